"""Rows that differ from each other, by their embeddings in the column `vector`."""

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int

from llmlabel.labelspace import LabelSpace
from llmlabel.select import check_budget, id_ranks, row_vectors, with_selection
from llmlabel.softlabels import SoftLabels

_DIAMETER = 2.0
"""Of the unit sphere: the distance of a row from no chosen row."""


def select_k_center(
    dataset: Dataset, *, budget: int, labelled: Dataset | None = None, seed: int = 0
) -> Dataset:
    """Takes the row that is farthest from all rows taken so far, `budget` times.

    The greedy 2-approximation of the k-center problem, Sener and Savarese, "Active Learning for
    Convolutional Neural Networks: A Core-Set Approach" (arXiv 1708.00489), algorithm 1; distances
    between vectors of length 1. `select_score` is the distance at the moment of choice.

    Args:
        dataset: rows with `vector`.
        budget: rows to take.
        labelled: rows with `vector` that are known already and need no neighbours.
        seed: draws the first row when there are none.
    """
    check_budget(budget, len(dataset))
    order = np.argsort(id_ranks(dataset))
    vectors = row_vectors(dataset)[order]
    known = None if labelled is None or not len(labelled) else row_vectors(labelled)
    first = int(np.random.default_rng(seed).integers(len(vectors)))
    rows, distances = k_center(vectors, budget=budget, known=known, first=first)
    return _selected(dataset, order[rows], distances, "{:.2f} from the nearest row taken before")


def k_center(
    vectors: Float[np.ndarray, "rows width"],
    *,
    budget: int,
    known: Float[np.ndarray, "others its_width"] | None = None,
    first: int = 0,
) -> tuple[Int[np.ndarray, " budget"], Float[np.ndarray, " budget"]]:
    """The rows in the order of choice, and how far each was from all before it.

    Args:
        vectors: of any length above 0; only their directions count.
        budget: rows to choose.
        known: vectors that count as chosen.
        first: the row to begin with, when none is known.
    """
    unit = _unit(vectors)
    nearest = np.full(len(unit), _DIAMETER)
    if known is not None:
        if known.shape[1] != unit.shape[1]:
            raise ValueError(
                f"vectors of widths {unit.shape[1]} and {known.shape[1]}; use one encoder for both"
            )
        for other in _unit(known):
            nearest = np.minimum(nearest, _distance(unit, other))
    rows, distances = np.zeros(budget, dtype=np.int64), np.zeros(budget)
    for place in range(budget):
        row = first if place == 0 and known is None else int(nearest.argmax())
        rows[place], distances[place] = row, nearest[row]
        nearest = np.minimum(nearest, _distance(unit, unit[row]))
        nearest[rows[: place + 1]] = -1.0  # never twice, even among equal vectors
    return rows, distances


def select_badge(dataset: Dataset, labels: LabelSpace, *, budget: int, seed: int = 0) -> Dataset:
    """Takes rows whose gradients are long and differ: uncertain and diverse at once.

    BADGE, Ash et al., "Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds"
    (arXiv 1906.03671), algorithm 1: k-means++ seeding on the gradients of the last layer, (p - the
    one-hot of its best label) times the vector. `select_score` is the squared distance at the
    moment of choice.

    Differs from the paper: the vector is the text's embedding, not the penultimate layer of the
    model that gave the soft label.

    Args:
        dataset: rows with `vector` and soft labels of the model to be improved.
        labels: their label space, single-label.
        budget: rows to take.
        seed: of the draws.
    """
    if labels.multilabel:
        raise ValueError("select_badge needs labels that exclude each other (single-label)")
    check_budget(budget, len(dataset))
    order = np.argsort(id_ranks(dataset))
    soft = SoftLabels.from_dataset(dataset, labels)
    probs = np.exp(soft.log_dense(floor=1e-30))[order]  # a row without a label is uniform
    rows, distances = badge(
        probs, row_vectors(dataset)[order], budget=budget, rng=np.random.default_rng(seed)
    )
    return _selected(dataset, order[rows], distances, "gradient {:.2f} (squared) from any before")


def badge(
    probs: Float[np.ndarray, "rows labels"],
    vectors: Float[np.ndarray, "rows width"],
    *,
    budget: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, " budget"], Float[np.ndarray, " budget"]]:
    """The rows in the order of choice, and their squared distance from all before (their norm first).

    The gradients are never built: <a h', b k'> = <a, b> <h, k>.
    """
    errors = probs.copy()
    errors[np.arange(len(errors)), probs.argmax(axis=1)] -= 1
    features = vectors.astype(np.float64)
    norms = (errors**2).sum(axis=1) * (features**2).sum(axis=1)
    rows, distances = np.zeros(budget, dtype=np.int64), np.zeros(budget)
    nearest = np.full(len(norms), np.inf)
    free = np.ones(len(norms), dtype=bool)
    for place in range(budget):
        mass = np.where(free, nearest if place else 1.0, 0.0)
        if not mass.sum() > 0:  # all that is left equals something chosen
            mass = free.astype(np.float64)
        total = mass.cumsum()
        row = int(np.searchsorted(total, rng.uniform() * total[-1], side="right"))
        rows[place], distances[place] = row, nearest[row] if place else norms[row]
        free[row] = False
        inner = (errors @ errors[row]) * (features @ features[row])
        nearest = np.minimum(nearest, np.maximum(norms + norms[row] - 2 * inner, 0.0))
        nearest[norms + norms[row] - 2 * inner < 1e-12] = 0.0  # equal, within rounding
    return rows, distances


def _selected(
    dataset: Dataset,
    rows: Int[np.ndarray, " budget"],
    distances: Float[np.ndarray, " budget"],
    reason: str,
) -> Dataset:
    taken = np.zeros(len(dataset), dtype=bool)
    taken[rows] = True
    scores = np.full(len(dataset), np.nan)
    scores[rows] = distances
    return with_selection(
        dataset, taken, scores, lambda row: reason.format(scores[row]) if taken[row] else None
    )


def _unit(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _distance(
    unit: Float[np.ndarray, "rows width"], other: Float[np.ndarray, " width"]
) -> Float[np.ndarray, " rows"]:
    return np.sqrt(np.maximum(2 - 2 * (unit @ other).astype(np.float64), 0.0))
