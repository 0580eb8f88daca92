"""A stand-in for an engine that counts what it is asked, before anything is spent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlabel.engine import Reply, Scores
from llmlabel.engine.codes import code_chat, code_orders
from llmlabel.engine.fake import instance
from llmlabel.prompt import Chat, chat_tokens

_COUNTED = 1000  # chats whose tokens are counted; those of more are estimated from these
_BYTES_PER_TOKEN = 4.0  # of UTF-8, where there is no tokenizer to count with
_TURN_TOKENS = 4  # that a chat template writes around a turn
_ANY_LENGTH = 10**9


@dataclass
class Asked:
    """What an engine was asked.

    Attributes:
        chats: Chats.
        requests: Prompts; a chat may be asked in several orders.
        prompt_tokens: Of all prompts, as if nothing were cached.
        output_tokens: At most.
        is_exact: Whether all tokens were counted, none estimated.
        first: The first prompt.
    """

    chats: int = 0
    requests: int = 0
    prompt_tokens: float = 0.0
    output_tokens: int = 0
    is_exact: bool = True
    first: Chat | None = None


class PlanEngine:
    """Answers at once that all labels are equally probable, and counts.

    Args:
        name: of the engine that it stands for.
        tokenizer: of its model; None estimates tokens from the length of the text.
        orders: in how many orders it asks each chat for letters (see `llmlabel.engine.codes`); None
            where it reads the labels themselves.
    """

    def __init__(self, name: str, *, tokenizer: Any = None, orders: int | None = None) -> None:
        self.name, self.tokenizer, self.orders = name, tokenizer, orders
        self.asked = Asked()
        self._counted = 0
        self._bytes = self._tokens = 0.0

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """Empty replies, or JSON of the schema, so that what follows can be planned too."""
        for chat in chats:
            self._count(chat, times=1, output_tokens=max_tokens)
        return [
            Reply("" if schema is None else instance(schema, chat[-1]["content"]), "stop")
            for chat in chats
        ]

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """The same probability for each label that may be answered."""
        log_probs = np.full((len(chats), len(labels)), -np.inf)
        for row, chat in enumerate(chats):
            allowed = range(len(labels)) if candidates is None else candidates[row]
            if len(allowed):
                log_probs[row, list(allowed)] = -math.log(len(allowed))
            if self.orders is None:
                self._count(chat, times=1, output_tokens=1)
            elif names := [labels[label] for label in allowed]:
                orders = code_orders(chat, names, orders=self.orders)
                asked = code_chat(chat, [names[at] for at in orders[0]])
                self._count(asked, times=len(orders), output_tokens=1)
        return Scores(log_probs, [None] * len(chats))

    def _count(self, chat: Chat, *, times: int, output_tokens: int) -> None:
        asked = self.asked
        asked.first = asked.first or chat
        asked.chats += 1
        asked.requests += times
        asked.output_tokens += times * output_tokens
        size = sum(len(turn["content"].encode()) for turn in chat)
        estimate = size / _BYTES_PER_TOKEN + _TURN_TOKENS * (len(chat) + 1)
        if self.tokenizer is None:
            tokens, asked.is_exact = estimate, False
        elif self._counted < _COUNTED:
            ids, _ = chat_tokens(self.tokenizer, chat, max_tokens=_ANY_LENGTH)
            tokens = len(ids)
            self._counted += 1
            self._bytes, self._tokens = self._bytes + size, self._tokens + tokens
        else:
            tokens, asked.is_exact = size * self._tokens / self._bytes, False
        asked.prompt_tokens += times * tokens
