"""MuLaConf: how many label sets each row's region holds, by going through all 2^labels.

Pins (a venv of its own, Python 3.11): mulaconf==0.3.0 torch==2.13.0 (CPU build) numpy==2.3.5
scipy==1.17.1 scikit-learn==1.9.1 pandas==3.1.1

    python sets_mulaconf.py LABELS CALIBRATION TEST      prints seconds and the counts of the test rows
"""

import json
import os
import sys
import time
import warnings

import numpy as np
import sets_protocol
from mulaconf import InductiveConformalPredictor
from protocol import forget_peak, peak_mib
from sets_risk import TRAIN, label_sets


def main() -> None:
    warnings.filterwarnings("ignore")
    labels, cal, test = map(int, sys.argv[1:4])
    probs, truth = label_sets(TRAIN + cal + test, labels, steps=64)
    parts = np.split(np.arange(len(probs)), [TRAIN, TRAIN + cal])
    train, gold, new = ((probs[part], truth[part].astype(int)) for part in parts)
    forget_peak(os.getpid())
    before, wall, cpu = sets_protocol.resident_mb(), time.perf_counter(), time.process_time()
    icp = InductiveConformalPredictor(*train, measure="norm")
    icp.calibrate(*gold)
    regions = icp.predict(new[0])
    regions.non_empty_prediction_regions = False
    counts = [len(some) for some in regions(significance_level=0.1)]
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - wall,
                "cpu_s": time.process_time() - cpu,
                "extra_mb": peak_mib(os.getpid()) - before,
                "counts": counts,
            }
        )
    )


if __name__ == "__main__":
    main()
