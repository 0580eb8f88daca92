"""Who voted for the labels of a table: how often, how far they agree, how reliable each is."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Int

from llmlabel import metrics
from llmlabel.data import with_columns
from llmlabel.label.weak import measure_functions
from llmlabel.refine.annotators import AnnotatorReport, measure_annotators
from llmlabel.refine.votes import FEW, Votes, read_votes
from llmlabel.report.measure import MOST_LABELS, Run, answers, confused, gold_lists

MOST_VOTERS = 20
"""So many voters are shown one by one, those that vote most; the rest is summed."""

MOST_CONFUSIONS = 4
"""So many voters, those furthest from the consensus, have their confusion drawn."""

_COLUMNS = ("id", "votes", "label_ids", "label_probs", "label_space")

_Rows = Int[np.ndarray, " rows"]
_Sources = Int[np.ndarray, " sources"]


@dataclass(frozen=True, eq=False)
class _Cast:
    """The votes in one table."""

    name: str
    """Of the table."""
    rows: _Rows
    """What they are on, as rows of the table."""
    votes: Votes
    counts: _Sources
    """Rows that each voter voted on."""
    agreed: _Sources
    """Its votes for what the table says, the consensus."""
    compared: _Sources
    """Its votes on rows where the table says something."""

    @property
    def order(self) -> _Sources:
        """Voters, those that vote most first; of equal ones by name."""
        order = np.argsort(-self.counts, kind="stable")
        return order[self.counts[order] > 0]

    def consensus(self, at: int) -> float | None:
        """Share of a voter's votes that are for what the table says."""
        return self.agreed[at] / self.compared[at] if self.compared[at] else None

    def furthest(self, among: _Sources) -> list[int]:
        """Those of several votes that differ from what the table says, most often first."""
        differ = among[(self.counts[among] >= FEW) & (self.agreed[among] < self.compared[among])]
        share = self.agreed[differ] / self.compared[differ]
        return differ[np.argsort(share, kind="stable")].tolist()


def who_voted(run: Run) -> dict[str, Any] | None:
    """The voters of the student's table, else of each other one; None where no table has several.

    Where no measured row has votes, those of all rows are taken, without gold. A table with the same
    votes as one before it is left out. A multi-label space has no single answers that could agree or
    be mistaken for each other, so there agreement, reliability and confusion are left out.

    Raises:
        ValueError: A vote is broken; the table is named.
    """
    found: dict[str, Any] = {}
    seen: list[Votes] = []
    for name in (run.student, *(name for name in run.tables if name != run.student)):
        rows, votes = _read(run, name)
        if votes is None or any(_same(votes, other) for other in seen):
            continue
        seen.append(votes)
        found[name] = _measure(run, _counted(run, name, rows, votes))
        if name == run.student:
            break
    return found or None


def _read(run: Run, name: str) -> tuple[_Rows, Votes | None]:
    """The votes in a table and the rows that they are on; None where not several voters voted."""
    table = _columns(run, name)
    if "votes" not in table.column_names:
        return run.measured, None
    for rows in (run.measured, np.arange(len(table))):
        try:
            votes = read_votes(table.select(rows), run.labels)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from None
        if run.labels.multilabel:  # a label below 0.5 is none
            row, source, label, prob = (
                of[votes.prob >= 0.5] for of in (votes.row, votes.source, votes.label, votes.prob)
            )
            votes = replace(votes, row=row, source=source, label=label, prob=prob)
        if len(votes.row):
            break
    return rows, votes if len(np.unique(votes.source)) > 1 else None


def _columns(run: Run, name: str) -> Dataset:
    table = run.tables[name]
    return table.select_columns([one for one in _COLUMNS if one in table.column_names])


def _same(one: Votes, other: Votes) -> bool:
    return one.names == other.names and all(
        np.array_equal(getattr(one, part), getattr(other, part))
        for part in ("row", "source", "label", "prob")
    )


def _counted(run: Run, name: str, rows: _Rows, votes: Votes) -> _Cast:
    sources, counts = len(votes.names), votes.source[votes.first()]
    if run.labels.multilabel:
        row, source, label = votes.row, votes.source, votes.label
        probs = run.soft[name].probs[rows]
        agreed = np.asarray(probs[row, label]).ravel() >= 0.5
        compared = (np.diff(probs.indptr) > 0)[row]
    else:
        hard, said = votes.hard(), answers(run, name)[rows]
        row, source, label = hard.row, hard.source, hard.label
        agreed, compared = said[row] == label, said[row] >= 0
    return _Cast(
        *(name, rows, votes),
        *(np.bincount(of, minlength=sources) for of in (counts, source[agreed], source[compared])),
    )


