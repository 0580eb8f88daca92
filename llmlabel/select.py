"""Which rows to label next or to keep."""

import math
from fractions import Fraction

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def margins(soft: SoftLabels) -> Float[np.ndarray, " rows"]:
    """Probability of the first label minus that of the second, Scheffer et al. 2001.

    0 for a row without a soft label. In a multi-label space twice the distance of the label nearest
    to 0.5 from it, Brinker 2003 (BinMin); a label not stored counts as 0.
    """
    if soft.multilabel:
        distance = soft.probs.copy()
        distance.data = 1 - np.abs(2 * distance.data - 1)
        return 1 - distance.max(axis=1).toarray().ravel().astype(np.float64)
    two = soft.top(2).probs.astype(np.float64)
    first = two.max(axis=1).toarray().ravel()
    return 2 * first - np.asarray(two.sum(axis=1)).ravel()


def vote_entropy(
    answers: Int[np.ndarray, "rows sources"],
) -> Float[np.ndarray, " rows"]:
    """Entropy of the sources' answers to each row over its maximum, Dagan and Engelson 1995.

    An answer is any number that is equal for equal answers; -1 is no answer. The maximum is the
    logarithm of the number of sources: 1 when each says something else.
    """
    given = answers >= 0
    same = (answers[:, :, None] == answers[:, None, :]) & given[:, None, :]
    votes = np.maximum(given.sum(axis=1, keepdims=True), 1)
    share = np.where(given, same.sum(axis=2) / votes, 1.0)
    entropy = -(np.log(share) * given).sum(axis=1) / votes[:, 0]
    return entropy / np.log(max(answers.shape[1], 2))


def keep_confident(dataset: Dataset, labels: LabelSpace, *, share: float) -> Dataset:
    """Sets `weight` to 0 except in each label's most confident `share` of rows.

    Rows belong to the label they give the highest probability; per label, so that no label dies out
    when a source is surer of some labels than of others. Weights that the rows already have are kept
    for the chosen ones; rows of weight 0 take no place.

    Cui et al., "Beyond Self-Supervision" (SSLD, arXiv 2103.05959). Differs from the paper: a share
    of each label's rows, not a number.

    Args:
        dataset: rows with soft labels.
        labels: their label space, single-label.
        share: between 0 (excluded) and 1; the number of rows is rounded up.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; got {share}")
    if labels.multilabel:
        raise ValueError("keep_confident needs labels that exclude each other (single-label)")
    require_columns(dataset, "id")
    probs = SoftLabels.from_dataset(dataset, labels).dense()
    best, confidence = probs.argmax(axis=1), probs.max(axis=1)
    ids = np.array(dataset["id"][:])
    weights = row_weights(dataset)
    kept = np.zeros(len(dataset), dtype=bool)
    for label in range(len(labels)):
        rows = np.flatnonzero((best == label) & (confidence > 0) & (weights > 0))
        order = np.lexsort((ids[rows], -confidence[rows]))  # ties by id, never by position
        count = math.ceil(Fraction(str(share)) * len(rows))  # 0.07 of 100 rows are 7, not 8
        kept[rows[order[:count]]] = True
    weights = np.where(kept, weights, 0).astype(np.float32)
    return with_columns(dataset, {"weight": (weights, Value("float32"))})


def row_weights(dataset: Dataset) -> Float[np.ndarray, " rows"]:
    """The column `weight`; 1 where it is null, and for all rows where there is none.

    Raises:
        ValueError: A weight is negative, infinite or no number.
    """
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    require_columns(dataset, "weight")
    given = dataset["weight"][:]
    weights = np.array([1.0 if weight is None else weight for weight in given], dtype=np.float64)
    if (bad := np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))).size:
        row = dataset[int(bad[0])]
        raise ValueError(
            f"row with id {row.get('id')!r} has the weight {row['weight']}; write a number of at "
            "least 0, or null for 1"
        )
    return weights
