"""Rows with soft labels and gold, for the tests of thresholds and of what comes with them."""

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

ALL = ["lac", "aps", "raps", "saps", "margin"]
SEEDS = pytest.mark.parametrize("seed", range(20))


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def random_rows(seed: int, count: int, labels: int) -> tuple[Dataset, list[list[float]]]:
    """Rows with ties, missing mass, none-of-these, and no soft label; and what is stored of them."""
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 9, (count, labels)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1) * rng.choice([1, 1.25], (count, 1))
    probs[rng.random(count) < 0.04] = 0
    guess = np.where(rng.random(count) < 0.85, probs.argmax(axis=1), rng.integers(0, labels, count))
    gold = [[] if rng.random() < 0.03 else [int(g)] for g in guess]
    ids = [f"{seed}/{i}" for i in range(count)]
    soft = SoftLabels.from_dense(probs, space(labels))
    dataset = soft.add_to(Dataset.from_dict({"id": ids, "gold": gold}))
    return dataset, soft.dense().tolist()


def table(probs: list[list[float]], gold: list[list[int]]) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(np.array(probs), space(len(probs[0]))).add_to(rows)


def voted(seed: int, count: int, *, name: str = "v") -> Dataset:
    """Soft labels from 5 votes a row, of which gold wins 3 on average: nearly all scores tie."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 4, count)
    cast = np.where(rng.random((count, 5)) < 0.6, gold[:, None], rng.integers(0, 4, (count, 5)))
    probs = (cast[:, :, None] == np.arange(4)).mean(axis=1)
    rows = {"id": [f"{name}{seed}/{i}" for i in range(count)], "gold": gold[:, None].tolist()}
    return SoftLabels.from_dense(probs, space(4)).add_to(Dataset.from_dict(rows))
