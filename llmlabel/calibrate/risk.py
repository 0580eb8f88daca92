"""Thresholds for many labels a row: how much is missed or said wrongly, kept below a promised level.

A label is said where its probability is at least a threshold. Each gold row then has a loss between
0 and 1, and the threshold is the most useful one whose mean loss over new rows is at most `alpha`:
on average over gold rows ("crc"), or for all but a share `delta` of draws of gold rows ("rcps",
"ltt"). Every distinct probability is a candidate: the stored probabilities are sorted once, and
nothing of the size rows x labels is made.

A threshold for every label is in `llmlabel.calibrate.per_label`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack

from llmlabel.calibrate.bounds import ROUNDING, risk_p_values, rows_needed, upper_bound
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.written import with_set_ids
from llmlabel.data import gold_index, gold_matrix, require_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Risk = Literal["false_negative", "false_positive", "false_discovery", "f1", "size"]
Method = Literal["crc", "rcps", "ltt"]
Bound = Literal["hoeffding_bentkus", "hoeffding"]

_MONOTONE = ("false_negative", "false_positive", "size")
_STARTS = 20
"""Thresholds, spread evenly between 0 and 1, from which a risk without a safe end is tested."""
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True)
class RiskControl:
    """A fitted threshold; `predict_risk_sets` says the labels whose probability is at least this.

    Attributes:
        risk: What is controlled.
        method: How.
        alpha: Mean loss allowed.
        delta: Share of draws of gold rows for which the promise may fail; null with "crc".
        bound: Inequality behind "rcps" and "ltt"; "binomial" is exact; null with "crc".
        max_size: Labels that a row may be given; null unless `risk` is "size".
        threshold: Infinite where nothing has to be said.
        found: Mean loss of the gold rows at the threshold.
        upper: What they prove of the mean loss of new rows, at most `alpha`.
        mean_size: Labels said of a gold row on average.
        rows: Number of gold rows.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    risk: Risk
    method: Method
    alpha: float
    delta: float | None
    bound: str | None
    max_size: int | None
    threshold: float
    found: float
    upper: float
    mean_size: float
    rows: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


class RiskCurve(NamedTuple):
    """The loss of all rows together at every threshold that makes a difference, falling."""

    thresholds: Float[np.ndarray, " distinct"]
    """The first is infinite: nothing is said."""
    totals: Float[np.ndarray, " distinct"]


def fit_risk(  # noqa: PLR0913  # each is one plain choice
    dataset: Dataset,
    labels: LabelSpace,
    *,
    risk: Risk = "false_negative",
    alpha: float = 0.1,
    method: Method = "crc",
    delta: float = 0.1,
    max_size: int | None = None,
    bound: Bound = "hoeffding_bentkus",
    training: Dataset | None = None,
) -> RiskControl:
    """Fits the threshold that keeps the mean loss of new rows at most `alpha`.

    "crc": the expected loss, Angelopoulos et al. 2022 (arXiv 2208.02814), equation 4. "rcps": with
    probability 1 - `delta` over the gold rows, Bates et al. 2021 (arXiv 2101.02703), equation 4.
    "ltt": the same for risks that are not monotone, by tests in a fixed sequence, Angelopoulos et
    al. 2021 (arXiv 2110.01052), algorithm 1. "crc" needs gold rows that are exchangeable with new
    ones, the others independent draws of the same distribution; the model has seen none of them.

    The losses of a row: "false_negative", the share of its true labels that is not said, 0 without a
    true label; "false_positive", the share of the other labels that is said; "false_discovery", the
    share of the said labels that is wrong, 0 where none is said; "f1", 1 - F1, 0 where nothing is
    true and nothing said; "size", 1 where more than `max_size` labels are said. Chosen is the
    highest threshold for "false_negative", the one with the best F1 of the gold rows for "f1", and
    the lowest for the others. A label that is not stored is never said.

    Differs from the papers: the sequence of tests runs over all thresholds, not over a grid; the
    tests of "f1" start from 20 thresholds, each at `delta` / 20. The bound is binomial and exact
    where losses are 0 or 1 by their nature: "size", and "false_negative" in a single-label space.

    Args:
        dataset: Gold rows; rows whose gold nobody knows (null) are left out.
        labels: Their label space.
        risk: What is controlled.
        alpha: Mean loss allowed.
        method: "crc" and "rcps" for risks that are monotone, "ltt" for all.
        delta: For "rcps" and "ltt".
        max_size: For "size".
        bound: For losses between 0 and 1; "hoeffding" is the simpler and looser one.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If an argument is out of range or does not fit the risk, gold rows were chosen
            because they are uncertain or were trained on, or no threshold can be certified.
    """
    _check(risk, method, bound, alpha=alpha, delta=delta, max_size=max_size)
    probs, gold, source = gold_rows(dataset, labels, training)
    rows = probs.shape[0]
    binary = risk == "size" or (risk == "false_negative" and not labels.multilabel)
    bound_name = None if method == "crc" else "binomial" if binary else bound
    level = delta / _STARTS if risk == "f1" else delta
    needed = rows_needed(alpha=alpha, delta=level, bound=bound_name)
    if rows < needed:
        raise ValueError(
            f"cannot certify {risk} <= {alpha}: needs n >= {needed} gold rows, there are {rows} (label "
            "more rows, or allow a larger alpha or delta)"
        )
    curve = risk_curve(probs, gold, risk, max_size=max_size)
    if bound_name is None:
        certified = curve.totals + 1 <= alpha * (rows + 1) + ROUNDING
    else:
        p_values = risk_p_values(curve.totals, rows=rows, alpha=alpha, bound=bound_name)
        certified = p_values <= level
    threshold, total = _choose(curve, certified, risk)
    if total is None:
        raise ValueError(_cannot(curve, risk, rows=rows, alpha=alpha))
    found = max(total, 0.0) / rows
    return RiskControl(
        risk,
        method,
        alpha,
        delta if bound_name else None,
        bound_name,
        max_size,
        threshold,
        round(found, 12),  # beyond that, the order of the rows
        round(upper_bound(total, rows=rows, delta=level, bound=bound_name), 12),
        int((probs.data >= threshold).sum()) / rows,
        rows,
        labels.fingerprint,
        *source,
    )


