"""Losses of a text over a pool of labels, per row and in nats.

Labels are graded by relevance: the weights of a row's positives are their relevances divided by
their sum. Every loss has two forms: `dense_retrieval_loss` of a table of scores, the reference,
and `retrieval_loss` of embeddings, which never holds scores of all rows and labels (`loss.fused`).

| loss | of a row with weights w, scores s, candidates C = positives and negatives |
|---|---|
| `decoupled_softmax` | -sum_p w_p log e^s_p / (e^s_p + sum_n e^s_n), n the negatives |
| `softmax` | -sum_p w_p log e^s_p / sum_C e^s; InfoNCE where a row has one positive |
| `soft_topk` | -sum_p w_p log z_p, z = s(alpha (s + t)), t of each row such that sum_C z = k |
| `bce` | -sum_C r_c log s(s_c) + (1 - r_c) log s(-s_c), r the relevance itself, 0 of a negative |
| `kl` | KL(w, q), q the softmax over C, as a teacher's distribution (LG-ANNA) |
| `symmetric_kl` | (KL(w, q) + KL(q, w)) / 2, w at least 1e-8 in the second (UniME-V2) |

The first four are those of DEXML (arXiv 2310.10636), sections 3 and 4. Differs from the paper:
`softmax` weighs by shares, where the paper's code sums over positives; `bce` sums over labels,
where it takes their mean; a score left out is -inf, where it is -100.

A row without positives has loss 0 and gradient 0: what is true of it is unknown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from llmlabel.loss import fused
from llmlabel.loss.fused import FLOOR, Fixed, FusedLoss, RetrievalLoss, reduced
from llmlabel.loss.soft import (
    binary_cross_entropy,
    kl_divergence,
    soft_cross_entropy,
    symmetric_kl_divergence,
    upcast,
)
from llmlabel.loss.soft_topk import soft_topk

__all__ = [
    "Fixed",
    "Relevance",
    "RetrievalLoss",
    "candidate_kl",
    "candidate_symmetric_kl",
    "dense_retrieval_loss",
    "retrieval_loss",
]


_FAR = 40.0
"""From here on 1 + exp(-x) is 1, in float64 too."""


@dataclass(frozen=True, eq=False)
class Relevance:
    """Relevance of labels for the rows of an update, as the rows of a CSR table.

    Attributes:
        indptr: where the entries of each row begin, and where the last row ends.
        ids: labels of the pool, ascending within a row.
        values: above 0, a positive of that relevance; 0, a label that is known or suspected to be
            true, and so in no sum at all. A label not stored is a negative, and where a loss
            compares distributions, one to which the teacher gives nothing.
    """

    indptr: Int[Tensor, " rows_and_one"]
    ids: Int[Tensor, " stored"]
    values: Float[Tensor, " stored"]

    def __post_init__(self) -> None:
        if int(self.indptr[0]) != 0 or int(self.indptr[-1]) != len(self.ids):
            raise ValueError(
                f"indptr must go from 0 to the {len(self.ids)} entries; got {int(self.indptr[0])} "
                f"to {int(self.indptr[-1])}"
            )
        rows = self.rows
        wrong = (self.ids[1:] <= self.ids[:-1]) & (rows[1:] == rows[:-1])
        if wrong.any():
            row = int(rows[1:][wrong][0])
            raise ValueError(f"ids of row {row} must ascend, each label once; sort them first")
        if not (self.values >= 0).all():
            raise ValueError(f"a relevance must be 0 or above; got {float(self.values.min())}")

    @property
    def rows(self) -> Int[Tensor, " stored"]:
        """The row of every entry."""
        counts = self.indptr.diff()
        return torch.repeat_interleave(
            torch.arange(len(counts), device=counts.device), counts, output_size=len(self.ids)
        )


def retrieval_loss(  # noqa: PLR0913  # each a plain choice
    texts: Float[Tensor, "rows width"],
    labels: Float[Tensor, "labels width"],
    relevance: Relevance,
    *,
    loss: RetrievalLoss = "decoupled_softmax",
    temperature: float = 0.05,
    k: int | Int[Tensor, " rows"] = 5,
    alpha: float = 2.0,
    block: int = 8192,
    group: ProcessGroup | None = None,
    fixed: Fixed | None = None,
) -> Float[Tensor, " rows"]:
    """The loss of every row with scores `texts @ labels.T / temperature`.

    Nothing of shape (rows, labels) is held, forward or backward. Computed and summed in float32
    (float64 for float64 input), also for half-precision embeddings and under autocast; gradients
    come in the format of the embeddings. There is no second derivative.

    Args:
        texts: embeddings of the rows.
        labels: embeddings of the pool.
        relevance: over the pool.
        loss: see the table above.
        temperature: divides the scores. To learn it, divide the texts by it and give 1 here.
        k: labels that `soft_topk` selects, below the number of labels; a number for each row where
            it is a tensor. A row with no more candidates than that has them all: loss 0.
        alpha: sharpness of `soft_topk`.
        block: labels at a time; the result does not depend on it but for rounding.
        group: processes that divide the pool. `texts` are the same rows in every process, `labels`
            and `relevance` the process's own part, its ids counted from 0. Every process gets the
            same loss and the whole gradient of `texts`, and the gradient of its own labels.
        fixed: more labels, counted after `labels`: rows of a table of embeddings that stay as they
            are. They get no gradient, and the table is neither copied nor widened but by blocks.
    """
    if temperature <= 0 or alpha <= 0 or block < 1:
        raise ValueError(
            f"temperature and alpha must lie above 0 and block must be 1 or more; got {temperature}, "
            f"{alpha} and {block}"
        )
    _check_loss(loss)
    dtype = torch.promote_types(torch.promote_types(texts.dtype, labels.dtype), torch.float32)
    count = len(labels) + (0 if fixed is None else len(fixed.rows))
    _check_shapes(relevance, len(texts), count)
    order = torch.argsort(relevance.ids, stable=True)
    rows, ids = relevance.rows[order], relevance.ids[order].long()
    values = relevance.values[order].to(dtype)
    weights, counted = _weights(rows, values, len(texts), loss, group)
    solve: Callable[[fused.Pool], fused.Solved]
    if loss == "soft_topk":
        counts, candidates = _selected(k, rows[values == 0], len(texts), count, group)
        counted = counted & (candidates > counts)
        solve = partial(soft_topk, counts=counts, candidates=candidates)
    else:
        solve = {
            "decoupled_softmax": fused.decoupled_softmax,
            "softmax": fused.softmax,
            "bce": fused.bce,
            "kl": fused.kl,
            "symmetric_kl": fused.symmetric_kl,
        }[loss]
    scale = (alpha if loss == "soft_topk" else 1.0) / temperature
    masked = loss == "decoupled_softmax"
    settings = fused.Settings(scale, block, group, mask_positives=masked, fixed=fixed)
    # torch has no types for `apply`
    return FusedLoss.apply(  # type: ignore[no-untyped-call]
        solve, settings, texts, labels, rows, ids, weights, counted
    )


def dense_retrieval_loss(
    scores: Float[Tensor, "rows labels"],
    relevance: Relevance,
    *,
    loss: RetrievalLoss = "decoupled_softmax",
    k: int | Int[Tensor, " rows"] = 5,
    alpha: float = 2.0,
) -> Float[Tensor, " rows"]:
    """`retrieval_loss` of scores that are divided by the temperature, by plain autograd."""
    _check_loss(loss)
    scores = upcast(scores)
    shape = (len(scores), scores.shape[1])
    _check_shapes(relevance, *shape)
    places = (relevance.rows, relevance.ids.long())
    stored = torch.zeros(shape, dtype=torch.bool, device=scores.device)
    stored[places] = True
    values = relevance.values.to(scores.dtype)
    weights, counted = _weights(relevance.rows, values, len(scores), loss, None)
    targets = torch.zeros_like(scores).index_put(places, weights)
    candidates = scores.masked_fill(stored & (targets == 0), -torch.inf)
    if loss == "decoupled_softmax":
        log_z = scores.masked_fill(stored, -torch.inf).logsumexp(dim=1, keepdim=True)
        found = -(targets * logsigmoid(scores - log_z)).sum(dim=1)
    elif loss == "softmax":
        found = soft_cross_entropy(candidates, targets)
    elif loss == "kl":
        found = kl_divergence(candidates, targets)
    elif loss == "symmetric_kl":
        found = symmetric_kl_divergence(candidates, targets, floor=FLOOR)
    elif loss == "bce":
        found = binary_cross_entropy(candidates, targets)
    else:
        left_out = relevance.rows[values == 0]
        counts, most = _selected(k, left_out, *shape, None)
        counted = counted & (most > counts)
        picked = torch.where(counted, counts, 1)
        open_rows = (alpha * candidates).masked_fill(~counted[:, None], 0.0)
        shifted = alpha * scores + _shift(open_rows, picked)[:, None]
        found = -(targets * logsigmoid(shifted.masked_fill(targets == 0, 0.0))).sum(dim=1)
    return found.masked_fill(~counted, 0.0)


def candidate_kl(
    student: Float[Tensor, "rows candidates"],
    teacher: Float[Tensor, "rows candidates"],
    *,
    student_temperature: float = 0.05,
    teacher_temperature: float = 0.05,
) -> Float[Tensor, " rows"]:
    """KL(Q, P) of lists of candidates, Q a softmax of the teacher's scores, P of the student's.

    The soft labels of LG-ANNA-Embedding (arXiv 2506.07438), whose loss is not given there.

    Args:
        student: scores, such as cosines, of each row's candidates.
        teacher: scores of a judge or cross-encoder; -inf is padding, which is in neither softmax.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's; a gap of 0.05 at 0.02 is a factor of 12.
    """
    return kl_divergence(*_compared(student, teacher, student_temperature, teacher_temperature))


def candidate_symmetric_kl(
    student: Float[Tensor, "rows candidates"],
    teacher: Float[Tensor, "rows candidates"],
    *,
    student_temperature: float = 0.02,
    teacher_temperature: float = 0.02,
) -> Float[Tensor, " rows"]:
    """(KL(Q, P) + KL(P, Q)) / 2, UniME-V2 (arXiv 2510.13515); arguments as in `candidate_kl`.

    Differs from the paper: two temperatures, as its 0.02 leaves a judge's scores in [0, 1] almost
    one-hot; 1e-8 is a floor under Q in KL(P, Q) where the paper's code adds it in both logarithms.
    """
    compared = _compared(student, teacher, student_temperature, teacher_temperature)
    return symmetric_kl_divergence(*compared, floor=FLOOR)


def _compared(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """The student's logits and the teacher's distribution; all 0 in a row that is all padding."""
    if student_temperature <= 0 or teacher_temperature <= 0:
        raise ValueError(
            f"temperatures must lie above 0; got {student_temperature} and {teacher_temperature}"
        )
    padding = teacher == -torch.inf
    empty = padding.all(dim=1, keepdim=True)
    logits = (upcast(student) / student_temperature).masked_fill(padding & ~empty, -torch.inf)
    targets = (upcast(teacher.detach()) / teacher_temperature).softmax(dim=1)
    return logits, targets.masked_fill(empty, 0.0)


def _check_loss(loss: str) -> None:
    if loss not in get_args(RetrievalLoss):
        raise ValueError(f"loss is one of {', '.join(get_args(RetrievalLoss))}; got {loss!r}")


def _check_shapes(relevance: Relevance, rows: int, labels: int) -> None:
    if len(relevance.indptr) != rows + 1:
        raise ValueError(f"relevance is of {len(relevance.indptr) - 1} rows; there are {rows}")
    if (
        len(relevance.ids)
        and not 0 <= int(relevance.ids.min()) <= int(relevance.ids.max()) < labels
    ):
        raise ValueError(
            f"relevance has labels {int(relevance.ids.min())} to {int(relevance.ids.max())}; the "
            f"pool has {labels}, counted from 0"
        )


def _weights(
    rows: Tensor, values: Tensor, count: int, loss: RetrievalLoss, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Weights of the entries, and which rows have a positive in any process."""
    totals = reduced(values.new_zeros(count).index_add_(0, rows, values), group)
    if loss != "bce":
        return values / torch.where(totals > 0, totals, 1)[rows], totals > 0
    if (values > 1).any():
        raise ValueError(f"relevance must be at most 1 for bce; got {float(values.max())}")
    return values, totals > 0


