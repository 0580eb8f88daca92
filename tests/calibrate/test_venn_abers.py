import numpy as np
import pytest
from pydantic import TypeAdapter
from reference import scaling as reference

from llmlabel.calibrate.venn_abers import (
    Curve,
    fit_isotonic,
    fit_venn_abers,
    isotonic,
    merged,
    venn_abers,
)

SEEDS = pytest.mark.parametrize("seed", range(20))


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, hits, and new scores on, between, below and above them."""
    rng = np.random.default_rng(seed)
    rows, steps = int(rng.integers(1, 40)), int(rng.integers(1, 30))
    scores = rng.integers(1, steps + 1, rows) / (steps + 1)
    hits = rng.random(rows) < (scores if seed % 3 else 0.5)
    return scores, hits, np.concatenate([scores, rng.random(20), [0.0, 1.0]])


@SEEDS
def test_both_probabilities_are_those_of_two_regressions_for_each_new_row(seed: int) -> None:
    scores, hits, new = random_rows(seed)
    low, high = venn_abers(fit_venn_abers(scores, hits), new)
    expected = [reference.venn_abers(scores.tolist(), hits.tolist(), x) for x in new.tolist()]
    np.testing.assert_allclose(np.stack([low, high], axis=1), expected, atol=1e-12)


@SEEDS
def test_isotonic_regression_equals_the_twin(seed: int) -> None:
    scores, hits, _ = random_rows(seed)
    curve = fit_isotonic(scores, hits)
    least = 1 / (len(scores) + 2)
    expected = [
        min(max(reference.isotonic_at(scores.tolist(), hits.tolist(), x), least), 1 - least)
        for x in scores.tolist()
    ]
    np.testing.assert_allclose(isotonic(curve, scores), expected, atol=1e-12)
    far = isotonic(curve, np.array([0.0, 1.0]))
    assert far.tolist() == pytest.approx([min(expected), max(expected)])


def test_the_interval_of_a_known_case() -> None:
    """Two rows, a miss below a hit: a new row above both is a hit of two, or the second of two."""
    curve = fit_venn_abers(np.array([0.3, 0.6]), np.array([False, True]))
    low, high = venn_abers(curve, np.array([0.1, 0.3, 0.4, 0.6, 0.9]))
    assert low.tolist() == [0, 0, 0, 0.5, 0.5]
    assert high.tolist() == [0.5, 0.5, 1, 1, 1]
    assert merged(low, high).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 2, 2 / 3, 2 / 3])


def test_one_of_the_two_is_calibrated() -> None:
    """Chosen by the outcome, p0 or p1 is right on average: at every value, as often as it says.

    With the scores of new rows shifted, so that these are no longer exchangeable, it is not.
    """
    rng = np.random.default_rng(0)
    chosen, shifted, outcomes = [], [], []
    for _ in range(2000):
        scores = rng.random(21)
        hits = rng.random(21) < scores**3
        curve = fit_venn_abers(scores[:20], hits[:20])
        low, high = venn_abers(curve, np.array([scores[20], scores[20] ** 3]))
        chosen.append(high[0] if hits[20] else low[0])
        shifted.append(high[1] if hits[20] else low[1])
        outcomes.append(hits[20])
    hits = np.array(outcomes)
    for values, calibrated in ((np.array(chosen), True), (np.array(shifted), False)):
        level = np.digitize(values, [0.2, 0.4, 0.6, 0.8])
        gaps = [abs(hits[level == k].mean() - values[level == k].mean()) for k in range(5)]
        bounds = [4 * 0.5 / np.sqrt((level == k).sum()) for k in range(5)]
        assert all(g < b for g, b in zip(gaps, bounds, strict=True)) == calibrated


def test_a_curve_keeps_only_where_it_bends_and_survives_json() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    curve = fit_venn_abers(scores, rng.random(20_000) < scores)
    assert len(curve.at) < 2_000
    new = rng.random(1000)
    low, high = venn_abers(curve, new)
    assert (low <= high).all()
    assert np.abs(merged(low, high) - new).max() < 0.1
    adapter = TypeAdapter(Curve)
    assert adapter.validate_json(adapter.dump_json(curve)) == curve
