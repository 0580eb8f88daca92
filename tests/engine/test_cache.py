from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmlabel.engine import Scores
from llmlabel.engine.cache import CachedEngine
from llmlabel.engine.fake import FakeEngine
from llmlabel.prompt import Chat


class Counting(FakeEngine):
    asked = 0

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        self.asked += len(chats)
        scores = super().score(chats, labels, candidates=candidates)
        unread = None if candidates is None else np.full(len(chats), 0.01)
        return Scores(scores.log_probs, scores.errors, unread, scores.prompt_tokens)


def chat(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    engine = Counting(max_characters=3)
    cached = CachedEngine(engine, tmp_path / "sub" / "replies.sqlite")
    first = cached.score([chat("a"), chat("long")], ["x", "y"])
    cached.close()
    cached = CachedEngine(engine, tmp_path / "sub" / "replies.sqlite")
    second = cached.score([chat("long"), chat("new"), chat("a")], ["x", "y"])
    assert engine.asked == 3
    np.testing.assert_array_equal(second.log_probs[[2, 0]], first.log_probs)
    assert second.errors == [first.errors[1], None, None]
    assert second.prompt_tokens == [1, 1, 1]
    plain = engine.score([chat("new")], ["x", "y"])
    np.testing.assert_array_equal(second.log_probs[1:2], plain.log_probs)
    cached.close()


def test_other_labels_engines_and_verbs_are_other_requests(tmp_path: Path) -> None:
    engine = Counting()
    cached = CachedEngine(engine, tmp_path / "replies.sqlite")
    cached.score([chat("a")], ["x", "y"])
    cached.score([chat("a")], ["y", "x"])
    assert engine.asked == 2
    assert cached.generate([chat("a b c")], max_tokens=2)[0].text == "a b"
    assert cached.generate([chat("a b c")], max_tokens=1)[0].text == "a"
    assert cached.generate([chat("a b c")], max_tokens=2)[0].text == "a b"
    other = CachedEngine(Counting(noise=2.0), tmp_path / "replies.sqlite")
    other.score([chat("a")], ["x", "y"])
    assert other.engine.asked == 1
    other.close()
    cached.close()


def test_no_rows_and_a_damaged_file(tmp_path: Path) -> None:
    cached = CachedEngine(FakeEngine(), tmp_path / "replies.sqlite")
    assert cached.score([], ["x", "y"]).log_probs.shape == (0, 2)
    cached.close()
    (tmp_path / "bad.sqlite").write_text("this is no database, but a text that is long enough")
    with pytest.raises(ValueError, match=r"bad\.sqlite.*delete the file"):
        CachedEngine(FakeEngine(), tmp_path / "bad.sqlite")


def test_candidates_are_part_of_a_request_and_bounds_are_kept(tmp_path: Path) -> None:
    engine = Counting()
    cached = CachedEngine(engine, tmp_path / "replies.sqlite")
    chats, labels = [chat("a"), chat("b")], ["x", "y", "z"]
    first = cached.score(chats, labels, candidates=[[0, 2], [1]])
    assert np.isfinite(first.log_probs).tolist() == [[True, False, True], [False, True, False]]
    again = cached.score(chats, labels, candidates=[[0, 2], [1]])
    assert engine.asked == 2
    np.testing.assert_array_equal(again.log_probs, first.log_probs)
    assert again.unread is not None
    assert again.unread.tolist() == [0.01, 0.01]
    cached.score(chats, labels, candidates=[[0, 2], [2]])
    assert engine.asked == 3
    assert cached.score(chats, labels).unread is None
    cached.close()
