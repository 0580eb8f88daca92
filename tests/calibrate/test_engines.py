"""Whose soft labels a fit is of: recorded, another model's refused, and forced, in every fit."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from pydantic import TypeAdapter

from llmlabel.calibrate.pac import fit_pac, predict_pac
from llmlabel.calibrate.per_label import fit_label_thresholds, predict_label_sets
from llmlabel.calibrate.powerset import fit_powerset, predict_powerset
from llmlabel.calibrate.risk import fit_risk, predict_risk_sets
from llmlabel.calibrate.scaling import apply_calibration, calibrate_probs
from llmlabel.calibrate.selective import fit_budget, fit_selective, route
from llmlabel.calibrate.temperature import apply_temperature, fit_temperature
from llmlabel.calibrate.trees import fit_subtrees, predict_subtrees
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def space(*, multilabel: bool) -> LabelSpace:
    names = ("bug", "praise", "other")
    return LabelSpace(names, names, ("",) * 3, ((),) * 3, multilabel)


def drawn(*, multilabel: bool, name: str = "row") -> Dataset:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(3, 0.2), 80)
    rows = {
        "id": [f"{name}{i}" for i in range(80)],
        "gold": [[int(rng.choice(3, p=row))] for row in probs],
    }
    labels = space(multilabel=multilabel)
    return SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict(rows))


def by(dataset: Dataset, *names: str | None) -> Dataset:
    engines = [names[row % len(names)] for row in range(len(dataset))]
    return dataset.add_column("engine", engines)


def budgeted(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_budget(dataset, drawn(multilabel=False, name="pool"), labels, people=5, **settings)


def selected(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return fit_selective(dataset, labels, target=0.5, **settings)


def scaled(dataset: Dataset, labels: LabelSpace, **settings: Any) -> Any:
    return calibrate_probs(dataset, labels, method="temperature", **settings)


PAIRS = [
    (budgeted, route, False),
    (fit_label_thresholds, predict_label_sets, True),
    (fit_label_thresholds, predict_label_sets, False),
    (fit_pac, predict_pac, False),
    (fit_powerset, predict_powerset, True),
    (fit_risk, predict_risk_sets, True),
    (fit_subtrees, predict_subtrees, False),
    (fit_temperature, apply_temperature, False),
    (fit_temperature, apply_temperature, True),
    (scaled, apply_calibration, False),
    (scaled, apply_calibration, True),
    (selected, route, False),
]


@pytest.mark.parametrize(("fit", "use", "multilabel"), PAIRS)
def test_soft_labels_of_another_engine_are_refused(
    fit: Callable[..., Any], use: Callable[..., Any], multilabel: bool
) -> None:
    rows, labels = drawn(multilabel=multilabel), space(multilabel=multilabel)
    fitted = fit(by(rows, "large", "small", None), labels)
    assert fitted.engines == ("large", "small")
    adapter = TypeAdapter(type(fitted))
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted

    plain = use(rows, labels, fitted)  # nothing is known of who made these
    same = use(by(rows, "small"), labels, fitted)
    assert same.remove_columns("engine").to_dict() == plain.to_dict()
    line = re.escape("fitted on soft labels of large, small, but these rows have those of tiny;")
    with pytest.raises(ValueError, match=line):
        use(by(rows, "tiny"), labels, fitted)
    forced = use(by(rows, "tiny"), labels, fitted, other_engine="allow")
    assert forced.remove_columns("engine").to_dict() == plain.to_dict()

    unknown = fit(rows, labels)
    assert unknown.engines == ()
    assert len(use(by(rows, "tiny"), labels, unknown)) == 80


@pytest.mark.parametrize(("fit", "use", "multilabel"), PAIRS)
def test_the_hash_is_of_the_gold_rows_in_any_order(
    fit: Callable[..., Any], use: Callable[..., Any], multilabel: bool
) -> None:
    rows, labels = drawn(multilabel=multilabel), space(multilabel=multilabel)
    order = np.random.default_rng(1).permutation(80)
    fitted, again = fit(rows, labels), fit(rows.select(order), labels)
    assert len(fitted.data_sha) == 64
    assert again.data_sha == fitted.data_sha
    gold = rows["gold"][:]
    gold[0] = [(gold[0][0] + 1) % 3]
    other = rows.remove_columns("gold").add_column("gold", gold)
    assert fit(other, labels).data_sha != fitted.data_sha


@pytest.mark.parametrize("fit", [fit_temperature, scaled])
def test_corrections_refuse_gold_rows_that_were_trained_on(fit: Callable[..., Any]) -> None:
    rows, labels = drawn(multilabel=False), space(multilabel=False)
    with pytest.raises(ValueError, match="12 of 80 gold rows are training rows too"):
        fit(rows, labels, training=rows.select(range(12)))
    other = drawn(multilabel=False, name="another")
    assert fit(rows, labels, training=other) == fit(rows, labels)


def test_a_first_threshold_above_all_tested_rows_is_told_as_such() -> None:
    from llmlabel.calibrate.quantile import row_uniforms

    labels, ids = space(multilabel=False), [f"row{i}" for i in range(80)]
    choosing = row_uniforms(ids, seed=0) < 0.2
    # Only rows that choose are sure and right; those to test are all less sure, and wrong.
    probs = np.where(choosing[:, None], [[0.9, 0.1, 0.0]], [[0.6, 0.4, 0.0]])
    rows = Dataset.from_dict({"id": ids, "gold": [[0] if sure else [1] for sure in choosing]})
    dataset = SoftLabels.from_dense(probs, labels).add_to(rows)
    count = int((~choosing).sum())
    line = f"none of the {count} gold rows to test is as confident as 0.9, the first threshold"
    with pytest.raises(ValueError, match=line):
        fit_selective(dataset, labels, target=0.1)
