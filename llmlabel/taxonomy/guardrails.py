"""What a proposal of labels has to keep to, and the errors that say what it does not."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

WORD_CHARACTERS = 8
"""A limit of words is held to as so many characters a word, which a schema can say."""
_ONE_OF_MANY = 0.05
"""Share of the letters of the texts that makes a script one of theirs."""

_ECHOES = {
    *("", "name", "label", "labels", "label name", "name of the label", "category"),
    *("category name", "cluster name", "topic name", "short name", "example", "string", "text"),
    *("description", "definition"),
}
_VAGUE = {
    *("other", "others", "misc", "miscellaneous", "general", "generic", "various", "unknown"),
    *("undefined", "uncategorized", "unclassified", "none", "n/a", "na", "everything", "rest"),
}
_EMPTY_WORDS = {
    *("topic", "topics", "issue", "issues", "question", "questions", "text", "texts", "category"),
    *("categories", "label", "labels", "inquiry", "inquiries", "request", "requests", "of", "the"),
    *("and", "or", "else", "above", "information"),
}


class TaxonomyError(ValueError):
    """No taxonomy came of a step; says which, why, how the last reply began, and the way out."""


class ReplyError(ValueError):
    """A reply that is refused, in words.

    Attributes:
        distinct: what is left when repeated names are taken once, where nothing else was wrong.
    """

    def __init__(self, problem: str, distinct: "Proposal | None" = None) -> None:
        super().__init__(problem)
        self.distinct = distinct


@dataclass(frozen=True)
class Proposal:
    """The labels of a reply, and what it says about those that it was shown."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    score: int | None = None
    suggestions: str | None = None
    explanation: str | None = None

    def table(self) -> str:
        """JSON, one label a line, for a prompt."""
        pairs = zip(self.names, self.descriptions, strict=True)
        lines = [json.dumps({"name": n, "description": d}, ensure_ascii=False) for n, d in pairs]
        return "\n".join(lines)


@dataclass(frozen=True)
class Limits:
    """What labels have to keep to.

    Attributes:
        max_labels: how many there may be.
        name_words: length of a name, in words of 8 characters.
        description_words: length of a description.
        scripts: of the texts, see `scripts_of`.
        taken: names of the labels above, which no label below may have.
        example: name and description of the label that the prompt shows as an example.
    """

    max_labels: int
    name_words: int
    description_words: int
    scripts: frozenset[str]
    taken: tuple[str, ...] = ()
    example: tuple[str, str] | None = None


def scripts_of(texts: Iterable[str]) -> frozenset[str]:
    """The scripts, as the first word of Unicode's character names, of 5 % or more of the letters."""
    counts = _letters(texts)
    return frozenset(s for s, n in counts.items() if n >= _ONE_OF_MANY * counts.total())


def foreign_script(texts: Iterable[str], scripts: frozenset[str]) -> str | None:
    """Says so when less than half of the letters are of one of the scripts.

    That tells an answer in Chinese about English texts, not one in French: nothing that needs no
    data of its own does.
    """
    counts = _letters(texts)
    own = sum(count for script, count in counts.items() if script in scripts)
    if not scripts or 2 * own >= counts.total():
        return None
    most = max(counts, key=lambda script: (counts[script], script))
    return f"written in {most.lower()} script, but the texts are in {_listed(scripts)}"


def _letters(texts: Iterable[str]) -> Counter[str]:
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    found: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            found[unicodedata.name(character, "UNKNOWN").split()[0]] += count
    return found


def _listed(scripts: frozenset[str]) -> str:
    return " and ".join(script.lower() for script in sorted(scripts))


def count_problems(proposal: Proposal, limits: Limits) -> list[str]:
    """What is wrong with the number of labels."""
    count = len(proposal.names)
    if count > limits.max_labels:
        return [f"{count} labels, at most {limits.max_labels} were asked"]
    return ["one label only, and a choice needs two"] if count < 2 else []


def label_problems(proposal: Proposal, limits: Limits) -> list[str]:
    """What is wrong with each label on its own."""
    problems = []
    taken = {name.casefold() for name in limits.taken}
    most, most_described = (
        words * WORD_CHARACTERS for words in (limits.name_words, limits.description_words)
    )
    for name, description in zip(proposal.names, proposal.descriptions, strict=True):
        if not any(character.isalpha() for character in name):
            problems.append(f"the name {name!r} has no letter")
        elif is_echo(name):
            problems.append(f"the name {name!r} is that of the format example")
        elif is_vague(name):
            problems.append(f"the name {name!r} says nothing")
        elif name.casefold() in taken:
            problems.append(f"the name {name!r} is that of a label above")
        if limits.example and _same((name, description), limits.example):
            problems.append(f"the label {name!r} is that of the example")
        if len(name) > most:
            problems.append(f"the name {name[:40]!r}... is longer than {limits.name_words} words")
        if len(description) > most_described:
            words = limits.description_words
            problems.append(f"the description of {name[:40]!r} is longer than {words} words")
    return problems


def without_example(proposal: Proposal, limits: Limits) -> Proposal:
    """Takes away a description that is only that of the example; a weak model repeats it."""
    if limits.example is None:
        return proposal
    echoed = limits.example[1].casefold()
    own = zip(proposal.names, proposal.descriptions, strict=True)
    kept = [
        "" if text.casefold() == echoed and not _same((name, text), limits.example) else text
        for name, text in own
    ]
    return replace(proposal, descriptions=tuple(kept))


def _same(one: tuple[str, str], other: tuple[str, str]) -> bool:
    return [text.casefold() for text in one] == [text.casefold() for text in other]


def is_echo(name: str) -> bool:
    """Whether a name is a placeholder of a format example, such as `category name`."""
    return re.sub(r"[^\w\s]|_", " ", name).strip().casefold() in _ECHOES


def is_vague(name: str) -> bool:
    """Whether a name is one for what is left over, such as `Other topics` or `General`."""
    words = re.findall(r"n/a|\w+", name.casefold())
    return not _VAGUE.isdisjoint(words) and _EMPTY_WORDS.issuperset(set(words) - _VAGUE)


def repeats(proposal: Proposal) -> tuple[list[str], Proposal]:
    """Names that come again, and the proposal with each once."""
    first: dict[str, int] = {}
    again = []
    for number, name in enumerate(proposal.names):
        if first.setdefault(name.casefold(), number) != number:
            again.append(name)
    kept = list(first.values())
    distinct = replace(
        proposal,
        names=tuple(proposal.names[i] for i in kept),
        descriptions=tuple(proposal.descriptions[i] for i in kept),
    )
    return list(dict.fromkeys(again)), distinct


def first_words(text: str, words: int) -> str:
    """The first words of a text on one line; where nothing stands between them, as many characters.

    Twice the `WORD_CHARACTERS` a word, so that long words of spaced scripts stay whole.
    """
    return " ".join(text.split(maxsplit=words)[:words])[: 2 * words * WORD_CHARACTERS]
