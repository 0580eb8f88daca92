"""A pool of vectors with labels that others are compared with, and how rows are labelled by it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.blocks import map_blocks
from llmlabel.data import (
    gold_index,
    label_csr,
    plain_words,
    require_columns,
    with_columns,
)
from llmlabel.files import arrow_table
from llmlabel.label.embedding import TEXT_CUT, readable_vectors
from llmlabel.label.nearest import CHUNK, Own
from llmlabel.labelspace import LabelSpace
from llmlabel.select import id_ranks
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

Answers = Literal["gold", "soft"]

Read = Callable[[Float[np.ndarray, "rows width"], Own], csr_array]
"""Vectors of a block and what is itself -> its distributions."""


@dataclass(frozen=True, eq=False)
class Memory:
    """A pool by rising id, so that the order of its rows does not matter; `rows` were their places."""

    ids: list[str]
    words: list[str]
    vectors: Float[np.ndarray, "pool width"]
    targets: csr_array
    rows: Int[np.ndarray, " pool"]

    @cached_property
    def _places(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        by_words: dict[str, list[int]] = {}
        for i, words in enumerate(self.words):
            if words:  # texts without a character are not all one text
                by_words.setdefault(words, []).append(i)
        return {id: i for i, id in enumerate(self.ids)}, by_words

    def itself(self, dataset: Dataset) -> Own:
        """The entries with the id or the words of each row."""
        by_id, by_words = self._places
        found = []
        for id, text in zip(dataset["id"][:], dataset["text"][:], strict=True):
            same = {*by_words.get(text_key(text), ())}
            if (place := by_id.get(str(id))) is not None:
                same.add(place)
            found.append(sorted(same))
        return found

    def take(self, entries: Int[np.ndarray, " entries"]) -> "Memory":
        """The memory of these entries alone."""
        some = entries.tolist()
        return Memory(
            [self.ids[i] for i in some],
            [self.words[i] for i in some],
            self.vectors[some],
            csr_array(self.targets[some]),
            self.rows[some],
        )

    def sums(self) -> Float[np.ndarray, "labels width"]:
        """Sum of each label's vectors by its share in them, in double precision."""
        found = np.zeros((self.targets.shape[1], self.vectors.shape[1]))
        for start in range(0, len(self.vectors), CHUNK):
            part = slice(start, start + CHUNK)
            found += self.targets[part].T @ self.vectors[part].astype(np.float64)
        return found

    def digest(self, choice: object) -> str:
        """8 hex digits of the pool and of what was chosen."""
        content = hashlib.sha256(json.dumps([choice, self.ids, self.words]).encode())
        for part in (self.vectors, self.targets.data, self.targets.indices, self.targets.indptr):
            content.update(np.ascontiguousarray(part).ravel().data)
        return content.hexdigest()[:8]


def read_pool(pool: Dataset, labels: LabelSpace, *, answers: Answers | None) -> Memory:
    """The pool rows with a vector and an answer; with `answers` None all that have a vector.

    Raises:
        ValueError: there are none.
    """
    require_columns(pool, "id", "text", "vector")
    places = np.arange(len(pool))
    if answers == "gold":
        require_columns(pool, "gold")
        places = np.flatnonzero(_given(pool, "gold"))
    known = pool.select(places)
    targets = csr_array((len(known), len(labels)))
    if answers == "gold" and labels.multilabel:
        targets = label_csr(known, labels)
    elif answers == "gold":
        gold = gold_index(known, labels)
        given = np.flatnonzero(gold >= 0)
        targets = csr_array((np.ones(len(given)), (given, gold[given])), targets.shape)
    elif answers == "soft":
        targets = SoftLabels.from_dataset(known, labels).probs.astype(np.float64)
    vectors, rows = readable_vectors(known)
    if answers == "soft":
        answered = _answered(known, targets, labels)[rows]
        vectors, rows = vectors[answered], rows[answered]
    if not len(rows):
        what = "a vector" if answers is None else f"a vector and an answer ({answers})"
        raise ValueError(f"no pool row has {what}; embed the rows, and label some")
    order = np.argsort(id_ranks(known)[rows])
    texts, ids = known["text"][:], known["id"][:]
    some = rows[order].tolist()
    return Memory(
        [str(ids[row]) for row in some],
        [text_key(texts[row]) for row in some],
        np.ascontiguousarray(vectors[order]),
        csr_array(targets[some]),
        places[some],
    )


def _answered(dataset: Dataset, soft: csr_array, labels: LabelSpace) -> Bool[np.ndarray, " rows"]:
    """Whether a row has a soft label; in a multi-label space an empty one says none of the labels."""
    stored: np.ndarray = np.diff(soft.indptr) > 0
    if not labels.multilabel:
        return stored
    read = [not error or error.startswith(TEXT_CUT) for error in _errors(dataset)]
    answered: np.ndarray = stored | (_given(dataset, "label_ids") & np.array(read, dtype=bool))
    return answered


def _given(dataset: Dataset, column: str) -> Bool[np.ndarray, " rows"]:
    valid: np.ndarray = arrow_table(dataset.select_columns([column]))[column].is_valid().to_numpy()
    return valid


def _errors(dataset: Dataset) -> list[str | None]:
    if "error" not in dataset.column_names:
        return [None] * len(dataset)
    errors: list[str | None] = dataset["error"][:]
    return errors


