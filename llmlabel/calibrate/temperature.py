"""Temperature scaling: one number makes probabilities as confident as they are right."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.data import gold_index, gold_matrix, require_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

MIN_ROWS = 10
"""Gold rows that a temperature is fitted on at least."""

_FLOOR = 1e-12


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature and what it did to the rows that it was fitted on.

    Attributes:
        value: Above 1 makes probabilities less confident, below 1 more.
        nll_before: Mean negative log-likelihood of gold, in nats, at temperature 1; in a multi-label
            space the mean over all stored labels of the rows, each with its own yes or no.
        nll_after: The same at `value`.
        rows: Number of rows fitted on.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    value: float
    nll_before: float
    nll_after: float
    rows: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def scale(probs: csr_array, temperature: float) -> csr_array:
    """p^(1/T) of the stored probabilities, each row brought back to the sum that it had.

    Equals a softmax of logits divided by T, Guo et al. 2017 (arXiv 1706.04599), equation 9.
    Differs from the paper: the missing mass of a row stays missing, where the paper has none.
    """
    counts = np.diff(probs.indptr)
    starts = probs.indptr[:-1][counts > 0]
    counts = counts[counts > 0]
    values = probs.data.astype(np.float64)
    if not values.size:
        return csr_array(probs, dtype=np.float64)
    # Relative to the largest of its row, so that the powers of no whole row underflow to 0.
    peak = np.repeat(np.maximum.reduceat(values, starts), counts)
    powers = (values / np.where(peak > 0, peak, 1.0)) ** (1 / temperature)
    total, sums = np.add.reduceat(powers, starts), np.add.reduceat(values, starts)
    scaled = powers * np.repeat(sums / np.where(total > 0, total, 1.0), counts)
    return csr_array((scaled, probs.indices, probs.indptr), shape=probs.shape)


def scale_odds(probs: csr_array, temperature: float) -> csr_array:
    """The stored probabilities with their log-odds divided by `temperature`, each for itself."""
    if temperature == 1:  # as they are, to the last bit
        return csr_array(probs, dtype=np.float64)
    scaled = 1 / (1 + np.exp(-log_odds(probs.data) / temperature))
    values = np.where(probs.data > 0, scaled, 0.0)
    return csr_array((values, probs.indices, probs.indptr), shape=probs.shape)


def log_odds(probs: Float[np.ndarray, " stored"]) -> Float[np.ndarray, " stored"]:
    """log(p / (1 - p)), finite: 0 and 1 count as their neighbours in float32, nearly."""
    inside = np.clip(probs.astype(np.float64), np.finfo(np.float32).tiny, 1 - 2.0**-25)
    return np.log(inside) - np.log1p(-inside)


def nll_at(probs: csr_array, gold: Int[np.ndarray, " rows"], temperature: float) -> float:
    """Mean negative log-likelihood of gold in nats after scaling; a likelihood is at least 1e-12."""
    likelihood: Float[np.ndarray, " rows"] = np.asarray(
        (scale(probs, temperature) * _one_hot(gold, probs.shape[1])).sum(axis=1)
    )
    return float(-np.log(np.maximum(likelihood, _FLOOR)).mean())


def best_temperature(nll: Callable[[float], float]) -> float:
    """The temperature between 0.05 and 20 of the lowest `nll`; 1 where none is lower than at 1."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: nll(math.exp(log_t)),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    value = math.exp(found.x)
    return value if nll(value) < nll(1.0) else 1.0


def fit_temperature(
    dataset: Dataset, labels: LabelSpace, *, training: Dataset | None = None
) -> Temperature:
    """Fits the temperature between 0.05 and 20 under which gold labels are most likely.

    Rows without a soft label or without a gold label say nothing about confidence and are left out
    (in a multi-label space an empty gold list does: none of the labels is true). Where no
    temperature is better than 1, it is 1. In a multi-label space all labels share the temperature,
    which divides their log-odds.

    Args:
        dataset: The gold rows.
        labels: Their label space.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: With fewer than 10 usable rows, or gold rows that were trained on.
    """
    require_columns(dataset, "gold")
    known = with_gold(dataset)
    refuse_routed(known)
    refuse_trained(known, training)
    probs = SoftLabels.from_dataset(known, labels).probs
    usable = np.diff(probs.indptr) > 0
    if labels.multilabel:
        true = gold_matrix(known, labels)[usable]
        probs = probs[usable]
        hits = true[np.repeat(np.arange(len(true)), np.diff(probs.indptr)), probs.indices]
        signs = np.where(hits, 1.0, -1.0)

        def nll(temperature: float) -> float:
            losses = np.logaddexp(0, -signs * log_odds(probs.data) / temperature)
            return float(np.minimum(losses, -math.log(_FLOOR)).mean())
    else:
        gold = gold_index(known, labels)
        usable &= gold >= 0
        probs, gold = probs[usable], gold[usable]

        def nll(temperature: float) -> float:
            return nll_at(probs, gold, temperature)

    if (rows := int(usable.sum())) < MIN_ROWS:
        raise ValueError(
            f"a temperature needs at least {MIN_ROWS} rows with a gold label and a soft label; "
            f"{rows} of {len(dataset)} rows have both"
        )
    value = best_temperature(nll)
    source = fitted_on(known.select(np.flatnonzero(usable)), labels, probs)
    return Temperature(value, nll(1.0), nll(value), rows, labels.fingerprint, *source)


def apply_temperature(
    dataset: Dataset,
    labels: LabelSpace,
    temperature: Temperature,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Scales the soft labels of every row; the order of the labels of a row stays.

    Args:
        dataset: The rows.
        labels: The label space of the fit.
        temperature: What `fit_temperature` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the temperature was fitted in another label space or on another model's labels.
    """
    check_space(labels, temperature.label_space, what="temperature")
    check_engines(dataset, temperature.engines, other_engine)
    soft = SoftLabels.from_dataset(dataset, labels)
    scaled = (scale_odds if labels.multilabel else scale)(soft.probs, temperature.value)
    return SoftLabels(scaled, soft.space, soft.multilabel).add_to(dataset)


def _one_hot(gold: Int[np.ndarray, " rows"], labels: int) -> csr_array:
    rows = len(gold)
    return csr_array((np.ones(rows), gold, np.arange(rows + 1)), shape=(rows, labels))
