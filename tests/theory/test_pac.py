"""PAC thresholds fail as often as they say, over 1,000 calibration sets; and where they must fail more."""

import math

import numpy as np
import pytest
from scipy.special import bdtr

from llmlabel.calibrate.cuts import BUDGETS, Tree, kept_nodes
from llmlabel.calibrate.pac import allowed_errors, fit_pac_tree, pac_threshold

pytestmark = pytest.mark.slow

RESAMPLES, ROWS = 1000, 120


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.05), (0.2, 0.1), (0.05, 0.2)])
def test_a_threshold_fails_exactly_as_often_as_the_binomial_tail(
    epsilon: float, delta: float
) -> None:
    """Of uniform scores the error above a threshold t is 1 - t."""
    rng = np.random.default_rng(0)
    errors = np.array(
        [
            1 - pac_threshold(rng.random(ROWS), epsilon=epsilon, delta=delta)
            for _ in range(RESAMPLES)
        ]
    )
    expected = bdtr(float(allowed_errors(ROWS, epsilon=epsilon, delta=delta)), ROWS, epsilon)
    assert expected <= delta
    noise = 4 * math.sqrt(expected * (1 - expected) / RESAMPLES)
    assert abs((errors > epsilon).mean() - expected) < noise
    # New rows that are harder: their scores are the square roots of uniform numbers.
    harder = 1 - (1 - errors) ** 2
    assert (harder > epsilon).mean() > delta + 4 * math.sqrt(delta * (1 - delta) / RESAMPLES)


def population(seed: int, *, honest: bool) -> tuple[list[Tree], list[set[str]]]:
    """Trees whose nodes are right as often as their costs say, or half as often."""
    rng = np.random.default_rng(seed)
    trees, gold = [], []
    for _ in range(300):
        parents, line = [-1], [0]
        for node in range(1, int(rng.integers(2, 9))):
            line = line[: int(rng.integers(1, len(line) + 1))]
            parents.append(line[-1])
            line.append(node)
        costs = rng.exponential(0.25, len(parents)) * rng.integers(0, 2, len(parents))
        contents = tuple(map(str, range(len(parents))))
        right = rng.random(len(parents)) < np.exp(-costs if honest else -costs - 0.7)
        trees.append(Tree(np.array(parents), costs, contents))
        gold.append({content for content, true in zip(contents, right, strict=True) if true})
    return trees, gold


def right_budgets(trees: list[Tree], gold: list[set[str]]) -> np.ndarray:
    """How many budgets of each tree keep nothing wrong."""
    found = []
    for tree, true in zip(trees, gold, strict=True):
        wrong = np.array([content not in true for content in tree.contents])
        found.append(int((~(kept_nodes(tree, holes=2) & wrong).any(axis=1)).sum()))
    return np.array(found)


def test_trees_fail_at_most_as_often_as_delta() -> None:
    """The population is the distribution: errors of a budget are counted, not estimated."""
    epsilon, delta = 0.2, 0.1
    trees, gold = population(0, honest=True)
    right = right_budgets(trees, gold)
    other = right_budgets(*population(1, honest=False))
    assert len(set(right.tolist())) > 8  # the budgets differ

    rng = np.random.default_rng(2)
    fails, fails_elsewhere, levels = [], [], []
    for _ in range(RESAMPLES):
        drawn = right[rng.integers(0, len(right), ROWS)]
        level = -int(pac_threshold(-drawn.astype(float), epsilon=epsilon, delta=delta)) - 1
        levels.append(level)
        fails.append((right <= level).mean() > epsilon)
        fails_elsewhere.append((other <= level).mean() > epsilon)
    noise = 4 * math.sqrt(delta * (1 - delta) / RESAMPLES)
    assert np.mean(fails) < delta + noise
    assert 0 <= np.mean(levels) < len(BUDGETS) - 1  # neither nothing nor everything is kept
    assert np.mean(fails_elsewhere) > delta + noise  # trees of another distribution

    picked = rng.integers(0, len(trees), ROWS)
    fitted = fit_pac_tree(
        [trees[i] for i in picked], [gold[i] for i in picked], epsilon=0.2, delta=0.1, holes=2
    )
    expected = pac_threshold(-right[picked].astype(float), epsilon=epsilon, delta=delta)
    assert fitted.level == -int(expected) - 1
