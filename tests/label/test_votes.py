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
from llmlabel.refine.orders import label_orders
from llmlabel.softlabels import SoftLabels

PROMPT = """{% block system %}{% for label in labels %}[{{ label }}]{% endfor %}{% endblock %}
{% block user %}{{ text }}?{% endblock %}"""


class FirstListed(FakeEngine):
    """Prefers what its prompt lists first: 0.6 and 0.2 each; a text `mute` gets no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[list[Chat]]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        self.calls.append(list(chats))
        found = np.full((len(chats), len(labels)), np.log(0.2))
        for row, chat in zip(found, chats, strict=True):
            system = chat[0]["content"]
            row[min(range(len(labels)), key=lambda i: system.index(labels[i]))] = np.log(0.6)
            if "mute" in chat[-1]["content"]:
                row[:] = -np.inf
        return Scores(found)


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(["apple", "berry", "cherry"])


def rows(*texts: str) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": list(texts)})


def test_each_order_is_a_source_and_their_mean_is_the_label(labels: LabelSpace) -> None:
    engine = FirstListed()
    got = label_direct(rows("x", "mute", ""), engine, labels, orders=3)
    first = [order[0] for order in label_orders(labels, 3)]
    assert first[0] == 0
    assert len({*first}) > 1  # else the mean below could not tell the orders apart
    expected = np.mean([np.where(np.arange(3) == one, 0.6, 0.2) for one in first], axis=0)
    dense = SoftLabels.from_dataset(got, labels).dense()
    np.testing.assert_allclose(dense, [expected, [0] * 3, [0] * 3], rtol=1e-6)
    votes = got["votes"][0]
    sources = [f"label/direct#{number}" for number in range(3)]
    assert [vote["source"] for vote in votes] == [name for name in sources for _ in range(3)]
    for name, one in zip(sources, first, strict=True):
        own = [(v["label_id"], v["prob"]) for v in votes if v["source"] == name]
        others = [label for label in range(3) if label != one]
        assert [label for label, _ in own] == [one, *others]
        assert [prob for _, prob in own] == pytest.approx([0.6, 0.2, 0.2])
    assert got["votes"][1:] == [[], []]
    assert got["error"][:] == [None, "the model gave no label a probability", "empty text"]
    np.testing.assert_allclose(got["label_mass"][:], [1.0, 0.0, 0.0], rtol=1e-6)
    assert [len(call) for call in engine.calls] == [
        2,
        2,
        2,
    ]  # one call an order: they share a prefix


def test_several_prompts_are_sources(labels: LabelSpace, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(PROMPT)
    engine = FirstListed()
    got = label_direct(rows("x"), engine, labels, prompt=["label/direct", mine])
    names = ["label/direct#0", "mine.jinja#0"]
    assert sorted({vote["source"] for vote in got["votes"][0]}) == names
    assert engine.calls[1][0][0]["content"] == "[apple][berry][cherry]"
    single = label_direct(rows("x"), FirstListed(), labels, prompt=mine)
    assert single["prompt_sha"][0] == prompt_sha(mine)
    assert "votes" not in single.column_names
    both = {got["prompt_sha"][0], prompt_sha(mine), prompt_sha("label/direct")}
    assert len(both) == 3
    with pytest.raises(ValueError, match="different names are needed"):
        label_direct(rows("x"), engine, labels, prompt=["label/direct", "label/direct"])


def test_a_source_without_an_answer_does_not_count(labels: LabelSpace, tmp_path: Path) -> None:
    mute = tmp_path / "mute.jinja"
    mute.write_text(PROMPT.replace("{{ text }}?", "{{ text }} mute"))
    got = label_direct(rows("x"), FirstListed(), labels, prompt=["label/direct", mute])
    assert got["label_probs"][0] == pytest.approx([0.6, 0.2, 0.2])
    assert got["error"][0] == "the model gave no label a probability"
    assert got["label_mass"][0] == pytest.approx(0.5)  # nothing of the second prompt's
    assert {vote["source"] for vote in got["votes"][0]} == {"label/direct#0"}


def test_orders_have_blocks_and_hashes_of_their_own(labels: LabelSpace, tmp_path: Path) -> None:
    shas = set()
    for orders in (1, 2, 3):
        engine = FirstListed()
        got = label_direct(rows("x"), engine, labels, orders=orders, output=tmp_path / str(orders))
        assert len(engine.calls) == orders
        shas.add(got["prompt_sha"][0])
        again = FirstListed()
        kept = label_direct(rows("x"), again, labels, orders=orders, output=tmp_path / str(orders))
        assert again.calls == []
        assert kept[0] == got[0]
    assert len(shas) == 3
    with pytest.raises(ValueError, match=r"begun by another call: .*orders"):
        label_direct(rows("x"), FirstListed(), labels, orders=1, output=tmp_path / "2")
    with pytest.raises(ValueError, match="orders"):
        label_direct(rows("x"), FirstListed(), labels, orders=7)  # 3 labels have 6


def test_row_order_and_blocks_do_not_matter(labels: LabelSpace) -> None:
    texts = [f"apple {i} cherry" for i in range(7)]
    whole = label_direct(rows(*texts), FakeEngine(), labels, orders=2, block_rows=3)
    back = label_direct(rows(*texts[::-1]), FakeEngine(), labels, orders=2)
    assert whole["label_probs"][:] == back["label_probs"][:][::-1]
    assert whole["votes"][:] == back["votes"][:][::-1]


def test_orders_of_a_multilabel_space() -> None:
    labels = load_labels(["apple", "berry", "cherry"], multilabel=True)

    class YesIfFirst(FakeEngine):
        def score(self, chats: Sequence[Chat], answers: Sequence[str]) -> Scores:
            assert tuple(answers) == ("yes", "no")
            found = []
            for chat in chats:
                listed = [line[2:] for line in chat[0]["content"].split("\n") if line[:2] == "- "]
                is_first = f'"{listed[0]}"' in chat[-1]["content"]
                found.append(np.log([0.9, 0.1] if is_first else [0.2, 0.8]))
            return Scores(np.array(found))

    got = label_direct(rows("x"), YesIfFirst(), labels, orders=3)
    first = [order[0] for order in label_orders(labels, 3)]
    expected = np.mean([np.where(np.arange(3) == one, 0.9, 0.2) for one in first], axis=0)
    np.testing.assert_allclose(SoftLabels.from_dataset(got, labels).dense(), [expected], rtol=1e-6)
    assert len(got["votes"][0]) == 9
