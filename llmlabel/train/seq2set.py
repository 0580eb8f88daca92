"""A decoder that writes the labels of a text one by one, in no order that is right (OTSeq2Set).

Cao and Zhang (arXiv 2210.14523): a recurrent decoder attends to the text's tokens and, at each of a
fixed number of steps, says a label or nothing; it is always fed its own last answer, in training too
(student forcing). Bipartite matching tells which true label a step should have said, and optimal
transport moves what all steps say onto the true labels; see `llmlabel.loss.sets`. So the number of
labels of a text needs no threshold.

Differs from the paper: the text is read by a pretrained backbone, frozen or with LoRA adapters, where
the paper has bidirectional GRUs and convolutions; label vectors are those of the labels' names and
descriptions, where the paper has GloVe's, and the vector of "nothing" is 0, so that a step that says
nothing points nowhere; the first state comes from the mean of the tokens; a label that is said again
counts once.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack, get_args

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel import metrics, models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns
from llmlabel.label.embedding import Encoder
from llmlabel.labelspace import LabelSpace
from llmlabel.loss.sets import Scheme, set_cross_entropy, transport_loss
from llmlabel.softlabels import LABEL_COLUMNS
from llmlabel.train import checkpoint
from llmlabel.train.answers import read_errors, with_answers
from llmlabel.train.folder import check_folder, folder_sha
from llmlabel.train.loop import Fitted, Objective, fit, trained
from llmlabel.train.network import LoRA, padded
from llmlabel.train.set_decoder import (
    WEIGHTS,
    TextToSet,
    label_vectors,
    load_set_decoder,
    new_backbone,
    save_set_decoder,
    tokens_of,
)
from llmlabel.train.settings import Training, settle
from llmlabel.train.student import (
    Rows,
    check_patience,
    repeated,
    rows_sha,
    sha_of,
    training_rows,
    validation_rows,
)


def train_seq2set(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    validation: Dataset | None = None,
    max_labels: int | None = None,
    scheme: Scheme = "all",
    transport_weight: float = 8.0,
    empty_weight: float = 0.2,
    label_encoder: str | Path | Encoder | None = None,
    lora: LoRA | None = None,
    width: int = 512,
    dropout: float = 0.2,
    **training: Unpack[Training],
) -> Path:
    """Trains a decoder of label sets and writes its folder, for `predict_label_sets`.

    A row's set are its labels with a probability of at least 0.5, of teachers or, as 1, of people; it
    may be empty. `weight` and rows without a text or a soft label are taken as by
    `llmlabel.train.classifier.train_classifier`.

    Args:
        dataset: rows with soft labels of a multi-label space.
        labels: the label space.
        model: encoder or decoder as path, hub name, `package:` or `wheel:` source.
        output: the model folder.
        validation: rows with `gold`, or else with soft labels, that no training row repeats; the
            epoch whose mean loss on them is lowest is kept.
        max_labels: steps of the decoder; null takes the size of the largest set. Of a larger set the
            most probable labels are learned (of equals those with lower ids), and the model card
            counts it.
        scheme: which steps may be given a label, see `llmlabel.loss.sets.assign`.
        transport_weight: lambda; the paper takes 8, and 0 where it has no label vectors.
        empty_weight: what a step counts that should say nothing.
        label_encoder: makes the label vectors; null lets the backbone do it, as the mean of its last
            layer.
        lora: adapters; null leaves the backbone as it is, with no use for `learning_rate` and
            `gradient_checkpointing`, which are refused then.
        width: of the decoder's state.
        dropout: of what the answers are read from.
        **training: see `llmlabel.train.settings.Training`; `learning_rate` is the adapters', and
            `head_learning_rate` the decoder's.

    Returns:
        The model folder.

    Raises:
        ValueError: the label space is not multi-label, no row can be trained on, or a setting leaves
            nothing to train.
    """
    settings = settle(
        training,
        num_train_epochs=20,
        head_learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=8.0,
    ) | {
        "max_labels": max_labels,
        "scheme": scheme,
        "transport_weight": transport_weight,
        "empty_weight": empty_weight,
        "lora": None if lora is None else asdict(lora),
        "width": width,
        "dropout": dropout,
    }
    _check(settings, labels, output)
    for name in ("learning_rate", "gradient_checkpointing"):
        if lora is None and training.get(name):
            raise ValueError(
                f"{name} is for the backbone, which stays as it is without `lora`; leave it out (the "
                "decoder learns by head_learning_rate), or give lora"
            )
    check_patience(settings, validation)
    rows = training_rows(dataset, labels)
    seen = None if validation is None else validation_rows(validation, labels)
    overlap = 0 if seen is None else repeated(*seen[:2], rows)
    sizes = (rows.soft >= 0.5).sum(axis=1)
    settings["max_labels"] = max_labels or max(1, int(sizes.max()))
    sets = label_sets(rows.soft, places=settings["max_labels"])
    with torch.random.fork_rng():  # weights and dropout draw from torch's global generator
        torch.manual_seed(settings["seed"])
        backbone, tokenizer = new_backbone(str(model), labels, settings)
        vectors = label_vectors(labels, label_encoder, backbone, tokenizer, settings)
        network = TextToSet(backbone, vectors, settings)
        losses = set_losses(sets, network.decoder.vectors, settings)
        tokens = tokens_of(tokenizer, rows.texts, settings)
        objective = Objective(
            network,
            _groups(network, settings),
            rows.ids,
            [len(ids) for ids in tokens],
            rows.weights,
            lambda chosen: padded([tokens[row] for row in chosen]),
            losses,
        )
        if seen is not None:
            objective.validate = _validator(*seen[1:], tokenizer, network.decoder.vectors, settings)
        digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:16]
        model_sha = models.model_sha(models.fetch(str(model)))
        seen_sha = None if seen is None else sha_of(seen[1], [seen[2]])
        key = str(["seq2set", model_sha, labels.fingerprint, rows_sha(rows), digest, seen_sha])
        done = fit(objective, settings, name="train_seq2set", key=key, output=output)
    if done.is_main:
        card = _card(str(model), labels, rows, settings, done)
        if seen is not None:
            card["validation"] = {
                "rows": len(seen[1]),
                "repeat_training_rows": overlap,
                "epochs": done.validation,
                "best_epoch": done.best_epoch,
            }
        save_set_decoder(network, labels, card, output)
        checkpoint.remove(output)
    return output


def predict_label_sets(
    dataset: Dataset,
    *,
    model: Path,
    pass_tokens: int = 8192,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the labels that a decoder of sets says of each text, in the columns that teachers write.

    The probability of a label is that of it against "no label" at the step that said it first: 0.5 or
    more, from where labels of any number count. A label that was not said is not stored; of a text
    without an `error`, no label means that none fits.
    Computes in float32; results do not depend on which rows share a pass.

    Args:
        dataset: rows with `text`.
        model: a folder written by `train_seq2set`.
        pass_tokens: padded tokens computed at a time.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.
    """
    require_columns(dataset, "text")
    network, tokenizer, labels, card = load_set_decoder(model)
    limit = int(card["settings"]["max_length"])
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        kept, errors = read_errors(texts, tokenizer, limit)
        tokens = tokens_of(tokenizer, [texts[row] for row in kept], card["settings"])
        probs = np.zeros((len(texts), len(labels)))
        for chosen, logits in _written(network, tokens, pass_tokens):
            probs[[kept[row] for row in chosen]] = said_probs(logits)
        return with_answers(block, probs, labels, name=name, errors=errors)

    digest = folder_sha(model, WEIGHTS)
    backbone_sha = models.model_sha(models.fetch(card["model"]))
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=f"predict_label_sets {digest} {backbone_sha}",
        output=output,
        block_rows=block_rows,
        name="predict_label_sets",
    )


