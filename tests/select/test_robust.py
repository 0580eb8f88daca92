import numpy as np
import pytest
from datasets import Dataset
from reference import select as reference

from llmlabel.labelspace import load_labels
from llmlabel.select.robust import draw, inclusion, rad_probabilities, select_rad
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b"])


def by_linear_program(gains, mistakes, penalise):
    """max sum_i x_i - factor (r t + sum_i u_i), u_i >= x_i - t: the r largest parts are lost."""
    from scipy.optimize import linprog

    n, factor = len(gains), 2 if penalise else 1
    cost = np.concatenate([-gains, factor * np.ones(n), [factor * mistakes]])
    bound = np.hstack([np.diag(gains), -np.eye(n), -np.ones((n, 1))])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    limits = [(0, None)] * (2 * n) + [(None, None)]
    found = linprog(
        cost, A_ub=bound, b_ub=np.zeros(n), A_eq=total, b_eq=[1], bounds=limits, method="highs-ds"
    )
    return -found.fun


def test_golden_numbers() -> None:
    found = rad_probabilities(np.array([0.9, 0.8, 0.5, 0.2, 0.1]), n_mistakes=1)
    assert found == pytest.approx([0.2548, 0.2866, 0.4586, 0, 0], abs=5e-5)
    value = reference.rad_value(found.tolist(), [0.9, 0.8, 0.5, 0.2, 0.1], 1, penalise=False)
    assert value == pytest.approx(0.4586, abs=5e-5)


@pytest.mark.parametrize("penalise", [False, True])
def test_the_closed_form_is_the_optimum_of_the_linear_program(penalise: bool) -> None:
    rng = np.random.default_rng(1 + penalise)
    for _ in range(150):
        n = int(rng.integers(3, 12))
        mistakes = int(rng.integers(0, (n - 1) // 2 + 1 if penalise else n))
        gains = rng.uniform(0.01, 1, size=n)
        found = rad_probabilities(gains, n_mistakes=mistakes, penalise=penalise)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        value = reference.rad_value(found.tolist(), gains.tolist(), mistakes, penalise)
        assert value == pytest.approx(by_linear_program(gains, mistakes, penalise), abs=1e-12)


def test_more_mistakes_spread_the_mass_further() -> None:
    gains = np.random.default_rng(0).uniform(0.1, 1, size=20)
    support = [int((rad_probabilities(gains, n_mistakes=r) > 0).sum()) for r in range(25)]
    assert support[0] == 1
    assert rad_probabilities(gains, n_mistakes=0)[gains.argmax()] == 1
    assert support == sorted(support)
    assert support[19:] == [20] * 6


def test_gains_of_zero_are_the_last_and_bad_ones_are_refused() -> None:
    found = rad_probabilities(np.array([0.5, 0.0, 0.5]), n_mistakes=1)
    assert found == pytest.approx([0.5, 0, 0.5])
    assert rad_probabilities(np.zeros(4), n_mistakes=3) == pytest.approx([0.25] * 4)
    for bad in ([0.5, np.nan], [0.5, -0.1], []):
        with pytest.raises(ValueError, match="gains must be finite"):
            rad_probabilities(np.array(bad, dtype=float), n_mistakes=1)
    with pytest.raises(ValueError, match="n_mistakes must be at least 0"):
        rad_probabilities(np.ones(2), n_mistakes=-1)


@pytest.mark.parametrize("seed", range(20))
def test_inclusion_is_the_budget_in_proportion_capped_at_1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(9, 0.3))
    budget = int(rng.integers(1, 9))
    found = inclusion(probs, probs, budget=budget)
    assert found == pytest.approx(reference.inclusion(probs.tolist(), budget), abs=1e-9)
    assert found.sum() == pytest.approx(budget)


def test_a_budget_above_the_support_is_filled_by_the_highest_gains() -> None:
    probs, gains = np.array([0.6, 0.4, 0, 0, 0]), np.array([0.9, 0.8, 0.1, 0.3, 0.2])
    assert inclusion(probs, gains, budget=4).tolist() == [1, 1, 0, 1, 1]


def test_rows_are_drawn_as_often_as_they_should() -> None:
    rng = np.random.default_rng(0)
    share = np.array([1.0, 0.75, 0.75, 0.3, 0.15, 0.05, 0.0])
    draws = np.array([draw(share, rng=rng) for _ in range(4000)])
    assert set(draws.sum(axis=1)) == {3}
    error = np.sqrt(np.maximum(share * (1 - share), 1e-12) / 4000)
    assert (np.abs(draws.mean(axis=0) - share) <= 4 * error + 1e-12).all()


def pool(n=40):
    first = np.random.default_rng(5).uniform(0.5, 1, size=n)
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(n)]})
    return SoftLabels.from_dense(np.stack([first, 1 - first], axis=1), LABELS).add_to(rows)


def test_selected_rows_have_a_score_and_a_reason_and_any_order_gives_the_same() -> None:
    rows = pool()
    found = select_rad(rows, LABELS, budget=10, teacher_error=0.1, seed=3)
    taken = np.array(found["selected"][:])
    assert taken.sum() == 10
    assert sum(found["select_score"]) == pytest.approx(10, abs=1e-5)
    assert all(
        (reason is not None) == pick
        for reason, pick in zip(found["select_reason"], taken, strict=True)
    )
    assert "drawn with probability" in found["select_reason"][int(taken.argmax())]
    back = select_rad(rows.select(range(39, -1, -1)), LABELS, budget=10, teacher_error=0.1, seed=3)
    assert back["selected"][::-1] == found["selected"][:]
    other = select_rad(rows, LABELS, budget=10, teacher_error=0.1, seed=4)
    assert other["selected"][:] != found["selected"][:]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="budget must be from 1 to 40"):
        select_rad(pool(), LABELS, budget=41, teacher_error=0.1)
    with pytest.raises(ValueError, match="teacher_error must be"):
        select_rad(pool(), LABELS, budget=4, teacher_error=1.0)
