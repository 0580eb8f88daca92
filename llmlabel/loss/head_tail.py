"""A classifier that learns from one of frequent and one of rare labels: COMIC's head-tail balancer.

Zhang et al. (arXiv 2304.10539); its other parts are in `llmlabel.loss.longtail`.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from llmlabel.loss.longtail import Gamma, focal
from llmlabel.loss.robust import sum_over_processes
from llmlabel.loss.soft import upcast


class HeadTail(NamedTuple):
    """Logits (rows, labels) of the three classifiers; `balanced` is the one to predict with."""

    head: Tensor
    tail: Tensor
    balanced: Tensor


class HeadTailBalancer(torch.nn.Module):
    """Three classifiers on one feature vector: COMIC's head-tail balancer.

    The moving vector e <- mu e + g sums the gradients g of the features, which frequent labels
    dominate. The head classifier reads features less their projection on e, the tail classifier
    features plus `alpha` times it; the balanced one reads features with an additive attention over
    the other two. Each is a cosine classifier, (rho / groups) sum_g w_g f_g / ((|w_g| + eta)
    |f_g|). Call `synchronize` after every update; it moves e.

    Differs from the paper: one backbone with three linear layers that start as the identity, not
    three backbones. Constants are those of the public code, which averages features where the paper
    says gradients.

    Args:
        width: of the features.
        labels: number of labels.
        groups: parts of the features that are normalised each by itself; divides `width`.
        rho: scale of the cosines.
        eta: keeps small weights small.
        alpha: what the tail classifier adds.
        mu: share of the past in e.
    """

    moving: Tensor
    _gradient: Tensor

    def __init__(
        self,
        width: int,
        labels: int,
        *,
        groups: int = 1,
        rho: float = 16.0,
        eta: float = 1 / 32,
        alpha: float = 2.0,
        mu: float = 0.9,
    ) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"groups must divide the width {width} of the features; got {groups}")
        self.groups, self.rho, self.eta, self.alpha, self.mu = groups, rho, eta, alpha, mu
        eye = torch.eye(width)
        self.project = torch.nn.Parameter(eye.repeat(3, 1, 1))
        self.classify = torch.nn.Parameter(torch.zeros(3, labels, width))
        self.query, self.key = torch.nn.Parameter(eye.clone()), torch.nn.Parameter(eye.clone())
        self.attend = torch.nn.Parameter(torch.zeros(width))
        self.register_buffer("moving", torch.zeros(width))
        self.register_buffer("_gradient", torch.zeros(width), persistent=False)

    def forward(self, features: Float[Tensor, "rows width"]) -> HeadTail:
        """Logits; in training mode, the backward pass adds the gradient of the features to e."""
        features = upcast(features)
        if self.training and torch.is_grad_enabled():
            if not features.requires_grad:  # frozen features have gradients too, for e
                features = features.detach().requires_grad_()
            cast(Any, features).register_hook(self._remember)
        with torch.autocast(features.device.type, enabled=False):  # float32, as the features are
            head, tail, balanced = (features @ weight.mT for weight in self.project)
            others = torch.stack([head, tail], dim=1)
            mixed = torch.tanh((balanced @ self.query.mT)[:, None] + others @ self.key.mT)
            share = (mixed @ self.attend).softmax(dim=1)
            balanced = balanced + (share[:, :, None] * others).sum(dim=1)
            return HeadTail(
                self._cosines(head, self.classify[0], -1.0),
                self._cosines(tail, self.classify[1], self.alpha),
                self._cosines(balanced, self.classify[2], 0.0),
            )

    def synchronize(self) -> None:
        """Moves e by the gradients of all processes since the last call."""
        self.moving.mul_(self.mu).add_(sum_over_processes(self._gradient))
        self._gradient.zero_()

    def _remember(self, gradient: Tensor) -> None:
        self._gradient += gradient.detach().sum(dim=0)

    def _cosines(self, features: Tensor, weights: Tensor, amount: float) -> Tensor:
        parts = (self.groups, features.shape[1] // self.groups)
        unit = normalize(features.reshape(len(features), *parts), dim=2)
        direction = normalize(self.moving.reshape(parts), dim=1)
        along = (unit * direction).sum(dim=2, keepdim=True) * direction
        heads = weights.reshape(len(weights), *parts)
        heads = heads / (torch.linalg.vector_norm(heads, dim=2, keepdim=True) + self.eta)
        return self.rho / self.groups * (unit + amount * along).flatten(1) @ heads.flatten(1).mT


def balance_loss(
    outputs: HeadTail,
    targets: Float[Tensor, "rows labels"],
    *,
    gamma_pos: Gamma = 0.0,
    gamma_neg: Gamma = 3.0,
    clip: float = 0.05,
    power: float = 2.0,
) -> Float[Tensor, " rows"]:
    """kappa_h L(p_h p_b) + kappa_t L(p_t p_b): the balanced classifier learns from the other two.

    L is the asymmetric loss of a probability, and kappa is proportional to L(p_h)^power and
    L(p_t)^power and sums to 1; the one with the larger loss weighs more. No gradient reaches the
    head and tail classifiers, which have losses of their own.

    Differs from the paper: kappa is of a row, not of a batch, so that rows do not depend on each
    other; p is the logistic function of the logits, as labels are events of their own.
    """
    targets, gammas = upcast(targets), (gamma_pos, gamma_neg)
    balanced = upcast(outputs.balanced)
    taught, sizes = [], []
    for logits in (outputs.head, outputs.tail):
        other = upcast(logits).detach()
        yes, no = logsigmoid(other), logsigmoid(-other)
        sizes.append(focal(yes, no, targets, gammas, clip) ** power)
        both = yes + logsigmoid(balanced)
        not_both = torch.logaddexp(logsigmoid(-balanced), logsigmoid(balanced) + no)
        taught.append(focal(both, not_both, targets, gammas, clip))
    total = sizes[0] + sizes[1]
    kappa = torch.where(total > 0, sizes[0] / torch.where(total > 0, total, 1), 0.5)
    return kappa * taught[0] + (1 - kappa) * taught[1]
