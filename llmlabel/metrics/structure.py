"""How good answers in hierarchies, edges, spans, clusters and graphs are."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import closure
from llmlabel.metrics.answers import LabelIds


def hierarchical_scores(
    predicted: LabelIds, gold: LabelIds, labels: LabelSpace
) -> dict[str, float]:
    """`precision`, `recall` and `f1` of the labels together with everything above them.

    Kiritchenko et al. 2006 ("Learning and evaluation in the presence of class hierarchies"), as in
    hiclass with average="micro": sizes of the sets are summed over the rows before dividing. As in
    the paper a root above all other labels is in no set, since every answer would share it. -1 is
    an empty set. 0 where nothing is predicted, or nothing gold.
    """
    above = closure(labels).astype(np.int64)
    guessed, true = _ancestor_sets(predicted, above, labels), _ancestor_sets(gold, above, labels)
    return _scores(int(guessed.multiply(true).sum()), int(guessed.sum()), int(true.sum()))


def tree_induced_error(
    predicted: LabelIds, gold: LabelIds, labels: LabelSpace, *, power: int = 1
) -> float:
    """Mean number of edges from the predicted label up to a common ancestor and down to the gold one.

    With `power` 2 it is the mean of its square, which Loki's mean minimises (arXiv 2307.12226).
    Dekel et al. 2004 ("Large margin hierarchical classification"), by the shortest such way where
    labels have several parents. All roots hang below one common point; -1 lies there.
    """
    pairs, counts = np.unique(np.stack([predicted, gold], axis=1), axis=0, return_counts=True)
    climbs = {label: _climb(label, labels) for label in np.unique(pairs).tolist()}
    edges = []
    for guess, true in pairs.tolist():
        near, far = sorted((climbs[guess], climbs[true]), key=len)
        edges.append(min(near[node] + far[node] for node in near if node in far))
    return float(np.average(np.power(edges, power), weights=counts))


def edge_scores(
    predicted: Iterable[tuple[str, str]], gold: Iterable[tuple[str, str]]
) -> dict[str, float]:
    """`precision`, `recall` and `f1` of (child, parent) pairs; a pair given twice counts once.

    0 where there is nothing to divide by.
    """
    guessed, true = set(predicted), set(gold)
    return _scores(len(guessed & true), len(guessed), len(true))


def span_scores(
    predicted: Iterable[set[tuple[int, int, int]]], gold: Iterable[set[tuple[int, int, int]]]
) -> dict[str, float]:
    """`precision`, `recall` and `f1` over all rows of whole (start, end, label) spans."""
    pairs = list(zip(predicted, gold, strict=True))
    return _scores(
        sum(len(said & true) for said, true in pairs),
        sum(len(said) for said, _ in pairs),
        sum(len(true) for _, true in pairs),
    )


def cluster_scores(assigned: LabelIds, gold: LabelIds) -> dict[str, float]:
    """`nmi`, `ami` and `ari` of two groupings, as scikit-learn defines them (arithmetic means).

    Only `ami` and `ari` are corrected for chance: with many tiny groups a random grouping has a high
    `nmi`. Rows whose gold is -1 are left out; rows assigned to nothing (-1) are one group.

    Raises:
        ValueError: No row has gold.
    """
    from sklearn.metrics import (
        adjusted_mutual_info_score,
        adjusted_rand_score,
        normalized_mutual_info_score,
    )

    known = gold >= 0
    if not known.any():
        raise ValueError(f"none of the {len(gold)} rows has a gold group to compare with")
    pair = gold[known], assigned[known]
    return {
        "nmi": float(normalized_mutual_info_score(*pair)),
        "ami": float(adjusted_mutual_info_score(*pair)),
        "ari": float(adjusted_rand_score(*pair)),
    }


def label_modularity(
    edges: Int[np.ndarray, "edges 2"], scores: Float[np.ndarray, "nodes labels"]
) -> float:
    """How far linked nodes share labels, beyond chance: a check of labels against a citation graph.

    The fuzzy modularity of Nepusz et al. 2008 (doi 10.1103/PhysRevE.77.016107), 1/2m times the sum
    over nodes i, j of (A_ij - d_i d_j / 2m) u_i u_j, of an undirected graph with m edges; u_i are
    the scores of a node divided by their sum. With one label a node it is Newman's modularity.
    """
    if not len(edges):
        raise ValueError("modularity needs at least one edge")
    total = scores.sum(axis=1, keepdims=True)
    shares = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
    degree = np.bincount(edges.ravel(), minlength=len(scores))
    within = np.einsum("el,el->", shares[edges[:, 0]], shares[edges[:, 1]])
    return float(within / len(edges) - ((degree @ shares / (2 * len(edges))) ** 2).sum())


def _scores(hits: int, guesses: int, truths: int) -> dict[str, float]:
    return {
        "precision": hits / guesses if guesses else 0.0,
        "recall": hits / truths if truths else 0.0,
        "f1": 2 * hits / (guesses + truths) if guesses + truths else 0.0,
    }


def _ancestor_sets(chosen: LabelIds, above: csr_array, labels: LabelSpace) -> csr_array:
    """Which labels are in the set of each row; rows of -1 are left out."""
    member = np.ones(len(labels), dtype=np.int64)
    if len(labels.roots) == 1:
        member[labels.roots[0]] = 0
    rows = np.flatnonzero(chosen >= 0)
    places = np.concatenate([[0], np.cumsum(chosen >= 0)])
    pick = csr_array(
        (np.ones(len(rows), np.int64), chosen[rows], places), (len(chosen), len(labels))
    )
    return (pick @ above).multiply(member[None, :]).tocsr()


def _climb(label: int, labels: LabelSpace) -> dict[int, int]:
    """Fewest edges up from a label to each label above it, and to -1, the point above the roots."""
    found, waiting = {label: 0}, [label]
    for at in waiting:  # which grows meanwhile, nearest first
        for parent in (labels.parent_positions[at] or (-1,)) if at >= 0 else ():
            if parent not in found:
                found[parent] = found[at] + 1
                waiting.append(parent)
    return found
