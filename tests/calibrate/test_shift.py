import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import groups as reference
from scipy.sparse import csr_array

from llmlabel.calibrate import written
from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.calibrate.shift import (
    WeightedConformal,
    add_shift_weights,
    effective_rows,
    fit_weighted_conformal,
    likelihood_ratio,
    predict_weighted_sets,
    weighted_thresholds,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
NAMES = tuple(f"l{k}" for k in range(5))
SPACE = LabelSpace(NAMES, NAMES, ("",) * 5, ((),) * 5)


def table(rows: int, *, seed: int, name: str, weights: Any = None) -> Dataset:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(5), rows)
    gold = [[int(rng.choice(5, p=p))] for p in probs]
    dataset = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)], "gold": gold})
    weights = rng.integers(1, 9, rows) / 4 if weights is None else weights
    dataset = with_columns(dataset, {"shift_weight": (weights, Value("float32"))})
    return SoftLabels.from_dense(probs, SPACE).add_to(dataset)


# ----------------------------------------------------------------------------------------- twins


@SEEDS
def test_thresholds_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    scores = rng.integers(0, 20, rows) / 16
    scores[rng.random(rows) < 0.05] = np.inf
    weights = rng.integers(0, 9, rows) / 4.0
    own = np.append(rng.integers(0, 20, 15) / 4.0, [0.0, 1e6])
    for alpha in (0.1, 0.3, 0.7):
        found = weighted_thresholds(scores, weights, own, alpha=alpha)
        expected = [
            reference.weighted_threshold(scores.tolist(), weights.tolist(), one, alpha)
            for one in own.tolist()
        ]
        assert found.tolist() == expected
    if weights.any():
        assert effective_rows(weights) == pytest.approx(reference.effective(weights.tolist()))


@SEEDS
def test_sets_equal_the_twin(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gold_rows = table(60, seed=seed, name="g")
    new = table(30, seed=seed + 100, name="n")
    fitted = fit_weighted_conformal(gold_rows, SPACE, alpha=0.2)
    dense = SoftLabels.from_dataset(gold_rows, SPACE).dense()
    scores = [1 - row[g[0]] for row, g in zip(dense, gold_rows["gold"], strict=True)]
    weights = gold_rows["shift_weight"][:]
    assert fitted.effective_rows == pytest.approx(reference.effective(weights))
    expected = []
    for row, own in zip(
        SoftLabels.from_dataset(new, SPACE).dense().tolist(), new["shift_weight"], strict=True
    ):
        cut = reference.weighted_threshold(scores, weights, own, 0.2)
        inside = [k for k in range(5) if 1 - row[k] <= cut]
        expected.append(sorted(inside, key=lambda k, row=row: (-row[k], k)))
    sets = predict_weighted_sets(new, SPACE, fitted)
    assert sets["set_ids"][:] == expected
    monkeypatch.setattr(written, "BLOCK_CELLS", 35)  # 7 rows a block
    assert predict_weighted_sets(new, SPACE, fitted)["set_ids"][:] == expected
    assert sets.features["set_ids"] == List(Value("int32"))
    assert sets["gold"][:] == new["gold"][:]


# ---------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 1e-8, 7e5])
def test_equal_weights_are_split_conformal(alpha: float, weight: float) -> None:
    rng = np.random.default_rng(0)
    for rows in (*range(1, 60), 99, 999, 9_999):
        scores = rng.random(rows)
        found = weighted_thresholds(scores, np.full(rows, weight), np.array([weight]), alpha=alpha)
        assert found[0] == conformal_quantile(scores, alpha)


def test_thresholds_by_hand() -> None:
    scores, weights = np.array([0.4, 0.1, 0.2, 0.3]), np.array([4.0, 1.0, 2.0, 3.0])
    own = np.array([0.0, 2.0, 2.5, 3.0])
    # Mass up to 0.3 is 6 of 10 and the row's own: half of it is reached at 0.3, ...; 0.8 x 12.5 = 10.
    assert weighted_thresholds(scores, weights, own, alpha=0.5).tolist() == [0.3, 0.3, 0.4, 0.4]
    assert weighted_thresholds(scores, weights, own, alpha=0.2).tolist() == [
        *(0.4, 0.4, 0.4, math.inf)
    ]


def test_a_heavier_row_has_a_larger_set() -> None:
    gold_rows = table(200, seed=0, name="g", weights=np.ones(200))
    new = table(1, seed=9, name="n").select([0] * 4)
    weights = np.array([0.0, 5.0, 15.0, 23.0])
    new = with_columns(new, {"shift_weight": (weights, Value("float32"))})
    fitted = fit_weighted_conformal(gold_rows, SPACE, alpha=0.1)
    sets = predict_weighted_sets(new, SPACE, fitted)["set_ids"][:]
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(sets))
    assert sorted(sets[3]) == [0, 1, 2, 3, 4]  # 0.9 x 223 is more than 200
    assert len(sets[0]) < 5