def _selected(
    k: int | Tensor, left_out: Tensor, rows: int, labels: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """K and the number of candidates of each row; `left_out` has a row for each label left out."""
    counts = torch.as_tensor(k, device=left_out.device).long().expand(rows)
    pool = torch.full_like(counts, labels)
    candidates = pool.index_add(0, left_out, torch.ones_like(left_out), alpha=-1)
    pool, candidates = reduced(torch.stack([pool, candidates]), group)
    if rows and not 1 <= int(counts.min()) <= int(counts.max()) < int(pool[0]):
        raise ValueError(
            f"k must be from 1 to less than the {int(pool[0])} labels; got {int(counts.min())} to "
            f"{int(counts.max())}"
        )
    return counts, candidates


def _shift(scores: Tensor, counts: Tensor) -> Tensor:
    """Shift t of sum s(scores + t) = K in each row, by bisection; its gradient by implicit derivation."""
    given, many = scores.detach(), counts[:, None]
    best, order = given.topk(int(counts.max()) + 1, dim=1)
    others = (given > -torch.inf).sum(dim=1, keepdim=True) - many
    last_in, first_out = best.gather(1, many - 1), best.gather(1, many)
    low = -last_in - others.clamp(min=1).to(best.dtype).log()
    high = many.to(best.dtype).log() - first_out
    for _ in range(64):
        middle = (low + high) / 2
        moved = given + middle
        # counted as 1 or 0 by its sign, less what it lacks: exact where K stand above the rest
        above = (~moved.signbit()).sum(dim=1, keepdim=True) - many
        lacking = torch.copysign(moved.abs().neg().sigmoid(), moved).sum(dim=1, keepdim=True)
        low = torch.where(above < lacking, middle, low)
        high = torch.where(above < lacking, high, middle)
    # and where K stand so far above the rest that s(-x) = exp(-x), which may be too small a number
    is_in = torch.arange(best.shape[1], device=best.device) < many
    rest = given.scatter(1, order, best.masked_fill(is_in, -torch.inf))
    level = (-best).masked_fill(~is_in, -torch.inf).logsumexp(dim=1, keepdim=True)
    level = (level - rest.logsumexp(dim=1, keepdim=True)) / 2
    is_far = (last_in + level > _FAR) & (first_out + level < -_FAR)
    shift = torch.where(is_far, level, (low + high) / 2)
    share = (logsigmoid(given + shift) + logsigmoid(-given - shift)).softmax(dim=1)
    mean = (share * scores.masked_fill(scores == -torch.inf, 0.0)).sum(dim=1)
    return shift[:, 0] - (mean - mean.detach())
