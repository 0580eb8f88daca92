"""Which rows go to a person, and what is promised of the rest.

A row whose confidence is below a threshold goes to a person, the model keeps the others. Given a
target error, `fit_selective` finds the threshold; given a number of rows for people, `fit_budget`
says what error it proves for the others. `route` writes the decision. (How to spend a budget of
seconds without a promise is in `llmlabel.select.review`.)

**What the answers may be used for.** Rows that a person answered because the model was unsure are
harder than the rest, so no threshold, temperature, prediction set or accuracy may come from them:
every such fit refuses them (`refuse_routed`). They may be trained on. `route(..., audit=0.05)` also
sends a random share of all rows to a person, whatever their confidence; these are like new rows, and
`audit_rows` keeps them for a new fit.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int
from scipy.stats import binom

from llmlabel.calibrate.bounds import binomial_upper, rows_needed
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.data import gold_index, require_columns, with_columns, with_gold
from llmlabel.files import arrow_table, in_memory
from llmlabel.labelspace import LabelSpace
from llmlabel.select import id_ranks
from llmlabel.softlabels import SoftLabels

MODEL, PERSON, AUDIT = "model", "person", "audit"
"""The values of the column `route`; null is a row that was never routed."""

_START_SHARE = 0.2
"""Of the gold rows, those that choose where the tests start and are not tested themselves."""


@dataclass(frozen=True)
class Selective:
    """A fitted threshold of confidence, and what it promises.

    Attributes:
        confidence: What measures it.
        threshold: The model keeps rows that are at least as confident; -inf keeps all.
        bound: Error of the rows that it keeps, at most, but for a share `delta` of draws of gold
            rows.
        delta: That share.
        error: Share of wrong labels among the tested gold rows that it keeps.
        kept: Share of the tested gold rows that it keeps.
        rows: Tested gold rows.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    confidence: str
    threshold: float
    bound: float
    delta: float
    error: float
    kept: float
    rows: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def fit_selective(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    target: float,
    delta: float = 0.1,
    confidence: str = "probability",
    seed: int = 0,
    training: Dataset | None = None,
) -> Selective:
    """Fits the lowest threshold above which at most a share `target` of labels is proven wrong.

    Selection with guaranteed risk, Geifman and El-Yaniv 2017 (arXiv 1705.08500): the errors among
    the gold rows above a threshold are binomial, so its tail tests each threshold exactly. The
    error is that of the most probable label, among new rows above the threshold; the promise fails
    for at most a share `delta` of draws of gold rows, which must be independent draws of what will
    be routed, and seen by no model.

    Differs from the paper: its thresholds come from a binary search over the same rows, with
    `delta` shared by the log2 n steps. Here a fifth of the gold rows, drawn by id, choose a first
    threshold, the other rows test it and then lower ones until one fails (fixed-sequence testing,
    Angelopoulos et al. 2021, arXiv 2110.01052), each at the whole `delta`.

    Args:
        dataset: Gold rows with soft labels; rows whose gold nobody knows (null) are left out, a row
            that is none of the labels counts as wrong.
        labels: A single-label space.
        target: Error allowed among the rows that the model keeps.
        delta: Share of draws of gold rows for which the promise may fail.
        confidence: "probability" of the most probable label; "set_size", the fewer labels in
            `set_ids` the surer, and none is the least sure; or a column of numbers, higher is
            surer, such as `p_value`. Sets and p-values must come from other gold rows.
        seed: Of the draw of the fifth.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If an argument is out of range, gold rows were chosen because they are
            uncertain or were trained on, or no threshold can be certified.
    """
    for name, share in (("target", target), ("delta", delta)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {share}")

    rows = _gold_rows(dataset, labels, confidence, training)
    choosing = row_uniforms(rows.ids, seed=seed) < _START_SHARE
    tested = ~choosing
    count = int(tested.sum())
    needed = rows_needed(alpha=target, delta=delta, bound="binomial")
    if count < needed:
        raise ValueError(
            f"cannot certify error <= {target}: needs n >= {needed} gold rows to test, there are "
            f"{count} of {len(tested)} (label more rows, or allow a larger target or delta)"
        )
    start = first_threshold(rows.confidence[choosing], rows.wrong[choosing], target=target)
    found = selective_threshold(
        rows.confidence[tested], rows.wrong[tested], target=target, delta=delta, start=start
    )
    if found is None:
        kept = tested & (rows.confidence >= start)
        why = (
            f"{int(rows.wrong[kept].sum())} of the {int(kept.sum())} most confident gold rows are wrong"
            if kept.any()
            else f"none of the {count} gold rows to test is as confident as {start:g}, the first threshold"
        )
        raise ValueError(
            f"cannot certify error <= {target}: {why} (label more rows, or allow a larger target or "
            "delta)"
        )
    return _result(rows, tested, confidence, (found, target, delta), labels)


def fit_budget(
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    people: int,
    delta: float = 0.1,
    confidence: str = "probability",
    training: Dataset | None = None,
) -> Selective:
    """Sends the `people` least confident rows of a pool to people, and bounds the error of the rest.

    The threshold comes from the pool alone, so the errors of the gold rows above it are binomial and
    the bound of Clopper and Pearson 1934 is exact. Equally confident rows go together, so fewer than
    `people` may go.

    Args:
        dataset: Gold rows, as in `fit_selective`, none of which is in the pool.
        pool: The rows to route.
        labels: A single-label space.
        people: Rows that people can answer.
        delta: Share of draws of gold rows for which the bound may fail.
        confidence: As in `fit_selective`.
        training: As in `fit_selective`.

    Raises:
        ValueError: If an argument is out of range, gold rows were chosen because they are
            uncertain or were trained on, or a row of the pool is a gold row.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1; got {delta}")
    if not len(pool):
        raise ValueError("the pool has no rows to route")
    if not 0 <= people < len(pool):
        raise ValueError(
            f"people must be from 0 to {len(pool) - 1}, as the pool has {len(pool)} rows; got {people}"
        )
    rows = _gold_rows(dataset, labels, confidence, training)
    require_columns(pool, "id")
    if both := set(rows.ids) & set(pool["id"][:]):
        raise ValueError(
            f"{len(both)} rows of the pool are gold rows too, the first is {min(both)!r}; leave them "
            "out of one of the two"
        )
    own = np.sort(confidences(pool, labels, confidence))
    # Of rows that are as confident as the last one that would go, none goes.
    threshold = float(own[people]) if people else -math.inf
    kept = rows.confidence >= threshold
    if not kept.any():
        raise ValueError(
            f"no gold row is as confident as {threshold:g}, the rows that people={people} leaves; "
            "label more rows, or give people fewer"
        )
    bound = binomial_upper(int(rows.wrong[kept].sum()), int(kept.sum()), delta=delta)
    every = np.ones(len(kept), dtype=bool)
    return _result(rows, every, confidence, (threshold, bound, delta), labels)


def route(
    dataset: Dataset,
    labels: LabelSpace,
    selective: Selective,
    *,
    audit: float = 0.0,
    seed: int = 0,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `route`: "model" keeps the row's label, "person" and "audit" go to a person.

    "person" rows are less confident than the threshold. "audit" rows are drawn from all rows by their
    ids, whatever their confidence: only their answers may be used to calibrate again.

    Args:
        dataset: Rows with what the confidence needs.
        labels: The label space of the fit.
        selective: The fitted threshold.
        audit: Share of all rows that is drawn.
        seed: Of that draw.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If `audit` is no share, or the threshold was fitted in another label space or on
            another model's labels.
    """
    if not 0 <= audit < 1:
        raise ValueError(f"audit must be a share of at least 0 and below 1; got {audit}")
    check_space(labels, selective.label_space)
    check_engines(dataset, selective.engines, other_engine)
    require_columns(dataset, "id")
    sure = confidences(dataset, labels, selective.confidence) >= selective.threshold
    drawn = row_uniforms((f"audit/{id}" for id in dataset["id"][:]), seed=seed) < audit
    routes = np.where(drawn, AUDIT, np.where(sure, MODEL, PERSON)).tolist()
    return with_columns(dataset, {"route": (routes, Value("string"))})


# ------------------------------------------------------------------- what may be calibrated with


def refuse_routed(dataset: Dataset) -> None:
    """Raises a ValueError where rows with a known gold were routed and are no random audit."""
    if "route" not in dataset.column_names or "gold" not in dataset.column_names:
        return
    counts = Counter(with_gold(dataset)["route"][:])
    if unknown := set(counts) - {MODEL, PERSON, AUDIT, None}:
        raise ValueError(
            f"the column 'route' holds {min(unknown, key=str)!r}, but means {MODEL}, {PERSON}, "
            f"{AUDIT} or null; rename it"
        )
    if biased := counts[PERSON] + counts[MODEL]:
        raise ValueError(
            f"{biased} of {counts.total()} gold rows have been routed ({counts[PERSON]} to a person, "
            f"because they were uncertain): they are not like new rows, so nothing can be calibrated "
            "on them. Keep the random audit with llmlabel.calibrate.selective.audit_rows, or remove "
            "the column 'route' if every row has gold, whatever its route"
        )


def audit_rows(dataset: Dataset) -> Dataset:
    """The rows that may be calibrated with: the random audit, and rows that were never routed.

    Raises:
        ValueError: If there are none.
    """
    require_columns(dataset, "route")
    routes = dataset["route"][:]
    fit = [row for row, value in enumerate(routes) if value in (AUDIT, None)]
    if not fit:
        raise ValueError(
            f"none of {len(routes)} rows is a random audit; route rows with audit=0.05 or so"
        )
    return in_memory(arrow_table(dataset.select(fit)))


# -------------------------------------------------------------------------------- the statistics


def confidences(
    dataset: Dataset, labels: LabelSpace, confidence: str
) -> Float[np.ndarray, " rows"]:
    """How sure each row is, higher is surer; null and NaN in a column are the least sure."""
    if confidence == "probability":
        probs = SoftLabels.from_dataset(dataset, labels).probs
        return probs.max(axis=1).toarray().ravel().astype(np.float64)
    if confidence == "set_size":
        require_columns(dataset, "set_ids")
        sizes = [len(some or ()) for some in dataset["set_ids"][:]]
        return -np.array([size or len(labels) + 1 for size in sizes], dtype=np.float64)
    require_columns(dataset, confidence)
    try:
        given = np.array(dataset[confidence][:], dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"confidence: the column {confidence!r} holds other things than numbers; give "
            "'probability', 'set_size' or a column of numbers"
        ) from None
    return np.where(np.isnan(given), -np.inf, given)


def selective_threshold(
    confidence: Float[np.ndarray, " rows"],
    wrong: Bool[np.ndarray, " rows"],
    *,
    target: float,
    delta: float,
    start: float,
) -> float | None:
    """The last threshold, from `start` on downwards, before a test at `delta` fails; None if all do.

    The hypothesis at a threshold is that rows above it are wrong more often than `target`. `start`
    must not come from these rows.
    """
    thresholds, errors, counts = _steps(confidence, wrong)
    above = thresholds >= start
    first = int(above.sum())  # thresholds at or above the start: its own state
    own_errors, own_count = (errors[first - 1], counts[first - 1]) if first else (0, 0)
    tails = binom.cdf(
        np.append(own_errors, errors[first:]), np.append(own_count, counts[first:]), target
    )
    passed = tails <= delta
    run = len(passed) if passed.all() else int(np.argmin(passed))
    if not run:
        return None
    if run == len(passed):
        return -math.inf  # below the last row nothing changes
    return start if run == 1 else float(thresholds[first + run - 2])


def first_threshold(
    confidence: Float[np.ndarray, " rows"], wrong: Bool[np.ndarray, " rows"], *, target: float
) -> float:
    """The threshold with the strongest evidence, in these rows, that the rows above it are good."""
    thresholds, errors, counts = _steps(confidence, wrong)
    if not len(thresholds):
        return -math.inf
    return float(thresholds[int(np.argmin(binom.cdf(errors, counts, target)))])


def _steps(
    confidence: Float[np.ndarray, " rows"], wrong: Bool[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " steps"], Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
    """The distinct confidences, falling; wrong rows and rows that are at least as confident."""
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: len(falling)])
    return falling[last], np.cumsum(wrong[order])[last], last + 1


