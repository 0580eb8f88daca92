"""The table: a `datasets.Dataset` whose column names are a contract between all steps.

`COLUMNS` says what each name means. A step declares what it reads with `require_columns`, adds
columns with `with_columns`, drops none, and keeps the order of the rows and every column of the
user's. Rows are joined by `id`. What a step computes row by row goes through `map_blocks`, every
file is written by `commit`: a crash at any moment loses at most the block in work.
"""

import codecs
import csv
import difflib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from datasets.table import InMemoryTable
from jaxtyping import Bool, Int

from llmlabel import progress
from llmlabel.labelspace import LabelSpace
from llmlabel.models import local_path

COLUMNS: dict[str, str] = {
    "id": "string: key of the row, unique, survives every step",
    "text": "string: the input",
    "gold": "list<int32>: positions of the true labels; empty = none of these",
    "label_ids": "list<int32>: positions of the labels of a soft label, most probable first",
    "label_probs": "list<float32>: their probabilities; what is missing to 1 is unknown",
    "label_mass": "float32: probability that the model answered inside the label set",
    "label_space": "string: fingerprint of the LabelSpace that label_ids refers to",
    "votes": "list<struct<source, label_id, prob>>: engines, prompts, samples or people",
    "reply": "string or null: what the model said",
    "error": "string or null: why the row could not be read, or what was done to its text",
    "engine": "string: who labelled the row",
    "prompt_sha": "string: hash of the prompt file",
    "weight": "float32: training weight",
    "set_ids": "list<int32>: positions of the labels of the prediction set",
    "split": "string: the part of the data that the row belongs to",
}

_ADDED_BY = {
    "id": "llmlabel.data.load adds it",
    "text": "llmlabel.data.load(..., text=COLUMN) adds it",
    "gold": "llmlabel.data.load(..., gold=COLUMN, labels=LABELS) adds it",
    **dict.fromkeys(
        ("label_ids", "label_probs", "label_space"),
        "a labeler such as llmlabel.label.direct.label_direct adds it",
    ),
    "label_mass": "llmlabel.label.direct.label_direct adds it",
    "set_ids": "llmlabel.calibrate.conformal.predict_sets adds it",
    "split": "llmlabel.data.split adds it",
}

_FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson")
_KNOWN = ".csv, .tsv, .jsonl, .ndjson (each also with .gz), .parquet, or a folder"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")
_MAX_FIELD = 2**31 - 1  # characters in a CSV field; the default of the csv module is 131,072


# ---------------------------------------------------------------------------------- reading


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
            null, "" and an empty list all mean none of the labels.
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
    encodings = _encodings([encoding] if isinstance(encoding, str) else encoding)
    try:
        table = _read(str(path), encodings)
        if table.num_rows == 0:
            raise ValueError("there are no rows; give a file with at least one")
        table = _placed(table, "text", _texts(table, text), source=text)
        table = _placed(table, "id", _ids(table, id), source=id)
        if gold is not None and labels is not None:
            table = _placed(table, "gold", _golds(table, gold, labels), source=gold)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Dataset(InMemoryTable(table))


