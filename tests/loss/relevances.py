"""Relevances and embeddings for tests of retrieval losses."""

import numpy as np
import torch
from torch import Tensor

from llmlabel.loss.retrieval import Relevance

Rows = list[dict[int, float]]


def relevance_of(rows: Rows) -> Relevance:
    """Relevance of {label: value} of each row."""
    return Relevance(
        torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()]),
        torch.tensor([label for row in rows for label in row], dtype=torch.long),
        torch.tensor([value for row in rows for value in row.values()], dtype=torch.float64),
    )


def random_case(seed: int) -> tuple[Tensor, Tensor, Rows]:
    """Embeddings with ties; rows with none to all labels stored, some of them left out."""
    rng = np.random.default_rng(seed)
    rows, labels, width = int(rng.integers(2, 6)), int(rng.integers(4, 12)), 3
    pool = rng.normal(size=(labels, width))
    pool[1] = pool[labels - 1]
    texts = torch.from_numpy(rng.normal(size=(rows, width))).requires_grad_()
    relevance: Rows = []
    for _ in range(rows):
        ids = rng.choice(labels, int(rng.integers(0, labels + 1)), replace=False)
        relevance.append({int(i): float(rng.choice([0.0, 0.3, 1.0])) for i in np.sort(ids)})
    return texts, torch.from_numpy(pool).requires_grad_(), relevance
