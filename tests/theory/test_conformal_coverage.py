"""The theorem itself: coverage over many seeded splits, and where it must fail."""

import math

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

SPLITS, CALIBRATION, TEST, LABELS, ALPHA = 200, 150, 400, 8, 0.1
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw(rng: np.random.Generator, rows: int, *, margin: float, name: str) -> Dataset:
    """Gold from softmax(z); the model is three times too sure and sees z through noise."""
    logits = rng.normal(0, margin, (rows, LABELS))
    gold = [[int(rng.choice(LABELS, p=p))] for p in softmax(logits)]
    probs = softmax(3 * logits + rng.normal(0, 1, logits.shape))
    ids = [f"{name}/{i}" for i in range(rows)]
    return SoftLabels.from_dense(probs, SPACE).add_to(Dataset.from_dict({"id": ids, "gold": gold}))


def coverages(score: str, *, easy: float, hard: float) -> np.ndarray:
    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        cal = draw(rng, CALIBRATION, margin=easy, name=f"{split}/cal")
        new = draw(rng, TEST, margin=hard, name=f"{split}/new")
        sets = predict_sets(new, SPACE, fit_conformal(cal, SPACE, alpha=ALPHA, score=score))
        hits = [g[0] in ids for g, ids in zip(sets["gold"], sets["set_ids"], strict=True)]
        found.append(sum(hits) / TEST)
    return np.array(found)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_coverage_is_beta_binomial(score: str) -> None:
    """Given the split it is Beta(k, n + 1 - k), Vovk 2012 (arXiv 1209.2673)."""
    found = coverages(score, easy=2.0, hard=2.0)
    k = math.ceil((CALIBRATION + 1) * (1 - ALPHA))
    a, b = k, CALIBRATION + 1 - k
    mean = a / (a + b)
    # Of the share of TEST draws at a rate that is itself Beta(a, b).
    variance = mean * (1 - mean) * (a + b + TEST) / ((a + b + 1) * TEST)
    assert abs(found.mean() - mean) < 4 * math.sqrt(variance / SPLITS)
    # The sample variance of 200 draws is within 4 sqrt(2 / 199) of the true one.
    assert abs(found.var(ddof=1) / variance - 1) < 4 * math.sqrt(2 / (SPLITS - 1))


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_coverage_falls_when_new_rows_are_harder(score: str) -> None:
    """Gold rows that are not like the new ones promise nothing."""
    assert coverages(score, easy=4.0, hard=1.0).mean() < 0.86
