"""A language model behind an OpenAI-compatible server: vLLM, a hosted API, llama.cpp and others.

What can be known of the labels depends on the server:

- `exact`: it reads chosen tokens (`logprob_token_ids`, as vLLM does): the joint probability of every
  label as the whole reply, as in process.
- `codes`: it shows its most probable tokens: labels are asked for as letters, in several orders
  (see `llmlabel.engine.codes`).
- `generate`: it shows no probabilities: the reply is compared with the labels. The label that was
  said gets probability 1, which is a vote and no distribution; a reply that is no label is an error
  of its row.
"""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from llmlabel.engine import Reply, Scores, Usage, chat_seeds, refuse_many_processes
from llmlabel.engine.bestfirst import BestFirst
from llmlabel.engine.codes import (
    CodeRead,
    code_chat,
    code_orders,
    mean_of_orders,
    question,
    read_codes,
)
from llmlabel.engine.labeltrie import tokens_and_trie
from llmlabel.engine.reads import Reads, read_rows
from llmlabel.engine.served import CHAT, Reading, meet
from llmlabel.engine.server import (
    Access,
    Meter,
    RequestError,
    Server,
    gather_all,
    run_async,
)
from llmlabel.prompt import Chat, chat_tokens, escape_control_tokens, prompt_sha

T = TypeVar("T")

# Without the model's tokenizer nobody knows its control tokens; these are what most models have.
_CONTROL = re.compile(
    r"<(?P<bar>[|\uff5c])[^<>\n]{1,40}(?P=bar)>|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk)>"
    r"|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]"
)


