"""Walks over a label space: orders, depths, ancestors, paths, distances, and mass that rolls up.

Labels are given and returned as positions. A label may have several parents. In a hierarchy a soft
label holds the probability that the answer *stops at* each label; `node_probs` turns it into that of
the label or anything below it, so that a parent never has less than its children.
"""

from collections import deque
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace

Probs = TypeVar("Probs", np.ndarray, csr_array)


def order(labels: LabelSpace) -> Int[np.ndarray, " labels"]:
    """All labels, parents before their children."""
    return np.array(labels.topological)


def depths(labels: LabelSpace) -> Int[np.ndarray, " labels"]:
    """Edges from a root, by the shortest way; 0 for a root."""
    found = [0] * len(labels)
    for label in labels.topological:
        if parents := labels.parent_positions[label]:
            found[label] = 1 + min(found[parent] for parent in parents)
    return np.array(found)


def ancestors(labels: LabelSpace, label: int, *, itself: bool = False) -> list[int]:
    """Everything above a label, ascending."""
    return _reached(labels.parent_positions, label, itself=itself)


def descendants(labels: LabelSpace, label: int, *, itself: bool = False) -> list[int]:
    """Everything below a label, ascending; with `itself` its subtree."""
    return _reached(labels.children, label, itself=itself)


def _reached(near: tuple[tuple[int, ...], ...], label: int, *, itself: bool) -> list[int]:
    seen, waiting = {label}, [label]
    while waiting:
        for other in near[waiting.pop()]:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return sorted(seen if itself else seen - {label})


def paths(labels: LabelSpace, label: int, *, most: int = 16) -> list[tuple[int, ...]]:
    """The ways from a root down to a label, each with both ends; at most so many.

    Their number can grow exponentially with the depth where many labels have several parents.
    """
    found: list[tuple[int, ...]] = []
    waiting: list[tuple[int, ...]] = [(label,)]
    while waiting and len(found) < most:
        path = waiting.pop()
        if parents := labels.parent_positions[path[0]]:
            waiting += [(parent, *path) for parent in reversed(parents)]
        else:
            found.append(path)
    return found


def path_names(labels: LabelSpace, *, separator: str = " > ") -> list[str]:
    """The names from a root down to each label, along everybody's first parent."""
    found = list(labels.names)
    for label in labels.topological:
        if parents := labels.parent_positions[label]:
            found[label] = f"{found[parents[0]]}{separator}{labels.names[label]}"
    return found


def closure(labels: LabelSpace) -> csr_array:
    """Bool, shape (labels, labels): whether the column's label is the row's or one above it."""
    lines = labels.ancestors
    bounds = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    columns = np.fromiter((place for line in lines for place in line), np.int32, int(bounds[-1]))
    return csr_array((np.ones(len(columns), bool), columns, bounds), shape=(len(labels),) * 2)


def node_probs(probs: Probs, labels: LabelSpace) -> Probs:
    """Probability of each label or anything below it; each label below is counted once.

    Args:
        probs: Shape (rows, labels): probability that the answer stops at the label.
        labels: The label space of the columns.
    """
    above: Probs = probs.astype(np.float64) @ closure(labels).astype(np.float64)
    return above


def answers(
    probs: Float[np.ndarray, "rows labels"] | csr_array, labels: LabelSpace
) -> Int[np.ndarray, " rows"]:
    """The one label to answer each row with; -1 for a row of zeros.

    From the heaviest root down to the heaviest child (see `node_probs`; of equal ones the first), as
    long as that child outweighs what stops at the label itself. In a flat space the most probable.
    """
    own = csr_array(probs, dtype=np.float64)
    below = csr_array(node_probs(own, labels))
    found = np.full(own.shape[0], -1)
    for row in range(own.shape[0]):
        stops = _row(own, row)
        mass = _row(below, row)
        at = _heaviest(mass, [label for label in mass if not labels.parents[label]])
        while at >= 0:
            found[row] = at
            children = labels.children[at]
            if len(children) > len(mass):
                children = tuple(c for c in mass if at in labels.parent_positions[c])
            at = _heaviest(mass, children, least=stops.get(at, 0.0))
    return found


