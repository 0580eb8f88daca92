"""The rows and labels of an extreme multi-label set, one by one, each checked on its way.

See `llmlabel.xmc` for the files.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmlabel.data import label_position
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.clean import Cleaning, clean_labels, values_of
from llmlabel.labelspace.files import suffix
from llmlabel.labelspace.sources import import_labels
from llmlabel.xmc import files
from llmlabel.xmc.files import lines, shown

SHORT = {"train": "trn", "test": "tst"}
"""Split -> what the names of its files begin with."""
_LABEL_FILES = ("lbl.json", "labels.jsonl", "Y.txt")
_SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of a surrogate pair, which JSON can say and Arrow cannot hold."""


# ---------------------------------------------------------------------------------------- finding


class PartFiles(NamedTuple):
    """Where the rows of a split are; "" is a file whose rows name their splits, or have none."""

    split: str
    rows: Path
    texts: Path | None = None
    excluded: Path | None = None

    @property
    def is_json(self) -> bool:
        """Whether it has a JSON object a line."""
        return suffix(self.rows) in (".json", ".jsonl", ".ndjson")


def find_parts(source: Path) -> list[PartFiles]:
    """The splits of a folder, or the one file."""
    if source.is_file():
        part = PartFiles("", source)
        if not part.is_json:
            raise ValueError(f"{source}: not a .jsonl file; give one, or the folder of a set")
        return [part]
    found = []
    for long, short in SHORT.items():
        rows = _find(source, f"{short}.json", f"{short}_X_Y.txt", f"{long}.txt", f"{long}.jsonl")
        if rows is not None:
            texts = _find(source, f"{short}_X.txt", f"{long}_raw_texts.txt")
            pairs = _find(source, f"{short}_filter_labels.txt", f"filter_labels_{long}.txt")
            found.append(PartFiles(long, rows, texts, pairs))
    if not found:
        raise FileNotFoundError(
            f"{source}: no trn.json, trn_X_Y.txt, train.txt or train.jsonl (nor tst..., test...; also "
            ".gz); give the folder that has them, or one .jsonl file"
        )
    return found


