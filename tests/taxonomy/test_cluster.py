"""Clusters named by a language model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.engine import Reply, Scores
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.cluster import cluster_labels, cluster_taxonomy, cluster_texts

TOPICS = ("cat", "bank", "rain")
SIZES = (6, 9, 4)


def rows() -> Dataset:
    texts = [f"{topic} word{i}" for topic, n in zip(TOPICS, SIZES, strict=True) for i in range(n)]
    texts.append("  ")
    return Dataset.from_dict({"id": [f"r{i:02}" for i in range(len(texts))], "text": texts})


class Directions:
    """A direction per topic; the number of the text turns it a little aside."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        vectors = np.zeros((len(texts), 6))
        for row, text in enumerate(texts):
            topic, word = text.split()
            vectors[row, TOPICS.index(topic)] = 1.0
            vectors[row, 3 + int(word[4:]) % 3] = 0.02 * int(word[4:])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Namer:
    """Answers with the next of its replies, and remembers what it was asked."""

    name = "namer"

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), list[Chat]()
        self.temperatures = list[float]()

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        self.asked += chats
        self.temperatures += [temperature] * len(chats)
        return [Reply(self.replies.pop(0), "stop") for _ in chats]

    def score(self, chats: Sequence[Chat], labels: Sequence[str], **given: Any) -> Scores:
        raise NotImplementedError


def label(name: str) -> str:
    return json.dumps({"name": name, "description": f"about {name}"})


def test_clusters_are_numbered_by_size() -> None:
    got = cluster_texts(rows(), Directions(), n_labels=3)
    assert got["cluster"][:] == [1] * 6 + [0] * 9 + [2] * 4 + [-1]
    vectors = Directions().encode(got["text"][:6])
    mean = vectors.mean(axis=0)
    expected = vectors @ mean / np.linalg.norm(mean)
    np.testing.assert_allclose(got["centrality"][:6], expected, rtol=1e-6)
    assert got["centrality"][-1] is None


def test_hdbscan_finds_their_number() -> None:
    got = cluster_texts(rows(), Directions(), method="hdbscan", min_texts=3)
    assert got["cluster"][:] == [1] * 6 + [0] * 9 + [2] * 4 + [-1]


def test_clusters_do_not_depend_on_the_order_of_rows() -> None:
    order = np.random.default_rng(0).permutation(20)
    mixed = cluster_texts(rows().select(order), Directions(), n_labels=5, seed=3)
    plain = cluster_texts(rows(), Directions(), n_labels=5, seed=3)
    assert mixed["cluster"][:] == plain.select(order)["cluster"][:]


def test_names() -> None:
    engine = Namer(label("Banks"), label("Cats"), label("Weather"))
    clustered = cluster_texts(rows(), Directions(), n_labels=3)
    got = cluster_taxonomy(clustered, engine, use_case="tests", nearest=2)
    assert got.labels.ids == ("banks", "cats", "weather")
    assert got.labels.descriptions == ("about Banks", "about Cats", "about Weather")
    central = sorted(range(6), key=lambda row: -clustered["centrality"][row])[:2]
    assert engine.asked[1][-1]["content"].split("\n")[1:3] == [f"- cat word{i}" for i in central]
    assert "have these names already" not in engine.asked[0][0]["content"]
    entry = got.history[0]
    assert (entry["step"], entry["batch"], entry["labels"]) == ("name", 0, ["Banks"])
    assert (entry["problem"], entry["notes"]) == (None, ["9 texts"])


def test_a_text_that_is_there_twice_is_shown_once() -> None:
    texts = ["cat word0", "cat  word0", "cat word1", "cat word2", "bank word0", "bank word0"]
    clustered = Dataset.from_dict(
        {
            "id": list("abcdef"),
            "text": texts,
            "cluster": [0, 0, 0, 0, 1, 1],
            "centrality": [0.9, 0.9, 0.8, 0.7, 0.9, 0.9],
        }
    )
    engine = Namer(label("Cats"), label("Banks"))
    got = cluster_taxonomy(clustered, engine, use_case="tests", nearest=2)
    shown = [chat[-1]["content"].split("\n")[1:-2] for chat in engine.asked]
    assert shown == [["- cat word0", "- cat word1"], ["- bank word0"]]
    assert got.history[0]["notes"] == ["4 texts"]


def test_the_example_comes_first_and_is_no_answer() -> None:
    described = "How much and how often to water plants"
    example = json.dumps({"name": "watering", "description": described})
    echo = json.dumps({"name": "Cats", "description": described})
    engine = Namer(example, echo, label("Weather"), label("Banks"))
    got = cluster_taxonomy(
        cluster_texts(rows(), Directions(), n_labels=3), engine, use_case="tests"
    )
    assert got.labels.names == ("Banks", "Cats", "Weather")
    assert got.labels.descriptions == ("about Banks", "", "about Weather")
    assert engine.temperatures == [0.0, 0.0, 0.0, 0.1]
    shown = json.loads(engine.asked[0][2]["content"])
    assert shown == {"name": "Watering", "description": "how much and how often to water plants"}


