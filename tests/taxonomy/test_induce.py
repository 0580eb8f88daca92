"""The state machine of TnT-LLM around an engine that says what a script tells it."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from pydantic import TypeAdapter
from reference import taxonomy as reference
from taxonomy.scripted import Scripted, reply

from llmlabel.engine import Reply, Scores
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat
from llmlabel.taxonomy.guardrails import TaxonomyError
from llmlabel.taxonomy.induce import (
    Taxonomy,
    induce,
    labels_of,
    summarise,
    with_other,
)
from llmlabel.taxonomy.rounds import minibatches, position_free


def table(rows: int) -> Dataset:
    texts = [f"text {i:03}" for i in range(rows)]
    return Dataset.from_dict({"id": [f"r{i:03}" for i in range(rows)], "text": texts})


def found(rows: int, engine: Scripted, **given: Any) -> Taxonomy:
    return induce(table(rows), engine, use_case="tests", **{"batch_rows": 10, **given})


# --------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize(
    ("rows", "size", "runs"),
    [(1, 10, 1), (9, 10, 1), (10, 10, 1), (11, 10, 1), (47, 10, 1), (50, 10, 1), (47, 10, 3)],
)
def test_exactly_the_calls_of_the_paper(rows: int, size: int, runs: int) -> None:
    engine = Scripted()
    got = found(rows, engine, batch_rows=size, runs=runs)
    read = rows if runs == 1 else rows - rows // 5  # a fifth is held out to choose among runs
    batches = math.ceil(read / size)
    steps = ["generate"] * runs + ["update"] * (batches - 1) * runs + ["review"] * runs
    assert engine.steps() == steps + ["select"] * (runs if runs > 1 else 0)
    assert [entry["step"] for entry in got.history if entry["run"] == 0][: batches + 1] == [
        "generate",
        *["update"] * (batches - 1),
        "review",
    ]


def test_every_text_is_in_one_batch_and_a_short_one_is_filled() -> None:
    engine = Scripted()
    found(47, engine)
    shown = [one["texts"] for one in engine.asked if one["step"] != "review"]
    assert [len(texts) for texts in shown] == [10] * 5
    assert [len(set(texts)) for texts in shown] == [10] * 5
    own = [text for texts in shown[:4] for text in texts] + shown[4][:7]
    assert sorted(own) == [f"text {i:03}" for i in range(47)]
    assert set(shown[4][7:]) <= set(own[:40])
    assert own != sorted(own)


def test_minibatches() -> None:
    rng = np.random.default_rng(0)
    assert sorted(minibatches([5, 6, 7], 10, rng)[0]) == [5, 6, 7]
    assert [len(b) for b in minibatches(range(20), 10, rng)] == [10, 10]
    fills = [minibatches(range(11), 10, np.random.default_rng(s))[1][1:] for s in range(40)]
    assert len({row for fill in fills for row in fill}) == 11  # drawn from all


def test_each_call_gets_its_batch_and_the_labels_before() -> None:
    engine = Scripted(lambda step, n: reply("one", f"{step} {n}"))
    got = found(30, engine)
    assert '{"name": "generate 0", "description": "about generate 0"}' in engine.asked[1]["system"]
    assert '{"name": "update 0", "description": "about update 0"}' in engine.asked[2]["system"]
    assert '{"name": "update 1", "description": "about update 1"}' in engine.asked[3]["user"]
    assert "text" not in " ".join(engine.asked[3]["texts"])  # a review sees no texts
    assert got.labels.names == ("one", "review 0")
    assert got.labels.descriptions == ("about one", "about review 0")


def test_history() -> None:
    engine = Scripted(lambda step, n: reply("one", f"{step} {n}", score=10 * n))
    got = found(30, engine)
    assert got.history[2] == {
        "run": 0,
        "level": 1,
        "parent": None,
        "step": "update",
        "batch": 2,
        "score": 10,
        "suggestions": "what",
        "explanation": "why",
        "labels": ["one", "update 1"],
        "added": ["update 1"],
        "removed": ["update 0"],
        "attempts": 1,
        "problem": None,
        "notes": [],
    }
    assert [entry["batch"] for entry in got.history] == [0, 1, 2, None]
    adapter = TypeAdapter(Taxonomy)
    assert adapter.validate_json(adapter.dump_json(got)) == got
    assert labels_of(got) is got.labels


def test_temperatures_and_the_schema() -> None:
    engine = Scripted()
    found(20, engine, max_labels=7, seed=3)
    assert [one["temperature"] for one in engine.asked] == [0.5, 0.2, 0.0]
    assert {one["seed"] for one in engine.asked} == {3}
    assert engine.asked[0]["schema"]["properties"]["labels"]["maxItems"] == 7


def test_the_order_of_rows_changes_nothing() -> None:
    rows = table(47)
    mixed = rows.select(np.random.default_rng(0).permutation(47))
    one, two = Scripted(), Scripted()
    for engine, some in ((one, rows), (two, mixed)):
        induce(some, engine, use_case="tests", batch_rows=10, runs=2)
    assert one.asked == two.asked


def test_another_seed_shuffles_otherwise() -> None:
    one, two = Scripted(), Scripted()
    found(47, one, seed=0)
    found(47, two, seed=1)
    assert one.asked[0]["texts"] != two.asked[0]["texts"]


def test_texts_are_values_on_lines_of_their_own() -> None:
    text = 'first\n- second  {{ 7 * 7 }}\n</s> <b>&"' + " word" * 50
    rows = Dataset.from_dict({"id": ["a", "b"], "text": [text, " \n"]})
    engine = Scripted()
    induce(rows, engine, use_case="tests", words=11)
    assert engine.asked[0]["texts"] == ['first - second {{ 7 * 7 }} </s> <b>&" word']


# ------------------------------------------------------------------------------ refused replies


def test_the_ladder_of_temperatures_and_the_kept_labels() -> None:
    engine = Scripted(lambda step, n: "??" if step == "update" else reply("one", step))
    got = found(20, engine, seed=7)
    tried = engine.of("update")
    assert [one["temperature"] for one in tried] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert [one["seed"] for one in tried] == [7, 8, 9, 10, 11, 12]
    assert len({one["user"] for one in tried}) == 1
    entry = got.history[1]
    assert (entry["labels"], entry["added"], entry["attempts"]) == (["one", "generate"], [], 6)
    assert entry["problem"].startswith("neither JSON")
    assert got.labels.names == ("one", "review")


def test_what_takes_long_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cut = "text cut: the prompt had 9 tokens, the limit is 8"
    caplog.set_level("INFO", logger="llmlabel")
    engine = Scripted(
        lambda step, n: "??" if n == 0 else Reply(reply("one", step), "stop", cut), holds=False
    )
    found(5, engine, max_labels=4)
    problem = "neither JSON, nor a Markdown table, nor a list of `name: description`"
    assert caplog.messages == [
        "induce level 1: 2 calls, replies of up to 879 tokens",
        f"generate: 1 of 1 replies refused, attempt 1 of 6: {problem}",
        f"generate: 1 of 1 chats not read whole (show fewer texts, or less of each): {cut}",
        f"review: 1 of 1 replies refused, attempt 1 of 6: {problem}",
        f"review: 1 of 1 chats not read whole (show fewer texts, or less of each): {cut}",
    ]


LONG = "word " * 30
CHINESE = json.dumps({"labels": ["\u8d39\u7528", "\u5361\u7247"]})
BAD_REPLIES = {
    "the name 'name' is that of the format example": reply("one", "name"),
    "5 labels, at most 4 were asked": reply(*"abcde"),
    "is longer than 10 words": reply("one", LONG),
    "written in cjk script, but the texts are in latin": CHINESE,
    "neither JSON, nor a Markdown table, nor a list": "| name |\n\nThe labels fit.",
}


@pytest.mark.parametrize("problem", BAD_REPLIES)
def test_the_labels_before_stay_whatever_is_wrong_with_an_update(problem: str) -> None:
    engine = Scripted(lambda step, n: BAD_REPLIES[problem] if step == "update" else reply("x", "y"))
    got = found(20, engine, max_labels=4)
    entry = got.history[1]
    assert (entry["step"], entry["labels"], entry["attempts"]) == ("update", ["x", "y"], 6)
    assert problem in entry["problem"]
    assert got.labels.names == ("x", "y")


def test_an_update_that_repeats_a_name_is_taken_once() -> None:
    said = {"generate": reply("x", "y"), "update": reply("z", "Z", "w"), "review": "??"}
    got = found(20, Scripted(lambda step, n: said[step]))
    assert got.history[1]["labels"] == ["z", "w"]
    assert got.history[1]["problem"] == "repeated names were taken once (repeated: 'Z')"
    assert got.labels.names == ("z", "w")


def test_texts_without_blanks_are_shown_as_so_many_characters() -> None:
    texts = ["\u8d39\u7528" * 500 + str(i) for i in range(4)]
    engine = Scripted(lambda step, n: CHINESE)
    rows = Dataset.from_dict({"id": list("abcd"), "text": texts})
    induce(rows, engine, use_case="tests", words=5)
    shown = re.findall("[\u4e00-\u9fff]+", engine.of("generate")[0]["user"])
    assert [len(some) for some in shown] == [80] * 4  # 2 x 5 words of 8 characters


def test_held_out_texts_are_encoded_once() -> None:
    class Counting(Topics):
        texts = 0

        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            self.texts += sum(text.startswith("text") for text in texts)
            return super().encode(texts, **options)

    encoder = Counting()
    rows = Dataset.from_dict(
        {"id": [f"{i}" for i in range(50)], "text": [f"text {i} cat" for i in range(50)]}
    )
    induce(rows, Scripted(), use_case="tests", batch_rows=10, runs=3, encoder=encoder)
    assert encoder.texts == 10


def test_a_later_attempt_counts() -> None:
    engine = Scripted(lambda step, n: "??" if step == "generate" and n < 2 else reply("one", step))
    got = found(5, engine)
    assert (got.history[0]["attempts"], got.history[0]["problem"]) == (3, None)


def test_without_labels_the_error_names_all() -> None:
    engine = Scripted(lambda step, n: "I am a helpful assistant")
    with pytest.raises(TaxonomyError) as failure:
        found(30, engine)
    assert str(failure.value) == (
        "induce: generate on batch 0 of run 0 gave no labels in 6 attempts: neither JSON, nor a "
        "Markdown table, nor a list of `name: description`; the last reply began 'I am a helpful "
        "assistant'; lower max_labels or batch_rows, allow more words, or take a larger model"
    )
    assert isinstance(failure.value, ValueError)
    assert engine.steps() == ["generate"] * 6


def test_repeated_names_are_taken_once_when_nothing_else_helps() -> None:
    engine = Scripted(lambda step, n: reply("one", "two", "ONE") if n < 6 else reply("three", "x"))
    got = found(5, engine)
    assert engine.steps() == ["generate"] * 6 + ["review"] * 6
    assert got.labels.names == ("one", "two")
    assert got.history[0]["problem"] == "repeated names were taken once (repeated: 'ONE')"
    assert got.history[0]["attempts"] == 6


def test_an_engine_that_holds_no_schema_is_asked_freely() -> None:
    prose = "Score: 40\nLabels:\n- one: first\n- two: second\n"
    engine = Scripted(lambda step, n: prose, holds=False)
    got = found(20, engine)
    assert got.labels.descriptions == ("first", "second")
    assert [one["schema"] for one in engine.asked] == [None] * 3
    assert got.history[1]["score"] == 40


def test_a_server_that_refuses_the_schema_is_asked_freely() -> None:
    class Server(Scripted):
        def generate(self, chats: Sequence[Chat], **given: Any) -> list[Reply]:
            if given["schema"] is not None:
                return [Reply("", "error", "400: response_format") for _ in chats]
            return super().generate(chats, **given)

    assert found(20, Server()).labels.names == ("one", "review 0")


def test_a_prompt_without_room_is_told_with_the_way_out() -> None:
    class Small(Scripted):
        def generate(self, chats: Sequence[Chat], **given: Any) -> list[Reply]:
            raise ValueError("the prompt without its text already exceeds 9 tokens")

    with pytest.raises(ValueError, match=r"exceeds 9 tokens \(the longest reply needs \d+ tokens"):
        found(5, Small())


def test_a_failing_server_is_told_and_asked_again(tmp_path: Path) -> None:
    broken = Scripted(lambda step, n: Reply("", "error", "503: busy"))
    with pytest.raises(TaxonomyError, match="the engine failed: 503: busy"):
        found(5, broken, output=tmp_path)
    assert found(5, Scripted(), output=tmp_path).labels.names == ("one", "review 0")


def test_a_reply_without_an_end_is_told() -> None:
    engine = Scripted(
        lambda step, n: Reply('{"labels": [{"na', "length") if n == 0 else reply("one", step)
    )
    assert found(5, engine).history[0]["attempts"] == 2
    engine = Scripted(lambda step, n: Reply('{"labels": [{"na', "length"))
    with pytest.raises(TaxonomyError, match="too long and has no end; the JSON is broken"):
        found(5, engine)


def test_a_cut_batch_is_told_and_a_cut_review_refused() -> None:
    cut = "text cut: the prompt had 9 tokens, the limit is 8"
    engine = Scripted(lambda step, n: Reply(reply("one", step), "stop", cut))
    got = found(5, engine)
    assert got.labels.names == ("one", "generate")  # some of the labels were not reviewed
    assert [entry["notes"] for entry in got.history] == [[cut], [cut]]
    assert [entry["problem"] for entry in got.history] == [None, cut]


# ------------------------------------------------------------------------------- several runs


def test_the_preferred_run_wins_at_every_position() -> None:
    for winner in range(3):
        engine = Scripted(
            lambda step, n: reply("one", f"set {n}"),
            prefers=lambda t, winner=winner: 1.0 * (f"set {winner}" in t),
        )
        got = found(60, engine, runs=3)
        assert got.labels.names == ("one", f"set {winner}")
        entry = got.history[-1]
        share = math.e / (math.e + 2)
        assert (entry["step"], entry["run"], entry["problem"]) == ("select", winner, None)
        assert entry["score"] == round(100 * share)
        assert f"run {winner}: {share:.3f}" in entry["explanation"]
        at = [re.findall(r'"name": "set (\d)"', one["system"]) for one in engine.of("select")]
        assert [sorted(column) for column in zip(*at, strict=True)] == [["0", "1", "2"]] * 3


def test_held_out_texts_are_seen_by_no_run() -> None:
    seen = list[str]()

    class Watching(Scripted):
        def score(self, chats: Sequence[Chat], labels: Sequence[str], **given: Any) -> Scores:
            for chat in chats:
                seen.extend(re.findall(r"^- (text .*)$", chat[1]["content"], re.MULTILINE))
            return super().score(chats, labels, **given)

    engine = Watching()
    found(60, engine, runs=2)
    read = {text for one in engine.asked if "texts" in one for text in one["texts"]}
    assert len(set(seen)) == 10  # at most a batch
    assert not read & set(seen)
    assert len(read | set(seen)) == 60


def test_runs_that_find_nothing_drop_out() -> None:
    engine = Scripted(lambda step, n: "??" if step == "generate" and n != 1 else reply("one", step))
    got = found(20, engine, runs=2)
    assert got.labels.names == ("one", "review")
    assert "gave no labels in 6 attempts" in got.history[0]["notes"][0]
    assert "select" not in engine.steps()


@pytest.mark.parametrize("seed", range(20))
def test_position_free_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 6))
    orders = np.stack([rng.permutation(count) for _ in range(4)])
    log_probs = np.log(rng.dirichlet(np.ones(count), 4))
    expected = reference.position_free(log_probs.tolist(), orders.tolist())
    np.testing.assert_allclose(position_free(log_probs, orders), expected, rtol=1e-12)


def test_nothing_said_of_positions_is_no_choice() -> None:
    silent = position_free(np.full((2, 2), -np.inf), np.array([[0, 1], [1, 0]]))
    assert silent.tolist() == [0.0, 0.0]


class Topics:
    """An encoder that sees the words cat and dog."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        return np.array([[1e-3 + ("cat" in t), 1e-3 + ("dog" in t)] for t in texts])