def test_equal_weights_give_the_sets_of_split_conformal() -> None:
    gold_rows = table(100, seed=0, name="g", weights=np.full(100, 0.3))
    new = table(40, seed=1, name="n", weights=np.full(40, 0.3))
    for score in ("lac", "aps"):
        plain = fit_conformal(gold_rows, SPACE, score=score, seed=3)
        fitted = fit_weighted_conformal(gold_rows, SPACE, score=score, seed=3)
        expected = predict_sets(new, SPACE, plain)["set_ids"][:]
        assert predict_weighted_sets(new, SPACE, fitted)["set_ids"][:] == expected


def test_the_order_of_the_rows_changes_nothing() -> None:
    gold_rows, new = table(100, seed=0, name="g"), table(40, seed=1, name="n")
    how = Nonconformity("aps")
    fitted = fit_weighted_conformal(gold_rows, SPACE, score=how)
    order = np.random.default_rng(0).permutation(100)
    assert fit_weighted_conformal(gold_rows.select(order), SPACE, score=how) == fitted
    sets = predict_weighted_sets(new, SPACE, fitted)["set_ids"][:]
    some = order[order < 40]
    assert predict_weighted_sets(new.select(some), SPACE, fitted)["set_ids"][:] == [
        sets[i] for i in some
    ]
    adapter = TypeAdapter(WeightedConformal)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_scores_that_are_infinite_survive_json() -> None:
    gold_rows = table(100, seed=0, name="g")
    gold = [[], *gold_rows["gold"][1:]]
    gold_rows = with_columns(gold_rows, {"gold": (gold, List(Value("int32")))})
    fitted = fit_weighted_conformal(gold_rows, SPACE)
    assert fitted.scores[-1] == math.inf
    assert fitted.scores[-2] < math.inf
    adapter = TypeAdapter(WeightedConformal)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_rows_whose_gold_nobody_knows_are_left_out() -> None:
    gold_rows = table(100, seed=0, name="g")
    gold = [g if i < 60 else None for i, g in enumerate(gold_rows["gold"])]
    rows = with_columns(gold_rows, {"gold": (gold, List(Value("int32")))})
    few = fit_weighted_conformal(gold_rows.select(range(60)), SPACE)
    assert fit_weighted_conformal(rows, SPACE) == few


def test_effective_rows_by_hand() -> None:
    assert effective_rows(np.ones(7)) == 7
    assert effective_rows(np.array([4.0, 2.0, 0.0])) == 1.8
    assert effective_rows(np.array([1e-200, 1e-200])) == 2
    assert effective_rows(np.zeros(3)) == 0
    assert effective_rows(np.zeros(0)) == 0


# ------------------------------------------------------------------------------ estimated weights


