"""The soft top-k of `loss.fused`: one shift t a row such that sum_j s(score_j + t) = K.

One pass over the labels leaves enough to solve for t in: the highest scores of each row as they are,
and for all others the sums of powers v, v^2, ... of v = exp(score - least of the highest), which lies
between 0 and 1. In v the sigmoid is a v / (1 + a v), a = exp(least + t), which the polynomial
through Chebyshev's points meets to a share of at most 1 / T_n(1 + 2 / a), T_n Chebyshev's polynomial:
seven digits with n = 6 where the least of the highest is 1.3 below 0 after the shift. So the others
act as n labels with weights (a quadrature). Where that is not as exact as the number format, Newton's
steps over all labels go on from the t that was found.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import logsigmoid

from llmlabel.loss.fused import Pool, Solved, reduced

KEPT = 64
"""Scores kept of each row beyond K."""

POWERS = 6

_FEW = 16
"""Part of a block's scores up to which those above the least of the best are picked one by one."""

_PART = 512
"""Labels whose powers are taken at a time, for the sake of the processor's cache."""


class Sums(NamedTuple):
    """Over labels, with x = score + t and u = s(-|x|): of x >= 0, sign(x) u, u and u (1 - u).

    A label is counted as 1 or 0 by its sign and only what it lacks to that is summed, so that the
    sum of the sigmoids, `above - signed`, is exact where K labels stand far above the rest.
    """

    above: Tensor
    signed: Tensor
    total: Tensor
    spread: Tensor

    def rounding(self, shift: Tensor, dtype: torch.dtype) -> Tensor:
        """How far these sums may be off by the rounding of scores in the format."""
        return 8 * torch.finfo(dtype).eps * (self.total + (1 + shift.abs()) * self.spread)


def soft_topk(pool: Pool, counts: Tensor, candidates: Tensor) -> Solved:
    """Scores come multiplied by alpha; `counts` is K of each row, of so many candidates."""
    at_entries = torch.empty_like(pool.weights)
    shift, log_spread = solve_shift(pool, counts, candidates - counts, at_entries)
    unsolved = candidates <= counts  # there is no t, and the row does not count
    shift, log_spread = shift.masked_fill(unsolved, 0.0), log_spread.masked_fill(unsolved, 0.0)
    margin = at_entries + shift[pool.rows]
    missing = pool.weights * torch.sigmoid(-margin)
    loss = pool.sum_by_row(-pool.weights * logsigmoid(margin))
    factor = pool.sum_by_row(missing).log() - log_spread
    # then slopes that matter may be too small for the format before they are divided by their sum
    is_far = bool((log_spread < 0.8 * math.log(torch.finfo(log_spread.dtype).tiny)).any())

    def slope(scores: Tensor) -> Tensor:
        smaller = scores.add_(shift).abs_().neg_()
        if is_far:
            return (smaller + factor).exp_().mul_(smaller.neg_().sigmoid_().square_())
        smaller.sigmoid_()
        return smaller.addcmul_(smaller, smaller, value=-1).mul_(factor.exp())

    return Solved(loss, slope, -missing)


def solve_shift(
    pool: Pool, counts: Tensor, others: Tensor, at_entries: Tensor
) -> tuple[Tensor, Tensor]:
    """Shift t of sum_j s(score_j + t) = K, and the logarithm of sum_j s'(score_j + t)."""
    dtype = pool.texts.dtype
    kept = int(counts.max()) + 1 + KEPT if len(counts) else 1
    best, powers = (found.double() for found in _best(pool, kept, at_entries))
    last_in = best.gather(1, counts[:, None] - 1)[:, 0]
    first_out = best.gather(1, counts[:, None])[:, 0]
    counts = counts.double()
    bracket = -last_in - others.clamp(min=1).double().log(), counts.log() - first_out
    solve = partial(_solved, counts=counts, bracket=bracket, dtype=dtype)
    near = partial(_near_sums, *_stand_ins(best, powers))
    shift, sums = solve(near, -(last_in + first_out) / 2)
    odds = (best[:, -1] + shift).exp()
    if (_off(odds, powers[0]) > sums.rounding(shift, dtype)).any():
        shift, sums = solve(partial(_sums, pool), shift)
    spread = sums.spread.clamp(min=torch.finfo(torch.double).tiny)
    return shift.to(dtype), spread.log().to(dtype)


def _solved(
    sums_of: Callable[[Tensor], Sums],
    shift: Tensor,
    *,
    counts: Tensor,
    bracket: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Sums]:
    """Newton's steps within a bracket, until they are within the rounding of the format."""
    low, high = bracket
    noise = 8 * torch.finfo(dtype).eps
    for _ in range(100):
        sums = sums_of(shift)
        excess = (sums.above - counts) - sums.signed
        low, high = torch.where(excess < 0, shift, low), torch.where(excess < 0, high, shift)
        step = -torch.log1p(excess / counts) * (counts + excess) / sums.spread
        # exactly K labels above 0: a plateau, where the sum is sinh-like and Newton far off is slow
        level = torch.log((sums.total + sums.signed) / (sums.total - sums.signed)) / 2
        step = torch.where((sums.above == counts) & (level.abs() > 1), level, step)
        moves = excess.abs() > sums.rounding(shift, dtype)
        moves &= step.abs() > noise * (1 + shift.abs())
        if not moves.any():  # NaN does not move
            break
        new = shift + step
        new = torch.where((new > low) & (new < high), new, (low + high) / 2)
        shift = torch.where(moves, new, shift)
    return torch.where(excess.isnan(), excess, shift), sums


