"""Replies with labels: every form that is read, everything that is refused and in which words."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from llmlabel.prompt import render
from llmlabel.taxonomy.guardrails import (
    Limits,
    Proposal,
    ReplyError,
    foreign_script,
    is_vague,
    scripts_of,
)
from llmlabel.taxonomy.replies import (
    labels_schema,
    read_label,
    read_labels,
    read_summary,
    reply_tokens,
)

LATIN = frozenset({"LATIN"})
LIMITS = Limits(4, 3, 8, LATIN)
CARD = {"name": "Lost card", "description": "a card is gone"}
FEES = {"name": "Fees", "description": "what a transfer costs"}
NAMES, DESCRIPTIONS = ("Lost card", "Fees"), ("a card is gone", "what a transfer costs")
WHOLE = {"labels": [CARD, FEES]}

TABLE = """| id | name | description |
|---|:---:|---|
| 1 | **Lost card** | a card is gone |
| 2 | Fees | what a transfer costs |"""

READ = {
    "json": json.dumps(WHOLE),
    "json, several lines": json.dumps(WHOLE, indent=2),
    "json in a fence": f"Here they are:\n```json\n{json.dumps(WHOLE)}\n```\nI hope that helps!",
    "a bare list": json.dumps([CARD, FEES]),
    "behind the echoed format": (
        f'{{"labels": [{{"name": "...", "description": "..."}}]}}\n{json.dumps(WHOLE)}'
    ),
    "before the echoed format": (
        f'{json.dumps(WHOLE)} as in {{"labels": [{{"name": "label name"}}]}}'
    ),
    "markdown table": TABLE,
    "table between remarks": f"These labels fit:\n\n{TABLE}\n\nAnything else?",
    "table with other columns": TABLE.replace(
        "| id | name | description |", "|#|Category|Meaning|"
    ),
    "table without bars at the ends": "name | description\n--- | ---\n"
    "Lost card | a card is gone\nFees | what a transfer costs",
    "bullets": "- Lost card: a card is gone\n- Fees: what a transfer costs",
    "bold bullets": "* **Lost card:** a card is gone\n* **Fees** - what a transfer costs",
    "numbers": "Labels:\n1. Lost card: a card is gone\n2) Fees \u2013 what a transfer costs\n",
    "suggestions are no labels": (
        "Score: 80\nSuggestions:\n- Merge: all of them\n- Split: some\n\nUpdated labels:\n"
        "- Lost card: a card is gone\n- Fees: what a transfer costs\nExplanation: because"
    ),
    "a table of suggestions is none": (
        f"{TABLE}\n\n## Suggestions\n\n| name | description |\n|---|---|\n| New | x |\n| Newer | y |"
    ),
    "numbered parts": (
        "1. Score: 70\n2. Explanation: fits\n3. Suggestions: none\n4. Labels:\n"
        "- Lost card: a card is gone\n- Fees: what a transfer costs"
    ),
    "a list of remarks is none": f'{json.dumps(WHOLE)}\nSuggestions: ["Merge all", "Split some"]',
    "numbers in brackets are none": f"{json.dumps(WHOLE)}\nI merged labels [1, 2].",
    "brackets beside a table": f'Suggestions: merge ["Fees", "Costs"]\nLabels:\n{TABLE}\nSee [1].',
    "a table of changes is none": f"{TABLE}\n\nChanges:\n\n| old | new |\n|---|---|\n| a | b |",
    "points below a label describe it": (
        "1. **Lost card**\n   - Description: a card is gone\n   - Example: mine\n"
        "2. **Fees**\n   - Description: what a transfer costs"
    ),
}


@pytest.mark.parametrize("form", READ)
def test_forms_that_are_read(form: str) -> None:
    got = read_labels(READ[form], LIMITS)
    assert (got.names, got.descriptions) == (NAMES, DESCRIPTIONS)


def test_judgements_are_read_beside_the_labels() -> None:
    said = {"score": 70, "explanation": "they\nfit", "suggestions": "add one"}
    expected = Proposal(NAMES, DESCRIPTIONS, 70, "add one", "they fit")
    assert read_labels(json.dumps({**said, **WHOLE}), LIMITS) == expected
    prose = "Score: 70 of 100\nExplanation: they fit\nSuggestions: add one\nLabels:\n"
    assert read_labels(prose + READ["bullets"], LIMITS) == expected


@pytest.mark.parametrize("score", [-1, 101, "70", 7.5, True, None])
def test_a_score_that_is_none_is_left_out(score: Any) -> None:
    assert read_labels(json.dumps({"score": score, **WHOLE}), LIMITS).score is None


def test_a_label_may_be_called_like_a_heading() -> None:
    names = ("Fees", "Cards", "Suggestions", "Login")
    listed = "\n".join(f"{n}. {name}: about it" for n, name in enumerate(names, start=1))
    assert read_labels(listed, LIMITS).names == names
    assert read_labels(f"{listed}\n5. Explanation: they fit", LIMITS) == Proposal(
        names, ("about it",) * 4, explanation="they fit"
    )


def labels(*names: str, description: str = "") -> str:
    return json.dumps({"labels": [{"name": n, "description": description} for n in names]})


REFUSED = {
    "": "neither JSON, nor a Markdown table, nor a list",
    "I would like to help you.": "neither JSON, nor a Markdown table, nor a list",
    '{"labels": [{"name": "Lost card"}, {"na': "the JSON is broken or ends too early",
    '```json\n{"labels": ["Lost card", "Fees"], "explanation": "it is\n```': "the JSON is broken",
    '{"labels": []}': "JSON without a list of labels",
    '{"clusters": [1]}': "JSON without a list of labels",
    '{"labels": [{"name": "..."}, {"name": "label name"}]}': "the format example was repeated",
    "- name: description\n- category name: description": "the format example was repeated",
    '{"labels": [{"name": 1}, {"name": "Fees"}]}': "label 1 has no name",
    '{"labels": [{"name": "Fees", "description": 3}, "Card"]}': "description of label 1 is no text",
    labels("a b", "c", "d", "e", "f"): "5 labels, at most 4 were asked",
    labels("Fees"): "one label only",
    labels("Fees", "x" * 25): "is longer than 3 words",
    labels("Fees", "Card", description="d" * 65): "is longer than 8 words",
    labels("Fees", "Other topics"): "the name 'Other topics' says nothing",
    labels("Fees", "category name"): "the name 'category name' is that of the format example",
    labels("Fees", "3."): "the name '3.' has no letter",
    labels("Fees", "FEES"): "repeated: 'FEES'",
    labels(
        "\u8d39\u7528", "\u5361\u7247\u4e22\u5931"
    ): "written in cjk script, but the texts are in latin",
    "Suggestions:\n- Lost card: a\n- Fees: b": "neither JSON",
}


@pytest.mark.parametrize("reply", REFUSED)
def test_replies_that_are_refused(reply: str) -> None:
    with pytest.raises(ReplyError, match=REFUSED[reply]):
        read_labels(reply, LIMITS)


def test_a_name_of_a_label_above_is_refused() -> None:
    below = Limits(4, 3, 8, LATIN, taken=("Money", "fees"))
    with pytest.raises(ReplyError, match="'Fees' is that of a label above"):
        read_labels(json.dumps(WHOLE), below)


def test_all_problems_of_a_reply_are_told() -> None:
    with pytest.raises(ReplyError) as refused:
        read_labels(labels("Fees", "Misc", "fees", "Misc", "General", "x"), LIMITS)
    assert str(refused.value) == (
        "6 labels, at most 4 were asked; the name 'Misc' says nothing; the name 'Misc' says "
        "nothing; the name 'General' says nothing; repeated: 'fees', 'Misc'"
    )
    assert refused.value.distinct is None


def test_where_only_names_are_repeated_the_distinct_ones_are_known() -> None:
    with pytest.raises(ReplyError) as refused:
        read_labels(json.dumps({"labels": [CARD, FEES, {**CARD, "name": "lost CARD"}]}), LIMITS)
    assert refused.value.distinct == Proposal(NAMES, DESCRIPTIONS)
    with pytest.raises(ReplyError, match="fewer than 2 different labels") as refused:
        read_labels(labels("Fees", "fees"), LIMITS)
    assert refused.value.distinct is None


def test_a_text_that_the_schema_stopped_ends_with_a_whole_word() -> None:
    description = "what a transfer to another bank in another country costs, and wh"
    assert len(description) == 64
    got = read_labels(labels("Fees", "Card", description=description), LIMITS)
    assert got.descriptions[0] == "what a transfer to another bank in another country costs, and"


@pytest.mark.parametrize(
    ("name", "vague"),
    [
        ("Other", True),
        ("Other / Misc.", True),
        ("General questions", True),
        ("N/A", True),
        ("none of the above", True),
        ("Questions", False),
        ("General insurance", False),
        ("Other banks", False),
        ("Questions about cards", False),
    ],
)
def test_vague_names(name: str, vague: bool) -> None:
    assert is_vague(name) == vague


def test_scripts() -> None:
    english, russian = "hello there " * 10, "\u043f\u0440\u0438\u0432\u0435\u0442 "
    assert scripts_of([english, "\u00e4 1 !"]) == {"LATIN"}
    assert scripts_of([english, russian]) == {"LATIN", "CYRILLIC"}
    assert scripts_of([english * 20, russian]) == {"LATIN"}
    assert foreign_script(["ok \u043f\u0440"], LATIN) is None  # half of it
    assert foreign_script(["\u043f\u0440\u0438", "ok"], LATIN) == (
        "written in cyrillic script, but the texts are in latin"
    )
    assert foreign_script(["123", ""], LATIN) is None
    assert foreign_script(["\u043f\u0440\u0438"], frozenset()) is None  # texts without a letter


def test_a_single_label() -> None:
    assert read_label(json.dumps(FEES), LIMITS) == Proposal(("Fees",), (FEES["description"],))
    echoed = '{"name": "...", "description": "..."} ' + json.dumps(FEES)
    assert read_label(echoed, LIMITS).names == ("Fees",)
    assert read_label("- Fees: what it costs", LIMITS).names == ("Fees",)
    with pytest.raises(ReplyError, match="says nothing"):
        read_label('{"name": "Other", "description": ""}', LIMITS)


@pytest.mark.parametrize(
    ("reply", "summary"),
    [
        ('{"summary": "a lost\\n card"}', "a lost card"),
        ("a lost card ", "a lost card"),
        ('Sure: {"summary": "a lost card"}', "a lost card"),
    ],
)
def test_summaries_that_are_read(reply: str, summary: str) -> None:
    assert read_summary(reply, words=5, scripts=LATIN) == summary


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "the summary is empty"),
        ('{"summary": " . "}', "the summary is empty"),
        ('{"summary": 3}', "the summary is the int 3, not text"),
        ('{"summary": "a lo', "no JSON with a summary"),
        ("word " * 30, "a summary of 30 words, at most 5 were asked"),
        ('{"summary": "\u5361\u7247"}', "written in cjk script"),
    ],
)
def test_summaries_that_are_refused(reply: str, problem: str) -> None:
    with pytest.raises(ReplyError, match=problem):
        read_summary(reply, words=5, scripts=LATIN)


def test_what_the_schema_allows_the_guardrails_allow() -> None:
    schema = labels_schema(LIMITS, rated=True, words=5)
    assert list(schema["properties"]) == ["score", "explanation", "suggestions", "labels"]
    many = schema["properties"]["labels"]
    assert (many["minItems"], many["maxItems"]) == (2, 4)
    longest = {
        "name": "n" * many["items"]["properties"]["name"]["maxLength"],
        "description": "d" * many["items"]["properties"]["description"]["maxLength"],
    }
    reply = {"labels": [{**longest, "name": f"{i}{longest['name'][1:]}"} for i in range(4)]}
    assert len(read_labels(json.dumps(reply), LIMITS).names) == 4
    # room for it, at four characters a token
    remarks = {"score": 100, "explanation": "e" * 40, "suggestions": "s" * 40}
    assert reply_tokens(schema) >= len(json.dumps({**remarks, **reply})) / 4


PROMPTS: dict[str, dict[str, Any]] = {
    "summarise": {"use_case": "routing", "words": "20"},
    "generate": {"use_case": "routing", "parent": ""},
    "update": {
        "use_case": "routing",
        "parent": "Cards",
        "table": Proposal(NAMES, ("a", "b")).table(),
    },
    "review": {"use_case": "routing", "parent": ""},
    "select": {"use_case": "routing", "parent": "", "candidates": ["one", "two"]},
    "name": {"use_case": "routing", "taken": "Fees, Cards"},
}
WORDS = {"max_labels": "5", "name_words": "4", "description_words": "12", "remark_words": "10"}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, golden: Callable[[str], Any]) -> None:
    text = "- {{ 7 * 7 }} a card\n- <b>fees</b>"
    listed = ("A", "B") if name == "select" else ()
    chat = render(f"taxonomy/{name}", text=text, labels=listed, **{**WORDS, **PROMPTS[name]})
    assert chat == golden(f"prompts/taxonomy/{name}.json")
