"""The few labels that an encoder finds nearest to a row, where more exist than fit a prompt."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import gold_matrix, require_columns, with_columns
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.labelspace import LabelSpace

_RECALL_AT = (1, 5, 10, 20, 50, 100)


def shortlist(
    dataset: Dataset,
    encoder: str | Path | Encoder,
    labels: LabelSpace,
    *,
    k: int,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `candidates`: the `k` labels whose "name: description" is nearest, nearest first.

    Nearest by cosine; of equally near ones the lower position. A text without a character to read
    has null. A true label outside the shortlist can no longer be found: see `shortlist_recall`.

    Args:
        dataset: rows with `id` and `text`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        labels: the label space.
        k: labels to keep.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: `k` is below 1 or above the number of labels.
    """
    require_columns(dataset, "id", "text")
    if not 1 <= k <= len(labels):
        raise ValueError(f"k must be from 1 to {len(labels)}, the number of labels; got {k}")

    @cache  # not before a block has to be computed
    def ready() -> tuple[Encoder, Float[np.ndarray, "labels width"]]:
        loaded = models.load_encoder(encoder)
        return loaded, unit_vectors(loaded, labels.texts())

    def compute(block: Dataset) -> Dataset:
        loaded, anchors = ready()
        texts = block["text"][:]
        readable = [row for row, text in enumerate(texts) if text.strip()]
        found: list[list[int] | None] = [None] * len(texts)
        if readable:
            cosines = unit_vectors(loaded, [texts[row] for row in readable]) @ anchors.T
            for row, nearest in zip(readable, top_k(cosines, k), strict=True):
                found[row] = nearest
        return with_columns(block, {"candidates": (found, List(Value("int32")))})

    name = None if output is None else encoder_name(encoder, labels.texts())
    return map_blocks(
        dataset,
        compute,
        columns=("candidates",),
        key=json.dumps(["shortlist", name, labels.fingerprint, k]),
        block_rows=block_rows,
        output=output,
        name="shortlist",
    )


def shortlist_recall(dataset: Dataset, labels: LabelSpace) -> dict[int, float]:
    """Share of a row's true labels among its first k candidates, averaged over the rows.

    Rows whose gold is unknown or empty do not count; in a row without candidates nothing is found.
    The k are 1, 5, 10, 20, 50 and 100 as far as the shortlists reach, and their full length.

    Raises:
        ValueError: no row has a true label.
    """
    require_columns(dataset, "candidates")
    gold = gold_matrix(dataset, labels)
    rows = np.flatnonzero(gold.any(axis=1))
    if not len(rows):
        raise ValueError("shortlist_recall: no row has a true label in `gold`, so nothing to find")
    candidate_lists(dataset, labels)  # refuses what is no position of a label
    lists = [some or [] for some in dataset["candidates"][:]]
    longest = max(1, *(len(some) for some in lists))
    found = np.zeros((len(rows), longest))
    for number, row in enumerate(rows.tolist()):
        found[number, : len(lists[row])] = gold[row, lists[row]]
    shares = found.cumsum(axis=1) / gold[rows].sum(axis=1, keepdims=True)
    return {
        k: float(shares[:, k - 1].mean())
        for k in sorted({*(k for k in _RECALL_AT if k < longest), longest})
    }


def candidate_lists(dataset: Dataset, labels: LabelSpace) -> list[list[int]] | None:
    """The column `candidates` by position, null as all labels; None where there is no such column.

    Raises:
        ValueError: a candidate is no position of a label.
    """
    if "candidates" not in dataset.column_names:
        return None
    every = range(len(labels))
    found = [sorted(set(every if some is None else some)) for some in dataset["candidates"][:]]
    for row, some in enumerate(found):
        if some and not 0 <= some[0] <= some[-1] < len(labels):
            raise ValueError(
                f"row {dataset[row]['id']!r} has the candidates {some}, but the labels have the "
                f"positions 0 to {len(labels) - 1}; make the candidates with this label space"
            )
    return found


# ------------------------------------------------------------------------- nearest by an encoder


def top_k(scores: Float[np.ndarray, "rows columns"], k: int) -> list[list[int]]:
    """The columns of the `k` highest scores of each row, highest first; -inf is never among them.

    Scores that differ by less than about 1e-6 are equal, and of equal ones the lower column comes
    first, so that nothing depends on how rows share a matrix product.
    """
    rounded = scores.round(6)
    if k < scores.shape[1]:
        least = np.partition(rounded, -k, axis=1)[:, -k]
    else:
        least = np.full(len(scores), -np.inf)
    found = []
    for row, bound in zip(rounded, least, strict=True):
        columns = np.flatnonzero((row >= bound) & (row > -np.inf))
        best = np.argsort(-row[columns], kind="stable")[:k]
        found.append(columns[best].tolist())
    return found
