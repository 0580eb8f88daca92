"""Each diagnostic over 200 seeded runs: it keeps its level without a shift, and sees a planted one."""

import numpy as np
import pytest
from datasets import Dataset, List, Value
from scipy.stats import binom, kstest

from llmlabel.calibrate.conformal import conformal_p_values, fit_conformal, predict_sets
from llmlabel.calibrate.diagnostics import coverage_cells, worst_slices
from llmlabel.calibrate.drift import jumper_martingale, monitor_drift, online_p_values
from llmlabel.calibrate.exchangeability import check_exchangeability, permutation_test, shares_test
from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

RUNS, LEVEL = 200, 0.05
MOST = int(binom.ppf(1 - 1e-4, RUNS, LEVEL))
"""More false alarms than this have a chance of 1 in 10,000."""

LABELS = load_labels(["a", "b", "c"])


def alarms(p_values: list[float]) -> int:
    return sum(p_value <= LEVEL for p_value in p_values)


@pytest.mark.parametrize("ties", [False, True])
def test_the_permutation_test_keeps_its_level_and_has_power(ties: bool) -> None:
    def run(seed: int, shift: float) -> float:
        rng = np.random.default_rng(seed)
        known, new = rng.normal(0, 1, 80), rng.normal(shift, 1, 60)
        if ties:
            known, new = np.round(known), np.round(new)
        return permutation_test(known, new, permutations=199, seed=seed)[1]

    still = [run(seed, 0.0) for seed in range(RUNS)]
    assert alarms(still) <= MOST
    assert ties or kstest(still, "uniform").pvalue > 1e-4  # and it is not idle
    assert alarms([run(seed, 0.7) for seed in range(RUNS)]) > 0.8 * RUNS


def test_p_values_of_one_draw_of_gold_rows_are_no_test_of_uniformity() -> None:
    """Why new rows are compared with the gold rows themselves."""

    def run(seed: int) -> float:
        rng = np.random.default_rng(seed)
        known = np.sort(rng.normal(0, 1, 100))
        values = conformal_p_values(rng.normal(0, 1, 400), known, rng.random(400))
        return float(kstest(values, "uniform").pvalue)

    assert alarms([run(seed) for seed in range(RUNS)]) > 2 * MOST


def test_shares_keep_their_level_and_have_power() -> None:
    def run(seed: int, shift: float) -> float:
        rng = np.random.default_rng(seed)
        share = np.array([0.5, 0.3, 0.15, 0.05])
        other = share * [1 - shift, 1, 1, 1 + 10 * shift]
        known = rng.multinomial(300, share)
        return shares_test(known, rng.multinomial(100, other / other.sum()), seed=seed)[1]

    still = [run(seed, 0.0) for seed in range(RUNS)]
    assert MOST >= alarms(still) >= int(binom.ppf(1e-4, RUNS, LEVEL))
    assert alarms([run(seed, 0.3) for seed in range(RUNS)]) > 0.8 * RUNS


def test_bets_ever_win_as_rarely_as_ville_says() -> None:
    def run(seed: int, shift: float) -> float:
        rng = np.random.default_rng(seed)
        scores = np.concatenate([rng.normal(0, 1, 300), rng.normal(shift, 1, 300)])
        past = rng.normal(0, 1, 100)
        return float(jumper_martingale(online_p_values(scores, rng.random(600), past=past)).max())

    limit = np.log(1 / LEVEL)
    assert sum(run(seed, 0.0) >= limit for seed in range(RUNS)) <= MOST
    for shift in (1.0, -1.0):
        assert sum(run(seed, shift) >= limit for seed in range(RUNS)) > 0.95 * RUNS


