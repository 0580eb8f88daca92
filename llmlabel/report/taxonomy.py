"""What a report says about a label space itself: its tree, what each level costs, how it was found."""

from typing import Any

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array

from llmlabel import metrics
from llmlabel.labelspace import LabelSpace, graph
from llmlabel.report.measure import Run, values_of
from llmlabel.taxonomy.induce import Taxonomy

Counts = Int[np.ndarray, " labels"]
Cells = Int[np.ndarray, " cells"]


def hierarchy(run: Run) -> dict[str, Any] | None:
    """Partly right answers of every source, and the rows at or below each label; None if flat."""
    labels = run.labels
    if labels.is_flat:
        return None
    result: dict[str, Any] = {
        "roots": len(labels.roots),
        "leaves": len(labels.leaves),
        "levels": int(graph.depths(labels).max()) + 1,
        "sources": {name: _scores(run, name) for name in run.tables},
        "rows": _by_id(run, rows_below(labels, *_answered(run))),
        "gold": None,
    }
    if len(run.rows):
        result["gold"] = _by_id(run, rows_below(labels, *_gold(run)))
    return result


def _scores(run: Run, name: str) -> dict[str, Any]:
    if run.labels.multilabel:
        return {}
    said = run.said[name][run.measured]
    inner = np.array([bool(below) for below in run.labels.children])
    answered = said[said >= 0]
    result: dict[str, Any] = {
        "at_a_leaf": float((~inner[answered]).mean()) if len(answered) else None
    }
    if not run.single_gold:
        return result
    said, gold = run.said[name][run.rows], run.gold
    scores = metrics.hierarchical_scores(said, gold, run.labels)
    errors = {
        name: metrics.tree_induced_error(said, gold, run.labels, power=power)
        for name, power in (("tree_induced_error", 1), ("squared_tree_error", 2))
    }
    return result | scores | errors


def _answered(run: Run) -> tuple[Cells, Cells]:
    """Row and label of every answer of the student on the measured rows."""
    if run.labels.multilabel:
        probs = run.soft[run.student].probs[run.measured].tocoo()
        sure = probs.data >= 0.5
        return probs.row[sure], probs.col[sure]
    said = run.said[run.student][run.measured]
    return np.flatnonzero(said >= 0), said[said >= 0]


def _gold(run: Run) -> tuple[Cells, Cells]:
    if run.labels.multilabel:
        rows, labels = np.nonzero(run.gold)
        return rows, labels
    return np.flatnonzero(run.gold >= 0), run.gold[run.gold >= 0]


def rows_below(labels: LabelSpace, rows: Cells, answered: Cells) -> Counts:
    """Number of rows with each label or one below it; a row counts once.

    Args:
        labels: the hierarchy.
        rows: the row of each answer, which may have several.
        answered: its label.
    """
    _, rows = np.unique(rows, return_inverse=True)
    shape = len(rows), len(labels)  # at most so many rows
    said = csr_array((np.ones(len(rows), dtype=np.int32), (rows, answered)), shape=shape)
    above = said @ graph.closure(labels).astype(
        np.int32
    )  # each cell once, however often it is said
    return np.bincount(above.indices, minlength=len(labels))


def _by_id(run: Run, counts: Counts) -> dict[str, int]:
    return {run.labels.ids[at]: int(counts[at]) for at in np.flatnonzero(counts)}


def costs(run: Run, sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Prompts and prompt tokens a measured row of each source that counted them; None without any.

    Args:
        run: The tables.
        sources: How good each source is.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, table in run.tables.items():
        rows = run.measured
        counted = {
            what: np.array([np.nan if n is None else n for n in values_of(table, what)], float)[
                rows
            ]
            for what in ("calls", "prompt_tokens")
        }
        if not np.isfinite(counted["calls"]).any():
            continue
        found[name] = {what: _mean(numbers) for what, numbers in counted.items()} | {
            "rows": len(rows),
            **{key: n for key, n in sources[name].items() if key.startswith(("accuracy", "micro"))},
        }
    return found or None


def _mean(numbers: np.ndarray) -> float | None:
    known = numbers[np.isfinite(numbers)]
    return float(known.mean()) if len(known) else None


def rounds(taxonomy: Taxonomy | list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The history of a taxonomy that was induced."""
    return taxonomy.history if isinstance(taxonomy, Taxonomy) else taxonomy


def score_series(history: list[dict[str, Any]]) -> list[list[float]]:
    """The scores of each run of each group, in order, where there are at least two."""
    series: dict[tuple[Any, ...], list[float]] = {}
    for entry in history:
        if entry["step"] != "select" and entry["score"] is not None:
            key = entry["level"], entry["parent"], entry["run"]
            series.setdefault(key, []).append(float(entry["score"]))
    return [scores for scores in series.values() if len(scores) > 1]
