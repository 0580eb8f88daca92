"""Thresholds from noisy labels cover true labels over many seeded splits; and where they must not."""

import math

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse import csr_array

from llmlabel.calibrate.channels import coverage_curve, estimate_noise
from llmlabel.calibrate.noise import fit_noisy_conformal
from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.scores import Nonconformity, true_scores
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

SPLITS, ROWS, TEST, LABELS, ALPHA, WRONG = 200, 1000, 1000, 6, 0.1, 0.2
GOLD, DELTA = 300, 0.1
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS)

UNIFORM = np.full((LABELS, LABELS), WRONG / (LABELS - 1))
np.fill_diagonal(UNIFORM, 1 - WRONG)

NEXT = (1 - WRONG) * np.eye(LABELS) + WRONG * np.roll(np.eye(LABELS), 1, axis=1)
"""A wrong label is always the next one."""


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (shares.cumsum(axis=1) < rng.random((len(shares), 1)) * shares.sum(axis=1)[:, None]).sum(
        axis=1
    )


def drawn(
    seed: int, channel: np.ndarray, *, second: bool = False, harder: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities and gold of all rows, and pseudo-labels of the first.

    `second`: the wrong labels are those that the model likes, too. `harder`: new rows are.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (ROWS + TEST, LABELS))
    gold = draw(softmax(logits), rng)
    spread = np.where(np.arange(ROWS + TEST) < ROWS, 1.0, 1.0 + harder)[:, None]
    probs = softmax(1.5 * logits + spread * rng.normal(0, 1, logits.shape)).astype(np.float32)
    given = draw(channel[gold[:ROWS]], rng)
    if second:
        best = np.argsort(-probs[:ROWS], axis=1)
        other = np.where(best[:, 0] == gold[:ROWS], best[:, 1], best[:, 0])
        given = np.where(rng.random(ROWS) < WRONG, other, gold[:ROWS])
    return probs, gold, given


def run(
    noise: float | str | tuple[tuple[float, ...], ...],
    *,
    channel: np.ndarray = UNIFORM,
    score: str = "lac",
    splits: int = SPLITS,
    **settings: float,
) -> dict[str, np.ndarray]:
    """Coverage of new rows with the corrected and the plain threshold, and what was said of it."""
    how, found = Nonconformity(score), []
    for split in range(splits):
        probs, gold, given = drawn(split, channel, **settings)
        uniforms = np.random.default_rng([split, 1]).random(ROWS + TEST)
        rows, new = slice(ROWS), slice(ROWS, None)
        known = noise
        if isinstance(noise, str):
            known = estimate_noise(given[:GOLD], gold[:GOLD], SPACE, noise)
        elif isinstance(noise, tuple):
            known = np.array(noise)
        curve = coverage_curve(csr_array(probs[rows]), given, known, how, uniforms[rows], DELTA)
        limit = curve.first(math.ceil((ROWS + 1) * (1 - ALPHA)) / ROWS)
        certain = curve.first(1 - ALPHA + curve.slack)
        plain = conformal_quantile(true_scores(probs[rows], given, how, uniforms[rows]), ALPHA)
        scores = true_scores(probs[new], gold[new], how, uniforms[new])
        found.append(
            {
                "corrected": (scores <= limit).mean(),
                "plain": (scores <= plain).mean(),
                "estimate": curve.at(plain),
                "floor": curve.at(limit) - curve.slack,
                "certain": 1.0 if certain is None else (scores <= certain).mean(),
            }
        )
    return {name: np.array([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("noise", [WRONG, "uniform"])
def test_a_fifth_of_wrong_labels_is_corrected_back(noise: float | str, score: str) -> None:
    found = run(noise, score=score)
    assert abs(found["corrected"].mean() - 0.9) < 0.01
    assert found["plain"].mean() > 0.95  # true labels are more probable than those that noise drew
    assert abs(found["estimate"].mean() - found["plain"].mean()) < 0.01  # which is said


@pytest.mark.parametrize("noise", [tuple(map(tuple, NEXT.tolist())), "matrix"])
def test_wrong_labels_of_one_kind_are_corrected_by_their_matrix(noise: object) -> None:
    found = run(noise, channel=NEXT)
    assert abs(found["corrected"].mean() - 0.9) < 0.01
    assert found["plain"].mean() > 0.95


@pytest.mark.parametrize("noise", [WRONG, tuple(map(tuple, UNIFORM.tolist()))])
def test_the_slack_is_exceeded_no_more_often_than_it_says(noise: object) -> None:
    found = run(noise)
    deviation = math.sqrt(ALPHA * (1 - ALPHA) / TEST)  # of TEST rows from their coverage
    allowed = DELTA + 4 * math.sqrt(DELTA * (1 - DELTA) / SPLITS)
    assert (found["corrected"] + deviation < found["floor"]).mean() <= allowed
    assert (found["certain"] < 1 - ALPHA - deviation).mean() <= allowed
    assert (found["corrected"] < 1 - ALPHA).mean() > allowed  # the estimate alone promises no such
    assert found["floor"].mean() > 0.7


def test_a_wrong_rate_corrects_wrongly() -> None:
    assert run(0.05, splits=60)["corrected"].mean() > 0.915
    assert run(0.3, splits=60)["corrected"].mean() < 0.885


def test_noise_that_depends_on_the_row_is_not_undone() -> None:
    """Wrong labels that the model likes, too: the pseudo-labels are no independent witness."""
    found = run("uniform", second=True)
    assert abs(found["corrected"].mean() - 0.9) > 0.015
    assert abs(found["estimate"].mean() - found["plain"].mean()) > 0.01
    assert found["plain"].mean() > 1 - ALPHA - WRONG  # which holds whatever the noise


def test_coverage_falls_when_new_rows_are_harder() -> None:
    assert run(WRONG, harder=1.5, splits=60)["corrected"].mean() < 0.86


@pytest.mark.parametrize("second", [False, True])
def test_tables_and_the_bound_of_gold_rows(*, second: bool) -> None:
    """Which supposes nothing about the noise, so it holds for noise of any kind."""
    below, corrected = 0, []
    for split in range(60):
        probs, gold, given = drawn(split, UNIFORM, second=second)
        columns = {
            "id": [f"{split}/{i}" for i in range(ROWS)],
            "gold": [[int(g)] if i < GOLD else None for i, g in enumerate(gold[:ROWS])],
            "crowd": given[:, None].tolist(),
        }
        rows = SoftLabels.from_dense(probs[:ROWS], SPACE).add_to(Dataset.from_dict(columns))
        fitted = fit_noisy_conformal(rows, SPACE, column="crowd", noise="uniform", delta=DELTA)
        scores = true_scores(probs[ROWS:], gold[ROWS:], Nonconformity(), np.zeros(TEST))
        corrected.append((scores <= fitted.threshold).mean())
        below += corrected[-1] < fitted.guaranteed
        assert fitted.guaranteed > 0.6
    assert below <= 60 * DELTA
    assert (abs(np.mean(corrected) - 0.9) < 0.01) != second
