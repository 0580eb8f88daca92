"""Probabilities that mean what they say: the way to get them, chosen by cross-validation on gold rows."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel import metrics
from llmlabel.calibrate.corrections import (
    Correction,
    Method,
    corrected,
    fit_correction,
    intervals,
    own,
    row_losses,
    shared_temperature,
)
from llmlabel.calibrate.linear import GoldRows, row_of
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.temperature import MIN_ROWS
from llmlabel.data import gold_index, gold_matrix, require_columns, with_columns, with_gold
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

MOST_LABELS = {"label_temperature": 2000, "vector": 2000, "isotonic": 2000, "dirichlet": 100}
"""Labels that a method is fitted for at most."""

FEWEST_ROWS = {
    **dict.fromkeys(("label_temperature", "vector"), 30),
    **dict.fromkeys(("venn_abers", "isotonic", "dirichlet"), 100),
}
"""Gold rows that "auto" tries a method with at least: fewer choose by chance."""

STRENGTHS = {
    "label_temperature": (1.0, 0.1, 0.01, 0.001),
    "vector": (1.0, 0.1, 0.01, 0.001),
    "dirichlet": (10.0, 1.0, 0.1, 0.01, 0.001),
}
"""How strongly a method is drawn back to the temperature: those that cross-validation tries."""


@dataclass(frozen=True)
class Quality:
    """How good probabilities are on gold rows; with several labels a row over all stored labels.

    Attributes:
        nll: Mean negative log-likelihood of gold, in nats; a likelihood is at least 1e-12.
        brier: Brier score.
        ece: Expected calibration error of the top probability (of every one that is stored), in ten
            bins of equal mass.
    """

    nll: float
    brier: float
    ece: float


@dataclass(frozen=True)
class Calibration:
    """A fitted way to correct probabilities, and what it did to rows that it was not fitted on.

    Attributes:
        correction: What was fitted, or chosen.
        before: Quality of the probabilities as they were.
        after: The same where each row is corrected by what was fitted on the other folds. It is
            that of the method chosen, so a little too good where many were tried.
        tried: Cross-validated `nll` of everything that was tried.
        skipped: Method -> why it was not tried.
        rows: Number of gold rows.
        labels_without_gold: Number of labels that gold says nothing about: those keep the
            temperature, or the probability that they have.
        folds: Number of parts of the cross-validation.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    correction: Correction
    before: Quality
    after: Quality
    tried: dict[str, float]
    skipped: dict[str, str]
    rows: int
    labels_without_gold: int
    folds: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def calibrate_probs(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    method: Method | Literal["auto"] = "auto",
    folds: int = 5,
    seed: int = 0,
    training: Dataset | None = None,
) -> Calibration:
    """Fits a correction of the soft labels on gold rows; `apply_calibration` corrects others.

    With "auto" all that fit are tried from the simplest on, each from the strongest pull on; one is
    taken instead of the one before where its negative log-likelihood, cross-validated, is lower by
    more than one standard error of the difference. Rows for prediction sets must be others.

    "temperature" fits one number; "label_temperature" one a label, in a multi-label space; "vector"
    and "dirichlet" a linear map of the log-probabilities; "isotonic" a rising curve a label;
    "venn_abers" a pair of curves for a yes or no: two labels, or each label of a multi-label space.

    Args:
        dataset: The gold rows. Rows without a soft label, of unknown gold and, in a single-label
            space, of none of the labels say nothing and are left out.
        labels: Their label space.
        method: Which, or "auto".
        folds: Parts of the cross-validation; each label's gold rows are spread over all of them.
        seed: Of the parts, which depend on the ids and not on the order of the rows.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: Fewer than 10 usable rows, or `folds`; a method that does not fit the label
            space or its size; rows whose `split` is "test"; gold rows that were trained on.
    """
    if method != "auto" and method not in get_args(Method):
        raise ValueError(f"method must be auto or {', '.join(get_args(Method))}; got {method}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2; got {folds}")
    require_columns(dataset, "id", "gold")
    _refuse_test(dataset)
    skipped = {name: reason for name in get_args(Method) if (reason := _misfit(name, labels))}
    if method in skipped:
        raise ValueError(f"method {method} cannot be used: {skipped[method]}")
    refuse_trained(with_gold(dataset), training)
    gold, part, source = _read(dataset, labels, folds=folds, seed=seed)
    if method == "auto":
        for name, fewest in FEWEST_ROWS.items():
            if len(part) < fewest:
                skipped.setdefault(
                    name, f"it is tried with at least {fewest} rows, not {len(part)}"
                )
    else:
        skipped = {}
    candidates = [
        (name, strength)
        for name in get_args(Method)
        if name not in skipped and method in ("auto", name)
        for strength in STRENGTHS.get(name, (None,))
    ]
    held_out = _held_out(gold, part, candidates)
    losses = [row_losses(values, gold) for values in held_out]
    best = _chosen(losses)
    names = [_called(*candidate) for candidate in candidates]
    return Calibration(
        fit_correction(gold, *candidates[best], temperature=shared_temperature(gold)),
        _quality(gold.probs.data, gold),
        _quality(held_out[best], gold),
        {called: _mean(loss, gold) for called, loss in zip(names, losses, strict=True)},
        skipped,
        len(part),
        int((~gold.seen()).sum()),
        folds,
        labels.fingerprint,
        *source,
    )


