"""What labels are worth without gold, and labels described by texts of their own."""

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import taxonomy as reference
from taxonomy.scripted import Scripted

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.describe import with_examples
from llmlabel.taxonomy.induce import with_other
from llmlabel.taxonomy.quality import information, taxonomy_quality


def assigned(labels: LabelSpace, best: list[int]) -> Dataset:
    rows = Dataset.from_dict(
        {"id": [str(i) for i in range(len(best))], "text": [f"say {'abx'[b]}" for b in best]}
    )
    probs = np.zeros((len(best), len(labels)))
    for row, label in enumerate(best):
        probs[row, label] = label >= 0
    return SoftLabels.from_dense(probs, labels).add_to(rows)


class Letters:
    """An encoder that sees which of three letters a text has."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        return np.array([[1e-6 + (letter in text.split()) for letter in "abx"] for text in texts])


def test_coverage_and_pairwise_accuracy() -> None:
    labels = with_other(load_labels(["a", "b"]))
    rows = assigned(labels, [0, 0, 1, 2, -1])
    got = taxonomy_quality(rows, labels, encoder=Letters())
    assert got == {
        "rows": 5,
        "coverage": 0.6,
        "pairwise": 1.0,
        "pairs": 3,
        "labels": 2,
        "used": 2,
    }
    judged = taxonomy_quality(rows, labels, engine=Scripted())
    assert (judged["pairwise"], judged["coverage"]) == (1.0, 0.6)
    wrong = rows.select([2, 1, 0])
    texts = wrong["text"][:]
    wrong = wrong.remove_columns("text").add_column("text", texts[::-1])
    got = taxonomy_quality(wrong, labels, encoder=Letters())
    assert got["pairwise"] == pytest.approx(1 / 3)


def test_pairs_do_not_depend_on_the_order_of_rows() -> None:
    labels = load_labels(["a", "b", "x", "y", "z"])
    rows = assigned(labels, [0, 1, 2] * 5)

    class Half:
        """Ties everywhere but with y, which no text likes."""

        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return np.array([[0.0, 1.0] if text == "y" else [1.0, 0.0] for text in texts])

    one = taxonomy_quality(rows, labels, other=None, encoder=Half(), seed=4)
    order = np.random.default_rng(0).permutation(15)
    assert taxonomy_quality(rows.select(order), labels, other=None, encoder=Half(), seed=4) == one
    assert 0.5 < one["pairwise"] < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either encoder= or engine="),
        ({"encoder": Letters(), "engine": Scripted()}, "give either encoder= or engine="),
        ({"encoder": Letters(), "other": "a"}, "needs two labels besides 'a'"),
    ],
)
def test_quality_needs_a_judge_and_two_labels(given: dict[str, Any], message: str) -> None:
    labels = load_labels(["a", "b"])
    with pytest.raises(ValueError, match=message):
        taxonomy_quality(assigned(labels, [0, 1]), labels, **{"other": None, **given})


@pytest.mark.parametrize("seed", range(20))
def test_information_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(int(rng.integers(2, 6)), 0.3), 30)
    probs[0] = np.eye(probs.shape[1])[0]
    assert information(probs) == pytest.approx(reference.information(probs.tolist()), abs=1e-12)


def test_information_at_its_limits() -> None:
    assert information(np.eye(4)) == pytest.approx(math.log(4))
    assert information(np.full((3, 4), 0.25)) == pytest.approx(0.0)
    assert information(np.ones((3, 1))) == 0.0
    assert information(np.zeros((0, 3))) == 0.0


# ------------------------------------------------------------------------- described by examples


class Counting:
    """Counts words; "cat or dog" is nearer to cat by the order of labels alone."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        counts = np.array([[t.count("cat") * 1.1, t.count("dog"), t.count("fish")] for t in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_labels_are_described_by_their_most_central_texts() -> None:
    texts = ["cat cat", "cat sits on a mat all day", "cat or dog", "dog", " "]
    rows = Dataset.from_dict({"id": list("abcde"), "text": texts})
    labels = load_labels([{"name": "dog", "description": "it barks"}, "cat", "fish"])
    got = with_examples(rows, Counting(), labels, texts=2, words=3)
    assert got.names == labels.names
    assert got.ids == labels.ids
    assert got.descriptions == ("it barks; such as: dog", "such as: cat cat / cat sits on", "")
    twice = Dataset.from_dict({"id": list("abcde"), "text": ["cat  cat", *texts[:4]]})
    assert with_examples(twice, Counting(), labels, texts=2, words=3) == got
    order = [3, 1, 4, 0, 2]
    assert with_examples(rows.select(order), Counting(), labels, texts=2, words=3) == got
    with pytest.raises(ValueError, match="texts and words must be at least 1; got 0 and 15"):
        with_examples(rows, Counting(), labels, texts=0)
