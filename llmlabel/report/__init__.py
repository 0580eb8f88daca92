"""One report.json and one self-contained report.html of a run.

How good each source is, what its probabilities and sets are worth, and which rows need a human.
"""

import json
import math
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from llmlabel import select
from llmlabel.calibrate.conformal import Conformal
from llmlabel.calibrate.diagnostics import Slice
from llmlabel.calibrate.drift import Drift
from llmlabel.calibrate.exchangeability import Exchangeability
from llmlabel.calibrate.groups import GroupConformal
from llmlabel.calibrate.noise import NoisyConformal
from llmlabel.files import arrow_table, commit
from llmlabel.labelspace import LabelSpace
from llmlabel.report import measure, page
from llmlabel.report.measure import values_of
from llmlabel.report.memorised import memorised, most_suspicious
from llmlabel.report.ranking import MAIN, rankings
from llmlabel.report.sets import fitted, monitored, prediction_sets
from llmlabel.report.taxonomy import costs, hierarchy, rounds
from llmlabel.report.voters import who_voted
from llmlabel.taxonomy.induce import Taxonomy

LOW_MARGIN = 0.2
"""Below this a row's margin is named as a reason to look at it."""

TEXT_CHARACTERS = 240

MOST_ANSWERS = 4
"""So many different answers to a row are told, the most frequent first."""

_PACKAGES = (
    *("llmlabel", "numpy", "scipy", "scikit-learn", "torch", "transformers", "peft", "accelerate"),
    *("datasets", "sentence-transformers", "vllm", "openai", "matplotlib", "jinja2"),
)


def write_report(  # noqa: PLR0913 - each argument is one choice of the person who reads the report
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    student: str,
    output: Path,
    baselines: dict[str, str] | None = None,
    split: str | None = "test",
    title: str = "llmlabel report",
    conformal: Conformal | GroupConformal | NoisyConformal | None = None,
    model: Path | None = None,
    taxonomy: Taxonomy | list[dict[str, Any]] | None = None,
    suspects: Dataset | None = None,
    training: Dataset | None = None,
    slices: tuple[Slice, ...] | None = None,
    drift: Drift | None = None,
    shift: Exchangeability | None = None,
    review_rows: int = 25,
) -> dict[str, Any]:
    """Measures every source and writes `report.json` and `report.html` into `output`.

    Equal inputs give equal bytes: no time, no path and no random number is in them.

    Args:
        sources: Name to show -> table with soft labels; all tables have the same row ids.
        labels: The label space of all of them.
        student: The source whose probabilities, sets, confusions and uncertain rows are shown.
        output: A folder; made where there is none.
        baselines: Name of a source -> name of the same source before bias correction.
        split: Only rows with this value in the column `split` are measured, and the gold of no
            other row is read; `None` measures all rows.
        title: Of the page.
        conformal: What made the sets; its promise is shown beside what was measured, and what breaks
            it.
        model: A model folder, whose `model_card.json` is shown.
        taxonomy: How the labels were found, or its `history`; every round is shown.
        suspects: What `llmlabel.train.memorisation.find_memorised` gave of the training rows; gold,
            where they have it, measures only how often the suspicion is right.
        training: Rows with `gold` that models learned from, for a section on how good rankings are:
            their counts give the propensities and the tenths of labels from frequent to rare.
        slices: What `llmlabel.calibrate.diagnostics.worst_slices` found, shown with the sets.
        drift: What `llmlabel.calibrate.drift.monitor_drift` saw, shown with the sets.
        shift: What `llmlabel.calibrate.exchangeability.check_exchangeability` found, shown with the
            sets.
        review_rows: How many of the most uncertain rows are listed, and of the most suspicious.

    Returns:
        The content of report.json; `summary` maps flat names to the main numbers.

    Raises:
        ValueError: No sources, a name that is no source, tables of different rows, a split without
            rows, something of another label space, or slices, drift or shift of a student without
            sets.
    """
    if conformal is not None and conformal.label_space != labels.fingerprint:
        raise ValueError(
            f"conformal was fitted on label space {conformal.label_space}, the labels given are "
            f"{labels.fingerprint}; fit it again or give its label space"
        )
    if review_rows < 0:
        raise ValueError(f"review_rows must be 0 or more; got {review_rows}")
    run = measure.gather(
        sources, labels, student=student, befores=baselines or {}, split=split, conformal=conformal
    )
    review = _review(run, review_rows)
    report: dict[str, Any] = {
        "summary": {},
        "sources": {name: measure.measure(run, name) for name in run.tables},
        "coverage": monitored(
            prediction_sets(run), labels, slices=slices, drift=drift, shift=shift
        ),
        "confusion": measure.confusion(run, student),
        "confusions": {
            name: measure.confusion(run, name)
            for name in run.tables
            if name != student and run.single_gold
        },
        **measure.curves(run),
        "label_bias": measure.label_bias(run),
        "errors": {name: _errors(table) for name, table in run.tables.items()},
        "review": [row["id"] for row in review],
        "provenance": _provenance(run, model),
        "overlap": measure.overlap(run),
    }
    report |= {
        name: part
        for name, part in (
            ("hierarchy", hierarchy(run)),
            ("costs", costs(run, report["sources"])),
            ("voters", who_voted(run)),
            ("ranking", rankings(run, training)),
            ("taxonomy", rounds(taxonomy)),
            ("memorised", memorised(suspects, labels)),
        )
        if part is not None
    }
    report["summary"] = _summary(run, report)
    suspicious = [
        row | {"text": _short(row["text"], TEXT_CHARACTERS)}
        for row in most_suspicious(suspects, labels, rows=review_rows)
    ]
    if "memorised" in report:
        report["memorised"]["most"] = [row["id"] for row in suspicious]
    report = _plain(report)
    html = page.render(run, report, _plain(review), suspicious, title=title)
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    commit(output / "report.json", lambda path: path.write_bytes(content.encode()))
    commit(output / "report.html", lambda path: path.write_bytes(html.encode()))
    return report


