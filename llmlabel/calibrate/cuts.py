"""The largest part of a tree that a budget allows, budget by budget.

A tree of decisions (a path in a taxonomy, the fields of an extraction, a program) is kept from the
root down, with some subtrees cut off, the holes; what is kept under one budget is kept under every
looser one. `llmlabel.calibrate.pac` chooses the budget.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

BUDGETS = tuple(np.geomspace(0.01, 30.0, 24).tolist())
"""Nats that the kept nodes of a tree may cost together, from tight to loose."""

_MOST_COST = 1e4
"""Cost of a node in nats where its probability is 0."""

_CANDIDATES = 384
_CELLS = 384
"""Trees of at most so many nodes are solved exactly; see `kept_nodes`."""


@dataclass(frozen=True, eq=False)
class Tree:
    """The most likely answer as a tree of decisions, in preorder: parents before their children.

    Attributes:
        parents: -1 for the first node, the root.
        costs: Negative log-probability of each decision, in nats.
        contents: What each node decides, and where in the tree; a node is right if the true answer
            has the same content.
        spans: First character and end of each node's text, where there is a text.
    """

    parents: Int[np.ndarray, " nodes"]
    costs: Float[np.ndarray, " nodes"]
    contents: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = field(default=(), repr=False)


def kept_nodes(
    tree: Tree,
    *,
    holes: int = 1,
    budgets: Sequence[float] = BUDGETS,
    anchor: int | None = None,
) -> Bool[np.ndarray, "budgets nodes"]:
    """Which nodes each budget keeps: as many as possible, and never fewer than a tighter one.

    Khakhar et al. (arXiv 2302.08703), equation 6: a node is kept only with its parent, at most
    `holes` subtrees are cut off, and the costs of the kept nodes sum to at most the budget. The budget at
    `anchor` has the most nodes of all such trees; every looser one the most that hold all nodes of
    the one before, every tighter one the most within the one before, by dynamic programming over
    the number of nodes cut off.

    Up to `_CANDIDATES` nodes this is exact. In a larger tree only so many subtrees may become holes
    (the most costly of each size), and the number of nodes cut off is counted in cells, at most
    `_CELLS`: then more nodes may be cut off than need be, but never fewer, the costs stay exact,
    and the sets nested.

    Differs from the paper: the budgets are solved one after the other, not all at once with z3; a
    cost is not cut at 10 nats.

    Args:
        tree: The most likely answer.
        holes: Subtrees that may be cut off.
        budgets: Ascending.
        anchor: Place of the budget that is solved first, by default the middle one. Chosen without
            the gold trees of the fit.

    Raises:
        ValueError: If a setting is out of range, a cost is NaN, or the nodes are not one tree.
    """
    anchor = check_family(holes, budgets, anchor)
    if (unknown := np.flatnonzero(np.isnan(tree.costs))).size:
        raise ValueError(f"node {unknown[0]} has the cost NaN; give each decision a probability")
    ends = subtree_ends(tree.parents)
    kept = np.ones((len(budgets), len(ends)), dtype=bool)
    if not len(ends):
        return kept
    sums = np.concatenate([[0.0], np.cumsum(np.clip(tree.costs, 0.0, _MOST_COST))])
    mass = sums[ends] - sums[:-1]
    # A budget gives way by the rounding of the sums, so that one equal to a sum allows it.
    needs = mass[0] - np.asarray(budgets, dtype=np.float64) - 1e-9 * (1 + mass[0])
    everything = np.arange(len(ends))
    first = _cut(everything, ends, mass, float(needs[anchor]), holes, ())
    cuts = {anchor: first}
    for level in range(anchor + 1, len(budgets)):
        inside = [np.arange(hole, ends[hole]) for hole in cuts[level - 1]]
        nodes = np.concatenate([everything[:0], *inside])
        cuts[level] = _cut(nodes, ends, mass, float(needs[level]), holes, ())
    for level in range(anchor - 1, -1, -1):
        before = cuts[level + 1]
        if mass[before].sum() >= needs[level]:
            cuts[level] = before
            continue
        outside = np.ones(len(ends), dtype=bool)
        for hole in before:
            outside[hole + 1 : ends[hole]] = False
        cuts[level] = _cut(
            np.flatnonzero(outside), ends, mass, float(needs[level]), holes, tuple(before)
        )
    for level, cut in cuts.items():
        for hole in cut:
            kept[level, hole : ends[hole]] = False
    return kept


def check_family(holes: int, budgets: Sequence[float], anchor: int | None) -> int:
    """The anchor, which is the middle where none is given."""
    if holes < 1:
        raise ValueError(f"holes must be at least 1, the subtrees that may be cut off; got {holes}")
    if not budgets or any(not 0 <= budget < math.inf for budget in budgets):
        raise ValueError(f"budgets must be numbers from 0 on; got {list(budgets)}")
    if any(low >= high for low, high in itertools.pairwise(budgets)):
        raise ValueError(f"budgets must ascend, from tight to loose; got {list(budgets)}")
    if anchor is None:
        return len(budgets) // 2
    if not 0 <= anchor < len(budgets):
        raise ValueError(f"anchor must be a place among the {len(budgets)} budgets; got {anchor}")
    return anchor


def subtree_ends(parents: Int[np.ndarray, " nodes"]) -> Int[np.ndarray, " nodes"]:
    """The place behind each subtree.

    Raises:
        ValueError: If the nodes are not one tree in preorder.
    """
    above = parents.tolist()
    sizes, last = [1] * len(above), list(range(1, len(above) + 1))
    for node in range(len(above) - 1, 0, -1):
        parent = above[node]
        if not 0 <= parent < node:
            raise ValueError(f"node {node} has the parent {parent}; parents stand before children")
        sizes[parent] += sizes[node]
        last[parent] = max(last[parent], last[node])
    ends = np.arange(len(above)) + np.array(sizes, dtype=int)
    if above and (above[0] != -1 or (ends != np.array(last)).any()):
        raise ValueError("nodes must be one tree in preorder: a node, then all that is below it")
    return ends


def _cut(
    candidates: Int[np.ndarray, " candidates"],
    ends: Int[np.ndarray, " nodes"],
    mass: Float[np.ndarray, " nodes"],
    need: float,
    holes: int,
    covered: tuple[int, ...],
) -> list[int]:
    """The at most `holes` disjoint subtrees with the fewest nodes whose masses sum to `need`.

    All `covered` nodes must be in them. Subtrees are intervals of the preorder, so this is a
    weighted choice of intervals: best[h, s] is the largest mass of h of them with s nodes.
    """
    if need <= 0 and not covered:
        return []
    candidates, most = _useful(candidates, ends, mass, need, covered)
    following = np.append(candidates[1:], len(ends))
    # Disjoint subtrees are never more than the candidates with no other below.
    holes = min(holes, int((following >= ends[candidates]).sum()))
    unit = -(-most // _CELLS)
    cells = -(-(ends[candidates] - candidates) // unit)
    capacity = most // unit + (holes + 1 if unit > 1 else 0)
    best = np.full((holes + 1, capacity + 1), -np.inf)
    best[0, 0] = 0.0
    steps: list[tuple[int, int, Bool[np.ndarray, "holes cells"], int]] = []
    waiting: list[tuple[int, int, np.ndarray, int]] = []
    sealed = set(covered)
    for node, cell, after in zip(
        candidates.tolist(), cells.tolist(), following.tolist(), strict=True
    ):
        leaf = after >= ends[node]
        waiting.append((node, cell, best if leaf else best.copy(), len(steps)))
        while waiting and ends[waiting[-1][0]] <= after:
            chosen, width, before, first = waiting.pop()
            cut = before[:-1, : capacity + 1 - width] + mass[chosen]
            if chosen in sealed:
                best[:] = -np.inf
            place = best[1:, width:]
            taken = cut > place
            np.copyto(place, cut, where=taken)
            steps.append((chosen, width, taken, first))
    enough = np.argwhere((best >= need).T)
    size, hole = enough[0].tolist()
    found, at = [], len(steps) - 1
    while hole:
        chosen, width, taken, first = steps[at]
        if size >= width and taken[hole - 1, size - width]:
            found.append(chosen)
            size, hole, at = size - width, hole - 1, first
        at -= 1
    return sorted(found)


def _useful(
    candidates: Int[np.ndarray, " candidates"],
    ends: Int[np.ndarray, " nodes"],
    mass: Float[np.ndarray, " nodes"],
    need: float,
    covered: tuple[int, ...],
) -> tuple[Int[np.ndarray, " useful"], int]:
    """Candidates that a best choice may hold, and how many nodes it cuts off at most.

    The outermost candidates and the best single one are choices at hand; they stay in.
    """
    sizes = ends[candidates] - candidates
    around = np.ones(len(candidates), dtype=bool)
    if covered:
        around = (candidates <= min(covered)) & (ends[candidates] >= ends[list(covered)].max())
    outermost = _outermost(candidates, ends)
    single = np.where(around & (mass[candidates] >= need), sizes, len(ends) + 1)
    most = min(int(single.min()), int(sizes[outermost].sum()))
    fixed = np.isin(candidates, covered) | outermost
    fixed[int(single.argmin())] = True
    for node in covered:
        fixed |= (candidates <= node) & (ends[candidates] > node)
    useful = (fixed | (mass[candidates] > 0)) & (sizes <= most)
    return _costliest(candidates[useful], sizes[useful], mass, fixed[useful]), most


def _outermost(
    candidates: Int[np.ndarray, " candidates"], ends: Int[np.ndarray, " nodes"]
) -> Bool[np.ndarray, " candidates"]:
    """Whether no other candidate is above."""
    reached = np.concatenate([[0], np.maximum.accumulate(ends[candidates])[:-1]])
    return candidates >= reached


def _costliest(
    candidates: Int[np.ndarray, " candidates"],
    sizes: Int[np.ndarray, " candidates"],
    mass: Float[np.ndarray, " nodes"],
    fixed: Bool[np.ndarray, " candidates"],
) -> Int[np.ndarray, " chosen"]:
    """`_CANDIDATES` of them in preorder: those fixed, then the costliest of each power of two."""
    if len(candidates) <= _CANDIDATES:
        return candidates
    group = np.log2(sizes).astype(int)
    order = np.lexsort((-mass[candidates], group))
    starts = np.searchsorted(group[order], group[order])
    rank = np.empty(len(candidates), dtype=int)
    rank[order] = np.arange(len(candidates)) - starts
    rank[fixed] = -1
    return candidates[np.sort(np.argsort(rank, kind="stable")[:_CANDIDATES])]