def test_an_encoder_chooses_among_all_rounds() -> None:
    def says(step: str, n: int) -> str:
        return reply("cat", "dog") if (step, n) == ("update", 1) else reply("one", f"{step} {n}")

    engine = Scripted(says)
    given = {"batch_rows": 20, "runs": 2, "encoder": Topics(), "max_labels": 2}
    got = induce(animals(100), engine, use_case="tests", **given)
    assert got.labels.names == ("cat", "dog")
    assert "select" not in engine.steps()  # the engine is not asked
    entry = got.history[-1]
    assert (entry["step"], entry["run"], entry["labels"]) == ("select", 1, ["cat", "dog"])
    assert entry["added"] == ["cat", "dog"]
    assert entry["score"] > 70
    assert re.fullmatch(
        r"run 0: (0.000 ?){5}, run 1: 0.000 0\.[89]\d\d( 0.000){3}", entry["explanation"]
    )


def test_labels_to_begin_with() -> None:
    engine = Scripted()
    start = load_labels([{"name": "cat", "description": "it purrs"}, "dog"])
    got = found(20, engine, start=start)
    assert engine.steps() == ["update", "update", "review"]
    assert '{"name": "cat", "description": "it purrs"}' in engine.asked[0]["system"]
    assert got.history[0]["removed"] == ["cat", "dog"]
    broken = Scripted(lambda step, n: "??")
    assert found(20, broken, start=start).labels.names == ("cat", "dog")
    with pytest.raises(ValueError, match="start has 3 labels, and max_labels is 2"):
        found(20, engine, start=load_labels(["a", "b", "c"]), max_labels=2)


