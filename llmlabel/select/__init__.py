"""Which rows to label next or to keep.

A selector reads a pool and a budget and adds three columns: `selected`, whether it takes the row;
`select_score`, how much it wants it (null where it has no score); `select_reason`, why it was taken
or left out (null for rows that were just not among the best). It drops no row: `chosen` does. What
is selected depends on the ids, never on the order of the rows. Selectors that choose what to train
on also set `weight` to 0 for what they leave out.

Here are the parts that they share; the selectors are in `uncertain` (margin, entropy, votes),
`diverse` (k-center, BADGE), `robust` (RAD, against a teacher's mistakes), `learnable` (LLKD, SALT),
`prune` (random, the best of each label), `duplicates` (near-duplicates of evaluation rows) and
`review` (a queue for people with a budget of time).
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int

from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table, in_memory
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
    logarithm of the number of all sources, also of those without an answer to the row: 1 when all
    answer and each says something else. Takes rows x sources^2 numbers, so it is for few sources;
    `llmlabel.select.uncertain.label_entropy` reads any number of votes.
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
    when a source is surer of some labels than of others. Weights that the rows already have are
    kept for the chosen ones; rows of weight 0 take no place.

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
    kept = best_of_each(
        probs.argmax(axis=1),
        np.where(row_weights(dataset) > 0, probs.max(axis=1), 0.0),
        id_ranks(dataset),
        # 0.07 of 100 rows are 7, not 8
        count=lambda rows: math.ceil(Fraction(str(share)) * rows),
    )
    weights = np.where(kept, row_weights(dataset), 0).astype(np.float32)
    return with_columns(dataset, {"weight": (weights, Value("float32"))})


def best_of_each(
    best: Int[np.ndarray, " rows"],
    score: Float[np.ndarray, " rows"],
    ranks: Int[np.ndarray, " rows"],
    *,
    count: Callable[[int], int],
) -> Bool[np.ndarray, " rows"]:
    """Whether a row is among the first `count(rows of its label)` by score; a score of 0 never is."""
    rows = np.flatnonzero(score > 0)
    rows = rows[np.lexsort((ranks[rows], -score[rows], best[rows]))]
    sizes = np.unique(best[rows], return_counts=True)[1]
    quotas = np.array([count(size) for size in sizes.tolist()], dtype=np.int64)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # in its label
    kept = np.zeros(len(best), dtype=bool)
    kept[rows[place < np.repeat(quotas, sizes)]] = True
    return kept


def chosen(dataset: Dataset) -> Dataset:
    """The rows that a selector took, those it wants most first; equal scores by id."""
    require_columns(dataset, "id", "selected", "select_score")
    taken = np.flatnonzero(np.array(dataset["selected"][:], dtype=bool))
    scores = np.array(dataset["select_score"][:], dtype=np.float64)[taken]
    order = np.lexsort((id_ranks(dataset)[taken], -np.nan_to_num(scores, nan=-np.inf)))
    return in_memory(arrow_table(dataset.select(taken[order])))


def with_selection(
    dataset: Dataset,
    taken: Bool[np.ndarray, " rows"],
    scores: Float[np.ndarray, " rows"],
    reason: Callable[[int], str | None],
) -> Dataset:
    """Adds the columns of a selector; a score that is NaN becomes null.

    Args:
        dataset: the pool.
        taken: whether each row is selected.
        scores: of all rows, higher is sooner.
        reason: of the row at a position.
    """
    values = pa.array(scores.astype(np.float32), mask=np.isnan(scores))
    reasons = [reason(row) for row in range(len(dataset))]
    return with_columns(
        dataset,
        {
            "selected": (taken, Value("bool")),
            "select_score": (values, Value("float32")),
            "select_reason": (reasons, Value("string")),
        },
    )


def highest(
    scores: Float[np.ndarray, " rows"], ranks: Int[np.ndarray, " rows"], *, budget: int
) -> Bool[np.ndarray, " rows"]:
    """Whether a row is among the `budget` highest scores; a NaN never is, equal ones go by rank."""
    usable = int((~np.isnan(scores)).sum())
    check_budget(budget, usable)
    taken = np.zeros(len(scores), dtype=bool)
    taken[np.lexsort((ranks, -np.nan_to_num(scores, nan=-np.inf)))[:budget]] = True
    return taken


def check_budget(budget: int, rows: int) -> None:
    """Raises a ValueError for a budget below 1 or above the number of rows to choose from."""
    if not 1 <= budget <= rows:
        raise ValueError(f"budget must be from 1 to {rows}, the rows to choose from; got {budget}")


def id_ranks(dataset: Dataset) -> Int[np.ndarray, " rows"]:
    """The place of each row's id among all ids: an order of rows that is not their position.

    Raises:
        ValueError: An id is there twice.
    """
    require_columns(dataset, "id")
    ids = arrow_table(dataset.select_columns(["id"]))["id"].combine_chunks()
    order = pc.sort_indices(ids)
    ordered = ids.take(order)
    if (
        len(ids) > 1
        and (equal := pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)).any()
    ):
        raise ValueError(f"the id {ordered[int(equal.argmax())].as_py()!r} is there more than once")
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[order.to_numpy()] = np.arange(len(ids))
    return ranks


def row_vectors(dataset: Dataset) -> Float[np.ndarray, "rows width"]:
    """The column `vector`, the embedding of each row's text.

    Raises:
        ValueError: A row has none, one of another width than the first row, or one that is not
        finite.
    """
    require_columns(dataset, "vector")
    column = arrow_table(dataset.select_columns(["vector"]))["vector"]
    lists = column.cast(pa.list_(pa.float32())).combine_chunks()
    widths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if not len(widths):
        return np.zeros((0, 0))
    if (other := np.flatnonzero((widths != widths[0]) | (widths == 0))).size:
        row = int(other[0])
        raise ValueError(
            f"row with id {dataset[row].get('id')!r} has a vector of {widths[row]} numbers, the first "
            f"row has {widths[0]}; embed all rows with one encoder"
        )
    vectors = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(widths), -1)
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        row = int(finite.argmin())
        raise ValueError(f"row with id {dataset[row].get('id')!r} has a vector that is not finite")
    return vectors


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