def rows_of(rng: np.random.Generator, rows: int, name: str, noise: float, share: float) -> Dataset:
    gold = rng.choice(3, rows, p=[share, (1 - share) / 2, (1 - share) / 2])
    logits = rng.normal(0, noise, (rows, 3))
    logits[np.arange(rows), gold] += 2.0
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)]})
    table = with_columns(table, {"gold": ([[int(g)] for g in gold], List(Value("int32")))})
    return SoftLabels.from_dense(probs, LABELS).add_to(table)


def two(
    seed: int, rows: tuple[int, int], *, noise: float = 1.0, share: float = 1 / 3
) -> tuple[Dataset, Dataset]:
    rng = np.random.default_rng(seed)
    known = rows_of(rng, rows[0], "c", 1.0, 1 / 3)
    return known, rows_of(rng, rows[1], "n", noise, share)


def test_four_tests_together_keep_the_level_and_have_power() -> None:
    def shifted(seed: int, **shift: float) -> bool:
        known, new = two(seed, (120, 100), **shift)
        return check_exchangeability(
            known, new, LABELS, permutations=199, level=LEVEL, seed=seed
        ).shifted

    assert sum(shifted(seed) for seed in range(RUNS)) <= MOST
    for shift in ({"noise": 2.5}, {"share": 0.7}):
        assert sum(shifted(seed, **shift) for seed in range(40)) > 32


def test_the_monitor_keeps_the_level_and_has_power() -> None:
    def drifted(seed: int, **shift: float) -> bool:
        known, new = two(seed, (150, 250), **shift)
        conformal = fit_conformal(known, LABELS, alpha=0.1)
        known, new = (predict_sets(rows, LABELS, conformal) for rows in (known, new))
        found = monitor_drift(new, LABELS, calibration=known, window=50, level=LEVEL, seed=seed)
        return found.drifted

    assert sum(drifted(seed) for seed in range(RUNS)) <= MOST
    for shift in ({"noise": 2.5}, {"share": 0.7}):
        assert sum(drifted(seed, **shift) for seed in range(40)) > 32


def test_groups_are_named_below_as_rarely_as_said() -> None:
    names = [str(i) for i in range(20)]

    def named(seed: int, planted: float) -> list[bool]:
        rng = np.random.default_rng(seed)
        group = rng.integers(0, 20, 2000)
        inside = rng.random(2000) < np.where(group == 7, planted, 0.9)
        cells = coverage_cells(
            names, group, inside, np.ones(2000, dtype=np.int64), target=0.9, level=LEVEL
        )
        return [cell.below for cell in cells]

    assert sum(any(named(seed, 0.9)) for seed in range(RUNS)) <= MOST
    assert sum(named(seed, 0.7)[7] for seed in range(RUNS)) > 0.9 * RUNS


def test_slices_are_named_below_as_rarely_as_said() -> None:
    """Words and coverage are independent, and the worst slice of the chosen half is always bad."""

    def sliced(seed: int, planted: float) -> tuple[bool, bool]:
        rng = np.random.default_rng(seed)
        words = rng.random((400, 15)) < 0.3
        inside = rng.random(400) < np.where(words[:, 3], planted, 0.9)
        texts = [" ".join(f"w{w}" for w in np.flatnonzero(row)) for row in words]
        table = Dataset.from_dict({"id": [f"{seed}/{i}" for i in range(400)], "text": texts})
        columns = {
            "gold": ([[0]] * 400, List(Value("int32"))),
            "set_ids": ([[0] if hit else [] for hit in inside], List(Value("int32"))),
        }
        found = worst_slices(with_columns(table, columns), LABELS, level=LEVEL, seed=seed)
        in_choosing = any(binom.cdf(s.found.covered, s.found.rows, 0.9) <= LEVEL for s in found)
        return any(s.measured.below for s in found), in_choosing

    still = [sliced(seed, 0.9) for seed in range(RUNS)]
    assert sum(measured for measured, _ in still) <= MOST
    assert sum(chosen for _, chosen in still) > 1.5 * MOST  # what half a search would have said
    assert sum(sliced(seed, 0.6)[0] for seed in range(40)) > 32
