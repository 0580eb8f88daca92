"""A threshold of its own for every label of a multi-label space, so that rare ones are not missed."""

import math
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from llmlabel.calibrate.bounds import rows_needed
from llmlabel.calibrate.provenance import OtherEngine, check_engines
from llmlabel.calibrate.quantile import exact
from llmlabel.calibrate.risk import gold_rows, position_in, said_sets
from llmlabel.labelspace import LabelSpace


@dataclass(frozen=True)
class LabelThresholds:
    """A threshold for every label; see `fit_label_thresholds`.

    Attributes:
        alpha: Share of the true rows of a label that may be missed.
        thresholds: In the order of the labels.
        rows: Gold rows of each label.
        sources: What gave the threshold: "own" rows; "rare", those of all labels with too few;
            "all", those of all labels; "unreachable" where too many true rows do not store the
            label: it is said wherever it is stored, and more is missed than promised.
        label_space: Fingerprint of the label space.
        engines: Who made the soft labels of the gold rows.
        data_sha: Hash of their ids, gold and soft labels, in any order.
    """

    alpha: float
    thresholds: tuple[float, ...]
    rows: tuple[int, ...]
    sources: tuple[str, ...]
    label_space: str
    engines: tuple[str, ...] = ()
    data_sha: str = ""


def fit_label_thresholds(
    dataset: Dataset, labels: LabelSpace, *, alpha: float = 0.1, training: Dataset | None = None
) -> LabelThresholds:
    """Fits for each label the threshold that misses at most a share `alpha` of its true rows.

    Split conformal prediction within the true rows of a label, Vovk et al. 2005 (Mondrian), with
    1 - p as the score: expected over gold rows, for every label with at least 1 / `alpha` - 1 of
    them. Labels with fewer share one threshold, from the rows of all of these; where even these are
    too few, from the rows of all labels. The threshold of the rare promises `alpha` on average over
    true labels of theirs drawn at random, not for the single label, and only where no row has several
    of them; the threshold of all labels promises the rare ones nothing.

    Args:
        dataset: Gold rows; rows whose gold nobody knows (null) are left out.
        labels: Their label space.
        alpha: Share of the true rows of a label that may be missed.
        training: Rows that a model was trained on; gold rows with the same id and text are refused.

    Raises:
        ValueError: If `alpha` is not between 0 and 1, all gold labels together are too few, or gold
            rows were chosen because they are uncertain or were trained on.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    probs, gold, whose = gold_rows(dataset, labels, training)
    needed = rows_needed(alpha=alpha, delta=0.0, bound=None)
    if gold.nnz < needed:
        raise ValueError(
            f"cannot certify that at most {alpha} of true labels are missed: needs n >= {needed} gold "
            f"labels, there are {gold.nnz} (label more rows, or allow a larger alpha)"
        )
    scores = np.zeros(gold.nnz)  # of a true label that is not stored
    at = position_in(gold, probs)
    scores[at >= 0] = probs.data[at[at >= 0]]
    counts = np.bincount(gold.indices, minlength=len(labels))
    scores = scores[np.lexsort((scores, gold.indices))]
    label_of = np.repeat(np.arange(len(labels)), counts)
    own = counts >= needed
    rare = np.sort(scores[~own[label_of]])
    shared, source = (rare, "rare") if len(rare) >= needed else (np.sort(scores), "all")
    share = exact(alpha)
    place = {count: math.floor(share * (count + 1)) - 1 for count in set(counts[own].tolist())}
    starts = np.cumsum(counts) - counts
    thresholds = np.full(len(labels), shared[math.floor(share * (len(shared) + 1)) - 1])
    thresholds[own] = [
        scores[start + place[count]]
        for start, count in zip(starts[own].tolist(), counts[own].tolist(), strict=True)
    ]
    sources = np.where(own, "own", source)
    return LabelThresholds(
        alpha,
        tuple(thresholds.tolist()),
        tuple(counts.tolist()),
        tuple(np.where(thresholds > 0, sources, "unreachable").tolist()),
        labels.fingerprint,
        *whose,
    )


def predict_label_sets(
    dataset: Dataset,
    labels: LabelSpace,
    fitted: LabelThresholds,
    *,
    other_engine: OtherEngine = "refuse",
) -> Dataset:
    """Adds `set_ids`, the labels that reach their own thresholds, most probable first.

    Args:
        dataset: New rows.
        labels: The label space of the thresholds.
        fitted: What `fit_label_thresholds` gave.
        other_engine: "allow" takes soft labels of another model, for which nothing is promised.

    Raises:
        ValueError: If the thresholds were fitted in another label space or on another model's
            labels.
    """
    check_engines(dataset, fitted.engines, other_engine)
    return said_sets(dataset, labels, np.array(fitted.thresholds), space=fitted.label_space)
