"""Vector scaling and Dirichlet calibration: a linear map of log-probabilities, fitted on gold rows.

Both start from the temperature of the same rows and are drawn back to it, so that a label of few
gold rows keeps nearly what the temperature gives it, and a label of none exactly that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.temperature import log_odds

_UNREAD = 1e-6
"""A label that is not stored counts as at least so probable where others look at it."""

_STEPS = 200


@dataclass(frozen=True)
class GoldRows:
    """Soft labels of rows whose gold is known; each row stores a label, and no zero.

    Attributes:
        probs: In float64.
        hits: 1 at the stored labels that are true, 0 at the others.
        multilabel: Whether each label is a yes or no of its own.
    """

    probs: csr_array
    hits: csr_array
    multilabel: bool

    def take(self, rows: Int[np.ndarray, " some"] | Bool[np.ndarray, " rows"]) -> "GoldRows":
        """Some of the rows."""
        return GoldRows(self.probs[rows], self.hits[rows], self.multilabel)

    def seen(self) -> Bool[np.ndarray, " labels"]:
        """Labels that gold says something about: true somewhere, and with several also false."""
        true = np.bincount(self.hits.indices, weights=self.hits.data, minlength=self.hits.shape[1])
        if not self.multilabel:
            return true > 0
        return (true > 0) & (true < np.bincount(self.hits.indices, minlength=len(true)))


def row_of(probs: csr_array) -> Int[np.ndarray, " stored"]:
    """The row of each stored value."""
    return np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))


def normalised(probs: csr_array, values: Float[np.ndarray, " stored"]) -> csr_array:
    """`values` at the places of `probs`, each row brought to the sum that it has there."""
    rows, count = row_of(probs), probs.shape[0]
    total = np.bincount(rows, weights=values, minlength=count)
    sums = np.bincount(rows, weights=probs.data, minlength=count)
    factor = sums / np.where(total > 0, total, 1.0)
    return csr_array((values * factor[rows], probs.indices, probs.indptr), shape=probs.shape)


def vector_scaled(
    probs: csr_array,
    weight: Float[np.ndarray, " labels"],
    bias: Float[np.ndarray, " labels"],
    *,
    multilabel: bool,
) -> csr_array:
    """softmax(w log p + b) over the stored labels of each row, Guo et al. 2017 (arXiv 1706.04599).

    With `multilabel` each label has its own sigmoid(w log(p / (1 - p)) + b), Platt 1999. Differs
    from the paper: the missing mass of a row stays missing.
    """
    z = weight[probs.indices] * _features(probs, multilabel=multilabel) + bias[probs.indices]
    if multilabel:
        return csr_array((_sigmoid(z), probs.indices, probs.indptr), shape=probs.shape)
    return normalised(probs, np.exp(z - _peak(z, probs)))


def dirichlet_scaled(
    probs: csr_array,
    weight: Float[np.ndarray, "labels labels"],
    bias: Float[np.ndarray, " labels"],
) -> csr_array:
    """softmax(W log p + b) over the stored labels of each row, Kull et al. 2019 (arXiv 1910.12656).

    Differs from the paper: labels that are not stored share the missing mass evenly where others
    look at them, and get nothing themselves; the missing mass stays missing.
    """
    z = (_log_dense(probs) @ weight.T + bias)[row_of(probs), probs.indices]
    return normalised(probs, np.exp(z - _peak(z, probs)))


def vector_loss(
    weight: Float[np.ndarray, " labels"],
    bias: Float[np.ndarray, " labels"],
    gold: GoldRows,
    *,
    start: float,
    strength: float,
) -> tuple[float, Float[np.ndarray, " labels"], Float[np.ndarray, " labels"]]:
    """Log-loss of `vector_scaled`, penalty included, and its gradients by weight and bias.

    The loss is a mean over rows (over stored labels with several), the penalty `strength` times the
    mean over labels of (w - start)^2 + b^2.
    """
    x = _features(gold.probs, multilabel=gold.multilabel)
    at, labels = gold.probs.indices, len(weight)
    z = weight[at] * x + bias[at]
    loss, residual = _log_loss(z, gold)
    loss += strength * float(((weight - start) ** 2 + bias**2).mean())
    by_weight = np.bincount(at, weights=residual * x, minlength=labels)
    by_bias = np.bincount(at, weights=residual, minlength=labels)
    pull = 2 * strength / labels
    return loss, by_weight + pull * (weight - start), by_bias + pull * bias


def dirichlet_loss(
    weight: Float[np.ndarray, "labels labels"],
    bias: Float[np.ndarray, " labels"],
    gold: GoldRows,
    *,
    start: float,
    strength: float,
    log_probs: Float[np.ndarray, "rows labels"] | None = None,
) -> tuple[float, Float[np.ndarray, "labels labels"], Float[np.ndarray, " labels"]]:
    """Log-loss of `dirichlet_scaled` with ODIR, and its gradients by weight and bias.

    Kull et al. 2019, section 3: off-diagonal and intercept regularisation, here of one strength:
    the mean square off the diagonal plus the mean square of the intercepts. Differs from the paper:
    the diagonal is drawn to `start` as the intercepts are to 0, where the paper leaves it free.
    """
    x = _log_dense(gold.probs) if log_probs is None else log_probs
    labels, rows = len(bias), row_of(gold.probs)
    loss, residual = _log_loss((x @ weight.T + bias)[rows, gold.probs.indices], gold)
    moved = weight - start * np.eye(labels)
    share = np.full(weight.shape, 1 / max(labels * (labels - 1), 1))
    np.fill_diagonal(share, 1 / labels)
    loss += strength * float((share * moved**2).sum() + (bias**2).mean())
    sparse = csr_array((residual, gold.probs.indices, gold.probs.indptr), shape=gold.probs.shape)
    by_weight: np.ndarray = sparse.T @ x
    by_bias = np.bincount(gold.probs.indices, weights=residual, minlength=labels)
    return (
        loss,
        by_weight + 2 * strength * share * moved,
        by_bias + 2 * strength / labels * bias,
    )


def fit_vector(
    gold: GoldRows, *, start: float, strength: float, intercepts: bool = True
) -> tuple[Float[np.ndarray, " labels"], Float[np.ndarray, " labels"]]:
    """Weight and bias of the lowest `vector_loss`; without intercepts a temperature per label.

    A label that gold says nothing about keeps `start` and 0. A temperature per label stays between
    0.05 and 20.
    """
    labels, free = gold.probs.shape[1], gold.seen()

    def loss(theta: Float[np.ndarray, " both"]) -> tuple[float, Float[np.ndarray, " both"]]:
        value, by_weight, by_bias = vector_loss(
            theta[:labels], theta[labels:], gold, start=start, strength=strength
        )
        return value, np.concatenate([by_weight * free, by_bias * (free & intercepts)])

    bounds = None if intercepts else [(0.05, 20.0)] * labels + [(0.0, 0.0)] * labels
    theta = _minimum(loss, np.repeat([start, 0.0], labels), bounds)
    return theta[:labels], theta[labels:]


def fit_dirichlet(
    gold: GoldRows, *, start: float, strength: float
) -> tuple[Float[np.ndarray, "labels labels"], Float[np.ndarray, " labels"]]:
    """Weight and bias of the lowest `dirichlet_loss`; a label without gold keeps `start` and 0."""
    labels, free, x = gold.probs.shape[1], gold.seen(), _log_dense(gold.probs)

    def loss(theta: Float[np.ndarray, " both"]) -> tuple[float, Float[np.ndarray, " both"]]:
        value, by_weight, by_bias = dirichlet_loss(
            theta[labels:].reshape(labels, labels),
            theta[:labels],
            gold,
            start=start,
            strength=strength,
            log_probs=x,
        )
        return value, np.concatenate([by_bias * free, (by_weight * free[:, None]).ravel()])

    theta = _minimum(loss, np.concatenate([np.zeros(labels), start * np.eye(labels).ravel()]), None)
    return theta[labels:].reshape(labels, labels), theta[:labels]


def _minimum(
    loss: Callable[[Float[np.ndarray, " all"]], tuple[float, Float[np.ndarray, " all"]]],
    start: Float[np.ndarray, " all"],
    bounds: list[tuple[float, float]] | None,
) -> Float[np.ndarray, " all"]:
    from scipy.optimize import minimize

    options = {"maxiter": _STEPS, "ftol": 1e-11, "gtol": 1e-6}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    theta: np.ndarray = found.x
    return theta


def _log_loss(
    z: Float[np.ndarray, " stored"], gold: GoldRows
) -> tuple[float, Float[np.ndarray, " stored"]]:
    """The loss of logits of the stored labels, and its gradient; rows whose gold is not stored: 0."""
    hits = gold.hits.data
    if gold.multilabel:
        loss = np.logaddexp(0, -np.where(hits > 0, z, -z)).mean()
        return float(loss), (_sigmoid(z) - hits) / max(len(z), 1)
    rows, count = row_of(gold.probs), gold.probs.shape[0]
    shifted = z - _peak(z, gold.probs)
    powers = np.exp(shifted)
    total = np.bincount(rows, weights=powers, minlength=count)
    stored = np.bincount(rows, weights=hits, minlength=count)
    loss = (np.log(total) * stored).sum() - (hits * shifted).sum()
    return float(loss) / count, (powers / total[rows] - hits) * stored[rows] / count


def _features(probs: csr_array, *, multilabel: bool) -> Float[np.ndarray, " stored"]:
    """Log-odds of each label for itself; or logarithms of the shares of what a row stores."""
    if multilabel:
        return log_odds(probs.data)
    logs: np.ndarray = np.log(normalised_shares(probs))
    return logs


def normalised_shares(probs: csr_array) -> Float[np.ndarray, " stored"]:
    """The stored probabilities divided by their sum in the row."""
    rows = row_of(probs)
    sums = np.bincount(rows, weights=probs.data, minlength=probs.shape[0])
    shares: np.ndarray = probs.data / sums[rows]
    return shares


def _log_dense(probs: csr_array) -> Float[np.ndarray, "rows labels"]:
    dense = probs.toarray()
    stored = np.diff(probs.indptr)
    missing = np.clip(1 - dense.sum(axis=1), 0, 1) / np.maximum(probs.shape[1] - stored, 1)
    unread = np.maximum(missing, _UNREAD)[:, None]
    logs: np.ndarray = np.log(np.where(dense > 0, dense, unread))
    return logs


def _peak(z: Float[np.ndarray, " stored"], probs: csr_array) -> Float[np.ndarray, " stored"]:
    """The largest of its row for each stored value."""
    counts = np.diff(probs.indptr)
    starts = probs.indptr[:-1][counts > 0]
    return np.repeat(np.maximum.reduceat(z, starts), counts[counts > 0]) if len(z) else z


def _sigmoid(z: Float[np.ndarray, " stored"]) -> Float[np.ndarray, " stored"]:
    from scipy.special import expit

    values: np.ndarray = expit(z)
    return values
