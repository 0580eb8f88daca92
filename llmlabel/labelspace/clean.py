"""Label spaces out of what is not one yet: cycles, repeated ids, parents that nobody knows.

`load_labels` refuses what is broken; `clean_labels` repairs it by `RULES` and tells each change. See
`llmlabel.labelspace.sources` for other sources than labels and edges.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import closing_edges

RULES = {
    "white space": "taken from the ends",
    "not text": "written as text",
    "no id or name": "left out",
    "no name": "named by its id",
    "repeated label": "one label, with the first name and description and the parents of all",
    "id on several levels": "the deepest keeps it, the others are now `level:id`",
    "unknown parent": "the edge is removed",
    "unknown label of an edge": "the edge is removed",
    "made": "a label that only an edge or a parent names",
    "self-loop": "the edge is removed",
    "repeated edge": "one edge, with the highest probability",
    "cycle": "the least probable edge of it is removed; of equal ones the last",
    "repeated name": "among siblings, so that the id is added",
    "several places": "one label with several parents",
    "deprecated": "left out",
    "unnamed parent": "the edge is left out",
    "other language": "the name is in the first language that there is",
    "unused column": "not read",
    "no path": "left out",
}
"""Kind of change -> what is done."""

Absent = Literal["drop", "make"]
_Level = str | int | float | None


@dataclass(frozen=True)
class Change:
    """What was done, and to whom.

    Attributes:
        kind: one of `RULES`.
        items: each a label, or the child and parent of an edge, or a label and its new name.
    """

    kind: str
    items: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """One line with the number and the first three."""
        items = [[t if len(t) <= 60 else f"{t[:57]}..." for t in item] for item in self.items[:3]]
        shown = "; ".join(" / ".join(map(repr, item)) for item in items)
        more = "; ..." if len(self.items) > 3 else ""
        return f"{len(self.items)} x {self.kind} ({RULES[self.kind]}): {shown}{more}"


@dataclass(frozen=True)
class Cleaning:
    """A label space, and all that was changed to get it."""

    labels: LabelSpace
    changes: tuple[Change, ...]

    def summary(self) -> str:
        """One line per kind of change; empty when nothing was changed."""
        return "\n".join(map(str, self.changes))


@dataclass
class _Draft:
    """The labels so far, by position."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    levels: list[_Level] = field(default_factory=list)
    told: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)

    def add(self, id: str, level: _Level) -> None:
        self.ids.append(id)
        self.names.append("")
        self.descriptions.append("")
        self.levels.append(level)

    def tell(self, kind: str, *item: str) -> None:
        self.told.setdefault(kind, []).append(item)


class _Edge(NamedTuple):
    child: int
    parent: int
    prob: float | None

    @property
    def weight(self) -> float:
        """An edge that somebody states without a probability is certain."""
        return 1.0 if self.prob is None else self.prob


def cleaned(cleaning: Cleaning) -> LabelSpace:
    """The label space of a cleaning, as a step of a recipe."""
    return cleaning.labels


def clean_labels(
    entries: Iterable[Any],
    edges: Iterable[Sequence[Any]] = (),
    *,
    absent: Absent = "drop",
    multilabel: bool = False,
    told: Mapping[str, Sequence[tuple[str, ...]]] | None = None,
) -> Cleaning:
    """Makes a label space of labels and edges as they come, and tells each change.

    Linear in labels and edges as long as there are no cycles; nothing here recurses. The labels keep
    the order in which they come first. Which edge of a cycle goes depends on the order of the edges
    only where their probabilities are equal: the edges are kept in falling order as long as they
    close no cycle with those kept before, so that none could be put back.

    Args:
        entries: Names, or mappings with the keys of a label file (see `llmlabel.labelspace.files`)
            and `level`: a number or a kind such as "section", for ids that stand on several levels.
            A parent is looked for on the level above (with kinds: on the same one first).
        edges: (child, parent) or (child, parent, probability), by ids, beside those of the entries.
        absent: What a parent that is no label means: nothing ("drop"), or one more label ("make").
        multilabel: A text may have several of the labels, or none.
        told: Changes made before, to be told as well.

    Raises:
        ValueError: Fewer than two labels are left, or a probability is none.
    """
    draft = _Draft(told={kind: list(items) for kind, items in (told or {}).items()})
    named = _read_entries(entries, draft)
    named += [_named_edge(edge, draft) for edge in edges]
    unique = _unique_edges(_resolve(named, draft, absent), draft)
    kept = _without_cycles(unique, draft)
    parents: list[list[_Edge]] = [[] for _ in draft.ids]
    for edge in kept:
        parents[edge.child].append(edge)
    _rename_siblings(draft, parents)
    probs: tuple[tuple[float, ...], ...] = ()
    if any(edge.prob is not None for edge in kept):
        probs = tuple(tuple(edge.weight for edge in some) for some in parents)
    labels = LabelSpace(
        ids=tuple(draft.ids),
        names=tuple(draft.names),
        descriptions=tuple(draft.descriptions),
        parents=tuple(tuple(draft.ids[edge.parent] for edge in some) for some in parents),
        multilabel=multilabel,
        parent_probs=probs,
    )
    for kind in {"white space", "not text"} & set(draft.told):  # a text may stand in many places
        draft.told[kind] = list(dict.fromkeys(draft.told[kind]))
    order = [kind for kind in RULES if kind in draft.told]
    return Cleaning(labels, tuple(Change(kind, tuple(draft.told[kind])) for kind in order))


