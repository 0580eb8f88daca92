import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import conformal as split
from reference import online as reference

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.online import (
    Online,
    online_bound,
    online_levels,
    predict_online_sets,
    start_online,
    update_online,
)
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

LABELS = 4
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS)
SEEDS = pytest.mark.parametrize("seed", range(20))
GOLD = List(Value("int32"))


def table(seed: int, rows: int, *, unknown: float = 0.0, none: float = 0.0) -> Dataset:
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 9, (rows, LABELS)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1)
    guess = np.where(rng.random(rows) < 0.7, probs.argmax(axis=1), rng.integers(0, LABELS, rows))
    kind = rng.random(rows)
    gold = [
        None if kind[i] < unknown else [] if kind[i] < unknown + none else [int(g)]
        for i, g in enumerate(guess)
    ]
    ids = Dataset.from_dict({"id": [f"{seed}/{i}" for i in range(rows)]})
    dataset = with_columns(ids, {"gold": (gold, GOLD)})
    return SoftLabels.from_dense(probs, SPACE).add_to(dataset)


def scores_of(dataset: Dataset, score: str) -> list[list[float]]:
    twin = {"lac": split.lac, "aps": split.aps}[score]
    rows = SoftLabels.from_dataset(dataset, SPACE).dense().tolist()
    return [
        twin(row, split.uniform(row_id, 0)) for row_id, row in zip(dataset["id"], rows, strict=True)
    ]


def own(dataset: Dataset, score: str) -> list[float | None]:
    rows = zip(scores_of(dataset, score), dataset["gold"], strict=True)
    return [row[gold[0]] if gold else None for row, gold in rows]


# -------------------------------------------------------------------------------------- numbers


