"""Autograd of the retrieval losses: scores by blocks of labels, never of all rows and labels.

The forward pass streams over the blocks and keeps a few numbers a row; the backward pass computes
each block again, turns its scores into their gradient in place and multiplies that into the two
gradients. So beside the gradients it holds one block of `rows x block` scores (two in the losses
that need a second value of each score).

Scores are computed and summed in float32, in float64 for float64 input: a block of half-precision
labels is widened first, which loses nothing (and leaves the products exact where a GPU multiplies
in TF32), as sums over a million labels would lose their digits in the format of the input.

With a process group, labels are divided among processes and rows are not: sums over labels are
sums over processes too, and stored entries stay with the process of their label.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid, softplus

RetrievalLoss = Literal["decoupled_softmax", "softmax", "soft_topk", "bce", "kl", "symmetric_kl"]

FLOOR = 1e-8  # least share of a label in the logarithm of a judge's distribution
LOWEST = -1e30  # stands for log(0) where -inf would turn a product with 0 into NaN


class Fixed(NamedTuple):
    """Labels whose embeddings are constants: rows of a table in any number format."""

    table: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Pool:
    """Scaled texts, labels, and the stored entries in the order of their labels."""

    texts: Tensor
    labels: Tensor
    rows: Tensor
    ids: Tensor
    weights: Tensor  # of positives; 0 where a label is left out
    masked: Tensor  # entries that are in no sum over labels
    block: int
    group: ProcessGroup | None
    fixed: Fixed | None = None  # labels after `labels`
    spans: list[slice] = field(init=False)  # the labels of each block
    bounds: list[int] = field(init=False)  # where the entries of each block begin

    def __post_init__(self) -> None:
        learned = len(self.labels)
        total = learned + (0 if self.fixed is None else len(self.fixed.rows))
        spans = [
            slice(start, min(start + self.block, stop))
            for first, stop in ((0, learned), (learned, total))
            for start in range(first, stop, self.block)
        ]
        ends = torch.tensor([*(span.start for span in spans), total], device=self.ids.device)
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "bounds", torch.searchsorted(self.ids, ends).tolist())

    def part(self, span: slice) -> Tensor:
        """The embeddings of the labels of a block."""
        learned = len(self.labels)
        if self.fixed is None or span.start < learned:
            return self.labels[span].to(self.texts.dtype)
        rows = self.fixed.rows[span.start - learned : span.stop - learned]
        return self.fixed.table[rows].to(self.texts)

    def blocks(self, at_entries: Tensor | None = None) -> Iterator["Block"]:
        """Scores of one block of labels after the other with all rows, in one buffer.

        Masked entries are -inf. `at_entries` is filled with the scores of all entries.
        """
        turned = self.texts.T.contiguous()  # products of this order are some 3 % faster on a CPU
        widest = max((span.stop - span.start for span in self.spans), default=0)
        buffer = self.texts.new_empty(widest, len(self.texts))
        for number, span in enumerate(self.spans):
            labels = self.part(span)
            scores = torch.mm(labels, turned, out=buffer[: len(labels)])
            entries = slice(self.bounds[number], self.bounds[number + 1])
            places = (self.ids[entries] - span.start, self.rows[entries])
            found = scores[places]
            if at_entries is not None:
                at_entries[entries] = found
            scores[places] = found.masked_fill(self.masked[entries], -torch.inf)
            yield Block(span, labels, scores, entries, places)

    def sum_by_row(self, values: Tensor) -> Tensor:
        """Of values of the entries, over all processes."""
        sums = values.new_zeros(len(self.texts)).index_add_(0, self.rows, values)
        return reduced(sums, self.group)


class Block(NamedTuple):
    """Scores of all rows with one block of labels, and the entries stored in it."""

    labels: slice
    embeddings: Tensor
    scores: Tensor
    entries: slice
    places: tuple[Tensor, Tensor]


class Solved(NamedTuple):
    """What the forward pass leaves to the backward pass.

    `slope(scores)` may overwrite `scores`: the derivative for every score as if nothing was
    stored; `at_entries` is what stored entries add to it.
    """

    loss: Tensor
    slope: Callable[[Tensor], Tensor]
    at_entries: Tensor


def reduced(values: Tensor, group: ProcessGroup | None, op: Any = None) -> Tensor:
    """Over the processes of the group, in place; a sum unless `op` says otherwise."""
    if group is not None:
        distributed.all_reduce(values, op or distributed.ReduceOp.SUM, group=group)
    return values


class FusedLoss(torch.autograd.Function):
    """The loss of every row from `inputs`: texts, labels, and what `pool_of` takes after them."""

    @staticmethod
    def forward(
        ctx: Any, solve: Callable[[Pool], Solved], settings: "Settings", *inputs: Tensor
    ) -> Tensor:
        """Solves each row; `counted` rows keep their loss, the others have 0."""
        solved = solve(pool_of(settings, *inputs))
        ctx.save_for_backward(*inputs)
        ctx.settings, ctx.slope, ctx.at_entries = settings, solved.slope, solved.at_entries
        return solved.loss.masked_fill(~inputs[-1], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """Gradients of texts and labels, a block of labels at a time."""
        texts, labels, *_, counted = ctx.saved_tensors
        pool = pool_of(ctx.settings, *ctx.saved_tensors)
        upstream = upstream.masked_fill(~counted, 0.0).to(pool.texts.dtype)[:, None]
        _, _, for_one, for_other, *_ = ctx.needs_input_grad
        texts_grad = torch.zeros_like(pool.texts) if for_one else None
        labels_grad = (
            torch.empty_like(labels, memory_format=torch.contiguous_format) if for_other else None
        )
        weighted = pool.texts * upstream
        for block in pool.blocks():
            slopes = ctx.slope(block.scores)
            slopes.index_put_(block.places, ctx.at_entries[block.entries], accumulate=True)
            if texts_grad is not None:
                texts_grad.addmm_(slopes.T, block.embeddings)
            if labels_grad is not None and block.labels.stop <= len(labels):
                place = labels_grad[block.labels]
                # with out=, autocast does not round the factors to half precision
                direct = place.dtype == slopes.dtype
                out = place if direct else torch.empty_like(block.embeddings)
                place.copy_(torch.mm(slopes, weighted, out=out))
        if texts_grad is not None:
            texts_grad.mul_(upstream * ctx.settings.scale).masked_fill_(~counted[:, None], 0.0)
            texts_grad = reduced(texts_grad, pool.group).to(texts.dtype)
        return None, None, texts_grad, labels_grad, *[None] * (len(ctx.saved_tensors) - 2)


@dataclass(frozen=True)
class Settings:
    """How the scores are computed."""

    scale: float
    block: int
    group: ProcessGroup | None
    mask_positives: bool
    fixed: Fixed | None = None


def pool_of(
    settings: Settings,
    texts: Tensor,
    labels: Tensor,
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    counted: Tensor,
) -> Pool:
    """Rows that do not count may hold anything: they are taken as zeros, whose slopes are finite."""
    scaled = (texts.to(weights.dtype) * settings.scale).masked_fill(~counted[:, None], 0.0)
    masked = torch.ones_like(weights, dtype=torch.bool) if settings.mask_positives else weights == 0
    return Pool(
        *(scaled, labels, rows, ids, weights, masked),
        block=settings.block,
        group=settings.group,
        fixed=settings.fixed,
    )


def decoupled_softmax(pool: Pool) -> Solved:
    """Sums over negatives alone; each positive then adds itself."""
    log_z, at_entries, _ = _log_z(pool)
    margin = at_entries - log_z[pool.rows]
    missing = pool.weights * torch.sigmoid(-margin)
    # exp(score - log_z) times the sum of `missing`; 0 where a row has no negatives
    shift = log_z - pool.sum_by_row(missing).log()
    shift = shift.masked_fill(log_z == -torch.inf, torch.inf)
    loss = pool.sum_by_row(-pool.weights * logsigmoid(margin))
    return Solved(loss, lambda scores: scores.sub_(shift).exp_(), -missing)


def softmax(pool: Pool) -> Solved:
    """Positives compete."""
    log_z, at_entries, _ = _log_z(pool)
    loss = pool.sum_by_row(pool.weights * (log_z[pool.rows] - at_entries))
    shift = log_z.masked_fill(log_z == -torch.inf, torch.inf)  # every label is left out
    return Solved(loss, lambda scores: scores.sub_(shift).exp_(), -pool.weights)


def kl(pool: Pool) -> Solved:
    """The gradient of `softmax`, as the entropy of the weights is constant."""
    solved = softmax(pool)
    entropy = pool.sum_by_row(torch.xlogy(pool.weights, pool.weights))
    return solved._replace(loss=solved.loss + entropy)


def symmetric_kl(pool: Pool) -> Solved:
    """KL(q, w) needs the mean score under q too: its slope is q_c (log q_c / w_c - KL(q, w))."""
    log_z, at_entries, mean = _log_z(pool, with_mean=True)
    empty = log_z == -torch.inf  # every label is left out
    log_z, mean = log_z.masked_fill(empty, torch.inf), mean.masked_fill(empty, 0.0)
    log_p = (at_entries - log_z[pool.rows]).masked_fill(pool.weights == 0, LOWEST)
    above_floor = pool.weights.clamp(min=FLOOR).log() - math.log(FLOOR)
    reverse = mean - log_z - math.log(FLOOR) - pool.sum_by_row(log_p.exp() * above_floor)
    forward = pool.sum_by_row(torch.xlogy(pool.weights, pool.weights) - pool.weights * log_p)
    offset = ((1 - log_z - math.log(FLOOR) - reverse) / 2).masked_fill(empty, 0.0)

    def slope(scores: Tensor) -> Tensor:
        probs = (scores - log_z).exp_()
        return scores.clamp_(min=LOWEST).div_(2).add_(offset).mul_(probs)

    return Solved((forward + reverse) / 2, slope, -(pool.weights + log_p.exp() * above_floor) / 2)


def bce(pool: Pool) -> Solved:
    """Sums log(1 + e^s) over all candidates, less the scores of positives."""
    at_entries, total = torch.empty_like(pool.weights), pool.texts.new_zeros(len(pool.texts))
    for _, _, scores, _, _ in pool.blocks(at_entries):
        total += softplus(scores, threshold=40).sum(dim=0)
    loss = reduced(total, pool.group) - pool.sum_by_row(pool.weights * at_entries)
    return Solved(loss, lambda scores: scores.sigmoid_(), -pool.weights)


def _log_z(pool: Pool, *, with_mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the scores, scores of the entries, and the mean score under the softmax."""
    at_entries, zeros = torch.empty_like(pool.weights), pool.texts.new_zeros(len(pool.texts))
    peak, total, moment = zeros - torch.inf, zeros.clone(), zeros.clone()
    for _, _, scores, _, _ in pool.blocks(at_entries):
        higher = torch.maximum(peak, scores.amax(dim=0))
        shift = higher.masked_fill(higher == -torch.inf, 0.0)
        decay, peak = (peak - shift).exp(), higher
        if with_mean:
            powers = (scores - shift).exp_()
            moment = moment * decay + scores.clamp_(min=LOWEST).mul_(powers).sum(dim=0)
        else:
            powers = scores.sub_(shift).exp_()
        total = total * decay + powers.sum(dim=0)
    if pool.group is not None:
        highest = reduced(peak.clone(), pool.group, distributed.ReduceOp.MAX)
        decay = (peak - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
        total, moment = reduced(torch.stack([total * decay, moment * decay]), pool.group)
        peak = highest
    return peak + total.log(), at_entries, moment / total
