"""Prediction sets: how large, how fast, how much memory, and whether they are those of other packages.

    python benchmarks/sets.py --work FOLDER --part large labels powerset trees
    python benchmarks/sets.py --work FOLDER --part peers same counts --python mapie=PYTHON torchcp=PYTHON
    python benchmarks/sets.py --work FOLDER --part scope hierarchy tail [--data ../shared/data]
    python benchmarks/sets.py --work FOLDER --write

Every run is a process of its own from benchmarks/peers, where the pins of its virtual environment
stand, one after the other; what it found is kept in FOLDER, and is measured again only when its file
is deleted. Packages without a Python are left out. The last three parts are in sets_real.py. The last
command writes benchmarks/results/sets.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sets_page
import sets_real
from datasets import Dataset, List, Value
from peers.sets_risk import CASES, TRAIN, label_sets, risk_case
from scipy.sparse import csr_array

from llmlabel.calibrate.cuts import BUDGETS, Tree, kept_nodes
from llmlabel.calibrate.pac import PacTree, predict_tree
from llmlabel.calibrate.powerset import Powerset, Region, regions, set_scores
from llmlabel.calibrate.risk import fit_risk, predict_risk_sets
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
PEERS = HERE / "peers"
PAGE = HERE / "results" / "sets.md"
DATA = HERE.parents[1] / "shared" / "data"
Found = dict[str, Any]


class Bench:
    """Where runs are kept, and the Python of each package."""

    def __init__(self, work: Path, pythons: dict[str, str]) -> None:
        self.work, self.pythons = work, {"llmlabel": sys.executable, **pythons}

    def kept(self, name: str, measure: Callable[[], Found]) -> Found:
        """What was measured under this name, now or before."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            found = measure()
            path.write_text(json.dumps(found), "utf-8")
            print(name, json.dumps(found)[:300], flush=True)
        return json.loads(path.read_text("utf-8"))

    def process(self, name: str, package: str, *arguments: object) -> None:
        """Runs the script of a package, which prints one JSON line."""
        if package not in self.pythons:
            print(f"{name}: left out, there is no --python {package}=...", flush=True)
            return
        command = [self.pythons[package], PEERS / f"sets_{package}.py", *arguments]

        def measure() -> Found:
            run = subprocess.run(
                [str(part) for part in command],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            return {**json.loads(run.stdout.splitlines()[-1]), "load": os.getloadavg()[0]}

        self.kept(name, measure)


# ------------------------------------------------------------------------------ beside packages


def large(bench: Bench) -> None:
    for score in ("none", "lac", "aps"):
        bench.process(f"large {score}", "llmlabel", "stream", score, 100_000, 100_000, 10_000)


def labels(bench: Bench) -> None:
    for score in ("none", "lac", "aps"):
        bench.process(f"labels {score}", "llmlabel", "stream", score, 10_000, 5_000, 100_000)


def peers(bench: Bench) -> None:
    for score in ("lac", "aps"):
        for package in ("llmlabel", "torchcp", "puncc", "mapie"):
            rows = ["--rows-cal", 10_000, "--rows-test", 10_000, "--labels", 10_000]
            name = f"peers {score} {package}"
            sets = bench.work / f"{name}.npy"
            bench.process(name, package, "--score", score, *rows, "--sets", sets)
    for package in ("llmlabel", "crepes"):
        rows = ["--rows-cal", 4000, "--rows-test", 20, "--labels", 10_000]
        name = f"peers few {package}"
        bench.process(name, package, "--score", "lac", *rows, "--sets", bench.work / f"{name}.npy")


def same(bench: Bench) -> None:
    """Sets of five small matrices, and of risk control."""
    for score in ("lac", "aps_whole"):
        for package in ("llmlabel", "mapie", *(("torchcp", "puncc", "crepes") * (score == "lac"))):
            name = f"same {score} {package}"
            sets = bench.work / f"{name}.npy"
            bench.process(name, package, "--score", score, "--matrices", 5, "--sets", sets)
    if "mapie" in bench.pythons:
        bench.kept("same risk", lambda: risk(bench))


def risk(bench: Bench) -> Found:
    answers = bench.work / "risk mapie.json"
    command = [bench.pythons["mapie"], PEERS / "sets_mapie.py", "risk", answers]
    subprocess.run([str(part) for part in command], check=True)
    theirs = iter(json.loads(answers.read_text("utf-8")))
    cells = differing = 0
    space = space_of(12, multilabel=True)
    for seed in range(5):
        probs, truth = risk_case(seed)
        rows = table(probs, truth, space)
        for method, bound, alpha in CASES:
            fitted = fit_risk(
                rows, space, alpha=alpha, method=method, bound=bound or "hoeffding_bentkus"
            )
            said = np.zeros(probs.shape, dtype=bool)
            for row, ids in enumerate(predict_risk_sets(rows, space, fitted)["set_ids"][:]):
                said[row, ids] = True
            expected = np.zeros(probs.size, dtype=bool)
            expected[next(theirs)] = True
            cells, differing = cells + said.size, differing + int((said.ravel() != expected).sum())
    return {"cells": cells, "differing": differing, "cases": 5 * len(CASES)}


def space_of(count: int, *, multilabel: bool) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(count))
    return LabelSpace(names, names, ("",) * count, ((),) * count, multilabel)


