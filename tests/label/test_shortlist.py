from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import demonstrations as reference

from llmlabel.label.embedding import label_embedding
from llmlabel.label.shortlist import shortlist, shortlist_recall, top_k
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.models import MINILM

VECTORS = {
    "red: a colour": [1.0, 0.0, 0.0],
    "blue": [0.0, 1.0, 0.0],
    "green": [0.0, 0.0, 1.0],
    "x": [0.6, 0.8, 0.1],
    "y": [0.0, 0.5, 0.5],
}


class Encoder:
    def __init__(self) -> None:
        self.asked = list[str]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.asked += texts
        found = np.array([VECTORS[text] for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels([{"id": "red", "description": "a colour"}, "blue", "green"])


def table(*texts: str) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": list(texts)})


def test_the_nearest_labels_nearest_first(labels: LabelSpace) -> None:
    got = shortlist(table("x", " ", "y"), Encoder(), labels, k=2)
    assert got["candidates"][:] == [[1, 0], None, [1, 2]]  # of equally near ones the lower position
    assert got.features["candidates"] == List(Value("int32"))
    assert shortlist(table("y"), Encoder(), labels, k=3)["candidates"][:] == [[1, 2, 0]]
    with pytest.raises(ValueError, match="k must be from 1 to 3, the number of labels; got 4"):
        shortlist(table("x"), Encoder(), labels, k=4)


def test_blocks_are_kept(labels: LabelSpace, tmp_path: Path) -> None:
    one = shortlist(table("x", "y"), Encoder(), labels, k=2, block_rows=1, output=tmp_path)
    again = Encoder()
    two = shortlist(table("x", "y", "x"), again, labels, k=2, block_rows=1, output=tmp_path)
    assert again.asked == [*labels.texts(), *labels.texts(), "x"]  # its name, the labels, one row
    assert two["candidates"][:] == [*one["candidates"][:], [1, 0]]
    other = shortlist(table("x"), Encoder(), labels, k=1, block_rows=1, output=tmp_path)
    assert other["candidates"][:] == [[1]]


@pytest.mark.parametrize("seed", range(20))
def test_top_k_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=(6, 9)) / 4  # ties
    scores[rng.random(scores.shape) < 0.4] = -np.inf
    for k in (1, 3, 9):
        assert top_k(scores, k) == [reference.top_k(row, k) for row in scores.tolist()]


def found(lists: list[list[int] | None], gold: list[list[int] | None]) -> Dataset:
    rows = table(*"abcdefgh"[: len(lists)])
    for name, values in (("candidates", lists), ("gold", gold)):
        rows = rows.add_column(name, values, feature=List(Value("int32")))
    return rows


def test_recall_at_each_length(labels: LabelSpace) -> None:
    rows = found([[2, 0], [1, 0], [0, 1], [1, 2]], [[0], [2], None, [1]])
    assert shortlist_recall(rows, labels) == pytest.approx({1: 1 / 3, 2: 2 / 3})
    with pytest.raises(ValueError, match="no row has a true label"):
        shortlist_recall(found([[0]], [[]]), labels)


def test_recall_of_rows_without_candidates_is_none(labels: LabelSpace) -> None:
    rows = found([[2, 0], None, []], [[2], [1], [1]])
    assert shortlist_recall(rows, labels) == pytest.approx({1: 1 / 3, 2: 1 / 3})


@pytest.mark.parametrize("seed", range(20))
def test_recall_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = load_labels([str(i) for i in range(12)], multilabel=True)
    lists = [rng.permutation(12)[:7].tolist() for _ in range(8)]
    gold = [rng.permutation(12)[: rng.integers(0, 4)].tolist() for _ in range(7)] + [[3]]
    got = shortlist_recall(found(lists, gold), labels)
    assert list(got) == [1, 5, 7]
    for k, share in got.items():
        assert share == pytest.approx(reference.recall(lists, gold, k), rel=1e-12)


@pytest.mark.model
def test_minilm_shortlists_are_the_best_of_its_ranking() -> None:
    labels = load_labels(["sports", "politics", {"id": "tech", "name": "technology"}])
    texts = ["The striker scored twice in the cup final.", "Parliament voted on the bill."]
    whole = label_embedding(table(*texts), MINILM, labels)
    few = shortlist(table(*texts), MINILM, labels, k=2)
    assert few["candidates"][:] == [ids[:2] for ids in whole["label_ids"]]
    assert [some[0] for some in few["candidates"]] == [0, 1]