def _summary(run: measure.Run, report: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "student": run.student,
        "split": run.split or "all rows",
        "rows": len(run.table),
        "measured_rows": len(run.measured),
        "labels": len(run.labels),
    }
    main = "micro_f1" if run.labels.multilabel else "accuracy"
    for name, numbers in report["sources"].items():
        if main in numbers:
            summary[f"{main} of {name}"] = numbers[main]
    student = report["sources"][run.student]
    summary |= {key: student[key] for key in ("macro_f1", "ece", "nll", "aurc") if key in student}
    for name, scores in report.get("hierarchy", {}).get("sources", {}).items():
        if "f1" in scores:
            summary[f"hierarchical_f1 of {name}"] = scores["f1"]
    ranks = report.get("ranking", {}).get("sources", {}).get(run.student, {})
    summary |= {key: ranks[key] for key in MAIN if key in ranks}
    for key in (
        *("target", "coverage", "promised_low", "promised_high"),
        *("mean_set_size", "empty_sets", "rows_for_a_human"),
    ):
        value = (report["coverage"] or {}).get(key)
        if value is not None:
            summary["target_coverage" if key == "target" else key] = value
    return summary


def _review(run: measure.Run, rows: int) -> list[dict[str, Any]]:
    """The rows with the highest (1 - margin) + vote entropy; gold plays no part in it."""
    voters = [name for name in run.tables if name not in run.befores.values()]
    answers = {name: _answers(run, name) for name in voters}
    codes: dict[tuple[int, ...] | None, int] = {None: -1}
    for column in answers.values():
        for answer in column:
            codes.setdefault(answer, len(codes))
    coded = np.array([[codes[answer] for answer in answers[name]] for name in voters]).T
    margin = select.margins(run.soft[run.student])
    score = np.round(1 - margin + select.vote_entropy(coded), 9)  # rounding must not break a tie
    names = measure.names_of(run.labels)
    gold = {int(row): run.gold[at] for at, row in enumerate(run.rows)}
    errors = {name: values_of(table, "error") for name, table in run.tables.items()}
    found = []
    for row in np.argsort(-score, kind="stable")[:rows].tolist():
        why = [
            f"{'error' if name == run.student else f'error of {name}'}: {_short(error[row], 90)}"
            for name, error in errors.items()
            if error[row]
        ]
        said = Counter(answers[name][row] for name in voters if answers[name][row] is not None)
        if len(said) > 1:
            most = said.most_common(MOST_ANSWERS)
            votes = [f"{_listed(ids, names)} ({n})" for ids, n in most]
            if len(said) > MOST_ANSWERS:
                votes.append(f"other answers ({said.total() - sum(n for _, n in most)})")
            why.append(f"sources disagree: {', '.join(votes)}")
        if run.sets is not None and len(run.sets[row]) != 1:
            size = len(run.sets[row])
            why.append(f"large set ({size} labels)" if size else "empty set")
        if margin[row] < LOW_MARGIN:
            why.append(f"low margin ({margin[row]:.2f})")
        entry = run.table[row]
        pairs = zip(entry["label_probs"] or [], entry["label_ids"] or [], strict=True)
        found.append(
            {
                "id": entry["id"],
                "text": _short(entry["text"] or "", TEXT_CHARACTERS),
                "score": score[row],
                "why": why or ["no single reason, the score only"],
                "labels": [(names[id], prob) for prob, id in sorted(pairs, reverse=True)[:3]],
                "set": None if run.sets is None else [names[id] for id in run.sets[row][:10]],
                "gold": _gold_names(gold[row], names) if row in gold else None,
            }
        )
    return found


