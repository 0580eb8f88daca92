"""Losses of a decoder that writes a set of labels, one a step, in no order that is right.

Cao and Zhang, "OTSeq2Set: An Optimal Transport Enhanced Sequence-to-Set Model for Extreme
Multi-label Text Classification" (arXiv 2210.14523): the true labels are assigned to the steps that
find them most probable (`set_cross_entropy`), and what the steps say is moved at least cost onto
the true labels in an embedding space (`transport_loss`). Their sum is the first + lambda times the
second, lambda = 8 in the paper.

A set is a row of label ids, in any order, filled up with -1. Beside the labels, the decoder has one
index `empty` that says "nothing more".
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from llmlabel.loss.soft import upcast

Scheme = Literal["all", "first_n"]


def set_cross_entropy(
    logits: Float[Tensor, "rows steps labels"],
    sets: Int[Tensor, "rows places"],
    *,
    empty: int,
    scheme: Scheme = "all",
    empty_weight: float = 0.2,
) -> Float[Tensor, " rows"]:
    """sum_t w_t (-log p_t[y_t]) / sum_t w_t, with the labels y that `assign` gives to the steps.

    w is 1 at a label and `empty_weight` where nothing is to be written. The loss does not depend on
    the order of a set. No gradient flows through the assignment.

    Differs from the paper: its code divides by the weights of the whole batch, so that rows depend
    on each other; here each row is a mean, to be weighed by `weighted_mean`.

    Args:
        logits: of all steps; the last axis holds the labels and `empty`.
        sets: label ids of each row; -1 is no label.
        empty: index of "nothing more" in the last axis.
        scheme: which steps may be given a label, see `assign`.
        empty_weight: 0.2 in the paper's code.

    Raises:
        ValueError: A set has more labels than there are steps, or an index is out of range.
    """
    _check(logits, sets, empty=empty)
    log_probs = log_softmax(upcast(logits), dim=2)
    labels = assign(log_probs.detach().exp(), sets, empty=empty, scheme=scheme)
    surprise = -log_probs.gather(2, labels[:, :, None])[:, :, 0]
    weights = torch.ones_like(surprise).masked_fill(labels == empty, empty_weight)
    total = weights.sum(dim=1)
    return (weights * surprise).sum(dim=1) / torch.where(total > 0, total, 1)


@torch.no_grad()
def assign(
    probs: Float[Tensor, "rows steps labels"],
    sets: Int[Tensor, "rows places"],
    *,
    empty: int,
    scheme: Scheme = "all",
) -> Int[Tensor, "rows steps"]:
    """The label of every step: the one-to-one assignment of the set with the most probability.

    Of n labels, `all` may put them at any step (EURLex, Amazon-670K), `first_n` at the first n
    (Wiki, AmazonCat). Other steps get `empty`. Exact, by the Hungarian method; all costs leave the
    device in one copy.
    """
    from scipy.optimize import linear_sum_assignment

    ordered = _in_order(sets)
    places = ordered.clamp(min=0)[:, None, :].expand(-1, probs.shape[1], -1)
    costs = probs.gather(2, places).double().cpu().nan_to_num().numpy()  # NaN: the loss tells it
    ids = ordered.cpu().numpy()
    labels = np.full(probs.shape[:2], empty, dtype=np.int64)
    for row, (cost, members) in enumerate(zip(costs, ids, strict=True)):
        size = int((members >= 0).sum())
        reach = cost.shape[0] if scheme == "all" else size
        steps, chosen = linear_sum_assignment(cost[:reach, :size], maximize=True)
        labels[row, steps] = members[chosen]
    return torch.from_numpy(labels).to(probs.device)


def transport_loss(
    logits: Float[Tensor, "rows steps labels"],
    sets: Int[Tensor, "rows places"],
    embeddings: Float[Tensor, "labels width"],
    *,
    scheme: Scheme = "all",
    method: Literal["ipot", "sinkhorn"] = "ipot",
    beta: float = 1.0,
    iterations: int = 50,
) -> Float[Tensor, " rows"]:
    """sum_tj C_tj T*_tj, C the cosine distance of the expected embedding of step t and of label j.

    The expected embedding is p_t E. Gradients flow through p in C only: the plan T* and the
    embeddings E are constants, as otherwise the embeddings would collapse. A row without labels
    adds exactly 0.

    Args:
        logits: of all steps.
        sets: label ids of each row; -1 is no label.
        embeddings: E of every index of the last axis of `logits`, the one for "nothing more"
            included.
        scheme: `first_n` compares only the first n steps with the n labels.
        method: of the plan, see `transport_plan`.
        beta: its step or strength.
        iterations: of the plan.
    """
    _check(logits, sets)
    ordered = _in_order(sets)
    with torch.autocast(logits.device.type, enabled=False):  # products of matrices in float32
        probs = upcast(logits).softmax(dim=2)
        embeddings = embeddings.detach().to(probs)
        expected = normalize(probs @ embeddings, dim=2)
        costs = 1 - expected @ normalize(embeddings[ordered.clamp(min=0)], dim=2).mT
    columns = ordered >= 0
    steps = torch.arange(logits.shape[1], device=logits.device)
    reach = columns.sum(dim=1, keepdim=True) if scheme == "first_n" else logits.shape[1]
    rows = (steps < reach) & columns.any(dim=1, keepdim=True)
    plan = transport_plan(
        costs.detach(), rows, columns, method=method, beta=beta, iterations=iterations
    )
    return (costs * plan).sum(dim=(1, 2))


@torch.no_grad()
def transport_plan(
    costs: Float[Tensor, "problems m n"],
    rows: Bool[Tensor, "problems m"],
    columns: Bool[Tensor, "problems n"],
    *,
    method: Literal["ipot", "sinkhorn"] = "ipot",
    beta: float = 1.0,
    iterations: int = 50,
) -> Float[Tensor, "problems m n"]:
    """The plan of least cost between two uniform distributions, in log space and all at once.

    `ipot`: Xie et al., "A Fast Proximal Point Method for Computing Exact Wasserstein Distance"
    (arXiv 1802.04307), algorithm 1 with one inner step; `beta` is the weight of the proximity to
    the last plan, and the plan goes to the exact one. `sinkhorn`: Cuturi, "Sinkhorn Distances"
    (arXiv 1306.0895); `beta` is the weight of the entropy, which stays.

    Columns sum to 1 / n exactly, rows to 1 / m as far as `iterations` have brought them.

    Args:
        costs: of moving m things onto n.
        rows: False for a thing that is not there; it gets no mass, and m does not count it.
        columns: the same for the n.
        method: of the two.
        beta: above 0.
        iterations: always all of them, so that a plan does not depend on its neighbours.

    Raises:
        ValueError: `beta` is not above 0, or `iterations` below 1.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    rows = rows & columns.any(dim=1, keepdim=True)
    columns = columns & rows.any(dim=1, keepdim=True)
    there = rows[:, :, None] & columns[:, None, :]
    kernel = (-upcast(costs) / beta).masked_fill(~there, -torch.inf)
    log_m = rows.sum(dim=1, keepdim=True).clamp(min=1).to(kernel).log()
    log_n = columns.sum(dim=1, keepdim=True).clamp(min=1).to(kernel).log()
    log_plan, log_b = torch.zeros_like(kernel), -log_n.expand_as(columns)
    for _ in range(iterations):
        log_q = kernel + log_plan if method == "ipot" else kernel
        log_a = -log_m - (log_q + log_b[:, None, :]).logsumexp(dim=2)
        log_a = log_a.masked_fill(~rows, 0.0)
        log_b = -log_n - (log_q + log_a[:, :, None]).logsumexp(dim=1)
        log_b = log_b.masked_fill(~columns, 0.0)
        log_plan = log_q + log_a[:, :, None] + log_b[:, None, :]
    return log_plan.exp()


def _in_order(sets: Tensor) -> Tensor:
    """Each set by rising label id, -1 last, so that ties do not depend on the order given."""
    last = torch.iinfo(torch.int64).max
    ordered = torch.where(sets < 0, last, sets.long()).sort(dim=1).values
    return torch.where(ordered == last, -1, ordered)


def _check(logits: Tensor, sets: Tensor, *, empty: int | None = None) -> None:
    steps, labels = logits.shape[1:]
    if empty is not None and not 0 <= empty < labels:
        raise ValueError(f"empty must be an index of the {labels} outputs of a step; got {empty}")
    if sets.numel() == 0:
        return
    sizes = (sets >= 0).sum(dim=1)
    if int(sizes.max()) > steps:
        row = int(sizes.argmax())
        raise ValueError(
            f"row {row} has {int(sizes[row])} labels, but the decoder writes {steps}; give it more "
            "steps"
        )
    if int(sets.max()) >= labels:
        raise ValueError(f"label {int(sets.max())} is outside the {labels} outputs of a step")
    if empty is not None and (rows := torch.nonzero(sets == empty)).numel():
        raise ValueError(
            f'label {empty} of row {int(rows[0, 0])} is the index that says "nothing more"; '
            "fill sets up with -1"
        )