def shifted(rows: int, mean: float, *, seed: int, name: str) -> Dataset:
    """x ~ N(mean, 1) in the first number of the vector; the second is noise."""
    rng = np.random.default_rng(seed)
    vectors = np.stack([rng.normal(mean, 1, rows), rng.normal(0, 1, rows)], axis=1)
    share = 1 / (1 + np.exp(-vectors[:, 0]))
    probs = np.stack([share, *[(1 - share) / 4] * 4], axis=1)
    dataset = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)]})
    dataset = with_columns(dataset, {"vector": (vectors.tolist(), List(Value("float32")))})
    return SoftLabels.from_dense(probs, SPACE).add_to(dataset)


@pytest.mark.parametrize("features", ["vector", "label_probs"])
def test_weights_are_likelihood_ratios(features: Any) -> None:
    cal, new = shifted(4000, 0, seed=0, name="c"), shifted(3000, 1, seed=1, name="n")
    weights = []
    for rows in (cal, new):
        found = add_shift_weights(rows, SPACE, calibration=cal, new=new, features=features)
        assert found.features["shift_weight"] == Value("float32")
        weights.append(np.array(found["shift_weight"]))
    assert weights[0].mean() == pytest.approx(1, abs=0.05)  # as that of every likelihood ratio
    x = np.array(cal["vector"])[:, 0]
    error = np.log(weights[0]) - (x - 0.5)
    inside = np.abs(x) < 2
    # Logits of probabilities are no straight line in x, so that the ratio is bent at its ends.
    assert np.abs(error[inside]).max() < (0.25 if features == "vector" else 0.75)
    assert np.abs(error[inside]).mean() < (0.1 if features == "vector" else 0.25)


def test_a_row_does_not_weigh_itself() -> None:
    """50 numbers of pure noise tell 60 rows apart, if a regression has seen them."""
    rng = np.random.default_rng(0)
    parts = []
    for name in ("c", "n"):
        rows = Dataset.from_dict({"id": [f"{name}{i}" for i in range(60)]})
        vectors = rng.normal(0, 1, (60, 50)).tolist()
        parts.append(with_columns(rows, {"vector": (vectors, List(Value("float32")))}))
    cal, new = parts
    means = []
    for rows in parts:
        found = add_shift_weights(rows, SPACE, calibration=cal, new=new, features="vector")
        means.append(float(np.log(found["shift_weight"]).mean()))
    assert abs(means[1] - means[0]) < 1.0
    x = [np.array(rows["vector"]) for rows in parts]
    seen = [np.log(likelihood_ratio(x[0], x[1], one)).mean() for one in x]
    assert seen[1] - seen[0] > 2.0


def test_weights_do_not_depend_on_order_or_company() -> None:
    cal, new = shifted(80, 0, seed=0, name="c"), shifted(60, 1, seed=1, name="n")
    whole = add_shift_weights(cal, SPACE, calibration=cal, new=new)["shift_weight"][:]
    order = np.random.default_rng(0).permutation(60)
    some = cal.select([5, 3, 70])
    found = add_shift_weights(some, SPACE, calibration=cal, new=new.select(order))
    assert found["shift_weight"][:] == [whole[5], whole[3], whole[70]]
    other = add_shift_weights(cal, SPACE, calibration=cal, new=new, seed=1)["shift_weight"][:]
    assert other != whole


def test_rows_that_are_surely_new_have_a_finite_weight() -> None:
    rng = np.random.default_rng(0)
    cal, new = rng.normal(0, 1, (100, 2)), rng.normal(60, 1, (50, 2))
    sure = likelihood_ratio(csr_array(cal), csr_array(new), csr_array(new))
    assert sure.tolist() == pytest.approx([99 * 100 / 50] * 50)


# ------------------------------------------------------------------------------------- bad input


