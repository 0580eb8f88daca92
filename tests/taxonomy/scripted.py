"""An engine that says what a script tells it, step by step of TnT-LLM."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmlabel.engine import Reply, Scores
from llmlabel.prompt import Chat

STEPS = {
    "You find out": "generate",
    "You improve": "update",
    "You check": "review",
    "You shorten": "summarise",
    "Several sets": "select",
}


def step_of(chat: Chat) -> str:
    return next(step for start, step in STEPS.items() if chat[0]["content"].startswith(start))


def reply(*names: str, score: int = 50) -> str:
    many = [{"name": name, "description": f"about {name}"} for name in names]
    said = {"score": score, "explanation": "why", "suggestions": "what", "labels": many}
    return json.dumps(said)


class Scripted:
    """Says what `says` makes of the step and the number of the chat at that step."""

    name = "scripted"

    def __init__(
        self,
        says: Callable[[str, int], str | Reply] = lambda step, n: reply("one", f"{step} {n}"),
        *,
        holds: bool = True,
        dies_after: float = math.inf,
        prefers: Callable[[str], float] = lambda table: 0.0,
    ) -> None:
        self.says, self.holds, self.dies_after, self.prefers = says, holds, dies_after, prefers
        self.asked = list[dict[str, Any]]()
        self.calls = 0

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        if schema is not None and not self.holds:
            raise ValueError("no schema here")
        if self.calls >= self.dies_after:
            raise ConnectionError("the server is gone")
        self.calls += 1
        replies = []
        for chat in chats:
            step = step_of(chat)
            number = len([one for one in self.asked if one["step"] == step])
            self.asked.append(
                {
                    "step": step,
                    "system": chat[0]["content"],
                    "texts": re.findall(r"^- (.*)$", chat[1]["content"], re.MULTILINE),
                    "user": chat[1]["content"],
                    "temperature": temperature,
                    "seed": seed,
                    "schema": schema,
                }
            )
            said = self.says(step, number)
            replies.append(Reply(said, "stop") if isinstance(said, str) else said)
        return replies

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Of sets by `prefers`, with a strong liking for the first; of labels by a shared word."""
        rows = []
        for chat in chats:
            if step_of_or_none(chat) == "select":
                self.asked.append({"step": "select", "system": chat[0]["content"]})
                tables = re.split(r"^Set .:$", chat[0]["content"], flags=re.MULTILINE)[1:]
                rows.append([self.prefers(t) + 5.0 * (i == 0) for i, t in enumerate(tables)])
            else:
                words = chat[-1]["content"].split()
                rows.append([9.0 * (label in words) for label in labels])
        logits = np.array(rows)
        return Scores(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def steps(self) -> list[str]:
        return [one["step"] for one in self.asked]

    def of(self, step: str) -> list[dict[str, Any]]:
        return [one for one in self.asked if one["step"] == step]


def step_of_or_none(chat: Chat) -> str | None:
    return next((s for start, s in STEPS.items() if chat[0]["content"].startswith(start)), None)
