"""Several views of one text: how far their labels differ, and the spans that they agree on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.refine.aggregate import consensus, provenance
from llmlabel.refine.crowd import average
from llmlabel.refine.votes import Votes, read_votes

SPANS = List(
    {
        **{"start": Value("int32"), "end": Value("int32"), "label_id": Value("int32")},
        **{"prob": Value("float32"), "agreement": Value("int32")},
    }
)
"""The type of the column `spans`: characters from `start` up to, without, `end`."""


def add_softness(sources: dict[str, Dataset] | Dataset, labels: LabelSpace) -> Dataset:
    """Adds `view_variance`, `view_entropy` and `softness`: how far a row's views differ.

    Views are chunks, prompts, label orders, samples or annotators; null where none has a label.
    Softness finds texts that read differently in parts; it is no confidence. As a sign of wrong
    labels it did far worse in our measurements (AUROC 0.58) than entropy or the top probability.

    Args:
        sources: name of a view -> rows with soft labels, the same ids in the same order; or one
            table with the column `votes`, whose sources are the views.
        labels: the label space of all of them.
    """
    votes = read_votes(sources, labels)
    first = sources if isinstance(sources, Dataset) else next(iter(sources.values()))
    silent = ~votes.voted
    names = ("view_variance", "view_entropy", "softness")
    return with_columns(
        first,
        {
            name: ([None if gone else x for x, gone in zip(column, silent, strict=True)],
                   Value("float32"))
            for name, column in zip(names, label_softness(votes), strict=True)
        },
    )  # fmt: skip


def label_softness(
    votes: Votes,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Variance over views, entropy of the mean view, and their product, the softness.

    "Robust 3D-Masked Part-level Editing in 3D Gaussian Splatting" (arXiv 2507.11061): S = H v, with
    v the variance of the label vector, summed over labels, and H the entropy in nats of
    p_j = softmax_j cos(mean view, label j).

    Differs from the paper: a view is a distribution over the labels, so the vector of a label is
    that of a distribution that is sure of it.
    """
    mean = average(votes)
    views = np.bincount(votes.row[votes.first()], minlength=votes.rows)
    at = mean[votes.row, votes.label]
    away = np.bincount(votes.row, (votes.prob - at) ** 2 - at**2, minlength=votes.rows)
    squares = (mean**2).sum(axis=1)
    variance = np.maximum(away / np.maximum(views, 1) + squares, 0.0)
    cosines = mean / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]
    p = np.exp(cosines)
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1)
    return variance, entropy, entropy * variance


# ------------------------------------------------------------------------------------------- spans


@dataclass(frozen=True)
class Span:
    """A labelled stretch of a text, as one source sees it: from `start` up to, without, `end`."""

    start: float
    end: float
    label_id: int
    prob: float
    source: str


@dataclass(frozen=True)
class FusedSpan:
    """What sources agree on.

    Attributes:
        start: Mean of the members' starts, weighted by their probabilities.
        end: The same of the ends.
        label_id: Of all members.
        spread: 1 minus the mean overlap of the members with this span.
        confidence: 0.7 max + 0.3 mean of their probabilities x `consensus`; may pass 1 slightly.
        agreement: Number of sources.
    """

    start: float
    end: float
    label_id: int
    spread: float
    confidence: float
    agreement: int


