"""Sets over a stream of rows whose gold comes later: adaptive conformal inference.

Where the texts or their labels drift, no threshold of old rows keeps its promise. Here the level that
the next set is cut at follows the errors so far, and in the long run a share alpha of the sets misses
the true label, whatever the stream is, even one that an adversary writes. What is promised is that
share over the whole stream, not the coverage of the next row.
"""

import bisect
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    data_sha,
    engines_of,
    refuse_trained,
)
from llmlabel.calibrate.quantile import exact, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_cut_sets
from llmlabel.data import gold_index, require_columns, with_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


@dataclass(frozen=True)
class Online:
    """Where a stream stands; `update_online` gives the next one.

    Attributes:
        alpha: Share of sets that may miss the true label in the long run.
        gamma: Step of the level after each answer.
        level: What the next set is cut at, in place of alpha; at 0 or less a set holds every label,
            from 1 on none.
        scores: Of the true labels that came last, in the order they came.
        window: How many of them count; null where all do.
        answers: Answers that moved the level.
        missed: How many of these were not in their set.
        how: Nonconformity score.
        seed: Seed of the uniform numbers of randomised scores.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the first gold rows (the column `engine`).
        data_sha: Hash of ids, gold and soft labels of these, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    gamma: float
    level: float
    scores: tuple[float, ...]
    window: int | None
    answers: int
    missed: int
    how: Nonconformity
    seed: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""

    def bound(self, *, delay: int = 0) -> float:
        """How far the share of misses so far can be from alpha, at most, whatever the stream is.

        Args:
            delay: How many other sets were made, at most, between a set and its answer.
        """
        return online_bound(self.alpha, gamma=self.gamma, answers=self.answers, delay=delay)


def online_bound(alpha: float, *, gamma: float, answers: int, delay: int = 0) -> float:
    """(max(alpha, 1 - alpha) + (1 + delay) gamma) / (answers x gamma).

    Gibbs and Candes 2021 (arXiv 2106.00170), proposition 4.1, for a level that starts at alpha. With a
    delay the level may take so many more steps past 0 or 1 before its own answers turn it.
    """
    if not answers:
        return math.inf
    return (max(alpha, 1 - alpha) + (1 + delay) * gamma) / (answers * gamma)


def start_online(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    gamma: float = 0.005,
    score: Score | Nonconformity = "lac",
    window: int | None = None,
    seed: int = 0,
    training: Dataset | None = None,
) -> Online:
    """The start of a stream: the scores of gold rows, and the level at alpha.

    Args:
        dataset: Gold rows, oldest first; with fewer than 1 / alpha - 1 the first sets hold every
            label. Rows without a gold label are left out.
        labels: A single-label space.
        alpha: Share of sets that may miss the true label in the long run.
        gamma: Step of the level; larger follows a drift faster, and makes sets vary more. The paper
            has 0.005.
        score: Nonconformity score, or a `Nonconformity` with its settings.
        window: How many true labels, the last ones, give the scores; null for all.
        seed: Of randomised scores.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If a choice is out of range, a row has several gold labels or was trained on, or
            the label space is multi-label.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0, and finite; got {gamma}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the number of scores; got {window}")
    if labels.multilabel:
        raise ValueError(
            "online sets need a label space of one label a row; this one is multi-label"
        )
    refuse_routed(dataset)
    how = with_settings(score)
    start = Online(alpha, gamma, alpha, (), window, 0, 0, how, seed, labels.fingerprint)
    dataset = with_gold(dataset)
    refuse_trained(dataset, training)
    scores, gold = _true_scores(dataset, labels, start)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return replace(
        start,
        scores=_last(scores[gold >= 0].tolist(), window),
        engines=engines_of(dataset),
        data_sha=data_sha(dataset["id"][:], gold, probs),
    )


