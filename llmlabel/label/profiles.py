"""Labels by what their name and their training rows look like together: one profile a label.

The profile of a label is `prior` times the vector of its name plus the vectors of its training rows,
brought to length 1 (Rocchio 1971, "Relevance Feedback in Information Retrieval", with the name as the
query and without negative feedback). It needs seconds, no training and no more room than the names
alone, and a label without a training row keeps its name. On subject headings it is far better than
either part (benchmarks/results/xmc.md).

What a pool holds with the id or the words of a row does not count for that row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.blocks import map_blocks
from llmlabel.data import label_csr, require_columns, with_gold
from llmlabel.label import topk
from llmlabel.label.index import LabelIndex, Search, index_of_vectors
from llmlabel.label.memory import (
    Memory,
    directions,
    label_by_memory,
    read_pool,
    text_key,
    with_labels,
)
from llmlabel.label.nearest import Own
from llmlabel.label.retrieval import SCALE, check_sharpness, opened, probabilities
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import LABEL_COLUMNS

_CELLS = 2**26
"""Scores of rows and labels that are held at a time."""

_NOTHING = 1e-6
"""Cosine below which a row and a label have nothing in common: what float32 leaves of a difference."""


def label_profiles(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    index: LabelIndex | Path,
    *,
    prior: float = 5.0,
    k: int = 100,
    scale: float = SCALE,
    midpoint: float = 0.5,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the `k` labels whose profiles lie nearest, with probabilities as in `label_retrieval`.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: training rows with the same columns and `gold`.
        index: the vectors of the label names, of the same encoder, or the folder of them
            (`llmlabel.label.retrieval.build_label_index`).
        prior: training rows that the name counts like; choose it on rows that are not in the pool.
        k: labels to store.
        scale: sharpness.
        midpoint: cosine at which a label of a multi-label space has probability 0.5.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: an argument is out of bounds, or no pool row has a vector and gold.
    """
    check_prior(prior, k)
    index = opened(index)
    check_sharpness(scale, midpoint, multilabel=index.labels.multilabel)
    labels, memory = index.labels, read_pool(pool, index.labels, answers="gold")
    sums = prior * topk.take(index.vectors, index.rows) + memory.sums()
    search: Search = "exact" if index.graph is None else "hnsw"
    profiles = index_of_vectors(
        labels, directions(sums).astype(np.float32), encoder=index.encoder, search=search
    )

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        touched = [np.unique(memory.targets[list(some)].indices) for some in own]
        ids, cosines = profiles.search(vectors, k=k + max(map(len, touched), default=0))
        for row, (entries, some) in enumerate(zip(own, touched, strict=True)):
            if len(some):  # the profiles without the row itself, which has moved its labels alone
                mine = memory.targets[list(entries)][:, some]
                rest = sums[some] - mine.T @ memory.vectors[list(entries)]
                changed = dict(zip(some.tolist(), directions(rest) @ vectors[row], strict=True))
                cosines[row] = [
                    changed.get(i, c) for i, c in zip(ids[row].tolist(), cosines[row], strict=True)
                ]
        return _stored(ids, cosines, labels, k, scale, midpoint)

    choice = ["profiles", prior, k, scale, midpoint, index.encoder, search]
    return label_by_memory(
        dataset, memory, read, labels, choice=choice, block_rows=block_rows, output=output
    )


