r"""Very many labels: llmlabel's dual encoder beside linear models and sentence-transformers.

    python benchmarks/xmc.py --work FOLDER --part baselines peers ours --napkinxc PYTHON \
        --omikuji PYTHON --pecos PYTHON --sentence-transformers PYTHON --debtags FOLDER
    python benchmarks/xmc.py --work FOLDER --part losses negatives steps --data finna
    python benchmarks/xmc.py --work FOLDER --part write --debtags FOLDER

Data: finna_yso of ../shared/data, and what ../shared/data/build_debtags.py wrote to the folder that
`--debtags` names. Every method is a process of its own, one after the other, on one thread: the
scripts of benchmarks/peers, where the pins of their virtual environments stand. It is given texts
and labels to learn from and new texts, leaves their 100 best labels and may take `--minutes` of
processor time in all. What a method found is kept in FOLDER and is measured again only when its file
is deleted; `--who` picks methods. `write` measures the answers and makes benchmarks/results/xmc.md of
what is there.

`losses`: the same `--updates` with each loss, three seeds. `negatives`: one pass over `--rows` rows,
with all labels encoded in every update and with the kept vectors. `steps`: the time of an update at
more and more labels, which are repeated. `--training` takes settings of `train_dual_encoder` as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xmc_data
import xmc_page

HERE = Path(__file__).parent
PAGE = HERE / "results" / "xmc.md"
SHARED = HERE.parents[1] / "shared" / "data"
BASELINES = ("names", "centroid", "neighbours")
PACKAGES = ("napkinxc", "omikuji", "pecos", "sentence_transformers")
PEERS = (*PACKAGES, "sentence_transformers_bf16")
OURS = ("frozen", "trained")
LOSSES = ("softmax", "decoupled_softmax", "soft_topk", "bce")
SEEDS = (0, 1, 2)
STEPS = {"cached": (4000, 9000, 30_000), "all": (4000, 9000)}

MAX_LENGTH = {"finna": 64, "debtags": 128}
"""Tokens that language models read of a text."""


@dataclass(frozen=True)
class Bench:
    """Where runs are kept, the Python of each package, and what a run may take."""

    work: Path
    pythons: dict[str, str]
    minutes: float

    def measure(self, data: str, name: str, script: str, **job: Any) -> None:
        """Runs a script, which leaves answers and prints one JSON line, unless it is there."""
        folder = self.work / data
        kept = folder / f"{name}.json"
        if kept.is_file():
            return
        python = self.pythons.get(script, sys.executable)
        if script in PACKAGES and script not in self.pythons:
            option = f"--{script.replace('_', '-')}"
            print(f"{data} {name}: left out, there is no {option} PYTHON", flush=True)
            return
        path = HERE / "peers" / f"xmc_{script}.py"
        job |= {"problem": str(folder / "problem.json"), "answers": str(folder / name)}
        job |= {"minutes": self.minutes, "work": str(folder)}
        task = folder / f"job {name}.json"
        task.write_text(json.dumps(job), "utf-8")
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        run = subprocess.run(
            [python, str(path), str(task)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **single},
        )
        line = run.stdout.splitlines()[-1]
        kept.write_text(line, "utf-8")
        print(data, name, line, flush=True)


def problems(args: argparse.Namespace) -> dict[str, xmc_data.Problem]:
    """Those whose files are there."""
    sources: dict[str, tuple[Path | None, Callable[[Path], xmc_data.Problem]]] = {
        "finna": (args.shared, xmc_data.finna),
        "debtags": (args.debtags, xmc_data.debtags),
    }
    found = {}
    for data in args.data:
        path, read = sources[data]
        if path is None or not path.is_dir():
            print(f"{data}: left out, its files are not there ({path})", flush=True)
            continue
        found[data] = read(path)
        (args.work / data).mkdir(parents=True, exist_ok=True)
        problem = args.work / data / "problem.json"
        if not problem.is_file():
            found[data].write(problem)
    return found


def baselines(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for method in asked(args, BASELINES):
        bench.measure(data, method, "sklearn", method=method)


def peers(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for method in asked(args, PEERS):
        script, bf16 = method.removesuffix("_bf16"), method.endswith("_bf16")
        bench.measure(data, method, script, max_length=MAX_LENGTH[data], bf16=bf16)


def ours(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for method in asked(args, OURS):
        job = {"method": method, "max_length": MAX_LENGTH[data], "training": args.training}
        bench.measure(data, method, "llmlabel", **job)


def one(bench: Bench, args: argparse.Namespace, data: str, name: str, **job: Any) -> None:
    job["training"] = {**args.training, **job["training"]}
    bench.measure(data, name, "llmlabel", method="one", max_length=MAX_LENGTH[data], **job)


def losses(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for seed in SEEDS:
        for loss in LOSSES:
            training = {"loss": loss, "seed": seed}
            one(bench, args, data, f"loss {loss} {seed}", training=training, steps=args.updates)


def negatives(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for kind in STEPS:
        training = {"num_train_epochs": 1, "negatives": kind}
        one(bench, args, data, f"negatives {kind}", training=training, steps=-1, rows=args.rows)


def steps(bench: Bench, args: argparse.Namespace, data: str) -> None:
    for kind, counts in STEPS.items():
        for labels in counts:
            for number in (1, 4):
                job = {"steps": number, "labels": labels, "answers_too": False}
                name = f"steps {kind} {labels} {number}"
                one(bench, args, data, name, training={"negatives": kind}, **job)


PARTS = {part.__name__: part for part in (baselines, peers, ours, losses, negatives, steps)}


def asked(args: argparse.Namespace, methods: tuple[str, ...]) -> list[str]:
    return [method for method in methods if not args.who or method in args.who]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "write"), required=True)
    parser.add_argument(
        "--data", nargs="+", choices=("finna", "debtags"), default=["finna", "debtags"]
    )
    parser.add_argument("--who", nargs="+", choices=(*BASELINES, *PEERS, *OURS))
    for package in PACKAGES:
        parser.add_argument(f"--{package.replace('_', '-')}", metavar="PYTHON")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--debtags", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--training", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4096)
    args = parser.parse_args()
    known = problems(args)
    pythons = {name: value for name in PACKAGES if (value := getattr(args, name))}
    bench = Bench(args.work, pythons, args.minutes)
    for data in known:
        for part in args.part:
            if part != "write":
                PARTS[part](bench, args, data)
    if "write" in args.part:
        PAGE.write_text(xmc_page.page(args.work, known), "utf-8")


if __name__ == "__main__":
    main()
