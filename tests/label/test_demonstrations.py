import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import demonstrations as reference

from llmlabel.data import load, save
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.demonstrations import choose_demonstrations, in_turn, k_center, rows_in_pool
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels


class Angles:
    """Reads the angle of a text's direction from the number in it."""

    def __init__(self) -> None:
        self.asked = list[str]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked += texts
        angles = np.radians([float("".join(c for c in t if c.isdigit()) or 0) for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(["bug", {"id": "q", "name": "question"}, "praise"])


def table(
    texts: list[str], gold: list[list[int] | None] | None = None, prefix: str = "r"
) -> Dataset:
    ids = [f"{prefix}{i}" for i in range(len(texts))]
    rows = Dataset.from_dict({"id": ids, "text": texts})
    return rows if gold is None else rows.add_column("gold", gold, feature=List(Value("int32")))


POOL = table(["at 0", "at 10", "at 20", "at 60", "at 90"], [[0], [1], [2], [0], [1]], "p")


def texts(got: Dataset) -> list[list[str]]:
    return [[one["text"] for one in some] for some in got["demonstrations"][:]]


def test_the_nearest_stand_next_to_the_text(labels: LabelSpace) -> None:
    got = choose_demonstrations(
        table(["is 12", "is 80"]), POOL, labels, n=2, method="similarity", encoder=Angles()
    )
    assert got["demonstrations"][0] == [
        {"text": "at 20", "label": "praise"},
        {"text": "at 10", "label": "q"},
    ]
    assert texts(got)[1] == ["at 60", "at 90"]


def test_a_row_or_its_duplicate_is_never_its_own(labels: LabelSpace) -> None:
    rows = Dataset.from_dict({"id": ["a", "p1"], "text": ["At 10!", "is 10"]})
    for method, n in (("similarity", 1), ("similarity", 4), ("fixed", 4), ("diversity", 4)):
        got = choose_demonstrations(rows, POOL, labels, n=n, method=method, encoder=Angles())
        assert [len(some) for some in texts(got)] == [n, n], method
        assert not any("at 10" in some for some in texts(got)), method
    assert rows_in_pool(rows, POOL) == 2
    assert rows_in_pool(table(["at 10 0", "at 0"]), POOL) == 1


def test_fixed_ones_take_the_labels_in_turn(labels: LabelSpace) -> None:
    rows = table(["x", "y"])
    got = choose_demonstrations(rows, POOL, labels, n=3, method="fixed", seed=1)
    assert sorted(one["label"] for one in got["demonstrations"][0]) == ["bug", "praise", "q"]
    assert got["demonstrations"][0] == got["demonstrations"][1]
    drawn = {
        str(choose_demonstrations(rows, POOL, labels, n=3, method="fixed", seed=seed)[0])
        for seed in range(8)
    }
    assert len(drawn) > 1


def test_the_order_of_rows_and_pool_does_not_matter(labels: LabelSpace) -> None:
    rows = table([f"is {i}" for i in (1, 10, 44, 75, 60)])
    for method in ("fixed", "similarity", "diversity"):
        one = choose_demonstrations(rows, POOL, labels, n=2, method=method, encoder=Angles())
        two = choose_demonstrations(
            rows.select(range(4, -1, -1)),
            POOL.select([3, 0, 4, 2, 1]),
            labels,
            n=2,
            method=method,
            encoder=Angles(),
            block_rows=2,
        )
        assert one["demonstrations"][:] == two["demonstrations"][:][::-1], method


def test_diverse_ones_cover_the_pool(labels: LabelSpace) -> None:
    got = choose_demonstrations(
        table(["x"]), POOL, labels, n=3, method="diversity", encoder=Angles()
    )
    assert texts(got) == [["at 20", "at 90", "at 60"]]


@pytest.mark.parametrize("seed", range(20))
def test_k_center_equals_the_loop(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(9, 3))
    assert k_center(points, 5) == reference.k_center(points.tolist(), 5)


def test_k_center_can_take_all_points_even_equal_ones() -> None:
    assert sorted(k_center(np.array([[1.0], [1.0], [3.0]]), 3)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_no_group_comes_again_before_all_others(seed: int) -> None:
    groups = [(int(g),) for g in np.random.default_rng(seed).integers(0, 4, size=20)]
    found = in_turn(groups, seed=seed)
    assert sorted(found) == list(range(20))
    count = len(set(groups))
    assert len({groups[i] for i in found[:count]}) == count
    rest = [groups[i] for i in found]
    for a in set(groups):  # a group is absent from a round only when it has no member left
        places = [i for i, group in enumerate(rest) if group == a]
        assert all(len(set(rest[p:q])) == q - p for p, q in itertools.pairwise(places))


def test_candidates_limit_what_is_shown(labels: LabelSpace) -> None:
    rows = table(["is 12"]).add_column("candidates", [[0, 2]], feature=List(Value("int32")))
    got = choose_demonstrations(rows, POOL, labels, n=3, method="similarity", encoder=Angles())
    assert texts(got) == [["at 60", "at 0", "at 20"]]
    got = choose_demonstrations(rows, POOL, labels, n=2, method="fixed")
    assert sorted(one["label"] for one in got["demonstrations"][0]) == ["bug", "praise"]
    with pytest.raises(ValueError, match="each row has candidates of its own"):
        choose_demonstrations(rows, POOL, labels, n=2, method="diversity", encoder=Angles())


def test_what_the_pool_cannot_show(labels: LabelSpace) -> None:
    pool = table(
        ["at 1", "AT 1.", "at 2", "at 3", " "], [[0], [1], None, [], [2]], "p"
    )  # a repeat, nobody knows, none of the labels, nothing to read
    got = choose_demonstrations(table(["x"]), pool, labels, n=1, method="fixed")
    assert got["demonstrations"][:] == [[{"text": "at 1", "label": "bug"}]]
    with pytest.raises(ValueError, match=r"n must be from 1 to 1, the texts that the pool has"):
        choose_demonstrations(table(["x"]), pool, labels, n=2, method="fixed")
    with pytest.raises(ValueError, match=r"method 'similarity' compares texts; give an encoder="):
        choose_demonstrations(table(["x"]), pool, labels, n=1, method="similarity")


def test_soft_labels_can_be_the_answers(labels: LabelSpace) -> None:
    probs = np.array([[0.1, 0.7, 0.2], [0.0, 0.0, 0.0], [0.5, 0.1, 0.4]])
    pool = SoftLabels.from_dense(probs, labels).add_to(table(["at 1", "at 2", "at 3"], None, "p"))
    got = choose_demonstrations(
        table(["0"]), pool, labels, n=2, method="similarity", encoder=Angles(), answers="soft"
    )
    assert got["demonstrations"][0] == [
        {"text": "at 3", "label": "bug"},
        {"text": "at 1", "label": "q"},
    ]


def test_multilabel_answers_are_all_true_labels() -> None:
    labels = load_labels(["bug", "question", "praise"], multilabel=True)
    pool = table(["at 1", "at 2", "at 3"], [[2, 0], [], None], "p")
    given = {"n": 2, "method": "similarity", "encoder": Angles()}
    got = choose_demonstrations(table(["0"]), pool, labels, **given)
    assert got["demonstrations"][0] == [
        {"text": "at 2", "label": []},
        {"text": "at 1", "label": ["bug", "praise"]},
    ]
    probs = np.array([[0.5, 0.9, 0.4], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0]])
    soft = SoftLabels.from_dense(probs, labels).add_to(pool)
    got = choose_demonstrations(table(["0"]), soft, labels, answers="soft", **given)
    assert [one["label"] for one in got["demonstrations"][0]] == [[], ["bug", "question"]]
    label_direct(got, FakeEngine(), labels)  # reads them


def test_blocks_are_kept_and_another_pool_has_others(labels: LabelSpace, tmp_path: Path) -> None:
    given: dict[str, Any] = {"n": 1, "method": "similarity", "output": tmp_path}
    one = choose_demonstrations(table(["is 12"]), POOL, labels, encoder=Angles(), **given)
    again = Angles()
    two = choose_demonstrations(table(["is 12"]), POOL, labels, encoder=again, **given)
    assert again.asked == labels.texts()  # its name only
    assert one["demonstrations"][:] == two["demonstrations"][:]
    smaller = POOL.select([0, 3])
    three = choose_demonstrations(table(["is 12"]), smaller, labels, encoder=Angles(), **given)
    assert texts(three) == [["at 0"]]


def test_what_was_chosen_survives_a_file(labels: LabelSpace, tmp_path: Path) -> None:
    multilabel = load_labels(["bug", {"id": "q", "name": "question"}, "praise"], multilabel=True)
    for space in (labels, multilabel):
        got = choose_demonstrations(table(["x", "y"]), POOL, space, n=2, method="fixed")
        expected = label_direct(got, FakeEngine(), space)["label_probs"][:]
        plain = label_direct(table(["x", "y"]), FakeEngine(), space)["label_probs"][:]
        assert expected == plain  # the fake engine reads the last turn only
        for name in ("chosen.parquet", "chosen.jsonl"):
            again = load(save(got, tmp_path / name))
            assert again["demonstrations"][:] == got["demonstrations"][:], name
            assert label_direct(again, FakeEngine(), space)["label_probs"][:] == expected
