"""A stand-in for a language model: instant, deterministic, for tests of everything around it."""

import hashlib
import json
import re
from collections.abc import Sequence
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
        """The first words of the text, or an empty object where a schema is asked for."""
        words = [_asked(chat).split()[:max_tokens] for chat in chats]
        texts = ["{}" if schema is not None else " ".join(some) for some in words]
        return [Reply(text, "stop") for text in texts]

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
        return Scores(log_probs + np.log(self.mass), [message if c else None for c in cut])

    def _logit(self, text: str, label: str) -> float:
        words = set(re.findall(r"\w+", text[: self.max_characters].lower()))
        overlap = len(words & set(re.findall(r"\w+", label.lower())))
        digest = hashlib.sha256(json.dumps([text, label]).encode()).digest()
        return 3.0 * overlap + self.noise * int.from_bytes(digest[:6], "big") / 2**48


def _asked(chat: Chat) -> str:
    """The last turn of the user; a reply may have been begun behind it."""
    return next(turn["content"] for turn in reversed(chat) if turn["role"] == "user")
