"""Prompt tuning from text to text (PT): a frozen decoder learns to write the labels of a text.

The baseline of Buchner et al. (arXiv 2309.12075): after a trained prompt and the text, the decoder
writes `a; b`, and is kept to sets of labels (`llmlabel.engine.labelsets`). It needs no head, and says
no probabilities; `llmlabel.train.prompt_tuning` reads a text once instead.

Differs from the paper: a line break stands between a text and its labels; the prompt's keys and values
are computed once for all rows of a pass; the learning rate rises first and then falls to 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns
from llmlabel.engine.labelsets import LabelSets, label_sets
from llmlabel.labelspace import LabelSpace
from llmlabel.loss.soft import balanced_pos_weight
from llmlabel.softlabels import LABEL_COLUMNS
from llmlabel.train import checkpoint
from llmlabel.train.answers import read_errors, with_answers
from llmlabel.train.folder import check_folder, folder_sha
from llmlabel.train.loop import Fitted, Objective, fit
from llmlabel.train.network import padded
from llmlabel.train.prompt_writer import (
    WEIGHTS,
    load_writer,
    new_writer,
    save_writer,
    written,
)
from llmlabel.train.settings import Training, settle
from llmlabel.train.soft_prompt import check_choices
from llmlabel.train.student import (
    Rows,
    check_patience,
    repeated,
    rows_sha,
    sha_of,
    training_rows,
    validation_rows,
)

_BEFORE = "\n"


def train_text_to_text(
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
    """Trains a soft prompt after which a decoder writes the labels of a text, for `write_labels`.

    A row's set are its labels with a probability of at least 0.5, the most frequent first, of equals
    those with lower ids; of a row without any there is nothing to write, and it is left out. The loss
    of a row is the mean surprise of the tokens of its reply.

    Args:
        dataset: rows with soft labels of a multi-label space.
        labels: the label space; labels are written by their names.
        model: see `llmlabel.train.prompt_tuning.train_prompt`, as for the next four.
        output: see there.
        validation: see there; the loss of its rows decides.
        prompt_tokens: see there.
        init: see there.
        pos_weight: `balanced` multiplies the loss of a row by the sum, over its labels, of rows of the
            most frequent label / the label's own; null counts all rows alike.
        **training: see `llmlabel.train.settings.Training`; there is no head.

    Returns:
        The model folder.

    Raises:
        ValueError: the space is not multi-label, no row can be trained on, or the model is no decoder.
    """
    settings = settle(training, num_train_epochs=8, learning_rate=5e-3, max_grad_norm=1.0)
    settings |= {"prompt_tokens": prompt_tokens, "init": init, "pos_weight": pos_weight}
    _check(settings, labels, output)
    check_patience(settings, validation)
    rows = _with_labels(training_rows(dataset, labels))
    given = None if validation is None else validation_rows(validation, labels)
    if given is not None and not (given[2] >= 0.5).any():
        raise ValueError(
            f"none of the {len(given[1])} validation rows has a label with a probability of at least "
            "0.5, whose writing could be measured; give others, or no validation"
        )
    overlap = 0 if given is None else repeated(*given[:2], rows)
    settings["max_labels"] = int((rows.soft >= 0.5).sum(axis=1).max())
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        network, tokenizer = new_writer(str(model), labels, settings)
        script = _Script.of(tokenizer, labels, rows, settings)
        _check_length(script.sets, network.model.config, settings, model)
        replies = script.replies(rows.texts, rows.soft)
        objective = Objective(
            network,
            [{"params": [network.prompt], "lr": settings["learning_rate"]}],
            rows.ids,
            replies.lengths,
            rows.weights,
            replies.inputs,
            replies.losses,
        )
        if given is not None:
            seen = script.replies(given[1], csr_array(given[2]))
            objective.validate = seen.validator(settings["pass_tokens"])
        key = ["text_to_text", models.model_sha(models.fetch(str(model))), labels.fingerprint]
        key += [rows_sha(rows), "" if given is None else sha_of(given[1], [given[2]])]
        done = fit(objective, settings, name="train_text_to_text", key=str(key), output=output)
    if done.is_main:
        card = _card(str(model), labels, rows, settings, done)
        if given is not None:
            card["validation"] = {
                "rows": len(seen.said),
                "repeat_training_rows": overlap,
                "epochs": done.validation,
                "best_epoch": done.best_epoch,
            }
        save_writer(network, labels, card, output)
        checkpoint.remove(output)
    return output


def write_labels(
    dataset: Dataset,
    *,
    model: Path,
    pass_tokens: int = 8192,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the labels that a prompted decoder writes of each text, in the columns that teachers write.

    Each token is the most probable of those that a set of labels allows, of at least one and at most as
    many as a training row had. A label that is written has the probability 1, since a reply does not
    say how sure the model is. Computes in float32; results do not depend on which rows share a pass.

    Args:
        dataset: rows with `text`.
        model: a folder written by `train_text_to_text`.
        pass_tokens: padded tokens computed at a time.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.
    """
    require_columns(dataset, "text")
    network, tokenizer, labels, card = load_writer(model)
    most, limit = (int(card["settings"][name]) for name in ("max_labels", "max_length"))
    sets = label_sets(tokenizer, labels.names, before=_BEFORE, most=most)
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        kept, errors = read_errors(texts, tokenizer, limit)
        contexts = [_context(tokenizer, texts[row], limit) for row in kept]
        probs = np.zeros((len(texts), len(labels)))
        for row, reply in zip(kept, written(network, contexts, sets, pass_tokens), strict=True):
            probs[row, sets.read(reply)] = 1.0
        return with_answers(block, probs, labels, name=name, errors=errors)

    digest = folder_sha(model, WEIGHTS)
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=f"write_labels {digest} {models.model_sha(models.fetch(card['model']))}",
        output=output,
        block_rows=block_rows,
        name="write_labels",
    )


