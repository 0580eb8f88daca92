"""Thresholds from calibration rows whose labels are pseudo-labels, some of them wrong.

A threshold that is fitted on wrong labels covers those. Where the noise is known, or a few rows with
gold tell it, the share of true labels that a threshold covers can be estimated without seeing them.

What is corrected is noise that depends on the true label only: given that, which pseudo-label a row
gets must say nothing of its soft label. So the pseudo-labels must come from somewhere else than the
soft labels (other people, another model, rules), and noise that hits the hard rows is not undone:
there only the bounds that hold whatever the noise is say something.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from jaxtyping import Int
from scipy.sparse import csr_array

from llmlabel.calibrate.bounds import binomial_upper
from llmlabel.calibrate.channels import (
    Channel,
    Kind,
    coverage_curve,
    estimate_noise,
    inverse_noise,
)
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    data_sha,
    engines_of,
    one_of,
    refuse_trained,
)
from llmlabel.calibrate.quantile import conformal_quantile, exact, fewest_scores, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_cut_sets
from llmlabel.data import gold_index, require_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


@dataclass(frozen=True)
class NoisyConformal:
    """A threshold that is corrected for noise beside one that is not, and what each promises.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        how: Nonconformity score.
        threshold: Corrected.
        coverage: Share of true labels that it covers, as estimated: unbiased if the noise is as said.
        guaranteed: Share that it covers at least, but for a share `delta` of draws of rows.
        plain_threshold: Of split conformal prediction, as if the pseudo-labels were true.
        plain_coverage: Share of true labels that it covers, as estimated.
        plain_guaranteed: Share that it covers at least on average, whatever the noise.
        noise: "uniform" or "matrix".
        wrong: Share of wrong pseudo-labels.
        gold_rows: Rows that the noise was estimated on; 0 where it was given.
        rows: Rows with a pseudo-label, those with gold included.
        delta: See `guaranteed`.
        seed: Of randomised scores.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels (the column `engine`).
        data_sha: Hash of ids, pseudo-labels and soft labels of the rows, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    how: Nonconformity
    threshold: float
    coverage: float
    guaranteed: float
    plain_threshold: float
    plain_coverage: float
    plain_guaranteed: float
    noise: str
    wrong: float
    gold_rows: int
    rows: int
    delta: float
    seed: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def fit_noisy_conformal(  # noqa: PLR0913  # each is one plain choice
    dataset: Dataset,
    labels: LabelSpace,
    *,
    column: str,
    noise: float | list[list[float]] | Kind,
    alpha: float = 0.1,
    score: Score | Nonconformity = "lac",
    aim: Literal["mean", "certain"] = "mean",
    delta: float = 0.1,
    seed: int = 0,
    training: Dataset | None = None,
) -> NoisyConformal:
    """Fits the threshold that leaves out the *true* label of at most a share `alpha` of new rows.

    With V the inverse of the matrix P(pseudo-label | label), the mean over rows of the sum over
    labels k of V[pseudo-label, k] x (score of k <= threshold) is the coverage of true labels, without
    bias: Sesia et al. 2023 (arXiv 2309.05092), in the marginal form of Bortolotti et al.
    2025 (arXiv 2501.18060); for uniform noise Penso et al. 2025 (NACP, arXiv 2501.12749). The
    threshold is the smallest where it reaches ceil((n + 1)(1 - alpha)) / n; without noise that is
    split conformal prediction. Where true labels conform better than others do, noise makes plain
    sets too large; `plain_guaranteed`, 1 - alpha - share of wrong labels, holds for any noise
    (Einbinder et al. 2022, arXiv 2209.14295).

    `guaranteed` with known noise is the estimate minus a slack of order sqrt(log(2 / delta) / 2n), from
    the inequality of Dvoretzky, Kiefer and Wolfowitz. With estimated noise it is the coverage of the
    gold rows minus sqrt(log(1 / delta) / 2m): that supposes nothing about the noise.

    Differs from the papers: the slack has one side only, for only low coverage breaks the promise; and
    it is a factor 1 + 1 / (2 log(2 / delta)) larger where a row counts with several labels.

    Args:
        dataset: Rows with soft labels and pseudo-labels, drawn like the new rows. Rows without a
            pseudo-label are left out: the promise is for rows that get one.
        labels: A single-label space.
        column: Lists of label ids; the first of a row is its pseudo-label. Not the soft label's own.
        noise: Share of wrong pseudo-labels, each other label being as probable; a matrix with a row of
            P(pseudo-label | label) for each label; or which of the two to estimate on the rows that
            have both gold and a pseudo-label, which must be a random part of all.
        alpha: Share of misses allowed.
        score: Nonconformity score, or a `Nonconformity` with its settings.
        aim: "mean" covers 1 - alpha on average; "certain" raises the threshold by the slack, so that
            `guaranteed` is 1 - alpha (known noise only).
        delta: Share of draws of rows in which `guaranteed` may fail; at most 0.5 where the noise is
            estimated (Massart 1990).
        seed: Of randomised scores.
        training: Rows that a model was trained on; rows with the same id and text are refused.

    Raises:
        ValueError: If `alpha` or `delta` is out of range, there are too few rows for them, a row was
            trained on, the pseudo-labels are the soft labels' own, the noise cannot be undone or estimated, or the
            label space is multi-label.
    """
    _check(labels, alpha, delta, noise)
    one_of("aim", aim, Literal["mean", "certain"])
    require_columns(dataset, "id", column)
    refuse_routed(dataset)
    how = with_settings(score)
    given = _first_labels(dataset, column, labels)
    kept = np.flatnonzero(given >= 0)
    dataset, given = dataset.select(kept), given[kept]
    refuse_trained(dataset, training)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    uniforms = row_uniforms(dataset["id"][:], seed=seed)
    rows = len(given)
    count = math.ceil((rows + 1) * (1 - exact(alpha)))
    if count > rows:
        raise ValueError(
            f"alpha={alpha} needs at least {fewest_scores(alpha)} rows with a pseudo-label "
            f"in column {column!r}; there are {rows} (label more rows, or allow a larger alpha)"
        )
    _check_source(probs, given, column)
    gold = np.full(rows, -1)
    if isinstance(noise, str):
        gold = _gold_part(dataset, labels)
        channel = estimate_noise(given[gold >= 0], gold[gold >= 0], labels, noise)
    else:
        channel = noise if isinstance(noise, int | float) else np.array(noise, dtype=np.float64)
    curve = coverage_curve(probs, given, channel, how, uniforms, delta)
    target = count / rows
    if aim == "certain":
        target = float(1 - exact(alpha)) + _certain_slack(curve.slack, rows, alpha, gold)
    if (threshold := curve.first(target)) is None:
        raise ValueError(
            f"alpha={alpha} is unreachable: an estimated {curve.coverage.max(initial=0.0):.3f} of true "
            f"labels are among the labels stored, and {target:.3f} are needed; store more labels a row, "
            "or allow a larger alpha"
        )
    plain = conformal_quantile(true_scores(probs, given, how, uniforms), alpha)
    wrong, most_wrong = _wrong_share(channel, given, gold, delta)
    known = gold >= 0
    if known.any():
        covered = true_scores(probs, gold, how, uniforms)[known] <= threshold
        guaranteed = float(covered.mean()) - math.sqrt(math.log(1 / delta) / (2 * known.sum()))
    else:
        guaranteed = curve.at(threshold) - curve.slack
    return NoisyConformal(
        alpha=alpha,
        how=how,
        threshold=threshold,
        coverage=curve.at(threshold),
        guaranteed=max(guaranteed, 0.0),
        plain_threshold=plain,
        plain_coverage=curve.at(plain),
        plain_guaranteed=max(1 - alpha - most_wrong, 0.0),
        noise="matrix" if isinstance(channel, np.ndarray) else "uniform",
        wrong=wrong,
        gold_rows=int(known.sum()),
        rows=rows,
        delta=delta,
        seed=seed,
        label_space=labels.fingerprint,
        engines=engines_of(dataset),
        data_sha=data_sha(dataset["id"][:], given, probs),
    )


