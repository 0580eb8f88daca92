"""What a language model may answer when it is asked for labels: schemas, and a parser."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmlabel.taxonomy.guardrails import (
    WORD_CHARACTERS,
    Limits,
    Proposal,
    ReplyError,
    count_problems,
    foreign_script,
    is_echo,
    label_problems,
    repeats,
    without_example,
)

_TOKEN_CHARACTERS = 4
_SPARE_TOKENS = 384
"""Room of a reply: its characters at four a token, and some more for numbers and rare words."""

_HEADING = re.compile(
    r"[\s#*_]*(?:\d+[.)]\s*)?[*_]*(?:"
    r"(?P<remark>score|rating|explanation|reason|suggestions?)[*_]*\s*(?:[:=][*_]*\s*(?P<rest>.*)|)"
    r"|(?:(?:the|updated|revised|final|new)\s+)*"
    r"(?:labels?|taxonomy|table|categories|clusters?)[*_]*\s*:?[*_]*\s*)$",
    re.IGNORECASE,
)
_ITEM = re.compile(r"(?P<indent>\s*)(?P<mark>[-*\u2022+]|\d+[.)])\s+(?P<said>.+)$")
_FENCE = re.compile(r"^\s*```\w*[ \t]*\n|\n\s*```\s*$")
_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*$")


# ----------------------------------------------------------------------------------- schemas


def label_schema(limits: Limits) -> dict[str, Any]:
    """A label."""
    return _object(
        name=text_schema(limits.name_words), description=text_schema(limits.description_words)
    )


def labels_schema(limits: Limits, *, rated: bool, words: int) -> dict[str, Any]:
    """Labels; where `rated`, after a judgement of the ones shown. Remarks have up to `words`."""
    many = {
        "type": "array",
        "items": label_schema(limits),
        "minItems": 2,
        "maxItems": limits.max_labels,
    }
    if not rated:
        return _object(labels=many, explanation=text_schema(words))
    return _object(
        score={"type": "integer", "minimum": 0, "maximum": 100},
        explanation=text_schema(words),
        suggestions=text_schema(words),
        labels=many,
    )


def summary_schema(words: int) -> dict[str, Any]:
    """A summary of about so many words at most."""
    return _object(summary=text_schema(words))


def text_schema(words: int) -> dict[str, Any]:
    """A text of about so many words at most."""
    return {"type": "string", "minLength": 1, "maxLength": words * WORD_CHARACTERS}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def reply_tokens(schema: dict[str, Any]) -> int:
    """Room for the longest reply of a schema."""
    return math.ceil(_most_characters(schema) / _TOKEN_CHARACTERS) + _SPARE_TOKENS


def _most_characters(schema: dict[str, Any]) -> int:
    match schema["type"]:
        case "string":
            return int(schema["maxLength"]) + 2
        case "integer":
            return 6
        case "array":
            return int(schema["maxItems"]) * (_most_characters(schema["items"]) + 2)
        case _:
            parts = schema["properties"].items()
            return sum(len(key) + 6 + _most_characters(part) for key, part in parts) + 4


# ------------------------------------------------------------------------------------ reading


def read_labels(text: str, limits: Limits) -> Proposal:
    """The labels of a reply that keeps to the limits.

    It may be JSON as in `labels_schema` (in a fence, between remarks, or the bare list), a Markdown
    table, or a list of `name: description`. Under a heading such as `Suggestions:` nothing is a
    label.

    Raises:
        ReplyError: it is none of these, or breaks a limit.
    """
    proposal = parse_labels(text, limits)
    problems = [*count_problems(proposal, limits), *label_problems(proposal, limits)]
    if foreign := foreign_script([*proposal.names, *proposal.descriptions], limits.scripts):
        problems.append(foreign)
    repeated, distinct = repeats(proposal)
    if repeated and len(distinct.names) < 2:
        problems.append("fewer than 2 different labels")
    if repeated:
        said = ", ".join(map(repr, repeated))
        raise ReplyError(
            "; ".join([*problems, f"repeated: {said}"]), None if problems else distinct
        )
    if problems:
        raise ReplyError("; ".join(problems))
    return proposal


def read_label(text: str, limits: Limits) -> Proposal:
    """The one label of a reply; see `read_labels`.

    Raises:
        ReplyError: as there.
    """
    objects = [one for one in json_values(text) if isinstance(one, dict) and "name" in one]
    found = [one for one in objects if not is_echo(str(one["name"]))] or objects
    proposal = _entries(found[-1:], limits) if found else parse_labels(text, limits)
    proposal = replace(proposal, names=proposal.names[:1], descriptions=proposal.descriptions[:1])
    proposal = without_example(proposal, limits)
    problems = label_problems(proposal, limits)
    if foreign := foreign_script([*proposal.names, *proposal.descriptions], limits.scripts):
        problems.append(foreign)
    if problems:
        raise ReplyError("; ".join(problems))
    return proposal


def read_summary(text: str, *, words: int, scripts: frozenset[str]) -> str:
    """The summary of a reply: JSON `{"summary": ...}`, or the whole reply.

    Raises:
        ReplyError: it is empty, too long, or not in the script of its text.
    """
    objects = [one for one in json_values(text) if isinstance(one, dict)]
    said = next((one["summary"] for one in objects if "summary" in one), None)
    if said is None and text.lstrip()[:1] in ("{", "["):
        raise ReplyError("no JSON with a summary")
    summary = text if said is None else said
    if not isinstance(summary, str):
        raise ReplyError(f"the summary is the {type(summary).__name__} {summary!r}, not text")
    summary = _whole_words(_one_line(summary), words)
    if not any(character.isalnum() for character in summary):
        raise ReplyError("the summary is empty")
    if len(summary) > words * WORD_CHARACTERS:
        raise ReplyError(f"a summary of {len(summary.split())} words, at most {words} were asked")
    if foreign := foreign_script([summary], scripts):
        raise ReplyError(foreign)
    return summary


def parse_labels(text: str, limits: Limits) -> Proposal:
    """The labels of a reply in any of the forms of `read_labels`, whatever limits they break.

    Raises:
        ReplyError: it has none of these forms.
    """
    text = _FENCE.sub("", text)
    values = list(json_values(text))
    lists = [_as_lists(value, whole=text.lstrip()[:1] == "[") for value in values]
    found = [(value, some) for value, some in zip(values, lists, strict=True) if some is not None]
    real = [(value, some) for value, some in found if not all(map(_echoes, some))]
    real = [one for one in real if isinstance(one[0], dict)] or real
    if real:
        value, some = real[-1]
        return _remarks(_entries(some, limits), value)
    if found:
        raise ReplyError("the format example was repeated instead of filled in")
    if text.lstrip()[:1] in ("{", "["):
        end = "JSON without a list of labels" if values else "the JSON is broken or ends too early"
        raise ReplyError(end)
    return _from_lines(text, limits)


def json_values(text: str) -> Iterator[Any]:
    """Every outermost JSON object or list in a text, in order."""
    decoder, at = json.JSONDecoder(), 0
    while found := re.compile(r"[{\[]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            if found.start() == len(text) - len(text.lstrip()):
                return  # what is inside broken JSON is no answer
            at = found.start() + 1
            continue
        yield value


def _as_lists(value: Any, *, whole: bool) -> list[Any] | None:
    """The labels of a JSON value; a bare list that is not the `whole` reply may be a remark."""
    if isinstance(value, dict):
        some = value.get("labels")
    else:
        named = all(isinstance(one, dict) and "name" in one for one in value)
        some = value if whole or named else None
    return some if isinstance(some, list) and some else None


def _echoes(entry: Any) -> bool:
    return is_echo(str(entry.get("name", "")) if isinstance(entry, dict) else str(entry))


def _entries(entries: Sequence[Any], limits: Limits) -> Proposal:
    names, descriptions = [], []
    for number, entry in enumerate(entries, start=1):
        label = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(label, dict) or not isinstance(label.get("name"), str):
            raise ReplyError(f"label {number} has no name: {json.dumps(entry)[:80]}")
        description = label.get("description")
        if not isinstance(description, str | None):
            raise ReplyError(f"the description of label {number} is no text: {description!r}")
        names.append(_whole_words(_one_line(label["name"]), limits.name_words))
        described = _one_line(description or "")
        descriptions.append(_whole_words(described, limits.description_words))
    return Proposal(tuple(names), tuple(descriptions))


def _remarks(proposal: Proposal, said: Any) -> Proposal:
    said = said if isinstance(said, dict) else {}
    score, suggestions, explanation = (
        said.get(key) for key in ("score", "suggestions", "explanation")
    )
    rated = isinstance(score, int) and not isinstance(score, bool) and 0 <= score <= 100
    return replace(
        proposal,
        score=score if rated else None,
        suggestions=_one_line(suggestions) if isinstance(suggestions, str) else None,
        explanation=_one_line(explanation) if isinstance(explanation, str) else None,
    )


def _from_lines(text: str, limits: Limits) -> Proposal:
    """A table or a list; what stands under a heading is told apart."""
    section, entries, said = "labels", list[dict[str, str]](), dict[str, list[str]]()
    columns: tuple[int, int | None] | None = None
    first: re.Match[str] | None = None  # of the list of labels
    lines = text.split("\n")
    for number, line in enumerate(lines):
        item = _ITEM.match(line)
        heading = _HEADING.match(line)
        if heading and not (item and first and _goes_on(first, lines[number + 1 :])):
            section = _section(heading["remark"] or "")
            said.setdefault(section, []).append(heading["rest"] or "")
        elif section != "labels":
            said[section].append(line)
        elif "|" in line and not _RULE.match(line):
            below = lines[number + 1] if number + 1 < len(lines) else ""
            if "|" in below and _RULE.match(below):
                columns = _columns(_cells(line), again=bool(entries))
            elif columns is not None:
                entries.append(_row(_cells(line), columns))
        elif item:
            name, description = _parted(item["said"])
            if first is not None and len(item["indent"]) > len(first["indent"]):
                entries[-1]["description"] = entries[-1]["description"] or description or name
            else:
                first = first or item
                entries.append({"name": name, "description": description})
    return _told(entries, said, limits)


def _goes_on(first: re.Match[str], below: list[str]) -> bool:
    """Whether the list that began with an item has more items below that are no heading."""
    kind = first["mark"][0].isdigit()
    items = [item for line in below if (item := _ITEM.match(line)) and not _HEADING.match(line)]
    return any(
        item["mark"][0].isdigit() == kind and item["indent"] == first["indent"] for item in items
    )


def _told(entries: list[dict[str, str]], said: dict[str, list[str]], limits: Limits) -> Proposal:
    if not entries:
        raise ReplyError("neither JSON, nor a Markdown table, nor a list of `name: description`")
    if all(map(_echoes, entries)):
        raise ReplyError("the format example was repeated instead of filled in")
    score = re.search(r"\d+", " ".join(said.get("score", ())))
    remarks = {
        "score": int(score[0]) if score else None,
        **{key: "\n".join(part) for key, part in said.items() if key != "score"},
    }
    return _remarks(_entries(entries, limits), remarks)


def _section(word: str) -> str:
    word = word.casefold()
    if word in ("score", "rating"):
        return "score"
    if word in ("explanation", "reason"):
        return "explanation"
    return "suggestions" if word.startswith("suggestion") else "labels"


def _cells(line: str) -> list[str]:
    return [_plain(cell) for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _columns(header: list[str], *, again: bool) -> tuple[int, int | None] | None:
    """Where names and descriptions stand in a table; one that comes `again` may have no labels."""
    words = [cell.casefold() for cell in header]
    if again and not any(re.search("name|label|category|cluster|topic", word) for word in words):
        return None
    about = next(
        (i for i, w in enumerate(words) if re.search("descri|definition|meaning", w)), None
    )
    free = [i for i in range(len(words)) if i != about]
    named = [i for i in free if re.search("name|label|category|cluster|topic", words[i])]
    named = [i for i in named if not re.search(r"\bid\b", words[i])] or [
        i for i in free if words[i] not in ("", "id", "#", "no", "no.", "number")
    ]
    name = (named or free or [0])[0]
    if about is None and name + 1 < len(words):
        about = name + 1
    return name, about


def _row(cells: list[str], columns: tuple[int, int | None]) -> dict[str, str]:
    name, about = columns
    return {
        "name": cells[name] if name < len(cells) else "",
        "description": cells[about] if about is not None and about < len(cells) else "",
    }


def _parted(item: str) -> tuple[str, str]:
    """Name and description of a list item."""
    parts = re.split(r":\s+|\s+[\u2013\u2014-]\s+|:$", _plain(item), maxsplit=1)
    return parts[0].strip(), parts[1].strip() if len(parts) > 1 else ""


def _plain(text: str) -> str:
    return re.sub(r"\*\*|__|`", "", text).strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _whole_words(text: str, words: int) -> str:
    """Without the broken word at the end of a text that a schema stopped."""
    if len(text) != words * WORD_CHARACTERS or " " not in text:
        return text
    return text.rpartition(" ")[0].rstrip(" ,;:-")
