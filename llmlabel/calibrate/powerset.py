"""Sets of label sets: which combinations of any number of labels are plausible for a row.

In a multi-label space the answer is a set of labels, and 2^labels sets are too many to look at. Their
distance from the probabilities of a row is a sum over labels, so that they come in order of distance
without listing the others, and can be counted without listing any.
"""

import heapq
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.quantile import conformal_quantile, fewest_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.data import gold_matrix, require_columns, with_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

_BLOCK_CELLS = 50_000_000
"""Rows x labels of gold that are dense at a time."""

_SLACK = 1e-12
"""Relative error of a sum of costs, by which the bounds of `Region.count` give way."""

_WHOLE = 2.0**52
"""Counts up to this are exact as float64."""


@dataclass(frozen=True)
class Powerset:
    """Fitted distances; the region of a row holds the label sets at most as far as these allow.

    Attributes:
        alpha: Share of new rows whose region may miss the true label set.
        power: p of the norm.
        scores: Distances (to the power p) of the gold rows' true label sets, ascending.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    power: float
    scores: tuple[float, ...]
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""

    @property
    def threshold(self) -> float:
        """The largest distance (to the power p) whose p-value is above `alpha`."""
        return conformal_quantile(np.array(self.scores), self.alpha)


@dataclass(frozen=True, eq=False)
class Region:
    """The label sets of one row within the threshold; iterating gives them, the nearest first.

    All sums run over the changed labels in the order of `costs`, so that a distance is the same
    number here and in `set_scores`: no tolerance is needed at the threshold.

    Attributes:
        best: The nearest label set: every label with a probability above one half.
        order: All labels by the cost of changing their membership, of equal ones the lower first.
        costs: These costs, ascending.
        base: Distance of `best`.
        threshold: Largest distance inside.
    """

    best: tuple[int, ...]
    order: Int[np.ndarray, " labels"]
    costs: Float[np.ndarray, " labels"]
    base: float
    threshold: float

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Label sets (ids ascending) and their distances; each next one costs O(log of those seen).

        Sorted subset sums (Lawler 1972): a set of changes is followed by the one with the next
        label added, and by the one with its last label replaced by the next.
        """
        best = set(self.best)
        waiting: list[tuple[float, tuple[int, ...], float]] = [(0.0, (), 0.0)]
        while waiting:
            cost, changes, before = heapq.heappop(waiting)
            if self.base + cost > self.threshold:
                return
            changed = best.symmetric_difference(self.order[list(changes)].tolist())
            yield tuple(sorted(changed)), self.base + cost
            after = changes[-1] + 1 if changes else 0
            if after < len(self.costs):
                step = float(self.costs[after])
                heapq.heappush(waiting, (cost + step, (*changes, after), cost))
                if changes:
                    heapq.heappush(waiting, (before + step, (*changes[:-1], after), before))

    def __contains__(self, some: Collection[int]) -> bool:
        """Whether a label set is inside; exact, whatever their number."""
        return self.distance(some) <= self.threshold

    def distance(self, some: Collection[int]) -> float:
        """Distance (to the power p) of a label set from the row's probabilities."""
        changed = np.isin(self.order, list(set(self.best).symmetric_difference(some)))
        cost = 0.0
        for step in self.costs[changed].tolist():
            cost += step
        return self.base + cost

    def uncertain(self) -> Int[np.ndarray, " uncertain"]:
        """The labels that are in some label sets of the region and not in others, the least sure first."""
        return self.order[self.base + self.costs <= self.threshold]

    def count(self, *, exact: int = 4096, cells: int = 20480) -> tuple[float, float]:
        """At least and at most so many label sets are in the region.

        Both are the number itself where it is at most `exact`. Beyond that they come from a
        knapsack whose costs are rounded up and down to a grid of `cells` cells, so the number is
        between them whatever the grid; beyond 1e300 they are a power of two and infinity.
        """
        if not self.base <= self.threshold:
            return 0.0, 0.0
        costs = self.costs[self.base + self.costs <= self.threshold]
        if (number := self._count_listed(costs, exact)) is not None:
            return number, number
        if math.isinf(self.threshold):
            return (2.0 ** len(costs),) * 2 if len(costs) < 1000 else (2.0**1000, math.inf)
        changes = int((np.cumsum(costs) <= self.threshold - self.base).sum())
        if len(costs) > 990 and changes * math.log10(len(costs)) > 300:
            return 2.0 ** min(changes - 1, 1000), math.inf
        budget, slack = self.threshold - self.base, _SLACK * max(self.threshold, 1.0)
        down = np.floor(costs * ((1 - _SLACK) * cells / (budget + slack)))
        up = np.ceil(costs * ((1 + _SLACK) * cells / max(budget - slack, slack)))
        low, high = _subsets(up, cells), _subsets(down, cells)
        if high > _WHOLE:
            low, high = low * (1 - 1e-9), high * (1 + 1e-9)
        return max(low, float(exact + 1)), high

    def _count_listed(self, costs: Float[np.ndarray, " labels"], most: int) -> float | None:
        """The number of label sets where it is at most so many, else None."""
        budget = self.threshold - self.base
        for size in range(1, 13):  # any `size` labels that cost at most a share of the budget each
            if math.comb(int(np.searchsorted(costs, budget / size * (1 - _SLACK))), size) >= most:
                return None
        sums = np.zeros(1)
        for cost in costs.tolist():
            larger = sums + cost
            sums = np.concatenate([sums, larger[self.base + larger <= self.threshold]])
            if len(sums) > most:
                return None
        return float(len(sums))


