"""A language model reads each text and gives every label a probability."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float

from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine, Scores
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import Chat, prompt_sha, render
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

_YES_NO = ("yes", "no")


def label_direct(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path | None = None,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds the model's probability of every label, read exactly from its next-token distribution.

    In a single-label space the labels compete: their joint probabilities as the reply are
    normalised, and `label_mass` is their sum before that. In a multi-label space each label is a
    yes/no question of its own, and `label_mass` is the least mass of yes and no among them. A text
    without a character to read gets no label and an `error`; a text that is too long for the model
    is cut, labelled and gets an `error` that says so.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads; see `llmlabel.engine`.
        labels: what may be answered.
        prompt: a prompt file or a shipped name; by default `label/direct`, and `label/applies` in a
            multi-label space, where the file also sees `label`.
        demonstrations: mappings with `text` and `label` (id or name; in a multi-label space the list
            of all true ones), shown before every text. A row is never its own demonstration: rows
            whose text is shown are refused.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: a demonstration has an unknown label or is the text of a row.
    """
    require_columns(dataset, "id", "text")
    prompt = prompt or ("label/applies" if labels.multilabel else "label/direct")
    shown = shown_demonstrations(demonstrations, labels)
    _refuse_own_text(dataset, shown)
    sha = prompt_sha(prompt)

    def chats(text: str) -> list[Chat]:
        given: dict[str, Any] = {"text": text, "labels": labels.texts()}
        if not labels.multilabel:
            return [render(prompt, demonstrations=shown, **given)]
        asked = []
        for name in labels.names:
            answers = [
                {"text": one["text"], "label": _YES_NO[name not in one["label"]]} for one in shown
            ]
            asked.append(render(prompt, demonstrations=answers, label=name, **given))
        return asked

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        readable = [i for i, text in enumerate(texts) if text.strip()]
        asked = [chat for i in readable for chat in chats(texts[i])]
        scores = engine.score(asked, _YES_NO if labels.multilabel else labels.names)
        probs = np.zeros((len(block), len(labels)))
        mass = np.zeros(len(block), dtype=np.float32)
        errors: list[str | None] = ["empty text"] * len(block)
        if readable:
            soft, mass[readable], said = _soft_labels(scores, labels)
            probs[readable] = soft.dense()
            for i, error in zip(readable, said, strict=True):
                errors[i] = error
        return with_columns(
            SoftLabels.from_dense(probs, labels).add_to(block),
            {
                "label_mass": (mass, Value("float32")),
                "engine": ([engine.name] * len(block), Value("string")),
                "prompt_sha": ([sha] * len(block), Value("string")),
                "error": (errors, Value("string")),
            },
        )

    key = json.dumps(["label_direct", engine.name, sha, labels.fingerprint, shown])
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=key,
        block_rows=block_rows,
        output=output,
        name="label_direct",
    )


def _soft_labels(
    scores: Scores, labels: LabelSpace
) -> tuple[SoftLabels, Float[np.ndarray, " rows"], list[str | None]]:
    """Soft label, mass of the label set and message per row, from the scores of its chats."""
    errors = scores.errors or [None] * len(scores.log_probs)
    if labels.multilabel:
        answers = scores.log_probs.reshape(-1, len(labels), len(_YES_NO))
        total = np.logaddexp.reduce(answers, axis=2)
        read = np.isfinite(total).all(axis=1)
        with np.errstate(invalid="ignore"):  # -inf - -inf, replaced below
            yes = np.where(read[:, None], np.exp(answers[:, :, 0] - total), 0.0)
        soft = SoftLabels.from_dense(yes, labels)
        mass = np.minimum(np.exp(total), 1.0).min(axis=1)
        errors = [
            next((e for e in errors[i : i + len(labels)] if e), None)
            for i in range(0, len(errors), len(labels))
        ]
    else:
        soft = SoftLabels.from_scores(scores.log_probs, labels)
        mass = scores.label_mass
        read = np.asarray(soft.probs.sum(axis=1)).ravel() > 0
    unread = "the model gave no label a probability"
    return soft, mass, [e if ok else (e or unread) for e, ok in zip(errors, read, strict=True)]


def shown_demonstrations(
    demonstrations: Sequence[Mapping[str, Any]], labels: LabelSpace
) -> list[dict[str, Any]]:
    """The demonstrations with labels as names; a list of them in a multi-label space.

    Raises:
        ValueError: other keys than text and label, or an unknown label.
    """
    shown: list[dict[str, Any]] = []
    for number, one in enumerate(demonstrations, start=1):
        if set(one) != {"text", "label"}:
            raise ValueError(
                f"demonstration {number} has the keys {sorted(one)}; it needs text and label"
            )
        given = one["label"]
        if labels.multilabel != isinstance(given, list):
            form = "a list of all true labels" if labels.multilabel else "one label"
            raise ValueError(f"demonstration {number}: label is {given!r}; {form} is needed")
        if labels.multilabel:
            answer: Any = [labels.names[labels.index(label)] for label in given]
        else:
            answer = labels.names[labels.index(given)]
        shown.append({"text": one["text"], "label": answer})
    return shown


def _refuse_own_text(dataset: Dataset, shown: list[dict[str, Any]]) -> None:
    texts = {one["text"].strip() for one in shown}
    if not texts:
        return
    for row, text in zip(dataset["id"], dataset["text"], strict=True):
        if text.strip() in texts:
            raise ValueError(
                f"row {row!r} is shown as a demonstration; leave it out of one of the two"
            )
