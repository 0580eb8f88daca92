"""Thresholds of their own for labels, clusters of labels, and groups of rows.

One threshold for all keeps its promise on average, and breaks it for rare labels. Here a label with
enough gold rows has its own; one without goes down a chain that the caller names, and the result
says of each label what gave its threshold and whether anything is promised for it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Shaped

from llmlabel.calibrate.clusters import (
    GroupOfRow,
    Scores,
    cluster_labels,
    counts_of,
    group_values,
    grouped_quantiles,
    interpolated,
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
from llmlabel.calibrate.quantile import conformal_quantile, fewest_scores, row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_cut_sets
from llmlabel.data import gold_index, require_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import closure
from llmlabel.softlabels import SoftLabels

By = Literal["class", "cluster"]
Fallback = Literal["cluster", "parent", "marginal"]

Found = tuple[Float[np.ndarray, " labels"], Shaped[np.ndarray, " labels"]]
"""The threshold of each label, NaN where a level gives none, and the name of what gave it."""

_FEWEST_EMBEDDED = 4
"""Scores of a label that tell two clusters apart, by the rule of Ding et al. 2023."""


@dataclass(frozen=True)
class Threshold:
    """The threshold of a label or group, and where it comes from.

    Attributes:
        group: Id of the label, or value of the column.
        value: Infinite where the label is in every set.
        rows: Gold rows of its own.
        level: What gave it: "class" or "group" (its own rows), "cluster", "parent", "marginal", or
            "all" where nothing did, so that it is infinite.
        source: Number of the cluster or id of the parent; else "".
        guaranteed: Whether the promise holds within the label or group, not only on average.
    """

    group: str
    value: float
    rows: int
    level: str
    source: str
    guaranteed: bool


@dataclass(frozen=True)
class GroupConformal:
    """Fitted thresholds of labels or groups.

    Attributes:
        alpha: Share of rows whose set may miss the true label.
        how: Nonconformity score.
        column: Column whose values are the groups; null where the labels are.
        thresholds: Of the labels in their order, or of the values of the column, ascending.
        marginal: Threshold that all gold rows give together.
        otherwise: Threshold of a group without gold rows, and of rows of no group.
        tau: Weight of the labels' thresholds against `marginal`, where they are interpolated.
        seed: Seed of the uniform numbers of randomised scores, and of clusters.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows (the column `engine`).
        data_sha: Hash of ids, gold and soft labels of the gold rows, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    how: Nonconformity
    column: str | None
    thresholds: tuple[Threshold, ...]
    marginal: float
    otherwise: float
    tau: float | None
    seed: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""

    @property
    def without_guarantee(self) -> tuple[str, ...]:
        """The labels or groups for which nothing is promised."""
        return tuple(one.group for one in self.thresholds if not one.guaranteed)


@dataclass(frozen=True)
class _Gold:
    """The calibration rows as arrays, their quantile, and the fewest scores that have one."""

    how: Nonconformity
    ids: list[str]
    scores: Scores
    index: GroupOfRow
    labels: LabelSpace
    alpha: float
    marginal: float
    needed: int
    data_sha: str
    engines: tuple[str, ...]


