"""Extreme multi-label data: texts with some of very many labels, in the usual files of such sets.

`import_xmc` reads, block by block, a folder of the Extreme Classification Repository or one .jsonl
file (each file also as .gz):

- trn.json, tst.json: a JSON object a line with `uid`, `title`, `content`, `target_ind`, `target_rel`;
- or trn_X_Y.txt, tst_X_Y.txt, or train.txt, test.txt (see `llmlabel.xmc.files`), with the texts beside
  them in trn_X.txt or train_raw_texts.txt, one a line;
- lbl.json, labels.jsonl or Y.txt: the labels, numbered from 0 in their order;
- trn_filter_labels.txt or filter_labels_train.txt: `row label` a line, not to be learned or counted;
- a .jsonl of your own: `text`, `labels` (ids or names; null = unknown), and maybe `id` and `split`
  (default: all).

What must fit into memory: the labels (1 kB each while they are read), the pairs of the filter
files, 8 bytes a row, and a block.
"""

import json
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from jaxtyping import Int
from scipy.sparse import csr_array

from llmlabel.data import label_csr, require_columns, with_gold
from llmlabel.files import arrow_table, commit, known_encodings, write_text
from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.xmc import files
from llmlabel.xmc.read import SHORT, Row, find_parts, label_space, read_rows

_REPORT = "import.json"
_SOFT = ("label_ids", "label_probs", "label_space")
_IDS, _PROBS = List(Value("int32")), List(Value("float32"))