def _find(folder: Path, *names: str) -> Path | None:
    """The first of the files that is there, or in the sub-folder of the repository's raw texts."""
    places = (folder, folder / "raw_text")
    paths = (place / (name + end) for name in names for place in places for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


# ----------------------------------------------------------------------------------------- labels


def label_space(
    source: Path,
    path: Path | None,
    parts: list[PartFiles],
    aliases: Sequence[str],
    encodings: list[str],
) -> Cleaning:
    """Of a label file, where there is none of the numbers that the matrices say."""
    widths = {part.rows: files.header(part.rows).columns for part in parts if not part.is_json}
    path = path or _find(source, *_LABEL_FILES)
    if path is None:
        if not widths:
            raise ValueError(f"{source}: no lbl.json, labels.jsonl or Y.txt; give it as labels=")
        numbers = ({"id": f"#{n}", "name": None} for n in range(next(iter(widths.values()))))
        cleaning, path = clean_labels(numbers, multilabel=True), next(iter(widths))
    elif suffix(path) in (".txt", ".jsonl") or path.name.startswith("lbl.json"):
        cleaning = _listed_labels(path, aliases, encodings, numbered=source.is_dir())
    else:
        cleaning = import_labels(path, multilabel=True)
    for rows, width in widths.items():
        if width != len(cleaning.labels):
            raise ValueError(
                f"{rows}: line 1 says {width} labels, but {path} has {len(cleaning.labels)}; give "
                "the files of one set"
            )
    return cleaning


def _listed_labels(
    path: Path, aliases: Sequence[str], encodings: list[str], *, numbered: bool
) -> Cleaning:
    """Of a file with a label a line; where rows refer to the numbers of the lines none may go."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file")
    entries = list(_label_entries(path, aliases, encodings))
    try:
        cleaning = import_labels(entries, multilabel=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if numbered and (lost := len(entries) - len(cleaning.labels)):
        twice = [c.items[0][0] for c in cleaning.changes if c.kind == "repeated label"]
        raise ValueError(
            f"{path}: {lost} of {len(entries)} labels have no id of their own, such as "
            f"{twice[0]!r}, so that the numbers of others would shift; make ids unique"
        )
    return cleaning


def _label_entries(
    path: Path, aliases: Sequence[str], encodings: list[str]
) -> Iterator[dict[str, Any]]:
    met = {"aliases"}
    for number, line in lines(path, told=True):
        where = f"{path}: line {number}"
        if suffix(path) == ".txt":
            yield {"id": f"#{number - 1}", "name": _decoded(line, encodings, where)}
            continue
        if not line.strip():
            continue
        record = _record(line, encodings, where)
        met.update(record)
        if "uid" in record or "title" in record:
            uid = record.get("uid")
            named = {"name": record.get("title"), "description": record.get("content")}
            record = {**record, **named, "id": f"#{number - 1}" if uid in (None, "") else uid}
            record = {key: record.get(key) for key in ("id", "name", "description", *aliases)}
        others = [str(name) for key in aliases for name in values_of(record.pop(key, None))]
        if others := [name for name in dict.fromkeys(map(str.strip, others)) if name]:
            also = f"also {', '.join(others)}"
            description = record.get("description")
            record["description"] = f"{also}. {description}" if description else also
        yield record
    if absent := [key for key in aliases if key not in met]:
        raise ValueError(f"{path}: no label has {absent[0]!r}, which aliases= asks for")


# ------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """A row as it stands in a file; a label may be there twice."""

    split: str
    id: str
    text: str
    labels: list[int] | None
    """None where nobody knows them."""
    relevance: list[float]
    excluded: list[int] | None
    where: str
    has_features: bool = True


def read_rows(part: PartFiles, space: LabelSpace, encodings: list[str]) -> Iterator[Row]:
    """The rows of a part, checked one by one."""
    excluded = None if part.excluded is None else _excluded(part.excluded, len(space))
    rows = (_json_rows if part.is_json else _matrix_rows)(part, space, encodings)
    for at, row in enumerate(rows):
        for label, relevance in zip(row.labels or (), row.relevance, strict=True):
            if not 0 <= label < len(space):
                raise ValueError(
                    f"{row.where}: there is no label {label}; there are {len(space)}, numbered from "
                    "0 as in the label file"
                )
            if not 0 <= relevance <= 1:
                raise ValueError(
                    f"{row.where}: the relevance {relevance:g} of label {label} is not from 0 to 1; "
                    "divide all by the highest"
                )
        yield row if excluded is None else row._replace(excluded=excluded.pop(at, []))
    if excluded:
        raise ValueError(
            f"{part.excluded}: there is no row {max(excluded)} in {part.rows}, whose rows are "
            "numbered from 0; give the files of one set"
        )


def _excluded(path: Path, labels: int) -> dict[int, list[int]]:
    pairs = files.read_pairs(path)
    if (outside := np.flatnonzero(pairs[:, 1] >= labels)).size:
        raise ValueError(
            f"{path}: there is no label {pairs[outside[0], 1]}; there are {labels}, numbered from 0"
        )
    pairs = np.unique(pairs, axis=0)
    rows, starts = np.unique(pairs[:, 0], return_index=True)
    parts = np.split(pairs[:, 1], starts[1:])
    return {int(row): part.tolist() for row, part in zip(rows, parts, strict=bool(len(rows)))}


def _matrix_rows(part: PartFiles, space: LabelSpace, encodings: list[str]) -> Iterator[Row]:
    sparse = files.header(part.rows).features is not None
    texts = None if part.texts is None else lines(part.texts)
    for at, (number, line) in enumerate(files.matrix_lines(part.rows, told=True)):
        where, text = f"{part.rows}: line {number}", ""
        if texts is not None:
            found = next(texts, None)
            if found is None:
                raise ValueError(
                    f"{part.texts} has {at} lines, but {part.rows} has more rows; give the files of "
                    "one set"
                )
            text = _decoded(found[1], encodings, f"{part.texts}: line {found[0]}")
        if sparse:
            labels, features = files.labels_and_features(line, where)
            relevance = [1.0] * len(labels)
        else:
            labels, relevance = files.relevances(line, where)
            features = b"of another file"
        id = f"{part.split}-{at}"
        yield Row(part.split, id, text, labels, relevance, None, where, bool(features))
    for number, rest in texts or ():
        if rest.strip():
            raise ValueError(
                f"{part.texts}: line {number}: {shown(rest)} is after the last row of {part.rows}; "
                "give the files of one set"
            )


def _json_rows(part: PartFiles, space: LabelSpace, encodings: list[str]) -> Iterator[Row]:
    known: dict[str, int] = {}
    at, named = -1, False
    for at, (number, line) in enumerate(lines(part.rows, told=True)):
        if not line.strip():
            continue
        where = f"{part.rows}: line {number}"
        record = _record(line, encodings, where)
        split = part.split or record.get("split", "all")
        if not (isinstance(split, str) and re.fullmatch(r"\w[\w.-]*", split)):
            raise ValueError(f"{where}: split {split!r} is no plain word, such as train")
        named = named or "text" in record or "title" in record
        id = record.get("id")
        id = record.get("uid") if id is None else id
        labels = _positions(record, space, known, where)
        yield Row(
            split=split,
            id=f"{split}-{at}" if id is None else str(id),
            text=_text(record, where),
            labels=labels,
            relevance=_relevance(record, labels or [], where),
            excluded=None,
            where=where,
        )
    if at >= 0 and not named:
        raise ValueError(
            f"{part.rows}: no row has a `text` or a `title`; rename the key of the texts"
        )


def _positions(
    record: Mapping[str, Any], space: LabelSpace, known: dict[str, int], where: str
) -> list[int] | None:
    """The labels of a row; `known` keeps where names and ids were found."""
    if (given := record.get("labels", record.get("target_ind"))) is None:
        return None
    if not isinstance(given, list):
        raise ValueError(f"{where}: the labels are {given!r}; write a list of them")
    if "labels" not in record:
        if wrong := [label for label in given if type(label) is not int]:
            raise ValueError(f"{where}: {wrong[0]!r} in target_ind is no number of a label")
        return given
    for label in given:
        if not isinstance(label, str) or label not in known:
            try:
                known[label] = label_position(label, space)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    return [known[label] for label in given]


def _relevance(record: Mapping[str, Any], labels: list[int], where: str) -> list[float]:
    given = record.get("target_rel")
    if given is None:
        return [1.0] * len(labels)
    if not isinstance(given, list) or len(given) != len(labels):
        raise ValueError(
            f"{where}: {len(labels)} labels, but target_rel is {given!r}; one for each"
        )
    if wrong := [value for value in given if type(value) not in (int, float)]:
        raise ValueError(f"{where}: {wrong[0]!r} in target_rel is no number")
    return [float(value) for value in given]


def _text(record: Mapping[str, Any], where: str) -> str:
    """The text, or title and content in lines of their own."""
    parts = []
    for key in ("text",) if "text" in record else ("title", "content"):
        value = record.get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"{where}: {key} is {value!r}, no text; put it in quotes")
        parts.append(value or "")
    return "\n".join(part for part in parts if part)


def _record(line: bytes, encodings: list[str], where: str) -> dict[str, Any]:
    text = _decoded(line, encodings, where)
    try:
        record = json.loads(text)
        if "\\u" in text:
            record = json.loads(_SURROGATES.sub("\ufffd", json.dumps(record, ensure_ascii=False)))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}; write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {shown(line)} is no JSON object; write {{...}}")
    return record


def _decoded(line: bytes, encodings: list[str], where: str) -> str:
    for encoding in encodings:
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            wrong = error
    raise ValueError(
        f"{where}: the byte 0x{line[wrong.start]:02x} at byte {wrong.start} is not "
        f"{' or '.join(encodings)}; say what it is, for example encoding: [utf-8, cp1252]"
    )