# ----------------------------------------------------------------------------------------- replies


@dataclass(frozen=True, eq=False)
class _Replies:
    """What is read, what is to be said after it, and what the loss of each row counts."""

    contexts: list[list[int]]
    said: list[list[int]]
    heavy: Float[Tensor, " rows"]

    @property
    def lengths(self) -> list[int]:
        return [len(one) + len(other) for one, other in zip(self.contexts, self.said, strict=True)]

    def inputs(self, chosen: list[int]) -> tuple[Tensor, ...]:
        """The last token before a reply goes with it: the reply's first is what follows it."""
        before = padded([self.contexts[row][:-1] for row in chosen])
        return *before, *padded([self.contexts[row][-1:] + self.said[row] for row in chosen])

    def losses(self, surprise: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        return surprise * self.heavy[chosen].to(surprise)

    def validator(self, pass_tokens: int) -> Callable[[torch.nn.Module], dict[str, float]]:
        """The mean loss of all rows, in passes."""

        def validate(network: torch.nn.Module) -> dict[str, float]:
            device = next(network.parameters()).device
            lengths, total = self.lengths, 0.0
            order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
            while order:
                count = max(1, pass_tokens // lengths[order[0]])
                chosen, order = order[:count], order[count:]
                surprise = network(*(part.to(device) for part in self.inputs(chosen)))
                total += float(self.losses(surprise, chosen).double().sum())
            return {"loss": total / len(lengths)}

        return validate


@dataclass(frozen=True, eq=False)
class _Script:
    """How the labels of a text are written."""

    tokenizer: Any
    sets: LabelSets
    max_length: int
    counts: Float[np.ndarray, " labels"]
    """Training rows of each label, by weight; the most frequent is written first."""
    heavy: Float[Tensor, " labels"] | None

    @classmethod
    def of(
        cls, tokenizer: Any, labels: LabelSpace, rows: Rows, settings: dict[str, Any]
    ) -> "_Script":
        most = settings["max_labels"]
        sets = label_sets(tokenizer, labels.names, before=_BEFORE, most=most)
        counts = (rows.soft >= 0.5).astype(np.float64).T @ rows.weights
        is_balanced = settings["pos_weight"] == "balanced"
        heavy = balanced_pos_weight(torch.from_numpy(counts)) if is_balanced else None
        return cls(tokenizer, sets, settings["max_length"], counts, heavy)

    def replies(self, texts: Sequence[str], targets: csr_array) -> _Replies:
        """Of the rows that have a label; of more than any training row, the first ones."""
        contexts, said, heavy = [], [], []
        ends = targets.indptr
        for text, start, stop in zip(texts, ends[:-1], ends[1:], strict=True):
            members = targets.data[start:stop] >= 0.5
            if own := targets.indices[start:stop][members].tolist():
                contexts.append(_context(self.tokenizer, text, self.max_length))
                in_order = sorted(own, key=lambda label: (-self.counts[label], label))
                said.append(self.sets.encode(in_order[: self.sets.most]))
                heavy.append(1.0 if self.heavy is None else float(self.heavy[own].sum()))
        return _Replies(contexts, said, torch.tensor(heavy))


def _context(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The tokens of a text, and of what stands between it and its labels."""
    own = tokenizer(text, truncation=True, max_length=limit).input_ids
    between = tokenizer(_BEFORE, add_special_tokens=False).input_ids
    # A tokenizer that knows no line breaks ends the text instead.
    return [*own, *(between or [tokenizer.eos_token_id])]


def _with_labels(rows: Rows) -> Rows:
    """The rows of which there is something to write.

    Raises:
        ValueError: there are none.
    """
    some = np.flatnonzero((rows.soft >= 0.5).sum(axis=1)).tolist()
    if not some:
        raise ValueError(
            f"none of the {len(rows.texts)} rows has a label with a probability of at least 0.5, "
            "which could be written"
        )
    return replace(
        rows,
        ids=[rows.ids[row] for row in some],
        texts=[rows.texts[row] for row in some],
        soft=rows.soft[some],
        weights=rows.weights[some],
        kept=[rows.kept[row] for row in some],
    )


def _card(
    model: str, labels: LabelSpace, rows: Rows, settings: dict[str, Any], done: Fitted
) -> dict[str, Any]:
    return {
        "model": model,
        "labels": labels.fingerprint,
        "rows": {"given": rows.given, "trained": len(rows.texts)},
        "loss": done.losses,
        "processes": done.processes,
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _check(settings: dict[str, Any], labels: LabelSpace, output: Path) -> None:
    """Refuses what nothing can be trained with, before anything is loaded."""
    if not labels.multilabel:
        raise ValueError(
            "train_text_to_text learns sets of labels, but in this label space a text has one; load it "
            "with multilabel=true, or use llmlabel.train.prompt_tuning.train_prompt"
        )
    check_choices(settings)
    check_folder(output, WEIGHTS, what="a writer of labels")


def _check_length(
    sets: LabelSets, config: Any, settings: dict[str, Any], model: str | Path
) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    more = settings["prompt_tokens"] + sets.longest + 2
    if limit is not None and settings["max_length"] + more > limit:
        raise ValueError(
            f"max_length={settings['max_length']} with {more} tokens of prompt and labels is more than "
            f"the {limit} tokens of {model}; set max_length={max(1, limit - more)} or less"
        )
