"""Whether new rows are like the gold rows, which is what prediction sets build on: tests, and a monitor.

`check_exchangeability` compares all new rows at once, `monitor_drift` follows them in their order. Both
keep the chance of a false alarm at most at a level. That they find nothing shows nothing; who is missed
more often than others is in `llmlabel.calibrate.diagnostics`.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.quantile import conformal_p_values, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.shift import likelihood_ratio
from llmlabel.data import gold_index, require_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

Scores = Float[np.ndarray, " rows"]

_JUMP = 0.01
"""Vovk et al. 2021: how readily the bet changes its direction."""

_FEWEST_PERMUTATIONS = 999
_FIRST_DRAWS, _ENOUGH = 200, 50
_DRAWN_CELLS = 4_000_000
_FEWEST_COMPARED = 20
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


@dataclass(frozen=True)
class Window:
    """A stretch of new rows.

    Attributes:
        first: Value of the column of the first row; its place where rows are in their own order.
        last: The same of the last row.
        rows: Number of rows.
        small_p_values: Share of rows with a p-value of the most probable label of at most alpha;
            about alpha if nothing changed.
        mean_set_size: Null without sets.
        label: The most probable label whose share changed most.
        label_change: Its share here less that among the gold rows.
        p_values: Of the tests against the gold rows: "small_p_values", "label", and where there are
            sets "set_size", where there is gold "true_score".
        alarm: Whether one of them is too small for all tests of all windows together.
    """

    first: str
    last: str
    rows: int
    small_p_values: float
    mean_set_size: float | None
    label: str
    label_change: float
    p_values: dict[str, float]
    alarm: bool


@dataclass(frozen=True)
class Drift:
    """What was seen along the stream.

    Attributes:
        level: Chance of any alarm without drift, at most; windows and bets have half of it each.
        alpha: What counts as a small p-value.
        windows: In the order of the stream.
        wealth: Of each bet the logarithm to base 10 of the most that it ever made of 1.
        alarms: Of each bet that raised one: id of the row at which it did.
        label_space: Fingerprint of the label space.
    """

    level: float
    alpha: float
    windows: tuple[Window, ...]
    wealth: dict[str, float]
    alarms: dict[str, str]
    label_space: str

    @property
    def drifted(self) -> bool:
        """Whether a window or a bet raised an alarm."""
        return bool(self.alarms) or any(window.alarm for window in self.windows)


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
    _check_share("level", level)
    if permutations < (needed := math.ceil(4 / level) - 1):
        raise ValueError(
            f"level={level} and up to 4 tests need at least {needed} permutations; got {permutations}"
        )
    datasets = _apart(_by_id(calibration), _by_id(new), labels)
    one, two = (_side(rows, labels, score, seed) for rows in datasets)

    def compared(known: Scores, here: Float[np.ndarray, " new"]) -> tuple[int, float, float]:
        return len(here), *permutation_test(known, here, permutations=permutations, seed=seed)

    by_label = shares_test(one.counts, two.counts, permutations=permutations, seed=seed)
    found = {"probability": compared(one.top, two.top), "label": (len(two.top), *by_label)}
    if (odds := _classified(datasets, (one, two), features, seed)) is not None:
        found["classifier"] = compared(*odds)
    known, given = (side.true[~np.isnan(side.true)] for side in (one, two))
    if min(len(known), len(given)) >= _FEWEST_COMPARED:
        refuse_routed(new)
        found["true_score"] = compared(known, given)
    adjusted = holm([p_value for *_, p_value in found.values()])
    pairs = zip(found.items(), adjusted, strict=True)
    tests = tuple(Comparison(name, *test, own) for (name, test), own in pairs)
    return Exchangeability(len(one.top), len(two.top), level, tests, labels.fingerprint)


def monitor_drift(
    new: Dataset,
    labels: LabelSpace,
    *,
    calibration: Dataset,
    column: str | None = None,
    window: int = 200,
    alpha: float = 0.1,
    level: float = 0.05,
    seed: int = 0,
) -> Drift:
    """Compares new rows with the gold rows along their order, window by window and row by row.

    Without drift, the chance of any alarm is at most `level`. Windows are tested by permutations
    against the gold rows, each by Bonferroni's share. Bets (`jumper_martingale`) on the p-values of
    the most probable label and, where gold is known, of the true label look at every row, so that
    they need no windows and can be read while the stream goes on.

    Args:
        new: Rows that get sets; `set_ids` and `gold` are used where they are there.
        labels: A single-label space.
        calibration: The gold rows of the threshold. Where their `set_ids` are there, too, the sizes
            are compared; these rows' own sets fit them a little, by about one row.
        column: What the rows are ordered by, such as a time; their own order where it is left out.
        window: About so many rows are a window.
        alpha: What counts as a small p-value.
        level: Chance of a false alarm.
        seed: Of permutations and ties.

    Raises:
        ValueError: If rows are in both, there are fewer than 20 of one kind, or an argument is out
            of range.
    """
    _check_share("level", level)
    _check_share("alpha", alpha)
    if window < _FEWEST_COMPARED:
        raise ValueError(f"window must be at least {_FEWEST_COMPARED} rows; got {window}")
    order, marks = _order(new, column)
    sides = _apart(calibration, new.select(order), labels)
    known, stream = (_side(rows, labels, "lac", seed) for rows in sides)
    bets = {"probability": (-known.top, -stream.top)}
    if not (np.isnan(known.true).all() or np.isnan(stream.true).all()):
        refuse_routed(new)
        bets["true_score"] = known.true, stream.true
    wealth, alarms = {}, {}
    for name, (past, here) in bets.items():
        at = np.flatnonzero(~np.isnan(here))
        ids = [stream.ids[row] for row in at.tolist()]
        draws = row_uniforms((f"drift/{name}/{row_id}" for row_id in ids), seed=seed)
        path = jumper_martingale(online_p_values(here[at], draws, past=past[~np.isnan(past)]))
        wealth[name] = float(path.max(initial=0.0) / math.log(10))
        if (over := np.flatnonzero(path >= math.log(2 * len(bets) / level))).size:
            alarms[name] = ids[over[0]]
    with_sizes = known.sizes is not None and stream.sizes is not None
    parts = np.array_split(np.arange(len(order)), max(1, len(order) // window))
    tests = len(parts) * (1 + with_sizes + len(bets))
    windows = tuple(
        _window(
            (known, stream.some(rows)),
            labels,
            (marks[rows[0]], marks[rows[-1]]),
            alpha=alpha,
            least=level / 2 / tests,
            seed=seed + number,
        )
        for number, rows in enumerate(parts)
    )
    return Drift(level, alpha, windows, wealth, alarms, labels.fingerprint)


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


def online_p_values(
    scores: Scores, uniforms: Scores, *, past: Float[np.ndarray, " past"] | None = None
) -> Scores:
    """Smoothed p-value of each score among those up to it, and those of the past.

    Independent and uniform if the rows are exchangeable (Vovk et al. 2003), which those against one
    set of gold rows are not.
    """
    seen: list[float] = [] if past is None else np.sort(past).tolist()
    found = np.empty(len(scores))
    for row, score in enumerate(scores.tolist()):
        insort(seen, score)
        above = len(seen) - bisect_right(seen, score)
        equal = len(seen) - bisect_left(seen, score) - above
        found[row] = (above + uniforms[row] * equal) / len(seen)
    return found


def jumper_martingale(p_values: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Logarithm of what a bet against uniform p-values makes of 1, after each row.

    Simple Jumper, Vovk et al. 2021 (arXiv 2102.10439), algorithm 1: money on small, on large and on
    no p-values, a hundredth of it shared out anew at each row. If the rows are exchangeable, it ever
    reaches 1 / level with probability at most level (Ville 1939).
    """
    directions = np.array([-1.0, 0.0, 1.0])
    money, log_wealth = np.full(3, 1 / 3), 0.0
    found = np.empty(len(p_values))
    for row, value in enumerate(p_values.tolist()):
        money = ((1 - _JUMP) * money + _JUMP / 3) * (1 + directions * (value - 0.5))
        total = money.sum()
        log_wealth += math.log(total)
        money = money / total
        found[row] = log_wealth
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values for who looks at all of them, Holm 1979."""
    found, largest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[at]))
        found[at] = largest
    return found


# -------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, eq=False)
class _Side:
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

    def some(self, rows: Int[np.ndarray, " some"]) -> "_Side":
        sizes = None if self.sizes is None else self.sizes[rows]
        ids = [self.ids[row] for row in rows.tolist()]
        return _Side(
            ids, self.probs[rows], self.top[rows], self.first[rows], self.true[rows], sizes
        )


def _side(dataset: Dataset, labels: LabelSpace, score: Score | Nonconformity, seed: int) -> _Side:
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
        how = score if isinstance(score, Nonconformity) else Nonconformity(score)
        draws, gold = row_uniforms(ids, seed=seed), gold_index(dataset, labels)
        true[known] = true_scores(probs[known], gold[known], how, draws[known])
    top = probs.max(axis=1).toarray().ravel().astype(np.float64)
    return _Side(ids, probs, top, first, true, sizes)


def _classified(
    datasets: tuple[Dataset, Dataset], sides: tuple[_Side, _Side], features: str, seed: int
) -> tuple[Scores, Float[np.ndarray, " new"]] | None:
    """The odds, in the halves that a classifier has not seen; None where the halves are small."""
    halves = [row_uniforms((f"half/{i}" for i in side.ids), seed=seed) < 0.5 for side in sides]
    if min(min(int(half.sum()), int((~half).sum())) for half in halves) < _FEWEST_COMPARED // 2:
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


def _window(
    sides: tuple[_Side, _Side],
    labels: LabelSpace,
    ends: tuple[str, str],
    *,
    alpha: float,
    least: float,
    seed: int,
) -> Window:
    known, here = sides
    permutations = max(_FEWEST_PERMUTATIONS, math.ceil(4 / least))
    kinds = {
        "small_p_values": _tails(-known.top, -here.top, alpha),
        "label": (known.counts, here.counts),
    }
    if known.sizes is not None and here.sizes is not None:
        most = int(max(known.sizes.max(), here.sizes.max())) + 1
        kinds["set_size"] = (
            np.bincount(known.sizes, minlength=most),
            np.bincount(here.sizes, minlength=most),
        )
    old, true = (side.true[~np.isnan(side.true)] for side in sides)
    if len(old) and len(true):
        kinds["true_score"] = _tails(old, true, alpha)
    p_values = {
        name: shares_test(*pair, permutations=permutations, seed=seed)[1]
        for name, pair in kinds.items()
    }
    change = here.counts / len(here.top) - known.counts / len(known.top)
    label = int(np.argmax(np.abs(change)))
    nonconforming = conformal_p_values(-here.top, np.sort(-known.top))
    return Window(
        *ends,
        len(here.top),
        float((nonconforming <= alpha).mean()),
        None if here.sizes is None else float(here.sizes.mean()),
        labels.ids[label] if label < len(labels) else "",
        float(change[label]),
        p_values,
        min(p_values.values()) <= least,
    )


def _tails(
    known: Scores, here: Float[np.ndarray, " new"], alpha: float
) -> tuple[Int[np.ndarray, "2"], Int[np.ndarray, "2"]]:
    """Rows at most and above a cut that leaves a share `alpha` of all of them above."""
    pooled = np.sort(np.concatenate([known, here]))
    cut = pooled[math.ceil((1 - alpha) * len(pooled)) - 1]
    return np.bincount(known > cut, minlength=2), np.bincount(here > cut, minlength=2)


def _apart(calibration: Dataset, new: Dataset, labels: LabelSpace) -> tuple[Dataset, Dataset]:
    """Both, if no row is in both and there are enough."""
    if labels.multilabel:
        raise ValueError(
            "these tests need a label space of one label a row; this one is multi-label"
        )
    for name, rows in (("calibration", calibration), ("new", new)):
        require_columns(rows, "id")
        if len(rows) < _FEWEST_COMPARED:
            raise ValueError(
                f"{name} has {len(rows)} rows; a comparison needs at least {_FEWEST_COMPARED} of each"
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


def _order(new: Dataset, column: str | None) -> tuple[Int[np.ndarray, " rows"], list[str]]:
    """The rows in the order of the column, of equal ones by id, and the values as text."""
    if column is None:
        return np.arange(len(new)), [str(row) for row in range(len(new))]
    require_columns(new, column, "id")
    values, ids = new[column][:], new["id"][:]
    if None in values:
        raise ValueError(
            f"column {column!r} is null in the row with id {ids[values.index(None)]!r}; rows without "
            "a place in the order cannot be monitored, leave them out"
        )
    order = sorted(range(len(new)), key=lambda row: (values[row], ids[row]))
    return np.array(order, dtype=np.int64), [str(values[row]) for row in order]


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {share}")
