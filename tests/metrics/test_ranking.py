import numpy as np
import pytest
from metrics.cases import SEEDS
from reference import ranking as reference
from scipy.sparse import csr_array

from llmlabel.metrics.ranking import inverse_propensity, ranked, ranking_scores, without_pairs


def random_case(seed: int) -> tuple[csr_array, csr_array, list[dict[int, float]], list[set[int]]]:
    """Scores with ties, negative ones, rows of none; gold with rows of none."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(3, 30)), int(rng.integers(3, 12))
    values = rng.integers(-3, 6, (rows, labels)) / 4
    values[values == 0] = 0.1
    values[rng.random(values.shape) < 0.4] = 0
    true = rng.random(values.shape) < 0.25
    scores, gold = csr_array(values), csr_array(true)
    stored = [{k: v for k, v in enumerate(row) if v} for row in values.tolist()]
    return scores, gold, stored, [set(np.flatnonzero(row).tolist()) for row in true]


@SEEDS
def test_scores_of_rankings_equal_the_twins(seed: int) -> None:
    scores, gold, rows, true = random_case(seed)
    labels = scores.shape[1]
    weights = inverse_propensity(gold, a=0.6, b=2.6)
    assert weights == pytest.approx(reference.inverse_propensity(true, labels, 0.6, 2.6), rel=1e-12)
    found = ranking_scores(scores, gold, ks=(1, 2, 5), inverse_propensity=weights)
    expected: dict[str, float] = {}
    for k in (1, 2, 5):
        expected |= reference.scores(rows, true, k, weights.tolist())
    assert found == pytest.approx(expected, abs=1e-12)
    assert ranking_scores(scores, gold, ks=(2,)) == {
        name: found[name] for name in ("P@2", "R@2", "nDCG@2")
    }
    padded = [[*reference.ranked(row, 4), -1, -1, -1, -1][:4] for row in rows]
    assert ranked(scores, k=4).tolist() == padded


@SEEDS
def test_pairs_that_are_left_out_are_not_ranked(seed: int) -> None:
    scores, gold, rows, true = random_case(seed)
    rng = np.random.default_rng(seed)
    pairs = np.column_stack([rng.integers(0, side, 15) for side in scores.shape])
    for row, label in pairs.tolist():
        rows[row].pop(label, None)
    found = ranking_scores(without_pairs(scores, pairs), gold, ks=(3,))
    expected = reference.scores(rows, true, 3, [1.0] * scores.shape[1])
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


def test_a_rare_label_found_counts_more_than_a_frequent_one() -> None:
    train = csr_array(np.array([[1, 0]] * 98 + [[0, 1]] * 2))
    weights = inverse_propensity(train)
    c = (np.log(100) - 1) * 2.5**0.55
    assert weights.tolist() == pytest.approx([1 + c * 99.5**-0.55, 1 + c * 3.5**-0.55])
    gold = csr_array(np.array([[1, 0], [0, 1]]))
    rare = ranking_scores(csr_array(np.array([[0, 1.0]] * 2)), gold, inverse_propensity=weights)
    often = ranking_scores(csr_array(np.array([[1.0, 0]] * 2)), gold, inverse_propensity=weights)
    assert rare["P@1"] == often["P@1"] == 0.5
    assert rare["PSP@1"] == pytest.approx(weights[1] / weights.sum())
    assert often["PSP@1"] == pytest.approx(weights[0] / weights.sum())


def test_scores_of_a_known_ranking() -> None:
    """Labels 2, 0, 1 in this order; 0, 1 and 3 are gold, and a row that says nothing."""
    scores = csr_array(np.array([[0.5, 0.2, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    gold = csr_array(np.array([[1, 1, 0, 1], [0, 0, 0, 1]]))
    found = ranking_scores(scores, gold, ks=(1, 3))
    at = 1 / np.log2([2, 3, 4])
    assert found == pytest.approx(
        {
            "P@1": 0.0,
            "R@1": 0.0,
            "nDCG@1": 0.0,
            "P@3": 2 / 3 / 2,
            "R@3": 2 / 3 / 2,
            "nDCG@3": (at[1] + at[2]) / at.sum() / 2,
        }
    )
