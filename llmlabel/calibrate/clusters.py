"""Quantiles of the scores of many groups at once, and labels that are alike by their scores."""

import math
import re
from fractions import Fraction

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int

from llmlabel.calibrate.quantile import fewest_scores
from llmlabel.data import require_columns
from llmlabel.files import arrow_table

Scores = Float[np.ndarray, " rows"]
GroupOfRow = Int[np.ndarray, " rows"]

_QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9)


def cluster_labels(
    scores: Scores,
    gold: GroupOfRow,
    uniforms: Scores,
    *,
    labels: int,
    alpha: float,
    fewest: int,
    clusters: int | None = None,
    seed: int = 0,
) -> tuple[Int[np.ndarray, " labels"], Bool[np.ndarray, " rows"]]:
    """Clusters labels by their scores, Ding et al. 2023 (arXiv 2306.09335).

    A part of the rows is drawn for it, the thresholds are for the others; a label with too few rows
    for a threshold gives all it has. The quantiles of a label's scores in that part are a point;
    k-means weighs each by the root of the number of scores.

    With n rows of the rarest label that can have a threshold of its own, and K labels of n or more, a
    share K / (75 + K) is drawn, and there are half as many clusters as that draws of the n rows.
    Where `clusters` is given, half of the rows are drawn.

    Returns:
        The cluster of each label, -1 for one with fewer than `fewest` scores in the part, and for
        all where there is nothing to tell apart; and which rows were not drawn.
    """
    counts, needed = counts_of(gold, labels), fewest_scores(alpha)
    share = 0.5
    if clusters is None:
        rarest = max(int(counts.min()), needed)
        frequent = int((counts >= rarest).sum())
        drawn = rarest * frequent // (75 + frequent)
        clusters, share = drawn // 2, drawn / rarest
    rest = uniforms >= share
    rest &= (gold < 0) | (counts[gold] >= needed)
    part = np.where(rest, -1, gold)
    counts = counts_of(part, labels)
    embedded = np.flatnonzero(counts >= fewest)
    found = np.full(labels, -1)
    if 1 < clusters < len(embedded):
        levels = np.array([*_QUANTILES, 1 - alpha])
        points = _embedding(scores, part, labels, levels)[embedded]
        found[embedded] = _k_means(points, np.sqrt(counts[embedded]), clusters, seed)
    return found, rest


def grouped_quantiles(
    scores: Scores, group: GroupOfRow, *, groups: int, alpha: float
) -> Float[np.ndarray, " groups"]:
    """`conformal_quantile` of each group's scores; a row of group -1 is in none."""
    ordered, counts = _by_group(scores, group, groups)
    sizes, size_of = np.unique(counts, return_inverse=True)
    kept = 1 - Fraction(repr(float(alpha)))
    ranks = np.array([math.ceil((n + 1) * kept) for n in sizes.tolist()], np.int64)[size_of]
    found, enough = np.full(groups, np.inf), ranks <= counts
    found[enough] = ordered[(np.cumsum(counts) - counts + ranks - 1)[enough]]
    return found


def counts_of(group: GroupOfRow, groups: int) -> Int[np.ndarray, " groups"]:
    """How many rows each group has."""
    return np.bincount(group[group >= 0], minlength=groups)


def interpolated(
    thresholds: Float[np.ndarray, " groups"], marginal: float, *, tau: float, scores: Scores
) -> Float[np.ndarray, " groups"]:
    """The sum of tau x threshold and (1 - tau) x marginal; infinity is the largest finite score."""
    largest = scores[np.isfinite(scores)].max(initial=-np.inf)
    own = np.where(np.isinf(thresholds) & np.isfinite(largest), largest, thresholds)
    return own if tau == 1 else tau * own + (1 - tau) * marginal


def group_values(dataset: Dataset, column: str) -> list[str | None]:
    """The groups of the rows as text; None where a row has none."""
    require_columns(dataset, column)
    kind = str(arrow_table(dataset.select_columns([column]))[column].type)
    if not re.fullmatch(r"(large_)?string(_view)?|u?int\d+|bool|null", kind):
        text = "groups are strings, whole numbers or truth values"
        raise ValueError(f"column {column!r} holds {kind}; {text}")
    return [None if value is None else str(value) for value in dataset[column][:]]


def _by_group(
    scores: Scores, group: GroupOfRow, groups: int
) -> tuple[Float[np.ndarray, " known"], Int[np.ndarray, " groups"]]:
    """The scores of group 0, ascending, then those of group 1 and so on; how many each has."""
    known = np.flatnonzero(group >= 0)
    order = known[np.lexsort((scores[known], group[known]))]
    return scores[order], counts_of(group, groups)


def _embedding(
    scores: Scores, group: GroupOfRow, groups: int, levels: Float[np.ndarray, " levels"]
) -> Float[np.ndarray, "groups levels"]:
    """Quantiles of each group's scores, interpolated; a group without scores has any."""
    largest = scores[np.isfinite(scores)].max(initial=0.0)
    ordered, counts = _by_group(np.minimum(scores, largest), group, groups)
    last = np.maximum(counts - 1, 0)[:, None]
    first = np.minimum((np.cumsum(counts) - counts)[:, None], max(len(ordered) - 1, 0))
    places = levels * last
    below = places.astype(np.int64)
    low, high = ordered[first + below], ordered[first + np.minimum(below + 1, last)]
    points: Float[np.ndarray, "groups levels"] = low + (places - below) * (high - low)
    return points


def _k_means(
    points: Float[np.ndarray, "points width"],
    weights: Float[np.ndarray, " points"],
    clusters: int,
    seed: int,
) -> Int[np.ndarray, " points"]:
    """The cluster of each point, numbered in the order of their first points."""
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(np.unique(points, axis=0)))
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(points, sample_weight=weights)
    _, first, found = np.unique(fitted.labels_, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[found]
