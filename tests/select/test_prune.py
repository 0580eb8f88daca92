import numpy as np
import pytest
from datasets import Dataset, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.select.prune import kd_weight, keep_random, keep_top
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b"])


def ids(n):
    return Dataset.from_dict({"id": [f"r{i}" for i in range(n)]})


def kept(rows):
    return {id for id, taken in zip(rows["id"], rows["selected"], strict=True) if taken}


def test_a_random_share_is_rounded_up_and_a_part_of_a_larger_one() -> None:
    rows = ids(101)
    small, large = keep_random(rows, share=0.05), keep_random(rows, share=0.3)
    assert (len(kept(small)), len(kept(large))) == (6, 31)
    assert kept(small) < kept(large)
    assert small["weight"][:] == [float(taken) for taken in small["selected"]]
    reason = "in a random share of 0.05"
    assert {r for r in small["select_reason"] if r} == {reason}
    assert kept(keep_random(rows, share=0.05, seed=1)) != kept(small)
    assert kept(keep_random(rows.select(range(100, -1, -1)), share=0.05)) == kept(small)


def test_every_row_has_the_same_chance() -> None:
    counts = np.zeros(20)
    for seed in range(150):
        counts += np.array(keep_random(ids(20), share=0.25, seed=seed)["selected"][:])
    assert counts.sum() == 750
    assert np.abs(counts / 150 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 150)


def test_rows_of_weight_0_take_no_place() -> None:
    rows = with_columns(ids(10), {"weight": ([0.0] * 6 + [0.5] * 4, Value("float32"))})
    found = keep_random(rows, share=0.5)
    assert len(kept(found)) == 2
    assert kept(found) <= {"r6", "r7", "r8", "r9"}
    assert sorted(found["weight"][:]) == [0] * 8 + [0.5] * 2
    none = with_columns(ids(2), {"weight": ([0.0] * 2, Value("float32"))})
    assert kept(keep_random(none, share=0.5)) == set()


def test_the_surest_rows_of_each_label() -> None:
    probs = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0, 0], [0.8, 0.2]]
    rows = SoftLabels.from_dense(np.array(probs), LABELS).add_to(ids(6))
    found = keep_top(rows, LABELS, per_label=2)
    assert found["weight"][:] == [1, 1, 0, 1, 0, 0]  # r1 and r5 are equal: by id
    assert found["select_score"][:4] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert found["select_score"][4] is None
    assert found["select_reason"][:3] == ["among the 2 surest of its label"] * 2 + [None]
    heavy = with_columns(rows, {"weight": ([0.0] + [3.0] * 5, Value("float32"))})
    assert keep_top(heavy, LABELS, per_label=1)["weight"][:] == [0, 3, 0, 3, 0, 0]


def test_the_weight_of_the_teacher_falls_from_1_to_a_half() -> None:
    assert [kd_weight(share) for share in (0.02, 0.3, 1.0)] == [1, 1, 0.5]
    assert kd_weight(0.65) == pytest.approx(0.75)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            kd_weight(share)


def test_bad_arguments() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must be above 0"):
            keep_random(ids(3), share=share)
    rows = SoftLabels.from_dense(np.eye(2), LABELS).add_to(ids(2))
    with pytest.raises(ValueError, match="per_label must be at least 1"):
        keep_top(rows, LABELS, per_label=0)
    with pytest.raises(ValueError, match="exclude each other"):
        keep_top(rows, load_labels(["a", "b"], multilabel=True), per_label=1)
