import numpy as np
import pytest
from datasets import Dataset, List, Value, concatenate_datasets
from reference import softlabels as reference
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def rows(count: int) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(count)]})


def table(label_ids: list, label_probs: list, labels: LabelSpace) -> Dataset:
    return Dataset.from_dict(
        {
            "id": [f"r{i}" for i in range(len(label_ids))],
            "label_ids": label_ids,
            "label_probs": label_probs,
            "label_space": [labels.fingerprint] * len(label_ids),
        }
    )


def random_soft(seed: int) -> tuple[SoftLabels, list[list[float | None]]]:
    """Sparse rows with ties, zeros that are stored, and rows without any label."""
    rng = np.random.default_rng(seed)
    count, labels = int(rng.integers(1, 30)), int(rng.integers(2, 9))
    probs = (rng.integers(0, 4, (count, labels)) / (4 * labels)).astype(np.float32)
    stored = rng.random((count, labels)) < 0.6
    at = np.nonzero(stored)
    matrix = csr_array((probs[at], at), shape=(count, labels))
    twin = [
        [float(probs[i, k]) if stored[i, k] else None for k in range(labels)] for i in range(count)
    ]
    return SoftLabels(matrix, space(labels).fingerprint), twin


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("multilabel", [False, True])
def test_from_scores_equals_the_twin(seed: int, multilabel: bool) -> None:
    rng = np.random.default_rng(seed)
    count, labels = int(rng.integers(1, 30)), int(rng.integers(2, 9))
    scores = np.minimum(rng.normal(-4, 30, (count, labels)), 0.0)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    scores[rng.random(scores.shape) < 0.05] = np.nan
    scores[rng.random(count) < 0.2] = -np.inf
    soft = SoftLabels.from_scores(scores, space(labels, multilabel=multilabel))
    expected = [reference.from_scores(row, multilabel) for row in scores.tolist()]
    np.testing.assert_allclose(soft.dense(), expected, rtol=1e-7, atol=1e-44)  # float32 storage
    assert soft.multilabel == multilabel


def test_scores_far_below_zero_still_become_a_distribution() -> None:
    scores = np.array([[-5000.0, -5000.0 + np.log(3.0), -9000.0]])
    soft = SoftLabels.from_scores(scores, space(3))
    np.testing.assert_allclose(soft.dense(), [[0.25, 0.75, 0.0]], rtol=1e-7)
    assert soft.probs.nnz == 2  # exp(-4000) is no float: not stored


@pytest.mark.parametrize("bad", [[-np.inf] * 3, [np.nan] * 3, [np.nan, -1.0, -2.0], [np.inf, 0, 0]])
def test_a_row_that_was_not_read_has_no_label(bad: list[float]) -> None:
    soft = SoftLabels.from_scores(np.array([bad, [0.0, -np.inf, -np.inf]]), space(3))
    assert soft.dense().tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert np.diff(soft.probs.indptr).tolist() == [0, 1]
    assert soft.missing_mass.tolist() == [1.0, 0.0]


def test_a_multilabel_score_above_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^row 0: 2\.\d+ is above 1, no probability$"):
        SoftLabels.from_scores(np.array([[0.7, -1.0]]), space(2, multilabel=True))


