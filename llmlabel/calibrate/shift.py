"""Sets that keep their promise where new rows are other ones than the gold rows: covariate shift.

What is in a text may shift, what a text means may not: the weight of a row is how much more probable
it is among new rows than among calibration rows. A weight that is wrong moves the coverage.
"""

import math
import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    data_sha,
    engines_of,
    one_of,
    refuse_trained,
)
from llmlabel.calibrate.quantile import fewest_scores, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_cut_sets
from llmlabel.data import gold_index, require_columns, with_columns, with_gold
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

Features: TypeAlias = csr_array | np.ndarray
"""One row a text."""

_MOST_PROBABLE = 0.99
"""No row counts as more certain to be new, so that weights stay finite."""

_ROUNDING = 1e-10
"""Relative; sums of weights that differ by less are equal."""


@dataclass(frozen=True)
class WeightedConformal:
    """Scores and weights of calibration rows; each new row cuts its own threshold from them.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        how: Nonconformity score.
        scores: Of the calibration rows, ascending; infinite where the true label has no score.
        weights: Their weights.
        effective_rows: (sum of weights)^2 / sum of squares: so many rows of equal weight say as much.
        column: Column of the weights.
        seed: Seed of the uniform numbers of randomised scores.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows (the column `engine`).
        data_sha: Hash of ids, gold and soft labels of the gold rows, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    how: Nonconformity
    scores: tuple[float, ...]
    weights: tuple[float, ...]
    effective_rows: float
    column: str
    seed: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def add_shift_weights(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    calibration: Dataset,
    new: Dataset,
    features: Literal["label_probs", "vector"] = "label_probs",
    folds: int = 5,
    seed: int = 0,
) -> Dataset:
    """Adds `shift_weight`, how much more probable a row is among `new` than among `calibration`.

    Logistic regression tells the two apart; the odds, times rows of calibration / rows of new, are
    the weight (Tibshirani et al. 2019, arXiv 1904.06019). Cross-fitted: the regression
    that weighs a row has not seen it. The same call weighs the gold rows and the new ones; gold is not
    read.

    Args:
        dataset: The rows to weigh: those of `calibration`, of `new`, or others.
        labels: The label space of the soft labels.
        calibration: The rows that a threshold is fitted on.
        new: Rows like those that get a set.
        features: What tells a row: its soft label, or the column `vector`
            (see `llmlabel.label.embedding.embed`), which sees shifts of topic within a label.
        folds: A row's id says in which of them it is.
        seed: Of the folds.

    Raises:
        ValueError: If a row is both in `calibration` and `new`, or there are too few rows for the
            folds.
    """
    one_of("features", features, Literal["label_probs", "vector"])
    if folds < 2:
        raise ValueError(f"folds must be at least 2; got {folds}")
    parts = [_by_id(rows) for rows in (calibration, new)]
    ids = [part["id"][:] for part in parts]
    if both := sorted({*ids[0]} & {*ids[1]}):
        raise ValueError(
            f"{len(both)} rows are both in calibration and new, the first with id {both[0]!r}; new "
            "rows are rows without a part in the threshold"
        )
    seen = [_features(part, labels, features) for part in parts]
    fold_of = [_folds(some, folds, seed) for some in ids]
    own, own_fold = _features(dataset, labels, features), _folds(dataset["id"][:], folds, seed)
    weights = np.zeros(len(dataset))
    for fold in range(folds):
        kept = [np.flatnonzero(places != fold) for places in fold_of]
        asked = np.flatnonzero(own_fold == fold)
        if not min(map(len, kept)):
            raise ValueError(
                f"fold {fold} leaves {len(kept[0])} calibration rows and {len(kept[1])} new rows to "
                "learn from; give more rows, or fewer folds"
            )
        if len(asked):
            known, other = seen[0][kept[0]], seen[1][kept[1]]
            weights[asked] = likelihood_ratio(known, other, own[asked])
    return with_columns(dataset, {"shift_weight": (weights, Value("float32"))})


def fit_weighted_conformal(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    score: Score | Nonconformity = "lac",
    column: str = "shift_weight",
    seed: int = 0,
    training: Dataset | None = None,
) -> WeightedConformal:
    """Keeps scores and weights of the gold rows, for sets that miss at most `alpha` of shifted rows.

    Weighted conformal prediction, Tibshirani et al. 2019 (arXiv 1904.06019), corollary 1. With true
    weights the promise is exact; with estimated ones it is as good as they are. It holds when only
    the texts have shifted, not what label a text has.

    Args:
        dataset: The gold rows, each with exactly one gold label or none of these, and a weight.
        labels: A single-label space.
        alpha: Share of misses allowed.
        score: Nonconformity score, or a `Nonconformity` with its settings.
        column: The weights, up to a common factor; `add_shift_weights` estimates them.
        seed: Of randomised scores.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If `alpha` is not between 0 and 1, the weights leave fewer than
            ceil(1 / alpha) - 1 effective rows, too few soft labels store the true label, a weight is
            negative or not finite, a row has several gold labels or was trained on, or the label
            space is multi-label.

    Warns:
        UserWarning: If so few effective rows are left that the coverage of this fit may be off by
            `alpha` (two standard deviations).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if labels.multilabel:
        raise ValueError(
            "weighted sets need a label space of one label a row; this one is multi-label"
        )
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    weights = _weights(dataset, column)
    needed = fewest_scores(alpha)
    effective = effective_rows(weights)
    if effective < needed * (1 - _ROUNDING):
        raise ValueError(
            f"alpha={alpha} needs at least {needed} effective gold rows; the weights of {len(weights)} "
            f"rows leave {effective:.1f} (label rows that are like the new ones, or allow a larger "
            "alpha)"
        )
    if effective < 4 * (1 - alpha) / alpha - 2:
        deviation = math.sqrt(alpha * (1 - alpha) / (effective + 2))
        warnings.warn(
            f"the weights leave {effective:.1f} effective gold rows of {len(weights)}: the coverage of "
            f"this fit is {1 - alpha:g} give or take {2 * deviation:.2f}; label rows that are like the "
            "new ones",
            stacklevel=2,
        )
    how = with_settings(score)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    uniforms = row_uniforms(dataset["id"][:], seed=seed)
    gold = gold_index(dataset, labels)
    scores = true_scores(probs, gold, how, uniforms)
    share = float(weights[np.isfinite(scores)].sum() / weights.sum())
    if share < 1 - alpha:
        raise ValueError(
            f"alpha={alpha} is unreachable: gold rows with {share:.2f} of the weight have their true "
            "label among the labels stored; store more labels a row, or allow a larger alpha"
        )
    order = np.lexsort((weights, scores))
    return WeightedConformal(
        alpha=alpha,
        how=how,
        scores=tuple(scores[order].tolist()),
        weights=tuple(weights[order].tolist()),
        effective_rows=effective,
        column=column,
        seed=seed,
        label_space=labels.fingerprint,
        engines=engines_of(dataset),
        data_sha=data_sha(dataset["id"][:], gold, probs),
    )


