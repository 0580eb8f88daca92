import dataclasses

import numpy as np
import pytest
from metrics.cases import SEEDS, random_case
from reference import metrics as reference

from llmlabel import metrics


@SEEDS
def test_log_loss_and_brier_score_equal_the_twins(seed: int) -> None:
    probs, gold = random_case(seed)
    twin = probs.tolist(), gold.tolist()
    assert metrics.nll(probs, gold) == pytest.approx(reference.nll(*twin, 1e-12), rel=1e-12)
    assert metrics.nll(probs, gold, floor=0.2) == pytest.approx(reference.nll(*twin, 0.2))
    assert metrics.brier(probs, gold) == pytest.approx(reference.brier(*twin), rel=1e-12)


@SEEDS
@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_errors_equal_the_twins(seed: int, bins: int, binning: str) -> None:
    probs, gold = random_case(seed)
    twin, how = (probs.tolist(), gold.tolist(), bins, binning), {"bins": bins, "binning": binning}
    assert metrics.ece(probs, gold, **how) == pytest.approx(reference.ece(*twin), rel=1e-12)
    errors = metrics.classwise_ece(probs, gold, **how)
    assert errors == pytest.approx(reference.classwise_ece(*twin), rel=1e-12)


@SEEDS
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_the_parts_of_the_brier_score_equal_the_twins(seed: int, binning: str) -> None:
    probs, gold = random_case(seed)
    parts = metrics.brier_parts(probs, gold, bins=4, binning=binning)
    expected = reference.brier_parts(probs.tolist(), gold.tolist(), 4, binning)
    assert dataclasses.asdict(parts) == pytest.approx(expected, abs=1e-12)
    order = np.random.default_rng(seed).permutation(len(gold))
    shuffled = metrics.brier_parts(probs[order], gold[order], bins=4, binning=binning)
    assert dataclasses.astuple(shuffled) == pytest.approx(dataclasses.astuple(parts), abs=1e-12)


def test_the_brier_score_of_a_calibrated_forecast_has_no_reliability() -> None:
    """Three of four rows at .75 are right, and one of four at .25: nothing is blurred either."""
    probs = np.array([[0.75, 0.25]] * 4 + [[0.25, 0.75]] * 4)
    parts = metrics.brier_parts(probs, np.array([0, 0, 0, 1, 1, 1, 1, 0]))
    assert (parts.reliability, parts.remainder) == pytest.approx((0, 0), abs=1e-12)
    assert parts.uncertainty == pytest.approx(0.5)
    assert parts.resolution == pytest.approx(2 * 0.25**2)
    assert parts.brier == pytest.approx(0.375)


def test_equal_values_share_a_bin_of_equal_mass() -> None:
    values = np.array([0.1, 0.9, 0.1, 0.5, 0.1, 0.1, 0.7, 0.8])
    assert metrics.quantile_bins(values, bins=4).tolist() == [0, 3, 0, 2, 0, 0, 2, 3]
    assert metrics.quantile_bins(np.arange(10), bins=10).tolist() == list(range(10))
    assert metrics.quantile_bins(np.array([3, 3]), bins=10).tolist() == [0, 0]


def test_errors_that_equal_widths_average_away_show_in_equal_masses() -> None:
    """All confidences in one bin of ten: .91 is always right, .99 half of the time."""
    probs = np.array([[0.91, 0.09]] * 10 + [[0.99, 0.01]] * 10)
    gold = np.array([0] * 10 + [0, 1] * 5)
    assert metrics.ece(probs, gold) == pytest.approx(0.95 - 0.75)
    assert metrics.ece(probs, gold, bins=2, binning="mass") == pytest.approx((0.09 + 0.49) / 2)
    assert metrics.classwise_ece(probs, gold, bins=2, binning="mass") == pytest.approx(0.29)


@SEEDS
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_reliability_equals_the_twin(seed: int, bins: int) -> None:
    probs, gold = random_case(seed)
    table = metrics.reliability(probs, gold, bins=bins)
    for column, twin in zip(
        table, reference.reliability(probs.tolist(), gold.tolist(), bins, "width"), strict=True
    ):
        np.testing.assert_allclose(column, twin, rtol=1e-12)


@SEEDS
def test_risk_coverage_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 50))
    confidence, correct = rng.integers(0, 20, rows) / 20, rng.random(rows) < 0.7
    twin = confidence.tolist(), correct.tolist()
    coverages, risks = metrics.risk_coverage(confidence, correct)
    np.testing.assert_allclose([coverages, risks], reference.risk_coverage(*twin), rtol=1e-12)
    area = metrics.aurc(confidence, correct)
    assert area == pytest.approx(reference.aurc(*twin), rel=1e-12)
    order = rng.permutation(rows)
    assert metrics.aurc(confidence[order], correct[order]) == area


def test_the_edge_of_a_bin_belongs_to_the_lower_one() -> None:
    probs = np.array([[0.6, 0.4], [0.2, 0.2], [1.0, 0.0], [0.0, 0.0]])
    _, _, count = metrics.reliability(probs, np.array([0, 0, 0, 0]), bins=5)
    assert count.tolist() == [2, 0, 1, 0, 1]  # 0.2 in (0, 0.2], 0.6 in (0.4, 0.6]


def test_calibration_error_of_a_known_case() -> None:
    probs = np.array([[0.9, 0.1]] * 10)
    gold = np.array([0] * 7 + [1] * 3)
    assert metrics.ece(probs, gold) == pytest.approx(0.2)


def test_equal_confidence_gives_one_point() -> None:
    correct = np.array([True, False, True, True])
    coverages, risks = metrics.risk_coverage(np.full(4, 0.5), correct)
    assert (coverages.tolist(), risks.tolist()) == ([1.0], [0.25])


def test_area_without_ties_is_the_mean_of_the_risks() -> None:
    correct = np.array([True, True, False, True])
    area = metrics.aurc(np.array([0.9, 0.8, 0.7, 0.6]), correct)
    assert area == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
