"""The walk down a hierarchy: which children a row is asked about, and where its mass goes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from llmlabel.engine import Engine
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.label.shortlist import top_k
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import ancestors
from llmlabel.prompt import Chat, render

UNREAD = "the model gave no label a probability"
"""The `error` of a row that was read in vain."""

_CALL_CHARACTERS = 1000
"""Of the different names in one call for several nodes: a trie that engines read in one pass."""

_OWN_CALL = 16
"""So many rows that ask about one node have a call for themselves, and so share its prompt."""


class Shown(NamedTuple):
    """A demonstration; `label` is a position."""

    text: str
    label: int


class Row(NamedTuple):
    """What is to be read of a row."""

    text: str
    shown: list[Shown]
    allowed: frozenset[int] | None
    """Nodes that may be answered or lie above one that may; None where all may."""


@dataclass
class Found:
    """What was found out about a row."""

    stops: dict[int, float] = field(default_factory=dict)
    """Node -> probability that the answer stops there."""
    mass: float | None = None
    """Label mass of the first prompt; None where none was read."""
    error: str | None = None
    calls: int = 0
    tokens: int | None = 0
    """Of all its prompts; None where the engine cannot tell."""

    def add(self, node: int, prob: float) -> None:
        """Lets more mass stop at a node."""
        if prob > 0:
            self.stops[node] = self.stops.get(node, 0.0) + prob


class Answers(NamedTuple):
    """What an engine says to some chats."""

    probs: Float[np.ndarray, "chats names"]
    """Share of each name; a row of zeros has no answer."""
    unread: Float[np.ndarray, " chats"]
    """Share that the names not read have at most."""


def read(
    engine: Engine,
    chats: Sequence[Chat],
    names: Sequence[str],
    candidates: Sequence[Sequence[int]] | None,
    found: Sequence[Found],
) -> Answers:
    """Asks an engine, and notes what it costs and what goes wrong in what is found of each chat."""
    scores = engine.score(chats, names, candidates=candidates)
    answers = shares(scores.log_probs, scores.unread)
    errors = scores.errors or [None] * len(chats)
    tokens: Sequence[int | None] = scores.prompt_tokens or [None] * len(chats)
    mass = np.nan_to_num(scores.label_mass, nan=0.0).tolist()
    answered = [bool(own.any()) for own in answers.probs]
    for one, error, count, inside, ok in zip(found, errors, tokens, mass, answered, strict=True):
        one.calls += 1
        one.tokens = None if count is None or one.tokens is None else one.tokens + count
        one.mass = inside if one.mass is None else one.mass
        one.error = one.error or error or (None if ok else UNREAD)
    return answers


def shares(
    log_probs: Float[np.ndarray, "chats names"], unread: Float[np.ndarray, " chats"] | None
) -> Answers:
    """Joint log-probabilities as shares of what was read and of what was not.

    A chat with a NaN anywhere, or with nothing but -inf, has no answer: zeros.
    """
    known = (log_probs < np.inf).all(axis=1, keepdims=True)
    scores = np.where(known, log_probs, -np.inf)
    peak = scores.max(axis=1)
    answered = np.isfinite(peak)
    peak = np.where(answered, peak, 0.0)
    joint = np.exp(scores - peak[:, None])
    rest = np.zeros(len(joint))
    if unread is not None:
        with np.errstate(divide="ignore"):
            rest = np.where(answered, np.exp(np.minimum(np.log(unread) - peak, 700.0)), 0.0)
    total = np.where(answered, joint.sum(axis=1) + rest, 1.0)
    return Answers(joint / total[:, None], rest / total)


# ------------------------------------------------------------------------------------- the walk


@dataclass(frozen=True)
class How:
    """How to go down.

    Attributes:
        prompt: Its file.
        keep: Nodes of a level that are read of a row at most, the heaviest.
        min_mass: Nodes with less are not read.
        stop: The reply that no child fits; None where there is no such reply.
        listed_characters: A prompt lists the children when their texts have at most so many.
        list_all: It lists all children, not only those that the row may be answered with, unless
            `nearest` has to choose.
        texts: "name: description" of each label.
        nearest: Chooses among many children; None where all may be answered.
    """

    prompt: Path
    keep: int
    min_mass: float
    stop: str | None
    listed_characters: int
    list_all: bool
    texts: list[str]
    nearest: "Nearest | None" = None


def walk(engine: Engine, labels: LabelSpace, rows: Sequence[Row], how: How) -> list[Found]:
    """Where the answer of each row stops, found from the roots down, level by level.

    A node's chat asks for one of its children; its mass goes to them in proportion to their joint
    probabilities as the reply. A level is the longest way from a root, so a node has the mass of all
    its parents when its turn comes. What is not read further, and what the engine did not read,
    stays at the node: the answer lies somewhere below.
    """
    state = _Walk(engine, labels, rows, how)
    levels = _levels(labels)
    for level in range(max(levels) + 1):
        asks = [ask for row in range(len(rows)) for ask in state.asks(row, level, levels)]
        for call in _calls(asks):
            state.tell(call)
    return state.found


class _Ask(NamedTuple):
    """One chat: which of its node's children a row belongs to."""

    row: int
    node: int
    mass: float
    children: tuple[int, ...]
    replies: tuple[str, ...]
    """The children's names, then what stops, where that can be answered."""
    chat: Chat


