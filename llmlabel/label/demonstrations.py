"""Labelled texts that are shown to the model before the text of a row."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import (
    gold_index,
    gold_matrix,
    plain_words,
    require_columns,
    with_columns,
    with_gold,
)
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.shortlist import candidate_lists, top_k
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Method = Literal["fixed", "similarity", "diversity"]

_OWN_IN_POOL = 2
"""A row can stand in a pool without repeats twice: by its id, and by its words."""


def choose_demonstrations(  # noqa: PLR0913  # what to choose, from what, how, and where to keep it
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    n: int,
    method: Method,
    answers: Literal["gold", "soft"] = "gold",
    encoder: str | Path | Encoder | None = None,
    seed: int = 0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `demonstrations`: up to `n` labelled texts of `pool` that `label_direct` shows.

    - `fixed`: the same for all rows, drawn at random, the labels in turn (label sets in a
      multi-label space), so that none is shown twice before each was shown once.
    - `similarity`: the nearest to each row in the encoder's space, the nearest last, beside the
      text; Liu et al., "What Makes Good In-Context Examples for GPT-3?" (arXiv 2101.06804).
    - `diversity`: the same for all rows, covering the pool (see `k_center`).

    Where rows of a single-label space have `candidates`, only texts that answer with one of them
    are taken, so `fixed` differs between rows, and `diversity`, which is for all rows alike, is
    refused.

    A row is never its own demonstration: a text of the pool with its id or its words (see
    `llmlabel.data.plain_words`) is skipped for that row, and the next one taken; `rows_in_pool`
    tells how often. Texts of the pool without an answer and repeats of another are never shown.

    Args:
        dataset: rows with `id` and `text`.
        pool: rows with `id` and `text`, and an answer.
        labels: the label space of both.
        n: demonstrations of a row; fewer where the pool has no more to show it.
        method: how they are chosen.
        answers: `gold` of the pool, or its soft label: the most probable one, in a multi-label
            space all of at least 0.5.
        encoder: for `similarity` and `diversity`: path, hub name, `package:` source, or anything
            with `encode`.
        seed: of `fixed`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: the pool has fewer than `n` texts to show, an encoder is missing, or `diversity`
            meets `candidates`.
    """
    require_columns(dataset, "id", "text")
    if method != "fixed" and encoder is None:
        raise ValueError(f"method {method!r} compares texts; give an encoder=")
    limited = "candidates" in dataset.column_names and not labels.multilabel
    if limited and method == "diversity":
        raise ValueError(
            "method 'diversity' covers the pool for all rows alike, but each row has candidates of "
            "its own; use similarity or fixed"
        )
    shown = _entries(pool, labels, answers)
    if not 1 <= n <= len(shown):
        raise ValueError(f"n must be from 1 to {len(shown)}, the texts that the pool has; got {n}")
    itself = _finder(shown)

    @cache  # not before a block has to be computed
    def loaded() -> tuple[Encoder, Float[np.ndarray, "pool width"]]:
        assert encoder is not None  # or refused above
        ready = models.load_encoder(encoder)
        return ready, unit_vectors(ready, [one.text for one in shown])

    @cache
    def ranking() -> list[int]:
        if method == "diversity":
            return k_center(loaded()[1], min(n + _OWN_IN_POOL, len(shown)))
        return in_turn([one.labels for one in shown], seed=seed)

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        own = [itself(id, text) for id, text in zip(block["id"][:], texts, strict=True)]
        lists = candidate_lists(block, labels) if limited else None
        among: list[list[int] | None] = [None] * len(block) if lists is None else [*lists]
        if method == "similarity":
            encode, vectors = loaded()
            cosines = unit_vectors(encode, texts) @ vectors.T
            allowed = _exclude(cosines, shown, own, among)
            chosen = [nearest[::-1] for nearest in top_k(allowed, n)]
        else:
            each = zip(own, among, strict=True)
            chosen = [list(islice(_allowed(ranking(), shown, *one), n)) for one in each]
        answered = [[_answer(shown[i], labels) for i in some] for some in chosen]
        return with_columns(block, {"demonstrations": (answered, _feature(labels))})

    return map_blocks(
        dataset,
        compute,
        columns=("demonstrations",),
        key="" if output is None else _key(shown, labels, encoder, [n, method, seed]),
        reads=("candidates",) if limited else (),
        block_rows=block_rows,
        output=output,
        name="choose_demonstrations",
    )


