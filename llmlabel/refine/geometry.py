"""Answers with the label in the middle of a distribution, one that the source never saw as well.

Roberts et al., "Geometry-Aware Adaptation for Pretrained Models" (Loki, arXiv 2307.12226): of all
labels y the one with the least expected squared distance F(y) = sum_k P(k) d(y, k)^2, a Fréchet mean,
instead of the most probable k. d is either the number of edges between two labels of a hierarchy, all
roots below one common point that is no label, or the distance between two vectors of labels. It is
squared here, once; nobody hands in squares.

What F costs: in a hierarchy where nobody has two parents only the labels on the ways between the
labels of a row can be its mean (any other label lies farther from each of them than the label where
it leaves these ways), so a row costs its number of labels times their depth. With vectors F is
|y - m|^2 and a constant, m the mean vector. With several parents every label is tried against every
label of the rows, by one search through the graph for each of these.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from llmlabel import models
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import depths
from llmlabel.refine.locus import Costs, between, edges, is_forest
from llmlabel.softlabels import SoftLabels

_MOST_CELLS = 1 << 24
"""Numbers that one block of rows holds at a time, of each of a few arrays."""

_DIGITS = 9
"""Means that are equal in so many digits are equal; the rest is rounding."""

_CHUNK = 8192
"""Labels whose distance to the mean vectors is computed at a time."""

_Cells = Int[np.ndarray, " cells"]
_Embeddings = Float[np.ndarray, "labels width"]


def frechet_predict(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    observed: LabelSpace | None = None,
    encoder: str | Path | Any = None,
    top: int | None = None,
    temperature: float = 1.0,
    keep: int = 10,
    scale: float | None = None,
) -> Dataset:
    """Replaces soft labels by softmax(-`scale` F) over the `keep` labels of least F.

    The first of them is Loki's prediction (see `frechet_mean`), which may be a label that no source
    ever answered; its paper takes -F as logits where it trains. What a row's probabilities miss to 1
    stays missing; a row without a soft label stays without.

    In a hierarchy `llmlabel.labelspace.graph.answers`, and so a report, goes down by the mass of
    whole subtrees and may answer another label than the first; with `keep=1` it is the mean itself.

    Loki needs peaked probabilities: of a flat distribution over many labels the mean is the centre
    of the label space, whatever the text says. `top` and `temperature` sharpen. Expected distance is
    what improves; the share of exactly right answers may fall.

    Differs from the paper: probabilities come with the prediction, over few labels. Between the
    labels of a row in a hierarchy without second parents (others are no candidates, so that a row
    with one label keeps it), else over all.

    Args:
        dataset: rows with soft labels; `gold`, where it is there, refers to `labels`.
        labels: all labels that may be answered, single-label.
        observed: the label space of the soft labels when it is a smaller one; its ids are ids of
            `labels`.
        encoder: for the distance between vectors of the labels' texts (unit length), a path, hub
            name, `package:` source or anything with `encode`; the hierarchy when left out.
        top: how many labels of a row count, the most probable ones; all when left out.
        temperature: probabilities are taken to the power of its inverse first.
        keep: how many labels get a probability.
        scale: sharpness of the result; when left out 1 for a hierarchy, as in the paper, and 10 for
            vectors, which is softmax(20 cosine) for a row with one label.

    Raises:
        ValueError: a number is out of range, the label space is flat and there is no encoder, it is
            multi-label, or `observed` has other labels.
    """
    scale = (1.0 if encoder is None else 10.0) if scale is None else scale
    _check_numbers(temperature=temperature, keep=keep, scale=scale)
    if labels.multilabel:
        raise ValueError("frechet_predict needs labels that exclude each other (single-label)")
    if labels.is_flat and encoder is None:
        raise ValueError(
            "no label has a parent, so all are equally far from each other and the mean is the most "
            "probable one; give encoder=, or a label space with parents"
        )
    soft = SoftLabels.from_dataset(dataset, labels if observed is None else observed)
    mass = 1.0 - soft.missing_mass
    if top is not None:
        soft = soft.top(top)
    probs = soft.probs if observed is None else _widened(soft.probs, dataset, observed, labels)
    vectors = None if encoder is None else _label_vectors(encoder, labels)
    means = _means(_sharpened(probs, temperature), labels, vectors, keep=keep, scale=scale)
    means.data *= np.repeat(mass, np.diff(means.indptr))
    return SoftLabels(means, labels.fingerprint).add_to(dataset)


def frechet_mean(
    probs: Float[np.ndarray, "rows labels"] | csr_array,
    labels: LabelSpace,
    *,
    embeddings: _Embeddings | None = None,
) -> Int[np.ndarray, " rows"]:
    """The label of least expected squared distance to each row's labels; -1 for a row of zeros.

    Of equal ones (to 9 digits) the lowest position. What the rows sum to does not matter.

    Args:
        probs: a distribution over the labels, 0 for those that are not observed.
        labels: the label space of the columns.
        embeddings: a vector for each label, any length; the hierarchy when left out.
    """
    means = _means(csr_array(probs), labels, embeddings, keep=1, scale=1.0)
    found = np.full(means.shape[0], -1)
    found[np.diff(means.indptr) > 0] = means.indices
    return found


def _means(
    probs: csr_array,
    labels: LabelSpace,
    embeddings: _Embeddings | None,
    *,
    keep: int,
    scale: float,
) -> csr_array:
    """softmax(-scale F) of each row over the labels of least F, which come in this order."""
    probs = csr_array(probs, dtype=np.float64, copy=True)
    probs.sum_duplicates()
    probs.eliminate_zeros()
    probs.data /= np.repeat(probs.sum(axis=1), np.diff(probs.indptr))
    filled = np.flatnonzero(np.diff(probs.indptr))
    costs_of, cells, unit = _method(labels, embeddings, keep=keep)
    parts = []
    for start, block in _blocks(probs[filled], *cells):
        rows, found, values = _lowest(costs_of(block), keep=keep, unit=unit)
        parts.append(Costs(rows + start, found, values))
    rows, found, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    least = values[np.searchsorted(rows, np.arange(len(filled)))]
    weights = np.exp(-scale * np.maximum(values - least[rows], 0.0))
    weights /= np.bincount(rows, weights)[rows]
    indptr = np.searchsorted(filled[rows], np.arange(probs.shape[0] + 1))
    return csr_array((weights, found, indptr), shape=probs.shape)


def _lowest(costs: Costs, *, keep: int, unit: float) -> Costs:
    """The `keep` lowest of each row, the lowest first; of equal ones the lower position."""
    order = np.lexsort((costs.labels, np.round(costs.values / unit, _DIGITS), costs.rows))
    rows = costs.rows[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = order[rank < keep]
    return Costs(costs.rows[kept], costs.labels[kept], costs.values[kept])


def _blocks(
    probs: csr_array, cells: Int[np.ndarray, " labels"], row_cells: int
) -> Iterator[tuple[int, csr_array]]:
    """Rows in blocks of at most `_MOST_CELLS`, or of one row; where each begins. At least one."""
    steps = np.concatenate([[0], np.cumsum(cells[probs.indices])])
    sums = np.cumsum(np.diff(steps[probs.indptr]) + row_cells)
    starts = np.flatnonzero(np.diff(sums // _MOST_CELLS, prepend=-1)).tolist() or [0]
    for start, stop in zip(starts, [*starts[1:], probs.shape[0]], strict=True):
        yield start, probs[start:stop]


def _method(
    labels: LabelSpace, embeddings: _Embeddings | None, *, keep: int
) -> tuple[Callable[[csr_array], Costs], tuple[Int[np.ndarray, " labels"], int], float]:
    """How F is computed, the numbers held for each label of a row and for the row, the size of F."""
    size = len(labels)
    if embeddings is not None:
        norms = np.einsum("lw,lw->l", embeddings, embeddings, dtype=np.float64)
        cells = np.full(size, embeddings.shape[1]), _CHUNK
        return _near_mean(embeddings, norms, keep=keep), cells, float(norms.max()) or 1.0
    if is_forest(labels):
        return functools.partial(between, labels=labels), (depths(labels) + 2, 1), 1.0
    return _anywhere(labels, keep=keep), (np.full(size, size), size), 1.0


def _anywhere(labels: LabelSpace, *, keep: int) -> Callable[[csr_array], Costs]:
    """F where it is low, in a hierarchy in which labels may have several parents."""
    graph = edges(labels)

    def costs(probs: csr_array) -> Costs:
        seen, columns = np.unique(probs.indices, return_inverse=True)
        weights = csr_array((probs.data, columns, probs.indptr), (probs.shape[0], len(seen)))
        distances = dijkstra(graph, directed=False, unweighted=True, indices=seen)[:, :-1]
        values = weights @ np.square(distances)
        nothing = np.full((len(values), keep), np.inf)
        rows, found, _ = _low(values, nothing, slack=np.full(len(values), 10.0**-_DIGITS))
        return Costs(rows, found, values[rows, found])

    return costs


def _near_mean(
    embeddings: _Embeddings, norms: Float[np.ndarray, " labels"], *, keep: int
) -> Callable[[csr_array], Costs]:
    """F, less a constant of the row, where vectors are near the row's mean vector."""
    rounding = 4 * embeddings.shape[1] * np.finfo(np.float32).eps

    def costs(probs: csr_array) -> Costs:
        seen, columns = np.unique(probs.indices, return_inverse=True)
        weights = csr_array((probs.data, columns, probs.indptr), (probs.shape[0], len(seen)))
        means = weights @ embeddings[seen].astype(np.float64)
        slack = rounding * (norms.max() + 2 * np.linalg.norm(means, axis=1) * norms.max() ** 0.5)
        # |y|^2 - 2 y m in half the precision, which takes a quarter of the time; whatever its
        # rounding could have moved into the lowest is computed again.
        left = np.concatenate([-2 * means, np.ones((len(means), 1))], axis=1, dtype=np.float32)
        lowest = np.full((len(means), keep), np.inf, dtype=np.float32)
        near = []
        for start in range(0, len(norms), _CHUNK):
            part = slice(start, start + _CHUNK)
            right = np.concatenate([embeddings[part], norms[part, None]], axis=1, dtype=np.float32)
            rows, found, lowest = _low(left @ right.T, lowest, slack=slack)
            near.append((rows, found + start))
        rows, found = (np.concatenate(column) for column in zip(*near, strict=True))
        exact = embeddings[found].astype(np.float64) - means[rows]
        return Costs(rows, found, np.square(exact).sum(axis=1))

    return costs


