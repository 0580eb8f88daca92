import dataclasses
import math

import numpy as np
import pytest
from datasets import Dataset
from pydantic import TypeAdapter
from reference import metrics as slow
from reference import scaling as reference

from llmlabel import metrics
from llmlabel.calibrate.scaling import (
    Calibration,
    apply_calibration,
    calibrate_probs,
)
from llmlabel.calibrate.temperature import apply_temperature, fit_temperature
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def table(probs: np.ndarray, gold: list[list[int]], labels: LabelSpace) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(probs, labels).add_to(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def drawn(rng: np.random.Generator, probs: np.ndarray) -> list[list[int]]:
    return [[int(rng.choice(len(row), p=row))] for row in probs]


def several(seed: int, rows: int, *, slope: float, bias: list[float]) -> tuple[Dataset, LabelSpace]:
    """Each label true with its own probability; said with other log-odds."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-0.5, 1.5, (rows, len(bias)))
    true = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    said = 1 / (1 + np.exp(-(logits * slope + np.array(bias))))
    labels = space(len(bias), multilabel=True)
    return table(said, [np.flatnonzero(row).tolist() for row in true], labels), labels


def test_each_method_finds_what_was_done_to_the_probabilities() -> None:
    """Gold drawn as the said probabilities say, or from a temperature, weights, a mixture of these."""
    rng = np.random.default_rng(0)
    said = softmax(rng.normal(0, 1.5, (800, 4)))
    logs, labels = np.log(said), space(4)
    mixing = np.eye(4) + np.array([[0, 0.8, 0, 0], [0, 0, -0.6, 0], [0.5, 0, 0, 0.6], [0, 0, 0, 0]])
    cases = {
        "none": logs,
        "temperature": logs / 3,
        "vector": logs * [0.5, 2, 1, 1] + [1.0, 0, -1, 0],
        "dirichlet": logs @ mixing.T,
    }
    for name, logits in cases.items():
        gold = drawn(rng, softmax(logits))
        found = calibrate_probs(table(said, gold, labels), labels)
        near = {name, "vector"} if name == "temperature" else {name}
        assert found.correction.method in near, found.tried
        best = metrics.nll(softmax(logits), np.array(gold)[:, 0])
        assert found.after.nll == pytest.approx(best, abs=0.03)
        if name == "none":
            assert found.after == found.before
        else:
            assert found.after.nll < found.before.nll - 0.03
            assert found.after.ece < found.before.ece
            assert found.after.brier < found.before.brier


def test_an_odd_shape_is_found_by_a_curve() -> None:
    """Two labels; said probabilities jump where nothing happens."""
    rng = np.random.default_rng(1)
    true = rng.uniform(0.1, 0.9, 3000)
    said = np.where(
        true < 0.5, true * 0.2, np.where(true < 0.7, 0.5 + true * 0.01, 0.98 + true / 50)
    )
    labels = space(2)
    gold = [[int(hit)] for hit in rng.random(3000) < true]
    dataset = table(np.column_stack([1 - said, said]), gold, labels)
    found = calibrate_probs(dataset, labels)
    assert found.correction.method == "venn_abers"
    applied = SoftLabels.from_dataset(apply_calibration(dataset, labels, found), labels).dense()
    assert np.abs(applied[:, 1] - true).mean() < 0.05
    single = calibrate_probs(dataset, labels, method="isotonic")
    assert single.after.nll == pytest.approx(found.after.nll, abs=0.01)


def test_several_labels_each_for_itself() -> None:
    dataset, labels = several(0, 800, slope=2.5, bias=[0.0] * 3)
    assert calibrate_probs(dataset, labels).correction.method == "temperature"
    dataset, labels = several(1, 800, slope=1.0, bias=[2.0, -2.0, 0.0])
    found = calibrate_probs(dataset, labels)
    assert found.correction.method == "vector"
    assert found.correction.bias == pytest.approx([-2, 2, 0], abs=0.5)
    assert found.after.nll < found.before.nll - 0.1
    assert set(found.skipped) == {"dirichlet"}


@pytest.mark.parametrize("method", ["isotonic", "venn_abers"])
def test_numbers_before_and_after_are_those_of_rows_not_fitted_on(method: str) -> None:
    """Gold without any relation to what is said: curves know the rows that they were fitted on."""
    rng = np.random.default_rng(2)
    share = rng.uniform(0.3, 0.7, 60)
    gold = [[int(k)] for k in rng.integers(0, 2, 60)]
    labels = space(2)
    dataset = table(np.column_stack([1 - share, share]), gold, labels)
    found = calibrate_probs(dataset, labels, method=method)
    fitted = SoftLabels.from_dataset(apply_calibration(dataset, labels, found), labels).dense()
    own = metrics.nll(fitted, np.array(gold)[:, 0])
    assert own < found.after.nll - 0.02
    assert found.tried == {method: found.after.nll}


def test_numbers_equal_the_metrics() -> None:
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(3), 50)
    probs[rng.random(50) < 0.2, 2] = 0  # gold may lie outside what is stored
    labels, gold = space(3), drawn(rng, np.full((50, 3), 1 / 3))
    dataset = table(probs, gold, labels)
    before = calibrate_probs(dataset, labels, method="temperature").before
    stored = SoftLabels.from_dataset(dataset, labels).dense().tolist()
    index = [g for [g] in gold]
    assert before.nll == pytest.approx(slow.nll(stored, index, 1e-12))
    assert before.brier == pytest.approx(slow.brier(stored, index))
    assert before.ece == pytest.approx(slow.ece(stored, index, 10, "mass"))
    dataset, labels = several(4, 50, slope=2.0, bias=[0.5, 0.0])
    before = calibrate_probs(dataset, labels, method="vector").before
    stored = SoftLabels.from_dataset(dataset, labels).dense()
    true = np.array([[k in row for k in range(2)] for row in dataset["gold"]])
    assert before.brier == pytest.approx(((stored - true) ** 2).mean())
    losses = [math.log(p if t else 1 - p) for p, t in zip(stored.flat, true.flat, strict=True)]
    assert before.nll == pytest.approx(-sum(losses) / 100)


@pytest.mark.parametrize("multilabel", [False, True])
def test_temperature_is_that_of_the_module_temperature(multilabel: bool) -> None:
    rng = np.random.default_rng(5)
    if multilabel:
        dataset, labels = several(5, 200, slope=2.0, bias=[0.0, 0.0])
    else:
        logits, labels = rng.normal(0, 1, (200, 3)), space(3)
        dataset = table(softmax(logits * 2), drawn(rng, softmax(logits)), labels)
    found = calibrate_probs(dataset, labels, method="temperature")
    alone = fit_temperature(dataset, labels)
    assert found.correction.temperature == pytest.approx(alone.value, rel=1e-3)
    assert found.before.nll == pytest.approx(alone.nll_before, rel=1e-9)
    pair = apply_calibration(dataset, labels, found), apply_temperature(dataset, labels, alone)
    one, other = (SoftLabels.from_dataset(rows, labels).dense() for rows in pair)
    np.testing.assert_allclose(one, other, rtol=5e-3)


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic", "venn_abers", "dirichlet"])
def test_the_missing_mass_and_what_is_not_stored_stay(method: str) -> None:
    rng = np.random.default_rng(6)
    probs = rng.dirichlet(np.ones(2), 60) * rng.uniform(0.6, 1, (60, 1))
    probs[:5, 0] = 0
    probs[5:8] = 0
    labels = space(2)
    dataset = table(probs, drawn(rng, np.full((60, 2), 0.5)), labels)
    found = calibrate_probs(dataset, labels, method=method)
    after = SoftLabels.from_dataset(apply_calibration(dataset, labels, found), labels)
    np.testing.assert_allclose(after.dense().sum(axis=1), probs.sum(axis=1), atol=1e-6)
    assert (after.dense()[probs == 0] == 0).all()
    assert np.abs(after.dense() - probs)[8:].max() > 0.01
    assert found.rows == 57


@pytest.mark.parametrize("multilabel", [False, True])
def test_intervals_hold_the_probability_in_the_order_of_the_labels(multilabel: bool) -> None:
    rng = np.random.default_rng(7)
    probs = rng.dirichlet(np.ones(2), 40) * rng.uniform(0.6, 1, (40, 1))
    labels = space(2, multilabel=multilabel)
    gold = [[k] if rng.random() < 0.8 else [] for k in rng.integers(0, 2, 40).tolist()]
    dataset = table(probs, gold, labels)
    found = calibrate_probs(dataset, labels, method="venn_abers")
    applied = apply_calibration(dataset, labels, found)
    stored = SoftLabels.from_dataset(dataset, labels).dense()
    known = [row for row, g in enumerate(gold) if g or multilabel]
    for i, row in enumerate(applied):
        whole = 1.0 if multilabel else stored[i].sum()
        for label, p, low, high in zip(
            row["label_ids"], row["label_probs"], row["label_low"], row["label_high"], strict=True
        ):
            twin = reference.venn_abers(
                [stored[j, label] / (1.0 if multilabel else stored[j].sum()) for j in known],
                [label in gold[j] for j in known],
                stored[i, label] / whole,
            )
            assert (low / whole, high / whole) == pytest.approx(twin, abs=1e-6)
            assert low - 1e-6 <= p <= high + 1e-6
            p0, p1 = twin
            assert p / whole == pytest.approx(p1 / (1 - p0 + p1), abs=1e-6)


def test_a_label_without_gold_keeps_the_temperature() -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 1, (300, 4))
    true = softmax(logits - [0, 0, 0, 1e3])
    labels = space(4)
    dataset = table(softmax(logits * 2), drawn(rng, true), labels)
    for method in ("vector", "dirichlet"):
        found = calibrate_probs(dataset, labels, method=method)
        start = 1 / found.correction.temperature
        weight = np.array(found.correction.weight).reshape(4, -1)[3]
        assert weight.tolist() == ([start] if method == "vector" else [0, 0, 0, start])
        assert found.correction.bias[3] == 0
        assert found.correction.bias[0] != 0
        assert found.labels_without_gold == 1
    curves = calibrate_probs(dataset, labels, method="isotonic").correction.curves
    assert curves[3] is None
    assert curves[2] is not None


def test_neither_the_order_of_the_rows_nor_rows_that_say_nothing_change_a_bit() -> None:
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 1, (60, 3))
    labels = space(3)
    probs, gold = softmax(logits * 2), drawn(rng, softmax(logits))
    probs[0] = 0
    dataset = table(probs, [gold[0], [], *gold[2:]], labels)
    found = calibrate_probs(dataset, labels)
    assert found.rows == 58
    assert calibrate_probs(dataset.select(rng.permutation(60)), labels) == found
    assert calibrate_probs(dataset.select(range(2, 60)), labels) == found
    other = calibrate_probs(dataset, labels, seed=1)
    assert other.after != found.after


def test_few_rows_do_not_choose_what_they_cannot_tell() -> None:
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 1, (40, 3))
    dataset = table(softmax(logits), drawn(rng, softmax(logits)), space(3))
    few = calibrate_probs(dataset.select(range(10)), space(3))
    assert set(few.tried) == {"none", "temperature"}
    assert few.skipped["vector"] == "it is tried with at least 30 rows, not 10"
    some = calibrate_probs(dataset, space(3))
    assert "vector at strength 0.01" in some.tried
    assert "isotonic" not in some.tried
    asked = calibrate_probs(dataset.select(range(10)), space(3), method="isotonic")
    assert (asked.correction.method, asked.skipped) == ("isotonic", {})


def test_what_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(11)
    labels = space(3)
    dataset = table(rng.dirichlet(np.ones(3), 12), [[0], [1], [2]] * 3 + [[]] * 3, labels)
    with pytest.raises(ValueError, match=r"at least 10 rows .* 9 of 12 rows have both"):
        calibrate_probs(dataset, labels)
    with pytest.raises(ValueError, match="folds must be at least 2; got 1"):
        calibrate_probs(dataset, labels, folds=1)
    with pytest.raises(ValueError, match=r"venn_abers cannot be used: .* two labels, not 3"):
        calibrate_probs(dataset, labels, method="venn_abers")
    with pytest.raises(
        ValueError, match="label_temperature cannot be used: it needs a multi-label"
    ):
        calibrate_probs(dataset, labels, method="label_temperature")
    with pytest.raises(
        ValueError, match=r"dirichlet cannot be used: it needs a label space of one"
    ):
        calibrate_probs(dataset, space(3, multilabel=True), method="dirichlet")
    parts = dataset.add_column("split", ["validation"] * 8 + ["test"] * 4)
    with pytest.raises(ValueError, match="4 of 12 rows are test rows"):
        calibrate_probs(parts, labels)
    for method, many in (("dirichlet", 101), ("vector", 2001), ("isotonic", 2001)):
        with pytest.raises(
            ValueError, match=rf"at most {many - 1} .* not {many} \(use temperature\)"
        ):
            calibrate_probs(dataset, space(many), method=method)


def test_many_labels_leave_the_temperature_and_say_why() -> None:
    rng = np.random.default_rng(12)
    labels = space(2500)
    probs = np.zeros((40, 2500))
    gold = []
    for row in probs:
        ids = rng.choice(2500, 5, replace=False)
        row[ids] = softmax(rng.normal(0, 1, (1, 5)))[0]
        gold.append([int(rng.choice(ids, p=row[ids]))])
    found = calibrate_probs(table(probs**3, gold, labels), labels)
    assert set(found.tried) == {"none", "temperature"}
    assert found.skipped["dirichlet"].endswith("at most 100 labels, not 2500 (use temperature)")
    assert set(found.skipped) == {
        "label_temperature",
        *(["vector", "isotonic", "venn_abers", "dirichlet"]),
    }


def test_a_calibration_survives_json_and_belongs_to_its_label_space() -> None:
    rng = np.random.default_rng(13)
    labels = space(2)
    probs = rng.dirichlet(np.ones(2), 40)
    dataset = table(probs, drawn(rng, probs), labels)
    adapter = TypeAdapter(Calibration)
    for method in ("auto", "vector", "venn_abers", "dirichlet"):
        found = calibrate_probs(dataset, labels, method=method)
        kept = adapter.validate_json(adapter.dump_json(found))
        assert kept == found
        again = apply_calibration(dataset, labels, kept)
        assert (
            again["label_probs"][:] == apply_calibration(dataset, labels, found)["label_probs"][:]
        )
    strange = dataclasses.replace(found, label_space="0123456789abcdef")
    with pytest.raises(ValueError, match=r"in label space 0123456789abcdef, .* fit it again"):
        apply_calibration(dataset, labels, strange)


@pytest.mark.parametrize("method", ["isotonic", "venn_abers"])
def test_curves_where_nothing_is_stored(method: str) -> None:
    """No new row has a soft label, or no gold row stores both of two labels."""
    labels = space(2)
    multilabel = space(2, multilabel=True)
    rng = np.random.default_rng(0)
    share = rng.uniform(0.1, 0.9, 60)
    probs, gold = np.column_stack([1 - share, share]), [[int(s > 0.5)] for s in share]
    for where in (labels, multilabel):
        found = calibrate_probs(table(probs, gold, where), where, method=method)
        for rows in (0, 3):
            new = table(np.zeros((rows, 2)), [[0]] * rows, where)
            applied = apply_calibration(new, where, found)
            assert applied["label_ids"][:] == [[]] * rows
    one = np.zeros((60, 2))
    one[np.arange(60), np.arange(60) % 2] = 0.9
    found = calibrate_probs(table(one, gold, labels), labels, method=method)
    assert found.after.nll == found.before.nll
