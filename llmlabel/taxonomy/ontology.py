"""From documents to an ontology: their terms and types, and the label space of both.

The steps of "Heterogeneous LLM Methods for Ontology Learning" (arXiv 2508.19428): `extract` reads
terms and types from documents (task A), `llmlabel.taxonomy.term_typing` finds the type of each term
(task B), `llmlabel.taxonomy.isa` the is-a edges between types (task C); here they are put together.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, List, Value

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import plain_words, require_columns, with_columns
from llmlabel.engine import Engine, Reply
from llmlabel.label.demonstrations import choose_demonstrations
from llmlabel.label.embedding import Encoder
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.prompt import find_prompt, prompt_sha, render
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.replies import json_values

EXTRACT_COLUMNS = (
    *("terms", "types", "absent_terms"),
    *("reply", "error", "engine", "prompt_sha"),
)
"""What `extract` adds; the lists are null in a row whose reply could not be read."""

_NONE = json.dumps({"terms": [], "types": []})


def extract(  # noqa: PLR0913  # what is asked, what is shown, what is kept
    dataset: Dataset,
    engine: Engine,
    *,
    pool: Dataset | Sequence[Mapping[str, Any]] | None = None,
    encoder: str | Path | Encoder | None = None,
    n: int = 4,
    most: int = 20,
    prompt: str | Path = "taxonomy/extract",
    max_tokens: int = 512,
    block_rows: int = 64,
    output: Path | None = None,
) -> Dataset:
    """Adds the `terms` of each document and the `types` of things that they are, in one prompt.

    The `n` documents of the pool that are most similar to a row are shown to it with their terms and
    types, the nearest last; never the row itself, by id or words (see `choose_demonstrations`).

    Nothing is invented: a term whose words do not stand in the document (see
    `llmlabel.data.plain_words`) goes to `absent_terms`. Types are general and need not stand there.
    Repeats that differ in case or punctuation are dropped. A reply that is no such JSON gives null
    lists, and an `error`.

    Differs from the paper (arXiv 2508.19428): decoding is restricted to JSON of the schema.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads.
        pool: documents with `text`, `terms` and `types` (and `id`), or a list of such mappings.
        encoder: compares documents; needed for a pool.
        n: demonstrations of a row.
        most: terms, and types, of a document at most.
        prompt: a prompt file or a shipped name.
        max_tokens: of a reply.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: there is a pool and no encoder, or it has fewer than `n` documents.
    """
    require_columns(dataset, "id", "text")
    if pool is not None:
        if encoder is None:
            raise ValueError("extract: documents are chosen by similarity; give an encoder=")
        dataset = _with_similar(dataset, pool, models.load_encoder(encoder), n, output)
    shown = ("demonstrations",) if "demonstrations" in dataset.column_names else ()
    require_columns(dataset, *shown)
    path, sha, schema = find_prompt(prompt), prompt_sha(prompt), extract_schema(most)

    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        examples = block["demonstrations"][:] if shown else [()] * len(texts)
        rows = [row for row, text in enumerate(texts) if text.strip()]
        chats = [
            render(path, text=texts[row], labels=(), demonstrations=examples[row] or ())
            for row in rows
        ]
        found = [_Found(error="empty text")] * len(texts)
        if chats:
            replies = engine.generate(chats, max_tokens=max_tokens, schema=schema)
            for row, reply in zip(rows, replies, strict=True):
                found[row] = _read(reply, texts[row])
        strings = {name: List(Value("string")) for name in ("terms", "types", "absent_terms")}
        kinds = {**strings, "reply": Value("string"), "error": Value("string")}
        return with_columns(
            block,
            {
                **{name: ([getattr(one, name) for one in found], kinds[name]) for name in kinds},
                "engine": (pa.repeat(engine.name, len(texts)), Value("string")),
                "prompt_sha": (pa.repeat(sha, len(texts)), Value("string")),
            },
        )

    return map_blocks(
        dataset,
        compute,
        columns=EXTRACT_COLUMNS,
        key={"engine": engine.name, "prompt": sha, "most": most, "max_tokens": max_tokens},
        reads=shown,
        block_rows=block_rows,
        output=output,
        name="extract",
    )


def extract_schema(most: int) -> dict[str, Any]:
    """The JSON schema of a reply, with at most so many terms and types."""
    some = {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 80},
        "maxItems": most,
    }
    return {
        "type": "object",
        "properties": {"terms": some, "types": some},
        "required": ["terms", "types"],
        "additionalProperties": False,
    }


# ---------------------------------------------------------------------------------- the assembly


def term_table(dataset: Dataset, *, column: str = "terms") -> Dataset:
    """One row per term of all documents: `id`, `text`, `count` of documents and their ids.

    Terms that differ in case or punctuation are one; its `text` is how it is most often written, its
    `id` the words of `llmlabel.data.plain_words`. The most frequent first.

    Args:
        dataset: what `extract` gives.
        column: `types` makes the table of types.

    Raises:
        ValueError: no document has any.
    """
    require_columns(dataset, "id", column)
    spellings: dict[str, Counter[str]] = {}
    documents: dict[str, list[str]] = {}
    for id, some in zip(dataset["id"][:], dataset[column][:], strict=True):
        for term in some or ():
            key = _words(term)
            spellings.setdefault(key, Counter())[term] += 1
            documents.setdefault(key, []).append(str(id))
    if not spellings:
        raise ValueError(f"term_table: no row has anything in {column!r}; read `error`")
    keys = sorted(spellings, key=lambda key: (-len(documents[key]), key))
    text = {key: min(spellings[key], key=lambda one: (-spellings[key][one], one)) for key in keys}
    return Dataset.from_dict(
        {
            "id": keys,
            "text": [text[key] for key in keys],
            "count": [len(documents[key]) for key in keys],
            "documents": [sorted(documents[key]) for key in keys],
        }
    )


def type_labels(dataset: Dataset, *, min_count: int = 1, most: int | None = None) -> LabelSpace:
    """The types that documents name, as a flat label space; the most frequent first.

    Args:
        dataset: what `extract` gives.
        min_count: documents that have to name a type.
        most: so many types at most.
    """
    table = term_table(dataset, column="types")
    rows = [row for row, count in enumerate(table["count"][:]) if count >= min_count][:most]
    if len(rows) < 2:
        raise ValueError(
            f"type_labels: {len(rows)} of {len(table)} types are named in min_count={min_count} "
            "documents, and a choice needs two; lower it"
        )
    return load_labels([{"id": table[row]["id"], "name": table[row]["text"]} for row in rows])


def add_terms(labels: LabelSpace, terms: Dataset) -> LabelSpace:
    """Puts each typed term below its most probable type, with the probability of that edge.

    Terms without a label (see `llmlabel.taxonomy.term_typing.abstain`) are left out, and so are
    terms that are labels themselves, by id or words.

    Args:
        labels: the types, with or without edges between them.
        terms: rows with `id`, `text` and soft labels of `labels`.

    Raises:
        ValueError: the soft labels are of another label space.
    """
    require_columns(terms, "id", "text")
    probs = SoftLabels.from_dataset(terms, labels).dense()
    taken = {*labels.ids, *map(_words, labels.names)}
    entries: list[tuple[str, str, str, float]] = []
    for row, (id, text) in enumerate(zip(terms["id"][:], terms["text"][:], strict=True)):
        best = int(probs[row].argmax())
        if probs[row, best] > 0 and taken.isdisjoint((str(id), _words(text))):
            taken |= {str(id), _words(text)}
            entries.append((str(id), text.strip(), labels.ids[best], float(probs[row, best])))
    sure = labels.parent_probs or tuple((1.0,) * len(some) for some in labels.parents)
    return dataclasses.replace(
        labels,
        ids=(*labels.ids, *(id for id, *_ in entries)),
        names=(*labels.names, *(text for _, text, *_ in entries)),
        descriptions=(*labels.descriptions, *[""] * len(entries)),
        parents=(*labels.parents, *((parent,) for *_, parent, _ in entries)),
        parent_probs=(*sure, *((prob,) for *_, prob in entries)),
    )


# -------------------------------------------------------------------------------------- documents


def _with_similar(
    dataset: Dataset,
    pool: Dataset | Sequence[Mapping[str, Any]],
    encoder: Encoder,
    n: int,
    output: Path | None,
) -> Dataset:
    """The rows with `demonstrations`; each reply that is shown counts as a label."""
    if not isinstance(pool, Dataset):
        pool = Dataset.from_list([{"id": f"pool {i}", **one} for i, one in enumerate(pool)])
    require_columns(pool, "id", "text", "terms", "types")
    replies = [
        json.dumps({"terms": terms or [], "types": types or []}, ensure_ascii=False)
        for terms, types in zip(pool["terms"][:], pool["types"][:], strict=True)
    ]
    answers = load_labels([*dict.fromkeys([*replies, _NONE, "{}"])])  # a choice needs two
    gold = [[answers.index(reply)] for reply in replies]
    labelled = with_columns(pool, {"gold": (gold, List(Value("int32")))})
    return choose_demonstrations(
        dataset,
        labelled,
        answers,
        n=n,
        method="similarity",
        encoder=encoder,
        output=output and output / "demonstrations",
    )


class _Found(NamedTuple):
    """What was read of one document."""

    terms: list[str] | None = None
    types: list[str] | None = None
    absent_terms: list[str] | None = None
    reply: str | None = None
    error: str | None = None


def _read(reply: Reply, document: str) -> _Found:
    if reply.error is not None and not reply.text:
        return _Found(reply=reply.text, error=reply.error)
    objects = [one for one in json_values(reply.text) if isinstance(one, dict)]
    try:
        said = next(one for one in objects if {"terms", "types"} <= set(one))
        lists = [_distinct(said[name]) for name in ("terms", "types")]
    except (StopIteration, TypeError):
        why = "cut by max_tokens" if reply.finish_reason == "length" else "not what was asked for"
        problem = f"the reply is no JSON object with lists `terms` and `types` ({why})"
        return _Found(reply=reply.text, error=problem)
    whole = f" {_words(document)} "
    terms = [term for term in lists[0] if _stands_in(_words(term), whole)]
    absent = [term for term in lists[0] if term not in terms]
    return _Found(terms, lists[1], absent, reply.text, reply.error)


def _stands_in(words: str, document: str) -> bool:
    """Whole words, except in scripts without upper case: some of these have no spaces."""
    return (f" {words} " if words.upper() != words else words) in document


def _distinct(some: Any) -> list[str]:
    """Texts without repeats and blanks.

    Raises:
        TypeError: it is not a list of texts.
    """
    if not isinstance(some, list) or not all(isinstance(one, str) for one in some):
        raise TypeError("not a list of texts")
    found: dict[str, str] = {}
    for one in some:
        if key := _words(one):
            found.setdefault(key, " ".join(one.split()))
    return list(found.values())


def _words(text: str) -> str:
    return plain_words(text) or text.strip()