def test_few_effective_rows_are_refused_or_warned_of() -> None:
    weights = np.ones(100)
    weights[0] = 40.0
    with pytest.raises(ValueError, match=r"alpha=0.05 needs at least 19 effective gold rows; the "):
        fit_weighted_conformal(table(100, seed=0, name="g", weights=weights), SPACE, alpha=0.05)
    effective = 139**2 / (1600 + 99)
    with pytest.warns(UserWarning, match=rf"{effective:.1f} effective gold rows of 100.* 0\.16; "):
        fitted = fit_weighted_conformal(
            table(100, seed=0, name="g", weights=weights), SPACE, alpha=0.1
        )
    assert fitted.effective_rows == pytest.approx(effective)
    nine = table(9, seed=0, name="g", weights=np.full(9, 0.7))
    with pytest.warns(UserWarning, match=r"9\.0 effective gold rows of 9"):
        fit_weighted_conformal(nine, SPACE, alpha=0.1)


def test_what_cannot_be_fitted_is_refused() -> None:
    rows, new = table(100, seed=0, name="g"), table(20, seed=1, name="n")
    wrong: list[tuple[Any, str]] = [
        (-1.0, "row with id 'g3' has the weight -1.0 in column 'shift_weight'"),
        (math.nan, "row with id 'g3' has the weight nan in column 'shift_weight'"),
        (math.inf, "row with id 'g3' has the weight inf in column 'shift_weight'"),
        (None, "row with id 'g3' has the weight nan in column 'shift_weight'"),
    ]
    for value, message in wrong:
        weights = [1.0, 1.0, 1.0, value, *[1.0] * 96]
        bad = with_columns(rows, {"shift_weight": (weights, Value("float32"))})
        with pytest.raises(ValueError, match=re.escape(message)):
            fit_weighted_conformal(bad, SPACE)
    with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1; got 1"):
        fit_weighted_conformal(rows, SPACE, alpha=1.0)
    with pytest.raises(ValueError, match="the column 'mine' is missing"):
        fit_weighted_conformal(rows, SPACE, column="mine")
    with pytest.raises(ValueError, match="column 'id' holds string; weights are numbers"):
        fit_weighted_conformal(rows, SPACE, column="id")
    many = LabelSpace(NAMES, NAMES, ("",) * 5, ((),) * 5, multilabel=True)
    with pytest.raises(ValueError, match="multi-label"):
        fit_weighted_conformal(rows, many)
    short = SoftLabels.from_dataset(rows, SPACE).top(1).add_to(rows)
    with pytest.raises(ValueError, match=r"alpha=0.1 is unreachable: gold rows with \d\.\d\d of "):
        fit_weighted_conformal(short, SPACE)
    fitted = fit_weighted_conformal(rows, SPACE)
    with pytest.raises(ValueError, match="the column 'shift_weight' is missing"):
        predict_weighted_sets(new.remove_columns("shift_weight"), SPACE, fitted)
    other = LabelSpace(NAMES[:4], NAMES[:4], ("",) * 4, ((),) * 4)
    with pytest.raises(ValueError, match=r"are of label space .*; fit them again"):
        predict_weighted_sets(new, other, fitted)


def test_what_cannot_be_weighed_is_refused() -> None:
    cal, new = shifted(20, 0, seed=0, name="c"), shifted(20, 1, seed=1, name="n")
    with pytest.raises(
        ValueError, match="20 rows are both in calibration and new, the first with "
    ):
        add_shift_weights(cal, SPACE, calibration=cal, new=cal)
    with pytest.raises(ValueError, match="folds must be at least 2; got 1"):
        add_shift_weights(cal, SPACE, calibration=cal, new=new, folds=1)
    with pytest.raises(ValueError, match=r"fold \d leaves 0 calibration rows and \d+ new rows"):
        add_shift_weights(cal, SPACE, calibration=cal.select([0]), new=new)
    rows = cal.remove_columns("vector")
    with pytest.raises(ValueError, match="the column 'vector' is missing"):
        add_shift_weights(rows, SPACE, calibration=rows, new=new, features="vector")
