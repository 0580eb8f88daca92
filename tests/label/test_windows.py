import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.label.windows import mean_by_group, windows
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat


def rows(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [f"r{i}" for i in range(len(texts))], "text": texts})


class ByText(FakeEngine):
    """Answers each text, named by its first word, with given probabilities."""

    def __init__(self, answers: dict[str, list[float]]) -> None:
        super().__init__()
        self.answers, self.asked = answers, list[str]()

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        texts = [chat[-1]["content"].split("\n")[0].removeprefix("Text: ") for chat in chats]
        self.asked += texts
        given = [self.answers[text.split()[0]] for text in texts]
        with np.errstate(divide="ignore"):
            return Scores(np.log(np.array(given)).reshape(len(chats), len(labels)))


def test_neighbours_share_a_quarter_and_the_last_window_is_full() -> None:
    text = " ".join(str(i) for i in range(10))
    assert windows(text, words=4) == ["0 1 2 3", "3 4 5 6", "6 7 8 9"]
    assert windows(text, words=8) == ["0 1 2 3 4 5 6 7", "2 3 4 5 6 7 8 9"]
    assert windows("a b c", words=1) == ["a", "b", "c"]
    assert windows("a b c", words=2) == ["a b", "b c"]


def test_a_short_text_stays_and_what_stands_between_words_too() -> None:
    assert windows("  a\n b ", words=2) == ["  a\n b "]
    assert windows(" a\n\nb\tc ", words=2) == ["a\n\nb", "b\tc"]
    with pytest.raises(ValueError, match="at least 1 word; got 0"):
        windows("a", words=0)


@pytest.mark.parametrize("seed", range(20))
def test_every_word_is_in_a_window_and_a_quarter_is_shared(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, words = int(rng.integers(1, 60)), int(rng.integers(2, 20))
    found = [
        [int(w) for w in part.split()]
        for part in windows(" ".join(map(str, range(count))), words=words)
    ]
    assert sorted({word for part in found for word in part}) == list(range(count))
    assert {len(part) for part in found} == {min(count, words)}
    for before, after in itertools.pairwise(found):
        assert len(set(before) & set(after)) >= words / 4
        assert after[0] > before[0]


@pytest.mark.parametrize("seed", range(20))
def test_mean_by_group_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, 6, size=int(rng.integers(0, 12))))
    values = rng.random((len(groups), 3))
    found = mean_by_group(values, groups, 7)
    for group in range(7):
        members = [v for v, g in zip(values.tolist(), groups.tolist(), strict=True) if g == group]
        mean = [sum(column) / len(members) for column in zip(*members, strict=True)] or [0.0] * 3
        assert found[group].tolist() == pytest.approx(mean, rel=1e-12)


def test_distributions_and_masses_of_windows_are_averaged() -> None:
    labels = load_labels(["bug", "praise"])
    answers = {"a": [0.2, 0.2], "b": [0.06, 0.02], "x": [0.1, 0.3]}
    engine = ByText(answers)
    got = label_direct(rows(["a b", "x", "", "b"]), engine, labels, window_words=1)
    assert engine.asked == ["a", "b", "x", "b"]
    probs = [
        dict(zip(i, p, strict=True))
        for i, p in zip(got["label_ids"], got["label_probs"], strict=True)
    ]
    assert probs[0] == pytest.approx({0: 0.625, 1: 0.375})  # means of 0.5, 0.75 and 0.5, 0.25
    assert probs[1] == pytest.approx({0: 0.25, 1: 0.75})
    assert probs[2] == {}
    np.testing.assert_allclose(got["label_mass"][:], [0.24, 0.4, 0.0, 0.08], rtol=1e-6)
    assert got["error"][:] == [None, None, "empty text", None]
    assert got["text"][0] == "a b"


def test_a_window_without_an_answer_does_not_count_but_is_reported() -> None:
    labels = load_labels(["bug", "praise"])
    got = label_direct(
        rows(["a b"]), ByText({"a": [0.1, 0.3], "b": [0, 0]}), labels, window_words=1
    )
    assert got["label_probs"][0] == pytest.approx([0.75, 0.25])
    assert got["error"][:] == ["the model gave no label a probability"]
    assert got["label_mass"][0] == pytest.approx(0.2)


def test_windows_of_a_multilabel_text() -> None:
    labels = load_labels(["bug", "praise"], multilabel=True)
    engine = ByText({"a": [0.3, 0.1], "b": [0.1, 0.3]})  # yes and no
    got = label_direct(rows(["a b"]), engine, labels, window_words=1)
    assert engine.asked == ["a", "a", "b", "b"]  # all labels of a window side by side
    assert got["label_probs"][0] == pytest.approx([0.5, 0.5])


def test_long_texts_are_not_cut() -> None:
    labels = load_labels(["bug", "praise"])
    long = "bug " * 4000
    whole = label_direct(rows([long]), FakeEngine(), labels)
    parts = label_direct(rows([long, "short"]), FakeEngine(), labels, window_words=500)
    assert whole["error"][0].startswith("text cut")
    assert parts["error"][:] == [None, None]
    assert parts["label_ids"][0][0] == 0
    plain = label_direct(rows(["short"]), FakeEngine(), labels)
    assert parts["label_probs"][1] == plain["label_probs"][0]


def test_windows_have_blocks_of_their_own(tmp_path: Path) -> None:
    labels = load_labels(["bug", "praise"])
    answers = {"a": [0.2, 0.2], "b": [0.6, 0.2]}
    one = label_direct(rows(["a b"]), ByText(answers), labels, output=tmp_path)
    with pytest.raises(ValueError, match="window_words was None and is 1"):
        label_direct(rows(["a b"]), ByText(answers), labels, output=tmp_path, window_words=1)
    two = label_direct(
        rows(["a b"]), ByText(answers), labels, output=tmp_path / "2", window_words=1
    )
    assert one["label_probs"][0] == pytest.approx([0.5, 0.5])
    assert two["label_probs"][0] == pytest.approx([0.625, 0.375])
    with pytest.raises(ValueError, match="window_words must be at least 1; got 0"):
        label_direct(rows(["a"]), ByText(answers), labels, window_words=0)
