import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import conformal as split
from reference import noise as reference

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.noise import (
    NoisyConformal,
    estimate_noise,
    fit_noisy_conformal,
    inverse_noise,
    predict_noisy_sets,
)
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
IDS = List(Value("int32"))


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def noise_matrix(rng: np.random.Generator, labels: int) -> list[list[float]]:
    """Of sixteenths, so that rows sum to 1 and fractions are short."""
    counts = [rng.multinomial(5, np.full(labels, 1 / labels)) for _ in range(labels)]
    return ((np.array(counts) + 11 * np.eye(labels)) / 16).tolist()


def table(seed: int, rows: int, labels: int, *, wrong: float = 0.2, gold: int = 0) -> Dataset:
    """Soft labels with ties and missing mass, pseudo-labels, and gold of the first rows."""
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 9, (rows, labels)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1) * rng.choice([1, 1.25], (rows, 1))
    guess = np.where(rng.random(rows) < 0.85, probs.argmax(axis=1), rng.integers(0, labels, rows))
    given = (guess + (rng.random(rows) < wrong) * rng.integers(1, labels, rows)) % labels
    columns = {
        "id": [f"{seed}/{i}" for i in range(rows)],
        "crowd": [[int(g), 0] for g in given],
        "gold": [[int(g)] if i < gold else None for i, g in enumerate(guess)],
    }
    dataset = with_columns(
        Dataset.from_dict({"id": columns["id"]}),
        {"crowd": (columns["crowd"], IDS), "gold": (columns["gold"], IDS)},
    )
    return SoftLabels.from_dense(probs, space(labels)).add_to(dataset)


def fit(dataset: Dataset, labels: int, **settings: Any) -> NoisyConformal:
    return fit_noisy_conformal(dataset, space(labels), column="crowd", **settings)


def scores_of(dataset: Dataset, labels: int, score: str = "lac") -> list[list[float]]:
    twin = {"lac": split.lac, "aps": split.aps}[score]
    rows = SoftLabels.from_dataset(dataset, space(labels)).dense().tolist()
    return [
        twin(row, split.uniform(row_id, 0)) for row_id, row in zip(dataset["id"], rows, strict=True)
    ]


def given_of(dataset: Dataset) -> list[int]:
    return [ids[0] for ids in dataset["crowd"]]


# -------------------------------------------------------------------------------------- numbers


@SEEDS
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_the_threshold_equals_the_twin(seed: int, score: Any) -> None:
    rng = np.random.default_rng(seed)
    labels = int(rng.integers(2, 5))
    rows = table(seed, 40, labels)
    matrix = noise_matrix(rng, labels)
    scores, given = scores_of(rows, labels, score), given_of(rows)
    for noise, as_matrix in ((0.125, reference.uniform(0.125, labels)), (matrix, matrix)):
        expected = reference.threshold(scores, given, as_matrix, 0.25)
        if expected is None:
            with pytest.raises(ValueError, match=r"alpha=0\.25 is unreachable: an estimated 0\."):
                fit(rows, labels, noise=noise, alpha=0.25, score=score)
            continue
        fitted = fit(rows, labels, noise=noise, alpha=0.25, score=score)
        assert fitted.threshold == pytest.approx(expected, rel=1e-12)
        for limit, found in (
            (fitted.threshold, fitted.coverage),
            (fitted.plain_threshold, fitted.plain_coverage),
        ):
            if limit < math.inf:
                limit = min((s for row in scores for s in row), key=lambda s: abs(s - limit))
                estimate = float(reference.coverage(scores, given, as_matrix, limit))
                assert found == pytest.approx(min(max(estimate, 0), 1), abs=1e-9)
    assert fitted.plain_threshold == pytest.approx(
        split.quantile([row[g] for row, g in zip(scores, given, strict=True)], 0.25)
    )