@SEEDS
def test_levels_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 60) / 8
    scores[rng.random(60) < 0.2] = np.nan
    start = rng.integers(0, 6, int(rng.integers(0, 30))) / 8
    window = [None, 5, 20][seed % 3]
    delay, gamma = [0, 1, 7][seed // 3 % 3], float(rng.choice([0.01, 0.1, 0.5]))
    levels, thresholds = online_levels(
        scores, start, alpha=0.2, gamma=gamma, level=0.2, window=window, delay=delay
    )
    known = [None if math.isnan(s) else s for s in scores.tolist()]
    expected = reference.levels(known, start.tolist(), 0.2, gamma, window, delay)
    assert levels.tolist() == [level for level, _ in expected]
    assert thresholds.tolist() == [threshold for _, threshold in expected]


@SEEDS
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_equal_the_twin(seed: int, score: Any) -> None:
    gold, rows = table(seed, 30), table(seed + 100, 50, unknown=0.2, none=0.1)
    window, delay = [None, 10][seed % 2], seed % 4
    state = start_online(gold, SPACE, alpha=0.2, gamma=0.1, score=score, window=window)
    found = predict_online_sets(rows, SPACE, state, delay=delay)
    expected = reference.levels(*(own(rows, score), own(gold, score), 0.2, 0.1, window, delay))
    assert found["online_alpha"][:] == [level for level, _ in expected]
    probs = SoftLabels.from_dataset(rows, SPACE).dense().tolist()
    sets = [
        sorted((k for k in range(LABELS) if row[k] <= limit), key=lambda k, p=p: (-p[k], k))
        for row, p, (_, limit) in zip(scores_of(rows, score), probs, expected, strict=True)
    ]
    assert found["set_ids"][:] == sets
    assert len({len(ids) for ids in sets}) > 1
    assert found["gold"][:] == rows["gold"][:]


def test_by_hand() -> None:
    """Score 0.5 is a miss at first; each miss lowers the level by 0.4, each hit raises it by 0.1."""
    scores = np.array([0.5, 0.5, 0.1, 0.9, 0.1, np.nan, 0.1])
    start = np.array([0.1, 0.2, 0.3, 0.4])
    levels, thresholds = online_levels(scores, start, alpha=0.2, gamma=0.5, level=0.2)
    # (4 + 1) x 0.8 = the 4th of 4. Then the level is -0.2: every label. 0.4 - 0.5 < 0 ... and so on.
    assert levels == pytest.approx([0.2, -0.2, -0.1, 0.0, 0.1, 0.2, 0.2])
    assert thresholds.tolist()[:3] == [0.4, math.inf, math.inf]
    # Seven, then eight scores: 0.1 0.1 0.2 0.3 0.4 0.5 0.5 0.9 and the 0.1 of row 4.
    assert thresholds[5:].tolist() == [0.5, 0.5]
    late, _ = online_levels(scores, start, alpha=0.2, gamma=0.5, level=0.2, delay=2)
    assert late == pytest.approx([0.2, 0.2, 0.2, -0.2, -0.6, -0.5, -0.4])


def test_no_step_is_split_conformal() -> None:
    """A tiny gamma, and answers that never come: the threshold of the gold rows."""
    gold, rows = table(0, 80), table(1, 40)
    unanswered = with_columns(rows, {"gold": ([None] * 40, GOLD)})
    for score in ("lac", "aps"):
        state = start_online(gold, SPACE, alpha=0.2, gamma=1e-9, score=score)
        expected = predict_sets(rows, SPACE, fit_conformal(gold, SPACE, alpha=0.2, score=score))
        for stream in (unanswered, rows.remove_columns("gold")):
            found = predict_online_sets(stream, SPACE, state)
            assert found["set_ids"][:] == expected["set_ids"][:]
            assert found["online_alpha"][:] == [0.2] * 40


def test_a_set_holds_every_label_or_none_outside_0_and_1() -> None:
    gold, rows = table(0, 40), table(1, 3)
    low = Online(
        0.2, 0.1, -0.05, (0.5,), None, 4, 1, start_online(gold, SPACE).how, 0, SPACE.fingerprint
    )
    high = Online(0.2, 0.1, 1.0, (0.5,), None, 4, 1, low.how, 0, SPACE.fingerprint)
    empty = SoftLabels.from_dense(np.zeros((3, LABELS)), SPACE).add_to(rows)
    unanswered = empty.remove_columns("gold")
    assert predict_online_sets(unanswered, SPACE, low)["set_ids"][:] == [[0, 1, 2, 3]] * 3
    assert predict_online_sets(unanswered, SPACE, high)["set_ids"][:] == [[]] * 3


# ------------------------------------------------------------------------------------ the promise


def worst(rng: np.random.Generator, threshold: float, kind: str, row: int) -> float:
    """What an adversary who sees the threshold answers."""
    if kind == "always":  # a miss wherever a miss is possible
        return math.nextafter(threshold, math.inf) if threshold < math.inf else 1.0
    if kind == "never":
        return threshold if threshold > -math.inf else 0.0
    if kind == "bursts":
        return 2.0 if row // 50 % 2 else -2.0
    return float(rng.random() * (1 + row / 100))


@pytest.mark.parametrize("kind", ["always", "never", "bursts", "drift"])
@pytest.mark.parametrize(("gamma", "delay"), [(0.005, 0), (0.3, 0), (0.05, 6), (2.0, 3)])
@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_no_stream_breaks_the_bound(kind: str, gamma: float, delay: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    scores, start = np.full(400, np.nan), rng.random(20)
    errors = []
    for row in range(400):  # the adversary sees the threshold of this row before answering
        if kind in ("always", "never") and row < 150:
            _, limits = online_levels(
                scores[: row + 1], start, alpha=alpha, gamma=gamma, level=alpha, delay=delay
            )
            scores[row] = worst(rng, limits[row], kind, row)
        else:
            scores[row] = worst(rng, 0.0, "bursts" if kind != "drift" else "drift", row)
    levels, limits = online_levels(
        scores, start, alpha=alpha, gamma=gamma, level=alpha, delay=delay
    )
    errors = np.cumsum(scores > limits) / np.arange(1, 401)
    bounds = np.array(
        [online_bound(alpha, gamma=gamma, answers=n, delay=delay) for n in range(1, 401)]
    )
    assert (np.abs(errors - alpha) <= bounds + 1e-9).all()
    assert levels.min() >= -(1 + delay) * gamma * (1 - alpha) - 1e-9
    assert levels.max() <= 1 + (1 + delay) * gamma * alpha + 1e-9


def test_the_bound_is_reached_and_a_fixed_level_breaks_it() -> None:
    """400 misses in a row: the level falls until sets hold all labels. A fixed one misses all."""
    scores, start = np.full(400, 5.0), np.linspace(0, 1, 100)
    _, limits = online_levels(scores, start, alpha=0.1, gamma=0.05, level=0.1, window=100)
    missed = float((scores > limits).mean())
    bound = online_bound(0.1, gamma=0.05, answers=400)
    assert abs(missed - 0.1) <= bound == pytest.approx((0.9 + 0.05) / 20)
    _, fixed = online_levels(scores, start, alpha=0.1, gamma=1e-12, level=0.1, delay=400)
    assert (scores > fixed).mean() - 0.1 > bound
    assert online_bound(0.1, gamma=0.05, answers=400, delay=3) == pytest.approx((0.9 + 0.2) / 20)
    assert online_bound(0.7, gamma=0.05, answers=0) == math.inf


# -------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize("window", [None, 15])
def test_a_stream_in_parts_is_the_stream(window: int | None, tmp_path: Path) -> None:
    rows = table(3, 90, unknown=0.2, none=0.1)
    state = start_online(table(2, 20), SPACE, alpha=0.2, gamma=0.07, score="aps", window=window)
    whole = predict_online_sets(rows, SPACE, state)
    end, sets, levels = state, [], []
    for part in itertools.pairwise((0, 1, 31, 31, 70, 90)):
        found = predict_online_sets(rows.select(range(*part)), SPACE, end)
        sets, levels = sets + found["set_ids"][:], levels + found["online_alpha"][:]
        end = update_online(found, SPACE, end)
        path = save_calibrator(end, tmp_path / "online.json")
        assert load_calibrator(path) == end
        end = load_calibrator(path)
    assert sets == whole["set_ids"][:]
    assert levels == whole["online_alpha"][:]
    answered = [(g, s) for g, s in zip(rows["gold"], sets, strict=True) if g]
    assert end.answers == len(answered)
    assert end.missed == sum(g[0] not in s for g, s in answered)
    assert end.level == pytest.approx(0.2 + 0.07 * (0.2 * end.answers - end.missed))
    assert end.bound(delay=2) == online_bound(0.2, gamma=0.07, answers=end.answers, delay=2)
    assert abs(end.missed / end.answers - 0.2) <= end.bound()
    assert end == update_online(whole, SPACE, state)
    assert len(end.scores) == (window or 20 + end.answers)


def test_answers_that_come_later() -> None:
    """Sets are made without gold, the answers are joined to them afterwards."""
    rows = table(5, 40)
    state = start_online(table(4, 30), SPACE, alpha=0.2, gamma=0.1)
    made = predict_online_sets(rows.remove_columns("gold"), SPACE, state)
    assert made["online_alpha"][:] == [0.2] * 40
    some = [g if i % 2 else None for i, g in enumerate(rows["gold"])]
    end = update_online(with_columns(made, {"gold": (some, GOLD)}), SPACE, state)
    assert end.answers == 20
    missed = sum(
        g[0] not in s
        for i, (g, s) in enumerate(zip(rows["gold"], made["set_ids"], strict=True))
        if i % 2
    )
    assert end.missed == missed > 0
    # All answers come after all sets: the bound is that of a delay of 39.
    assert abs(missed / 20 - 0.2) <= end.bound(delay=39)


def test_scores_that_are_infinite_survive_json(tmp_path: Path) -> None:
    rows = SoftLabels.from_dataset(table(0, 30), SPACE).top(1).add_to(table(0, 30))
    state = start_online(rows, SPACE)
    assert math.inf in state.scores
    assert load_calibrator(save_calibrator(state, tmp_path / "s.json")) == state


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1; got 1.0"),
        ({"gamma": 0.0}, "gamma must be above 0, and finite; got 0.0"),
        ({"gamma": math.inf}, "gamma must be above 0, and finite; got inf"),
        ({"window": 0}, "window must be at least 1, the number of scores; got 0"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        start_online(table(0, 20), SPACE, **settings)


def test_what_is_no_part_of_the_stream_is_refused() -> None:
    rows = table(0, 20)
    state = start_online(rows, SPACE)
    many = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS, multilabel=True)
    with pytest.raises(ValueError, match="this one is multi-label"):
        start_online(rows, many)
    other = LabelSpace(NAMES[:3], NAMES[:3], ("",) * 3, ((),) * 3)
    line = "the stream is of label space .*; start another one with gold rows of this one"
    with pytest.raises(ValueError, match=line):
        predict_online_sets(rows, other, state)
    with pytest.raises(ValueError, match=line):
        update_online(rows, other, state)
    with pytest.raises(ValueError, match="delay must be 0 or more, a number of rows; got -1"):
        predict_online_sets(rows, SPACE, state, delay=-1)
    with pytest.raises(ValueError, match="the column 'set_ids' is missing"):
        update_online(rows, SPACE, state)
    routed = with_columns(rows, {"route": (["model"] * 20, Value("string"))})
    with pytest.raises(ValueError, match="20 of 20 gold rows have been routed"):
        start_online(routed, SPACE)
