"""Sets from all gold rows, those included that models were trained on: cross-conformal prediction.

The gold rows are cut into folds, and for each fold a model is trained on the others. Every gold row so
has a soft label from a model that did not see it, and every new row one from each model. That wastes
no row; its price is a promise that is weaker for p-values, and sets that are larger for e-values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    data_sha,
    engines_of,
    one_of,
    refuse_trained,
)
from llmlabel.calibrate.quantile import exact, fewest_scores, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, block_scores, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_set_ids
from llmlabel.data import gold_index, require_columns, rows_of, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Method = Literal["cross", "twice", "e"]

Folds = Sequence[Float[np.ndarray, "..."]]
"""An array a fold."""


@dataclass(frozen=True)
class CrossConformal:
    """Scores of all gold rows, fold by fold.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        how: Nonconformity score.
        folds: Names of the folds.
        scores: Of each fold's true labels, ascending; infinite where the true label has no score.
        column: Column of the folds.
        seed: Seed of the uniform numbers of randomised scores.
        label_space: Fingerprint of the label space.
        engines: Of each fold, who made the soft labels (the column `engine`).
        data_sha: Hash of ids, gold and soft labels of the gold rows, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    how: Nonconformity
    folds: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    column: str
    seed: int
    label_space: str
    engines: tuple[tuple[str, ...], ...] = ()
    data_sha: str = ""

    @property
    def rows(self) -> int:
        """Number of gold rows."""
        return sum(map(len, self.scores))

    def guaranteed(self, method: Method = "cross") -> float:
        """The proven share of new rows whose set holds the true label; see `predict_cross_sets`.

        For "cross", 1 - 2 alpha - 2 (1 - alpha)(K - 1) / (n + K) with n rows in K folds: Vovk et al.
        2018 and Barber et al. 2021 (arXiv 1905.02928), theorem 4, whose folds are of one size; with
        folds of any size it is the same, as a weighted mean of p-values is at most doubled.
        """
        one_of("method", method, Method)
        if method != "cross" or len(self.folds) == 1:
            return 1 - self.alpha
        extra = (len(self.folds) - 1) / (self.rows + len(self.folds))
        return max(1 - 2 * self.alpha - 2 * (1 - self.alpha) * extra, 0.0)