def test_by_hand() -> None:
    """Two labels, wrong in 1 of 5 rows: V = [4 -1; -1 4] / 3. Score 0 is the one that fits best."""
    probs = [[1.0, 0.0]] * 5 + [[0.75, 0.25]] * 4
    ids = Dataset.from_dict({"id": [f"{i}" for i in range(9)]})
    crowd = [[0]] * 5 + [[1]] + [[0]] * 3
    rows = with_columns(ids, {"crowd": (crowd, IDS)})
    rows = SoftLabels.from_dense(np.array(probs), space(2)).add_to(rows)
    # 5 x 4/3 at 0, 3 x 4/3 - 1/3 more at 0.25, where 9 x 10.33/9 >= 8 = ceil(10 x 0.8) is reached.
    fitted = fit(rows, 2, noise=0.2, alpha=0.2)
    assert fitted.threshold == 0.25
    assert fitted.coverage == 1.0  # 31/27, which is no share, counts as 1
    assert fitted.plain_threshold == 0.25
    assert fitted.plain_guaranteed == pytest.approx(0.6)
    assert (fitted.wrong, fitted.gold_rows, fitted.rows) == (0.2, 0, 9)
    half = fit(rows, 2, noise=0.2, alpha=0.5)  # 5 of 9, and 20/3 are there
    assert (half.threshold, half.coverage) == (0.0, pytest.approx(20 / 27))


@pytest.mark.parametrize("score", ["lac", "aps", "raps", "margin"])
def test_without_noise_it_is_split_conformal(score: Any) -> None:
    rows = table(3, 60, 4)
    as_gold = with_columns(rows, {"gold": ([ids[:1] for ids in rows["crowd"]], IDS)})
    for alpha in (0.1, 0.3, 0.7):
        settings = {"free_labels": 1, "penalty": 0.0} if score == "raps" else {}
        plain = fit_conformal(
            as_gold, space(4), alpha=alpha, score=score, unreachable="every label", **settings
        )
        if plain.threshold == math.inf:
            continue
        for noise in (0.0, np.eye(4).tolist()):
            how = Nonconformity(score, **settings)
            fitted = fit(rows, 4, noise=noise, alpha=alpha, score=how)
            assert fitted.threshold == fitted.plain_threshold == plain.threshold
    sets = predict_noisy_sets(rows, space(4), fitted)
    assert sets["set_ids"][:] == predict_sets(rows, space(4), plain)["set_ids"][:]


def test_a_number_is_a_matrix() -> None:
    rows = table(0, 80, 3)
    matrix = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    one, other = fit(rows, 3, noise=0.2, alpha=0.2), fit(rows, 3, noise=matrix, alpha=0.2)
    assert (one.threshold, one.noise, other.noise) == (other.threshold, "uniform", "matrix")
    assert one.coverage == pytest.approx(other.coverage)
    assert other.wrong == pytest.approx(0.2)
    assert other.plain_guaranteed == pytest.approx(one.plain_guaranteed)


def test_the_slack_equals_the_twin() -> None:
    rows = table(1, 400, 4)
    for delta in (0.05, 0.1, 0.5):
        fitted = fit(rows, 4, noise=0.2, alpha=0.3, delta=delta)
        slack = reference.slack(0.2, 4, 400, delta)
        assert fitted.guaranteed == pytest.approx(fitted.coverage - slack)
    matrix = np.full((4, 4), 0.05) + 0.8 * np.eye(4)
    weights = np.linalg.inv(matrix)
    level = math.sqrt(math.log(2 / 0.1) / 800) * (1 + 1 / (2 * math.log(2 / 0.1)))
    fitted = fit(rows, 4, noise=matrix.tolist(), alpha=0.3)
    both = np.abs(weights).sum(axis=1).max()
    assert fitted.guaranteed == pytest.approx(fitted.coverage - level * both)


# -------------------------------------------------------------------------------------- estimates


def test_the_noise_is_estimated_on_rows_with_gold() -> None:
    rows = table(4, 300, 3, gold=120)
    gold = [g[0] for g in rows["gold"][:120]]
    given = given_of(rows)[:120]
    wrong = sum(a != b for a, b in zip(gold, given, strict=True)) / 120
    fitted, known = fit(rows, 3, noise="uniform"), fit(rows, 3, noise=wrong)
    assert (fitted.wrong, fitted.gold_rows, fitted.rows) == (wrong, 120, 300)
    assert (fitted.threshold, fitted.coverage) == (known.threshold, known.coverage)
    matrix = [
        [sum((a, b) == (i, j) for a, b in zip(gold, given, strict=True)) for j in range(3)]
        for i in range(3)
    ]
    shares = [[count / sum(row) for count in row] for row in matrix]
    estimated = fit(rows, 3, noise="matrix")
    assert estimated.threshold == fit(rows, 3, noise=shares).threshold
    assert estimated.noise == "matrix"
    found = estimate_noise(np.array(given), np.array(gold), space(3), "matrix")
    assert found == pytest.approx(np.array(shares))


