"""Zero-shot labels from a sentence encoder: how close a text lies to each label's description."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels


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
            ready = models.load_encoder(encoder) if isinstance(encoder, str | Path) else encoder
            loaded.append((ready, unit_vectors(ready, labels.texts())))
        ready, anchors = loaded[0]
        texts = block["text"][:]
        readable = [i for i, text in enumerate(texts) if text.strip()]
        probs = np.zeros((len(block), len(labels)))
        if readable:
            cosines = unit_vectors(ready, [texts[i] for i in readable]) @ anchors.T
            probs[readable] = _probabilities(scale * cosines, multilabel=labels.multilabel)
        cut = _cut(ready, texts)
        errors = [cut[i] if text.strip() else "empty text" for i, text in enumerate(texts)]
        return with_columns(
            SoftLabels.from_dense(probs, labels).add_to(block),
            {
                "engine": ([name] * len(block), Value("string")),
                "error": (errors, Value("string")),
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


def unit_vectors(encoder: Encoder, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    """One vector of length 1 per text."""
    vectors = encoder.encode(
        list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return np.asarray(vectors, dtype=np.float64)


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


def _cut(encoder: Encoder, texts: list[str]) -> list[str | None]:
    """Says which texts are longer than what a SentenceTransformer reads; others never cut."""
    limit, tokenizer = getattr(encoder, "max_seq_length", None), getattr(encoder, "tokenizer", None)
    if limit is None or tokenizer is None:
        return [None] * len(texts)
    counts = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    return [f"text cut: {n} tokens, the limit is {limit}" if n > limit else None for n in counts]
