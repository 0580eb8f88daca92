"""Tests of whether new rows are like the gold rows, which is what prediction sets build on.

A test that finds nothing shows nothing. Rows along their order are in `llmlabel.calibrate.drift`, who is
missed more often than others in `llmlabel.calibrate.diagnostics`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.shift import likelihood_ratio
from llmlabel.calibrate.tuning import with_settings
from llmlabel.data import gold_index, require_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

Scores = Float[np.ndarray, " rows"]

_FIRST_DRAWS, _ENOUGH = 200, 50
_DRAWN_CELLS = 4_000_000
FEWEST_COMPARED = 20
"""Rows of each kind that a comparison needs."""


@dataclass(frozen=True)
class Comparison:
    """One test of whether two groups of rows are alike.

    Attributes:
        of: "true_score" (nonconformity of true labels), "probability" (of the most probable label),
            "label" (which one it is), "classifier" (told apart by soft labels or vectors).
        rows: New rows compared.
        statistic: Largest distance of the two distributions; of "label" half the sum of distances.
        p_value: Chance of at least that if the rows are exchangeable.
        adjusted: The same where all tests of the result are looked at (Holm 1979).
    """

    of: str
    rows: int
    statistic: float
    p_value: float
    adjusted: float


@dataclass(frozen=True)
class Exchangeability:
    """What the comparisons found.

    Attributes:
        calibration_rows: The gold rows.
        new_rows: The rows compared with them.
        level: Chance that `shifted` is wrong, at most.
        tests: See `Comparison`.
        label_space: Fingerprint of the label space.
    """

    calibration_rows: int
    new_rows: int
    level: float
    tests: tuple[Comparison, ...]
    label_space: str

    @property
    def shifted(self) -> bool:
        """Whether some test says that the rows are not exchangeable."""
        return any(test.adjusted <= self.level for test in self.tests)


def check_exchangeability(
    calibration: Dataset,
    new: Dataset,
    labels: LabelSpace,
    *,
    score: Score | Nonconformity = "lac",
    features: Literal["label_probs", "vector"] = "label_probs",
    permutations: int = 999,
    level: float = 0.05,
    seed: int = 0,
) -> Exchangeability:
    """Tests whether new rows could be a random part of the gold rows and new rows together.

    Compared are the largest probability, the most probable label, a classifier that is trained to
    tell one half of the rows apart and tested on the other (Lopez-Paz and Oquab 2017, arXiv
    1610.06545), and the nonconformity of the true labels of new rows whose gold is known, the only
    one that sees a change of what a text means. Each by permutations, so that together they are
    wrong with a chance of at most `level`.

    Differs from the paper: the classifier's test is the distance of its two distributions of
    probabilities, not its accuracy.

    Args:
        calibration: The gold rows of the threshold.
        new: Rows that get sets; gold where it is known.
        labels: A single-label space.
        score: Nonconformity of true labels.
        features: What the classifier sees: soft labels, or the column `vector`.
        permutations: P-values are at least 1 / (this + 1).
        level: Chance of a false alarm.
        seed: Of permutations, halves and randomised scores.

    Raises:
        ValueError: If rows are in both, there are fewer than 20 of one kind, or too few permutations
            for the level.
    """
    check_share("level", level)
    if permutations < (needed := math.ceil(4 / level) - 1):
        raise ValueError(
            f"level={level} and up to 4 tests need at least {needed} permutations; got {permutations}"
        )
    datasets = apart(_by_id(calibration), _by_id(new), labels)
    one, two = (side_of(rows, labels, score, seed) for rows in datasets)

    def compared(known: Scores, here: Float[np.ndarray, " new"]) -> tuple[int, float, float]:
        return len(here), *permutation_test(known, here, permutations=permutations, seed=seed)

    by_label = shares_test(one.counts, two.counts, permutations=permutations, seed=seed)
    found = {"probability": compared(one.top, two.top), "label": (len(two.top), *by_label)}
    if (odds := _classified(datasets, (one, two), features, seed)) is not None:
        found["classifier"] = compared(*odds)
    known, given = (side.true[~np.isnan(side.true)] for side in (one, two))
    if min(len(known), len(given)) >= FEWEST_COMPARED:
        refuse_routed(new)
        found["true_score"] = compared(known, given)
    adjusted = holm([p_value for *_, p_value in found.values()])
    pairs = zip(found.items(), adjusted, strict=True)
    tests = tuple(Comparison(name, *test, own) for (name, test), own in pairs)
    return Exchangeability(len(one.top), len(two.top), level, tests, labels.fingerprint)


# ------------------------------------------------------------------------------------------- arrays


def permutation_test(
    calibration: Scores, new: Float[np.ndarray, " new"], *, permutations: int = 999, seed: int = 0
) -> tuple[float, float]:
    """The Kolmogorov-Smirnov distance of two samples, and its exact p-value.

    (1 + permutations at least as far) / (1 + permutations): at most a with probability at most a if
    all rows are exchangeable, whatever ties or infinities there are (Phipson and Smyth 2010). P-values
    of new rows would not do for a test of uniformity: one draw of gold rows moves all of them.
    """
    rows, many = len(calibration) + len(new), len(new)
    pooled = np.concatenate([calibration, new])
    order = np.argsort(pooled, kind="stable")
    ordered = pooled[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], np.ones(1, dtype=bool)))

    def distance(is_new: Bool[np.ndarray, " all_rows"]) -> int:
        """In whole numbers, so that equal distances are equal."""
        found = np.cumsum(is_new)[ends] * rows - (ends + 1) * many
        return int(np.abs(found).max())

    marks = np.arange(rows) >= len(calibration)
    observed, rng = distance(marks[order]), np.random.default_rng(seed)
    further = sum(distance(rng.permutation(marks)) >= observed for _ in range(permutations))
    return observed / (len(calibration) * many), (1 + further) / (1 + permutations)


def shares_test(
    calibration: Int[np.ndarray, " kinds"],
    new: Int[np.ndarray, " kinds"],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> tuple[float, float]:
    """Total variation of the shares of kinds, and the p-value of chi-square by permutations.

    A permutation of rows draws the kinds of the new ones without replacement, so that counts are
    enough. The p-value is that of `permutation_test`; once 50 draws were at least as far it is their
    share, and no more are drawn (Besag and Clifford 1991).
    """
    kinds = np.flatnonzero(calibration + new)
    known, here = calibration[kinds].astype(np.int64), new[kinds].astype(np.int64)
    both, many = known + here, int(here.sum())
    expected = both * (many / both.sum())
    distance = float(np.abs(here / many - known / known.sum()).sum() / 2)
    least = ((here - expected) ** 2 / both).sum() * (1 - 1e-9)  # equal ones, but for rounding
    rng, further, done, size = np.random.default_rng(seed), 0, 0, _FIRST_DRAWS
    while done < permutations:
        size = min(size, permutations - done, max(1, _DRAWN_CELLS // len(kinds)))
        drawn = rng.multivariate_hypergeometric(both, many, size=size, method="marginals")
        count = further + np.cumsum(((drawn - expected) ** 2 / both).sum(axis=1) >= least)
        if count[-1] >= _ENOUGH:
            return distance, _ENOUGH / (done + int(np.argmax(count >= _ENOUGH)) + 1)
        further, done, size = int(count[-1]), done + size, 2 * size
    return distance, (1 + further) / (1 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for who looks at all of them, Holm 1979."""
    found, largest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[at]))
        found[at] = largest
    return found


