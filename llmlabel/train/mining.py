"""Negatives for retrieval losses: which labels are hard to tell from a row's own, and which are true.

Label sets are incomplete, so the labels nearest to a row are often true though nobody gave them.
`mine_negatives` tells the two apart by a teacher encoder's scores, and `judge_negatives` of
`llmlabel.train.judge_mining` by a language model that reads each pair. Both write `excluded_ids`,
what a loss should leave out, and `negative_ids`; a row without a given label or without a text has
null there, or the `excluded_ids` that it came with.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import label_csr, require_columns, with_columns
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.memory import Answers
from llmlabel.label.nearest import Nearest, Own, Search, finder, search_name
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Rule = Literal["perc_pos", "margin_pos", "abs", "none"]
"""How the bar is set: below a share of the positive's score, below it by a margin, at a score, never."""

Positive = Literal["max", "mean", "min"]
"""Which score stands for a row with several given labels."""

Sample = Literal["topk", "cyclic", "uniform"]
"""Which of the negatives are taken: the hardest, one in so many, or some at random."""

_VALUES: dict[str, float] = {"perc_pos": 0.95, "margin_pos": 0.05, "abs": 0.7, "none": np.inf}
_ALLOWED = {"perc_pos": (0.0, 1.0), "margin_pos": (0.0, 2.0), "abs": (-1.0, 1.0)}
_REDUCERS: dict[str, Callable[[Any], Any]] = {"max": np.max, "mean": np.mean, "min": np.min}

IDS = List(Value("int32"))
"""The type of the columns."""


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]], *, k: int = 60) -> dict[int, float]:
    """Sum of 1 / (`k` + rank) over the rankings that have an item, highest first, ranks from 1.

    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods" (SIGIR 2009), with their k of 60. Of equal sums the lower item comes first.

    >>> {item: round(score, 4) for item, score in reciprocal_rank_fusion([[7, 3], [3, 5]]).items()}
    {3: 0.0325, 7: 0.0164, 5: 0.0161}

    Raises:
        ValueError: `k` is negative, or a ranking has an item twice.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0; got {k}")
    shares: dict[int, list[float]] = {}
    for number, ranking in enumerate(rankings):
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"ranking number {number} has an item twice: {list(ranking)}")
        for rank, item in enumerate(ranking, start=1):
            shares.setdefault(item, []).append(1 / (k + rank))
    sums = {item: math.fsum(some) for item, some in shares.items()}  # in any order of the rankings
    return dict(sorted(sums.items(), key=lambda pair: (-pair[1], pair[0])))


def bars(
    positives: Float[np.ndarray, " rows"], *, rule: Rule = "perc_pos", value: float | None = None
) -> Float[np.ndarray, " rows"]:
    """The score from which on a label that was not given may be true: a negative lies below it.

    The rules of NV-Retriever (arXiv 2407.15831): `perc_pos` is a share `value` of the positive's
    score s, which LG-ANNA-Embedding (arXiv 2506.07438) takes as 0.95; `margin_pos` is s - `value`;
    `abs` is `value`; `none` is no bar.

    Differs from the paper: `perc_pos` is s - (1 - `value`) |s|. It is the same where s is above 0;
    below, `value` x s would lie above s and let through what is nearer than the positive itself.

    Args:
        positives: the teacher's scores of what is true, such as cosines.
        rule: see above.
        value: where it is left out, 0.95, 0.05 and 0.7, in this order.

    Raises:
        ValueError: `value` is out of bounds, or given for no bar.
    """
    value = _value(rule, value)
    if rule == "perc_pos":
        return positives - (1 - value) * np.abs(positives)
    return positives - value if rule == "margin_pos" else np.full_like(positives, value)


def cyclic_order(size: int, *, step: int = 5) -> list[int]:
    """Places 0, `step`, 2 `step`, ..., then 1, 1 + `step`, ...: each once (UniME-V2)."""
    if step < 1:
        raise ValueError(f"step must be at least 1; got {step}")
    return [place for start in range(step) for place in range(start, size, step)]


def mine_negatives(  # noqa: PLR0913  # who teaches, where the bar is, what is taken, where to keep it
    dataset: Dataset,
    labels: LabelSpace,
    encoder: str | Path | Encoder,
    *,
    k: int = 50,
    rule: Rule = "perc_pos",
    value: float | None = None,
    positive: Positive = "max",
    sample: Sample = "topk",
    step: int = 5,
    count: int = 10,
    answers: Answers = "gold",
    search: Search = "exact",
    seed: int = 0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `excluded_ids` and `negative_ids`, of the `k` labels nearest to a row that it was not given.

    Nearest by the teacher's cosine of the text and "name: description". Labels at or above the bar
    are excluded; `count` of the others are the negatives, hardest first. What `excluded_ids` holds
    already, as of a filter file, stays excluded and is not looked at; a row not mined keeps it.

    With m given labels, `positive` decides which of their scores sets the bar. A true label that was
    forgotten, and that scores like any given one, is then excluded with probability m / (m + 1) at
    least for `min`, 1 / (m + 1) for `max`. The price of `min` is that a given label that the teacher
    does not understand excludes everything above it; `max` excludes what the pair rule of NV-Retriever
    drops for each of the row's pairs.

    Args:
        dataset: rows with `id`, `text` and given labels, and maybe `excluded_ids`.
        labels: their label space.
        encoder: the teacher: path, hub name, `package:` source, or anything with `encode`.
        k: labels that are looked at a row, besides its own and those excluded already.
        rule: see `bars`.
        value: see there.
        positive: which given label's score sets the bar.
        sample: `cyclic` takes them in `cyclic_order`, so that not all are nearly the same.
        step: of `cyclic`.
        count: negatives kept at most.
        answers: what is given: `gold`, or every label that a soft label stores.
        search: see `llmlabel.label.neighbours.label_neighbours`; the pool are the labels.
        seed: of `uniform`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: an argument is out of bounds, or a vector of the teacher is not finite.
    """
    require_columns(dataset, "id", "text", *columns_of(answers))
    _value(rule, value)
    take, reduce = sampler(sample, step=step, count=count, seed=seed), reducer(positive)
    if k < 1:
        raise ValueError(f"k must be at least 1, the labels looked at; got {k}")
    earlier = ("excluded_ids",) if "excluded_ids" in dataset.column_names else ()

    @cache  # not before a block has to be computed
    def ready() -> tuple[Encoder, np.ndarray, Callable[[np.ndarray, Own], Nearest]]:
        loaded = models.load_encoder(encoder)
        anchors = _finite(unit_vectors(loaded, labels.texts()), "label", labels.ids)
        return loaded, anchors, finder(anchors, k=k, search=search)

    def compute(block: Dataset) -> Dataset:
        texts, given, ids = block["text"][:], given_labels(block, labels, answers), block["id"][:]
        excluded: list[list[int] | None] = (
            block["excluded_ids"][:] if earlier else [None] * len(block)
        )
        negatives: list[list[int] | None] = [None] * len(block)
        rows = [row for row, text in enumerate(texts) if text.strip() and given[row]]
        if rows:
            teacher, anchors, find = ready()
            vectors = unit_vectors(teacher, [texts[row] for row in rows])
            _finite(vectors, "row with id", [ids[row] for row in rows])
            known = [[*given[row], *(excluded[row] or ())] for row in rows]
            found, cosines = find(vectors, known)
            own = [reduce(anchors[given[row]] @ vectors[i]) for i, row in enumerate(rows)]
            bar = bars(np.array(own), rule=rule, value=value).round(6)
            for i, row in enumerate(rows):
                near = found[i][cosines[i] > -np.inf]
                beyond = cosines[i][: len(near)].round(6) >= bar[i]
                new, before = near[beyond].tolist(), excluded[row]
                excluded[row] = sorted({*before, *new}) if before else new
                negatives[row] = take(near[~beyond].tolist(), ids[row])
        return with_columns(
            block, {"excluded_ids": (excluded, IDS), "negative_ids": (negatives, IDS)}
        )

    name = None if output is None else encoder_name(encoder, labels.texts())
    choice = [k, rule, value, positive, sample, step, count, answers, search_name(search), seed]
    return map_blocks(
        dataset,
        compute,
        columns=("excluded_ids", "negative_ids"),
        key=json.dumps(["mine_negatives", name, labels.fingerprint, *map(str, choice)]),
        reads=(*columns_of(answers), *earlier),
        block_rows=block_rows,
        output=output,
        name="mine_negatives",
    )


