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
            `Dataset`; a `LabelSpace`.
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
        if isinstance(content, Mapping) and {"labels"} <= set(content) <= {"labels", "multilabel"}:
            multilabel = multilabel or content.get("multilabel") is True
            content = content["labels"]
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


def _rows(content: Any) -> Iterable[Any]:
    if hasattr(content, "iterrows"):  # a DataFrame of pandas iterates over its columns
        return content.to_dict("records")
    return content.tolist() if isinstance(content, np.ndarray) else content


def _row_entries(
    rows: list[Any],
    columns: Mapping[str, str | list[str]],
    separator: str | None,
    told: dict[str, list[tuple[str, ...]]],
) -> tuple[list[Any], list[list[Any]]]:
    if not all(isinstance(row, Mapping) for row in rows):
        paths = any(isinstance(row, list | tuple | np.ndarray) for row in rows)
        if separator is None and not paths:
            return files.without_paths(rows, files.SEPARATOR), []
        return _path_entries([{"path": row} for row in rows], {"path": "path"}, separator), []
    names = dict.fromkeys(name for row in rows for name in row)
    used = _used_columns(list(names), columns)
    if not used:
        return _tree_entries(rows, told), []
    flat = [column for each in used.values() for column in values_of(each)]
    if unused := [(name,) for name in names if name not in flat]:
        told.setdefault("unused column", []).extend(unused)
    if "path" in used:
        return _path_entries(rows, used, separator), []
    plain = {meaning: str(column) for meaning, column in used.items()}
    if "child" in plain:
        edges = [[row.get(column) for column in plain.values()] for row in rows]
        ends = dict.fromkeys(end for edge in edges for end in reversed(edge[:2]))
        given = [end for end in ends if not (is_missing(end) or end == "")]
        # A child without a parent is a root.
        return given, [edge for edge in edges if not (is_missing(edge[1]) or edge[1] == "")]
    return [{key: row.get(column) for key, column in plain.items()} for row in rows], []


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


def _path_entries(
    rows: Sequence[Mapping[str, Any]], used: Mapping[str, str | list[str]], separator: str | None
) -> list[Any]:
    between = separator or files.SEPARATOR
    others = {key: str(column) for key, column in used.items() if key != "path"}
    paths: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        cells = [cell for column in values_of(used["path"]) for cell in values_of(row.get(column))]
        parts = [str(cell).strip() for cell in cells if not is_missing(cell)]
        if len(parts) == 1 and len(cells) == 1:
            parts = [part.strip() for part in parts[0].split(between)]
        if path := tuple(part for part in parts if part):
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
