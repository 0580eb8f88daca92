"""One conversation with an OpenAI-compatible server: patient, and never silent about a failure.

What fails for a moment (no connection, HTTP 429 and 5xx, no answer in time, an answer that cannot be
read) is asked again after growing, jittered pauses. What keeps failing is told apart by asking for
something that worked before: a server that answers this has a problem with one request only.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from llmlabel.engine import Usage

T = TypeVar("T")

_FIRST_SECONDS, _MOST_SECONDS = 0.5, 8.0  # pauses between tries
_TRIES = 5  # then a request is suspected rather than the server
_LACKING_TRIES = 3  # of an answer that is whole but lacks what was asked for


class ServerError(RuntimeError):
    """Nothing can be asked of the server; `status` is its HTTP status, where it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RequestError(RuntimeError):
    """One request cannot be answered; others can."""


LOST = -9000.0
"""At or below this there is no log-probability: servers write -9999."""


class LackingError(ValueError):
    """An answer that is whole but lacks what was asked for, such as the probability of a label."""


@dataclass(frozen=True)
class Access:
    """Where a server is and how it is treated; the key stays in the environment."""

    base_url: str
    key_variable: str
    in_flight: int
    timeout_seconds: float
    patience_seconds: float

    def __post_init__(self) -> None:
        """Refuses what could not work, and a password that would be written into files."""
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"base_url {self.base_url!r} is no address; give one like http://localhost:8000/v1"
            )
        if address.username or address.password or address.query:
            raise ValueError(
                "base_url must not hold a password or a key; put the key into the environment "
                f"variable {self.key_variable}"
            )
        if self.in_flight < 1 or self.timeout_seconds <= 0 or self.patience_seconds < 0:
            raise ValueError(
                "in_flight must be at least 1, timeout_seconds above 0 and patience_seconds not "
                f"below; got {self.in_flight}, {self.timeout_seconds} and {self.patience_seconds}"
            )

    @property
    def root(self) -> str:
        """The address without the version, where vLLM has its own paths."""
        return self.base_url.rstrip("/").removesuffix("/v1")


@dataclass
class Meter:
    """Counts what the answers of a server say about tokens."""

    usage: Usage = field(default_factory=Usage)
    tells_cached: bool = True
    """Whether every answer said what came out of the server's cache."""

    def count(self, answer: Any, body: dict[str, Any]) -> None:
        """Adds one answer to the request `body`."""
        self.usage.requests += 1
        told = answer.get("usage") if isinstance(answer, dict) else None
        if not isinstance(told, dict):
            return
        prompt = int(told.get("prompt_tokens") or 0)
        self.usage.prompt_tokens += prompt
        self.usage.output_tokens += int(told.get("completion_tokens") or 0)
        cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens")
        # Of several prompts vLLM tells the cached tokens of the last one only.
        is_one = not isinstance(body.get("prompt"), list) or len(body["prompt"]) == 1
        if cached is None or not is_one:
            self.tells_cached = False
        # No sum of what only some answers tell.
        computed = self.usage.computed_tokens + prompt - int(cached or 0)
        self.usage.computed_tokens = computed if self.tells_cached else 0