def fit_class_conformal(  # noqa: PLR0913  # four independent choices beside the usual ones
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    score: Score | Nonconformity = "lac",
    by: By = "class",
    fallback: tuple[Fallback, ...] | None = None,
    tau: float | None = None,
    clusters: int | None = None,
    seed: int = 0,
    training: Dataset | None = None,
) -> GroupConformal:
    """Fits a threshold for each label, so that each is missed in at most `alpha` of its own rows.

    "class" is Mondrian conformal prediction (Vovk et al. 2005): the quantile of the scores of a
    label's gold rows, ceil(1 / alpha) - 1 of them at least. "cluster" is clustered conformal
    prediction (Ding et al. 2023, arXiv 2306.09335): labels whose scores are alike share a threshold,
    and the promise holds on average over them; see `cluster_labels`. A label with too few rows goes
    down `fallback`: "cluster", the labels whose scores are most like its few; "parent", the nearest
    label above with enough rows at or below it; "marginal", all rows. Nothing is promised for such a
    label, and over all rows up to 2 alpha may be missed where "marginal" is the only fallback.

    `tau` is Interp-Q (Ding et al. 2025, arXiv 2507.06867): tau x threshold of the label + (1 - tau) x
    threshold of all rows. At most 2 alpha of all rows are missed.

    Differs from the papers: the threshold of all rows is that of all gold rows, also of those that
    found the clusters; a cluster with too few rows goes on down the chain. In Interp-Q a label with
    too few rows counts as the largest finite score of a gold row, where the paper has 1.

    Args:
        dataset: The gold rows, each with exactly one gold label or none of these.
        labels: A single-label space.
        alpha: Share of misses allowed.
        score: Nonconformity score, or a `Nonconformity` with its settings.
        by: What has a threshold of its own.
        fallback: Tried in this order; after the last, or with (), a label with too few rows is in
            every set. Default: "cluster", "parent", "marginal"; with `tau` none, as in the paper.
        tau: From 0, one threshold for all, to 1; the paper finds 0.9 to 0.999 useful.
        clusters: How many; by default the paper's rule, which finds none where rows are few.
        seed: Of randomised scores and of clusters.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If a choice is out of range, too few rows (with a stored true label) carry
            `alpha`, a row has several gold labels or was trained on, or the label space is multi-label.
    """
    chain = _chain(by, fallback, tau)
    if clusters is not None and clusters < 2:
        raise ValueError(f"clusters must be at least 2; got {clusters} (or leave it out)")
    gold = _read(dataset, labels, alpha=alpha, score=score, seed=seed, training=training)
    counts = counts_of(gold.index, len(labels))
    thresholds = np.full(len(labels), np.nan)  # of labels that still ask
    levels, sources = np.full((2, len(labels)), "", dtype=object)
    for level in chain:
        asking = np.isnan(thresholds)
        names = np.full(len(labels), "", dtype=object)
        if level == "class":
            found = grouped_quantiles(gold.scores, gold.index, groups=len(labels), alpha=alpha)
            found[counts < gold.needed] = np.nan
        elif level == "cluster":
            fewest = gold.needed if by == "cluster" else _FEWEST_EMBEDDED
            found, names = _cluster_thresholds(gold, clusters=clusters, fewest=fewest, seed=seed)
        elif level == "parent":
            found, names = _parent_thresholds(gold, asking)
        else:
            found = np.full(len(labels), gold.marginal)
        settled = asking & ~np.isnan(found)
        thresholds[settled], sources[settled] = found[settled], names[settled]
        levels[settled] = level
    levels[np.isnan(thresholds)] = "all"
    thresholds[np.isnan(thresholds)] = np.inf
    if tau is not None:
        thresholds = interpolated(thresholds, gold.marginal, tau=tau, scores=gold.scores)
    kept = np.isin(levels, ("class", "all")) & (tau is None)
    table = _table(labels.ids, thresholds, counts, levels, sources, kept)
    return GroupConformal(
        *(alpha, gold.how, None, table, gold.marginal, gold.marginal, tau, seed),
        *(labels.fingerprint, gold.engines, gold.data_sha),
    )


def fit_group_conformal(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    column: str,
    alpha: float = 0.1,
    score: Score | Nonconformity = "lac",
    fallback: Literal["marginal", "all"] = "marginal",
    seed: int = 0,
    training: Dataset | None = None,
) -> GroupConformal:
    """Fits a threshold for each group of rows, so that at most `alpha` of each group is missed.

    Mondrian conformal prediction (Vovk et al. 2005) by what is known of every new row: a source, a
    language, a cluster of texts.

    Args:
        dataset: The gold rows.
        labels: A single-label space.
        column: Strings, whole numbers or truth values; a row with null is in no group.
        alpha: Share of misses allowed.
        score: Nonconformity score.
        fallback: Of groups with fewer than ceil(1 / alpha) - 1 gold rows, new ones and rows of no
            group: the threshold of all rows, which promises nothing for the group, or every label.
        seed: Of randomised scores.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.
    """
    one_of("fallback", fallback, Literal["marginal", "all"])
    gold = _read(dataset, labels, alpha=alpha, score=score, seed=seed, training=training)
    values = group_values(with_gold(dataset), column)
    groups = sorted({value for value in values if value is not None})
    places = {group: place for place, group in enumerate(groups)}
    group_of = np.array([-1 if value is None else places[value] for value in values], np.int64)
    counts = counts_of(group_of, len(groups))
    own = counts >= gold.needed
    otherwise = gold.marginal if fallback == "marginal" else math.inf
    found = grouped_quantiles(gold.scores, group_of, groups=len(groups), alpha=alpha)
    found, levels = np.where(own, found, otherwise), np.where(own, "group", fallback)
    kept = own | (levels == "all")
    table = _table(groups, found, counts, levels, np.full(len(groups), ""), kept)
    return GroupConformal(
        *(alpha, gold.how, column, table, gold.marginal, otherwise, None, seed),
        *(labels.fingerprint, gold.engines, gold.data_sha),
    )


