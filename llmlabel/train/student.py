"""What all trainers of students share: rows, validation, the training of a network, its folder."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel import metrics, models
from llmlabel.data import gold_matrix, plain_words, require_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_weights
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint
from llmlabel.train.loop import Memory, Objective, fit, trained
from llmlabel.train.network import check_output, new_network, padded, save_network
from llmlabel.train.settings import EARLY

CALIBRATION = "calibration.json"
"""The temperature of a student, where validation rows with gold were there to fit it."""

Losses = Callable[[Tensor, list[int]], Float[Tensor, " some"]]
"""Logits (rows, labels) and the numbers of their rows -> the loss of each row."""

Compare = Callable[[Tensor, Tensor], Float[Tensor, " some"]]
"""Logits and targets (rows, labels) -> the loss of each row."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What is trained on."""

    ids: list[str]
    texts: list[str]
    soft: csr_array
    """The targets, float64; a label not stored has 0."""
    weights: Float[np.ndarray, " rows"]
    given: int
    """Rows before some were left out."""
    kept: list[int]
    """Where the others stood."""

    def __post_init__(self) -> None:
        """Equal targets are stored alike."""
        soft = csr_array(self.soft, dtype=np.float64, copy=True)
        soft.sum_duplicates()
        soft.eliminate_zeros()
        object.__setattr__(self, "soft", soft)

    def block(self, chosen: list[int]) -> Float[Tensor, "some labels"]:
        """The targets of some rows."""
        return torch.from_numpy(self.soft[chosen].toarray())

    @property
    def targets(self) -> Float[np.ndarray, "rows labels"]:
        """The targets of all rows, rows x labels x 8 bytes; a trainer takes a `block` at a time."""
        dense: np.ndarray = self.soft.toarray()
        return dense


def training_rows(dataset: Dataset, labels: LabelSpace) -> Rows:
    """The rows that have a text, a soft label and a weight above 0.

    In a multi-label space an empty soft label whose `error` is null says that no label is true.

    Raises:
        ValueError: there are none.
    """
    require_columns(dataset, "text", "label_ids", "label_probs")
    probs = SoftLabels.from_dataset(dataset, labels).probs.astype(np.float64)
    texts = [text or "" for text in dataset["text"]]
    weights = row_weights(dataset)
    has_text = np.array([bool(text.strip()) for text in texts], dtype=bool)
    labelled = probs.sum(axis=1) > 0
    if labels.multilabel and "error" in dataset.column_names:  # it was read: none of the labels
        pairs = zip(dataset["label_ids"][:], dataset["error"][:], strict=True)
        labelled |= np.array([ids is not None and not e for ids, e in pairs], dtype=bool)
    kept = np.flatnonzero((weights > 0) & labelled & has_text)
    if not kept.size:
        raise ValueError(
            f"none of the {len(texts)} rows has a text, a soft label and a weight above 0"
        )
    targets = probs[kept]
    if not labels.multilabel:
        targets.data /= np.repeat(targets.sum(axis=1), np.diff(targets.indptr))
    numbers = range(len(dataset))
    ids = dataset["id"][:] if "id" in dataset.column_names else [f"row {n}" for n in numbers]
    return Rows(
        [str(ids[i]) for i in kept],
        [texts[i] for i in kept],
        targets,
        weights[kept],
        len(texts),
        kept.tolist(),
    )


