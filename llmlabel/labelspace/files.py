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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmlabel.labelspace import LabelSpace, closest, listed, ontologies
from llmlabel.strictyaml import read_yaml

ENTRY_KEYS = ("id", "name", "description", "parent", "parents", "parent_probs", "path")
SEPARATOR = " > "
SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".txt", *ontologies.SUFFIXES)
_MAX_FIELD = 2**31 - 1  # characters in a CSV field; the default of the csv module is 131,072


def read(path: Path) -> Any:
    """What a label file says, as Python values for `parse`."""
    text = read_text(path)
    match suffix(path):
        case ".yaml" | ".yml":
            return read_yaml(text)
        case ".json":
            return _json(text)
        case ".jsonl":
            return read_jsonl(text)
        case ".csv":
            return _csv_entries(*read_csv(text))
        case ".txt":
            return [line.strip() for line in text.split("\n") if line.strip()]
        case kind:
            return ontologies.read(text, kind).entries


def suffix(path: Path) -> str:
    """The type of a label file, without .gz and in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_text(path: Path) -> str:
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


def parse(content: Any, *, multilabel: bool) -> LabelSpace:
    """The label space that the content of a label file describes."""
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
    ids, names, descriptions, parents, probs = zip(*entries, strict=True) if entries else ((),) * 5
    return LabelSpace(
        ids=tuple(ids),
        names=tuple(names),
        descriptions=tuple(descriptions),
        parents=tuple(parents),
        multilabel=multilabel,
        parent_probs=tuple(probs) if any(probs) else (),
    )


def write(labels: LabelSpace, path: Path) -> str:
    """The content of a file of the type that the name of `path` says.

    Raises:
        ValueError: Such a file cannot hold these labels.
    """
    match path.suffix.lower():
        case ".yaml" | ".yml":
            return str(yaml.safe_dump(_content(labels), allow_unicode=True, sort_keys=False))
        case ".json":
            return json.dumps(_content(labels), ensure_ascii=False, indent=2) + "\n"
        case ".csv":
            return _to_csv(labels, path)
        case suffix:
            raise ValueError(f"{path}: cannot save labels as {suffix!r}; use .yaml, .json or .csv")


def _content(labels: LabelSpace) -> dict[str, Any]:
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
    return {"multilabel": labels.multilabel, "labels": entries}


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
        tuple(map(float, entry.get("parent_probs", ()))),
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
                f"{what} has the unknown key {key!r}; {closest(str(key), allowed)}"
                f"; allowed are {listed(allowed)}"
            )


def _first_duplicate(values: list[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
