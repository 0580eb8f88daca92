"""crepes: sets from the scores of a matrix.

Pins (a venv of its own, Python 3.11): crepes==0.9.1 numpy==2.3.5 scipy==1.17.1 pandas==3.1.1
scikit-learn==1.9.1 (imported, but not declared)

    python sets_crepes.py --score lac --rows-cal 4000 --rows-test 20 --labels 10000

Every (row, label) pair is a pass over all calibration scores in a Python loop: keep rows x labels small.
"""

from typing import Any

import numpy as np
import sets_protocol
from crepes import ConformalClassifier
from crepes.extras import hinge

SCORES = {"lac": hinge}


def calibrate(
    score: str, probs: Any, gold: np.ndarray, *, alpha: float, seed: int
) -> sets_protocol.Predict:
    classifier = ConformalClassifier()
    classifier.fit(SCORES[score](probs, np.arange(probs.shape[1]), gold), seed=seed)
    return lambda test: classifier.predict_set(
        SCORES[score](test), confidence=1 - alpha, smoothing=False
    ).astype(bool)


if __name__ == "__main__":
    sets_protocol.run("crepes", calibrate, sets_protocol.arguments(list(SCORES)))
