"""Regions of label sets: coverage over many seeded splits, and where it must fail."""

import math
from functools import cache

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse import csr_array

from llmlabel.calibrate.powerset import Powerset, fit_powerset, regions, set_scores
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

SPLITS, CALIBRATION, TEST, LABELS = 200, 150, 400, 12


def draw(rng: np.random.Generator, rows: int, *, sure: float) -> tuple[np.ndarray, np.ndarray]:
    """What a model that is too sure of itself sees, and label sets from the true probabilities."""
    logits = rng.normal(-2, sure, (rows, LABELS))
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    seen = 1 / (1 + np.exp(-2 * logits - rng.normal(0, 1, logits.shape)))
    return seen.astype(np.float32), truth


@cache
def scored(*, easy: float, hard: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of calibration rows and of new ones, of each split."""
    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        parts = draw(rng, CALIBRATION, sure=easy), draw(rng, TEST, sure=hard)
        one, other = (set_scores(csr_array(seen), truth) for seen, truth in parts)
        found.append((one, other))
    return found


def coverages(alpha: float, *, easy: float, hard: float) -> np.ndarray:
    found = []
    for scores, new in scored(easy=easy, hard=hard):
        fitted = Powerset(alpha, 2.0, tuple(np.sort(scores).tolist()), "")
        found.append((new <= fitted.threshold).mean())
    return np.array(found)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_coverage_is_beta_binomial(alpha: float) -> None:
    """Given the split it is Beta(k, n + 1 - k), Vovk 2012 (arXiv 1209.2673)."""
    found = coverages(alpha, easy=2.0, hard=2.0)
    k = math.ceil((CALIBRATION + 1) * (1 - alpha))
    a, b = k, CALIBRATION + 1 - k
    mean = a / (a + b)
    # Of the share of TEST draws at a rate that is itself Beta(a, b).
    variance = mean * (1 - mean) * (a + b + TEST) / ((a + b + 1) * TEST)
    assert abs(found.mean() - mean) < 4 * math.sqrt(variance / SPLITS)
    assert abs(found.var(ddof=1) / variance - 1) < 4 * math.sqrt(2 / (SPLITS - 1))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_coverage_falls_when_new_rows_are_harder(alpha: float) -> None:
    """Gold rows that are not like the new ones promise nothing."""
    assert coverages(alpha, easy=4.0, hard=1.0).mean() < 1 - alpha - 0.05


def test_the_region_holds_a_label_set_exactly_when_its_score_is_within() -> None:
    """So the coverage above is that of the regions themselves."""
    rng = np.random.default_rng(0)
    names = tuple(f"label {k}" for k in range(LABELS))
    space = LabelSpace(names, names, ("",) * LABELS, ((),) * LABELS, multilabel=True)
    probs, truth = draw(rng, 550, sure=2.0)
    rows = {
        "id": [str(i) for i in range(550)],
        "gold": [np.flatnonzero(row).tolist() for row in truth],
    }
    data = SoftLabels.from_dense(probs, space).add_to(Dataset.from_dict(rows))
    fitted = fit_powerset(data.select(range(150)), space)
    scores = set_scores(csr_array(probs[150:]), truth[150:])
    inside = [
        tuple(gold) in region
        for gold, region in zip(
            rows["gold"][150:], regions(data.select(range(150, 550)), space, fitted), strict=True
        )
    ]
    assert inside == (scores <= fitted.threshold).tolist()
    assert 0.82 < np.mean(inside) < 0.97
