"""Order statistics of nonconformity scores: thresholds, p-values, and the numbers that break ties."""

import hashlib
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from jaxtyping import Float


def conformal_quantile(scores: Float[np.ndarray, " rows"], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores; infinite where that is more than n.

    Vovk et al. 2005; Lei et al. 2018 (arXiv 1604.04173), algorithm 2.
    """
    # In fractions: as floats, (9 + 1) * (1 - 0.7) is 3.0000000000000004 and would round up to 4.
    k = math.ceil((len(scores) + 1) * (1 - exact(alpha)))
    return float(np.partition(scores, k - 1)[k - 1]) if k <= len(scores) else math.inf


def conformal_p_values(
    scores: Float[np.ndarray, "..."],
    calibration: Float[np.ndarray, " gold_rows"],
    uniforms: Float[np.ndarray, "..."] | None = None,
) -> Float[np.ndarray, "..."]:
    """The share of true labels that conform as little as each score does, Vovk et al. 2005.

    (1 + #{calibration >= score}) / (n + 1): it is above alpha exactly where the score is at most
    `conformal_quantile(calibration, alpha)`. With uniform numbers u it is smoothed, (#{>} + u (1 +
    #{=})) / (n + 1), and uniform between 0 and 1 for true labels, whatever ties there are.

    Args:
        scores: Of any labels.
        calibration: Of the true labels of the gold rows, ascending.
        uniforms: One for each score, or of a shape that spreads to it.
    """
    n = len(calibration)
    at_least = n - np.searchsorted(calibration, scores, side="left").astype(np.float64)
    if uniforms is None:
        return (1 + at_least) / (n + 1)
    above = n - np.searchsorted(calibration, scores, side="right").astype(np.float64)
    return (above + uniforms * (1 + at_least - above)) / (n + 1)


def row_uniforms(ids: Iterable[str], *, seed: int) -> Float[np.ndarray, " rows"]:
    """One number between 0 and 1 a row, made from its id and `seed` only: no other row matters."""
    digests = (hashlib.blake2b(f"{seed}:{row_id}".encode()).digest()[:8] for row_id in ids)
    return np.frombuffer(b"".join(digests), dtype=">u8") / 2.0**64


def exact(alpha: float) -> Fraction:
    """The decimal number that was written: 0.1 as a float is a little more than 1/10."""
    return Fraction(repr(float(alpha)))


def fewest_scores(alpha: float) -> int:
    """ceil(1 / alpha) - 1: fewer scores have no finite quantile."""
    return math.ceil(1 / exact(alpha)) - 1