def read_parquet(path: Path) -> Dataset:
    """The dataset that `save` wrote to a .parquet file, without the cache of `datasets`."""
    try:
        return Dataset(InMemoryTable(_parquet_table(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def arrow_table(dataset: Dataset) -> pa.Table:
    """The rows of a dataset in their order; after a select, `dataset.data` holds the old ones."""
    # In blocks: gathering selected rows costs one slice a row, too much memory for all at once.
    blocks = dataset.with_format("arrow").iter(batch_size=10_000)
    tables = [block.combine_chunks() for block in blocks]
    schema = dataset.features.arrow_schema
    return pa.concat_tables([schema.empty_table(), *tables]).replace_schema_metadata(
        schema.metadata
    )


def _encodings(names: list[str]) -> list[str]:
    if not names:
        raise ValueError("encoding=[] is empty; try utf-8")
    for name in names:
        try:
            by_line = _keeps_line_ends(name)
        except LookupError:
            raise ValueError(f"encoding={name!r} is unknown; try utf-8 or cp1252") from None
        if len(names) > 1 and not by_line:
            raise ValueError(f"encoding={name!r} cannot be mixed with others; give it alone")
    return names


def _keeps_line_ends(encoding: str) -> bool:
    """Whether bytes can be cut into lines before they are decoded; not so in UTF-16."""
    return "a\n".encode(encoding).endswith(b"a\n")


def _read(path: str, encodings: list[str]) -> pa.Table:
    place = local_path(path)
    if place is None:
        return _read_hub(path)
    if place.is_dir():
        return _read_folder(place, encodings)
    name = place.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet"):
        return _parquet_table(place)
    if suffix not in _FILE_TYPES:
        raise ValueError(f"unknown file type {place.suffix!r}; known are {_KNOWN}")
    raw = place.read_bytes()
    if name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"not a whole .gz file ({error}); copy or download it again") from None
    if not _keeps_line_ends(encodings[0]):
        raw, encodings = _decode(raw, encodings, "the file").encode(), ["utf-8"]
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if suffix in (".csv", ".tsv"):
        return _read_csv(raw, encodings, "," if suffix == ".csv" else "\t")
    return _read_jsonl(raw, encodings)


def _decode(raw: bytes, encodings: list[str], where: str) -> str:
    failure = None
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError as error:
            failure = failure or error
    assert failure is not None
    tried = " or ".join(encodings)
    raise ValueError(
        f"{where}: the byte 0x{raw[failure.start]:02x} at byte offset {failure.start} is not "
        f"{tried}; say what it is, for example encoding: [utf-8, cp1252]"
    )


def _read_csv(raw: bytes, encodings: list[str], delimiter: str) -> pa.Table:
    rows: list[list[str]] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(raw.splitlines(keepends=True), start=1):
            where = f"data row {len(rows)}" if rows else "the header"
            yield _decode(line, encodings, f"{where}, line {number}")

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(_MAX_FIELD)
    line = 1  # where the row in work begins
    try:
        for row in reader:
            if rows and row and len(row) != len(rows[0]):
                raise ValueError(
                    f"line {line} (data row {len(rows)}) has {len(row)} fields, the header has "
                    f"{len(rows[0])}; put a field that holds {delimiter!r} in double quotes"
                )
            if row:
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"the row that begins in line {line} is broken: {error}; put a field with quotes in "
            "double quotes, and write each quote inside it twice"
        ) from None
    finally:
        csv.field_size_limit(limit)
    header, *rows = rows or [[]]
    for name, count in Counter(header).items():
        if count > 1:
            raise ValueError(f"the header has the column {name!r} {count} times; rename one")
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return _table(dict(zip(header, columns, strict=True)))


def _read_jsonl(raw: bytes, encodings: list[str]) -> pa.Table:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(raw.split(b"\n"), start=1):  # U+2028 is no end of a line
        if not line.strip():
            continue
        content = _decode(line, encodings, f"data row {len(records) + 1}, line {number}")
        try:
            record = json.loads(content)
            if "\\u" in content:  # half of a surrogate pair is no text that Arrow could hold
                whole = json.dumps(record, ensure_ascii=False)
                record = json.loads(re.sub("[\ud800-\udfff]", "\ufffd", whole))
        except ValueError as error:
            raise ValueError(
                f"line {number} is not JSON: {error}; write one object a line"
            ) from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ValueError(f"line {number} holds a {kind}; write one JSON object {{...}} a line")
        records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    return _table({name: [record.get(name) for record in records] for name in names})


def _table(columns: dict[str, Iterable[Any]]) -> pa.Table:
    arrays = {}
    for name, column in columns.items():
        values = list(column)
        try:
            array = pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            kinds: dict[str, int] = {}
            for row, value in enumerate(values, start=1):
                if value is not None:
                    kinds.setdefault(type(value).__name__, row)
            found = ", ".join(f"{kind} (data row {row})" for kind, row in kinds.items())
            raise ValueError(
                f"column {name!r} holds values that do not fit together: {found}; {error}; make "
                "all of one type"
            ) from None
        empty = pa.types.is_struct(array.type) and array.type.num_fields == 0
        arrays[name] = pa.nulls(len(values)) if empty else array  # no file format holds struct<>
    return pa.table(arrays)


def _parquet_table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)  # a folder `alpha=0.1` is no column
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"not a whole Parquet file: {_first_line(error)}") from None
    for position, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # pandas' categories, unknown to datasets
            table = table.set_column(
                position, field.name, table[position].cast(field.type.value_type)
            )
    return table


