"""The theorem itself: coverage over many seeded splits, and where it must fail."""

import math
from functools import lru_cache

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.quantile import conformal_p_values, conformal_quantile
from llmlabel.calibrate.scores import Nonconformity, sets_of, stored_scores, true_scores
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

SPLITS, CALIBRATION, TEST, LABELS, ALPHA = 200, 150, 400, 8, 0.1
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS)
HOW = [
    Nonconformity("lac"),
    Nonconformity("lac", prior=(0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)),
    Nonconformity("aps"),
    Nonconformity("aps", randomised=False),
    Nonconformity("raps", penalty=0.05, free_labels=2),
    Nonconformity("saps", penalty=0.1),
    Nonconformity("margin"),
]
EACH = pytest.mark.parametrize(
    "how", HOW, ids=lambda how: f"{how.score}-{how.randomised}-{how.prior is not None}"
)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def arrays(rng: np.random.Generator, rows: int, *, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Gold from softmax(z); the model is three times too sure and sees z through noise."""
    logits = rng.normal(0, margin, (rows, LABELS))
    gold = (softmax(logits).cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    probs = softmax(3 * logits + rng.normal(0, 1, logits.shape)).astype(np.float32)
    return probs, np.minimum(gold, LABELS - 1)


@lru_cache
def drawn() -> list[tuple[np.ndarray, ...]]:
    """Of each split: probabilities, gold, uniforms; labels of new rows, some by somebody else."""
    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        probs, gold = arrays(rng, CALIBRATION + TEST, margin=2.0)
        uniforms = rng.random(len(gold))
        changed = rng.random(TEST) < 0.2
        other = np.where(changed, rng.integers(0, LABELS, TEST), gold[CALIBRATION:])
        found.append((probs, gold, uniforms, other))
    return found


@lru_cache
def coverages(how: Nonconformity) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the new rows of each split by their labels, and by those of somebody else."""
    found = []
    cal, new, rows = slice(CALIBRATION), slice(CALIBRATION, None), np.arange(TEST)
    for probs, gold, uniforms, other in drawn():
        limit = conformal_quantile(true_scores(probs[cal], gold[cal], how, uniforms[cal]), ALPHA)
        sets = sets_of(probs[new], limit, how, uniforms[new]).toarray()
        found.append((sets[rows, gold[new]].mean(), sets[rows, other].mean()))
    own, others = np.array(found).T
    return own, others


def check_beta_binomial(found: np.ndarray) -> None:
    """Given the split it is Beta(k, n + 1 - k), Vovk 2012 (arXiv 1209.2673)."""
    k = math.ceil((CALIBRATION + 1) * (1 - ALPHA))
    a, b = k, CALIBRATION + 1 - k
    mean = a / (a + b)
    # Of the share of TEST draws at a rate that is itself Beta(a, b).
    variance = mean * (1 - mean) * (a + b + TEST) / ((a + b + 1) * TEST)
    assert abs(found.mean() - mean) < 4 * math.sqrt(variance / len(found))
    # The sample variance of 200 draws is within 4 sqrt(2 / 199) of the true one.
    assert abs(found.var(ddof=1) / variance - 1) < 4 * math.sqrt(2 / (len(found) - 1))


@EACH
def test_coverage_is_beta_binomial(how: Nonconformity) -> None:
    check_beta_binomial(coverages(how)[0])


@EACH
def test_coverage_falls_when_new_rows_are_labelled_otherwise(how: Nonconformity) -> None:
    """Gold rows that are not like the new ones promise nothing, and the band says so."""
    found = coverages(how)[1][:50]
    assert found.mean() < 0.86
    with pytest.raises(AssertionError):
        check_beta_binomial(found)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_tables_cover_like_arrays(score: str) -> None:
    found = []
    for split in range(60):
        rng = np.random.default_rng(split)
        probs, gold = arrays(rng, CALIBRATION + TEST, margin=2.0)
        ids = [f"{split}/{i}" for i in range(len(gold))]
        rows = Dataset.from_dict({"id": ids, "gold": gold[:, None].tolist()})
        rows = SoftLabels.from_dense(probs, SPACE).add_to(rows)
        cal, new = rows.select(range(CALIBRATION)), rows.select(range(CALIBRATION, len(rows)))
        sets = predict_sets(new, SPACE, fit_conformal(cal, SPACE, alpha=ALPHA, score=score))
        hits = [g[0] in ids for g, ids in zip(sets["gold"], sets["set_ids"], strict=True)]
        found.append(sum(hits) / TEST)
    check_beta_binomial(np.array(found))


@pytest.mark.parametrize("harder", [False, True])
def test_smoothed_p_values_of_votes_are_uniform(*, harder: bool) -> None:
    """Five votes a row, so that nearly all scores tie; the p-values of true labels do not."""
    from scipy.stats import kstest

    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        gold = rng.integers(0, 4, CALIBRATION + 1)
        right = np.full((CALIBRATION + 1, 1), 0.6)
        right[-1] = 0.3 if harder else 0.6
        cast = rng.random((CALIBRATION + 1, 5)) < right
        cast = np.where(cast, gold[:, None], rng.integers(0, 4, cast.shape))
        probs = (cast[:, :, None] == np.arange(4)).mean(axis=1)
        scores = np.where(probs > 0, 1 - probs, np.inf)[np.arange(len(gold)), gold]
        uniform = rng.random(1)
        found.append(conformal_p_values(scores[-1:], np.sort(scores[:-1]), uniform)[0])
    assert (kstest(found, "uniform").pvalue > 1e-4) != harder


def test_a_tuned_penalty_keeps_the_promise_because_its_rows_are_left_out() -> None:
    found = []
    for split in range(60):
        rng = np.random.default_rng(split)
        probs, gold = arrays(rng, 2 * CALIBRATION, margin=2.0)
        ids = [f"{split}/{i}" for i in range(len(gold))]
        rows = Dataset.from_dict({"id": ids, "gold": gold[:, None].tolist()})
        rows = SoftLabels.from_dense(probs, SPACE).add_to(rows)
        fitted = fit_conformal(rows.select(range(CALIBRATION)), SPACE, alpha=ALPHA, score="raps")
        sets = predict_sets(rows.select(range(CALIBRATION, len(rows))), SPACE, fitted)
        hits = [g[0] in ids for g, ids in zip(sets["gold"], sets["set_ids"], strict=True)]
        found.append(sum(hits) / CALIBRATION)
    n = fitted.rows
    assert n == CALIBRATION - 30
    k = math.ceil((n + 1) * (1 - ALPHA))
    mean = k / (n + 1)
    variance = mean * (1 - mean) * (n + 1 + CALIBRATION) / ((n + 2) * CALIBRATION)
    assert abs(np.mean(found) - mean) < 4 * math.sqrt(variance / 60)


def test_labels_that_are_not_stored_cost_sets_but_no_coverage() -> None:
    """Of each soft label only the five most probable labels are kept: a shortlist."""
    how, found, dropped = Nonconformity("lac"), [], []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        probs, gold = arrays(rng, CALIBRATION + TEST, margin=2.0)
        probs[probs < np.partition(probs, -5, axis=1)[:, -5:-4]] = 0
        uniforms = np.zeros(len(gold))
        scores = true_scores(probs, gold, how, uniforms)
        sets = sets_of(
            probs[CALIBRATION:],
            conformal_quantile(scores[:CALIBRATION], ALPHA),
            how,
            uniforms[:TEST],
        ).toarray()
        found.append(sets[np.arange(TEST), gold[CALIBRATION:]].mean())
        kept = scores[:CALIBRATION]
        limit = conformal_quantile(kept[np.isfinite(kept)], ALPHA)  # as if they were not there
        wrong = sets_of(probs[CALIBRATION:], limit, how, uniforms[:TEST]).toarray()
        dropped.append(wrong[np.arange(TEST), gold[CALIBRATION:]].mean())
    check_beta_binomial(np.array(found))
    with pytest.raises(AssertionError):
        check_beta_binomial(np.array(dropped))


def test_a_set_is_the_labels_with_p_values_above_alpha() -> None:
    from scipy.sparse import csr_array

    rng = np.random.default_rng(0)
    probs, gold = arrays(rng, 3000, margin=2.0)
    uniforms = rng.random(3000)
    for how in HOW:
        calibration = np.sort(true_scores(probs[:1000], gold[:1000], how, uniforms[:1000]))
        new = csr_array(probs[1000:])
        values = conformal_p_values(stored_scores(new, how, uniforms[1000:]), calibration)
        for alpha in (0.01, 0.05, 0.1, 0.2, 0.37):
            limit = conformal_quantile(calibration, alpha)
            sets = sets_of(new, limit, how, uniforms[1000:])
            assert sets.nnz == (values > alpha).sum()