def train_student(  # noqa: PLR0913 - what is trained, by what, and how
    rows: Rows,
    labels: LabelSpace,
    losses: Losses,
    settings: dict[str, Any],
    *,
    model: str | Path,
    output: Path,
    validation: "Dataset | Validation | None" = None,
    memory: Memory | None = None,
    after_update: Callable[[], None] | None = None,
    keep_more: Callable[[Path], dict[str, Any]] | None = None,
    told: dict[str, Any] | None = None,
    pos_weight: Float[np.ndarray, " labels"] | None = None,
    compare: Compare | None = None,
    name: str = "train_classifier",
) -> Path:
    """Trains a network with any loss and writes its folder; what all trainers of students share.

    Args:
        rows: see `training_rows`.
        labels: the label space.
        losses: of rows.
        settings: see `train_classifier`.
        model: see there, as for the next two.
        output: see there.
        validation: see there.
        memory: what the losses remember.
        after_update: see `llmlabel.train.loop.Objective`.
        keep_more: writes further files of the model into its folder; what it returns is told in the
            model card too.
        told: more for the model card; the loss must be told, since a checkpoint is only continued
            with the same.
        pos_weight: what a true label counts in the validation loss, as in `losses`.
        compare: the validation loss; null is the cross-entropy.
        name: of the trainer, for progress and errors.
    """
    check_output(output, settings, others=[EARLY, CALIBRATION])
    check_patience(settings, validation)
    seen = validation
    if isinstance(seen, Dataset):
        weight = np.ones(len(labels)) if pos_weight is None else pos_weight
        seen = _validation(seen, labels, rows, settings, weight, compare)
    with torch.random.fork_rng():  # adapters and dropout draw from torch's global generator
        torch.manual_seed(settings["seed"])
        network, tokenizer = new_network(str(model), labels, settings)
        limit = settings["max_length"]
        tokens = [
            tokenizer(text, truncation=True, max_length=limit).input_ids for text in rows.texts
        ]
        before_head = [p for what, p in trained(network).items() if not what.startswith("score.")]
        groups = [
            {"params": before_head, "lr": settings["learning_rate"]},
            {"params": list(network.score.parameters()), "lr": settings["head_learning_rate"]},
        ]
        objective = Objective(
            network,
            groups,
            rows.ids,
            [len(ids) for ids in tokens],
            rows.weights,
            lambda chosen: padded([tokens[row] for row in chosen]),
            losses,
            memory,
            after_update,
        )
        if seen is not None:
            objective.validate = seen.validate(tokenizer)
        key = [models.model_sha(models.fetch(str(model))), labels.fingerprint, rows_sha(rows), told]
        key.append(None if seen is None else seen.sha)
        done = fit(objective, settings, name=name, key=str(key), output=output)
    if done.is_main:
        card = {
            "model": str(model),
            "labels": labels.fingerprint,
            "rows": {"given": rows.given, "trained": len(tokens)},
            "labels_without_rows": [labels.ids[label] for label in _without_rows(rows, labels)],
            "loss": done.losses,
            "processes": done.processes,
            "settings": settings,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            **(told or {}),
        }
        if seen is not None:
            card["validation"] = {
                "rows": seen.rows,
                "repeat_training_rows": seen.overlap,
                "epochs": done.validation,
                "best_epoch": done.best_epoch,
            }
        if keep_more is not None:
            card |= keep_more(output)
        (output / CALIBRATION).unlink(missing_ok=True)  # of a student that was here before
        save_network(network, str(model), labels, card, output)
        checkpoint.remove(output)
    return output


def rows_sha(rows: Rows) -> str:
    """Stands for what is trained on."""
    return sha_of([*rows.ids, *rows.texts, csr_sha(rows.soft)], [rows.weights])


def csr_sha(values: csr_array, *more: np.ndarray) -> str:
    """Stands for what is stored, however wide its positions are stored, and for more arrays."""
    positions = [part.astype(np.int64) for part in (values.indices, values.indptr)]
    return sha_of([str(values.shape)], [values.data, *positions, *more])


def sha_of(texts: Iterable[str], arrays: Iterable[np.ndarray]) -> str:
    """Stands for texts and numbers, in their order."""
    digest = hashlib.sha256()
    for part in texts:
        digest.update(f"{len(part)}:{part}".encode(errors="surrogatepass"))
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def label_counts(rows: Rows) -> Float[Tensor, " labels"]:
    """Rows of each label by weight, for what balances labels; it is no matter what weights sum to.

    Remains of probability that add up to less than one row count as one: they are no class.
    """
    counts = torch.from_numpy(rows.soft.T @ (rows.weights / rows.weights.mean()))
    return torch.where(counts > 0, counts.clamp(min=1), 0.0)


def check_patience(settings: dict[str, Any], validation: object) -> None:
    """Refuses to wait for a better validation loss where there is none."""
    if settings["early_stopping_patience"] is not None and validation is None:
        raise ValueError(
            f"early_stopping_patience={settings['early_stopping_patience']} needs `validation`, rows "
            "that are not trained on; give some or leave it out"
        )


def _without_rows(rows: Rows, labels: LabelSpace) -> list[int]:
    """Labels that are no row's: of them nothing can be learned but that they are rare."""
    if labels.multilabel:
        found: list[int] = np.flatnonzero(rows.soft.max(axis=0).toarray() < 0.5).tolist()
        return found
    counts = np.bincount(rows.soft.argmax(axis=1), minlength=len(labels))
    return np.flatnonzero(counts == 0).tolist()


