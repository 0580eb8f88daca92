"""The labels that texts can have: a flat list, or a directed acyclic graph when somebody has a parent.

`LabelSpace` holds them and keeps its promises; `llmlabel.labelspace.graph` walks them,
`llmlabel.labelspace.files` says what a label file looks like.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """The possible labels, in an order that `label_ids` and the columns of a matrix refer to.

    Args:
        ids: Unique and stable.
        names: What a model reads; unique among siblings.
        descriptions: `""` where there is none.
        parents: The ids of the parents; `()` for a root.
        multilabel: A text may have several labels, or none.
        parent_probs: How probable each parent is, in the order of `parents`; `()` where nobody says.

    Raises:
        ValueError: A broken promise of the above, white space at the end of a text, a parent that
            does not exist or is given twice, a cycle, or fewer than two labels (one, when
            `multilabel`).
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parents: tuple[tuple[str, ...], ...]
    multilabel: bool = False
    parent_probs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        """Checks what is promised above, so that nobody else has to."""
        lengths = [len(self.ids), len(self.names), len(self.descriptions), len(self.parents)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"ids, names, descriptions and parents must be equally many; got {lengths}"
            )
        _check_size(self)
        _check_texts(self)
        _check_unique(self)
        _check_parents(self)
        _check_parent_probs(self)

    def __len__(self) -> int:
        """The number of labels."""
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever anything here changes."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        if not self.parent_probs:  # a space without them is what it was before there were any
            values.pop()
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    @cached_property
    def is_flat(self) -> bool:
        """Whether no label has a parent."""
        return not any(self.parents)

    @cached_property
    def parent_positions(self) -> tuple[tuple[int, ...], ...]:
        """The positions of each label's parents, in the order of `parents`."""
        return tuple(tuple(self._by_id[parent] for parent in some) for some in self.parents)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The positions of each label's children, ascending."""
        found: list[list[int]] = [[] for _ in self.ids]
        for position, parents in enumerate(self.parent_positions):
            for parent in parents:
                found[parent].append(position)
        return tuple(map(tuple, found))

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """The positions of the labels without a parent, ascending."""
        return tuple(i for i, parents in enumerate(self.parents) if not parents)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The positions of the labels without a child, ascending."""
        return tuple(i for i, children in enumerate(self.children) if not children)

    @cached_property
    def topological(self) -> tuple[int, ...]:
        """The positions of all labels, parents before their children (Kahn 1962)."""
        waiting = [len(parents) for parents in self.parents]
        found = list(self.roots)
        for label in found:  # which grows meanwhile
            for child in self.children[label]:
                waiting[child] -= 1
                if not waiting[child]:
                    found.append(child)
        return tuple(found)

    @cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """The positions of each label itself and of everything above it, ascending."""
        above: list[tuple[int, ...]] = [()] * len(self)
        for label in self.topological:
            lines = [above[parent] for parent in self.parent_positions[label]]
            above[label] = tuple(sorted({label}.union(*lines)))
        return tuple(above)

    def index(self, label: str) -> int:
        """The position of a label given by its id, or by its name where only one label has it."""
        if label in self._by_id:
            return self._by_id[label]
        found = self._by_name.get(label, [])
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(repr(self.ids[position]) for position in found)
            raise ValueError(f"label {label!r} is the name of several labels; give the id: {ids}")
        known = [*self._by_id, *self._by_name]
        raise ValueError(f"unknown label {label!r}; {closest(label, known)}")

    def texts(self) -> list[str]:
        """`name: description` of every label, or its `name` where it has no description."""
        pairs = zip(self.names, self.descriptions, strict=True)
        return [f"{name}: {description}" if description else name for name, description in pairs]

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {label: position for position, label in enumerate(self.ids)}

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for position, name in enumerate(self.names):
            found.setdefault(name, []).append(position)
        return found


def load_labels(
    source: str | Path | list[Any] | dict[str, Any],
    *,
    multilabel: bool = False,
    separator: str = " > ",
) -> LabelSpace:
    """Reads a label space from a file, or from the same content as Python values.

    White space at the ends of ids, names and descriptions is dropped; anything else that is broken
    is refused (`llmlabel.labelspace.sources.import_labels` repairs it).

    Args:
        source: A path (see `llmlabel.labelspace.files`), a list of entries, or a mapping.
        multilabel: What the source says about it, or true when either of the two says so.
        separator: Stands between the names of a `path`.
    """
    from llmlabel.labelspace import files  # here: it makes a LabelSpace

    if not isinstance(source, str | Path):
        return files.parse(source, multilabel=multilabel, separator=separator)
    try:
        return files.parse(files.read(Path(source)), multilabel=multilabel, separator=separator)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def save_labels(labels: LabelSpace, path: Path) -> None:
    """Writes a file that `load_labels` reads back as an equal label space.

    Raises:
        ValueError: A file of that type (see `llmlabel.labelspace.files`) cannot hold these labels.
    """
    from llmlabel.files import commit  # here: data imports this module, and datasets takes a second
    from llmlabel.labelspace import files

    content = files.write(labels, path)
    commit(path, lambda temporary: _write(temporary, content))


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # bytes: text mode would turn line ends


def _check_size(labels: LabelSpace) -> None:
    if not labels.ids:
        raise ValueError("there are no labels; give at least two")
    if len(labels.ids) == 1 and not labels.multilabel:
        raise ValueError(
            f"one label only ({labels.ids[0]!r}), and a choice needs two; for a yes/no question "
            "say multilabel: true, where one label is allowed"
        )


def _check_texts(labels: LabelSpace) -> None:
    for n, (id, name) in enumerate(zip(labels.ids, labels.names, strict=True), start=1):
        if not (id and name):
            empty = "id" if name else "name"
            raise ValueError(f"label {n} has an empty {empty} (its id is {id!r}, name {name!r})")
    for text in (*labels.ids, *labels.names, *labels.descriptions):
        if text != text.strip():
            raise ValueError(f"white space at an end of {text!r} in the labels; remove it")


def _check_unique(labels: LabelSpace) -> None:
    first: dict[str, int] = {}
    for n, id in enumerate(labels.ids, start=1):
        if first.setdefault(id, n) != n:
            raise ValueError(
                f"labels {first[id]} and {n} have the same id {id!r}; give each an id of its own"
            )
    siblings: dict[tuple[str | None, str], str] = {}
    for id, name, parents in zip(labels.ids, labels.names, labels.parents, strict=True):
        for parent in parents or (None,):
            other = siblings.setdefault((parent, name), id)
            if other != id:
                place = "roots" if parent is None else f"children of {parent!r}"
                raise ValueError(
                    f"the labels {other!r} and {id!r}, both {place}, have the same name {name!r}; "
                    "rename one"
                )


def _check_parents(labels: LabelSpace) -> None:
    parents_of = dict(zip(labels.ids, labels.parents, strict=True))
    for id, parents in parents_of.items():
        if len(set(parents)) < len(parents):
            raise ValueError(f"label {id!r} has a parent twice: {listed(parents)}; keep one")
        for parent in parents:
            if parent not in parents_of:
                raise ValueError(
                    f"label {id!r} has the unknown parent {parent!r}; "
                    f"{closest(parent, labels.ids)} (a parent is given by its id)"
                )
    _check_acyclic(parents_of)


def _check_parent_probs(labels: LabelSpace) -> None:
    if not labels.parent_probs:
        return
    if [*map(len, labels.parent_probs)] != [*map(len, labels.parents)]:
        raise ValueError("parent_probs must have one number for each parent of each label")
    for id, probs in zip(labels.ids, labels.parent_probs, strict=True):
        if wrong := [prob for prob in probs if not 0 <= prob <= 1]:
            raise ValueError(f"label {id!r}: {wrong[0]} is no probability of a parent")


def _check_acyclic(parents_of: dict[str, tuple[str, ...]]) -> None:
    # From the roots down (Kahn 1962): whoever is never reached lies on a cycle or below one.
    children: dict[str, list[str]] = {}
    waiting = {id: len(parents) for id, parents in parents_of.items()}
    for id, parents in parents_of.items():
        for parent in parents:
            children.setdefault(parent, []).append(id)
    ready = [id for id, count in waiting.items() if count == 0]
    while ready:
        id = ready.pop()
        del waiting[id]
        for child in children.get(id, []):
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    if not waiting:
        return
    at, path = next(iter(waiting)), dict[str, None]()
    while at not in path:
        path[at] = None
        at = next(parent for parent in parents_of[at] if parent in waiting)
    shown = [repr(id) for id in [*path][[*path].index(at) :]]
    if len(shown) > 10:
        shown[5:-4] = [f"... ({len(shown) - 9} more)"]
    cycle = " -> ".join([*shown, repr(at)])
    raise ValueError(
        f"the parents form a cycle: {cycle}; remove one of them, or repair all with import_labels"
    )


def closest(value: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known labels or keys, or some that there are."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {listed(close)}?"
    return f"known are {listed(known[:10])}" + (", ..." if len(known) > 10 else "")


def listed(values: Iterable[str]) -> str:
    """In quotes, with commas."""
    return ", ".join(repr(value) for value in values)
