"""The labels nearest to a text among thousands to millions: a matrix of vectors, and its search.

Exact search compares with every label, block by block, and never holds rows x labels. From some
200,000 labels on a graph names candidates (HNSW, arXiv 1603.09320, of the package usearch), whose
cosines are then computed exactly. Labels that are added or taken away need no training, and only new texts are read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from llmlabel import models
from llmlabel.files import commit, write_text
from llmlabel.label import topk
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.labelspace import LabelSpace, load_labels, save_labels

Search = Literal["auto", "exact", "hnsw"]

HNSW_FROM = 200_000
"""Label texts from which "auto" searches by a graph: below, comparing with all is fast enough."""

LINKS, BUILD, SEARCH = 16, 128, 128
"""M, efConstruction and efSearch of the graph; see benchmarks/results/label_index.md.

efSearch is twice the candidates, where these are more than half of it.
"""

_TEXTS, _QUERIES = 16_384, 256
"""Texts encoded at a time, and rows searched for at a time."""

_SLACK = 16
"""Candidates beyond k, so that equal cosines at the border are seen."""

_ROUNDING = 2e-6
"""What a float32 cosine and one rounded to 6 digits differ by at most."""

_DEAD = 0.2
"""Share of vectors without a label from which they are thrown away."""

_SAME = 0.999
"""Cosine at least of a label's vector kept and the one its encoder gives now."""

_PROBE = ("a text", "another")

_CARD, _LABELS = "index.json", "labels.json"
_VECTORS, _GRAPH = "vectors.safetensors", "graph.usearch"

