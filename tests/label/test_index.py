"""The labels nearest to a vector: exact search, the graph, updates, the folder."""

import builtins
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label.letters import Letters, space, unit
from reference import label_index as reference
from safetensors.numpy import load_file, save_file

from llmlabel.label import index as module
from llmlabel.label import topk
from llmlabel.label.index import (
    LabelIndex,
    check_encoder,
    index_of_vectors,
    label_index,
    load_index,
    save_index,
    searched,
    updated,
)
from llmlabel.labelspace import LabelSpace, load_labels


@pytest.mark.parametrize("seed", range(20))
def test_search_equals_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "CHUNK", 7)
    monkeypatch.setattr(module, "_SLACK", 1)
    rng = np.random.default_rng(seed)
    labels = unit(rng.integers(-1, 2, size=(40, 3)) + 1e-3)  # many labels of one vector
    queries = unit(np.concatenate([rng.normal(size=(5, 3)), labels[:3]]))
    k = int(rng.integers(1, 45))
    index = index_of_vectors(load_labels([f"l{i}" for i in range(40)]), labels, encoder="e")
    ids, cosines = index.search(queries, k=k)
    exact = labels.astype(np.float64)
    for row, query in enumerate(queries.astype(np.float64).tolist()):
        expected = reference.nearest(query, exact.tolist(), k)
        assert ids[row].tolist() == [label for _, label in expected]
        np.testing.assert_allclose(cosines[row], [cosine for cosine, _ in expected], atol=1e-12)


def test_all_labels_where_k_is_larger() -> None:
    index = label_index(space(["a", "b", "c"]), Letters())
    ids, _ = index.search(Letters().encode(["x", "y"]), k=100)
    assert np.sort(ids).tolist() == [[0, 1, 2]] * 2
    with pytest.raises(
        ValueError, match="k must be at least 1, the number of labels to find; got 0"
    ):
        index.search(Letters().encode(["x"]), k=0)


def test_results_do_not_depend_on_which_rows_share_a_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    labels, queries = unit(rng.normal(size=(500, 64))), unit(rng.normal(size=(33, 64)))
    index = index_of_vectors(load_labels([f"l{i}" for i in range(500)]), labels, encoder="e")
    whole = index.search(queries, k=20)
    monkeypatch.setattr(module, "_QUERIES", 5)
    monkeypatch.setattr(topk, "CHUNK", 64)
    for got, expected in zip(index.search(queries, k=20), whole, strict=True):
        assert (got == expected).all()


def test_equal_texts_are_encoded_once_and_all_their_labels_found() -> None:
    encoder = Letters()
    index = label_index(space(["fish", "boat", "fish", "sail"]), encoder, name="letters")
    assert encoder.read == ["fish", "boat", "sail"]
    assert index.size == 3
    ids, cosines = index.search(Letters().encode(["fish"]), k=3)
    assert ids[0, :2].tolist() == [0, 2]
    np.testing.assert_allclose(cosines[0, :2], 1.0, atol=1e-6)


def test_an_update_encodes_new_texts_alone() -> None:
    old = label_index(space(["a", "b", "c"]), Letters())
    encoder = Letters()
    new = updated(old, space(["c", "d", "b", "d"]), encoder)
    assert encoder.read == ["a", "b", "c", "d"]  # the three of before only to see whose they are
    fresh = label_index(space(["c", "d", "b", "d"]), Letters())
    queries = Letters().encode([f"q{i}" for i in range(9)])
    for got, expected in zip(new.search(queries, k=4), fresh.search(queries, k=4), strict=True):
        np.testing.assert_array_equal(got, expected)
    again, _ = old.search(queries, k=3)  # what was given is as it was
    assert np.sort(again).tolist() == [[0, 1, 2]] * 9


def test_vectors_of_no_label_are_thrown_away_when_they_are_many() -> None:
    names = [f"n{i}" for i in range(20)]
    index = label_index(space(names), Letters())
    few = updated(index, space([*names[:17], "x"]), Letters())
    assert few.size == 21  # three of no label, which are not found
    ids, _ = few.search(Letters().encode(names[17:]), k=18)
    assert np.sort(ids).tolist() == [list(range(18))] * 3
    many = updated(index, space([*names[:9], "x"]), Letters())
    assert many.size == 10
    fresh = label_index(space([*names[:9], "x"]), Letters())
    queries = Letters().encode(["p", "q"])
    np.testing.assert_array_equal(many.search(queries, k=10)[0], fresh.search(queries, k=10)[0])


