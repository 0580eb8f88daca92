"""Of edges with gains, the best ones that form no cycle: pure functions of positions."""

from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

Positions = Int[np.ndarray, " edges"]
Gains = Float[np.ndarray, " edges"]

_EXACT_EDGES = 300
"""Edges of a knot of cycles up to which integer programs are tried."""
_ROUNDS = 30
"""Programs solved for one knot before it is broken greedily."""
_NODES_A_ROUND = 400
"""Labels of a knot through which a shortest cycle is looked for in one round."""


class AcyclicChoice(NamedTuple):
    """Which edges are kept."""

    kept: Bool[np.ndarray, " edges"]
    lost: float
    """Gains of edges that were left out to break cycles."""
    gap: float
    """At most so much of `lost` could have been saved; 0 is proven to be the best choice."""


def acyclic_choice(
    children: Positions, parents: Positions, gains: Gains, *, labels: int
) -> AcyclicChoice:
    """The edges of highest total gain that form no cycle; those that gain nothing are left out.

    The maximum acyclic subgraph (Grötschel, Jünger and Reinelt 1984), knot by knot (strongly
    connected component): an integer program that leaves out at least one edge of every cycle found
    so far, until what it keeps has no further one. A knot where that does not end in time, or that
    is large, is broken greedily, and what an exact choice could have saved is bounded: by the last
    program's optimum, or by cycles without a common edge, each of which must lose its least one.
    An edge of infinite gain always stays; such edges alone must not form a cycle.
    """
    kept = gains > 0
    lost = gap = 0.0
    graph = csr_array(
        (np.ones(kept.sum()), (children[kept], parents[kept])), shape=(labels, labels)
    )
    _, knot = connected_components(graph, directed=True, connection="strong")
    tied = kept & (knot[children] == knot[parents])
    for number in np.unique(knot[children[tied]]).tolist():
        rows = np.flatnonzero(tied & (knot[children] == number))
        out, bound = _break_cycles(children[rows], parents[rows], gains[rows])
        kept[rows[out]] = False
        cost = float(gains[rows[out]].sum())
        lost += cost
        excess = cost - bound
        gap += excess if excess > 1e-9 * max(1.0, cost) else 0.0
    return AcyclicChoice(kept, lost, gap)


def _break_cycles(
    children: Positions, parents: Positions, gains: Gains
) -> tuple[Int[np.ndarray, " out"], float]:
    """The edges to leave out, and a lower bound of what they must cost."""
    cycles: dict[tuple[int, ...], None] = {}
    out, bound = np.array([], dtype=np.int64), 0.0
    price = np.where(np.isfinite(gains), gains, 0.0)
    scale = float(price.max()) or 1.0
    if len(gains) > _EXACT_EDGES:
        return _greedily(children, parents, gains), _disjoint_cost(children, parents, gains)
    for _ in range(_ROUNDS):
        found = _shortest_cycles(children, parents, np.setdiff1d(np.arange(len(gains)), out))
        if not found:
            return out, float(gains[out].sum())
        cycles.update(dict.fromkeys(found))
        columns = np.concatenate([np.array(cycle) for cycle in cycles])
        rows = np.repeat(np.arange(len(cycles)), [len(cycle) for cycle in cycles])
        hit = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(cycles), len(gains)))
        solved = milp(
            price / scale,
            integrality=np.ones(len(gains)),
            bounds=Bounds(0, np.isfinite(gains).astype(np.float64)),
            constraints=LinearConstraint(hit, lb=1),
            options={"mip_rel_gap": 0.0, "node_limit": 20_000},
        )
        bound = max(bound, float(solved.mip_dual_bound or 0.0) * scale)
        if solved.status != 0:  # the limit
            break
        out = np.flatnonzero(solved.x > 0.5)
    return _greedily(children, parents, gains), bound


def _greedily(children: Positions, parents: Positions, gains: Gains) -> Int[np.ndarray, " out"]:
    """Edges that close a cycle with those of higher gain before them."""
    above: dict[int, list[int]] = {}
    out = []
    for edge in np.argsort(-gains, kind="stable").tolist():
        child, parent = int(children[edge]), int(parents[edge])
        waiting, seen = [parent], {parent}
        while waiting and child not in seen:
            for other in above.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        if child in seen:
            out.append(edge)
        else:
            above.setdefault(child, []).append(parent)
    return np.array(sorted(out), dtype=np.int64)


