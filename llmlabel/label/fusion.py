"""Ranks of labels in several views, fused with weights that known links calibrate.

The numbers behind `llmlabel.label.concepts`.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.stats import rankdata

FLOOR = 0.01
"""Added to scores in the loss, so that a known label that is ranked last costs no infinity."""

_Views = Float[np.ndarray, "views items labels"]
_Scores = Float[np.ndarray, "items labels"]
_Weights = Float[np.ndarray, " views"]
_Known = Bool[np.ndarray, "items labels"]


def label_similarities(
    cosines: Float[np.ndarray, "items references"],
    gold: Bool[np.ndarray, "references labels"],
    *,
    top: int,
) -> _Scores:
    """Mean cosine of each label's `top` nearest references; -inf, which is no cosine, for none."""
    found = np.full((len(cosines), gold.shape[1]), -np.inf)
    for label in np.flatnonzero(gold.any(axis=0)).tolist():
        own = -np.sort(-cosines[:, gold[:, label]], axis=1)[:, :top]
        there = np.isfinite(own)
        total, count = np.where(there, own, 0.0).sum(axis=1), there.sum(axis=1)
        found[count > 0, label] = total[count > 0] / count[count > 0]
    return found


def reciprocal_ranks(similarities: _Views, *, k: float) -> _Views:
    """1 / (k + rank) of each label; equal ones share the mean of their ranks."""
    ranks: np.ndarray = 1.0 / (k + rankdata(-similarities, axis=2))
    return ranks


def fuse(ranks: _Views, weights: _Weights) -> _Scores:
    """Weighted sum of reciprocal ranks, then min-max over the labels of each item.

    Whatever the weights, some label of an item has 0 and some 1: else the weights that give every
    label 1 would please known links best. An item whose labels all tie has 0 everywhere.
    """
    return _min_max(np.tensordot(weights, ranks, 1))


def positive_only_loss(scores: _Scores, known: _Known) -> tuple[float, _Scores]:
    """Mean -log(score + `FLOOR`) over known links, and its gradient: 0 wherever nothing is known."""
    gradient = np.zeros_like(scores)
    gradient[known] = -1.0 / ((scores[known] + FLOOR) * known.sum())
    return float(-np.log(scores[known] + FLOOR).mean()), gradient


def fit_weights(ranks: _Views, known: _Known, *, l2: float = 0.0) -> _Weights:
    """The weights on the simplex with the least `positive_only_loss` + `l2` x their sum of squares.

    From equal weights by L-BFGS over the logits of the weights; the loss is not convex.
    """

    def objective(logits: Any) -> tuple[float, Any]:
        weights = np.exp(logits - np.logaddexp.reduce(logits))
        loss, gradient = weights_loss(ranks, known, weights)
        gradient = gradient + 2 * l2 * weights
        return loss + l2 * float(weights @ weights), weights * (gradient - weights @ gradient)

    logits = minimize(objective, np.zeros(len(ranks)), jac=True, method="L-BFGS-B").x
    fitted: np.ndarray = np.exp(logits - np.logaddexp.reduce(logits))
    return fitted


def weights_loss(ranks: _Views, known: _Known, weights: _Weights) -> tuple[float, _Weights]:
    """`positive_only_loss` of the fused scores, and its gradient with respect to the weights."""
    raw = np.tensordot(weights, ranks, 1)
    items, low, high = np.arange(len(raw)), raw.argmin(axis=1), raw.argmax(axis=1)
    scores = _min_max(raw)
    loss, gradient = positive_only_loss(scores, known)
    span = raw[items, high] - raw[items, low]
    gradient = np.where(span[:, None] > 0, gradient, 0.0) / np.where(span > 0, span, 1.0)[:, None]
    lowest, highest = ranks[:, items, low], ranks[:, items, high]
    of_scores = np.einsum("vil,il->v", ranks, gradient) - lowest @ gradient.sum(axis=1)
    return loss, of_scores - (highest - lowest) @ (gradient * scores).sum(axis=1)


def _min_max(raw: _Scores) -> _Scores:
    low, high = raw.min(axis=1, keepdims=True), raw.max(axis=1, keepdims=True)
    return np.where(high > low, (raw - low) / np.where(high > low, high - low, 1.0), 0.0)