@dataclass(frozen=True, eq=False)
class Validation:
    """Rows that are not trained on, and how good a network is on them."""

    rows: int
    overlap: int
    """Rows that repeat a training row."""
    sha: str
    """Stands for them."""
    validate: Callable[[Any], Callable[[torch.nn.Module], dict[str, float]]]
    """The tokenizer -> what an `Objective` takes as `validate`."""


def repeated(ids: list[str | None], texts: list[str], rows: Rows) -> int:
    """Of validation rows, how many have the id or the words of a training row; warned of."""
    mine, words = set(rows.ids), {plain_words(text) or text for text in rows.texts}
    overlap = sum(
        id in mine or (plain_words(text) or text) in words
        for id, text in zip(ids, texts, strict=True)
    )
    if overlap:
        warnings.warn(
            f"{overlap} of {len(texts)} validation rows repeat a training row by their id or words, "
            "so that their loss says too little; take them out of one of both",
            stacklevel=5,
        )
    return overlap


def validation_rows(
    dataset: Dataset, labels: LabelSpace
) -> tuple[list[str | None], list[str], Float[np.ndarray, "rows labels"]]:
    """Ids, texts and targets of the rows with gold, or with soft labels where there is no gold.

    Raises:
        ValueError: none has a text and a label.
    """
    require_columns(dataset, "text")
    if "gold" in dataset.column_names:
        known = dataset.filter(lambda gold: gold is not None, input_columns="gold")
        targets = gold_matrix(known, labels).astype(np.float64)
    else:
        known = dataset
        targets = SoftLabels.from_dataset(known, labels).dense()
    texts = [text or "" for text in known["text"]]
    # No gold label of many means that none is true; no soft label, that nobody knows.
    none_is_known = labels.multilabel and "gold" in dataset.column_names
    some = none_is_known | (targets.sum(axis=1) > 0)
    kept = [i for i, text in enumerate(texts) if text.strip() and some[i]]
    if not kept:
        raise ValueError(f"none of the {len(dataset)} validation rows has a text and a label")
    ids = [str(id) for id in known["id"]] if "id" in known.column_names else [None] * len(known)
    targets = targets[kept]
    if not labels.multilabel:
        targets = targets / targets.sum(axis=1, keepdims=True)
    return [ids[i] for i in kept], [texts[i] for i in kept], targets


def _validation(
    dataset: Dataset,
    labels: LabelSpace,
    rows: Rows,
    settings: dict[str, Any],
    pos_weight: Float[np.ndarray, " labels"],
    compare: Compare | None,
) -> Validation:
    ids, texts, targets = validation_rows(dataset, labels)
    limit = settings["max_length"]

    def measured(probs: Float[np.ndarray, "rows labels"]) -> dict[str, float]:
        values = pos_weight * targets * np.log(np.clip(probs, 1e-12, 1.0))
        if not labels.multilabel:
            right = metrics.correct(probs, targets.argmax(axis=1))
            return {"loss": -float(values.sum(axis=1).mean()), "accuracy": float(right.mean())}
        values += (1 - targets) * np.log(np.clip(1 - probs, 1e-12, 1.0))
        loss = -float(values.sum(axis=1).mean())
        if compare is not None:
            logits = torch.from_numpy(probs).logit(eps=1e-12)
            loss = float(compare(logits, torch.from_numpy(targets)).mean())
        return {"loss": loss, "micro_f1": metrics.micro_f1(probs >= 0.5, targets >= 0.5)}

    def validate(tokenizer: Any) -> Callable[[torch.nn.Module], dict[str, float]]:
        tokens = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
        return lambda network: measured(
            probabilities(network, tokens, labels, settings["pass_tokens"])
        )

    overlap = repeated(ids, texts, rows)
    return Validation(len(texts), overlap, sha_of(texts, [targets, pos_weight]), validate)


@torch.inference_mode()
def probabilities(
    network: torch.nn.Module, tokens: list[list[int]], labels: LabelSpace, pass_tokens: int
) -> Float[np.ndarray, "rows labels"]:
    """Of every label; computed in float32 and in passes of at most so many padded tokens."""
    probs = np.zeros((len(tokens), len(labels)))
    device = next(network.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))
    while order:
        count = max(1, pass_tokens // len(tokens[order[0]]))
        chosen, order = order[:count], order[count:]
        inputs = [part.to(device) for part in padded([tokens[i] for i in chosen])]
        logits = network(*inputs).double()
        values = logits.sigmoid() if labels.multilabel else logits.softmax(dim=1)
        probs[chosen] = values.cpu().numpy()
    return probs
