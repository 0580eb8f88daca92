"""The section of a report on prediction sets: who is missed, and what their promise rests on."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int

from llmlabel import metrics
from llmlabel.calibrate.conformal import Conformal, calibration_rows
from llmlabel.calibrate.diagnostics import (
    Cell,
    Slice,
    confidence_groups,
    coverage_cells,
    size_groups,
)
from llmlabel.calibrate.drift import Drift
from llmlabel.calibrate.exchangeability import Exchangeability, permutation_test
from llmlabel.calibrate.groups import GroupConformal
from llmlabel.calibrate.noise import NoisyConformal
from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.scores import Score, true_scores
from llmlabel.labelspace import LabelSpace
from llmlabel.report import measure
from llmlabel.report.measure import MOST_LABELS, NO_LABEL, Run, values_of
from llmlabel.report.plots import ACCENT, INK, MUTED, RULE, drawables, svg, wealth, windows

FEW = 20
"""With fewer rows nothing is compared."""

_LONG = ("scores", "row_marks", "prior", "thresholds")
"""One value a row or a label."""

_BETS = {"probability": "largest probability", "true_score": "score of true label"}


def prediction_sets(run: Run) -> dict[str, Any] | None:
    """`measure.coverage`, who is missed behind the average, and what the promise rests on."""
    result = measure.coverage(run)
    if result is None:
        return None
    if run.conformal is not None:
        result["promise"] = _promise(run, run.conformal)
    if not run.single_gold:
        return result
    sets = measure.gold_sets(run)
    inside, sizes = metrics.covered(sets, run.gold), metrics.set_sizes(sets).astype(np.int64)
    probs = run.soft[run.student].probs[run.rows]
    top = probs.max(axis=1).toarray().ravel().astype(np.float64)
    groupings: dict[str, tuple[Sequence[str], Int[np.ndarray, " rows"]]] = {
        "classes": ([*run.lines, NO_LABEL], run.lines_of(run.gold)),
        "by_size": size_groups(sizes),
        "by_confidence": confidence_groups(top),
    }
    for key, (names, group) in groupings.items():
        cells = coverage_cells(names, group, inside, sizes, target=result["target"])
        result[key] = {cell.group: _row(cell) for cell in cells}
    if (run.gold >= 0).any():
        result["macro_coverage"] = metrics.macro_coverage(sets, run.gold)
        result["share_below_half"] = metrics.share_below(sets, run.gold)
    return result


def monitored(
    sets: dict[str, Any] | None,
    labels: LabelSpace,
    *,
    slices: tuple[Slice, ...] | None,
    drift: Drift | None,
    shift: Exchangeability | None,
) -> dict[str, Any] | None:
    """`prediction_sets` and what was found of rows that break the promise; only what is given."""
    given = {"slices": slices, "drift": drift, "shift": shift}
    names = [name for name, one in given.items() if one is not None]
    if sets is None and names:
        raise ValueError(
            f"{', '.join(names)}: the student has no prediction sets to show this with (column "
            "set_ids); predict them, or leave it out"
        )
    for name, one in (("drift", drift), ("shift", shift)):
        if one is not None and one.label_space != labels.fingerprint:
            raise ValueError(
                f"{name} is of label space {one.label_space}, the labels given are "
                f"{labels.fingerprint}; monitor rows of this label space"
            )
    found = dict(sets or {})
    if slices is not None:
        found["slices"] = [
            {"column": one.column, "value": one.value}
            | {"found": _row(one.found), "measured": _row(one.measured)}
            for one in slices
        ]
    if drift is not None:
        stretches = [{"number": at, **asdict(one)} for at, one in enumerate(drift.windows, start=1)]
        found["drift"] = asdict(drift) | {
            "windows": stretches,
            "drifted": drift.drifted,
            "wealth_of_alarm": math.log10(2 * len(drift.wealth) / drift.level),
        }
    if shift is not None:
        found["shift"] = asdict(shift) | {"shifted": shift.shifted}
    return None if sets is None else found


def fitted(conformal: Conformal | GroupConformal | NoisyConformal) -> dict[str, Any]:
    """How the sets were made, without what is as long as the data."""
    fields = asdict(conformal)
    fields |= fields.pop("how", {})
    if callable(score := fields["score"]):
        fields["score"] = f"{score.__module__}.{score.__qualname__}"
    return {key: value for key, value in fields.items() if key not in _LONG}


def figures(sets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dots of each grouping: name -> data URI and the same in words."""
    said = {"classes": "label", "by_size": "size of the set", "by_confidence": "confidence"}
    found = {}
    for key, of in said.items():
        if rows := sets.get(key):
            words = "; ".join(
                f"{name} {100 * row['coverage']:.1f} % of {row['rows']}"
                + (", surely below the target" if row["below"] else "")
                for name, row in rows.items()
            )
            found[f"coverage {key}"] = {
                "src": dots(rows, target=sets["target"]),
                "alt": f"Coverage by {of}: {words}.",
            }
    return found | _slice_figure(sets) | _drift_figures(sets.get("drift"))


