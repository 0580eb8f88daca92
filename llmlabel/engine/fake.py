"""A stand-in for a language model: instant, deterministic, for tests of everything around it."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmlabel.engine import Reply, Scores
from llmlabel.prompt import Chat


class FakeEngine:
    """Prefers labels whose words stand in the text; the rest is noise from a hash.

    Args:
        noise: size of the hash noise in nats.
        mass: probability that the reply is a label at all.
        max_characters: longer texts are reported as cut.
    """

    def __init__(
        self, *, noise: float = 1.0, mass: float = 0.9, max_characters: int = 10_000
    ) -> None:
        self.noise, self.mass, self.max_characters = noise, mass, max_characters
        self.name = f"fake:noise={noise}:mass={mass}:{max_characters}"

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """The first words of the text, or JSON of the schema with words of the text in it."""
        replies = []
        for chat in chats:
            words = _asked(chat).split()
            if schema is None:
                text = " ".join(words[:max_tokens])
            else:
                text = instance(schema, _asked(chat))
            replies.append(Reply(text, "stop"))
        return replies

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Log-probabilities from word overlap and a hash of text and label."""
        rows = [[self._logit(_asked(chat), label) for label in labels] for chat in chats]
        logits = np.array(rows, dtype=np.float64).reshape(len(chats), len(labels))
        if candidates is not None:
            for row, some in zip(logits, candidates, strict=True):
                row[np.setdiff1d(np.arange(len(labels)), some)] = -np.inf
        log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        cut = [len(_asked(chat)) > self.max_characters for chat in chats]
        message = f"text cut: the limit is {self.max_characters} characters"
        sizes = [sum(len(turn["content"].split()) for turn in chat) for chat in chats]
        return Scores(
            log_probs + np.log(self.mass), [message if c else None for c in cut], None, sizes
        )

    def _logit(self, text: str, label: str) -> float:
        words = set(re.findall(r"\w+", text[: self.max_characters].lower()))
        overlap = len(words & set(re.findall(r"\w+", label.lower())))
        digest = hashlib.sha256(json.dumps([text, label]).encode()).digest()
        return 3.0 * overlap + self.noise * int.from_bytes(digest[:6], "big") / 2**48


def instance(schema: dict[str, Any], text: str) -> str:
    """Small JSON of a schema with the words of a text in it: two items where they are allowed."""
    said = dict.fromkeys(re.findall(r"[^\W\d_]+", text))
    more = (f"word {number}" for number in itertools.count(1))
    return json.dumps(_instance(schema, itertools.chain(said, more)))


def _instance(schema: dict[str, Any], words: Iterator[str]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {name: _instance(part, words) for name, part in properties.items()}
        case "array":
            count = max(schema.get("minItems", 0), min(2, schema.get("maxItems", 2)))
            return [_instance(schema["items"], words) for _ in range(count)]
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return True
        case "null":
            return None
    return next(words)[: schema.get("maxLength")]


def _asked(chat: Chat) -> str:
    """The last turn of the user; a reply may have been begun behind it."""
    return next(turn["content"] for turn in reversed(chat) if turn["role"] == "user")