def _measure(run: Run, cast: _Cast) -> dict[str, Any]:
    votes, order = cast.votes, cast.order
    table = _columns(run, cast.name).select(cast.rows)
    table = with_columns(table, {"gold": (_gold(run, cast.rows), List(Value("int32")))})
    functions = measure_functions(table, run.labels)["functions"]
    for one in functions.values():
        del one["labels"]  # of a large space very many
    report = None if run.labels.multilabel else measure_annotators(table, run.labels)
    shown, rest = order[:MOST_VOTERS], order[MOST_VOTERS:]
    voted = int(votes.voted.sum())
    result: dict[str, Any] = {
        "rows": len(cast.rows),
        "all_rows": len(cast.rows) != len(run.measured),
        "rows_with_votes": voted,
        "votes": int(cast.counts.sum()),
        "voters": len(order),
        "krippendorff": None if report is None else report.agreement,
        "identical": [
            {"voters": group, "votes": int(cast.counts[votes.names.index(group[0])])}
            for group in votes.identical()
        ],
        "shown": {},
        "others": None,
    }
    for at in shown.tolist():
        name, count = votes.names[at], int(cast.counts[at])
        result["shown"][name] = {
            **{"votes": count, "abstentions": voted - count, **functions[name]},
            **{"consensus": cast.consensus(at), **_reliability(report, at, functions[name])},
        }
    if len(rest):
        result["others"] = _together(cast, rest, functions, report)
    if report is None:
        return result
    result["pairs"] = _pairs(votes.hard(), shown)
    if len(run.labels) <= MOST_LABELS:
        for at in shown.tolist():
            result["shown"][votes.names[at]]["confusion"] = report.annotators[at].confusion
        result["confusions"] = _confusions(run, cast, shown)
    return result


def _gold(run: Run, rows: _Rows) -> list[list[int] | None]:
    """The gold that the report has, which is of measured rows only."""
    of = dict(zip(run.rows.tolist(), gold_lists(run), strict=True))
    return [of.get(row) for row in rows.tolist()]


def _reliability(
    report: AnnotatorReport | None, at: int, function: dict[str, Any]
) -> dict[str, Any]:
    if report is None:
        return {}
    of, judged = report.annotators[at], function["gold_votes"]
    low, high = None, None
    if judged:
        low, high = metrics.binomial_interval(round(function["accuracy"] * judged), judged)
    return {
        **{"agreement": of.agreement, "reliability": of.accuracy, "only_label": of.only_label},
        **{"accuracy_low": low, "accuracy_high": high},
    }


def _together(
    cast: _Cast, rest: _Sources, functions: dict[str, Any], report: AnnotatorReport | None
) -> dict[str, Any]:
    """All votes of the voters that are not shown, and who of them differs most."""
    names, weights = cast.votes.names, cast.counts[rest]
    judged = sum(functions[names[at]]["gold_votes"] for at in rest)
    right = sum(
        round(one["accuracy"] * one["gold_votes"])
        for one in (functions[names[at]] for at in rest)
        if one["gold_votes"]
    )
    agreed, compared = cast.agreed[rest].sum(), cast.compared[rest].sum()
    result = {
        "voters": len(rest),
        "votes": int(weights.sum()),
        "median_votes": float(np.median(weights)),
        "consensus": agreed / compared if compared else None,
        "gold_votes": judged,
        "accuracy": right / judged if judged else None,
        "furthest": {
            names[at]: {"votes": int(cast.counts[at]), "consensus": cast.consensus(at)}
            for at in cast.furthest(rest)[:MOST_CONFUSIONS]
        },
    }
    if report is not None:
        reliability = [report.annotators[at].accuracy for at in rest]
        result["reliability"] = float(np.average(reliability, weights=weights))
    return result


def _pairs(votes: Votes, shown: _Sources) -> dict[str, Any]:
    """Rows that two voters both voted on, and the share on which they voted alike."""
    said = np.full((len(shown), votes.rows), -1, dtype=np.int32)
    place = np.full(len(votes.names), -1)
    place[shown] = np.arange(len(shown))
    kept = place[votes.source] >= 0
    said[place[votes.source[kept]], votes.row[kept]] = votes.label[kept]
    both = np.array([((said >= 0) & (one >= 0)).sum(axis=1) for one in said])
    alike = np.array([((said == one) & (one >= 0)).sum(axis=1) for one in said])
    with np.errstate(invalid="ignore"):  # no common row: NaN, in JSON null
        shares = alike / both
    return {"voters": [votes.names[at] for at in shown], "rows": both, "agreement": shares}


def _confusions(run: Run, cast: _Cast, shown: _Sources) -> dict[str, Any]:
    """Answers by true label, or where no gold is known by consensus, of who differs most from it."""
    votes = cast.votes.hard()
    gold = np.full(len(run.table), -1)
    gold[run.rows] = run.gold
    known = np.zeros(len(run.table), dtype=bool)
    known[run.rows] = True
    said = answers(run, cast.name)
    several = shown[votes.only_label()[shown] < 0]
    found = {}
    for at in cast.furthest(several)[:MOST_CONFUSIONS]:
        of = votes.source == at
        rows, label = cast.rows[votes.row[of]], votes.label[of]
        judged = known[rows] if known[rows].any() else said[rows] >= 0
        true = gold if known[rows].any() else said
        found[votes.names[at]] = {
            "against": "gold" if known[rows].any() else "consensus",
            **confused(run, label[judged], true[rows[judged]]),
        }
    return found
