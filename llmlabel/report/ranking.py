"""The section of a report on rankings: whether true labels come first, and if rare ones do too."""

import itertools
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

FEW = 20
"""A group with fewer true labels in the measured rows is not drawn."""

NEVER = "none"

_WIDTH = 8.2
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "sD^vPX"


def rankings(run: Run, training: Dataset | None) -> dict[str, Any] | None:
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
        return NEVER
    least, most = f"{tenth['least']:,}", f"{tenth['most']:,}"
    return least if least == most else f"{most} to {least}"


def figures(run: Run, found: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """A line for each source over the tenths of labels; sources before bias correction have none."""
    tenths = [tenth for tenth in found["tenths"] if tenth["gold"] >= FEW] if found else []
    groups = [occurrences(tenth) for tenth in tenths]
    if found is None or groups in ([], [NEVER]):
        return {}
    names = [name for name in run.tables if name not in run.befores.values()] or list(run.tables)
    recall = f"R@{found['k']}"
    shares = {name: [one["sources"][name][recall] for one in tenths] for name in names}
    said = [f"{name} {', '.join(map(percent, line))}" for name, line in shares.items()]
    quantity = f"true labels among the first {found['k']}"
    return {
        "ranking": {
            "src": by_frequency(shares, groups, accent=run.student, quantity=quantity),
            "alt": f"{recall} by training rows of a label ({', '.join(groups)}): {'; '.join(said)}.",
            "wide": True,
        }
    }


def by_frequency(
    shares: dict[str, list[float]], groups: Sequence[str], *, accent: str, quantity: str
) -> str:
    """A line for each name over the groups, and dots for `NEVER`, which is the last where it is there."""
    names, seen = drawables(list(shares), "source"), len(groups) - (NEVER in groups)
    height, beside = 2.3 + 0.16 * max(len(names), 6), 0.5 + 0.08 * max(map(len, names))
    unit = (_WIDTH - 0.8 - beside) / (len(groups) + 0.5)  # inches from one group to the next
    at = np.arange(len(groups)) + np.where(np.arange(len(groups)) == seen, beside / unit - 0.2, 0.0)
    top = 1.08 * max(0.05, *itertools.chain(*shares.values()))
    places = _spread([line[seen - 1] for line in shares.values()], 0.17 * top / (height - 0.9), top)

    def draw(axes: Any) -> None:
        axes.set(xlim=(-0.3, at[0] + (len(groups) - 0.5) + beside / unit), ylim=(0, top))
        axes.set_ylabel(quantity)
        percent_axis(axes.yaxis)
        sides = [(-0.3, seen - 0.7), (at[-1] - 0.5, at[-1] + 0.5)]
        for left, right in sides[: 1 + (seen < len(groups))]:
            axes.hlines(axes.get_yticks(), left, right, color=RULE, linewidth=0.6, zorder=0)
        for number, (name, line) in enumerate(shares.items()):
            main = name == accent
            look = {"color": ACCENT if main else (INK, MUTED)[number % 2], "zorder": 2 + main}
            marker = "o" if main else _MARKERS[number % len(_MARKERS)]
            look |= {"marker": marker, "markersize": 5 if main else 3.8}
            dashes = "-" if main else _DASHES[number % len(_DASHES)]
            axes.plot(at[:seen], line[:seen], dashes, lw=2 if main else 1.1, **look)
            if seen < len(groups):
                aside = 0.8 * ((number + 0.5) / len(names) - 0.5)  # else one dot hides the others
                axes.plot(at[seen] + aside, line[seen], clip_on=False, **look)
            axes.annotate(
                names[number],
                (seen - 1, line[seen - 1]),
                (seen - 1 + 0.35 / unit, places[number]),
                va="center",
                color=look["color"],
                weight="bold" if main else "normal",
                arrowprops={"arrowstyle": "-", "color": look["color"], "lw": 0.5, "shrinkB": 4},
            )
        axes.set_xticks(at, [group.replace(" to ", "\nto ") for group in groups])
        axes.set_xlabel("training rows of a label", loc="left")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)

    return svg(draw, width=_WIDTH, height=height)


def _spread(values: list[float], gap: float, top: float) -> list[float]:
    """Where names stand beside the values, around them, without covering each other."""
    order = np.argsort(values, kind="stable")
    steps, wanted = gap * np.arange(len(values)), np.array(values)[order]
    up = np.maximum.accumulate(wanted - steps)
    down = np.minimum.accumulate((wanted - steps)[::-1])[::-1]
    places = np.empty(len(values))
    places[order] = np.clip((up + down) / 2, 0, top - steps[-1]) + steps
    return places.tolist()
