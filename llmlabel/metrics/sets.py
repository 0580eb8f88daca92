"""How often prediction sets hold the gold label, in all and where it hurts: per label, per size.

Sets are a matrix of booleans, dense or CSR. A row whose gold is none of the labels is never covered
and belongs to no label.
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.metrics.answers import LabelIds, Sets


def covered(sets: Sets | csr_array, gold: LabelIds) -> Bool[np.ndarray, " rows"]:
    """Whether each set contains the gold label of its row."""
    if isinstance(sets, csr_array):
        rows = np.repeat(np.arange(sets.shape[0]), np.diff(sets.indptr))
        held = rows[(sets.data != 0) & (sets.indices == gold[rows])]
        return np.bincount(held, minlength=len(gold)) > 0
    inside: np.ndarray = sets[np.arange(len(gold)), gold] & (gold >= 0)  # -1 reads the last label
    return inside


def set_sizes(sets: Sets | csr_array) -> Int[np.ndarray, " rows"]:
    """Number of labels in each set."""
    if isinstance(sets, csr_array):
        rows = np.repeat(np.arange(sets.shape[0]), np.diff(sets.indptr))
        return np.bincount(rows[sets.data != 0], minlength=sets.shape[0])
    return sets.sum(axis=1)


def coverage(sets: Sets | csr_array, gold: LabelIds) -> float:
    """Share of rows whose set contains the gold label."""
    return float(covered(sets, gold).mean())


def set_size(sets: Sets | csr_array) -> float:
    """Mean number of labels in a set."""
    return float(set_sizes(sets).mean())


def coverage_by(
    groups: Int[np.ndarray, " rows"], covered: Bool[np.ndarray, " rows"], *, count: int
) -> tuple[Float[np.ndarray, " count"], Int[np.ndarray, " count"]]:
    """Coverage and number of rows of each of `count` groups; NaN and 0 for one without a row.

    Rows of group -1 are in none. The groups are the gold labels for coverage per label; the
    `quantile_bins` of the confidence, or of how frequent the gold label is in training data, for
    coverage per decile; the sizes of the sets for coverage per size.
    """
    known = groups >= 0
    rows = np.bincount(groups[known], minlength=count)
    hits = np.bincount(groups[known], weights=covered[known], minlength=count)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty group
        return hits / rows, rows


def macro_coverage(sets: Sets | csr_array, gold: LabelIds) -> float:
    """Mean over the labels that have gold rows of the coverage of these; NaN without any."""
    share = _label_coverage(sets, gold)
    return float(share.mean()) if share.size else math.nan


def under_coverage_gap(sets: Sets | csr_array, gold: LabelIds, *, target: float) -> float:
    """Mean over the labels that have gold rows of how far their coverage is below `target`.

    Ding et al. 2025 (arXiv 2507.06867). NaN without a row of any label.
    """
    share = _label_coverage(sets, gold)
    return float(np.maximum(target - share, 0.0).mean()) if share.size else math.nan


def share_below(sets: Sets | csr_array, gold: LabelIds, *, least: float = 0.5) -> float:
    """Share of the labels that have gold rows whose coverage is below `least`; NaN without any."""
    share = _label_coverage(sets, gold)
    return float((share < least).mean()) if share.size else math.nan


def size_stratified_violation(
    sets: Sets | csr_array,
    gold: LabelIds,
    *,
    target: float,
    edges: tuple[int, ...] = (2, 4, 11, 101, 1001),
) -> float:
    """The largest distance of coverage and `target` over bins of the size of the set.

    Size-stratified coverage violation, Angelopoulos et al. 2021 (arXiv 2009.14193), with its bins:
    0 to 1, 2 to 3, 4 to 10, 11 to 100, 101 to 1000 and more. A bin without rows says nothing.
    """
    strata = np.searchsorted(np.array(edges), set_sizes(sets), side="right")
    share, rows = coverage_by(strata, covered(sets, gold), count=len(edges) + 1)
    return float(np.abs(share[rows > 0] - target).max())


def promised_coverage(
    *, calibration_rows: int, rows: int, alpha: float, level: float = 0.95
) -> tuple[float, float]:
    """The middle `level` of the coverage on `rows` new rows when split conformal keeps its promise.

    Exact: with k = ceil((n + 1)(1 - alpha)), the number of covered rows is beta-binomial(rows, k,
    n + 1 - k) over the draw of the n calibration rows and the new ones (Vovk 2012, proposition 2a,
    for scores without ties).
    """
    from scipy.stats import betabinom

    k = math.ceil((1 - Fraction(str(alpha))) * (calibration_rows + 1))
    if k > calibration_rows:
        return 1.0, 1.0
    covered = betabinom(rows, k, calibration_rows + 1 - k)
    tail = (1 - level) / 2
    return float(covered.ppf(tail) / rows), float(covered.ppf(1 - tail) / rows)


def _label_coverage(
    sets: Sets | csr_array, gold: LabelIds
) -> Float[np.ndarray, " labels_with_rows"]:
    share, rows = coverage_by(gold, covered(sets, gold), count=sets.shape[1])
    return share[rows > 0]