class _Walk:
    """Rows on their way down; `top` is the point above the roots."""

    def __init__(self, engine: Engine, labels: LabelSpace, rows: Sequence[Row], how: How) -> None:
        self.engine, self.labels, self.rows, self.how = engine, labels, rows, how
        self.found = [Found() for _ in rows]
        self.top = len(labels)
        self.waiting = [{self.top: 1.0} for _ in rows]
        self._options: dict[tuple[int, tuple[int, ...]], tuple[list[str], tuple[str, ...]]] = {}

    def asks(self, number: int, level: int, levels: list[int]) -> Iterator[_Ask]:
        """The chats of a row at a level; all other mass of the level is moved on, or stays."""
        mass = self.waiting[number]
        undecided = {}
        for node in [node for node in mass if levels[node] == level]:
            children = self._children(number, node)
            if not children:
                self._stay(number, node, mass.pop(node))
            elif len(children) == 1 and (self.how.stop is None or node == self.top):
                mass[children[0]] = mass.get(children[0], 0.0) + mass.pop(node)
            else:
                undecided[node] = children
        heavy = [node for node in undecided if mass[node] >= self.how.min_mass]
        # Masses that differ by less than about 1e-6 are equal: nothing depends on who shares a pass.
        heavy.sort(key=lambda node: (-round(mass[node], 6), node))
        for node in heavy[: self.how.keep]:
            yield self._ask(number, node, mass.pop(node), undecided.pop(node))
        for node in undecided:
            self._stay(number, node, mass.pop(node))

    def tell(self, asks: list[_Ask]) -> None:
        """Reads some chats, and moves the mass of their nodes to the children."""
        names = asks[0].replies
        places: list[list[int]] | None = None
        if any(ask.replies is not names for ask in asks):
            names = tuple(dict.fromkeys(name for ask in asks for name in ask.replies))
            place = {name: at for at, name in enumerate(names)}
            places = [[place[name] for name in ask.replies] for ask in asks]
        chats = [ask.chat for ask in asks]
        found = [self.found[ask.row] for ask in asks]
        probs, unread = read(self.engine, chats, names, places, found)
        for number, ask in enumerate(asks):
            values = probs[number] if places is None else probs[number, places[number]]
            if not values.any():
                self._stay(ask.row, ask.node, ask.mass)
                continue
            mass = self.waiting[ask.row]
            for at in np.flatnonzero(values[: len(ask.children)]).tolist():
                child = ask.children[at]
                mass[child] = mass.get(child, 0.0) + ask.mass * float(values[at])
            stopped = float(values[len(ask.children) :].sum() + unread[number])
            self._stay(ask.row, ask.node, ask.mass * stopped)

    def _children(self, number: int, node: int) -> tuple[int, ...]:
        children, allowed = self._every(node), self.rows[number].allowed
        if allowed is None:
            return children
        return tuple(child for child in children if child in allowed)

    def _every(self, node: int) -> tuple[int, ...]:
        return self.labels.roots if node == self.top else self.labels.children[node]

    def _stay(self, number: int, node: int, mass: float) -> None:
        if node != self.top:  # above the roots there is nothing to stop at: the mass is missing
            self.found[number].add(node, mass)

    def _ask(self, number: int, node: int, mass: float, children: tuple[int, ...]) -> _Ask:
        if self.how.nearest is not None and len(children) > self.how.nearest.k:
            near = self.how.nearest
            children = near.among(children, self._every(node), self._vectors[number])
        row, names = self.rows[number], self.labels.names
        listed, replies = self._replies(node, children)
        shown = []
        for one in row.shown:
            line = {one.label, *ancestors(self.labels, one.label)}
            answers = [names[child] for child in children if child in line]
            if one.label == node:
                answers += replies[len(children) :]
            shown += [{"text": one.text, "label": answer} for answer in answers[:1]]
        path = _path(self.labels, node)
        chat = render(
            self.how.prompt, text=row.text, labels=listed, demonstrations=shown, path=path
        )
        return _Ask(number, node, mass, children, replies, chat)

    def _replies(self, node: int, children: tuple[int, ...]) -> tuple[list[str], tuple[str, ...]]:
        """What a prompt lists, nothing where that is too much, and what may be answered."""
        key = (node, children)
        if key not in self._options:
            stop = [] if self.how.stop is None or node == self.top else [self.how.stop]
            every, near = self._every(node), self.how.nearest
            is_narrow = near is None or len(every) <= near.k
            shown = every if self.how.list_all and is_narrow else children
            listed = [self.how.texts[child] for child in shown] + stop
            if sum(map(len, listed)) > self.how.listed_characters:
                listed = []
            replies = (*(self.labels.names[child] for child in children), *stop)
            self._options[key] = listed, replies
        return self._options[key]

    @cached_property
    def _vectors(self) -> Float[np.ndarray, "rows width"]:
        """Of the texts, where some node has many children."""
        assert self.how.nearest is not None
        return unit_vectors(self.how.nearest.encoder, [row.text for row in self.rows])


