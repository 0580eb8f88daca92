"""An encoder without a model, and label spaces of few words, for tests of many labels."""

from typing import Any

import numpy as np

from llmlabel.labelspace import LabelSpace


class Letters:
    """Reads a text as a vector drawn from its letters; remembers what it has read."""

    def __init__(self, width: int = 8, salt: int = 0) -> None:
        self.width, self.salt, self.read = width, salt, []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.read += texts
        rows = [
            np.random.default_rng([self.salt, *text.encode()]).normal(size=self.width)
            for text in texts
        ]
        vectors = np.array(rows).reshape(len(texts), self.width)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def space(names: list[str]) -> LabelSpace:
    """A label that repeats a name lies below the one before it, for siblings may not."""
    again = [name in names[:i] for i, name in enumerate(names)]
    return LabelSpace(
        tuple(f"l{i}" for i in range(len(names))),
        tuple(names),
        ("",) * len(names),
        tuple((f"l{i - 1}",) if under else () for i, under in enumerate(again)),
        multilabel=True,
    )