def apart(memory: Memory, dataset: Dataset) -> Memory:
    """The memory without what has the id or the words of a row of the dataset.

    Raises:
        ValueError: nothing is left.
    """
    repeated = {i for own in memory.itself(dataset) for i in own}
    kept = [i for i in range(len(memory.ids)) if i not in repeated]
    if not kept:
        raise ValueError(
            "each pool row is also a row of the dataset; use label_prototypes, which leaves out only "
            "the row itself"
        )
    return memory.take(np.array(kept))


def gram(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "width width"]:
    """X'X in double precision."""
    found = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].astype(np.float64)
        found += part.T @ part
    return found


def text_key(text: str) -> str:
    """What repeats of a text have in common; empty for one without a character to read."""
    return plain_words(text) or text.strip()  # texts of nothing but punctuation are not all equal


def label_by_memory(
    dataset: Dataset,
    memory: Memory,
    read: Read,
    labels: LabelSpace,
    *,
    choice: list[object],
    block_rows: int,
    output: Path | None,
) -> Dataset:
    """Labels block by block by `read`; `choice` is the method's name and what was chosen."""
    require_columns(dataset, "id", "text", "vector")
    name = f"{choice[0]}@{memory.digest([*choice, labels.fingerprint])}"

    def compute(block: Dataset) -> Dataset:
        vectors, rows = readable_vectors(block)
        probs = csr_array((len(block), len(labels)))
        if len(rows):
            check_width(vectors, memory.vectors)
            found = read(vectors, memory.itself(block.select(rows))).tocoo()
            probs = csr_array((found.data, (rows[found.row], found.col)), shape=probs.shape)
        return with_labels(block, probs, rows, labels, name)

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=name,
        reads=("vector", *(("error",) if "error" in dataset.column_names else ())),
        block_rows=block_rows,
        output=output,
        name=f"label_{choice[0]}",
    )


def with_labels(
    dataset: Dataset,
    probs: csr_array,
    readable: Int[np.ndarray, " readable"],
    labels: LabelSpace,
    name: str,
) -> Dataset:
    """Adds the columns of a labeler; says why a row has no label, or still that its text was cut."""
    probs = csr_array(probs)
    probs.eliminate_zeros()
    errors: list[str | None] = [
        "empty text" if not t.strip() else "no vector" for t in dataset["text"]
    ]
    before = _errors(dataset)
    for row in readable.tolist():
        cut = old if (old := before[row]) and old.startswith(TEXT_CUT) else None
        labelled = probs.indptr[row] < probs.indptr[row + 1]
        errors[row] = cut if labelled else _NOBODY[labels.multilabel] or cut
    nothing = [None] * len(dataset)
    soft = SoftLabels(probs, labels.fingerprint, labels.multilabel)
    return with_columns(
        soft.add_to(dataset),
        {
            "engine": ([name] * len(dataset), Value("string")),
            "error": (errors, Value("string")),
            "label_mass": (nothing, Value("float32")),
            "prompt_sha": (nothing, Value("string")),
        },
    )


_NOBODY = {False: "no pool row votes for a label", True: None}
"""In a multi-label space none of the labels is an answer."""


def check_width(
    vectors: Float[np.ndarray, "rows width"], others: Float[np.ndarray, "others other_width"]
) -> None:
    """Raises a ValueError for vectors of two encoders."""
    if vectors.shape[1] != others.shape[1]:
        raise ValueError(
            f"the rows have vectors of {vectors.shape[1]} numbers, what they are compared with has "
            f"{others.shape[1]}; embed both with one encoder"
        )


def check_unknown(unknown: float, labels: LabelSpace) -> None:
    """Raises a ValueError for a share of missing mass that cannot be."""
    if not 0 <= unknown < 1:
        raise ValueError(f"unknown must be at least 0 and below 1; got {unknown}")
    if unknown and labels.multilabel:
        raise ValueError("unknown= is missing mass, which a multi-label space has none of; leave 0")


def refuse_multilabel(labels: LabelSpace, method: str) -> None:
    """Raises a ValueError that names what does work in a multi-label space."""
    if labels.multilabel:
        raise ValueError(
            f"{method} needs labels that exclude each other (single-label); label_neighbours and "
            "label_singular also read multi-label pools"
        )


# --------------------------------------------------------------------------------------- numerics


def normalised(logits: Float[np.ndarray, "rows labels"]) -> Float[np.ndarray, "rows labels"]:
    """Softmax of each row; -inf has probability 0, and a row of nothing else is all 0."""
    peak = logits.max(axis=1, keepdims=True)
    odds = np.exp(logits - np.where(np.isfinite(peak), peak, 0.0))
    total = odds.sum(axis=1, keepdims=True)
    return odds / np.where(total > 0, total, 1.0)


def directions(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    """The vectors with length 1; one of length 0 stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def vote(
    found: Int[np.ndarray, "rows k"], weights: Float[np.ndarray, "rows k"], targets: csr_array
) -> csr_array:
    """Sum of the targets of what was found, by weight."""
    bounds = np.arange(len(found) + 1) * found.shape[1]
    shape = (len(found), targets.shape[0])
    return csr_array((weights.ravel(), found.ravel(), bounds), shape) @ targets