def _calls(asks: list[_Ask]) -> Iterator[list[_Ask]]:
    """Which chats go to the engine together: many of one node, or few of several."""
    by_node: dict[int, list[_Ask]] = {}
    for ask in asks:
        by_node.setdefault(ask.node, []).append(ask)
    call: list[_Ask] = []
    names: set[str] = set()
    for _, some in sorted(by_node.items()):
        if len(some) >= _OWN_CALL:
            yield some
            continue
        more = names.union(*(ask.replies for ask in some))
        if call and sum(map(len, more)) > _CALL_CHARACTERS:
            yield call
            call, more = [], set().union(*(ask.replies for ask in some))
        call, names = call + some, more
    if call:
        yield call


def _levels(labels: LabelSpace) -> list[int]:
    """The longest way from the point above the roots, which is the last."""
    levels = [1] * len(labels) + [0]
    for label in labels.topological:
        below = levels[label] + 1
        for child in labels.children[label]:
            levels[child] = max(levels[child], below)
    return levels


def _path(labels: LabelSpace, node: int) -> str:
    """The names of a node's first parent and of the node: more costs tokens and says little."""
    if node == len(labels):
        return ""
    above = labels.parent_positions[node][:1]
    return " > ".join(labels.names[one] for one in (*above, node))


# ------------------------------------------------------------------------------ nearest children


class Nearest:
    """The children nearest to a text; each node's are embedded once, when it is first read.

    Args:
        encoder: who embeds.
        texts: "name: description" of each label.
        k: of more children than that the nearest so many are answered.
    """

    def __init__(self, encoder: Encoder, texts: list[str], k: int) -> None:
        self.encoder, self.texts, self.k = encoder, texts, k
        self._anchors: dict[tuple[int, ...], np.ndarray] = {}

    def among(
        self, some: tuple[int, ...], every: tuple[int, ...], text: Float[np.ndarray, " width"]
    ) -> tuple[int, ...]:
        """The nearest of `some` of a node's children, by position; `every` is all of them."""
        if every not in self._anchors:
            texts = [self.texts[child] for child in every]
            self._anchors[every] = unit_vectors(self.encoder, texts).astype(np.float32)
        cosines = (self._anchors[every] @ text.astype(np.float32)).astype(np.float64)
        columns = np.searchsorted(every, some)
        (nearest,) = top_k(cosines[None, columns], self.k)
        return tuple(some[at] for at in sorted(nearest))
