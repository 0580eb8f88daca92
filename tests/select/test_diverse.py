import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import select as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.select import chosen
from llmlabel.select.diverse import badge, k_center, select_badge, select_k_center
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])


def table(vectors, probs=None) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i:02}" for i in range(len(vectors))]})
    if probs is not None:
        rows = SoftLabels.from_dense(np.array(probs, dtype=float), LABELS).add_to(rows)
    return with_columns(rows, {"vector": (np.array(vectors).tolist(), List(Value("float32")))})


@pytest.mark.parametrize("seed", range(20))
def test_k_center_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, known = rng.normal(size=(15, 3)), rng.normal(size=(seed % 3, 3))
    rows, distances = k_center(
        vectors, budget=6, known=known if len(known) else None, first=seed % 15
    )
    expected = reference.k_center(vectors.tolist(), 6, known.tolist(), seed % 15)
    assert rows.tolist() == expected[0]
    assert distances == pytest.approx(expected[1], abs=1e-6)


def test_every_corner_is_taken_before_a_neighbour() -> None:
    corners = np.repeat(np.eye(4), 5, axis=0) + np.random.default_rng(0).normal(0, 0.01, (20, 4))
    found = select_k_center(table(corners), budget=5, seed=1)
    taken = np.flatnonzero(found["selected"][:])
    assert set(taken // 5) == {0, 1, 2, 3}
    queue = chosen(found)
    assert queue["select_score"][0] == 2  # no row was taken before the first
    assert queue["select_score"][1:4] == pytest.approx([np.sqrt(2)] * 3, abs=0.05)
    assert queue["select_score"][4] < 0.1
    assert queue["select_reason"][4].endswith("from the nearest row taken before")
    assert found["select_score"][int(np.flatnonzero(~np.array(found["selected"][:]))[0])] is None


def test_known_rows_need_no_neighbours() -> None:
    rows = table(np.eye(3))
    found = select_k_center(rows, budget=2, labelled=rows.select([1]))
    assert found["selected"][:] == [True, False, True]
    with pytest.raises(ValueError, match="vectors of widths 3 and 2"):
        select_k_center(rows, budget=2, labelled=table(np.eye(2)))


def test_equal_vectors_are_never_taken_twice() -> None:
    assert sorted(k_center(np.ones((4, 2)), budget=4)[0]) == [0, 1, 2, 3]
    probs = np.tile([0.6, 0.4], (4, 1))
    rng = np.random.default_rng(0)
    assert sorted(badge(probs, np.ones((4, 2)), budget=4, rng=rng)[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_badge_equals_seeding_on_whole_gradients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, vectors = rng.dirichlet(np.ones(3), size=12), rng.normal(size=(12, 4))
    rows, distances = badge(probs, vectors, budget=5, rng=np.random.default_rng(seed))
    numbers = np.random.default_rng(seed).uniform(size=5).tolist()
    expected = reference.badge(probs.tolist(), vectors.tolist(), 5, numbers)
    assert rows.tolist() == expected[0]
    assert distances == pytest.approx(expected[1], rel=1e-9)


def test_badge_leaves_out_rows_that_are_sure() -> None:
    rng = np.random.default_rng(0)
    probs = [[1, 0, 0]] * 10 + [[0.4, 0.3, 0.3]] * 10
    for seed in range(10):
        found = select_badge(table(rng.normal(size=(20, 5)), probs), LABELS, budget=6, seed=seed)
        # all sure rows have the same gradient, 0, so that one stands for all
        assert sum(found["selected"][:10]) <= 1
        assert sum(found["selected"][10:]) >= 5
    last = int(np.flatnonzero(found["selected"][:])[-1])
    assert found["select_reason"][last].startswith("gradient ")


def test_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    rows = table(rng.normal(size=(15, 4)), rng.dirichlet(np.ones(3), size=15))
    for select in (
        lambda some: select_k_center(some, budget=4, seed=5),
        lambda some: select_badge(some, LABELS, budget=4, seed=5),
    ):
        there, back = select(rows), select(rows.select(range(14, -1, -1)))
        assert back["selected"][::-1] == there["selected"][:]
        assert chosen(back)["id"][:] == chosen(there)["id"][:]
    seeds = {tuple(select_badge(rows, LABELS, budget=4, seed=s)["selected"]) for s in range(5)}
    assert len(seeds) > 1


def test_bad_arguments() -> None:
    rows = table(np.eye(3), np.eye(3))
    with pytest.raises(ValueError, match="budget must be from 1 to 3"):
        select_k_center(rows, budget=4)
    with pytest.raises(ValueError, match="budget must be from 1 to 3"):
        select_badge(rows, LABELS, budget=0)
    many = load_labels(["a", "b", "c"], multilabel=True)
    with pytest.raises(ValueError, match="exclude each other"):
        select_badge(rows, many, budget=1)
