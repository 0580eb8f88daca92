"""Which rows and which model a calibrator was fitted on, and checks of what it is given later."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int, UInt64
from scipy.sparse import csr_array

from llmlabel.data import gold_index
from llmlabel.labelspace import LabelSpace

OtherEngine: TypeAlias = Literal["refuse", "allow"]
"""What is done with soft labels of another model than those of the gold rows."""


def row_marks(dataset: Dataset) -> UInt64[np.ndarray, " rows"]:
    """A hash of each row's id and, where there are texts, its text."""
    texts = dataset["text"][:] if "text" in dataset.column_names else [""] * len(dataset)
    rows = zip(dataset["id"][:], texts, strict=True)
    return _hashes(json.dumps(row, ensure_ascii=False).encode() for row in rows)


def same_rows(dataset: Dataset, marks: UInt64[np.ndarray, " others"]) -> Bool[np.ndarray, " rows"]:
    """Whether each row is one of those marked: same id, and same text where there are texts."""
    return np.isin(row_marks(dataset), marks)


def shared_rows(dataset: Dataset, training: Dataset) -> Bool[np.ndarray, " rows"]:
    """Whether each row is one of `training`: same id, and same text where both have texts."""
    for name, rows in (("the gold rows", dataset), ("training", training)):
        if "id" not in rows.column_names:
            raise ValueError(f"{name} have no column id, by which training rows are known; add it")
    if ("text" in dataset.column_names) != ("text" in training.column_names):
        dataset, training = dataset.select_columns(["id"]), training.select_columns(["id"])
    return same_rows(dataset, row_marks(training))


def refuse_trained(dataset: Dataset, training: Dataset | None) -> None:
    """Raises a ValueError if gold rows are among those that a model was trained on."""
    if training is None:
        return
    if trained := int(shared_rows(dataset, training).sum()):
        raise ValueError(
            f"{trained} of {len(dataset)} gold rows are training rows too, so their soft labels are "
            "too good and nothing can be promised; leave them out"
        )


def fitted_on(
    dataset: Dataset, labels: LabelSpace, probs: csr_array
) -> tuple[tuple[str, ...], str]:
    """The fields `engines` and `data_sha` of a fit on gold rows, whose ids may be missing."""
    ids = dataset["id"][:] if "id" in dataset.column_names else [""] * len(dataset)
    if labels.multilabel:
        return engines_of(dataset), data_sha(ids, [sorted(some) for some in dataset["gold"]], probs)
    return engines_of(dataset), data_sha(ids, gold_index(dataset, labels), probs)


def data_sha(
    ids: list[str], gold: Int[np.ndarray, " rows"] | list[list[int]], probs: csr_array
) -> str:
    """Of ids, gold and soft labels of the rows, in any order."""
    golds = gold if isinstance(gold, list) else gold.tolist()
    hashes = _hashes(
        json.dumps([row_id, true]).encode()
        + probs.indices[a:b].tobytes()
        + probs.data[a:b].tobytes()
        for row_id, true, a, b in zip(ids, golds, probs.indptr[:-1], probs.indptr[1:], strict=True)
    )
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


def engines_of(dataset: Dataset) -> tuple[str, ...]:
    """The names in the column `engine`, if there is one."""
    names = dataset.unique("engine") if "engine" in dataset.column_names else []
    return tuple(sorted(name for name in names if name is not None))


def check_space(labels: LabelSpace, space: str, *, what: str = "threshold") -> None:
    """Raises a ValueError if what was fitted, named in the message, is of another label space."""
    if space != labels.fingerprint:
        was, it = ("were", "them") if what.endswith("s") else ("was", "it")
        raise ValueError(
            f"the {what} {was} fitted in label space {space}, but the label space given is "
            f"{labels.fingerprint}; fit {it} again on rows of this one"
        )


def check_engines(dataset: Dataset, engines: tuple[str, ...], other_engine: OtherEngine) -> None:
    """Raises a ValueError if soft labels are of another model than those of the gold rows.

    Args:
        dataset: New rows; without the column `engine` nothing can be checked.
        engines: Those of the gold rows; where there are none, nothing is checked.
        other_engine: "allow" takes them all the same.
    """
    one_of("other_engine", other_engine, OtherEngine)
    here = engines_of(dataset)
    if other_engine == "refuse" and engines and not set(here) <= set(engines):
        raise ValueError(
            f"the threshold was fitted on soft labels of {', '.join(engines)}, but these "
            f"rows have those of {', '.join(here)}; fit it again on gold rows that it labelled "
            "(other_engine='allow' uses it all the same, and then nothing is promised)"
        )


def one_of(name: str, value: object, kind: Any) -> None:
    """Raises a ValueError if a value is none of those of a `Literal`."""
    if value not in (known := get_args(kind)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def _hashes(contents: Iterable[bytes]) -> UInt64[np.ndarray, " rows"]:
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
