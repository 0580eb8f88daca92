"""How little a label conforms to a row: the scores that prediction sets are cut from.

The smaller a score, the better the label fits; a set holds the labels whose score is at most a
threshold. Probabilities come as a CSR array or as a dense block, float32 or float64, and are never
copied as a whole into float64. A label of probability 0 is one that is not stored: its score is
+inf, so that it is in a set only where the threshold is +inf.

Masses are summed on a grid of 2^-50, where float64 adds without rounding: a score is the same number
whether it was summed along a sorted row or over the labels above one, in any order and block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy.sparse import csr_array

Score = Literal["lac", "aps", "raps", "saps", "margin"]

ScoreFunction = Callable[[Any, Any], Any]
"""Probabilities (rows, labels) and one uniform number a row -> scores (rows, labels), row by row."""

_GRID = 2.0**50
_CELLS = 1_000_000
"""Rows x labels that are ranked at a time."""
_FIRST_PREFIX = 32
"""Most probable labels of a dense row that are looked at first."""


@dataclass(frozen=True)
class Nonconformity:
    """Which score, and its settings.

    Attributes:
        score: "lac" 1 - p, the smallest sets on average (Sadinle et al. 2019, arXiv 1609.00451);
            "aps" the mass of all more probable labels and a share of the own, sets that grow with
            the difficulty of the row (Romano et al. 2020, arXiv 2006.02544); "raps" adds a penalty
            for each rank beyond `free_labels` (Angelopoulos et al. 2021, arXiv 2009.14193); "saps"
            counts ranks instead of masses (Huang et al. 2024, arXiv 2310.06430); "margin" the lead
            of the best other label. Or a function of (probabilities, uniforms) that scores dense
            rows; a recipe cannot name one.
        randomised: Whether the own share of "aps", "raps" and "saps" is drawn, one number a row;
            without it sets are larger and cover more than asked for.
        penalty: Lambda of "raps", the weight of a rank in "saps".
        free_labels: Ranks that "raps" does not penalise (k_reg).
        prior: Probability of each label; "lac" then scores 1 - p / prior, so that rare labels keep
            their place (PAS, Ding et al. 2025, arXiv 2507.06867).
    """

    score: Score | ScoreFunction = "lac"
    randomised: bool = True
    penalty: float = 0.0
    free_labels: int = 0
    prior: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses settings that the score cannot have."""
        if not callable(self.score) and self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}; got {self.score}")
        if not 0 <= self.penalty < np.inf:
            raise ValueError(f"penalty must be a number from 0 on; got {self.penalty}")
        if self.free_labels < 0:
            raise ValueError(f"free_labels must be 0 or more; got {self.free_labels}")
        if self.prior is not None and self.score != "lac":
            raise ValueError(f"a prior adjusts the score lac only; got score={self.score}")
        bad = [k for k, share in enumerate(self.prior or ()) if not 0 < share < np.inf]
        if self.prior is not None and bad:
            raise ValueError(
                f"a prior must be above 0 everywhere; label {bad[0]} has {self.prior[bad[0]]} (add a "
                "pseudo-count to labels that were not seen)"
            )


def block_scores(
    probs: Float[np.ndarray, "rows labels"],
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
) -> Float[np.ndarray, "rows labels"]:
    """The score of every label of dense rows; of equally probable labels the lower id ranks first."""
    stored = csr_array(probs)
    scores = np.full(probs.shape, np.inf)
    scores[_rows(stored), stored.indices] = stored_scores(stored, how, uniforms)
    return scores


