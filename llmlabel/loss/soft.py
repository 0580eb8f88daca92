"""Losses of soft targets, per row and in nats.

Half-precision inputs are computed in float32, so that sums over many labels keep their digits.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid


def soft_cross_entropy(
    logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """-sum_k t_k log softmax(z)_k; a label of target 0 adds exactly 0, even at a logit of -inf."""
    logits, targets = _upcast(logits), _upcast(targets)
    return -_dot(targets, log_softmax(logits, dim=1)).sum(dim=1)


def kl_divergence(
    logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """KL(targets || softmax(logits)): the soft cross-entropy less the entropy of the targets.

    The gradient for the logits is that of `soft_cross_entropy`.
    """
    logits, targets = _upcast(logits), _upcast(targets)
    return torch.xlogy(targets, targets).sum(dim=1) + soft_cross_entropy(logits, targets)


def binary_cross_entropy(
    logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """-sum_k t_k log s(z_k) + (1 - t_k) log s(-z_k), s the logistic function: one event a label."""
    logits, targets = _upcast(logits), _upcast(targets)
    return -(_dot(targets, logsigmoid(logits)) + _dot(1 - targets, logsigmoid(-logits))).sum(dim=1)


def weighted_mean(
    values: Float[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    *,
    total: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """sum_i w_i v_i / `total`.

    Args:
        values: Losses of the rows.
        weights: Weights of the rows; a row of weight 0 adds exactly 0.
        total: Sum of the weights of all micro-batches and processes of one optimizer step, so that
            the layout of the batch does not change the result; the sum of `weights` when left out.
    """
    values, weights = _upcast(values), _upcast(weights)
    return _dot(weights, values).sum() / (weights.sum() if total is None else total)


def _upcast(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Their product, where 0 times anything is 0, for the gradient too."""
    return weights * values.masked_fill(weights == 0, 0.0)