def predict_noisy_sets(
    dataset: Dataset,
    labels: LabelSpace,
    fitted: NoisyConformal,
    *,
    threshold: Literal["corrected", "plain"] = "corrected",
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most the threshold, most probable first.

    Args:
        dataset: New rows.
        labels: The label space of the thresholds.
        fitted: What `fit_noisy_conformal` gave.
        threshold: Which of the two.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If it was fitted in another label space or on another model's soft labels.
    """
    one_of("threshold", threshold, Literal["corrected", "plain"])
    check_space(labels, fitted.label_space)
    check_engines(dataset, fitted.engines, other_engine)
    require_columns(dataset, "id")
    limit = fitted.threshold if threshold == "corrected" else fitted.plain_threshold
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return with_cut_sets(dataset, probs, np.array([[limit]]), fitted.how, seed=fitted.seed)


def _certain_slack(slack: float, rows: int, alpha: float, gold: Int[np.ndarray, " rows"]) -> float:
    if (gold >= 0).any():
        raise ValueError(
            "aim='certain' needs known noise; where it is estimated only the gold rows are certain, so "
            "fit llmlabel.calibrate.pac.fit_pac on these"
        )
    if slack > alpha:
        raise ValueError(
            f"cannot certify: alpha={alpha} with this noise needs n >= "
            f"{math.ceil(rows * (slack / alpha) ** 2)} rows with a pseudo-label; there are {rows} (label "
            "more rows, or allow a larger alpha or delta)"
        )
    return slack


def _wrong_share(
    channel: Channel, given: Int[np.ndarray, " rows"], gold: Int[np.ndarray, " rows"], delta: float
) -> tuple[float, float]:
    """The share of wrong pseudo-labels, and an upper bound of it."""
    if (known := gold >= 0).any():
        errors = int((given[known] != gold[known]).sum())
        return errors / int(known.sum()), binomial_upper(errors, int(known.sum()), delta=delta)
    if isinstance(channel, np.ndarray):
        shares = np.bincount(given, minlength=len(channel)) / len(given)
        wrong = float(np.clip(1 - shares @ inverse_noise(channel) @ np.diag(channel), 0, 1))
        return wrong, float(1 - np.diag(channel).min())  # whatever label is frequent
    return channel, channel


def _first_labels(dataset: Dataset, column: str, labels: LabelSpace) -> Int[np.ndarray, " rows"]:
    """The first label id of each row, -1 where there is none."""
    values = arrow_table(dataset.select_columns([column]))[column]
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        raise ValueError(f"column {column!r} holds {values.type}; pseudo-labels are lists of ids")
    firsts = [ids[0] if ids else -1 for ids in values.cast(pa.list_(pa.int64())).to_pylist()]
    first = np.array(firsts, dtype=np.int64)
    if (outside := np.flatnonzero((first < -1) | (first >= len(labels)))).size:
        row = int(outside[0])
        raise ValueError(
            f"row with id {dataset[row]['id']!r} has the pseudo-label {first[row]} in column "
            f"{column!r}; the label space has ids 0 to {len(labels) - 1}"
        )
    return first


def _gold_part(dataset: Dataset, labels: LabelSpace) -> Int[np.ndarray, " rows"]:
    """The gold label of each row, -1 where nobody knows it."""
    gold = gold_index(dataset, labels)
    known = arrow_table(dataset.select_columns(["gold"]))["gold"].is_valid().to_numpy()
    if none := int((known & (gold < 0)).sum()):
        raise ValueError(
            f"{none} of {known.sum()} gold rows have none of the labels: such rows get wrong "
            "pseudo-labels that no noise of the labels explains; add a label for them, such as 'other'"
        )
    return gold


def _check_source(probs: csr_array, given: Int[np.ndarray, " rows"], column: str) -> None:
    own = probs[np.arange(len(given)), given]
    if (own >= probs.max(axis=1).toarray()).all():
        raise ValueError(
            f"every pseudo-label of column {column!r} is the most probable label of its row's soft "
            "label: they say nothing about it. Take pseudo-labels from another model or from people"
        )


def _check(
    labels: LabelSpace, alpha: float, delta: float, noise: float | list[list[float]] | Kind
) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {value}")
    if isinstance(noise, str):
        one_of("noise", noise, Kind)
        if delta > 0.5:
            raise ValueError(
                f"delta must be at most 0.5 where the noise is estimated; got {delta} (the inequality "
                "of one side, Massart 1990, holds up to there)"
            )
    if labels.multilabel:
        raise ValueError(
            "noisy rows need a label space of one label a row; this one is multi-label"
        )
