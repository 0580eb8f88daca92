"""MAPIE: split conformal sets of a matrix, and risk control of many labels.

Pins (a venv of its own, Python 3.11): mapie==1.6.0 scikit-learn==1.9.1 numpy==2.3.5 scipy==1.17.1

    python sets_mapie.py --score aps --rows-cal 10000 --rows-test 10000 --labels 10000
    python sets_mapie.py risk FILE      writes its thresholds' sets for `risk_case` of five seeds

It wants a classifier and rows of float64 that sum to 1 within 1e-5, so the matrix is wrapped and
normalised again; that is part of its time.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import sets_protocol
from mapie.classification import SplitConformalClassifier
from mapie.risk_control import MultiLabelClassificationController
from sets_risk import CASES, risk_case
from sklearn.base import BaseEstimator, ClassifierMixin

# name -> (conformity score, how the label that crosses the threshold is treated)
SCORES = {"lac": ("lac", None), "aps": ("aps", "randomized"), "aps_whole": ("aps", True)}


class Matrix(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose input already is its probabilities."""

    def __init__(self, labels: int = 2) -> None:
        self.labels = labels
        self.classes_ = np.arange(labels)

    def fit(self, X: Any, y: Any) -> "Matrix":
        """Nothing."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, X: Any) -> np.ndarray:
        """In float64, as MAPIE checks sums."""
        X = np.asarray(X, np.float64)
        return X / X.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label."""
        return self.predict_proba(X).argmax(axis=1)


def calibrate(
    score: str, probs: Any, gold: np.ndarray, *, alpha: float, seed: int
) -> sets_protocol.Predict:
    name, last = SCORES[score]
    classifier = SplitConformalClassifier(
        Matrix(probs.shape[1]),
        confidence_level=1 - alpha,
        conformity_score=name,
        prefit=True,
        random_state=seed,
    )
    classifier.conformalize(probs, gold)
    params = {} if last is None else {"conformity_score_params": {"include_last_label": last}}
    return lambda test: classifier.predict_set(test, **params)[1][:, :, 0]


def risk(path: Path) -> None:
    warnings.filterwarnings("ignore")
    found = []
    for seed in range(5):
        probs, truth = risk_case(seed)
        for method, bound, alpha in CASES:
            control = MultiLabelClassificationController(
                predict_function=lambda X: X,
                risk="recall",
                method=method,
                target_level=1 - alpha,
                confidence_level=0.9 if bound else None,
                rcps_bound=bound,
            )
            control.calibrate(probs, truth.astype(int))
            said = control.predict(probs)[:, :, 0]
            found.append(np.flatnonzero(said).tolist())
    path.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["risk"]:
        risk(Path(sys.argv[2]))
    else:
        sets_protocol.run("mapie", calibrate, sets_protocol.arguments(list(SCORES)))
