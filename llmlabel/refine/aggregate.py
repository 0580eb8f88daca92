"""Several sources become one soft label, with a weight that says how far they agree."""

from typing import Literal

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import VOTES, SoftLabels

Method = Literal["average", "log_average", "majority"]
Votes = Float[np.ndarray, "sources rows labels"]


def aggregate(
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    method: Method = "log_average",
    weights: dict[str, float] | None = None,
) -> Dataset:
    """The rows of the first source with the soft label of all, their `votes` and a `weight`.

    `average` takes the mean of the probabilities, `log_average` of the log-probabilities (a product
    of experts: the committee of CV-DD, arXiv 2501.07575, which averages logits), `majority` the
    share of sources whose most probable label it is. A source that has no label for a row does not
    vote on it. `weight` is the squared consensus confidence (see `consensus_confidence`).

    Args:
        sources: name -> rows with soft labels; the same ids in the same order.
        labels: the label space of all of them.
        method: how distributions are combined.
        weights: of the sources, equal when left out. Weights from prior accuracy did not help in
            our measurements.

    Raises:
        ValueError: rows differ between sources, or a weight is missing, unknown or negative.
    """
    shares = _source_weights(sources, weights)
    first = next(iter(sources.values()))
    require_columns(first, "id")
    ids = first["id"][:]
    for name, rows in sources.items():
        if "id" not in rows.column_names or rows["id"][:] != ids:
            raise ValueError(
                f"source {name!r} has other rows than {next(iter(sources))!r}; "
                "label the same dataset with every source"
            )
    read = list(SoftLabels.from_sources(sources, labels).values())
    probs = np.stack([soft.dense() for soft in read])
    voting = (probs.sum(axis=2) > 0) & (shares > 0)[:, None]
    if method == "log_average" and not labels.multilabel:
        values = np.stack([soft.log_dense() for soft in read])
    elif method == "majority" and not labels.multilabel:
        values = np.eye(len(labels))[probs.argmax(axis=2)]
    elif method == "average":
        values = probs
    else:
        raise ValueError(f"method {method!r} needs a single-label space; use average")
    combined = _weighted_mean(values, shares[:, None] * voting)
    if method == "log_average":
        combined = np.where(voting.any(axis=0)[:, None], combined, -np.inf)
        soft = SoftLabels.from_scores(combined, labels)
    else:
        soft = SoftLabels.from_dense(combined, labels)
    confidence = consensus_confidence(probs, soft.dense().argmax(axis=1))
    return with_columns(
        soft.add_to(first),
        {
            "votes": (_votes(list(sources), probs, voting), VOTES),
            "weight": (np.minimum(confidence, 1.0).astype(np.float32) ** 2, Value("float32")),
            "engine": ([" + ".join(sources)] * len(ids), Value("string")),
            # of the first source, and nothing that all of them share
            "label_mass": ([None] * len(ids), Value("float32")),
            "prompt_sha": ([None] * len(ids), Value("string")),
            "error": (
                [None if any_ else "no source has a label" for any_ in voting.any(axis=0)],
                Value("string"),
            ),
        },
    )


def consensus_confidence(
    probs: Votes, label: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """How far the sources that chose `label` agree: base x consensus; may pass 1 slightly.

    Abid et al., "Robust and Label-Efficient Deep Waste Detection" (arXiv 2508.18799): base is
    0.7 max + 0.3 mean of the members' probabilities, consensus is
    exp(-0.1 spread) min(1.1, 1 + 0.05 (members - 2)). 0 where no source chose the label.

    Differs from the paper: a document has no box, so the spread is 1 minus the mean overlap
    sum_c min(p_c, mean_c) of the members' distributions with their mean; a single member is scored
    too, not dropped.
    """
    rows = np.arange(len(label))
    member = (probs.argmax(axis=2) == label) & (probs.sum(axis=2) > 0)
    count = member.sum(axis=0)
    chosen = np.where(member, probs[:, rows, label], 0.0)
    base = 0.7 * chosen.max(axis=0) + 0.3 * chosen.sum(axis=0) / np.maximum(count, 1)
    mean = _weighted_mean(probs, member.astype(np.float64))
    overlap = np.where(member, np.minimum(probs, mean).sum(axis=2), 0.0)
    spread = 1.0 - overlap.sum(axis=0) / np.maximum(count, 1)
    bonus = np.minimum(1.1, 1.0 + 0.05 * (count - 2))
    return np.where(count > 0, base * np.exp(-0.1 * spread) * bonus, 0.0)


def _weighted_mean(
    values: Votes, weights: Float[np.ndarray, "sources rows"]
) -> Float[np.ndarray, "rows labels"]:
    total = weights.sum(axis=0)
    summed = (values * weights[:, :, None]).sum(axis=0)
    return summed / np.where(total > 0, total, 1.0)[:, None]


def _source_weights(
    sources: dict[str, Dataset], weights: dict[str, float] | None
) -> Float[np.ndarray, " sources"]:
    if not sources:
        raise ValueError("aggregate needs at least one source")
    if weights is None:
        return np.ones(len(sources))
    if set(weights) != set(sources):
        raise ValueError(f"weights name {sorted(weights)}, the sources are {sorted(sources)}")
    values = np.array([float(weights[name]) for name in sources])
    if not (values >= 0).all() or not values.sum() > 0:
        raise ValueError(f"weights must be at least 0 and not all 0; got {weights}")
    return values


def _votes(names: list[str], probs: Votes, voting: np.ndarray) -> list[list[dict[str, object]]]:
    best, top = probs.argmax(axis=2), probs.max(axis=2)
    return [
        [
            {"source": name, "label_id": int(best[s, row]), "prob": float(top[s, row])}
            for s, name in enumerate(names)
            if voting[s, row]
        ]
        for row in range(probs.shape[1])
    ]
