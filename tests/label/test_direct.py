from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

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
    third = Known(rows)
    label_direct(table(["a"]), third, load_labels(["bug", "x", "praise"]), output=tmp_path)
    assert len(third.asked) == 1  # another label space: other blocks


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
