"""How good predictions, probabilities, prediction sets and groupings are: pure functions of arrays.

`gold` holds one label id a row; -1 means none of these labels, which nothing predicts right.
A row of `probs` that is all 0 has no prediction (its reply could not be read): it counts as wrong.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import closure

Probs = Float[np.ndarray, "rows labels"]
LabelIds = Int[np.ndarray, " rows"]
Sets = Bool[np.ndarray, "rows labels"]


def predicted(probs: Probs) -> LabelIds:
    """The most probable label of each row (of equal ones the lowest id); -1 for a row of zeros."""
    return np.where(probs.max(axis=1) > 0, probs.argmax(axis=1), -1)


def accuracy(probs: Probs, gold: LabelIds) -> float:
    """Share of rows whose most probable label is the gold one."""
    return float(correct(probs, gold).mean())


def confusion(predicted: LabelIds, gold: LabelIds, labels: int) -> Int[np.ndarray, "labels labels"]:
    """Number of rows by gold label (row) and predicted label (column).

    Rows without a prediction or without a gold label are in no cell.
    """
    known = (predicted >= 0) & (gold >= 0)
    cells = gold[known] * labels + predicted[known]
    return np.bincount(cells, minlength=labels * labels).reshape(labels, labels)


def macro_f1(predicted: LabelIds, gold: LabelIds, labels: int) -> float:
    """Mean F1 of the labels; a label that is neither predicted nor gold anywhere is left out.

    A prediction for a row of no gold label is a false positive of the label predicted.
    """
    hits = np.bincount(gold[(predicted == gold) & (gold >= 0)], minlength=labels)
    guesses = np.bincount(predicted[predicted >= 0], minlength=labels)
    return _macro_f1(hits, guesses + np.bincount(gold[gold >= 0], minlength=labels))


def nll(probs: Probs, gold: LabelIds, *, floor: float = 1e-12) -> float:
    """Mean negative log-likelihood in nats; the probability of gold counts as at least `floor`.

    A row whose gold is none of these has the likelihood `floor`.
    """
    return float(-np.log(np.maximum(_gold_probs(probs, gold), floor)).mean())


def brier(probs: Probs, gold: LabelIds) -> float:
    """Brier score, multi-class: mean over rows of the summed squared error, between 0 and 2.

    A row whose gold is none of these has the target 0 for every label.
    """
    targets = gold[:, None] == np.arange(probs.shape[1])
    return float(((probs.astype(np.float64) - targets) ** 2).sum(axis=1).mean())


def reliability(
    probs: Probs, gold: LabelIds, *, bins: int = 10
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Mean confidence, accuracy and number of rows in equal-width bins of the top probability.

    Bin i is (i/bins, (i+1)/bins]; 0 belongs to the first. An empty bin has NaN, NaN and 0.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    # Against the edges themselves: confidence * bins would round 0.2 * 15 up into the next bin.
    edges = np.arange(1, bins) / bins
    index = np.searchsorted(edges, confidence, side="left")
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / count
        mean_correct = np.bincount(index, weights=correct(probs, gold), minlength=bins) / count
    return mean_confidence, mean_correct, count


def ece(probs: Probs, gold: LabelIds, *, bins: int = 10) -> float:
    """Expected calibration error of the top probability, Guo et al. 2017 (arXiv 1706.04599), eq. 3."""
    confidence, correct, count = reliability(probs, gold, bins=bins)
    filled = count > 0
    gap = np.abs(confidence[filled] - correct[filled])
    return float((gap * count[filled]).sum() / count.sum())


def risk_coverage(
    confidence: Float[np.ndarray, " rows"], correct: Bool[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " levels"], Float[np.ndarray, " levels"]]:
    """Error rate of the rows that are at least so confident, against the share of such rows.

    One point for each distinct confidence, the most confident first; rows of equal confidence enter
    together, so the order of the rows changes nothing.
    """
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    last = np.append(np.flatnonzero(np.diff(falling) != 0), len(falling) - 1)
    accepted = last + 1
    errors = np.cumsum(~correct[order])[last]
    return accepted / len(falling), errors / accepted


def aurc(confidence: Float[np.ndarray, " rows"], correct: Bool[np.ndarray, " rows"]) -> float:
    """Area under the risk-coverage curve: mean risk over all coverages, lower is better.

    Geifman et al. 2019 (arXiv 1805.08206). Differs from the paper: rows of equal
    confidence enter together, each at the risk of their group, instead of in the order they have.
    """
    coverages, risks = risk_coverage(confidence, correct)
    return float((np.diff(coverages, prepend=0.0) * risks).sum())


def coverage(sets: Sets, gold: LabelIds) -> float:
    """Share of rows whose set contains the gold label."""
    inside = sets[np.arange(len(gold)), gold]  # -1 reads the last label and is masked
    return float((inside & (gold >= 0)).mean())


def set_size(sets: Sets) -> float:
    """Mean number of labels in a set."""
    return float(sets.sum(axis=1).mean())


def binomial_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes > 0 else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def micro_f1(predicted: Sets, gold: Sets) -> float:
    """F1 over all pairs of row and label together; 0 where nothing is predicted nor gold."""
    total = predicted.sum() + gold.sum()
    return float(2 * (predicted & gold).sum() / total) if total else 0.0


def macro_f1_multilabel(predicted: Sets, gold: Sets) -> float:
    """Mean F1 of the labels; a label that is neither predicted nor gold anywhere is left out."""
    return _macro_f1((predicted & gold).sum(axis=0), predicted.sum(axis=0) + gold.sum(axis=0))


def _macro_f1(hits: Int[np.ndarray, " labels"], total: Int[np.ndarray, " labels"]) -> float:
    """Mean of 2 * true positives / (predicted + gold) over the labels that occur; 0 without any."""
    occurs = total > 0
    return float((2 * hits[occurs] / total[occurs]).mean()) if occurs.any() else 0.0


def correct(probs: Probs, gold: LabelIds) -> Bool[np.ndarray, " rows"]:
    """Whether the most probable label is the true one; never where no label is true."""
    return (predicted(probs) == gold) & (gold >= 0)


def _gold_probs(probs: Probs, gold: LabelIds) -> Float[np.ndarray, " rows"]:
    picked = probs[np.arange(len(gold)), gold].astype(np.float64)  # -1 reads the last label
    return np.where(gold >= 0, picked, 0.0)


def promised_coverage(
    *, calibration_rows: int, rows: int, alpha: float, level: float = 0.95
) -> tuple[float, float]:
    """The middle `level` of the coverage on `rows` new rows when split conformal keeps its promise.

    Exact: with k = ceil((n + 1)(1 - alpha)), the number of covered rows is beta-binomial(rows, k,
    n + 1 - k) over the draw of the n calibration rows and the new ones (Vovk 2012, proposition 2a,
    for scores without ties).
    """
    from scipy.stats import betabinom

    k = math.ceil((1 - Fraction(str(alpha))) * (calibration_rows + 1))
    if k > calibration_rows:
        return 1.0, 1.0
    covered = betabinom(rows, k, calibration_rows + 1 - k)
    tail = (1 - level) / 2
    return float(covered.ppf(tail) / rows), float(covered.ppf(1 - tail) / rows)


# ---------------------------------------------------------- hierarchies, edges, clusters and graphs


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