def test_gold_rows_prove_their_own_bound() -> None:
    rows = table(4, 300, 3, gold=120)
    fitted = fit(rows, 3, noise="uniform", delta=0.2)
    scores = scores_of(rows, 3)
    covered = [scores[i][rows["gold"][i][0]] <= fitted.threshold for i in range(120)]
    expected = sum(covered) / 120 - math.sqrt(math.log(5) / 240)
    assert fitted.guaranteed == pytest.approx(expected)
    # The share of wrong labels is at most the one where so few errors have probability delta.
    tail = sum(
        math.comb(120, k) * most**k * (1 - most) ** (120 - k)
        for most in [1 - fitted.alpha - fitted.plain_guaranteed]
        for k in range(round(fitted.wrong * 120) + 1)
    )
    assert tail == pytest.approx(0.2)


def test_a_certain_threshold_is_higher_by_the_slack() -> None:
    rows = table(5, 1200, 4)
    mean, sure = (fit(rows, 4, noise=0.1, alpha=0.25, aim=aim) for aim in ("mean", "certain"))
    assert sure.threshold > mean.threshold
    assert sure.guaranteed >= 0.75 > mean.guaranteed
    slack = reference.slack(0.1, 4, 100, 0.1)
    needed = math.ceil(100 * (slack / 0.1) ** 2)
    line = (
        f"cannot certify: alpha=0.1 with this noise needs n >= {needed} rows with a pseudo-label; "
    )
    with pytest.raises(ValueError, match=re.escape(line)):
        fit(rows.select(range(100)), 4, noise=0.1, aim="certain")
    assert reference.slack(0.1, 4, needed, 0.1) <= 0.1 < reference.slack(0.1, 4, needed - 1, 0.1)
    with pytest.raises(ValueError, match="aim='certain' needs known noise"):
        fit(table(5, 100, 4, gold=50), 4, noise="uniform", aim="certain")


# ----------------------------------------------------------------------------------- the contract


def test_order_disk_and_rows_without_a_pseudo_label(tmp_path: Path) -> None:
    rows = table(6, 150, 3, gold=60)
    fitted = fit(rows, 3, noise="matrix", score="aps", seed=4)
    order = np.random.default_rng(0).permutation(150)
    assert fit(rows.select(order), 3, noise="matrix", score="aps", seed=4) == fitted
    assert load_calibrator(save_calibrator(fitted, tmp_path / "noise.json")) == fitted
    crowd = [None if i % 10 == 9 else [] if i % 10 == 8 else c for i, c in enumerate(rows["crowd"])]
    some = with_columns(rows, {"crowd": (crowd, IDS)})
    kept = rows.select([i for i in range(150) if i % 10 < 8])
    assert fit(some, 3, noise=0.2) == fit(kept, 3, noise=0.2)
    assert fit(some, 3, noise=0.2).rows == 120


def test_sets_of_both_thresholds() -> None:
    rows, new = table(7, 200, 4), table(8, 30, 4)
    fitted = fit(rows, 4, noise=0.2, alpha=0.25)
    assert fitted.threshold < fitted.plain_threshold
    scores = scores_of(new, 4)
    for name, limit in (("corrected", fitted.threshold), ("plain", fitted.plain_threshold)):
        sets = predict_noisy_sets(new, space(4), fitted, threshold=name)
        expected = [
            sorted((k for k in range(4) if row[k] <= limit), key=lambda k, row=row: (row[k], k))
            for row in scores
        ]
        assert sets["set_ids"][:] == expected
    assert sets["crowd"][:] == new["crowd"][:]
    with pytest.raises(ValueError, match=r"was fitted in label space .*; fit it again on rows"):
        predict_noisy_sets(table(8, 30, 3), space(3), fitted)


