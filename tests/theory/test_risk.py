"""The promises of risk control and selection over 1,000 resamples, and where they must fail.

Rows are drawn from a large pool with replacement, so that the true risk of every threshold is known.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse import csr_array

from llmlabel.calibrate.bounds import binomial_upper, risk_p_values
from llmlabel.calibrate.per_label import fit_label_thresholds
from llmlabel.calibrate.risk import RiskCurve, _choose, risk_curve
from llmlabel.calibrate.selective import first_threshold, selective_threshold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

POOL, ROWS, LABELS, RESAMPLES, ALPHA, DELTA = 20_000, 300, 8, 1_000, 0.2, 0.1
SIGMA = math.sqrt(DELTA * (1 - DELTA) / RESAMPLES)


@cache
def pool() -> tuple[csr_array, csr_array]:
    """Probabilities that see the chances through noise, and what is true."""
    rng = np.random.default_rng(0)
    chance = rng.beta(0.3, 0.9, (POOL, LABELS))
    probs = np.clip(chance + rng.normal(0, 0.2, chance.shape), 1e-4, 1).astype(np.float32)
    return csr_array(probs), csr_array(rng.random(chance.shape) < chance)


def true_mean(risk: Any, threshold: float) -> float:
    thresholds, totals = curve_of_pool(risk)
    at = int(np.searchsorted(-thresholds, -threshold, side="right")) - 1
    return float(totals[at]) / POOL


@cache
def curve_of_pool(risk: Any) -> Any:
    return risk_curve(*pool(), risk, max_size=3)


@cache
def easy_rows() -> np.ndarray:
    """Rows whose probabilities are close to the truth: not like the others."""
    probs, gold = pool()
    off = np.abs(probs.toarray() - gold.toarray()).sum(axis=1)
    return np.flatnonzero(off < np.median(off))


@cache
def curves(risk: Any, *, broken: bool) -> list[RiskCurve]:
    probs, gold = pool()
    found = []
    for number in range(RESAMPLES):
        rng = np.random.default_rng(number)
        rows = rng.choice(easy_rows(), ROWS) if broken else rng.integers(0, POOL, ROWS)
        found.append(risk_curve(probs[rows], gold[rows], risk, max_size=3))
    return found


def true_risks(
    risk: Any, bound: str | None, *, alpha: float = ALPHA, broken: bool = False
) -> np.ndarray:
    """Of the threshold that each resample chooses; 0 where it certifies none."""
    level = DELTA / 20 if risk == "f1" else DELTA
    found = np.zeros(RESAMPLES)
    for number, curve in enumerate(curves(risk, broken=broken)):
        if bound is None:
            certified = curve.totals + 1 <= alpha * (ROWS + 1)
        else:
            certified = risk_p_values(curve.totals, rows=ROWS, alpha=alpha, bound=bound) <= level
        threshold, total = _choose(curve, certified, risk)
        found[number] = 0.0 if total is None else true_mean(risk, threshold)
    return found


@pytest.mark.parametrize("risk", ["false_negative", "false_positive", "size"])
def test_crc_holds_on_average_and_is_tight(risk: Any) -> None:
    """At most alpha, and at least alpha - 2 / (n + 1), theorem 2 of arXiv 2208.02814."""
    found = true_risks(risk, None)
    error = 3 * found.std() / math.sqrt(RESAMPLES)
    assert ALPHA - 2 / (ROWS + 1) - error < found.mean() < ALPHA + error


@pytest.mark.parametrize(
    ("risk", "bound", "least"),
    [
        ("false_negative", "hoeffding_bentkus", 0.0),
        ("false_negative", "hoeffding", 0.0),
        ("false_discovery", "hoeffding_bentkus", 0.0),
        ("size", "binomial", 0.05),  # the exact one fails nearly as often as it may
    ],
)
def test_rcps_and_ltt_fail_at_most_delta(risk: Any, bound: str, least: float) -> None:
    found = true_risks(risk, bound)
    assert least <= (found > ALPHA).mean() < DELTA + 3 * SIGMA
    assert (found > 0).mean() > 0.9  # nearly every resample certifies something


def test_ltt_of_f1_certifies_what_cannot_be_reached_at_most_delta_of_the_time() -> None:
    best = curve_of_pool("f1").totals.min() / POOL
    found = true_risks("f1", "hoeffding_bentkus", alpha=best - 1e-6)
    assert (found > 0).mean() < DELTA + 3 * SIGMA  # each of them is a failure
    found = true_risks("f1", "hoeffding_bentkus", alpha=0.6)
    assert (found > 0).all()
    assert best <= found.min() <= found.max() < 0.6
    assert found.mean() < best + 0.02  # chosen is nearly the best threshold of all


@pytest.mark.parametrize("bound", [None, "hoeffding_bentkus"])
@pytest.mark.parametrize("risk", ["false_negative", "false_discovery"])
def test_promises_break_when_gold_rows_are_easier(risk: Any, bound: str | None) -> None:
    found = true_risks(risk, bound, broken=True)
    if bound is None:
        assert found.mean() > ALPHA + 3 * found.std() / math.sqrt(RESAMPLES)
    else:
        assert (found > ALPHA).mean() > DELTA + 3 * SIGMA


# ------------------------------------------------------------------------- a threshold a label

DRAWS = 100
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS, True)


def missed_shares(*, broken: bool) -> np.ndarray:
    """Share of the true rows of each label that each draw misses in the pool."""
    probs, gold = pool()
    own = [np.sort(probs.toarray()[gold.toarray()[:, k], k]) for k in range(LABELS)]
    found = np.zeros((DRAWS, LABELS))
    for number in range(DRAWS):
        rng = np.random.default_rng(number)
        rows = rng.choice(easy_rows(), ROWS) if broken else rng.integers(0, POOL, ROWS)
        some = np.split(gold[rows].indices, gold[rows].indptr[1:-1])
        table = Dataset.from_dict({"gold": [list(map(int, one)) for one in some]})
        soft = SoftLabels(probs[rows], SPACE.fingerprint, True).add_to(table)
        fitted = fit_label_thresholds(soft, SPACE, alpha=ALPHA)
        assert set(fitted.sources) == {"own"}
        found[number] = [
            np.searchsorted(scores, limit) / len(scores)
            for scores, limit in zip(own, fitted.thresholds, strict=True)
        ]
    return found


def test_each_label_is_missed_as_often_as_it_may_be() -> None:
    found = missed_shares(broken=False)
    error = 4 * found.std(axis=0) / math.sqrt(DRAWS)
    assert (found.mean(axis=0) < ALPHA + error).all()
    assert (found.mean(axis=0) > ALPHA - 0.02 - error).all()  # 1 / (n + 1), n is 50 and more
    assert (missed_shares(broken=True).mean(axis=0) > ALPHA + error).all()


# ---------------------------------------------------------------------------------- selection

TARGET, GOLD = 0.15, 500


@cache
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Confidence, not calibrated, and whether the label is wrong."""
    rng = np.random.default_rng(1)
    sure = rng.beta(2, 1, POOL)
    return sure, rng.random(POOL) > 0.35 + 0.65 * sure**2