def import_xmc(
    source: Path,
    output: Path,
    *,
    labels: Path | None = None,
    aliases: Sequence[str] = ("aliases",),
    encoding: str | list[str] = "utf-8",
    block_rows: int = 10_000,
) -> Path:
    """Brings an extreme multi-label set into a folder that `xmc_rows` and `xmc_labels` read.

    No row is left out. What is odd (rows without labels or text, labels without rows, ...) is counted
    in `import.json` of the folder, beside what was done to the label space.

    Args:
        source: See the module.
        output: The folder; `import.json` comes last: without it the import is unfinished.
        labels: The label file, when it is not one of the usual ones in the folder: a .txt with one
            name a line, a .jsonl, or what `llmlabel.labelspace.sources.import_labels` reads. In a
            folder without any the labels are named by their numbers.
        aliases: Fields of a .jsonl of labels with other names; these go into the description.
        encoding: What the bytes of texts mean; of several, each line takes the first that fits.
        block_rows: Rows that are held in memory at a time.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: There are no files with rows.
        ValueError: A file is broken; the error names it, the line, the value and the way out.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1; got {block_rows}")
    encodings = known_encodings([encoding] if isinstance(encoding, str) else encoding)
    if broad := [name for name in encodings if "\n".encode(name) != b"\n"]:
        raise ValueError(f"encoding={broad[0]!r} has no plain line ends; save the files as UTF-8")
    parts = find_parts(source)
    cleaning = label_space(source, labels, parts, aliases, encodings)
    space = cleaning.labels
    rows = chain.from_iterable(read_rows(part, space, encodings) for part in parts)
    output.mkdir(parents=True, exist_ok=True)
    written: dict[str, _Writer] = {}
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output) as temporary:
        with ExitStack() as opened:
            for row in rows:
                if row.split not in written:
                    file = Path(temporary) / f"{row.split}.arrow"
                    writer = _Writer(file, space, block_rows, excluded=row.excluded is not None)
                    written[row.split] = opened.enter_context(writer)
                written[row.split].add(row)
        if not written:
            raise ValueError(f"{source}: there are no rows; give files with at least one")
        for name, writer in written.items():
            writer.check(source, name)
        (output / _REPORT).unlink(missing_ok=True)
        for name, writer in written.items():
            commit(output / f"{name}.arrow", writer.file.replace)
    save_labels(space, output / "labels.json")
    first = written.get("train", next(iter(written.values())))
    told = {
        "labels": len(space),
        "labels_without_rows": first.label_rows.count(0),
        "changes": cleaning.summary().splitlines(),
        "parts": {name: writer.counts for name, writer in written.items()},
    }
    write_text(output / _REPORT, json.dumps(told, ensure_ascii=False, indent=1))
    return output


def xmc_rows(folder: Path, *, split: str | None = None) -> Dataset:
    """The rows of a split that `import_xmc` wrote (by default of the only one), left on the disk.

    They have `id`, `text` and `gold`; `excluded_ids` where there was a filter file; and `label_ids`,
    `label_probs` and `label_space` where not all relevances are 1.
    """
    parts = _report(folder)["parts"]
    name = next(iter(parts)) if split is None else split
    if name not in parts or (split is None and len(parts) > 1):
        raise ValueError(f"{folder}: split={split!r}, but the splits are {', '.join(parts)}")
    dataset: Dataset = Dataset.from_file(str(folder / f"{name}.arrow"))
    return dataset if parts[name]["graded"] else dataset.remove_columns(list(_SOFT))


def xmc_labels(folder: Path) -> LabelSpace:
    """The label space that `import_xmc` wrote; multi-label."""
    _report(folder)
    return load_labels(folder / "labels.json")


def excluded_pairs(dataset: Dataset) -> Int[np.ndarray, "pairs 2"]:
    """(row, label) of `excluded_ids`, for `llmlabel.metrics.ranking.without_pairs`."""
    return np.column_stack(_listed(dataset, "excluded_ids"))


def export_xmc(
    dataset: Dataset,
    labels: LabelSpace,
    output: Path,
    *,
    split: str = "train",
    relevance: bool = False,
    features: csr_array | None = None,
) -> Path:
    """Writes trn_X.txt, trn_X_Y.txt and Y.txt (tst_ for the test split), for other programs.

    Args:
        dataset: Rows with `text` and `gold`.
        labels: Their label space; line ends in names and texts become spaces.
        output: The folder.
        split: train or test.
        relevance: Writes soft labels as relevances instead of gold.
        features: Of each row; with them train.txt or test.txt is written too.

    Returns:
        `output`.

    Raises:
        ValueError: Gold of a row is unknown, which the files cannot say.
    """
    require_columns(dataset, "text", "gold")
    if split not in SHORT:
        raise ValueError(f"split must be one of {', '.join(SHORT)}; got {split!r}")
    if unknown := len(dataset) - len(with_gold(dataset)):
        raise ValueError(
            f"gold of {unknown} of {len(dataset)} rows is unknown; take them out (with_gold), as the "
            "files would say that they have no label"
        )
    gold = label_csr(dataset, labels)
    written = SoftLabels.from_dataset(dataset, labels).probs if relevance else gold
    texts = (row["text"] for row in dataset.select_columns(["text"]))
    files.write_texts(texts, output / f"{SHORT[split]}_X.txt")
    files.write_matrix(written, output / f"{SHORT[split]}_X_Y.txt")
    files.write_texts(labels.names, output / "Y.txt")
    if features is not None:
        files.write_matrix(features, output / f"{split}.txt", labels=gold)
    return output


def _report(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / _REPORT).read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder}: {_REPORT} is missing; give a folder of import_xmc that has finished"
        ) from None
    return found


def _listed(
    dataset: Dataset, column: str
) -> tuple[Int[np.ndarray, " listed"], Int[np.ndarray, " listed"]]:
    """Row and value of all that the lists of a column hold."""
    require_columns(dataset, column)
    rows, values, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for chunk in arrow_table(dataset.select_columns([column]))[column].chunks:
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        rows.append(np.repeat(np.arange(first, first + len(chunk)), lengths))
        values.append(chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
        first += len(chunk)
    return np.concatenate(rows), np.concatenate(values)


@dataclass
class _Writer:
    """The rows of one split on their way to an Arrow file, and what there is to tell of them."""

    file: Path
    space: LabelSpace
    block_rows: int
    excluded: bool

    def __post_init__(self) -> None:
        features = {"id": Value("string"), "text": Value("string"), "gold": _IDS}
        features |= {"excluded_ids": _IDS} if self.excluded else {}
        features |= {"label_ids": _IDS, "label_probs": _PROBS, "label_space": Value("string")}
        self.schema = Features(features).arrow_schema
        self.columns: list[list[Any]] = [[] for _ in features]
        self.hashes = array("q")
        self.label_rows = array("q", bytes(8 * len(self.space)))
        self.counts: dict[str, Any] = {
            "rows": 0,
            "labels": 0,
            "unknown_labels": 0,
            "without_labels": 0,
            "repeated_labels": 0,
            "without_text": 0,
            "without_features": 0,
            "graded": False,
        }

    def __enter__(self) -> "_Writer":
        self.stream = pa.ipc.new_stream(str(self.file), self.schema)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self.stream.close()

    def add(self, row: Row) -> None:
        """Takes a row; of a label that is there twice the higher relevance."""
        relevance: dict[int, float] = {}
        for label, value in zip(row.labels or (), row.relevance, strict=True):
            relevance[label] = max(value, relevance.get(label, 0.0))
        ordered = gold = sorted(relevance)
        if graded := any(value != 1 for value in relevance.values()):
            ordered = sorted(gold, key=lambda label: -relevance[label])
            gold = [label for label in gold if relevance[label] > 0]
        for label in gold:
            self.label_rows[label] += 1
        self.hashes.append(hash(row.id))
        counts = self.counts
        counts["rows"] += 1
        counts["labels"] += len(gold)
        counts["unknown_labels"] += row.labels is None
        counts["without_labels"] += row.labels is not None and not gold
        counts["repeated_labels"] += len(row.labels or ()) - len(relevance)
        counts["without_text"] += not row.text.strip()
        counts["without_features"] += not row.has_features
        counts["graded"] |= graded
        probs = [relevance[label] for label in ordered]
        known, *soft = (None, None, None) if row.labels is None else (gold, ordered, probs)
        values: list[Any] = [row.id, row.text, known, *([row.excluded] if self.excluded else [])]
        values += [*soft, self.space.fingerprint]
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)
        if len(self.columns[0]) == self.block_rows:
            self.flush()

    def flush(self) -> None:
        """Writes what is held."""
        arrays = [
            pa.array(c, field.type) for c, field in zip(self.columns, self.schema, strict=True)
        ]
        self.stream.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self.columns = [[] for _ in self.columns]

    def check(self, source: Path, split: str) -> None:
        """Raises a ValueError when two rows have the same id."""
        hashes = np.array(self.hashes)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        if not same.size:
            return
        first, second = (int(order[same[0] + step]) for step in (0, 1))
        id = Dataset.from_file(str(self.file))[first]["id"]
        raise ValueError(
            f"{source}: rows {first + 1} and {second + 1} of {split} have the same id {id!r}; make "
            "ids unique"
        )
