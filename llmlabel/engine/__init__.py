"""Who runs a language model: two verbs, `generate` and `score`, for every backend.

`score` is the one that labelling stands on: the probability of every label string as the whole
reply, so that a label that is a prefix of another is scored right.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from llmlabel.prompt import Chat


@dataclass(frozen=True)
class Reply:
    """What a model said to one chat; `error` says why it could not be read."""

    text: str
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """Natural-log joint probability of each label as the whole reply to each chat."""

    log_probs: Float[np.ndarray, "rows labels"]
    """-inf is a label that was not read: together these have at most the probability `unread`."""
    errors: list[str | None] = field(default_factory=list)
    """One message or None per row; a row with a message is scored all the same where it could be."""
    unread: Float[np.ndarray, " rows"] | None = None
    """Probability that all labels not read have at most; None where every label was read."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens of each chat as they were given to the model; empty where a backend cannot tell."""

    @property
    def label_mass(self) -> Float[np.ndarray, " rows"]:
        """Probability that the model answers with one of the labels that were read."""
        return np.minimum(np.exp(self.log_probs).sum(axis=1), 1.0)


@dataclass
class Usage:
    """What an engine has been asked since it was made."""

    requests: int = 0
    """Passes of a model in process; calls of a server."""
    prompt_tokens: int = 0
    """Tokens of all prompts as if nothing were shared."""
    computed_tokens: int = 0
    """Of these the tokens that were really computed, where the backend tells."""
    output_tokens: int = 0


@runtime_checkable
class Engine(Protocol):
    """What labelling and taxonomies ask of a backend."""

    name: str
    """Backend, model and number format: part of the provenance of every row."""

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """One reply per chat; `schema` restricts it to JSON of that schema where supported."""
        ...

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """The joint probability of each label as the reply.

        Args:
            chats: each up to the start of the reply.
            labels: the possible replies.
            candidates: per chat the positions of the labels that may be answered, where not all may;
                the others are -inf and do not count as unread.
        """
        ...


def chat_seeds(chats: Sequence[Chat], seed: int) -> list[int]:
    """One seed per chat that depends on `seed`, the chat and its how-manieth occurrence only."""
    seen: Counter[str] = Counter()
    seeds = []
    for chat in chats:
        content = json.dumps(chat, sort_keys=True)
        seen[content] += 1
        digest = hashlib.sha256(f"{seed} {seen[content]} {content}".encode()).digest()
        seeds.append(int.from_bytes(digest[:4], "big"))
    return seeds


def refuse_many_processes(engine: str) -> None:
    """Engines run in one process; training runs in many.

    Raises:
        RuntimeError: under `accelerate launch` or `torchrun` with more than one process.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RuntimeError(
            f"{engine}: started in {processes} processes; label first, then train: run the recipe "
            "once in one process, then launch the same command in many"
        )
