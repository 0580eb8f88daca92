"""Coverage behind the average: per label, size, confidence and column, and the kinds of rows missed most.

The promise of prediction sets is on average over rows. Here are the rows that pay for it. Whether new
rows are like the gold rows at all is in `llmlabel.calibrate.exchangeability`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array
from scipy.stats import beta, binom

from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.data import gold_index, plain_words, require_columns, with_gold
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import (
    binomial_interval,
    covered,
    macro_coverage,
    quantile_bins,
    set_sizes,
    share_below,
    under_coverage_gap,
)
from llmlabel.softlabels import SoftLabels

_SIZE_EDGES = (0, 1, 2, 3, 4, 5, 6, 11, 101, 1001)
_MOST_ALIKE = 0.5
"""Slices that share more of their rows than this are one slice."""


@dataclass(frozen=True)
class Cell:
    """Coverage of the rows of one kind.

    Attributes:
        group: What they have in common.
        rows: How many.
        covered: How many of them have their true label in their set.
        coverage: The share.
        low: Lower end of its exact 95 % interval (Clopper and Pearson 1934).
        high: Upper end.
        set_size: Mean number of labels.
        below: Whether so few covered rows have at most the chance `level` / kinds if each kind is
            covered as often as promised.
    """

    group: str
    rows: int
    covered: int
    coverage: float
    low: float
    high: float
    set_size: float
    below: bool


@dataclass(frozen=True)
class Coverage:
    """Coverage of all rows and behind the average.

    Attributes:
        alpha: Share of misses allowed.
        level: Of `Cell.below`, for all kinds of a grouping together.
        all: All rows with gold.
        by: "label" (the true one), "set_size", "confidence", and the columns -> kinds with rows.
        macro_coverage: Mean over the labels with rows.
        under_coverage_gap: See `llmlabel.metrics.sets.under_coverage_gap`.
        share_below_half: Of the labels with rows, those covered in less than half of them.
        label_space: Fingerprint of the label space.
    """

    alpha: float
    level: float
    all: Cell
    by: dict[str, tuple[Cell, ...]]
    macro_coverage: float
    under_coverage_gap: float
    share_below_half: float
    label_space: str


@dataclass(frozen=True)
class Slice:
    """A kind of rows that was found in one half of the rows and measured in the other.

    Attributes:
        column: "text" for a word.
        value: Value of the column, or the word.
        found: Coverage in the half that it was chosen in; too low, because it was chosen for that.
        measured: Coverage in the other half; `below` holds for all slices of the result together.
    """

    column: str
    value: str
    found: Cell
    measured: Cell


def coverage_by_group(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    columns: tuple[str, ...] = (),
    bins: int = 10,
    level: float = 0.05,
) -> Coverage:
    """Coverage of `set_ids` per true label, size of the set, confidence and value of columns.

    Args:
        dataset: Gold rows that no threshold was fitted on, with their sets.
        labels: A single-label space.
        alpha: Share of misses allowed.
        columns: Strings, whole numbers or truth values; rows with null are in no group.
        bins: Groups of the largest probability.
        level: Chance that a grouping names any group `below` that is not.
    """
    _check_share("alpha", alpha)
    _check_share("level", level)
    rows, sets, gold = _with_sets(dataset, labels)
    inside, sizes = covered(sets, gold), set_sizes(sets).astype(np.int64)
    probs = SoftLabels.from_dataset(rows, labels).probs
    top = probs.max(axis=1).toarray().ravel().astype(np.float64)
    groupings: dict[str, tuple[Sequence[str], Int[np.ndarray, " rows"]]] = {
        "label": (labels.ids, gold),
        "set_size": size_groups(sizes),
        "confidence": confidence_groups(top, bins=bins),
    } | {name: _groups(rows, name) for name in columns}

    def cells(
        names: Sequence[str], group: Int[np.ndarray, " rows"], target: float | None = 1 - alpha
    ) -> tuple[Cell, ...]:
        return coverage_cells(names, group, inside, sizes, target=target, level=level)

    return Coverage(
        *(alpha, level, cells(["all"], np.zeros(len(gold), dtype=np.int64))[0]),
        {name: cells(*grouping) for name, grouping in groupings.items()},
        macro_coverage(sets, gold),
        under_coverage_gap(sets, gold, target=1 - alpha),
        share_below(sets, gold),
        labels.fingerprint,
    )


def worst_slices(  # noqa: PLR0913  # each is one plain choice
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    columns: tuple[str, ...] = (),
    words: Literal["search", "leave out"] = "search",
    slices: int = 5,
    min_rows: int = 20,
    level: float = 0.05,
    seed: int = 0,
) -> tuple[Slice, ...]:
    """The kinds of rows whose sets miss the true label most often, the worst first.

    They are chosen among the values of columns and the words of texts in one half of the rows, drawn
    by id, as those whose coverage has the lowest upper end of its interval. The worst of many is
    always bad there; what counts is what is measured in the other half.

    Args:
        dataset: Gold rows that no threshold was fitted on, with their sets.
        labels: A single-label space.
        alpha: Share of misses allowed.
        columns: Strings, whole numbers or truth values.
        words: Whether the words of `text` are searched.
        slices: How many at most; one that has most of its rows in common with a worse one is left
            out.
        min_rows: Rows of a slice in the half that it is chosen in.
        level: Chance that any of the slices is named `below` that is not.
        seed: Of the halves.
    """
    _check_share("alpha", alpha)
    _check_share("level", level)
    if min(slices, min_rows) < 1:
        raise ValueError(f"slices and min_rows must be 1 or more; got {slices} and {min_rows}")
    rows, sets, gold = _with_sets(dataset, labels)
    inside, sizes = covered(sets, gold), set_sizes(sets).astype(np.int64)
    choosing = row_uniforms((f"slices/{row}" for row in rows["id"][:]), seed=seed) < 0.5
    names, members = _candidates(rows, columns, words, choosing, min_rows)
    there = members[choosing]
    many = np.asarray(there.sum(axis=0), dtype=np.int64).ravel()
    hits = there.T @ inside[choosing].astype(np.int64)
    upper = np.where(hits < many, beta.ppf(0.975, hits + 1, np.maximum(many - hits, 1)), 1.0)
    measured = np.asarray(members[~choosing].sum(axis=0), dtype=np.int64).ravel() > 0
    found: dict[int, Bool[np.ndarray, " rows"]] = {}
    for at in np.lexsort((np.arange(len(names)), np.round(upper, 12))).tolist():
        mine = np.zeros(len(gold), dtype=bool)
        mine[members.indices[members.indptr[at] : members.indptr[at + 1]]] = True
        alike = (
            (mine & other).sum() > _MOST_ALIKE * (mine | other).sum() for other in found.values()
        )
        if measured[at] and not any(alike):
            found[at] = mine
        if len(found) == slices:
            break

    def cell(at: int, half: Bool[np.ndarray, " rows"]) -> Cell:
        group, share = np.where(found[at] & half, 0, -1), level / len(found)
        name = ["=".join(names[at])]
        return coverage_cells(name, group, inside, sizes, target=1 - alpha, level=share)[0]

    return tuple(Slice(*names[at], cell(at, choosing), cell(at, ~choosing)) for at in found)


# ------------------------------------------------------------------------------------------- arrays


def coverage_cells(
    names: Sequence[str],
    group: Int[np.ndarray, " rows"],
    covered: Bool[np.ndarray, " rows"],
    sizes: Int[np.ndarray, " rows"],
    *,
    target: float | None,
    level: float = 0.05,
) -> tuple[Cell, ...]:
    """Coverage of each group that has rows; a row of group -1 is in none.

    Without a target no group is `below` it.
    """
    known = group >= 0
    group, covered, sizes = group[known], covered[known], sizes[known]
    rows, hits, total = (
        np.bincount(group, weights=weights, minlength=len(names))
        for weights in (None, covered.astype(np.float64), sizes.astype(np.float64))
    )
    there = np.flatnonzero(rows)
    found = []
    for at in there.tolist():
        n, k = int(rows[at]), int(hits[at])
        low, high = binomial_interval(k, n)
        below = target is not None and bool(binom.cdf(k, n, target) <= level / len(there))
        found.append(Cell(names[at], n, k, k / n, low, high, float(total[at] / n), below))
    return tuple(found)


def size_groups(sizes: Int[np.ndarray, " rows"]) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """Names of groups of set sizes, and the group of each row."""
    names = [
        str(low) if high == low + 1 else f"{low} to {high - 1}"
        for low, high in pairwise(_SIZE_EDGES)
    ]
    return [*names, f"{_SIZE_EDGES[-1]} or more"], np.searchsorted(_SIZE_EDGES, sizes, "right") - 1


def confidence_groups(
    confidence: Float[np.ndarray, " rows"], *, bins: int = 10
) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """Groups of about equally many rows from the least to the most confident, and their names.

    Names have so many digits that no two are the same.
    """
    group = quantile_bins(confidence, bins=bins)
    there, group = np.unique(group, return_inverse=True)
    ends = [confidence[group == at] for at in range(len(there))]
    names: list[str] = []
    for digits in range(3, 18):
        names = [f"{one.min():.{digits}g} to {one.max():.{digits}g}" for one in ends]
        if len(set(names)) == len(names):
            break
    return names, group


# -------------------------------------------------------------------------------------------- parts


def _with_sets(
    dataset: Dataset, labels: LabelSpace
) -> tuple[Dataset, csr_array, Int[np.ndarray, " rows"]]:
    """The rows whose gold is known, with their sets."""
    if labels.multilabel:
        raise ValueError("coverage needs a label space of one label a row; this one is multi-label")
    require_columns(dataset, "id", "set_ids", "gold")
    refuse_routed(dataset)
    rows = with_gold(dataset)
    if not len(rows):
        raise ValueError(
            "no row has a known gold label; coverage can only be measured on such rows"
        )
    return rows, _sets(rows, labels), gold_index(rows, labels)


def _sets(dataset: Dataset, labels: LabelSpace) -> csr_array:
    column = arrow_table(dataset.select_columns(["set_ids"]))["set_ids"].combine_chunks()
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ids = np.array(column.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False))  # to sort
    if ids.size and not 0 <= ids.min() <= ids.max() < len(labels):
        raise ValueError(
            f"set_ids holds {ids.min()} to {ids.max()}, but the labels are 0 to {len(labels) - 1}; "
            "predict sets in this label space"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    held = np.ones(len(ids), dtype=bool)
    sets = csr_array((held, ids, offsets), shape=(len(dataset), len(labels)))
    sets.sum_duplicates()  # which sorts the ids of each row, too
    return sets


def _groups(dataset: Dataset, column: str) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """The values of a column, ascending, and which one each row has."""
    require_columns(dataset, column)
    kind = arrow_table(dataset.select_columns([column]))[column].type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(fits(kind) for fits in (*text, pa.types.is_integer, pa.types.is_boolean)):
        raise ValueError(
            f"column {column!r} holds {kind}; groups are strings, whole numbers or truth values"
        )
    values = dataset[column][:]
    names = sorted({value for value in values if value is not None})
    places = {value: place for place, value in enumerate(names)} | {None: -1}
    return [str(name) for name in names], np.array([places[value] for value in values], np.int64)


def _candidates(
    rows: Dataset,
    columns: tuple[str, ...],
    words: str,
    choosing: Bool[np.ndarray, " rows"],
    min_rows: int,
) -> tuple[list[tuple[str, str]], csc_array]:
    """Columns and values with enough rows in the half, and the rows that have them."""
    held: list[list[tuple[str, str]]] = [[] for _ in range(len(rows))]
    for column in columns:
        names, group = _groups(rows, column)
        for row in np.flatnonzero(group >= 0).tolist():
            held[row].append((column, names[group[row]]))
    if words == "search":
        require_columns(rows, "text")
        for row, text in enumerate(rows["text"][:]):
            held[row] += [("text", word) for word in {*plain_words(text).split()}]
    many = Counter(name for row in np.flatnonzero(choosing).tolist() for name in held[row])
    kept = sorted(name for name, count in many.items() if count >= min_rows)
    if not kept:
        raise ValueError(
            f"no value of {', '.join(columns) or 'a column'} and no word has {min_rows} rows in half of "
            f"{len(rows)}; give more rows or a smaller min_rows"
        )
    places = {name: place for place, name in enumerate(kept)}
    pairs = np.array(
        [(row, places[name]) for row, names in enumerate(held) for name in names if name in places]
    )
    ones = np.ones(len(pairs), dtype=np.int64)
    return kept, csc_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(rows), len(kept)))


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {share}")
