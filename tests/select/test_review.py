import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import select as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.select import chosen
from llmlabel.select.review import expected_errors, review_queue
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b"])


def table(first, words, labels=LABELS):
    probs = np.array([[p, 1 - p] if p is not None else [0, 0] for p in first], dtype=float)
    texts = [" ".join(["word"] * n) for n in words]
    rows = Dataset.from_dict({"id": [f"r{i:02}" for i in range(len(texts))], "text": texts})
    return SoftLabels.from_dense(probs, labels).add_to(rows)


TIMES = {"seconds_per_row": 5.0, "seconds_per_word": 0.5}


def test_most_errors_a_minute_until_the_time_is_used() -> None:
    rows = table([0.6, 0.6, 0.9, None, 1.0], [10, 30, 0, 30, 0])
    # seconds 10, 20, 5, 20, 5; errors .4, .4, .1, 1, 0; a minute 2.4, 1.2, 1.2, 3, 0
    found = review_queue(rows, LABELS, budget_seconds=36.0, **TIMES)
    assert found["select_score"][:] == pytest.approx([2.4, 1.2, 1.2, 3, 0], abs=1e-5)
    assert found["selected"][:] == [True, False, True, True, False]  # r1 does not fit, r2 does
    assert chosen(found)["id"][:] == ["r03", "r00", "r02"]
    assert found["select_reason"][0] == "0.40 expected errors in 10 s"
    assert found["select_reason"][1] is None
    all_ = review_queue(rows, LABELS, budget_seconds=1000.0, **TIMES)
    assert all_["selected"][:] == [True] * 4 + [False]  # where nothing is wrong nobody looks


def test_rows_that_a_guarantee_decides_need_nobody() -> None:
    rows = table([0.6, 0.6, 0.6], [0, 0, 0])
    rows = with_columns(rows, {"set_ids": ([[0], [0, 1], []], List(Value("int32")))})
    found = review_queue(rows, LABELS, budget_seconds=100.0, **TIMES)
    assert found["selected"][:] == [False, True, True]


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_equals_the_greedy_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = table(rng.uniform(0.5, 1, size=15), rng.integers(0, 40, size=15))
    budget = float(rng.uniform(30, 150))
    found = review_queue(rows, LABELS, budget_seconds=budget, **TIMES)
    errors = [1 - max(p) for p in SoftLabels.from_dataset(rows, LABELS).dense().tolist()]
    seconds = [5 + 0.5 * len(text.split()) for text in rows["text"]]
    expected = reference.review(errors, seconds, budget)
    assert np.flatnonzero(found["selected"][:]).tolist() == expected
    back = review_queue(rows.select(range(14, -1, -1)), LABELS, budget_seconds=budget, **TIMES)
    assert back["selected"][::-1] == found["selected"][:]


def test_expected_errors_of_many_labels_are_a_sum() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    soft = SoftLabels.from_dense(np.array([[0.9, 0.4], [0, 0], [1.0, 0.5]]), labels)
    assert expected_errors(soft) == pytest.approx([0.5, 1, 0.5])
    two = table([0.7, 0.6], [0, 0], labels)
    assert review_queue(two, labels, budget_seconds=6.0, **TIMES)["selected"][:] == [False, True]


def test_bad_arguments() -> None:
    rows = table([0.6, 0.7], [10, 20])
    with pytest.raises(ValueError, match=r"does not pay for one row, the cheapest takes 10\.0 s"):
        review_queue(rows, LABELS, budget_seconds=9.0, **TIMES)
    with pytest.raises(ValueError, match="seconds_per_row must be above 0"):
        review_queue(rows, LABELS, budget_seconds=9.0, seconds_per_row=0.0)
