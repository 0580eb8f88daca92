"""How a hierarchy is asked about, and what cannot be read."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import List, Value
from label.trees import (
    BALANCED,
    CHAIN,
    DAG,
    RAGGED,
    SAME,
    STRATEGIES,
    Scripted,
    asked_text,
    assert_consistent,
    candidates,
    chat_words,
    noise,
    space,
    stops,
    table,
)

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.engine.plan import PlanEngine
from llmlabel.label.hierarchy import label_hierarchy
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import Chat, chat_tokens, prompt_sha, render

# ------------------------------------------------------------------------------------ the prompts


@pytest.mark.parametrize("name", ["leaf", "path", "child"])
def test_prompts(name: str, golden: Callable[[str], Any]) -> None:
    listed = ["- animal", "  - cat: purrs"] if name == "path" else ["cat: purrs", "dog"]
    answer = "animal > cat" if name == "path" else "cat"
    shown = [{"text": "It purrs.", "label": answer}]
    values = {"path": "animal", "separator": " > "}
    chat = render(
        f"label/hierarchy_{name}",
        text="It barks.",
        labels=listed,
        demonstrations=shown,
        **values,
    )
    assert chat == golden(f"prompts/label/hierarchy_{name}.json")


def test_the_child_prompt_names_no_path_above_the_roots() -> None:
    chat = render("label/hierarchy_child", text="x", labels=["a", "b"], path="")
    assert chat[0]["content"].split("\n")[0] == "Read the user's text and name its label."


# -------------------------------------------------------------------------------- calls and chats


@pytest.mark.parametrize(
    ("labels", "calls"), [(BALANCED, 2), (RAGGED, 3), (CHAIN, 1), (DAG, 3), (SAME, 2)]
)
def test_calls_of_each_strategy(labels: LabelSpace, calls: int) -> None:
    deep = {"animal", "pet", "river", "cat", "fish", "bank", "lion", "cod"}
    for strategy, want in (("dl", 1), ("dh", 1), ("tmh", calls)):
        engine = Scripted(lambda text, path, reply: 0.2 if reply in deep else 0.1)
        got = label_hierarchy(table(["x"]), engine, labels, strategy=strategy, keep=1)
        assert len(engine.asked) == got["calls"][0] == want
        assert got["prompt_tokens"][0] == sum(len(chat_words(chat)) for chat in engine.chats)


def test_tmh_asks_for_exactly_the_children() -> None:
    liked = {"animal": 0.4, "money": 0.1, "cat": 0.3, "dog": 0.1, "lion": 0.2, "lynx": 0.05}
    engine = Scripted(lambda text, path, reply: liked[reply])
    got = label_hierarchy(table(["x"]), engine, RAGGED, strategy="tmh", keep=1)
    assert engine.asked == [
        ("x", "", ["animal", "money"]),
        ("x", "animal", ["cat", "dog"]),
        ("x", "animal > cat", ["lion", "lynx"]),
    ]
    assert [chat[0]["content"].split("\n")[3:5] for chat in engine.chats] == [
        ["- animal", "- money"],
        ["- cat", "- dog"],
        ["- lion", "- lynx"],
    ]
    want = {4: 0.8 * 0.75 * 0.8, 5: 0.8 * 0.75 * 0.2, 3: 0.8 * 0.25, 1: 0.2}
    assert stops(got) == pytest.approx(want, rel=1e-6)
    assert got["label_mass"][0] == pytest.approx(0.5)
    assert got["calls"][0] == 3
    assert got["engine"][0] == engine.name
    assert got["prompt_sha"][0] == prompt_sha("label/hierarchy_child")


def test_dl_lists_leaves_and_tells_equal_names_apart() -> None:
    engine = Scripted(lambda text, path, reply: 0.2)
    got = label_hierarchy(table(["x"]), engine, SAME, strategy="dl")
    assert engine.asked == [("x", "", ["river > bank", "ford", "money > bank", "cash"])]
    assert engine.chats[0][0]["content"].split("\n")[3:7] == [
        "- river > bank",
        "- ford",
        "- money > bank",
        "- cash",
    ]
    assert stops(got) == pytest.approx(dict.fromkeys((2, 3, 4, 5), 0.25))
    assert got["label_mass"][0] == pytest.approx(0.8)


def test_equal_names_among_candidates_are_told_apart() -> None:
    """An inner node without an allowed child is an answer too, perhaps with a leaf's name."""
    labels = space("animal", "plant", "a=other<animal", "worm<a", "p=other<plant", "tree<plant")
    a, p = labels.index("a"), labels.index("p")
    rows = table(["a worm"], candidates=candidates([[a, p]]))
    for strategy in STRATEGIES:
        got = label_hierarchy(rows, FakeEngine(), labels, strategy=strategy)
        assert sum(got["label_probs"][0]) == pytest.approx(1), strategy
        assert set(got["label_ids"][0]) <= {a, p}


