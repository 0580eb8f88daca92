"""TorchCP: split conformal sets of a matrix.

Pins (a venv of its own, Python 3.11): torch==2.13.0 (CPU build) numpy==2.3.5 transformers==5.23.0
scikit-learn==1.9.1 pandas==3.1.1 xxhash==4.1.0 psutil==7.2.2 requests==2.34.2 tqdm, then without what
they ask for (pip says so):

    pip install --no-deps torchcp==1.2.1 torch-geometric==2.8.1
    python sets_torchcp.py --score aps --rows-cal 10000 --rows-test 10000 --labels 10000

A plain install fails on a machine without CUDA, where torchsort cannot be built. Only one of its losses
uses torchsort, so an empty module stands in. Licence LGPL-3: it runs beside the project. It takes
logits: these are made beforehand.
"""

import sys
import types
from typing import Any

import numpy as np
import sets_protocol

try:
    import torchsort  # noqa: F401
except ModuleNotFoundError:
    stub = types.ModuleType("torchsort")
    stub.soft_rank = stub.soft_sort = None
    sys.modules["torchsort"] = stub

import torch
from torchcp.classification.predictor import SplitPredictor
from torchcp.classification.score import APS, LAC

SCORES = {"lac": LAC, "aps": APS}


def logits(probs: np.ndarray) -> Any:
    own = probs.astype(np.float32, copy=False)
    np.log(own, out=own)
    return torch.from_numpy(own)


def calibrate(
    score: str, given: Any, gold: np.ndarray, *, alpha: float, seed: int
) -> sets_protocol.Predict:
    torch.manual_seed(seed)
    predictor = SplitPredictor(SCORES[score](), alpha=alpha)
    predictor.calculate_threshold(given, torch.from_numpy(np.asarray(gold)))
    return lambda test: predictor.predict_with_logits(test).numpy().astype(bool)


if __name__ == "__main__":
    sets_protocol.run("torchcp", calibrate, sets_protocol.arguments(list(SCORES)), logits)