def rows_in_pool(dataset: Dataset, pool: Dataset) -> int:
    """Number of rows that also stand in the pool, by their id or their words."""
    require_columns(dataset, "id", "text")
    require_columns(pool, "id", "text")
    ids, words = set(pool["id"][:]), {_words(text) for text in pool["text"][:]}
    pairs = zip(dataset["id"][:], dataset["text"][:], strict=True)
    return sum(id in ids or _words(text) in words for id, text in pairs)


def k_center(vectors: Float[np.ndarray, "points width"], count: int) -> list[int]:
    """Points of which every other is near one: each next is the farthest from all before.

    The greedy algorithm 1 of Sener and Savarese, "Active Learning for Convolutional Neural
    Networks: A Core-Set Approach" (arXiv 1708.00489). Differs from the paper: nothing is labelled
    at the start, so the first is the point nearest to the mean; of equally far ones the first is
    taken.
    """
    to_mean = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)
    chosen = [int(to_mean.round(9).argmin())]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
        distance[chosen] = -1.0  # a point with the place of a chosen one may still be needed
        chosen.append(int(distance.round(9).argmax()))
    return chosen


def in_turn(groups: Sequence[tuple[int, ...]], *, seed: int) -> list[int]:
    """All members, one of each group in turn; groups and their members in random order."""
    rng = np.random.default_rng(seed)
    names = sorted(set(groups))
    members: dict[tuple[int, ...], list[int]] = {names[i]: [] for i in rng.permutation(len(names))}
    for i in rng.permutation(len(groups)).tolist():
        members[groups[i]].append(i)
    rounds = max(len(some) for some in members.values())
    return [some[turn] for turn in range(rounds) for some in members.values() if turn < len(some)]


# ------------------------------------------------------------------- as `label_direct` reads them


def own_demonstrations(dataset: Dataset, labels: LabelSpace) -> list[list[dict[str, Any]]] | None:
    """The column `demonstrations`, labels as names; None where there is no such column.

    Raises:
        ValueError: an unknown label, or a row among its own.
    """
    if "demonstrations" not in dataset.column_names:
        return None
    found = []
    rows = zip(dataset["id"][:], dataset["text"][:], dataset["demonstrations"][:], strict=True)
    for id, text, given in rows:
        try:
            shown = shown_demonstrations(given or (), labels)
        except ValueError as error:
            raise ValueError(f"row {id!r}: {error}") from None
        if any(one["text"].strip() == text.strip() for one in shown):
            raise ValueError(f"row {id!r} is shown as a demonstration of its own; leave it out")
        found.append(shown)
    return found


def shown_demonstrations(
    demonstrations: Sequence[Mapping[str, Any]], labels: LabelSpace
) -> list[dict[str, Any]]:
    """The demonstrations with labels as names; a list of them in a multi-label space.

    Raises:
        ValueError: other keys than text and label, or an unknown label.
    """
    shown: list[dict[str, Any]] = []
    for number, one in enumerate(demonstrations, start=1):
        if set(one) != {"text", "label"}:
            raise ValueError(
                f"demonstration {number} has the keys {sorted(one)}; it needs text and label"
            )
        given = one["label"]
        if labels.multilabel != isinstance(given, list):
            form = "a list of all true labels" if labels.multilabel else "one label"
            raise ValueError(f"demonstration {number}: label is {given!r}; {form} is needed")
        if labels.multilabel:
            answer: Any = [labels.names[labels.index(label)] for label in given]
        else:
            answer = labels.names[labels.index(given)]
        shown.append({"text": one["text"], "label": answer})
    return shown


def _feature(labels: LabelSpace) -> List:
    label = List(Value("string")) if labels.multilabel else Value("string")
    return List({"text": Value("string"), "label": label})


