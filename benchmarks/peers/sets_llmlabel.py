"""llmlabel: sets of a matrix, or of a stream of rows that is never held whole.

    python sets_llmlabel.py --score aps --rows-cal 10000 --rows-test 10000 --labels 10000
    python sets_llmlabel.py stream aps 100000 100000 10000      (or none: the rows alone are made)

"aps_whole" is MAPIE's: the numbers of its generator in calibration, and in the set the whole label that
crosses the threshold.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import sets_protocol
from protocol import forget_peak, peak_mib

from llmlabel.calibrate.quantile import conformal_quantile
from llmlabel.calibrate.scores import Nonconformity, sets_of, true_scores
from llmlabel.calibrate.streams import scores_of_blocks, sets_of_blocks
from llmlabel.metrics import coverage, set_size

SCORES = ("lac", "aps", "aps_whole")
ALPHA = 0.1


def parts(probs: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(probs), sets_protocol.BLOCK):
        yield probs[start : start + sets_protocol.BLOCK]


def calibrate(
    score: str, probs: Any, gold: np.ndarray, *, alpha: float, seed: int
) -> sets_protocol.Predict:
    if score == "aps_whole":
        how = Nonconformity("aps")
        shares = 1 - np.random.RandomState(seed).uniform(size=len(gold))  # MAPIE's
        threshold = conformal_quantile(true_scores(probs, gold, how, shares), alpha)
        return lambda test: sets_of(test, threshold, how, np.zeros(len(test)))
    how = Nonconformity(score)
    rows = zip(parts(probs), parts(gold), strict=True)
    threshold = conformal_quantile(scores_of_blocks(rows, how, seed=seed), alpha)
    return lambda test: sets_of_blocks(parts(test), threshold, how, seed=seed + 1)


def stream(score: str, cal: int, test: int, labels: int) -> None:
    truth: list[np.ndarray] = []

    def rows() -> Iterator[np.ndarray]:
        for probs, gold in sets_protocol.blocks(test, labels, 2):
            truth.append(gold)
            yield probs

    forget_peak(os.getpid())
    before, wall, cpu = sets_protocol.resident_mb(), time.perf_counter(), time.process_time()
    found = {}
    if score == "none":
        made = sum(len(gold) for _, gold in sets_protocol.blocks(cal, labels, 1))
        found["rows"] = made + sum(len(probs) for probs in rows())
    else:
        how = Nonconformity(score)
        scores = scores_of_blocks(sets_protocol.blocks(cal, labels, 1), how, seed=1)
        sets = sets_of_blocks(rows(), conformal_quantile(scores, ALPHA), how, seed=2)
        found["sets_mb"] = (sets.data.nbytes + sets.indices.nbytes + sets.indptr.nbytes) / 2**20
    found |= {
        "seconds": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "extra_mb": peak_mib(os.getpid()) - before,
    }
    if score != "none":
        found |= {"coverage": coverage(sets, np.concatenate(truth)), "size": set_size(sets)}
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["stream"]:
        stream(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        sets_protocol.run("llmlabel", calibrate, sets_protocol.arguments(SCORES))