def predict_group_sets(
    dataset: Dataset,
    labels: LabelSpace,
    fitted: GroupConformal,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most their threshold, most probable first.

    Args:
        dataset: New rows.
        labels: The label space of the thresholds.
        fitted: Of labels or of groups.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the label space or model is another one, or the column of groups is missing.
    """
    check_space(labels, fitted.label_space, what="thresholds")
    check_engines(dataset, fitted.engines, other_engine)
    require_columns(dataset, "id")
    if fitted.column is None:
        limits = np.array([one.value for one in fitted.thresholds])[None, :]
    else:
        known: dict[str | None, float] = {one.group: one.value for one in fitted.thresholds}
        values = group_values(dataset, fitted.column)
        own = [known.get(value, fitted.otherwise) for value in values]  # None is no group
        limits = np.array(own, dtype=np.float64)[:, None]
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return with_cut_sets(dataset, probs, limits, fitted.how, seed=fitted.seed)


def group_report(fitted: GroupConformal) -> Dataset:
    """The thresholds as rows; columns as in `Threshold`."""
    return Dataset.from_list([asdict(one) for one in fitted.thresholds])


def _cluster_thresholds(gold: _Gold, *, clusters: int | None, fewest: int, seed: int) -> Found:
    # Other numbers than those of randomised scores: whether a row is drawn must not tell its score.
    uniforms = row_uniforms((f"cluster/{row}" for row in gold.ids), seed=seed)
    cluster, rest = cluster_labels(
        gold.scores,
        gold.index,
        uniforms,
        labels=len(gold.labels),
        alpha=gold.alpha,
        fewest=fewest,
        clusters=clusters,
        seed=seed,
    )
    many = int(cluster.max()) + 1
    group = np.where(rest & (gold.index >= 0), cluster[gold.index], -1)
    found = grouped_quantiles(gold.scores, group, groups=many, alpha=gold.alpha)
    found[counts_of(group, many) < gold.needed] = np.nan
    names = np.array([*map(str, range(many)), ""], dtype=object)
    return np.append(found, np.nan)[cluster], names[cluster]  # the last one is that of -1


def _parent_thresholds(gold: _Gold, asking: Bool[np.ndarray, " labels"]) -> Found:
    found, names = np.full(len(gold.labels), np.nan), np.full(len(gold.labels), "", object)
    known = np.flatnonzero(gold.index >= 0)
    above = closure(gold.labels)[gold.index[known]].tocsc()  # what is at or above each row's gold
    ready = np.diff(above.indptr) >= gold.needed
    for label in np.flatnonzero(asking).tolist():
        if (parent := _nearest(gold.labels, label, ready)) is not None:
            rows = known[above.indices[above.indptr[parent] : above.indptr[parent + 1]]]
            found[label] = conformal_quantile(gold.scores[rows], gold.alpha)
            names[label] = gold.labels.ids[parent]
    return found, names


def _nearest(labels: LabelSpace, label: int, ready: Bool[np.ndarray, " labels"]) -> int | None:
    """The fewest edges up to what is ready; of several the first, in the order of parents."""
    level = labels.parent_positions[label]
    while level:
        if found := [parent for parent in level if ready[parent]]:
            return found[0]
        level = tuple(dict.fromkeys(p for child in level for p in labels.parent_positions[child]))
    return None


def _chain(by: By, fallback: tuple[Fallback, ...] | None, tau: float | None) -> tuple[str, ...]:
    """What is asked for a threshold, one after the other."""
    if tau is not None and not 0 <= tau <= 1:
        raise ValueError(f"tau must lie between 0 (one threshold) and 1 (one a label); got {tau}")
    if fallback is None:
        fallback = get_args(Fallback) if tau is None else ()
    known = ("class", *get_args(Fallback))
    if wrong := [level for level in (by, *fallback) if level not in known]:
        raise ValueError(f"a level must be one of {', '.join(known)}; got {wrong[0]!r}")
    return by, *(level for level in fallback if level != by)


def _table(groups: Sequence[str], *columns: Shaped[np.ndarray, "..."]) -> tuple[Threshold, ...]:
    rows = zip(groups, *(values.tolist() for values in columns), strict=True)
    return tuple(Threshold(*row) for row in rows)


def _read(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float,
    score: Score | Nonconformity,
    seed: int,
    training: Dataset | None,
) -> _Gold:
    """The rows whose gold is known."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if labels.multilabel:
        raise ValueError(
            "these thresholds need a label space of one label a row; this one is multi-label (see "
            "llmlabel.calibrate.risk for those)"
        )
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    if len(dataset) < (needed := fewest_scores(alpha)):
        raise ValueError(
            f"alpha={alpha} needs at least {needed} gold rows; there are {len(dataset)} (label more "
            "rows, or allow a larger alpha)"
        )
    how = with_settings(score)
    ids, index = dataset["id"][:], gold_index(dataset, labels)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    scores = true_scores(probs, index, how, row_uniforms(ids, seed=seed))
    if math.isinf(marginal := conformal_quantile(scores, alpha)):
        raise ValueError(
            f"alpha={alpha} is unreachable: only {np.isfinite(scores).sum()} of {len(scores)} gold "
            "rows have their true label among the labels stored; store more labels a row, or allow "
            "a larger alpha"
        )
    return _Gold(
        *(how, ids, scores, index, labels, alpha, marginal, needed),
        *(data_sha(ids, index, probs), engines_of(dataset)),
    )
