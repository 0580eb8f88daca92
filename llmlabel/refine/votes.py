"""Votes: who said what about which row, as arrays, read and checked."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from jaxtyping import Bool, Float, Int

from llmlabel.data import label_position, require_columns, with_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import VOTES, SoftLabels

FEW = 10
"""What fewer votes of a source show (one label only, equal to another source) may be chance."""

_MAX_SUM = 1 + 1e-3
"""More than this in one soft vote is no distribution (half precision included)."""


@dataclass(frozen=True, eq=False)
class Votes:
    """One entry for each label that a source gave a row, by row, then source, then label.

    The entries of one source on one row are its vote: a label with probability 1 (a hard vote), or
    several with theirs (a soft one). A source without an entry on a row did not vote on it, and
    `read_votes` reads one whose probabilities on a row are all 0 as that.

    Attributes:
        row: Position of the row.
        source: Position in `names`.
        label: Position in the label space.
        prob: Probability that the source gave the label.
        names: Of the sources.
        rows: Number of rows, with and without votes.
        labels: Number of labels.
    """

    row: Int[np.ndarray, " entries"]
    source: Int[np.ndarray, " entries"]
    label: Int[np.ndarray, " entries"]
    prob: Float[np.ndarray, " entries"]
    names: tuple[str, ...]
    rows: int
    labels: int

    @property
    def voted(self) -> Bool[np.ndarray, " rows"]:
        """Whether any source voted on each row."""
        voted = np.zeros(self.rows, dtype=bool)
        voted[self.row] = True
        return voted

    def first(self) -> Bool[np.ndarray, " entries"]:
        """Whether a vote begins with each entry."""
        first = np.ones(len(self.row), dtype=bool)
        first[1:] = (np.diff(self.row) != 0) | (np.diff(self.source) != 0)
        return first

    def top(self) -> Int[np.ndarray, " votes"]:
        """The entry of the most probable label of each vote; of equal ones the lowest id."""
        first = self.first()
        if first.all():
            top = np.arange(len(first))
        else:
            order = np.lexsort((self.label, -self.prob, np.cumsum(first)))
            top = order[first]  # a vote begins in the same place of either order
        return top[self.prob[top] > 0]

    def hard(self) -> "Votes":
        """Each vote as one whole vote for its most probable label."""
        top = self.top()
        return Votes(
            *(self.row[top], self.source[top], self.label[top], np.ones(len(top))),
            *(self.names, self.rows, self.labels),
        )

    def of(self, sources: Bool[np.ndarray, " sources"]) -> "Votes":
        """The votes of some sources alone."""
        kept = sources[self.source]
        place = (np.cumsum(sources) - 1).astype(np.int32)
        names = tuple(name for name, keep in zip(self.names, sources, strict=True) if keep)
        return Votes(
            *(self.row[kept], place[self.source[kept]], self.label[kept], self.prob[kept]),
            *(names, self.rows, self.labels),
        )

    def counts(
        self, weights: Float[np.ndarray, " sources"] | None = None
    ) -> Float[np.ndarray, "rows labels"]:
        """Votes for each label, each times the weight of its source."""
        weighted = self.prob if weights is None else self.prob * weights[self.source]
        cell = self.row.astype(np.int64) * self.labels + self.label
        counts = np.bincount(cell, weights=weighted, minlength=self.rows * self.labels)
        return counts.astype(np.float64, copy=False).reshape(self.rows, self.labels)

    def only_label(self) -> Int[np.ndarray, " sources"]:
        """The label of each source that never votes for another one; -1 for all other sources."""
        cell = self.source.astype(np.int64) * self.labels + self.label
        given = np.bincount(cell, self.prob, minlength=len(self.names) * self.labels) > 0
        given = given.reshape(len(self.names), self.labels)
        return np.where(given.sum(axis=1) == 1, given.argmax(axis=1), -1)

    def identical(self) -> list[list[str]]:
        """Groups of sources with the same votes on the same rows, at least `FEW` of them."""
        # A sum of numbers drawn from row and label finds pairs; then their votes are compared.
        key = self.row.astype(np.uint64) * np.uint64(self.labels) + self.label.astype(np.uint64)
        drawn = (key * np.uint64(0x9E3779B97F4A7C15)) / 2.0**64
        size = np.bincount(self.source, minlength=len(self.names))
        sums = np.bincount(self.source, drawn * self.prob, minlength=len(self.names))
        found: list[list[int]] = []
        groups: dict[tuple[int, float], list[list[int]]] = {}
        for source in np.flatnonzero(size >= FEW).tolist():
            alike = groups.setdefault((size[source], sums[source]), [])
            group = next((one for one in alike if self._same(one[0], source)), None)
            if group is None:
                alike.append([source])
                found.append(alike[-1])
            else:
                group.append(source)
        return [[self.names[source] for source in group] for group in found if len(group) > 1]

    def _same(self, one: int, other: int) -> bool:
        a, b = self.source == one, self.source == other
        return all(np.array_equal(of[a], of[b]) for of in (self.row, self.label, self.prob))


# --------------------------------------------------------------------------------------- reading


def read_votes(sources: dict[str, Dataset] | Dataset, labels: LabelSpace) -> Votes:
    """The soft labels of several sources on the same rows, or the column `votes` of one table.

    In the column, a null `label_id` is an abstention, read as no vote, and a null `prob` is 1. Where
    all probabilities of a source on a row are 0, it has no vote on it.

    Raises:
        ValueError: Sources have other rows, rows were labelled in another space, a label is outside
            it, a probability is none, or a source votes twice on a row.
    """
    if isinstance(sources, Dataset):
        read = _column_votes(sources, labels)
    else:
        read = _table_votes(sources, labels)
    start = np.flatnonzero(read.first())
    if not start.size:
        return read
    length = np.diff(np.append(start, len(read.row)))
    kept = np.repeat(np.add.reduceat(read.prob, start) > 0, length)
    if kept.all():
        return read
    entries = (read.row[kept], read.source[kept], read.label[kept], read.prob[kept])
    return Votes(*entries, read.names, read.rows, read.labels)


def _table_votes(sources: dict[str, Dataset], labels: LabelSpace) -> Votes:
    if not sources:
        raise ValueError("aggregate needs at least one source")
    first_name, first = next(iter(sources.items()))
    require_columns(first, "id")
    ids = first["id"][:]
    for name, rows in sources.items():
        if "id" not in rows.column_names or rows["id"][:] != ids:
            raise ValueError(
                f"source {name!r} has other rows than {first_name!r}; "
                "label the same dataset with every source"
            )
    entries = []
    for number, soft in enumerate(SoftLabels.from_sources(sources, labels).values()):
        probs = soft.probs
        row = np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))
        entries.append((row, np.full(len(row), number), probs.indices, probs.data))
    columns = [np.concatenate(column) for column in zip(*entries, strict=True)]
    return _sorted(*columns, names=tuple(sources), rows=len(ids), labels=len(labels))


def add_votes(dataset: Dataset, votes: Dataset, labels: LabelSpace) -> Dataset:
    """Adds the column `votes` from a long table with one vote a line.

    Args:
        dataset: rows with `id`.
        votes: columns `id` (of the row), `source`, `label` (id or name of the label, null where the
            source abstained) and, where votes are not certain, `prob`.
        labels: the label space of the votes.

    Raises:
        ValueError: a vote is on a row or for a label that is not there, has no source, a source
            votes twice on a row, two rows have one id, or the rows have votes already.
    """
    require_columns(dataset, "id")
    require_columns(votes, "id", "source", "label")
    if "votes" in dataset.column_names:
        raise ValueError("the rows have the column votes already; take it away first")
    table = arrow_table(votes).combine_chunks()
    ids = pa.array(dataset["id"][:])
    if len(pc.unique(ids)) < len(ids):
        twice = Counter(ids.to_pylist()).most_common(1)[0][0]
        raise ValueError(
            f"the id {twice!r} is of several rows, which votes cannot tell apart; make ids unique"
        )
    row = pc.index_in(table["id"].cast(ids.type), value_set=ids).combine_chunks()
    if row.null_count:
        lost = table["id"][pc.index(row.is_null(), True).as_py()].as_py()
        raise ValueError(f"a vote is on the row {lost!r}, but no row has that id; add the row")
    if table["source"].null_count:
        raise ValueError("a vote has no source; name who cast it in the column 'source'")
    coded = table["label"].combine_chunks().dictionary_encode()
    try:
        known = [
            None if label is None else label_position(label, labels)
            for label in coded.dictionary.to_pylist()
        ]
    except ValueError as error:
        raise ValueError(f"column 'label' of the votes: {error}") from None
    label = pa.array(known, pa.int32()).take(coded.indices)
    prob = table["prob"] if "prob" in table.column_names else pa.nulls(len(table), pa.float32())
    entries = pa.table({"source": table["source"], "label_id": label, "prob": prob})
    column = vote_lists(row.to_numpy(), entries, rows=len(dataset))
    added = with_columns(dataset, {"votes": (column, VOTES)})
    read_votes(added, labels)  # so that what is wrong is said here
    return added


def vote_lists(row: Int[np.ndarray, " votes"], entries: pa.Table, *, rows: int) -> pa.ListArray:
    """The values of a column `votes`: the entries of each row in the order that they have."""
    order = pa.array(np.argsort(row, kind="stable"))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    kind = Features({"votes": VOTES}).arrow_schema.field("votes").type.value_type
    fields = [entries[f.name].combine_chunks().cast(f.type).take(order) for f in kind]
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(fields, fields=list(kind))
    )


def _column_votes(dataset: Dataset, labels: LabelSpace) -> Votes:
    require_columns(dataset, "votes")
    if "label_space" in dataset.column_names:
        _refuse_other_space(dataset, labels)
    lists = arrow_table(dataset.select_columns(["votes"]))["votes"].combine_chunks()
    lists = lists.cast(Features({"votes": VOTES}).arrow_schema.field("votes").type)
    row = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    votes = lists.flatten()
    coded = pc.struct_field(votes, "source").dictionary_encode()
    if coded.indices.null_count:
        at = pc.index(coded.indices.is_null(), True).as_py()
        raise ValueError(f"{_name(dataset, row[at])}: a vote has no source; name who cast it")
    given = pc.struct_field(votes, "label_id").is_valid().to_numpy(zero_copy_only=False)
    names = sorted(coded.dictionary.to_pylist())  # their places do not depend on the rows' order
    place = np.argsort(np.argsort(coded.dictionary.to_pylist()))
    source = place[coded.indices.to_numpy(zero_copy_only=False)[given]]
    label = pc.struct_field(votes, "label_id").fill_null(0).to_numpy(zero_copy_only=False)[given]
    prob = pc.struct_field(votes, "prob").fill_null(1.0).to_numpy(zero_copy_only=False)[given]
    row = row[given]
    for wrong, problem in (
        ((label < 0) | (label >= len(labels)), "votes for label id {label}, but the label space "
         f"has ids 0 to {len(labels) - 1}; load the one that the votes are about"),
        (~((prob >= 0) & (prob <= _MAX_SUM)), "votes with the probability {prob}; give one between "
         "0 and 1, or null for a vote without one"),
    ):  # fmt: skip
        if wrong.any():
            at = int(np.argmax(wrong))
            said = problem.format(label=label[at], prob=prob[at])
            raise ValueError(f"{_name(dataset, row[at])}: source {names[source[at]]!r} {said}")
    read = _sorted(
        *(row, source, label, prob), names=tuple(names), rows=len(dataset), labels=len(labels)
    )
    _refuse_second_votes(read, dataset, multilabel=labels.multilabel)
    return read


def _refuse_other_space(dataset: Dataset, labels: LabelSpace) -> None:
    require_columns(dataset, "label_space")
    spaces = arrow_table(dataset.select_columns(["label_space"]))["label_space"].unique()
    for space in spaces.to_pylist():
        if space not in (None, labels.fingerprint):
            raise ValueError(
                f"the rows carry votes of label space {space}, but the label space given is "
                f"{labels.fingerprint}; load the one that made them, or label the rows again"
            )


def _refuse_second_votes(votes: Votes, dataset: Dataset, *, multilabel: bool) -> None:
    first = votes.first()
    if first.all():
        return
    again = np.flatnonzero(~first & (np.diff(votes.label, prepend=-1) == 0))
    if not again.size and not multilabel:
        start = np.flatnonzero(first)
        again = start[np.add.reduceat(votes.prob, start) > _MAX_SUM]
    if again.size:
        row, source = int(votes.row[again[0]]), int(votes.source[again[0]])
        mine = (votes.row == row) & (votes.source == source)
        raise ValueError(
            f"{_name(dataset, row)}: source {votes.names[source]!r} votes twice, for the label "
            f"ids {votes.label[mine].tolist()} with probabilities that sum to "
            f"{votes.prob[mine].sum():.6g}; keep one vote, or name the second source differently"
        )


def _name(dataset: Dataset, row: Any) -> str:
    known = "id" in dataset.column_names
    return f"row with id {dataset[int(row)]['id']!r}" if known else f"row {row}"


def _sorted(
    row: Int[np.ndarray, " entries"],
    source: Int[np.ndarray, " entries"],
    label: Int[np.ndarray, " entries"],
    prob: Float[np.ndarray, " entries"],
    *,
    names: tuple[str, ...],
    rows: int,
    labels: int,
) -> Votes:
    key = (row.astype(np.int64) * len(names) + source) * labels + label
    order = slice(None) if (np.diff(key) >= 0).all() else np.argsort(key, kind="stable")
    row, source, label = (part.astype(np.int32)[order] for part in (row, source, label))
    return Votes(row, source, label, prob.astype(np.float64)[order], names, rows, labels)
