"""Training rows that repeat evaluation rows, word for word or nearly."""

import math
from collections import Counter, defaultdict

import numpy as np
from datasets import Dataset, Value

from llmlabel.data import plain_words, require_columns, with_columns
from llmlabel.select import row_weights, with_selection


def drop_near_duplicates(
    dataset: Dataset, evaluation: Dataset, *, threshold: float = 0.8, characters: int = 5
) -> Dataset:
    """Sets `weight` to 0 for rows whose text nearly equals that of an evaluation row.

    Near is a Jaccard similarity of at least `threshold` between the sets of `characters`-grams of
    the texts, without case and punctuation (Broder 1997; also short texts have such grams, where
    word 13-grams are absent). Exact, no MinHash: of the n grams of a text, rarest first, the first
    n - ceil(`threshold` n) + 1 must hold a common one (prefix filtering, Bayardo et al. 2007), so
    that few pairs are compared. `select_score` is the highest similarity, 0 below the threshold;
    `selected` are the rows that stay, and `select_reason` names the evaluation row that one
    repeats.

    Args:
        dataset: rows to train on, with `text`.
        evaluation: rows that must stay unseen, with `id` and `text`.
        threshold: above 0, at most 1.
        characters: length of a gram; a shorter text is one gram.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1; got {threshold}")
    if characters < 1:
        raise ValueError(f"characters must be at least 1; got {characters}")
    require_columns(dataset, "text")
    require_columns(evaluation, "id", "text")
    ids = [str(id) for id in evaluation["id"][:]]
    unseen = [grams(text, characters) for text in evaluation["text"][:]]
    counts = Counter(gram for text in unseen for gram in text)
    holders: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(unseen):
        for gram in _rare(text, counts, threshold):
            holders[gram].append(row)
    scores, reasons = np.zeros(len(dataset)), [None] * len(dataset)
    found: list[str | None] = list(reasons)
    for row, text in enumerate(dataset["text"][:]):
        mine = grams(text, characters)
        near = {other for gram in _rare(mine, counts, threshold) for other in holders.get(gram, ())}
        pairs = [(jaccard(mine, unseen[other]), ids[other]) for other in near]
        if pairs and (score := max(pair[0] for pair in pairs)) >= threshold:
            scores[row] = score
            like = min(id for value, id in pairs if value == score)
            found[row] = f"repeats evaluation row {like!r} ({score:.2f})"
    stays = scores == 0
    weights = np.where(stays, row_weights(dataset), 0).astype(np.float32)
    marked = with_selection(dataset, stays, scores, found.__getitem__)
    return with_columns(marked, {"weight": (weights, Value("float32"))})


def grams(text: str, characters: int) -> frozenset[str]:
    """The sets of characters in a row of a text without case and punctuation; none of no text."""
    plain = plain_words(text)
    count = max(len(plain) - characters + 1, 1)
    return frozenset(plain[i : i + characters] for i in range(count)) - {""}


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared members over all members; 0 for two empty sets."""
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)


def _rare(text: frozenset[str], counts: Counter[str], threshold: float) -> list[str]:
    """The grams of which a near text must hold one, rarest of the evaluation rows first."""
    needed = math.ceil(threshold * len(text) - 1e-9)
    kept = len(text) - needed + 1 if text else 0
    return sorted(text, key=lambda gram: (counts[gram], gram))[:kept]
