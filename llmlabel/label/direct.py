"""A language model reads each text and gives every label a probability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.label.demonstrations import own_demonstrations, shown_demonstrations
from llmlabel.label.shortlist import candidate_lists
from llmlabel.label.windows import mean_by_group, windows
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import Chat, find_prompt, prompt_sha, render
from llmlabel.refine.orders import label_orders, orders_sha
from llmlabel.softlabels import LABEL_COLUMNS, VOTES, SoftLabels

_YES_NO = ("yes", "no")
UNREAD = "the model gave no label a probability"
"""The `error` of a row that was read in vain."""


def label_direct(  # noqa: PLR0913  # each is one plain choice about how the model is asked
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path | list[str | Path] | None = None,
    orders: int = 1,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    window_words: int | None = None,
    min_mass: float = 0.0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds the model's probability of every label, read exactly from its next-token distribution.

    In a single-label space the labels compete: their joint probabilities as the reply are
    normalised, and `label_mass` is their sum before that; where the engine did not read all labels,
    what the soft label misses to 1 is a bound on the others. In a multi-label space each label is a
    yes/no question of its own, and `label_mass` is the least mass of yes and no among them. A text
    without a character to read gets no label and an `error`; a text that is too long for the model
    is cut, labelled and gets an `error` that says so.

    Two columns of the rows are heeded where they are there. `candidates` (see
    `llmlabel.label.shortlist`): only these labels are listed, by position so that the encoder's
    rank does not leak, and may be answered; null is all of them. `demonstrations` (see
    `llmlabel.label.demonstrations`): shown after those of the argument. A demonstration whose label
    is not among the row's candidates is not shown.

    Several prompts or orders are as many sources: the soft label and `label_mass` are the means
    over them, and `votes` holds the distribution of each, by the name `PROMPT#ORDER`.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads; see `llmlabel.engine`.
        labels: what may be answered.
        prompt: a prompt file or a shipped name, or several; by default `label/direct`, and
            `label/applies` in a multi-label space, where the file also sees `label`.
        orders: in how many orders the prompt lists the labels: those of
            `llmlabel.refine.orders.label_orders`, the first is their own.
        demonstrations: mappings with `text` and `label` (id or name; in a multi-label space the
            list of all true ones), shown before every text. A row is never its own demonstration:
            rows whose text is shown are refused.
        window_words: longer texts are read in overlapping windows of so many words, and their
            distributions and masses averaged (see `llmlabel.label.windows`).
        min_mass: a row whose `label_mass` is below it gets no label, and an `error`.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: a demonstration has an unknown label or is the text of a row, a candidate is no
            label, or there are not so many orders.
    """
    require_columns(dataset, "id", "text")
    sources = _sources(prompt, labels, orders=orders)
    shown = shown_demonstrations(demonstrations, labels)
    _refuse_own_text(dataset, shown)
    per_row = [name for name in ("candidates", "demonstrations") if name in dataset.column_names]
    require_columns(dataset, *per_row)
    if window_words is not None and window_words < 1:
        raise ValueError(f"window_words must be at least 1; got {window_words}")
    if not 0 <= min_mass <= 1:
        raise ValueError(f"min_mass is a probability between 0 and 1; got {min_mass}")

    def compute(block: Dataset) -> Dataset:
        reads, errors = _reads(block, labels, shown, window_words)
        said = [_ask(engine, source, reads, labels) for source in sources]
        return _labelled(
            block, labels, sources, said, errors, engine=engine.name, min_mass=min_mass
        )

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS if len(sources) == 1 else (*LABEL_COLUMNS, "votes"),
        key={
            "engine": engine.name,
            "prompts": {one.name: one.sha for one in sources},
            "labels": labels,
            "demonstrations": shown,
            "window_words": window_words,
            "min_mass": min_mass,
        },
        reads=per_row,
        block_rows=block_rows,
        output=output,
        name="label_direct",
    )


# ------------------------------------------------------------------------------ how it is asked


class _Source(NamedTuple):
    """One way to ask."""

    name: str
    path: Path
    """Of the prompt file, found once and not for every chat."""
    sha: str
    order: list[int]
    """The labels' positions in the order in which the prompt lists them."""


