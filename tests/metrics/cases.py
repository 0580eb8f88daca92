"""Random cases of tests of metrics."""

import numpy as np
import pytest

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
