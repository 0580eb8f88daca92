"""Labelled stretches of a text as tags of its words, and back.

A tag is 0 (outside), 1 + 2k (label k begins) or 2 + 2k (label k goes on). A word has its tag on its
first token (LS-LLaMA, arXiv 2310.01208; the other tokens are not looked at).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Word(NamedTuple):
    """Characters from `start` up to, without, `end`, and the position of its first token."""

    start: int
    end: int
    token: int


def words_of(
    word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]], text: str
) -> list[Word]:
    """The words of a text, without the blanks at their ends; those of blanks alone are none.

    Args:
        word_ids: number of the word of each token, None of what stands in no text.
        offsets: characters of each token.
        text: what was tokenized.
    """
    found: list[Word] = []
    before: int | None = None
    for token, (word, (start, end)) in enumerate(zip(word_ids, offsets, strict=True)):
        if word is not None and end > start:
            if word == before:
                found[-1] = found[-1]._replace(end=end)
            else:
                found.append(Word(start, end, token))
                before = word
        elif word is None:
            before = None
    trimmed = []
    for start, end, token in found:
        inside = text[start:end]
        first = start + len(inside) - len(inside.lstrip())
        last = first + len(inside.strip())
        if last > first:
            trimmed.append(Word(first, last, token))
    return trimmed


def _rank(span: Mapping[str, Any]) -> tuple[float, int, int, int]:
    """More probable, longer, earlier."""
    return (-prob_of(span), span["start"] - span["end"], span["start"], span["label_id"])


def tags_of(
    spans: Sequence[Mapping[str, Any]], words: Sequence[Word], *, labels: int
) -> Float[np.ndarray, "words tags"]:
    """The distribution of each word's tag: that of its span has the span's probability.

    A word belongs to a span that has a character of it. Of overlapping spans a word is given to the
    most probable one, of equals to the longer and then the earlier one; what a span's probability
    lacks to 1 is that of being outside.

    Args:
        spans: with `start`, `end`, `label_id` and `prob` (1 where it is null or not there).
        words: of the text.
        labels: number of labels.
    """
    found = np.zeros((len(words), 2 * labels + 1))
    found[:, 0] = 1.0
    taken = np.zeros(len(words), dtype=bool)
    for span in sorted(spans, key=_rank):
        begins = True
        for at, word in enumerate(words):
            if word.end <= span["start"] or word.start >= span["end"]:
                continue
            if taken[at]:
                begins = True  # behind a more probable span it begins anew
                continue
            taken[at] = True
            tag = 1 + 2 * span["label_id"] + (not begins)
            found[at, 0], found[at, tag] = 1 - prob_of(span), prob_of(span)
            begins = False
    return found


def prob_of(span: Mapping[str, Any]) -> float:
    """Of a span; 1 where it is not said."""
    prob = span.get("prob")
    return 1.0 if prob is None else float(prob)


def spans_of(probs: Float[np.ndarray, "words tags"], words: Sequence[Word]) -> list[dict[str, Any]]:
    """The spans of the most probable sequence of tags in which a label goes on only where it is.

    `prob` is the mean over the words of the span of the probability that they belong to its label.
    """
    tags = best_tags(probs)
    found: list[dict[str, Any]] = []
    shares: list[list[float]] = []
    for word, tag, row in zip(words, tags.tolist(), probs, strict=True):
        if tag == 0:
            continue
        label = (tag - 1) // 2
        share = float(row[1 + 2 * label] + row[2 + 2 * label])
        if tag % 2:
            found.append({"start": word.start, "end": word.end, "label_id": label})
            shares.append([share])
        else:
            found[-1]["end"] = word.end
            shares[-1].append(share)
    for span, share_list in zip(found, shares, strict=True):
        span |= {"prob": float(np.mean(share_list)), "agreement": None}
    return found


def best_tags(probs: Float[np.ndarray, "words tags"]) -> Int[np.ndarray, " words"]:
    """The most probable allowed sequence (Viterbi); of equals the one with the lower last tags."""
    count, tags = probs.shape
    if not count:
        return np.zeros(0, dtype=np.int64)
    scores = np.log(np.maximum(probs, 1e-30))
    goes_on = np.arange(2, tags, 2)
    best = scores[0].copy()
    best[goes_on] = -np.inf
    back = np.zeros((count, tags), dtype=np.int64)
    for word in range(1, count):
        # Any tag may be followed by "outside" and by the beginning of any label.
        back[word] = best.argmax()
        start, inside = best[goes_on - 1], best[goes_on]
        back[word, goes_on] = np.where(start >= inside, goes_on - 1, goes_on)
        best = scores[word] + best[back[word]]
    found = np.zeros(count, dtype=np.int64)
    found[-1] = best.argmax()
    for word in range(count - 1, 0, -1):
        found[word - 1] = back[word, found[word]]
    return found
