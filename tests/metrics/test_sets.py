import numpy as np
import pytest
from metrics.cases import SEEDS, random_sets
from reference import metrics as reference
from scipy.sparse import csr_array

from llmlabel import metrics


def forms(sets: np.ndarray) -> list[np.ndarray | csr_array]:
    """Dense, sparse, and sparse with what is no member stored as such."""
    rows, labels = sets.shape
    full = np.tile(np.arange(labels), rows), np.arange(rows + 1) * labels
    return [sets, csr_array(sets), csr_array((sets.ravel(), *full), shape=sets.shape)]


@SEEDS
def test_scores_of_sets_equal_the_twins(seed: int) -> None:
    sets, _ = random_sets(seed)
    rng = np.random.default_rng(seed)
    gold = rng.integers(-1, sets.shape[1], len(sets))
    twin = sets.tolist(), gold.tolist()
    expected = [
        reference.coverage(*twin),
        reference.set_size(twin[0]),
        reference.macro_coverage(*twin),
        reference.under_coverage_gap(*twin, 0.6),
        reference.share_below(*twin, 0.4),
        reference.size_stratified_violation(*twin, 0.6, [(0, 0), (1, 2), (3, 99)]),
    ]
    for form in forms(sets):
        found = [
            metrics.coverage(form, gold),
            metrics.set_size(form),
            metrics.macro_coverage(form, gold),
            metrics.under_coverage_gap(form, gold, target=0.6),
            metrics.share_below(form, gold, least=0.4),
            metrics.size_stratified_violation(form, gold, target=0.6, edges=(1, 3)),
        ]
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert metrics.set_sizes(form).tolist() == [sum(row) for row in twin[0]]
        held = [g >= 0 and row[g] for row, g in zip(*twin, strict=True)]
        assert metrics.covered(form, gold).tolist() == held


def test_one_label_that_is_never_covered_hides_in_the_mean() -> None:
    gold = np.array([0] * 9 + [1, -1])
    sets = np.zeros((11, 3), dtype=bool)
    sets[:10, 0] = True
    assert metrics.coverage(sets, gold) == pytest.approx(9 / 11)  # none of the labels: a miss
    assert metrics.macro_coverage(sets, gold) == 0.5  # label 2 has no row
    assert metrics.under_coverage_gap(sets, gold, target=0.9) == pytest.approx(0.45)
    assert metrics.share_below(sets, gold) == 0.5
    share, rows = metrics.coverage_by(gold, metrics.covered(sets, gold), count=3)
    assert share[:2].tolist() == [1.0, 0.0]
    assert np.isnan(share[2])
    assert rows.tolist() == [9, 1, 0]
    assert metrics.size_stratified_violation(sets, gold, target=0.9) == pytest.approx(0.9 - 9 / 11)
    assert np.isnan(metrics.macro_coverage(sets, np.full(11, -1)))


def test_coverage_of_the_rarest_tenth_is_told_apart() -> None:
    frequency = np.repeat(np.arange(1, 11) * 10, 5)
    covered = frequency > 20
    share, rows = metrics.coverage_by(metrics.quantile_bins(frequency), covered, count=10)
    assert share.tolist() == [0.0, 0.0, *[1.0] * 8]
    assert rows.tolist() == [5] * 10


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
