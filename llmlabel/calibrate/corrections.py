"""One way to correct probabilities, fitted on gold rows and applied to others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.linear import (
    GoldRows,
    dirichlet_scaled,
    fit_dirichlet,
    fit_vector,
    normalised,
    normalised_shares,
    row_of,
    vector_scaled,
)
from llmlabel.calibrate.temperature import best_temperature, scale, scale_odds
from llmlabel.calibrate.venn_abers import (
    Curve,
    fit_isotonic,
    fit_venn_abers,
    isotonic,
    merged,
    venn_abers,
)

Method = Literal[
    "none", "temperature", "label_temperature", "vector", "venn_abers", "isotonic", "dirichlet"
]
"""From the simplest to the one with most to fit."""

_FLOOR = 1e-12


@dataclass(frozen=True)
class Correction:
    """A fitted correction.

    Attributes:
        method: Which.
        strength: How strongly it is drawn back to the temperature; None where it has no such number.
        temperature: That temperature, shared by all labels; 1 where the method does not use it.
        weight: By label of "vector" and "label_temperature"; row by row the matrix of "dirichlet".
        bias: By label.
        curves: By label, of "isotonic" and "venn_abers"; None for a label that keeps what it has.
    """

    method: Method
    strength: float | None
    temperature: float
    weight: tuple[float, ...] = ()
    bias: tuple[float, ...] = ()
    curves: tuple[Curve | None, ...] = ()


def shared_temperature(gold: GoldRows) -> float:
    """The temperature of all labels under which gold is most likely."""
    scaled = scale_odds if gold.multilabel else scale
    return best_temperature(lambda t: float(row_losses(scaled(gold.probs, t).data, gold).sum()))


def fit_correction(
    gold: GoldRows, method: Method, strength: float | None, *, temperature: float
) -> Correction:
    """Fits one method; `temperature` is the one of the same rows, which others start from."""
    if method in ("vector", "label_temperature") and strength is not None:
        weight, bias = fit_vector(
            gold, start=1 / temperature, strength=strength, intercepts=method == "vector"
        )
    elif method == "dirichlet" and strength is not None:
        weight, bias = fit_dirichlet(gold, start=1 / temperature, strength=strength)
    elif method == "isotonic":
        return Correction(method, strength, 1.0, curves=_curves(gold, fit_isotonic))
    elif method == "venn_abers" and gold.multilabel:
        return Correction(method, strength, 1.0, curves=_curves(gold, fit_venn_abers))
    elif method == "venn_abers":
        both = gold.take(np.diff(gold.probs.indptr) == 2)
        yes = _curves(both, fit_venn_abers)[1]
        return Correction(method, strength, 1.0, curves=(None, yes))
    else:
        return Correction(method, strength, temperature if method == "temperature" else 1.0)
    numbers = tuple(weight.ravel().tolist()), tuple(bias.tolist())
    return Correction(method, strength, temperature, *numbers)


def corrected(
    fit: Correction, probs: csr_array, *, multilabel: bool
) -> Float[np.ndarray, " stored"]:
    """What becomes of the stored probabilities; there may be no zero among them."""
    values: np.ndarray
    weight, bias = np.array(fit.weight), np.array(fit.bias)
    if fit.method == "dirichlet":
        values = dirichlet_scaled(probs, weight.reshape(len(bias), -1), bias).data
    elif fit.method in ("vector", "label_temperature"):
        values = vector_scaled(probs, weight, bias, multilabel=multilabel).data
    elif fit.method == "isotonic":
        values = own(probs, multilabel=multilabel).copy()
        for label, at in _by_label(probs):
            if curve := fit.curves[label]:
                values[at] = isotonic(curve, values[at])
        values = values if multilabel else normalised(probs, values).data
    elif fit.method == "venn_abers":
        shares = merged(*intervals(fit, probs, multilabel=multilabel))
        values = shares if multilabel else normalised(probs, shares).data
    else:
        values = (scale_odds if multilabel else scale)(probs, fit.temperature).data
    return values


def intervals(
    fit: Correction, probs: csr_array, *, multilabel: bool
) -> tuple[Float[np.ndarray, " stored"], Float[np.ndarray, " stored"]]:
    """p0 and p1 of what `own` reads, which stand for themselves where there is no curve."""
    low, high = (own(probs, multilabel=multilabel).copy() for _ in range(2))
    if multilabel:
        for label, at in _by_label(probs):
            if curve := fit.curves[label]:
                low[at], high[at] = venn_abers(curve, low[at])
    elif curve := fit.curves[1]:
        starts = probs.indptr[:-1][np.diff(probs.indptr) == 2]  # rows that store no and yes
        p0, p1 = venn_abers(curve, low[starts + 1])
        low[starts], high[starts] = 1 - p1, 1 - p0
        low[starts + 1], high[starts + 1] = p0, p1
    return low, high


def own(probs: csr_array, *, multilabel: bool) -> Float[np.ndarray, " stored"]:
    """What a curve reads: the probability, or the share of what the row stores."""
    return probs.data if multilabel else normalised_shares(probs)


def row_losses(values: Float[np.ndarray, " stored"], gold: GoldRows) -> Float[np.ndarray, " rows"]:
    """Negative log-likelihood of the gold of each row; with several labels the sum over all stored."""
    rows, hits, count = row_of(gold.probs), gold.hits.data, gold.probs.shape[0]
    if gold.multilabel:
        likelihood = np.maximum(np.where(hits > 0, values, 1 - values), _FLOOR)
        return np.bincount(rows, weights=-np.log(likelihood), minlength=count)
    likelihood = np.bincount(rows, weights=hits * values, minlength=count)
    losses: np.ndarray = -np.log(np.maximum(likelihood, _FLOOR))
    return losses


def _curves(
    gold: GoldRows,
    fit: Callable[[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]], Curve],
) -> tuple[Curve | None, ...]:
    """The curve of each label, of the rows that store it; None for a label gold does not tell of."""
    shares, hits, seen = (
        own(gold.probs, multilabel=gold.multilabel),
        gold.hits.data > 0,
        gold.seen(),
    )
    curves: list[Curve | None] = [None] * gold.probs.shape[1]
    for label, at in _by_label(gold.probs):
        if seen[label]:
            curves[label] = fit(shares[at], hits[at])
    return tuple(curves)


def _by_label(probs: csr_array) -> Iterator[tuple[int, Int[np.ndarray, " some"]]]:
    """Each stored label and where it is stored."""
    order = np.argsort(probs.indices, kind="stable")
    found, starts = np.unique(probs.indices[order], return_index=True)
    ends = np.append(starts[1:], len(order))  # one too many where nothing is stored
    for label, start, end in zip(found.tolist(), starts.tolist(), ends.tolist(), strict=False):
        yield label, order[start:end]