def _read_folder(folder: Path, encodings: list[str]) -> pa.Table:
    if (folder / "state.json").is_file():
        return arrow_table(datasets.load_from_disk(str(folder)))
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise ValueError(f"the folder holds the splits {splits}; load one, as {folder / splits[0]}")
    files = [
        file
        for file in folder.glob("*/*.txt")
        if not (file.name.startswith(".") or file.parent.name.startswith("."))
    ]
    if not files:
        raise ValueError(
            "the folder is neither a saved dataset (no state.json) nor a folder of class folders "
            "(no */*.txt)"
        )
    files.sort(key=lambda file: (file.parent.name, file.name))
    texts = [
        _decode(
            file.read_bytes().removeprefix(codecs.BOM_UTF8), encodings, f"data row {row}, {file}"
        )
        for row, file in enumerate(files, start=1)
    ]
    return _table(
        {
            "id": [f"{file.parent.name}/{file.stem}" for file in files],
            "text": texts,
            "label": [file.parent.name for file in files],
        }
    )


def _read_hub(path: str) -> pa.Table:
    name, _, split = path.partition(":")
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix in (*_FILE_TYPES, ".parquet") or not _HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"{path}: no such file or folder; known are {_KNOWN}")
    try:
        return arrow_table(datasets.load_dataset(name, split=split or "train"))
    except Exception as error:  # network, hub and file formats fail in many ways; all mean this:
        raise FileNotFoundError(
            f"{path}: no such file or folder here, and the hub did not give a dataset {name!r} "
            f"with a split {split or 'train'!r} ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


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
    hint = f"did you mean {argument}={close[0]!r}?" if close else f"say which with {argument}=NAME"
    raise ValueError(
        f"there is no column {name!r}; {hint} The columns are {', '.join(table.column_names)}"
    )


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = _column(table, name, "text")
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_string_view(kind) or pa.types.is_null(kind)):
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
    values = _column(table, name, "id").to_pylist()
    ids = ["" if value is None else str(value) for value in values]
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
    golds = []
    for id, value in zip(table["id"].to_pylist(), values, strict=True):
        given = value if isinstance(value, list) else [] if value in (None, "") else [value]
        if isinstance(inner, ClassLabel):  # the hub's way: numbers in the file, names beside it
            given = [inner.names[number] for number in given if number >= 0]
        try:
            golds.append(list(dict.fromkeys(_position(label, labels) for label in given)))
        except ValueError as error:
            raise ValueError(f"row with id {id!r}, column {name!r}: {error}") from None
    return pa.array(golds, pa.list_(pa.int32()))


def _position(label: Any, labels: LabelSpace) -> int:
    if not isinstance(label, str):
        raise ValueError(f"the {type(label).__name__} {label!r} is no id or name of a label")
    return labels.index(label)


def require_columns(dataset: Dataset, *names: str) -> None:
    """Raises a ValueError that names the first column that is missing, and what would add it."""
    for name in names:
        if name not in dataset.column_names:
            way_out = f"; {_ADDED_BY[name]}" if name in _ADDED_BY else ""
            raise ValueError(
                f"the column {name!r} is missing; there are {', '.join(dataset.column_names)}"
                f"{way_out}"
            )


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
    return Dataset(InMemoryTable(table.replace_schema_metadata(schema.metadata)))


def gold_index(dataset: Dataset) -> Int[np.ndarray, " rows"]:
    """The true label of each row, -1 where none of the labels is true.

    Raises:
        ValueError: A row has several.
    """
    lengths, values = _gold_lists(dataset)
    if (several := np.flatnonzero(lengths > 1)).size:
        row = dataset[int(several[0])]
        raise ValueError(
            f"row with id {row.get('id')!r} has the gold labels {row['gold']}; multi-label rows "
            "have no single true label"
        )
    index = np.full(len(dataset), -1, dtype=np.int64)
    index[lengths == 1] = values
    return index


