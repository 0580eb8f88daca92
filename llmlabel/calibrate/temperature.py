"""Temperature scaling: one number makes probabilities as confident as they are right."""

import math
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.data import gold_index, require_columns
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
        nll_before: Mean negative log-likelihood of gold, in nats, at temperature 1.
        nll_after: The same at `value`.
        rows: Number of rows fitted on.
        label_space: Fingerprint of the label space.
    """

    value: float
    nll_before: float
    nll_after: float
    rows: int
    label_space: str


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


def nll_at(probs: csr_array, gold: Int[np.ndarray, " rows"], temperature: float) -> float:
    """Mean negative log-likelihood of gold in nats after scaling; a likelihood is at least 1e-12."""
    likelihood: Float[np.ndarray, " rows"] = np.asarray(
        (scale(probs, temperature) * _one_hot(gold, probs.shape[1])).sum(axis=1)
    )
    return float(-np.log(np.maximum(likelihood, _FLOOR)).mean())


def fit_temperature(dataset: Dataset, labels: LabelSpace) -> Temperature:
    """Fits the temperature between 0.05 and 20 under which gold labels are most likely.

    Rows without a soft label or without a gold label say nothing about confidence and are left out.
    Where no temperature is better than 1, it is 1.

    Raises:
        ValueError: In a multi-label space, or with fewer than 10 usable rows.
    """
    from scipy.optimize import minimize_scalar

    _check_single(labels)
    require_columns(dataset, "gold")
    probs = SoftLabels.from_dataset(dataset, labels).probs
    gold = gold_index(dataset, labels)
    usable = (gold >= 0) & (np.diff(probs.indptr) > 0)
    rows = int(usable.sum())
    if rows < MIN_ROWS:
        raise ValueError(
            f"a temperature needs at least {MIN_ROWS} rows with a gold label and a soft label; "
            f"{rows} of {len(dataset)} rows have both"
        )
    probs, gold = probs[usable], gold[usable]
    found = minimize_scalar(
        lambda log_t: nll_at(probs, gold, math.exp(log_t)),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    before, value = nll_at(probs, gold, 1.0), math.exp(found.x)
    after = nll_at(probs, gold, value)
    if not after < before:
        value, after = 1.0, before
    return Temperature(value, before, after, rows, labels.fingerprint)


def apply_temperature(dataset: Dataset, labels: LabelSpace, temperature: Temperature) -> Dataset:
    """Scales the soft labels of every row; the order of the labels of a row stays.

    Raises:
        ValueError: If the temperature was fitted in another label space.
    """
    _check_single(labels)
    if temperature.label_space != labels.fingerprint:
        raise ValueError(
            f"the temperature was fitted in label space {temperature.label_space}, but the label "
            f"space given is {labels.fingerprint}; fit it again on gold rows of this one"
        )
    soft = SoftLabels.from_dataset(dataset, labels)
    return SoftLabels(scale(soft.probs, temperature.value), soft.space).add_to(dataset)


def _one_hot(gold: Int[np.ndarray, " rows"], labels: int) -> csr_array:
    rows = len(gold)
    return csr_array((np.ones(rows), gold, np.arange(rows + 1)), shape=(rows, labels))


def _check_single(labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "temperature scaling needs a label space of one label a row; this one is multi-label "
            "(load it with multilabel=false, or leave out the temperature)"
        )