class OpenAIEngine:
    """A model behind a server that speaks the OpenAI protocol.

    The key is read from the environment whenever the server is asked, and written nowhere. A request
    that fails is asked again for `patience_seconds`; then a request that the server cannot bear is an
    error of its row, and a server that answers nothing is a `ServerError`.

    Args:
        base_url: address of the server, such as `http://localhost:8000/v1`.
        model: name of the model there; may be left out where the server has only one.
        key_variable: environment variable that holds the key; local servers need none.
        tokenizer: path or hub name of the model's tokenizer, for exact reads; by default what the
            server says that it serves.
        reading: how labels are read (see the module); `auto` is exact where the server can do it,
            else codes, and refuses a server that shows no probabilities.
        orders: of codes: in how many orders each chat is asked.
        max_missing: of exact reads: share of the label set's probability that may stay unread.
        max_nodes: of exact reads: inner nodes of the label trie that are read of a row at most.
        max_tokens: of exact reads: longer chats lose the end of their text and are reported.
        in_flight: prompts at the server at once.
        timeout_seconds: for one request.
        patience_seconds: for one request and all its repetitions.
        input_price: of a million prompt tokens.
        output_price: of a million output tokens.
    """

    def __init__(  # noqa: PLR0913  # each is one plain fact about the server or how it is treated
        self,
        base_url: str,
        model: str | None = None,
        *,
        key_variable: str = "OPENAI_API_KEY",
        tokenizer: str | Path | None = None,
        reading: Literal["auto", "exact", "codes", "generate"] = "auto",
        orders: int = 3,
        max_missing: float = 1e-3,
        max_nodes: int = 512,
        max_tokens: int = 2048,
        in_flight: int = 32,
        timeout_seconds: float = 60.0,
        patience_seconds: float = 180.0,
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        refuse_many_processes("OpenAIEngine")
        if orders < 1 or not 0 <= max_missing < 1:
            raise ValueError(
                "orders must be at least 1 and max_missing at least 0 and below 1; got "
                f"{orders} and {max_missing}"
            )
        self.access = Access(base_url, key_variable, in_flight, timeout_seconds, patience_seconds)
        self.orders, self.max_missing, self.max_nodes = orders, max_missing, max_nodes
        self.prices = (input_price, output_price)
        self._meter = Meter()
        self._known_good: tuple[str, dict[str, Any]] | None = None
        self.served = self._session(
            lambda server: meet(server, model=model, reading=reading, tokenizer=tokenizer)
        )
        self._known_good = self.served.known_good
        # The read itself is one output token.
        self.max_tokens = min(max_tokens, (self.served.context_tokens or max_tokens + 1) - 1)
        self.name = self._name()

    @property
    def reading(self) -> Reading:
        """How labels are read."""
        return self.served.reading

    @property
    def usage(self) -> Usage:
        """What the server has answered; requests that failed are not counted."""
        return self._meter.usage

    @property
    def cost(self) -> float | None:
        """Price of all tokens so far, as if none came from the server's cache; None without prices."""
        if self.prices == (None, None):
            return None
        prompt, output = (price or 0.0 for price in self.prices)
        return (self.usage.prompt_tokens * prompt + self.usage.output_tokens * output) / 1e6

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """One reply per chat; one that the server cannot give has an `error` and no text.

        With a schema a small model may write blanks without an end: start a vLLM server with
        `--structured-outputs-config '{"backend": "guidance", "disable_any_whitespace": true}'`.
        """
        asked: dict[str, Any] = {"temperature": temperature}
        if self.reading == "exact":
            path, bodies, errors = self._completions(chats, max_tokens, schema)
        else:
            path, errors = CHAT, [None] * len(chats)
            bodies = [
                self._chat(question(chat)) | {self.served.limit: max_tokens} for chat in chats
            ]
            if schema is not None:
                held = {"name": "reply", "schema": schema, "strict": True}
                asked["response_format"] = {"type": "json_schema", "json_schema": held}

        async def one(server: Server, body: dict[str, Any], error: str | None) -> Reply:
            try:
                text, reason = await server.ask(path, body, _text_of)
            except RequestError as problem:
                return Reply("", "error", str(problem))
            return Reply(text, reason, error)

        if temperature > 0:  # nothing is drawn at 0, and not every server knows the word
            seeds = chat_seeds(chats, seed)
            bodies = [body | {"seed": own} for body, own in zip(bodies, seeds, strict=True)]
        return self._session(
            lambda server: gather_all(
                [one(server, body | asked, e) for body, e in zip(bodies, errors, strict=True)]
            )
        )

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Log-probabilities of the labels, by the engine's way of reading.

        A row that the server cannot answer has an error and no label.

        Raises:
            ValueError: two labels have the same tokens or the same name, or there are more than
                letters can be read.
            ServerError: the server does not answer.
        """
        if self.reading == "exact":
            return self._score_exact(chats, labels, candidates)
        if len(set(labels)) < len(labels):
            raise ValueError("two labels have the same name and so the same tokens; rename one")
        allowed = candidates or [range(len(labels))] * len(chats)
        if self.reading == "codes":
            return self._score_codes(chats, labels, allowed)
        return self._score_replies(chats, labels, allowed)

    # ------------------------------------------------------------------------------ ways to read

    def _score_exact(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        candidates: Sequence[Sequence[int]] | None,
    ) -> Scores:
        trie, rows, errors = tokens_and_trie(
            self.served.tokenizer, chats, labels, max_tokens=self.max_tokens
        )
        reading = BestFirst(
            trie,
            len(rows),
            max_missing=self.max_missing,
            max_reads=self.max_nodes,
            candidates=candidates,
        )

        async def work(server: Server) -> list[str | None]:
            reads = Reads(server, self.served.model, in_flight=self.access.in_flight)
            return await read_rows(reads, reading, rows, candidates=candidates)

        problems = self._session(work) if rows else []
        log_probs, unread = reading.log_probs, reading.unread
        for row, problem in enumerate(problems):
            if problem is not None:  # half a reading is none
                errors[row], log_probs[row], unread[row] = problem, -np.inf, 1.0
        return Scores(
            log_probs, errors, unread if unread.any() else None, [len(ids) for ids in rows]
        )

    def _score_codes(
        self, chats: Sequence[Chat], labels: Sequence[str], allowed: Sequence[Sequence[int]]
    ) -> Scores:
        if (most := max(map(len, allowed), default=0)) > self.served.top:
            raise ValueError(
                f"{most} labels are more than the {self.served.top} tokens whose probability the "
                "server shows; give each row fewer candidates (llmlabel.label.shortlist), or use a "
                "vLLM server"
            )

        async def one(server: Server, row: int) -> tuple[Float[np.ndarray, " some"], float]:
            names = [labels[label] for label in allowed[row]]
            orders = code_orders(chats[row], names, orders=self.orders)

            def read(answer: Any) -> CodeRead:
                return read_codes(answer, len(names))

            # No temperature: at 0 some servers show nothing but the first token.
            bodies = [
                self._chat(code_chat(chats[row], [names[at] for at in order]))
                | {self.served.limit: 1, "logprobs": True, "top_logprobs": self.served.top}
                for order in orders
            ]
            reads = await gather_all([server.ask(CHAT, body, read) for body in bodies])
            return mean_of_orders(reads, orders, len(names))

        return self._rows(one, allowed, len(labels))

    def _score_replies(
        self, chats: Sequence[Chat], labels: Sequence[str], allowed: Sequence[Sequence[int]]
    ) -> Scores:
        longest = max((len(label.encode()) for label in labels), default=0) + 8
        replies = self.generate(chats, max_tokens=longest)
        log_probs, unread = _nothing_read(len(chats), len(labels))
        errors: list[str | None] = [reply.error for reply in replies]
        for row, (chat, reply) in enumerate(zip(chats, replies, strict=True)):
            if errors[row] is None:
                label = label_said(reply.text, chat, [labels[at] for at in allowed[row]])
                if label is None:
                    errors[row] = f"the reply {reply.text[:80]!r} is no label"
                else:
                    log_probs[row, allowed[row][label]], unread[row] = 0.0, 0.0
        return Scores(log_probs, errors, unread if unread.any() else None)

    def _rows(
        self,
        one: Callable[[Server, int], Awaitable[tuple[Any, float]]],
        allowed: Sequence[Sequence[int]],
        labels: int,
    ) -> Scores:
        """The scores of all rows; one that the server cannot answer has an error instead."""
        log_probs, unread = _nothing_read(len(allowed), labels)
        errors: list[str | None] = [None] * len(allowed)

        async def row(server: Server, at: int) -> None:
            try:
                log_probs[at, list(allowed[at])], unread[at] = await one(server, at)
            except RequestError as problem:
                errors[at] = str(problem)

        asked = [at for at, some in enumerate(allowed) if len(some)]
        if asked:
            self._session(lambda server: gather_all([row(server, at) for at in asked]))
        return Scores(log_probs, errors, unread if unread.any() else None)

    # -------------------------------------------------------------------------------- the server

    def _session(self, work: Callable[[Server], Awaitable[T]]) -> T:
        """Runs `work` with an open connection; an event loop of its own each time."""

        async def session() -> T:
            async with Server(self.access, self._meter) as server:
                server.known_good = self._known_good
                return await work(server)

        return run_async(session())

    def _chat(self, chat: Chat) -> dict[str, Any]:
        messages = [
            {"role": turn["role"], "content": escape_control_tokens(turn["content"], _CONTROL)}
            for turn in chat
        ]
        return {"model": self.served.model, "messages": messages}

    def _completions(
        self, chats: Sequence[Chat], max_tokens: int, schema: dict[str, Any] | None
    ) -> tuple[str, list[dict[str, Any]], list[str | None]]:
        """Requests with the tokens that the other engines would compute."""
        room = self.max_tokens - max_tokens
        read = [chat_tokens(self.served.tokenizer, chat, max_tokens=room) for chat in chats]
        held = {} if schema is None else {"structured_outputs": {"json": schema}}
        shared = {"model": self.served.model, "max_tokens": max_tokens, **held}
        return "/completions", [shared | {"prompt": [ids]} for ids, _ in read], [e for _, e in read]

    def _name(self) -> str:
        """Everything that a score depends on, and nothing about where the server is."""
        model = self.served.model
        if PurePath(model).is_absolute():
            model = PurePath(model).name
        if self.reading == "exact":
            tokenizer = self.served.tokenizer
            content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
            known = hashlib.sha256(content.encode()).hexdigest()[:8]
            bounds = f"{self.max_tokens}:{self.max_nodes}:{self.max_missing:g}"
            return f"openai:{model}@{known}:exact:{bounds}"
        if self.reading == "codes":
            how = f"{self.orders}:{self.served.top}:{prompt_sha('engine/codes')[:8]}"
            return f"openai:{model}:codes:{how}"
        return f"openai:{model}:generate"


def label_said(text: str, chat: Chat, labels: Sequence[str]) -> int | None:
    """The position of the one label that a reply is, but for case and blanks.

    Where the chat begins the reply itself, the reply may repeat that and what closes it.

    >>> label_said(" Sports ", [{"role": "user", "content": "x"}], ["business", "sports"])
    1
    """
    if chat[-1]["role"] == "assistant":
        text = text.strip().removeprefix(chat[-1]["content"].strip())
        text = text.removesuffix((chat[-1].get("after") or "").strip())
    text = text.strip()
    for change in (str, _plain):
        matches = [at for at, label in enumerate(labels) if change(label) == change(text)]
        if len(matches) == 1:
            return matches[0]
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _text_of(answer: Any) -> tuple[str, str]:
    """The reply of a completion or a chat, and why it ended."""
    choice = answer["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError("the reply is no text")
    return text, str(choice.get("finish_reason"))


def _nothing_read(
    rows: int, labels: int
) -> tuple[Float[np.ndarray, "rows labels"], Float[np.ndarray, " rows"]]:
    return np.full((rows, labels), -np.inf), np.ones(rows)
