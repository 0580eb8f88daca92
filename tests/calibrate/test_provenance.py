"""Gold rows that a model was trained on, soft labels of another model, and far too small alphas."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.cross import fit_cross_conformal, predict_cross_sets
from llmlabel.calibrate.groups import fit_class_conformal, fit_group_conformal, predict_group_sets
from llmlabel.calibrate.noise import fit_noisy_conformal, predict_noisy_sets
from llmlabel.calibrate.online import predict_online_sets, start_online, update_online
from llmlabel.calibrate.p_values import p_values
from llmlabel.calibrate.pac import fit_pac
from llmlabel.calibrate.per_label import fit_label_thresholds
from llmlabel.calibrate.powerset import fit_powerset
from llmlabel.calibrate.provenance import one_of
from llmlabel.calibrate.risk import fit_risk
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.selective import fit_budget, fit_selective
from llmlabel.calibrate.shift import fit_weighted_conformal, predict_weighted_sets
from llmlabel.calibrate.trees import fit_subtrees
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def space(*, multilabel: bool) -> LabelSpace:
    names = ("bug", "praise", "other")
    return LabelSpace(names, names, ("",) * 3, ((),) * 3, multilabel)


def drawn(count: int, *, multilabel: bool, name: str = "row") -> Dataset:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(3, 0.2), count)
    rows = {
        "id": [f"{name}{i}" for i in range(count)],
        "text": [f"text {i}" for i in range(count)],
        "gold": [[int(rng.choice(3, p=row))] for row in probs],
    }
    wrong = rng.random(count) < 0.1
    rows["crowd"] = [
        [(gold[0] + one) % 3] for gold, one in zip(rows["gold"], wrong.tolist(), strict=True)
    ]
    rows["split"] = [f"f{i % 2}" for i in range(count)]
    rows["shift_weight"] = [1.0] * count
    labels = space(multilabel=multilabel)
    return SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict(rows))


def by(dataset: Dataset, *engines: str) -> Dataset:
    """With soft labels said to be of these models, one row after the other."""
    names = [engines[i % len(engines)] for i in range(len(dataset))]
    kept = [name for name in dataset.column_names if name != "engine"]
    return dataset.select_columns(kept).add_column("engine", names)


def budgeted(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    pool = drawn(20, multilabel=False, name="pool")
    return fit_budget(dataset, pool, labels, people=5, **settings)


def selected(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_selective(dataset, labels, target=0.5, **settings)


def grouped(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_group_conformal(dataset, labels, column="split", **settings)


def noisy(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_noisy_conformal(dataset, labels, column="crowd", noise=0.1, **settings)


def crossed(dataset: Dataset, labels: LabelSpace, fitted: Any, **settings: Any) -> Dataset:
    folds = dict.fromkeys(fitted.folds, dataset)
    return predict_cross_sets(dataset, labels, fitted, folds=folds, **settings)


def weighted(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_weighted_conformal(dataset, labels, **settings)


SETS = [
    (fit_conformal, predict_sets),
    (fit_conformal, p_values),
    (fit_class_conformal, predict_group_sets),
    (grouped, predict_group_sets),
    (weighted, predict_weighted_sets),
    (noisy, predict_noisy_sets),
    (start_online, predict_online_sets),
    (start_online, update_online),
    (fit_cross_conformal, crossed),
]
"""Fits of sets, and what takes their thresholds."""

FITS = [
    *((fit, False) for fit in dict.fromkeys(fit for fit, _ in SETS)),
    (budgeted, False),
    (fit_label_thresholds, True),
    (fit_pac, False),
    (fit_powerset, True),
    (fit_risk, True),
    (fit_subtrees, False),
    (selected, False),
]


@pytest.mark.parametrize(("fit", "multilabel"), FITS)
def test_gold_rows_that_were_trained_on_are_refused(
    fit: Callable[..., Any], multilabel: bool
) -> None:
    rows, labels = drawn(80, multilabel=multilabel), space(multilabel=multilabel)
    line = re.escape("12 of 80 gold rows are training rows too")
    with pytest.raises(ValueError, match=line):
        fit(rows, labels, training=rows.select(range(12)))
    with pytest.raises(ValueError, match="training have no column id"):
        fit(rows, labels, training=rows.remove_columns("id"))
    # Row numbers as ids are the same in any two files: the text decides.
    other = rows.map(lambda row: {"text": f"another {row['text']}"})
    assert fit(rows, labels, training=other) == fit(rows, labels)


@pytest.mark.parametrize(("fit", "multilabel"), [(fit_powerset, True), (fit_subtrees, False)])
def test_the_rows_that_a_tiny_alpha_needs_are_known_at_once(
    fit: Callable[..., Any], multilabel: bool
) -> None:
    rows, labels = drawn(10, multilabel=multilabel), space(multilabel=multilabel)
    start = time.process_time()
    with pytest.raises(ValueError, match="needs n >= 999999 gold rows; there are 10"):
        fit(rows, labels, alpha=1e-6)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(("fit", "predict"), SETS)
def test_soft_labels_of_another_model_are_refused(
    fit: Callable[..., Any], predict: Callable[..., Dataset], tmp_path: Path
) -> None:
    labels = space(multilabel=False)
    rows = by(drawn(80, multilabel=False), "student a")
    fitted = fit(rows, labels)
    single = fit is not fit_cross_conformal
    assert fitted.engines == (("student a",) if single else (("student a",), ("student a",)))
    assert re.fullmatch("[0-9a-f]{64}", fitted.data_sha)
    shuffled = rows.shuffle(seed=1)
    assert fit(shuffled, labels).data_sha == fitted.data_sha
    assert fit(rows.select(range(79)), labels).data_sha != fitted.data_sha
    assert load_calibrator(save_calibrator(fitted, tmp_path / "fitted.json")) == fitted

    new = by(drawn(20, multilabel=False, name="new"), "student a")
    new = new.add_column("set_ids", [[0]] * 20)
    made = predict(new, labels, fitted)
    mixed = by(new, "student b", "student a")
    line = (
        "the threshold was fitted on soft labels of student a, but these rows have those of "
        "student a, student b; "
    )
    with pytest.raises(ValueError, match=re.escape(line)):
        predict(mixed, labels, fitted)
    forced = predict(mixed, labels, fitted, other_engine="allow")
    unknown = predict(mixed, labels, replace(fitted, engines=()))  # as from an older file
    if isinstance(made, Dataset):
        column = "p_value" if predict is p_values else "set_ids"
        assert forced[column][:] == made[column][:] == unknown[column][:]
    else:
        assert forced == made == replace(unknown, engines=fitted.engines)


def test_each_fold_has_its_own_model() -> None:
    labels = space(multilabel=False)
    rows = by(drawn(80, multilabel=False), "model 0", "model 1")  # of folds f0 and f1
    fitted = fit_cross_conformal(rows, labels)
    assert fitted.engines == (("model 0",), ("model 1",))
    new = drawn(20, multilabel=False, name="new")
    folds = {"f0": by(new, "model 0"), "f1": by(new, "model 1")}
    made = predict_cross_sets(new, labels, fitted, folds=folds)
    folds = {"f0": folds["f1"], "f1": folds["f0"]}
    with pytest.raises(
        ValueError, match="soft labels of model 0, but these rows have those of mod"
    ):
        predict_cross_sets(new, labels, fitted, folds=folds)
    forced = predict_cross_sets(new, labels, fitted, folds=folds, other_engine="allow")
    assert forced["set_ids"][:] == made["set_ids"][:]


def test_a_choice_that_is_none_is_named() -> None:
    kind = Literal["uniform", "matrix"]
    one_of("noise", "matrix", kind)
    line = "noise must be one of 'uniform', 'matrix'; got 'unifrm'"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        one_of("noise", "unifrm", kind)