# ------------------------------------------------------------------------------------- labels

_Named = tuple[int | str, str, float | None]
"""The position of the child, or its id; the id of its parent; the probability."""


def _read_entries(entries: Iterable[Any], draft: _Draft) -> list[_Named]:
    """Fills the draft, and returns the edges that the entries state."""
    places: dict[tuple[Any, str], int] = {}
    nameless: dict[int, None] = {}
    edges: list[_Named] = []
    for number, entry in enumerate(entries, start=1):
        given = entry if isinstance(entry, Mapping) else {"name": entry}
        id, name, description = (
            _text(given.get(key), draft) for key in ("id", "name", "description")
        )
        if not (id or name):
            draft.tell("no id or name", f"label {number}")
            continue
        level = _level(given.get("level"))
        place = places.setdefault((level, id or name), len(draft.ids))
        if place == len(draft.ids):
            draft.add(id or name, level)
        else:
            kept = (draft.names[place] or name, draft.descriptions[place] or description)
            lost = [text for text in (name, description) if text and text not in kept]
            draft.tell("repeated label", id or name, *lost)
        draft.names[place] = draft.names[place] or name
        draft.descriptions[place] = draft.descriptions[place] or description
        if not name and "name" in given:
            nameless[place] = None
        edges += ((place, *parent) for parent in _parents(given, draft))
    for place in nameless:
        if not draft.names[place]:
            draft.tell("no name", draft.ids[place], draft.ids[place])
    draft.names = [name or id for name, id in zip(draft.names, draft.ids, strict=True)]
    return edges


def _level(value: Any) -> _Level:
    if is_missing(value):
        return None
    return value if isinstance(value, str | int | float) else str(value)


def _parents(entry: Mapping[str, Any], draft: _Draft) -> Iterator[tuple[str, float | None]]:
    parents = values_of(entry.get("parents")) or values_of(entry.get("parent"))
    probs = values_of(entry.get("parent_probs"))
    if probs and len(probs) != len(parents):
        raise ValueError(f"{len(parents)} parents and {len(probs)} parent_probs in {dict(entry)}")
    for parent, prob in zip(parents, probs or [None] * len(parents), strict=True):
        if text := _text(parent, draft):
            yield text, _prob(prob)


def _prob(value: Any) -> float | None:
    if is_missing(value):
        return None
    try:
        prob = float(value)
    except (TypeError, ValueError):
        prob = math.nan
    if not 0 <= prob <= 1:
        raise ValueError(f"{value!r} is no probability of a parent; give a number from 0 to 1")
    return prob


def values_of(value: Any) -> list[Any]:
    """The value as a list: empty where it is missing."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    return [] if is_missing(value) else [value]


def is_missing(value: Any) -> bool:
    """Whether it is None or NaN, which is what tables have in an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, draft: _Draft) -> str:
    if not isinstance(value, str):
        if is_missing(value):
            return ""
        draft.tell("not text", str(value), type(value).__name__)
        value = str(value)
    text: str = value.strip()
    if text != value:
        draft.tell("white space", value, text)
    return text


def _named_edge(edge: Sequence[Any], draft: _Draft) -> _Named:
    child, parent, prob = edge if len(edge) == 3 else (*edge, None)
    return _text(child, draft), _text(parent, draft), _prob(prob)


