"""The labels that texts can have: a flat list, or a directed acyclic graph when somebody has a parent.

A label file is a list of entries, or `{labels: [...], multilabel: true}`. An entry is a name, or a
mapping with the keys of `ENTRY_KEYS`; at least one of `id` and `name`, the other defaults to it.
In a .csv the keys are columns, an empty cell is a key left out, and several parents are separated
by `|`; a .txt has one name a line.
"""

import csv
import dataclasses
import difflib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llmlabel.strictyaml import read_yaml

ENTRY_KEYS = ("id", "name", "description", "parent", "parents")
SUFFIXES = (".yaml", ".yml", ".json", ".csv", ".txt")


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """The possible labels, in an order that `label_ids` and the columns of a matrix refer to.

    Args:
        ids: Unique and stable.
        names: What a model reads; unique among siblings.
        descriptions: `""` where there is none.
        parents: The ids of the parents; `()` for a root.
        multilabel: A text may have several labels, or none.

    Raises:
        ValueError: A broken promise of the above, white space at the end of a text, a parent that
            does not exist, a cycle, or fewer than two labels (one, when `multilabel`).
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parents: tuple[tuple[str, ...], ...]
    multilabel: bool = False

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

    def __len__(self) -> int:
        """The number of labels."""
        return len(self.ids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever anything here changes."""
        content = json.dumps([getattr(self, field.name) for field in dataclasses.fields(self)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

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
        raise ValueError(f"unknown label {label!r}; {_closest(label, known)}")

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
    source: str | Path | list[Any] | dict[str, Any], *, multilabel: bool = False
) -> LabelSpace:
    """Reads a label space from a file, or from the same content as Python values.

    White space at the ends of ids, names and descriptions is dropped.

    Args:
        source: A path with one of the `SUFFIXES`, a list of entries, or a mapping.
        multilabel: What the source says about it, or true when either of the two says so.
    """
    if not isinstance(source, str | Path):
        return _parse(source, multilabel=multilabel)
    try:
        return _parse(_read(Path(source)), multilabel=multilabel)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def save_labels(labels: LabelSpace, path: Path) -> None:
    """Writes a file that `load_labels` reads back as an equal label space; .yaml, .json or .csv."""
    from llmlabel.files import commit  # here: data imports this module, and datasets takes a second

    entries = []
    for id, name, description, parents in zip(
        labels.ids, labels.names, labels.descriptions, labels.parents, strict=True
    ):
        entry: dict[str, Any] = {"id": id, "name": name}
        if description:
            entry["description"] = description
        if parents:
            entry["parents"] = list(parents)
        entries.append(entry)
    content = {"multilabel": labels.multilabel, "labels": entries}
    match path.suffix.lower():
        case ".yaml" | ".yml":
            text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        case ".json":
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        case ".csv":
            text = _to_csv(labels, path)
        case suffix:
            raise ValueError(f"{path}: cannot save labels as {suffix!r}; use .yaml, .json or .csv")
    commit(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # bytes: text mode would turn line ends


def _to_csv(labels: LabelSpace, path: Path) -> str:
    if labels.multilabel:
        raise ValueError(f"{path}: a .csv cannot say multilabel: true; save as .yaml or .json")
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["id", "name", "description", "parents"])
    for id, name, description, parents in zip(
        labels.ids, labels.names, labels.descriptions, labels.parents, strict=True
    ):
        if bad := [parent for parent in parents if "|" in parent]:
            raise ValueError(f"{path}: the parent id {bad[0]!r} has a |; save as .yaml or .json")
        writer.writerow([id, name, description, "|".join(parents)])
    return stream.getvalue()


def _read(path: Path) -> Any:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"unknown label file type {path.suffix!r}; use one of {_listed(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file; give a path or a list of labels")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None
    match path.suffix.lower():
        case ".yaml" | ".yml":
            return read_yaml(text)
        case ".json":
            try:
                return json.loads(text, object_pairs_hook=_unique_keys)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from None
        case ".csv":
            return _read_csv(text)
        case _:
            return [line.strip() for line in text.split("\n") if line.strip()]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := _first_duplicate([key for key, _ in pairs])) is not None:
        raise ValueError(f"the key {twice!r} is there twice; remove one")
    return dict(pairs)


