"""The highest products of vectors with a matrix of very many rows, by blocks of it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

CHUNK = 16_384
"""Rows of the matrix compared with at a time."""

Blocks = Sequence[Float[np.ndarray, "_ width"]]


def highest(
    vectors: Float[np.ndarray, "rows width"], blocks: Blocks, *, count: int
) -> tuple[Int[np.ndarray, "rows count"], Float[np.ndarray, " rows"]]:
    """The `count` matrix rows of the highest products with each vector in any order; the lowest one.

    In float32; of equal ones at the border any.
    """
    rows = np.arange(len(vectors))
    best = np.full((len(rows), 0), -np.inf, dtype=np.float32)
    ids = np.full((len(rows), 0), -1)
    least = np.full(len(rows), -np.inf, dtype=np.float32)
    for start, chunk in _chunks(blocks):
        scores = vectors @ chunk.T
        if best.shape[1] < count < scores.shape[1]:
            least = np.partition(scores, -count, axis=1)[:, -count]
        at = np.flatnonzero(scores >= least[:, None])  # few, once good ones are known
        row, column = np.divmod(at, scores.shape[1])
        place, hits = ranks(row, len(rows))
        more = np.full((len(rows), int(hits.max())), -np.inf, dtype=np.float32)
        which = np.full(more.shape, -1)
        more[row, place], which[row, place] = scores.ravel()[at], start + column
        best, ids = np.concatenate([best, more], axis=1), np.concatenate([ids, which], axis=1)
        if best.shape[1] > count:
            keep = np.argpartition(best, -count, axis=1)[:, -count:]
            best, ids = np.take_along_axis(best, keep, 1), np.take_along_axis(ids, keep, 1)
        if best.shape[1] == count:
            least = best.min(axis=1)
    return ids, least


def take(blocks: Blocks, rows: Int[np.ndarray, " some"]) -> Float[np.ndarray, "some width"]:
    """Some rows of the matrix."""
    if len(blocks) == 1:
        return blocks[0][rows]
    found = np.empty((len(rows), blocks[0].shape[1]), dtype=np.float32)
    start = 0
    for block in blocks:
        here = (rows >= start) & (rows < start + len(block))
        found[here] = block[rows[here] - start]
        start += len(block)
    return found


def cosines(
    vectors: Float[np.ndarray, "rows width"], blocks: Blocks, found: Int[np.ndarray, "rows some"]
) -> Float[np.ndarray, "rows some"]:
    """Products with candidates in double precision, so that they depend on nothing else; -1 is none."""
    exact, products = vectors.astype(np.float64), np.empty(found.shape)
    for column in range(found.shape[1]):  # one at a time: rows x some x width is too much
        rows = np.maximum(found[:, column], 0)
        products[:, column] = np.einsum("rw,rw->r", exact, take(blocks, rows))
    products[found < 0] = -np.inf
    return products


def nearest_owners(
    found: Int[np.ndarray, "rows some"],
    products: Float[np.ndarray, "rows some"],
    owners: tuple[Int[np.ndarray, " owners"], Int[np.ndarray, " bounds"]],
    *,
    k: int,
) -> tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"], Bool[np.ndarray, " rows"]]:
    """The `k` nearest of all who own a candidate, and whether a row has so many.

    Nearest first, of equal ones (to 6 digits) the lower number. `owners` are those of all matrix rows
    by row, and where those of each row begin.
    """
    numbers, starts = owners
    counts = np.where(found >= 0, starts[found + 1] - starts[found], 0).ravel()
    at = np.repeat(np.arange(found.size), counts)
    nth = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    who, near, row = (
        numbers[starts[found.ravel()[at]] + nth],
        products.ravel()[at],
        at // found.shape[1],
    )
    order = np.lexsort((who, -near.round(6), row))
    rank, per_row = ranks(row, len(found))  # rows are in order before and after
    order, rank = order[rank < k], rank[rank < k]
    ids, best = np.zeros((len(found), k), dtype=np.int64), np.full((len(found), k), -np.inf)
    ids[row[order], rank], best[row[order], rank] = who[order], near[order]
    return ids, best, per_row >= k


def ranks(
    row: Int[np.ndarray, " some"], rows: int
) -> tuple[Int[np.ndarray, " some"], Int[np.ndarray, " rows"]]:
    """The place of each among those of its row, which stand together, and how many each row has."""
    counts = np.bincount(row, minlength=rows)
    return np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts), counts


def _chunks(blocks: Blocks) -> Iterator[tuple[int, Float[np.ndarray, "_ width"]]]:
    start = 0
    for block in blocks:
        for at in range(0, len(block), CHUNK):
            yield start + at, block[at : at + CHUNK]
        start += len(block)


def named(
    graph: Any, vectors: Float[np.ndarray, "rows width"], count: int, size: int
) -> Int[np.ndarray, "rows count"]:
    """The rows that a graph of usearch names; -1 where it names none, or one from `size` on."""
    # one row more, because a lone one is answered in another form
    found = graph.search(np.concatenate([vectors, vectors[:1]]), count)
    there = np.arange(found.keys.shape[1]) < found.counts[:, None]  # behind them anything may stand
    keys = np.where(there, found.keys.astype(np.int64), -1)[:-1]
    known: np.ndarray = np.where(keys < size, keys, -1)
    return known


def usearch() -> Any:
    """The class of graphs; a ValueError says what is missing."""
    try:
        from usearch.index import Index
    except ImportError:
        raise ValueError(
            "search by a graph needs the package usearch: pip install usearch, or take search='exact'"
        ) from None
    return Index
