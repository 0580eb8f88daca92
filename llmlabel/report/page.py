"""The web page of a report: figures and tables of its numbers, in one file without scripts."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmlabel.labelspace.show import tree_html
from llmlabel.refine.votes import FEW
from llmlabel.report import matrices, plots, ranking
from llmlabel.report import sets as prediction_sets
from llmlabel.report.measure import Run, names_of
from llmlabel.report.taxonomy import score_series
from llmlabel.report.template import environment, percent

MOST_MESSAGES = 20
MOST_LISTED_LABELS = 200
MOST_ROUNDS = 200
MOST_PAIRS = 5
MOST_NAMES = 8
CELL_CHARACTERS = 300

_COLUMNS = {
    "accuracy": ("accuracy", True),
    "micro_f1": ("micro F1", True),
    "macro_f1": ("macro F1", True),
    "nll": ("NLL", False),
    "brier": ("Brier", False),
    "ece": ("ECE", False),
    "aurc": ("AURC", False),
}
"""Key -> name, and whether it is a share of which more is better."""


def render(
    run: Run,
    report: dict[str, Any],
    review: list[dict[str, Any]],
    suspicious: list[dict[str, Any]],
    *,
    title: str,
) -> str:
    """The page as text; all but the run holds plain JSON values."""
    bias = report["label_bias"]
    provenance = report["provenance"]
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            student=run.student,
            multilabel=run.labels.multilabel,
            headline=_headline(run, report),
            key=_key_facts(run, report),
            all_rows=len(run.table),
            labels=len(run.labels),
            rows=len(run.measured),
            split=run.split,
            gold_rows=len(run.rows),
            befores=run.befores,
            columns={
                key: _COLUMNS[key] for key in _COLUMNS if key in report["sources"][run.student]
            },
            left_out=run.left_out,
            lines_shown=len(run.lines) - 1,
            line_names=bias["labels"],
            errors=_errors(report),
            most_messages=MOST_MESSAGES,
            label_list=provenance["labels"][:MOST_LISTED_LABELS],
            labels_left_out=max(0, len(run.labels) - MOST_LISTED_LABELS),
            card=list(_flat(provenance["model_card"] or {})),
            hierarchy=report.get("hierarchy"),
            tree=_tree(run, report),
            costs=report.get("costs"),
            ranking=report.get("ranking"),
            occurrences=ranking.occurrences,
            few_true=ranking.FEW,
            voters=report.get("voters"),
            few=FEW,
            few_compared=prediction_sets.FEW,
            between=_between,
            disagreements=disagreements,
            most_names=MOST_NAMES,
            label_names=dict(zip(run.labels.ids, names_of(run.labels), strict=True)),
            memorised=report.get("memorised"),
            suspicious=suspicious,
            rounds=report.get("taxonomy"),
            most_rounds=MOST_ROUNDS,
            report=report,
            review=review,
            figures=_figures(run, report),
        )
    )


def _headline(run: Run, report: dict[str, Any]) -> list[tuple[str, bool]]:
    """Parts of the sentence on top, and whether they are strong."""
    numbers, sets = report["sources"][run.student], report["coverage"]
    rows = f"{len(run.measured):,} {run.split} rows" if run.split else f"{len(run.measured):,} rows"
    parts = [(f"Of {rows}, {run.student} labels ", False)]
    if "accuracy" in numbers:
        parts += [(percent(numbers["accuracy"]), True), (" right", False)]
    elif "ranking" in report and run.labels.multilabel and len(run.rows):
        ranks = report["ranking"]["sources"][run.student]
        parts = [(f"Of {rows}, {run.student} has a true label first in ", False)]
        parts += [(percent(ranks["P@1"]), True), ("; of its first five labels, ", False)]
        parts += [(percent(ranks["P@5"]), True), (" are true", False)]
    elif "micro_f1" in numbers:
        parts += [("with a micro F1 of ", False), (percent(numbers["micro_f1"]), True)]
    else:
        labelled = int((np.diff(run.soft[run.student].probs[run.measured].indptr) > 0).sum())
        parts += [(str(labelled), True), ("; how many are right is not known", False)]
    if sets is None:
        return [*parts, (".", False)]
    if "coverage" in sets:
        parts += [("; its sets hold the true label in ", False), (percent(sets["coverage"]), True)]
        parts += [(", with ", False)]
    else:
        parts += [("; its sets have ", False)]
    parts += [(f"{sets['mean_set_size']:.2f}", True), (" labels on average", False)]
    if run.labels.multilabel:
        return [*parts, (".", False)]
    human = sets["rows_for_a_human"]
    parts += [(", and ", False), (f"{human:,} rows", True)]
    return [*parts, (f" ({percent(human / len(run.measured))}) need a human.", False)]


def _key_facts(run: Run, report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and note of the numbers under the headline."""
    numbers, sets = report["sources"][run.student], report["coverage"]
    facts = []
    if "accuracy" in numbers:
        between = _between(numbers["accuracy_low"], numbers["accuracy_high"])
        facts.append(("Accuracy", percent(numbers["accuracy"]), between))
    if sets is None:
        return facts
    if "coverage" in sets:
        note = _between(sets["coverage_low"], sets["coverage_high"])
        if sets["target"] is not None:
            note += f", target {100 * sets['target']:g}\u202f%"
        facts.append(("Coverage of the sets", percent(sets["coverage"]), note))
    empty = f"{percent(sets['empty_sets'])} are empty"
    facts.append(("Labels in a set", f"{sets['mean_set_size']:.2f}", empty))
    if not run.labels.multilabel:
        note = f"of {len(run.measured):,}: their set is not one label"
        facts.append(("Rows for a human", f"{sets['rows_for_a_human']:,}", note))
    return facts


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {percent(high)}"


