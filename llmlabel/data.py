"""The table: a `datasets.Dataset` whose column names are a contract between all steps.

`llmlabel.columns` says what each name means. A step declares what it reads with `require_columns`,
adds columns with `with_columns`, drops none, and keeps the order of the rows and every column of the
user's. Rows are joined by `id`. What a step computes row by row goes through `llmlabel.blocks`, so
that a crash loses at most the block in work.
"""

import difflib
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from jaxtyping import Bool, Int
from scipy.sparse import csr_array

from llmlabel.columns import ADDED_BY, COLUMNS, READABLE
from llmlabel.files import (
    arrow_table,
    commit,
    even_chunks,
    in_memory,
    known_encodings,
    read_parquet_table,
    read_table,
    write_rows,
)
from llmlabel.labelspace import LabelSpace


def load(
    path: str | Path,
    *,
    text: str = "text",
    id: str = "id",
    gold: str | None = None,
    labels: LabelSpace | None = None,
    encoding: str | list[str] = "utf-8",
) -> Dataset:
    """Reads texts into a table with `id` and `text`, and with `gold` when asked for.

    Args:
        path: A .csv, .tsv, .jsonl or .ndjson file (each also .gz) or a .parquet file; a folder that
            `Dataset.save_to_disk` wrote; a folder with one sub-folder of .txt files a class (their
            names become the column `label`); any of these inside an installed package, as
            `package:NAME/inner/path`; else a dataset of the hub, as `owner/name` or
            `owner/name:split` (default split: train).
        text: Name of the column with the texts; null becomes "".
        id: Name of the column with the keys; without a column `id` it is the row number from 0.
        gold: Name of the column with the true label of a row, or a list of them, as ids or names;
            an empty list means none of the labels, null and "" that nobody knows.
        labels: The label space that `gold` refers to.
        encoding: What the file's bytes mean; of several, each row takes the first that fits.

    Raises:
        FileNotFoundError: Nothing is there, here or on the hub.
        ValueError: The content is broken, has no rows, or lacks a column that was named.
    """
    if gold is not None and labels is None:
        raise ValueError(f"gold={gold!r} needs labels=, the label space that it refers to")
    if gold is None and labels is not None:
        raise ValueError("labels= is given without gold=; name the column with the true labels")
    encodings = known_encodings([encoding] if isinstance(encoding, str) else encoding)
    try:
        table = read_table(str(path), encodings)
        if table.num_rows == 0:
            raise ValueError("there are no rows; give a file with at least one")
        table = _placed(table, "text", _texts(table, text), source=text)
        table = _placed(table, "id", _ids(table, id), source=id)
        if gold is not None and labels is not None:
            table = _placed(table, "gold", _golds(table, gold, labels), source=gold)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return in_memory(table)