# ------------------------------------------------------------------- what both kinds of mining share


def given_labels(dataset: Dataset, labels: LabelSpace, answers: Answers) -> list[list[int]]:
    """The labels that each row was given, ascending; none where nobody knows."""
    if answers == "gold":
        stored = label_csr(dataset, labels)
    else:
        stored = SoftLabels.from_dataset(dataset, labels).probs.copy()
    stored.eliminate_zeros()
    stored.sort_indices()
    return [part.tolist() for part in np.split(stored.indices, stored.indptr[1:-1])]


def columns_of(answers: Answers) -> tuple[str, ...]:
    """What `given_labels` reads."""
    return ("gold",) if answers == "gold" else ("label_ids", "label_probs", "label_space")


def _value(rule: str, value: float | None) -> float:
    if rule not in _VALUES:
        raise ValueError(f"rule must be one of {', '.join(_VALUES)}; got {rule!r}")
    if value is None:
        return _VALUES[rule]
    if rule not in _ALLOWED:
        raise ValueError(f"rule={rule!r} has no bar; leave value={value} out")
    least, most = _ALLOWED[rule]
    if not least <= value <= most:
        raise ValueError(f"value of rule={rule!r} must be from {least} to {most}; got {value}")
    return value


def reducer(positive: Positive) -> Callable[[Any], Any]:
    """Several scores -> the one that counts."""
    if positive not in _REDUCERS:
        raise ValueError(f"positive must be max, mean or min; got {positive!r}")
    return _REDUCERS[positive]


def sampler(
    sample: Sample, *, step: int, count: int, seed: int
) -> Callable[[list[int], Any], list[int]]:
    """What takes `count` of a row's negatives, given hardest first, and keeps their order."""
    if count < 1:
        raise ValueError(f"count must be at least 1, the negatives kept of a row; got {count}")
    if sample not in ("topk", "cyclic", "uniform"):
        raise ValueError(f"sample must be topk, cyclic or uniform; got {sample!r}")
    cyclic_order(0, step=step)  # refuses a step below 1

    def take(negatives: list[int], id: object) -> list[int]:
        size = len(negatives)
        if sample == "topk" or size <= count:
            return negatives[:count]
        if sample == "cyclic":
            places = cyclic_order(size, step=step)
        else:
            rng = np.random.default_rng(int.from_bytes(digest(seed, id)[:8], "big"))
            places = rng.permutation(size).tolist()
        return [negatives[place] for place in sorted(places[:count])]

    return take


def digest(*parts: object) -> bytes:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _finite(
    vectors: Float[np.ndarray, "some width"], what: str, ids: Sequence[object]
) -> Float[np.ndarray, "some width"]:
    if (broken := np.flatnonzero(~np.isfinite(vectors).all(axis=1))).size:
        raise ValueError(
            f"the teacher's vector of the {what} {ids[broken[0]]!r} is not finite; take another encoder"
        )
    return vectors
