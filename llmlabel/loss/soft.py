"""Losses of soft targets, per row and in nats.

Half-precision inputs are computed in float32, so that sums over many labels keep their digits.

Where a row has one true label, what its targets t lack to a sum of 1 is unknown, not false. With
the mass m = sum_k t_k, every loss counts the row m times: m D(t / m, q), with q = softmax(z). So a
row of mass 0, whose label nobody could read, adds exactly 0, to the gradient too; its weight
belongs to no `total`. Where each label is an event of its own, a target not given is 0.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

Divergence = Literal["cross_entropy", "kl", "reverse_kl", "symmetric_kl", "jensen_shannon"]

_LOWEST = -1e30  # stands for log(0) where -inf would turn a gradient of 0 into NaN


def soft_cross_entropy(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    class_weights: Float[Tensor, " labels"] | None = None,
) -> Float[Tensor, " rows"]:
    """-sum_k c_k t_k log q_k; a label of target 0 adds exactly 0, even at a logit of -inf.

    Args:
        logits: z.
        targets: t.
        class_weights: c; all 1 when left out. The mass of a row is then sum_k c_k t_k.
    """
    logits, targets = upcast(logits), upcast(targets)
    if class_weights is not None:
        targets = targets * class_weights.to(targets)
    return -_dot(targets, log_softmax(logits, dim=1)).sum(dim=1)


def kl_divergence(
    logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """M KL(t / m || q): the soft cross-entropy less the entropy of the targets.

    The gradient for the logits is that of `soft_cross_entropy`.
    """
    logits, targets = upcast(logits), upcast(targets)
    mass = targets.sum(dim=1)
    negative_entropy = torch.xlogy(targets, targets).sum(dim=1) - torch.xlogy(mass, mass)
    return negative_entropy + soft_cross_entropy(logits, targets)


def reverse_kl_divergence(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    floor: float = 1e-8,
) -> Float[Tensor, " rows"]:
    """M KL(q || t / m), which seeks one mode of the targets instead of covering all.

    Args:
        logits: z.
        targets: t.
        floor: a share t_k / m counts as at least this, as otherwise one label that the teacher left
            out makes the loss infinite.
    """
    mass, shares = _mass_and_shares(targets)
    log_q = log_softmax(upcast(logits), dim=1)
    return mass * _dot(log_q.exp(), log_q - shares.clamp(min=floor).log()).sum(dim=1)


def symmetric_kl_divergence(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    floor: float = 1e-8,
) -> Float[Tensor, " rows"]:
    """The mean of both directions, the loss of SSLD (arXiv 2103.05959), whose code names it JSDiv.

    Differs from the paper: a floor under the targets instead of a small number added to all four
    probabilities, and the sum over labels as it is.
    """
    both = kl_divergence(logits, targets) + reverse_kl_divergence(logits, targets, floor=floor)
    return both / 2


def jensen_shannon_divergence(
    logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """M (KL(t / m || M) + KL(q || M)) / 2 with M = (t / m + q) / 2; from 0 to m log 2.

    Lin, "Divergence measures based on the Shannon entropy" (1991), at equal weights.
    """
    mass, shares = _mass_and_shares(targets)
    log_q = log_softmax(upcast(logits), dim=1)
    log_t = shares.log().clamp(min=_LOWEST)
    log_middle = torch.logaddexp(log_t, log_q) - math.log(2)
    both = _dot(shares, log_t - log_middle) + _dot(log_q.exp(), log_q - log_middle)
    return mass * both.sum(dim=1) / 2


def binary_cross_entropy(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    pos_weight: Float[Tensor, " labels"] | None = None,
) -> Float[Tensor, " rows"]:
    """-sum_k w_k t_k log s(z_k) + (1 - t_k) log s(-z_k), s the logistic function.

    Args:
        logits: z.
        targets: t, one event a label.
        pos_weight: w; all 1 when left out.
    """
    logits, targets = upcast(logits), upcast(targets)
    positive = targets if pos_weight is None else targets * pos_weight.to(targets)
    return -(_dot(positive, logsigmoid(logits)) + _dot(1 - targets, logsigmoid(-logits))).sum(dim=1)


def sparse_cross_entropy(
    logits: Float[Tensor, "rows labels"],
    ids: Int[Tensor, "rows stored"],
    probs: Float[Tensor, "rows stored"],
    *,
    rest: Literal["unknown", "uniform"] = "unknown",
) -> Float[Tensor, " rows"]:
    """`soft_cross_entropy` of targets that are stored as labels and probabilities.

    Nothing of shape (rows, labels) is kept for the backward pass beside the logits.

    Args:
        logits: z.
        ids: labels with a stored probability, each once a row; -1 is padding.
        probs: their probabilities.
        rest: `uniform` spreads what a row lacks to 1 evenly over its labels not stored, as
            `SoftLabels.log_dense` does, but in a row that stores nothing.
    """
    logits = upcast(logits)
    log_z = logits.logsumexp(dim=1)
    stored, values = ids >= 0, upcast(probs).masked_fill(ids < 0, 0.0)
    chosen = logits.gather(1, ids.clamp(min=0).long())
    loss = _dot(values, log_z[:, None] - chosen).sum(dim=1)
    if rest == "unknown":
        return loss
    mass = values.sum(dim=1)
    others = logits.shape[1] - stored.sum(dim=1)
    share = torch.where((mass > 0) & (others > 0), (1 - mass).clamp(min=0) / others.clamp(min=1), 0)
    surprise = (log_z[:, None] - logits).masked_fill(_where(ids, logits.shape[1]), 0.0)
    return loss + _dot(share, surprise.sum(dim=1))


def sparse_binary_cross_entropy(
    logits: Float[Tensor, "rows labels"],
    ids: Int[Tensor, "rows stored"],
    probs: Float[Tensor, "rows stored"],
    *,
    pos_weight: Float[Tensor, " labels"] | None = None,
) -> Float[Tensor, " rows"]:
    """`binary_cross_entropy` of targets that are stored as labels and probabilities.

    Args:
        logits: z.
        ids: labels with a stored probability, each once a row; -1 is padding.
        probs: their probabilities.
        pos_weight: as there.
    """
    logits = upcast(logits)
    places = ids.clamp(min=0).long()
    chosen, values = logits.gather(1, places), upcast(probs).masked_fill(ids < 0, 0.0)
    positive = values if pos_weight is None else values * pos_weight.to(values)[places]
    negative = (1 - values).masked_fill(ids < 0, 0.0)
    at_stored = _dot(positive, softplus(-chosen)) + _dot(negative, softplus(chosen))
    elsewhere = softplus(logits).masked_fill(_where(ids, logits.shape[1]), 0.0)
    return at_stored.sum(dim=1) + elsewhere.sum(dim=1)


def distillation_loss(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    teacher: Float[Tensor, "rows labels"],
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: Divergence = "kl",
) -> Float[Tensor, " rows"]:
    """(1 - alpha) CE(targets, z) + alpha T^2 D(teacher_T, softmax(z / T)).

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2: a
    temperature T shrinks the gradients of the second term by 1 / T^2, and the factor T^2 gives them
    back. A row whose targets have mass 0 learns from the teacher alone. No gradient reaches the
    teacher.

    Args:
        logits: z of the student.
        targets: the labels given, hard or soft.
        teacher: probabilities of the teacher; `temper` softens them.
        alpha: share of the teacher, from 0 to 1.
        temperature: T, above 0.
        divergence: D.
    """
    _check_distillation(alpha, temperature)
    logits = upcast(logits)
    compare = {
        "cross_entropy": soft_cross_entropy,
        "kl": kl_divergence,
        "reverse_kl": reverse_kl_divergence,
        "symmetric_kl": symmetric_kl_divergence,
        "jensen_shannon": jensen_shannon_divergence,
    }[divergence]
    taught = compare(logits / temperature, temper(teacher.detach(), temperature))
    return (1 - alpha) * soft_cross_entropy(logits, targets) + alpha * temperature**2 * taught


def binary_distillation_loss(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    teacher: Float[Tensor, "rows labels"],
    *,
    alpha: float,
    temperature: float = 1.0,
    pos_weight: Float[Tensor, " labels"] | None = None,
) -> Float[Tensor, " rows"]:
    """`distillation_loss` where each label is an event: binary cross-entropy in both terms.

    The teacher's odds are raised to the power 1 / T. `pos_weight` is for the targets only.
    """
    _check_distillation(alpha, temperature)
    logits = upcast(logits)
    softened = torch.sigmoid(torch.logit(upcast(teacher).detach()) / temperature)
    given = binary_cross_entropy(logits, targets, pos_weight=pos_weight)
    taught = binary_cross_entropy(logits / temperature, softened)
    return (1 - alpha) * given + alpha * temperature**2 * taught


def temper(probs: Float[Tensor, "rows labels"], temperature: float) -> Float[Tensor, "rows labels"]:
    """p^(1 / T), each row brought back to the sum that it had: a softmax of logits divided by T."""
    mass, shares = _mass_and_shares(probs)
    powers = (shares / shares.amax(dim=1, keepdim=True).clamp(min=1e-38)) ** (1 / temperature)
    return mass[:, None] * powers / powers.sum(dim=1, keepdim=True).clamp(min=1e-38)


def smooth(
    targets: Float[Tensor, "rows labels"], epsilon: float, *, multilabel: bool = False
) -> Float[Tensor, "rows labels"]:
    """(1 - epsilon) t + epsilon m / labels, Szegedy et al. (arXiv 1512.00567), section 7.

    A row keeps its mass m. Multi-label: (1 - epsilon) t + epsilon / 2, for the two outcomes.
    """
    targets = upcast(targets)
    if epsilon == 0:
        return targets  # and no second table of all rows and labels
    if multilabel:
        return (1 - epsilon) * targets + epsilon / 2
    return (1 - epsilon) * targets + epsilon * targets.mean(dim=1, keepdim=True)


def balanced_class_weights(counts: Float[Tensor, " labels"]) -> Float[Tensor, " labels"]:
    """Weights under which all labels that occur count alike and a row counts 1 on average.

    `counts` are sums of targets; a label that never occurs gets 1.
    """
    counts, occurs = upcast(counts), counts > 0
    balanced = counts.sum() / (occurs.sum().clamp(min=1) * torch.where(occurs, counts, 1))
    return torch.where(occurs, balanced, 1)


def balanced_pos_weight(counts: Float[Tensor, " labels"]) -> Float[Tensor, " labels"]:
    """Max count / count, the `pos_weight` of PTEC (arXiv 2309.12075); 1 for a label never seen."""
    counts, occurs = upcast(counts), counts > 0
    return torch.where(occurs, counts.amax() / torch.where(occurs, counts, 1), 1)


def weighted_mean(
    values: Float[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    *,
    total: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """sum_i w_i v_i / `total`; 0 where nothing has a weight.

    Args:
        values: Losses of the rows.
        weights: Weights of the rows; a row of weight 0 adds exactly 0.
        total: Sum of the weights of all micro-batches and processes of one optimizer step, so that
            the layout of the batch does not change the result; the sum of `weights` when left out.
    """
    values, weights = upcast(values), upcast(weights)
    divisor = weights.sum() if total is None else total
    divisor = torch.as_tensor(divisor, dtype=values.dtype, device=values.device)
    return _dot(weights, values).sum() / torch.where(divisor == 0, 1, divisor)


def upcast(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Float32, but float64 where it is that."""
    return values if values.dtype == torch.float64 else values.float()


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Their product, where 0 times anything is 0, for the gradient too."""
    return weights * values.masked_fill(weights == 0, 0.0)


def _mass_and_shares(targets: Tensor) -> tuple[Tensor, Tensor]:
    targets = upcast(targets)
    mass = targets.sum(dim=1)
    return mass, targets / torch.where(mass > 0, mass, 1)[:, None]


def _where(ids: Tensor, labels: int) -> Tensor:
    """Which labels of each row are stored, as one bit mask (rows, labels)."""
    mask = torch.zeros(len(ids), labels + 1, dtype=torch.bool, device=ids.device)
    places = torch.where(ids < 0, labels, ids).long()
    return mask.scatter_(1, places, value=True)[:, :labels]


def _check_distillation(alpha: float, temperature: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the share of the teacher, must be between 0 and 1; got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0; got {temperature}")