# -------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, eq=False)
class Side:
    """What is compared of gold rows or new rows."""

    ids: list[str]
    probs: csr_array
    top: Scores
    """The largest probability."""
    first: Int[np.ndarray, " rows"]
    """The most probable label; one after the last where there is none."""
    true: Scores
    """Nonconformity of the true label; NaN where nobody knows it."""
    sizes: Int[np.ndarray, " rows"] | None

    @property
    def counts(self) -> Int[np.ndarray, " labels_and_none"]:
        """Rows by most probable label."""
        return np.bincount(self.first, minlength=self.probs.shape[1] + 1)

    def some(self, rows: Int[np.ndarray, " some"]) -> "Side":
        """Only these rows."""
        sizes = None if self.sizes is None else self.sizes[rows]
        ids = [self.ids[row] for row in rows.tolist()]
        return Side(ids, self.probs[rows], self.top[rows], self.first[rows], self.true[rows], sizes)


def side_of(dataset: Dataset, labels: LabelSpace, score: Score | Nonconformity, seed: int) -> Side:
    """What is compared of these rows; sets and gold where they are there."""
    ids = dataset["id"][:]
    probs = SoftLabels.from_dataset(dataset, labels).probs
    first = np.asarray(probs.argmax(axis=1), dtype=np.int64).ravel()
    first[np.diff(probs.indptr) == 0] = len(labels)
    true, sizes = np.full(len(dataset), np.nan), None
    if "set_ids" in dataset.column_names:
        require_columns(dataset, "set_ids")
        lists = arrow_table(dataset.select_columns(["set_ids"]))["set_ids"].combine_chunks()
        sizes = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if "gold" in dataset.column_names:
        require_columns(dataset, "gold")
        known = arrow_table(dataset.select_columns(["gold"]))["gold"].is_valid().to_numpy()
        how = with_settings(score)
        draws, gold = row_uniforms(ids, seed=seed), gold_index(dataset, labels)
        true[known] = true_scores(probs[known], gold[known], how, draws[known])
    top = probs.max(axis=1).toarray().ravel().astype(np.float64)
    return Side(ids, probs, top, first, true, sizes)


