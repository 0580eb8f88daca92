"""Labelled terms, and which of them are nearest to others."""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Float

from llmlabel import models
from llmlabel.data import gold_matrix, plain_words, require_columns
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.shortlist import top_k
from llmlabel.labelspace import LabelSpace


class LabelledTerms:
    """Terms with their types and their vectors, which are computed when first needed.

    What is encoded of a term is its text and nothing else, so that no answer can be found by itself.
    The order of the pool does not matter.

    Args:
        pool: rows with `id`, `text` and `gold`; those without a text or a type are left out.
        types: the label space of `gold`.
        encoder: path, hub name, `package:` source, or anything with `encode`.

    Raises:
        ValueError: no term has a type.
    """

    def __init__(self, pool: Dataset, types: LabelSpace, encoder: str | Path | Encoder) -> None:
        require_columns(pool, "id", "text", "gold")
        truth = gold_matrix(pool, types)
        ids, texts = pool["id"][:], pool["text"][:]
        has_type = (truth.sum(axis=1) > 0).tolist()
        rows = [i for i in range(len(ids)) if has_type[i] and texts[i].strip()]
        rows.sort(key=lambda i: ids[i])
        if not rows:
            raise ValueError("no term of the pool has a type in `gold`; give labelled terms")
        self.types, self.encoder = types, encoder
        self.texts = [texts[i] for i in rows]
        self.shares = truth[rows] / truth[rows].sum(axis=1, keepdims=True)
        self._places: dict[tuple[str, str], list[int]] = {}
        for place, i in enumerate(rows):
            for key in _keys(ids[i], texts[i]):
                self._places.setdefault(key, []).append(place)
        told = json.dumps([[ids[i] for i in rows], self.texts, truth[rows].tolist()])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        self.name = f"{encoder_name(encoder, types.texts())}:{digest}"

    def votes(
        self, block: Dataset, *, neighbours: int, scale: float
    ) -> Float[np.ndarray, "rows types"]:
        """Share of each type among the nearest terms, each weighted by exp(`scale` x cosine).

        A term of several types divides its weight. Terms with the id or the words of a row (see
        `llmlabel.data.plain_words`) are skipped for it; zeros where nothing is left.
        """
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, terms that vote; got {neighbours}")
        found = np.zeros((len(block), len(self.types)))
        ids, texts, rows = block["id"][:], block["text"][:], _readable(block)
        if not rows:
            return found
        cosines = unit_vectors(self._ready, [texts[row] for row in rows]) @ self._vectors.T
        for number, row in enumerate(rows):
            itself = [i for key in _keys(ids[row], texts[row]) for i in self._places.get(key, ())]
            cosines[number, itself] = -np.inf
        for number, nearest in enumerate(top_k(cosines, neighbours)):
            if nearest:
                weights = np.exp(scale * (cosines[number, nearest] - cosines[number].max()))
                found[rows[number]] = weights @ self.shares[nearest] / weights.sum()
        return found

    def named(self, block: Dataset, *, nearest: int) -> list[list[int]]:
        """The types whose "name: description" is nearest to each term, nearest first."""
        found: list[list[int]] = [[] for _ in range(len(block))]
        texts, rows = block["text"][:], _readable(block)
        if rows and nearest:
            vectors = unit_vectors(self._ready, [texts[row] for row in rows])
            for row, some in zip(rows, top_k(vectors @ self._anchors.T, nearest), strict=True):
                found[row] = some
        return found

    @cached_property
    def _ready(self) -> Encoder:
        return models.load_encoder(self.encoder)

    @cached_property
    def _vectors(self) -> Float[np.ndarray, "terms width"]:
        return unit_vectors(self._ready, self.texts)

    @cached_property
    def _anchors(self) -> Float[np.ndarray, "types width"]:
        return unit_vectors(self._ready, self.types.texts())


def _readable(block: Dataset) -> list[int]:
    return [row for row, text in enumerate(block["text"][:]) if text.strip()]


def _keys(id: str, text: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """What a row is found again by."""
    return ("id", id), ("words", plain_words(text) or text.strip())
