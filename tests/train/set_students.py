"""Small decoders of sets, for the tests of their training and of themselves."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.seq2set import (
    train_seq2set,
)

LABELS = load_labels(["cat", "mat", "money"], multilabel=True)
WEIGHTS = "set_decoder.safetensors"

KINDS = [
    ("the cat sat", [0]),
    ("the cat sat on the mat", [0, 1]),
    ("business and sports", [2]),
    ("the cat sat on the mat and business and sports", [0, 1, 2]),
    ("a catfish is no", []),
]


def table(rows: int = 30) -> Dataset:
    """Texts of 0 to 3 things; who is in the set has 0.9, who is not 0.1."""
    texts = [f"{KINDS[i % 5][0]} {i // 5}" for i in range(rows)]
    probs = np.where(members(rows), 0.9, 0.1)
    ids = [f"r{i}" for i in range(rows)]
    return SoftLabels.from_dense(probs, LABELS).add_to(
        Dataset.from_dict({"id": ids, "text": texts})
    )


def members(rows: int = 30) -> np.ndarray:
    found = np.zeros((rows, 3), dtype=bool)
    for row in range(rows):
        found[row, KINDS[row % 5][1]] = True
    return found


def train(
    dataset: Dataset, model: Path, output: Path, labels: LabelSpace = LABELS, **given: Any
) -> Path:
    arguments = {
        "head_learning_rate": 0.02,
        "num_train_epochs": 25,
        "dtype": "float32",
        "per_device_train_batch_size": 10,
        "max_length": 128,
        "width": 24,
        "dropout": 0.1,
    }
    return train_seq2set(dataset, labels, model=str(model), output=output, **{**arguments, **given})
