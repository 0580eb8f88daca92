"""Rows and label spaces for tests of mining."""

from datasets import Dataset, List, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels

INTS = List(Value("int32"))


def space(count: int) -> LabelSpace:
    return load_labels(
        [{"id": f"l{i}", "name": f"label {i}"} for i in range(count)], multilabel=True
    )


def rows_of(gold: list[list[int] | None], texts: list[str] | None = None) -> Dataset:
    texts = texts or [f"text {i}" for i in range(len(gold))]
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "text": texts})
    return with_columns(rows, {"gold": (gold, INTS)})