def _low(
    values: Float[np.ndarray, "rows labels"],
    lowest: Float[np.ndarray, "rows keep"],
    *,
    slack: Float[np.ndarray, " rows"],
) -> tuple[_Cells, _Cells, Float[np.ndarray, "rows keep"]]:
    """Row and label of all values within `slack` of the lowest ones so far; and these, updated."""
    keep = lowest.shape[1]
    if keep == 1:
        lowest = np.minimum(lowest, values.min(axis=1, keepdims=True))
    else:
        few = min(keep, values.shape[1])
        more = np.partition(values, few - 1, axis=1)[:, :few]
        lowest = np.partition(np.concatenate([lowest, more], axis=1), keep - 1, axis=1)[:, :keep]
    bound = lowest.max(axis=1) + slack
    cells = np.flatnonzero(values <= bound[:, None])  # nonzero is 20 times slower
    rows, found = np.divmod(cells, values.shape[1])
    return rows, found, lowest


def _sharpened(probs: csr_array, temperature: float) -> csr_array:
    """p^(1 / temperature), the largest of each row being 1 so that not all of it vanishes."""
    sharp = csr_array(probs, dtype=np.float64, copy=True)
    sharp.eliminate_zeros()
    peak = sharp.max(axis=1).toarray().ravel()
    sharp.data /= np.repeat(peak, np.diff(sharp.indptr))
    sharp.data **= 1.0 / temperature
    return sharp


