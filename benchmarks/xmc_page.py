"""The page of benchmarks/xmc.py: benchmarks/results/xmc.md from what was kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from xmc_data import Problem

NAMES = {
    "names": "label names, characters",
    "centroid": "TF-IDF centroids",
    "neighbours": "20 nearest rows, TF-IDF",
    "napkinxc": "napkinXC PLT",
    "omikuji": "omikuji",
    "pecos": "libpecos XR-Linear",
    "sentence_transformers": "sentence-transformers CachedMNRL, MiniLM, float32",
    "sentence_transformers_bf16": "sentence-transformers CachedMNRL, MiniLM, bfloat16",
    "frozen": "llmlabel, MiniLM",
    "trained": "llmlabel, MiniLM",
}
COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "R@10", "R@100", "PSP@1", "PSP@3", "PSP@5")
FEW = ("P@1", "P@3", "P@5", "R@10", "R@100", "PSP@5")
DATA = {"finna": "finna_yso", "debtags": "Debian debtags"}
LOSSES = {
    "softmax": "softmax",
    "decoupled_softmax": "decoupled softmax",
    "soft_topk": "soft top-5",
    "bce": "one-vs-all BCE",
}
ABSENT = "(not measured)"
Found = dict[str, Any]


def page(work: Path, known: dict[str, Problem]) -> str:
    lines = [
        "# Very many labels",
        "",
        "`python benchmarks/xmc.py --work FOLDER --part baselines peers ours losses negatives steps "
        "write --debtags FOLDER --napkinxc PYTHON --omikuji PYTHON --pecos PYTHON "
        "--sentence-transformers PYTHON`, where `ours` has `--training` with the settings told below "
        "(`finna_yso`'s first three lines of ours without: float32)",
        "",
        "Every method is a process of its own on one thread of a machine that other programs used "
        "too. CPU s are seconds of the processor, of the method and its children, from its start to "
        "its answers: features, search for settings, learning and answering; at most 20 minutes. MiB "
        "is the largest resident memory. Settings were chosen by P@1 + P@5 on rows held from those "
        "to learn from, never on test rows; a package has a second line where its defaults were not "
        "the best. All numbers but the last two columns in percent; PSP with A = 0.55, B = 1.5. The "
        "labels of both sets are incomplete, so that P@k is a lower bound.",
        "",
        "Our lines: the encoder alone; with the vote of the 100 nearest rows (`label_neighbours`); and "
        "with `label_profiles`, `label_lexical` and `label_linear` too. `fit_fusion` weighs them on the "
        "held rows. `--training` gives the settings told below each table; with `dtype` bfloat16 the "
        "untrained encoder is in it as well (Debian debtags; finna_yso's was measured in float32). On "
        "Debian debtags the last two lines took longer than the 20 minutes: what follows training was "
        "foreseen too short on a busy machine.",
        "",
    ]
    for data, problem in known.items():
        folder = work / data
        lines += [f"## {DATA[data]}", "", sizes(problem), "", *table(folder, problem)]
        lines += [*tried(folder), *tenths(folder, problem), *losses(folder, problem)]
        lines += [*negatives(folder, problem), *steps(folder)]
    return "\n".join(lines).rstrip("\n") + "\n"


def read(folder: Path, name: str) -> Found | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def rows_of(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def percent(scores: dict[str, float], columns: tuple[str, ...]) -> list[str]:
    return [f"{100 * scores[column]:.2f}" for column in columns]


def sizes(problem: Problem) -> str:
    seen = problem.gold("train").sum(axis=0)
    per_row = problem.gold("train").sum() / len(problem.train)
    return (
        f"{len(problem.train):,} rows to learn from, {problem.held.sum():,} of them held to choose "
        f"settings by; {len(problem.test):,} test rows; {len(problem.space):,} labels, "
        f"{per_row:.1f} a row, the median one in {np.median(seen):.0f} rows, {(seen == 0).sum()} in "
        "none."
    )


def table(folder: Path, problem: Problem) -> list[str]:
    rows = []
    for method, name in NAMES.items():
        found = read(folder, method)
        if found is None:
            rows.append([name, ABSENT, *[""] * (len(COLUMNS) + 2)])
            continue
        for which, run in found["runs"].items():
            scores = problem.scores(folder / f"{method} {which}.npz")
            rows.append([name, setting(found, which), *percent(scores, COLUMNS)])
            search = found["search_s"] if which == "chosen" else 0.0
            rows[-1] += [f"{run['cpu_s'] + search:.0f}", f"{run['mib']:.0f}"]
    return rows_of(["", "", *COLUMNS, "CPU s", "MiB"], rows)


def setting(found: Found, which: str) -> str:
    if which not in ("default", "chosen"):
        return which
    return found["runs"][which]["setting"] if found["trials"] else ""


def tried(folder: Path) -> list[str]:
    """What was chosen among, and what training took."""
    lines = []
    for method, name in NAMES.items():
        found = read(folder, method)
        if found and found["trials"]:
            parts = [
                f"{setting} {100 * one['P@1']:.1f} / {100 * one['P@5']:.1f}"
                if one
                else f"{setting} (no time left)"
                for setting, one in found["trials"].items()
            ]
            lines.append(f"- {name}: {'; '.join(parts)}.")
    if lines:
        lines = ["Settings tried, P@1 / P@5 at the held rows:", "", *lines, ""]
    if (found := read(folder, "trained")) is not None:
        card = found["card"]
        kept = (
            *("loss", "negatives", "positives", "learning_rate", "per_device_train_batch_size"),
            *("hard_labels", "refresh", "dtype", "max_length"),
        )
        chosen = ", ".join(f"{name} {card['settings'][name]}" for name in kept)
        lines += [
            f"Our training: {card['updates']} updates, {card['label_tokens']:,} label tokens encoded; "
            f"{chosen}.",
            "",
        ]
    return lines


def tenths(folder: Path, problem: Problem) -> list[str]:
    """Recall among the first 10 by how frequent labels are."""
    rows, groups = [], []
    for method, name in NAMES.items():
        found = read(folder, method)
        if found is None:
            continue
        which = list(found["runs"])[-1]
        lines = problem.by_frequency(folder / f"{method} {which}.npz")
        groups = [line for line in lines if line["labels"]]
        name = f"{name}, {which}" if which not in ("default", "chosen") else name
        rows.append([name, *(f"{100 * line['R@10']:.1f}" for line in groups)])
    if not rows:
        return []
    span = ["rows a label", *(f"{line['least']} to {line['most']}" for line in groups)]
    heads = [f"tenth {line['group']}" for line in groups]
    heads = [head.replace("tenth zero-shot", "zero-shot") for head in heads]
    return [
        "Share of the true labels among the first 10, by how many rows to learn from a label has "
        "(tenths of the labels; the best line of each method):",
        "",
        *rows_of(["", *heads], [span, *rows]),
    ]


def losses(folder: Path, problem: Problem) -> list[str]:
    rows, cards = [], []
    for loss, name in LOSSES.items():
        some = [path.stem for path in sorted(folder.glob(f"loss {loss} *.json"))]
        if not some:
            rows.append([name, ABSENT, *[""] * len(FEW)])
            continue
        scores = [problem.scores(folder / f"{run} default.npz") for run in some]
        cards += [read(folder, run)["card"] for run in some]
        cells = [[100 * one[column] for one in scores] for column in FEW]
        rows.append([name, str(len(some)), *(f"{np.mean(c):.2f} ({np.ptp(c):.2f})" for c in cells)])
    if not cards:
        return []
    return [
        f"### Losses\n\nThe encoder alone after {cards[0]['updates']} updates, the same rows in the "
        "same order, all labels as one pool (`cached`); mean of the seeds, largest less smallest in "
        "brackets.",
        "",
        *rows_of(["loss", "seeds", *FEW], rows),
    ]


def negatives(folder: Path, problem: Problem) -> list[str]:
    rows, runs = [], {}
    for kind in ("all", "cached"):
        found = runs[kind] = read(folder, f"negatives {kind}")
        if found is None:
            rows.append([f"`{kind}`", ABSENT, *[""] * (len(FEW) + 3)])
            continue
        scores = percent(problem.scores(folder / f"negatives {kind} default.npz"), FEW)
        card = found["card"]
        cost = [f"{card['label_tokens']:,}", f"{card['seconds']:.0f}", f"{found['cpu_s']:.0f}"]
        rows.append([f"`{kind}`", str(card["updates"]), *scores, *cost])
    if not any(runs.values()):
        return []
    text = "### All labels in every update, and kept vectors\n\nThe encoder alone after one epoch."
    if all(runs.values()):
        many, few = (runs[kind]["card"] for kind in ("all", "cached"))
        text += (
            f" `cached` encodes {many['label_tokens'] / few['label_tokens']:.1f} times fewer label "
            f"tokens and takes {many['seconds'] / few['seconds']:.1f} times less time on the clock."
        )
    heads = ["", "updates", *FEW, "label tokens", "s", "CPU s"]
    return [text, "", *rows_of(heads, rows)]


def steps(folder: Path) -> list[str]:
    """Seconds of the processor for an update: the difference of two trainings of a few."""
    rows: dict[str, dict[int, dict[int, float]]] = {}
    for path in folder.glob("steps *.json"):
        _, kind, labels, number = path.stem.split()
        run = json.loads(path.read_text("utf-8"))
        rows.setdefault(kind, {}).setdefault(int(labels), {})[int(number)] = run["cpu_s"]
    counts = sorted({labels for some in rows.values() for labels in some})
    lines = []
    for kind, some in sorted(rows.items()):
        cells = []
        for labels in counts:
            runs = sorted(some.get(labels, {}).items())
            if len(runs) < 2:
                cells.append(ABSENT)
                continue
            (few, first), (more, last) = runs[0], runs[-1]
            cells.append(f"{(last - first) / (more - few):.1f}")
        lines.append([f"`{kind}`", *cells])
    if not lines:
        return []
    return [
        "### Time of an update\n\nCPU s; beyond the labels there are, names are repeated with a "
        "number.",
        "",
        *rows_of(["labels", *(f"{labels:,}" for labels in counts)], lines),
    ]