def test_scores_that_are_written_to_belong_to_the_caller() -> None:
    scores = np.array([[np.nan, -1.0]])
    SoftLabels.from_scores(scores, space(2))
    assert np.isnan(scores[0, 0])


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([[0.5, 0.5], [0.5, -0.25]], "row 1: -0.25 is no probability"),
        ([[0.5, np.nan]], "row 0: nan is no probability"),
        ([[0.5, 0.5], [0.75, 0.5]], "row 1: the probabilities sum to 1.25; normalise them"),
        ([[0.5, 0.25, 0.25]], "3 columns do not fit a space of 2 labels"),
    ],
)
def test_from_dense_refuses_what_is_no_distribution(probs: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftLabels.from_dense(np.array(probs), space(2))


def test_multilabel_rows_may_sum_to_more_than_one() -> None:
    labels = space(2, multilabel=True)
    soft = SoftLabels.from_dense(np.array([[0.75, 0.5]]), labels)
    assert soft.dense().tolist() == [[0.75, 0.5]]
    with pytest.raises(ValueError, match="missing mass is defined for a single-label space only"):
        _ = soft.missing_mass
    np.testing.assert_allclose(soft.log_dense(), np.log([[0.75, 0.5]]))
    read = SoftLabels.from_dataset(soft.add_to(rows(1)), labels)
    assert read.multilabel
    assert read.dense().tolist() == [[0.75, 0.5]]


@pytest.mark.parametrize("seed", range(20))
def test_the_columns_give_back_every_value(seed: int) -> None:
    soft, twin = random_soft(seed)
    labels = space(soft.probs.shape[1])
    dataset = soft.add_to(rows(len(twin)))
    ranked = [reference.ranked(row) for row in twin]
    assert dataset["label_ids"][:] == [[k for k, _ in row] for row in ranked]
    assert dataset["label_probs"][:] == [[p for _, p in row] for row in ranked]
    assert dataset["label_space"][:] == [labels.fingerprint] * len(twin)
    assert dataset.features["label_ids"] == List(Value("int32"))
    assert dataset.features["label_probs"] == List(Value("float32"))
    read = SoftLabels.from_dataset(dataset, labels)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(read.probs, name), getattr(soft.probs, name))


def test_the_rows_of_a_selection_are_read_in_its_order() -> None:
    labels = space(3)
    probs = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.125, 0.5, 0.375]])
    dataset = SoftLabels.from_dense(probs, labels).add_to(rows(3))
    read = SoftLabels.from_dataset(dataset.select([2, 0]), labels)
    assert read.dense().tolist() == probs[[2, 0]].tolist()
    joined = concatenate_datasets([dataset.select([1]), dataset])
    assert SoftLabels.from_dataset(joined, labels).dense().tolist() == probs[[1, 0, 1, 2]].tolist()
    assert SoftLabels.from_dataset(dataset.select([]), labels).dense().shape == (0, 3)


def test_a_table_from_elsewhere_is_read_whatever_its_number_types() -> None:
    labels = space(3)
    dataset = table([[2, 0], [], None], [[0.5, 0.25], [], None], labels)  # int64 and float64
    soft = SoftLabels.from_dataset(dataset, labels)
    assert soft.dense().tolist() == [[0.25, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    nothing = table([None, None], [None, None], labels)  # columns of the type null
    assert SoftLabels.from_dataset(nothing, labels).missing_mass.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("label_ids", "label_probs", "message"),
    [
        ([[0], [3]], [[1.0], [1.0]], "row with id 'r1': label id 3 is outside .* ids 0 to 2"),
        ([[0], [-1]], [[1.0], [1.0]], "row with id 'r1': label id -1 is outside"),
        ([[0], [1, 2]], [[1.0], [0.5, -0.5]], "row with id 'r1': -0.5 is no probability"),
        ([[], [0]], [[], [float("nan")]], "row with id 'r1': nan is no probability"),
        ([[], [0]], [[], [None]], "row with id 'r1': nan is no probability"),
        ([[0], [0, 1]], [[1.0], [1.0]], "row with id 'r1': label_ids and label_probs differ"),
        ([[0], [1, 0]], [[1.0], [0.5, 0.75]], "row with id 'r1': the probabilities sum to 1.25"),
        ([[1], [1, 0, 1]], [[1.0], [0.5, 0.0, 0.5]], "row with id 'r1': label id 1 occurs twice"),
    ],
)
def test_a_broken_row_is_named(label_ids: list, label_probs: list, message: str) -> None:
    labels = space(3)
    with pytest.raises(ValueError, match=message) as failure:
        SoftLabels.from_dataset(table(label_ids, label_probs, labels), labels)
    assert "\n" not in str(failure.value)


def test_a_broken_row_without_an_id_is_named_by_its_number() -> None:
    dataset = table([[0], [3]], [[1.0], [1.0]], space(3)).remove_columns("id")
    with pytest.raises(ValueError, match=r"^row 1: label id 3 is outside"):
        SoftLabels.from_dataset(dataset, space(3))


def test_labels_that_end_and_begin_rows_are_not_taken_for_twice_the_same() -> None:
    labels = space(3)
    soft = SoftLabels.from_dataset(
        table([[0, 1], [1, 2]], [[0.5, 0.5], [0.5, 0.5]], labels), labels
    )
    assert soft.dense().tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]


