"""Quantiles of many groups at once, and labels that are alike by their scores."""

import math

import numpy as np
import pytest
from reference import groups as reference

from llmlabel.calibrate.clusters import cluster_labels, grouped_quantiles, interpolated
from llmlabel.calibrate.quantile import conformal_quantile, row_uniforms

SEEDS = pytest.mark.parametrize("seed", range(20))


# -------------------------------------------------------------------------------------------- twins


@SEEDS
def test_quantiles_of_groups_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, many = int(rng.integers(0, 80)), int(rng.integers(1, 7))
    scores = rng.integers(0, 20, rows) / 16
    scores[rng.random(rows) < 0.05] = np.inf
    group = rng.integers(-1, many, rows)
    for alpha in (0.1, 0.3, 0.7):
        found = grouped_quantiles(scores, group, groups=many, alpha=alpha)
        expected = [reference.quantile(scores[group == g].tolist(), alpha) for g in range(many)]
        assert found.tolist() == expected


@SEEDS
def test_clusters_equal_the_twin(seed: int) -> None:
    """k-means against all ways to part the labels in two or three."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(7, 240, p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.08, 0.02])
    gold[rng.random(240) < 0.03] = -1
    noise, none, uniforms = rng.random(240), rng.random(240) < 0.02, rng.random(240)
    for many, fewest in ((2, 4), (3, 9)):
        centres = rng.permutation(np.arange(7) % many) * 3.0
        scores = np.where(none, np.inf, centres[gold] + noise)
        found, rest = cluster_labels(
            scores, gold, uniforms, labels=7, alpha=0.1, fewest=fewest, clusters=many, seed=seed
        )
        cluster, kept = reference.cluster_labels(
            scores.tolist(), gold.tolist(), uniforms.tolist(), 7, 0.1, fewest, many
        )
        assert found.tolist() == cluster
        assert rest.tolist() == kept


@SEEDS
def test_interpolation_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.append(rng.random(30), math.inf)
    thresholds = np.append(rng.random(5), math.inf)
    for tau in (0.0, 0.3, 0.99, 1.0):
        found = interpolated(thresholds, 0.625, tau=tau, scores=scores)
        expected = [reference.interpolate(t, 0.625, tau, scores.tolist()) for t in thresholds]
        assert found.tolist() == expected


# --------------------------------------------------------------------------- quantiles and clusters


def test_a_quantile_of_few_scores_is_infinite() -> None:
    scores, group = np.arange(17.0), np.repeat([0, 1], [8, 9])
    assert grouped_quantiles(scores, group, groups=3, alpha=0.1).tolist() == [
        *(math.inf, 16.0, math.inf)
    ]
    assert conformal_quantile(scores[:8], 0.1) == math.inf


def test_the_papers_rule_for_clusters() -> None:
    """100 labels of 50 rows: 50 x 100 // 175 = 28 of 50 rows are drawn, for 14 clusters."""
    rng = np.random.default_rng(0)
    gold = np.repeat(np.arange(100), 50)
    scores = rng.random(5000) + gold
    uniforms = rng.random(5000)
    found, rest = cluster_labels(scores, gold, uniforms, labels=100, alpha=0.1, fewest=9)
    assert set(found.tolist()) == set(range(14))
    assert rest.tolist() == (uniforms >= 28 / 50).tolist()
    # Five labels: 50 x 5 // 80 = 3 rows, one cluster: there is nothing to tell apart.
    few = gold < 5
    found, rest = cluster_labels(
        scores[few], gold[few], uniforms[few], labels=5, alpha=0.1, fewest=9
    )
    assert found.tolist() == [-1] * 5


@pytest.mark.parametrize(("last", "expected"), [(60, [0, 0, 1]), (30, [0, 1, 1])])
def test_labels_weigh_the_root_of_their_scores(last: int, expected: list[int]) -> None:
    """At 0, 1 and 2.1: two of weights v and w cost v w / (v + w) of their distance squared."""
    gold = np.repeat([0, 1, 2], [100, 100, last])
    scores = np.array([0.0, 1.0, 2.1])[gold]
    found, _ = cluster_labels(
        scores, gold, np.zeros(len(gold)), labels=3, alpha=0.1, fewest=9, clusters=2
    )
    assert found.tolist() == expected  # 60: 5 < 5.3 (of the counts 54 > 45); 30: 5 > 4.3


def test_equal_labels_are_one_cluster() -> None:
    gold = np.repeat(np.arange(4), 40)
    found, _ = cluster_labels(
        np.ones(160),
        gold,
        row_uniforms(map(str, range(160)), seed=0),
        labels=4,
        alpha=0.1,
        fewest=4,
        clusters=3,
    )
    assert found.tolist() == [0] * 4


def test_no_scores_no_clusters() -> None:
    none = np.full(30, np.inf)
    gold = np.repeat([0, 1, -1], 10)
    found, _ = cluster_labels(none, gold, np.zeros(30), labels=3, alpha=0.1, fewest=4, clusters=2)
    assert found.tolist() == [-1] * 3