def test_many_updates_equal_one(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(30)]
    index = label_index(space(names[:4]), Letters())
    for count in range(5, 31):
        index = updated(index, space(names[:count]), Letters())
    assert len(index.vectors) <= 2
    kept = load_index(save_index(index, tmp_path / "index"))
    fresh = label_index(space(names), Letters())
    queries = Letters().encode(["p", "q"])
    for some in (index, kept):
        np.testing.assert_array_equal(some.search(queries, k=9)[0], fresh.search(queries, k=9)[0])


def clustered(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(50, 24))
    return unit(centres[rng.integers(0, 50, rows)] + 0.4 * rng.normal(size=(rows, 24)))


def test_the_graph_finds_nearly_all_grows_and_is_kept(tmp_path: Path) -> None:
    vectors, queries = clustered(3000, 1), clustered(50, 2)
    names = load_labels([f"l{i}" for i in range(3000)], multilabel=True)
    exact = index_of_vectors(names, vectors, encoder="e")
    graph = index_of_vectors(names, vectors, encoder="e", search="hnsw")
    assert exact.graph is None
    assert len(graph.graph) == 3000
    best, near = exact.search(queries, k=10)
    ids, cosines = graph.search(queries, k=10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(ids, best, strict=True)]) > 0.97
    same = ids[:, 0] == best[:, 0]
    np.testing.assert_array_equal(cosines[same, 0], near[same, 0])  # computed anew, not the graph's

    more = space([*names.names, "new"])
    grown = updated(graph_of(graph, names), more, Fixed(vectors, names))
    assert len(grown.graph) == 3001
    found, _ = grown.search(Fixed(vectors, names).encode(["new"]), k=1)
    assert found.tolist() == [[3000]]
    old, _ = graph.search(Fixed(vectors, names).encode(["new"]), k=3)  # does not see what is newer
    assert old.max() < 3000
    with pytest.raises(ValueError, match="updated once already; update the newer one"):
        updated(graph_of(graph, names), space([*names.names, "other"]), Fixed(vectors, names))

    kept = load_index(save_index(grown, tmp_path / "index"), labels=more)
    np.testing.assert_array_equal(kept.search(queries, k=10)[0], grown.search(queries, k=10)[0])


def graph_of(index: LabelIndex, labels: LabelSpace) -> LabelIndex:
    return LabelIndex(labels, index.encoder, index.vectors, index.rows, index.graph)


class Fixed(Letters):
    """The vectors given for the names of the labels, and letters for all else."""

    def __init__(self, vectors: np.ndarray, labels: LabelSpace) -> None:
        super().__init__(vectors.shape[1])
        self.own = dict(zip(labels.names, vectors, strict=True))

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        drawn = super().encode(texts)
        return np.array([self.own.get(text, drawn[i]) for i, text in enumerate(texts)])


def test_labels_taken_from_a_graph_are_not_found() -> None:
    vectors = clustered(400, 1)
    names = load_labels([f"l{i}" for i in range(400)], multilabel=True)
    graph = index_of_vectors(names, vectors, encoder="e", search="hnsw")
    fewer = load_labels([f"l{i}" for i in range(50, 400)], multilabel=True)
    less = updated(graph, fewer, Fixed(vectors, names))
    assert len(less.graph) == 400
    exact = index_of_vectors(fewer, vectors[50:], encoder="e")
    queries = vectors[:60]  # those of labels that are gone: the graph names them first
    ids, _ = less.search(queries, k=10)
    best, _ = exact.search(queries, k=10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(ids, best, strict=True)]) > 0.97


def test_a_graph_without_usearch_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "usearch.index":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="needs the package usearch: pip install usearch"):
        label_index(space(["a", "b"]), Letters(), search="hnsw")