def read_parquet(path: Path) -> Dataset:
    """The dataset that `save` wrote to a .parquet file, without the cache of `datasets`."""
    try:
        return in_memory(read_parquet_table(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ----------------------------------------------------------------------- the contract columns


def _placed(table: pa.Table, name: str, column: Any, *, source: str) -> pa.Table:
    """The table with `column`, made from the user's column `source`, under the contract's `name`."""
    if name not in table.column_names:
        return table.append_column(name, column)
    position = table.column_names.index(name)
    if name != source and table[name].to_pylist() != column.to_pylist():
        raise ValueError(
            f"the column {source!r} is to become {name!r}, but another column {name!r} is there "
            f"already; rename that one"
        )
    return table.set_column(position, name, column)


def _column(table: pa.Table, name: str, argument: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table[name]
    close = difflib.get_close_matches(name, table.column_names, n=1)
    hint = f"did you mean {argument}={close[0]!r}?" if close else f"say which with {argument}=NAME."
    raise ValueError(
        f"there is no column {name!r}; {hint} The columns are {', '.join(table.column_names)}"
    )


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = _column(table, name, "text")
    if not re.fullmatch(rf"{READABLE['string']}|null", str(column.type)):
        row = pc.index(column.is_valid(), True).as_py()
        value = column[row].as_py()
        raise ValueError(
            f"data row {row + 1}: {name!r} is the {type(value).__name__} {value!r}, not text; name "
            "the column with the texts, or write the values as strings"
        )
    return column.cast(pa.string()).fill_null("")


def _ids(table: pa.Table, name: str) -> pa.Array:
    if name == "id" and name not in table.column_names:
        return pa.array([str(row) for row in range(table.num_rows)])
    ids = ["" if id is None else str(id) for id in _column(table, name, "id").to_pylist()]
    first: dict[str, int] = {}
    for row, id in enumerate(ids, start=1):
        if not id:
            raise ValueError(f"data row {row} has an empty id (column {name!r}); give it one")
        if first.setdefault(id, row) != row:
            raise ValueError(
                f"data rows {first[id]} and {row} have the same id {id!r} (column {name!r}); make "
                "ids unique, or name another column with id="
            )
    return pa.array(ids, pa.string())


def _golds(table: pa.Table, name: str, labels: LabelSpace) -> pa.Array:
    values = _column(table, name, "gold").to_pylist()
    feature = Features.from_arrow_schema(table.schema)[name]
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    golds: list[list[int] | None] = []
    for id, value in zip(table["id"].to_pylist(), values, strict=True):
        if value is None or value == "" or (isinstance(inner, ClassLabel) and value == -1):
            golds.append(None)
            continue
        given = value if isinstance(value, list) else [value]
        if isinstance(inner, ClassLabel):  # the hub's way: numbers in the file, names beside it
            given = [inner.names[number] for number in given if number >= 0]
        try:
            golds.append(list(dict.fromkeys(label_position(label, labels) for label in given)))
        except ValueError as error:
            raise ValueError(f"row with id {id!r}, column {name!r}: {error}") from None
    return pa.array(golds, pa.list_(pa.int32()))


def label_position(label: Any, labels: LabelSpace) -> int:
    """The position of a label given by its id or name; anything but a string is refused."""
    if not isinstance(label, str):
        raise ValueError(f"the {type(label).__name__} {label!r} is no id or name of a label")
    return labels.index(label)


def require_columns(dataset: Dataset, *names: str) -> None:
    """Raises a ValueError that names the first column that is missing, and what would add it.

    Also refuses a column that has one of the names in `COLUMNS` and holds something else.
    """
    for name in names:
        if name not in dataset.column_names:
            way_out = f"; {ADDED_BY[name]}" if name in ADDED_BY else ""
            raise ValueError(
                f"the column {name!r} is missing; there are {', '.join(dataset.column_names)}"
                f"{way_out}"
            )
        if kind := _unreadable(dataset, name):
            raise ValueError(
                f"the column {name!r} holds {kind}, but the name means {COLUMNS[name]}; rename it "
                "or write that (a .csv turns lists into text, .jsonl and .parquet keep them)"
            )


def _unreadable(dataset: Dataset, name: str) -> str | None:
    """The Arrow type of a column that is not what `COLUMNS` says; ids may be anything."""
    kind = str(dataset.features.arrow_schema.field(name).type)
    if name == "text" and dataset.data.column(name).null_count and None in dataset[name][:]:
        return "nulls"  # counted first, because that is cheap, though rows not selected count too
    if name == "id" or name not in COLUMNS or kind == "null":
        return None
    meant = COLUMNS[name].partition(":")[0].removesuffix(" or null")
    return None if re.fullmatch(READABLE[meant], kind) else kind


def with_columns(dataset: Dataset, columns: dict[str, tuple[Any, Any]]) -> Dataset:
    """Adds columns, or replaces them in place.

    Args:
        dataset: The rows.
        columns: Name -> (values, datasets feature); values as a list, or a NumPy or Arrow array.
    """
    table = arrow_table(dataset)
    features = Features({**dataset.features, **{name: f for name, (_, f) in columns.items()}})
    schema = features.arrow_schema
    for name, (values, _) in columns.items():
        if len(values) != len(dataset):
            raise ValueError(f"column {name!r} has {len(values)} values for {len(dataset)} rows")
        field = schema.field(name)
        is_arrow = isinstance(values, pa.Array | pa.ChunkedArray)
        column = values.cast(field.type) if is_arrow else pa.array(values, field.type)
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), field, column)
        else:
            table = table.append_column(field, column)
    return in_memory(table.replace_schema_metadata(schema.metadata))


def with_gold(dataset: Dataset) -> Dataset:
    """The rows whose true labels are known; an empty list is known to be none of the labels."""
    require_columns(dataset, "gold")
    known = arrow_table(dataset.select_columns(["gold"]))["gold"].is_valid()
    return dataset.select(np.flatnonzero(known.to_numpy()))


def gold_index(dataset: Dataset, labels: LabelSpace) -> Int[np.ndarray, " rows"]:
    """The true label of each row, -1 where there is none or nobody knows; several are an error."""
    rows, values = _golds_given(dataset, labels)
    if (several := np.flatnonzero(np.diff(rows) == 0)).size:
        row = dataset[int(rows[several[0]])]
        raise ValueError(
            f"row with id {row.get('id')!r} has the gold labels {row['gold']}; multi-label rows "
            "have no single true label"
        )
    index = np.full(len(dataset), -1, dtype=np.int64)
    index[rows] = values
    return index


def gold_matrix(dataset: Dataset, labels: LabelSpace) -> Bool[np.ndarray, "rows labels"]:
    """Whether each label is true for each row."""
    rows, values = _golds_given(dataset, labels)
    matrix = np.zeros((len(dataset), len(labels)), dtype=bool)
    matrix[rows, values] = True
    return matrix


def label_csr(dataset: Dataset, labels: LabelSpace, *, column: str = "gold") -> csr_array:
    """The labels that a column lists for each row, as ones of shape (rows, labels)."""
    rows, values = _golds_given(dataset, labels, column)
    found = csr_array((np.ones(len(rows)), (rows, values)), shape=(len(dataset), len(labels)))
    found.data[:] = 1.0  # a label that is listed twice
    return found


def _golds_given(
    dataset: Dataset, labels: LabelSpace, column: str = "gold"
) -> tuple[Int[np.ndarray, " golds"], Int[np.ndarray, " golds"]]:
    """Row and label of every label listed, by row."""
    require_columns(dataset, column)
    lists = arrow_table(dataset.select_columns([column]))[column].combine_chunks()
    lists = lists.cast(pa.list_(pa.int64()))
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(dataset)), lengths.astype(np.int64))
    values = lists.flatten().fill_null(-1).to_numpy(zero_copy_only=False)
    if (outside := np.flatnonzero((values < 0) | (values >= len(labels)))).size:
        id = dataset[int(rows[outside[0]])].get("id")
        raise ValueError(
            f"row with id {id!r} has the {column} label {values[outside[0]]}, but there are only "
            f"{len(labels)} labels; load {column} with this label space"
        )
    return rows, values


