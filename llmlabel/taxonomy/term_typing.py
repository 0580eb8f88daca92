"""Which type a term is of: by its nearest labelled terms, by a language model, or by type names.

Task B of "Heterogeneous LLM Methods for Ontology Learning" (arXiv 2508.19428). A term is the `text`
of a row, the types are a label space, and every answer is a distribution over the types.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from jaxtyping import Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.label.demonstrations import choose_demonstrations
from llmlabel.label.direct import label_direct
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.taxonomy.neighbours import LabelledTerms

Matrix = Float[np.ndarray, "terms types"]
Matrices = Float[np.ndarray, "encoders terms types"]


def vote_types(
    dataset: Dataset,
    pool: Dataset,
    types: LabelSpace,
    encoders: Sequence[str | Path | Encoder],
    *,
    neighbours: int = 10,
    scale: float = 10.0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the types of the nearest terms of `pool`, each weighted by exp(`scale` x cosine).

    The share of each type among the weights is its probability; of several encoders the mean. Terms
    are compared as they are: no type is ever part of what is encoded. Differs from the paper (arXiv
    2508.19428), which encodes "Term: ..., Types: ..." in the index, and so lets a row of the pool
    find itself by its own answer. A term of the pool with the id or the words of the row has no vote.

    Args:
        dataset: rows with `id` and `text`.
        pool: rows with `id`, `text` and `gold`.
        types: the label space of `gold`.
        encoders: paths, hub names, `package:` sources, or anything with `encode`.
        neighbours: terms that vote.
        scale: sharpness of the votes.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    indexes = [LabelledTerms(pool, types, encoder) for encoder in encoders]
    if not indexes:
        raise ValueError("vote_types: encoders is empty; give at least one")
    name = "+".join(f"votes:{index.name}" for index in indexes)

    def compute(block: Dataset) -> Dataset:
        probs = np.mean(
            [index.votes(block, neighbours=neighbours, scale=scale) for index in indexes], axis=0
        )
        why = "no other term of the pool to compare with"
        return _labelled(block, probs, types, engine=name, why=why)

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=json.dumps(["vote_types", name, types.fingerprint, neighbours, scale]),
        block_rows=block_rows,
        output=output,
        name="vote_types",
    )


def type_candidates(
    dataset: Dataset,
    pool: Dataset,
    types: LabelSpace,
    encoder: str | Path | Encoder,
    *,
    neighbours: int = 10,
    nearest_types: int = 3,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds `candidates`: the types of the nearest terms of `pool`, then the nearest type names.

    Args:
        dataset: rows with `id` and `text`.
        pool: rows with `id`, `text` and `gold`; see `vote_types` for what is never looked at.
        types: the label space of `gold`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        neighbours: terms whose types are taken, the most similar first.
        nearest_types: types that are taken because their "name: description" is near.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    index = LabelledTerms(pool, types, encoder)

    def compute(block: Dataset) -> Dataset:
        votes = index.votes(block, neighbours=neighbours, scale=10.0)
        found: list[list[int] | None] = []
        for row, named in zip(votes, index.named(block, nearest=nearest_types), strict=True):
            voted = np.argsort(-row, kind="stable")[: np.count_nonzero(row)].tolist()
            found.append(list(dict.fromkeys([*voted, *named])) or None)
        return with_columns(block, {"candidates": (found, List(Value("int32")))})

    key = ["type_candidates", index.name, types.fingerprint, neighbours, nearest_types]
    return map_blocks(
        dataset,
        compute,
        columns=("candidates",),
        key=json.dumps(key),
        block_rows=block_rows,
        output=output,
        name="type_candidates",
    )


def type_terms(  # noqa: PLR0913  # what may be answered, what is shown, when nothing is said
    dataset: Dataset,
    engine: Engine,
    pool: Dataset,
    types: LabelSpace,
    *,
    encoder: str | Path | Encoder,
    neighbours: int = 10,
    nearest_types: int = 3,
    shown: int = 4,
    prompt: str | Path = "taxonomy/type_term",
    min_mass: float = 0.0,
    min_confidence: float = 0.0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds a language model's distribution over the types, with similar terms as demonstrations.

    `type_candidates` says what may be answered, `choose_demonstrations` what is shown, and
    `label_direct` reads the probability of each candidate; then `abstain`.

    Differs from the paper (arXiv 2508.19428): types are not written as JSON but read as
    probabilities, only candidates may be answered, and no reasons are asked for.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads.
        pool: rows with `id`, `text` and `gold`; a row is never its own demonstration.
        types: the label space, of one type a term.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        neighbours: see `type_candidates`.
        nearest_types: see there.
        shown: demonstrations of a row, the nearest last.
        prompt: a prompt file or a shipped name.
        min_mass: a row whose `label_mass` is below it gets no label, and an `error`.
        min_confidence: see `abstain`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    ready = models.load_encoder(encoder)
    place = {name: output and output / name for name in ("candidates", "shown", "labels")}
    rows = type_candidates(
        dataset,
        pool,
        types,
        ready,
        neighbours=neighbours,
        nearest_types=nearest_types,
        output=place["candidates"],
    )
    rows = choose_demonstrations(
        rows, pool, types, n=shown, method="similarity", encoder=ready, output=place["shown"]
    )
    rows = label_direct(
        rows,
        engine,
        types,
        prompt=prompt,
        min_mass=min_mass,
        block_rows=block_rows,
        output=place["labels"],
    )
    return abstain(rows, types, min_confidence=min_confidence)


def ensemble_typing(
    dataset: Dataset,
    encoders: Sequence[str | Path | Encoder],
    types: LabelSpace,
    *,
    temperature: float = 0.02,
    weights: Literal["confidence", "uniform"] | list[float] = "confidence",
    min_confidence: float = 0.0,
) -> Dataset:
    """Adds softmax(weighted cosines / `temperature`) of each term against each type, zero-shot.

    The cosines of all encoders are added up with the weights of `ensemble_weights`; see there for
    the paper (arXiv 2508.19428). The weights depend on all rows, so no block of them is kept.

    Differs from the paper: `temperature` is 0.02 and not 1, at which every softmax of cosines is
    flat, so that an encoder that wavers weighs as much as one that is sure; every type has a
    probability, and not only the best one; terms and types are encoded without phrases around them.

    Args:
        dataset: rows with `id` and `text`.
        encoders: paths, hub names, `package:` sources, or anything with `encode`.
        types: what may be answered.
        temperature: in units of cosine.
        weights: by confidence, all equal, or one number per encoder.
        min_confidence: see `abstain`.

    Raises:
        ValueError: there is no encoder, or the weights are not one positive number for each.
    """
    require_columns(dataset, "id", "text")
    if not encoders:
        raise ValueError("ensemble_typing: encoders is empty; give at least one")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    texts = dataset["text"][:]
    rows = [row for row, text in enumerate(texts) if text.strip()]
    probs, names = (
        np.zeros((len(texts), len(types))),
        [encoder_name(one, types.texts()) for one in encoders],
    )
    shares = np.full(len(encoders), 1 / len(encoders))
    if isinstance(weights, list):
        shares = _given(weights, len(encoders))
    if rows:
        cosines = np.stack([_cosines(one, [texts[row] for row in rows], types) for one in encoders])
        if weights == "confidence":
            shares = ensemble_weights(cosines, temperature=temperature)
        probs[rows] = _softmax(np.einsum("e,etk->tk", shares, cosines) / temperature)
    who = "+".join(f"{share:.3f}*{name}" for share, name in zip(shares, names, strict=True))
    found = _labelled(dataset, probs, types, engine=f"ensemble:{who}", why="empty text")
    return abstain(found, types, min_confidence=min_confidence)


def ensemble_weights(cosines: Matrices, *, temperature: float) -> Float[np.ndarray, " encoders"]:
    """How much each encoder counts: the more, the surer it is of its terms' types.

    With p = softmax(cosines / temperature) by row, H = -sum p log(p + 1e-10), confidence =
    max p (1 - H / log types) and means over the terms: 0.7 confidence / sum of confidences + 0.3
    (1 - H / sum of H), scaled to sum to 1 (arXiv 2508.19428, ensemble typing, as in its code).
    """
    p = _softmax(cosines / temperature)
    entropy = -(p * np.log(p + 1e-10)).sum(axis=2)
    confidence = (p.max(axis=2) * (1 - entropy / np.log(p.shape[2]))).mean(axis=1)
    entropy = entropy.mean(axis=1)
    raw = 0.7 * confidence / confidence.sum() + 0.3 * (1 - entropy / entropy.sum())
    return raw / raw.sum()


def abstain(dataset: Dataset, labels: LabelSpace, *, min_confidence: float) -> Dataset:
    """Takes the label from rows whose most probable one is below; they get an `error` instead."""
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence is a probability; got {min_confidence}")
    probs = SoftLabels.from_dataset(dataset, labels).dense()
    best = probs.max(axis=1)
    unsure = (best > 0) & (best < min_confidence)
    errors = dataset["error"][:] if "error" in dataset.column_names else [None] * len(dataset)
    for row in np.flatnonzero(unsure).tolist():
        why = f"abstained: {best[row]:.2g} is below min_confidence={min_confidence:g}"
        errors[row] = f"{errors[row]}; {why}" if errors[row] else why
    probs[unsure] = 0.0
    rows = SoftLabels.from_dense(probs, labels).add_to(dataset)
    return with_columns(rows, {"error": (errors, Value("string"))})


# ------------------------------------------------------------------------------------ the parts


def _labelled(
    dataset: Dataset, probs: Matrix, types: LabelSpace, *, engine: str, why: str
) -> Dataset:
    """The rows with their soft labels; `why` is the error of those that have none."""
    texts, answered = dataset["text"][:], (probs.max(axis=1) > 0).tolist()
    errors = [
        None if ok else "empty text" if not text.strip() else why
        for ok, text in zip(answered, texts, strict=True)
    ]
    return with_columns(
        SoftLabels.from_dense(probs, types).add_to(dataset),
        {
            "label_mass": ([None] * len(texts), Value("float32")),
            "engine": (pa.repeat(engine, len(texts)), Value("string")),
            "prompt_sha": ([None] * len(texts), Value("string")),
            "error": (errors, Value("string")),
        },
    )


def _cosines(encoder: str | Path | Encoder, texts: list[str], types: LabelSpace) -> Matrix:
    ready = models.load_encoder(encoder)
    return unit_vectors(ready, texts) @ unit_vectors(ready, types.texts()).T


def _softmax(logits: Float[np.ndarray, "*rows types"]) -> Float[np.ndarray, "*rows types"]:
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def _given(weights: list[float], encoders: int) -> Float[np.ndarray, " encoders"]:
    if len(weights) != encoders or min(weights) < 0 or not sum(weights):
        raise ValueError(
            f"weights must be {encoders} numbers from 0, one for each encoder, and not all 0; got "
            f"{weights}"
        )
    return np.array(weights) / sum(weights)
