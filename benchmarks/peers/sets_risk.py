"""Small problems with many labels a row, for the packages that control their risk; numpy only."""

import numpy as np

CASES = [
    (method, bound, alpha)
    for method, bound in (("crc", None), ("rcps", "hoeffding"))
    for alpha in (0.1, 0.15, 0.2)
]
"""Method, bound, and share of the true labels that may be missed."""

TRAIN = 500
"""Rows that MuLaConf is constructed with; they change nothing for the norm."""


def risk_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities between the points of MAPIE's grid of 0.01, and what is true."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(0.5, 2, (400, 12))
    truth = rng.random(chance.shape) < chance
    truth[~truth.any(axis=1), 0] = True  # it wants a true label in every row
    return (chance * 99).astype(int) / 100 + 0.005, truth


def label_sets(
    rows: int, labels: int, *, shape: tuple[float, float] = (0.12, 2.4), steps: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a Beta distribution, and label sets drawn from them.

    As multiples of 1 / steps, their squares are exact in float32 too, and ties are ties.
    """
    rng = np.random.default_rng(1)
    probs = rng.beta(*shape, size=(rows, labels))
    if steps:
        probs = np.round(probs * steps) / steps
    return probs, rng.random((rows, labels)) < probs
