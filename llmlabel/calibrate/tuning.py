"""Settings of a score that are chosen on rows, never on those of the threshold."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.quantile import conformal_quantile, fewest_scores, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, sets_of, true_scores
from llmlabel.data import gold_index
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

TUNED = ("raps", "saps")
"""Scores whose settings are chosen where they are left out."""

_PENALTIES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Tried where `penalty` is left out."""


def with_settings(score: Score | Nonconformity) -> Nonconformity:
    """The score itself, or the one of a name that needs no settings.

    Raises:
        ValueError: If it is the name "raps" or "saps": without a penalty the one is "aps", and in
            the other all ranks but the first are equal. Only `fit_conformal` chooses settings.
    """
    if isinstance(score, Nonconformity):
        return score
    if score in TUNED:
        raise ValueError(
            f"score {score!r} needs its settings here, as nothing chooses them: give "
            f"Nonconformity({score!r}, penalty=...), with those that fit_conformal chose"
        )
    return Nonconformity(score)


def tuning_fold(ids: list[str], share: float, seed: int) -> Bool[np.ndarray, " rows"]:
    """A share of the rows, drawn by their ids."""
    if not 0 < share < 1:
        raise ValueError(f"tuning_share must lie strictly between 0 and 1; got {share}")
    chosen = np.zeros(len(ids), dtype=bool)
    points = row_uniforms((f"tuning/{row_id}" for row_id in ids), seed=seed)
    chosen[np.argsort(points)[: math.floor(share * len(ids))]] = True
    return chosen


def tuned_score(
    how: Nonconformity,
    rows: tuple[csr_array, Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]],
    alpha: float,
    penalty: float | None,
    free_labels: int | None,
) -> Nonconformity:
    """With the settings that are null chosen on these rows.

    Angelopoulos et al. 2021, appendix E: k_reg is the conformal quantile of the true labels' ranks,
    lambda gives the smallest sets; of equally good ones the smallest.
    """
    probs, gold, uniforms = rows
    labels = probs.shape[1]
    if free_labels is None and how.score == "raps":
        plain = replace(how, randomised=False, penalty=0.0, free_labels=0)
        masses = true_scores(probs, gold, plain, uniforms)
        stored = np.isfinite(masses)
        ranks = np.full(len(gold), np.inf)  # a penalty of 1 a rank adds the rank
        by_rank = true_scores(probs, gold, replace(plain, penalty=1.0), uniforms)
        ranks[stored] = np.rint(by_rank[stored] - masses[stored])
        how = replace(how, free_labels=int(min(conformal_quantile(ranks, alpha), labels)))
    if penalty is not None:
        return how

    def size(candidate: Nonconformity) -> float:
        limit = conformal_quantile(true_scores(probs, gold, candidate, uniforms), alpha)
        if limit == math.inf:
            return math.inf
        return float(sets_of(probs, limit, candidate, uniforms).nnz)

    return min((replace(how, penalty=one) for one in _PENALTIES), key=size)


def check_fold(tuned: Bool[np.ndarray, " rows"], alpha: float) -> None:
    """Both parts of the gold rows must carry alpha."""
    needed, of = fewest_scores(alpha), len(tuned)
    if (fewest := min(int(tuned.sum()), of - int(tuned.sum()))) < needed:
        raise ValueError(
            f"alpha={alpha}: choosing the settings of the score splits the {of} gold rows, and "
            f"{fewest} in one part are fewer than the {needed} needed; give penalty= (and "
            "free_labels= for raps), another tuning_share, or more gold rows"
        )


def label_prior(
    dataset: Dataset, labels: LabelSpace, *, source: Literal["soft", "gold"] = "soft"
) -> list[float]:
    """How probable each label is among these rows, with one row's worth spread over all labels.

    Args:
        dataset: Rows other than those of the threshold, such as the training rows.
        labels: Their label space.
        source: The soft labels or `gold`.
    """
    if labels.multilabel:
        raise ValueError("a prior needs a label space of one label a row; this one is multi-label")
    if source == "gold":
        gold = gold_index(dataset, labels)
        ids, weights = gold[gold >= 0], None
    else:
        probs = SoftLabels.from_dataset(dataset, labels).probs
        ids, weights = probs.indices, probs.data
    counts = np.bincount(ids, weights, minlength=len(labels)).astype(np.float64)
    shares = (counts + 1 / len(labels)) / (counts.sum() + 1)
    return [float(share) for share in shares]