def gold_matrix(dataset: Dataset, labels: LabelSpace) -> Bool[np.ndarray, "rows labels"]:
    """Whether each label is true for each row."""
    lengths, values = _gold_lists(dataset)
    rows = np.repeat(np.arange(len(dataset)), lengths)
    if (outside := np.flatnonzero((values < 0) | (values >= len(labels)))).size:
        row = dataset[int(rows[outside[0]])]
        raise ValueError(
            f"row with id {row.get('id')!r} has the gold label {values[outside[0]]}, but there are "
            f"only {len(labels)} labels; load gold with this label space"
        )
    matrix = np.zeros((len(dataset), len(labels)), dtype=bool)
    matrix[rows, values] = True
    return matrix


def _gold_lists(
    dataset: Dataset,
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " golds"]]:
    require_columns(dataset, "gold")
    lists = arrow_table(dataset.select_columns(["gold"]))["gold"].combine_chunks()
    lists = lists.cast(pa.list_(pa.int64()))
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), lists.flatten().to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------- choosing and joining


def first_words(dataset: Dataset, *, words: int) -> Dataset:
    """Cuts every text down to its first `words` words, which are joined by one space each."""
    if words < 1:
        raise ValueError(f"words must be at least 1, the number of words to keep; got {words}")
    require_columns(dataset, "text")
    texts = [" ".join(text.split(maxsplit=words)[:words]) for text in dataset["text"]]
    return with_columns(dataset, {"text": (texts, Value("string"))})


def split(dataset: Dataset, *, shares: dict[str, float], seed: int = 0) -> Dataset:
    """Adds the column `split`, drawn by the shares from a hash of the seed and the text.

    The order and the number of rows do not matter, and texts that differ only in case, punctuation
    and white space always land together, so that no copy of a test row is ever trained on.
    """
    if "" in shares or any(share <= 0 for share in shares.values()):
        raise ValueError(f"shares must have names, and values above 0; got {shares}")
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1; {shares} sum to {sum(shares.values()):g}")
    if "split" in dataset.column_names:
        raise ValueError("there is a column 'split' already; use it with part, or rename it first")
    require_columns(dataset, "text")
    bounds = np.cumsum(list(shares.values()))[:-1]
    points = [_point(text, seed) for text in dataset["text"]]
    chosen = np.searchsorted(bounds, points, side="right")
    names = list(shares)
    return with_columns(dataset, {"split": ([names[n] for n in chosen], Value("string"))})


