"""The files of the Extreme Classification Repository: sparse matrices, pairs and texts, line by line.

A matrix begins with a line `rows columns` and has `column:value ...` a row; a sparse data file begins
with `rows features labels` and has `label,label feature:value ...` a row. Numbers begin at 0, and a
row may be empty. Each file may be compressed as .gz, when it is read. Only a line feed ends a line.
"""

import codecs
import gzip
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel import progress
from llmlabel.files import commit

_PAIR = rb"\d+:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PAIRS = re.compile(rb"(?:%s(?:\s+%s)*)?" % (_PAIR, _PAIR))
_NUMBERS = re.compile(rb"\d+(?:,\d+)*")
_BLOCK_LINES = 1000


class Header(NamedTuple):
    """The first line of a matrix or of a sparse data file, whose `features` are not None."""

    rows: int
    features: int | None
    columns: int
    """Labels in a sparse data file."""


def lines(path: Path, *, told: bool = False) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line; with `told` the progress in the file is shown."""
    size, packed = path.stat().st_size, path.name.lower().endswith(".gz")
    with (
        path.open("rb") as raw,
        gzip.open(raw) if packed else nullcontext(raw) as file,
        progress.task(f"read {path.name}", size, "bytes") if told else nullcontext() as advance,
    ):
        done = 0
        try:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                yield number, content.removesuffix(b"\n").removesuffix(b"\r")
                if advance is not None and number % 10_000 == 0:
                    advance(raw.tell() - done)
                    done = raw.tell()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: not a whole .gz file ({error}); copy or download it again"
            ) from None
        if advance is not None:
            advance(size - done)


def header(path: Path) -> Header:
    """What the first line says."""
    first = next(lines(path), (1, b""))[1]
    parts = first.split()
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise ValueError(
            f"{path}: line 1: {shown(first)} is no header; put `rows labels` in front, or `rows "
            "features labels` where a line has both"
        )
    numbers = [int(part) for part in parts]
    return Header(numbers[0], numbers[1] if len(parts) == 3 else None, numbers[-1])


def matrix_lines(path: Path, *, told: bool = False) -> Iterator[tuple[int, bytes]]:
    """The line of each row, after the header, which says how many there are."""
    rows, found = header(path).rows, 0
    for number, line in islice(lines(path, told=told), 1, None):
        if found < rows:
            yield number, line
            found += 1
        elif line.strip():
            raise ValueError(
                f"{path}: line {number}: {shown(line)} is after the {rows} rows that line 1 says; "
                "mend line 1 or take it out"
            )
    if found < rows:
        raise ValueError(
            f"{path}: line 1 says {rows} rows, but there are only {found}; copy the file again, or "
            "mend line 1"
        )


def labels_and_features(line: bytes, where: str) -> tuple[list[int], bytes]:
    """The labels of a row of a sparse data file, and `feature:value ...`."""
    parts = line.split(maxsplit=1)
    if not parts or b":" in parts[0]:
        return [], line.strip()
    if not _NUMBERS.fullmatch(parts[0]):
        raise ValueError(f"{where}: {shown(parts[0])} is no list of labels, as in `3,12`")
    return [int(part) for part in parts[0].split(b",")], parts[1].strip() if parts[1:] else b""


def relevances(line: bytes, where: str) -> tuple[list[int], list[float]]:
    """The labels of a row of a label matrix, and how relevant each is."""
    text = line.strip()
    _refuse_other_than_pairs(text, where)
    pairs = [pair.split(b":") for pair in text.split()]
    return [int(label) for label, _ in pairs], [float(value) for _, value in pairs]


def _refuse_other_than_pairs(text: bytes, where: str) -> None:
    if not _PAIRS.fullmatch(text):
        wrong = next((part for part in text.split() if not _PAIRS.fullmatch(part)), text)
        raise ValueError(f"{where}: {shown(wrong)} is not number:value, as in `12:0.5`")


def shown(raw: bytes) -> str:
    """The beginning of what a file says, for an error."""
    text = raw[:40].decode("utf-8", "replace")
    return repr(text if len(raw) <= 40 else f"{text}...")


# --------------------------------------------------------------------------------- whole matrices


def read_features(path: Path) -> csr_array:
    """The features of a sparse data file, or of a matrix `rows features`; float32, in memory."""
    told = header(path)
    width = told.columns if told.features is None else told.features
    return _matrix(path, width, labels=False)


def read_label_matrix(path: Path) -> csr_array:
    """The relevances of a matrix `rows labels`, or 1 for the labels of a sparse data file."""
    return _matrix(path, header(path).columns, labels=True)


def read_pairs(path: Path) -> Int[np.ndarray, "pairs 2"]:
    """The pairs of a file with `row label` a line, such as trn_filter_labels.txt."""
    pairs = array("q")
    for number, line in lines(path):
        parts = line.split()
        if parts and not (len(parts) == 2 and all(part.isdigit() for part in parts)):
            raise ValueError(
                f"{path}: line {number}: {shown(line)} is not `row label`, as in `7 12`"
            )
        pairs.extend(map(int, parts))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _matrix(path: Path, width: int, *, labels: bool) -> csr_array:
    sparse = header(path).features is not None
    rows = matrix_lines(path, told=True)
    counts, ids, values = (
        [np.zeros(1, np.int64)],
        [np.zeros(0, np.int32)],
        [np.zeros(0, np.float32)],
    )
    while block := list(islice(rows, _BLOCK_LINES)):
        texts = []
        for number, line in block:
            where, text = f"{path}: line {number}", line.strip()
            if sparse:
                own, text = labels_and_features(line, where)
                text = b" ".join(b"%d:1" % label for label in own) if labels else text
            _refuse_other_than_pairs(text, where)
            texts.append(text)
        joined = b" ".join(filter(None, texts))  # numpy reads blanks alone as one number
        numbers = np.fromstring(joined.replace(b":", b" "), sep=" ")
        stored = np.array([text.count(b":") for text in texts])
        lines_of = np.repeat([number for number, _ in block], stored)
        _refuse_bad(path, lines_of, numbers[::2], numbers[1::2], width)
        counts.append(stored)
        ids.append(numbers[::2].astype(np.int32))
        values.append(numbers[1::2].astype(np.float32))
    indptr = np.cumsum(np.concatenate(counts))
    shape = (len(indptr) - 1, width)
    return csr_array((np.concatenate(values), np.concatenate(ids), indptr), shape=shape)


def _refuse_bad(
    path: Path,
    lines_of: Int[np.ndarray, " stored"],
    ids: Float[np.ndarray, " stored"],
    values: Float[np.ndarray, " stored"],
    width: int,
) -> None:
    """Raises a ValueError for a number out of range or twice in a row, and for a value too large."""
    order = np.lexsort((ids, lines_of))
    twice = np.zeros(len(ids), dtype=bool)
    twice[order[1:]] = (np.diff(ids[order]) == 0) & (np.diff(lines_of[order]) == 0)
    for wrong, why in (
        (ids >= width, f"line 1 says {width} columns, numbered from 0; mend line 1 or the number"),
        (ids >= 2**31, "a number must be below 2^31; number the columns that are used anew"),
        (twice, "the number is there twice; keep one"),
        (np.abs(values) > np.finfo(np.float32).max, "too large for float32; divide all values"),
    ):
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{path}: line {lines_of[at]}: {ids[at]:.0f}:{values[at]:g}: {why}")


# ---------------------------------------------------------------------------------------- writing


def write_matrix(matrix: csr_array, path: Path, *, labels: csr_array | None = None) -> Path:
    """Writes `rows columns` and the pairs of each row; with `labels` a sparse data file of features.

    Returns:
        `path`.
    """
    if labels is not None and labels.shape[0] != matrix.shape[0]:
        raise ValueError(
            f"{path}: {matrix.shape[0]} rows of features and {labels.shape[0]} of labels; both must "
            "be of the same texts"
        )

    def rows() -> Iterator[bytes]:
        yield b"%d %d" % matrix.shape + (b"" if labels is None else b" %d" % labels.shape[1])
        for row in range(matrix.shape[0]):
            pairs = [b"%d:%.9g" % pair for pair in zip(*_row(matrix, row), strict=True)]
            if labels is not None:  # where there are none, a space in front says so
                pairs.insert(0, b",".join(b"%d" % label for label in _row(labels, row)[0]))
            yield b" ".join(pairs)

    return write_lines(rows(), path)


def _row(matrix: csr_array, row: int) -> tuple[list[int], list[float]]:
    span = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[span].tolist(), matrix.data[span].tolist()


def write_texts(texts: Iterable[str], path: Path) -> Path:
    """Writes one text a line; line ends inside of texts become spaces."""
    return write_lines((re.sub(r"[\r\n]+", " ", text).encode() for text in texts), path)


def write_lines(content: Iterable[bytes], path: Path) -> Path:
    """Commits a file of these lines."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in content)

    commit(path, write)
    return path