class Server:
    """An open connection; used as `async with`, in one event loop.

    Attributes:
        known_good: path and body of a request that the server has answered before.
    """

    def __init__(self, access: Access, meter: Meter) -> None:
        self.access, self.meter = access, meter
        self.known_good: tuple[str, dict[str, Any]] | None = None
        self._key = os.environ.get(access.key_variable, "")
        self._slots = asyncio.Semaphore(access.in_flight)
        self._quiet_until = 0.0
        self._jitter = random.Random()  # of pauses: nothing that is computed depends on it

    async def __aenter__(self) -> Self:
        """Opens the connections."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise ImportError(
                f"OpenAIEngine needs the openai package: pip install 'llmlabel[openai]' ({error})"
            ) from error
        self._client = AsyncOpenAI(
            base_url=self.access.base_url,
            api_key=self._key or "none",  # local servers ask for none, but the client does
            max_retries=0,  # retried here, where it is known what an answer must hold
            timeout=self.access.timeout_seconds,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the connections."""
        await self._client.close()

    async def ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], T],
        *,
        patience_seconds: float | None = None,
    ) -> T:
        """What `read` makes of the JSON that the server answers; without a body, a GET.

        Args:
            path: below `base_url`, or a whole address.
            body: of the request.
            read: raises LackingError where something asked for is not there, and KeyError,
                IndexError, TypeError or ValueError where the answer is of another form.
            patience_seconds: how long failures are waited for, if not as long as always.

        Raises:
            RequestError: the server refuses this request, or answers others but not this one.
            ServerError: the server refuses everything, or gave no answer for `patience_seconds`.
        """
        start, tries, answered = time.monotonic(), 0, False
        patience = self.access.patience_seconds if patience_seconds is None else patience_seconds
        while True:
            try:
                async with self._slots:
                    return await self._try(path, body, read)
            except _Passing as error:
                failure = error
            tries += 1
            if failure.is_lacking and tries >= _LACKING_TRIES:
                raise RequestError(str(failure))
            grown = min(_FIRST_SECONDS * 2 ** (tries - 1), _MOST_SECONDS)
            pause = max(failure.pause, grown * self._jitter.uniform(0.5, 1.0))
            spent = time.monotonic() - start
            over = spent + pause > patience
            suspect = failure.status != 429 and (over or tries >= _TRIES)
            answers = suspect and await self._answers_another()
            if answers and answered:  # before this try and after it
                raise RequestError(str(failure))
            answered = answers
            if over and not answers:
                raise ServerError(
                    f"server {self.access.base_url}: {failure}, {tries} tries in {spent:.0f} s; what "
                    "was committed stays: run the same command again, or with more patience_seconds",
                    failure.status,
                )
            if not answers:
                await asyncio.sleep(pause)

    async def _answers_another(self) -> bool:
        if self.known_good is None:
            return False
        try:
            await self._try(*self.known_good, lambda answer: answer["choices"][0])
        except (_Passing, RequestError, ServerError):
            return False
        return True

    async def _try(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        """One try; whatever may be over soon is a `_Passing`."""
        import openai

        while (wait := self._quiet_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        try:
            if body is None:
                text = await self._client.get(path, cast_to=str)
            else:
                text = await self._client.post(path, cast_to=str, body=body)
        except openai.APITimeoutError:
            raise _Passing(f"no answer within {self.access.timeout_seconds:g} s") from None
        except openai.APIConnectionError as error:
            raise _Passing(f"no connection ({self._said(error.__cause__ or error)})") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        try:
            answer = json.loads(text)
            found = read(answer)
        except LackingError as error:
            raise _Passing(str(error), is_lacking=True) from None
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise _Passing(f"unreadable answer ({_line(error)})") from None
        if body is not None:
            self.meter.count(answer, body)
        return found

    def _refusal(self, error: Any) -> Exception:
        """What an HTTP error says about this request, the server, or the moment."""
        status, said = int(error.status_code), f"HTTP {error.status_code}: {self._said(error)}"
        if status == 429 and error.code != "insufficient_quota":  # no pause brings money back
            pause = _retry_after(error.response.headers.get("retry-after"))
            patience = self.access.patience_seconds
            if pause > patience:
                return ServerError(
                    f"server {self.access.base_url}: asks to wait {pause:.0f} s, more than "
                    f"patience_seconds={patience:g}; come back later, or give it more",
                    status,
                )
            self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
            return _Passing(said, pause=pause, status=status)
        if status in (408, 409) or (status >= 500 and status != 501):
            return _Passing(said, status=status)
        if status in (400, 413, 422):
            return RequestError(said)
        hint = ""
        if status in (401, 403):
            hint = f"; put a valid key into the environment variable {self.access.key_variable}"
        if status == 404:
            hint = "; check base_url (it ends with /v1 on most servers) and model"
        return ServerError(f"server {self.access.base_url}: {said}{hint}", status)

    def _said(self, error: BaseException) -> str:
        """An error's first line without the key."""
        text = _line(error)
        if isinstance(body := getattr(error, "body", None), dict):
            text = str(body.get("message") or text)
        return text.replace(self._key, "***") if self._key else text


class _Passing(Exception):
    """A failure that may be over soon.

    Args:
        problem: what happened.
        pause: seconds that the server asks for.
        status: of HTTP.
        is_lacking: whether the answer was whole but lacked what was asked for.
    """

    def __init__(
        self,
        problem: str,
        *,
        pause: float = 0.0,
        status: int | None = None,
        is_lacking: bool = False,
    ) -> None:
        super().__init__(problem)
        self.pause, self.status, self.is_lacking = pause, status, is_lacking


def _line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)


def _retry_after(header: str | None) -> float:
    """Seconds of a Retry-After header, which holds these or a date; 0 where it says nothing."""
    if not header:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, in a thread of its own where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def gather_all(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