def label_lexical(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    prior: float = 2.5,
    k: int = 100,
    scale: float = SCALE,
    midpoint: float = 0.5,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """`label_profiles` of words and parts of words instead of embeddings: it knows rare names.

    The vectors are TF-IDF of words and of three to five characters within words, logarithmic in how
    often they occur. A label with nothing in common with a row is not stored.

    Args:
        dataset: rows with `id` and `text`.
        pool: training rows with the same columns and `gold`.
        labels: the label space of both.
        prior: training rows that the name counts like.
        k: labels to store.
        scale: sharpness.
        midpoint: cosine at which a label of a multi-label space has probability 0.5.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: an argument is out of bounds, or no pool row has text and gold.
    """
    check_prior(prior, k)
    check_sharpness(scale, midpoint, multilabel=labels.multilabel)
    require_columns(dataset, "id", "text")
    words = Words.read(pool, labels, prior)
    name = f"lexical@{words.digest([prior, k, scale, midpoint, labels.fingerprint])}"

    def read(rows: Dataset) -> csr_array:
        vectors = words.vectors_of(rows["text"][:])
        return _stored(*words.nearest(rows, vectors, k), labels, k, scale, midpoint)

    return label_by_words(
        dataset, read, labels, name=name, step="label_lexical", block_rows=block_rows, output=output
    )


def label_by_words(
    dataset: Dataset,
    read: Callable[[Dataset], csr_array],
    labels: LabelSpace,
    *,
    name: str,
    step: str,
    block_rows: int,
    output: Path | None,
) -> Dataset:
    """Adds what `read` says of rows with text, (rows, labels), a few of which it is given at a time."""

    def compute(block: Dataset) -> Dataset:
        from scipy.sparse import vstack

        readable = np.flatnonzero([bool(text.strip()) for text in block["text"]])
        parts = [csr_array((0, len(labels)))]
        parts += [read(block.select(some)) for some in in_parts(readable, len(labels))]
        found = csr_array(vstack(parts))
        counts = np.zeros(len(block) + 1, dtype=np.int64)
        counts[readable + 1] = np.diff(found.indptr)
        shape = (len(block), len(labels))
        probs = csr_array((found.data, found.indices, counts.cumsum()), shape=shape)
        return with_labels(block, probs, readable, labels, name)

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=name,
        block_rows=block_rows,
        output=output,
        name=step,
    )