Found = tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]
"""Label ids and their cosines, nearest first; of equal ones (to 6 digits) the lower id."""


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """The vectors of the label texts; labels of one text share a vector.

    Attributes:
        labels: The label space, in whose positions it answers.
        encoder: Name of the encoder.
        vectors: Of length 1, float32, in one or two blocks, of which the second is what was added.
        rows: The vector of each label; others belong to labels that were taken away.
        graph: An HNSW index over all vectors, or None, where all are compared with.
    """

    labels: LabelSpace
    encoder: str
    vectors: tuple[Float[np.ndarray, "_ width"], ...]
    rows: Int[np.ndarray, " labels"]
    graph: Any = None

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.vectors[0].shape[1])

    @property
    def size(self) -> int:
        """Number of vectors."""
        return sum(map(len, self.vectors))

    def search(self, vectors: Float[np.ndarray, "rows width"], *, k: int) -> Found:
        """The `k` nearest labels of each vector, all where there are fewer.

        Without a graph exactly those of the highest cosines; with one a few may be missed.

        Raises:
            ValueError: `k` is below 1, or the vectors are not those of the labels' encoder.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, the number of labels to find; got {k}")
        if vectors.shape[1] != self.width:
            raise ValueError(
                f"the rows have vectors of {vectors.shape[1]} numbers, those of the labels have "
                f"{self.width}; embed both with one encoder"
            )
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"vector {row} holds a number that is not finite; embed it again")
        k = min(k, len(self.labels))
        ids = np.empty((len(vectors), k), dtype=np.int64)
        cosines = np.empty((len(vectors), k))
        for start in range(0, len(vectors), _QUERIES):
            some = slice(start, start + _QUERIES)
            ids[some], cosines[some] = self._search(vectors[some].astype(np.float32), k)
        return ids, cosines

    def _search(self, vectors: Float[np.ndarray, "rows width"], k: int) -> Found:
        """`search` of few rows: candidates first, and more where they are not surely enough."""
        ids, near = np.empty((len(vectors), k), dtype=np.int64), np.empty((len(vectors), k))
        left, count = np.arange(len(vectors)), k + _SLACK
        if self.graph is not None and count < self.size:
            self.graph.expansion_search = max(SEARCH, 2 * count)
            found = topk.named(self.graph, vectors, count, self.size)
            products = topk.cosines(vectors, self.vectors, found)
            ids, near, enough = topk.nearest_owners(found, products, self._owners, k=k)
            left = left[~enough]
        while len(left):
            count, some = min(count, self.size), vectors[left]
            found, least = topk.highest(some, self.vectors, count=count)
            products = topk.cosines(some, self.vectors, found)
            ids[left], near[left], enough = topk.nearest_owners(found, products, self._owners, k=k)
            enough &= (least < near[left, -1] - _ROUNDING) | (count == self.size)
            left, count = left[~enough], 4 * count
        return ids, near

    @cached_property
    def sha(self) -> str:
        """Stands for the vectors of the labels."""
        digest = hashlib.sha256(self.rows.tobytes())
        for block in self.vectors:
            digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    @cached_property
    def _owners(self) -> tuple[Int[np.ndarray, " labels"], Int[np.ndarray, " bounds"]]:
        """The labels by vector, and where those of each vector begin."""
        counts = np.bincount(self.rows, minlength=self.size)
        return np.argsort(self.rows, kind="stable"), np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def _row_of_text(self) -> dict[str, int]:
        return dict(zip(self.labels.texts(), self.rows.tolist(), strict=True))


def label_index(
    labels: LabelSpace,
    encoder: str | Path | Encoder,
    *,
    search: Search = "auto",
    name: str | None = None,
) -> LabelIndex:
    """Encodes "name: description" of every label; labels with the same text are encoded once.

    Args:
        labels: the label space.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        search: "exact" compares with every label; "hnsw" builds a graph, which needs the package
            usearch and may miss a few; "auto" takes the graph from 200,000 label texts on.
        name: of the encoder, for provenance; null makes one of its files or of what it computes.

    Raises:
        ValueError: a label has a vector that is not finite or has length 0.
    """
    _check_search(search)
    texts = labels.texts()
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    rows = np.array([row_of[text] for text in texts], dtype=np.int64)
    if search == "hnsw" or (search == "auto" and len(row_of) >= HNSW_FROM):
        topk.usearch()  # that it is missing is said before the labels are encoded
    vectors = _encoded(list(row_of), models.load_encoder(encoder))
    return _built(
        LabelIndex(labels, name or encoder_name(encoder, _PROBE), (vectors,), rows), search
    )


def index_of_vectors(
    labels: LabelSpace,
    vectors: Float[np.ndarray, "labels width"],
    *,
    encoder: str,
    search: Search = "auto",
) -> LabelIndex:
    """An index of vectors of length 1 that are there already; `encoder` is the name of their maker."""
    _check_search(search)
    if len(vectors) != len(labels):
        raise ValueError(f"{len(vectors)} vectors do not fit a space of {len(labels)} labels")
    if (row := _bad(vectors)) is not None:
        raise ValueError(f"the vector of label {labels.ids[row]!r} has not length 1; normalise it")
    rows = np.arange(len(labels))
    return _built(LabelIndex(labels, encoder, (vectors.astype(np.float32),), rows), search)


def updated(index: LabelIndex, labels: LabelSpace, encoder: str | Path | Encoder) -> LabelIndex:
    """The index of another label space, of which only texts that are new are encoded.

    Labels may be added, taken away, renamed and put in another order. Where there is a graph, it
    grows, and the index given can still be searched but not updated again.

    Args:
        index: of some of the labels, or of none.
        labels: the label space from now on.
        encoder: the encoder of the index.

    Raises:
        ValueError: the encoder is not that of the index, or the index has an update already.
    """
    texts, known = labels.texts(), index._row_of_text
    rows = np.fromiter((known.get(text, -1) for text in texts), np.int64, len(texts))
    absent = np.flatnonzero(rows < 0)
    new = list(dict.fromkeys(texts[i] for i in absent.tolist()))
    place = {text: index.size + number for number, text in enumerate(new)}
    rows[absent] = [place[texts[i]] for i in absent.tolist()]
    ready = models.load_encoder(encoder)
    check_encoder(index, ready)
    vectors = index.vectors
    if new:
        if index.graph is not None and len(index.graph) != index.size:
            raise ValueError(
                "this index was updated once already; update the newer one, or load it"
            )
        added = _encoded(new, ready)
        if index.graph is not None:
            _grown(index.graph, added)
        vectors = (vectors[0], np.concatenate([*vectors[1:], added]))
    found = replace(index, labels=labels, vectors=vectors, rows=rows)
    if index.graph is None and len(vectors) > 1 and len(vectors[1]) > len(vectors[0]):
        found = replace(found, vectors=(np.concatenate(vectors),))
    if np.count_nonzero(np.bincount(rows)) < (1 - _DEAD) * found.size:
        return _built(_compact(found), "exact" if index.graph is None else "hnsw")
    return found


def searched(index: LabelIndex, search: Search) -> LabelIndex:
    """With a graph or without, as `search` of `label_index` has it; "auto" leaves what there is."""
    _check_search(search)
    if search == "auto" or (index.graph is not None) == (search == "hnsw"):
        return index
    return _built(_compact(index), search)


def save_index(index: LabelIndex, folder: Path) -> Path:
    """Writes labels.json, the vectors as safetensors, the graph in usearch's form, and a card."""
    from safetensors.numpy import save_file

    alive = np.count_nonzero(np.bincount(index.rows)) == index.size
    if index.graph is None and not (alive and len(index.vectors) == 1):
        index = _compact(index)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CARD).unlink(missing_ok=True)  # written last: a folder without it is unfinished
    tensors = {"vectors": np.concatenate(index.vectors), "rows": index.rows}
    commit(folder / _VECTORS, lambda path: save_file(tensors, path))
    save_labels(index.labels, folder / _LABELS)
    if index.graph is None:
        (folder / _GRAPH).unlink(missing_ok=True)
    else:
        graph = index.graph
        if len(graph) != index.size:
            raise ValueError("this index was updated once already; save the newer one")
        commit(folder / _GRAPH, lambda path: graph.save(str(path)))
    card = {
        "encoder": index.encoder,
        "labels": index.labels.fingerprint,
        "sha256": _sha256(folder / _VECTORS),
        "graph": index.graph is not None,
    }
    write_text(folder / _CARD, json.dumps(card, indent=2))
    return folder