def _sums(pool: Pool, shift: Tensor) -> Sums:
    """Of all labels."""
    shift = shift.to(pool.texts.dtype)
    sums = pool.texts.new_zeros(4, len(pool.texts))
    for _, _, scores, _, _ in pool.blocks():
        scores.add_(shift)
        smaller = scores.abs().neg_().sigmoid_()
        sums[0] += (~scores.signbit()).sum(dim=0)
        sums[1] += torch.copysign(smaller, scores, out=scores).sum(dim=0)
        sums[2] += smaller.sum(dim=0)
        sums[3] -= smaller.mul_(smaller).sum(dim=0)
    sums[3] += sums[2]
    return Sums(*reduced(sums, pool.group).double())


def _stand_ins(best: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, and how often each counts: the highest once, and a few that stand for the others."""
    nodes, weights = _nodes(powers)
    scores = torch.cat([best, best[:, -1:] + nodes.log()], dim=1)
    return scores, torch.cat([torch.ones_like(best), weights.T], dim=1)


def _near_sums(scores: Tensor, weights: Tensor, shift: Tensor) -> Sums:
    """Of few labels, weighted."""
    moved = scores + shift[:, None]
    smaller = moved.abs().neg_().sigmoid_()
    parts = (~moved.signbit(), torch.copysign(smaller, moved), smaller, smaller - smaller**2)
    return Sums(*((weights * part).sum(dim=1) for part in parts))


def _nodes(powers: Tensor) -> tuple[Tensor, Tensor]:
    """Values of v, and weights by row under which they have the same sums of powers."""
    points = np.cos(np.pi * (np.arange(POWERS) + 0.5) / POWERS) / 2 + 0.5
    # w_i z_i = sum_v v l_i(v), l_i the polynomial that is 1 at z_i and 0 at the others
    inverse = np.linalg.inv(np.vander(points, increasing=True).T) / points[:, None]
    nodes, table = (torch.from_numpy(each).to(powers) for each in (points, inverse))
    return nodes, table @ powers


def _off(odds: Tensor, total: Tensor) -> Tensor:
    """Bound of what the nodes' sums are off by, `total` the sum of v and `odds` a of the above.

    The sigmoids are off by a share 1 / T_n(1 + 2 / a); of the sum of slopes, which is their
    derivative, it is at most n + 1 times as much.
    """
    order = POWERS * torch.acosh(1 + 2 / odds)
    return (1 + POWERS) * odds * total / torch.cosh(order)


def _best(pool: Pool, count: int, at_entries: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores of each row, -inf where there are too few, and the others' powers.

    Sums of v, v^2, ... with v = exp(score - least of the highest), over all processes.
    """
    best = pool.texts.new_full((len(pool.texts), count), -torch.inf)
    powers = pool.texts.new_zeros(POWERS, len(pool.texts))
    for _, _, scores, _, _ in pool.blocks(at_entries):
        best, dropped = _merged(best, powers, _taken_out(scores, best))
        _add_powers(powers, scores, best)
        _add_powers(powers, dropped.T, best)
    if pool.group is not None:
        parts = [torch.empty_like(best) for _ in range(distributed.get_world_size(pool.group))]
        distributed.all_gather(parts, best, group=pool.group)
        del parts[distributed.get_rank(pool.group)]
        best, dropped = _merged(best, powers, torch.cat(parts, dim=1))
        _add_powers(reduced(powers, pool.group), dropped.T, best)
    return best, powers


def _taken_out(scores: Tensor, best: Tensor) -> Tensor:
    """What may be among the best, (rows, some); the scores, (labels, rows), become -inf there."""
    few = _above(scores, best[:, -1])
    if few is None:
        found = scores.T.contiguous().topk(min(best.shape[1], len(scores)), dim=1)
        scores.scatter_(0, found.indices.T, -torch.inf)
        return found.values
    rows, labels = few
    counts = rows.bincount(minlength=len(best))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    taken = best.new_full((len(best), int(counts.max())), -torch.inf)
    taken[rows, place] = scores[labels, rows]
    scores[labels, rows] = -torch.inf
    return taken


def _above(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and labels of the scores above the least, by rows; None if they are not few."""
    if len(least) == 0 or (least == -torch.inf).any():
        return None
    near = (~((scores - least).amax(dim=1) <= 0)).nonzero()[:, 0]  # few labels, after some blocks
    above = scores[near] > least
    if above.sum() > scores.numel() / _FEW:
        return None
    rows, labels = above.T.nonzero(as_tuple=True)
    return rows, near[labels]


def _least(best: Tensor) -> Tensor:
    """0 where there are too few, and so no others."""
    return best[:, -1].masked_fill(best[:, -1] == -torch.inf, 0.0)


def _merged(best: Tensor, powers: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of both and what was dropped; the powers become those by the new least one."""
    both = torch.cat([best, more], dim=1).sort(dim=1, descending=True).values
    now, dropped = both[:, : best.shape[1]], both[:, best.shape[1] :]
    decay = (best[:, -1] - _least(now)).exp()
    for power in range(POWERS):
        powers[power:] *= decay
    return now, dropped


def _add_powers(powers: Tensor, scores: Tensor, best: Tensor) -> None:
    """Overwrites the scores, (labels, rows), none of which is above the least of the best."""
    least = _least(best)
    for start in range(0, len(scores), _PART):
        value = scores[start : start + _PART].sub_(least).exp_()
        power = value.clone()
        powers[0] += value.sum(dim=0)
        for row in powers[1:]:
            row += power.mul_(value).sum(dim=0)
