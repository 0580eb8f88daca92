"""The labels between labels: which of them a distribution can have in its middle, and how far they lie.

Roberts et al., "Geometry-Aware Adaptation for Pretrained Models" (Loki, arXiv 2307.12226): the locus
of the observed labels are all labels that are a Fréchet mean of some distribution over them (see
`llmlabel.refine.geometry`). Distances count edges of the hierarchy; all roots lie below one common
point, which is no label.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import depths

_Keys = Int[np.ndarray, " cells"]


class Costs(NamedTuple):
    """Expected squared distances F of some labels of each row."""

    rows: Int[np.ndarray, " cells"]
    labels: Int[np.ndarray, " cells"]
    values: Float[np.ndarray, " cells"]


def reachable_labels(labels: LabelSpace, observed: list[int]) -> list[int]:
    """The locus: all labels that some distribution over the observed ones has as its mean.

    In a hierarchy where no label has two parents these are the labels on the ways between observed
    ones, these included (theorem of the paper for trees).

    Args:
        labels: the hierarchy.
        observed: positions.

    Raises:
        ValueError: a label has several parents, nothing is observed, or a position is no label's.
    """
    _check_observed(labels, observed)
    if not is_forest(labels):
        several = next(i for i, some in enumerate(labels.parents) if len(some) > 1)
        raise ValueError(
            f"label {labels.ids[several]!r} has several parents, {labels.parents[several]}, and the "
            "locus is known for trees only; keep one parent of each label"
        )
    together = csr_array(np.bincount(observed, minlength=len(labels))[None, :], dtype=np.float64)
    return between(together, labels).labels.tolist()


def next_label(labels: LabelSpace, observed: list[int]) -> int | None:
    """The label to observe next: out of reach and farthest from the locus; None when all are reached.

    The paper's active selection. Of equally far ones the lowest position.

    Args:
        labels: the hierarchy, without second parents.
        observed: positions.
    """
    reached = reachable_labels(labels, observed)
    graph = edges(labels)
    far = dijkstra(graph, directed=False, unweighted=True, indices=reached, min_only=True)[:-1]
    return int(far.argmax()) if far.max() > 0 else None


def between(probs: csr_array, labels: LabelSpace) -> Costs:
    """F (see `llmlabel.refine.geometry`) of the labels on the ways between each row's labels.

    For hierarchies without second parents and rows that sum to 1.

    The sums of p, p d and p d^2 over what lies below a label go up level by level, d measured from
    the label. Down again, with d measured from the parent, F(child) = F(parent) + 1 + 2 (sum of p d
    outside the child's part - sum of p d inside it).
    """
    width = len(labels) + 1  # the last column is the point above the roots
    parent = np.array([*(some[0] if some else width - 1 for some in labels.parent_positions), -1])
    own = np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr)) * width + probs.indices
    keys = _ways_up(own, parent)
    rows, nodes = np.divmod(keys, width)
    up = np.searchsorted(keys, rows * width + parent[nodes])
    levels = _levels(np.append(depths(labels) + 1, 0)[nodes])
    mass, first, second, sources = np.zeros((4, len(keys)))
    mass[np.searchsorted(keys, own)] = probs.data
    sources[np.searchsorted(keys, own)] = 2
    for level in levels[:0:-1]:
        np.add.at(second, up[level], second[level] + 2 * first[level] + mass[level])
        np.add.at(first, up[level], first[level] + mass[level])
        np.add.at(mass, up[level], mass[level])
        np.add.at(sources, up[level], 1)
    passed = sources == 1  # nothing stops here and all comes from one child
    inside, moment, values = first + mass, first.copy(), second.copy()
    for level in levels[1:]:
        # Below a label that all ways pass through, all mass is the child's, whose own sums hold.
        branch = level[~passed[up[level]]]
        above = up[branch]
        values[branch] = values[above] + 1 + 2 * (moment[above] - 2 * inside[branch])
        moment[branch] = moment[above] + 1 - 2 * mass[branch]
        passed[branch] = False
    kept = ~passed & (nodes < width - 1)
    return Costs(rows[kept], nodes[kept], values[kept])


def _ways_up(own: Int[np.ndarray, " own"], parent: Int[np.ndarray, " nodes"]) -> _Keys:
    """All labels on the ways from each row's labels to the top, as row * number of nodes + label."""
    width = len(parent)
    parts = [own]
    while len(parts[-1]):
        rows, nodes = np.divmod(parts[-1], width)
        rows, nodes = rows[nodes < width - 1], nodes[nodes < width - 1]
        parts.append(np.unique(rows * width + parent[nodes]))
    return np.unique(np.concatenate(parts))


def _levels(depth: Int[np.ndarray, " cells"]) -> list[Int[np.ndarray, " level"]]:
    """The places of each depth, from 0 on."""
    order = np.argsort(depth, kind="stable")
    return np.split(order, np.searchsorted(depth[order], np.arange(1, depth.max(initial=0) + 1)))


def edges(labels: LabelSpace) -> csr_array:
    """The graph of children and parents; the last node is the point above the roots."""
    top = len(labels)
    pairs = [(i, p) for i, some in enumerate(labels.parent_positions) for p in some or (top,)]
    children, parents = np.array(pairs).T
    return csr_array((np.ones(len(pairs)), (children, parents)), shape=(top + 1, top + 1))


def is_forest(labels: LabelSpace) -> bool:
    """Whether no label has more than one parent."""
    return all(len(some) <= 1 for some in labels.parents)


def _check_observed(labels: LabelSpace, observed: list[int]) -> None:
    if not observed:
        raise ValueError("observed names no label; give the position of at least one")
    if wrong := [position for position in observed if not 0 <= position < len(labels)]:
        raise ValueError(
            f"observed has the position {wrong[0]}, but the {len(labels)} labels have positions 0 "
            f"to {len(labels) - 1}"
        )
