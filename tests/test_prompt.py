import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmlabel.engine.codes import code_chat
from llmlabel.prompt import (
    chat_tokens,
    control_tokens,
    escape_control_tokens,
    find_prompt,
    prompt_sha,
    render,
)

LABELS = ["bug: it breaks", "praise"]


def test_direct_prompt(golden: Callable[[str], Any]) -> None:
    shown = [{"text": "Great!", "label": "praise"}]
    chat = render("label/direct", text="It crashed.", labels=LABELS, demonstrations=shown)
    assert chat == golden("prompts/label/direct.json")


def test_applies_prompt(golden: Callable[[str], Any]) -> None:
    chat = render("label/applies", text="It crashed.", labels=LABELS, label="bug")
    assert chat == golden("prompts/label/applies.json")


def test_quoted_prompt(golden: Callable[[str], Any]) -> None:
    shown = [{"text": "Great!", "label": "praise"}]
    chat = render("label/quoted", text="It crashed.", labels=LABELS, demonstrations=shown)
    assert chat == golden("prompts/label/quoted.json")


@pytest.mark.parametrize("prompt", ["label/direct", "label/quoted"])
def test_codes_prompt(golden: Callable[[str], Any], prompt: str) -> None:
    shown = [{"text": "Great!", "label": "praise"}]
    chat = render(prompt, text="It crashed.", labels=["bug", "praise"], demonstrations=shown)
    assert code_chat(chat, ["praise", "bug"]) == golden("prompts/engine/codes.json")


def test_a_reply_block_needs_something_that_closes_it(tmp_path: Path) -> None:
    file = tmp_path / "open.jinja"
    user = "{% block user %}{{ text }}{% endblock %}"
    file.write_text(user + "{% block reply %}Label: {{ answer }}{% endblock %}")
    with pytest.raises(ValueError, match=r"its reply block does not show .* that closes it"):
        render(file, text="x", labels=LABELS)


def test_every_shipped_prompt_has_a_golden_file() -> None:
    shipped = find_prompt("label/direct").parents[1]
    names = {p.relative_to(shipped).with_suffix("") for p in shipped.rglob("*.jinja")}
    frozen = Path(__file__).parent / "golden" / "prompts"
    assert names == {p.relative_to(frozen).with_suffix("") for p in frozen.rglob("*.json")}
    assert len(names) >= 2


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7 * 7 }}",
        "{% for x in labels %}{{ x }}{% endfor %}",
        "{# gone #}",
        "</s>",
        "a\x00b",
        "\n",
    ],
)
def test_a_text_is_never_a_template(text: str) -> None:
    chat = render("label/direct", text=text, labels=LABELS)
    assert chat[-1]["content"] == f"Text: {text}\nLabel:"
    assert chat[-1]["tail"] == len("\nLabel:")


def test_labels_are_never_templates() -> None:
    chat = render("label/direct", text="x", labels=["{{ 7 * 7 }}", "b"])
    assert "- {{ 7 * 7 }}\n- b\n" in chat[0]["content"]


def test_missing_prompt_names_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"'label/drect'.*label/applies, .*label/direct"):
        find_prompt("label/drect")


def test_a_prompt_needs_the_text_and_known_variables(tmp_path: Path) -> None:
    file = tmp_path / "p.jinja"
    file.write_text("{% block user %}no text{% endblock %}")
    with pytest.raises(ValueError, match=r"p.jinja.*does not show \{\{ text \}\}"):
        render(file, text="x", labels=LABELS)
    file.write_text("{{ text }}")
    with pytest.raises(ValueError, match=r"block named user"):
        render(file, text="x", labels=LABELS)
    file.write_text("{% block user %}{{ text }} {{ lables }}{% endblock %}")
    with pytest.raises(ValueError, match=r"p.jinja: 'lables' is undefined"):
        render(file, text="x", labels=LABELS)
    file.write_text("{% block user %}{{ text {% endblock %}")
    with pytest.raises(ValueError, match=r"p.jinja: "):
        render(file, text="x", labels=LABELS)
    file.write_text("{% block user %}{{ text | upper }}{% endblock %}")
    assert render(file, text="x", labels=LABELS)[0]["content"] == "X"


def test_what_chats_share_follows_their_arguments(tmp_path: Path) -> None:
    file = tmp_path / "p.jinja"
    source = "{% block system %}{{ labels }}{% endblock %}{% block user %}{{ text }}|{{ x }}{% endblock %}"
    file.write_text(source)
    labels = ["a"]
    first = render(file, text="t", labels=labels, x="1")
    assert first == [
        {"role": "system", "content": "['a']"},
        {"role": "user", "content": "t|1", "tail": 2},
    ]
    first[0]["content"] = "changed by its owner"
    labels.append("b")
    assert render(file, text="t", labels=labels, x="1")[0]["content"] == "['a', 'b']"
    assert render(file, text="t", labels=["a"], x="1")[0]["content"] == "['a']"
    for x, shown in ((1, "1"), (True, "True"), (1.0, "1.0"), (["l"], "['l']"), ("True", "True")):
        chat = render(file, text="t", labels=labels, x=x)
        assert (chat[1]["content"], chat[1]["tail"]) == (f"t|{shown}", len(shown) + 1)
    file.write_text(source.replace("|", "||"))
    os.utime(file, ns=(0, 0))
    assert render(file, text="t", labels=labels, x="1")[1] == {
        "role": "user",
        "content": "t||1",
        "tail": 3,
    }


def test_sha_is_of_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jinja", tmp_path / "two.jinja"
    one.write_text("{% block user %}{{ text }}{% endblock %}")
    two.write_text("{% block user %}{{ text }}!{% endblock %}")
    assert prompt_sha(one) != prompt_sha(two)
    assert re.fullmatch("[0-9a-f]{16}", prompt_sha(one))


def test_escape_leaves_no_control_token(tiny_tokenizer: Any) -> None:
    control = control_tokens(tiny_tokenizer)
    assert control is not None
    for text in ["<|im_end|>", "<|im_<|im_end|>end|>", "<<|im_end|>|im_start|>", "plain < |"]:
        escaped = escape_control_tokens(text, control)
        assert not control.search(escaped)
        assert escaped.replace(" ", "") == text.replace(" ", "")
    assert escape_control_tokens("plain", None) == "plain"


def test_a_long_chat_keeps_its_surroundings(tiny_tokenizer: Any) -> None:
    chat = render("label/direct", text="the cat sat on the mat " * 50, labels=LABELS)
    whole, message = chat_tokens(tiny_tokenizer, chat, max_tokens=10_000)
    assert message is None
    ids, message = chat_tokens(tiny_tokenizer, chat, max_tokens=400)
    assert message == f"text cut: the prompt had {len(whole)} tokens, the limit is 400"
    assert 380 < len(ids) <= 400
    text = tiny_tokenizer.decode(ids)
    assert text.endswith("\nLabel:<|im_end|>\n<|im_start|>assistant\n")
    assert "- praise" in text
    kept = text.split("Text: ")[1].split("\nLabel:")[0]
    assert ("the cat sat on the mat " * 50).startswith(kept)


def test_golden_files_are_json() -> None:
    files = list((Path(__file__).parent / "golden").rglob("*.json"))
    assert files
    for file in files:
        json.loads(file.read_text("utf-8"))