def test_labels_to_begin_with_stay_when_an_encoder_finds_none_better() -> None:
    start = load_labels(["cat", "dog"])
    got = induce(animals(), Scripted(), use_case="tests", runs=2, encoder=Topics(), start=start)
    assert got.labels.names == ("cat", "dog")


# ------------------------------------------------------------------------------- level by level


def animals(rows: int = 40) -> Dataset:
    texts = [f"{'cat' if i % 4 else 'dog'} number {i}" for i in range(rows)]
    return Dataset.from_dict({"id": [f"r{i:03}" for i in range(rows)], "text": texts})


def divided(step: str, n: int) -> str:
    return reply("cat", "dog") if n == 0 else reply("big", "small")


def test_levels() -> None:
    engine = Scripted(divided)
    got = induce(animals(), engine, use_case="tests", levels=2, min_texts=20, max_labels=[2, 3])
    assert got.labels.ids == ("cat", "dog", "cat/big", "cat/small")
    assert got.labels.names == ("cat", "dog", "big", "small")
    assert got.labels.parents == ((), (), ("cat",), ("cat",))
    assert engine.steps() == ["generate", "review"] * 2
    below = engine.of("generate")[1]
    assert len(below["texts"]) == 30
    assert all(text.startswith("cat") for text in below["texts"])
    assert 'All texts have the label "cat".' in below["system"]
    assert below["schema"]["properties"]["labels"]["maxItems"] == 3
    places = [(entry["level"], entry["parent"]) for entry in got.history]
    assert places == [(1, None)] * 2 + [(2, "cat")] * 2


