"""The rows that a model is least sure of."""

from typing import Any, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float

from llmlabel.labelspace import LabelSpace
from llmlabel.refine.votes import Votes, read_votes
from llmlabel.select import highest, id_ranks, margins, with_selection
from llmlabel.softlabels import SoftLabels

Measure = Literal["margin", "entropy", "least_confident", "votes"]


def select_uncertain(
    dataset: Dataset, labels: LabelSpace, *, budget: int, measure: Measure = "margin"
) -> Dataset:
    """Takes the `budget` rows of highest uncertainty, from 0 to 1; a row without a label has 1.

    "margin" is 1 minus the first probability less the second (Scheffer et al. 2001), "entropy" that
    of the distribution over its maximum (Shannon 1948; Settles 2009, section 3.1),
    "least_confident" 1 minus the largest probability (Lewis and Gale 1994), "votes" the vote
    entropy of the sources (Dagan and Engelson 1995; `label_entropy`), where a vote counts for its
    most probable label. Uncertain rows are also those that a teacher gets wrong most: see
    `llmlabel.select.robust` when a model answers, not a person.

    Args:
        dataset: rows with soft labels, or `votes` for that measure.
        labels: their label space; "least_confident" and "votes" need a single-label one.
        budget: rows to take.
        measure: of uncertainty.
    """
    if labels.multilabel and measure in ("least_confident", "votes"):
        raise ValueError(f"measure {measure!r} needs labels that exclude each other; use margin")
    if measure == "votes":
        votes = read_votes(dataset, labels).hard()
        scores = np.where(votes.voted, label_entropy(votes), 1.0)
    else:
        soft = SoftLabels.from_dataset(dataset, labels)
        scores = _uncertainty(soft, measure)
        scores[np.diff(soft.probs.indptr) == 0] = 1.0
    taken = highest(scores, id_ranks(dataset), budget=budget)

    def reason(row: int) -> str | None:
        if not taken[row]:
            return None
        return _reason(dataset[row], labels, measure, float(scores[row]))

    return with_selection(dataset, taken, scores, reason)


def entropies(soft: SoftLabels) -> Float[np.ndarray, " rows"]:
    """Entropy of each row over its maximum; the missing mass is spread over labels not stored.

    In a multi-label space the largest entropy of a label, over log 2.
    """
    if soft.multilabel:
        event = np.clip(soft.dense(), 0, 1)
        parts = _times_log(event) + _times_log(1 - event)
        return -parts.min(axis=1) / np.log(2)
    return -_times_log(np.exp(soft.log_dense(floor=1e-30))).sum(axis=1) / np.log(
        soft.probs.shape[1]
    )


def label_entropy(votes: Votes) -> Float[np.ndarray, " rows"]:
    """Entropy of the labels that each row's votes are for, over the log of their number.

    Dagan and Engelson 1995, "Committee-Based Sampling for Training Probabilistic Classifiers", with
    hard votes: 1 when each says something else, 0 for a row with one vote or none.

    Differs from the paper: a source without a vote on a row is not of its committee.
    """
    cell, count = np.unique(
        votes.row.astype(np.int64) * votes.labels + votes.label, return_counts=True
    )
    cast = np.bincount(votes.row, minlength=votes.rows)
    order = np.lexsort((count, cell // votes.labels))  # which label has which count breaks no tie
    row, count = cell[order] // votes.labels, count[order]
    same = np.bincount(row, count * np.log(count), minlength=votes.rows)
    several = np.maximum(cast, 2)
    # the entropy is log n - sum_c n_c log(n_c) / n; in this form exactly 0 and 1 at its ends
    return np.where(cast > 1, 1.0 - same / (several * np.log(several)), 0.0)


def _times_log(probs: np.ndarray) -> np.ndarray:
    return probs * np.log(np.maximum(probs, 1e-30))


def _uncertainty(soft: SoftLabels, measure: Measure) -> Float[np.ndarray, " rows"]:
    if measure == "margin":
        return 1 - margins(soft)
    if measure == "entropy":
        return entropies(soft)
    return 1 - soft.dense().max(axis=1)


def _reason(row: dict[str, Any], labels: LabelSpace, measure: Measure, score: float) -> str:
    if measure == "votes":
        return f"the sources disagree: vote entropy {score:.2f}"
    if not row["label_ids"]:
        return f"no label: {row.get('error') or 'nothing was read'}"
    named = " and ".join(repr(labels.names[label]) for label in row["label_ids"][:2])
    return f"{measure.replace('_', ' ')}: uncertainty {score:.2f} about {named}"
