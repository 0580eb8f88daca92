"""Sets that keep their promise with a stated confidence: PAC thresholds, and PAC sets over trees.

A conformal threshold covers on average over calibration sets; a PAC threshold errs on at most a share
epsilon of new rows with probability 1 - delta over the calibration set at hand. Over a tree of
decisions (a path in a taxonomy, the fields of an extraction, a program) the set is the tree with some
subtrees cut off, the holes: all answers that agree with what is kept.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int

from llmlabel.calibrate.cuts import BUDGETS, Tree, check_family, kept_nodes
from llmlabel.calibrate.provenance import (
    OtherEngine,
    check_engines,
    check_space,
    fitted_on,
    refuse_trained,
)
from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.scores import Nonconformity, Score, true_scores
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.tuning import with_settings
from llmlabel.calibrate.written import with_cut_sets
from llmlabel.data import gold_index, require_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


@dataclass(frozen=True)
class Pac:
    """A fitted PAC threshold; `predict_pac` keeps the labels whose score is at most this.

    Attributes:
        epsilon: Share of new rows whose set may miss the true label,
        delta: and the probability that it is more.
        how: Nonconformity score.
        threshold: The largest score inside.
        errors: Gold rows that the threshold leaves out at most.
        rows: Number of gold rows.
        seed: Seed of the uniform numbers of randomised scores.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    epsilon: float
    delta: float
    how: Nonconformity
    threshold: float
    errors: int
    rows: int
    seed: int
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


@dataclass(frozen=True)
class PacTree:
    """A fitted budget; `predict_tree` keeps as many nodes of a tree as it allows.

    Attributes:
        epsilon: Share of new trees that may keep a wrong node,
        delta: and the probability that it is more.
        holes: Subtrees that may be cut off.
        budgets: The family of sets, from tight to loose.
        anchor: Place of the budget that `kept_nodes` starts from.
        level: Place of the chosen budget; -1 where only the empty tree is certified.
        errors: Gold trees in which the chosen budget keeps a wrong node.
        rows: Number of gold trees.
    """

    epsilon: float
    delta: float
    holes: int
    budgets: tuple[float, ...]
    anchor: int
    level: int
    errors: int
    rows: int


# ------------------------------------------------------------------------------------ thresholds


def allowed_errors(rows: int, *, epsilon: float, delta: float) -> int:
    """The most errors k among `rows` that certify: P[Binomial(rows, epsilon) <= k] <= delta.

    Park et al. 2020 (arXiv 2001.00106), theorem 1; Khakhar et al. (arXiv 2302.08703), section 3.

    Raises:
        ValueError: If not even no error certifies.
    """
    from scipy.special import bdtr

    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {value}")
    errors = int((bdtr(np.arange(rows, dtype=np.float64), rows, epsilon) <= delta).sum()) - 1
    if errors < 0:
        needed = math.ceil(math.log(delta) / math.log1p(-epsilon))
        raise ValueError(
            f"cannot certify: epsilon={epsilon} and delta={delta} need n >= {needed} gold rows; there "
            f"are {rows} (label more rows, or allow a larger epsilon or delta)"
        )
    return errors


def pac_threshold(scores: Float[np.ndarray, " rows"], *, epsilon: float, delta: float) -> float:
    """The smallest threshold that at most `allowed_errors` of the scores exceed."""
    errors = allowed_errors(len(scores), epsilon=epsilon, delta=delta)
    place = len(scores) - errors - 1
    return float(np.partition(scores, place)[place])


def fit_pac(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    epsilon: float = 0.1,
    delta: float = 0.05,
    score: Score | Nonconformity = "lac",
    seed: int = 0,
    training: Dataset | None = None,
) -> Pac:
    """Fits a threshold that misses more than a share `epsilon` of new rows with probability `delta`.

    Holds for independent rows from one distribution, gold and new, none of them used to make the
    soft labels. A row whose gold is none of the labels, or not stored, is missed by every threshold
    below infinity.

    Args:
        dataset: The gold rows, each with one gold label or none of these; null rows are left out.
        labels: A single-label space.
        epsilon: Share of misses allowed.
        delta: Probability that there are more.
        score: The nonconformity score.
        seed: Of the uniform numbers of randomised scores.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If a setting is out of range, there are too few rows to certify it, too few
            true labels are stored, or gold rows were trained on.
    """
    _check_single(labels)
    how = with_settings(score)
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    refuse_routed(dataset)
    refuse_trained(dataset, training)
    errors = allowed_errors(len(dataset), epsilon=epsilon, delta=delta)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    uniforms = row_uniforms(dataset["id"][:], seed=seed)
    gold = gold_index(dataset, labels)
    scores = true_scores(probs, gold, how, uniforms)
    threshold = pac_threshold(scores, epsilon=epsilon, delta=delta)
    if threshold == math.inf:
        raise ValueError(not_stored(f"epsilon={epsilon}", np.isfinite(scores), gold))
    return Pac(
        *(epsilon, delta, how, threshold, errors, len(scores), seed, labels.fingerprint),
        *fitted_on(dataset, labels, probs),
    )


