"""Label files: what `llmlabel.labelspace.load_labels` reads and `save_labels` writes.

A label file is a list of entries, or `{labels: [...], multilabel: true}`. An entry is a name, or a
mapping with the keys of `ENTRY_KEYS`; at least one of `id`, `name` and `path` (the names from a root
down to the label, joined by a separator), the others default to it. The labels above a path need no
entry of their own.

- .yaml, .yml, .json: as above; a .jsonl has one entry a line;
- .csv: the keys are columns, an empty cell is a key left out, several parents are separated by `|`
  or written as a JSON list;
- .txt: one name a line;
- .ttl, .nt, .rdf, .owl, .jsonld, .obo: see `llmlabel.labelspace.ontologies`.

Each may be compressed as .gz, when it is read.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmlabel.labelspace import LabelSpace, closest, listed, ontologies
from llmlabel.strictyaml import read_yaml

ENTRY_KEYS = ("id", "name", "description", "parent", "parents", "parent_probs", "path")
SEPARATOR = " > "
SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".txt", *ontologies.SUFFIXES)


def read(path: Path) -> Any:
    """What a label file says, as Python values for `parse`."""
    if suffix(path) != ".csv":
        return contents(path)[0]
    columns, entries = _read_csv(_read_text(path))
    if not {"id", "name", "path"} & set(columns):
        raise ValueError(
            f"no column `id` or `name` (or `path`) in the first line; it has {columns}"
        )
    return entries


def contents(
    path: Path, *, language: str = "en", base: str = ""
) -> tuple[Any, dict[str, list[tuple[str, ...]]]]:
    """What a label file says, a table with any columns, and what an ontology has beside labels.

    See `llmlabel.labelspace.ontologies` for the language, the base, and what is told.
    """
    text, kind = _read_text(path), suffix(path)
    if kind in ontologies.SUFFIXES:
        ontology = ontologies.read(text, kind, language=language, base=base)
        return ontology.entries, ontology.told
    match kind:
        case ".yaml" | ".yml":
            return read_yaml(text), {}
        case ".json":
            return _json(text), {}
        case ".jsonl":
            return _read_jsonl(text), {}
        case ".csv":
            return _read_csv(text)[1], {}
        case _:
            return [line.strip() for line in text.split("\n") if line.strip()], {}


def suffix(path: Path) -> str:
    """The type of a label file, without .gz and in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_text(path: Path) -> str:
    """The text of a label file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is of another type, or not UTF-8.
    """
    if suffix(path) not in SUFFIXES:
        raise ValueError(f"unknown label file type {path.suffix!r}; use one of {listed(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file; give a path or a list of labels")
    raw = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"not a whole .gz file ({error}); copy or download it again") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def parse(content: Any, *, multilabel: bool, separator: str = SEPARATOR) -> LabelSpace:
    """The label space that the content of a label file describes."""
    if isinstance(content, dict):
        content, stated = unwrapped(content)
        multilabel = multilabel or stated
    if not isinstance(content, list):
        kind = type(content).__name__
        raise ValueError(f"labels must be a list of names or of mappings; got {kind}")
    entries = [_entry(entry, f"label {n}") for n, entry in _without_paths(content, separator)]
    ids, names, descriptions, parents, probs = zip(*entries, strict=True) if entries else ((),) * 5
    return LabelSpace(
        ids=tuple(ids),
        names=tuple(names),
        descriptions=tuple(descriptions),
        parents=tuple(parents),
        multilabel=multilabel,
        # A parent that somebody states without a probability is certain.
        parent_probs=tuple(
            some or (1.0,) * len(each) for some, each in zip(probs, parents, strict=True)
        )
        if any(probs)
        else (),
    )


def unwrapped(content: Mapping[Any, Any]) -> tuple[Any, bool]:
    """The labels of `{labels: ..., multilabel: ...}`, and whether it says that it is multi-label."""
    _check_keys(content, ("labels", "multilabel"), "the label file")
    stated = content.get("multilabel", False)
    if not isinstance(stated, bool):
        raise ValueError(f"multilabel must be true or false; got {stated!r}")
    return content.get("labels"), stated