def _tree(run: Run, report: dict[str, Any]) -> Any:
    """The label space as markup, with the rows that the student answers at or below each label."""
    from markupsafe import Markup

    if "hierarchy" not in report:
        return None
    rows, gold = report["hierarchy"]["rows"], report["hierarchy"]["gold"]
    details = None
    if gold is not None:
        details = [
            f"{gold.get(id, 0):,} true" if gold.get(id) or rows.get(id) else ""
            for id in run.labels.ids
        ]
    # Every text in it is escaped there
    return Markup(
        tree_html(run.labels, counts=[rows.get(id, 0) for id in run.labels.ids], details=details)
    )


def _errors(report: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [
        (name, rows, message)
        for name, messages in report["errors"].items()
        for message, rows in list(messages.items())[:MOST_MESSAGES]
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        cut = len(text) > CELL_CHARACTERS
        yield name, text[:CELL_CHARACTERS] + ("…" if cut else "")


def _figures(run: Run, report: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Name -> data URI, text for who cannot see it, and whether it is wider than a phone."""
    figures: dict[Any, dict[str, Any]] = {}
    sets, matrix = report["coverage"], report["confusion"]
    if len(run.rows):
        figures["accuracies"] = _accuracies(run, report)
    if report["reliability"]:
        bins, curve = report["reliability"], report["risk_coverage"]
        # null in the JSON of an empty bin
        confidence, correct = (
            np.array(bins[key], dtype=float) for key in ("confidence", "correct")
        )
        figures["reliability"] = {
            "src": plots.reliability(confidence, correct, np.array(bins["rows"])),
            "alt": "Reliability diagram. Mean confidence, share correct, rows: "
            + "; ".join(
                f"{percent(a)}, {percent(b)}, {n}"
                for a, b, n in zip(confidence, correct, bins["rows"], strict=True)
                if n
            ),
        }
        figures["risk_coverage"] = {
            "src": plots.risk_coverage(np.array(curve["kept"]), np.array(curve["risk"])),
            "alt": "Risk-coverage curve. " + _risk_in_words(curve),
        }
    if sets:
        figures["set_sizes"] = {
            "src": plots.set_sizes(np.array(sets["sizes"])),
            "alt": "Rows by size of their set: "
            + ", ".join(f"{rows} of size {size}" for size, rows in enumerate(sets["sizes"][:12])),
        }
        if "coverage" in sets:
            measured = plots.Measured(*(sets[f"coverage{end}"] for end in ("", "_low", "_high")))
            promised = None
            if "promised_low" in sets:
                promised = sets["promised_low"], sets["promised_high"]
            figures["coverage"] = {
                "src": plots.coverage(measured, target=sets["target"], promised=promised),
                "alt": f"Coverage {percent(measured.value)}, 95 % interval "
                f"{_between(measured.low, measured.high)}.",
            }
        figures |= prediction_sets.figures(sets)
    if matrix:
        figures["confusion", run.student] = _confusion(matrix)
    figures |= {("confusion", name): _confusion(one) for name, one in report["confusions"].items()}
    for table, voters in report.get("voters", {}).items():
        figures |= _voters(table, voters)
    figures |= ranking.figures(run, report.get("ranking"))
    figures |= _shares(run, report)
    figures |= _taxonomy(run, report)
    return {name: {"wide": False, **figure} for name, figure in figures.items()}


def _confusion(
    matrix: dict[str, Any], axes_names: tuple[str, str] = ("true", "predicted")
) -> dict[str, Any]:
    return {
        "src": matrices.confusion(
            np.array(matrix["counts"]),
            true_names=matrix["gold"],
            said_names=matrix["predicted"],
            axes_names=axes_names,
        ),
        "alt": "Confusion matrix. Rows alike, by label: "
        + ", ".join(
            f"{name} {row[at]} of {sum(row)}"
            for at, (name, row) in enumerate(zip(matrix["gold"], matrix["counts"], strict=True))
            if at < len(row)
        ),
        "wide": len(matrix["predicted"]) > 8,
    }


def _voters(table: str, voters: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """How often every two voters agree, where that says more than always or never; confusions."""
    figures: dict[Any, dict[str, Any]] = {
        ("confusion", table, name): _confusion(
            one, ("true" if one["against"] == "gold" else "consensus", "voted")
        )
        for name, one in voters.get("confusions", {}).items()
    }
    pairs = voters.get("pairs")
    if pairs is None:
        return figures
    shares = np.array(pairs["agreement"], dtype=float)
    shares[np.array(pairs["rows"]) < FEW] = np.nan  # chance
    below = shares[np.tril_indices(len(shares), -1)]
    if len(shares) > 2 and ((below > 0) & (below < 1)).any():
        figures["agreement", table] = {
            "src": matrices.agreement(shares, names=pairs["voters"]),
            "alt": f"Agreement of every two voters: {percent(float(np.nanmin(below)))} to "
            f"{percent(float(np.nanmax(below)))}, median {percent(float(np.nanmedian(below)))}.",
            "wide": len(shares) > 8,
        }
    return figures


def disagreements(pairs: dict[str, Any]) -> list[tuple[int, int, str, str]]:
    """The pairs that vote differently on most rows: those rows, their common rows, both names."""
    names = pairs["voters"]
    found = []
    for row, column in zip(*np.tril_indices(len(names), -1), strict=True):
        both, share = pairs["rows"][row][column], pairs["agreement"][row][column]
        if both and share < 1:
            found.append((round(both * (1 - share)), both, names[column], names[row]))
    return sorted(found, key=lambda one: -one[0])[:MOST_PAIRS]


def _risk_in_words(curve: dict[str, list[float]]) -> str:
    kept = np.array(curve["kept"])
    parts = []
    for share in (0.5, 0.8, 1.0):
        at = min(int(np.searchsorted(kept, share - 1e-9)), len(kept) - 1)
        parts.append(f"{percent(curve['risk'][at])} wrong among {percent(kept[at])} of the rows")
    return "; ".join(dict.fromkeys(parts)) + "."


def _accuracies(run: Run, report: dict[str, Any]) -> dict[str, Any]:
    key = "micro_f1" if run.labels.multilabel else "accuracy"

    def measured(name: str) -> plots.Measured:
        numbers = report["sources"][name]
        value = numbers[key]
        low, high = numbers.get(f"{key}_low", value), numbers.get(f"{key}_high", value)
        return plots.Measured(value, low, high)

    names = [name for name in run.tables if name not in run.befores.values()]
    names = names or list(run.tables)
    rows = [
        plots.Row(
            name,
            measured(name),
            measured(run.befores[name]) if name in run.befores else None,
            name == run.student,
        )
        for name in names
    ]
    said = [
        f"{row.name} {percent(row.after.value)}"
        + (f", before correction {percent(row.before.value)}" if row.before else "")
        for row in rows
    ]
    quantity = _COLUMNS[key][0]
    return {
        "src": plots.accuracies(rows, quantity=quantity),
        "alt": f"{quantity} of each source: {'; '.join(said)}.",
    }


def _shares(run: Run, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    bias = report["label_bias"]
    gold = None if bias["gold"] is None else np.array(bias["gold"])
    shares = {name: np.array(values) for name, values in bias["sources"].items()}
    names = bias["labels"]
    if run.left_out:  # all others together would dwarf the rest
        names, gold = names[:-1], None if gold is None else gold[:-1]
        shares = {name: values[:-1] for name, values in shares.items()}
    limit = max(
        [float(values.max()) for values in shares.values()]
        + ([] if gold is None else [float(gold.max())])
    )
    return {
        f"bias of {name}": {
            "src": plots.shares(values, gold, names=names, limit=limit or 1.0),
            "alt": f"Mean share of each label, {name}: "
            + ", ".join(
                f"{label} {percent(share)}"
                for label, share in zip(names, values.tolist(), strict=True)
            ),
        }
        for name, values in shares.items()
    }


def _taxonomy(run: Run, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Quality against cost, and the scores of the rounds that found the labels."""
    figures = {}
    key = "micro_f1" if run.labels.multilabel else "accuracy"
    points = [
        (name, row["prompt_tokens"], row[key], name == run.student)
        for name, row in report.get("costs", {}).items()
        if key in row and row["prompt_tokens"] is not None
    ]
    if len(points) > 1:
        quantity = _COLUMNS[key][0]
        figures["costs"] = {
            "src": plots.costs(points, quantity=quantity),
            "alt": f"{quantity} and prompt tokens a row: "
            + "; ".join(f"{name} {percent(y)}, {x:,.0f}" for name, x, y, _ in points),
        }
    if series := score_series(report.get("taxonomy", [])):
        figures["scores"] = {
            "src": plots.scores(series),
            "alt": "Scores of the rounds: "
            + "; ".join(", ".join(f"{score:g}" for score in line) for line in series[:12]),
        }
    return figures