def not_stored(
    target: str, stored: Bool[np.ndarray, " rows"], gold: Int[np.ndarray, " rows"]
) -> str:
    """Why no finite threshold reaches a target, where so many true labels are not stored."""
    n, none, found = len(gold), int((gold < 0).sum()), int(stored.sum())
    return (
        f"{target} is unreachable: only {found} of {n} gold rows have their true label among the "
        f"labels stored (shortlist recall {found / max(n - none, 1):.2f}, {none} rows with none of "
        f"the labels); store more labels a row, or allow a larger {target.split('=')[0]}"
    )


def predict_pac(
    dataset: Dataset, labels: LabelSpace, pac: Pac, *, other_engine: OtherEngine = "refuse"
) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most the threshold, most probable first.

    Args:
        dataset: New rows.
        labels: The label space of the threshold.
        pac: What `fit_pac` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the threshold was fitted in another label space or on another model's labels.
    """
    _check_single(labels)
    require_columns(dataset, "id")
    check_space(labels, pac.label_space)
    check_engines(dataset, pac.engines, other_engine)
    probs = SoftLabels.from_dataset(dataset, labels).probs
    return with_cut_sets(dataset, probs, np.array([[pac.threshold]]), pac.how, seed=pac.seed)


# ------------------------------------------------------------------------------------------ trees


def fit_pac_tree(
    trees: Sequence[Tree],
    gold: Sequence[Collection[str]],
    *,
    epsilon: float = 0.1,
    delta: float = 0.05,
    holes: int = 1,
    budgets: Sequence[float] = BUDGETS,
    anchor: int | None = None,
) -> PacTree:
    """Fits the loosest budget under which at most a share `epsilon` of new trees keep a wrong node.

    The share is larger with probability at most `delta` (Khakhar et al., arXiv 2302.08703,
    theorem 1), for trees that are independent and of one distribution. A looser budget keeps more,
    so it errs wherever a tighter one does.

    Args:
        trees: The most likely answers.
        gold: Contents of the true answers, such as `json_tree(text).contents`.
        epsilon: Share of errors allowed.
        delta: Probability that there are more.
        holes: See `kept_nodes`.
        budgets: See `kept_nodes`.
        anchor: See `kept_nodes`.

    Raises:
        ValueError: If a setting is out of range, there are too few trees to certify it, or nodes
            have no contents.
    """
    anchor = check_family(holes, budgets, anchor)
    if len(trees) != len(gold):
        raise ValueError(f"{len(trees)} trees do not fit {len(gold)} gold answers")
    allowed_errors(len(trees), epsilon=epsilon, delta=delta)
    right = []  # how many of the budgets, from the tightest on, keep nothing wrong
    for tree, true in zip(trees, gold, strict=True):
        if len(tree.contents) != len(tree.parents):
            raise ValueError(
                f"a tree of {len(tree.parents)} nodes has {len(tree.contents)} contents; each node "
                "needs one, to be compared with the true answer"
            )
        true = set(true)
        wrong = np.array([content not in true for content in tree.contents], dtype=bool)
        kept = kept_nodes(tree, holes=holes, budgets=budgets, anchor=anchor)
        right.append(int((~(kept & wrong).any(axis=1)).sum()))
    scores = -np.array(right, dtype=np.float64)
    level = -int(pac_threshold(scores, epsilon=epsilon, delta=delta)) - 1
    errors = sum(count <= level for count in right)
    return PacTree(
        epsilon, delta, holes, tuple(map(float, budgets)), anchor, level, errors, len(trees)
    )


def predict_tree(tree: Tree, fitted: PacTree) -> Bool[np.ndarray, " nodes"]:
    """Which nodes of a tree to keep."""
    if fitted.level < 0:
        return np.zeros(len(tree.parents), dtype=bool)
    # Of the family only what leads from the anchor to the chosen budget.
    low, high = sorted((fitted.level, fitted.anchor))
    budgets = fitted.budgets[low : high + 1]
    kept = kept_nodes(tree, holes=fitted.holes, budgets=budgets, anchor=fitted.anchor - low)
    return kept[fitted.level - low]


def _check_single(labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "fit_pac needs a label space of one label a row; this one is multi-label (bound its "
            "risk with llmlabel.calibrate.risk, or load it with multilabel=false)"
        )