def test_soft_labels_of_another_space_are_refused() -> None:
    mine, other = space(3), space(4)
    dataset = SoftLabels.from_dense(np.eye(3), mine).add_to(rows(3))
    with pytest.raises(ValueError, match=f"space {mine.fingerprint}, .* is {other.fingerprint};"):
        SoftLabels.from_dataset(dataset, other)
    with pytest.raises(ValueError, match="column 'label_ids' is missing"):
        SoftLabels.from_dataset(rows(3), mine)
    with pytest.raises(ValueError, match="soft labels of 3 rows do not fit a dataset of 2"):
        SoftLabels.from_dense(np.eye(3), mine).add_to(rows(2))


@pytest.mark.parametrize("seed", range(20))
def test_top_keeps_the_most_probable(seed: int) -> None:
    soft, twin = random_soft(seed)
    for k in (1, 2, 5):
        expected = [[0.0] * soft.probs.shape[1] for _ in twin]
        for row, kept in zip(twin, expected, strict=True):
            for label, p in reference.ranked(row)[:k]:
                kept[label] = p
        top = soft.top(k)
        assert top.dense().tolist() == expected
        assert np.diff(top.probs.indptr).tolist() == [
            min(k, len(reference.ranked(r))) for r in twin
        ]


def test_minus_zero_is_zero_when_labels_are_ranked() -> None:
    stored = csr_array((np.array([0.0, -0.0, 0.5], dtype=np.float32), [0, 1, 2], [0, 3]), (1, 3))
    dataset = SoftLabels(stored, space(3).fingerprint).add_to(rows(1))
    assert dataset["label_ids"][0] == [2, 0, 1]


def test_top_of_no_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be at least 1, .* got 0"):
        SoftLabels.from_dense(np.eye(2), space(2)).top(0)


@pytest.mark.parametrize("seed", range(20))
def test_log_dense_spreads_the_missing_mass(seed: int) -> None:
    soft, twin = random_soft(seed)
    expected = [reference.log_dense(row, 1e-9) for row in twin]
    np.testing.assert_allclose(soft.log_dense(floor=1e-9), expected, atol=1e-6)


def test_the_rounding_of_float32_is_no_missing_mass() -> None:
    soft = SoftLabels.from_dense(np.array([[0.9, 0.1, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]]), space(4))
    assert soft.missing_mass[0] == 0
    assert soft.missing_mass[1] == pytest.approx(0.9)
    assert soft.log_dense()[0, 3] == pytest.approx(np.log(1e-12))
    np.testing.assert_allclose(soft.log_dense()[1], np.log([0.1, 0.3, 0.3, 0.3]), rtol=1e-6)


def test_any_sparse_array_is_brought_into_form_without_touching_it() -> None:
    given = csr_array((np.array([0.25, 0.75]), np.array([1, 0]), np.array([0, 2])), shape=(1, 2))
    soft = SoftLabels(given, space(2).fingerprint)
    assert soft.probs.dtype == np.float32
    assert soft.probs.indices.tolist() == [0, 1]
    assert given.indices.tolist() == [1, 0]
    assert SoftLabels(given.astype(np.float32), "x").add_to(rows(1))["label_ids"][0] == [0, 1]