def risk_curve(
    probs: csr_array, gold: csr_array, risk: Risk, *, max_size: int | None = None
) -> RiskCurve:
    """The summed losses at every distinct stored probability, from one sort."""
    rows = np.repeat(np.arange(probs.shape[0], dtype=np.int64), np.diff(probs.indptr))
    order = np.lexsort((-probs.data, rows))
    true = _stored_true(probs, gold)[order]
    said = np.arange(1, probs.nnz + 1) - probs.indptr[rows]
    so_far = np.cumsum(true)
    hits = so_far - np.concatenate([[0], so_far])[probs.indptr[rows]]
    truths = np.diff(gold.indptr)
    width = probs.shape[1]
    change = row_losses(risk, said, hits, truths[rows], labels=width, max_size=max_size)
    change -= row_losses(risk, said - 1, hits - true, truths[rows], labels=width, max_size=max_size)
    zero = np.zeros_like(truths)
    nothing = row_losses(risk, zero, zero, truths, labels=width, max_size=max_size).sum()
    scores = probs.data[order]
    falling = np.argsort(-scores, kind="stable")
    scores = scores[falling]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    totals = nothing + np.cumsum(change[falling])[last]
    return RiskCurve(
        np.concatenate([[np.inf], scores[last].astype(np.float64)]),
        np.concatenate([[nothing], totals]),
    )


def row_losses(
    risk: Risk,
    said: Int[np.ndarray, "..."],
    hits: Int[np.ndarray, "..."],
    truths: Int[np.ndarray, "..."],
    *,
    labels: int,
    max_size: int | None,
) -> Float[np.ndarray, "..."]:
    """The loss of rows with so many labels said, said and true, and true."""
    if risk == "false_negative":
        return np.where(truths > 0, 1 - hits / np.maximum(truths, 1), 0.0)
    if risk == "false_positive":
        return (said - hits) / np.maximum(labels - truths, 1)
    if risk == "false_discovery":
        return (said - hits) / np.maximum(said, 1)
    if risk == "f1":
        both = said + truths
        return np.where(both > 0, 1 - 2 * hits / np.maximum(both, 1), 0.0)
    return (said > (max_size or 0)).astype(np.float64)


def _choose(
    curve: RiskCurve, certified: Bool[np.ndarray, " distinct"], risk: Risk
) -> tuple[float, float | None]:
    """The most useful threshold that is certified, and the sum of losses there; None if there is none.

    Tests run from a safe end and stop at the first that fails. Where there is no safe end, they run
    from several thresholds that were fixed beforehand, downwards.
    """
    thresholds, totals = curve
    if risk == "false_negative":
        run = _run(certified[::-1])
        at = len(totals) - run
        return (float(thresholds[at]), float(totals[at])) if run else (math.inf, None)
    if risk != "f1":
        at = _run(certified) - 1  # at 0 nothing is said
        return (float(thresholds[at]), float(totals[at])) if at > 0 else (math.inf, None)
    best: tuple[float, float | None] = (math.inf, None)
    for start in (1 - (np.arange(_STARTS) + 0.5) / _STARTS).tolist():
        first = int(np.searchsorted(-thresholds, -start, side="right")) - 1
        if run := _run(certified[first:]):
            run_totals = totals[first : first + run]
            at = first + int(np.argmax(run_totals <= run_totals.min() + ROUNDING))
            if best[1] is None or totals[at] < best[1] - ROUNDING:
                # Of the first state only the start itself was tested, not all that look like it.
                best = (start if at == first else float(thresholds[at]), float(totals[at]))
    return best


