"""The section of a report on rankings: whether true labels come first, and if rare ones do too."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from llmlabel.data import label_csr, with_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics.ranking import counted, measure_ranking, ranking_by_frequency
from llmlabel.report.measure import Run, gold_lists
from llmlabel.report.plots import ACCENT, INK, MUTED, RULE, drawables, percent_axis, svg
from llmlabel.report.template import percent

KS = (1, 3, 5)
"""So many of the first labels of a row are looked at; the last of them for the tenths of labels."""

MAIN = ("P@1", f"P@{KS[-1]}", f"nDCG@{KS[-1]}", f"PSP@{KS[-1]}", "R@stored")
"""What a summary says of the student."""

_READ = ("id", "label_ids", "label_probs", "label_space", "excluded_ids")

_DASHES = ((), (5, 2), (1, 1.5), (7, 2, 1, 2))
_MARKERS = "osD^vP"


def ranking(run: Run, training: Dataset | None) -> dict[str, Any] | None:
    """`measure_ranking` of every source, and the recall of labels by how often `training` has them.

    Groups of `frequency_groups` without a label are left out; without gold to measure, all numbers.
    """
    if training is None:
        return None
    try:
        known = with_gold(training)
        learned = label_csr(known, run.labels)
    except ValueError as error:
        raise ValueError(f"training: {error}") from None
    if not len(known):
        raise ValueError(
            "training: no row has known gold; give the rows that models learned from, or leave it out"
        )
    counts = np.bincount(learned.indices, minlength=len(run.labels))
    result: dict[str, Any] = {
        **{"k": KS[-1], "training_rows": len(known), "never_seen": int((counts == 0).sum())},
        **{"sources": {}, "tenths": []},
    }
    if not len(run.rows):
        return result
    tables = {name: _measured(run, table) for name, table in run.tables.items()}
    for name, numbers in measure_ranking(tables, run.labels, training=known, ks=KS).items():
        result["sources"][name] = {key: one for key, one in numbers.items() if key != "rows"}
    result["tenths"] = _tenths(tables, run.labels, counts)
    return result


def _measured(run: Run, table: Dataset) -> Dataset:
    """The rows that are measured, whose gold may stand in the table of another source."""
    columns = [name for name in _READ if name in table.column_names]
    rows = table.select_columns(columns).select(run.rows)
    return with_columns(rows, {"gold": (gold_lists(run), List(Value("int32")))})


def _tenths(
    tables: dict[str, Dataset], labels: LabelSpace, counts: np.ndarray
) -> list[dict[str, Any]]:
    tenths: list[dict[str, Any]] = []
    for name, table in tables.items():
        gold, scores = label_csr(table, labels), counted(table, labels)
        lines = ranking_by_frequency(scores, gold, counts, k=KS[-1])
        tenths = tenths or [
            {key: line[key] for key in ("group", "labels", "least", "most", "gold")}
            | {"sources": {}}
            for line in lines
        ]
        for tenth, line in zip(tenths, lines, strict=True):
            tenth["sources"][name] = {
                key: line[key] for key in ("hits", f"P@{KS[-1]}", f"R@{KS[-1]}")
            }
    return [tenth for tenth in tenths if tenth["labels"]]


def occurrences(tenth: dict[str, Any]) -> str:
    """How many training rows a label of the tenth has."""
    if tenth["group"] == "zero-shot":
        return "none"
    least, most = f"{tenth['least']:,}", f"{tenth['most']:,}"
    return least if least == most else f"{most} to {least}"


def figures(run: Run, found: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """A line for each source over the tenths of labels; sources before bias correction have none."""
    if found is None or not found["tenths"]:
        return {}
    names = [name for name in run.tables if name not in run.befores.values()] or list(run.tables)
    tenths, recall = found["tenths"], f"R@{found['k']}"
    shares = {
        name: [one["sources"][name][recall] if one["gold"] else np.nan for one in tenths]
        for name in names
    }
    said = [
        f"{name}: {', '.join(percent(share) for share in line)}" for name, line in shares.items()
    ]
    groups = [occurrences(tenth) for tenth in tenths]
    return {
        "ranking": {
            "src": by_frequency(
                shares,
                groups,
                accent=run.student,
                quantity=f"true labels among the first {found['k']}",
            ),
            "alt": f"{recall} by training rows of a label, {'; '.join(groups)}. {'; '.join(said)}.",
            "wide": True,
        }
    }


def by_frequency(
    shares: dict[str, list[float]], groups: Sequence[str], *, accent: str, quantity: str
) -> str:
    """A line for each name over the groups, the last apart where it is "none"; NaN is not drawn."""
    unseen = groups[-1] == "none"
    at = np.arange(len(groups)) + np.where(np.arange(len(groups)) == len(groups) - 1, 0.3, 0)
    height = 2.6 + 0.1 * max(len(shares), 6)
    top = 1.08 * max(0.05, np.nanmax([*shares.values(), [0.0] * len(groups)]))

    def draw(axes: Any) -> None:
        seen = len(groups) - unseen
        if unseen and seen:
            axes.axvline(at[seen] - 0.65, color=RULE, linewidth=1.0)
        ends = _spread([_last(line) for line in shares.values()], 0.2 * top / (height - 1), top)
        for number, (name, line) in enumerate(shares.items()):
            main = name == accent
            look = {
                "color": ACCENT if main else (INK, MUTED)[number % 2],
                "marker": "o" if main else _MARKERS[number % len(_MARKERS)],
                "markersize": 5 if main else 3.8,
                "linewidth": 2 if main else 1.1,
                "zorder": 3 if main else 2,
                "clip_on": False,
            }
            dashes = (None, None) if main else _DASHES[number % len(_DASHES)] or (None, None)
            axes.plot(at[:seen], line[:seen], dashes=dashes, **look)
            axes.plot(at[seen:], line[seen:], **look)
            axes.annotate(
                drawables(list(shares), "source")[number],
                (at[-1], _last(line)),
                (at[-1] + 0.45, ends[number]),
                va="center",
                color=look["color"],
                weight="bold" if main else "normal",
                arrowprops={"arrowstyle": "-", "color": look["color"], "lw": 0.5, "shrinkB": 4},
                annotation_clip=False,
            )
        axes.set(xlim=(-0.3, at[-1] + 0.15), ylim=(0, top), ylabel=quantity)
        axes.set_xticks(at, [group.replace(" to ", "\nto ") for group in groups])
        axes.set_xlabel("training rows of a label")
        axes.grid(visible=True, axis="y")
        percent_axis(axes.yaxis)

    return svg(draw, width=8.2, height=height)


def _last(line: list[float]) -> float:
    known = [share for share in line if not np.isnan(share)]
    return known[-1] if known else 0.0


def _spread(values: list[float], gap: float, top: float) -> list[float]:
    """Where names stand beside the values, as near as they can without covering each other."""
    order, places = np.argsort(values, kind="stable").tolist(), list(values)
    for low, high in zip(order, order[1:], strict=False):
        places[high] = max(places[high], places[low] + gap)
    above = top + gap
    for one in reversed(order):
        places[one] = above = min(places[one], above - gap)
    return places
