"""Exact reads of many rows on a vLLM server, packed into few requests.

A read asks for the next-token log-probabilities of chosen tokens (`logprob_token_ids`) after a
prompt of token ids. Where a node's labels have few tokens, the model writes on, held to these tokens,
and each further position is one more node read: a written token costs the server one token, a prompt
of its own at least the unfinished block of its prefix cache. What the model wrote decides only which
nodes come for free; those still wanted are asked for themselves.

Reads wait in the order of their rows, so that a row that has begun goes on while its prefix is still
in the server's cache, and neighbours that want the same tokens share a request. No row waits for
another one.
"""

import asyncio
import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmlabel.engine.bestfirst import BestFirst, Branches, Step, Wish
from llmlabel.engine.server import LOST, LackingError, RequestError, Server, gather_all

_LOOKED_AT = 256  # waiting reads among which a companion is looked for

Answer = dict[int, float]
"""Token -> log-probability."""


def read_body(model: str, prompts: Sequence[list[int]], wish: Wish) -> dict[str, Any]:
    """The request of one read per prompt."""
    body = {
        "model": model,
        "prompt": list(prompts),
        "max_tokens": wish.steps,
        "temperature": 0.0,
        "logprobs": 1,
        "logprob_token_ids": list(wish.ids),
        "return_tokens_as_token_ids": True,
    }
    return body | {"allowed_token_ids": list(wish.written)} if wish.steps > 1 else body


def choices_of(answer: Any, count: int) -> list[Any]:
    """The choices of a completion in the order of their prompts.

    Raises:
        ValueError: there are not so many.
    """
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise ValueError(f"{len(choices)} answers to {count} prompts")
    return choices


def steps_of(choice: Any, ids: Sequence[int]) -> list[Step]:
    """The positions of one choice, each with the log-probabilities of `ids`.

    Raises:
        LackingError: one is missing, or is no log-probability.
        ValueError: the answer is of another form.
    """
    said = choice.get("logprobs") or {}
    shown, tokens = said.get("top_logprobs") or [{}], said.get("tokens") or [""]
    steps = []
    for values, written in zip(shown, tokens, strict=True):
        found = {}
        for token in ids:
            value = (values or {}).get(f"token_id:{token}")
            if value is None:
                raise LackingError("the server lost the log-probability of a label's token")
            if not LOST < value <= 1e-3:
                raise LackingError(f"the server gave {value:g} as a log-probability")
            found[token] = float(value)
        steps.append(Step(found, int(written.removeprefix("token_id:"))))
    return steps


class _Read(NamedTuple):
    """In the order in which it is asked; no two have the same row and number."""

    row: int
    number: int
    prompt: list[int]
    wish: Wish
    answer: "asyncio.Future[list[Step]]"


class Reads:
    """Reads that wait for or are at a server, at most `in_flight` of them at once."""

    def __init__(self, server: Server, model: str, *, in_flight: int) -> None:
        self.server, self.model, self.in_flight = server, model, in_flight
        self.most_prompts = max(1, in_flight // 4)  # the server has work between two answers
        self._waiting: list[_Read] = []
        self._flying = self._number = 0
        self._is_woken = False
        self._sent: set[asyncio.Task[None]] = set()

    async def read(self, row: int, prompt: list[int], wish: Wish) -> list[Step]:
        """What a server answers to a wish, one position at least.

        Raises:
            RequestError: the server cannot give them.
        """
        loop = asyncio.get_running_loop()
        self._number += 1
        one = _Read(row, self._number, prompt, wish, loop.create_future())
        heapq.heappush(self._waiting, one)
        if not self._is_woken:  # after the other rows have said what they want
            self._is_woken = True
            loop.call_soon(self._send)
        return await one.answer

    def _send(self) -> None:
        self._is_woken = False
        free = self.in_flight - self._flying
        if free < min(self.most_prompts, len(self._waiting)):
            return  # else every request would have the one prompt that another one made room for
        while self._flying < self.in_flight:
            batch = self._take(min(self.most_prompts, self.in_flight - self._flying))
            if not batch:
                return
            self._flying += len(batch)
            task = asyncio.ensure_future(self._answer(batch))
            self._sent.add(task)
            task.add_done_callback(self._sent.discard)

    def _take(self, most: int) -> list[_Read]:
        """The first that waits, and others with the same wish."""
        batch: list[_Read] = []
        others: list[_Read] = []
        while self._waiting and len(batch) < most and len(others) < _LOOKED_AT:
            one = heapq.heappop(self._waiting)
            if one.answer.done():  # its row has failed
                continue
            (batch if not batch or one.wish == batch[0].wish else others).append(one)
        for one in others:
            heapq.heappush(self._waiting, one)
        return batch

    async def _answer(self, batch: list[_Read]) -> None:
        try:
            lacking = await self._ask(batch)
            for one in lacking if len(batch) > 1 else ():
                await self._ask([one])
        except Exception as error:  # whoever waits must learn of it, a bug too
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
        finally:
            self._flying -= len(batch)
            self._send()

    async def _ask(self, batch: list[_Read]) -> list[_Read]:
        """Asks once for a batch; returns the reads that must be asked for alone."""
        wish = batch[0].wish
        body = read_body(self.model, [one.prompt for one in batch], wish)

        def read(answer: Any) -> list[_Read]:
            lacking = []
            for one, choice in zip(batch, choices_of(answer, len(batch)), strict=True):
                try:
                    found = steps_of(choice, wish.ids)
                except LackingError:
                    if len(batch) == 1:
                        raise
                    lacking.append(one)
                else:
                    if not one.answer.done():
                        one.answer.set_result(found)
            return lacking

        try:
            return await self.server.ask("/completions", body, read)
        except RequestError as error:
            if len(batch) > 1:  # one of them may be what the server cannot bear
                return [one for one in batch if not one.answer.done()]
            if not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return []


async def read_rows(
    reads: Reads,
    reading: BestFirst,
    rows: Sequence[list[int]],
    *,
    candidates: Sequence[Sequence[int]] | None = None,
) -> list[str | None]:
    """Reads every row to its end; per row a message where the server cannot answer.

    Args:
        reads: who asks the server.
        reading: what is told the results.
        rows: token ids of the rows, up to the start of the reply.
        candidates: as `reading` knows them; other labels' tokens are not asked for.
    """
    trie = reading.trie
    whole = Branches(trie, None)

    async def one_node(row: int, node: int, branches: Branches) -> None:
        prompt = rows[row] + trie.path(node)
        wishes = branches.wishes(node)
        answers = await gather_all([reads.read(row, prompt, wish) for wish in wishes])
        reading.walk(row, node, answers, branches)

    async def one_row(row: int) -> str | None:
        branches = whole if candidates is None else Branches(trie, candidates[row])
        try:
            while wanted := [int(node) for _, nodes in reading.round([row]) for node in nodes]:
                await gather_all([one_node(row, node, branches) for node in wanted])
        except RequestError as error:
            return str(error)
        return None

    return await gather_all([one_row(row) for row in range(len(rows))])
