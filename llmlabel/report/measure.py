"""Every number of a report: the sources side by side, on the rows that are measured."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel import metrics
from llmlabel.calibrate.conformal import Conformal
from llmlabel.calibrate.groups import GroupConformal
from llmlabel.calibrate.noise import NoisyConformal
from llmlabel.data import gold_index, gold_matrix, plain_words, require_columns
from llmlabel.labelspace import LabelSpace, graph
from llmlabel.softlabels import SoftLabels

MOST_LABELS = 20
"""So many labels are shown one by one; the rest is summed."""

MOST_POINTS = 200
"""Of a curve."""

NO_LABEL = "no label"

_MAY_HAVE = ("error", "set_ids", "votes", "weight", "label_mass", "calls", "prompt_tokens")
"""Columns of a source that are read where they are there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a report is about; all tables have the rows of the student's, in its order."""

    tables: dict[str, Dataset]
    soft: dict[str, SoftLabels]
    labels: LabelSpace
    student: str
    befores: dict[str, str]
    split: str | None
    conformal: Conformal | GroupConformal | NoisyConformal | None
    measured: Int[np.ndarray, " measured"]
    """Rows of the split."""
    rows: Int[np.ndarray, " gold_rows"]
    """Those of `measured` whose gold is known."""
    gold: Int[np.ndarray, " gold_rows"] | Bool[np.ndarray, "gold_rows labels"]
    """A label id each (-1: none of them); in a multi-label space whether each label is true."""
    sets: list[list[int]] | None
    groups: Int[np.ndarray, " labels"]
    """The line of a table or plot that each label belongs to."""
    lines: list[str]
    """Their names: labels, then one for all labels that are too many to show."""
    said: dict[str, Int[np.ndarray, " rows"]]
    """In a hierarchy of single labels each source's answers, -1 without one; else empty."""

    @property
    def table(self) -> Dataset:
        """The student's."""
        return self.tables[self.student]

    @property
    def single_gold(self) -> bool:
        """Whether there is exactly one true answer to compare with."""
        return len(self.rows) > 0 and not self.labels.multilabel

    @property
    def left_out(self) -> int:
        """Number of labels that share the last line."""
        return len(self.labels) - MOST_LABELS if len(self.labels) > len(self.lines) else 0

    def by_line(self, values: Float[np.ndarray, " labels"]) -> list[float]:
        """Values of the labels, summed by line."""
        return np.bincount(self.groups, weights=values).tolist()

    def lines_of(self, ids: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """The line of each label; of -1 the line after the last."""
        return np.append(self.groups, len(self.lines))[ids]


def gather(
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    student: str,
    befores: dict[str, str],
    split: str | None,
    conformal: Conformal | GroupConformal | NoisyConformal | None,
) -> Run:
    """Checks that the sources fit together, and brings their rows into one order."""
    if not sources:
        raise ValueError("there are no sources; give at least the student's table")
    known = ", ".join(map(repr, sources))
    for what, name in [("student", student)] + [
        ("baselines", name) for pair in befores.items() for name in pair
    ]:
        if name not in sources:
            raise ValueError(f"{what}: {name!r} is no source; the sources are {known}")
    for name, table in sources.items():
        try:
            there = [column for column in _MAY_HAVE if column in table.column_names]
            require_columns(table, "id", "text", *there)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
    tables = {
        name: _in_order(table, name, sources[student], student) for name, table in sources.items()
    }
    table = tables[student]
    soft = SoftLabels.from_sources(tables, labels)
    measured = _measured(table, split)
    rows, gold = _gold(tables, table, measured, labels)
    share = np.asarray(soft[student].probs[measured].sum(axis=0))
    if len(rows):
        share = _indicator(gold, labels).sum(axis=0)
    groups, lines = _lines(labels, share)
    sets = None
    if "set_ids" in table.column_names:
        sets = [ids or [] for ids in table["set_ids"][:]]
        for id, ids in zip(table["id"][:], sets, strict=True):
            if not all(0 <= label < len(labels) for label in ids):
                raise ValueError(
                    f"source {student!r}: row with id {id!r} has the set {ids}, but the labels are "
                    f"0 to {len(labels) - 1}; fit and predict sets in this label space"
                )
    return Run(
        *(tables, soft, labels, student, befores, split, conformal),
        *(measured, rows, gold, sets, groups, lines, _said(soft, labels)),
    )


def _said(soft: dict[str, SoftLabels], labels: LabelSpace) -> dict[str, Int[np.ndarray, " rows"]]:
    if labels.is_flat or labels.multilabel:
        return {}
    return {name: graph.answers(one.probs, labels) for name, one in soft.items()}


def _in_order(table: Dataset, name: str, first: Dataset, first_name: str) -> Dataset:
    ids, wanted = table["id"][:], first["id"][:]
    if ids == wanted:
        return table
    position = {id: row for row, id in enumerate(ids)}
    for one, other, these, those in [
        (name, first_name, set(wanted) - set(ids), wanted),
        (first_name, name, set(ids) - set(wanted), ids),
    ]:
        if these:
            example = next(id for id in those if id in these)
            raise ValueError(
                f"source {one!r} lacks {len(these)} rows of source {other!r}, the first has id "
                f"{example!r}; label the same rows with both"
            )
    return table.select([position[id] for id in wanted])


def _measured(table: Dataset, split: str | None) -> Int[np.ndarray, " measured"]:
    if split is None:
        return np.arange(len(table))
    require_columns(table, "split")
    splits = table["split"][:]
    rows = np.flatnonzero(np.array([name == split for name in splits], dtype=bool))
    if not rows.size:
        raise ValueError(
            f"split {split!r} has no rows; the splits and rows are {dict(Counter(splits))}"
        )
    return rows


def _gold(
    tables: dict[str, Dataset],
    table: Dataset,
    measured: Int[np.ndarray, " measured"],
    labels: LabelSpace,
) -> tuple[
    Int[np.ndarray, " gold_rows"],
    Int[np.ndarray, " gold_rows"] | Bool[np.ndarray, "gold_rows labels"],
]:
    """Rows with known gold and their gold; of the student's table, else of the first that has it."""
    for one in (table, *tables.values()):
        if "gold" in one.column_names:
            given = one.select(measured)["gold"][:]
            rows = measured[np.array([ids is not None for ids in given], dtype=bool)]
            known = one.select(rows)
            read = gold_matrix if labels.multilabel else gold_index
            return rows, read(known, labels)
    return measured[:0], np.zeros(0, dtype=np.int64)


def _lines(
    labels: LabelSpace, share: Float[np.ndarray, " labels"] | Int[np.ndarray, " labels"]
) -> tuple[Int[np.ndarray, " labels"], list[str]]:
    names = names_of(labels)
    if len(labels) <= MOST_LABELS + 1:
        return np.arange(len(labels)), names
    most = np.argsort(-share, kind="stable")[:MOST_LABELS]
    groups = np.full(len(labels), MOST_LABELS)
    groups[most] = np.arange(MOST_LABELS)
    rest = f"{len(labels) - MOST_LABELS:,} other labels"
    return groups, [*(names[label] for label in most), rest]


def names_of(labels: LabelSpace) -> list[str]:
    """Names, with the id where two labels have the same name."""
    times = Counter(labels.names)
    pairs = zip(labels.names, labels.ids, strict=True)
    return [name if times[name] == 1 else f"{name} ({id})" for name, id in pairs]


def gold_lists(run: Run) -> list[list[int]]:
    """The true labels of each row whose gold is known; an empty list: none of them."""
    if run.labels.multilabel:
        return [np.flatnonzero(true).tolist() for true in run.gold]
    return [[true] if true >= 0 else [] for true in run.gold.tolist()]


def _indicator(
    gold: Int[np.ndarray, " rows"] | Bool[np.ndarray, "rows labels"], labels: LabelSpace
) -> Bool[np.ndarray, "rows labels"]:
    return gold if gold.ndim == 2 else gold[:, None] == np.arange(len(labels))


def _dense(run: Run, name: str) -> Float[np.ndarray, "gold_rows labels"]:
    return run.soft[name].probs[run.rows].astype(np.float64).toarray()


def _answer_probs(run: Run, name: str) -> Float[np.ndarray, "gold_rows labels"]:
    """The most probable label of each row is the answer: in a hierarchy nothing else is left."""
    probs = _dense(run, name)
    if name not in run.said:
        return probs
    rows, said = np.arange(len(probs)), run.said[name][run.rows]
    answered = np.zeros_like(probs)
    answered[rows, said] = np.where(said >= 0, probs[rows, said], 0.0)
    return answered


def values_of(table: Dataset, name: str) -> list[Any]:
    """Its values; nulls where there is no such column."""
    return table[name][:] if name in table.column_names else [None] * len(table)


def measure(run: Run, name: str) -> dict[str, Any]:
    """How good the first label and the probabilities of a source are."""
    result: dict[str, Any] = {"before": run.befores.get(name), "gold_rows": len(run.rows)}
    if not len(run.rows):
        return result
    gold = run.gold
    if run.labels.multilabel:
        said = (run.soft[name].probs[run.rows] >= 0.5).toarray()
        return result | {
            "micro_f1": metrics.micro_f1(said, gold),
            "macro_f1": metrics.macro_f1_multilabel(said, gold),
        }
    probs, answered = _dense(run, name), _answer_probs(run, name)
    said = metrics.predicted(answered)
    accuracy = metrics.accuracy(answered, gold)
    low, high = metrics.binomial_interval(round(accuracy * len(gold)), len(gold))
    return result | {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": metrics.macro_f1(said, gold, len(run.labels)),
        "nll": metrics.nll(probs, gold),
        "brier": metrics.brier(probs, gold),
        "ece": metrics.ece(answered, gold),
        "aurc": metrics.aurc(answered.max(axis=1), metrics.correct(answered, gold)),
    }


def coverage(run: Run) -> dict[str, Any] | None:
    """How large the student's sets are, and how many hold the true label; None without sets."""
    if run.sets is None:
        return None
    sizes = np.array([len(ids) for ids in run.sets], dtype=np.int64)
    here = sizes[run.measured]
    result: dict[str, Any] = {
        "target": None if run.conformal is None else 1 - run.conformal.alpha,
        "measured_rows": len(here),
        "sizes": np.bincount(here).tolist(),
        "mean_set_size": float(here.mean()),
        "empty_sets": float((here == 0).mean()),
        "rows_for_a_human": int((here != 1).sum()),
        "all_rows": len(sizes),
        "all_rows_for_a_human": int((sizes != 1).sum()),
    }
    if not run.single_gold:
        return result
    result |= _covered(gold_sets(run), run.gold)
    if isinstance(run.conformal, Conformal):
        result["promised_low"], result["promised_high"] = metrics.promised_coverage(
            calibration_rows=run.conformal.rows, rows=len(run.rows), alpha=run.conformal.alpha
        )
    return result


def gold_sets(run: Run) -> csr_array:
    """The sets of the rows whose gold is known, each label once."""
    sets = [sorted({*run.sets[row]}) for row in run.rows.tolist()] if run.sets is not None else []
    offsets = np.cumsum([0, *map(len, sets)])
    ids = np.array([label for ids in sets for label in ids], dtype=np.int64)
    held = np.ones(len(ids), dtype=bool)
    return csr_array((held, ids, offsets), shape=(len(sets), len(run.labels)))


def _covered(sets: csr_array, gold: Int[np.ndarray, " rows"]) -> dict[str, Any]:
    share = metrics.coverage(sets, gold)
    covered = round(share * len(gold))
    low, high = metrics.binomial_interval(covered, len(gold))
    return {
        "rows": len(gold),
        "covered": covered,
        "coverage": share,
        "coverage_low": low,
        "coverage_high": high,
        "set_size": metrics.set_size(sets),
    }


def answers(run: Run, name: str) -> Int[np.ndarray, " rows"]:
    """The label that a source gives each row of a single-label space; -1 where it gives none."""
    if name in run.said:
        return run.said[name]
    first = run.soft[name].top(1).probs
    said = np.full(first.shape[0], -1)
    said[np.diff(first.indptr) > 0] = first.indices
    return said


def confusion(run: Run, name: str) -> dict[str, Any] | None:
    """Counts of a source's answers (columns) by true label (rows), unlabelled ones included."""
    if not run.single_gold:
        return None
    return confused(run, metrics.predicted(_answer_probs(run, name)), run.gold)


def confused(
    run: Run, said: Int[np.ndarray, " rows"], true: Int[np.ndarray, " rows"]
) -> dict[str, Any]:
    """Counts of answers (columns) by true label (rows), by line; -1 is no label."""
    lines = [*run.lines, NO_LABEL]
    counts = metrics.confusion(run.lines_of(said), run.lines_of(true), len(lines))
    rows, columns = (len(lines) - (not counts[-1].any()), len(lines) - (not counts[:, -1].any()))
    return {
        "gold": lines[:rows],
        "predicted": lines[:columns],
        "counts": counts[:rows, :columns].tolist(),
    }


def label_bias(run: Run) -> dict[str, Any]:
    """Mean share of each label, per source over the measured rows that it labelled, and of gold."""
    result: dict[str, Any] = {"labels": run.lines, "gold": None, "sources": {}}
    if len(run.rows):
        result["gold"] = run.by_line(_indicator(run.gold, run.labels).mean(axis=0))
    for name, soft in run.soft.items():
        probs = soft.probs[run.measured]
        labelled = max(int((np.diff(probs.indptr) > 0).sum()), 1)
        result["sources"][name] = run.by_line(np.asarray(probs.sum(axis=0)) / labelled)
    return result


def curves(run: Run) -> dict[str, Any]:
    """Reliability diagram and risk-coverage curve of the student; None where they have no meaning."""
    if not run.single_gold:
        return {"reliability": None, "risk_coverage": None}
    probs = _answer_probs(run, run.student)
    correct = metrics.correct(probs, run.gold)
    kept, risk = metrics.risk_coverage(probs.max(axis=1), correct)
    some = np.unique(np.linspace(0, len(kept) - 1, MOST_POINTS).round().astype(int))
    mean, share, rows = metrics.reliability(probs, run.gold)
    return {
        "reliability": {"confidence": mean, "correct": share, "rows": rows},
        "risk_coverage": {"kept": kept[some], "risk": risk[some]},
    }


def overlap(run: Run) -> int | None:
    """Number of measured rows whose words also stand in another split, whatever their case."""
    if run.split is None:
        return None
    texts = [plain_words(text) for text in run.table["text"]]
    here = set(run.measured.tolist())
    others = {text for row, text in enumerate(texts) if row not in here}
    return sum(texts[row] in others for row in run.measured)
