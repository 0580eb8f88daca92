"""New rows along their order: a monitor that says when they stop being like the gold rows.

Its alarms are false with a chance of at most a level, however long the stream is. All rows at once are
compared in `llmlabel.calibrate.exchangeability`.
"""

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int

from llmlabel.calibrate.exchangeability import (
    FEWEST_COMPARED,
    Scores,
    Side,
    apart,
    check_share,
    shares_test,
    side_of,
)
from llmlabel.calibrate.quantile import conformal_p_values, row_uniforms
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.data import require_columns
from llmlabel.labelspace import LabelSpace

_JUMP = 0.01
"""Vovk et al. 2021: how readily the bet changes its direction."""

_FEWEST_PERMUTATIONS = 999


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
    check_share("level", level)
    check_share("alpha", alpha)
    if window < FEWEST_COMPARED:
        raise ValueError(f"window must be at least {FEWEST_COMPARED} rows; got {window}")
    order, marks = _order(new, column)
    sides = apart(calibration, new.select(order), labels)
    known, stream = (side_of(rows, labels, "lac", seed) for rows in sides)
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


# ------------------------------------------------------------------------------------------ arrays


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


# ------------------------------------------------------------------------------------------- parts


def _window(
    sides: tuple[Side, Side],
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