def apply_calibration(
    dataset: Dataset,
    labels: LabelSpace,
    calibration: Calibration,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Corrects the soft labels of every row; each row of a single-label space keeps its sum.

    What a row does not store stays so. "venn_abers" also adds `label_low` and `label_high`, the
    interval of each probability in the order of `label_ids`: wide where gold rows say little.

    Args:
        dataset: The rows.
        labels: The label space of the fit.
        calibration: What `calibrate_probs` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the calibration was fitted in another label space or on another model's labels.
    """
    check_space(labels, calibration.label_space, what="calibration")
    check_engines(dataset, calibration.engines, other_engine)
    soft = SoftLabels.from_dataset(dataset, labels)
    probs = _stored(soft.probs)
    fit, multilabel = calibration.correction, labels.multilabel
    values = corrected(fit, probs, multilabel=multilabel)
    result = SoftLabels(_with(probs, values), soft.space, multilabel).add_to(dataset)
    if fit.method != "venn_abers":
        return result
    table = arrow_table(result.select_columns(["label_ids"]))["label_ids"].combine_chunks()
    ids = table.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    rows = np.repeat(np.arange(len(dataset)), np.diff(probs.indptr))
    stored = np.searchsorted(rows * len(labels) + probs.indices, rows * len(labels) + ids)
    whole = probs.data / own(probs, multilabel=multilabel)  # the sum of the row, or 1
    columns = {}
    bounds = intervals(fit, probs, multilabel=multilabel)
    for column, bound in zip(("label_low", "label_high"), bounds, strict=True):
        offsets = pa.array(probs.indptr, pa.int32())
        at = pa.array((bound * whole)[stored], pa.float32())
        columns[column] = pa.ListArray.from_arrays(offsets, at), List(Value("float32"))
    return with_columns(result, columns)


def _called(method: Method, strength: float | None) -> str:
    return method if strength is None else f"{method} at strength {strength:g}"


def _misfit(method: Method, labels: LabelSpace) -> str | None:
    """Why a method does not fit a label space."""
    if method == "dirichlet" and labels.multilabel:
        return "it needs a label space of one label a row (vector fits each label for itself)"
    if method == "label_temperature" and not labels.multilabel:
        return "it needs a multi-label space (temperature and vector fit one label a row)"
    if method == "venn_abers" and not labels.multilabel and len(labels) != 2:
        return f"it needs a yes or no: two labels, not {len(labels)}, or a multi-label space"
    most = MOST_LABELS.get(method)
    if most is not None and len(labels) > most:
        return f"it is fitted for at most {most} labels, not {len(labels)} (use temperature)"
    return None


def _refuse_test(dataset: Dataset) -> None:
    if "split" in dataset.column_names and (test := dataset["split"][:].count("test")):
        raise ValueError(
            f"{test} of {len(dataset)} rows are test rows, which a calibration must not see; fit it "
            "on llmlabel.data.part(..., split='validation')"
        )


def _stored(probs: csr_array) -> csr_array:
    """In float64 and without zeros, which say no more than a label that is not stored."""
    probs = csr_array(probs, dtype=np.float64, copy=True)
    probs.eliminate_zeros()
    return probs


def _with(probs: csr_array, values: Float[np.ndarray, " stored"]) -> csr_array:
    return csr_array((values, probs.indices, probs.indptr), shape=probs.shape)


def _read(
    dataset: Dataset, labels: LabelSpace, *, folds: int, seed: int
) -> tuple[GoldRows, Int[np.ndarray, " rows"], tuple[tuple[str, ...], str]]:
    """The usable gold rows, in an order that depends on their ids only, the fold of each, and whose."""
    known = with_gold(dataset)
    refuse_routed(known)
    probs = _stored(SoftLabels.from_dataset(known, labels).probs)
    usable = np.diff(probs.indptr) > 0
    at, rows_of = probs.indices, row_of(probs)
    if labels.multilabel:
        true = gold_matrix(known, labels)
        first = np.where(true.any(axis=1), true.argmax(axis=1), -1)
        hits = true[rows_of, at]
    else:
        first = gold_index(known, labels)
        usable &= first >= 0
        hits = first[rows_of] == at
    if (rows := int(usable.sum())) < (needed := max(MIN_ROWS, folds)):
        raise ValueError(
            f"a calibration of {folds} folds needs at least {needed} rows with a gold label and a "
            f"soft label; {rows} of {len(dataset)} rows have both"
        )
    uniforms = row_uniforms((f"fold/{row}" for row in known["id"][:]), seed=seed)
    order = np.lexsort((uniforms, first))  # label by label, so that each is spread over all folds
    order = order[usable[order]]
    gold = GoldRows(probs, _with(probs, hits * 1.0), labels.multilabel).take(order)
    source = fitted_on(known.select(order), labels, gold.probs)
    return gold, np.arange(len(order)) % folds, source


def _held_out(
    gold: GoldRows,
    part: Int[np.ndarray, " rows"],
    candidates: list[tuple[Method, float | None]],
) -> list[Float[np.ndarray, " stored"]]:
    """The probabilities of every candidate, those of each fold by what the other folds fitted."""
    found = [np.zeros(gold.probs.nnz) for _ in candidates]
    fold_of = part[row_of(gold.probs)]
    for fold in np.unique(part).tolist():
        rest, held = gold.take(part != fold), gold.take(part == fold)
        temperature = shared_temperature(rest)
        for values, (method, strength) in zip(found, candidates, strict=True):
            fit = fit_correction(rest, method, strength, temperature=temperature)
            values[fold_of == fold] = corrected(fit, held.probs, multilabel=gold.multilabel)
    return found


def _chosen(losses: list[Float[np.ndarray, " rows"]]) -> int:
    """Which candidate; a later one only where it beats the one before by one standard error."""
    kept = 0
    for later in range(1, len(losses)):
        gain = losses[kept] - losses[later]
        if gain.mean() > gain.std(ddof=1) / math.sqrt(len(gain)):
            kept = later
    return kept


def _mean(losses: Float[np.ndarray, " rows"], gold: GoldRows) -> float:
    """Over rows; with several labels a row over all that are stored."""
    return float(losses.sum()) / (gold.probs.nnz if gold.multilabel else len(losses))


def _quality(values: Float[np.ndarray, " stored"], gold: GoldRows) -> Quality:
    rows, hits = row_of(gold.probs), gold.hits.data
    squared = np.bincount(rows, weights=(values - hits) ** 2)
    nll = _mean(row_losses(values, gold), gold)
    if gold.multilabel:
        table = metrics.binned(values, hits, binning="mass")
        return Quality(nll, _mean(squared, gold), metrics.calibration_error(*table))
    squared += 1 - np.bincount(rows, weights=hits)  # gold that is not stored has probability 0
    top = np.maximum.reduceat(values, gold.probs.indptr[:-1])
    tops = np.flatnonzero(values == top[rows])
    first = tops[np.unique(rows[tops], return_index=True)[1]]  # of equal ones the lowest id
    table = metrics.binned(top, hits[first], binning="mass")
    return Quality(nll, _mean(squared, gold), metrics.calibration_error(*table))
