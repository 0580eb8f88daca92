"""Label spaces out of whatever describes one: files, tables, paths, edges, classes, trees."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmlabel.labelspace import LabelSpace, closest, files, listed
from llmlabel.labelspace.clean import Absent, Cleaning, clean_labels, is_missing, values_of

_MEANINGS = (*files.ENTRY_KEYS, "level", "child", "prob")
_OTHER_NAMES = {"id": "label", "name": "text"}


def import_labels(
    source: str | Path | Any,  # a Path among them, so that the content of a file counts in a recipe
    *,
    columns: Mapping[str, str | list[str]] | None = None,
    separator: str | None = None,
    language: str = "en",
    base: str = "",
    absent: Absent = "drop",
    multilabel: bool = False,
) -> Cleaning:
    """Makes a label space of whatever describes one, and tells each change (see `llmlabel.labelspace.clean.clean_labels`).

    Args:
        source: A label file or an ontology (see `llmlabel.labelspace.files`); or, also as a .csv,
            .json or .jsonl, rows of labels with the columns `id` (or `label`), `name` (or `text`),
            `parent`, `level`, `description`; rows of edges with `child`, `parent`, `prob`; paths
            from a root, as lists, as a column `path` or several, or as texts with a separator; names
            (a list, an array of classes); a tree of mappings and lists, where a name is an id; a
            `Dataset`; a `LabelSpace`. Where rows with a `path` have an `id` (or a parent) too, it is
            read only as `columns` say, or when they are entries of a label file and one has no path.
        columns: Meaning (`id`, `name`, `parent`, `path`, ...) -> column, where they differ; a list
            of columns for `path`, one a level.
        separator: Stands between the names of a path; without one a text is one name, and only in
            a column `path` it is " > ".
        language: Of names and descriptions, where an ontology has several.
        base: A beginning of ids that they are to be without, such as that of an ontology's IRIs.
        absent: See `clean_labels`.
        multilabel: See `clean_labels`.

    Raises:
        ValueError: The source is of none of these kinds, or what is left of it is no label space.
    """
    told: dict[str, list[tuple[str, ...]]] = {}
    edges: list[list[Any]] = []
    try:
        if isinstance(source, str | Path):
            content, told = files.contents(Path(source), language=language, base=base)
        else:
            content = source
        if isinstance(content, LabelSpace):
            multilabel = multilabel or content.multilabel
            content = files.entries_of(content)
        if isinstance(content, Mapping) and _is_label_file(content):
            content, stated = files.unwrapped(content)
            multilabel = multilabel or stated
        if isinstance(content, Mapping):
            content = _tree_entries(content, told)
        elif isinstance(content, Iterable) and not isinstance(content, str):
            rows = list(_rows(content))
            content, edges = _row_entries(rows, columns or {}, separator, told)
        else:
            kind = type(content).__name__
            raise ValueError(f"cannot make labels of a {kind}; give a list, a mapping or a path")
        return clean_labels(content, edges, absent=absent, multilabel=multilabel, told=told)
    except ValueError as error:
        place = f"{source}: " if isinstance(source, str | Path) else ""
        raise ValueError(f"{place}{error}") from None


def _is_label_file(content: Mapping[Any, Any]) -> bool:
    """Whether it is `{labels: ...}`, with a misspelt key where `labels` are clearly entries."""
    if "labels" not in content:
        return False
    entries = values_of(content["labels"])
    return set(content) <= {"labels", "multilabel"} or any(
        isinstance(entry, Mapping) and isinstance(entry.get(key), str | int)
        for entry in entries
        for key in ("id", "name")
    )


def _rows(content: Any) -> Iterable[Any]:
    if hasattr(content, "iterrows"):  # a DataFrame of pandas iterates over its columns
        # Where a cell of a column is empty, whole numbers are floats and 1 would be "1.0".
        whole = content.convert_dtypes().astype(object)
        return whole.where(whole.notna(), None).to_dict("records")
    return content.tolist() if isinstance(content, np.ndarray) else content


def _row_entries(
    rows: list[Any],
    columns: Mapping[str, str | list[str]],
    separator: str | None,
    told: dict[str, list[tuple[str, ...]]],
) -> tuple[list[Any], list[list[Any]]]:
    between = separator or files.SEPARATOR
    if not all(isinstance(row, Mapping) for row in rows):
        return _name_entries(rows, separator), []
    names = dict.fromkeys(name for row in rows for name in row)
    if not columns and _are_label_entries(rows, names, between):
        return _label_entries(rows, between), []
    used = _used_columns(list(names), columns)
    if not used:
        return _tree_entries(rows, told), []
    flat = [column for each in used.values() for column in values_of(each)]
    if unused := [(name,) for name in names if name not in flat]:
        told.setdefault("unused column", []).extend(unused)
    if "path" in used:
        for number, row in enumerate(rows, start=1):
            if not _path(row, used["path"], between):
                told.setdefault("no path", []).append((f"row {number}",))
        return _path_entries(rows, used, between), []
    plain = {meaning: str(column) for meaning, column in used.items()}
    if "child" in plain:
        edges = [[row.get(column) for column in plain.values()] for row in rows]
        ends = dict.fromkeys(end for edge in edges for end in reversed(edge[:2]))
        given = [end for end in ends if not (is_missing(end) or end == "")]
        # A child without a parent is a root.
        return given, [edge for edge in edges if not (is_missing(edge[1]) or edge[1] == "")]
    return [{key: row.get(column) for key, column in plain.items()} for row in rows], []


def _name_entries(rows: list[Any], separator: str | None) -> list[Any]:
    """Of names and paths, some of which may be entries of a label file."""
    between = separator or files.SEPARATOR
    paths = separator is not None or any(isinstance(row, list | tuple | np.ndarray) for row in rows)
    if any(isinstance(row, Mapping) for row in rows):
        return _label_entries(rows, between, paths=paths)
    return (
        _path_entries([{"path": row} for row in rows], {"path": "path"}, between) if paths else rows
    )


def _used_columns(
    names: list[str], columns: Mapping[str, str | list[str]]
) -> dict[str, str | list[str]]:
    """Meaning -> column: of paths, of edges or of labels, whichever there is first.

    Beside paths and edges an `id` may be that of a text: only when it is asked for, it is the label's.
    """
    for meaning, given in columns.items():
        if meaning not in _MEANINGS:
            raise ValueError(
                f"columns has the unknown meaning {meaning!r}; {closest(meaning, _MEANINGS)}"
            )
        if absent := [column for column in values_of(given) if column not in names]:
            raise ValueError(f"there is no column {absent[0]!r}; there are {listed(names)}")
    found: dict[str, str | list[str]] = {name: name for name in _MEANINGS if name in names}
    found |= columns
    for kind in (("path",), ("child", "parent", "prob")):
        if found.keys() >= set(kind) - {"prob"}:
            return {key: found[key] for key in (*kind, *columns) if key in found}
    for meaning, other in _OTHER_NAMES.items():
        if other in names and other not in found.values():
            found.setdefault(meaning, other)
    return found


def _are_label_entries(rows: list[Mapping[str, Any]], names: Iterable[str], between: str) -> bool:
    """Whether they are entries of a label file, some with a path and some without."""
    names = set(names)
    lacking = [row for row in rows if not _path(row, "path", between)]
    return (
        "path" in names
        and names <= {*files.ENTRY_KEYS, "level"}
        and any(not is_missing(row.get(key)) for row in lacking for key in ("id", "name"))
    )


def _label_entries(rows: list[Any], between: str, *, paths: bool = False) -> list[Any]:
    """Entries of a label file, whatever a table has in empty cells; with `paths` texts are paths."""
    entries: list[Any] = []
    for row in rows:
        if not (paths or isinstance(row, Mapping)):
            entries.append(row)
            continue
        given = dict(row) if isinstance(row, Mapping) else {"path": row}
        path = _path(given, "path", between)
        given = {key: v for key, v in given.items() if key != "path" and not is_missing(v)}
        entries.append({"path": list(path), **given} if path else given)
    return files.without_paths(entries, between)


def _path(row: Mapping[str, Any], columns: str | list[str], between: str) -> tuple[str, ...]:
    """The names from a root down, none where the row has no path."""
    cells = [cell for column in values_of(columns) for cell in values_of(row.get(column))]
    parts = [str(cell).strip() for cell in cells if not is_missing(cell)]
    if len(parts) == 1 and len(cells) == 1:
        parts = [part.strip() for part in parts[0].split(between)]
    return tuple(part for part in parts if part)


def _path_entries(
    rows: Sequence[Mapping[str, Any]], used: Mapping[str, str | list[str]], between: str
) -> list[Any]:
    others = {key: str(column) for key, column in used.items() if key != "path"}
    paths: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        if path := _path(row, used["path"], between):
            rest = {key: row.get(column) for key, column in others.items()}
            paths.setdefault(path, {key: v for key, v in rest.items() if not is_missing(v)})
    return files.without_paths(
        [{"path": list(path), **rest} for path, rest in paths.items()], between
    )


_DEEPEST = 100_000
"""Levels of a tree of mappings and lists; one with more holds itself."""


def _tree_entries(tree: Any, told: dict[str, list[tuple[str, ...]]]) -> list[dict[str, Any]]:
    found: dict[tuple[int, str], dict[str, Any]] = {}
    waiting = [(1, "", name, below) for name, below in reversed(_branches(tree))]
    seen: set[tuple[int, str, int]] = set()
    while waiting:
        level, parent, name, below = waiting.pop()
        if level > _DEEPEST:
            raise ValueError(f"the tree has more than {_DEEPEST:,} levels at {name!r}")
        known = (level, name) in found
        entry = found.setdefault((level, name), {"name": name, "level": level, "parents": []})
        if known:
            again = not parent or parent in entry["parents"]
            told.setdefault("repeated label" if again else "several places", []).append(
                (name, parent)
            )
        if parent and parent not in entry["parents"]:
            entry["parents"].append(parent)
        if (level, name, id(below)) not in seen:  # YAML can say one branch in many places
            seen.add((level, name, id(below)))
            waiting += [(level + 1, name, *branch) for branch in reversed(_branches(below))]
    return list(found.values())


def _branches(tree: Any) -> list[tuple[str, Any]]:
    """The names on top of a tree, each with what is below it."""
    if isinstance(tree, Mapping):
        return [(str(name), below) for name, below in tree.items()]
    found: list[tuple[str, Any]] = []
    for each in values_of(tree):
        found += _branches(each) if isinstance(each, Mapping) else [(str(each), None)]
    return found
