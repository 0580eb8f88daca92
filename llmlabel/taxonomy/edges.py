"""Edges with a probability each, and the label space that they make."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float
from scipy.special import expit, logit

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.taxonomy.acyclic import acyclic_choice, best_branching

_SURE = 1e-6
"""Probabilities count as at least this far from 0 and 1, so that all log-odds are finite."""


def combine_judge(edges: Dataset, *, known: Dataset | None = None) -> Dataset:
    """Makes one `prob` of the layer's and a judge's `match`; what it was stays in `isa_prob`.

    With judged edges whose truth is known, by a logistic regression on both log-odds, fitted on
    these; without, by the mean of the log-odds (the normalised geometric mean of the odds). An edge
    that the judge could not read keeps its probability.

    Args:
        edges: rows of `isa_edges` that `llmlabel.label.judge.judge` has judged.
        known: the same with `is_edge`, of children whose pairs the layer has not been trained on.

    Raises:
        ValueError: `known` does not hold edges of both kinds.
    """
    require_columns(edges, "prob", "match")
    prob, features, read = _evidence(edges)
    if known is None:
        combined = expit(features.mean(axis=1))
    else:
        require_columns(known, "prob", "match", "is_edge")
        _, told, told_read = _evidence(known)
        truth = np.array(known["is_edge"][:], dtype=bool)[told_read]
        weights, bias = logistic(told[told_read], truth)
        combined = expit(features @ weights + bias)
    return with_columns(
        edges,
        {
            "isa_prob": (prob.astype(np.float32), Value("float32")),
            "prob": (np.where(read, combined, prob).astype(np.float32), Value("float32")),
        },
    )


def choose_edges(
    edges: Dataset,
    labels: LabelSpace,
    *,
    threshold: float | Path = 0.5,
    parents: Literal["several", "one"] = "several",
) -> LabelSpace:
    """Gives labels the parents of the most probable acyclic graph, each with its probability.

    Edges count as independent, so that the likelihood of a graph is the product of the
    probabilities of the edges that it has, and of 1 - probability of those that it lacks. Every
    edge above the threshold is wanted; of each knot of cycles those are left out that lose least
    log-odds together (see `acyclic_choice`). With `one` parent at most, the answer is a maximum
    branching (see `best_branching`). Parents that the labels have already stay, as they are certain
    or as probable as `parent_probs` says.

    Differs from the paper (arXiv 2508.19428): there every pair above the threshold is an edge,
    cycles or not.

    Args:
        edges: rows with `child` and `parent` (ids) and `prob`; see `llmlabel.taxonomy.isa`.
        labels: the label space of both.
        threshold: probability from which on an edge is wanted, or the folder that `fit_isa` wrote,
            whose validation part tells it; 0.5 is the maximum likelihood.
        parents: how many a label may get.

    Raises:
        ValueError: an edge is there twice, or from a label to itself, or has no probability; or the
            labels have several parents already and may have one.
    """
    bound = _threshold(threshold)
    table = _edge_table(edges, labels)
    known = {
        (child, parent): 1.0 if not labels.parent_probs else labels.parent_probs[child][number]
        for child, some in enumerate(labels.parent_positions)
        for number, parent in enumerate(some)
    }
    if parents == "one" and len({child for child, _ in known}) < len(known):
        raise ValueError('choose_edges: labels have several parents already; use parents="several"')
    pairs = sorted({**table, **known})  # by position, so that the order of the rows cannot matter
    child, parent = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    probs = np.array([known.get(pair, table.get(pair, 0.0)) for pair in pairs], dtype=np.float64)
    gains = _log_odds(probs) - float(logit(bound))
    certain = np.array([pair in known for pair in pairs], dtype=bool)
    if parents == "one":
        gains[certain] = np.abs(gains).sum() + 1.0  # never given up for all others together
        kept = best_branching(child, parent, gains, labels=len(labels))
    else:
        gains[certain] = np.inf
        choice = acyclic_choice(child, parent, gains, labels=len(labels))
        if choice.gap > 0:
            warnings.warn(
                f"choose_edges: cycles were broken at a loss of {choice.lost:.3g} in log-odds, which "
                f"may be {choice.gap:.3g} more than needed; a higher threshold leaves fewer cycles",
                stacklevel=2,
            )
        kept = choice.kept
    chosen: list[list[tuple[str, float]]] = [[] for _ in labels.ids]
    for edge in np.flatnonzero(kept).tolist():
        chosen[child[edge]].append((labels.ids[parent[edge]], float(probs[edge])))
    for some in chosen:
        some.sort(key=lambda one: -one[1])
    return dataclasses.replace(
        labels,
        parents=tuple(tuple(id for id, _ in some) for some in chosen),
        parent_probs=tuple(tuple(prob for _, prob in some) for some in chosen),
    )


# --------------------------------------------------------------- from known pairs


def best_threshold(
    scores: Float[np.ndarray, " pairs"], truth: Bool[np.ndarray, " pairs"]
) -> tuple[float, float]:
    """The score above which pairs should count as edges, and the F1 that this gives.

    Half way to the next lower score that there is. Of equal F1 the highest threshold; edges that are
    not among the pairs are not missed.
    """
    order = np.argsort(-scores, kind="stable")
    falling, hits = scores[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    ends = np.append(falling[1:] != falling[:-1], True)  # equal scores enter together
    best = int(np.where(ends, f1, -1.0).argmax())
    below = falling[best + 1] if best + 1 < len(falling) else falling[best] - 1.0
    return float((falling[best] + below) / 2), float(f1[best])


def logistic(
    features: Float[np.ndarray, "rows features"], truth: Bool[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " features"], float]:
    """Weights and bias of a logistic regression, hardly regularised.

    Raises:
        ValueError: all rows are true, or none is.
    """
    from sklearn.linear_model import LogisticRegression

    if truth.all() or not truth.any():
        raise ValueError(
            f"{int(truth.sum())} of {len(truth)} known pairs are edges; both kinds are needed"
        )
    fitted = LogisticRegression(C=100.0, solver="newton-cholesky").fit(features, truth)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _evidence(
    edges: Dataset,
) -> tuple[Float[np.ndarray, " edges"], Float[np.ndarray, "edges 2"], Bool[np.ndarray, " edges"]]:
    """The layer's probability, both log-odds, and where there are both."""
    columns = [
        np.array([np.nan if p is None else p for p in edges[name][:]], dtype=np.float64)
        for name in ("prob", "match")
    ]
    odds = _log_odds(np.stack(columns, axis=1))
    return columns[0], np.nan_to_num(odds), ~np.isnan(odds).any(axis=1)