def _widened(
    probs: csr_array, dataset: Dataset, observed: LabelSpace, labels: LabelSpace
) -> csr_array:
    """The columns of `observed` at their places among `labels`."""
    if unknown := sorted(set(observed.ids) - set(labels.ids)):
        raise ValueError(
            f"observed has {len(unknown)} labels that labels has not, the first is {unknown[0]!r}; "
            "labels must hold every observed one, under the same id"
        )
    if stale := sorted({"votes", "candidates", "set_ids"} & set(dataset.column_names)):
        raise ValueError(
            f"the column {stale[0]!r} holds positions in the smaller label space; remove it first"
        )
    places = np.array([labels.index(id) for id in observed.ids])
    return csr_array(
        (probs.data, places[probs.indices], probs.indptr), (probs.shape[0], len(labels))
    )


def _label_vectors(encoder: str | Path | Any, labels: LabelSpace) -> _Embeddings:
    ready = models.load_encoder(encoder)
    vectors = ready.encode(
        labels.texts(), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return np.asarray(vectors, dtype=np.float64)


def _check_numbers(*, temperature: float, keep: int, scale: float) -> None:
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be above 0 and finite; got {temperature}")
    if not 0 < scale < np.inf:
        raise ValueError(f"scale must be above 0 and finite; got {scale}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, the number of labels to keep; got {keep}")
