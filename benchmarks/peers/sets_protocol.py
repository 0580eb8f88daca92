"""What a run of the benchmark of prediction sets is given and what it prints; numpy only.

    PYTHON benchmarks/peers/sets_NAME.py --score lac --rows-cal 10000 --rows-test 10000 --labels 10000

One long-tailed problem with one label a row: label j has the prior 1 / (j + 1)^1.1, a row's logits are
noise (sd 1.5) and half the log prior, the true label gets N(9, 3) on top; softmax, float32. It is made
in blocks of 500 rows, each from a generator of its own, so that the same rows come out whether they are
held whole or streamed.

Seconds are without imports and without making the rows, on the clock and of the processor (`cpu_s`).
`extra_mb` is the largest resident size while sets are made less that before, when both matrices are
there already. With --matrices N the rows are N small problems (`small`) instead, one after the other.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from protocol import forget_peak, peak_mib

BLOCK = 500
SMALL = {"cal": 500, "test": 1000, "labels": 60}

Predict = Callable[[Any], np.ndarray]
Calibrate = Callable[..., Predict]


def prior(labels: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, labels + 1) ** 1.1
    return weights / weights.sum()


def block(number: int, rows: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (rows, labels) and true labels of one block."""
    rng = np.random.default_rng([seed, number])
    shares = prior(labels)
    gold = rng.choice(labels, size=rows, p=shares)
    z = rng.standard_normal((rows, labels), dtype=np.float32) * 1.5
    z += (0.5 * np.log(shares)).astype(np.float32)
    z[np.arange(rows), gold] += rng.normal(9.0, 3.0, rows).astype(np.float32)
    z -= z.max(axis=1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=1, keepdims=True)
    return z, gold


def blocks(rows: int, labels: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, start in enumerate(range(0, rows, BLOCK)):
        yield block(number, min(BLOCK, rows - start), labels, seed)


def dense(rows: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All blocks as one matrix."""
    probs, gold, start = np.empty((rows, labels), np.float32), np.empty(rows, np.int64), 0
    for some, true in blocks(rows, labels, seed):
        probs[start : start + len(true)], gold[start : start + len(true)] = some, true
        start += len(true)
    return probs, gold


def small(rows: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weaker probabilities, float64: sets of 10 to 20 of 60 labels."""
    rng = np.random.default_rng(seed)
    shares = prior(labels)
    gold = rng.choice(labels, rows, p=shares)
    z = rng.normal(size=(rows, labels)) * 1.2 + 0.5 * np.log(shares)
    z[np.arange(rows), gold] += rng.normal(2.5, 1.5, rows)
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True), gold


def resident_mb() -> float:
    pages = Path("/proc/self/statm").read_text("utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE") / 2**20


def arguments(scores: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--score", choices=scores, default=scores[0])
    parser.add_argument("--rows-cal", type=int, default=2000)
    parser.add_argument("--rows-test", type=int, default=2000)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1, help="calibration; test rows have seed + 1")
    parser.add_argument("--matrices", type=int, default=0)
    parser.add_argument("--sets", type=Path, help="file of the sets: places in the flat matrix")
    return parser.parse_args()


def same(values: Any) -> Any:
    return values


def run(
    package: str,
    calibrate: Calibrate,
    args: argparse.Namespace,
    prepare: Callable[[np.ndarray], Any] = same,
) -> None:
    """Prints one JSON line; `prepare` turns a matrix into the kind that the package takes.

    `calibrate(score, matrix, gold, alpha=, seed=)` gives a function from a matrix to its sets: a
    boolean matrix, dense or CSR.
    """
    warnings.filterwarnings("ignore")
    out = {"package": package, "version": version(package), "score": args.score}
    if args.matrices:
        inside = []
        for seed in range(args.matrices):
            probs, gold = small(SMALL["cal"] + SMALL["test"], SMALL["labels"], seed)
            cal, test = prepare(probs[: SMALL["cal"]]), prepare(probs[SMALL["cal"] :])
            predict = calibrate(args.score, cal, gold[: SMALL["cal"]], alpha=args.alpha, seed=seed)
            inside.append(places(predict(test)) + seed * SMALL["test"] * SMALL["labels"])
        np.save(args.sets, np.concatenate(inside))
        print(json.dumps({**out, "cells": args.matrices * SMALL["test"] * SMALL["labels"]}))
        return
    probs, gold = dense(args.rows_cal, args.labels, args.seed)
    new, truth = dense(args.rows_test, args.labels, args.seed + 1)
    cal, test = prepare(probs), prepare(new)
    del probs, new
    forget_peak(os.getpid())
    before, wall, cpu = resident_mb(), time.perf_counter(), time.process_time()
    try:
        predict = calibrate(args.score, cal, gold, alpha=args.alpha, seed=args.seed)
        sets = predict(test)
    except Exception as error:  # a package that raises is a result too
        print(json.dumps({**out, "error": f"{type(error).__name__}: {str(error)[:160]}"}))
        return
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    extra = peak_mib(os.getpid()) - before
    flat = places(sets)
    if args.sets:
        np.save(args.sets, flat)
    out |= quality(flat, truth, args.labels)
    out |= {"seconds": seconds, "cpu_s": cpu_s, "data_mb": before, "extra_mb": extra}
    print(json.dumps(out))


def places(sets: Any) -> np.ndarray:
    """The members of all sets as places in the flat matrix, ascending."""
    if isinstance(sets, np.ndarray):
        return np.flatnonzero(sets)
    rows = np.repeat(np.arange(sets.shape[0], dtype=np.int64), np.diff(sets.indptr))
    return rows * sets.shape[1] + sets.indices


def quality(flat: np.ndarray, truth: np.ndarray, labels: int) -> dict[str, float]:
    """Coverage and mean size of sets, which are places in the flat matrix."""
    own = np.arange(len(truth), dtype=np.int64) * labels + truth
    return {"coverage": float(np.isin(own, flat).mean()), "size": len(flat) / len(truth)}