def table(probs: np.ndarray, truth: np.ndarray, space: LabelSpace) -> Dataset:
    rows = SoftLabels.from_dense(probs, space).add_to(
        Dataset.from_dict({"id": [f"{i:06}" for i in range(len(probs))]})
    )
    gold = [np.flatnonzero(row).tolist() for row in truth]
    return with_columns(rows, {"gold": (gold, List(Value("int32")))})


# --------------------------------------------------------------------------- sets of label sets


def row_regions(
    probs: np.ndarray, truth: np.ndarray, cal: int, skipped: int = 0
) -> tuple[list[Region], float]:
    """Regions at alpha 0.1 of the rows after the calibration rows, and their coverage."""
    space = space_of(probs.shape[1], multilabel=True)
    scores = set_scores(csr_array(probs.astype(np.float32)), truth)
    gold, new = scores[skipped : skipped + cal], slice(skipped + cal, None)
    fitted = Powerset(0.1, 2.0, tuple(np.sort(gold).tolist()), space.fingerprint)
    rows = table(probs[new], truth[new], space)
    return list(regions(rows, space, fitted)), float((scores[new] <= fitted.threshold).mean())


COUNTED = ((6, 1000, 300), (10, 1000, 300), (12, 1000, 150))
"""Labels, calibration rows, test rows."""


def counts(bench: Bench) -> None:
    for count, cal, test in COUNTED:
        bench.process(f"counts mulaconf {count}", "mulaconf", count, cal, test)

        def measure(count: int = count, cal: int = cal, test: int = test) -> Found:
            probs, truth = label_sets(TRAIN + cal + test, count, steps=64)
            start = time.process_time()
            found, _ = row_regions(probs, truth, cal, TRAIN)
            numbers = [region.count() for region in found]
            exact = [int(low) for low, high in numbers if low == high]
            return {"counts": exact, "cpu_s": time.process_time() - start}

        bench.kept(f"counts llmlabel {count}", measure)


def powerset(bench: Bench) -> None:
    def ninety() -> Found:
        found, covered = row_regions(*label_sets(2200, 90), 2000)
        start = time.process_time()
        both = np.array([region.count() for region in found])
        seconds = time.process_time() - start
        finer = np.array([region.count(cells=2**18) for region in found[:60]])
        width, truth = both[:, 1] / both[:, 0] - 1, finer.mean(axis=1, keepdims=True)
        return {
            "coverage": covered,
            "ms": 1000 * seconds / len(found),
            "width": [float(np.median(width)), float(width.max())],
            "error": float(np.abs(both[:60] / truth - 1).max()),
            "finer": float((finer[:, 1] / finer[:, 0]).max() - 1),
            "median": float(np.median(both[:, 0])),
            "largest": float(both[:, 1].max()),
        }

    def many() -> Found:
        found, covered = row_regions(*label_sets(700, 500, shape=(0.02, 5.0)), 500)
        seconds = []
        for region in found:
            start = time.process_time()
            listed = list(islice(region, 1000))
            seconds.append((time.process_time() - start, len(listed)))
        full = [taken for taken, listed in seconds if listed == 1000]
        return {"coverage": covered, "rows": len(full), "longest": max(full, default=0.0)}

    bench.kept("powerset 90", ninety)
    bench.kept("powerset 500", many)


# ------------------------------------------------------------------------------------------ trees


def random_tree(rng: np.random.Generator, nodes: int, deep: float) -> Tree:
    """Preorder; the deeper, the more often a node hangs below the one before."""
    parents, stack = [-1], [0]
    for node in range(1, nodes):
        last = len(stack) - 1
        at = last if rng.random() < deep else int(rng.integers(0, len(stack)))
        stack = stack[: at + 1]
        parents.append(stack[-1])
        stack.append(node)
    costs = rng.exponential(0.3, nodes) * (rng.random(nodes) < 0.3) * (30 / (0.09 * nodes))
    return Tree(np.array(parents), costs)


def trees(bench: Bench) -> None:
    def measure() -> Found:
        rng, found = np.random.default_rng(0), {}
        anchor = len(BUDGETS) // 2
        for deep in (0.2, 0.6, 0.95):
            some = [random_tree(rng, 10_000, deep) for _ in range(5)]
            for holes in (1, 4):
                fitted = PacTree(0.1, 0.05, holes, BUDGETS, anchor, anchor + 3, 0, 100)
                seconds = []
                for fit in (lambda tree, h=holes: kept_nodes(tree, holes=h), None):
                    start = time.process_time()
                    for tree in some:
                        fit(tree) if fit else predict_tree(tree, fitted)
                    seconds.append(1000 * (time.process_time() - start) / len(some))
                far = replace(fitted, level=len(BUDGETS) - 1)
                start = time.process_time()
                for tree in some:
                    predict_tree(tree, far)
                seconds.append(1000 * (time.process_time() - start) / len(some))
                found[f"{deep} {holes}"] = seconds
        return found

    bench.kept("trees", measure)


PARTS: dict[str, Callable[[Bench], None]] = {
    one.__name__: one for one in (large, labels, peers, same, counts, powerset, trees)
}
REAL = ("scope", "hierarchy", "tail")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="*", choices=[*PARTS, *REAL], default=[])
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, dict(pair.split("=", 1) for pair in args.python))
    for part in args.part:
        if part in PARTS:
            PARTS[part](bench)
        else:
            measure = getattr(sets_real, part)
            bench.kept(part, lambda measure=measure: measure(args.data, args.work))
    if args.write:
        PAGE.write_text(sets_page.page(args.work), "utf-8")


if __name__ == "__main__":
    main()
