"""What a run would ask, without asking it and without writing anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmlabel.engine.codes import code_chat, code_orders
from llmlabel.prompt import chat_tokens, render
from llmlabel.recipe import PlannedStep, load_recipe, plan, run

LABELS = ["cat", "money", "mat"]
TEXTS = [f"{LABELS[i % 3]} number {i}" for i in range(30)]
RECIPE = """
labels: {call: llmlabel.labelspace.load_labels, source: [cat, money, mat]}
texts: {call: llmlabel.data.load, path: texts.jsonl}
engine: {call: llmlabel.engine.fake.FakeEngine}
raw:
  call: llmlabel.label.direct.label_direct
  dataset: ${texts}
  engine: ${engine}
  labels: ${labels}
labeled: {call: llmlabel.refine.debias.batch_calibration, dataset: "${raw}", labels: "${labels}"}
file: {call: llmlabel.data.save, dataset: "${labeled}", output: labeled.jsonl}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return tmp_path


def planned(text: str = RECIPE, *overrides: str) -> list[PlannedStep]:
    before = {path for path in Path().rglob("*") if "recipe" not in path.name}
    Path("recipe.yaml").write_text(text)
    steps = plan(load_recipe("recipe.yaml", overrides))
    assert {path for path in Path().rglob("*") if "recipe" not in path.name} == before
    return steps


def test_rows_chats_and_the_first_prompt() -> None:
    (step,) = planned()
    assert (step.name, step.rows, step.problem, step.is_kept) == ("raw", 30, None, False)
    ((engine, asked, cost),) = step.asked
    assert (engine, cost) == ("FakeEngine", None)
    assert (asked.chats, asked.requests, asked.output_tokens) == (30, 30, 30)
    assert asked.first == render("label/direct", text=TEXTS[0], labels=LABELS)
    size = sum(len(turn["content"]) for turn in asked.first)
    assert not asked.is_exact
    assert 30 * size / 4 < asked.prompt_tokens < 30 * (size / 4 + 20)


def test_tokens_are_counted_where_the_tokenizer_is_here(
    tiny_decoder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("llmlabel.engine.hf.HFEngine.__init__.__wrapped__", loaded, raising=False)
    hf = f"engine={{call: llmlabel.engine.hf.HFEngine, model: {tiny_decoder}}}"
    (step,) = planned(RECIPE, hf)
    ((engine, asked, _),) = step.asked
    assert engine == f"HFEngine {tiny_decoder}"
    chats = [render("label/direct", text=text, labels=LABELS) for text in TEXTS]
    counted = [len(chat_tokens(tiny_tokenizer, chat, max_tokens=10**6)[0]) for chat in chats]
    assert asked.is_exact
    assert asked.prompt_tokens == sum(counted)


def test_many_chats_are_estimated_from_some(
    tiny_decoder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmlabel.engine.plan._COUNTED", 10)
    hf = f"engine={{call: llmlabel.engine.hf.HFEngine, model: {tiny_decoder}}}"
    (step,) = planned(RECIPE, hf)
    ((_, asked, _),) = step.asked
    chats = [render("label/direct", text=text, labels=LABELS) for text in TEXTS]
    counted = [len(chat_tokens(tiny_tokenizer, chat, max_tokens=10**6)[0]) for chat in chats]
    assert not asked.is_exact
    assert asked.prompt_tokens == pytest.approx(sum(counted), rel=0.02)
    assert asked.prompt_tokens != sum(counted)


@pytest.mark.parametrize("reading", ["codes", "auto"])
def test_letters_are_asked_in_several_orders_and_have_a_price(
    tiny_decoder: Path, tiny_tokenizer: Any, reading: str
) -> None:
    server = (
        "engine={call: llmlabel.engine.openai.OpenAIEngine, base_url: 'http://127.0.0.1:1/v1', "
        f"model: small, reading: {reading}, orders: 2, tokenizer: {tiny_decoder}, "
        "input_price: 2.0, output_price: 10.0}"
    )
    (step,) = planned(RECIPE, server)  # nobody is at that address
    ((engine, asked, cost),) = step.asked
    assert (engine, asked.chats, asked.requests) == ("OpenAIEngine small", 30, 60)
    tokens = 0
    for text in TEXTS:
        chat = render("label/direct", text=text, labels=LABELS)
        order = code_orders(chat, LABELS, orders=2)[0]
        asked_chat = code_chat(chat, [LABELS[at] for at in order])
        tokens += 2 * len(chat_tokens(tiny_tokenizer, asked_chat, max_tokens=10**6)[0])
    assert asked.prompt_tokens == tokens
    assert cost == pytest.approx((2 * tokens + 10 * 60) / 1e6)


def test_what_is_kept_is_not_asked_again() -> None:
    Path("recipe.yaml").write_text(RECIPE)
    run(load_recipe("recipe.yaml"))
    (step,) = planned()
    assert (step.is_kept, step.asked) == (True, [])
    (step,) = planned(RECIPE, "raw.min_mass=0.5")
    assert (step.is_kept, step.asked[0][1].chats) == (False, 30)
    assert step.finished_blocks == 1


def test_what_needs_training_is_not_planned_and_says_so() -> None:
    text = (
        RECIPE
        + """
student:
  call: llmlabel.train.classifier.train_classifier
  dataset: ${labeled}
  labels: ${labels}
  model: owner/name
  pooling: mean
seen: {call: llmlabel.train.classifier.predict, dataset: "${texts}", model: "${student}"}
again:
  call: llmlabel.label.direct.label_direct
  dataset: ${seen}
  engine: ${engine}
  labels: ${labels}
"""
    )
    first, second = planned(text)
    assert first.asked[0][1].chats == 30
    assert (second.name, second.asked) == ("again", [])
    assert second.problem == "it needs seen, which is not computed for a plan"


def test_a_step_that_cannot_run_says_why() -> None:
    (step,) = planned(RECIPE, "raw.min_mass=3.0")
    assert step.problem == "raw: min_mass is a probability between 0 and 1; got 3.0"


def test_steps_that_share_an_engine_are_counted_apart() -> None:
    text = (
        RECIPE
        + """
wrapped: {call: llmlabel.engine.cache.CachedEngine, engine: "${engine}", path: cache.sqlite}
few: {call: llmlabel.data.first_words, dataset: "${labeled}", words: 1}
judged:
  call: llmlabel.label.direct.label_direct
  dataset: ${few}
  engine: ${wrapped}
  labels: {call: llmlabel.labelspace.load_labels, source: [yes, no]}
inline:
  call: llmlabel.label.direct.label_direct
  dataset: ${texts}
  engine: {call: llmlabel.engine.fake.FakeEngine, noise: 0.5}
  labels: {call: llmlabel.labelspace.load_labels, source: [a, b, c, d], multilabel: true}
"""
    )
    steps = planned(text)
    assert [step.name for step in steps] == ["raw", "judged", "inline"]
    assert [[one[1].chats for one in step.asked] for step in steps] == [[30], [30], [120]]
    first = steps[1].asked[0][1].first
    assert first is not None
    assert first[-1]["content"].startswith("Text: cat\n")
    assert "- yes" in first[0]["content"]


def test_every_shipped_recipe_that_labels_has_a_plan() -> None:
    steps = plan(
        load_recipe("label", ["labels.source=[cat, money, mat]", "texts.path=texts.jsonl"])
    )
    assert [(step.name, step.asked[0][1].chats) for step in steps] == [("raw", 30)]
