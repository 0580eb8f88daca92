import numpy as np
import pytest
from datasets import Dataset
from reference import aggregate as reference

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.refine.aggregate import aggregate, consensus_confidence
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])


def source(probs: np.ndarray, labels: LabelSpace = LABELS) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    return SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict({"id": ids, "text": ids}))


def dense(dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0, 1.0, 1.0], size=(rng.integers(1, 6), 7))
    sources = {f"s{i}": source(p) for i, p in enumerate(probs)}
    got = aggregate(sources, LABELS)
    for row in range(7):
        expected = reference.log_average(probs[:, row].tolist())
        np.testing.assert_allclose(dense(got)[row], expected, atol=1e-6)
        confidence = reference.confidence(probs[:, row].tolist(), int(np.argmax(expected)))
        assert got["weight"][row] == pytest.approx(min(confidence, 1.0) ** 2, abs=1e-6)
    average = aggregate(sources, LABELS, method="average")
    np.testing.assert_allclose(dense(average), probs.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("spread", "members", "value"),
    [
        (0, 2, 1.0),
        (0, 3, 1.05),
        (0, 4, 1.1),
        (0, 5, 1.1),
        (0.35, 2, 0.965605),
        (0.35, 4, 1.062166),
        (1, 2, 0.904837),
    ],
)
def test_golden_consensus(spread: float, members: int, value: float) -> None:
    assert reference.consensus(spread, members) == pytest.approx(value, abs=1e-6)


def test_identical_sources_have_no_spread() -> None:
    probs = np.array([[[0.8, 0.1, 0.1]]] * 4)
    got = consensus_confidence(probs, np.array([0]))
    assert got[0] == pytest.approx(0.8 * 1.1, rel=1e-12)


def test_majority_and_weights() -> None:
    probs = [np.array([[0.6, 0.4, 0.0]]), np.array([[0.0, 0.9, 0.1]]), np.array([[0.1, 0.8, 0.1]])]
    sources = {n: source(p) for n, p in zip("xyz", probs, strict=True)}
    np.testing.assert_allclose(
        dense(aggregate(sources, LABELS, method="majority")), [[1 / 3, 2 / 3, 0]], atol=1e-6
    )
    weighted = aggregate(sources, LABELS, method="majority", weights={"x": 2.0, "y": 1.0, "z": 1.0})
    np.testing.assert_allclose(dense(weighted), [[0.5, 0.5, 0]], atol=1e-6)
    assert weighted["votes"][0] == [
        {"source": "x", "label_id": 0, "prob": pytest.approx(0.6)},
        {"source": "y", "label_id": 1, "prob": pytest.approx(0.9)},
        {"source": "z", "label_id": 1, "prob": pytest.approx(0.8)},
    ]
    assert weighted["engine"][0] == "x + y + z"


def test_who_has_no_label_does_not_vote() -> None:
    sources = {
        "x": source(np.array([[0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])),
        "y": source(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])),
    }
    for method in ("average", "log_average", "majority"):
        got = aggregate(sources, LABELS, method=method)
        assert got["label_ids"][0][0] == 0
        assert got["label_ids"][1] == []
        assert got["error"][:] == [None, "no source has a label"]
        assert [len(v) for v in got["votes"]] == [1, 0]
        assert got["weight"][1] == 0


def test_order_of_sources_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    parts = {n: source(rng.dirichlet([1.0] * 3, size=5)) for n in "abc"}
    one = aggregate(parts, LABELS)
    two = aggregate(dict(reversed(parts.items())), LABELS)
    np.testing.assert_allclose(dense(one), dense(two), atol=1e-7)
    np.testing.assert_allclose(one["weight"][:], two["weight"][:], atol=1e-7)


def test_multilabel_averages_only() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    sources = {
        "x": source(np.array([[0.9, 0.8]]), labels),
        "y": source(np.array([[0.5, 0.2]]), labels),
    }
    got = aggregate(sources, labels, method="average")
    np.testing.assert_allclose(dense(got, labels), [[0.7, 0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="single-label space; use average"):
        aggregate(sources, labels)


def test_bad_input() -> None:
    one = source(np.array([[0.5, 0.5, 0.0]]))
    two = source(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="'y' has other rows than 'x'"):
        aggregate({"x": one, "y": two}, LABELS)
    with pytest.raises(ValueError, match="at least one source"):
        aggregate({}, LABELS)
    with pytest.raises(ValueError, match=r"weights name \['z'\]"):
        aggregate({"x": one}, LABELS, weights={"z": 1.0})
    with pytest.raises(ValueError, match="at least 0"):
        aggregate({"x": one}, LABELS, weights={"x": -1.0})
    others = load_labels(["a", "b", "d"])
    other = source(np.array([[0.5, 0.5, 0.0]]), others)
    with pytest.raises(ValueError, match=r"source 'y': the rows carry soft labels of label space"):
        aggregate({"x": one, "y": other}, LABELS)
    with pytest.raises(ValueError, match="the column 'id' is missing"):
        aggregate({"x": one.remove_columns("id")}, LABELS)
    with pytest.raises(ValueError, match="'y' has other rows than 'x'"):
        aggregate({"x": one, "y": one.remove_columns("id")}, LABELS)