def _sources(
    prompt: str | Path | list[str | Path] | None, labels: LabelSpace, *, orders: int
) -> list[_Source]:
    """Every prompt with every order; a prompt's orders stand together."""
    if prompt is None:
        prompt = "label/applies" if labels.multilabel else "label/direct"
    prompts = prompt if isinstance(prompt, list) else [prompt]
    names = [Path(one).name if Path(one).is_file() else str(one) for one in prompts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prompt: one or several with different names are needed; got {names}")
    return [
        _Source(f"{name}#{number}", find_prompt(one), prompt_sha(one), order)
        for name, one in zip(names, prompts, strict=True)
        for number, order in enumerate(label_orders(labels, orders))
    ]


@dataclass(frozen=True)
class _Reads:
    """What the model is to read of a block: the windows of its texts, row by row."""

    count: int
    """Rows of the block."""
    rows: Int[np.ndarray, " reads"]
    texts: list[str]
    shown: list[list[dict[str, Any]]]
    candidates: list[list[int]] | None
    """Positions of the labels that may be answered, ascending; None where all may."""


def _reads(
    block: Dataset, labels: LabelSpace, shown: list[dict[str, Any]], window_words: int | None
) -> tuple[_Reads, dict[int, str]]:
    """What is to be read, and why some rows are not."""
    texts = block["text"][:]
    errors = {row: "empty text" for row, text in enumerate(texts) if not text.strip()}
    candidates = candidate_lists(block, labels)
    if candidates is not None:
        none = {row: "no candidate labels" for row, some in enumerate(candidates) if not some}
        errors = {**none, **errors}
    readable = [row for row in range(len(texts)) if row not in errors]
    parts = {row: windows(texts[row], words=window_words) for row in readable if window_words}
    rows = [row for row in readable for _ in parts.get(row, (0,))]
    own = own_demonstrations(block, labels)
    reads = _Reads(
        len(block),
        np.array(rows, dtype=np.int64),
        [part for row in readable for part in parts.get(row, (texts[row],))],
        [shown + own[row] for row in rows] if own else [shown] * len(rows),
        None if candidates is None else [candidates[row] for row in rows],
    )
    return reads, errors


# ------------------------------------------------------------------------------ what it answers


class _Said(NamedTuple):
    """What one source says about a block."""

    probs: Float[np.ndarray, "rows labels"]
    """A row of zeros has no answer."""
    mass: Float[np.ndarray, " rows"]
    errors: dict[int, str]


def _ask(engine: Engine, source: _Source, reads: _Reads, labels: LabelSpace) -> _Said:
    if not len(reads.rows):
        return _Said(np.zeros((reads.count, len(labels))), np.zeros(reads.count), {})
    ask = _ask_each_label if labels.multilabel else _ask_once
    probs, mass, messages = ask(engine, source, reads, labels)
    mass = np.nan_to_num(mass, nan=0.0)
    answered = probs.max(axis=1) > 0
    errors = {
        row: message or UNREAD  # written from the last read on: the first message stays
        for row, message, ok in zip(
            reads.rows[::-1].tolist(), messages[::-1], answered[::-1].tolist(), strict=True
        )
        if message or not ok
    }
    rows = reads.rows
    return _Said(
        mean_by_group(probs[answered], rows[answered], reads.count),
        mean_by_group(mass[:, None], rows, reads.count)[:, 0],
        errors,
    )


_Answers = tuple[Float[np.ndarray, "reads labels"], Float[np.ndarray, " reads"], list[str | None]]
"""Probabilities (zeros where there is no answer), mass of the label set and message per read."""


def _ask_once(engine: Engine, source: _Source, reads: _Reads, labels: LabelSpace) -> _Answers:
    """One chat a read, whose reply is a label."""
    names, texts = labels.names, labels.texts()
    if reads.candidates is None:
        listed = [texts[label] for label in source.order]
        chats = [
            render(source.path, text=text, labels=listed, demonstrations=shown)
            for text, shown in zip(reads.texts, reads.shown, strict=True)
        ]
        scores = engine.score(chats, names)
    else:
        place = np.argsort(source.order).tolist()  # of each label in the order of the prompt
        chats = []
        for text, shown, some in zip(reads.texts, reads.shown, reads.candidates, strict=True):
            allowed = {names[label] for label in some}
            chats.append(
                render(
                    source.path,
                    text=text,
                    labels=[texts[label] for label in sorted(some, key=place.__getitem__)],
                    demonstrations=[one for one in shown if one["label"] in allowed],
                )
            )
        scores = engine.score(chats, names, candidates=reads.candidates)
    soft = SoftLabels.from_scores(scores.log_probs, labels, unread=scores.unread)
    return soft.dense(), scores.label_mass, scores.errors or [None] * len(chats)


def _ask_each_label(engine: Engine, source: _Source, reads: _Reads, labels: LabelSpace) -> _Answers:
    """One yes/no chat per read and label; those of a read are neighbours and share their start."""
    names, texts = labels.names, labels.texts()
    place = np.argsort(source.order).tolist()
    asked = reads.candidates or [list(range(len(labels)))] * len(reads.texts)
    chats: list[Chat] = []
    for text, shown, some in zip(reads.texts, reads.shown, asked, strict=True):
        listed = [texts[label] for label in sorted(some, key=place.__getitem__)]
        for name in (names[label] for label in some):
            answers = [
                {"text": one["text"], "label": _YES_NO[name not in one["label"]]} for one in shown
            ]
            chats.append(
                render(source.path, text=text, labels=listed, demonstrations=answers, label=name)
            )
    scores = engine.score(chats, _YES_NO)
    counts = np.array([len(some) for some in asked])
    read, starts = np.repeat(np.arange(len(asked)), counts), np.cumsum(counts) - counts
    total = np.logaddexp.reduce(scores.log_probs, axis=1)
    whole: np.ndarray = np.logical_and.reduceat(np.isfinite(total), starts)  # else no answer
    with np.errstate(invalid="ignore"):  # -inf - -inf, where there is no answer
        yes = np.where(whole[read], np.exp(scores.log_probs[:, 0] - total), 0.0)
    probs = np.zeros((len(asked), len(labels)))
    probs[read, np.concatenate(asked)] = yes
    mass = np.minimum.reduceat(np.minimum(np.exp(total), 1.0), starts)
    errors: list[str | None] = [None] * len(asked)
    if any(scores.errors):
        for number, message in zip(read[::-1].tolist(), scores.errors[::-1], strict=True):
            errors[number] = message or errors[number]  # the first one of a read stays
    return probs, mass, errors


def _labelled(
    block: Dataset,
    labels: LabelSpace,
    sources: list[_Source],
    said: list[_Said],
    errors: dict[int, str],
    *,
    engine: str,
    min_mass: float,
) -> Dataset:
    """The block with the mean of what the sources say; one without an answer does not count."""
    answers = np.sum([one.probs.any(axis=1) for one in said], axis=0)
    probs = np.sum([one.probs for one in said], axis=0) / np.maximum(answers, 1)[:, None]
    mass = np.mean([one.mass for one in said], axis=0)
    for one in reversed(said):  # of several messages, the first source's
        errors = {**errors, **one.errors}
    low = (mass < min_mass) & (answers > 0)
    probs[low] = 0.0
    for row in np.flatnonzero(low).tolist():
        why = f"label mass {mass[row]:.2g} is below min_mass={min_mass:g}"
        errors[row] = f"{errors[row]}; {why}" if row in errors else why
    sha = orders_sha([(one.sha, one.order) for one in sources])
    columns: dict[str, tuple[Any, Any]] = {
        "label_mass": (mass.astype(np.float32), Value("float32")),
        "engine": (pa.repeat(engine, len(block)), Value("string")),
        "prompt_sha": (pa.repeat(sha, len(block)), Value("string")),
        "error": ([errors.get(row) for row in range(len(block))], Value("string")),
    }
    if len(sources) > 1:
        votes = _votes([one.name for one in sources], np.stack([one.probs for one in said]))
        columns["votes"] = (votes, VOTES)
    return with_columns(SoftLabels.from_dense(probs, labels).add_to(block), columns)


def _votes(names: list[str], probs: Float[np.ndarray, "sources rows labels"]) -> pa.ListArray:
    """The whole distribution of each source: by row, by source, most probable first."""
    source, row, label = np.nonzero(probs)
    prob = probs[source, row, label]
    order = np.lexsort((label, -prob, source, row))
    entries = pa.StructArray.from_arrays(
        [
            pa.array(names).take(pa.array(source[order])),
            pa.array(label[order], pa.int32()),
            pa.array(prob[order], pa.float32()),
        ],
        names=["source", "label_id", "prob"],
    )
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=probs.shape[1]))])
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), entries)


def _refuse_own_text(dataset: Dataset, shown: list[dict[str, Any]]) -> None:
    texts = {one["text"].strip() for one in shown}
    if not texts:
        return
    for row, text in zip(dataset["id"][:], dataset["text"][:], strict=True):
        if text.strip() in texts:
            raise ValueError(
                f"row {row!r} is shown as a demonstration; leave it out of one of the two"
            )
