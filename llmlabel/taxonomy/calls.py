"""What taxonomies ask of an engine: until it can be read, and kept once it is said."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from llmlabel.engine import Engine, Reply
from llmlabel.files import keep_json, kept_json
from llmlabel.prompt import Chat
from llmlabel.taxonomy.guardrails import ReplyError
from llmlabel.taxonomy.replies import reply_tokens

_log = logging.getLogger(__name__)
RETRIES = 5
_WARMER = 0.1
Step = Literal["summarise", "generate", "update", "review", "name"]
TEMPERATURES: dict[Step, float] = {
    "summarise": 0.0,
    "generate": 0.5,
    "update": 0.2,
    "review": 0.0,
    "name": 0.0,
}
"""Of the first attempt at each step."""
_TOLD: tuple[Step, ...] = ("generate", "update", "review", "name")  # rows of a summary have `error`
T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of a chat after one or several attempts."""

    value: T | None
    attempts: int
    problem: str | None
    """What was refused last, or what was done to make the last reply fit."""
    reply: Reply
    """The last one."""
    cut: str | None = None
    """The engine's word that it did not read all of the chat."""


@dataclass
class Asker:
    """Asks an engine until its replies can be read, and keeps what it said.

    Attributes:
        engine: who answers.
        seed: of the first attempts.
        output: folder for the calls; None keeps nothing.
        holds: Whether the engine holds a reply to a schema: found out by the first call.
    """

    engine: Engine
    seed: int
    output: Path | None = None
    holds: bool | None = None

    def ask(
        self,
        step: Step,
        chats: Sequence[Chat],
        read: Callable[[int, str], T],
        *,
        schema: dict[str, Any],
        name: str = "",
    ) -> list[Answer[T]]:
        """One answer a chat; a reply that cannot be read is asked for again, a little warmer.

        Args:
            step: how warm the first attempt is, see `TEMPERATURES`.
            chats: what is asked.
            read: number of the chat and its reply -> the value, or a ReplyError.
            schema: of every reply.
            name: of the files that the calls are kept in.
        """
        answers: dict[int, Answer[T]] = {}
        spare: dict[int, Any] = {}
        waiting = list(range(len(chats)))
        for attempt in range(RETRIES + 1):
            asked = [chats[number] for number in waiting]
            temperature = round(TEMPERATURES[step] + _WARMER * attempt, 2)
            replies = self._kept(f"{name}-{attempt}", asked, schema, temperature, attempt)
            for number, reply in zip(waiting, replies, strict=True):
                value, problem = None, None
                try:
                    value = _read(read, number, reply)
                except ReplyError as error:
                    problem = str(error)
                    if error.distinct is not None:
                        spare.setdefault(number, error.distinct)
                answers[number] = Answer(value, attempt + 1, problem, reply, reply.error)
            waiting = [number for number in waiting if answers[number].value is None]
            if not waiting:
                break
            if step in _TOLD:
                _log.info(
                    "%s: %d of %d replies refused, attempt %d of %d: %s",
                    *(step, len(waiting), len(chats), attempt + 1, RETRIES + 1),
                    answers[waiting[0]].problem,
                )
        cuts = [answer.cut for answer in answers.values() if answer.cut]
        if cuts and step in _TOLD:
            told = "%s: %d of %d chats not read whole (show fewer texts, or less of each): %s"
            _log.info(told, step, len(cuts), len(chats), cuts[0])
        for number in waiting:
            if number in spare:
                told = f"repeated names were taken once ({answers[number].problem})"
                answers[number] = replace(answers[number], value=spare[number], problem=told)
        return [answers[number] for number in range(len(chats))]

    def scores(self, chats: Sequence[Chat], replies: Sequence[str], *, name: str) -> dict[str, Any]:
        """`log_probs` of each reply to each chat, and `errors`."""

        def score() -> dict[str, Any]:
            found = self.engine.score(chats, replies)
            return {"log_probs": found.log_probs.tolist(), "errors": found.errors}

        said, keep = self._once(name, [chats, list(replies)], score)
        keep()
        return said

    def _kept(
        self,
        name: str,
        chats: Sequence[Chat],
        schema: dict[str, Any],
        temperature: float,
        attempt: int,
    ) -> list[Reply]:
        """The replies to a call."""
        seed = self.seed + attempt

        def generate() -> dict[str, Any]:
            replies = self._generate(chats, schema, temperature, seed)
            return {"holds": self.holds, "replies": [vars(reply) for reply in replies]}

        said, keep = self._once(name, [chats, schema, temperature, seed], generate)
        self.holds = said["holds"]
        replies = [Reply(**reply) for reply in said["replies"]]
        if not any(reply.finish_reason == "error" for reply in replies):
            keep()  # what a server failed at is asked again by the next run
        return replies

    def _once(
        self, name: str, asked: list[Any], ask: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        """What the engine says, now or before a crash, and what keeps it."""
        if self.output is None:
            return ask(), lambda: None
        file = self.output / "calls" / f"{name}.json"
        content = json.dumps([version("llmlabel"), self.engine.name, asked])
        mark = hashlib.sha256(content.encode()).hexdigest()
        if (said := kept_json(file, mark)) is not None:
            return said, lambda: None
        said = ask()
        return said, lambda: keep_json(file, mark, said)

    def _generate(
        self, chats: Sequence[Chat], schema: dict[str, Any], temperature: float, seed: int
    ) -> list[Reply]:
        room = reply_tokens(schema)

        def generate(held: dict[str, Any] | None) -> list[Reply]:
            return self.engine.generate(
                chats, max_tokens=room, temperature=temperature, seed=seed, schema=held
            )

        if self.holds is not None:
            return generate(schema if self.holds else None)
        try:
            replies, refusal = generate(schema), None
        except ValueError as error:
            replies, refusal = [], error
        if replies and any(reply.finish_reason != "error" for reply in replies):
            self.holds = True
            return replies
        try:
            free = generate(None)
        except ValueError as error:
            raise ValueError(
                f"{self.engine.name}: {error} (the longest reply needs {room} tokens of its own: "
                "fewer labels or words make it shorter)"
            ) from refusal
        if not replies or any(reply.finish_reason != "error" for reply in free):
            self.holds = False
            return free
        return replies


def _read(read: Callable[[int, str], T], number: int, reply: Reply) -> T:
    if reply.finish_reason == "error":
        raise ReplyError(f"the engine failed: {reply.error}")
    try:
        return read(number, reply.text)
    except ReplyError as error:
        if reply.finish_reason != "length":
            raise
        raise ReplyError(f"the reply was too long and has no end; {error}") from None