def true_error(threshold: float) -> float:
    sure, wrong = answers()
    kept = sure >= threshold
    return float(wrong[kept].mean()) if kept.any() else 0.0


@cache
def draws(*, routed: bool) -> list[np.ndarray]:
    """Row numbers of each resample; those that a person answered are the ones found right."""
    _, wrong = answers()
    weight = np.where(wrong & routed, 0.4, 1.0)
    weight /= weight.sum()
    return [np.random.default_rng(n).choice(POOL, GOLD, p=weight) for n in range(RESAMPLES)]


def selective_errors(*, routed: bool = False, same_rows: bool = False) -> np.ndarray:
    sure, wrong = answers()
    found = []
    for rows in draws(routed=routed):
        first, rest = rows[: GOLD // 5], rows[GOLD // 5 :]
        if same_rows:
            first = rest = rows
        start = first_threshold(sure[first], wrong[first], target=TARGET)
        threshold = selective_threshold(
            sure[rest], wrong[rest], target=TARGET, delta=DELTA, start=start
        )
        found.append(0.0 if threshold is None else true_error(threshold))
    return np.array(found)


def test_selection_fails_at_most_delta() -> None:
    found = selective_errors()
    assert 0.03 < (found > TARGET).mean() < DELTA + 3 * SIGMA
    assert (found > 0).mean() > 0.6


def test_selection_breaks_when_gold_rows_are_easier() -> None:
    assert (selective_errors(routed=True) > TARGET).mean() > DELTA + 3 * SIGMA


def test_the_bound_of_a_budget_fails_delta_of_the_time() -> None:
    sure, wrong = answers()
    threshold = float(np.quantile(sure, 0.3))
    truth = true_error(threshold)

    def failures(*, routed: bool) -> float:
        missed = 0
        for rows in draws(routed=routed):
            kept = sure[rows] >= threshold
            errors = int(wrong[rows][kept].sum())
            missed += truth > binomial_upper(errors, int(kept.sum()), delta=DELTA)
        return missed / RESAMPLES

    assert DELTA / 2 < failures(routed=False) < DELTA + 3 * SIGMA
    assert failures(routed=True) > DELTA + 3 * SIGMA
