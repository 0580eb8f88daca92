"""Self-training around toy models whose answers are known by construction."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.engine import Reply, Scores
from llmlabel.label.selftrain import label_selftrain
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.prompt import Chat, render
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

SPORT = ("goal", "match", "team", "coach")
MONEY = ("bank", "loan", "stock", "price")
FILLER = ("today", "please", "soon", "again", "magic", "maybe")


class Toy:
    """Counts words of sport and money in the text; what the prompt says sharpens its answers.

    Args:
        preference: nats that it gives to sport whatever the text says; to the first label listed
            where `by_order`.
        gain: sharpness that each keyword or instruction with "magic" adds.
        dies_after: chats after which it raises.
    """

    name = "toy"

    def __init__(
        self,
        *,
        preference: float = 0.0,
        by_order: bool = False,
        gain: float = 0.0,
        dies_after: float = float("inf"),
        says: Sequence[str] = (),
    ) -> None:
        self.preference, self.by_order, self.gain = preference, by_order, gain
        self.dies_after, self.says = dies_after, says
        self.scored, self.written = list[Chat](), list[Chat]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        self._count(self.scored, chats)
        return Scores(np.array([self._read(chat) for chat in chats]))

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        self._count(self.written, chats)
        if len(chats) == 1:
            return [Reply("It lacks magic.", "stop")]
        return [Reply(self.says[i % len(self.says)], "stop") for i in range(len(chats))]

    @property
    def calls(self) -> int:
        return len(self.scored) + len(self.written)

    def _count(self, asked: list[Chat], chats: Sequence[Chat]) -> None:
        if self.calls + len(chats) > self.dies_after:
            raise ConnectionError("the server is gone")
        asked += chats

    def _read(self, chat: Chat) -> list[float]:
        system, text = chat[0]["content"], chat[-1]["content"]
        words = text.split()
        signal = sum(w in SPORT for w in words) - sum(w in MONEY for w in words)
        digest = hashlib.sha256(json.dumps([system, text]).encode()).digest()
        noise = int.from_bytes(digest[:4], "big") / 2**32 - 0.5
        odds = signal * (0.5 + self.gain * system.count("magic")) + 0.4 * noise
        first = "- sport" in system.split("- money")[0]
        odds += self.preference * (1 if first or not self.by_order else -1)
        return [-np.logaddexp(0, -odds) - 1, -np.logaddexp(0, odds) - 1]


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(["sport", "money"])


def table(rows: int = 40, *, sport: float = 0.5, seed: int = 0) -> Dataset:
    """Texts of two to four words of their class, at times one of the other, and filler."""
    rng = np.random.default_rng(seed)
    texts, gold = [], []
    for row in range(rows):
        label = int(row >= sport * rows)
        own, other = (SPORT, MONEY) if label == 0 else (MONEY, SPORT)
        words = [*rng.choice(own, rng.integers(2, 5)), *rng.choice(other, rng.integers(0, 2))]
        words += [*rng.choice(FILLER, 3), f"n{row}"]
        texts.append(" ".join(rng.permutation(words)))
        gold.append([label])
    ids = [f"r{i:03}" for i in range(rows)]
    return Dataset.from_dict({"id": ids, "text": texts, "mine": gold})


SMALL: dict[str, Any] = {
    "budget_calls": 600,
    "length": 3,
    "samples": 6,
    "batch_rows": 6,
    "demonstrations": 4,
    "rounds": 2,
}


def dense(dataset: Dataset, labels: LabelSpace) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "selftrain.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------- labels


def test_rows_keep_their_columns_and_get_a_label(labels: LabelSpace) -> None:
    rows = table()
    got = label_selftrain(rows, Toy(), labels, **SMALL)
    assert got.column_names == [*rows.column_names, *LABEL_COLUMNS]
    assert got.select_columns(rows.column_names).to_dict() == rows.to_dict()
    right = dense(got, labels).argmax(axis=1) == np.array(rows["mine"][:])[:, 0]
    assert right.mean() >= 0.95
    np.testing.assert_allclose(got["label_mass"][:], np.exp(-1), rtol=1e-6)
    assert set(got["engine"]) == {"toy"}
    assert set(got["error"]) == {None}
    assert len(set(got["prompt_sha"])) == 1


def test_the_result_is_the_mean_over_the_times_the_rows_were_labelled(
    labels: LabelSpace, tmp_path: Path
) -> None:
    engine = Toy()
    got = label_selftrain(table(), engine, labels, **SMALL, output=tmp_path)
    assert not report(tmp_path)["label preference"]["taken out"]
    times = [engine.scored[:40], engine.scored[-40:]]
    note = report(tmp_path)["rounds"][0]
    shown = [{"text": one["text"], "label": one["label"]} for one in note["demonstrations"]]
    whole = render("label/selftrain", text="x", labels=["sport", "money"], **note["learned"])
    middle = [
        chat
        for chat in engine.scored[40:-40]
        if chat[0] == whole[0]
        and [m["content"] for m in chat[1:-1:2]]
        == [f"Text: {one['text']}\nLabel:" for one in shown]
    ]
    assert len(middle) >= 40 - len(shown)
    texts = [chat[-1]["content"] for chat in times[0]]
    own = {text: np.array(engine._read(chat)) for text, chat in zip(texts, times[0], strict=True)}
    last = {chat[-1]["content"]: np.array(engine._read(chat)) for chat in times[1]}
    between = {chat[-1]["content"]: np.array(engine._read(chat)) for chat in middle}
    compared = 0
    for text, probs in zip(table()["text"], dense(got, labels), strict=True):
        key = f"Text: {text}\nLabel:"
        if key in between:
            mean = (own[key] + between[key] + last[key]) / 3
            expected = np.exp(mean) / np.exp(mean).sum()
            np.testing.assert_allclose(probs, expected, atol=1e-6)
            compared += 1
    assert compared >= 30


def test_the_order_of_rows_does_not_matter(labels: LabelSpace) -> None:
    rows = table()
    shuffled = rows.select(np.random.default_rng(1).permutation(len(rows)))
    one = label_selftrain(rows, Toy(), labels, **SMALL)
    two = label_selftrain(shuffled, Toy(), labels, **SMALL, block_rows=7)
    by_id = dict(zip(two["id"], two["label_probs"], strict=True))
    assert [by_id[id] for id in one["id"]] == one["label_probs"][:]


def test_a_row_is_never_its_own_demonstration(labels: LabelSpace) -> None:
    rows = table()
    twin = rows["text"][0].upper() + " !"  # the same words in another row
    rows = rows.map(
        lambda row, i: row | {"text": twin if i == 1 else row["text"]}, with_indices=True
    )
    engine = Toy()
    label_selftrain(rows, engine, labels, **SMALL, reliable=1.0)
    plain = [" ".join(c[-1]["content"].lower().replace("!", "").split()) for c in engine.scored]
    shown = 0
    for chat, text in zip(engine.scored, plain, strict=True):
        for turn in chat[1:-1:2]:
            shown += 1
            assert " ".join(turn["content"].lower().replace("!", "").split()) != text
    assert shown > 500


def test_texts_that_nobody_can_read_stay_without_a_label(labels: LabelSpace) -> None:
    rows = table()
    rows = rows.map(
        lambda row, i: row | {"text": " \n" if i in (3, 9) else row["text"]}, with_indices=True
    )
    engine = Toy()
    got = label_selftrain(rows, engine, labels, **SMALL)
    empty = [i for i, ids in enumerate(got["label_ids"]) if not ids]
    assert empty == [3, 9]
    assert [got["error"][i] for i in empty] == ["empty text", "empty text"]
    assert all("\n\n" not in chat[-1]["content"] for chat in engine.scored)
    with pytest.raises(ValueError, match="none of the 2 rows has a text"):
        label_selftrain(rows.select([3, 9]), engine, labels, **SMALL)


def test_repeats_and_a_handful_of_rows(labels: LabelSpace) -> None:
    texts = ["goal match today"] * 6 + ["bank loan today"] * 5 + [" "]
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(12)], "text": texts})
    engine = Toy()
    got = label_selftrain(rows, engine, labels, **SMALL, reliable=1.0)
    assert [ids[:1] for ids in got["label_ids"]] == [[0]] * 6 + [[1]] * 5 + [[]]
    assert {len(chat) for chat in engine.scored} == {2, 4}  # only the other text is shown


def test_a_model_without_answers(labels: LabelSpace) -> None:
    class Mute(Toy):
        def _read(self, chat: Chat) -> list[float]:
            return [-np.inf, -np.inf]

    with pytest.raises(ValueError, match="toy gives no label a probability for any of 40 texts"):
        label_selftrain(table(), Mute(), labels, **SMALL)


def test_a_row_that_the_model_cannot_answer_is_left_out(labels: LabelSpace) -> None:
    class Shy(Toy):
        def _read(self, chat: Chat) -> list[float]:
            shy = "n7\n" in chat[-1]["content"] or "n7 " in chat[-1]["content"]
            return [-np.inf, -np.inf] if shy else super()._read(chat)

    engine, rows = Shy(), table()
    got = label_selftrain(rows, engine, labels, **SMALL)
    assert got["label_ids"][7] == []
    assert got["error"][7] == "the model gave no label a probability"
    assert sum(error is None for error in got["error"]) == 39
    words = [*rows["text"][7].split(), "Label:"]
    asked = [chat for chat in engine.scored if chat[-1]["content"].split()[1:] == words]
    assert len(asked) == 4  # all rows three times, once in another order, in no step or check
    assert not any("n7 " in turn["content"] for chat in engine.scored for turn in chat[1:-1])


# ----------------------------------------------------------------------------- label preference


def test_a_preference_that_follows_the_order_is_taken_out(
    labels: LabelSpace, tmp_path: Path
) -> None:
    got = label_selftrain(
        table(60),
        Toy(preference=1.2, by_order=True),
        labels,
        **SMALL | {"budget_calls": 900},
        output=tmp_path,
    )
    found = report(tmp_path)["label preference"]
    assert found["taken out"]
    assert found["agreement without"] > 0.8 > 0.3 > found["agreement with"]
    right = dense(got, labels).argmax(axis=1) == np.array(table(60)["mine"][:])[:, 0]
    assert right.mean() >= 0.9


def test_a_skewed_mix_of_labels_is_no_preference(labels: LabelSpace, tmp_path: Path) -> None:
    rows = table(60, sport=0.1)
    got = label_selftrain(rows, Toy(), labels, **SMALL | {"budget_calls": 900}, output=tmp_path)
    assert not report(tmp_path)["label preference"]["taken out"]
    right = dense(got, labels).argmax(axis=1) == np.array(rows["mine"][:])[:, 0]
    assert right.mean() >= 0.95


# --------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(("budget", "steps"), [(472, 4), (600, 8), (777, 12)])
def test_the_budget_counts_chats_and_is_never_exceeded(
    labels: LabelSpace, tmp_path: Path, budget: int, steps: int
) -> None:
    engine = Toy()
    label_selftrain(table(), engine, labels, **SMALL | {"budget_calls": budget}, output=tmp_path)
    assert report(tmp_path)["calls"] == engine.calls <= budget
    # all rows three times and once in another order; 36 of them, since 4 are shown, twice in the
    # check of each round; a step tries 6 prompts on 6 rows
    assert engine.calls == 40 * 3 + 40 + 2 * 2 * 36 + 36 * steps
    assert len(report(tmp_path)["history"]) == steps
    calls = [step["calls"] for step in report(tmp_path)["history"]]
    assert calls == sorted(calls)
    assert calls[0] == 40 + 40 + 36


def test_critiques_and_rewrites_are_calls_too(labels: LabelSpace, tmp_path: Path) -> None:
    engine = Toy(says=["Look for magic.", "Read it twice."])
    label_selftrain(table(), engine, labels, **SMALL, optimiser="textual", output=tmp_path)
    steps = len(report(tmp_path)["history"])
    assert steps >= 2
    assert len(engine.written) == steps * (1 + 6)
    assert report(tmp_path)["calls"] == engine.calls <= 600
    # the two different rewrites and the instruction before, on 6 rows each
    assert len(engine.scored) == 40 * 3 + 40 + 2 * 2 * 36 + steps * 3 * 6


def test_a_budget_that_cannot_do_is_refused_with_the_number(labels: LabelSpace) -> None:
    engine = Toy()
    with pytest.raises(ValueError, match=r"budget_calls=391 is too small.*at least 392 are needed"):
        label_selftrain(table(), engine, labels, **SMALL | {"budget_calls": 391})
    assert not engine.calls
    label_selftrain(table(), engine, labels, **SMALL | {"budget_calls": 392})
    assert 0 < engine.calls <= 392


# ------------------------------------------------------------------------------------ the prompt


LEARN: dict[str, Any] = SMALL | {"budget_calls": 3000, "samples": 10, "rounds": 1}


def test_a_word_that_helps_is_learned(labels: LabelSpace, tmp_path: Path) -> None:
    label_selftrain(table(), Toy(gain=1.0), labels, **LEARN, learning_rate=1.0, output=tmp_path)
    found = report(tmp_path)
    magic = found["vocabulary"].index("magic")
    probs = np.array(found["word probabilities"])
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    assert probs.shape == (3, len(found["vocabulary"]))
    assert (probs.argmax(axis=1) == magic).sum() >= 2
    assert probs[:, magic].mean() > 5 / len(found["vocabulary"])
    assert found["rounds"][0]["learned"]["words"].count("magic") >= 2
    assert found["rounds"][0]["loss"] < found["rounds"][0]["loss before"] - 0.1
    losses = [step["loss"] for step in found["history"]]
    assert np.mean(losses[-9:]) < np.mean(losses[:9]) / 2


def test_bdpl_is_reinforce_at_twice_the_rate(labels: LabelSpace, tmp_path: Path) -> None:
    plain, twice = tmp_path / "plain", tmp_path / "twice"
    given = LEARN | {"budget_calls": 1000}
    label_selftrain(table(), Toy(gain=0.3), labels, **given, learning_rate=0.1, output=plain)
    label_selftrain(
        *(table(), Toy(gain=0.3), labels),
        **given,
        optimiser="bdpl",
        learning_rate=0.05,
        output=twice,
    )
    one, two = report(plain)["word probabilities"], report(twice)["word probabilities"]
    np.testing.assert_allclose(one, two, atol=1e-12)
    assert np.ptp(one) > 0.1


def test_words_that_do_not_help_are_dropped(labels: LabelSpace, tmp_path: Path) -> None:
    class Deaf(Toy):
        def _read(self, chat: Chat) -> list[float]:
            return super()._read([{"role": "system", "content": "- sport - money"}, chat[-1]])

    engine = Deaf()
    label_selftrain(table(), engine, labels, **SMALL, output=tmp_path)
    for note in report(tmp_path)["rounds"]:
        assert note["loss"] == note["loss before"]
        assert note["learned"] == {}
        assert note["candidate"] != {}
    assert "Keywords" not in engine.scored[-1][0]["content"]


def test_an_instruction_of_less_loss_is_kept(labels: LabelSpace, tmp_path: Path) -> None:
    says = ["Read it twice.", "  Look for\nmagic and magic. ", ""]
    engine = Toy(gain=0.5, says=says)
    label_selftrain(
        *(table(), engine, labels),
        **SMALL | {"rounds": 1},
        optimiser="textual",
        output=tmp_path,
    )
    found = report(tmp_path)
    assert found["rounds"][0]["learned"] == {"instruction": "Look for magic and magic."}
    assert set(found["history"][0]["tried"]) == {"Read it twice.", "Look for magic and magic."}
    assert found["word probabilities"] == []
    assert engine.scored[-1][0]["content"].startswith("Look for magic and magic.\n\nLabels:")
    critique, rewrite = engine.written[0], engine.written[1]
    worst = critique[-1]["content"].count("was labelled")
    assert worst == 3
    assert "Read the user's text and name its label." in critique[-1]["content"]
    assert "It lacks magic." in rewrite[-1]["content"]


def test_an_instruction_that_is_no_better_is_not(labels: LabelSpace, tmp_path: Path) -> None:
    engine = Toy(gain=-0.4, says=["magic"])
    label_selftrain(table(), engine, labels, **SMALL, optimiser="textual", output=tmp_path)
    assert [note["learned"] for note in report(tmp_path)["rounds"]] == [{}, {}]


def test_demonstrations_may_be_left_out_of_the_training(labels: LabelSpace) -> None:
    turns = {}
    for in_training in (True, False):
        engine = Toy()
        label_selftrain(
            *(table(), engine, labels),
            **SMALL | {"rounds": 1},
            demonstrations_in_training=in_training,
        )
        sizes = [len(chat) for chat in engine.scored]
        assert set(sizes[:80]) == {2}
        assert set(sizes[-40:]) == {2 + 2 * 4}
        turns[in_training] = set(sizes[80:-40])
    assert turns == {True: {2 + 2 * 4}, False: {2}}


def test_no_demonstrations_at_all(labels: LabelSpace) -> None:
    engine = Toy()
    label_selftrain(table(), engine, labels, **SMALL | {"demonstrations": 0})
    assert {len(chat) for chat in engine.scored} == {2}


# ----------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("optimiser", ["reinforce", "textual"])
def test_a_killed_call_goes_on_to_the_same_result(
    labels: LabelSpace, tmp_path: Path, optimiser: Any
) -> None:
    given = SMALL | {"optimiser": optimiser, "block_rows": 16}
    says = ["Look for magic.", "Read it twice."]
    whole = Toy(says=says, gain=0.2)
    expected = label_selftrain(table(), whole, labels, **given, output=tmp_path / "whole")
    rng = np.random.default_rng(0)
    folder, asked, kills = tmp_path / "killed", 0, 0
    while True:
        engine = Toy(says=says, gain=0.2, dies_after=int(rng.integers(40, 200)))
        try:
            got = label_selftrain(table(), engine, labels, **given, output=folder)
            break
        except ConnectionError:
            kills += 1
        finally:
            asked += engine.calls
    assert kills >= 3
    assert got.to_dict() == expected.to_dict()
    text = (tmp_path / "whole" / "selftrain.json").read_text("utf-8")
    assert (folder / "selftrain.json").read_text("utf-8") == text
    # a step that a kill interrupts is asked again as a whole, a finished one is not
    assert asked <= whole.calls + kills * 60
    again = Toy(says=says, gain=0.2)
    assert (
        label_selftrain(table(), again, labels, **given, output=folder).to_dict() == got.to_dict()
    )
    assert again.calls == 0


def test_a_damaged_step_is_asked_again(labels: LabelSpace, tmp_path: Path) -> None:
    expected = label_selftrain(table(), Toy(), labels, **SMALL, output=tmp_path)
    for damage in ("", "[]", "{", '{"call": "another", "said": {"calls": 1}}'):
        (tmp_path / "steps" / "round-1-step-1.json").write_text(damage)
        engine = Toy()
        got = label_selftrain(table(), engine, labels, **SMALL, output=tmp_path)
        assert got.to_dict() == expected.to_dict()
        assert engine.calls == 36


def test_another_call_in_the_same_folder_is_refused(labels: LabelSpace, tmp_path: Path) -> None:
    label_selftrain(table(), Toy(), labels, **SMALL, output=tmp_path)
    other = load_labels(["sport", "money", "weather"])
    with pytest.raises(ValueError, match="the label space has changed"):
        label_selftrain(table(), Toy(), other, **SMALL, output=tmp_path)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        label_selftrain(table(), Toy(), labels, **SMALL, seed=1, output=tmp_path)


# -------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 1}, "samples must be at least 2; got 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"search_space": 1}, "search_space must be at least 2"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch_rows": 0}, "batch_rows must be at least 1"),
        ({"demonstrations": -1}, "demonstrations must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"reliable": 0.0}, "reliable must be above 0 and at most 1"),
        ({"reliable": 1.5}, "reliable must be above 0 and at most 1"),
    ],
)
def test_bad_arguments(labels: LabelSpace, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_selftrain(table(), Toy(), labels, **SMALL | given)


def test_multilabel_is_refused() -> None:
    labels = load_labels(["sport", "money"], multilabel=True)
    with pytest.raises(ValueError, match=r"exclude each other.*label_direct"):
        label_selftrain(table(), Toy(), labels, **SMALL)


def test_texts_without_frequent_words(labels: LabelSpace) -> None:
    rows = Dataset.from_dict({"id": list("abcdef"), "text": [f"t{i} u{i}" for i in range(6)]})
    with pytest.raises(ValueError, match=r"0 n-grams occur 5 times.*optimiser='textual'"):
        label_selftrain(rows, Toy(), labels, **SMALL)


# --------------------------------------------------------------------------------------- prompts


def test_prompts(golden: Any) -> None:
    two = ["bug: it breaks", "praise"]
    shown = [{"text": "Great!", "label": "praise"}]
    chat = render("label/selftrain", text="It crashed.", labels=two, demonstrations=shown)
    assert chat == render("label/direct", text="It crashed.", labels=two, demonstrations=shown)
    chat = render("label/selftrain", text="It crashed.", labels=two, words="new york, {{ trip }}")
    assert chat == golden("prompts/label/selftrain.json")
    mistakes = [{"text": "Well.", "given": "praise", "expected": "bug"}] * 2
    chat = render("label/selftrain_critique", text="Name it.", labels=["a"], mistakes=mistakes)
    assert chat == golden("prompts/label/selftrain_critique.json")
    chat = render("label/selftrain_rewrite", text="Name it.", labels=["a", "b"], critique="Vague.")
    assert chat == golden("prompts/label/selftrain_rewrite.json")


@pytest.mark.model
@pytest.mark.parametrize("optimiser", ["reinforce", "textual"])
def test_a_real_model(labels: LabelSpace, tmp_path: Path, optimiser: Any) -> None:
    from llmlabel.engine.hf import HFEngine
    from llmlabel.models import SMOLLM2

    sport = ("The team won the match", "The coach praised the goal", "A late goal won the match")
    money = ("The bank raised the loan", "The stock price fell again", "A loan from the bank")
    texts = [f"{text} on {day}." for day in ("Monday", "Tuesday") for text in (*sport, *money)]
    rows = Dataset.from_dict({"id": [f"r{i:02}" for i in range(12)], "text": texts})
    given = SMALL | {"budget_calls": 260, "samples": 3, "batch_rows": 4, "optimiser": optimiser}
    got = label_selftrain(rows, HFEngine(SMOLLM2), labels, **given, output=tmp_path)
    right = dense(got, labels).argmax(axis=1) == np.tile([0, 0, 0, 1, 1, 1], 2)
    assert right.mean() >= 0.75
    found = report(tmp_path)
    assert 0 < found["calls"] <= 260
    assert len(found["history"]) >= 2
    if optimiser == "textual":
        assert any(step["critique"] and step["tried"] for step in found["history"])