def predict_online_sets(
    dataset: Dataset,
    labels: LabelSpace,
    state: Online,
    *,
    delay: int = 0,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, most probable label first, and `online_alpha`, the level each was cut at.

    Adaptive conformal inference, Gibbs and Candes 2021 (arXiv 2106.00170), equation 2. Rows are read
    in their order. A row's gold is looked at after the sets of the `delay` rows behind it were made;
    then its score is one more to cut sets by, and the level moves by gamma x (alpha - miss). A row
    whose gold nobody knows, or is none of the labels (no set can hold that), gets a set and moves
    nothing; so where no gold is there, all sets are cut at the level of `state`.

    Differs from the paper: scores are not weighed by age, and the model is not fitted again.

    Args:
        dataset: The rows of the stream, oldest first.
        labels: Their label space.
        state: From `start_online` or `update_online`.
        delay: How many sets are made between a row's set and its answer.
        other_engine: "allow" takes soft labels of another model. That is a drift like others: the
            promise in the long run stays, the next sets may be poor.

    Raises:
        ValueError: If the state is of another label space or model, or `delay` is negative.
    """
    if delay < 0:
        raise ValueError(f"delay must be 0 or more, a number of rows; got {delay}")
    _check_space(state, labels)
    check_engines(dataset, state.engines, other_engine)
    require_columns(dataset, "id")
    probs = SoftLabels.from_dataset(dataset, labels).probs
    if "gold" in dataset.column_names:
        scores, gold = _true_scores(dataset, labels, state)
    else:
        scores, gold = np.full((2, len(dataset)), -1.0)
    levels, thresholds = online_levels(
        np.where(gold >= 0, scores, np.nan),
        np.array(state.scores),
        alpha=state.alpha,
        gamma=state.gamma,
        level=state.level,
        window=state.window,
        delay=delay,
    )
    found = with_cut_sets(dataset, probs, thresholds[:, None], state.how, seed=state.seed)
    return with_columns(found, {"online_alpha": (levels, Value("float64"))})


def update_online(
    dataset: Dataset, labels: LabelSpace, state: Online, *, other_engine: OtherEngine = "refuse"
) -> Online:
    """The state after the answers to these rows, each given once, in the order they came.

    A stream may so be cut into parts anywhere: predict, wait for answers, update, predict the next.
    Parts give the same sets as the whole, if in the whole no answer came later than in the parts.

    Args:
        dataset: Rows that `predict_online_sets` made the sets of, with answers in `gold`; rows without
            one, and rows of none of the labels, change nothing.
        labels: Their label space.
        state: The state before.
        other_engine: As in `predict_online_sets`.

    Raises:
        ValueError: If the state is of another label space or model, or `set_ids` or `gold` is missing.
    """
    _check_space(state, labels)
    check_engines(dataset, state.engines, other_engine)
    require_columns(dataset, "set_ids", "gold")
    scores, gold = _true_scores(dataset, labels, state)
    known = np.flatnonzero(gold >= 0)
    level, missed = state.level, 0
    sets = dataset.select(known)["set_ids"][:]
    for true, chosen in zip(gold[known].tolist(), sets, strict=True):
        miss = true not in chosen
        level += state.gamma * (state.alpha - miss)
        missed += miss
    return replace(
        state,
        level=level,
        scores=_last([*state.scores, *scores[known].tolist()], state.window),
        answers=state.answers + len(known),
        missed=state.missed + missed,
    )


def online_levels(  # the start of a stream is four numbers
    scores: Float[np.ndarray, " rows"],
    start: Float[np.ndarray, " past"],
    *,
    alpha: float,
    gamma: float,
    level: float,
    window: int | None = None,
    delay: int = 0,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """The level and the threshold of each row, before its own score was looked at.

    Args:
        scores: Of the true labels; NaN where nobody knows it.
        start: Scores of earlier rows, oldest first.
        alpha: Share of misses in the long run.
        gamma: Step of the level.
        level: Of the first row.
        window: How many of the last scores count.
        delay: How many rows a score comes late.
    """
    recent = deque(_last(start.tolist(), window))
    ordered = sorted(recent)
    levels, thresholds = np.empty(len(scores)), np.empty(len(scores))
    for row in range(len(scores)):
        answered = row - 1 - delay
        if answered >= 0 and not math.isnan(score := float(scores[answered])):
            level += gamma * (alpha - (score > thresholds[answered]))
            recent.append(score)
            bisect.insort(ordered, score)
            if window is not None and len(recent) > window:
                del ordered[bisect.bisect_left(ordered, recent.popleft())]
        levels[row], thresholds[row] = level, _threshold(ordered, level)
    return levels, thresholds


def _threshold(ordered: list[float], level: float) -> float:
    """The conformal quantile of sorted scores at a level that may be any number."""
    if level <= 0:
        return math.inf
    if level >= 1:
        return -math.inf
    k = math.ceil((len(ordered) + 1) * (1 - exact(level)))
    return ordered[k - 1] if k <= len(ordered) else math.inf


def _true_scores(
    dataset: Dataset, labels: LabelSpace, state: Online
) -> tuple[Float[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """The scores of the gold labels, and these; -1 for a row without one."""
    require_columns(dataset, "id", "gold")
    gold = gold_index(dataset, labels)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return true_scores(
        probs, gold, state.how, row_uniforms(dataset["id"][:], seed=state.seed)
    ), gold


def _last(scores: list[float], window: int | None) -> tuple[float, ...]:
    return tuple(scores if window is None else scores[-window:])


def _check_space(state: Online, labels: LabelSpace) -> None:
    if state.label_space != labels.fingerprint:
        raise ValueError(
            f"the stream is of label space {state.label_space}, but the label space given is "
            f"{labels.fingerprint}; start another one with gold rows of this one"
        )
