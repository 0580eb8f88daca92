"""The page of benchmarks/sets.py: benchmarks/results/sets.md from what was kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "llmlabel": "llmlabel",
    "torchcp": "TorchCP 1.2.1",
    "puncc": "puncc 0.9.3",
    "mapie": "MAPIE 1.6.0",
    "crepes": "crepes 0.9.1",
}
MISSING = "(not measured)"
TAIL = {
    "lac": "LAC, alpha 0.1",
    "adjusted": "adjusted, mean size of LAC",
    "promised": "adjusted, alpha 0.1",
}


def page(work: Path) -> str:
    kept = {path.stem: json.loads(path.read_text("utf-8")) for path in work.glob("*.json")}
    lines = [
        "# Prediction sets",
        "",
        "`python benchmarks/sets.py --work FOLDER --part large labels peers same counts powerset "
        "trees scope hierarchy tail --python mapie=... torchcp=... puncc=... crepes=... "
        "mulaconf=... --write`",
        "",
        "One core of a machine that other programs used too, so that a run waited for most of its "
        "time on the clock: seconds are those of the processor, with those of the clock behind "
        "them. Every run is a process of its own, in turn, spread over half an hour of changing load; "
        "memory is the largest resident size above that before the run.",
        "",
        *streams(kept),
        *beside(kept),
        *identical(kept, work),
        *label_sets(kept),
        *trees(kept),
        *scope(kept),
        *hierarchy(kept),
        *tail(kept),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def clock(run: dict[str, Any]) -> str:
    return f"{run['cpu_s']:.1f} ({run['seconds']:.0f})"


def rows_of(header: str, *rows: str) -> list[str]:
    return [header, "|" + "---|" * (header.count("|") - 1), *rows, ""]


# ---------------------------------------------------------------------------------- how large


def streams(kept: dict[str, Any]) -> list[str]:
    lines = [
        "## Streams of rows (`scores_of_blocks`, `sets_of_blocks`)",
        "",
        "Scores in float32, made in blocks of 500 rows and never held whole; alpha 0.1. Asked of "
        "1e5 calibration and 1e5 test rows of 1e4 labels: LAC below 30 s and 200 MB, randomised APS "
        "below 60 s and 1.5 GB, coverage .90 ± .01; and bounded memory at 1e5 labels. That holds for "
        "seconds of the processor; on the clock of this busy machine it was not seen.",
        "",
    ]
    rows = []
    for part, shape in (("large", "1e5 + 1e5, 1e4"), ("labels", "1e4 + 5e3, 1e5")):
        alone = kept.get(f"{part} none")
        for score in ("lac", "aps"):
            run = kept.get(f"{part} {score}")
            if not run or not alone:
                rows.append(f"| {shape} | {score.upper()} | {MISSING} | | | | | |")
                continue
            rows.append(
                f"| {shape} | {score.upper()} | {clock(run)} | "
                f"{run['cpu_s'] - alone['cpu_s']:.1f} | {run['extra_mb']:,.0f} | "
                f"{run['sets_mb']:,.0f} | {run['coverage']:.4f} | {run['size']:.2f} |"
            )
    lines += rows_of(
        "| calibration + test rows, labels | score | s | without making the rows | MB | of which "
        "sets | coverage | mean size |",
        *rows,
    )
    for part, what in (("large", "1e4"), ("labels", "1e5")):
        if alone := kept.get(f"{part} none"):
            lines += [
                f"Making the rows of {what} labels alone: {clock(alone)} s and "
                f"{alone['extra_mb']:,.0f} MB, which the numbers above hold too.",
                "",
            ]
    return lines


def beside(kept: dict[str, Any]) -> list[str]:
    lines = [
        "## Beside other packages",
        "",
        "1e4 calibration and 1e4 test rows of 1e4 labels, the same matrices, which are there before "
        "the clock starts (763 MB in float32; TorchCP's logits are made beforehand too). MAPIE is given "
        "float64, normalised again, as it refuses sums further than 1e-5 from 1. Ratios are to llmlabel; asked: at least 5 times the speed and a tenth of the "
        "memory of MAPIE and TorchCP.",
        "",
    ]
    rows = []
    for score in ("lac", "aps"):
        own = kept.get(f"peers {score} llmlabel")
        for package in ("llmlabel", "torchcp", "puncc", "mapie"):
            run = kept.get(f"peers {score} {package}")
            name = f"| {score.upper()} | {NAMES[package]} |"
            if not run or not own:
                rows.append(f"{name} {MISSING} | | | | | |")
            elif "error" in run:
                rows.append(f"{name} {run['error']} | | | | | |")
            else:
                rows.append(
                    f"{name} {run['cpu_s']:.2f} ({run['seconds']:.1f}) | "
                    f"{run['cpu_s'] / own['cpu_s']:.1f} | {run['extra_mb']:,.0f} | "
                    f"{run['extra_mb'] / own['extra_mb']:.0f} | {run['coverage']:.4f} | "
                    f"{run['size']:.2f} |"
                )
    lines += rows_of(
        "| score | package | s | times | MB | times | coverage | mean size |",
        *rows,
    )
    few, own = kept.get("peers few crepes"), kept.get("peers few llmlabel")
    if few and own:
        lines += [
            f"crepes 0.9.1 goes through all pairs of a row and a label: LAC, 4,000 calibration rows, "
            f"20 rows of 1e4 labels, {few['cpu_s']:.2f} s (llmlabel {own['cpu_s']:.3f}).",
            "",
        ]
    return lines


def identical(kept: dict[str, Any], work: Path) -> list[str]:
    """Cells of the sets that differ from ours."""
    rows = []

    def compare(what: str, name: str, package: str) -> None:
        own, theirs = (work / f"{name} {one}.npy" for one in ("llmlabel", package))
        run = kept.get(f"{name} {package}")
        if run and "error" not in run and own.is_file() and theirs.is_file():
            both = np.load(own), np.load(theirs)
            differing = len(np.setxor1d(*both))
            rows.append(f"| {what} | {NAMES[package]} | {len(both[0]):,} | {differing:,} |")
        else:
            rows.append(f"| {what} | {NAMES[package]} | {MISSING} | |")

    for package in ("mapie", "torchcp", "puncc"):
        compare("LAC, 1e4 rows of 1e4 labels", "peers lac", package)
    compare("LAC, 20 rows of 1e4 labels", "peers few", "crepes")
    for package in ("mapie", "torchcp", "puncc", "crepes"):
        compare("LAC, five matrices, 1,000 rows of 60 labels each", "same lac", package)
    compare("APS, the last label whole, the same five", "same aps_whole", "mapie")
    lines = [
        "## The same sets",
        "",
        "Labels in our sets, and cells (row and label) in which theirs differ. MAPIE's APS is given "
        "the same numbers in calibration and keeps the whole label that crosses the threshold.",
        "",
        *rows_of("| sets | package | labels in them | differing |", *rows),
    ]
    if found := kept.get("same risk"):
        lines += [
            f"Risk control of recall (CRC, and RCPS with Hoeffding's bound; {found['cases']} cases on "
            f"MAPIE's grid of thresholds): {found['differing']:,} of {found['cells']:,} cells differ "
            "from MAPIE's.",
            "",
        ]
    return lines


# ---------------------------------------------------------------------------- other kinds of sets


def label_sets(kept: dict[str, Any]) -> list[str]:
    rows = []
    for count in (6, 10, 12):
        own, theirs = (kept.get(f"counts {one} {count}") for one in ("llmlabel", "mulaconf"))
        if not own or not theirs:
            continue
        equal = sum(a == b for a, b in zip(own["counts"], theirs["counts"], strict=True))
        total = len(own["counts"])
        rows.append(
            f"| {count} | {equal} of {total} | {1000 * theirs['cpu_s'] / total:.2f} | "
            f"{1000 * own['cpu_s'] / total:.2f} | {theirs['extra_mb']:.0f} |"
        )
    lines = [
        "## Label sets (`calibrate.powerset`)",
        "",
        "Number of label sets in a region, beside MuLaConf 0.3.0, which goes through all 2^labels of "
        "them. Probabilities are multiples of 1/64: it computes in float32, where these are exact.",
        "",
        *rows_of(
            "| labels | rows with the same number | MuLaConf, ms a row | llmlabel, ms a row | MB of "
            "MuLaConf |",
            *rows,
        ),
    ]
    if found := kept.get("powerset 90"):
        lines += [
            f"90 labels (asked: within 1 % in under 1 ms): {found['ms']:.2f} ms a row. The two bounds "
            f"are {found['width'][0]:.2%} apart in the median row and {found['width'][1]:.2%} at most "
            f"(200 rows); from the number itself, known to {found['finer']:.2%} by a grid sixteen times "
            f"as fine, they are at most {found['error']:.2%} away (60 rows). Regions hold "
            f"{found['median']:.1e} label sets in the median, {found['largest']:.1e} at most.",
            "",
        ]
    if found := kept.get("powerset 500"):
        lines += [
            f"500 labels (asked: the first 1,000 label sets in under 1 s): {found['longest']:.4f} s at "
            f"most, over {found['rows']} rows.",
            "",
        ]
    return lines


def trees(kept: dict[str, Any]) -> list[str]:
    rows = []
    for key, values in kept.get("trees", {}).items():
        deep, holes = key.split()
        cells = " | ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {float(deep):.0%} | {holes} | {cells} |")
    return [
        "## PAC sets over a tree of 10,000 nodes (`kept_nodes`, `predict_tree`)",
        "",
        "Milliseconds a tree, asked: below 50; mean of five random trees in which a node hangs below "
        "the one before with the probability given.",
        "",
        *rows_of(
            "| below the one before | holes | all 24 budgets (a row of the fit) | prediction, 3 "
            "budgets from the anchor | prediction, the farthest budget |",
            *rows,
        ),
    ]


def scope(kept: dict[str, Any]) -> list[str]:
    if not (found := kept.get("scope")):
        return []
    low, high = found["promised"]
    base, scores = found["baseline"], found["scores"]
    best = max(scores, key=lambda name: scores[name]["choice"])
    rows = [
        f"| {name} | {one['coverage']:.4f} | {one['size']:.2f} | {one['choice']:.4f} | "
        f"{one['auroc']:.4f} | {one['flagged'][0]:.3f} | {one['flagged'][1]:.3f} |"
        for name, one in scores.items()
    ]
    rows.append(
        f"| *largest probability itself* | | | {base['choice']:.4f} | {base['test']:.4f} | | |"
    )
    return [
        "## clinc150: coverage in scope, and what is out of scope",
        "",
        f"Logistic regression on frozen MiniLM vectors, accuracy {found['accuracy']:.4f} on "
        f"{found['rows']['test']:,} test rows in scope. Thresholds at alpha 0.1 from "
        f"{found['rows']['calibration']:,} validation rows in scope; on the test rows coverage should "
        f"then lie between {low:.4f} and {high:.4f} (19 times of 20). A row is out of scope if its "
        "largest p-value is small: AUROC on the other half of the validation rows with 100 out of "
        "scope, on which the score is chosen, and on the test rows with 1,000. `tempered` is LAC of the "
        "softmax of log p over a temperature, given as a function.",
        "",
        *rows_of(
            "| score | coverage | mean size | AUROC, choice | AUROC, test | out of scope flagged at "
            "p <= 0.1 | in scope flagged |",
            *rows,
        ),
        f"Chosen: {best}, AUROC {scores[best]['auroc']:.4f} on the test rows; the largest probability "
        f"has {base['test']:.4f}. The largest p-value of LAC is the largest probability on another "
        "scale, so only another score can tell more. That of APS is no measure of strangeness: its first "
        "label scores a share of its own probability, which is largest where the model is sure.",
        "",
    ]


def hierarchy(kept: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in kept.get("hierarchy", {}).items():
        rows = []
        for key, values in found["sets"].items():
            alpha, kind = key.split()
            kind = "LAC, `add_nodes`" if kind == "lac" else f"at most {kind}"
            if isinstance(values, str):
                rows.append(f"| {alpha} | {kind} | {values.split(';')[0]} | | |")
            else:
                held, leaves, nodes = values
                rows.append(f"| {alpha} | {kind} | {held:.4f} | {leaves:.2f} | {nodes:.2f} |")
        paths = [
            f"| {epsilon} | {wrong:.4f} | {depth:.2f} | {flat_wrong:.4f} | {flat_depth:.2f} |"
            for epsilon, (wrong, depth, flat_wrong, flat_depth) in found["pac"].items()
        ]
        cal, new = found["rows"]
        lines += [
            f"## Hierarchy: {name}",
            "",
            f"{cal:,} calibration rows, {new:,} test rows, accuracy {found['accuracy']:.4f}. Sets as "
            "unions of nodes (`fit_subtrees`); they hold at least the answer, so they cover no less than "
            "the accuracy:",
            "",
            *rows_of("| alpha | nodes | coverage | leaves in a set | nodes in a set |", *rows),
            "Paths from the root, cut off where they may be wrong (`fit_pac_tree`, delta 0.05), beside "
            "the whole path or nothing under the same promise:",
            "",
            *rows_of("| epsilon | wrong | depth | all or nothing: wrong | depth |", *paths),
        ]
    return lines


def tail(kept: dict[str, Any]) -> list[str]:
    rows = []
    for knows, draws in kept.get("tail", {}).items():
        better = sum(
            draw["adjusted"][2] > draw["lac"][2] and draw["adjusted"][3] < draw["lac"][3]
            for draw in draws
        )
        for score, name in TAIL.items():
            values = np.array([draw[score] for draw in draws])
            cells = " | ".join(
                f"{mean:.{digits}f} ± {spread:.{digits}f}"
                for mean, spread, digits in zip(
                    values.mean(axis=0), values.std(axis=0, ddof=1), (3, 1, 3, 3), strict=True
                )
            )
            counted = f"{better} of {len(draws)}" if score == "adjusted" else ""
            knowing = "all" if knows == "1.0" else "half"
            rows.append(f"| {knowing} | {name} | {cells} | {counted} |")
    if not rows:
        return []
    return [
        "## A long tail (Zipf 1.1, 60 labels)",
        "",
        "LAC at alpha 0.1 from 2,000 rows, and prevalence-adjusted sets (PAS) of the same mean size, or "
        "at the same alpha; the prior is the model's mean soft label on other rows. A model that knows how "
        "frequent the labels are, or half of it. Ten draws, mean ± standard deviation.",
        "",
        *rows_of(
            "| knows | score | coverage | mean size | macro-coverage | under-coverage gap | better in "
            "both |",
            *rows,
        ),
        "At equal size the tail is paid for by the head: coverage of all rows falls. Where it is "
        "promised, adjusted sets are larger than those of LAC.",
        "",
    ]