def fit_cross_conformal(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    column: str = "split",
    alpha: float = 0.1,
    score: Score | Nonconformity = "lac",
    seed: int = 0,
    training: Dataset | None = None,
) -> CrossConformal:
    """Keeps the scores of all gold rows, each from the model that was not trained on its fold.

    Args:
        dataset: The gold rows, each with exactly one gold label or none of these, and a soft label
            made by the model of its fold. That no model has seen its fold cannot be checked here; if
            one has, sets are too small. Rows whose gold nobody knows are left out.
        labels: A single-label space.
        column: The folds, as strings; `llmlabel.data.split` draws them.
        alpha: Share of misses allowed.
        score: Nonconformity score, or a `Nonconformity` with its settings.
        seed: Of randomised scores.
        training: Rows beside the other folds that a model was trained on; gold rows with the same id
            and text are refused.

    Raises:
        ValueError: If `alpha` is not between 0 and 1, there are too few rows for it or too few that
            store the true label, a row has no fold or several gold labels or was trained on, or
            the label space is multi-label.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if labels.multilabel:
        raise ValueError("cross-conformal sets need a label space of one label a row")
    require_columns(dataset, "id", "gold", column)
    refuse_routed(dataset)
    dataset = with_gold(dataset)
    refuse_trained(dataset, training)
    if len(dataset) < (needed := fewest_scores(alpha)):
        raise ValueError(
            f"alpha={alpha} needs at least {needed} gold rows; there are {len(dataset)} (label more "
            "rows, or allow a larger alpha)"
        )
    how = with_settings(score)
    fold_of = dataset[column][:]
    if strange := [name for name in fold_of if not isinstance(name, str)]:
        raise ValueError(
            f"column {column!r} holds {strange[0]!r}, which is no name of a fold; every gold row has "
            "one, a string"
        )
    probs = SoftLabels.from_dataset(dataset, labels).probs
    uniforms = row_uniforms(dataset["id"][:], seed=seed)
    gold = gold_index(dataset, labels)
    scores = true_scores(probs, gold, how, uniforms)
    lost = int(np.isinf(scores).sum())
    if lost >= math.floor(exact(alpha) * (len(scores) + 1)):
        raise ValueError(
            f"alpha={alpha} is unreachable: only {len(scores) - lost} of {len(scores)} gold rows have "
            "their true label among the labels stored, so every set would hold every label; store "
            "more labels a row, or allow a larger alpha"
        )
    names = sorted(set(fold_of))
    rows_in = [np.flatnonzero(np.array(fold_of) == name) for name in names]
    return CrossConformal(
        alpha=alpha,
        how=how,
        folds=tuple(names),
        scores=tuple(tuple(np.sort(scores[rows]).tolist()) for rows in rows_in),
        column=column,
        seed=seed,
        label_space=labels.fingerprint,
        engines=tuple(engines_of(dataset.select(rows)) for rows in rows_in),
        data_sha=data_sha(dataset["id"][:], gold, probs),
    )


def predict_cross_sets(
    dataset: Dataset,
    labels: LabelSpace,
    fitted: CrossConformal,
    *,
    folds: dict[str, Dataset],
    method: Method = "cross",
    power: float = 16.0,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the label most probable over all models first.

    "cross": labels with a cross-conformal p-value above alpha (Vovk 2015, arXiv 1208.0806),
    which misses about a share alpha in practice, and 2 alpha and a little is proven. "twice":
    the same at the level, about alpha / 2, where alpha itself is proven. "e": labels whose conformal
    e-value, a mean over the folds, is below 1 / alpha (Vovk 2025, arXiv 2001.05989; Balinsky and
    Balinsky 2024, arXiv 2403.19082): alpha is proven, for any folds and models. What is proven stands
    in `CrossConformal.guaranteed`, and holds when gold rows and new rows are drawn from one source.

    Differs from the papers: e-values are made of scores that are scaled to [0, 1] (a label that is not
    stored has 1) and raised to a power.

    Args:
        dataset: New rows.
        labels: The label space of the scores.
        fitted: What `fit_cross_conformal` gave.
        folds: For each fold the same rows with the soft labels of its model.
        method: How folds are joined.
        power: Of "e" only, and chosen before gold is seen: with 1, as in the papers, sets are of use
            where true labels have a mean score well below alpha; 16 helps where that is not so.
        other_engine: "allow" takes soft labels of another model than the fold's,
            for which nothing is promised.

    Raises:
        ValueError: If the label space or a fold's model is another one, a fold or a row of one is missing, there are too
            few rows to prove alpha, or no e-value can reach 1 / alpha.
    """
    one_of("method", method, Method)
    check_space(labels, fitted.label_space, what="scores")
    if set(folds) != set(fitted.folds):
        raise ValueError(
            f"folds must be {', '.join(fitted.folds)}, each with the rows that its model labelled; "
            f"got {', '.join(folds) or 'none'}"
        )
    for name, engines in zip(fitted.folds, fitted.engines or ((),) * len(folds), strict=True):
        check_engines(folds[name], engines, other_engine)
    require_columns(dataset, "id")
    tables = {name: rows_of(dataset, folds[name], f"fold {name!r}") for name in fitted.folds}
    probs = [soft.probs for soft in SoftLabels.from_sources(tables, labels).values()]
    calibration = [np.array(scores) for scores in fitted.scores]
    ranged = partial(ranged_scores, how=fitted.how, labels=len(labels), power=power)
    if method == "e":
        calibration = [ranged(scores) for scores in calibration]
        _check_reach(calibration, fitted.alpha, power)
    least = _least_count(fitted, method)
    uniforms = row_uniforms(dataset["id"][:], seed=fitted.seed)

    def sets(rows: slice) -> csr_array:
        blocks = [one[rows].astype(np.float64).toarray() for one in probs]
        scores = [block_scores(block, fitted.how, uniforms[rows]) for block in blocks]
        if method == "e":
            return csr_array(
                cross_e_values([ranged(s) for s in scores], calibration) < 1 / fitted.alpha
            )
        return csr_array(cross_counts(scores, calibration) >= least)

    return with_set_ids(dataset, sum(probs[1:], start=probs[0].astype(np.float64)), sets)