# ------------------------------------------------------------------------------------------ input


class _Rows(NamedTuple):
    """Gold rows."""

    ids: list[str]
    confidence: Float[np.ndarray, " rows"]
    wrong: Bool[np.ndarray, " rows"]
    source: tuple[tuple[str, ...], str]


def _gold_rows(
    dataset: Dataset, labels: LabelSpace, confidence: str, training: Dataset | None
) -> _Rows:
    if labels.multilabel:
        raise ValueError(
            "a row is right or wrong in a label space of one label a row; this one is multi-label "
            "(see llmlabel.calibrate.risk for promises there)"
        )
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    id_ranks(dataset)  # refuses repeated ids, which would be drawn together
    soft = SoftLabels.from_dataset(dataset, labels)
    best = np.full(len(dataset), -2)  # no label, which is wrong
    top = soft.top(1).probs
    best[np.diff(top.indptr) > 0] = top.indices
    sure = confidences(dataset, labels, confidence)
    wrong = best != gold_index(dataset, labels)
    return _Rows(dataset["id"][:], sure, wrong, fitted_on(dataset, labels, soft.probs))


def _result(
    rows: _Rows,
    tested: Bool[np.ndarray, " rows"],
    confidence: str,
    promise: tuple[float, float, float],
    labels: LabelSpace,
) -> Selective:
    kept = tested & (rows.confidence >= promise[0])
    count, left = int(tested.sum()), int(kept.sum())
    measured = int(rows.wrong[kept].sum()) / left, left / count, count
    return Selective(confidence, *promise, *measured, labels.fingerprint, *rows.source)