def _run(certified: Bool[np.ndarray, " tests"]) -> int:
    """How many are certified before the first that is not."""
    return len(certified) if certified.all() else int(np.argmin(certified))


# ------------------------------------------------------------------------------------- prediction


def predict_risk_sets(
    dataset: Dataset,
    labels: LabelSpace,
    control: RiskControl,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels whose probability is at least the threshold, most probable first.

    Args:
        dataset: New rows.
        labels: The label space of the threshold.
        control: What `fit_risk` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the threshold was fitted in another label space or on another model's labels.
    """
    check_engines(dataset, control.engines, other_engine)
    return said_sets(dataset, labels, control.threshold, space=control.label_space)


def said_sets(
    dataset: Dataset,
    labels: LabelSpace,
    thresholds: float | Float[np.ndarray, " labels"],
    *,
    space: str,
) -> Dataset:
    """`set_ids` of one threshold, or of one a label, that was fitted in a label space."""
    check_space(labels, space)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    limits = np.broadcast_to(np.asarray(thresholds), len(labels))

    def sets(rows: slice) -> csr_array:
        block = probs[rows]
        inside = (block.data >= limits[block.indices]) & (block.data > 0)
        said = csr_array((inside, block.indices, block.indptr), shape=block.shape)
        said.eliminate_zeros()
        return said

    return with_set_ids(dataset, probs, sets)


# ------------------------------------------------------------------------------------------ input


def gold_rows(
    dataset: Dataset, labels: LabelSpace, training: Dataset | None = None
) -> tuple[csr_array, csr_array, tuple[tuple[str, ...], str]]:
    """Probabilities above 0, which labels are true, and whose the rows are; those of known gold."""
    require_columns(dataset, "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    if not labels.multilabel:
        gold_index(dataset, labels)  # refuses several true labels
    probs = SoftLabels.from_dataset(dataset, labels).probs
    if probs.nnz and not probs.data.all():
        probs = probs.copy()
        probs.eliminate_zeros()
    size = max(1, _BLOCK_CELLS // len(labels))
    blocks = [
        csr_array(
            gold_matrix(dataset.select(range(start, min(start + size, len(dataset)))), labels)
        )
        for start in range(0, len(dataset), size)
    ]
    none = csr_array((0, len(labels)), dtype=bool)
    gold = vstack(blocks, format="csr") if blocks else none
    return probs, gold, fitted_on(dataset, labels, probs)


def _stored_true(probs: csr_array, gold: csr_array) -> Bool[np.ndarray, " stored"]:
    """Whether each stored label is true."""
    true = np.zeros(probs.nnz, dtype=bool)
    at = position_in(gold, probs)
    true[at[at >= 0]] = True
    return true


def position_in(gold: csr_array, probs: csr_array) -> Int[np.ndarray, " golds"]:
    """Where each true label is stored, -1 where it is not."""
    stored, asked = _keys(probs), _keys(gold)
    at = np.searchsorted(stored, asked)
    inside = at < len(stored)
    at[inside] = np.where(stored[at[inside]] == asked[inside], at[inside], -1)
    return np.where(inside, at, -1)


def _keys(matrix: csr_array) -> Int[np.ndarray, " stored"]:
    """One number for each row and label, ascending."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return rows * matrix.shape[1] + matrix.indices


def _check(
    risk: str, method: str, bound: str, *, alpha: float, delta: float, max_size: int | None
) -> None:
    for name, value, choices in (
        ("risk", risk, Risk),
        ("method", method, Method),
        ("bound", bound, Bound),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}; got {value}")
    for name, share in (("alpha", alpha), ("delta", delta)):
        if not 0 < share < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {share}")
    if method != "ltt" and risk not in _MONOTONE:
        raise ValueError(
            f"{method} needs a risk that only rises or only falls with the threshold, which {risk} "
            f"does not; use method='ltt', or one of {', '.join(_MONOTONE)}"
        )
    if (max_size is not None) != (risk == "size") or (max_size is not None and max_size < 1):
        raise ValueError(
            f"max_size is for risk='size', where it is 1 or more; got max_size={max_size} with "
            f"risk={risk!r}"
        )


def _cannot(curve: RiskCurve, risk: Risk, *, rows: int, alpha: float) -> str:
    least = curve.totals.min() / rows
    if risk == "false_negative":
        return (
            f"cannot certify {risk} <= {alpha}: {least:.3g} of the true labels are missed even if "
            "every stored label is said (store more labels a row, label more rows, or allow a larger "
            "alpha)"
        )
    if risk == "f1":
        return (
            f"cannot certify f1 loss <= {alpha}: at the best threshold it is {least:.3g} on {rows} "
            "gold rows (label more rows, or allow a larger alpha)"
        )
    first = curve.totals[min(1, len(curve.totals) - 1)] / rows
    return (
        f"cannot certify {risk} <= {alpha} at any threshold at which a label is said: at the highest, "
        f"it is {first:.3g} on {rows} gold rows (label more rows, or allow a larger alpha)"
    )