def _point(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the words of the text."""
    words = re.sub(r"\W+", " ", text.lower()).strip()
    return int.from_bytes(hashlib.sha256(f"{seed}:{words}".encode()).digest()[:6]) / 2**48


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
    return Dataset(InMemoryTable(arrow_table(dataset.select(rows))))


def join(left: Dataset, right: Dataset, *, columns: list[str]) -> Dataset:
    """Adds these columns of `right` to the rows of `left` with the same id."""
    require_columns(left, "id")
    require_columns(right, "id", *columns)
    if there := [name for name in columns if name in left.column_names]:
        raise ValueError(f"the column {there[0]!r} is in both; rename it in one of them first")
    position = {id: row for row, id in enumerate(right["id"])}
    if len(position) < len(right):
        id = Counter(right["id"]).most_common(1)[0][0]
        raise ValueError(f"the id {id!r} is there more than once in the rows to join; remove one")
    missing = [id for id in left["id"] if id not in position]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(left)} ids have no row to join, the first are {missing[:3]}; "
            "both tables must come from the same texts"
        )
    rows = arrow_table(right.select([position[id] for id in left["id"]]))
    return with_columns(left, {name: (rows[name], right.features[name]) for name in columns})


# -------------------------------------------------------------------------------------- writing


def commit(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that at any moment the whole old or the whole new one is there.

    `write` gets a temporary path in the same folder, with the same suffix, and creates it. It may
    also be a folder; between an old folder and the new one there is a moment with neither.

    Raises:
        OSError: The disk is full, among other reasons; the temporary path is gone then.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        for written in [*temporary.rglob("*"), temporary]:
            _fsync(written)
        if path.is_dir():
            old = path.replace(path.with_name(f".old-{os.getpid()}-{path.name}"))
            temporary.replace(path)
            _remove(old)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk is full, so {path} was not written; everything committed before it is "
                "kept: free some space and run the same command again",
            ) from error
        raise
    finally:
        _remove(temporary)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(dataset: Dataset, path: Path) -> None:
    """Writes .parquet (exact, same bytes for same rows), .jsonl, .csv, .tsv, or a folder.

    CSV and TSV hold lists as JSON; a folder, named without a suffix, is read by `load_from_disk`.
    """
    match path.suffix.lower():
        case ".parquet":
            # One chunk a column: the pages of the file then depend on the rows alone.
            table = arrow_table(dataset).combine_chunks()
            commit(path, lambda temporary: pq.write_table(table, temporary))
        case ".jsonl" | ".ndjson":
            commit(path, lambda temporary: _write_jsonl(dataset, temporary))
        case ".csv" | ".tsv":
            commit(path, lambda temporary: _write_csv(dataset, temporary))
        case "":
            if path.is_dir() and any(path.iterdir()) and not (path / "state.json").is_file():
                raise ValueError(f"{path}: the folder holds other things; give a new folder")
            commit(path, lambda temporary: dataset.save_to_disk(str(temporary)))
        case suffix:
            raise ValueError(
                f"{path}: cannot save as {suffix!r}; use .parquet, .jsonl, .csv, .tsv or a folder "
                "without a suffix"
            )


def _records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in arrow_table(dataset).to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _write_jsonl(dataset: Dataset, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for record in _records(dataset):
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _write_csv(dataset: Dataset, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        writer.writerow(dataset.column_names)
        for record in _records(dataset):
            writer.writerow(
                json.dumps(value, ensure_ascii=False, default=str)
                if isinstance(value, list | dict)
                else value
                for value in record.values()
            )


def map_blocks(
    dataset: Dataset,
    compute: Callable[[Dataset], dict[str, Any]],
    *,
    output: Path | None,
    key: str,
    block_rows: int = 256,
    name: str = "rows",
) -> pa.Table:
    """Computes columns in blocks of rows, each of which is kept as soon as it is done.

    The same call after a crash, or with more rows at the end, computes only what is missing.

    Args:
        dataset: Rows with `id` and `text`.
        compute: Block -> columns (lists or Arrow arrays) with a value for each of its rows.
        output: Blocks are kept in its sub-folder `blocks`; None keeps nothing.
        key: Stands for everything but ids and texts that the result depends on; another key means
            other blocks.
        block_rows: Rows in a block.
        name: What the progress display calls this task.
    """
    require_columns(dataset, "id", "text")
    if not len(dataset):
        raise ValueError(f"{name}: there are no rows to work on")
    tables = []
    with progress.task(name, total=len(dataset)) as advance:
        for start in range(0, len(dataset), block_rows):
            block = dataset.select(range(start, min(start + block_rows, len(dataset))))
            content = json.dumps([key, block["id"][:], block["text"][:]])
            digest = hashlib.sha256(content.encode()).hexdigest()[:24]
            file = None if output is None else output / "blocks" / f"{digest}.parquet"
            table = None if file is None else _kept_block(file, len(block))
            if table is None:
                table = _computed_block(block, compute, name)
                if file is not None:
                    _commit_table(file, table)
            tables.append(table)
            advance(len(block))
    return pa.concat_tables(tables, promote_options="permissive")


def _kept_block(file: Path, rows: int) -> pa.Table | None:
    try:
        table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException):  # not there, or damaged: computed again
        return None
    return table if table.num_rows == rows else None


def _computed_block(
    block: Dataset, compute: Callable[[Dataset], dict[str, Any]], name: str
) -> pa.Table:
    columns = compute(block)
    for column, values in columns.items():
        if len(values) != len(block):
            raise ValueError(
                f"{name}: {len(values)} values of {column!r} were computed for a block of "
                f"{len(block)} rows that begins with id {block[0]['id']!r}; rows in = rows out"
            )
    return pa.table(columns)


def _commit_table(file: Path, table: pa.Table) -> None:
    commit(file, lambda temporary: pq.write_table(table, temporary))
