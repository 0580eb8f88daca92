"""Small students of two labels, for the tests of their training and their predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train import classifier, loop
from llmlabel.train.classifier import train_classifier
from llmlabel.train.network import LoRA

LABELS = load_labels(["animal", "money"])
NO_DROPOUT = LoRA(r=4, alpha=16, dropout=0.0)


def table(rows: int = 24, labels: LabelSpace = LABELS) -> Dataset:
    """Texts about two things, with soft labels that lean the right way."""
    kinds = ["the cat sat", "business and money"]
    texts = [kinds[i % 2] + " on the mat" * (i % 3) + f" {i}" for i in range(rows)]
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])[np.arange(rows) % 2]
    ids = [f"r{i}" for i in range(rows)]
    return SoftLabels.from_dense(probs, labels).add_to(
        Dataset.from_dict({"id": ids, "text": texts})
    )


def train(
    dataset: Dataset, model: Path, output: Path, labels: LabelSpace = LABELS, **given: object
) -> Path:
    arguments = {
        "pooling": "mean",
        "learning_rate": 0.02,
        "num_train_epochs": 6,
        "dtype": "float32",
        "per_device_train_batch_size": 8,
        "lora": NO_DROPOUT,
        "max_length": 128,
    }
    return train_classifier(
        dataset, labels, model=str(model), output=output, **{**arguments, **given}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def losses_of(
    monkeypatch: pytest.MonkeyPatch, rows: Dataset, labels: LabelSpace, **given: Any
) -> Any:
    """The function that `train_classifier` trains with, and its rows."""
    found: dict[str, Any] = {}

    def train_student(rows: Any, labels: Any, losses: Any, settings: Any, **more: Any) -> Path:
        found.update(losses=losses, rows=rows, more=more)
        return Path("model")

    monkeypatch.setattr(classifier, "train_student", train_student)
    train_classifier(rows, labels, model="m", output=Path("o"), **given)
    return found


def validation_of(texts: list[str], gold: list[int], **columns: object) -> Dataset:
    rows = Dataset.from_dict({"text": texts, **columns})
    return with_columns(rows, {"gold": ([[one] for one in gold], List(Value("int32")))})


def killed_in_update(
    number: int, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Path], **given: Any
) -> None:
    alive, calls = loop._Run.update, iter(range(1000))

    def update(run: Any, chosen: list[int]) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        alive(run, chosen)

    with monkeypatch.context() as now:
        now.setattr(loop._Run, "update", update)
        with pytest.raises(KeyboardInterrupt):
            call(save_steps=1, **given)
