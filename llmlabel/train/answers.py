"""What students write beside a text, in the columns that teachers write."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def with_answers(
    block: Dataset,
    probs: Float[np.ndarray, "rows labels"],
    labels: LabelSpace,
    *,
    name: str,
    errors: Sequence[str | None],
) -> Dataset:
    """Adds soft labels, `engine` and `error`; what a teacher has and no student is emptied."""
    return with_columns(
        SoftLabels.from_dense(probs, labels).add_to(block),
        {
            "engine": ([name] * len(block), Value("string")),
            "error": (list(errors), Value("string")),
            # of a teacher whose rows these may be
            "label_mass": ([None] * len(block), Value("float32")),
            "prompt_sha": ([None] * len(block), Value("string")),
        },
    )


def read_errors(
    texts: Sequence[str], tokenizer: Any, limit: int
) -> tuple[list[int], list[str | None]]:
    """Rows that hold a text, and what is told of each row: that it is empty, or that it is cut."""
    kept = [row for row, text in enumerate(texts) if text and text.strip()]
    errors: list[str | None] = ["empty text"] * len(texts)
    for row in kept:
        errors[row] = cut_message(len(tokenizer(texts[row], verbose=False).input_ids), limit)
    return kept, errors


def cut_message(tokens: int, limit: int) -> str | None:
    """Null where the text is not cut."""
    return f"text cut: {tokens} tokens, the limit is {limit}" if tokens > limit else None
