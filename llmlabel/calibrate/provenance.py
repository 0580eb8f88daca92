"""Which rows and which model a calibrator was fitted on, as short hashes and names."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int, UInt64
from scipy.sparse import csr_array


def row_marks(dataset: Dataset) -> UInt64[np.ndarray, " rows"]:
    """A hash of each row's id and, where there are texts, its text."""
    texts = dataset["text"][:] if "text" in dataset.column_names else [""] * len(dataset)
    rows = zip(dataset["id"][:], texts, strict=True)
    return _hashes(json.dumps(row, ensure_ascii=False).encode() for row in rows)


def same_rows(dataset: Dataset, marks: UInt64[np.ndarray, " others"]) -> Bool[np.ndarray, " rows"]:
    """Whether each row is one of those marked: same id, and same text where there are texts."""
    return np.isin(row_marks(dataset), marks)


def data_sha(ids: list[str], gold: Int[np.ndarray, " rows"], probs: csr_array) -> str:
    """Of ids, gold and soft labels of the rows, in any order."""
    hashes = _hashes(
        json.dumps([row_id, true]).encode()
        + probs.indices[a:b].tobytes()
        + probs.data[a:b].tobytes()
        for row_id, true, a, b in zip(
            ids, gold.tolist(), probs.indptr[:-1], probs.indptr[1:], strict=True
        )
    )
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


def engines_of(dataset: Dataset) -> tuple[str, ...]:
    """The names in the column `engine`, if there is one."""
    names = dataset.unique("engine") if "engine" in dataset.column_names else []
    return tuple(sorted(name for name in names if name is not None))


def _hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, " rows"]:
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
