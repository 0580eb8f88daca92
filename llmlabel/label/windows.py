"""Long texts as overlapping windows, and one distribution out of those of the windows."""

import math
import re

import numpy as np
from jaxtyping import Float, Int

_WORD = re.compile(r"\S+")

_SHARED = 4
"""Neighbours share at least one in this many of their words (windows of one word share none)."""


def windows(text: str, *, words: int) -> list[str]:
    """The text in windows of `words` words, of which neighbours share at least a quarter.

    Overlapping segments as in Pappagari et al., "Hierarchical Transformers for Long Document
    Classification" (arXiv 1910.10781). Differs from the paper: words, not tokens; the last window
    ends with the text and is as long as the others, so that a scrap of a few words does not count
    as much as a full window.

    Args:
        text: what has at most `words` words is its only window and stays as it is.
        words: separated by white space; what stands between them is kept.
    """
    if words < 1:
        raise ValueError(f"windows need at least 1 word; got {words}")
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) <= words:
        return [text]
    last = len(spans) - words
    step = max(words - math.ceil(words / _SHARED), 1)
    starts = [*range(0, last, step), last]
    return [text[spans[start][0] : spans[start + words - 1][1]] for start in starts]


def mean_by_group(
    values: Float[np.ndarray, "members width"], groups: Int[np.ndarray, " members"], count: int
) -> Float[np.ndarray, "groups width"]:
    """The mean of each group's members; 0 for a group without any.

    Windows and prompts are pooled by the mean of their probabilities: the label of the whole is
    then that of a part drawn at random. A product would take parts that overlap and share one topic
    for independent evidence, be far too sure, and let one window that says nothing of a label veto
    it.

    Args:
        values: of the members.
        groups: of each member, ascending.
        count: number of groups.
    """
    means = np.zeros((count, values.shape[1]))
    if len(groups):
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        sizes = np.diff(starts, append=len(groups))
        means[groups[starts]] = np.add.reduceat(values, starts, axis=0) / sizes[:, None]
    return means
