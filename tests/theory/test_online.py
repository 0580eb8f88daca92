"""Sets of a stream that drifts, and sets from all gold rows of models that were trained on them."""

import math

import numpy as np
import pytest

from llmlabel.calibrate.cross import CrossConformal, cross_counts, cross_e_values, ranged_scores
from llmlabel.calibrate.online import online_bound, online_levels
from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.scores import Nonconformity

pytestmark = pytest.mark.slow

SPLITS, ALPHA = 200, 0.1
LAC = Nonconformity()

# -------------------------------------------------------------------------------------- a stream

STREAM, START, GAMMA = 500, 100, 0.05


def streams(drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of misses of each split's adaptive sets, and of those of the first rows' threshold."""
    adaptive, fixed = [], []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        start = rng.random(START)
        scores = rng.random(STREAM) + drift * np.linspace(0, 1, STREAM)
        _, limits = online_levels(scores, start, alpha=ALPHA, gamma=GAMMA, level=ALPHA)
        adaptive.append((scores > limits).mean())
        fixed.append((scores > conformal_quantile(start, ALPHA)).mean())
    return np.array(adaptive), np.array(fixed)


@pytest.mark.parametrize("drift", [0.0, 1.0, -0.8])
def test_a_share_alpha_is_missed_however_the_stream_drifts(drift: float) -> None:
    adaptive, fixed = streams(drift)
    # Not on average only: in each of the 200 streams.
    assert np.abs(adaptive - ALPHA).max() <= online_bound(ALPHA, gamma=GAMMA, answers=STREAM)
    if drift:  # where a threshold of the first rows breaks its promise
        assert abs(fixed.mean() - ALPHA) > 0.05


# ---------------------------------------------------------------------------------- cross-conformal

ROWS, FOLDS, NEW, LABELS = 100, 5, 200, 4


def model(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """A kernel vote: sure of itself beside its own rows, and of no opinion far from all."""
    near = np.exp(-8 * ((asked[:, None, :] - x[None, :, :]) ** 2).sum(axis=2))
    votes = near @ np.eye(LABELS)[y] + 0.05
    return votes / votes.sum(axis=1, keepdims=True)


def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    y = rng.integers(0, LABELS, rows)
    centres = np.array([[0, 0], [1.2, 0], [0, 1.2], [1.2, 1.2]])
    return centres[y] + rng.normal(0, 0.6, (rows, 2)), y


def cross(*, seen: bool = False, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Misses of each method and the mean e-value of true labels, for each split.

    `seen`: each model was trained on its own fold, too. `shift`: new rows are elsewhere.
    """
    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        (x, y), (new_x, new_y) = draw(rng, ROWS), draw(rng, NEW)
        new_x = new_x + shift
        fold = np.arange(ROWS) % FOLDS
        calibration, scores = [], []
        for one in range(FOLDS):
            rest = (fold != one) | seen
            own = model(x[rest], y[rest], x[fold == one])
            calibration.append(np.sort(1 - own[np.arange(len(own)), y[fold == one]]))
            probs = model(x[rest], y[rest], new_x)
            scores.append(1 - probs[np.arange(NEW), new_y])
        counts = cross_counts(scores, calibration)
        powered = [ranged_scores(s, LAC, labels=LABELS, power=POWER) for s in scores]
        bags = [ranged_scores(s, LAC, labels=LABELS, power=POWER) for s in calibration]
        values = cross_e_values(powered, bags)
        twice = math.floor(ALPHA * (ROWS + FOLDS) / 2 - FOLDS + 1)
        found.append(
            {
                "cross": (counts < math.floor(ALPHA * (ROWS + 1))).mean(),
                "twice": (counts < twice).mean(),
                "e": (values >= 1 / ALPHA).mean(),
                "value": values.mean(),
            }
        )
    return {name: np.array([one[name] for one in found]) for name in found[0]}


POWER = 16.0


def error(values: np.ndarray) -> float:
    return 4 * float(values.std(ddof=1)) / math.sqrt(SPLITS)


def test_what_is_promised_is_kept() -> None:
    found = cross()
    scores = tuple((0.5,) * (ROWS // FOLDS) for _ in range(FOLDS))
    fitted = CrossConformal(ALPHA, LAC, tuple("abcde"), scores, "split", 0, "f")
    assert found["cross"].mean() < 1 - fitted.guaranteed("cross")
    assert abs(found["cross"].mean() - ALPHA) < 0.02  # and in practice it is alpha
    for method in ("twice", "e"):
        assert found[method].mean() <= ALPHA
    assert abs(found["value"].mean() - 1) < error(found["value"])


def test_models_that_have_seen_their_rows_break_it() -> None:
    found = cross(seen=True)
    assert found["cross"].mean() > 2 * ALPHA
    assert found["value"].mean() > 1 + error(found["value"])


def test_new_rows_from_elsewhere_break_it() -> None:
    found = cross(shift=1.0)
    assert found["cross"].mean() > 2 * ALPHA
    assert found["value"].mean() > 1 + error(found["value"])
