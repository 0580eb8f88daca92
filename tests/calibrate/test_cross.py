import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import conformal as split
from reference import cross as reference

from llmlabel.calibrate import written
from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.cross import (
    CrossConformal,
    cross_counts,
    cross_e_values,
    cross_p_values,
    fit_cross_conformal,
    predict_cross_sets,
    ranged_scores,
)
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

LABELS = 4
NAMES = tuple(f"label {k}" for k in range(LABELS))
SPACE = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS)
SEEDS = pytest.mark.parametrize("seed", range(20))
GOLD = List(Value("int32"))
TWINS = {"lac": split.lac, "aps": split.aps, "margin": split.margin}


def table(seed: int, rows: int, *, folds: int = 3, right: float = 0.9, name: str = "") -> Dataset:
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 9, (rows, LABELS)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1)
    guess = np.where(rng.random(rows) < right, probs.argmax(axis=1), rng.integers(0, LABELS, rows))
    gold = [[] if rng.random() < 0.03 else [int(g)] for g in guess]
    ids = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)]})
    fold = [f"f{i}" for i in rng.integers(0, folds, rows)]
    dataset = with_columns(ids, {"gold": (gold, GOLD), "split": (fold, Value("string"))})
    return SoftLabels.from_dense(probs, SPACE).add_to(dataset)


def new_rows(seed: int, rows: int, *, folds: int = 3) -> dict[str, Dataset]:
    """The same rows, labelled by the model of each fold."""
    return {f"f{i}": table(seed + 50 * i, rows, name="new") for i in range(folds)}


def scores_of(dataset: Dataset, score: str) -> list[list[float]]:
    rows = SoftLabels.from_dataset(dataset, SPACE).dense().tolist()
    return [
        TWINS[score](row, split.uniform(row_id, 0))
        for row_id, row in zip(dataset["id"], rows, strict=True)
    ]


def own_scores(dataset: Dataset, score: str, folds: int) -> list[list[float]]:
    rows = zip(scores_of(dataset, score), dataset["gold"], dataset["split"], strict=True)
    known = [(row[gold[0]] if gold else math.inf, fold) for row, gold, fold in rows]
    return [[s for s, fold in known if fold == f"f{i}"] for i in range(folds)]


def powered(scores: list[float], score: str, power: float) -> list[float]:
    low, width = (-1.0, 2.0) if score == "margin" else (0.0, 1.0)
    return [min(max((s - low) / width, 0.0), 1.0) ** power for s in scores]


# -------------------------------------------------------------------------------------- numbers


@SEEDS
def test_values_equal_the_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    folds = [np.sort(rng.integers(0, 7, int(rng.integers(1, 12))) / 8) for _ in range(seed % 4 + 1)]
    scores = [rng.integers(0, 7, (5, 3)) / 8 for _ in folds]
    found_p, found_e = cross_p_values(scores, folds), cross_e_values(scores, folds)
    lists = [fold.tolist() for fold in folds]
    for i in range(5):
        for j in range(3):
            own = [float(one[i, j]) for one in scores]
            assert found_p[i, j] == pytest.approx(float(reference.p_value(own, lists)))
            assert found_e[i, j] == pytest.approx(reference.e_value(own, lists))
            total = 1 + sum(map(len, lists))
            assert cross_counts(scores, folds)[i, j] + 1 == reference.p_value(own, lists) * total


