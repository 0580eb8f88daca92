"""Sets of more rows than memory holds: scores and sets of a stream of blocks."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from llmlabel.calibrate.scores import Nonconformity, csr_of, sets_of, true_scores

_MAX_SUM = 1 + 1e-3


def scores_of_blocks(
    blocks: Iterable[tuple[csr_array | np.ndarray, np.ndarray]], how: Nonconformity, *, seed: int
) -> Float[np.ndarray, " rows"]:
    """`true_scores` of a stream of (probabilities, gold): no more than one block is ever held.

    Args:
        blocks: Dense (float32 or float64) or CSR blocks of rows, cut anywhere.
        how: The score.
        seed: Of the uniform numbers, which are drawn row after row; new rows take another seed.

    Raises:
        ValueError: If a row holds no probabilities.
    """
    rng = np.random.default_rng(seed)
    found = [np.empty(0)]
    for number, (probs, gold) in enumerate(blocks):
        _check_block(probs, number)
        found.append(true_scores(probs, gold, how, rng.random(len(gold))))
    return np.concatenate(found)


def sets_of_blocks(
    blocks: Iterable[csr_array | np.ndarray], threshold: float, how: Nonconformity, *, seed: int
) -> csr_array:
    """`sets_of` a stream of probabilities; only the sets are kept. See `scores_of_blocks`."""
    rng = np.random.default_rng(seed)
    lengths, indices, labels = [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.int32)], 0
    for number, probs in enumerate(blocks):
        _check_block(probs, number)
        sets = sets_of(probs, threshold, how, rng.random(probs.shape[0]))
        lengths.append(np.diff(sets.indptr))
        indices.append(sets.indices.astype(np.int32))
        labels = probs.shape[1]
    ids = np.concatenate(indices)
    indices.clear()  # or they would be in memory twice while the array is made
    indptr = np.cumsum(np.concatenate(lengths))
    return csr_of(np.ones(len(ids), dtype=bool), ids, indptr, labels)


def _check_block(probs: csr_array | np.ndarray, number: int) -> None:
    """A NaN, a negative number or a row that sums to more than 1 is no distribution."""
    sums = np.asarray(probs.sum(axis=1))
    values = probs if isinstance(probs, np.ndarray) else probs.data
    if values.size and not (values.min() >= 0 and sums.max() <= _MAX_SUM):
        wrong = ~(sums <= _MAX_SUM)
        row = int(np.argmax(wrong)) if wrong.any() else -1
        what = f"row {row} sums to {sums[row]}" if wrong.any() else f"it holds {values.min()}"
        raise ValueError(
            f"block {number}: {what}; each row must hold probabilities of at least 0 that sum to "
            "at most 1"
        )
