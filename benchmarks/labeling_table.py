"""The table of `labeling.py` in Markdown, and the ratios that the project wants to reach."""

import operator
from collections.abc import Iterator
from typing import Any

SERVER, IN_PROCESS = "llmlabel, vLLM server", "llmlabel, vLLM in process"
HF = ("llmlabel, hf float32", "llmlabel, hf bfloat16")
STRINGS = ("distilabel, enum", "DSPy, Literal")
CAPPR, READ = "CAPPr float32", "by hand, one-token read"

COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

HEAD = (
    *("run", "rows", "texts/s cold", "texts/s warm", "prompt tokens computed per text"),
    *("accuracy", "NLL", "ECE", "rows invalid", "labels without a probability", "peak MiB"),
)


def ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each with `set`, `what`, `value`, `wanted` and `reached`; only those whose runs are there."""
    found = []
    for name, one in result["sets"].items():
        runs = {key: run for key, run in one["runs"].items() if "warm" in run}
        for what, value, wanted in [*against_peers(runs, one["labels"]), *own_promises(runs)]:
            sign, bound = wanted.split()
            row = {"set": name, "what": what, "value": round(value, 6), "wanted": wanted}
            found.append(row | {"reached": bool(COMPARE[sign](value, float(bound)))})
    return found


def against_peers(runs: dict[str, Any], labels: int) -> Iterator[tuple[str, float, str]]:
    if SERVER in runs:
        ours = runs[SERVER]
        for peer in [one for one in STRINGS if one in runs]:
            yield f"texts/s: {SERVER} / {peer}", speed(ours) / speed(runs[peer]), ">= 3"
            if "accuracy_corrected" in ours:
                gain = ours["accuracy_corrected"] - runs[peer]["accuracy"]
                yield f"accuracy: {SERVER} corrected - {peer}", gain, "> 0"
        if READ in runs:
            yield f"texts/s: {SERVER} / {READ}", speed(ours) / speed(runs[READ]), ">= 0.8"
    if CAPPR in runs:
        theirs = runs[CAPPR]
        for name in [one for one in HF if one in runs]:
            times = speed(runs[name]) / speed(theirs)
            yield f"texts/s: {name} / CAPPr", times, ">= 5" if labels < 26 else ">= 20"
            share = runs[name]["peak_mib"] / theirs["peak_mib"]
            yield f"peak memory: {name} / CAPPr", share, "< 1"
        if theirs["difference"] is not None:
            yield f"largest difference: {HF[0]}, CAPPr", theirs["difference"], "<= 0.001"


def own_promises(runs: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    for name in [one for one in (*HF, IN_PROCESS, SERVER) if one in runs]:
        run = runs[name]
        extra = run["warm"]["computed_tokens"] / run["needed_tokens"]
        yield f"computed / needed tokens: {name}", extra, "<= 1.3"
        yield f"rows invalid: {name}", run["invalid"], "<= 0"
        if "largest_bound" in run:
            yield f"largest bound on what is not read: {name}", run["largest_bound"], "<= 0.001"


def speed(run: dict[str, Any]) -> float:
    return run["warm"]["texts_per_s"]


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = ["# Labelling side by side", "", "```", result["command"], "```", ""]
    lines += [f"{machine['cores']} cores, {machine['processor']}; {load(result)}.", ""]
    lines += [f"{versions(result)}.", ""]
    lines += [
        "Cold: the first texts after loading, or after the server's prefix cache was emptied. Warm:",
        "other texts after that. Two values are before and after bias correction (batch",
        "calibration), which needs a distribution and as many rows as labels. Memory is that of",
        "the process, and of the server where there is one.",
        "",
    ]
    for name, one in result["sets"].items():
        lines += [f"## {name}: {one['labels']} labels, {one['rows']} texts", ""]
        lines += [row(HEAD), row(["---"] * len(HEAD))]
        lines += [row(cells(run, found, one)) for run, found in one["runs"].items()]
        lines.append("")
    lines += ["## Ratios", "", row(["set", "what", "value", "wanted", "reached"]), row(["---"] * 5)]
    for one in result.get("ratios", []):
        reached = "yes" if one["reached"] else "no"
        lines.append(row([one["set"], one["what"], f"{one['value']:.4g}", one["wanted"], reached]))
    return "\n".join(lines) + "\n"


def cells(name: str, run: dict[str, Any], texts: dict[str, Any]) -> list[str]:
    if "warm" not in run:
        said = f"skipped: {run['skipped']}" if "skipped" in run else f"failed: {run['failed']}"
        return [name, said.replace("|", "/"), *[""] * (len(HEAD) - 2)]
    warm = run["warm"]
    tokens = f"{warm['computed_tokens'] / warm['rows']:.1f}" if "computed_tokens" in warm else "-"
    no_probability = f"{run['no_probability']}"
    if run["no_probability"] == warm["rows"] * texts["labels"]:
        no_probability = "all"
    elif run["no_probability"] and "largest_bound" in run:
        no_probability += f" (together at most {run['largest_bound']:.2g} in a row)"
    memory = f"{run['peak_mib']:.0f}"
    if "server_peak_mib" in run:
        memory += f" + {run['server_peak_mib']:.0f}"
    return [
        *(name, f"{warm['rows']}", f"{run['cold']['texts_per_s']:.3g}"),
        *(f"{warm['texts_per_s']:.3g}", tokens),
        *(both(run, key) for key in ("accuracy", "nll", "ece")),
        *(f"{run['invalid']}", no_probability, memory),
    ]


def both(run: dict[str, Any], key: str) -> str:
    """The value before and after bias correction, as far as there are such."""
    if key not in run:
        return "-"
    corrected = run.get(f"{key}_corrected")
    return f"{run[key]:.3f}" + ("" if corrected is None else f" → {corrected:.3f}")


def row(values: Any) -> str:
    return f"| {' | '.join(values)} |"


def versions(result: dict[str, Any]) -> str:
    known: dict[str, dict[str, None]] = {}
    for one in result["sets"].values():
        for run in one["runs"].values():
            for package, version in run.get("versions", {}).items():
                known.setdefault(package, {})[version] = None
    return ", ".join(f"{package} {' / '.join(found)}" for package, found in known.items())


def load(result: dict[str, Any]) -> str:
    """How busy the machine was before each pass; where the two differ much, do not trust ratios."""
    found = [
        run[part]["load_before"]
        for one in result["sets"].values()
        for run in one["runs"].values()
        for part in ("cold", "warm")
        if part in run
    ]
    return f"load before the passes {min(found)} to {max(found)}" if found else "nothing was run"