@SEEDS
@pytest.mark.parametrize("method", ["cross", "twice", "e"])
def test_sets_equal_the_twin(seed: int, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    score = ["lac", "aps", "margin"][seed % 3]
    gold, new = table(seed, 60), new_rows(seed + 1000, 25)
    fitted = fit_cross_conformal(gold, SPACE, alpha=0.3, score=score)
    known = own_scores(gold, score, 3)
    assert [list(scores) for scores in fitted.scores] == [sorted(scores) for scores in known]
    by_fold = [scores_of(new[f"f{i}"], score) for i in range(3)]
    level = {
        "cross": Fraction(3, 10),
        "twice": reference.twice_level(0.3, 60, 3),
        "e": None,
    }[method]
    means = sum(SoftLabels.from_dataset(one, SPACE).dense() for one in new.values())
    expected = []
    for row in range(25):
        inside = []
        for k in range(LABELS):
            own = [scores[row][k] for scores in by_fold]
            if level is not None:
                if reference.p_value(own, known) > level:
                    inside.append(k)
                continue
            bags = [powered(fold, score, 16.0) for fold in known]
            if reference.e_value(powered(own, score, 16.0), bags) < 1 / 0.3:
                inside.append(k)
        expected.append(sorted(inside, key=lambda k, mean=means[row]: (-mean[k], k)))
    plain = Dataset.from_dict({"id": [f"new{i}" for i in range(25)], "mine": list(range(25))})
    sets = predict_cross_sets(plain, SPACE, fitted, folds=new, method=method)
    assert sets["set_ids"][:] == expected
    assert sets["mine"][:] == list(range(25))
    monkeypatch.setattr(written, "BLOCK_CELLS", 7 * LABELS)
    assert (
        predict_cross_sets(plain, SPACE, fitted, folds=new, method=method)["set_ids"][:] == expected
    )


@pytest.mark.parametrize("score", ["lac", "aps", "margin"])
def test_one_fold_is_split_conformal(score: Any) -> None:
    gold, new = table(0, 60, folds=1), new_rows(9, 40, folds=1)
    for alpha in (0.2, 0.35):
        fitted = fit_cross_conformal(gold, SPACE, alpha=alpha, score=score)
        plain = fit_conformal(gold, SPACE, alpha=alpha, score=score)
        expected = predict_sets(new["f0"], SPACE, plain)["set_ids"][:]
        for method in ("cross", "twice"):
            found = predict_cross_sets(new["f0"], SPACE, fitted, folds=new, method=method)
            assert found["set_ids"][:] == expected
            assert fitted.guaranteed(method) == 1 - alpha


def test_e_values_by_hand() -> None:
    folds = [np.array([0.1, 0.3]), np.array([0.0])]
    values = cross_e_values([np.array([0.2, 0.0, 1.0]), np.array([0.5, 0.0, 1.0])], folds)
    # 3 x 0.2/0.6 and 2 x 0.5/0.5; nothing and nothing; 3 x 1/1.4 and 2.
    assert values == pytest.approx([(1 + 2) / 2, 0.0, (3 / 1.4 + 2) / 2])
    # Each row of a bag in turn as the new one: the mean e-value is 1, whatever the scores are.
    bag = np.random.default_rng(0).random(9) ** 5
    each = [cross_e_values([bag[[i]]], [np.delete(bag, i)])[0] for i in range(9)]
    assert np.mean(each) == pytest.approx(1)


def test_scores_on_a_scale() -> None:
    lac = ranged_scores(
        np.array([-1e-4, 0.0, 0.5, 1.0, np.inf]), Nonconformity(), labels=4, power=2.0
    )
    assert lac.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    margin = ranged_scores(np.array([-1.0, 0.0, 1.0]), Nonconformity("margin"), labels=4, power=1.0)
    assert margin.tolist() == [0.0, 0.5, 1.0]
    raps = Nonconformity("raps", penalty=0.5, free_labels=2)  # at most 1 + 2 x 0.5
    assert ranged_scores(np.array([1.0, 2.0]), raps, labels=4, power=1.0).tolist() == [0.5, 1.0]
    saps = Nonconformity("saps", penalty=1.0)  # at most 1 + 3
    assert ranged_scores(np.array([1.0, 4.0]), saps, labels=4, power=1.0).tolist() == [0.25, 1.0]


def test_what_is_guaranteed() -> None:
    fitted = CrossConformal(
        0.1, Nonconformity(), ("a", "b"), ((0.1,) * 49, (0.2,) * 49), "split", 0, "f"
    )
    assert fitted.rows == 98
    assert fitted.guaranteed() == pytest.approx(1 - 0.2 - 2 * 0.9 / 100)
    # As Barber et al. write it: 2 (1 - 1/K) / (n/K + 1), here with the factor 1 - alpha.
    assert fitted.guaranteed() == pytest.approx(0.8 - 0.9 * 2 * (1 - 1 / 2) / (98 / 2 + 1))
    assert fitted.guaranteed("twice") == fitted.guaranteed("e") == 0.9


def test_methods_are_ordered_and_order_changes_nothing(tmp_path: Path) -> None:
    gold, new = table(1, 150, right=0.8), new_rows(7, 60)
    fitted = fit_cross_conformal(gold, SPACE, alpha=0.2, score="aps", seed=5)
    order = np.random.default_rng(0).permutation(150)
    assert fit_cross_conformal(gold.select(order), SPACE, alpha=0.2, score="aps", seed=5) == fitted
    assert load_calibrator(save_calibrator(fitted, tmp_path / "cross.json")) == fitted
    rows = new["f0"]
    sets = {
        method: predict_cross_sets(rows, SPACE, fitted, folds=new, method=method)["set_ids"][:]
        for method in ("cross", "twice")
    }
    assert all(set(a) <= set(b) for a, b in zip(sets["cross"], sets["twice"], strict=True))
    assert sum(map(len, sets["cross"])) < sum(map(len, sets["twice"]))
    turned = {name: one.select(range(59, -1, -1)) for name, one in reversed(new.items())}
    found = predict_cross_sets(rows, SPACE, fitted, folds=turned)  # rows are joined by id
    assert found["set_ids"][:] == sets["cross"]


def test_rows_whose_gold_nobody_knows_are_left_out() -> None:
    gold = table(2, 60)
    some = with_columns(
        gold, {"gold": ([g if i < 40 else None for i, g in enumerate(gold["gold"])], GOLD)}
    )
    few = fit_cross_conformal(gold.select(range(40)), SPACE)
    assert fit_cross_conformal(some, SPACE) == few


# -------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_fitted_is_refused() -> None:
    rows = table(0, 30)
    many = LabelSpace(NAMES, NAMES, ("",) * LABELS, ((),) * LABELS, multilabel=True)
    wrong: list[tuple[Dataset, LabelSpace, dict[str, Any], str]] = [
        (rows, SPACE, {"alpha": 0.0}, "alpha must lie strictly between 0 and 1; got 0.0"),
        (rows, SPACE, {"alpha": 0.02}, "alpha=0.02 needs at least 49 gold rows; there are 30"),
        (rows, many, {}, "need a label space of one label a row"),
        (
            with_columns(rows, {"gold": ([[], [], [], *rows["gold"][3:]], GOLD)}),
            *(SPACE, {}, "alpha=0.1 is unreachable: only "),
        ),
        (rows, SPACE, {"score": "raps"}, "score 'raps' needs its settings here"),
        (rows, SPACE, {"column": "fold"}, "the column 'fold' is missing"),
        (
            with_columns(rows, {"split": ([None, *["a"] * 29], Value("string"))}),
            *(SPACE, {}, "column 'split' holds None, which is no name of a fold"),
        ),
        (
            with_columns(rows, {"route": (["person"] * 30, Value("string"))}),
            *(SPACE, {}, "30 of 30 gold rows have been routed"),
        ),
    ]
    for dataset, labels, settings, line in wrong:
        with pytest.raises(ValueError, match=re.escape(line)):
            fit_cross_conformal(dataset, labels, **settings)


def test_what_cannot_be_predicted_is_refused() -> None:
    gold, new = table(0, 60), new_rows(5, 10)
    fitted = fit_cross_conformal(gold, SPACE)
    rows = new["f0"]
    other = LabelSpace(NAMES[:3], NAMES[:3], ("",) * 3, ((),) * 3)
    with pytest.raises(ValueError, match=r"were fitted in label space .*; fit them again"):
        predict_cross_sets(rows, other, fitted, folds=new)
    two = {name: new[name] for name in ("f0", "f1")}
    with pytest.raises(ValueError, match=r"folds must be f0, f1, f2, .*; got f0, f1"):
        predict_cross_sets(rows, SPACE, fitted, folds=two)
    short = {**new, "f1": new["f1"].select(range(9))}
    with pytest.raises(ValueError, match="the row with id 'new9' is not in fold 'f1'"):
        predict_cross_sets(rows, SPACE, fitted, folds=short)
    line = r"every set would hold every label: e-values are at most \d.* raise power="
    with pytest.raises(ValueError, match=line):
        predict_cross_sets(rows, SPACE, fitted, folds=new, method="e", power=0.01)
    with pytest.raises(ValueError, match="power must be above 0, and finite; got 0"):
        predict_cross_sets(rows, SPACE, fitted, folds=new, method="e", power=0.0)
    prior = fit_cross_conformal(gold, SPACE, score=Nonconformity(prior=(0.25,) * 4))
    with pytest.raises(ValueError, match="e-values need a score of known range"):
        predict_cross_sets(rows, SPACE, prior, folds=new, method="e")


def test_folds_that_are_too_many_to_prove_alpha() -> None:
    gold, new = table(0, 40), new_rows(5, 10)
    fitted = fit_cross_conformal(gold, SPACE, alpha=0.1)
    line = "cannot certify: alpha=0.1 with 3 folds needs n >= 57 gold rows; there are 40"
    with pytest.raises(ValueError, match=re.escape(line)):
        predict_cross_sets(new["f0"], SPACE, fitted, folds=new, method="twice")
    level = reference.twice_level(0.1, 57, 3)
    assert level * 58 == 1  # the smallest p-value there is
