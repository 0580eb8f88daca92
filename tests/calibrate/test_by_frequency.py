"""One isotonic curve for each tenth of the labels by frequency."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from scipy.sparse import csr_array

from llmlabel import metrics
from llmlabel.calibrate.by_frequency import MIN_HITS, apply_by_frequency, fit_by_frequency
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.venn_abers import fit_isotonic, isotonic
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

MANY = load_labels([f"l{i}" for i in range(20)], multilabel=True)
ONE = load_labels([f"l{i}" for i in range(20)])
COUNTS = np.array([*range(1, 20), 0])


def table(probs: Any, labels: LabelSpace, gold: Any, prefix: str = "r") -> Dataset:
    ids = [f"{prefix}{i}" for i in range(len(gold))]
    rows = with_columns(Dataset.from_dict({"id": ids}), {"gold": (gold, List(Value("int32")))})
    return SoftLabels(csr_array(probs), labels.fingerprint, labels.multilabel).add_to(rows)


def training(labels: LabelSpace) -> Dataset:
    gold = [[label] for label, count in enumerate(COUNTS) for _ in range(count)]
    return table(np.zeros((len(gold), 20)), labels, gold, "train")


def case(seed: int, labels: LabelSpace = MANY, rows: int = 400) -> Dataset:
    """Probabilities that are right for frequent labels and three times too high for rare ones."""
    rng = np.random.default_rng(seed)
    probs = rng.random((rows, 20)) * 0.9 + 0.05
    probs[rng.random(probs.shape) < 0.3] = 0.0
    true = rng.random(probs.shape) < probs / np.where(COUNTS < 11, 3, 1)
    if labels.multilabel:
        return table(probs, labels, [np.flatnonzero(row).tolist() for row in true])
    probs /= probs.sum(axis=1, keepdims=True)
    gold = [[int(rng.choice(20, p=row))] for row in probs]
    return table(probs, labels, gold)


@pytest.mark.parametrize("seed", range(20))
def test_each_group_has_the_curve_of_its_own_labels(seed: int) -> None:
    groups = 2 + seed % 2
    rows, counted = case(seed), training(MANY)
    fitted = fit_by_frequency(rows, MANY, training=counted, groups=groups)
    got = SoftLabels.from_dataset(
        apply_by_frequency(rows, MANY, fitted, training=counted), MANY
    ).dense()
    probs = SoftLabels.from_dataset(rows, MANY).dense()
    hits = np.array([[i in some for i in range(20)] for some in rows["gold"]])
    order = np.argsort(-COUNTS[:19], kind="stable")  # 19 labels that occur, all of other counts
    of = np.full(20, groups)
    of[order] = groups * (2 * np.arange(19) + 1) // 38
    for group in range(groups + 1):
        own = (probs > 0) & (of == group)
        source = own if hits[own].sum() >= MIN_HITS else probs > 0
        curve = fit_isotonic(probs[source], hits[source])
        expected = 0.999 * isotonic(curve, probs[own]) + 0.001 * probs[own]
        np.testing.assert_allclose(got[own], expected, rtol=1e-5)
    assert (got[probs == 0] == 0).all()


def test_new_rows_are_calibrated_among_rare_labels_too() -> None:
    fitted = fit_by_frequency(case(0, rows=3000), MANY, training=training(MANY), groups=2)
    new = case(1, rows=3000)
    rare = COUNTS < 11

    def error(rows: Dataset) -> float:
        dense = SoftLabels.from_dataset(rows, MANY).dense()[:, rare]
        hits = np.array([[i in some for i in range(20)] for some in rows["gold"]])[:, rare]
        kept = dense > 0
        table_of = metrics.binned(dense[kept], hits[kept].astype(float), binning="mass")
        return metrics.calibration_error(*table_of)

    assert error(new) > 0.25
    assert error(apply_by_frequency(new, MANY, fitted, training=training(MANY))) < 0.02


def test_the_order_of_equally_frequent_labels_stays_and_single_rows_keep_their_sum() -> None:
    rows = case(2, ONE)
    fitted = fit_by_frequency(rows, ONE, training=training(ONE), groups=1)
    found = SoftLabels.from_dataset(
        apply_by_frequency(rows, ONE, fitted, training=training(ONE)), ONE
    )
    before = SoftLabels.from_dataset(rows, ONE)
    np.testing.assert_allclose(found.probs.sum(axis=1), before.probs.sum(axis=1), rtol=1e-5)
    seen = before.dense()[:, :19], found.dense()[:, :19]  # the last label has no training row
    for was, now in zip(*seen, strict=True):
        steps = np.diff(now[np.argsort(was, kind="stable")])
        assert (steps >= 0).all()
        assert (steps[np.diff(np.sort(was)) > 1e-3] > 0).all()  # also where the curve is level


def test_groups_are_empty_where_counts_are_equal() -> None:
    gold = [[label] for label in range(20) for _ in range(3)]
    equal = table(np.zeros((60, 20)), MANY, gold, "train")
    fitted = fit_by_frequency(case(3), MANY, training=equal, groups=4)
    assert fitted.least == (4, 4, 3, 3)
    assert [curve is None for curve in fitted.curves] == [True, True, False, True, True]
    assert fitted.curves[2] == fitted.shared


def test_it_is_kept_as_json(tmp_path: Path) -> None:
    fitted = fit_by_frequency(case(0), MANY, training=training(MANY), groups=3)
    path = save_calibrator(fitted, tmp_path / "calibration.json")
    assert load_calibrator(path) == fitted
    assert json.loads(path.read_text())["type"].endswith("by_frequency.FrequencyCalibration")


def test_what_cannot_be_fitted_is_refused() -> None:
    rows, counted = case(0), training(MANY)
    with pytest.raises(ValueError, match="at least 10 rows with gold and a soft label; 9 of 9"):
        fit_by_frequency(rows.select(range(9)), MANY, training=counted)
    with pytest.raises(ValueError, match="gold rows are training rows too"):
        fit_by_frequency(rows, MANY, training=rows)
    tested = with_columns(rows, {"split": (["test"] * 400, Value("string"))})
    with pytest.raises(ValueError, match="400 of 400 rows are test rows"):
        fit_by_frequency(tested, MANY, training=counted)
    none = with_columns(rows, {"gold": ([[]] * 400, List(Value("int32")))})
    with pytest.raises(ValueError, match="no stored label is true"):
        fit_by_frequency(none, MANY, training=counted)
    fitted = fit_by_frequency(rows, MANY, training=counted)
    with pytest.raises(ValueError, match="label space"):
        apply_by_frequency(case(0, ONE), ONE, fitted, training=training(ONE))
