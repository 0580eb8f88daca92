"""Weighted sets under a shift that is known exactly: N(0, 1) -> N(1, 1)."""

import numpy as np
import pytest

from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.shift import effective_rows, likelihood_ratio, weighted_thresholds

pytestmark = pytest.mark.slow

SPLITS, ALPHA, ROWS, TEST, LABELS = 200, 0.1, 2000, 1000, 20


def draw(rng: np.random.Generator, rows: int, mean: float, *, turn: float = 0.0) -> np.ndarray:
    """x and 1 - p of the true label; rows get harder as x grows, and by `turn` at any x."""
    x = rng.normal(mean, 1, rows)
    easy = rng.random(rows) < 1 / (1 + np.exp(2 * x + turn))
    logits = rng.normal(0, 1, (rows, LABELS))
    logits[:, 0] += np.where(easy, 6.0, 0.5)  # the true label stands first
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.stack([x, 1 - powers[:, 0] / powers.sum(axis=1)])


def ratio(x: np.ndarray) -> np.ndarray:
    return np.exp(x - 0.5)


def coverage(weights: object, *, splits: int = SPLITS, turn: float = 0.0) -> np.ndarray:
    found = []
    for split in range(splits):
        rng = np.random.default_rng(split)
        (x, scores), (new_x, new_scores) = draw(rng, ROWS, 0.0), draw(rng, TEST, 1.0, turn=turn)
        if weights == "none":
            cuts = np.full(TEST, conformal_quantile(scores, ALPHA))
        elif weights == "estimated":
            half = [x[::2, None], new_x[::2, None]], [x[1::2, None], new_x[1::2, None]]
            own, new = np.empty(ROWS), np.empty(TEST)
            for part, (cal, other) in enumerate(half):  # each half weighed by the other
                own[1 - part :: 2] = likelihood_ratio(cal, other, x[1 - part :: 2, None])
                new[1 - part :: 2] = likelihood_ratio(cal, other, new_x[1 - part :: 2, None])
            cuts = weighted_thresholds(scores, own, new, alpha=ALPHA)
        elif weights == "scrambled":  # each score meets a foreign weight
            cuts = weighted_thresholds(
                np.sort(scores), np.sort(ratio(x)), ratio(new_x), alpha=ALPHA
            )
        else:
            cuts = weighted_thresholds(scores, ratio(x), ratio(new_x), alpha=ALPHA)
        found.append((new_scores <= cuts).mean())
    return np.array(found)


def test_true_weights_keep_the_promise() -> None:
    found = coverage("true")
    error = found.std() / np.sqrt(SPLITS)
    assert error < 0.0015
    assert found.mean() == pytest.approx(0.9, abs=0.01)
    # The promise is a lower bound; above it there is no more than the share of one row's weight.
    assert 0.9 - 4 * error < found.mean() < 0.9 + 4 * error + 0.003


def test_without_weights_coverage_falls() -> None:
    assert coverage("none").mean() < 0.87


def test_weights_of_other_rows_are_no_weights() -> None:
    """What a peer does: sorts the weights by themselves."""
    assert coverage("scrambled", splits=50).mean() > 0.95


def test_coverage_falls_when_texts_mean_something_else() -> None:
    assert coverage("true", splits=50, turn=2.0).mean() < 0.88


def test_estimated_weights_come_close() -> None:
    assert coverage("estimated", splits=40).mean() == pytest.approx(0.9, abs=0.015)


def test_effective_rows_of_this_shift() -> None:
    """n / E[w^2] = n / e for the log-normal ratio of two normals one apart."""
    x = np.random.default_rng(0).normal(0, 1, 400_000)
    assert effective_rows(ratio(x)) / len(x) == pytest.approx(np.exp(-1), rel=0.05)
