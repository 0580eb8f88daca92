"""Replies that are sets of labels: `a; b`, in any order, no label twice.

PTEC's text-to-text baseline (arXiv 2309.12075) decodes label sets along a trie of the labels' tokens.
Here a prefix alone says what may come next, so that beams can be split, dropped and sorted at will,
and whatever order a model has learned is allowed.

Differs from the paper: a label used up is masked, not deleted from a copy of the trie; a separator is
what the tokenizer makes of it before each label, not one token of a fixed number; replies are read by
the labels' tokens, not by looking for names, which other names may contain.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmlabel.engine.labeltrie import LabelTrie

_State = tuple[int, int, frozenset[int]]
"""Which trie (0 of a first label, 1 of a further one), the node there, and the labels before."""


@dataclass(frozen=True, eq=False)
class LabelSets:
    """The language of all sets of 1 to `most` labels.

    Args:
        labels: as they are written; none may contain the separator.
        separator: between two labels.
        end: the token that ends a reply.
        first: of each label as the first of a reply, the tokens.
        further: of each label after another one, the tokens, the separator's among them.
        most: labels of a set at most; as many as there are when left out.

    Raises:
        ValueError: a reply could be read as two different sets.
    """

    labels: tuple[str, ...]
    separator: str
    end: int
    first: tuple[tuple[int, ...], ...]
    further: tuple[tuple[int, ...], ...]
    most: int | None = None
    _tries: tuple["_Trie", "_Trie"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks what makes replies readable."""
        if not self.labels:
            raise ValueError("a label set needs labels, and there are none")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most, the labels of a set, must be at least 1; got {self.most}")
        for label in self.labels:
            if (label + self.separator).find(self.separator) != len(label):
                raise ValueError(
                    f"label {label!r} and the separator {self.separator!r} cannot be told apart; "
                    "give another separator"
                )
        tries = (
            _Trie(LabelTrie.of([[*ids, self.end] for ids in self.first])),
            _Trie(LabelTrie.of([[*ids, self.end] for ids in self.further])),
        )
        object.__setattr__(self, "_tries", tries)

    def encode(self, labels: Sequence[int]) -> list[int]:
        """The tokens of a reply, with the end.

        Raises:
            ValueError: such a set is none of this language.
        """
        if not 1 <= len(labels) <= self._limit or len(set(labels)) < len(labels):
            raise ValueError(
                f"{list(labels)} is no set of 1 to {self._limit} labels; leave such a row out"
            )
        parts = [self.first[labels[0]], *(self.further[label] for label in labels[1:])]
        return [token for part in parts for token in part] + [self.end]

    def write(self, labels: Sequence[int]) -> str:
        """The reply as text."""
        return self.separator.join(self.labels[label] for label in labels)

    def parse(self, text: str) -> list[int]:
        """The labels of a reply, ascending.

        Raises:
            ValueError: it is no reply of this language.
        """
        number = {label: position for position, label in enumerate(self.labels)}
        parts = text.split(self.separator)
        if unknown := [part for part in parts if part not in number]:
            raise ValueError(f"reply {text!r}: {unknown[0]!r} is no label")
        if len(set(parts)) < len(parts):
            raise ValueError(f"reply {text!r}: a label stands there twice")
        if len(parts) > self._limit:
            raise ValueError(
                f"reply {text!r}: {len(parts)} labels, at most {self._limit} are allowed"
            )
        return sorted(number[part] for part in parts)

    def read(self, tokens: Sequence[int]) -> list[int]:
        """The labels of a reply's tokens up to the end, ascending.

        Raises:
            ValueError: they are no reply of this language, or one that was cut.
        """
        tokens = list(tokens)
        if self.end not in tokens:
            raise ValueError(f"the {len(tokens)} tokens of this label set do not come to an end")
        states = self._states(tokens[: tokens.index(self.end)])
        found = {
            used | {label}
            for which, node, used in states
            for label in self._ended(which, node, used)
        }
        if len(found) != 1:
            raise ValueError(f"the tokens {tokens[:8]} ... are no label set, or several")
        return sorted(found.pop())

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """The tokens that may follow those of a reply that has begun, ascending.

        After the end, and after what no reply begins with (a beam that is lost already), that is the
        end again: transformers asks there too.
        """
        found: set[int] = set()
        for which, node, used in self._states(prefix):
            trie = self._tries[which]
            found |= {t for t, child in trie.children[node].items() if trie.is_open(child, used)}
            for label in self._ended(which, node, used):
                found.add(self.end)
                found |= self._begun(used | {label})
        return sorted(found or {self.end})

    def prefix_allowed_tokens_fn(self, prompt_tokens: int) -> Callable[[int, Any], list[int]]:
        """For `transformers`' generate; `prompt_tokens` stand before a reply."""
        return lambda batch, ids: self.allowed(ids[prompt_tokens:].tolist())

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest reply, with the end; with so many new tokens none is cut."""
        further = sorted(map(len, self.further), reverse=True)
        return max(map(len, self.first)) + sum(further[: self._limit - 1]) + 1

    def grammar(self) -> str:
        """The same language for llguidance and for vLLM's structured outputs (backend `guidance`).

        The intersection with "not this label twice" keeps it linear in the labels; llguidance 1.9
        takes it for about a hundred of them, `allowed` for any number.
        """
        one = "(" + "|".join(_quoted(label) for label in self.labels) + ")"
        sep = _quoted(self.separator)
        more = f"{{0,{self._limit - 1}}}"
        lines = [f"start: SET\nSET: /{one}({sep}{one}){more}/"]
        for label in self.labels:
            own = _quoted(label)
            twice = f"((.|\\n)*{sep})?{own}{sep}((.|\\n)*{sep})?{own}({sep}(.|\\n)*)?"
            lines.append(f"  & ~/{twice}/")
        return "".join(lines)

    @property
    def _limit(self) -> int:
        return min(self.most or len(self.labels), len(self.labels))

    def _states(self, prefix: Sequence[int]) -> set[_State]:
        """All that a prefix can be: a token may go on in a label or end it (`no`, `no; not`)."""
        states: set[_State] = {(0, 0, frozenset())}
        for token in prefix:
            after: set[_State] = set()
            for which, node, used in states:
                trie = self._tries[which]
                child = trie.children[node].get(token)
                if child is not None and trie.is_open(child, used):
                    after.add((which, child, used))
                for label in self._ended(which, node, used):
                    if token in self._begun(used | {label}):
                        after.add((1, self._tries[1].children[0][token], used | {label}))
            states = after
        return states

    def _ended(self, which: int, node: int, used: frozenset[int]) -> list[int]:
        """The label that may end at a node, if any."""
        label = self._tries[which].ends.get(node)
        return [] if label is None or label in used else [label]

    def _begun(self, used: frozenset[int]) -> set[int]:
        """Tokens with which a further label begins."""
        if len(used) >= self._limit:
            return set()
        trie = self._tries[1]
        return {t for t, child in trie.children[0].items() if trie.is_open(child, used)}


class _Trie:
    """Tokens to nodes, and how many labels lie behind each."""

    def __init__(self, trie: LabelTrie) -> None:
        self.children: list[dict[int, int]] = [{} for _ in trie.tokens]
        parents = trie.parents.tolist()
        for node, token in enumerate(trie.tokens.tolist()):
            if node:
                self.children[parents[node]][token] = node
        self.ends = {node: label for label, node in enumerate(trie.last_node.tolist())}
        self.above: list[list[int]] = []
        self.behind = [0] * len(parents)
        for node in trie.last_node.tolist():
            path = [node]
            while path[-1]:
                path.append(parents[path[-1]])
            self.above.append(path)
            for step in path:
                self.behind[step] += 1

    def is_open(self, node: int, used: frozenset[int]) -> bool:
        """Whether a label lies behind a node that is not used yet."""
        return self.behind[node] > sum(node in self.above[label] for label in used)


def label_sets(
    tokenizer: Any,
    labels: Sequence[str],
    *,
    before: str = "",
    separator: str = "; ",
    most: int | None = None,
) -> LabelSets:
    """The sets of labels as a tokenizer writes them, each set ended by its end-of-text token.

    Args:
        tokenizer: of the model.
        labels: see `LabelSets`, as for the last two.
        before: the end of the prompt, which tells how a first label is tokenized.
        separator: see there.
        most: see there.

    Raises:
        ValueError: a reply could be read as two different sets, or the tokenizer has no end of text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, which ends a label set")
    first = [_after(tokenizer, before, label) for label in labels]
    # What stands before a separator is another label: of all, the first stands for them.
    further = [_after(tokenizer, labels[0], separator + label) for label in labels]
    return LabelSets(
        tuple(labels), separator, tokenizer.eos_token_id, tuple(first), tuple(further), most
    )


def _after(tokenizer: Any, before: str, text: str) -> tuple[int, ...]:
    """The tokens of a text behind another, or by itself where the two have a token in common."""
    start = list(tokenizer(before, add_special_tokens=False).input_ids) if before else []
    whole = list(tokenizer(before + text, add_special_tokens=False).input_ids)
    if whole[: len(start)] == start:
        return tuple(whole[len(start) :])
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _quoted(text: str) -> str:
    """For a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")
