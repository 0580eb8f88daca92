"""How well labels fit texts, without gold: coverage and pairwise label accuracy."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float
from scipy.special import entr

from llmlabel.data import with_columns
from llmlabel.engine import Engine
from llmlabel.label.direct import label_direct
from llmlabel.label.embedding import Encoder, label_embedding
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.rounds import generator


def taxonomy_quality(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    other: str | None = "other",
    encoder: str | Path | Encoder | None = None,
    engine: Engine | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The measures of TnT-LLM (Wan et al., arXiv 2403.12173) that need no true labels.

    `coverage` is the share of rows whose most probable label is one and not `other`. `pairwise` is
    the share of these rows for which a judge who sees the assigned label and another one, drawn at
    random, finds the assigned one to fit better; a tie counts half. `used` is how many labels are
    assigned to any row. An encoder that assigned the labels agrees with itself: take another judge.

    Differs from the paper: the judge is an encoder or an engine, never a person.

    Args:
        dataset: rows with soft labels.
        labels: their label space.
        other: id or name of the label for texts that none fits; None where there is none.
        encoder: judges by the cosine of text and label.
        engine: judges by the probability of the label (see `llmlabel.label.direct.label_direct`).
        seed: of the labels drawn.

    Raises:
        ValueError: not one of `encoder` and `engine` is given, or there is no label to draw.
    """
    if (encoder is None) == (engine is None):
        raise ValueError("taxonomy_quality needs a judge: give either encoder= or engine=")
    probs = SoftLabels.from_dataset(dataset, labels).dense()
    out = labels.index(other) if other is not None else -1
    best = np.where(probs.any(axis=1), probs.argmax(axis=1), -1)
    covered = np.flatnonzero((best >= 0) & (best != out))
    choice = [label for label in range(len(labels)) if label != out]
    if len(choice) < 2:
        raise ValueError(f"pairwise accuracy needs two labels besides {other!r}; give more labels")
    ids = [str(id) for id in dataset["id"][:]]
    pairs = [
        (
            int(best[row]),
            int(generator(seed, ids[row]).choice([c for c in choice if c != best[row]])),
        )
        for row in covered
    ]
    wins = _wins(dataset.select(covered), pairs, labels, encoder, engine) if pairs else np.zeros(0)
    return {
        "rows": len(dataset),
        "coverage": len(covered) / len(dataset),
        "pairwise": float(wins.mean()) if len(wins) else None,
        "pairs": len(pairs),
        "labels": len(choice),
        "used": len(set(best[covered].tolist())),
    }


def information(probs: Float[np.ndarray, "rows labels"]) -> float:
    """Mutual information of texts and labels, in nats: how much labels tell about texts.

    Entropy of the mean distribution less the mean entropy. It is log(labels) when every text is
    certain of its label and all labels are equally frequent, 0 when texts make no difference, and
    needs no true labels (Bridle et al., "Unsupervised classifiers, mutual information and phantom
    targets", NeurIPS 1991).
    """
    if not len(probs):
        return 0.0
    entropies = entr(probs).sum(axis=1)
    return max(float(entr(probs.mean(axis=0)).sum() - entropies.mean()), 0.0)


def _wins(
    rows: Dataset,
    pairs: list[tuple[int, int]],
    labels: LabelSpace,
    encoder: str | Path | Encoder | None,
    engine: Engine | None,
) -> np.ndarray:
    """1 where the first label of a pair fits better, 0.5 where both fit alike or nobody can tell."""
    rows = rows.select_columns(["id", "text"])
    if engine is None:
        assert encoder is not None
        judged = label_embedding(rows, encoder, labels)
    else:
        listed = (list(map(list, pairs)), List(Value("int32")))
        judged = label_direct(with_columns(rows, {"candidates": listed}), engine, labels)
    probs = SoftLabels.from_dataset(judged, labels).dense()
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    at = np.arange(len(pairs))
    gap = probs[at, first] - probs[at, second]
    wins: np.ndarray = (np.sign(gap) + 1) / 2
    return wins
