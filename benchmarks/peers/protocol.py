"""What a run of the labelling benchmark is given and what it prints; the standard library only.

    PYTHON benchmarks/peers/NAME.py JOB.json

A job holds `labels`, the rows `cold` and `warm` (each with `id` and `text`), `model` (a folder) or
`base_url` and `served` (a server's model name), `in_flight`, the path `answers`, and what a run
needs beyond that. Every run labels the cold rows right after loading, then the warm ones, which are
other texts; it writes one answer per warm row and prints one JSON line.

An answer has `id`, `pred` (a label, or null where the reply was none) and, where the tool gives
them, `probs` in the order of the labels (0 = not known).
"""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Rows = list[dict[str, Any]]
Counters = dict[str, float]

METRICS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "output_tokens": "vllm:generation_tokens_total",
    "requests": "vllm:request_success_total",
}


def read_job() -> Job:
    return json.loads(Path(sys.argv[1]).read_text("utf-8"))


def run(
    job: Job,
    label: Callable[[Rows], Rows],
    *,
    packages: tuple[str, ...],
    counters: Callable[[], Counters] | None = None,
) -> None:
    """Times `label` on the cold and the warm rows; `counters` only grow, as a server's do."""
    if counters is None and "base_url" in job:
        counters = lambda: server_counters(job["base_url"])  # noqa: E731
    summary: dict[str, Any] = {"versions": versions(packages)}
    answers: Rows = []
    for name in ("cold", "warm"):
        before = counters() if counters else {}
        load, start = os.getloadavg()[0], time.perf_counter()
        answers = label(job[name])
        seconds = time.perf_counter() - start
        after = counters() if counters else {}
        summary[name] = {
            "rows": len(answers),
            "seconds": round(seconds, 3),
            "texts_per_s": round(len(answers) / seconds, 4),
            "load_before": round(load, 2),
            **{key: after[key] - before[key] for key in after},
        }
    with Path(job["answers"]).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)
    summary["peak_mib"] = peak_mib(os.getpid())
    print(json.dumps(summary), flush=True)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Those of the packages that are installed here."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def server_counters(base_url: str) -> Counters:
    """Tokens and requests that a vLLM server has counted, over all its engines."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=60) as reply:
        lines = reply.read().decode()
    totals = {
        key: sum(float(x) for x in re.findall(rf"^{name}{{[^\n]*}} (\S+)$", lines, re.MULTILINE))
        for key, name in METRICS.items()
    }
    totals["computed_tokens"] = totals["prompt_tokens"] - totals.pop("cached_tokens")
    return totals


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it (Linux)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            content = path.read_text("utf-8", errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        parents[int(path.parent.name)] = int(content.rpartition(")")[2].split()[1])
    tree = [pid]
    for parent in tree:
        tree += [child for child, above in parents.items() if above == parent]
    return tree


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process and its descendants, each at its own peak."""
    total = 0
    for one in process_tree(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text("utf-8")
        except OSError:
            continue
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            total += int(found[1])
    return round(total / 1024, 1)


def forget_peak(pid: int) -> None:
    """Sets the peak of a process and its descendants to what they hold now."""
    for one in process_tree(pid):
        try:
            Path(f"/proc/{one}/clear_refs").write_text("5", "utf-8")
        except OSError:
            continue
