import numpy as np
import pytest
from metrics.cases import SEEDS, random_case, random_sets
from reference import metrics as reference

from llmlabel import metrics


@SEEDS
def test_scores_of_answers_equal_the_twins(seed: int) -> None:
    probs, gold = random_case(seed)
    labels = probs.shape[1]
    guesses = metrics.predicted(probs)
    twin = probs.tolist(), gold.tolist()
    assert guesses.tolist() == reference.predicted(twin[0])
    assert metrics.accuracy(probs, gold) == pytest.approx(reference.accuracy(*twin))
    expected = reference.confusion(guesses.tolist(), gold.tolist(), labels)
    assert metrics.confusion(guesses, gold, labels).tolist() == expected
    assert metrics.macro_f1(guesses, gold, labels) == pytest.approx(
        reference.macro_f1(guesses.tolist(), gold.tolist(), labels), rel=1e-12
    )


@SEEDS
def test_scores_of_sets_equal_the_twins(seed: int) -> None:
    guesses, gold = random_sets(seed)
    twin = guesses.tolist(), gold.tolist()
    assert metrics.micro_f1(guesses, gold) == pytest.approx(reference.micro_f1(*twin), rel=1e-12)
    macro = metrics.macro_f1_multilabel(guesses, gold)
    assert macro == pytest.approx(reference.macro_f1_multilabel(*twin), rel=1e-12)


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