def set_scores(
    probs: csr_array, truth: Bool[np.ndarray, "rows labels"], *, power: float = 2.0
) -> Float[np.ndarray, " rows"]:
    """sum_j |y_j - o_j|^p of each row's label set: its nonconformity, without the root.

    Papadopoulos et al. (arXiv 2312.09304); a label not stored has probability 0.
    """
    row, own = _rows(probs), np.minimum(probs.data.astype(np.float64), 1.0)
    changed = truth[row, probs.indices] != (own > 0.5)
    unstored = truth.copy()
    unstored[row, probs.indices] = False
    more_rows, more_ids = np.nonzero(unstored)
    rows = np.concatenate([row[changed], more_rows])
    ids = np.concatenate([probs.indices[changed], more_ids])
    costs = np.concatenate([_change_costs(own[changed], power), np.ones(len(more_rows))])
    order = np.lexsort((ids, costs, rows))
    total = np.bincount(rows[order], costs[order], minlength=probs.shape[0])
    return _base(probs, power) + total


def fit_powerset(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    power: float = 2.0,
    training: Dataset | None = None,
) -> Powerset:
    """Fits the distance within which all but a share `alpha` of new rows have their true label set.

    LP-ICP, Papadopoulos et al. (arXiv 2312.09304): the p-value of a label set is the share of gold
    rows, itself included, whose true set is as far or farther. The guarantee is for the average new
    row, and holds when gold rows and new rows are exchangeable and no gold row was used to make the
    soft labels. A row without a soft label has probability 0 everywhere.

    Differs from the paper: distances are kept to the power p, which changes no order.

    Args:
        dataset: The gold rows; an empty gold list is the empty label set, null rows are left out.
        labels: A multi-label space.
        alpha: Share of misses allowed.
        power: p of the norm, 1 or more.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If a setting or the space does not fit, rows are too few, or were trained on.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if not 1 <= power < math.inf:
        raise ValueError(f"power must be a number from 1 on; got {power}")
    _check_multilabel(labels)
    require_columns(dataset, "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    size = max(1, _BLOCK_CELLS // len(labels))
    scores = [np.empty(0)]
    for start in range(0, len(dataset), size):
        block = dataset.select(range(start, min(start + size, len(dataset))))
        truth = gold_matrix(block, labels)
        scores.append(set_scores(probs[start : start + size], truth, power=power))
    ascending, source = np.sort(np.concatenate(scores)).tolist(), fitted_on(dataset, labels, probs)
    fitted = Powerset(alpha, power, tuple(ascending), labels.fingerprint, *source)
    if math.isinf(fitted.threshold):
        raise ValueError(
            f"cannot certify: alpha={alpha} needs n >= {fewest_scores(alpha)} gold rows; there are "
            f"{len(dataset)} (label more rows, or allow a larger alpha)"
        )
    return fitted


def p_values(
    powerset: Powerset, distances: Float[np.ndarray, " sets"]
) -> Float[np.ndarray, " sets"]:
    """The p-value of label sets at these distances: (#{gold rows at least as far} + 1) / (n + 1)."""
    rows = len(powerset.scores)
    return (rows - np.searchsorted(powerset.scores, distances, side="left") + 1) / (rows + 1)


def regions(
    dataset: Dataset,
    labels: LabelSpace,
    powerset: Powerset,
    *,
    other_engine: OtherEngine = "refuse",
) -> Iterator[Region]:
    """The region of each row; see `predict_powerset`."""
    _check_multilabel(labels)
    check_engines(dataset, powerset.engines, other_engine)
    check_space(labels, powerset.label_space, what="distances")
    probs = SoftLabels.from_dataset(dataset, labels).probs
    threshold = powerset.threshold
    for row, base in enumerate(_base(probs, powerset.power).tolist()):
        own = np.zeros(len(labels))
        part = slice(*probs.indptr[row : row + 2].tolist())
        own[probs.indices[part]] = np.minimum(probs.data[part].astype(np.float64), 1.0)
        costs = _change_costs(own, powerset.power)
        order = np.argsort(costs, kind="stable")
        best = np.flatnonzero(own > 0.5).tolist()
        yield Region(tuple(best), order, costs[order], base, threshold)


def predict_powerset(
    dataset: Dataset,
    labels: LabelSpace,
    powerset: Powerset,
    *,
    top: int = 10,
    empty: Literal["keep", "best"] = "keep",
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds what is plausible for each row, and how much of it there is.

    `set_ids`: the labels that are in at least one label set of the region, most probable first;
    `certain_ids`: those in all of them; `label_sets`: the `top` nearest label sets, and `capped`:
    whether the region holds more. The listed sets of a capped row promise nothing; `set_ids`,
    `certain_ids` and the counts are always about the whole region. `sets_least` and `sets_most`
    bound the number of label sets. `credibility` is the p-value of the nearest label set, low where
    no label set fits; `confidence` is 1 - the p-value of the second nearest.

    Args:
        dataset: The rows.
        labels: The label space of the fit.
        powerset: The fit.
        top: Label sets to list.
        empty: What becomes of a region without any label set. "keep" leaves it empty: the row is
            stranger than a share 1 - alpha of gold rows. "best" puts the nearest label set in.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the fit was in another label space or on another model's soft labels.
    """
    if top < 0:
        raise ValueError(f"top must be 0 or more, the label sets to list; got {top}")
    columns: dict[str, Any] = {name: [] for name in _FEATURES}
    nearest: list[tuple[float, float]] = []
    for region in regions(dataset, labels, powerset, other_engine=other_engine):
        if region.base > region.threshold and empty == "best":
            low = high = 1.0
            listed, unsure = [region.best][:top], set()
        else:
            low, high = region.count()
            listed = [some for some, _ in itertools.islice(region, top)]
            unsure = set(region.uncertain().tolist())
        certain = [label for label in region.best if label not in unsure] if high else []
        # By falling probability: of labels in the best set the dearest to change, then the rest.
        cost = np.empty(len(labels))
        cost[region.order] = region.costs
        cost[list(region.best)] *= -1
        possible = np.array(sorted({*certain, *unsure}), dtype=int)
        possible = possible[np.argsort(cost[possible], kind="stable")]
        nearest.append((region.base, region.base + float(region.costs[0])))
        values = (possible, certain, listed, high > len(listed), low, high)
        for column, value in zip(columns.values(), values, strict=False):
            column.append(value)
    both = np.array(nearest, dtype=np.float64).reshape(-1, 2)
    columns["credibility"] = p_values(powerset, both[:, 0])
    columns["confidence"] = 1 - p_values(powerset, both[:, 1])
    return with_columns(dataset, {name: (columns[name], _FEATURES[name]) for name in _FEATURES})


def binary_relevance(
    gold_probs: Float[np.ndarray, "gold labels"],
    truth: Bool[np.ndarray, "gold labels"],
    probs: Float[np.ndarray, "rows labels"],
    *,
    alpha: float,
) -> tuple[Bool[np.ndarray, "rows labels"], Bool[np.ndarray, "rows labels"]]:
    """The baseline: each label by itself at alpha / labels, so that all hold together (Bonferroni).

    Returns:
        Whether a label may be in the answer, and whether it may be absent. With fewer than
        labels / alpha gold rows everything may be.
    """
    wrong = np.where(truth, 1 - gold_probs, gold_probs)
    limits = np.array([conformal_quantile(column, alpha / truth.shape[1]) for column in wrong.T])
    return 1 - probs <= limits, probs <= limits


_IDS = List(Value("int32"))
_FEATURES = {
    "set_ids": _IDS,
    "certain_ids": _IDS,
    "label_sets": List(_IDS),
    "capped": Value("bool"),
    "sets_least": Value("float64"),
    "sets_most": Value("float64"),
    "credibility": Value("float32"),
    "confidence": Value("float32"),
}


def _subsets(cells: Float[np.ndarray, " labels"], capacity: int) -> float:
    """The number of subsets of these whole numbers that sum to at most `capacity`."""
    ways = np.zeros(capacity + 1)
    ways[0] = 1.0
    for cell, times in zip(*np.unique(cells, return_counts=True), strict=True):
        step, number = int(min(cell, capacity + 1)), int(times)
        if step == 0:
            ways *= 2.0**number
        elif number == 1:
            ways[step:] += ways[:-step]
        else:  # of equal ones any j: C(number, j) ways, instead of one round for each
            more = ways.copy()
            for j in range(1, min(number, capacity // step) + 1):
                more[j * step :] += math.comb(number, j) * ways[: -j * step]
            ways = more
    return float(ways.sum())


def _change_costs(own: Float[np.ndarray, " labels"], power: float) -> Float[np.ndarray, " labels"]:
    """By how much the distance grows when a label's membership changes; 1 at probability 0."""
    return np.maximum(own, 1 - own) ** power - np.minimum(own, 1 - own) ** power


def _base(probs: csr_array, power: float) -> Float[np.ndarray, " rows"]:
    """Distance of each row's nearest label set; summed in order, so zeros stored change nothing."""
    own = np.minimum(probs.data.astype(np.float64), 1.0)
    nearest = np.minimum(own, 1 - own) ** power
    return np.bincount(_rows(probs), nearest, minlength=probs.shape[0]).astype(np.float64)


def _rows(probs: csr_array) -> Int[np.ndarray, " stored"]:
    return np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))


def _check_multilabel(labels: LabelSpace) -> None:
    if not labels.multilabel:
        raise ValueError(
            "sets of label sets need a multi-label space; this one has one label a row (use "
            "llmlabel.calibrate.conformal, or load it with multilabel=true)"
        )
