import numpy as np
import pytest
from datasets import Dataset, Value
from reference import select as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.select.learnable import LLKD, learnable_score, select_learnable, select_llkd
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])


def table(probs, ids=None) -> Dataset:
    rows = Dataset.from_dict({"id": ids or [f"r{i}" for i in range(len(probs))]})
    return SoftLabels.from_dense(np.array(probs, dtype=float), LABELS).add_to(rows)


@pytest.mark.parametrize("seed", range(20))
def test_llkd_equals_the_loop_over_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 6))
    selector = LLKD(count, ema=[0.9, 0.5][seed % 2])
    batches = [  # two or three rows, so that labels are absent from most batches
        (rng.dirichlet(np.full(count, 0.5), size=n), rng.dirichlet(np.full(count, 0.5), size=n))
        for n in rng.integers(2, 4, size=8)
    ]
    lists = [(teacher.tolist(), student.tolist()) for teacher, student in batches]
    expected = reference.llkd(lists, count, selector.ema)
    for (teacher, student), (keep, weights) in zip(batches, expected, strict=True):
        found = selector.step(teacher, student)
        assert found[0].tolist() == keep
        assert found[1] == pytest.approx(weights, abs=1e-12)


def test_llkd_before_the_first_step() -> None:
    selector = LLKD(4)
    assert (selector.tau_teacher, selector.tau_student) == (0.25, 0.5)
    assert selector.teacher_means.tolist() == [0.25] * 4
    assert selector.student_means.tolist() == [1] * 4
    assert selector.step(np.zeros((0, 4)), np.zeros((0, 4)))[0].tolist() == []
    assert selector.tau_student == 0.5


def test_llkd_never_is_empty_for_ever() -> None:
    """A student that is almost sure starts far below the threshold of 0.5."""
    rng = np.random.default_rng(0)
    selector = LLKD(3)
    kept = []
    for _ in range(60):
        teacher = rng.dirichlet([5, 1, 1], size=16)
        doubt = rng.uniform(0.001, 0.01, size=(16, 1))
        student = np.hstack([1 - 2 * doubt, doubt, doubt])
        kept.append(int(selector.step(teacher, student)[0].sum()))
    assert kept[0] == 0
    assert sum(kept[-10:]) > 10


def test_llkd_refuses_bad_numbers() -> None:
    for wrong in ({"n_labels": 1}, {"n_labels": 3, "ema": 1.0}):
        with pytest.raises(ValueError, match="n_labels must be at least 2 and ema"):
            LLKD(**wrong)


def test_a_round_of_llkd_takes_what_the_teacher_knows_and_the_student_does_not() -> None:
    sure, unsure = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]
    teacher = table([sure, sure, unsure, unsure, [0, 0, 0]])
    student = table([unsure, sure, unsure, sure, unsure]).select([4, 3, 2, 1, 0])
    teacher = with_columns(teacher, {"weight": ([2.0] * 5, Value("float32"))})
    found = select_llkd(teacher, student, LABELS)
    assert found["selected"][:] == [True, False, False, False, False]
    entropy = -sum(p * np.log(p) for p in unsure) / np.log(3)
    assert found["select_score"][0] == pytest.approx(0.9 * entropy, abs=1e-6)
    assert found["select_score"][4] is None
    assert found["weight"][:] == pytest.approx([2 * 0.9 * entropy, 0, 0, 0, 0], abs=1e-6)
    assert found["select_reason"][0] == f"teacher 0.90 sure, student {entropy:.2f} uncertain"
    with pytest.raises(ValueError, match="row with id 'r4' is not in student"):
        select_llkd(teacher, student.select([1, 2, 3, 4]), LABELS)
    with pytest.raises(ValueError, match="the id 'r3' is more than once in student; remove one"):
        select_llkd(teacher, student.select([0, 1, 2, 3, 4, 1]), LABELS)
    many = load_labels(["a", "b", "c"], multilabel=True)
    with pytest.raises(ValueError, match="exclude each other"):
        select_llkd(teacher, student, many)


# ----------------------------------------------------------------------------------- SALT


@pytest.mark.parametrize("seed", range(20))
def test_the_score_of_a_text_is_the_median_loss_of_its_tokens_in_reach(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 8))
    logs, hit = -rng.exponential(size=n), rng.uniform(size=n) < 0.7
    left = [-x for x, h in zip(logs.tolist(), hit, strict=True) if h]
    zero = [-x if h else 0.0 for x, h in zip(logs.tolist(), hit, strict=True)]
    assert learnable_score(logs, hit) == pytest.approx(reference.median(left), nan_ok=True)
    found = learnable_score(logs, hit, masked="zero")
    assert found == pytest.approx(reference.median(zero), nan_ok=True)


def test_hard_rows_in_reach_and_easy_ones() -> None:
    target = table([[1, 0, 0]] * 4 + [[0, 0, 0]])
    small = table([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.1, 0.6, 0.3], [0.5, 0.5, 0], [1, 0, 0]])
    hard = select_learnable(target, small, LABELS, budget=2, k=2)
    assert hard["selected"][:] == [False, True, False, True, False]
    assert hard["select_score"][:2] == pytest.approx([-np.log(0.9), -np.log(0.4)], abs=1e-6)
    assert hard["select_score"][2] is None
    assert hard["select_reason"][2] == "not among the small model's 2 labels"
    assert hard["select_reason"][1] == "hard: loss 0.92 of the small model"
    easy = select_learnable(target, small, LABELS, budget=1, k=2, prefer="easy")
    assert easy["selected"][:] == [True, False, False, False, False]
    assert easy["select_score"][0] == pytest.approx(np.log(0.9), abs=1e-6)


def test_learnable_refuses_what_it_cannot_do() -> None:
    target, small = table([[1, 0, 0]] * 2), table([[0.1, 0.9, 0], [0.9, 0.1, 0]])
    with pytest.raises(ValueError, match="budget must be from 1 to 1, the rows"):
        select_learnable(target, small, LABELS, budget=2, k=1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        select_learnable(target, small, LABELS, budget=1, k=0)
    with pytest.raises(ValueError, match="is not in small"):
        select_learnable(target, small.select([0]), LABELS, budget=1)
    with pytest.raises(ValueError, match="the id 'r1' is more than once in small; remove one"):
        select_learnable(target, small.select([1, 0, 1]), LABELS, budget=1)
    many = load_labels(["a", "b", "c"], multilabel=True)
    with pytest.raises(ValueError, match="exclude each other"):
        select_learnable(target, small, many, budget=1)