def _classified(
    datasets: tuple[Dataset, Dataset], sides: tuple[Side, Side], features: str, seed: int
) -> tuple[Scores, Float[np.ndarray, " new"]] | None:
    """The odds, in the halves that a classifier has not seen; None where the halves are small."""
    halves = [row_uniforms((f"half/{i}" for i in side.ids), seed=seed) < 0.5 for side in sides]
    if min(min(int(half.sum()), int((~half).sum())) for half in halves) < FEWEST_COMPARED // 2:
        return None
    seen: list[Any] = [
        row_vectors(rows).astype(np.float64)
        if features == "vector"
        else side.probs.astype(np.float64)
        for rows, side in zip(datasets, sides, strict=True)
    ]
    known, other = (some[np.flatnonzero(half)] for some, half in zip(seen, halves, strict=True))
    odds = [
        likelihood_ratio(known, other, some[np.flatnonzero(~half)])
        for some, half in zip(seen, halves, strict=True)
    ]
    return odds[0], odds[1]


def apart(calibration: Dataset, new: Dataset, labels: LabelSpace) -> tuple[Dataset, Dataset]:
    """Both, if no row is in both and there are enough."""
    if labels.multilabel:
        raise ValueError(
            "these tests need a label space of one label a row; this one is multi-label"
        )
    for name, rows in (("calibration", calibration), ("new", new)):
        require_columns(rows, "id")
        if len(rows) < FEWEST_COMPARED:
            raise ValueError(
                f"{name} has {len(rows)} rows; a comparison needs at least {FEWEST_COMPARED} of each"
            )
    if both := sorted({*calibration["id"][:]} & {*new["id"][:]}):
        raise ValueError(
            f"{len(both)} rows are both in calibration and new, the first with id {both[0]!r}; new "
            "rows are rows without a part in the threshold"
        )
    return calibration, new


def _by_id(dataset: Dataset) -> Dataset:
    """The rows in the order of their ids: the sums of a regression depend on the order."""
    require_columns(dataset, "id")
    return dataset.select(np.argsort(np.array(dataset["id"][:], dtype=object), kind="stable"))


def check_share(name: str, share: float) -> None:
    """Raises a ValueError unless it lies between 0 and 1."""
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {share}")