def _row(matrix: csr_array, row: int) -> dict[int, float]:
    part = slice(*matrix.indptr[row : row + 2].tolist())
    return dict(zip(matrix.indices[part].tolist(), matrix.data[part].tolist(), strict=True))


def _heaviest(mass: dict[int, float], some: list[int] | tuple[int, ...], least: float = 0.0) -> int:
    weighed = [(mass[label], -label) for label in some if mass.get(label, 0.0) > least]
    return -max(weighed)[1] if weighed else -1


def lowest_common_ancestors(labels: LabelSpace, *some: int) -> list[int]:
    """Of what is above all of these (or one of them) the lowest: with no other such label below."""
    if not some:
        return []
    common = set.intersection(*(set(ancestors(labels, one, itself=True)) for one in some))
    above = {p for label in common for p in labels.parent_positions[label]}
    return sorted(common - above)


def distances_from(labels: LabelSpace, label: int) -> Float[np.ndarray, " labels"]:
    """Edges between a label and every other, up or down; the roots have one common point above."""
    top = len(labels)  # the point above the roots
    found = np.full(top + 1, np.inf)
    found[label] = 0.0
    waiting = deque([label])
    while waiting:
        at = waiting.popleft()
        if at == top:
            near = labels.roots
        else:
            near = labels.children[at] + (labels.parent_positions[at] or (top,))
        for other in near:
            if np.isinf(found[other]):
                found[other] = found[at] + 1
                waiting.append(other)
    return found[:top]


def closing_edges(
    nodes: int, edges: Sequence[tuple[int, int]], weights: Sequence[float]
) -> list[int]:
    """The edges (by position, ascending) to remove so that no cycle is left.

    The edges are tried by falling weight, equal ones in their order, and each is kept unless it
    closes a cycle with those kept before (the greedy acyclic subgraph). What is kept has an order
    of the nodes at any time, repaired locally where an edge goes against it (Pearce and Kelly, "A
    dynamic topological sort algorithm for directed acyclic graphs", JEA 2007). The order begins as
    one of the whole graph; without cycles no edge goes against it.
    """
    rank = _depth_first_ranks(nodes, edges)
    if all(rank[start] < rank[end] for start, end in edges):
        return []
    after: list[list[int]] = [[] for _ in range(nodes)]
    before: list[list[int]] = [[] for _ in range(nodes)]
    removed = []
    for place in sorted(range(len(edges)), key=lambda place: -weights[place]):
        start, end = edges[place]
        if rank[start] >= rank[end]:
            between = range(rank[end], rank[start] + 1)
            ahead = _between(end, after, rank, between)
            if start in ahead:
                removed.append(place)
                continue
            behind = _between(start, before, rank, between)
            moved = sorted(behind, key=rank.__getitem__) + sorted(ahead, key=rank.__getitem__)
            slots = sorted(rank[node] for node in moved)
            for node, slot in zip(moved, slots, strict=True):
                rank[node] = slot
        after[start].append(end)
        before[end].append(start)
    return sorted(removed)


def _between(start: int, near: list[list[int]], rank: list[int], within: range) -> dict[int, None]:
    seen, waiting = {start: None}, [start]
    while waiting:
        for other in near[waiting.pop()]:
            if other not in seen and rank[other] in within:
                seen[other] = None
                waiting.append(other)
    return seen


def _depth_first_ranks(nodes: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """A rank of each node; in a graph without cycles every edge leads to a higher one."""
    after: list[list[int]] = [[] for _ in range(nodes)]
    for start, end in edges:
        after[start].append(end)
    rank, free = [-1] * nodes, nodes
    seen = [False] * nodes
    for root in range(nodes):
        waiting = [] if seen[root] else [(root, iter(after[root]))]
        seen[root] = True
        while waiting:
            node, rest = waiting[-1]
            unseen = next((other for other in rest if not seen[other]), None)
            if unseen is None:  # all that it leads to has its rank
                waiting.pop()
                free -= 1
                rank[node] = free
            else:
                seen[unseen] = True
                waiting.append((unseen, iter(after[unseen])))
    return rank