def cross_counts(scores: Folds, calibration: Folds) -> Int[np.ndarray, "..."]:
    """How many gold rows conform as little as each label does to the model of their fold.

    Args:
        scores: Of any labels, by each fold's model.
        calibration: Of each fold's true labels, ascending.
    """
    pairs = zip(scores, calibration, strict=True)
    counts = [len(known) - np.searchsorted(known, one, side="left") for one, known in pairs]
    total: np.ndarray = np.sum(counts, axis=0)
    return total


def cross_p_values(scores: Folds, calibration: Folds) -> Float[np.ndarray, "..."]:
    """(1 + count) / (n + 1), Vovk 2015 (arXiv 1208.0806); see `cross_counts`."""
    return (1 + cross_counts(scores, calibration)) / (1 + sum(map(len, calibration)))


def cross_e_values(scores: Folds, calibration: Folds) -> Float[np.ndarray, "..."]:
    """The mean over folds of score / mean score of the fold's rows and the new one.

    Vovk 2025 (arXiv 2001.05989). The expectation for a true label is 1 in each fold, and so
    for their mean, however the folds depend on each other.

    Args:
        scores: From 0 on, finite.
        calibration: Likewise.
    """
    values = []
    for one, known in zip(scores, calibration, strict=True):
        total = known.sum() + one
        values.append(
            (len(known) + 1) * np.divide(one, total, np.zeros_like(total), where=total > 0)
        )
    mean: np.ndarray = np.mean(values, axis=0)
    return mean


def ranged_scores(
    scores: Float[np.ndarray, "..."], how: Nonconformity, *, labels: int, power: float
) -> Float[np.ndarray, "..."]:
    """Scores scaled to [0, 1], where what is not stored is, and raised to a power.

    Raises:
        ValueError: If the score has no known range, or the power is not above 0.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power must be above 0, and finite; got {power}")
    if callable(how.score) or how.prior is not None:
        raise ValueError(
            "e-values need a score of known range; one with a prior or a function has none"
        )
    ranks = {"raps": max(labels - how.free_labels, 0), "saps": labels - 1}.get(how.score, 0)
    low, high = -1.0 if how.score == "margin" else 0.0, 1.0 + how.penalty * ranks
    found: np.ndarray = np.clip((scores - low) / (high - low), 0.0, 1.0) ** power
    return found


def _least_count(fitted: CrossConformal, method: Method) -> int:
    """Labels that at least so many gold rows do not conform more than are in the set."""
    n, many, alpha = fitted.rows, len(fitted.folds), exact(fitted.alpha)
    if method != "twice" or many == 1:
        return math.floor(alpha * (n + 1))
    level = alpha * (n + many) / 2 - many + 1
    if level < 1:
        raise ValueError(
            f"cannot certify: alpha={fitted.alpha} with {many} folds needs n >= "
            f"{math.ceil(many * (2 / alpha - 1))} gold rows; there are {n} (take method='cross', fewer "
            "folds or a larger alpha)"
        )
    return math.floor(level)


def _check_reach(calibration: Folds, alpha: float, power: float) -> None:
    """An e-value that no label can reach leaves no label out."""
    most = float(cross_e_values([np.ones(1)] * len(calibration), calibration)[0])
    if most < 1 / alpha:
        raise ValueError(
            f"every set would hold every label: e-values are at most {most:.3g} with power={power:g}, "
            f"and 1 / alpha = {1 / alpha:.3g} leaves a label out; raise power=, or take method='twice'"
        )