def test_the_folder_gives_back_the_index(tmp_path: Path) -> None:
    labels = space(["a", "b", "a"])
    index = label_index(labels, Letters())
    folder = save_index(index, tmp_path / "index")
    assert sorted(p.name for p in folder.iterdir()) == [
        *("index.json", "labels.json", "vectors.safetensors")
    ]
    kept = load_index(folder, labels=labels)
    assert kept.labels == labels
    assert kept.encoder == index.encoder
    np.testing.assert_array_equal(kept.vectors[0], index.vectors[0])
    assert kept.rows.tolist() == [0, 1, 0]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder = save_index(label_index(space(["a", "b"]), Letters()), tmp_path / "index")
    with pytest.raises(ValueError, match=r"it is of label space .*updated, which encodes only new"):
        load_index(folder, labels=space(["a", "c"]))
    with pytest.raises(ValueError, match="does not belong to the model; build it again"):
        check_encoder(load_index(folder), Letters(salt=1))
    with pytest.raises(ValueError, match="does not belong to the model"):
        check_encoder(load_index(folder), Letters(width=5))
    with pytest.raises(ValueError, match="does not belong to the model"):
        updated(load_index(folder), space(["a", "c"]), Letters(salt=1))
    other = save_index(label_index(space(["a", "b"]), Letters(salt=1)), tmp_path / "other")
    own = (folder / "vectors.safetensors").read_bytes()
    (folder / "vectors.safetensors").write_bytes((other / "vectors.safetensors").read_bytes())
    with pytest.raises(ValueError, match="its files do not belong together; build the index again"):
        load_index(folder)
    (folder / "vectors.safetensors").write_bytes(own)  # a copy, later, is the same
    load_index(folder)
    card = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(card | {"labels": "other"}))
    with pytest.raises(ValueError, match="its files do not belong together; build the index again"):
        load_index(folder)
    (folder / "index.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index\.json is missing; give a folder of save_inde"
    ):
        load_index(folder)


def test_what_is_no_vector_is_refused(tmp_path: Path) -> None:
    class Broken(Letters):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return np.where(np.array(texts)[:, None] == "b", np.nan, super().encode(texts))

    with pytest.raises(ValueError, match="the label text 'b' has no vector of length 1"):
        label_index(space(["a", "b"]), Broken())
    index = label_index(space(["a", "b"]), Letters())
    with pytest.raises(ValueError, match="vector 1 holds a number that is not finite"):
        index.search(np.array([[0.0] * 8, [np.nan] * 8]), k=1)
    with pytest.raises(ValueError, match="have vectors of 3 numbers, those of the labels have 8"):
        index.search(np.ones((1, 3)), k=1)
    folder = save_index(index, tmp_path / "index")
    tensors = load_file(folder / "vectors.safetensors")
    tensors["vectors"][1, 0] = np.nan
    save_file(tensors, folder / "vectors.safetensors")
    with pytest.raises(ValueError, match="its vector 1 has not length 1; build the index again"):
        load_index(folder)
    with pytest.raises(ValueError, match="the vector of label 'l1' has not length 1; normalise it"):
        index_of_vectors(space(["a", "b"]), np.array([[1.0, 0.0], [2.0, 0.0]]), encoder="e")


def test_an_unknown_search_is_refused() -> None:
    index = label_index(space(["a", "b"]), Letters())
    for call, given in (
        (label_index, {"labels": index.labels, "encoder": Letters()}),
        (
            index_of_vectors,
            {"labels": index.labels, "vectors": index.vectors[0], "encoder": "e"},
        ),
        (searched, {"index": index}),
    ):
        with pytest.raises(
            ValueError, match="search must be one of auto, exact, hnsw; got 'faiss'"
        ):
            inspect.unwrap(call)(search="faiss", **given)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("index.json", b"{", "JSONDecodeError"),
        ("index.json", b"{}", "KeyError"),
        ("vectors.safetensors", b"short", "SafetensorError"),
    ],
)
def test_a_damaged_file_of_an_index_is_said(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    folder = save_index(label_index(space(["a", "b"]), Letters()), tmp_path / "index")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^label index '.*index' cannot be loaded \({why}"):
        load_index(folder)


def test_a_graph_that_is_gone_is_not_searched_without(tmp_path: Path) -> None:
    index = index_of_vectors(
        load_labels([f"l{i}" for i in range(60)]), clustered(60, 1), encoder="e", search="hnsw"
    )
    folder = save_index(index, tmp_path / "index")
    (folder / "graph.usearch").unlink()
    with pytest.raises(ValueError, match="its files do not belong together; build the index again"):
        load_index(folder)


def test_the_sha_is_of_vectors_and_rows_whatever_their_blocks() -> None:
    index = label_index(space(["a", "b", "c"]), Letters())
    parts = (index.vectors[0][:1], index.vectors[0][1:])
    assert LabelIndex(index.labels, "e", parts, index.rows).sha == index.sha
    assert LabelIndex(index.labels, "e", index.vectors, index.rows[::-1].copy()).sha != index.sha
    assert label_index(space(["a", "b", "c"]), Letters(salt=1)).sha != index.sha