def _answers(run: measure.Run, name: str) -> list[tuple[int, ...] | None]:
    """What a source says: its first label, or every label of at least 0.5; None without a label."""
    if name in run.said:
        return [(label,) if label >= 0 else None for label in run.said[name].tolist()]
    soft = run.soft[name]
    probs = soft.probs if run.labels.multilabel else soft.top(1).probs
    answers: list[tuple[int, ...] | None] = []
    for start, end in zip(probs.indptr[:-1], probs.indptr[1:], strict=True):
        ids = probs.indices[start:end]
        if run.labels.multilabel:
            ids = ids[probs.data[start:end] >= 0.5]
        answers.append(tuple(ids.tolist()) if end > start else None)
    return answers


def _gold_names(gold: Any, names: list[str]) -> list[str]:
    ids = np.flatnonzero(gold) if np.ndim(gold) else [gold] if gold >= 0 else []
    return [names[id] for id in ids]


def _listed(ids: tuple[int, ...], names: list[str]) -> str:
    more = [f"{len(ids) - 3} more"] * (len(ids) > 4)
    shown = ids[: 3 if more else None]
    return " + ".join([*(_short(names[id], 30) for id in shown), *more]) or "none"


def _short(text: str, characters: int) -> str:
    """On one line, cut at a word."""
    text = " ".join(text[: 8 * characters].split())  # what is cut away need not be split
    if len(text) <= characters:
        return text
    head = text[: characters - 1]
    return f"{head.rsplit(' ', 1)[0] if ' ' in head[characters // 2 :] else head} …"


def _values(table: Dataset, name: str) -> list[str]:
    return sorted({str(value) for value in values_of(table, name) if value is not None})


def _errors(table: Dataset) -> dict[str, int]:
    """Rows by message, the most frequent first; numbers in a message are replaced by #."""
    messages = Counter(
        re.sub(r"\d+", "#", _short(error, 200)) for error in values_of(table, "error") if error
    )
    return dict(sorted(messages.items(), key=lambda item: (-item[1], item[0])))


def _provenance(run: measure.Run, model: Path | None) -> dict[str, Any]:
    labels = run.labels
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    content = None
    if model is not None:
        card = model / "model_card.json"
        if not card.is_file():
            raise FileNotFoundError(
                f"model folder {model}: model_card.json is missing; give a folder that "
                "train_classifier has finished"
            )
        try:
            content = _portable(json.loads(card.read_text("utf-8")))
        except ValueError as error:
            raise ValueError(f"{card}: not JSON: {error}; train the model again") from None
    return {
        "sources": {name: _origin(run, name) for name in run.tables},
        "label_space": labels.fingerprint,
        "multilabel": labels.multilabel,
        "labels": [
            {"id": id, "name": name, "description": description, "parents": list(parents)}
            for id, name, description, parents in zip(
                labels.ids, labels.names, labels.descriptions, labels.parents, strict=True
            )
        ],
        "conformal": None if run.conformal is None else fitted(run.conformal),
        "versions": versions,
        "model_card": content,
    }


def _origin(run: measure.Run, name: str) -> dict[str, Any]:
    table = run.tables[name]
    weights = [value for value in values_of(table, "weight") if value is not None]
    masses = [value for value in values_of(table, "label_mass") if value is not None]
    votes: list[str | None] = []
    if "votes" in table.column_names:  # as Arrow, for there may be millions
        lists = arrow_table(table.select_columns(["votes"]))["votes"].combine_chunks()
        votes = pc.struct_field(lists.flatten(), "source").unique().to_pylist()
    return {
        "rows": len(table),
        "rows_without_label": int((np.diff(run.soft[name].probs.indptr) == 0).sum()),
        "engine": _values(table, "engine"),
        "prompt_sha": _values(table, "prompt_sha"),
        "mean_label_mass": float(np.mean(masses)) if masses else None,
        "mean_weight": float(np.mean(weights)) if weights else None,
        "votes_of": sorted(map(str, votes)),
    }


def _portable(value: Any) -> Any:
    """A model card without what differs between machines and runs: folders and durations."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if not key.endswith("seconds")}
        return {key: _portable(one) for key, one in kept.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _plain(value: Any) -> Any:
    """What JSON can hold: no arrays, and null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