def aggregate_spans(
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    min_prob: float = 0.05,
    overlap: float = 0.65,
    min_agreement: int = 2,
    min_confidence: float = 0.35,
) -> Dataset:
    """The rows of the first source with the `spans` that sources agree on; see `fuse_spans`.

    Starts and ends are rounded to whole characters. A null in `spans` is a text that a source could
    not read; where all are, the row has an `error`. `engine` names all sources, `prompt_sha` is null.

    Args:
        sources: name -> rows with `id`, `text` and `spans` (`start`, `end`, `label_id`, `prob`), the
            same ids in the same order.
        labels: the label space of all of them.
        min_prob: spans below are dropped.
        overlap: intersection over union from which on two spans are the same.
        min_agreement: so many sources, at least, have a span that is kept.
        min_confidence: and so much confidence.

    Raises:
        ValueError: rows differ between sources, or a span is outside its text or has a wrong label
            or probability.
    """
    if not sources:
        raise ValueError("aggregate_spans needs at least one source")
    first_name, first = next(iter(sources.items()))
    require_columns(first, "id", "text")
    ids, lengths = first["id"][:], [len(text) for text in first["text"][:]]
    found: list[list[Span] | None] = [None] * len(ids)
    for name, rows in sources.items():
        if "id" not in rows.column_names or rows["id"][:] != ids:
            raise ValueError(f"source {name!r} has other rows than {first_name!r}")
        require_columns(rows, "spans")
        for row, spans in enumerate(rows["spans"][:]):
            if spans is not None:
                where = f"source {name!r}, row with id {ids[row]!r}"
                read = _spans(spans, name, where, length=lengths[row], labels=len(labels))
                found[row] = [*(found[row] or []), *read]
    fused = [
        None
        if spans is None
        else [
            {
                **{"start": round(one.start), "end": round(one.end), "label_id": one.label_id},
                **{"prob": min(one.confidence, 1.0), "agreement": one.agreement},
            }
            for one in fuse_spans(
                spans, min_prob=min_prob, overlap=overlap, min_agreement=min_agreement
            )
            if one.confidence >= min_confidence
        ]
        for spans in found
    ]
    errors = [None if spans is not None else "no source has spans" for spans in fused]
    columns = {"spans": (fused, SPANS), "error": (errors, Value("string"))}
    return with_columns(first, {**columns, **provenance(" + ".join(sources), rows=len(ids))})


def fuse_spans(
    spans: Iterable[Span], *, min_prob: float = 0.05, overlap: float = 0.65, min_agreement: int = 2
) -> list[FusedSpan]:
    """Spans of one text that several sources agree on, by start, then label.

    Abid et al., "Robust and Label-Efficient Deep Waste Detection" (arXiv 2508.18799), in one
    dimension: the most probable span first, each joins the first cluster of its label whose most
    probable member it overlaps enough; a cluster becomes one span.

    Differs from the paper: spans with equal probabilities go by position and source, so that the
    order in which they come changes nothing. As in the paper, a second span of one source in a
    cluster counts in the means and not in the agreement.
    """
    clusters: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (-s.prob, s.start, s.end, s.label_id, s.source)):
        if span.prob < min_prob:
            continue
        for cluster in clusters:
            same = cluster[0].label_id == span.label_id
            if same and _iou(cluster[0].start, cluster[0].end, span) >= overlap:
                cluster.append(span)
                break
        else:
            clusters.append([span])
    fused = [_fused(cluster) for cluster in clusters]
    fused.sort(key=lambda one: (one.start, one.end, one.label_id))
    return [one for one in fused if one.agreement >= min_agreement]


def _fused(cluster: Sequence[Span]) -> FusedSpan:
    probs = np.array([span.prob for span in cluster])
    start = float(probs @ [span.start for span in cluster] / probs.sum())
    end = float(probs @ [span.end for span in cluster] / probs.sum())
    spread = 1.0 - float(np.mean([_iou(start, end, span) for span in cluster]))
    agreement = len({span.source for span in cluster})
    base = 0.7 * probs.max() + 0.3 * probs.mean()
    confidence = float(base * consensus(np.array([spread]), np.array([agreement]))[0])
    return FusedSpan(start, end, cluster[0].label_id, spread, confidence, agreement)


def _iou(start: float, end: float, span: Span) -> float:
    shared = max(0.0, min(end, span.end) - max(start, span.start))
    return shared / ((end - start) + (span.end - span.start) - shared)


def _spans(
    given: list[dict[str, Any]], source: str, where: str, *, length: int, labels: int
) -> list[Span]:
    spans = []
    for one in given:
        start, end, label, prob = (one.get(key) for key in ("start", "end", "label_id", "prob"))
        if start is None or end is None or not 0 <= start < end <= length:
            raise ValueError(
                f"{where}: the span from {start} to {end} is outside the text of {length} "
                "characters, or empty; give start < end"
            )
        if label is None or not 0 <= label < labels:
            raise ValueError(
                f"{where}: a span has the label id {label}, but the label space has ids 0 to "
                f"{labels - 1}"
            )
        prob = 1.0 if prob is None else prob
        if not 0 < prob <= 1:
            raise ValueError(f"{where}: a span has the probability {prob}; give one in (0, 1]")
        spans.append(Span(float(start), float(end), int(label), float(prob), source))
    return spans
