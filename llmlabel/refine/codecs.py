"""What is stored of a row's soft label: the codecs of `llmlabel.refine.compress`, in memory."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Bits = Literal[8, 16, 32]
Rest = Literal["smooth", "renormalise", "missing"]

_FULL = 1e-6
_LOWEST_LOG_PROB = -16.0
"""A single log-probability below this would outweigh all others in a loss."""


@dataclass(frozen=True)
class TopK:
    """The `k` most probable labels of a row: `k` x (1, 2 or 4 bytes of id + `bits` / 8) bytes.

    Marginal smoothing of FKD (Shen and Xing, arXiv 2112.01528); with `k` 1 its label smoothing. On
    16 Debian sections students lost 1.0 point of accuracy with `k` 1 at 3 bytes a row and 0.4 with
    `k` 3 and 8 bits at 6; 1.7 and 0.4 when the temperature of the teacher was not fitted first.
    """

    k: int = 8
    bits: Bits = 16

    def __post_init__(self) -> None:
        """Checks the number of labels."""
        if self.k < 1:
            raise ValueError(f"k must be at least 1, the number of labels to keep; got {self.k}")


@dataclass(frozen=True)
class Dense:
    """The probabilities of all labels, each rounded to `bits`: labels x `bits` / 8 bytes a row."""

    bits: Bits = 8


@dataclass(frozen=True)
class TwoDistances:
    """Log-probabilities of two labels: the row's most probable one and that of a partner row.

    The distance-based representation (DBR) of Tran et al., NRR-DD (arXiv 2503.18267): the teacher's
    cross-entropy to two one-hot labels is minus these two numbers, which is all that is stored. The
    partner of each row is drawn by `seed` and id (see `partners`).

    On 16 Debian sections students of the restored labels lost 0.7 points at 6 bytes a row, with the
    paper's own loss 0.9.

    Differs from the paper: the two label ids are stored too, so that a store can be restored alone;
    log-probabilities are cut off at -16.
    """

    bits: Literal[16, 32] = 16
    seed: int = 0


StoredRow = TopK | Dense | TwoDistances


def partners(ids: list[Any], *, seed: int) -> Int[np.ndarray, " rows"]:
    """Another row for each row: the next one in an order that only `seed` and the ids decide."""
    keys = [hashlib.sha256(f"{seed}:{id}".encode()).digest()[:8] for id in ids]
    order = sorted(range(len(ids)), key=lambda row: (keys[row], str(ids[row])))
    partner = np.zeros(len(ids), dtype=np.int64)
    partner[order] = np.roll(np.array(order, dtype=np.int64), -1)
    return partner


def payload_type(codec: StoredRow, labels: LabelSpace) -> np.dtype:
    """The bytes of a row, little-endian."""
    count = len(labels)
    id_type = "<u1" if count <= 2**8 else "<u2" if count <= 2**16 else "<u4"
    if isinstance(codec, Dense):
        return np.dtype([("probs", _number(codec.bits), (count,))])
    if isinstance(codec, TwoDistances):
        return np.dtype([("ids", id_type, (2,)), ("log_probs", _number(codec.bits), (2,))])
    k = min(codec.k, count)
    return np.dtype([("ids", id_type, (k,)), ("probs", _number(codec.bits), (k,))])


def encode(
    soft: SoftLabels,
    codec: StoredRow,
    labels: LabelSpace,
    *,
    partner: Int[np.ndarray, " rows"] | None = None,
) -> Shaped[np.ndarray, " rows"]:
    """The payload of each row; what it means where a row has no soft label is undefined."""
    kind = payload_type(codec, labels)
    payload = np.zeros(soft.probs.shape[0], dtype=kind)
    if isinstance(codec, Dense):
        payload["probs"] = _rounded(soft.dense(), codec.bits)
        best = (np.arange(len(payload)), np.maximum(most_probable(soft), 0))
        # the most probable label is never rounded away
        payload["probs"][best] = np.maximum(payload["probs"][best], _least(codec.bits))
    elif isinstance(codec, TwoDistances):
        assert partner is not None
        ids = np.maximum(np.stack([most_probable(soft), partner], axis=1), 0)
        probs = np.stack([soft.probs[np.arange(len(ids)), some] for some in ids.T], axis=1)
        unstored = np.maximum(len(labels) - np.diff(soft.probs.indptr), 1)
        probs = np.where(probs > 0, probs, (soft.missing_mass / unstored)[:, None])
        payload["ids"] = ids
        payload["log_probs"] = np.log(np.maximum(probs, np.exp(_LOWEST_LOG_PROB)))
    else:
        top = soft.top(min(codec.k, len(labels)))
        rank = np.arange(top.probs.nnz) - np.repeat(
            top.probs.indptr[:-1], np.diff(top.probs.indptr)
        )
        order = top._most_probable_first()
        payload["ids"][top._rows(), rank] = top.probs.indices[order]
        payload["probs"][top._rows(), rank] = _rounded(top.probs.data[order], codec.bits)
        payload["probs"][:, 0] = np.maximum(payload["probs"][:, 0], _least(codec.bits))
    return payload


def decode(
    payload: Shaped[np.ndarray, " rows"],
    codec: StoredRow,
    labels: LabelSpace,
    *,
    present: Shaped[np.ndarray, " rows"],
    rest: Rest = "smooth",
) -> SoftLabels:
    """The soft labels of payloads; rows that are not `present` have none."""
    if isinstance(codec, Dense):
        values = _read(payload["probs"], codec.bits)
        ids = np.broadcast_to(np.arange(len(labels)), values.shape)
    elif isinstance(codec, TwoDistances):
        ids = payload["ids"].astype(np.int64)
        values = np.exp(payload["log_probs"].astype(np.float64))
        values[ids[:, 0] == ids[:, 1], 1] = 0.0  # the partner has the same label
    else:
        ids, values = payload["ids"].astype(np.int64), _read(payload["probs"], codec.bits)
    if (outside := ids[present] >= len(labels)).any():
        raise ValueError(f"a row names label {ids[present][outside][0]} of {len(labels)} labels")
    stored = (values > 0) & present[:, None]
    values = np.where(stored, values, 0.0)
    if labels.multilabel:
        return _sparse(ids, values, stored, labels)
    total = values.sum(axis=1, keepdims=True)
    whole = total > (0.0 if rest == "renormalise" else 1 - _FULL)  # also above 1, by rounding
    values = np.where(whole, values / np.where(total > 0, total, 1.0), values)
    soft = _sparse(ids, values, stored, labels)
    if rest != "smooth" or whole[present].all():
        return soft
    probs = soft.dense()
    left = np.where(present, 1 - probs.sum(axis=1), 0.0)[:, None]
    others = (probs == 0) & ~whole
    count = others.sum(axis=1, keepdims=True)
    probs = np.where(others, left / np.maximum(count, 1), probs)
    all_stored = present & ~whole[:, 0] & (count[:, 0] == 0)
    total = np.where(all_stored, probs.sum(axis=1), 1.0)[:, None]
    return SoftLabels.from_dense(probs / total, labels)


def _sparse(
    ids: Int[np.ndarray, "rows k"],
    values: Float[np.ndarray, "rows k"],
    stored: Shaped[np.ndarray, "rows k"],
    labels: LabelSpace,
) -> SoftLabels:
    indptr = np.concatenate([[0], np.cumsum(stored.sum(axis=1))])
    probs = csr_array((values[stored], ids[stored], indptr), shape=(len(ids), len(labels)))
    return SoftLabels(probs, labels.fingerprint, labels.multilabel)


def _number(bits: int) -> str:
    return {8: "<u1", 16: "<f2", 32: "<f4"}[bits]


def _rounded(probs: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(np.minimum(probs, 1.0) * 255) if bits == 8 else probs


def _least(bits: int) -> float:
    return 1.0 if bits == 8 else float(np.finfo(_number(bits)).tiny)


def _read(stored: np.ndarray, bits: int) -> np.ndarray:
    return stored.astype(np.float64) / (255 if bits == 8 else 1)


def most_probable(soft: SoftLabels) -> Int[np.ndarray, " rows"]:
    """The most probable label of each row, -1 where there is none."""
    best = np.asarray(soft.probs.argmax(axis=1)).ravel().astype(np.int64)
    return np.where(np.diff(soft.probs.indptr) > 0, best, -1)