def test_parents_of_a_level_are_asked_together() -> None:
    engine = Scripted(divided)
    got = induce(animals(), engine, use_case="tests", levels=2, min_texts=10)
    assert engine.calls == 4
    assert engine.steps() == ["generate", "review"] + ["generate"] * 2 + ["review"] * 2
    assert got.labels.ids[2:] == ("cat/big", "cat/small", "dog/big", "dog/small")


def test_an_encoder_may_assign_between_levels() -> None:
    class Encoder:
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return np.array([[1.0, 0.1] if "cat" in text else [0.1, 1.0] for text in texts])

    engine = Scripted(divided)
    got = induce(animals(), engine, use_case="tests", levels=2, min_texts=20, encoder=Encoder())
    assert got.labels.ids == ("cat", "dog", "cat/big", "cat/small")


def test_a_label_whose_texts_give_none_stays_a_leaf() -> None:
    engine = Scripted(lambda step, n: reply("cat", "dog") if n == 0 else "??")
    got = induce(animals(), engine, use_case="tests", levels=2, min_texts=20)
    assert got.labels.ids == ("cat", "dog")
    assert "gave no labels" in got.history[-1]["notes"][0]
    assert got.history[-1]["parent"] == "cat"


def test_a_child_is_not_called_like_a_label_above() -> None:
    engine = Scripted(lambda step, n: reply("cat", "dog") if n < 3 else reply("big", "small"))
    got = induce(animals(), engine, use_case="tests", levels=2, min_texts=20)
    assert got.labels.names == ("cat", "dog", "big", "small")
    assert got.history[2]["attempts"] == 3


