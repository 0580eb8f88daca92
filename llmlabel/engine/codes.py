"""Labels as letters: what a server that shows its most probable tokens only can tell of them.

Labels are listed as options A, B, ... and the model is asked for the letter, so that the answer is
one token and its probability stands among the `top_logprobs`. Models prefer some letters whatever the
text says, so each chat is asked in several orders: rotations of one random order, which put every
label at places far from each other. Differs from an exact read: it is the probability of the letter
as the first token of the reply, of a longer prompt, and a letter that the server does not show is
known by a bound only.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from llmlabel.engine.server import LOST, LackingError
from llmlabel.prompt import Chat, render, reply_form


def code_orders(
    chat: Chat, labels: Sequence[str], *, orders: int, seed: int = 0
) -> list[list[int]]:
    """Orders of the labels for one chat, as positions in `labels`; at most as many as labels.

    They depend on the chat, the set of labels and the seed, not on other chats.
    """
    own = hashlib.sha256(json.dumps([seed, chat], sort_keys=True).encode()).digest()

    def rank(at: int) -> bytes:
        return hashlib.sha256(own + labels[at].encode()).digest()

    first = sorted(range(len(labels)), key=rank)
    count = min(orders, len(labels))
    starts = [k * len(labels) // count for k in range(count)]
    return [first[start:] + first[:start] for start in starts]


def question(chat: Chat) -> Chat:
    """A chat without the start of the reply that it may end with: this protocol has none."""
    return chat[:-1] if chat[-1]["role"] == "assistant" else chat


def code_chat(chat: Chat, labels: Sequence[str], *, prompt: str | Path = "engine/codes") -> Chat:
    """A chat that asks for the letter of a label; in demonstrations too.

    Args:
        chat: asks for a label.
        labels: in the order of their letters.
        prompt: a prompt file or a shipped name; it sees the system text as `instructions`.
    """
    turns, instructions = question(chat), ""
    if turns[0]["role"] == "system":
        instructions, turns = turns[0]["content"], turns[1:]
    code_of = dict(zip(labels, ascii_uppercase, strict=False))
    form = reply_form([chat])
    shown = []
    for asked, said in zip(turns[:-1:2], turns[1::2], strict=True):
        answer = said["content"].removeprefix(form.lead).removesuffix(form.after or "")
        shown.append({"text": asked["content"], "label": code_of.get(answer, answer)})
    return render(
        prompt,
        text=turns[-1]["content"],
        labels=[f"{code}: {label}" for label, code in code_of.items()],
        demonstrations=shown,
        instructions=instructions,
        last=ascii_uppercase[len(labels) - 1],
    )


class CodeRead(NamedTuple):
    """What one answer tells of the letters."""

    probs: Float[np.ndarray, " codes"]
    is_seen: Bool[np.ndarray, " codes"]
    rest: float
    """Probability that all letters not seen have at most."""


def read_codes(answer: Any, count: int) -> CodeRead:
    """The probabilities of the first `count` letters in an answer of the chat API.

    A letter is one of two tokens: with and without a blank before it. One that is not shown is no
    more probable than the least probable token that is.

    Raises:
        LackingError: the answer shows no log-probabilities, or a lost one.
    """
    said = answer["choices"][0]["logprobs"]
    shown = said["content"][0]["top_logprobs"] if said and said.get("content") else []
    if not shown:
        raise LackingError("the server gave no log-probabilities")
    probs, is_seen = np.zeros(count), np.zeros(count, dtype=bool)
    least, total = 1.0, 0.0
    for entry in shown:
        log_prob = float(entry["logprob"])
        if not LOST < log_prob <= 1e-3:
            raise LackingError(f"the server gave {log_prob:g} as a log-probability")
        prob = math.exp(log_prob)
        least, total = min(least, prob), total + prob
        token = entry["token"].removeprefix(" ")
        if len(token) == 1 and 0 <= (at := ascii_uppercase.find(token)) < count:
            probs[at] += prob
            is_seen[at] = True
    if total > 1 + 1e-2:
        raise LackingError(f"the server gave probabilities with the sum {total:.3g}")
    rest = min(max(0.0, 1.0 - total), 2 * least * int((~is_seen).sum()))
    return CodeRead(probs, is_seen, rest)


def mean_of_orders(
    reads: Sequence[CodeRead], orders: Sequence[Sequence[int]], count: int
) -> tuple[Float[np.ndarray, " labels"], float]:
    """Log of each label's mean probability over the orders, and the bound of what was not seen.

    A label that some order did not show counts 0 there, and what it could have is in the bound.
    """
    probs = np.zeros(count)
    for read, order in zip(reads, orders, strict=True):
        probs[list(order)] += read.probs / len(reads)
    with np.errstate(divide="ignore"):
        return np.log(probs), sum(read.rest for read in reads) / len(reads)
