"""Split conformal prediction: sets of labels that hold the true one with a chosen probability."""

import base64
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, cast, get_args

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    data_sha,
    engines_of,
    one_of,
    row_marks,
    same_rows,
    shared_rows,
)
from llmlabel.calibrate.quantile import (
    conformal_p_values,
    conformal_quantile,
    fewest_scores,
    row_uniforms,
)
from llmlabel.calibrate.scores import (
    Nonconformity,
    Score,
    ScoreFunction,
    sets_of,
    stored_scores,
    true_scores,
)
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import TUNED, check_fold, tuned_score, tuning_fold
from llmlabel.calibrate.written import with_set_ids
from llmlabel.data import gold_index, require_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


@dataclass(frozen=True)
class Conformal:
    """A fitted threshold; `predict_sets` keeps the labels whose score is at most this.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        score: Nonconformity score, or the name of the function that it was.
        threshold: Infinite where the gold rows cannot carry `alpha`: then a set holds every label.
        rows: Number of gold rows, those whose gold is none of the labels included.
        seed: Seed of the uniform numbers.
        label_space: Fingerprint of the label space.
        randomised: Setting of the score, as are the next three; see `Nonconformity`.
        penalty: Chosen on the tuning rows where it was left out.
        free_labels: So is this.
        prior: Probability of each label.
        tuning_rows: Gold rows that settings were chosen on; they are not among `rows`.
        recall: Share of `rows` whose soft label stores the true label: no set can cover more.
        training_overlap: Gold rows that a model was trained on, if that was forced: no promise then.
        engines: Who made the soft labels (the column `engine`).
        data_sha: Hash of ids, gold and soft labels of the gold rows, in any order.
        row_marks: Short hashes of the gold rows; see `calibration_rows`.
        scores: Of the true labels, ascending, for p-values; null where they were not kept.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    score: str
    threshold: float
    rows: int
    seed: int
    label_space: str
    randomised: bool = True
    penalty: float = 0.0
    free_labels: int = 0
    prior: tuple[float, ...] | None = None
    tuning_rows: int = 0
    recall: float = 1.0
    training_overlap: int = 0
    engines: tuple[str, ...] = ()
    data_sha: str = ""
    row_marks: str = ""
    scores: tuple[float, ...] | None = None

    def how(self, function: ScoreFunction | None = None) -> Nonconformity:
        """The score with its settings; a score that was a function is given again."""
        return Nonconformity(
            cast(Score, self.score) if function is None else function,
            *(self.randomised, self.penalty, self.free_labels, self.prior),
        )


def fit_conformal(  # noqa: PLR0913  # each is one plain choice
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    score: Score | ScoreFunction = "lac",
    randomised: bool = True,
    penalty: float | None = None,
    free_labels: int | None = None,
    prior: list[float] | None = None,
    tuning_share: float = 0.2,
    seed: int = 0,
    training: Dataset | None = None,
    overlap: Literal["refuse", "record"] = "refuse",
    unreachable: Literal["refuse", "every label"] = "refuse",
    keep_scores: bool = True,
) -> Conformal:
    """Fits the threshold that leaves out the true label of at most a share `alpha` of new rows.

    The guarantee is for the average new row, and holds when gold rows and new rows are exchangeable
    and no gold row was used to make the soft labels. A row whose gold is none of the labels is in no
    set: it counts as missed, and so does one whose soft label does not store the true label
    (outside a shortlist, or no soft label at all).

    Args:
        dataset: The gold rows, each with exactly one gold label or none of these; rows whose gold
            nobody knows (null) are left out.
        labels: A single-label space.
        alpha: Share of misses allowed.
        score: "lac" gives the smallest sets on average, "aps" sets that grow with the difficulty of
            the row, "raps" and "saps" such sets without long tails; see `Nonconformity`. In Python
            also a function; it is given again to `predict_sets`.
        randomised: Setting of the score, as are the next three; see `Nonconformity`.
        penalty: Where null, the one with the smallest sets on the tuning rows ("raps", "saps").
        free_labels: Where null, so many that a share 1 - `alpha` of the tuning rows has the true
            label among them ("raps": Angelopoulos et al. 2021, arXiv 2009.14193, appendix E).
        prior: Probability of each label, from rows other than these; see `label_prior`.
        tuning_share: Share of the gold rows, drawn by their ids, that null settings are chosen on;
            the threshold is fitted on the others.
        seed: Of the uniform numbers, and of that draw.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.
        overlap: "record" takes them all the same, and the result says how many.
        unreachable: "every label" gives sets of all labels where more than a share `alpha` of the
            soft labels do not store the true label, instead of an error.
        keep_scores: Whether the result keeps the scores (18 bytes of JSON a row) for p-values.

    Raises:
        ValueError: If `alpha` is not between 0 and 1, there are too few rows for it or it is out of
            reach, a row has several gold labels or was trained on, or the label space is multi-label.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    one_of("overlap", overlap, Literal["refuse", "record"])
    one_of("unreachable", unreachable, Literal["refuse", "every label"])
    _check_single(labels)
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    _check_rows(len(dataset), alpha)
    trained = 0 if training is None else int(shared_rows(dataset, training).sum())
    if trained and overlap == "refuse":
        raise ValueError(
            f"{trained} of {len(dataset)} gold rows are training rows too, so their soft labels are "
            "too good and sets too small; leave them out (overlap='record' takes them all the same, "
            "and then nothing is promised)"
        )
    how = Nonconformity(
        *(score, randomised, penalty or 0.0, free_labels or 0),
        None if prior is None else tuple(prior),
    )
    probs = SoftLabels.from_dataset(dataset, labels).probs
    gold = gold_index(dataset, labels)
    ids = dataset["id"][:]
    uniforms = row_uniforms(ids, seed=seed)
    tuned = np.zeros(len(gold), dtype=bool)
    if (penalty is None and score in TUNED) or (free_labels is None and score == "raps"):
        tuned = tuning_fold(ids, tuning_share, seed)
        check_fold(tuned, alpha)
        how = tuned_score(
            how, (probs[tuned], gold[tuned], uniforms[tuned]), alpha, penalty, free_labels
        )
    kept = ~tuned
    scores = np.sort(true_scores(probs[kept], gold[kept], how, uniforms[kept]))
    threshold = conformal_quantile(scores, alpha)
    lost = int(np.isinf(scores).sum())
    if threshold == math.inf and lost > alpha * len(scores) and unreachable == "refuse":
        raise ValueError(_unreachable(alpha, scores, gold[kept]))
    return Conformal(
        *(alpha, _name(score), threshold, len(scores), seed, labels.fingerprint),
        *(how.randomised, how.penalty, how.free_labels, how.prior),
        tuning_rows=int(tuned.sum()),
        recall=float(np.isfinite(scores).mean()),
        training_overlap=trained,
        engines=engines_of(dataset),
        data_sha=data_sha(ids, gold, probs),
        row_marks=base64.b64encode(np.sort(row_marks(dataset)).astype("<u8").tobytes()).decode(),
        scores=tuple(scores.tolist()) if keep_scores else None,
    )


