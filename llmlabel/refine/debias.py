"""Takes out what a source prefers whatever the text says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float

from llmlabel.engine import Engine
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import render
from llmlabel.softlabels import SoftLabels

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs of Zhao et al. 2021."""


def batch_calibration(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Removes the mean log-probability of each label over the rows, then normalises again.

    Zhou et al., "Batch Calibration" (arXiv 2309.17249), equation 5. It helps where labels are about
    equally frequent in the rows, or at least unrelated to what the source prefers; it needs no gold.

    Differs from the paper: the mean is taken of log-probabilities, so the correction does not depend
    on how sharp the source is.

    Args:
        dataset: rows with soft labels; rows without one count for nothing and stay without.
        labels: their label space, single-label.
    """
    log_probs, has_label = _log_probs(dataset, labels)
    if has_label.any():
        log_probs = log_probs - log_probs[has_label].mean(axis=0)
    return _replaced(dataset, labels, log_probs, has_label)


def content_free_calibration(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path = "label/direct",
    texts: Sequence[str] = CONTENT_FREE,
) -> Dataset:
    """Divides by what the model answers to texts that say nothing, then normalises again.

    Zhao et al., "Calibrate Before Use" (arXiv 2102.09690), equation 1 with W = diag(p_cf)^-1, b = 0.

    Args:
        dataset: rows with soft labels that `engine` gave with the same `prompt`.
        engine: who labelled the rows.
        labels: their label space, single-label.
        prompt: the prompt file the rows were labelled with.
        texts: the content-free inputs, whose probabilities are averaged.
    """
    log_probs, has_label = _log_probs(dataset, labels)
    chats = [render(prompt, text=text, labels=labels.texts()) for text in texts]
    scores = engine.score(chats, labels.names)
    free = SoftLabels.from_scores(scores.log_probs, labels).dense().mean(axis=0)
    return _replaced(dataset, labels, log_probs - np.log(np.maximum(free, 1e-12)), has_label)


def _log_probs(
    dataset: Dataset, labels: LabelSpace
) -> tuple[Float[np.ndarray, "rows labels"], Bool[np.ndarray, " rows"]]:
    if labels.multilabel:
        raise ValueError(
            "bias correction compares labels that exclude each other; this label space is "
            "multi-label: its labels need a threshold each"
        )
    soft = SoftLabels.from_dataset(dataset, labels)
    return soft.log_dense(), np.diff(soft.probs.indptr) > 0


def _replaced(
    dataset: Dataset,
    labels: LabelSpace,
    log_probs: Float[np.ndarray, "rows labels"],
    has_label: Bool[np.ndarray, " rows"],
) -> Dataset:
    log_probs = np.where(has_label[:, None], log_probs, -np.inf)
    return SoftLabels.from_scores(log_probs, labels).add_to(dataset)
