"""Split conformal prediction: sets of labels that hold the true one with a chosen probability."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel.data import gold_index, require_columns, with_columns, with_gold
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

Score = Literal["lac", "aps"]

_BLOCK_CELLS = 4_000_000
"""Rows x labels that are dense at a time."""


@dataclass(frozen=True)
class Conformal:
    """A fitted threshold; `predict_sets` keeps the labels whose score is at most this.

    Attributes:
        alpha: Share of new rows whose set may miss the true label.
        score: Nonconformity score.
        threshold: Infinite where the gold rows cannot carry `alpha`: then a set holds every label.
        rows: Number of gold rows, those whose gold is none of the labels included.
        seed: Seed of the uniform numbers of "aps".
        label_space: Fingerprint of the label space.
    """

    __pydantic_config__: ClassVar = {"ser_json_inf_nan": "strings"}  # JSON has no infinity

    alpha: float
    score: Score
    threshold: float
    rows: int
    seed: int
    label_space: str


def lac_scores(probs: Float[np.ndarray, "rows labels"]) -> Float[np.ndarray, "rows labels"]:
    """1 - p of every label: least ambiguous sets, Sadinle et al. 2019 (arXiv 1609.00451)."""
    return 1.0 - probs


def aps_scores(
    probs: Float[np.ndarray, "rows labels"], uniforms: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, "rows labels"]:
    """Mass of all more probable labels, plus u times the own: adaptive prediction sets.

    Romano et al. 2020 (arXiv 2006.02544), section 2: the smallest level at which a label is in the
    set, in closed form. u = 1 is the variant without randomisation, which covers too often. Of
    equally probable labels the one with the lower id counts as more probable.

    Differs from the paper: u stands where the paper has 1 - u, of the same distribution.
    """
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=1)
    above = np.cumsum(ranked, axis=1) - ranked
    scores = np.empty_like(probs)
    np.put_along_axis(scores, order, above + uniforms[:, None] * ranked, axis=1)
    return scores


def conformal_quantile(scores: Float[np.ndarray, " rows"], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores; infinite where that is more than n.

    Vovk et al. 2005; Lei et al. 2018 (arXiv 1604.04173), algorithm 2.
    """
    # In fractions: as floats, (9 + 1) * (1 - 0.7) is 3.0000000000000004 and would round up to 4.
    k = math.ceil((len(scores) + 1) * (1 - _exact(alpha)))
    return float(np.partition(scores, k - 1)[k - 1]) if k <= len(scores) else math.inf


def row_uniforms(ids: Iterable[str], *, seed: int) -> Float[np.ndarray, " rows"]:
    """One number between 0 and 1 a row, made from its id and `seed` only: no other row matters."""
    digests = (hashlib.blake2b(f"{seed}:{row_id}".encode()).digest()[:8] for row_id in ids)
    return np.frombuffer(b"".join(digests), dtype=">u8") / 2.0**64


def fit_conformal(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    alpha: float = 0.1,
    score: Score = "lac",
    seed: int = 0,
) -> Conformal:
    """Fits the threshold that leaves out the true label of at most a share `alpha` of new rows.

    The guarantee is for the average new row, and holds when gold rows and new rows are exchangeable
    and no gold row was used to make the soft labels. A row whose gold is none of the labels is in no
    set: it counts as missed. A row without a soft label has probability 0 everywhere, here and in
    `predict_sets`.

    Args:
        dataset: The gold rows, each with exactly one gold label or none of these; rows whose gold
            nobody knows (null) are left out.
        labels: A single-label space.
        alpha: Share of misses allowed.
        score: "lac" gives the smallest sets on average, "aps" sets that grow with the difficulty of
            the row.
        seed: Of the uniform numbers of "aps".

    Raises:
        ValueError: If `alpha` is not between 0 and 1, there are too few rows for it, a row has
            several gold labels, or the label space is multi-label.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}; got {score}")
    _check_single(labels)
    require_columns(dataset, "id", "gold")
    dataset = with_gold(dataset)
    needed = math.ceil(1 / _exact(alpha)) - 1
    if len(dataset) < needed:
        raise ValueError(
            f"alpha={alpha} needs at least {needed} gold rows; there are {len(dataset)} (label more "
            "rows, or allow a larger alpha)"
        )
    gold = gold_index(dataset, labels)
    scores = np.full(len(gold), np.inf)  # of a row whose gold is none of the labels
    for start, _, block in _blocks(dataset, labels, score=score, seed=seed):
        known = np.flatnonzero(gold[start : start + len(block)] >= 0)
        scores[start + known] = block[known, gold[start + known]]
    threshold = conformal_quantile(scores, alpha)
    return Conformal(alpha, score, threshold, len(gold), seed, labels.fingerprint)


def predict_sets(dataset: Dataset, labels: LabelSpace, conformal: Conformal) -> Dataset:
    """Adds `set_ids`, the labels whose score is at most the threshold, most probable first.

    A set may be empty and stays so, as a filled one would cover too often. With "lac" it says that
    not even the most probable label is as probable as true labels are on the gold rows; with "aps"
    it is the chance of the uniform number, on rows of one very probable label. A row without a soft
    label has the empty set with "lac" (every label if the threshold is 1 or more) and every label
    with "aps".

    Raises:
        ValueError: If the threshold was fitted in another label space.
    """
    _check_single(labels)
    require_columns(dataset, "id")
    if conformal.label_space != labels.fingerprint:
        raise ValueError(
            f"the threshold was fitted in label space {conformal.label_space}, but the label space "
            f"given is {labels.fingerprint}; fit it again on gold rows of this one"
        )
    lengths, set_ids = [], []
    blocks = _blocks(dataset, labels, score=conformal.score, seed=conformal.seed)
    for _, probs, scores in blocks:
        inside = scores <= conformal.threshold
        rows, ids = np.nonzero(inside)
        order = np.lexsort((-probs[rows, ids], rows))  # stable: of equal ones the lower id first
        set_ids.append(ids[order].astype(np.int32))
        lengths.append(inside.sum(axis=1))
    empty = np.zeros(1, dtype=np.int32)
    offsets = pa.array(np.cumsum(np.concatenate([empty, *lengths])), pa.int32())
    values = pa.array(np.concatenate([empty[:0], *set_ids]), pa.int32())
    sets = pa.ListArray.from_arrays(offsets, values)
    return with_columns(dataset, {"set_ids": (sets, List(Value("int32")))})


def _blocks(
    dataset: Dataset, labels: LabelSpace, *, score: Score, seed: int
) -> Iterator[tuple[int, Float[np.ndarray, "rows labels"], Float[np.ndarray, "rows labels"]]]:
    """First row, probabilities and scores of blocks of rows: all rows dense would be too much."""
    probs = SoftLabels.from_dataset(dataset, labels).probs
    uniforms = row_uniforms(dataset["id"][:], seed=seed)
    size = max(1, _BLOCK_CELLS // len(labels))
    for start in range(0, len(dataset), size):
        block = probs[start : start + size].astype(np.float64).toarray()
        own = uniforms[start : start + size]
        yield start, block, lac_scores(block) if score == "lac" else aps_scores(block, own)


def _exact(alpha: float) -> Fraction:
    """The decimal number that was written: 0.1 as a float is a little more than 1/10."""
    return Fraction(repr(float(alpha)))


def _check_single(labels: LabelSpace) -> None:
    if labels.multilabel:
        raise ValueError(
            "LAC and APS need a label space of one label a row; this one is multi-label (load it "
            "with multilabel=false and give each row one gold label)"
        )
