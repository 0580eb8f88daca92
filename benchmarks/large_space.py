"""The price of many labels: the trie's build and one row's time, 10,000 labels against 100.

    python benchmarks/large_space.py --vllm-python VENV/bin/python \
        --out benchmarks/results/large_space.json

Same engine, same texts, and a prompt that does not list the labels, so that only the reading
differs. Names are 2 to 4 of 30 words, and the 100 labels are the first of the 10,000. Each time is
the median over texts that were not seen before. Without --vllm-python only hf is measured. A table
goes beside the JSON file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from datasets import Dataset

from llmlabel import models
from llmlabel.engine.labeltrie import label_trie
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

WORDS = [
    *("account", "address", "airport", "booking", "camera", "cancel"),
    *("card", "cheap", "city", "claim", "daily", "delay"),
    *("email", "family", "foreign", "garden", "health", "hotel"),
    *("insurance", "late", "letter", "market", "missing", "music"),
    *("order", "paper", "refund", "travel", "weather", "winter"),
]
PROMPT = (
    "{% block system %}Name the topic of the user's text in a few words.{% endblock %}\n"
    "{% block user %}Text: {{ text }}\nTopic:{% endblock %}\n"
)
SUBJECTS = ("my luggage", "the hotel room", "an invoice", "the concert", "a parcel", "our garden")
EVENTS = ("never arrived", "was far too late", "costs more than last year", "has been cancelled")


def label_names(labels: int, *, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    names: dict[str, None] = {}
    while len(names) < labels:
        names[" ".join(rng.choice(WORDS, size=rng.integers(2, 5), replace=False))] = None
    return list(names)


def measured(engine: Any, names: list[str], sizes: list[int], texts: list[str]) -> dict[str, Any]:
    """Times of one engine; the first text of each space is a warm-up."""
    found: dict[str, Any] = {"engine": engine.name}
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "topic.jinja"
        prompt.write_text(PROMPT, "utf-8")
        for labels in sizes:
            start = time.perf_counter()
            trie = label_trie(engine.tokenizer, tuple(names[:labels]))
            build = time.perf_counter() - start
            space = load_labels(names[:labels])
            seconds, bounds = [], []
            for number, text in enumerate(texts):
                row = Dataset.from_dict({"id": [str(number)], "text": [text]})
                start = time.perf_counter()
                labelled = label_direct(row, engine, space, prompt=prompt)
                seconds.append(time.perf_counter() - start)
                bounds.append(float(SoftLabels.from_dataset(labelled, space).missing_mass[0]))
            found[str(labels)] = {
                "trie_nodes": len(trie),
                "trie_seconds": round(build, 4),
                "row_seconds": round(median(seconds[1:]), 4),
                "first_row_seconds": round(seconds[0], 4),
                "largest_bound": max(bounds),
            }
    few, many = found[str(sizes[0])], found[str(sizes[-1])]
    found["row_ratio"] = round(many["row_seconds"] / few["row_seconds"], 3)
    return found


def load_engine(name: str, model: str) -> Any:
    if name == "hf":
        from llmlabel.engine.hf import HFEngine

        return HFEngine(model)
    from llmlabel.engine.vllm import VLLMEngine

    return VLLMEngine(model, enforce_eager=True)


def markdown(result: dict[str, Any]) -> str:
    head = ("engine", "labels", "trie nodes", "trie built, s", "one row, s", "bound on the unread")
    lines = ["# 10,000 labels against 100", "", "```", result["command"], "```", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, found in result["engines"].items():
        for labels in [key for key in found if key.isdigit()]:
            one = found[labels]
            cells = (name, labels, one["trie_nodes"], one["trie_seconds"])
            cells += (one["row_seconds"], f"{one['largest_bound']:.2g}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for name, found in result["engines"].items():
        lines.append(f"{name}: a row takes {found['row_ratio']} times as long (wanted: at most 3).")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=int, nargs=2, default=[100, 10_000])
    parser.add_argument("--texts", type=int, default=6, help="of which the first is a warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of the names")
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--vllm-python", help="with vLLM and llmlabel")
    parser.add_argument("--only", choices=("hf", "vllm"), help="measure this engine, print JSON")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        names = label_names(max(arguments.labels), seed=arguments.seed)
        texts = [f"I am writing because {s} {e}." for e in EVENTS for s in SUBJECTS]
        engine = load_engine(arguments.only, models.fetch(arguments.model))
        found = measured(engine, names, arguments.labels, texts[: arguments.texts])
        print(json.dumps(found), flush=True)
        return
    shown = ["PATH" if part.startswith("/") else part for part in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/large_space.py", *shown])
    result: dict[str, Any] = {"command": command, "engines": {}}
    given = ["--labels", *map(str, arguments.labels), "--texts", str(arguments.texts)]
    given += ["--seed", str(arguments.seed), "--model", arguments.model]
    for name, python in (("hf", sys.executable), ("vllm", arguments.vllm_python)):
        if python is None:
            continue
        done = subprocess.run(
            [python, __file__, "--only", name, *given],
            stdout=subprocess.PIPE,
            check=True,
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ},  # GiB; only a CPU build reads it
        )
        last = [line for line in done.stdout.decode().split("\n") if line.startswith("{")][-1]
        result["engines"][name] = json.loads(last)
    print(markdown(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        arguments.out.with_suffix(".md").write_text(markdown(result), "utf-8")


if __name__ == "__main__":
    main()
