"""Labels of one field's texts from labelled texts of another, by concepts that both have.

The composite labeling function of Ascione and Tamagnone, "From scratch to silver" (arXiv
2509.09303), there for patents and papers about the Sustainable Development Goals: a language model
writes down what a text is about in a few fixed fields, fields of both sides are compared in pairs
(views), and the labels' ranks in all views are fused. Only known links calibrate the weights of the
views, because a link that nobody made need not be wrong.

Differs from the paper: built from its abstract, so the fusion formula, the loss and the constants
here are ours. The scores are ranks made into numbers, no calibrated probabilities.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from jaxtyping import Bool, Float

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import gold_matrix, require_columns, with_columns
from llmlabel.engine import Engine, Reply
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.fusion import (
    fit_weights,
    fuse,
    label_similarities,
    positive_only_loss,
    reciprocal_ranks,
)
from llmlabel.label.memory import text_key
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import find_prompt, prompt_sha, render
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

PATENT_FIELDS: Mapping[str, str] = {
    "function": "the task that is done or the need that is met",
    "solution": "the means by which that is done",
    "application": "where, by whom and for what it is used",
}

CONCEPTS = List({"field": Value("string"), "text": Value("string")})
"""The type of the column `concepts`."""

_Views = Float[np.ndarray, "views items labels"]


@dataclass(frozen=True)
class ViewWeights:
    """How much each view counts, and how views are made.

    Attributes:
        weights: "field of the item / field of the reference" -> share, which sum to 1; when empty,
            all views count equally.
        k: Of reciprocal ranks, 1 / (k + rank): with a larger one, ranks count more evenly.
        top: A label is as similar as the mean of its so many nearest references.
        positives: Number of known links that the weights were fitted to.
        loss: Mean -log(score + 0.01) of these.
        equal_loss: The same with equal weights.
    """

    weights: dict[str, float] = field(default_factory=dict)
    k: float = 60.0
    top: int = 3
    positives: int = 0
    loss: float | None = None
    equal_loss: float | None = None

    def __post_init__(self) -> None:
        """Checks the constants."""
        if not self.k > 0:
            raise ValueError(f"k must be above 0; got {self.k}")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, a number of references; got {self.top}")


# ------------------------------------------------------------------------------- texts to concepts


def extract_concepts(
    dataset: Dataset,
    engine: Engine,
    *,
    fields: Mapping[str, str] = PATENT_FIELDS,
    prompt: str | Path = "label/concepts",
    characters: int = 240,
    max_tokens: int = 256,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds `concepts`: what a language model says about each field of the text, and its `reply`.

    A field that the text tells nothing about is left out. A reply that is not JSON with these
    fields gives no concepts and an `error`, as does a text without a character to read.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads; its replies are held to a JSON schema.
        fields: name -> what is to be said there; the same for both sides.
        prompt: a prompt file or a shipped name, which sees `fields`.
        characters: of a field; the schema ends it there, where a small model copies on and on.
        max_tokens: of a reply.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    require_columns(dataset, "id", "text")
    if not fields:
        raise ValueError("fields is empty; name at least one thing that texts are about")
    path, sha, kinds = find_prompt(prompt), prompt_sha(prompt), dict(fields)
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": characters} for name in fields},
        "required": list(fields),
        "additionalProperties": False,
    }

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        rows = [row for row, text in enumerate(texts) if text.strip()]
        chats = [render(path, text=texts[row], labels=(), fields=kinds) for row in rows]
        replies = engine.generate(chats, max_tokens=max_tokens, schema=schema) if rows else []
        said = {row: reply.text for row, reply in zip(rows, replies, strict=True)}
        read = {row: _read(reply, kinds) for row, reply in zip(rows, replies, strict=True)}
        found = [read.get(row, ([], "empty text")) for row in range(len(block))]
        columns: dict[str, tuple[Any, Any]] = {
            "concepts": ([concepts for concepts, _ in found], CONCEPTS),
            "reply": ([said.get(row) for row in range(len(block))], Value("string")),
            "error": ([error for _, error in found], Value("string")),
            "engine": (pa.repeat(engine.name, len(block)), Value("string")),
            "prompt_sha": (pa.repeat(sha, len(block)), Value("string")),
        }
        return with_columns(block, columns)

    return map_blocks(
        dataset,
        compute,
        columns=("concepts", "reply", "error", "engine", "prompt_sha"),
        key={
            "engine": engine.name,
            "prompt": sha,
            "fields": kinds,
            "characters": characters,
            "max_tokens": max_tokens,
        },
        block_rows=block_rows,
        output=output,
        name="extract_concepts",
    )


def _read(reply: Reply, fields: dict[str, str]) -> tuple[list[dict[str, str]], str | None]:
    try:
        found = json.loads(reply.text)
    except ValueError as error:
        cut = "a larger max_tokens lets it end" if reply.finish_reason == "length" else str(error)
        return [], reply.error or f"the reply is no JSON: {cut}"
    if not isinstance(found, dict) or set(found) != set(fields):
        return [], f"the reply is no JSON object with the fields {', '.join(fields)}"
    if odd := [name for name in fields if not isinstance(found[name], str)]:
        return [], f"the field {odd[0]!r} of the reply is no text"
    texts = {name: found[name].strip() for name in fields}
    concepts = [{"field": name, "text": text} for name, text in texts.items() if text]
    return concepts, reply.error or (None if concepts else "the model found nothing in any field")


# ------------------------------------------------------------------------------ concepts to labels


def calibrate_concepts(
    dataset: Dataset,
    references: Dataset,
    encoder: str | Path | Encoder,
    labels: LabelSpace,
    *,
    k: float = 60.0,
    top: int = 3,
    l2: float = 0.0,
) -> ViewWeights:
    """Weights of the views under which the known labels of the rows get high scores.

    See `fit_weights`. A label that a row does not have in `gold` is unknown, not wrong. A reference
    with the id or the words of a row is not compared with it, since it would give its label away;
    where other documents repeat it, take those out of `references` first.

    Args:
        dataset: rows with `concepts` and, in `gold`, the labels known of them.
        references: labelled rows of the other field, with `concepts` and `gold`.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        labels: a multi-label space.
        k: see `ViewWeights`.
        top: see there.
        l2: pulls the weights towards equal ones.

    Raises:
        ValueError: no row has both concepts and a known label, or no reference has.
    """
    require_columns(dataset, "id", "text", "concepts", "gold")
    made = ViewWeights(k=k, top=top)
    compared = _Compared(references, encoder, labels, made)
    known = gold_matrix(dataset, labels)
    used = np.flatnonzero(known.any(axis=1) & np.array(_fields_of(dataset), dtype=bool))
    if not used.size:
        raise ValueError("no row has both concepts and a known label; weights cannot be calibrated")
    ranks, known = compared.ranks(dataset.select(used)), known[used]
    equal = np.full(len(ranks), 1 / len(ranks))
    weights = fit_weights(ranks, known, l2=l2)
    return ViewWeights(
        *(dict(zip(compared.views, weights.tolist(), strict=True)), k, top, int(known.sum())),
        loss=positive_only_loss(fuse(ranks, weights), known)[0],
        equal_loss=positive_only_loss(fuse(ranks, equal), known)[0],
    )


def label_concepts(
    dataset: Dataset,
    references: Dataset,
    encoder: str | Path | Encoder,
    labels: LabelSpace,
    *,
    views: ViewWeights | None = None,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds to each row a score between 0 and 1 for every label: 1 for its first, 0 for its last.

    Weighted reciprocal-rank fusion (Cormack et al. 2009, doi 10.1145/1571941.1572114) of the
    labels' ranks in all views, then min-max. A row without concepts, or whose labels all tie, gets
    no label and an `error`.

    Args:
        dataset: rows with `concepts`.
        references: see `calibrate_concepts`, as for the next two; references with the id or the
            words of a row are not compared with it here either.
        encoder: see there.
        labels: see there.
        views: what `calibrate_concepts` gives; equal weights when left out.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    require_columns(dataset, "id", "text", "concepts")
    made = views or ViewWeights()
    compared = _Compared(references, encoder, labels, made)
    weights = np.array([made.weights.get(view, 0.0) for view in compared.views])
    if not made.weights:
        weights = np.full(len(compared.views), 1 / len(compared.views))
    elif unknown := sorted(set(made.weights) - set(compared.views)):
        raise ValueError(f"the view {unknown[0]!r} is none of {', '.join(compared.views)}")

    def compute(block: Dataset) -> Dataset:
        there = np.array(_fields_of(block), dtype=bool)
        scores = np.zeros((len(block), len(labels)))
        if there.any():
            some = block.select(np.flatnonzero(there))
            scores[there] = fuse(compared.ranks(some), weights)
        said = block["error"][:] if "error" in block.column_names else [None] * len(block)
        why = np.where(there, "no view tells the labels apart", "no concepts").tolist()
        told = zip(said, (scores.max(axis=1) > 0).tolist(), why, strict=True)
        errors = [first or (None if labelled else reason) for first, labelled, reason in told]
        columns: dict[str, tuple[Any, Any]] = {
            "label_mass": (pa.nulls(len(block)), Value("float32")),
            "engine": (pa.repeat(f"concepts + {compared.name}", len(block)), Value("string")),
            "prompt_sha": (pa.nulls(len(block)), Value("string")),
            "error": (errors, Value("string")),
        }
        return with_columns(SoftLabels.from_dense(scores, labels).add_to(block), columns)

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key={
            "encoder": compared.name,
            "labels": labels,
            "references": compared.sha,
            "views": {**made.weights, "k": made.k, "top": made.top},
        },
        reads=("concepts", *(("error",) if "error" in dataset.column_names else ())),
        block_rows=block_rows,
        output=output,
        name="label_concepts",
    )


class _Compared:
    """References, against which rows are ranked."""

    def __init__(
        self, references: Dataset, encoder: Any, labels: LabelSpace, made: ViewWeights
    ) -> None:
        if not labels.multilabel:
            raise ValueError("these scores are no distribution; load labels with multilabel=true")
        require_columns(references, "id", "text", "concepts", "gold")
        gold, given = gold_matrix(references, labels), np.array(_fields_of(references), dtype=bool)
        kept = np.flatnonzero(gold.any(axis=1) & given)
        if not kept.size:
            raise ValueError("no reference has both concepts and gold labels; nothing to compare")
        self.rows, self.gold, self.made = references.select(kept), gold[kept], made
        self.said = _fields_of(self.rows)
        content = [self.rows["id"][:], self.rows["text"][:], self.said, self.gold.tolist()]
        self.sha = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
        self.fields = sorted({name for said in self.said for name in said})
        self.views = [f"{mine} / {other}" for mine in self.fields for other in self.fields]
        self.encoder, self.name = encoder, encoder_name(encoder, list(self.said[0].values()))
        self.own: dict[str, tuple[Any, Any]] = {}

    def ranks(self, rows: Dataset) -> _Views:
        """1 / (k + rank) of every label in every view; a view without a text ranks all equally."""
        if not self.own:  # not before rows have to be compared
            self.encoder = models.load_encoder(self.encoder)
            self.own = self._vectors(self.said)
        items, same = self._vectors(_fields_of(rows)), self._same_document(rows)
        views = []
        for at, vectors in (items[name] for name in self.fields):
            for to, anchors in (self.own[name] for name in self.fields):
                cosines = np.full(same.shape, -np.inf)
                if len(at) and len(to):
                    cosines[np.ix_(at, to)] = vectors @ anchors.T
                cosines[same] = -np.inf
                views.append(label_similarities(cosines, self.gold, top=self.made.top))
        # rounded, since the last bits of a cosine depend on what shares its block
        return reciprocal_ranks(np.stack(views).round(6), k=self.made.k)

    def _same_document(self, rows: Dataset) -> Bool[np.ndarray, "items references"]:
        same = np.zeros((len(rows), len(self.rows)), dtype=bool)
        for column, key in (("id", lambda id: str(id).strip()), ("text", text_key)):
            found = defaultdict(list)
            for at, value in enumerate(self.rows[column][:]):
                found[key(value)].append(at)
            found.pop("", None)  # blank texts are not all one document
            for row, value in enumerate(rows[column][:]):
                same[row, found.get(key(value), [])] = True
        return same

    def _vectors(self, said: list[dict[str, str]]) -> dict[str, tuple[Any, Any]]:
        """Of each field, the rows that have it and their vectors."""
        found = {}
        for name in self.fields:
            texts = {at: parts[name] for at, parts in enumerate(said) if name in parts}
            vectors = unit_vectors(self.encoder, list(texts.values())) if texts else None
            found[name] = (list(texts), vectors)
        return found


def _fields_of(dataset: Dataset) -> list[dict[str, str]]:
    return [{part["field"]: part["text"] for part in row} for row in dataset["concepts"][:]]