# ------------------------------------------------------------------------- choosing and joining


def first_words(dataset: Dataset, *, words: int) -> Dataset:
    """Cuts every text down to its first `words` words, which are joined by one space each."""
    if words < 1:
        raise ValueError(f"words must be at least 1, the number of words to keep; got {words}")
    require_columns(dataset, "text")
    texts = [" ".join(text.split(maxsplit=words)[:words]) for text in dataset["text"][:]]
    return with_columns(dataset, {"text": (texts, Value("string"))})


def split(dataset: Dataset, *, shares: dict[str, float], seed: int = 0) -> Dataset:
    """Adds the column `split`, drawn by the shares from a hash of the seed and the text.

    The order and the number of rows do not matter, and texts that differ only in case, punctuation
    and white space always land together, so that no copy of a test row is ever trained on.
    """
    if "" in shares or not all(share > 0 for share in shares.values()):
        raise ValueError(f"shares must have names, and values above 0; got {shares}")
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1; {shares} sum to {sum(shares.values()):g}")
    if "split" in dataset.column_names:
        raise ValueError("there is a column 'split' already; use it with part, or rename it first")
    require_columns(dataset, "text")
    bounds = np.cumsum(list(shares.values()))[:-1]
    points = [_point(text, seed) for text in dataset["text"][:]]
    chosen = np.array(list(shares))[np.searchsorted(bounds, points, side="right")]
    return with_columns(dataset, {"split": (chosen.tolist(), Value("string"))})