def stored_scores(
    probs: csr_array, how: Nonconformity, uniforms: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " stored"]:
    """The score of every stored label, in the order of `probs.data`; ids must ascend in each row."""
    _check_prior(how, probs.shape[1])
    if how.score == "lac":
        return _lac(probs.data, probs.indices, how)
    scores = np.empty(probs.nnz)
    score = _called if callable(how.score) else _ranked
    width = probs.shape[1] if callable(how.score) else np.diff(probs.indptr).max(initial=1)
    size = max(1, _CELLS // width)
    for start in range(0, probs.shape[0], size):
        block = probs[start : start + size]
        found = score(block, how, uniforms[start : start + size])
        first = probs.indptr[start]
        scores[first : first + block.nnz] = np.where(block.data > 0, found, np.inf)
    return scores


def true_scores(
    probs: csr_array | Float[np.ndarray, "rows labels"],
    gold: Int[np.ndarray, " rows"],
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
) -> Float[np.ndarray, " rows"]:
    """The score of each row's true label, without sorting; +inf where `gold` is -1 or not stored."""
    _check_prior(how, probs.shape[1])
    stored = _needed(probs, gold, how) if isinstance(probs, np.ndarray) else _in_order(probs)
    row, ids = _rows(stored), stored.indices
    at = np.flatnonzero((ids == gold[row]) & (stored.data > 0))
    scores = np.full(len(gold), np.inf)
    if how.score == "lac":
        scores[row[at]] = _lac(stored.data[at], ids[at], how)
    elif callable(how.score):
        scores[row[at]] = stored_scores(stored, how, uniforms)[at]
    else:
        own = np.zeros(len(gold), dtype=stored.dtype)
        own[row[at]] = stored.data[at]
        ahead = (stored.data > own[row]) | ((stored.data == own[row]) & (ids < gold[row]))
        others = stored.data.copy()
        others[at] = 0
        best = csr_array((others, ids, stored.indptr), shape=stored.shape).max(axis=1).toarray()
        found = _formula(
            how,
            own=own,
            above=_sums(row[ahead], _on_grid(stored.data[ahead]), len(gold)),
            rank=1 + np.bincount(row[ahead], minlength=len(gold)),
            top=np.maximum(best, own),
            best_other=best,
            uniforms=uniforms,
        )
        scores[row[at]] = found[row[at]]
    return scores


def sets_of(
    probs: csr_array | Float[np.ndarray, "rows labels"],
    thresholds: float | Float[np.ndarray, "..."],
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
) -> csr_array:
    """The labels whose score is at most the threshold: bool, (rows, labels), ids ascending.

    Args:
        probs: Rows of probabilities.
        thresholds: One for all, or of shape (1, labels), (rows, 1) or (rows, labels).
        how: The score.
        uniforms: One number a row.
    """
    _check_prior(how, probs.shape[1])
    limits = np.atleast_2d(np.asarray(thresholds, dtype=np.float64))
    if isinstance(probs, np.ndarray):
        finite = not np.isposinf(limits).any()
        if finite and how.score == "lac" and limits.shape != probs.shape:
            return _members(probs >= _lac_cuts(limits, how, labels=probs.shape[1], like=probs))
        if finite and limits.shape[1] == 1 and not callable(how.score) and how.score != "lac":
            return _prefix_sets(probs, np.broadcast_to(limits[:, 0], len(probs)), how, uniforms)
        return _members(block_scores(probs, how, uniforms) <= limits)
    stored = _in_order(probs)
    each = np.broadcast_to(limits, stored.shape)[_rows(stored), stored.indices]
    chosen = _chosen(stored, stored_scores(stored, how, uniforms) <= each)
    always = np.isposinf(limits)  # of these labels also what is not stored
    return _members(chosen.toarray() | always) if always.any() else chosen


def _needed(
    probs: Float[np.ndarray, "rows labels"], gold: Int[np.ndarray, " rows"], how: Nonconformity
) -> csr_array:
    """The part of dense rows that tells the score of their true labels."""
    if callable(how.score):
        return csr_array(probs)
    known = np.maximum(gold, 0)
    own = np.where(gold >= 0, probs[np.arange(len(gold)), known], np.zeros((), dtype=probs.dtype))
    if how.score == "lac":
        return csr_array((own, known, np.arange(len(gold) + 1)), shape=probs.shape)
    least = own
    if how.score == "margin" and probs.shape[1] > 1:
        least = np.minimum(own, np.partition(probs, -2, axis=1)[:, -2])
    return _at_least(probs, np.where(own > 0, least, np.inf))


# ------------------------------------------------------------------------------------ formulas


def _formula(
    how: Nonconformity,
    *,
    own: Num[np.ndarray, "..."],
    above: Float[np.ndarray, "..."],
    rank: Int[np.ndarray, "..."],
    top: Num[np.ndarray, "..."],
    best_other: Num[np.ndarray, "..."],
    uniforms: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """The score of labels that `above` mass and `rank` - 1 labels stand before.

    Differs from the papers: u stands where APS and RAPS have 1 - u, of the same distribution.
    """
    share = uniforms if how.randomised else np.ones_like(uniforms)
    if how.score == "margin":
        return np.subtract(best_other, own, dtype=np.float64)
    if how.score == "saps":
        peak = top.astype(np.float64)
        return np.where(rank == 1, share * peak, peak + (rank - 2 + share) * how.penalty)
    scores = above + share * _on_grid(own)
    if how.score == "raps":
        scores += how.penalty * np.maximum(rank - how.free_labels, 0)
    return scores


def _lac(
    own: Float[np.ndarray, "..."], ids: Int[np.ndarray, "..."], how: Nonconformity
) -> Float[np.ndarray, "..."]:
    own = own.astype(np.float64)
    if how.prior is not None:
        own = own / np.asarray(how.prior)[ids]
    return np.where(own > 0, 1.0 - own, np.inf)


def _on_grid(probs: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """As float64 that add up exactly: a float32 from 2^-27 on stays what it is."""
    return np.rint(probs.astype(np.float64) * _GRID) / _GRID


def _ranked(
    probs: csr_array, how: Nonconformity, uniforms: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " stored"]:
    """The scores of what is stored, from rows sorted by falling probability."""
    row = _rows(probs)
    column = np.arange(probs.nnz) - np.repeat(probs.indptr[:-1], np.diff(probs.indptr))
    padded = np.zeros((probs.shape[0], int(column.max(initial=0)) + 1), dtype=probs.dtype)
    padded[row, column] = probs.data
    order = np.argsort(-padded, axis=1, kind="stable")  # of equal ones the lower id first
    scores = np.empty(padded.shape)
    ranked = _falling_scores(np.take_along_axis(padded, order, axis=1), how, uniforms)
    np.put_along_axis(scores, order, ranked, axis=1)
    return scores[row, column]


def _falling_scores(
    probs: Float[np.ndarray, "rows ranks"],
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
) -> Float[np.ndarray, "rows ranks"]:
    """The scores of the most probable labels, given in falling order; they never fall."""
    mass = _on_grid(probs)
    above = np.zeros(probs.shape)
    np.cumsum(mass[:, :-1], axis=1, out=above[:, 1:])
    best_other = np.repeat(probs[:, :1], probs.shape[1], axis=1)
    best_other[:, 0] = probs[:, 1] if probs.shape[1] > 1 else 0
    return _formula(
        how,
        own=probs,
        above=above,
        rank=np.arange(1, probs.shape[1] + 1)[None, :],
        top=probs[:, :1],
        best_other=best_other,
        uniforms=uniforms[:, None],
    )


def _called(
    probs: csr_array, how: Nonconformity, uniforms: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " stored"]:
    if not callable(how.score):
        raise TypeError(f"score {how.score} is no function")
    dense = probs.astype(np.float64).toarray()
    scores = np.asarray(how.score(dense, uniforms), dtype=np.float64)
    if scores.shape != dense.shape or np.isnan(scores).any():
        raise ValueError(
            f"the score function must give one number for each of {dense.shape} rows and labels; "
            f"it gave shape {scores.shape}, {int(np.isnan(scores).sum())} of them NaN"
        )
    found: np.ndarray = scores[_rows(probs), probs.indices]
    return found


# ------------------------------------------------------------------------------- sets of blocks


def _prefix_sets(
    probs: Float[np.ndarray, "rows labels"],
    limits: Float[np.ndarray, " rows"],
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
) -> csr_array:
    """Sets of a score that rises with the rank, from growing prefixes of sorted probabilities.

    Only values are sorted; the labels are those from the last value inside on.
    """
    rows, labels = probs.shape
    cuts = np.full(rows, np.inf, dtype=probs.dtype)
    sizes = np.zeros(rows, dtype=np.int64)
    left, width = np.arange(rows), 0
    while left.size:
        width = min(labels, width * 8 or _FIRST_PREFIX)
        block = probs if len(left) == rows else probs[left]
        falling = np.sort(np.partition(block, labels - width, axis=1)[:, labels - width :])[:, ::-1]
        inside = _falling_scores(falling, how, uniforms[left]) <= limits[left, None]
        size = (inside & (falling > 0)).sum(axis=1)
        sizes[left] = size
        last = falling[np.arange(len(left)), np.maximum(size - 1, 0)]
        cuts[left] = np.where(size > 0, last, np.inf)
        left = left[size == width] if width < labels else left[:0]
    found = _at_least(probs, cuts)
    if (tied := np.flatnonzero(np.diff(found.indptr) != sizes)).size:  # equal ones at the cut
        kept = np.ones(found.nnz, dtype=bool)
        scores = stored_scores(found[tied], how, uniforms[tied])
        at = np.isin(_rows(found), tied)
        kept[at] = scores <= np.repeat(limits[tied], np.diff(found.indptr)[tied])
        return _chosen(found, kept)
    return _chosen(found, np.ones(found.nnz, dtype=bool))


def _lac_cuts(
    limits: Float[np.ndarray, "..."], how: Nonconformity, *, labels: int, like: np.ndarray
) -> Float[np.ndarray, "..."]:
    """The smallest probability whose score is at most the limit, found among all floats of its kind.

    So comparing a block with it decides exactly as the score in float64 does, at the price of one
    comparison in float32.
    """
    dtype, whole = like.dtype, np.dtype(f"i{like.dtype.itemsize}")
    shape = limits.shape if how.prior is None else (limits.shape[0], labels)
    ids = np.arange(shape[1])[None, :]
    low = np.ones(shape, dtype=whole)  # positive floats rise with their bits
    high = np.full(shape, np.array(np.inf, dtype=dtype).view(whole))
    while (low < high).any():
        middle = low + (high - low) // 2
        inside = _lac(middle.view(dtype), ids, how) <= limits
        low, high = (
            np.where(inside, low, np.minimum(middle + 1, high)),
            np.where(inside, middle, high),
        )
    return low.view(dtype)


def _at_least(
    probs: Float[np.ndarray, "rows labels"], cuts: Float[np.ndarray, " rows"]
) -> csr_array:
    """The stored labels with at least the cut's probability, as they are."""
    least = np.maximum(cuts, np.finfo(probs.dtype).smallest_subnormal).astype(probs.dtype)
    return _members(probs >= least[:, None], probs)


def _members(inside: Bool[np.ndarray, "rows labels"], values: Any = None) -> csr_array:
    flat = np.flatnonzero(inside)
    data = np.ones(len(flat), dtype=bool) if values is None else values.ravel()[flat]
    indptr = np.searchsorted(flat, np.arange(len(inside) + 1) * inside.shape[1])
    ids = (flat % inside.shape[1]).astype(np.int32)
    return csr_of(data, ids, indptr, inside.shape[1])


def csr_of(data: np.ndarray, ids: np.ndarray, indptr: np.ndarray, labels: int) -> csr_array:
    """With ids of 4 bytes where their number allows: SciPy gives both arrays the wider type."""
    kind = np.int32 if len(ids) < 2**31 else np.int64
    parts = (data, ids.astype(kind, copy=False), indptr.astype(kind))
    return csr_array(parts, shape=(len(indptr) - 1, labels))


def _chosen(probs: csr_array, inside: Bool[np.ndarray, " stored"]) -> csr_array:
    """The stored labels that are inside."""
    counts = np.concatenate([[0], np.cumsum(inside)])
    data = np.ones(int(counts[-1]), dtype=bool)
    return csr_of(data, probs.indices[inside], counts[probs.indptr], probs.shape[1])


def _sums(
    rows: Int[np.ndarray, " some"], values: Float[np.ndarray, " some"], count: int
) -> Float[np.ndarray, " rows"]:
    return np.bincount(rows, values, minlength=count).astype(np.float64)  # of nothing it is int


def _check_prior(how: Nonconformity, labels: int) -> None:
    if how.prior is not None and len(how.prior) != labels:
        raise ValueError(f"the prior has {len(how.prior)} labels, the rows have {labels}")


def _in_order(probs: csr_array) -> csr_array:
    """With ascending ids in each row, each once."""
    if not probs.has_canonical_format:
        probs = probs.copy()
        probs.sum_duplicates()
    return probs


def _rows(probs: csr_array) -> Int[np.ndarray, " stored"]:
    return np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))
