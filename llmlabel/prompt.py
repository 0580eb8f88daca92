"""Prompt files: find, render, hash; and the tokens of a chat.

A prompt is a jinja file with two blocks, `system` and `user`, under the same path in `prompts/` as
the module that uses it. A third block, `reply`, may begin the model's reply for it: the words around
`{{ answer }}`, so that a weak model answers with a label instead of a remark. Only the file is a template: texts, labels and demonstrations are values.
What all rows share (instructions, labels, demonstrations) stands first, the text last, so that an
engine computes the shared prefix once.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    tail: NotRequired[int]
    """Characters at the end of `content` that must survive when the text before is shortened."""
    after: NotRequired[str]
    """Of a reply that has been begun (a last turn of the assistant): what closes it."""


Chat = list[Message]


class ReplyForm(NamedTuple):
    """How a chat has its answer: words before it, and what closes it (else the end of the turn)."""

    lead: str = ""
    after: str | None = None


_MARK = "\ue000\ue001\ue000"  # private use: stands for a text or a reply to see what follows it


def find_prompt(prompt: str | Path) -> Path:
    """The prompt file of a path, or of a shipped name such as `label/direct`.

    Raises:
        FileNotFoundError: names the shipped prompts.
    """
    if (path := Path(prompt)).is_file():
        return path
    if (path := _shipped(str(prompt))).is_file():
        return path
    shipped = _shipped("x").parent
    names = sorted(
        p.relative_to(shipped).with_suffix("").as_posix() for p in shipped.rglob("*.jinja")
    )
    raise FileNotFoundError(
        f"prompt {str(prompt)!r}: no such file, and not a shipped one ({', '.join(names)})"
    )


@lru_cache
def _shipped(name: str) -> Path:
    """Where a prompt of that name is shipped: in the package, or beside it in a checkout."""
    here = Path(__file__).parent
    folder = here / "prompts" if (here / "prompts").is_dir() else here.parent / "prompts"
    return folder / f"{name}.jinja"


def prompt_sha(prompt: str | Path) -> str:
    """The first 16 hex digits of the sha256 of a prompt file."""
    return hashlib.sha256(find_prompt(prompt).read_bytes()).hexdigest()[:16]


def render(
    prompt: str | Path,
    *,
    text: str,
    labels: Sequence[str],
    demonstrations: Sequence[Mapping[str, str]] = (),
    **values: Any,
) -> Chat:
    """The chat of one text: system, one pair of turns per demonstration, the text.

    Args:
        prompt: a file or a shipped name.
        text: the text to label.
        labels: what the model may choose from, one line each.
        demonstrations: mappings with `text` and `label`; the label is the assistant's answer.
        values: further variables of the prompt file.
    """
    path = find_prompt(prompt)
    asked = (path, path.stat().st_mtime_ns, tuple(labels), tuple(values.items()))
    # Kept by content, since a list may change between two calls; 1 and true would be the same.
    is_plain = all(type(value) is str for value in values.values())
    template, shared, system, tail, reply = (_shared if is_plain else _shared.__wrapped__)(*asked)
    chat: Chat = []
    if system:
        chat.append({"role": "system", "content": system})
    for shown in demonstrations:
        content = _block(path, template, "user", {**shared, "text": shown["text"]})
        chat.append({"role": "user", "content": content})
        answer = shown["label"] if reply is None else reply.lead + shown["label"] + str(reply.after)
        chat.append({"role": "assistant", "content": answer})
    content = _block(path, template, "user", {**shared, "text": text})
    chat.append({"role": "user", "content": content, "tail": tail})
    if reply is not None:
        chat.append({"role": "assistant", "content": reply.lead, "after": str(reply.after)})
    return chat


@lru_cache(maxsize=256)
def _shared(
    path: Path, changed_ns: int, labels: tuple[str, ...], values: tuple[tuple[str, Any], ...]
) -> tuple[Template, dict[str, Any], str, int, "ReplyForm | None"]:
    """What the chats of all texts have in common: their template, its variables, the system text.

    Then the number of characters behind the text in its turn, and the words around the answer.
    """
    template = _template(path, changed_ns)
    shared = {"labels": list(labels), **dict(values)}
    system = ""
    if "system" in template.blocks:
        system = _block(path, template, "system", {**shared, "text": ""}).strip()
    turn = _block(path, template, "user", {**shared, "text": _MARK})
    _, found, tail = turn.rpartition(_MARK)
    if not found:
        raise ValueError(f"prompt file {path}: its user block does not show {{{{ text }}}}")
    reply = None
    if "reply" in template.blocks:
        words = _block(path, template, "reply", {**shared, "text": "", "answer": _MARK})
        lead, found, after = words.partition(_MARK)
        if not (found and after):
            raise ValueError(
                f"prompt file {path}: its reply block does not show {{{{ answer }}}} with something "
                "behind it that closes it, such as a quotation mark"
            )
        reply = ReplyForm(lead, after)
    return template, shared, system, len(tail), reply


def _block(path: Path, template: Template, name: str, variables: dict[str, Any]) -> str:
    try:
        return "".join(template.blocks[name](template.new_context(variables)))
    except TemplateError as error:
        raise ValueError(f"prompt file {path}: {error}") from None


@lru_cache(maxsize=32)
def _template(path: Path, changed_ns: int) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False
    )
    try:
        template = environment.from_string(path.read_text("utf-8"))
    except TemplateError as error:
        raise ValueError(f"prompt file {path}: {error}") from None
    if "user" not in template.blocks:
        raise ValueError(
            f"prompt file {path}: it needs a block named user that shows {{{{ text }}}}"
        )
    return template


def escape_control_tokens(text: str, control: re.Pattern[str] | None) -> str:
    """Takes the power from control tokens of a chat template that stand inside a text.

    A space after the first character is enough: `<|im_end|>` becomes `< |im_end|>`.
    """
    if control is None:
        return text
    while control.search(text):  # taking one apart may complete another
        text = control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern of the tokens that a tokenizer would read as control tokens inside a text."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    names = {name for name in names if len(name) > 1 and not name.isspace()}
    if not names:
        return None
    return re.compile("|".join(re.escape(n) for n in sorted(names, key=lambda n: (-len(n), n))))


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
    """A chat as its template writes it, up to the start of the reply unless `reply` is false.

    Thinking is switched off where the template knows the switch: the reply is read directly. Where
    a template knows no system role, the system text stands in front of the first user turn.
    """
    if messages[0]["role"] == "system" and not _knows_system(tokenizer):
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    return _apply(tokenizer, messages, reply=reply)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, reply: bool) -> str:
    written = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=reply, enable_thinking=False
    )
    return str(written)


@lru_cache(maxsize=8)
def _knows_system(tokenizer: Any) -> bool:
    turns = [{"role": "system", "content": _MARK}, {"role": "user", "content": "x"}]
    try:
        return _MARK in _apply(tokenizer, turns, reply=True)
    except TemplateError:
        return False


def reply_form(chats: Sequence[Chat]) -> ReplyForm:
    """The one form of the replies of all chats.

    Raises:
        ValueError: chats were made from prompts that begin the reply in different ways.
    """
    forms = {
        ReplyForm(chat[-1]["content"], chat[-1].get("after"))
        if chat[-1]["role"] == "assistant"
        else ReplyForm()
        for chat in chats
    }
    if len(forms) > 1:
        raise ValueError(f"chats begin their replies in different ways: {sorted(forms, key=str)}")
    return forms.pop() if forms else ReplyForm()


@lru_cache(maxsize=32)
def reply_surroundings(tokenizer: Any, form: ReplyForm = ReplyForm()) -> tuple[str, str, str]:  # noqa: B008  # immutable
    """What stands before a reply, between that and its first character, and after its last one.

    The first is a chat up to the label, without blanks at its end: a token may join a blank with
    the word that follows. The template itself is asked, since it may write a space before an answer
    and end it with another token than end-of-text.
    """
    turns = [{"role": "user", "content": "x"}]
    start = chat_text(tokenizer, turns)
    whole = chat_text(tokenizer, [*turns, {"role": "assistant", "content": _MARK}], reply=False)
    before, _, after = whole.partition(_MARK)
    lead = before[len(start) :] if before.startswith(start) else ""
    begun = (lead + form.lead).rstrip() if form.lead else ""
    gap = (lead + form.lead)[len(begun) :]
    return start + begun, gap, after if form.after is None else form.after


def _ids(tokenizer: Any, messages: list[dict[str, str]], last: str, begun: str) -> list[int]:
    """Of a chat whose last turn says `last`, and of the reply that is begun."""
    turns = [*messages[:-1], {**messages[-1], "content": last}]
    text = chat_text(tokenizer, turns) + begun
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def chat_tokens(tokenizer: Any, chat: Chat, *, max_tokens: int) -> tuple[list[int], str | None]:
    """Token ids of a chat up to the start of the reply, at most `max_tokens` of them.

    A chat that is too long loses the end of its text, never what stands around it; the second
    value says so, else it is None.

    Raises:
        ValueError: what stands around the text is already too long.
    """
    control = control_tokens(tokenizer)
    turns = [turn for turn in chat if turn is not chat[-1] or turn["role"] == "user"]
    last, tail = turns[-1]["content"], turns[-1].get("tail", 0)
    body, end = last[: len(last) - tail], last[len(last) - tail :]
    body, end = escape_control_tokens(body, control), escape_control_tokens(end, control)
    messages = [
        {"role": m["role"], "content": escape_control_tokens(m["content"], control)} for m in turns
    ]
    begun = reply_surroundings(tokenizer, reply_form([chat]))[0]
    begun = begun[len(reply_surroundings(tokenizer)[0]) :]
    ids = _ids(tokenizer, messages, body + end, begun)
    whole = len(ids)
    if whole <= max_tokens:
        return ids, None
    offsets = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in offsets["offset_mapping"]]
    keep = len(starts)
    while len(ids) > max_tokens and keep > 0:
        keep = max(0, keep - (len(ids) - max_tokens))
        kept = body[: starts[keep]] if keep < len(starts) else body
        ids = _ids(tokenizer, messages, kept + end, begun)
    if len(ids) > max_tokens:
        raise ValueError(
            f"the prompt without its text already exceeds {max_tokens} tokens: "
            "fewer labels, shorter descriptions or demonstrations, or a larger max_tokens"
        )
    return ids, f"text cut: the prompt had {whole} tokens, the limit is {max_tokens}"
