"""A language model finds each text's place in a hierarchy of labels.

Three ways to ask, of which none is best everywhere: what they cost and how right they are depends on
the tree, the length of the texts and the model. All give one distribution over *all* nodes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from scipy.sparse import csr_array

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.label.demonstrations import own_demonstrations, shown_demonstrations
from llmlabel.label.embedding import Encoder, encoder_name
from llmlabel.label.shortlist import candidate_lists
from llmlabel.label.topdown import Found, How, Nearest, Row, Shown, read, walk
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import ancestors, paths
from llmlabel.prompt import find_prompt, prompt_sha, render
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

Strategy = Literal["dl", "dh", "tmh"]

_PROMPTS = {
    "dl": "label/hierarchy_leaf",
    "dh": "label/hierarchy_path",
    "tmh": "label/hierarchy_child",
}


def label_hierarchy(  # noqa: PLR0913  # each is one plain choice about how the model is asked
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    strategy: Strategy,
    keep: int = 2,
    min_mass: float = 0.0,
    stop: str | None = None,
    inner: bool = False,
    encoder: str | Path | Encoder | None = None,
    nearest: int = 16,
    listed_characters: int = 4000,
    list_all: bool = False,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    prompt: str | Path | None = None,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Adds the probability that the answer stops at each node, and what it cost to find out.

    "Hierarchical Text Classification Using Black Box Large Language Models" (arXiv 2508.04219):

    - `dl` (direct leaf): one chat that lists the leaves; the reply is a leaf, by its path where
      another one has the same name.
    - `dh` (direct hierarchical): one chat that shows the hierarchy as an indented tree; the reply is
      a path from a root down. A node with several paths (16 at most count) has the sum of them.
    - `tmh` (top-down multi-step): a chat per node asks for one of its children, from the roots down.
      A child has its share of the mass of all parents that were read. Levels with one child only
      need no chat. What is not read further stays at its node: the answer lies somewhere below.

    Differs from the paper: labels are not written but scored, so every reply is a node and every
    node has a probability; `tmh` follows `keep` nodes of a level instead of one and so can recover
    from a wrong turn; answers may stop at inner nodes.

    `label_ids` and `label_probs` sum to 1 less what the engine left unread among leaves, paths or
    roots; `llmlabel.labelspace.graph.node_probs` gives the mass of each node with all below it,
    which is never less than its children's. `label_mass` is that of the row's first prompt, null
    where none was needed. `calls` counts the prompts of a row and `prompt_tokens` their tokens, null
    where the engine cannot tell. A text without a character to read gets no label and an `error`.

    Two columns of the rows are heeded where they are there. `candidates` (see
    `llmlabel.label.shortlist`; leaves or inner nodes): only these and what is above them exist for
    the row; null is all. `demonstrations`: shown after those of the argument. A demonstration is
    answered as the strategy answers, in `tmh` by the child that leads to its label, and left out
    where that cannot be answered.

    Args:
        dataset: rows with `id` and `text`.
        engine: who reads; see `llmlabel.engine`.
        labels: the hierarchy; a flat space is one of a single level.
        strategy: how the model is asked.
        keep: `tmh`: nodes of a level that are read of a row at most, the heaviest.
        min_mass: `tmh`: a node with less is not read.
        stop: `tmh`: a reply beside a node's children that none of them fits, such as "other"; its
            probability stays at the node.
        inner: `dl`, `dh`: inner nodes may be answered too.
        encoder: `tmh`: path, hub name, `package:` source, or anything with `encode`; where a node
            has more than `nearest` children, only those nearest to the text may be answered.
        nearest: how many these are.
        listed_characters: labels whose texts together have more are not shown in the prompt, and
            answered all the same.
        list_all: the prompt lists all labels, also those that are no candidates of the row, which
            cannot be answered all the same: rows then share more of the prompt, which an engine
            computes once.
        demonstrations: mappings with `text` and `label` (id, or a name that only one node has). A
            row is never its own demonstration: rows whose text is shown are refused.
        prompt: a prompt file or a shipped name; by default `label/hierarchy_leaf`,
            `label/hierarchy_path` (which also sees `separator`) or `label/hierarchy_child` (which
            also sees `path`, the names of the node's first parent and of the node, "" above the
            roots).
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: a multi-label space, an argument of another strategy, a number out of its range,
            or a candidate or demonstration that does not fit.
    """
    require_columns(dataset, "id", "text")
    _check(labels, strategy=strategy, stop=stop, inner=inner, encoder=encoder)
    for name, number in (("keep", keep), ("nearest", nearest)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    if not 0 <= min_mass <= 1:
        raise ValueError(f"min_mass is a probability between 0 and 1; got {min_mass}")
    path = find_prompt(_PROMPTS[strategy] if prompt is None else prompt)
    shown_demonstrations(demonstrations, labels)  # refuses what cannot be shown
    shown = _positions(demonstrations, labels)
    _refuse_own_text(dataset, shown)
    per_row = [name for name in ("candidates", "demonstrations") if name in dataset.column_names]
    require_columns(dataset, *per_row)

    @cache  # not before a block has to be computed
    def ready() -> "How | Direct":
        if strategy != "tmh":
            return Direct(labels, strategy, path, inner, listed_characters, list_all)
        loaded = models.load_encoder(encoder)
        texts = labels.texts()
        near = None if loaded is None else Nearest(loaded, texts, nearest)
        return How(path, keep, min_mass, stop, listed_characters, list_all, texts, near)

    def compute(block: Dataset) -> Dataset:
        numbers, rows, errors = _rows(block, labels, shown)
        how = ready()
        if isinstance(how, Direct):
            answers = how.ask(engine, rows)
        else:
            answers = walk(engine, labels, rows, how)
        found = [Found(mass=0.0, error=errors.get(number)) for number in range(len(block))]
        for number, one in zip(numbers, answers, strict=True):
            found[number] = one
        return _labelled(block, labels, found, engine=engine.name, sha=prompt_sha(path))

    return map_blocks(
        dataset,
        compute,
        columns=(*LABEL_COLUMNS, "calls", "prompt_tokens"),
        key={
            "engine": engine.name,
            "prompt": prompt_sha(path),
            "labels": labels,
            "strategy": strategy,
            "demonstrations": shown,
            "keep": [keep, min_mass],
            "stop": [stop, inner],
            "encoder": None
            if encoder is None or output is None
            else [encoder_name(encoder, labels.names[:100]), nearest],
            "listed": [listed_characters, list_all],
        },
        reads=per_row,
        block_rows=block_rows,
        output=output,
        name="label_hierarchy",
    )


def _check(
    labels: LabelSpace, *, strategy: str, stop: str | None, inner: bool, encoder: object
) -> None:
    if labels.multilabel:
        raise ValueError(
            "label_hierarchy gives a text one place in the hierarchy, but the label space is "
            "multi-label; load it with multilabel=false, or use label_direct, which asks about each "
            "label by itself"
        )
    if strategy not in _PROMPTS:
        raise ValueError(f"strategy is one of {', '.join(_PROMPTS)}; got {strategy!r}")
    if strategy == "tmh" and inner:
        raise ValueError("inner= is for dl and dh; with tmh say by stop= how a reply stops")
    if strategy != "tmh" and stop is not None:
        raise ValueError(f"stop= is for tmh; with {strategy} say inner=true")
    if strategy != "tmh" and encoder is not None:
        raise ValueError(
            f"encoder= is for tmh; with {strategy} add `candidates` by "
            "llmlabel.label.shortlist.shortlist"
        )
    if stop is not None and (not stop.strip() or stop in labels.names):
        raise ValueError(f"stop must be a reply that is no label's name; got {stop!r}")


# -------------------------------------------------------------------------------------- the rows


def _rows(
    block: Dataset, labels: LabelSpace, shown: list[Shown]
) -> tuple[list[int], list[Row], dict[int, str]]:
    """The rows to read with their numbers in the block, and why the others are not read."""
    texts = block["text"][:]
    allowed = _allowed(block, labels)
    own = [list[Shown]() for _ in texts]
    if own_demonstrations(block, labels) is not None:  # refuses what cannot be shown
        own = [_positions(some or (), labels) for some in block["demonstrations"][:]]
    errors = {n: "no candidate labels" for n, some in enumerate(allowed) if some == frozenset()}
    errors |= {n: "empty text" for n, text in enumerate(texts) if not text.strip()}
    numbers = [n for n in range(len(texts)) if n not in errors]
    return numbers, [Row(texts[n], shown + own[n], allowed[n]) for n in numbers], errors


def _allowed(block: Dataset, labels: LabelSpace) -> list[frozenset[int] | None]:
    """The candidates of each row and what is above them; None where it has no list."""
    found: list[frozenset[int] | None] = [None] * len(block)
    if "candidates" not in block.column_names:
        return found
    given = [n for n, some in enumerate(block["candidates"][:]) if some is not None]
    lists = candidate_lists(block.select(given), labels) or []
    line = cache(lambda label: ancestors(labels, label, itself=True))
    for n, some in zip(given, lists, strict=True):
        found[n] = frozenset(node for label in some for node in line(label))
    return found


def _positions(demonstrations: Sequence[Mapping[str, Any]], labels: LabelSpace) -> list[Shown]:
    return [Shown(one["text"], labels.index(one["label"])) for one in demonstrations]


def _refuse_own_text(dataset: Dataset, shown: list[Shown]) -> None:
    texts = {one.text.strip() for one in shown}
    for id, text in zip(dataset["id"][:], dataset["text"][:], strict=True) if texts else ():
        if text.strip() in texts:
            raise ValueError(
                f"row {id!r} is shown as a demonstration; leave it out of one of the two"
            )


def _labelled(
    block: Dataset, labels: LabelSpace, found: list[Found], *, engine: str, sha: str
) -> Dataset:
    stops = [
        [(node, np.float32(prob)) for node, prob in one.stops.items() if np.float32(prob) > 0]
        for one in found
    ]
    probs = csr_array(
        (
            np.array([prob for some in stops for _, prob in some], dtype=np.float32),
            np.array([node for some in stops for node, _ in some], dtype=np.int64),
            np.concatenate([[0], np.cumsum([len(some) for some in stops])]),
        ),
        shape=(len(block), len(labels)),
    )
    columns: dict[str, tuple[Any, Any]] = {
        "label_mass": ([one.mass for one in found], Value("float32")),
        "engine": (pa.repeat(engine, len(block)), Value("string")),
        "prompt_sha": (pa.repeat(sha, len(block)), Value("string")),
        "error": ([one.error for one in found], Value("string")),
        "calls": ([one.calls for one in found], Value("int32")),
        "prompt_tokens": ([one.tokens for one in found], Value("int32")),
    }
    return with_columns(SoftLabels(probs, labels.fingerprint).add_to(block), columns)


# ------------------------------------------------------------------------- leaf or path at once


class _Options(NamedTuple):
    """What a row may be answered with."""

    names: tuple[str, ...]
    nodes: tuple[int, ...]
    """What each name stands for; a node may have several paths."""
    listed: list[str]


@dataclass(frozen=True)
class Direct:
    """How to ask for a leaf, or a path, at once."""

    labels: LabelSpace
    strategy: str
    prompt: Path
    inner: bool
    listed_characters: int
    list_all: bool

    def ask(self, engine: Engine, rows: Sequence[Row]) -> list[Found]:
        """One chat a row, all in one call."""
        found = [Found() for _ in rows]
        own = cache(self._options_of)  # nearly every row has candidates of its own: kept no longer
        options = [self._every if row.allowed is None else own(row.allowed) for row in rows]
        distinct = list({id(some): some for some in options}.values())
        names = list(dict.fromkeys(name for some in distinct for name in some.names))
        place = {name: at for at, name in enumerate(names)}
        places = {id(some): [place[name] for name in some.names] for some in distinct}
        chats = []
        for row, some in zip(rows, options, strict=True):
            first = dict(zip(some.nodes[::-1], some.names[::-1], strict=True))
            shown = [
                {"text": one.text, "label": first[one.label]}
                for one in row.shown
                if one.label in first
            ]
            chats.append(
                render(
                    self.prompt,
                    text=row.text,
                    labels=self._every.listed if self.list_all else some.listed,
                    demonstrations=shown,
                    separator=self._separator,
                )
            )
        limited = None if len(distinct) == 1 else [places[id(some)] for some in options]
        probs, _ = read(engine, chats, names, limited, found) if rows else (np.zeros((0, 0)), None)
        for one, some, said in zip(found, options, probs, strict=True):
            values = said[places[id(some)]]
            for at in np.flatnonzero(values).tolist():
                one.add(some.nodes[at], float(values[at]))
        return found

    @cached_property
    def _every(self) -> _Options:
        return self._options_of(None)

    def _options_of(self, allowed: frozenset[int] | None) -> _Options:
        """Leaves, or nodes without a child that is allowed; inner nodes too where these may be."""
        labels = self.labels
        nodes = sorted(range(len(labels)) if allowed is None else allowed)
        if not self.inner:
            above = {parent for node in nodes for parent in labels.parent_positions[node]}
            nodes = [node for node in nodes if node not in above]
        if self.strategy == "dl":
            answers = list(zip(self._names(nodes), nodes, strict=True))
            listed = [
                f"{name}: {labels.descriptions[node]}" if labels.descriptions[node] else name
                for name, node in answers
            ]
        else:
            answers = [
                (self._separator.join(labels.names[one] for one in path), node)
                for node in nodes
                for path in paths(labels, node)
            ]
            listed = _tree(labels, allowed, most=self.listed_characters)
        if sum(map(len, listed)) > self.listed_characters:
            listed = []
        names, ends = zip(*answers, strict=True)
        return _Options(names, ends, listed)

    def _names(self, nodes: list[int]) -> list[str]:
        """The nodes' names, their paths where two of them, or two leaves, have one name."""
        names = self.labels.names
        counts = Counter(names[node] for node in nodes)
        twice = self._twice | {name for name, times in counts.items() if times > 1}
        return [
            self._separator.join(names[one] for one in paths(self.labels, node, most=1)[0])
            if names[node] in twice
            else names[node]
            for node in nodes
        ]

    @cached_property
    def _twice(self) -> set[str]:
        """Names that several nodes have which may be answered."""
        nodes = range(len(self.labels)) if self.inner else self.labels.leaves
        counts = Counter(self.labels.names[node] for node in nodes)
        return {name for name, times in counts.items() if times > 1}

    @cached_property
    def _separator(self) -> str:
        """What occurs in no name, so that every reply is one path."""
        marks = chain((">", "/", "|", "->", "::"), (">" * times for times in count(2)))
        return next(f" {m} " for m in marks if not any(m in name for name in self.labels.names))


def _tree(labels: LabelSpace, allowed: frozenset[int] | None, *, most: int) -> list[str]:
    """The nodes below one another, two spaces a level; what follows after `most` is left out."""
    texts = labels.texts()
    lines: list[str] = []
    waiting = [(root, 0) for root in reversed(labels.roots)]
    while waiting and most >= 0:
        node, depth = waiting.pop()
        if allowed is None or node in allowed:
            lines.append(f"{'  ' * depth}- {texts[node]}")
            most -= len(lines[-1])
            waiting += [(child, depth + 1) for child in reversed(labels.children[node])]
    return lines