def test_ids_are_readable_and_unique() -> None:
    engine = Scripted(lambda step, n: reply("C++", "C", "c#", "Caf\u00e9 & Bar"))
    assert found(5, engine).labels.ids == ("c", "c~2", "c~3", "caf\u00e9-bar")


# ---------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("dies_after", range(6))
def test_no_finished_call_is_asked_again(tmp_path: Path, dies_after: int) -> None:
    def says(step: str, n: int) -> str:
        return "??" if (step, n) == ("update", 0) else reply("one", step)

    whole = Scripted(says)
    expected = found(47, whole)
    dying = Scripted(says, dies_after=dies_after)
    with pytest.raises(ConnectionError):
        found(47, dying, output=tmp_path)

    def rest(step: str, n: int) -> str:
        return says(step, n + dying.steps().count(step))

    resumed = Scripted(rest)
    assert found(47, resumed, output=tmp_path) == expected
    assert dying.asked + resumed.asked == whole.asked
    idle = Scripted(dies_after=0)
    assert found(47, idle, output=tmp_path) == expected


def test_another_call_is_not_taken_for_this_one(tmp_path: Path) -> None:
    found(20, Scripted(), output=tmp_path)
    again = Scripted()
    found(20, again, output=tmp_path, name_words=9)
    assert len(again.asked) == 3