def in_parts(rows: Int[np.ndarray, " rows"], labels: int) -> list[Int[np.ndarray, " some"]]:
    """So that scores of a part and all labels may be held."""
    step = max(1, _CELLS // labels)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


@dataclass(frozen=True, eq=False)
class Words:
    """What labels look like in words; `sums` are their profiles before these have length 1."""

    memory: Memory
    texts: list[str]
    features: tuple[Any, ...]
    vectors: csr_array
    sums: csr_array

    @classmethod
    def read(cls, pool: Dataset, labels: LabelSpace, prior: float) -> "Words":
        """Of the pool rows with text and gold, by rising id."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        require_columns(pool, "id", "text", "gold")
        known = with_gold(pool)
        texts, ids = known["text"][:], known["id"][:]
        rows = sorted(
            (row for row, text in enumerate(texts) if text.strip()), key=lambda row: str(ids[row])
        )
        if not rows:
            raise ValueError("no pool row has text and gold; give labelled training rows")
        some = known.select(rows)
        texts, names = some["text"][:], labels.texts()
        features = (
            TfidfVectorizer(sublinear_tf=True, dtype=np.float32),
            TfidfVectorizer(
                analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32
            ),
        )
        both = _joined([vectorizer.fit_transform([*texts, *names]) for vectorizer in features])
        vectors, gold = both[: len(texts)], label_csr(some, labels)
        memory = Memory(
            [str(id) for id in some["id"][:]],
            [text_key(text) for text in texts],
            np.zeros((len(texts), 0)),
            gold,
            np.array(rows),
        )
        sums = csr_array(gold.T @ vectors + prior * both[len(texts) :])
        return cls(memory, texts, features, vectors, sums)

    @cached_property
    def profiles(self) -> csr_array:
        """Features x labels, each label of length 1."""
        return csr_array(_normalised(self.sums).T)

    @cached_property
    def lengths(self) -> Float[np.ndarray, " labels"]:
        """Of `sums`."""
        return _lengths(self.sums)

    def digest(self, choice: object) -> str:
        """8 hex digits of the pool and of what was chosen."""
        return self.memory.digest(choice)

    def vectors_of(self, texts: list[str]) -> csr_array:
        """TF-IDF of length 1, or 0 where nothing is known."""
        return _joined([some.transform(texts) for some in self.features])

    def nearest(
        self, rows: Dataset, vectors: csr_array, k: int
    ) -> tuple[Int[np.ndarray, "rows some"], Float[np.ndarray, "rows some"]]:
        """At least the `k` nearest labels of each row, without what is the row itself.

        `vectors` are those of the texts of the rows.
        """
        texts = rows["text"][:]
        scores = (vectors @ self.profiles).toarray()
        for row, entries in enumerate(self.memory.itself(rows)):
            if not entries:
                continue
            mine = self.memory.targets[list(entries)]
            some = np.unique(mine.indices)
            if len(entries) == 1 and self.texts[entries[0]] == texts[row]:  # x'x is 1
                dot, length = scores[row, some] * self.lengths[some], self.lengths[some]
                rest = np.sqrt(np.maximum(length**2 - 2 * dot + 1, 1e-12))
                left_over = np.where(np.abs(dot - 1) < _NOTHING * length, 0.0, dot - 1)
                scores[row, some] = left_over / rest
            else:
                left = self.sums[some] - mine[:, some].T @ self.vectors[list(entries)]
                scores[row, some] = (_normalised(csr_array(left)) @ vectors[[row]].T).toarray()[
                    :, 0
                ]
        scores[np.abs(scores) < _NOTHING] = 0.0
        count = min(k, scores.shape[1])
        least = np.partition(scores, -count, axis=1)[:, -count]
        at, label = np.nonzero(scores >= least[:, None])
        order = np.lexsort((label, -scores[at, label], at))
        place, _ = topk.ranks(at, len(scores))
        order, place = order[place < count], place[place < count]
        ids = np.zeros((len(scores), count), dtype=np.int64)
        ids[at[order], place] = label[order]
        return ids, np.take_along_axis(scores, ids, axis=1)


def _joined(parts: list[Any]) -> csr_array:
    """Side by side, rows of length 1."""
    from scipy.sparse import hstack

    return _normalised(csr_array(hstack(parts)))


def _normalised(vectors: csr_array) -> csr_array:
    """Of length 1; an empty one stays."""
    lengths = _lengths(vectors)
    factor = np.repeat(1 / np.where(lengths > 0, lengths, 1.0), np.diff(vectors.indptr))
    return csr_array((vectors.data * factor, vectors.indices, vectors.indptr), shape=vectors.shape)


def _lengths(vectors: csr_array) -> Float[np.ndarray, " rows"]:
    lengths: np.ndarray = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
    return lengths


def _stored(
    ids: Int[np.ndarray, "rows some"],
    cosines: Float[np.ndarray, "rows some"],
    labels: LabelSpace,
    k: int,
    scale: float,
    midpoint: float,
) -> csr_array:
    """The probabilities of the `k` highest of each row; what has nothing in common has none."""
    order = np.lexsort((ids, -cosines.round(6)), axis=1)[:, :k]
    ids, near = np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)
    values = probabilities(near, scale, midpoint, multilabel=labels.multilabel)
    return table_of(ids, np.where(near != 0, values, 0.0), len(labels))


def table_of(
    ids: Int[np.ndarray, "rows some"], values: Float[np.ndarray, "rows some"], labels: int
) -> csr_array:
    """(rows, labels), without zeros."""
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    found = csr_array((values.ravel(), (rows, ids.ravel())), shape=(len(ids), labels))
    found.eliminate_zeros()
    return found


def check_prior(prior: float, k: int) -> None:
    """Raises a ValueError for numbers without a meaning."""
    if not 0 < prior < np.inf:
        raise ValueError(
            f"prior must be above 0, training rows that a name counts like; got {prior}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of labels to store; got {k}")