def _disjoint_cost(children: Positions, parents: Positions, gains: Gains) -> float:
    """What cycles without a common edge must cost at least: the least gain of each."""
    used: set[int] = set()
    cost = 0.0
    for cycle in _shortest_cycles(children, parents, np.arange(len(gains))):
        if used.isdisjoint(cycle):
            used.update(cycle)
            cost += float(gains[list(cycle)].min())
    return cost


def _shortest_cycles(
    children: Positions, parents: Positions, rows: Int[np.ndarray, " rows"]
) -> list[tuple[int, ...]]:
    """A shortest cycle of these edges through each of the first labels that are on one."""
    leaving: dict[int, list[int]] = {}
    for row in rows.tolist():
        leaving.setdefault(int(children[row]), []).append(row)
    found: dict[tuple[int, ...], None] = {}
    for start in sorted(leaving):
        if len(found) >= _NODES_A_ROUND:
            break
        came: dict[int, int] = {}
        queue = deque([start])
        while queue and start not in came:
            for row in leaving.get(queue.popleft(), ()):
                label = int(parents[row])
                if label not in came:
                    came[label] = row
                    queue.append(label)
        if start in came:
            cycle, label = [came[start]], int(children[came[start]])
            while label != start:
                cycle.append(came[label])
                label = int(children[came[label]])
            found[tuple(sorted(cycle))] = None
    return list(found)


# --------------------------------------------------------------------------- one parent at most


def best_branching(
    children: Positions, parents: Positions, gains: Gains, *, labels: int
) -> Bool[np.ndarray, " edges"]:
    """The edges of highest total gain that give no label two parents and form no cycle.

    Chu and Liu (1965) and Edmonds (1967), with a root above all that costs nothing: everybody takes
    the best parent, every cycle becomes one label that others may enter at the price of what they
    replace in it, until there are no cycles. Of equal choices the first edge wins.
    """
    good = np.flatnonzero(gains > 0)
    above, below = (
        np.append(parents[good], np.full(labels, -1)),
        np.append(children[good], range(labels)),
    )
    gain = np.append(gains[good], np.zeros(labels))
    levels: list[tuple[Positions, Positions, Positions]] = []
    while True:
        order = np.lexsort((np.arange(len(gain)), -gain, below))
        best = order[np.unique(below[order], return_index=True)[1]]
        group, is_cyclic = _contracted(above[best])
        if not is_cyclic.any():
            break
        price = np.where(is_cyclic, gain[best], 0.0)
        entering = np.flatnonzero((above < 0) | (group[above] != group[below]))
        levels.append((best, below, entering))
        gain = gain[entering] - price[below[entering]]
        above = np.where(above[entering] < 0, -1, group[above[entering]])
        below = group[below[entering]]
    for before, target, entering in reversed(levels):
        taken = entering[best]
        best = before.copy()
        best[target[taken]] = taken
    kept = np.zeros(len(gains), dtype=bool)
    kept[good[best[best < len(good)]]] = True
    return kept


def _contracted(
    above: Int[np.ndarray, " labels"],
) -> tuple[Int[np.ndarray, " labels"], Bool[np.ndarray, " labels"]]:
    """A number per label that those of one cycle share, and who is on a cycle; -1 is above all."""
    state = np.zeros(len(above), dtype=np.int64)  # 0 not seen, else the walk that saw it first
    cycle_of = np.full(len(above), -1)
    for walk in range(1, len(above) + 1):
        label = walk - 1
        while label >= 0 and not state[label]:
            state[label] = walk
            label = int(above[label])
        if label >= 0 and state[label] == walk and cycle_of[label] < 0:
            first = label
            while cycle_of[label] < 0:
                cycle_of[label] = first
                label = int(above[label])
    is_cyclic = cycle_of >= 0
    names = np.where(is_cyclic, cycle_of, np.arange(len(above)))
    return np.unique(names, return_inverse=True)[1], is_cyclic