def test_dh_shows_the_tree_and_answers_paths() -> None:
    liked = {
        "pet / fish / cod": 0.1,
        "food / fish / cod": 0.2,
        "pet / fish / carp": 0.05,
        "food / fish / carp": 0.05,
        "pet / dog": 0.3,
        "food / so > up": 0.1,
    }
    labels = space(
        *DAG.ids[:2],
        *(f"{i}<{','.join(p)}" for i, p in zip(DAG.ids, DAG.parents, strict=True) if p),
    )
    labels = LabelSpace(
        labels.ids,
        tuple("so > up" if name == "soup" else name for name in labels.names),
        labels.descriptions,
        labels.parents,
    )
    engine = Scripted(lambda text, path, reply: liked[reply])
    got = label_hierarchy(table(["x"]), engine, labels, strategy="dh")
    assert sorted(engine.asked[0][2]) == sorted(liked)
    system = engine.chats[0][0]["content"]
    assert (
        "\n- pet\n  - fish\n    - cod\n    - carp\n  - dog\n"
        "- food\n  - fish\n    - cod\n    - carp\n  - so > up\n"
    ) in system
    assert 'separated by " / "' in system
    assert stops(got) == pytest.approx({4: 0.3 / 0.8, 5: 0.1 / 0.8, 3: 0.3 / 0.8, 6: 0.1 / 0.8})


def test_a_separator_is_found_for_any_names() -> None:
    labels = space("a>b", "a/b", "a|b", "->", "::", ">>", "x>>>y", "last<a>b", "more<a>b")
    engine = Scripted(lambda text, path, reply: 0.1)
    label_hierarchy(table(["x"]), engine, labels, strategy="dh")
    assert engine.asked[0][2][-2:] == ["a>b >>>> last", "a>b >>>> more"]


def test_inner_nodes_may_be_answered() -> None:
    engine = Scripted(lambda text, path, reply: 0.1)
    label_hierarchy(table(["x"]), engine, BALANCED, strategy="dl", inner=True)
    label_hierarchy(table(["x"]), engine, CHAIN, strategy="dh", inner=True)
    assert engine.asked[0][2] == list(BALANCED.names)
    assert engine.asked[1][2] == [
        "all",
        "all > animal",
        "all > animal > cat",
        "all > animal > cat > lion",
        "all > animal > cat > lynx",
    ]


def test_stop_stays_at_the_node() -> None:
    engine = Scripted(lambda text, path, reply: 0.3 if reply == "other" else 0.1)
    got = label_hierarchy(table(["x"]), engine, BALANCED, strategy="tmh", stop="other")
    assert engine.asked[0][2] == ["animal", "money"]  # above the roots there is no place to stop
    assert engine.asked[1][2] == ["cat", "dog", "other"]
    assert engine.chats[1][0]["content"].split("\n")[3:6] == ["- cat", "- dog", "- other"]
    want = {0: 0.3, 1: 0.3, **dict.fromkeys((2, 3, 4, 5), 0.1)}
    assert stops(got) == pytest.approx(want, rel=1e-6)


def test_a_node_with_one_child_is_asked_where_it_may_stop() -> None:
    engine = Scripted(lambda text, path, reply: 0.1)
    label_hierarchy(table(["x"]), engine, CHAIN, strategy="tmh", stop="other")
    assert [some for _, _, some in engine.asked] == [
        ["animal", "other"],
        ["cat", "other"],
        ["lion", "lynx", "other"],
    ]


# ------------------------------------------------------------------------------- what cannot be read


