"""Prediction sets as the column `set_ids`, made a block of rows at a time."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from scipy.sparse import csr_array

from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.scores import Nonconformity, sets_of
from llmlabel.data import with_columns

BLOCK_CELLS = 4_000_000
"""Rows x labels of the sets that are made at a time."""


def with_set_ids(dataset: Dataset, probs: csr_array, sets: Callable[[slice], csr_array]) -> Dataset:
    """Adds `set_ids`, most probable first, of equal ones the lower id.

    Args:
        dataset: The rows.
        probs: Their probabilities (rows, labels), which order the labels of a set.
        sets: The sets of some rows, (some rows, labels), true where a label is inside.
    """
    lengths, set_ids = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int32)]
    size = max(1, BLOCK_CELLS // probs.shape[1])
    for start in range(0, len(dataset), size):
        rows = slice(start, start + size)
        inside, block = sets(rows), probs[rows]
        row = np.repeat(np.arange(inside.shape[0]), np.diff(inside.indptr))
        # Indexed by nothing, SciPy gives an array of another shape.
        own = np.asarray(block[row, inside.indices]).ravel() if len(row) else np.empty(0)
        set_ids.append(inside.indices[np.lexsort((inside.indices, -own, row))].astype(np.int32))
        lengths.append(np.diff(inside.indptr))
    offsets = pa.array(np.cumsum(np.concatenate(lengths)), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(set_ids), pa.int32()))
    return with_columns(dataset, {"set_ids": (column, List(Value("int32")))})


def with_cut_sets(
    dataset: Dataset, probs: csr_array, limits: np.ndarray, how: Nonconformity, *, seed: int
) -> Dataset:
    """`set_ids` of the labels whose score is at most a limit: (1, 1), (1, labels) or (rows, 1)."""
    uniforms = row_uniforms(dataset["id"][:], seed=seed)

    def sets(rows: slice) -> csr_array:
        own = limits if len(limits) == 1 else limits[rows]
        return sets_of(probs[rows], own, how, uniforms[rows])

    return with_set_ids(dataset, probs, sets)