def _slice_figure(sets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not sets.get("slices"):
        return {}
    rows = {f"{one['column']}={one['value']}": one["measured"] for one in sets["slices"]}
    words = "; ".join(f"{name} {100 * row['coverage']:.1f} %" for name, row in rows.items())
    source = dots(rows, target=sets["target"])
    return {"worst slices": {"src": source, "alt": f"Measured coverage of slices: {words}."}}


def _drift_figures(drift: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The windows in their order, and what each bet made at most."""
    if drift is None:
        return {}
    seen, found = drift["windows"], {}
    alarms = [one["alarm"] for one in seen]
    numbers = ", ".join(str(one["number"]) for one in seen if one["alarm"]) or "none"
    for key, quantity, level in (
        ("small_p_values", "share of small p-values", drift["alpha"]),
        ("mean_set_size", "mean set size", None),
    ):
        values = [one[key] for one in seen]
        if None not in values:
            found[f"drift {key}"] = {
                "src": windows(values, alarms, quantity=quantity, expected=level),
                "alt": f"{quantity} in {len(seen)} windows: {min(values):.3g} to "
                f"{max(values):.3g}; windows with an alarm: {numbers}.",
            }
    bets = {_BETS.get(name, name): value for name, value in drift["wealth"].items()}
    found["drift wealth"] = {
        "src": wealth(bets, alarm=drift["wealth_of_alarm"]),
        "alt": "The most that a bet made of 1, as a power of ten: "
        + "; ".join(f"{name} {value:.2f}" for name, value in bets.items())
        + f"; an alarm at {drift['wealth_of_alarm']:.2f}.",
    }
    return found


def dots(rows: dict[str, dict[str, Any]], *, target: float | None) -> str:
    """A line for each group: coverage with its interval; a diamond where it is surely too low."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        lowest = min(row["coverage_low"] for row in rows.values())
        axes.set_xlim(math.floor(lowest * 10) / 10, 1.0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        if target is not None:
            axes.axvline(target, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        aside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        for y, row in enumerate(rows.values()):
            color, low, high = ACCENT, row["coverage_low"], row["coverage_high"]
            axes.axhline(y, color=RULE, linewidth=0.6, zorder=0)
            axes.hlines(y, low, high, color=color, linewidth=1.6, alpha=0.45)
            look: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markerfacecolor": color}
            if row["below"]:
                look = {"marker": "D", "markersize": 7, "markerfacecolor": "white"}
            axes.plot(
                row["coverage"], y, markeredgecolor=color, clip_on=False, linestyle="", **look
            )
            weight, ink = ("bold", INK) if row["below"] else ("normal", MUTED)
            number = f"{row['rows']:,}"
            axes.annotate(number, (1, y), (10, 0), va="center", color=ink, weight=weight, **aside)
        axes.annotate("rows", (1, -0.6), (10, 3), va="bottom", color=MUTED, fontsize=7.5, **aside)
        axes.set_yticks(range(len(rows)), drawables(list(rows)))
        axes.tick_params(axis="y", length=0, pad=8, labelcolor=INK)
        axes.spines[["left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
        axes.set_xlabel("rows whose set holds the true label")

    return svg(draw, width=4.0, height=0.75 + 0.25 * len(rows))


def _row(cell: Cell) -> dict[str, Any]:
    return {
        **{"rows": cell.rows, "covered": cell.covered, "coverage": cell.coverage},
        **{"coverage_low": cell.low, "coverage_high": cell.high},
        **{"set_size": cell.set_size, "below": cell.below},
    }


def _promise(run: Run, conformal: Conformal | GroupConformal | NoisyConformal) -> dict[str, Any]:
    """What breaks it or bounds it, as far as the report can see."""
    if isinstance(conformal, GroupConformal):
        names = dict(zip(run.labels.ids, measure.names_of(run.labels), strict=True))
        without = [one for one in conformal.thresholds if not one.guaranteed]
        return {
            "groups": len(conformal.thresholds),
            "column": conformal.column,
            "without": {
                names.get(one.group, one.group) if conformal.column is None else one.group: {
                    "rows": one.rows,
                    "level": one.level,
                }
                for one in without[:MOST_LABELS]
            },
            "without_guarantee": len(without),
            "levels": dict(Counter(one.level for one in without)),
            "every_label": sum(math.isinf(one.value) for one in conformal.thresholds),
        }
    if isinstance(conformal, NoisyConformal):
        return {
            "wrong": conformal.wrong,
            "pseudo_rows": conformal.rows,
            "noise_rows": conformal.gold_rows,
            "delta": conformal.delta,
            "corrected": {
                **{"threshold": conformal.threshold, "coverage": conformal.coverage},
                "guaranteed": conformal.guaranteed,
            },
            "plain": {
                **{"threshold": conformal.plain_threshold, "coverage": conformal.plain_coverage},
                "guaranteed": conformal.plain_guaranteed,
            },
        }
    engines = sorted({one for one in values_of(run.table, "engine") if one is not None})
    there = set(np.flatnonzero(calibration_rows(run.table, conformal)).tolist())
    return {
        "calibration_rows": conformal.rows,
        "trained_on": conformal.training_overlap,
        "measured_fitted_on": len(there & set(run.measured.tolist())),
        "every_label": math.isinf(conformal.threshold),
        "recall": conformal.recall,
        "engines": list(conformal.engines),
        "other_engines": [one for one in engines if one not in conformal.engines]
        if conformal.engines
        else [],
        "shift": _shift(run, conformal, there),
    }


def _shift(run: Run, conformal: Conformal, fitted_on: set[int]) -> dict[str, Any] | None:
    """Whether true labels conform here as on the gold rows; None where that cannot be told."""
    if conformal.scores is None or conformal.score not in get_args(Score) or not run.single_gold:
        return None
    kept = np.array([row not in fitted_on for row in run.rows.tolist()], dtype=bool)
    if min(int(kept.sum()), len(conformal.scores)) < FEW:
        return None
    rows = run.rows[kept]
    ids = run.table["id"][:]
    draws = row_uniforms((ids[row] for row in rows.tolist()), seed=conformal.seed)
    probs = run.soft[run.student].probs[rows]
    scores: Float[np.ndarray, " rows"] = true_scores(probs, run.gold[kept], conformal.how(), draws)
    distance, p_value = permutation_test(np.array(conformal.scores), scores)
    return {"rows": len(rows), "distance": distance, "p_value": p_value}
