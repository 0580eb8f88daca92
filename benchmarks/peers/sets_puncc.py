"""puncc: split conformal sets of a matrix.

Pins (a venv of its own, Python 3.11): puncc==0.9.3 numpy==1.26.4 scikit-learn==1.9.1 scipy==1.13.1

    python sets_puncc.py --score aps --rows-cal 10000 --rows-test 10000 --labels 10000

It gives one list of labels a row; making a matrix of them is part of its time.
"""

from typing import Any

import numpy as np
import sets_protocol
from deel.puncc.api.prediction import BasePredictor
from deel.puncc.classification import APS, LAC

SCORES = {"lac": LAC, "aps": APS}


class Matrix(BasePredictor):
    """A trained predictor whose input already is its probabilities."""

    def __init__(self) -> None:
        super().__init__(model=None, is_trained=True)

    def fit(self, X: Any, y: Any, **settings: Any) -> None:
        """Nothing."""

    def predict(self, X: Any, **settings: Any) -> Any:
        """The input."""
        return X

    def copy(self) -> "Matrix":
        """Another one."""
        return Matrix()


def calibrate(
    score: str, probs: Any, gold: np.ndarray, *, alpha: float, seed: int
) -> sets_protocol.Predict:
    np.random.seed(seed)  # noqa: NPY002  # it draws from the global generator
    conformal = SCORES[score](Matrix(), train=False)
    conformal.fit(X_calib=probs, y_calib=gold)

    def predict(test: np.ndarray) -> np.ndarray:
        _, sets = conformal.predict(test, alpha=alpha)
        matrix = np.zeros(test.shape, bool)
        for row, members in enumerate(sets):
            matrix[row, list(members)] = True
        return matrix

    return predict


if __name__ == "__main__":
    sets_protocol.run("puncc", calibrate, sets_protocol.arguments(list(SCORES)))
