"""The nearest vectors of a pool: by comparing all, or by an index that names candidates."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

CHUNK = 8192
"""Entries of a pool that a block is compared with at a time."""

_OVERSAMPLE = 4
"""An index is asked for so many times k, of which the nearest are taken exactly."""

_FOUND = 0.99
"""Cosine at least of a pool's vector and the nearest that an index names, itself as a rule."""

_NOT_THERE = np.iinfo(np.int64).min

_Vectors = Float[np.ndarray, "rows width"]

Own = Sequence[Sequence[int]]
"""For each row the entries of a pool that are the row itself."""

Nearest = tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]
"""Entries of the pool and their cosines, nearest first; -inf where there is no more."""


@runtime_checkable
class Index(Protocol):
    """What is asked of an index of unit vectors; those of faiss and usearch are one as they are.

    It only names candidates, so it may store rough vectors: cosines are computed anew. For instance

        index = faiss.IndexHNSWFlat(384, 16, faiss.METRIC_INNER_PRODUCT)
        index.add(np.array(pool["vector"][:], dtype=np.float32))
        label_neighbours(dataset, pool, labels, search=index)
    """

    def search(self, vectors: np.ndarray, count: int, /) -> Any:
        """Similarities and row numbers of the nearest, -1 for none (faiss); or usearch's matches."""
        ...


Search = Literal["exact", "usearch"] | Index


def finder(
    pool: Float[np.ndarray, "pool width"],
    *,
    k: int,
    search: Search = "exact",
    rows: Int[np.ndarray, " pool"] | None = None,
) -> Callable[[_Vectors, Own], Nearest]:
    """What finds the `k` nearest entries of the pool; of equally near ones the first.

    Cosines that differ by less than about 1e-6 count as equal, so that nothing depends on how rows
    share a matrix product. `rows` are the numbers that a given index has for the entries.

    Raises:
        ValueError: `k` is not positive, or the index is none of these vectors.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of neighbours; got {k}")
    if isinstance(search, str) and search not in ("exact", "usearch"):
        raise ValueError(f"search must be 'exact', 'usearch' or an index; got {search!r}")
    k = min(k, len(pool))
    if search == "exact":
        return lambda vectors, own: _exactly(vectors, pool, k, own)
    size = len(pool) if isinstance(search, str) else _size(search, pool)
    numbers = np.arange(len(pool)) if rows is None or search == "usearch" else rows
    place = np.full(int(numbers.max()) + 2, -1)  # the last for all that is no entry
    place[numbers] = np.arange(len(pool))
    # an index also names rows that are no entry; where it has fewer, it says so
    wanted = math.ceil(_OVERSAMPLE * k * max(len(place) - 1, size) / len(pool))

    @cache  # not before a block has to be computed
    def index() -> Any:
        if search == "usearch":
            return _hnsw(pool)
        some = evenly(len(pool), 8)
        entries = _named(search, pool[some], wanted, place)
        if np.median(_ranked(pool[some], pool, entries, 1)[1]) < _FOUND:
            raise ValueError(
                f"search= is an index ({type(search).__name__}) that does not find the pool's own "
                "vectors; build it of the vectors of the pool, in their order and of length 1"
            )
        return search

    def approximately(vectors: _Vectors, own: Own) -> Nearest:
        entries = _named(index(), vectors, wanted + max(map(len, own), default=0), place)
        for mine, itself in zip(entries, own, strict=True):
            mine[np.isin(mine, itself)] = -1
        return _ranked(vectors, pool, entries, k)

    return approximately


def _size(index: Any, pool: Float[np.ndarray, "pool width"]) -> int:
    """How many vectors an index has, as faiss and usearch say; of one that does not, the pool's."""
    width = getattr(index, "d", getattr(index, "ndim", pool.shape[1]))
    if width != pool.shape[1]:
        raise ValueError(
            f"search= is an index of vectors of {width} numbers, the pool's have {pool.shape[1]}; "
            "build it of the vectors of the pool"
        )
    known = len(index) if hasattr(index, "__len__") else len(pool)
    size: int = getattr(index, "ntotal", known)
    if size < len(pool):
        raise ValueError(
            f"search= is an index of {size} vectors, the pool has {len(pool)} to find; "
            "add the rows that it lacks"
        )
    return size


def evenly(rows: int, most: int) -> Int[np.ndarray, " taken"]:
    """Positions of all rows, or of at most so many at even distances."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def search_name(search: Search) -> str:
    """What stands for the search in provenance; of a given index its type alone."""
    return search if isinstance(search, str) else type(search).__name__


def _named(
    index: Any, vectors: _Vectors, count: int, place: Int[np.ndarray, " numbers"]
) -> Int[np.ndarray, "rows some"]:
    """The entries that an index names for each row; -1 is none."""
    # one row more, because usearch answers a lone one in another form
    found = index.search(np.concatenate([vectors, vectors[:1]]).astype(np.float32), count)
    if isinstance(found, tuple):
        keys = found[1]
    else:  # behind its counts anything may stand
        there = np.arange(found.keys.shape[1]) < found.counts[:, None]
        keys = np.where(there, found.keys.astype(np.int64), -1)
    entries: np.ndarray = place[np.clip(keys[:-1], -1, len(place) - 1)]
    return entries


def _hnsw(pool: Float[np.ndarray, "pool width"]) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise ValueError(
            "search='usearch' needs the package usearch: pip install usearch, or search='exact'"
        ) from None
    index = Index(ndim=pool.shape[1], metric="cos", dtype="i8")  # recall is that of f32
    index.add(np.arange(len(pool)), np.asarray(pool, np.float32), threads=1)  # always one graph
    return index


def _exactly(
    vectors: Float[np.ndarray, "rows width"],
    pool: Float[np.ndarray, "pool width"],
    k: int,
    own: Own,
) -> Nearest:
    best = np.full((len(vectors), 0), _NOT_THERE)
    for start in range(0, len(pool), CHUNK):
        cosines = vectors @ pool[start : start + CHUNK].T
        # One integer an entry, higher is nearer: no two are equal, so the k best are unique.
        places = np.arange(start, start + cosines.shape[1])
        keys = (np.rint(cosines * 1e6).astype(np.int64) << 32) - places
        for row, itself in enumerate(own):
            inside = [entry - start for entry in itself if 0 <= entry - start < keys.shape[1]]
            keys[row, inside] = _NOT_THERE
        best = np.concatenate([best, keys], axis=1)
        best = np.partition(best, max(best.shape[1] - k, 0), axis=1)[:, -k:]
    entries = np.where(best == _NOT_THERE, -1, -best & 0xFFFFFFFF)
    return _ranked(vectors, pool, entries, k)


def _ranked(
    vectors: Float[np.ndarray, "rows width"],
    pool: Float[np.ndarray, "pool width"],
    entries: Int[np.ndarray, "rows some"],
    k: int,
) -> Nearest:
    """The `k` nearest of some entries, by cosines in double precision; -1 is no entry."""
    cosines = np.full(entries.shape, -np.inf)
    exact = vectors.astype(np.float64)
    for column in range(entries.shape[1]):  # one at a time: rows x some x width is too much
        cosines[:, column] = (exact * pool[entries[:, column]]).sum(axis=1)
    cosines[entries < 0] = -np.inf
    order = np.lexsort((entries, -cosines.round(6)), axis=1)[:, :k]
    found = np.take_along_axis(entries, order, axis=1)
    return np.maximum(found, 0), np.take_along_axis(cosines, order, axis=1)
