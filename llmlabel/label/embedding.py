"""Vectors of texts and labels, and zero-shot labels: how close a text lies to a label's description."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float, Int

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_vectors
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

TEXT_CUT = "text cut"
"""How the `error` of a row begins whose text was longer than what was read of it."""


@runtime_checkable
class Encoder(Protocol):
    """What is asked of an encoder; a SentenceTransformer is one."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        """One vector per text."""
        ...


def label_embedding(
    dataset: Dataset,
    encoder: str | Path | Encoder,
    labels: LabelSpace,
    *,
    scale: float = 20.0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds softmax(`scale` x cosine) of each text against "name: description" of each label.

    The form of CLIP's zero-shot classifier (arXiv 2103.00020, section 3.1). In a multi-label space,
    where softmax has no meaning and no published form is known to us, each label gets
    sigmoid(`scale` x (cosine - mean cosine of the row)). A text without a character to read gets no
    label and an `error`.

    Args:
        dataset: rows with `id` and `text`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        labels: what may be answered.
        scale: sharpness; the inverse of a temperature in cosine units.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    require_columns(dataset, "id", "text")
    name = encoder_name(encoder, labels.texts())
    loaded: list[tuple[Encoder, Float[np.ndarray, "labels width"]]] = []

    def compute(block: Dataset) -> Dataset:
        if not loaded:  # not before a block has to be computed
            ready = models.load_encoder(encoder)
            loaded.append((ready, unit_vectors(ready, labels.texts())))
        ready, anchors = loaded[0]
        texts = block["text"][:]
        readable = [i for i, text in enumerate(texts) if text.strip()]
        probs = np.zeros((len(block), len(labels)))
        if readable:
            cosines = unit_vectors(ready, [texts[i] for i in readable]) @ anchors.T
            probs[readable] = _probabilities(scale * cosines, multilabel=labels.multilabel)
        return with_columns(
            SoftLabels.from_dense(probs, labels).add_to(block),
            {
                "engine": ([name] * len(block), Value("string")),
                "error": (_unread(ready, texts), Value("string")),
                "label_mass": ([None] * len(block), Value("float32")),
                "prompt_sha": ([None] * len(block), Value("string")),
            },
        )

    key = json.dumps(["label_embedding", name, labels.fingerprint, scale])
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=key,
        block_rows=block_rows,
        output=output,
        name="label_embedding",
    )


def embed(
    dataset: Dataset,
    encoder: str | Path | Encoder,
    *,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `vector`, the embedding of each text, of length 1; null for a text without a character.

    Also adds `error`: that there was no character to read, or that the encoder reads less than the
    whole text. What an earlier step says there stays, unless it is a cut and this one cuts too.

    Args:
        dataset: rows with `id` and `text`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    earlier = ("error",) if "error" in dataset.column_names else ()
    require_columns(dataset, "id", "text", *earlier)
    loaded: list[Encoder] = []

    def compute(block: Dataset) -> Dataset:
        if not loaded:  # not before a block has to be computed
            ready = models.load_encoder(encoder)
            loaded.append(ready)
        texts = block["text"][:]
        readable = [row for row, text in enumerate(texts) if text.strip()]
        found: list[list[float] | None] = [None] * len(texts)
        if readable:
            vectors = unit_vectors(loaded[0], [texts[row] for row in readable]).astype(np.float32)
            for row, vector in zip(readable, vectors.tolist(), strict=True):
                found[row] = vector
        before = block["error"][:] if earlier else [None] * len(texts)
        errors = [  # why a row has no label is never lost behind a cut
            mine or old if (old or TEXT_CUT).startswith(TEXT_CUT) else old
            for mine, old in zip(_unread(loaded[0], texts), before, strict=True)
        ]
        return with_columns(
            block,
            {"vector": (found, List(Value("float32"))), "error": (errors, Value("string"))},
        )

    name = None if output is None else encoder_name(encoder, ["a text", "another"])
    return map_blocks(
        dataset,
        compute,
        columns=("vector", "error"),
        key=json.dumps(["embed", "vector", "error", name]),
        reads=earlier,
        block_rows=block_rows,
        output=output,
        name="embed",
    )


def embed_labels(labels: LabelSpace, encoder: str | Path | Encoder) -> Dataset:
    """The labels as rows: `id`, their "name: description" as `text`, its `vector` and `error`."""
    rows = Dataset.from_dict({"id": list(labels.ids), "text": labels.texts()})
    return embed(rows, encoder)


def label_vectors(anchors: Dataset, labels: LabelSpace) -> Float[np.ndarray, "labels width"]:
    """The vectors of `embed_labels`, in the order of the labels.

    Raises:
        ValueError: a label has no row, or its row no vector.
    """
    require_columns(anchors, "id", "vector")
    position = {id: row for row, id in enumerate(anchors["id"][:])}
    if absent := [id for id in labels.ids if id not in position]:
        raise ValueError(f"the label {absent[0]!r} has no row in anchors; use embed_labels")
    vectors, rows = readable_vectors(anchors.select([position[id] for id in labels.ids]))
    if len(rows) < len(labels):
        first = min(set(range(len(labels))) - set(rows.tolist()))
        raise ValueError(f"the label {labels.ids[first]!r} has no vector; give it a name to read")
    return vectors.astype(np.float64)


def readable_vectors(
    dataset: Dataset,
) -> tuple[Float[np.ndarray, "readable width"], Int[np.ndarray, " readable"]]:
    """The vectors, of length 1, of the rows that have one, and the positions of these rows.

    Raises:
        ValueError: a vector has another width than the first, is not finite, or has length 0.
    """
    require_columns(dataset, "id", "vector")
    valid = arrow_table(dataset.select_columns(["vector"]))["vector"].is_valid()
    rows = np.flatnonzero(valid.to_numpy())
    vectors = row_vectors(dataset.select(rows))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        row = dataset[int(rows[lengths[:, 0].argmin()])]
        raise ValueError(f"row with id {row['id']!r} has a vector of length 0; embed it again")
    return vectors / lengths, rows


def unit_vectors(encoder: Encoder, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    """One vector of length 1 per text; a vector of zeros stays as it is."""
    encoded = encoder.encode(
        list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    vectors = np.asarray(encoded, dtype=np.float64)
    # Once more: what an encoder in bfloat16 divides by its length is off by up to 0.4 %.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def encoder_name(encoder: str | Path | Encoder, probe: Sequence[str]) -> str:
    """What tells one encoder from another: its files, or else its vectors of the `probe` texts."""
    if isinstance(encoder, str | Path):
        return f"encoder:{models.model_name(encoder)}@{models.model_sha(models.fetch(encoder))}"
    vectors = unit_vectors(encoder, probe).astype(np.float32)
    digest = hashlib.sha256(vectors.round(4).tobytes()).hexdigest()[:8]
    return f"encoder:{type(encoder).__name__}@{digest}"


def _probabilities(
    logits: Float[np.ndarray, "rows labels"], *, multilabel: bool
) -> Float[np.ndarray, "rows labels"]:
    if multilabel:
        return 1.0 / (1.0 + np.exp(-(logits - logits.mean(axis=1, keepdims=True))))
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def _unread(encoder: Encoder, texts: list[str]) -> list[str | None]:
    """What the encoder does not read of each text."""
    cuts = zip(texts, _cut(encoder, texts), strict=True)
    return [cut if text.strip() else "empty text" for text, cut in cuts]


def _cut(encoder: Encoder, texts: list[str]) -> list[str | None]:
    """Says which texts are longer than what a SentenceTransformer reads; others never cut.

    Nor does one of static embeddings: its limit is infinite, and its tokenizer no function.
    """
    limit, tokenizer = getattr(encoder, "max_seq_length", None), getattr(encoder, "tokenizer", None)
    if limit is None or not math.isfinite(limit) or not callable(tokenizer):
        return [None] * len(texts)
    counts = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    return [f"{TEXT_CUT}: {n} tokens, the limit is {limit}" if n > limit else None for n in counts]
