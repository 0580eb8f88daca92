"""The rows of each update and of each pass: the same for any number of processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def update_batches(
    lengths: Sequence[int], update_rows: int, settings: dict[str, Any], steps: int
) -> Iterator[list[int]]:
    """The rows of each update: all once an epoch, in random order, each update's of similar length."""
    rng = np.random.default_rng(settings["seed"])
    made = 0
    while True:
        order = rng.permutation(len(lengths))
        window = 8 * update_rows
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            some = sorted(order[start : start + window].tolist(), key=lambda i: (lengths[i], i))
            batches += [some[i : i + update_rows] for i in range(0, len(some), update_rows)]
        for index in rng.permutation(len(batches)):
            if made == steps:
                return
            made += 1
            yield batches[index]


def passes(
    rows: list[int], lengths: Sequence[int], settings: dict[str, Any]
) -> Iterator[list[int]]:
    """Rows in their order, as many at a time as fit."""
    part: list[int] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        most = settings["per_device_train_batch_size"]
        if part and (len(part) == most or (len(part) + 1) * longest > settings["pass_tokens"]):
            yield part
            part, longest = [], lengths[row]
        part.append(row)
    if part:
        yield part