# --------------------------------------------------------------------------------- what is given


def _edge_table(edges: Dataset, labels: LabelSpace) -> dict[tuple[int, int], float]:
    """Positions of child and parent -> probability."""
    require_columns(edges, "child", "parent", "prob")
    found: dict[tuple[int, int], float] = {}
    place = {id: position for position, id in enumerate(labels.ids)}
    for child, parent, prob in zip(
        edges["child"][:], edges["parent"][:], edges["prob"][:], strict=True
    ):
        pair = tuple(place[id] if id in place else labels.index(id) for id in (child, parent))
        name = f"the edge from {child!r} to {parent!r}"
        if pair[0] == pair[1] or pair in found:
            what = "leads to itself" if pair[0] == pair[1] else "is there twice"
            raise ValueError(f"choose_edges: {name} {what}; leave it out")
        if prob is None or not 0 <= prob <= 1:
            raise ValueError(f"choose_edges: {name} has the prob {prob}; give one from 0 to 1")
        found[pair[0], pair[1]] = prob
    return found


def _threshold(threshold: float | Path) -> float:
    if isinstance(threshold, Path):
        return float(json.loads((threshold / "isa.json").read_text("utf-8"))["threshold"])
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie strictly between 0 and 1; got {threshold}")
    return threshold


def _log_odds(probs: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    odds: Float[np.ndarray, "*any"] = logit(np.clip(probs, _SURE, 1 - _SURE))
    return odds
