"""Rows that were labelled in one version of a label space, moved to another version."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Bool, Int
from scipy.sparse import coo_array, csr_array

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace, graph
from llmlabel.labelspace.versions import LabelDiff, diff_labels
from llmlabel.softlabels import VOTES, SoftLabels

_log = logging.getLogger(__name__)

_LISTS = ("gold", "candidates", "set_ids", "votes")
"""Columns besides the soft label that hold positions of labels."""

_NOWHERE = -1

Cells = Int[np.ndarray, " cells"]


@dataclass(frozen=True)
class RowMapping:
    """What rows that both versions labelled say about old and new labels.

    Attributes:
        same: Old id -> new ids, for every old label that is the answer of some row.
        counts: Old id -> new id -> number of rows with these two answers.
        rows: Number of rows with an answer in both versions.
    """

    same: dict[str, tuple[str, ...]]
    counts: dict[str, dict[str, int]]
    rows: int


def mapping_from_rows(
    old_table: Dataset,
    new_table: Dataset,
    old: LabelSpace,
    new: LabelSpace,
    *,
    share: float = 0.2,
    one_to_one: bool = False,
) -> RowMapping:
    """Finds what each old label became from the answers that rows have in both versions.

    An old and a new label belong together when at least `share` of the old one's rows are the new
    one's, and one of the two is the other's most frequent partner: so parts point to the label that
    was split, and members to the one that they were merged into, but stray rows to nobody.

    Args:
        old_table: Rows with soft labels of `old`; joined by `id` with those of `new_table`.
        new_table: Rows with soft labels of `new`; either may have rows that the other has not.
        old: The label space of the first.
        new: Of the second.
        share: Between 0 and 1.
        one_to_one: The pairs with the most rows in common, each label in one pair at most (the
            assignment of Kuhn 1955), so that nothing is split or merged.

    Raises:
        ValueError: No row has an answer in both versions, or `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], a part of an old label's rows; got {share}")
    pairs = _answer_pairs(old_table, new_table, old, new)
    cells, times = np.unique(pairs, axis=0, return_counts=True)
    rows, columns = cells[:, 0], cells[:, 1]
    counts: dict[str, dict[str, int]] = {}
    for i, j, n in zip(rows.tolist(), columns.tolist(), times.tolist(), strict=True):
        counts.setdefault(old.ids[i], {})[new.ids[j]] = n
    partners = _assigned(rows, columns, times) if one_to_one else _partners(rows, columns, times)
    total = np.bincount(rows, weights=times)
    partners &= times >= share * total[rows]
    same: dict[str, tuple[str, ...]] = dict.fromkeys(counts, ())
    for i, j in cells[partners].tolist():
        same[old.ids[i]] += (new.ids[j],)
    return RowMapping(same, counts, len(pairs))


def _answer_pairs(
    old_table: Dataset, new_table: Dataset, old: LabelSpace, new: LabelSpace
) -> Int[np.ndarray, "rows 2"]:
    answered = []
    for table, labels in ((old_table, old), (new_table, new)):
        require_columns(table, "id")
        said = graph.answers(SoftLabels.from_dataset(table, labels).probs, labels)
        ids = table["id"][:]
        answered.append({id: at for id, at in zip(ids, said.tolist(), strict=True) if at >= 0})
    before, after = answered
    if not (both := [id for id in before if id in after]):
        raise ValueError(
            f"none of the {len(before)} rows with an old label has a new one (rows are joined by "
            f"id, there are {len(after)} new ones); label the same rows with both versions"
        )
    return np.array([(before[id], after[id]) for id in both])


def _partners(rows: Cells, columns: Cells, times: Cells) -> Bool[np.ndarray, " cells"]:
    """Whether a cell is the largest of its row or of its column (of equal ones the first)."""
    found = np.zeros(len(rows), dtype=bool)
    for line in (rows, columns):
        order = np.lexsort((np.arange(len(rows)), -times, line))
        found[order[np.unique(line[order], return_index=True)[1]]] = True
    return found


def _assigned(rows: Cells, columns: Cells, times: Cells) -> Bool[np.ndarray, " cells"]:
    """Whether a cell is in the one-to-one assignment with the most rows."""
    from scipy.optimize import linear_sum_assignment

    (some_rows, i), (some_columns, j) = (
        np.unique(line, return_inverse=True) for line in (rows, columns)
    )
    table = np.zeros((len(some_rows), len(some_columns)))
    table[i, j] = times
    chosen = set(zip(*map(np.ndarray.tolist, linear_sum_assignment(-table)), strict=True))
    return np.array([pair in chosen for pair in zip(i.tolist(), j.tolist(), strict=True)])


def carry_over(
    dataset: Dataset,
    old: LabelSpace,
    new: LabelSpace,
    diff: LabelDiff | Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Moves what rows say about the old labels to the new ones; nothing is guessed.

    The probability of a label goes to the label that it became; that of a label that was split to
    the lowest new label above all parts, that of a label that was removed to where its parents' goes;
    where there is no such label it becomes missing mass. Merged labels add theirs (in a multi-label
    space, where several may be true together, the largest counts). Votes move likewise. Candidates
    and prediction sets get all parts of a label. The gold of a row with a label that was split or
    removed is unknown (null) afterwards, and so is that of a row with none of the old labels when
    labels were added, unless the space is multi-label; the row's `error` says so, and also when
    nothing is left of its soft label. Demonstrations stay as they are: choose them again.

    Args:
        dataset: Rows with any of soft labels, gold, candidates, votes and prediction sets.
        old: The label space of the rows.
        new: The label space that they get.
        diff: What `diff_labels` found, or its `same`.

    Raises:
        ValueError: The rows or `diff` belong to other label spaces, or only one of the two spaces is
            multi-label.
    """
    if not isinstance(diff, LabelDiff):
        diff = diff_labels(old, new, same=diff)
    if (diff.old_space, diff.new_space) != (old.fingerprint, new.fingerprint):
        raise ValueError(
            f"the diff leads from label space {diff.old_space} to {diff.new_space}, the labels given "
            f"are {old.fingerprint} and {new.fingerprint}; give those, or diff them"
        )
    if old.multilabel != new.multilabel:
        raise ValueError("one label space is multi-label and the other is not; make them alike")
    _check_positions(dataset, old)
    places = _places(old, new, diff)
    dataset, notes = _gold_carried(dataset, old, new, diff)
    dataset = _lists_carried(dataset, old, new, places, diff)
    if "label_ids" in dataset.column_names:
        before = SoftLabels.from_dataset(dataset, old)
        after = _moved(before, places, new)
        lost = (np.diff(before.probs.indptr) > 0) & (np.diff(after.probs.indptr) == 0)
        for row in np.flatnonzero(lost).tolist():
            notes[row].append("nothing is left of the soft label in the new labels")
        dataset = after.add_to(dataset)
    return _with_notes(dataset, notes)


def _check_positions(dataset: Dataset, old: LabelSpace) -> None:
    there = [name for name in _LISTS if name in dataset.column_names]
    require_columns(dataset, *there)
    for name in there:
        for row, some in enumerate(dataset[name][:]):
            for one in some or ():
                label = one["label_id"] if name == "votes" else one
                if label is None and name == "votes":  # an abstention
                    continue
                if label is None or not 0 <= label < len(old):
                    raise ValueError(
                        f"row {row}: {name} has the label {label}, but the old labels are 0 to "
                        f"{len(old) - 1}; give the label space of these rows"
                    )


def _places(old: LabelSpace, new: LabelSpace, diff: LabelDiff) -> list[int]:
    """The new label that takes the probability of each old one; `_NOWHERE` where there is none."""
    found, depths = [_NOWHERE] * len(old), graph.depths(new)
    for label in old.topological:
        after = {new.index(id) for id in diff.successors[old.ids[label]]}
        if not after:
            after = {found[parent] for parent in old.parent_positions[label]} - {_NOWHERE}
        found[label] = _lowest_above(after, new, depths)
    return found


def _lowest_above(some: set[int], labels: LabelSpace, depths: Int[np.ndarray, " labels"]) -> int:
    """The lowest label that all of these are or are below; of several the deepest, then the first."""
    if len(some) < 2:
        return next(iter(some), _NOWHERE)
    common = graph.lowest_common_ancestors(labels, *some)
    return min(common, key=lambda label: (-depths[label], label), default=_NOWHERE)


def _moved(soft: SoftLabels, places: list[int], new: LabelSpace) -> SoftLabels:
    probs = soft.probs
    target = np.array(places)[probs.indices]
    rows = np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))[target >= 0]
    cells, at = np.unique(rows * len(new) + target[target >= 0], return_inverse=True)
    values = np.zeros(len(cells))
    together = np.maximum if new.multilabel else np.add
    together.at(values, at, probs.data[target >= 0].astype(np.float64))
    moved = coo_array((values, np.divmod(cells, len(new))), shape=(probs.shape[0], len(new)))
    return SoftLabels(csr_array(moved), new.fingerprint, new.multilabel)


def _lists_carried(
    dataset: Dataset, old: LabelSpace, new: LabelSpace, places: list[int], diff: LabelDiff
) -> Dataset:
    """With the new positions in the columns that hold labels without a claim to be all or right."""
    there = {*_LISTS[1:]} & set(dataset.column_names)
    wide = [  # where the meaning of each label is now: its parts, not what is above them
        [new.index(id) for id in diff.successors[one]] or [place] * (place != _NOWHERE)
        for one, place in zip(old.ids, places, strict=True)
    ]
    columns: dict[str, tuple[Any, Any]] = {}
    for name in sorted(there - {"votes"}):
        lists = [
            None if some is None else list(dict.fromkeys(at for one in some for at in wide[one]))
            for some in dataset[name][:]
        ]
        if name == "candidates":  # null means all, an empty list would leave nothing to answer
            lists = [some or None for some in lists]
        columns[name] = lists, List(Value("int32"))
    if "votes" in there:
        columns["votes"] = [_votes(some, places, new) for some in dataset["votes"][:]], VOTES
    return with_columns(dataset, columns)


def _votes(
    votes: list[dict[str, Any]] | None, places: list[int], new: LabelSpace
) -> list[dict[str, Any]] | None:
    if votes is None:
        return None
    moved: list[dict[str, Any]] = []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for vote in votes:
        if vote["label_id"] is None:  # an abstention
            moved.append(vote)
        elif (place := places[vote["label_id"]]) != _NOWHERE:
            prob = 1.0 if vote["prob"] is None else vote["prob"]
            same = found.get((vote["source"], place))
            if same is None:
                moved.append({"source": vote["source"], "label_id": place, "prob": prob})
                found[vote["source"], place] = moved[-1]
            else:
                same["prob"] = max(same["prob"], prob) if new.multilabel else same["prob"] + prob
    return moved


def _gold_carried(
    dataset: Dataset, old: LabelSpace, new: LabelSpace, diff: LabelDiff
) -> tuple[Dataset, list[list[str]]]:
    """With the new gold, and for each row why it is unknown now."""
    if "gold" not in dataset.column_names:
        return dataset, [[] for _ in range(len(dataset))]
    pairs = [_gold(some, old, new, diff) for some in dataset["gold"][:]]
    golds = [gold for gold, _ in pairs]
    dataset = with_columns(dataset, {"gold": (golds, List(Value("int32")))})
    return dataset, [notes for _, notes in pairs]


def _gold(
    gold: list[int] | None, old: LabelSpace, new: LabelSpace, diff: LabelDiff
) -> tuple[list[int] | None, list[str]]:
    """The true labels, None where nobody knows them any more, and why."""
    if gold is None:
        return None, []
    if not gold and diff.added and not new.multilabel:
        return None, ["gold is unknown: none of the old labels, and labels were added"]
    ids = [old.ids[label] for label in gold]
    for id in ids:
        if len(diff.successors[id]) != 1:
            what = "split" if diff.successors[id] else "removed"
            return None, [f"gold is unknown: label {id!r} was {what}"]
    return list(dict.fromkeys(new.index(diff.successors[id][0]) for id in ids)), []


def _with_notes(dataset: Dataset, notes: list[list[str]]) -> Dataset:
    if not (touched := sum(map(bool, notes))):
        return dataset
    _log.info("carry_over: %d of %d rows lost a label; error says why", touched, len(dataset))
    there = "error" in dataset.column_names
    errors = dataset["error"][:] if there else [None] * len(dataset)
    said = [
        "; ".join([error, *some] if error else some) or None
        for error, some in zip(errors, notes, strict=True)
    ]
    return with_columns(dataset, {"error": (said, Value("string"))})