def _resolve(named: list[_Named], draft: _Draft, absent: Absent) -> list[_Edge]:
    """Edges between positions; ids that stand on several levels are renamed on the way."""
    by_id: dict[str, list[int]] = {}
    for place, id in enumerate(draft.ids):
        by_id.setdefault(id, []).append(place)
    levels = _Levels(draft)
    edges = []
    for below, parent, prob in named:
        for end in (below, parent):
            if absent == "make" and isinstance(end, str) and end and end not in by_id:
                by_id[end] = [_make(end, draft)]
        places = [below] if isinstance(below, int) else by_id.get(below, [-1])
        child = places[0] if len(places) == 1 else max(places, key=levels.rank)
        above = by_id.get(parent, [])
        if child < 0:
            draft.tell("unknown label of an edge", str(below), parent)
        elif not above:
            draft.tell("unknown parent", draft.ids[child], parent)
        else:
            place = above[0] if len(above) == 1 else levels.parent(child, above)
            edges.append(_Edge(child, place, prob))
    _rename_ids(draft, by_id, levels)
    return edges


def _make(id: str, draft: _Draft) -> int:
    draft.tell("made", id)
    draft.add(id, None)
    draft.names[-1] = id
    return len(draft.ids) - 1


class _Levels:
    """Which level is above which: by number, or where they are kinds by first appearance."""

    def __init__(self, draft: _Draft) -> None:
        self.levels = draft.levels
        self.ranks: dict[Any, float] = {}
        try:
            self.ranks = {
                level: float("none" if level is None else level) for level in set(draft.levels)
            }
            self.numbers = True
        except ValueError:
            self.numbers = False
            for level in draft.levels:
                self.ranks.setdefault(level, float(len(self.ranks)))

    def rank(self, place: int) -> float:
        return self.ranks.get(self.levels[place], -1.0)

    def parent(self, child: int, places: list[int]) -> int:
        """Of labels with one id the one that a child means: the nearest above that is not itself."""

        def distance(place: int) -> tuple[int, float]:
            up = self.rank(child) - self.rank(place)
            if up == 0:  # a code within a code, both of the kind "code"; but no 4 within a 4
                return int(self.numbers), 0.0
            return (int(not self.numbers), up) if up > 0 else (2, -up)

        return min((p for p in places if p != child), key=distance, default=child)


def _rename_ids(draft: _Draft, by_id: dict[str, list[int]], levels: _Levels) -> None:
    taken = set(by_id)
    for id, places in by_id.items():
        for place in sorted(places, key=levels.rank)[:-1] if len(places) > 1 else ():
            level = draft.levels[place]
            new = _free(id if level is None else f"{level}:{id}", taken)
            taken.add(new)
            draft.ids[place] = new
            draft.tell("id on several levels", id, new)


def _free(text: str, taken: set[str]) -> str:
    tries = (text if number == 1 else f"{text} ({number})" for number in count(1))
    return next(each for each in tries if each not in taken)


def _rename_siblings(draft: _Draft, parents: list[list[_Edge]]) -> None:
    """Adds the ids to names that siblings share, all of them, so that their order is no matter."""
    groups = [[edge.parent for edge in some] or [-1] for some in parents]
    seen: dict[tuple[int, str], int] = {}
    repeated: set[int] = set()
    for place, name in enumerate(draft.names):
        for group in groups[place]:
            first = seen.setdefault((group, name), place)
            if first != place:
                repeated |= {first, place}
    taken = {key for key, place in seen.items() if place not in repeated}
    for place in sorted(repeated):
        name, id = draft.names[place], draft.ids[place]
        tries = (f"{name} ({id})" if n == 1 else f"{name} ({id}) ({n})" for n in count(1))
        new = next(t for t in tries if not any((group, t) in taken for group in groups[place]))
        taken |= {(group, new) for group in groups[place]}
        draft.names[place] = new
        draft.tell("repeated name", id, name, new)


# -------------------------------------------------------------------------------------- edges


def _unique_edges(edges: list[_Edge], draft: _Draft) -> list[_Edge]:
    kept: dict[tuple[int, int], _Edge] = {}
    for edge in edges:
        key = (edge.child, edge.parent)
        item = (draft.ids[edge.child], draft.ids[edge.parent])
        if edge.child == edge.parent:
            draft.tell("self-loop", *item)
        elif key in kept:
            draft.tell("repeated edge", *item)
            if edge.weight > kept[key].weight:
                kept[key] = edge
        else:
            kept[key] = edge
    return list(kept.values())


def _without_cycles(edges: list[_Edge], draft: _Draft) -> list[_Edge]:
    removed = closing_edges(
        len(draft.ids), [(e.child, e.parent) for e in edges], [e.weight for e in edges]
    )
    for place in removed:
        draft.tell("cycle", draft.ids[edges[place].child], draft.ids[edges[place].parent])
    gone = set(removed)
    return [edge for place, edge in enumerate(edges) if place not in gone]