def test_empty_texts_and_no_candidates_get_no_label() -> None:
    rows = table(["cat", " ", "dog"], candidates=candidates([None, [2], []]))
    for strategy in STRATEGIES:
        got = label_hierarchy(rows, FakeEngine(), BALANCED, strategy=strategy)
        assert got["error"][:] == [None, "empty text", "no candidate labels"]
        assert got["label_ids"][1:] == [[], []]
        assert got["label_mass"][1:] == [0.0, 0.0]
        assert got["calls"][1:] == [0, 0]
        assert got["calls"][0] > 0


def test_nothing_but_empty_texts() -> None:
    for strategy in STRATEGIES:
        got = label_hierarchy(table([""]), FakeEngine(), BALANCED, strategy=strategy)
        assert (got["label_ids"][0], got["error"][0]) == ([], "empty text")


def test_an_answer_that_fails_leaves_the_mass_where_it_was() -> None:
    def weight(text: str, path: str, reply: str) -> float:
        return 0.0 if (path == "animal" or text == "y") else 0.1

    got = label_hierarchy(table(["x", "y"]), Scripted(weight), BALANCED, strategy="tmh")
    assert stops(got) == pytest.approx({0: 0.5, 4: 0.25, 5: 0.25})
    assert got["error"][:] == ["the model gave no label a probability"] * 2
    assert got["label_ids"][1] == []
    dl = label_hierarchy(table(["y"]), Scripted(weight), BALANCED, strategy="dl")
    assert (dl["label_ids"][0], dl["error"][0]) == ([], "the model gave no label a probability")