def _read_csv(text: str) -> list[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *rows = [(reader.line_num, row) for row in reader if row] or [(1, [])]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None
    columns = [column.strip() for column in header[1]]
    if (twice := _first_duplicate(columns)) is not None:
        raise ValueError(f"the column {twice!r} is there twice; remove one")
    if not {"id", "name"} & set(columns):
        raise ValueError(f"no column `id` or `name` in the first line; it has {columns}")
    entries = []
    for line, row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"line {line} has {len(row)} fields, the first line has {len(columns)}; "
                "put quotes around a field with a comma"
            )
        entry: dict[str, Any] = {
            key: cell for key, cell in zip(columns, row, strict=True) if cell.strip()
        }
        for key in {"parent", "parents"} & set(entry):
            entry[key] = entry[key].split("|")
        entries.append(entry)
    return entries


def _parse(content: Any, *, multilabel: bool) -> LabelSpace:
    if isinstance(content, dict):
        _check_keys(content, ("labels", "multilabel"), "the label file")
        stated = content.get("multilabel", False)
        if not isinstance(stated, bool):
            raise ValueError(f"multilabel must be true or false; got {stated!r}")
        multilabel = multilabel or stated
        content = content.get("labels")
    if not isinstance(content, list):
        kind = type(content).__name__
        raise ValueError(f"labels must be a list of names or of mappings; got {kind}")
    entries = [_entry(entry, f"label {n}") for n, entry in enumerate(content, start=1)]
    ids, names, descriptions, parents = zip(*entries, strict=True) if entries else ((),) * 4
    return LabelSpace(
        ids=tuple(ids),
        names=tuple(names),
        descriptions=tuple(descriptions),
        parents=tuple(parents),
        multilabel=multilabel,
    )


def _entry(entry: Any, what: str) -> tuple[str, str, str, tuple[str, ...]]:
    if not isinstance(entry, dict):
        name = _text(entry, what)
        return name, name, "", ()
    _check_keys(entry, ENTRY_KEYS, what)
    given = {key: _text(entry[key], f"{key} of {what}") for key in ("id", "name") if key in entry}
    if not given:
        raise ValueError(f"{what} has neither `id` nor `name`: {entry}; give at least one")
    if "parent" in entry and "parents" in entry:
        raise ValueError(f"{what} has both `parent` and `parents`; keep one")
    description = entry.get("description")
    parents = entry.get("parents", entry.get("parent"))
    if parents is None:
        parents = []
    elif not isinstance(parents, list | tuple):
        parents = [parents]
    return (
        given.get("id", given.get("name", "")),
        given.get("name", given.get("id", "")),
        "" if description is None else _text(description, f"description of {what}"),
        tuple(dict.fromkeys(_text(parent, f"parent of {what}") for parent in parents)),
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{what} is the {type(value).__name__} {value!r}, not text; put it in quotes "
            "(YAML reads a bare no, on, 1.0 or null as something else)"
        )
    return value.strip()


def _check_keys(mapping: dict[Any, Any], allowed: tuple[str, ...], what: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise ValueError(
                f"{what} has the unknown key {key!r}; {_closest(str(key), allowed)}"
                f"; allowed are {_listed(allowed)}"
            )


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
        for parent in parents:
            if parent not in parents_of:
                raise ValueError(
                    f"label {id!r} has the unknown parent {parent!r}; "
                    f"{_closest(parent, labels.ids)} (a parent is given by its id)"
                )
    _check_acyclic(parents_of)


def _check_acyclic(parents_of: dict[str, tuple[str, ...]]) -> None:
    # From the roots down (Kahn 1962): whoever is never reached lies on a cycle or below one.
    children: dict[str, list[str]] = {}
    waiting = {id: len(set(parents)) for id, parents in parents_of.items()}
    for id, parents in parents_of.items():
        for parent in set(parents):
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
    path = [next(iter(waiting))]
    while path.count(path[-1]) == 1:
        path.append(next(parent for parent in parents_of[path[-1]] if parent in waiting))
    cycle = " -> ".join(repr(id) for id in path[path.index(path[-1]) :])
    raise ValueError(f"the parents form a cycle: {cycle}; remove one of them")


def _first_duplicate(values: list[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _closest(value: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {_listed(close)}?"
    return f"known are {_listed(known[:10])}" + (", ..." if len(known) > 10 else "")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(repr(value) for value in values)
