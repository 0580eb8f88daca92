"""What the losses of n gold rows, each between 0 and 1, prove of the mean loss of new rows."""

import math

import numpy as np
from jaxtyping import Float
from scipy.special import rel_entr
from scipy.stats import beta, binom

from llmlabel.calibrate.quantile import fewest_scores

ROUNDING = 1e-9
"""Losses of many rows summed in another order differ by less than this."""


def risk_p_values(
    totals: Float[np.ndarray, " thresholds"], *, rows: int, alpha: float, bound: str
) -> Float[np.ndarray, " thresholds"]:
    """How improbable so small a sum of losses is, if their mean over new rows were above `alpha`.

    "hoeffding_bentkus": Angelopoulos et al. 2021 (arXiv 2110.01052), proposition 1.1. "hoeffding":
    exp(-2 n (alpha - mean)^2). "binomial": exact where each loss is 0 or 1.
    """
    if bound == "binomial":
        return binom.cdf(np.rint(totals), rows, alpha)
    means = np.clip(totals / rows, 0.0, alpha)
    if bound == "hoeffding":
        return np.exp(-2 * rows * (alpha - means) ** 2)
    hoeffding = np.exp(-rows * (rel_entr(means, alpha) + rel_entr(1 - means, 1 - alpha)))
    bentkus = math.e * binom.cdf(np.ceil(totals - ROUNDING), rows, alpha)
    return np.minimum(hoeffding, bentkus)


def upper_bound(total: float, *, rows: int, delta: float, bound: str | None) -> float:
    """The largest mean loss at which the p-value is `delta`; without a bound the estimate of CRC."""
    if bound is None:
        return (max(total, 0.0) + 1) / (rows + 1)
    if bound == "binomial":
        return binomial_upper(round(total), rows, delta=delta)
    low, high = min(max(total / rows, 0.0), 1.0), 1.0
    sums = np.array([total])
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if risk_p_values(sums, rows=rows, alpha=middle, bound=bound)[0] > delta:
            low = middle
        else:
            high = middle
    return high


def binomial_upper(errors: int, rows: int, *, delta: float) -> float:
    """The error rate at which so few errors have probability `delta`, Clopper and Pearson 1934."""
    return 1.0 if errors >= rows else float(beta.ppf(1 - delta, errors + 1, rows - errors))


def rows_needed(*, alpha: float, delta: float, bound: str | None) -> int:
    """Gold rows with which a mean loss of at most `alpha` can be proven if none has any loss."""
    if bound is None:
        return fewest_scores(alpha)
    if bound == "hoeffding":
        return math.ceil(math.log(1 / delta) / (2 * alpha**2))
    return math.ceil(math.log(delta) / math.log1p(-alpha))
