"""Prompt files: find, render, hash; and the tokens of a chat.

A prompt is a jinja file with two blocks, `system` and `user`, under the same path in `prompts/` as
the module that uses it. Only the file is a template: texts, labels and demonstrations are values.
What all rows share (instructions, labels, demonstrations) stands first, the text last, so that an
engine computes the shared prefix once.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    tail: NotRequired[int]
    """Characters at the end of `content` that must survive when the text before is shortened."""


Chat = list[Message]

_MARK = "\ue000\ue001\ue000"  # private use: stands for a text or a reply to see what follows it


def find_prompt(prompt: str | Path) -> Path:
    """The prompt file of a path, or of a shipped name such as `label/direct`.

    Raises:
        FileNotFoundError: names the shipped prompts.
    """
    if Path(prompt).is_file():
        return Path(prompt)
    here = Path(__file__).parent
    shipped = here / "prompts" if (here / "prompts").is_dir() else here.parent / "prompts"
    path = shipped / f"{prompt}.jinja"
    if path.is_file():
        return path
    names = sorted(
        p.relative_to(shipped).with_suffix("").as_posix() for p in shipped.rglob("*.jinja")
    )
    raise FileNotFoundError(
        f"prompt {str(prompt)!r}: no such file, and not a shipped one ({', '.join(names)})"
    )


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
    template = _template(path, path.stat().st_mtime_ns)
    shared = {"labels": list(labels), **values}

    def block(name: str, text: str) -> str:
        context = template.new_context({**shared, "text": text})
        try:
            return "".join(template.blocks[name](context))
        except TemplateError as error:
            raise ValueError(f"prompt file {path}: {error}") from None

    chat: Chat = []
    if "system" in template.blocks and (system := block("system", "").strip()):
        chat.append({"role": "system", "content": system})
    for shown in demonstrations:
        chat.append({"role": "user", "content": block("user", shown["text"])})
        chat.append({"role": "assistant", "content": shown["label"]})
    _, found, tail = block("user", _MARK).rpartition(_MARK)
    if not found:
        raise ValueError(f"prompt file {path}: its user block does not show {{{{ text }}}}")
    chat.append({"role": "user", "content": block("user", text), "tail": len(tail)})
    return chat


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


def reply_surroundings(tokenizer: Any) -> tuple[str, str, str]:
    """What stands before a reply, between that and its first character, and after its last one.

    The first is a chat up to the generation prompt; the template itself is asked for the others,
    since it may write a space before an answer and end it with another token than end-of-text.
    """
    turns = [{"role": "user", "content": "x"}]
    start = chat_text(tokenizer, turns)
    whole = chat_text(tokenizer, [*turns, {"role": "assistant", "content": _MARK}], reply=False)
    before, _, after = whole.partition(_MARK)
    lead = before[len(start) :] if before.startswith(start) else ""
    return start, lead, after


def chat_tokens(tokenizer: Any, chat: Chat, *, max_tokens: int) -> tuple[list[int], str | None]:
    """Token ids of a chat up to the start of the reply, at most `max_tokens` of them.

    A chat that is too long loses the end of its text, never what stands around it; the second
    value says so, else it is None.

    Raises:
        ValueError: what stands around the text is already too long.
    """
    control = control_tokens(tokenizer)
    last, tail = chat[-1]["content"], chat[-1].get("tail", 0)
    body, end = last[: len(last) - tail], last[len(last) - tail :]
    body, end = escape_control_tokens(body, control), escape_control_tokens(end, control)
    messages = [
        {"role": m["role"], "content": escape_control_tokens(m["content"], control)} for m in chat
    ]

    def tokens(kept: str) -> list[int]:
        messages[-1]["content"] = kept + end
        text = chat_text(tokenizer, messages)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    ids = tokens(body)
    whole = len(ids)
    if whole <= max_tokens:
        return ids, None
    offsets = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in offsets["offset_mapping"]]
    keep = len(starts)
    while len(ids) > max_tokens and keep > 0:
        keep = max(0, keep - (len(ids) - max_tokens))
        ids = tokens(body[: starts[keep]] if keep < len(starts) else body)
    if len(ids) > max_tokens:
        raise ValueError(
            f"the prompt without its text already exceeds {max_tokens} tokens: "
            "fewer labels, shorter descriptions or demonstrations, or a larger max_tokens"
        )
    return ids, f"text cut: the prompt had {whole} tokens, the limit is {max_tokens}"