@pytest.mark.parametrize(("text", "name"), [("cat word0", "Cats"), ("watering cats", "Watering")])
def test_the_name_of_the_example_needs_a_text_that_says_it(text: str, name: str) -> None:
    clustered = Dataset.from_dict(
        {"id": ["a", "b"], "text": [text, "bank"], "cluster": [0, 1], "centrality": [0.9, 0.9]}
    )
    engine = Namer(label("Watering"), label("Banks"), label("Cats"))
    got = cluster_taxonomy(clustered, engine, use_case="tests")
    assert got.labels.names == (name, "Banks")


def test_a_taken_name_is_asked_for_again_with_the_others_in_view() -> None:
    engine = Namer(label("Pets"), label("pets"), label("Weather"), label("Cats"))
    clustered = cluster_texts(rows(), Directions(), n_labels=3)
    got = cluster_taxonomy(clustered, engine, use_case="tests")
    assert got.labels.names == ("Pets", "Cats", "Weather")
    assert "find another one: Pets, Weather" in engine.asked[3][0]["content"]


def test_words_of_the_texts_make_a_name_when_nothing_else_does() -> None:
    engine = Namer(*[label("Pets"), "{", label("Pets")], *["{"] * 5, *[label("Pets")] * 2)
    clustered = cluster_texts(rows(), Directions(), n_labels=3)
    got = cluster_taxonomy(clustered, engine, use_case="tests")
    assert got.labels.names == ("Pets", "cat", "Pets (rain)")
    assert got.labels.descriptions == ("about Pets", "", "about Pets")
    assert engine.temperatures[2:8] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert got.history[1]["attempts"] == 6
    assert got.history[1]["problem"].endswith("too early: words of the texts make the name")
    assert got.history[2]["problem"] == "the name is taken: words of the texts make the name"


def test_words_that_set_clusters_apart_weigh_more() -> None:
    from llmlabel.taxonomy.cluster import _class_tfidf

    weights = _class_tfidf([["cat cat the", "the"], ["bank the the the"], ["the"]])
    mean = 9 / 3
    assert weights[0] == {"cat": pytest.approx(2 * math.log(1 + mean / 2))}
    assert weights[1] == {"bank": pytest.approx(math.log(1 + mean / 1))}
    assert weights[2] == {"the": pytest.approx(math.log(1 + mean / 6))}  # it has no word of its own


def test_calls_are_kept(tmp_path: Path) -> None:
    clustered = cluster_texts(rows(), Directions(), n_labels=3)
    replies = [label("Banks"), label("Cats"), label("Weather")]
    first = cluster_taxonomy(clustered, Namer(*replies), use_case="tests", output=tmp_path)
    assert cluster_taxonomy(clustered, Namer(), use_case="tests", output=tmp_path) == first


def test_soft_labels_of_clusters() -> None:
    labels = load_labels(["a", "b", "c"])
    got = cluster_labels(cluster_texts(rows(), Directions(), n_labels=3), labels)
    probs = SoftLabels.from_dataset(got, labels).dense()
    assert probs[:-1].argmax(axis=1).tolist() == [1] * 6 + [0] * 9 + [2] * 4
    assert (probs[:-1].max(axis=1) == 1).all()
    assert probs[-1].tolist() == [0, 0, 0]
    assert got["error"][:] == [None] * 19 + ["in no cluster"]
    with pytest.raises(ValueError, match="cluster 2 has no label; there are 2"):
        cluster_labels(got, load_labels(["a", "b"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "kmeans needs a number"),
        ({"method": "hdbscan", "n_labels": 3}, "hdbscan finds it"),
        ({"n_labels": 50}, "19 rows have a text, and kmeans needs 50; .* lower n_labels"),
        ({"method": "hdbscan", "min_texts": 12}, "hdbscan needs 24; .* lower min_texts"),
        ({"method": "hdbscan", "min_texts": 9}, "hdbscan found . clusters; lower min_texts"),
    ],
)
def test_what_cannot_be_clustered(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_texts(rows(), Directions(), **given)


def test_one_cluster_is_no_choice() -> None:
    clustered = cluster_texts(rows(), Directions(), n_labels=3)
    some = clustered.filter(lambda row: row["cluster"] == 0)
    with pytest.raises(ValueError, match="1 clusters, and a choice needs two"):
        cluster_taxonomy(some, Namer(), use_case="tests")
    with pytest.raises(ValueError, match="the column 'cluster' is missing"):
        cluster_taxonomy(rows(), Namer(), use_case="tests")
