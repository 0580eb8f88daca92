"""Several sources of soft labels become one, with weights fitted on gold rows."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import score_fusion as reference
from scipy.sparse import csr_array

from llmlabel import metrics
from llmlabel.data import with_columns
from llmlabel.label.score_fusion import Fusion, fit_fusion, fuse, fusion_loss
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

MANY = load_labels([f"l{i}" for i in range(8)], multilabel=True)
ONE = load_labels([f"l{i}" for i in range(8)])


def table(
    probs: Any, labels: LabelSpace, gold: Any = None, prefix: str = "r", **columns: Any
) -> Dataset:
    size = probs.shape[0]
    ids = [f"{prefix}{i}" for i in range(size)]
    rows = Dataset.from_dict({"id": ids, "text": [f"text of {i}" for i in ids], **columns})
    if gold is not None:
        rows = with_columns(rows, {"gold": (gold, List(Value("int32")))})
    return SoftLabels(csr_array(probs), labels.fingerprint, labels.multilabel).add_to(rows)


def case(seed: int, labels: LabelSpace, rows: int = 30) -> tuple[dict[str, Dataset], Dataset]:
    """Two sources that see the truth dimly, one of them only few labels, and training rows."""
    rng = np.random.default_rng(seed)
    true = rng.random((rows, 8)) < 0.25
    if not labels.multilabel:
        true = np.eye(8, dtype=bool)[rng.integers(0, 8, rows)]
    gold = [np.flatnonzero(row).tolist() for row in true]
    sources = {}
    for name, noise, least in (("a", 2.0, -9.0), ("b", 1.0, 0.5)):
        logits = 2.0 * true - 1 + noise * rng.normal(size=true.shape)
        probs = np.where(logits > least, 1 / (1 + np.exp(-logits)), 0.0)
        if not labels.multilabel:
            probs = probs / np.maximum(probs.sum(axis=1, keepdims=True) * 1.1, 1e-9)
        sources[name] = table(probs, labels, gold)
    counted = rng.integers(0, 8, (40, 1)).tolist()
    return sources, table(np.zeros((40, 8)), labels, counted, "train")


def plain(sources: dict[str, Dataset]) -> list[list[dict[int, float]]]:
    return [
        [
            dict(zip(ids, probs, strict=True))
            for ids, probs in zip(rows["label_ids"], rows["label_probs"], strict=True)
        ]
        for rows in sources.values()
    ]


def counts(training: Dataset) -> list[int]:
    return np.bincount([label for some in training["gold"] for label in some], minlength=8).tolist()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("labels", [MANY, ONE], ids=["multi", "single"])
def test_fusion_equals_the_loop(seed: int, labels: LabelSpace) -> None:
    sources, training = case(seed, labels)
    fusion = fit_fusion(sources, labels, training=training)
    weights = [w for some in fusion.weights for w in some] + [fusion.frequency]
    how = (counts(training), weights, fusion.bias, labels.multilabel)
    golds = sources["a"]["gold"][:]
    assert fusion.nll == pytest.approx(reference.nll(plain(sources), golds, *how), rel=1e-4)
    got = fuse(sources, labels, fusion=fusion, training=training, k=5)
    for row in range(30):
        expected = reference.fused(plain(sources), row, *how)
        best = sorted(expected, key=lambda label: (-expected[label], label))[:5]
        ids, probs = got["label_ids"][row], got["label_probs"][row]
        assert ids == best
        np.testing.assert_allclose(probs, [expected[i] for i in best], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("multilabel", [True, False])
def test_gradients_equal_finite_differences(seed: int, multilabel: bool) -> None:
    rng = np.random.default_rng(seed)
    logits, row = rng.normal(size=12), np.sort(rng.integers(0, 4, 12))
    hits = np.zeros(12)
    for own in np.unique(row):  # one true label a row, or none
        hits[rng.choice(np.flatnonzero(row == own))] = rng.integers(0, 2)
    _, gradient = fusion_loss(logits, hits, row, 4, multilabel=multilabel)
    for i in range(12):
        step = np.eye(12)[i] * 1e-6
        up, _ = fusion_loss(logits + step, hits, row, 4, multilabel=multilabel)
        down, _ = fusion_loss(logits - step, hits, row, 4, multilabel=multilabel)
        assert gradient[i] == pytest.approx((up - down) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("labels", [MANY, ONE], ids=["multi", "single"])
def test_the_fit_is_a_minimum_and_beats_each_source(labels: LabelSpace) -> None:
    sources, training = case(3, labels, rows=600)
    fusion = fit_fusion(sources, labels, training=training)
    golds, how = sources["a"]["gold"][:], (counts(training),)
    weights = [w for some in fusion.weights for w in some] + [fusion.frequency]
    for i in np.flatnonzero(weights):  # a source that stores all labels has none that is absent
        for step in (0.5, -0.5):
            moved = [w + step * (i == j) for j, w in enumerate(weights)]
            args = (*how, moved, fusion.bias, labels.multilabel)
            assert reference.nll(plain(sources), golds, *args) > fusion.nll
    new, _ = case(4, labels, rows=600)  # rows that the weights have not seen
    fused = fuse(new, labels, fusion=fusion, training=training)
    alone = {
        name: fuse(
            {name: rows},
            labels,
            fusion=fit_fusion({name: sources[name]}, labels, training=training),
            training=training,
        )
        for name, rows in new.items()
    }
    best = first_right(fused, new["a"])
    assert all(best > first_right(rows, new["a"]) + 0.02 for rows in alone.values())


def first_right(found: Dataset, gold: Dataset) -> float:
    pairs = zip(found["label_ids"], gold["gold"], strict=True)
    return float(np.mean([bool(ids) and ids[0] in true for ids, true in pairs]))


def test_probabilities_are_calibrated_on_new_rows() -> None:
    sources, _ = case(0, MANY, rows=1500)
    new, _ = case(1, MANY, rows=1500)
    fused = fuse(new, MANY, fusion=fit_fusion(sources, MANY))
    dense = SoftLabels.from_dataset(fused, MANY).dense().ravel()
    hits = np.array([[i in true for i in range(8)] for true in new["a"]["gold"]]).ravel()
    kept = dense > 0
    table_of = metrics.binned(dense[kept], hits[kept].astype(float), binning="mass")
    assert metrics.calibration_error(*table_of) < 0.02


def test_none_of_the_labels_is_missing_mass() -> None:
    probs = np.zeros((400, 8))
    probs[:, :2] = 0.4  # the source never stores the true label 5 of every fourth row
    gold = [[5] if i % 4 == 0 else [i % 2] for i in range(400)]
    source = {"a": table(probs, ONE, gold)}
    fusion = fit_fusion(source, ONE)
    assert fusion.ceiling == 0.75
    soft = SoftLabels.from_dataset(fuse(source, ONE, fusion=fusion), ONE)
    np.testing.assert_allclose(soft.missing_mass, 0.25, atol=5e-3)


def test_rows_are_found_by_id_and_their_order_does_not_matter() -> None:
    sources, training = case(5, MANY)
    turned = sources["b"].select(range(29, -1, -1))
    fusion = fit_fusion(sources, MANY, training=training)
    again = fit_fusion({"a": sources["a"], "b": turned}, MANY, training=training)
    assert again == fusion
    got = fuse({"a": sources["a"], "b": turned}, MANY, fusion=fusion, training=training)
    expected = fuse(sources, MANY, fusion=fusion, training=training)
    assert got["label_probs"] == expected["label_probs"]
    swapped = fuse({"b": sources["b"], "a": sources["a"]}, MANY, fusion=fusion, training=training)
    assert swapped["label_probs"] == expected["label_probs"]


def test_labels_that_come_later_need_no_fit() -> None:
    sources, _ = case(6, MANY)
    fusion = fit_fusion(sources, MANY)
    more = load_labels([f"l{i}" for i in range(9)], multilabel=True)
    wide = {
        name: table(np.hstack([SoftLabels.from_dataset(rows, MANY).dense(), [[0.9]] * 30]), more)
        for name, rows in sources.items()
    }
    got = fuse(wide, more, fusion=fusion)
    assert all(8 in ids for ids in got["label_ids"])


def test_a_fusion_is_json() -> None:
    sources, training = case(7, MANY)
    fusion = fit_fusion(sources, MANY, training=training)
    kept = json.dumps(TypeAdapter(Fusion).dump_python(fusion, mode="json"))
    assert TypeAdapter(Fusion).validate_json(kept) == fusion
    assert fusion.engines == {"a": (), "b": ()}


def test_errors_say_why_a_row_has_no_label() -> None:
    probs = np.array([[0.5] * 8, [0.0] * 8, [0.5] * 8, [0.0] * 8])
    a = table(probs, MANY, error=["text cut: 9 tokens", "empty text", "unreadable", None])
    b = table(np.array([[0.1] * 8, [0.0] * 8, [0.1] * 8, [0.0] * 8]), MANY, error=[None] * 4)
    sources, _ = case(8, MANY)
    got = fuse({"a": a, "b": b}, MANY, fusion=fit_fusion(sources, MANY))
    assert got["error"] == ["text cut: 9 tokens", "empty text", None, "no source has a label"]
    assert [bool(ids) for ids in got["label_ids"]] == [True, False, True, False]
    assert got["engine"][0].startswith("fusion:a+b@")


def test_what_cannot_be_fused_is_refused() -> None:
    sources, training = case(9, MANY)
    fusion = fit_fusion(sources, MANY, training=training)

    def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            call(*args, **options)

    few = {name: rows.select(range(9)) for name, rows in sources.items()}
    refused("a fusion needs at least 10 rows with gold; 9 have it", fit_fusion, few, MANY)
    refused("sources is empty", fit_fusion, {}, MANY)
    silent = {name: table(np.zeros((30, 8)), MANY, [[0]] * 30) for name in "xy"}
    said = r"no source \(x, y\) stores a label for any of the 30 rows with gold"
    refused(said, fit_fusion, silent, MANY)
    shorter = sources | {"b": sources["b"].select(range(5, 30))}
    refused("the row with id 'r0' is not in source 'b'", fit_fusion, shorter, MANY)
    refused("gold rows are training rows too", fit_fusion, sources, MANY, training=sources["a"])
    tested = with_columns(sources["a"], {"split": (["test"] * 30, Value("string"))})
    refused("30 of 30 rows are test rows", fit_fusion, sources | {"a": tested}, MANY)
    other = with_columns(sources["b"], {"text": (["x"] * 30, Value("string"))})
    refused("'r0' has another text in source 'b'", fit_fusion, sources | {"b": other}, MANY)
    refused("source 'a': the rows carry soft labels of label space", fit_fusion, sources, ONE)
    alone = {"a": sources["a"]}
    refused("fitted on the sources a, b; got a", fuse, alone, MANY, fusion=fusion)
    refused("give training= as in its fit", fuse, sources, MANY, fusion=fusion)
    refused("k must be at least 1", fuse, sources, MANY, fusion=fusion, training=training, k=0)
    single = dataclasses.replace(fusion, multilabel=False)
    refused("is of the other kind; fit it again", fuse, sources, MANY, fusion=single)