def test_nan_is_no_answer() -> None:
    for strategy in STRATEGIES:

        class Broken(Scripted):
            def score(self, *args: Any, **options: Any) -> Scores:
                scores = super().score(*args, **options)
                scores.log_probs[:, 0] = np.nan
                return scores

        got = label_hierarchy(table(["x"]), Broken(noise), BALANCED, strategy=strategy)
        assert (got["label_ids"][0], got["label_mass"][0]) == ([], 0.0)
        assert got["error"][0] == "the model gave no label a probability"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_done_to_a_text_is_reported(strategy: Any) -> None:
    engine = Scripted(noise, errors={"y": "text cut: the limit is 9"})
    got = label_hierarchy(table(["x", "y"]), engine, BALANCED, strategy=strategy)
    assert got["error"][:] == [None, "text cut: the limit is 9"]
    assert len(got["label_ids"][1]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "tmh", "keep": 0}, "keep must be at least 1; got 0"),
        ({"strategy": "tmh", "nearest": 0}, "nearest must be at least 1; got 0"),
        ({"strategy": "tmh", "min_mass": 2.0}, "between 0 and 1; got 2.0"),
        ({"strategy": "tmh", "inner": True}, "inner= is for dl and dh"),
        ({"strategy": "dl", "stop": "other"}, "stop= is for tmh"),
        ({"strategy": "tmh", "stop": "cat"}, "no label's name; got 'cat'"),
        ({"strategy": "tmh", "stop": " "}, "no label's name; got ' '"),
        ({"strategy": "dh", "encoder": "x"}, "encoder= is for tmh"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        label_hierarchy(table(["x"]), FakeEngine(), BALANCED, **options)


def test_multilabel_spaces_are_refused() -> None:
    labels = space("a", "b<a", "c<a", multilabel=True)
    with pytest.raises(ValueError, match="use label_direct"):
        label_hierarchy(table(["x"]), FakeEngine(), labels, strategy="dl")


def test_a_candidate_that_is_no_label() -> None:
    rows = table(["x", "y"], candidates=candidates([None, [9]]))
    with pytest.raises(ValueError, match=r"row 'r1' has the candidates \[9\]"):
        label_hierarchy(rows, FakeEngine(), BALANCED, strategy="dl")


# -------------------------------------------------------------------------------- demonstrations


def turns(chat: Chat) -> list[str]:
    """What the demonstrations answer; behind the text the reply is only begun."""
    said = [turn["content"] for turn in chat if turn["role"] == "assistant"]
    assert said.pop() in ('The label is "', 'The path is "')
    return [re.fullmatch(r'The (?:label|path) is "(.*)"', one)[1] for one in said]


def test_demonstrations_answer_as_the_strategy_does() -> None:
    shown = [{"text": "Roars.", "label": "lion"}, {"text": "Coins.", "label": "money"}]
    for strategy, want in (
        ("dl", {"": ["lion", "money"]}),
        ("dh", {"": ["animal > cat > lion", "money"]}),
        ("tmh", {"": ["animal", "money"], "animal": ["cat"], "animal > cat": ["lion"]}),
    ):
        engine = Scripted(noise)
        label_hierarchy(table(["x"]), engine, RAGGED, strategy=strategy, demonstrations=shown)
        paths = [path for _, path, _ in engine.asked]
        assert {p: turns(c) for p, c in zip(paths, engine.chats, strict=True)} == want


def test_a_demonstration_of_an_inner_node_stops_there() -> None:
    shown = [{"text": "Some beast.", "label": "animal"}]
    engine = Scripted(noise)
    label_hierarchy(
        table(["x"]), engine, BALANCED, strategy="tmh", stop="other", demonstrations=shown
    )
    found = {p: turns(c) for (_, p, _), c in zip(engine.asked, engine.chats, strict=True)}
    assert found == {"": ["animal"], "animal": ["other"], "money": []}
    engine = Scripted(noise)
    label_hierarchy(table(["x"]), engine, BALANCED, strategy="dl", demonstrations=shown)
    assert turns(engine.chats[0]) == []


def test_demonstrations_of_the_rows_follow_those_of_the_argument() -> None:
    own = [[{"text": "Barks.", "label": "dog"}], None]
    feature = List({"text": Value("string"), "label": Value("string")})
    rows = table(["x", "y"], demonstrations=(own, feature))
    engine = Scripted(noise)
    shown = [{"text": "Purrs.", "label": "cat"}]
    label_hierarchy(rows, engine, BALANCED, strategy="dl", demonstrations=shown)
    assert [turns(chat) for chat in engine.chats] == [["cat", "dog"], ["cat"]]


def test_a_demonstration_outside_the_candidates_is_not_shown() -> None:
    rows = table(["x"], candidates=candidates([[2, 4]]))
    shown = [{"text": "Purrs.", "label": "cat"}, {"text": "Barks.", "label": "dog"}]
    for strategy, want in (("dl", ["cat"]), ("dh", ["animal > cat"])):
        engine = Scripted(noise)
        label_hierarchy(rows, engine, BALANCED, strategy=strategy, demonstrations=shown)
        assert turns(engine.chats[0]) == want


def test_a_row_is_never_its_own_demonstration() -> None:
    shown = [{"text": "x", "label": "cat"}]
    with pytest.raises(ValueError, match="row 'r0' is shown as a demonstration"):
        label_hierarchy(table(["x "]), FakeEngine(), BALANCED, strategy="dl", demonstrations=shown)
    feature = List({"text": Value("string"), "label": Value("string")})
    rows = table(["x"], demonstrations=([shown], feature))
    with pytest.raises(ValueError, match="row 'r0' is shown as a demonstration of its own"):
        label_hierarchy(rows, FakeEngine(), BALANCED, strategy="tmh")


def test_a_demonstration_with_several_paths_takes_the_first() -> None:
    shown = [{"text": "Swims.", "label": "cod"}]
    for strategy, want in (("dh", ["pet > fish > cod"]), ("tmh", ["pet"])):
        engine = Scripted(noise)
        label_hierarchy(table(["x"]), engine, DAG, strategy=strategy, demonstrations=shown)
        assert turns(engine.chats[0]) == want


def test_an_ambiguous_demonstration() -> None:
    shown = [{"text": "Coins.", "label": "bank"}]
    with pytest.raises(ValueError, match="the name of several labels"):
        label_hierarchy(table(["x"]), FakeEngine(), SAME, strategy="dl", demonstrations=shown)


# ------------------------------------------------------------------------------ costs and resuming


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on(strategy: Any, tmp_path: Path) -> None:
    rows = table([f"text {i}" for i in range(10 if strategy == "tmh" else 20)])

    class Dies(Scripted):
        def score(self, *args: Any, **options: Any) -> Scores:
            if len(self.asked) >= 12:
                raise KeyboardInterrupt
            return super().score(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        label_hierarchy(rows, Dies(noise), SAME, strategy=strategy, block_rows=2, output=tmp_path)
    done = len(list((tmp_path / "blocks").glob("*.parquet")))
    engine = Scripted(noise)
    got = label_hierarchy(rows, engine, SAME, strategy=strategy, block_rows=2, output=tmp_path)
    whole = label_hierarchy(rows, Scripted(noise), SAME, strategy=strategy)
    assert got.to_dict() == whole.to_dict()
    assert done >= 1
    assert len(engine.asked) == sum(whole["calls"][2 * done :])
    with pytest.raises(ValueError, match="begun by another call: keep was"):
        label_hierarchy(
            rows, engine, SAME, strategy=strategy, block_rows=2, output=tmp_path, keep=5
        )


def test_other_candidates_are_computed_again(tmp_path: Path) -> None:
    for some in ([2, 3], [2, 4]):
        rows = table(["x"], candidates=candidates([some]))
        got = label_hierarchy(rows, Scripted(noise), BALANCED, strategy="dl", output=tmp_path)
        assert sorted(stops(got)) == some


def test_tokens_are_counted_to_the_token(tiny_decoder: Path, tiny_tokenizer: Any) -> None:
    from llmlabel.engine.hf import HFEngine

    engine = HFEngine(tiny_decoder, dtype="float32")
    rows = table(["a cat sat on the mat", "money"])
    for strategy in STRATEGIES:
        before = engine.usage.prompt_tokens
        got = label_hierarchy(rows, engine, RAGGED, strategy=strategy)
        heard = Heard(engine)
        again = label_hierarchy(rows, heard, RAGGED, strategy=strategy)
        assert again.to_dict() == got.to_dict()
        counts = {
            row: [
                len(chat_tokens(tiny_tokenizer, chat, max_tokens=512)[0])
                for chat in heard.chats
                if asked_text(chat) == rows["text"][row]
            ]
            for row in range(2)
        }
        assert got["prompt_tokens"][:] == [sum(counts[row]) for row in range(2)]
        assert got["calls"][:] == [len(counts[row]) for row in range(2)]
        assert engine.usage.prompt_tokens - before == 2 * sum(got["prompt_tokens"])
        assert_consistent(got, RAGGED)


class Heard:
    """An engine whose chats are kept."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name, self.chats = engine, engine.name, list[Chat]()

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.engine.generate(*args, **options)

    def score(self, chats: Sequence[Chat], labels: Sequence[str], **options: Any) -> Scores:
        self.chats += chats
        return self.engine.score(chats, labels, **options)


def test_a_plan_asks_what_a_run_may_ask() -> None:
    for strategy, calls in (("dl", 1), ("dh", 1), ("tmh", 3)):
        engine = PlanEngine("plan")
        got = label_hierarchy(table(["x", "y"]), engine, BALANCED, strategy=strategy)
        assert engine.asked.requests == 2 * calls == sum(got["calls"])


def test_costs_are_ordered_as_in_the_paper() -> None:
    """DL < DH on every tree; TMH < DH on a deep tree with short texts, however wide its beam."""
    letters = "abcdef"
    names = [f"{x}" for x in letters]
    names += [f"{x}{y}<{x}" for x in letters for y in letters]
    names += [f"{x}{y}{z}<{x}{y}" for x in letters for y in letters for z in letters]
    deep = space(*names)
    for labels in (BALANCED, RAGGED, CHAIN, DAG, SAME, deep):
        cost = {
            strategy: label_hierarchy(table(["x"]), Scripted(noise), labels, strategy=strategy)[
                "prompt_tokens"
            ][0]
            for strategy in STRATEGIES
        }
        assert cost["dl"] < cost["dh"]
    assert cost["tmh"] < cost["dl"]


def test_tokens_that_nobody_counted_are_null() -> None:
    class Silent(Scripted):
        def score(self, *args: Any, **options: Any) -> Scores:
            scores = super().score(*args, **options)
            return Scores(scores.log_probs, scores.errors)

    got = label_hierarchy(table(["x", ""]), Silent(noise), BALANCED, strategy="tmh")
    assert (got["calls"][:], got["prompt_tokens"][:]) == ([3, 0], [None, 0])
