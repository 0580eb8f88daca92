from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.prompt import Chat, prompt_sha
from llmlabel.softlabels import SoftLabels

TEXTS = ["a bug in it", "praise, praise", "", "a question? maybe", " \n", "neither"]


class Known(FakeEngine):
    """Gives fixed log-probabilities, so that values can be checked by hand; counts its rows."""

    def __init__(self, rows: list[list[float]], errors: list[str | None] | None = None) -> None:
        super().__init__()
        self.rows, self.errors, self.asked = rows, errors or [], list[Chat]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        self.asked += chats
        return Scores(np.array(self.rows[: len(chats)]), self.errors[: len(chats)])


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(["bug", {"id": "q", "name": "question", "description": "asks"}, "praise"])


def table(texts: list[str]) -> Dataset:
    rows = {
        "id": [f"r{i}" for i in range(len(texts))],
        "text": texts,
        "mine": list(range(len(texts))),
    }
    return Dataset.from_dict(rows)


def test_joint_probabilities_are_normalised(labels: LabelSpace) -> None:
    engine = Known(
        [
            list(np.log([0.2, 0.1, 0.1])),
            [np.log(0.01), -np.inf, np.log(0.03)],
        ]
    )
    got = label_direct(table(["x", "y"]), engine, labels)
    assert got["label_ids"][:] == [[0, 1, 2], [2, 0]]
    np.testing.assert_allclose(got["label_probs"][0], [0.5, 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(got["label_probs"][1], [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(got["label_mass"][:], [0.4, 0.04], rtol=1e-6)
    assert got["mine"][:] == [0, 1]
    assert got["prompt_sha"][0] == prompt_sha("label/direct")
    assert set(got["label_space"]) == {labels.fingerprint}
    assert "- question: asks" in engine.asked[0][0]["content"]


def test_empty_texts_stay_and_get_no_label(labels: LabelSpace) -> None:
    engine = FakeEngine()
    got = label_direct(table(TEXTS), engine, labels)
    assert got["id"][:] == [f"r{i}" for i in range(6)]
    assert [i for i, error in enumerate(got["error"]) if error == "empty text"] == [2, 4]
    assert [i for i, ids in enumerate(got["label_ids"]) if ids == []] == [2, 4]
    assert got["label_ids"][0][0] == 0
    assert got["label_ids"][1][0] == 2
    assert got["label_mass"][2] == 0


def test_nothing_but_empty_texts(labels: LabelSpace) -> None:
    got = label_direct(table(["", " "]), FakeEngine(), labels)
    assert got["label_ids"][:] == [[], []]


def test_what_the_model_cannot_say_is_not_invented(labels: LabelSpace) -> None:
    got = label_direct(table(["x", "y"]), Known([[-np.inf] * 3, [-1.0, -2.0, -3.0]]), labels)
    assert got["label_ids"][0] == []
    assert got["error"][:] == ["the model gave no label a probability", None]


def test_cut_texts_are_labelled_and_reported(labels: LabelSpace) -> None:
    long = "bug " * 20_000  # 80,000 characters
    got = label_direct(table([long, "bug"]), FakeEngine(), labels)
    assert got["error"][0].startswith("text cut")
    assert got["label_ids"][0][0] == 0
    assert got["text"][0] == long


def test_each_block_is_committed_and_not_computed_again(labels: LabelSpace, tmp_path: Path) -> None:
    rows = [[-1.0 - i, -2.0, -3.0] for i in range(2)]
    first = Known(rows)
    one = label_direct(table(["a", "b", "c"]), first, labels, block_rows=2, output=tmp_path)
    assert len(first.asked) == 3
    second = Known(rows)
    two = label_direct(table(["a", "b", "c", "d"]), second, labels, block_rows=2, output=tmp_path)
    assert [c[-1]["content"] for c in second.asked] == ["Text: c\nLabel:", "Text: d\nLabel:"]
    assert two["label_probs"][:2] == one["label_probs"][:2]
    others = load_labels(["bug", "x", "praise"])
    with pytest.raises(ValueError, match=r"label space has changed \(added: 'x'; gone: 'q'\)"):
        label_direct(table(["a"]), Known(rows), others, output=tmp_path)


def test_demonstrations_are_turns_before_the_text(labels: LabelSpace) -> None:
    engine = Known([[-1.0, -2.0, -3.0]])
    label_direct(table(["x"]), engine, labels, demonstrations=[{"text": "Why?", "label": "q"}])
    chat = engine.asked[0]
    assert [m["role"] for m in chat] == ["system", "user", "assistant", "user"]
    assert chat[2]["content"] == "question"


def test_a_row_is_never_its_own_demonstration(labels: LabelSpace) -> None:
    with pytest.raises(ValueError, match=r"row 'r1' is shown as a demonstration"):
        label_direct(
            table(["x", "Why? "]),
            FakeEngine(),
            labels,
            demonstrations=[{"text": "Why?", "label": "q"}],
        )


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"text": "x", "label": "bugs"}, "bugs"),
        ({"text": "x"}, "demonstration 1 has the keys"),
        ({"text": "x", "label": "bug", "weight": "1"}, "demonstration 1 has the keys"),
    ],
)
def test_bad_demonstrations(labels: LabelSpace, one: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_direct(table(["y"]), FakeEngine(), labels, demonstrations=[one])


def test_multilabel_reads_are_independent() -> None:
    labels = load_labels(["bug", "praise"], multilabel=True)
    p = np.log([[0.3, 0.1], [0.1, 0.4], [0.2, 0.2], [0.0001, 0.0099]])
    got = label_direct(table(["x", "y"]), Known(p.tolist(), ["e", None, None, None]), labels)
    dense = SoftLabels.from_dataset(got, labels).dense()
    np.testing.assert_allclose(dense, [[0.75, 0.2], [0.5, 0.01]], rtol=1e-6)
    np.testing.assert_allclose(got["label_mass"][:], [0.4, 0.01], rtol=1e-5)
    assert got["error"][:] == ["e", None]


def test_multilabel_prompts_name_the_label() -> None:
    labels = load_labels(["bug", "praise"], multilabel=True)
    engine = Known([[-1.0, -1.0]] * 2)
    label_direct(table(["x"]), engine, labels)
    assert [
        '"bug" fit?' in engine.asked[0][-1]["content"],
        '"praise" fit?' in engine.asked[1][-1]["content"],
    ] == [True, True]


def test_multilabel_demonstrations_answer_for_the_label_that_is_asked() -> None:
    labels = load_labels(["bug", {"id": "p", "name": "praise"}], multilabel=True)
    engine = Known([[-1.0, -1.0]] * 2)
    shown = [{"text": "It crashed.", "label": ["bug"]}, {"text": "Well done.", "label": ["p"]}]
    label_direct(table(["x"]), engine, labels, demonstrations=shown)
    answers = [[m["content"] for m in chat if m["role"] == "assistant"] for chat in engine.asked]
    assert answers == [["yes", "no"], ["no", "yes"]]
    with pytest.raises(ValueError, match=r"label is 'bug'; a list of all true labels is needed"):
        label_direct(
            table(["x"]), engine, labels, demonstrations=[{"text": "It crashed.", "label": "bug"}]
        )


def test_order_of_rows_does_not_matter(labels: LabelSpace) -> None:
    texts = [f"bug {i} praise" for i in range(7)]
    whole = label_direct(table(texts), FakeEngine(), labels, block_rows=3)
    back = label_direct(table(texts[::-1]), FakeEngine(), labels, block_rows=2)
    assert whole["label_probs"][:] == back["label_probs"][:][::-1]


def test_columns_are_asked_for(labels: LabelSpace) -> None:
    with pytest.raises(ValueError, match="text"):
        label_direct(Dataset.from_dict({"id": ["a"]}), FakeEngine(), labels)


class Asked(FakeEngine):
    """Keeps what it was asked; equal probabilities for the labels that may be answered."""

    def __init__(self, mass: float = 0.8) -> None:
        super().__init__(mass=mass)
        self.chats, self.candidates = list[Chat](), list[list[int]]()

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        self.chats += chats
        self.candidates += [list(some) for some in candidates or ()]
        found = np.full((len(chats), len(labels)), -np.inf)
        every = [range(len(labels))] * len(chats)
        for row, some in zip(found, candidates or every, strict=True):
            row[list(some)] = np.log(self.mass / len(some))
        return Scores(found)


def with_candidates(texts: list[str], candidates: list[list[int] | None]) -> Dataset:
    feature = List(Value("int32"))
    return table(texts).add_column("candidates", candidates, feature=feature)


def test_only_candidates_are_listed_and_answered(labels: LabelSpace) -> None:
    engine = Asked()
    rows = with_candidates(["x", "y", "z", ""], [[2, 0], None, [], [1]])
    got = label_direct(rows, engine, labels)
    listed = [
        [line for line in chat[0]["content"].split("\n") if line.startswith("- ")]
        for chat in engine.chats
    ]
    assert listed == [["- bug", "- praise"], ["- bug", "- question: asks", "- praise"]]
    assert engine.candidates == [[0, 2], [0, 1, 2]]
    assert got["label_ids"][:] == [[0, 2], [0, 1, 2], [], []]
    assert got["label_probs"][0] == [0.5, 0.5]
    assert got["error"][:] == [None, None, "no candidate labels", "empty text"]
    assert got["candidates"][:] == rows["candidates"][:]


def test_candidates_outside_the_space_are_refused(labels: LabelSpace) -> None:
    with pytest.raises(ValueError, match=r"row 'r1' has the candidates \[0, 3\]"):
        label_direct(with_candidates(["x", "y"], [[0], [0, 3]]), Asked(), labels)


def test_candidates_of_a_multilabel_space_are_the_ones_asked_about() -> None:
    labels = load_labels(["bug", "question", "praise"], multilabel=True)
    engine = Asked()
    got = label_direct(with_candidates(["x", "y"], [[2, 0], [1]]), engine, labels)
    asked = [chat[-1]["content"].split('"')[1] for chat in engine.chats]
    assert asked == ["bug", "praise", "question"]
    assert got["label_ids"][:] == [[0, 2], [1]]
    assert got["label_probs"][:] == [[0.5, 0.5], [0.5]]
    np.testing.assert_allclose(got["label_mass"][:], [0.8, 0.8], rtol=1e-6)
    assert engine.candidates == []
    assert "- question" not in engine.chats[0][0]["content"]


def test_candidates_and_demonstrations_have_blocks_of_their_own(
    labels: LabelSpace, tmp_path: Path
) -> None:
    label_direct(with_candidates(["x"], [[0, 1]]), Asked(), labels, output=tmp_path)
    again, other = Asked(), Asked()
    more = with_candidates(["x", "y"], [[0, 1], [0, 1]])
    label_direct(more, again, labels, output=tmp_path, block_rows=1)
    assert [chat[-1]["content"] for chat in again.chats] == ["Text: y\nLabel:"]
    got = label_direct(with_candidates(["x"], [[0, 2]]), other, labels, output=tmp_path)
    assert len(other.chats) == 1
    assert got["label_ids"][:] == [[0, 2]]
    shown = Asked()
    rows = with_demonstrations(["x"], [[("Why?", "q")]])
    label_direct(rows, shown, labels, output=tmp_path)
    assert len(shown.chats) == 1


def with_demonstrations(texts: list[str], shown: list[list[tuple[str, str]] | None]) -> Dataset:
    feature = List({"text": Value("string"), "label": Value("string")})
    values = [some and [{"text": t, "label": label} for t, label in some] for some in shown]
    return table(texts).add_column("demonstrations", values, feature=feature)


def answers(chat: Chat) -> list[tuple[str, str]]:
    """The demonstrations of a chat."""
    turns = [m["content"] for m in chat if m["role"] != "system"][:-1]
    texts = [turn.removeprefix("Text: ").removesuffix("\nLabel:") for turn in turns[::2]]
    return list(zip(texts, turns[1::2], strict=True))


def test_demonstrations_of_a_row_follow_those_of_all(labels: LabelSpace) -> None:
    engine = Asked()
    rows = with_demonstrations(["x", "y"], [[("Why?", "q"), ("It broke.", "bug")], None])
    label_direct(rows, engine, labels, demonstrations=[{"text": "Nice!", "label": "praise"}])
    first, second = engine.chats
    assert answers(first) == [("Nice!", "praise"), ("Why?", "question"), ("It broke.", "bug")]
    assert answers(second) == [("Nice!", "praise")]


def test_demonstrations_whose_label_is_no_candidate_are_not_shown(labels: LabelSpace) -> None:
    engine = Asked()
    rows = with_demonstrations(["x"], [[("Why?", "q"), ("It broke.", "bug")]])
    rows = rows.add_column("candidates", [[0, 2]], feature=List(Value("int32")))
    label_direct(rows, engine, labels, demonstrations=[{"text": "How?", "label": "q"}])
    assert answers(engine.chats[0]) == [("It broke.", "bug")]


def test_bad_demonstrations_of_a_row(labels: LabelSpace) -> None:
    with pytest.raises(ValueError, match=r"row 'r1' is shown as a demonstration of its own"):
        label_direct(with_demonstrations(["x", "y"], [[], [(" y", "q")]]), Asked(), labels)
    with pytest.raises(ValueError, match=r"row 'r0': unknown label 'bugs'"):
        label_direct(with_demonstrations(["x"], [[("y", "bugs")]]), Asked(), labels)


def test_what_was_not_read_is_missing_mass(labels: LabelSpace) -> None:
    class Partly(FakeEngine):
        def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
            read = np.log([[0.6, 0.2, 0.1], [0.3, 0.1, 1.0]])
            read[1, 2] = -np.inf
            return Scores(read, unread=np.array([0.0, 0.1]))

    got = label_direct(table(["x", "y"]), Partly(), labels)
    np.testing.assert_allclose(got["label_probs"][1], [0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(got["label_mass"][:], [0.9, 0.4], rtol=1e-6)
    missing = SoftLabels.from_dataset(got, labels).missing_mass
    np.testing.assert_allclose(missing, [0.0, 0.2], atol=1e-6)


def test_rows_below_min_mass_get_no_label_and_say_so(labels: LabelSpace) -> None:
    engine = Known(
        [list(np.log([0.01, 0.005, 0.005])), list(np.log([0.04, 0.01, 0.01])), [-np.inf] * 3],
        ["text cut", None, None],
    )
    got = label_direct(table(["x", "y", "z"]), engine, labels, min_mass=0.05)
    assert got["label_ids"][:] == [[], [0, 1, 2], []]
    assert got["error"][:] == [
        "text cut; label mass 0.02 is below min_mass=0.05",
        None,
        "the model gave no label a probability",
    ]
    np.testing.assert_allclose(got["label_mass"][:], [0.02, 0.06, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"min_mass is a probability between 0 and 1; got 5.0"):
        label_direct(table(["x"]), engine, labels, min_mass=5.0)


def test_abstention_is_part_of_the_key(labels: LabelSpace, tmp_path: Path) -> None:
    low = [list(np.log([0.01, 0.005, 0.005]))]
    kept = label_direct(table(["x"]), Known(low), labels, output=tmp_path)
    with pytest.raises(ValueError, match=r"min_mass was 0\.0 and is 0\.5"):
        label_direct(table(["x"]), Known(low), labels, output=tmp_path, min_mass=0.5)
    left = label_direct(table(["x"]), Known(low), labels, output=tmp_path / "2", min_mass=0.5)
    assert (kept["label_ids"][0], left["label_ids"][0]) == ([0, 1, 2], [])
    assert left["error"][0] == "label mass 0.02 is below min_mass=0.5"


def test_a_row_with_a_nan_has_no_label_and_no_mass(labels: LabelSpace) -> None:
    got = label_direct(table(["x"]), Known([[np.nan, -1.0, -2.0]]), labels)
    assert (got["label_ids"][0], got["label_mass"][0]) == ([], 0.0)
    assert got["error"][0] == "the model gave no label a probability"


def test_one_unread_question_leaves_a_multilabel_row_without_a_label() -> None:
    labels = load_labels(["bug", "praise"], multilabel=True)
    p = np.array([[0.3, 0.1], [0.0, 0.0], [0.2, 0.2], [0.1, 0.3]])
    with np.errstate(divide="ignore"):
        engine = Known(np.log(p).tolist(), [None, None, None, "late"])
    got = label_direct(table(["x", "y"]), engine, labels)
    assert got["label_ids"][:] == [[], [0, 1]]
    assert got["error"][:] == ["the model gave no label a probability", "late"]