def test_two_processes_are_refused(tmp_path: Path) -> None:
    class Meddling(Scripted):
        def generate(self, chats: Sequence[Chat], **given: Any) -> list[Reply]:
            found(5, Scripted(), output=tmp_path)
            return super().generate(chats, **given)

    with pytest.raises(RuntimeError, match="another process is running"):
        found(5, Meddling(), output=tmp_path)


# ------------------------------------------------------------------------------------ summaries


def test_summarise() -> None:
    rows = Dataset.from_dict({"id": ["a", "b", "c"], "text": ["hello one", " ", "hello two"]})
    engine = Scripted(lambda step, n: json.dumps({"summary": f"s{n}"}))
    got = summarise(rows, engine, use_case="tests", words=5)
    assert got.column_names == ["id", "text", "summary", "error"]
    assert got["summary"][:] == ["s0", None, "s1"]
    assert got["error"][:] == [None, "empty text", None]
    assert engine.steps() == ["summarise"] * 2
    assert {one["temperature"] for one in engine.asked} == {0.0}


def test_a_text_without_a_summary_stands_with_its_first_words() -> None:
    bad = "I think this text is long " * 5
    engine = Scripted(
        lambda step, n: (
            (bad if n else '{"summary": "short"}') if step == "summarise" else reply("a", "b")
        )
    )
    rows = summarise(table(2), engine, use_case="tests", words=5)
    assert rows["summary"][:] == ["short", None]
    assert rows["error"][1] == "a summary of 30 words, at most 5 were asked"
    assert engine.steps() == ["summarise"] * 7
    got = induce(rows, engine, use_case="tests")
    assert sorted(engine.of("generate")[0]["texts"]) == ["short", "text 001"]
    told = "1 of 2 texts have no summary: their first words stand in"
    assert [entry["notes"] for entry in got.history] == [[told], []]


def test_blocks_of_summaries_are_kept(tmp_path: Path) -> None:
    says = lambda step, n: json.dumps({"summary": "same"})  # noqa: E731
    dying = Scripted(says, dies_after=2)
    with pytest.raises(ConnectionError):
        summarise(table(10), dying, use_case="tests", block_rows=3, output=tmp_path)
    resumed = Scripted(says)
    got = summarise(table(10), resumed, use_case="tests", block_rows=3, output=tmp_path)
    assert (len(dying.asked), len(resumed.asked)) == (6, 4)
    assert got["summary"][:] == ["same"] * 10


# --------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": 0}, "levels must be at least 1; got 0"),
        ({"max_labels": 1}, "max_labels must be at least 2"),
        ({"max_labels": [5]}, "needs one number for each of levels=2"),
        ({"batch_rows": 0}, "batch_rows must be at least 1; got 0"),
        ({"runs": 0}, "runs must be at least 1; got 0"),
        ({"words": 0}, "words must be at least 1; got 0"),
        ({"name_words": 0}, "name_words and description_words must be at least 1; got 0 and 30"),
    ],
)
def test_impossible_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(5, Scripted(), **{"levels": 2, **given})


def test_rows_without_any_text() -> None:
    rows = Dataset.from_dict({"id": ["a"], "text": [" "]})
    with pytest.raises(ValueError, match="none of the 1 rows has a text"):
        induce(rows, Scripted(), use_case="tests")


# -------------------------------------------------------------------------------------- other


def test_with_other() -> None:
    got = with_other(load_labels(["a", "b"]))
    assert (got.names, got.descriptions[-1]) == (
        ("a", "b", "other"),
        "none of the other labels fits",
    )
    with pytest.raises(ValueError, match="there is a label 'Other' already"):
        with_other(load_labels(["a", "OTHER"]), name="Other")
