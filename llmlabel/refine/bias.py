"""What a correction did: accuracy, confidence, label mix and label-order sensitivity, before and after."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool

from llmlabel import metrics
from llmlabel.data import gold_index, part, require_columns, with_columns, with_gold
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import LabelIds, Probs
from llmlabel.refine.orders import HOW, OrderSensitivity, order_sensitivity
from llmlabel.softlabels import SoftLabels

Verdict = Literal["gain", "no gain shown", "worse", "unknown: no gold"]


@dataclass(frozen=True)
class Quality:
    """How good soft labels are on the rows whose gold is known.

    Attributes:
        accuracy: Share of rows whose most probable label is the gold one.
        nll: Mean negative log-likelihood of gold, in nats.
        ece: Expected calibration error of the top probability.
    """

    accuracy: float
    nll: float
    ece: float


@dataclass(frozen=True)
class BiasReport:
    """What a correction did to the same rows.

    Attributes:
        verdict: On accuracy: `gain` or `worse` only where all of `gain_interval` says so.
        gold_rows: Number of rows whose gold is known.
        before: Quality without the correction; None without gold.
        after: Quality with it.
        won: Number of rows that the correction made right.
        lost: Number of rows that it made wrong.
        gain_interval: 95 % interval of accuracy after minus before, given how many rows changed;
            None without gold.
        mix_before: Mean probability of each label, by id, over all rows with a soft label.
        mix_after: The same with the correction.
        mix_gold: Share of each label among the gold rows; None without gold.
        order_before: How far answers depend on the label order; None where it was not read.
        order_after: The same with the correction.
        note: What is missing and how to get it, or None.
    """

    verdict: Verdict
    gold_rows: int
    before: Quality | None
    after: Quality | None
    won: int
    lost: int
    gain_interval: tuple[float, float] | None
    mix_before: dict[str, float]
    mix_after: dict[str, float]
    mix_gold: dict[str, float] | None
    order_before: OrderSensitivity | None
    order_after: OrderSensitivity | None
    note: str | None


def measure_bias(
    before: Dataset, after: Dataset, labels: LabelSpace, *, split: str | None = None
) -> BiasReport:
    """Compares soft labels with their correction; says `gain` only where held-out gold shows one.

    Gold is read here and nowhere in `llmlabel.refine.debias`, so it is held out as long as no prior
    that was given comes from the same rows. Label-order sensitivity comes from the `votes` of
    `llmlabel.refine.orders.read_orders`, before the correction and, since that corrects the votes
    of each order too, after it.

    Args:
        before: rows with soft labels; with `gold`, null where unknown, when there is any.
        after: the same rows, corrected.
        labels: the label space of both.
        split: gold counts in this part of the rows only; in all when left out.

    Raises:
        ValueError: the two have not the same ids in the same order, or the space is multi-label.
    """
    if labels.multilabel:
        raise ValueError("measure_bias needs labels that exclude each other (single-label)")
    require_columns(before, "id")
    require_columns(after, "id")
    if before["id"][:] != after["id"][:]:
        raise ValueError("`before` and `after` have other rows, or another order of them")
    tables = {"before": before, "after": after}
    soft = SoftLabels.from_sources(tables, labels)
    order_before, order_after, note = _orders(before, after, labels)
    rows, gold = _gold(before, labels, split)
    probs = {name: one.dense()[rows] for name, one in soft.items()}
    right = {name: metrics.correct(one, gold) for name, one in probs.items()}
    won, lost = changes(right["before"], right["after"])
    interval = gain_interval(won, lost, len(gold)) if len(gold) else None
    shares = np.bincount(gold[gold >= 0], minlength=len(labels)) / max(len(gold), 1)
    return BiasReport(
        verdict=_verdict(interval),
        gold_rows=len(gold),
        before=_quality(probs["before"], gold),
        after=_quality(probs["after"], gold),
        won=won,
        lost=lost,
        gain_interval=interval,
        mix_before=_mix(soft["before"], labels),
        mix_after=_mix(soft["after"], labels),
        mix_gold=dict(zip(labels.ids, shares.tolist(), strict=True)) if len(gold) else None,
        order_before=order_before,
        order_after=order_after,
        note=note,
    )


def changes(before: Bool[np.ndarray, " rows"], after: Bool[np.ndarray, " rows"]) -> tuple[int, int]:
    """Number of rows that became right, and of those that became wrong."""
    return int((~before & after).sum()), int((before & ~after).sum())


def gain_interval(won: int, lost: int, rows: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the change in accuracy from the rows that changed, of which half would win by luck.

    McNemar 1947 in its exact form: given the number of changed rows, those won are binomial, and
    0 lies outside exactly when the two-sided sign test rejects at 1 - `level`.
    """
    changed = won + lost
    if not changed:
        return 0.0, 0.0
    low, high = metrics.binomial_interval(won, changed, level=level)
    return (2 * low - 1) * changed / rows, (2 * high - 1) * changed / rows


def _verdict(interval: tuple[float, float] | None) -> Verdict:
    if interval is None:
        return "unknown: no gold"
    low, high = interval
    if low > 0:
        return "gain"
    return "worse" if high < 0 else "no gain shown"


def _gold(dataset: Dataset, labels: LabelSpace, split: str | None) -> tuple[LabelIds, LabelIds]:
    """Positions of the rows that count, and their gold."""
    if "gold" not in dataset.column_names:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    place = dataset.select_columns(
        [c for c in ("id", "gold", "split") if c in dataset.column_names]
    )
    place = with_columns(place, {"_row": (np.arange(len(dataset)), Value("int64"))})
    rows = with_gold(place if split is None else part(place, split=split))
    return np.array(rows["_row"][:], dtype=np.int64), gold_index(rows, labels)


def _quality(probs: Probs, gold: LabelIds) -> Quality | None:
    if not len(gold):
        return None
    return Quality(
        accuracy=metrics.accuracy(probs, gold),
        nll=metrics.nll(probs, gold),
        ece=metrics.ece(probs, gold),
    )


def _mix(soft: SoftLabels, labels: LabelSpace) -> dict[str, float]:
    rows = max(int((np.diff(soft.probs.indptr) > 0).sum()), 1)
    means = np.asarray(soft.probs.astype(np.float64).sum(axis=0)).ravel() / rows
    return dict(zip(labels.ids, means.tolist(), strict=True))


def _orders(
    before: Dataset, after: Dataset, labels: LabelSpace
) -> tuple[OrderSensitivity | None, OrderSensitivity | None, str | None]:
    """Sensitivity before and after, and what keeps one of them from being known."""
    first = order_sensitivity(before, labels)
    if first is None:
        return None, None, f"label-order sensitivity: the rows have no votes of two orders; {HOW}"
    if first.distance is None:
        what = "the votes hold the most probable label of each order only"
        return first, None, f"label-order sensitivity after the correction: {what}; {HOW}"
    second = order_sensitivity(after, labels)
    changed = not _same(before, after, "label_ids", "label_probs")
    if second is None or (changed and _same(before, after, "votes")):
        what = "`after` has not the corrected votes of each order"
        return first, None, f"label-order sensitivity after the correction: {what}; {HOW}"
    return first, second, None


def _same(one: Dataset, other: Dataset, *columns: str) -> bool:
    tables = [arrow_table(table.select_columns(list(columns))) for table in (one, other)]
    return all(tables[0][name].equals(tables[1][name]) for name in columns)