def write(labels: LabelSpace, path: Path) -> str:
    """The content of a file of the type that the name of `path` says.

    Raises:
        ValueError: Such a file cannot hold these labels.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".csv", *ontologies.WRITTEN) and labels.multilabel:
        raise ValueError(f"{path}: a {kind} cannot say multilabel: true; save as .yaml or .json")
    match kind:
        case ".yaml" | ".yml":
            content = {"multilabel": labels.multilabel, "labels": entries_of(labels)}
            return str(yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False))
        case ".json":
            content = {"multilabel": labels.multilabel, "labels": entries_of(labels)}
            return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        case ".jsonl":
            lines = [json.dumps(entry, ensure_ascii=False) for entry in entries_of(labels)]
            return "".join(f"{line}\n" for line in lines)
        case ".csv":
            return _to_csv(labels)
        case _ if kind in ontologies.WRITTEN:
            try:
                return ontologies.write(labels, kind)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        case _:
            known = listed((".yaml", ".json", ".jsonl", ".csv", *ontologies.WRITTEN))
            raise ValueError(f"{path}: cannot save labels as {kind!r}; use one of {known}")


class _Dumper(yaml.SafeDumper):
    """PyYAML takes U+0085 for the end of a line, but where it writes double quotes."""


def _dump_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\x85" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _dump_text)


def entries_of(labels: LabelSpace) -> list[dict[str, Any]]:
    """The labels as the entries of a label file."""
    entries = []
    probs = labels.parent_probs or ((),) * len(labels)
    for id, name, description, parents, parent_probs in zip(
        labels.ids, labels.names, labels.descriptions, labels.parents, probs, strict=True
    ):
        entry: dict[str, Any] = {"id": id, "name": name}
        if description:
            entry["description"] = description
        if parents:
            entry["parents"] = list(parents)
        if parent_probs:
            entry["parent_probs"] = list(parent_probs)
        entries.append(entry)
    return entries


def without_paths(entries: list[Any], separator: str) -> list[Any]:
    """The entries, where a `path` is replaced by a parent and all above it have entries too.

    The id of such a label is its path, unless the entry gives one.
    """
    return [entry for _, entry in _without_paths(entries, separator)]


def _without_paths(entries: list[Any], separator: str) -> list[tuple[int, Any]]:
    """The same, each with the number of the entry that it comes from."""
    ids: dict[tuple[str, ...], str] = {}
    for n, entry in enumerate(entries, start=1):
        if isinstance(entry, dict) and "path" in entry:
            path = _parts(entry["path"], separator, f"path of label {n}")
            ids.setdefault(path, entry.get("id") or _joined(path, separator))
    found: list[tuple[int, Any]] = []
    made = set(ids)
    for n, entry in enumerate(entries, start=1):
        if not (isinstance(entry, dict) and "path" in entry):
            found.append((n, entry))
            continue
        if both := {"parent", "parents"} & set(entry):
            raise ValueError(f"label {n} has both `path` and `{min(both)}`; keep one")
        path = _parts(entry["path"], separator, f"path of label {n}")
        lines = [(path, {key: value for key, value in entry.items() if key != "path"})]
        while (above := lines[-1][0][:-1]) and above not in made:
            made.add(above)
            ids[above] = _joined(above, separator)
            lines.append((above, {}))
        for line, rest in reversed(lines):
            parents = [ids[line[:-1]]] if line[:-1] else []
            found.append((n, {"name": line[-1], **rest, "id": ids[line], "parents": parents}))
    return found


def _parts(path: Any, separator: str, what: str) -> tuple[str, ...]:
    parts = path.split(separator) if isinstance(path, str) else path
    if not isinstance(parts, list | tuple):
        raise ValueError(f"{what} must be text or a list of names; got {path!r}")
    found = tuple(_text(part, what) for part in parts)
    if not (found and all(found)):
        raise ValueError(f"{what} has an empty name: {path!r}; the separator is {separator!r}")
    return found


def _joined(path: tuple[str, ...], separator: str) -> str:
    # A name with the separator in it must not look like two.
    return separator.join(name.replace(separator, f"\\{separator}") for name in path)


def _to_csv(labels: LabelSpace) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    columns = ["id", "name", "description", "parents"]
    writer.writerow(columns + ["parent_probs"] * bool(labels.parent_probs))
    for row, entry in enumerate(entries_of(labels)):
        parents = entry.get("parents", [])
        cell = "|".join(parents)
        if cell.startswith("[") or any("|" in parent for parent in parents):
            cell = json.dumps(parents, ensure_ascii=False)
        cells = [entry["id"], entry["name"], entry.get("description", ""), cell]
        if labels.parent_probs:
            cells.append("|".join(map(repr, labels.parent_probs[row])))
        writer.writerow(cells)
    return stream.getvalue()


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("the brackets are nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := _first_duplicate([key for key, _ in pairs])) is not None:
        raise ValueError(f"the key {twice!r} is there twice; remove one")
    return dict(pairs)


def _read_jsonl(text: str) -> list[Any]:
    """One JSON value a line; U+2028 ends no line."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append(_json(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}; write one entry a line") from None
    return found


def _read_csv(text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns, and each row as an entry without the keys of its empty cells."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *rows = [(reader.line_num, row) for row in reader if row] or [(1, [])]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None
    columns = [column.strip() for column in header[1]]
    if (twice := _first_duplicate(columns)) is not None:
        raise ValueError(f"the column {twice!r} is there twice; remove one")
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
        # A row of an edge list has one parent, which may have a | in its name.
        several = set() if "child" in columns else {"parent", "parents", "parent_probs"}
        for key in several & set(entry):
            entry[key] = _cells(entry[key])
        if "parent_probs" in entry:
            entry["parent_probs"] = [_number(cell) for cell in entry["parent_probs"]]
        entries.append(entry)
    return columns, entries


def _cells(cell: str) -> list[str]:
    if cell.startswith("["):
        try:
            cells = json.loads(cell)
        except ValueError:  # an id that begins so
            cells = None
        if isinstance(cells, list) and all(isinstance(each, str) for each in cells):
            return cells
    return cell.split("|")


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:  # told with its label by `_entry`
        return cell


def _entry(entry: Any, what: str) -> tuple[str, str, str, tuple[str, ...], tuple[float, ...]]:
    if not isinstance(entry, dict):
        name = _text(entry, what)
        return name, name, "", (), ()
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
        _probs(entry.get("parent_probs"), what),
    )


def _probs(value: Any, what: str) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if value is None:
        return ()
    if wrong := [each for each in values if type(each) not in (int, float)]:
        raise ValueError(f"parent_probs of {what} must be numbers, one a parent; got {wrong[0]!r}")
    return tuple(map(float, values))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{what} is the {type(value).__name__} {value!r}, not text; put it in quotes "
            "(YAML reads a bare no, on, 1.0 or null as something else)"
        )
    return value.strip()


def _check_keys(mapping: Mapping[Any, Any], allowed: tuple[str, ...], what: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise ValueError(
                f"{what} has the unknown key {key!r}; {closest(str(key), allowed)}"
                f"; allowed are {listed(allowed)}"
            )


def _first_duplicate(values: list[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