def test_pseudo_labels_of_the_model_itself_are_refused() -> None:
    rows = table(0, 60, 3)
    line = (
        "every pseudo-label of column 'label_ids' is the most probable label .* from another model"
    )
    with pytest.raises(ValueError, match=line):
        fit_noisy_conformal(rows, space(3), column="label_ids", noise=0.2)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"noise": 0.2, "alpha": 0.0}, "alpha must lie strictly between 0 and 1; got 0.0"),
        ({"noise": 0.2, "delta": 1.0}, "delta must lie strictly between 0 and 1; got 1.0"),
        (
            {"noise": "uniform", "delta": 0.6},
            "delta must be at most 0.5 where the noise is estimated",
        ),
        ({"noise": 0.2, "alpha": 0.01}, "alpha=0.01 needs at least 99 rows with a pseudo-label"),
        (
            {"noise": 0.7},
            "must be from 0 to below 0.667, that of labels drawn at random from 3; it ",
        ),
        ({"noise": -0.1}, "must be from 0 to below 0.667"),
        ({"noise": [[0.5, 0.5], [0.5, 0.5]]}, r"has shape (2, 2), not (3, 3)"),
        (
            {"noise": [[0.5, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]},
            "row 0 of the noise matrix is [0.5, 0.6",
        ),
        (
            {"noise": [[1.0, 0.0, 0.0], [0.0, 1.5, -0.5], [0.0, 0.0, 1.0]]},
            "row 1 of the noise matrix is [0.0, 1.5",
        ),
        (
            {"noise": [[1.0, 0.0, 0.0], [0.0, math.nan, 0.0], [0.0, 0.0, 1.0]]},
            "row 1 of the noise matrix is [0.0, nan",
        ),
        (
            {"noise": [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]},
            "the noise matrix has no inverse",
        ),
        ({"noise": "uniform"}, "no row has both gold and a pseudo-label"),
    ],
)
def test_what_cannot_be_fitted_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        fit(table(0, 60, 3), 3, **settings)


def test_gold_that_cannot_tell_the_noise_is_refused() -> None:
    rows = table(0, 60, 3, gold=3)
    with_gold = with_columns(rows, {"gold": ([[0], [1]] + [None] * 58, IDS)})
    line = "label 'label 2' has no row with both gold and a pseudo-label, .*1 such labels of 3"
    with pytest.raises(ValueError, match=line):
        fit(with_gold, 3, noise="matrix")
    none = with_columns(rows, {"gold": ([[0], [], [1]] + [None] * 57, IDS)})
    with pytest.raises(ValueError, match="1 of 3 gold rows have none of the labels"):
        fit(none, 3, noise="uniform")
    routed = with_columns(table(0, 60, 3, gold=30), {"route": (["person"] * 60, Value("string"))})
    with pytest.raises(ValueError, match="30 of 30 gold rows have been routed"):
        fit(routed, 3, noise="uniform")


def test_columns_that_are_no_pseudo_labels_are_refused() -> None:
    rows = table(0, 60, 3)
    with pytest.raises(ValueError, match="the column 'other' is missing"):
        fit_noisy_conformal(rows, space(3), column="other", noise=0.2)
    with pytest.raises(
        ValueError, match="column 'id' holds string; pseudo-labels are lists of ids"
    ):
        fit_noisy_conformal(rows, space(3), column="id", noise=0.2)
    outside = with_columns(rows, {"crowd": ([[3]] + [[0]] * 59, IDS)})
    with pytest.raises(
        ValueError, match="row with id '0/0' has the pseudo-label 3 in column 'crowd'"
    ):
        fit(outside, 3, noise=0.2)
    with pytest.raises(ValueError, match="this one is multi-label"):
        fit_noisy_conformal(rows, space(3, multilabel=True), column="crowd", noise=0.2)


def test_the_inverse_undoes_the_noise() -> None:
    matrix = np.array(noise_matrix(np.random.default_rng(0), 4))
    assert matrix @ inverse_noise(matrix) == pytest.approx(np.eye(4))
    exact = [[float(v) for v in row] for row in reference.inverse(matrix.tolist())]
    assert inverse_noise(matrix) == pytest.approx(np.array(exact))
