import re

import numpy as np
import pytest
from datasets import Dataset
from metrics.cases import SEEDS
from reference import ranking as reference
from scipy.sparse import csr_array, csr_matrix

from llmlabel.data import label_csr
from llmlabel.labelspace import load_labels
from llmlabel.metrics.ranking import (
    frequency_groups,
    inverse_propensity,
    measure_ranking,
    ranked,
    ranking_by_frequency,
    ranking_scores,
    without_pairs,
)
from llmlabel.softlabels import SoftLabels


def random_case(seed: int) -> tuple[csr_array, csr_array, list[dict[int, float]], list[set[int]]]:
    """Scores with ties, negative ones, rows of none; gold with rows of none."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(3, 30)), int(rng.integers(3, 12))
    values = rng.integers(-3, 6, (rows, labels)) / 4
    values[values == 0] = 0.1
    values[rng.random(values.shape) < 0.4] = 0
    true = rng.random(values.shape) < 0.25
    scores, gold = csr_array(values), csr_array(true)
    stored = [{k: v for k, v in enumerate(row) if v} for row in values.tolist()]
    return scores, gold, stored, [set(np.flatnonzero(row).tolist()) for row in true]


@SEEDS
def test_scores_of_rankings_equal_the_twins(seed: int) -> None:
    scores, gold, rows, true = random_case(seed)
    labels = scores.shape[1]
    weights = inverse_propensity(gold, a=0.6, b=2.6)
    assert weights == pytest.approx(reference.inverse_propensity(true, labels, 0.6, 2.6), rel=1e-12)
    found = ranking_scores(scores, gold, ks=(1, 2, 5), inverse_propensity=weights)
    expected: dict[str, float] = {}
    for k in (1, 2, 5):
        expected |= reference.scores(rows, true, k, weights.tolist())
    assert found == pytest.approx(expected, abs=1e-12)
    assert ranking_scores(scores, gold, ks=(2,)) == {
        name: found[name] for name in ("P@2", "R@2", "nDCG@2")
    }
    padded = [[*reference.ranked(row, 4), -1, -1, -1, -1][:4] for row in rows]
    assert ranked(scores, k=4).tolist() == padded


@SEEDS
def test_pairs_that_are_left_out_are_not_ranked(seed: int) -> None:
    scores, gold, rows, true = random_case(seed)
    rng = np.random.default_rng(seed)
    pairs = np.column_stack([rng.integers(0, side, 15) for side in scores.shape])
    for row, label in pairs.tolist():
        rows[row].pop(label, None)
    found = ranking_scores(without_pairs(scores, pairs), gold, ks=(3,))
    expected = reference.scores(rows, true, 3, [1.0] * scores.shape[1])
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


def test_a_rare_label_found_counts_more_than_a_frequent_one() -> None:
    train = csr_array(np.array([[1, 0]] * 98 + [[0, 1]] * 2))
    weights = inverse_propensity(train)
    c = (np.log(100) - 1) * 2.5**0.55
    assert weights.tolist() == pytest.approx([1 + c * 99.5**-0.55, 1 + c * 3.5**-0.55])
    gold = csr_array(np.array([[1, 0], [0, 1]]))
    rare = ranking_scores(csr_array(np.array([[0, 1.0]] * 2)), gold, inverse_propensity=weights)
    often = ranking_scores(csr_array(np.array([[1.0, 0]] * 2)), gold, inverse_propensity=weights)
    assert rare["P@1"] == often["P@1"] == 0.5
    assert rare["PSP@1"] == pytest.approx(weights[1] / weights.sum())
    assert often["PSP@1"] == pytest.approx(weights[0] / weights.sum())


def test_scores_of_a_known_ranking() -> None:
    """Labels 2, 0, 1 in this order; 0, 1 and 3 are gold, and a row that says nothing."""
    scores = csr_array(np.array([[0.5, 0.2, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    gold = csr_array(np.array([[1, 1, 0, 1], [0, 0, 0, 1]]))
    found = ranking_scores(scores, gold, ks=(1, 3))
    at = 1 / np.log2([2, 3, 4])
    assert found == pytest.approx(
        {
            "P@1": 0.0,
            "R@1": 0.0,
            "nDCG@1": 0.0,
            "P@3": 2 / 3 / 2,
            "R@3": 2 / 3 / 2,
            "nDCG@3": (at[1] + at[2]) / at.sum() / 2,
        }
    )


@SEEDS
@pytest.mark.parametrize("groups", [1, 3, 10])
def test_groups_of_labels_by_frequency_equal_the_twin(seed: int, groups: int) -> None:
    scores, gold, rows, true = random_case(seed)
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, scores.shape[1])
    k = int(rng.integers(1, 6))
    lines = ranking_by_frequency(scores, gold, counts, k=k, groups=groups)
    found = [(line["labels"], line["gold"], line["hits"]) for line in lines]
    assert found == reference.by_frequency(rows, true, counts.tolist(), k, groups)
    assert [line["group"] for line in lines] == [*range(1, groups + 1), "zero-shot"]
    for line in lines:
        assert line[f"P@{k}"] == line["hits"] / (k * len(rows))
        assert line[f"R@{k}"] == (line["hits"] / line["gold"] if line["gold"] else 0)
    whole = ranking_scores(scores, gold, ks=(k,))
    assert sum(line["hits"] for line in lines) / (k * len(rows)) == whole[f"P@{k}"]
    assert sum(line[f"P@{k}"] for line in lines) == pytest.approx(whole[f"P@{k}"], abs=1e-15)
    assert sum(line["labels"] for line in lines) == scores.shape[1]
    order = rng.permutation(scores.shape[1])
    assert (
        frequency_groups(counts[order], groups=groups)
        == frequency_groups(counts, groups=groups)[order]
    ).all()


def test_labels_by_frequency_of_a_known_case() -> None:
    """Ten labels that differ are ten deciles; equal ones share the middle; 0 is zero-shot."""
    assert frequency_groups(np.arange(1, 11)).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert frequency_groups(np.array([9, 0, 1, 1, 1, 5])).tolist() == [1, -1, 7, 7, 7, 3]
    assert frequency_groups(np.array([0, 0])).tolist() == [-1, -1]
    counts = np.array([50, 2, 0])
    scores = csr_array(np.array([[0.9, 0.5, 0.1], [0.9, 0.1, 0.5], [0.9, 0.5, 0.1]]))
    gold = csr_array(np.array([[1, 1, 0], [0, 0, 1], [0, 0, 1]]))
    lines = ranking_by_frequency(scores, gold, counts, k=2, groups=2)
    assert [[*line.values()] for line in lines] == [
        [1, 1, 50, 50, 1, 1, 1 / 6, 1.0],
        [2, 1, 2, 2, 1, 1, 1 / 6, 1.0],
        ["zero-shot", 1, 0, 0, 2, 1, 1 / 6, 0.5],
    ]
    assert [*lines[0]] == ["group", "labels", "least", "most", "gold", "hits", "P@2", "R@2"]


def test_labels_by_frequency_say_what_does_not_fit() -> None:
    matrix = csr_array(np.eye(3))
    with pytest.raises(ValueError, match="3 labels have scores, 3 gold and 2 counts; all must be"):
        ranking_by_frequency(matrix, matrix, np.array([1, 2]), k=1)
    with pytest.raises(ValueError, match="groups must be at least 1; got 0"):
        frequency_groups(np.array([1]), groups=0)
    with pytest.raises(ValueError, match="a label cannot be gold -2 times; give counts"):
        frequency_groups(np.array([1, -2]))
    for given, message in (
        ({"k": 0}, "k must be at least 1, the number of labels that count; got 0"),
        ({"k": 1, "groups": 0}, "groups must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ranking_by_frequency(matrix, matrix, np.array([1, 2, 3]), **given)


def test_numbers_of_labels_and_shapes_that_do_not_fit_are_said() -> None:
    matrix = csr_array(np.eye(3))
    for ks in ((0,), (1, -1), ()):
        with pytest.raises(ValueError, match="ks must be numbers of labels, each at least 1; got"):
            ranking_scores(matrix, matrix, ks=ks)
        with pytest.raises(ValueError, match=r"ks must be numbers .*; got " + re.escape(f"{ks}")):
            measure_ranking({}, load_labels(["a", "b"]), ks=ks)
    for other in (csr_array((2, 3)), csr_array((3, 4))):
        with pytest.raises(
            ValueError, match=r"scores are of 3 rows and 3 labels, gold of \d and \d; both must"
        ):
            ranking_scores(matrix, other)


@SEEDS
def test_scores_of_rankings_equal_napkinxc(seed: int) -> None:
    """With scores that differ, since it ranks equal ones as they come; some rows have no gold."""
    oracle = pytest.importorskip("napkinxc.metrics")
    rng = np.random.default_rng(seed)
    rows, labels, k = int(rng.integers(3, 40)), int(rng.integers(6, 60)), int(rng.integers(1, 6))
    true = rng.random((rows, labels)) < 0.15
    values = rng.permutation(rows * labels).reshape(rows, labels) + 1.0
    values[rng.random(values.shape) < 0.3] = 0
    pairs = np.argwhere(rng.random(values.shape) < 0.1)
    scores, gold = without_pairs(csr_array(values), pairs), csr_array(true)
    values[pairs[:, 0], pairs[:, 1]] = 0  # what the filter leaves is what is left by hand
    filtered = [[int(x) for x in np.argsort(-row) if row[x]] for row in values]
    weights = inverse_propensity(gold, a=0.6, b=2.6)
    expected = oracle.Jain_et_al_inverse_propensity(csr_matrix(true.astype(float)), A=0.6, B=2.6)
    assert weights == pytest.approx(np.asarray(expected), abs=1e-9)
    found = ranking_scores(scores, gold, ks=(k,), inverse_propensity=weights)
    truth = [np.flatnonzero(row).tolist() for row in true]
    names = {"P": "precision", "R": "recall", "nDCG": "ndcg"}
    for name, theirs in names.items():
        value = getattr(oracle, f"{theirs}_at_k")(truth, filtered, k=k)[-1]
        assert found[f"{name}@{k}"] == pytest.approx(value, abs=1e-9)
    for name, theirs in {"PSP": "psprecision", "PSnDCG": "psndcg"}.items():
        value = getattr(oracle, f"{theirs}_at_k")(truth, filtered, weights, k=k)[-1]
        assert found[f"{name}@{k}"] == pytest.approx(value, abs=1e-9)


def test_sources_are_measured_over_rows_of_known_gold() -> None:
    labels = load_labels(["a", "b", "c"], multilabel=True)
    probs = csr_array(np.array([[0.9, 0.8, 0], [0, 0.6, 0], [0, 0, 0], [0.5, 0, 0.0]]))
    rows = SoftLabels(probs, labels.fingerprint, multilabel=True).add_to(
        Dataset.from_dict(
            {"id": list("wxyz"), "text": list("wxyz"), "gold": [[1], [1, 2], [0], None]}
        )
    )
    found = measure_ranking({"one": rows}, labels, ks=(1, 2))["one"]
    assert found["rows"] == 3
    assert found["P@1"] == pytest.approx(1 / 3)
    assert found["P@2"] == pytest.approx(2 / 6)
    assert found["R@2"] == found["R@stored"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert "PSP@1" not in found
    training = Dataset.from_dict({"gold": [[0], [0], [0, 1], [2]]})
    weights = inverse_propensity(label_csr(training, labels))
    scored = measure_ranking({"one": rows}, labels, training=training, ks=(1,))["one"]
    assert scored["PSP@1"] == pytest.approx(
        weights[1] / (weights[1] + max(weights[1], weights[2]) + weights[0])
    )
    pairs = rows.add_column("excluded_ids", [[0], [], [], []])  # of the first row its best label
    assert measure_ranking({"one": pairs}, labels, ks=(1,))["one"]["P@1"] == pytest.approx(2 / 3)
    amazon = inverse_propensity(label_csr(training, labels), a=0.6, b=2.6)
    other = measure_ranking({"one": rows}, labels, training=training, ks=(1,), a=0.6, b=2.6)["one"]
    assert other["PSP@1"] == pytest.approx(amazon[1] / (amazon[1] + amazon[1:].max() + amazon[0]))
    with pytest.raises(ValueError, match="no row of the source 'one' has known gold"):
        measure_ranking({"one": rows.select([3])}, labels)