def predict_weighted_sets(
    dataset: Dataset,
    labels: LabelSpace,
    fitted: WeightedConformal,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most the row's own threshold, most probable first.

    A row that weighs so much that the gold rows cannot carry it has every label.

    Args:
        dataset: New rows, with weights.
        labels: The label space of the scores.
        fitted: What `fit_weighted_conformal` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If it was fitted in another label space or on another model's soft labels, or a
            weight is missing, negative or not finite.
    """
    if fitted.label_space != labels.fingerprint:
        raise ValueError(
            f"the weighted scores are of label space {fitted.label_space}, but the label space given "
            f"is {labels.fingerprint}; fit them again on gold rows of this one"
        )
    check_engines(dataset, fitted.engines, other_engine)
    require_columns(dataset, "id")
    limits = weighted_thresholds(
        np.array(fitted.scores),
        np.array(fitted.weights),
        _weights(dataset, fitted.column),
        alpha=fitted.alpha,
    )
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return with_cut_sets(dataset, probs, limits[:, None], fitted.how, seed=fitted.seed)


def weighted_thresholds(
    scores: Float[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
    own: Float[np.ndarray, " new"],
    *,
    alpha: float,
) -> Float[np.ndarray, " new"]:
    """The 1 - alpha quantile of the weighted scores and of infinity with the new row's own weight.

    Tibshirani et al. 2019, corollary 1. Equal weights give exactly `conformal_quantile`.
    """
    order = np.argsort(scores, kind="stable")
    mass = np.cumsum(weights[order])
    total = mass[-1] if len(mass) else 0.0
    target = (1 - alpha) * (total + own) * (1 - _ROUNDING)
    found: Float[np.ndarray, " new"] = np.append(scores[order], np.inf)[
        np.searchsorted(mass, target)
    ]
    return found


def effective_rows(weights: Float[np.ndarray, " rows"]) -> float:
    """(sum)^2 / sum of squares, Kish 1965; 0 where all weights are 0."""
    top = weights.max(initial=0.0)
    if not top:
        return 0.0
    shares = weights / top  # squares of very small or large weights would leave float64
    return float(shares.sum() ** 2 / (shares**2).sum())


def likelihood_ratio(
    calibration: Features, new: Features, rows: Features
) -> Float[np.ndarray, " rows"]:
    """How much more probable each of `rows` is among `new`, by the odds of logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sparse = isinstance(calibration, csr_array)  # probabilities: they have one scale already
    stacked: Any = vstack([calibration, new]) if sparse else np.vstack([calibration, new])
    is_new = np.repeat([0, 1], [calibration.shape[0], new.shape[0]])
    regression = LogisticRegression(max_iter=1000)
    model = regression if sparse else make_pipeline(StandardScaler(), regression)
    model.fit(stacked, is_new)
    share = np.minimum(model.predict_proba(rows)[:, 1], _MOST_PROBABLE)
    ratio: Float[np.ndarray, " rows"] = share / (1 - share)
    return ratio * (calibration.shape[0] / new.shape[0])


def _features(dataset: Dataset, labels: LabelSpace, features: str) -> Features:
    if features == "vector":
        return row_vectors(dataset).astype(np.float64)
    return SoftLabels.from_dataset(dataset, labels).probs.astype(np.float64)


def _by_id(dataset: Dataset) -> Dataset:
    """The rows in the order of their ids: sums of floats depend on the order."""
    require_columns(dataset, "id")
    return dataset.select(np.argsort(np.array(dataset["id"][:], dtype=object), kind="stable"))


def _folds(ids: list[str], folds: int, seed: int) -> Int[np.ndarray, " rows"]:
    uniforms = row_uniforms((f"fold/{row}" for row in ids), seed=seed)
    return (uniforms * folds).astype(np.int64)


def _weights(dataset: Dataset, column: str) -> Float[np.ndarray, " rows"]:
    """The numbers of a column, each finite and not negative."""
    require_columns(dataset, column)
    values = arrow_table(dataset.select_columns([column]))[column]
    if not re.fullmatch(r"u?int\d+|float|double|halffloat", str(values.type)):
        raise ValueError(f"column {column!r} holds {values.type}; weights are numbers")
    weights: Float[np.ndarray, " rows"] = values.cast(pa.float64()).to_numpy()  # null becomes NaN
    if (wrong := np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))).size:
        row = int(wrong[0])
        raise ValueError(
            f"row with id {dataset[row]['id']!r} has the weight {weights[row]} in column {column!r}; "
            "a weight is a finite number from 0 on"
        )
    return weights
