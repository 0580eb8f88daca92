"""Soft labels of the nearest labels, their ceiling, and what a language model is given of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from label.letters import Letters, space
from reference import label_index as reference

from llmlabel import models
from llmlabel.data import with_columns
from llmlabel.label import retrieval
from llmlabel.label.embedding import embed
from llmlabel.label.index import index_of_vectors, label_index, load_index, save_index
from llmlabel.label.retrieval import (
    build_label_index,
    label_nearest,
    label_retrieval,
    probabilities,
    stored_candidates,
    stored_recall,
)
from llmlabel.labelspace import LabelSpace, load_labels, save_labels

MANY = space([f"label {i}" for i in range(12)])
ONE = load_labels([f"label {i}" for i in range(12)])


def rows(texts: list[str], gold: list[list[int] | None] | None = None) -> Dataset:
    found = Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": texts})
    return found if gold is None else with_columns(found, {"gold": (gold, List(Value("int32")))})


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("labels", [MANY, ONE], ids=["multi", "single"])
def test_probabilities_equal_the_loop(seed: int, labels: LabelSpace) -> None:
    rng = np.random.default_rng(seed)
    encoder, k = Letters(salt=seed), int(rng.integers(1, 15))
    scale, midpoint = float(rng.uniform(1, 12)), float(rng.uniform(0, 0.6))
    texts = [f"text {i}" for i in range(5)]
    got = label_retrieval(
        rows(texts), model=encoder, labels=labels, k=k, scale=scale, midpoint=midpoint, block_rows=2
    )
    anchors = encoder.encode(labels.texts()).astype(np.float32).tolist()
    for row, vector in zip(got, encoder.encode(texts).tolist(), strict=True):
        near = reference.nearest(vector, anchors, k)
        expected = reference.probs([c for c, _ in near], scale, midpoint, labels.multilabel)
        assert row["label_ids"] == [label for _, label in near]
        np.testing.assert_allclose(row["label_probs"], expected, rtol=1e-4)
        assert row["error"] is None
        assert row["label_space"] == labels.fingerprint
        assert row["engine"].startswith("retrieval:encoder:Letters@")


def test_no_label_has_probability_0_however_sharp() -> None:
    for multilabel in (True, False):
        cosines = np.array([[1.0, 0.0, -1.0]])
        values = probabilities(cosines, 1e6, 0.5, multilabel=multilabel).astype(np.float32)
        assert (values > 0).all()
        assert values[0, 0] == 1.0


@pytest.mark.parametrize("midpoint", [0.5, 0.0, -1.0, 1.0])
def test_a_small_temperature_keeps_the_order_of_several_labels(midpoint: float) -> None:
    """At 1 / 0.01 all cosines from .7 on have probability 1, and the lowest number comes first."""
    cosines = np.array([[0.7, 0.75, 0.8, 0.85, 0.9, 0.95]])
    index = index_of_vectors(
        space([*"abcdef"]), np.stack([cosines[0], np.sqrt(1 - cosines[0] ** 2)], 1), encoder="e"
    )
    towers = retrieval._Towers("e", index.labels, 1 / 0.01, lambda: (Letters(), Letters()))
    sharpness = retrieval._sharpness(towers, index.labels, midpoint)
    vector = with_columns(rows(["t"]), {"vector": ([[1.0, 0.0]], List(Value("float32")))})
    got = label_nearest(vector, index, scale=sharpness, midpoint=midpoint)
    assert got["label_ids"] == [[5, 4, 3, 2, 1, 0]]
    assert retrieval._sharpness(towers, ONE, midpoint) == 100.0  # softmax keeps it at any
    with pytest.raises(ValueError, match="all have probability 1 and no order"):
        label_nearest(vector, index, scale=100.0, midpoint=0.5)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_a_kept_index_is_searched_as_asked(tmp_path: Path, graph: bool, more: bool) -> None:
    pytest.importorskip("usearch")
    before, after = ("exact", "hnsw") if graph else ("hnsw", "exact")
    labels = space([*MANY.names, "new"]) if more else MANY
    folder = build_label_index(
        Letters(),
        labels=MANY,
        output=tmp_path / "index",
        search=before,
    )
    assert (load_index(folder).graph is None) == graph
    build_label_index(Letters(), labels=labels, output=folder)  # auto
    assert (load_index(folder).graph is None) == graph
    build_label_index(Letters(), labels=labels, output=folder, search=after)
    kept = load_index(folder, labels=labels)
    assert (kept.graph is not None) == graph
    assert (folder / "graph.usearch").is_file() == graph
    queries = Letters().encode(["p", "q"])
    fresh = label_index(labels, Letters())
    np.testing.assert_array_equal(kept.search(queries, k=5)[0], fresh.search(queries, k=5)[0])
    stamp = (folder / "index.json").stat().st_mtime_ns
    build_label_index(Letters(), labels=labels, output=folder, search=after)
    assert (folder / "index.json").stat().st_mtime_ns == stamp  # nothing to do


def test_a_row_without_text_has_no_label_and_a_cut_is_told() -> None:
    class Short(Letters):
        max_seq_length = 2

        def tokenizer(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0] * len(text.split()) for text in texts]}

    got = label_retrieval(rows(["a b", " ", "a b c"]), model=Short(), labels=MANY, k=2)
    assert got["label_ids"][1] == []
    assert got["error"] == [None, "empty text", "text cut: 3 tokens, the limit is 2"]
    assert len(got["label_ids"][2]) == 2


def test_rows_with_vectors_get_the_same_labels() -> None:
    texts = rows([f"t{i}" for i in range(7)])
    index = label_index(MANY, Letters())
    near = label_nearest(embed(texts, Letters()), index, k=3, block_rows=3)
    direct = label_retrieval(texts, model=Letters(), labels=MANY, k=3)
    assert near["label_ids"] == direct["label_ids"]
    np.testing.assert_allclose(near["label_probs"], direct["label_probs"], rtol=1e-5)


def test_finished_blocks_and_the_index_are_used_again(tmp_path: Path) -> None:
    texts = rows([f"t{i}" for i in range(6)])
    places = {"index": tmp_path / "index", "output": tmp_path / "out"}
    first = label_retrieval(texts, model=Letters(), labels=MANY, k=3, block_rows=2, **places)
    assert load_index(places["index"]).labels == MANY
    encoder = Letters()
    again = label_retrieval(texts, model=encoder, labels=MANY, k=3, block_rows=2, **places)
    assert again["label_probs"] == first["label_probs"]
    assert encoder.read == ["a text", "another"]  # for its name alone
    more = space([*MANY.names, "new"])
    label_retrieval(texts, model=encoder, labels=more, k=3, index=places["index"])
    assert [text for text in encoder.read if text == "new"] == ["new"]
    assert sum(text.startswith("label ") for text in encoder.read) == 8  # to see whose they are
    assert load_index(places["index"]).labels == more
    with pytest.raises(ValueError, match="does not belong to the model; build it again"):
        label_retrieval(texts, model=Letters(salt=3), labels=more, index=places["index"])


def test_an_index_is_a_folder_that_other_steps_read(tmp_path: Path) -> None:
    encoder = Letters()
    folder = build_label_index(encoder, labels=MANY, output=tmp_path / "index")
    assert folder == build_label_index(encoder, labels=MANY, output=folder)
    assert sum(text.startswith("label ") for text in encoder.read) == 12 + 8  # and whose it is
    texts = embed(rows(["a", "b"]), encoder)
    near = label_nearest(texts, folder, k=3)
    expected = label_nearest(texts, label_index(MANY, Letters()), k=3)
    assert near["label_ids"] == expected["label_ids"]
    with pytest.raises(ValueError, match="labels= is missing"):
        build_label_index(encoder, output=folder)


def test_labels_of_another_index_of_the_same_name_are_not_taken(tmp_path: Path) -> None:
    texts = embed(rows([f"t{i}" for i in range(6)]), Letters())
    found = []
    for salt in (0, 1, 0):
        index = label_index(MANY, Letters(salt=salt), name="mine")
        near = label_nearest(texts, index, k=3, output=tmp_path / "out")
        assert near["label_ids"] == label_nearest(texts, index, k=3)["label_ids"]
        found.append(near["label_ids"][:])
    assert found[0] != found[1]


def test_a_folder_of_a_student_or_with_a_broken_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_card.json").write_text('{"model": "m", "settings": {}}')
    with pytest.raises(
        ValueError, match=r"it is of a student that reads texts alone, not of a dual"
    ):
        label_retrieval(rows(["a"]), model=tmp_path)
    (tmp_path / "encoder").mkdir()
    for content, why in (("{", "JSONDecodeError"), ('{"settings": {}}', "KeyError: 'temperature'")):
        (tmp_path / "model_card.json").write_text(content)
        with pytest.raises(ValueError, match=rf"^model '.*' cannot be loaded \({why}"):
            label_retrieval(rows(["a"]), model=tmp_path)


def test_what_has_no_meaning_is_refused() -> None:
    texts = rows(["a"])
    with pytest.raises(ValueError, match="labels= is missing: an encoder that nobody trained"):
        label_retrieval(texts, model=Letters())
    for wrong, message in (
        ({"k": 0}, "k must be at least 1"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"midpoint": 2.0}, "midpoint is a cosine"),
        ({"scale": 25.0}, r"scale x \(1 - midpoint\) must be at most 12 .* got scale=25"),
    ):
        with pytest.raises(ValueError, match=message):
            label_retrieval(texts, model=Letters(), labels=MANY, **wrong)


@pytest.mark.parametrize("seed", range(20))
def test_recall_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = [rng.choice(12, rng.integers(0, 5), replace=False).tolist() for _ in range(9)] + [[1]]
    dataset = rows([f"t{i}" for i in range(10)], [None, *gold[1:]])
    found = label_retrieval(dataset, model=Letters(), labels=MANY, k=6)
    got = stored_recall(found, MANY, ks=(1, 4, 6))
    for k in (1, 4, 6):
        expected = reference.recall(found["label_ids"], [[], *gold[1:]], k)
        assert got[f"R@{k}"] == pytest.approx(expected, abs=1e-12)


def test_recall_without_gold_is_refused() -> None:
    found = label_retrieval(rows(["a"], [[]]), model=Letters(), labels=MANY, k=2)
    with pytest.raises(ValueError, match="no row has a true label"):
        stored_recall(found, MANY)


def test_the_first_stored_labels_become_candidates() -> None:
    found = label_retrieval(rows(["a", " "]), model=Letters(), labels=MANY, k=6)
    got = stored_candidates(found, MANY, k=2)
    assert got["candidates"] == [found["label_ids"][0][:2], None]
    with pytest.raises(ValueError, match="k must be at least 1, the number of candidates"):
        stored_candidates(found, MANY, k=0)
    with pytest.raises(ValueError, match="label space"):
        stored_candidates(found, ONE)


def test_a_sentence_transformer_reads_texts_and_labels(tiny_encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    SentenceTransformer(str(tiny_encoder)).save(str(folder))
    labels = load_labels(["a cat", "a dog", "sports"], multilabel=True)
    got = label_retrieval(rows(["a dog", "sports"]), model=folder, labels=labels, k=2)
    assert [some[0] for some in got["label_ids"]] == [1, 2]
    assert got["label_probs"][0][0] == pytest.approx(1 / (1 + np.exp(-10)), abs=1e-5)
    assert retrieval._towers(folder).scale == 20.0


@pytest.mark.parametrize("separate", [False, True])
def test_a_trained_folder_brings_labels_temperature_and_towers(
    separate: bool,
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "model"
    tower = SentenceTransformer(str(tiny_encoder))
    tower.save(str(folder / "encoder"), create_model_card=False)
    if separate:
        with torch.no_grad():
            for weight in tower.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.manual_seed(0)))
        tower.save(str(folder / "label_encoder"), create_model_card=False)
    labels = load_labels(["a cat", "a dog", "sports"], multilabel=True)
    save_labels(labels, folder / "labels.json")
    card = {"model": "tiny", "labels": labels.fingerprint, "settings": {"temperature": 0.01}}
    (folder / "model_card.json").write_text(json.dumps(card))
    sharp = label_retrieval(rows(["a dog"]), model=folder)
    assert max(sharp["label_probs"][0]) < 1  # not those of 1 / 0.01, which are all the same
    card["settings"] = {"temperature": 0.1}
    (folder / "model_card.json").write_text(json.dumps(card))
    got = label_retrieval(rows(["a dog"]), model=folder, midpoint=0.0)
    texts = models.load_encoder(folder / "encoder").encode(["a dog"], normalize_embeddings=True)
    names = tower.encode(labels.texts(), normalize_embeddings=True)
    cosines = (names @ texts[0]).tolist()
    for label, prob in zip(got["label_ids"][0], got["label_probs"][0], strict=True):
        assert prob == pytest.approx(1 / (1 + np.exp(-10 * cosines[label])), abs=1e-4)
    assert got["engine"][0].startswith("retrieval:dual_encoder:tiny@")
    more = load_labels(["a cat", "a dog", "sports", "dog a"], multilabel=True)
    wider = label_retrieval(rows(["a dog"]), model=folder, labels=more)
    assert sorted(wider["label_ids"][0]) == [0, 1, 2, 3]

    save_index(label_index(labels, Letters(32)), folder / "index")  # of another model
    with pytest.raises(ValueError, match="does not belong to the model"):
        label_retrieval(rows(["a dog"]), model=folder)
    save_index(
        label_index(labels, folder / ("label_encoder" if separate else "encoder")), folder / "index"
    )
    again = label_retrieval(rows(["a dog"]), model=folder, midpoint=0.0)
    np.testing.assert_allclose(again["label_probs"], got["label_probs"], rtol=1e-4)