# -------------------------------------------------------------------------------------- the pool


class _Entry(NamedTuple):
    """A text of the pool; `labels` are positions, one of them in a single-label space."""

    id: str
    text: str
    labels: tuple[int, ...]


def _entries(pool: Dataset, labels: LabelSpace, answers: str) -> list[_Entry]:
    """What can be shown, by id, so that the order of the pool's rows does not matter."""
    require_columns(pool, "id", "text")
    known = with_gold(pool) if answers == "gold" else pool
    true = (_all_true if labels.multilabel else _only_true)(known, labels, answers)
    entries = [
        _Entry(id, text, some)
        for id, text, some in zip(known["id"][:], known["text"][:], true, strict=True)
        if some is not None and text.strip()
    ]
    first: dict[str, _Entry] = {}
    for entry in sorted(entries, key=lambda one: one.id):
        first.setdefault(_words(entry.text), entry)
    return list(first.values())


def _only_true(pool: Dataset, labels: LabelSpace, answers: str) -> list[tuple[int, ...] | None]:
    """The one label of each row; None where there is none."""
    if answers == "gold":
        best = gold_index(pool, labels)
    else:
        probs = SoftLabels.from_dataset(pool, labels).dense()
        best = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
    return [(label,) if label >= 0 else None for label in best.tolist()]


def _all_true(pool: Dataset, labels: LabelSpace, answers: str) -> list[tuple[int, ...] | None]:
    """All labels of each row, perhaps none of them; None where nobody knows."""
    if answers == "gold":
        true, known = gold_matrix(pool, labels), np.ones(len(pool), dtype=bool)
    else:
        probs = SoftLabels.from_dataset(pool, labels).dense()
        true, known = probs >= 0.5, probs.max(axis=1) > 0
    pairs = zip(true, known.tolist(), strict=True)
    return [tuple(np.flatnonzero(row).tolist()) if ok else None for row, ok in pairs]


def _answer(entry: _Entry, labels: LabelSpace) -> dict[str, Any]:
    ids = [labels.ids[label] for label in entry.labels]
    return {"text": entry.text, "label": ids if labels.multilabel else ids[0]}


def _finder(shown: list[_Entry]) -> Callable[[str, str], set[int]]:
    """Id and text of a row -> where it stands in the pool itself."""
    by_id = {one.id: i for i, one in enumerate(shown)}
    by_words = {_words(one.text): i for i, one in enumerate(shown)}

    def itself(id: str, text: str) -> set[int]:
        places = (by_id.get(id), by_words.get(_words(text)))
        return {place for place in places if place is not None}

    return itself


def _words(text: str) -> str:
    return plain_words(text) or text.strip()  # texts of nothing but punctuation are not all equal


def _allowed(
    ranking: list[int], shown: list[_Entry], own: set[int], candidates: list[int] | None
) -> Iterator[int]:
    """Of a ranking what is not the row itself, and answers with a candidate where there are any."""
    for i in ranking:
        if i not in own and (candidates is None or shown[i].labels[0] in candidates):
            yield i


def _exclude(
    scores: Float[np.ndarray, "rows pool"],
    shown: list[_Entry],
    own: list[set[int]],
    candidates: Sequence[list[int] | None],
) -> Float[np.ndarray, "rows pool"]:
    """The scores with -inf for what is the row itself, or answers with no candidate."""
    allowed = scores.copy()
    answers = np.array([one.labels[0] if one.labels else -1 for one in shown])
    for row, (places, some) in enumerate(zip(own, candidates, strict=True)):
        allowed[row, list(places)] = -np.inf
        if some is not None:
            allowed[row, ~np.isin(answers, some)] = -np.inf
    return allowed


def _key(
    shown: list[_Entry], labels: LabelSpace, encoder: str | Path | Encoder | None, choice: list[Any]
) -> str:
    name = None if encoder is None else encoder_name(encoder, labels.texts())
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    return json.dumps(["choose_demonstrations", choice, labels.fingerprint, name, digest])