# ------------------------------------------------------------------------------- sets and answers


def _groups(network: TextToSet, settings: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [
        {"params": list(network.decoder.parameters()), "lr": settings["head_learning_rate"]},
        {"params": list(trained(network.backbone).values()), "lr": settings["learning_rate"]},
    ]
    return [group for group in groups if group["params"]]


def label_sets(probs: csr_array, *, places: int) -> Int[Tensor, "rows places"]:
    """The most probable labels from 0.5 on, of equals those with lower ids; filled up with -1."""
    count, labels = probs.shape
    rows, ids = np.repeat(np.arange(count), np.diff(probs.indptr)), probs.indices
    some = np.flatnonzero(probs.data >= 0.5)
    some = some[np.lexsort((ids[some], -probs.data[some], rows[some]))]
    rows, ids = rows[some], ids[some]
    first = np.searchsorted(rows, np.arange(count))
    place = np.arange(len(rows)) - first[rows]
    sets = np.full((count, min(places, labels)), -1)
    fits = place < places
    sets[rows[fits], place[fits]] = ids[fits]
    return torch.from_numpy(sets)


def said_probs(
    logits: Float[Tensor, "rows steps answers"],
) -> Float[np.ndarray, "rows labels"]:
    """Of each label against "no label", at the step that said it first; 0 where none did.

    What was said has 0.5 at least, as labels of any number count from there.
    """
    highest, said = logits.double().max(dim=2)
    probs = (highest - logits[:, :, -1].double()).sigmoid()
    found = torch.zeros(len(logits), logits.shape[2], dtype=probs.dtype, device=probs.device)
    for step in reversed(range(logits.shape[1])):  # earlier ones overwrite later ones
        found.scatter_(1, said[:, step : step + 1], probs[:, step : step + 1])
    return found[:, :-1].cpu().numpy()


def set_losses(
    sets: Int[Tensor, "rows places"],
    vectors: Float[Tensor, "answers width"],
    settings: dict[str, Any],
) -> Callable[[Tensor, list[int]], Float[Tensor, " some"]]:
    """Logits and the numbers of their rows -> the loss of each row, L_b + lambda L_ot."""
    scheme, empty = settings["scheme"], len(vectors) - 1

    def losses(logits: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        own = sets[chosen].to(logits.device)
        values = set_cross_entropy(
            logits, own, empty=empty, scheme=scheme, empty_weight=settings["empty_weight"]
        )
        if settings["transport_weight"] == 0:
            return values
        moved = transport_loss(logits, own, vectors.to(logits), scheme=scheme)
        return values + settings["transport_weight"] * moved

    return losses


def _written(
    network: torch.nn.Module, tokens: list[list[int]], pass_tokens: int
) -> Iterator[tuple[list[int], Float[Tensor, "some steps answers"]]]:
    """Row numbers and logits, in passes of at most so many padded tokens."""
    device = next(network.parameters()).device
    order = sorted(range(len(tokens)), key=lambda row: (-len(tokens[row]), row))
    while order:
        count = max(1, pass_tokens // len(tokens[order[0]]))
        chosen, order = order[:count], order[count:]
        inputs = [part.to(device) for part in padded([tokens[row] for row in chosen])]
        with torch.no_grad():
            logits = network(*inputs)
        yield chosen, logits


def _validator(
    texts: list[str],
    targets: Float[np.ndarray, "rows labels"],
    tokenizer: Any,
    vectors: Float[Tensor, "answers width"],
    settings: dict[str, Any],
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Mean loss and micro-F1 of the validation rows."""
    tokens = tokens_of(tokenizer, texts, settings)
    sets = label_sets(csr_array(targets), places=settings["max_labels"])
    losses = set_losses(sets, vectors, settings)

    def validate(network: torch.nn.Module) -> dict[str, float]:
        said = np.zeros(targets.shape, dtype=bool)
        total = 0.0
        for chosen, logits in _written(network, tokens, settings["pass_tokens"]):
            total += float(losses(logits, chosen).double().sum())
            said[chosen] = said_probs(logits) > 0
        f1 = metrics.micro_f1(said, targets >= 0.5)
        return {"loss": total / len(tokens), "micro_f1": f1}

    return validate


def _card(
    model: str, labels: LabelSpace, rows: Rows, settings: dict[str, Any], done: Fitted
) -> dict[str, Any]:
    members = rows.soft >= 0.5
    sizes, counts = members.sum(axis=1), members.sum(axis=0)
    return {
        "model": model,
        "labels": labels.fingerprint,
        "rows": {"given": rows.given, "trained": len(rows.texts)},
        "sets": {
            "empty": int((sizes == 0).sum()),
            "largest": int(sizes.max()),
            "cut": int((sizes > settings["max_labels"]).sum()),
        },
        "labels_without_rows": [labels.ids[i] for i in np.flatnonzero(counts == 0)],
        "loss": done.losses,
        "processes": done.processes,
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _check(settings: dict[str, Any], labels: LabelSpace, output: Path) -> None:
    """Refuses what nothing can be trained with, before anything is loaded."""
    if not labels.multilabel:
        raise ValueError(
            "train_seq2set learns sets of labels, but in this label space a text has one; load it "
            "with multilabel=true, or use llmlabel.train.classifier.train_classifier"
        )
    for name, least in (("max_labels", 1), ("width", 1), ("transport_weight", 0)):
        if settings[name] is not None and not least <= settings[name] < float("inf"):
            raise ValueError(f"{name} must be at least {least}; got {settings[name]}")
    if not 0 <= settings["empty_weight"] <= 1:
        raise ValueError(f"empty_weight must be between 0 and 1; got {settings['empty_weight']}")
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {settings['dropout']}")
    if settings["scheme"] not in get_args(Scheme):
        names = ", ".join(get_args(Scheme))
        raise ValueError(f"scheme is one of {names}; got {settings['scheme']!r}")
    check_folder(output, WEIGHTS, what="a decoder of sets")