def load_index(folder: Path, *, labels: LabelSpace | None = None) -> LabelIndex:
    """What `save_index` wrote.

    Args:
        folder: where.
        labels: the label space that it has to be of.

    Raises:
        FileNotFoundError: the folder is none of an index, or is half written.
        ValueError: a file is damaged, or the index is of other labels.
    """
    from safetensors.numpy import load_file

    for name in (_CARD, _LABELS, _VECTORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"label index {folder}: {name} is missing; give a folder of save_index"
            )
    own = load_labels(folder / _LABELS)
    if labels is not None and labels.fingerprint != own.fingerprint:
        raise ValueError(
            f"label index {folder}: it is of label space {own.fingerprint}, but the label space "
            f"given is {labels.fingerprint}; bring it to these labels with llmlabel.label.index."
            "updated, which encodes only new ones, or build it anew"
        )
    usearch = topk.usearch() if (folder / _GRAPH).is_file() else None
    with models.loading(folder, what="label index"):
        card = json.loads((folder / _CARD).read_text("utf-8"))
        tensors = load_file(folder / _VECTORS)
        graph = usearch.restore(str(folder / _GRAPH)) if usearch and card["graph"] else None
        index = LabelIndex(own, card["encoder"], (tensors["vectors"],), tensors["rows"], graph)
        whole = card["labels"] == own.fingerprint and card["graph"] == (graph is not None)
    if (row := _bad(index.vectors[0])) is not None:
        raise ValueError(
            f"label index {folder}: its vector {row} has not length 1; build the index again"
        )
    whole &= len(index.rows) == len(own) and (graph is None or len(graph) == index.size)
    if not whole or ("sha256" in card and card["sha256"] != _sha256(folder / _VECTORS)):
        raise ValueError(
            f"label index {folder}: its files do not belong together; build the index again"
        )
    return index


def check_encoder(index: LabelIndex, encoder: Encoder) -> None:
    """Encodes a few of the labels again and compares.

    Raises:
        ValueError: the vectors of the index are not those of this encoder.
    """
    count = min(8, len(index.labels))
    some = np.unique(np.linspace(0, len(index.labels) - 1, count).astype(np.int64))
    names = index.labels
    texts = [
        f"{names.names[i]}: {names.descriptions[i]}" if names.descriptions[i] else names.names[i]
        for i in some.tolist()
    ]
    now, kept = unit_vectors(encoder, texts), topk.take(index.vectors, index.rows[some])
    if now.shape != kept.shape or ((now * kept).sum(axis=1) < _SAME).any():
        raise ValueError(
            f"the label index was made by {index.encoder}, and this encoder gives its labels other "
            "vectors: it does not belong to the model; build it again with this one"
        )


# -------------------------------------------------------------------------------------- building


def _check_search(search: str) -> None:
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}; got {search!r}")


def _encoded(texts: Sequence[str], encoder: Encoder) -> Float[np.ndarray, "texts width"]:
    parts = [
        unit_vectors(encoder, texts[at : at + _TEXTS]).astype(np.float32)
        for at in range(0, len(texts), _TEXTS)
    ]
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if (row := _bad(vectors)) is not None:
        raise ValueError(
            f"the label text {texts[row]!r} has no vector of length 1; look at the encoder, which may "
            "compute what is no number"
        )
    return vectors


def _bad(vectors: Float[np.ndarray, "rows width"]) -> int | None:
    """The first vector that has not length 1; NaN has none."""
    lengths = np.einsum("rw,rw->r", vectors, vectors)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    return int(wrong[0]) if wrong.size else None


def _built(index: LabelIndex, search: Search) -> LabelIndex:
    """With a graph, where one is wanted."""
    if search == "exact" or (search == "auto" and index.size < HNSW_FROM):
        return index
    graph = topk.usearch()(
        ndim=index.width, metric="cos", dtype="i8", connectivity=LINKS, expansion_add=BUILD
    )
    for block in index.vectors:
        _grown(graph, block)
    return replace(index, graph=graph)


def _grown(graph: Any, vectors: Float[np.ndarray, "rows width"]) -> None:
    keys = np.arange(len(graph), len(graph) + len(vectors))
    graph.add(keys, vectors, threads=1)  # always one graph


def _compact(index: LabelIndex) -> LabelIndex:
    """Without vectors of no label and without a graph, in one block."""
    alive, rows = np.unique(index.rows, return_inverse=True)
    return replace(
        index, vectors=(topk.take(index.vectors, alive),), rows=rows.astype(np.int64), graph=None
    )


def _sha256(file: Path) -> str:
    """Of all of it, which a copy has too; `models.content_sha` of a large file is of its age."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
