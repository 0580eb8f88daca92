import numpy as np
import pytest
from reference import metrics as reference

from llmlabel import metrics

SEEDS = pytest.mark.parametrize("seed", range(20))


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties and rows of zeros; gold with rows of none of these."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(1, 60)), int(rng.integers(2, 7))
    probs = rng.integers(0, 5, (rows, labels)).astype(np.float64)
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1)
    probs[rng.random(rows) < 0.1] = 0
    return probs, rng.integers(-1, labels, rows)


def random_sets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 40)), int(rng.integers(2, 7))
    return rng.random(shape) < 0.4, rng.random(shape) < 0.3


@SEEDS
def test_scores_of_probabilities_equal_the_twins(seed: int) -> None:
    probs, gold = random_case(seed)
    labels = probs.shape[1]
    guesses = metrics.predicted(probs)
    twin = probs.tolist(), gold.tolist()
    assert guesses.tolist() == reference.predicted(twin[0])
    assert metrics.accuracy(probs, gold) == pytest.approx(reference.accuracy(*twin))
    assert metrics.nll(probs, gold) == pytest.approx(reference.nll(*twin, 1e-12), rel=1e-12)
    assert metrics.nll(probs, gold, floor=0.2) == pytest.approx(reference.nll(*twin, 0.2))
    assert metrics.brier(probs, gold) == pytest.approx(reference.brier(*twin), rel=1e-12)
    expected = reference.confusion(guesses.tolist(), gold.tolist(), labels)
    assert metrics.confusion(guesses, gold, labels).tolist() == expected
    assert metrics.macro_f1(guesses, gold, labels) == pytest.approx(
        reference.macro_f1(guesses.tolist(), gold.tolist(), labels), rel=1e-12
    )


@SEEDS
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_reliability_equals_the_twin(seed: int, bins: int) -> None:
    probs, gold = random_case(seed)
    table = metrics.reliability(probs, gold, bins=bins)
    for column, twin in zip(
        table, reference.reliability(probs.tolist(), gold.tolist(), bins), strict=True
    ):
        np.testing.assert_allclose(column, twin, rtol=1e-12)
    expected = reference.ece(probs.tolist(), gold.tolist(), bins)
    assert metrics.ece(probs, gold, bins=bins) == pytest.approx(expected, rel=1e-12)


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


@SEEDS
def test_scores_of_sets_equal_the_twins(seed: int) -> None:
    guesses, gold = random_sets(seed)
    twin = guesses.tolist(), gold.tolist()
    assert metrics.micro_f1(guesses, gold) == pytest.approx(reference.micro_f1(*twin), rel=1e-12)
    macro = metrics.macro_f1_multilabel(guesses, gold)
    assert macro == pytest.approx(reference.macro_f1_multilabel(*twin), rel=1e-12)
    assert metrics.set_size(guesses) == pytest.approx(reference.set_size(twin[0]))
    truth = np.random.default_rng(seed).integers(-1, guesses.shape[1], len(guesses))
    expected = reference.coverage(twin[0], truth.tolist())
    assert metrics.coverage(guesses, truth) == pytest.approx(expected)


@SEEDS
def test_binomial_interval_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = int(rng.integers(1, 40))
    successes = int(rng.integers(0, trials + 1))
    level = float(rng.choice([0.9, 0.95, 0.99]))
    interval = metrics.binomial_interval(successes, trials, level=level)
    assert interval == pytest.approx(reference.binomial_interval(successes, trials, level))


def test_binomial_interval_of_textbook_cases() -> None:
    assert metrics.binomial_interval(0, 10) == pytest.approx((0.0, 0.30849710))
    assert metrics.binomial_interval(10, 10) == pytest.approx((0.69150290, 1.0))
    assert metrics.binomial_interval(5, 10) == pytest.approx((0.18708603, 0.81291397))


def test_a_row_that_was_not_read_is_wrong() -> None:
    probs = np.array([[0.0, 0.0], [0.4, 0.6]])
    assert metrics.predicted(probs).tolist() == [-1, 1]
    assert metrics.accuracy(probs, np.array([-1, 1])) == 0.5  # -1 is not what -1 predicts
    assert metrics.accuracy(probs, np.array([0, 1])) == 0.5
    assert metrics.brier(probs, np.array([0, 1])) == pytest.approx((1 + 0.32) / 2)


def test_a_tie_goes_to_the_lower_id() -> None:
    assert metrics.predicted(np.array([[0.2, 0.4, 0.4]])).tolist() == [1]


def test_f1_leaves_out_labels_that_do_not_occur() -> None:
    guesses, gold = np.array([0, 0, 1, -1]), np.array([0, 1, 1, -1])
    assert metrics.macro_f1(guesses, gold, 2) == pytest.approx(2 / 3)
    assert metrics.macro_f1(guesses, gold, 50) == pytest.approx(2 / 3)
    nothing = np.zeros((2, 3), dtype=bool)
    assert metrics.micro_f1(nothing, nothing) == 0
    assert metrics.macro_f1_multilabel(nothing, nothing) == 0


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


def test_promised_coverage_is_what_split_conformal_does() -> None:
    """Against simulation: uniform scores, the quantile of n, the share of new scores below it."""
    rng = np.random.default_rng(0)
    n, rows, k = 99, 200, 90
    scores = np.sort(rng.uniform(size=(4000, n)), axis=1)[:, k - 1]
    covered = (rng.uniform(size=(4000, rows)) <= scores[:, None]).mean(axis=1)
    low, high = metrics.promised_coverage(calibration_rows=n, rows=rows, alpha=0.1)
    inside = ((covered >= low) & (covered <= high)).mean()
    assert 0.95 <= inside <= 0.97
    assert low == pytest.approx(np.quantile(covered, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(covered, 0.975), abs=0.01)
    assert metrics.promised_coverage(calibration_rows=5, rows=10, alpha=0.1) == (1.0, 1.0)
