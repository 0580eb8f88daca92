"""Takes out what a source prefers whatever the text says."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float

from llmlabel.data import require_columns
from llmlabel.engine import Engine
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import prompt_sha, render
from llmlabel.softlabels import SoftLabels

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs of Zhao et al. 2021."""

_FEWEST_ROWS = 10


def batch_calibration(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Removes the mean log-probability of each label over the rows, then normalises again.

    Zhou et al., "Batch Calibration" (arXiv 2309.17249). It helps where labels are about equally
    frequent in the rows, or at least unrelated to what the source prefers; it needs no gold. A row's
    result depends on the rows it is given with.

    Differs from the paper: the mean is taken of log-probabilities, so the correction does not depend
    on how sharp the source is.

    Args:
        dataset: rows with soft labels; rows without one count for nothing and stay without.
        labels: their label space, single-label.
    """
    log_probs, has_label = _log_probs(dataset, labels)
    if 0 < has_label.sum() < (needed := max(_FEWEST_ROWS, len(labels))):
        raise ValueError(
            f"only {has_label.sum()} rows have a soft label, and their mean says nothing below "
            f"{needed}; give more rows, or use the labels as they are"
        )
    if has_label.any():
        log_probs = log_probs - log_probs[has_label].mean(axis=0)
    return _replaced(dataset, labels, log_probs, has_label)


def content_free_calibration(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path = "label/direct",
    demonstrations: Sequence[Mapping[str, str]] = (),
    texts: Sequence[str] = CONTENT_FREE,
) -> Dataset:
    """Divides by what the model answers to texts that say nothing, then normalises again.

    Zhao et al., "Calibrate Before Use" (arXiv 2102.09690), section 4, with W = diag(p_cf)^-1 and
    b = 0. Differs from the paper: W p is normalised, where the paper takes a softmax of it; the most
    probable label is the same.

    Args:
        dataset: rows with soft labels that `engine` gave with the same prompt and demonstrations.
        engine: who labelled the rows.
        labels: their label space, single-label.
        prompt: the prompt file the rows were labelled with.
        demonstrations: those the rows were labelled with, with the labels' names.
        texts: the content-free inputs, whose probabilities are averaged.

    Raises:
        ValueError: the rows were labelled with another prompt file.
    """
    require_columns(dataset, "prompt_sha")
    if others := set(dataset["prompt_sha"]) - {prompt_sha(prompt), None}:
        raise ValueError(
            f"prompt={str(prompt)!r} has the hash {prompt_sha(prompt)}, but rows were labelled with "
            f"{sorted(others)[0]}; give the prompt that made the labels"
        )
    log_probs, has_label = _log_probs(dataset, labels)
    chats = [
        render(prompt, text=text, labels=labels.texts(), demonstrations=demonstrations)
        for text in texts
    ]
    scores = engine.score(chats, labels.names)
    free = SoftLabels.from_scores(scores.log_probs, labels).dense().mean(axis=0)
    return _replaced(dataset, labels, log_probs - np.log(np.maximum(free, 1e-12)), has_label)


def _log_probs(
    dataset: Dataset, labels: LabelSpace
) -> tuple[Float[np.ndarray, "rows labels"], Bool[np.ndarray, " rows"]]:
    if labels.multilabel:
        raise ValueError(
            "bias correction compares labels that exclude each other; in a multi-label space use the "
            "labels as they are (in recipes/label.yaml: labeled='${raw}')"
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
