import time

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import select as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.select import (
    best_of_each,
    chosen,
    id_ranks,
    keep_confident,
    margins,
    row_vectors,
    row_weights,
    vote_entropy,
)
from llmlabel.softlabels import SoftLabels


def test_margin_is_first_minus_second_and_0_without_a_label() -> None:
    labels = load_labels(["a", "b", "c"])
    probs = np.array([[0.2, 0.7, 0.1], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    found = margins(SoftLabels.from_dense(probs, labels))
    assert found == pytest.approx([0.5, 1.0, 0.0, 0.0], abs=1e-6)


def test_margin_of_many_labels_is_that_of_the_one_nearest_to_a_half() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    probs = np.array([[0.9, 0.6], [0.9, 0.0], [0.0, 0.0], [0.5, 1.0]])
    found = margins(SoftLabels.from_dense(probs, labels))
    assert found == pytest.approx([0.2, 0.8, 1.0, 0.0], abs=1e-6)


def test_vote_entropy() -> None:
    answers = np.array([[3, 3, 3], [0, 1, 2], [0, 0, 1], [0, 1, -1], [-1, -1, -1], [5, -1, -1]])
    two_to_one = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(3)
    expected = [0, 1, two_to_one, np.log(2) / np.log(3), 0, 0]
    assert vote_entropy(answers) == pytest.approx(expected, abs=1e-12)


def test_one_source_never_disagrees() -> None:
    assert vote_entropy(np.array([[0], [4], [-1]])).tolist() == [0, 0, 0]


LABELS = load_labels(["a", "b"])
PROBS = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.45, 0.55], [0.3, 0.7], [0.0, 0.0]])


def table(probs: np.ndarray) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    return SoftLabels.from_dense(probs, LABELS).add_to(Dataset.from_dict({"id": ids, "text": ids}))


def test_the_most_confident_of_each_label() -> None:
    got = keep_confident(table(PROBS), LABELS, share=0.5)
    assert got["weight"][:] == [1, 1, 0, 0, 1, 0]  # 2 of 3, and 1 of 2; a row without label never
    assert keep_confident(table(PROBS), LABELS, share=1.0)["weight"][:] == [1, 1, 1, 1, 1, 0]


def test_weights_are_kept() -> None:
    rows = with_columns(table(PROBS), {"weight": ([0.5] * 6, Value("float32"))})
    assert keep_confident(rows, LABELS, share=0.5)["weight"][:] == [0.5, 0.5, 0, 0, 0.5, 0]


def test_a_null_weight_is_one_and_a_bad_one_is_named() -> None:
    rows = with_columns(table(PROBS), {"weight": ([None, 0.5] * 3, Value("float32"))})
    assert keep_confident(rows, LABELS, share=0.5)["weight"][:] == [1, 0.5, 0, 0, 1, 0]
    assert row_weights(rows).tolist() == [1, 0.5] * 3
    assert row_weights(table(PROBS)).tolist() == [1] * 6
    for bad in (-1.0, float("nan"), float("inf")):
        rows = with_columns(table(PROBS), {"weight": ([1.0, bad] * 3, Value("float32"))})
        with pytest.raises(ValueError, match=rf"row with id 'r1' has the weight {bad}; write a"):
            keep_confident(rows, LABELS, share=0.5)
    rows = with_columns(table(PROBS), {"weight": (["heavy"] * 6, Value("string"))})
    with pytest.raises(ValueError, match="the column 'weight' holds string"):
        row_weights(rows)
    with pytest.raises(ValueError, match="the column 'id' is missing"):
        keep_confident(table(PROBS).remove_columns("id"), LABELS, share=0.5)


def test_ties_do_not_depend_on_the_order_of_rows() -> None:
    rows = table(np.array([[0.7, 0.3]] * 4))
    kept = keep_confident(rows, LABELS, share=0.5)
    back = keep_confident(rows.select([3, 2, 1, 0]), LABELS, share=0.5)
    by_id = dict(zip(back["id"], back["weight"], strict=True))
    assert dict(zip(kept["id"], kept["weight"], strict=True)) == by_id
    assert sum(by_id.values()) == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_each_label_equals_the_loop_over_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(0, 60))
    best, ranks = rng.integers(0, 6, rows), rng.permutation(rows)
    score = rng.integers(0, 4, rows) / 4  # many ties, and some 0
    few = int(rng.integers(0, 5))
    for count in (lambda n: few, lambda n: -(-n // 3), lambda n: n):
        expected = reference.best_of_each(best.tolist(), score.tolist(), ranks.tolist(), count)
        assert best_of_each(best, score, ranks, count=count).tolist() == expected


def test_the_best_of_each_of_very_many_labels() -> None:
    rows = 100_000
    best = np.arange(rows) % (rows // 2)
    start = time.perf_counter()
    kept = best_of_each(best, np.ones(rows), np.arange(rows), count=lambda n: n - 1)
    assert time.perf_counter() - start < 1  # a scan of all rows for each label takes 3 s, this 0.01
    assert kept.tolist() == [True] * (rows // 2) + [False] * (rows // 2)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        keep_confident(table(PROBS), LABELS, share=share)


# ------------------------------------------------------------ what the selectors have in common


def test_chosen_rows_come_best_first_and_equal_ones_by_id() -> None:
    rows = with_columns(
        table(PROBS),
        {
            "selected": ([True, False, True, True, True, False], Value("bool")),
            "select_score": ([0.5, 9.0, 0.7, 0.5, None, 1.0], Value("float32")),
        },
    )
    assert chosen(rows)["id"][:] == ["r2", "r0", "r3", "r4"]
    assert chosen(rows.select([5, 4, 3, 2, 1, 0]))["id"][:] == ["r2", "r0", "r3", "r4"]
    with pytest.raises(ValueError, match="column 'selected' is missing"):
        chosen(table(PROBS))


def test_ids_decide_the_order_and_must_be_unique() -> None:
    assert id_ranks(Dataset.from_dict({"id": ["b", "c", "a"]})).tolist() == [1, 2, 0]
    assert id_ranks(Dataset.from_dict({"id": [30, 4]})).tolist() == [1, 0]
    with pytest.raises(ValueError, match="the id 'x' is there more than once"):
        id_ranks(Dataset.from_dict({"id": ["x", "y", "x"]}))


def test_vectors_are_one_matrix_or_the_row_is_named() -> None:
    def rows(*vectors) -> Dataset:
        return with_columns(
            Dataset.from_dict({"id": [f"r{i}" for i in range(len(vectors))]}),
            {"vector": (list(vectors), List(Value("float32")))},
        )

    assert row_vectors(rows([1, 2], [3, 4])).tolist() == [[1, 2], [3, 4]]
    assert row_vectors(rows([1, 2], [3, 4]).select([1])).tolist() == [[3, 4]]
    with pytest.raises(ValueError, match="'r1' has a vector of 1 numbers, the first row has 2"):
        row_vectors(rows([1, 2], [3]))
    with pytest.raises(ValueError, match="'r1' has a vector of 0 numbers"):
        row_vectors(rows([1, 2], None))
    with pytest.raises(ValueError, match="'r0' has a vector that is not finite"):
        row_vectors(rows([1, float("nan")], [1, 2]))