def predict_sets(
    dataset: Dataset,
    labels: LabelSpace,
    conformal: Conformal,
    *,
    empty: Literal["keep", "top"] = "keep",
    ties: Literal["keep", "draw"] = "keep",
    score: ScoreFunction | None = None,
    overlap: Literal["keep", "refuse"] = "keep",
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most the threshold, most probable first.

    With "lac" an empty set says that not even the most probable label is as probable as true labels
    are on the gold rows; with "aps" it is the chance of the uniform number, on rows of one very
    probable label. A row without a soft label has the empty set, unless the threshold is infinite:
    then every set holds all labels.

    Args:
        dataset: New rows. Rows that the threshold was fitted on get sets, too, but nothing is
            promised for these; see `calibration_rows`.
        labels: The label space of the threshold.
        conformal: What `fit_conformal` gave.
        empty: "keep" leaves an empty set empty, "top" puts the most probable label in; that can
            only raise the coverage, above what was asked for.
        ties: "draw" keeps labels with a smoothed p-value above alpha. Sets are then smaller where
            scores tie (soft labels from a few votes), and coverage is 1 - alpha exactly.
        score: The function, if the score is one.
        overlap: "refuse" raises if some rows are among those that the threshold was fitted on.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the threshold was fitted in another label space, on another model's soft
            labels or with another score function.
    """
    one_of("empty", empty, Literal["keep", "top"])
    one_of("ties", ties, Literal["keep", "draw"])
    one_of("overlap", overlap, Literal["keep", "refuse"])
    require_columns(dataset, "id")
    probs, how = checked(dataset, labels, conformal, score, other_engine)
    if overlap == "refuse" and (shared := int(calibration_rows(dataset, conformal).sum())):
        raise ValueError(
            f"{shared} of {len(dataset)} rows are among the {conformal.rows} gold rows that the "
            "threshold was fitted on, so nothing is promised for them; leave them out"
        )
    ids = dataset["id"][:]
    uniforms, draws = row_uniforms(ids, seed=conformal.seed), tie_draws(ids, conformal)

    def sets(rows: slice) -> csr_array:
        block, own = probs[rows], uniforms[rows]
        if ties == "keep":
            inside = sets_of(block, conformal.threshold, how, own)
        else:
            inside = _drawn(block, conformal, how, own, draws[rows])
        return inside + _tops(block, np.diff(inside.indptr) == 0) if empty == "top" else inside

    return with_set_ids(dataset, probs, sets)


def calibration_rows(dataset: Dataset, conformal: Conformal) -> Bool[np.ndarray, " rows"]:
    """Whether each row is a gold row of the threshold: same id, and same text where there are texts.

    Their sets are fitted to them, so coverage must not be measured there.
    """
    marks = np.frombuffer(base64.b64decode(conformal.row_marks), dtype="<u8").astype(np.uint64)
    return same_rows(dataset, marks)


def _drawn(
    probs: csr_array,
    conformal: Conformal,
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
    draws: Float[np.ndarray, " rows"],
) -> csr_array:
    """The labels whose smoothed p-value is above alpha; of those not stored, all or none."""
    calibration = kept_scores(conformal)
    rows = np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))
    values = conformal_p_values(stored_scores(probs, how, uniforms), calibration, draws[rows])
    at = np.flatnonzero(values > conformal.alpha)
    chosen = csr_array(
        (np.ones(len(at), dtype=bool), (rows[at], probs.indices[at])), shape=probs.shape
    )
    rest = conformal_p_values(np.full(len(draws), np.inf), calibration, draws) > conformal.alpha
    if rest.any():
        stored = csr_array((probs.data > 0, probs.indices, probs.indptr), shape=probs.shape)
        chosen = csr_array(chosen.toarray() | (rest[:, None] & ~stored.toarray()))
    return chosen


def _tops(probs: csr_array, wanted: Bool[np.ndarray, " rows"]) -> csr_array:
    """The most probable label of the rows wanted, if they have a soft label."""
    wanted = wanted & (probs.max(axis=1).toarray() > 0)
    rows = np.flatnonzero(wanted)
    ids = np.asarray(probs[rows].argmax(axis=1)).ravel()
    return csr_array((np.ones(len(rows), dtype=bool), (rows, ids)), shape=probs.shape)


def tie_draws(ids: list[str], conformal: Conformal) -> Float[np.ndarray, " rows"]:
    """Numbers that break ties, other ones than those of randomised scores."""
    return row_uniforms((f"ties/{row_id}" for row_id in ids), seed=conformal.seed)


def kept_scores(conformal: Conformal) -> Float[np.ndarray, " gold_rows"]:
    """Of the true labels, ascending; a ValueError where they were not kept."""
    if conformal.scores is None:
        raise ValueError(
            "p-values need the scores of the gold rows, which this threshold was fitted without; "
            "fit it with keep_scores=True"
        )
    return np.array(conformal.scores)


def checked(
    dataset: Dataset,
    labels: LabelSpace,
    conformal: Conformal,
    score: ScoreFunction | None,
    other_engine: OtherEngine,
) -> tuple[csr_array, Nonconformity]:
    """The soft labels of new rows, if they are of the kind that the threshold was fitted on."""
    _check_single(labels)
    check_space(labels, conformal.label_space)
    check_engines(dataset, conformal.engines, other_engine)
    by_name = conformal.score in get_args(Score)
    if by_name == (score is not None) or (score is not None and _name(score) != conformal.score):
        given = "none is" if score is None else f"{_name(score)} is"
        needed = "no function" if by_name else f"the function {conformal.score}"
        raise ValueError(f"the threshold was fitted with {needed} as score=, but {given} given")
    return SoftLabels.from_dataset(dataset, labels).probs, conformal.how(score)


def _name(score: Score | ScoreFunction) -> str:
    if not callable(score):
        return score
    named = score if hasattr(score, "__qualname__") else type(score)  # a partial has no name
    return f"{named.__module__}.{named.__qualname__}"


def _check_rows(rows: int, alpha: float) -> None:
    if rows < (needed := fewest_scores(alpha)):
        raise ValueError(
            f"alpha={alpha} needs at least {needed} gold rows; there are {rows} (label more "
            "rows, or allow a larger alpha)"
        )


def _unreachable(
    alpha: float, scores: Float[np.ndarray, " rows"], gold: Int[np.ndarray, " rows"]
) -> str:
    """Why no finite threshold covers enough of the gold rows."""
    n, none = len(gold), int((gold < 0).sum())
    stored = int(np.isfinite(scores).sum())
    least = math.ceil((1 - Fraction(stored, n + 1)) * 1000) / 1000
    larger = f", or allow alpha={least:g}" if least < 1 else ""
    return (
        f"alpha={alpha} is unreachable: only {stored} of {n} gold rows have their true label among "
        f"the labels stored (shortlist recall {stored / max(n - none, 1):.2f}, {none} rows with none "
        f"of the labels); store more labels a row{larger} (unreachable='every "
        "label' makes sets of all labels)"
    )


def _check_single(labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "these sets need a label space of one label a row; this one is multi-label (load it "
            "with multilabel=false and give each row one gold label)"
        )
