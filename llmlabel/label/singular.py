"""The classifier that a wide and deep network becomes: votes by a power of the distance."""

from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float
from scipy.sparse import csr_array

from llmlabel.label.embedding import readable_vectors
from llmlabel.label.memory import (
    Answers,
    Memory,
    check_unknown,
    label_by_memory,
    normalised,
    read_pool,
    vote,
)
from llmlabel.label.nearest import Nearest, Own, Search, evenly, finder, search_name
from llmlabel.labelspace import LabelSpace

Dimension = Literal["two_nn", "leave_one_out"]

GRID = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
"""Exponents that leave-one-out compares."""

_SAMPLE = 2000
"""Rows that an exponent is estimated on; more make it hardly better."""

_SAME = 1e-10
"""Vectors of a smaller squared distance are the same: encoders make no two alike in other batches."""


def label_singular(  # noqa: PLR0913  # what votes, how, how it is found, and where to keep it
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    dimension: float | Dimension = "two_nn",
    k: int = 100,
    unknown: float = 0.0,
    answers: Answers = "gold",
    search: Search = "exact",
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the mean label of each row's `k` nearest pool rows, weighted by distance^-`dimension`.

    Radhakrishnan et al., "Wide and Deep Neural Networks Achieve Optimality for Classification"
    (arXiv 2204.14126): with a suitable activation the infinitely wide and deep network is the vote
    with the singular kernel ||x - x'||^(-2 alpha), and it is consistent if 2 alpha is the dimension
    of the manifold on which the data lie (Devroye's Hilbert estimate). Nothing is tuned. Rows of
    the same vector as some pool rows get the mean label of these.

    Differs from the paper: soft labels of any number of classes instead of a sign; only the `k`
    nearest vote, of distances in log space. The theorem is asymptotic: it promises nothing against a
    k-NN tuned on validation rows.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: labelled rows with the same columns, and an answer.
        labels: the label space of both.
        dimension: the exponent 2 alpha: a number; "two_nn", see `intrinsic_dimension`, on the pool;
            or "leave_one_out", see `best_exponent`. That of the embedding's width is nothing but
            1-NN. With few pool rows give a number estimated on unlabelled rows.
        k: neighbours that vote; all rows of a smaller pool.
        unknown: share of each distribution left missing, for labels that no neighbour has.
            Single-label only.
        answers: `gold` of the pool, or its soft labels.
        search: see `llmlabel.label.neighbours.label_neighbours`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    check_unknown(unknown, labels)
    memory = read_pool(pool, labels, answers=answers)
    if dimension == "two_nn":
        exponent = _two_nn(memory.vectors)
    elif dimension == "leave_one_out":
        exponent = best_exponent(memory, pool, k=k)
    else:
        exponent = float(dimension)
    if not 0 < exponent < np.inf:
        raise ValueError(f"dimension must be a number above 0; got {dimension}")
    find = finder(memory.vectors, k=k, search=search, rows=memory.rows)

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        found, squared = _distances(find(vectors, own), vectors, memory.vectors)
        return (1 - unknown) * vote(found, singular_weights(squared, exponent), memory.targets)

    choice = ["singular", exponent, k, unknown, search_name(search)]
    return label_by_memory(
        dataset, memory, read, labels, choice=choice, block_rows=block_rows, output=output
    )


def singular_weights(
    squared: Float[np.ndarray, "rows k"], exponent: float
) -> Float[np.ndarray, "rows k"]:
    """Shares proportional to distance^-`exponent`, of squared distances; inf has none.

    The paper's theorem 1, singular case. The limit where some distances are 0: equal shares of
    these.
    """
    same = squared < _SAME
    logs = -exponent / 2 * np.log(np.maximum(squared, _SAME))
    logs = np.where(same.any(axis=1, keepdims=True), np.where(same, 0.0, -np.inf), logs)
    return normalised(logs)


def _distances(
    nearest: Nearest,
    vectors: Float[np.ndarray, "rows width"],
    pool: Float[np.ndarray, "pool width"],
) -> Nearest:
    """Squared distances instead of cosines, which tell small distances only to about 1e-3."""
    found, cosines = nearest
    squared = np.full(found.shape, np.inf)
    exact = vectors.astype(np.float64)
    for column in range(found.shape[1]):  # one at a time: rows x k x width is too much
        squared[:, column] = ((exact - pool[found[:, column]]) ** 2).sum(axis=1)
    return found, np.where(np.isfinite(cosines), squared, np.inf)


def intrinsic_dimension(dataset: Dataset) -> float:
    """Dimension of the manifold on which the vectors lie, by their two nearest neighbours.

    Facco et al. (arXiv 1803.06992): the ratio of the distances to the second and the first
    neighbour has the distribution 1 - ratio^-d. Differs from the paper: the maximum-likelihood
    estimate (n - 1) / sum of log ratios (Denti et al., arXiv 2104.13832), not a line fitted to 90 %
    of the ratios. Of more than 2,000 rows every nth is compared with all.

    Args:
        dataset: rows with `id` and `vector`; labels are not needed.

    Raises:
        ValueError: fewer than 3 rows differ.
    """
    vectors, rows = readable_vectors(dataset)
    order = np.argsort(np.array(dataset["id"][:], dtype=str)[rows])
    return _two_nn(vectors[order])


def _two_nn(vectors: Float[np.ndarray, "rows width"]) -> float:
    distinct = np.unique(vectors.round(5), axis=0, return_index=True)[1]
    vectors = vectors[np.sort(distinct)]
    if len(vectors) < 3:
        raise ValueError(
            f"only {len(vectors)} vectors differ, too few to tell their dimension; give dimension= a "
            "number"
        )
    sample = evenly(len(vectors), _SAMPLE)
    find = finder(vectors, k=2)
    squared = np.concatenate(
        [
            _distances(find(vectors[some], [[int(i)] for i in some]), vectors[some], vectors)[1]
            for some in np.array_split(sample, -(-len(sample) // 500))
        ]
    )
    near, far = np.log(np.sort(np.maximum(squared, _SAME), axis=1)).T / 2
    return float((len(sample) - 1) / np.maximum(far - near, 1e-12).sum())


def best_exponent(memory: Memory, pool: Dataset, *, k: int) -> float:
    """The exponent of `GRID` of the lowest Brier score when each pool row is left out in turn.

    Closed form: what is left out has no weight. Of equal scores the lowest exponent; of more than
    2,000 rows every nth is left out. A row whose label no other has says nothing and is passed over.

    Raises:
        ValueError: no label has two rows.
    """
    others = memory.targets.copy()
    mass = np.asarray(memory.targets.sum(axis=0)).ravel()
    others.data = (mass[others.indices] - others.data > 1e-6).astype(np.float64)
    telling = np.flatnonzero(others.sum(axis=1) > 0)
    if not len(telling):
        raise ValueError(
            "no label has two pool rows, so none can be left out; give dimension= 'two_nn' or a number"
        )
    position = {str(id): row for row, id in enumerate(pool["id"][:])}
    sample = telling[evenly(len(telling), _SAMPLE)]
    find = finder(memory.vectors, k=k)
    scores = np.zeros(len(GRID))
    for some in np.array_split(sample, -(-len(sample) // 500)):
        own = memory.itself(pool.select([position[memory.ids[i]] for i in some.tolist()]))
        nearest = find(memory.vectors[some], own)
        found, squared = _distances(nearest, memory.vectors[some], memory.vectors)
        truth = memory.targets[some.tolist()]
        for i, exponent in enumerate(GRID):
            guess = vote(found, singular_weights(squared, exponent), memory.targets)
            scores[i] += ((guess - truth).power(2)).sum()
    return GRID[int(scores.round(9).argmin())]