def plain_words(text: str) -> str:
    """The words of a text without case and punctuation; texts with equal ones count as repeats."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def _point(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the words of the text."""
    content = f"{seed}:{plain_words(text)}"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6]) / 2**48


def part(dataset: Dataset, *, split: str | list[str]) -> Dataset:
    """The rows of one split, or of several, in the order of the dataset."""
    require_columns(dataset, "split")
    wanted = [split] if isinstance(split, str) else split
    splits = dataset["split"][:]
    counts = Counter(splits)
    for name in wanted:
        if name not in counts:
            raise ValueError(f"there is no split {name!r}; the splits and rows are {dict(counts)}")
    rows = [row for row, name in enumerate(splits) if name in wanted]
    return in_memory(arrow_table(dataset.select(rows)))


def join(left: Dataset, right: Dataset, *, columns: list[str]) -> Dataset:
    """Adds these columns of `right` to the rows of `left` with the same id."""
    require_columns(left, "id")
    require_columns(right, "id", *columns)
    if there := [name for name in columns if name in left.column_names]:
        raise ValueError(f"the column {there[0]!r} is in both; rename it in one of them first")
    left_ids, right_ids = left["id"][:], right["id"][:]
    position = {id: row for row, id in enumerate(right_ids)}
    if len(position) < len(right_ids):
        id = Counter(right_ids).most_common(1)[0][0]
        raise ValueError(f"the id {id!r} is there more than once in the rows to join; remove one")
    missing = [id for id in left_ids if id not in position]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(left)} ids have no row to join, the first are {missing[:3]}; "
            "both tables must come from the same texts"
        )
    rows = arrow_table(right.select_columns(columns).select([position[id] for id in left_ids]))
    return with_columns(left, {name: (rows[name], right.features[name]) for name in columns})


def rows_of(dataset: Dataset, other: Dataset, name: str) -> Dataset:
    """The rows of `other`, which errors call `name`, with the ids of `dataset`, in its order.

    Raises:
        ValueError: `other` lacks an id, or has one that is asked for or not more than once.
    """
    require_columns(dataset, "id")
    require_columns(other, "id")
    ids, theirs = dataset["id"][:], other["id"][:]
    position = {id: row for row, id in enumerate(theirs)}
    if len(position) < len(theirs):
        id = Counter(theirs).most_common(1)[0][0]
        raise ValueError(f"the id {id!r} is more than once in {name}; remove one")
    if absent := [id for id in ids if id not in position]:
        raise ValueError(f"the row with id {absent[0]!r} is not in {name}; add it there too")
    return other.select([position[id] for id in ids])


def save(dataset: Dataset, output: Path) -> Path:
    """Writes .parquet (exact, same bytes for same rows), .jsonl, .csv, .tsv, or a folder.

    CSV and TSV hold lists as JSON; a folder, named without a suffix, is read by `load_from_disk`.

    Returns:
        `output`.
    """
    match output.suffix.lower():
        case ".parquet":
            table = even_chunks(arrow_table(dataset))  # so that the pages depend on rows alone
            commit(output, lambda temporary: pq.write_table(table, temporary))
        case ".jsonl" | ".ndjson" | ".csv" | ".tsv":
            commit(output, lambda temporary: write_rows(dataset, temporary))
        case "":
            if output.is_dir() and any(output.iterdir()) and not (output / "state.json").is_file():
                raise ValueError(f"{output}: the folder holds other things; give a new folder")
            commit(output, lambda temporary: dataset.save_to_disk(str(temporary)))
        case suffix:
            raise ValueError(
                f"{output}: cannot save as {suffix!r}; use .parquet, .jsonl, .csv, .tsv or a folder "
                "without a suffix"
            )
    return output
