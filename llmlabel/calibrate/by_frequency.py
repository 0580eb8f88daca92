"""Calibration of very many labels: one rising curve for each tenth of the labels by frequency.

A curve per label would need gold of every label, and most labels of a large space have a handful of
rows; one curve for all is too sure of rare labels or too unsure of frequent ones.
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.linear import normalised, normalised_shares, row_of
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.temperature import MIN_ROWS
from llmlabel.calibrate.venn_abers import Curve, fit_isotonic, isotonic
from llmlabel.data import label_csr, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics.ranking import frequency_groups
from llmlabel.softlabels import SoftLabels

MIN_HITS = 50
"""True labels that a group has a curve of its own from; others share one of all labels."""

_ORDER = 1e-3
"""Share of the probability as it was, which keeps the order where a curve is level."""


@dataclass(frozen=True)
class FrequencyCalibration:
    """Curves by how many training rows have a label.

    Attributes:
        least: Fewest training rows of a label of each group, from the most frequent tenth on; the
            last group are the labels without any.
        curves: Of each group; None for one with too little gold, which takes `shared`.
        shared: The curve of all labels.
        rows: Number of gold rows.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    least: tuple[int, ...]
    curves: tuple[Curve | None, ...]
    shared: Curve
    rows: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def fit_by_frequency(
    dataset: Dataset, labels: LabelSpace, *, training: Dataset, groups: int = 10
) -> FrequencyCalibration:
    """Fits isotonic regression (Zadrozny and Elkan 2002) in each tenth of the labels by frequency.

    Of a row's labels only those are calibrated that it stores. In a single-label space a curve reads
    the share of what the row stores.

    Args:
        dataset: gold rows with soft labels, which nothing was trained on. Rows of unknown gold do not
            count.
        labels: their label space.
        training: rows with `gold`, whose labels are counted.
        groups: parts of the labels, of equally many where counts are not equal.

    Raises:
        ValueError: fewer than 10 usable rows; rows whose `split` is "test"; rows that are in
            `training`; no stored label is true.
    """
    known = with_gold(dataset)
    if "split" in known.column_names and (test := known["split"][:].count("test")):
        raise ValueError(
            f"{test} of {len(known)} rows are test rows, which a calibration must not see; fit it on "
            "rows of validation"
        )
    refuse_routed(known)
    refuse_trained(known, training)
    probs, gold = SoftLabels.from_dataset(known, labels).probs, label_csr(known, labels)
    usable = np.diff(probs.indptr) > 0
    if not labels.multilabel:
        usable &= np.diff(gold.indptr) > 0
    if (rows := int(usable.sum())) < MIN_ROWS:
        raise ValueError(
            f"a calibration needs at least {MIN_ROWS} rows with gold and a soft label; {rows} of "
            f"{len(dataset)} rows have both"
        )
    probs, gold = probs[usable], gold[usable]
    hits = np.asarray(gold[row_of(probs), probs.indices] > 0).ravel()
    if not hits.any():
        raise ValueError("no stored label is true, so that there is nothing to calibrate")
    counts = _counts(training, labels)
    least = _least(counts, groups)
    values, of = _read(probs, labels), _groups(counts, least)[probs.indices]
    curves: list[Curve | None] = []
    for group in range(groups + 1):
        own = of == group
        enough = hits[own].sum() >= MIN_HITS
        curves.append(fit_isotonic(values[own], hits[own]) if enough else None)
    return FrequencyCalibration(
        least,
        tuple(curves),
        fit_isotonic(values, hits),
        rows,
        labels.fingerprint,
        *fitted_on(known.select(np.flatnonzero(usable)), labels, probs),
    )


def apply_by_frequency(
    dataset: Dataset,
    labels: LabelSpace,
    calibration: FrequencyCalibration,
    *,
    training: Dataset,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Corrects the stored soft labels of every row; in a single-label space each row keeps its sum.

    Args:
        dataset: the rows.
        labels: the label space of the fit.
        calibration: what `fit_by_frequency` gave.
        training: the rows whose labels were counted.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: it was fitted in another label space or on another model's labels.
    """
    check_space(labels, calibration.label_space, what="calibration")
    check_engines(dataset, calibration.engines, other_engine)
    soft = SoftLabels.from_dataset(dataset, labels)
    probs = csr_array(soft.probs, dtype=np.float64, copy=True)
    probs.eliminate_zeros()
    values, result = _read(probs, labels), np.empty(probs.nnz)
    of = _groups(_counts(training, labels), calibration.least)[probs.indices]
    for group, curve in enumerate(calibration.curves):
        own = of == group
        result[own] = isotonic(curve or calibration.shared, values[own])
    result = (1 - _ORDER) * result + _ORDER * values
    found = csr_array((result, probs.indices, probs.indptr), shape=probs.shape)
    if not labels.multilabel:
        found = normalised(probs, result)
    return SoftLabels(found, soft.space, soft.multilabel).add_to(dataset)


def _counts(training: Dataset, labels: LabelSpace) -> Int[np.ndarray, " labels"]:
    return np.bincount(label_csr(training, labels).indices, minlength=len(labels))


def _least(counts: Int[np.ndarray, " labels"], groups: int) -> tuple[int, ...]:
    """Fewest training rows of a label of each group; an empty group has those of the one before."""
    of = frequency_groups(counts, groups=groups)
    above = counts.max() + 1
    fewest = [counts[of == group].min(initial=above) for group in range(groups)]
    return tuple(np.minimum.accumulate(fewest).tolist())


def _groups(
    counts: Int[np.ndarray, " labels"], least: tuple[int, ...]
) -> Int[np.ndarray, " labels"]:
    """The group of each label; the last but one takes what is rarer than all of the fit."""
    rising = np.array(least[::-1])
    group = len(least) - np.searchsorted(rising, counts, side="right")
    found: np.ndarray = np.where(counts > 0, np.minimum(group, len(least) - 1), len(least))
    return found


def _read(probs: csr_array, labels: LabelSpace) -> Float[np.ndarray, " stored"]:
    """What a curve reads: the probability, or the share of what the row stores."""
    if labels.multilabel:
        return np.asarray(probs.data, dtype=np.float64)
    return normalised_shares(probs) if probs.nnz else np.zeros(0)
