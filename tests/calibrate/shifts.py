"""Gold rows, and new rows that are like them or not."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
LABELS = load_labels(["a", "b", "c"])


def rows_of(
    seed: int, rows: int, *, name: str, noise: float = 1.0, share: Any = (1, 1, 1)
) -> Dataset:
    """Softmax of noise and a bonus for the true label."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(3, rows, p=np.array(share) / sum(share))
    logits = rng.normal(0, noise, (rows, 3))
    logits[np.arange(rows), gold] += 2.0
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)]})
    table = with_columns(table, {"gold": ([[int(g)] for g in gold], List(Value("int32")))})
    return SoftLabels.from_dense(probs, LABELS).add_to(table)


def shuffled(dataset: Dataset, seed: int = 0) -> Dataset:
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset)))


def with_fitted_sets(*tables: Dataset) -> list[Dataset]:
    conformal = fit_conformal(tables[0], LABELS, alpha=0.1)
    return [predict_sets(table, LABELS, conformal) for table in tables]
