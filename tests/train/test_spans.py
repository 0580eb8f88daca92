import itertools
from typing import Any

import numpy as np
import pytest

from llmlabel.train.spans import Word, best_tags, spans_of, tags_of, words_of


def split(text: str) -> list[Word]:
    found, place = [], 0
    for number, word in enumerate(text.split(" ")):
        found.append(Word(place, place + len(word), number))
        place += len(word) + 1
    return found


def span(start: int, end: int, label: int, prob: float | None = None) -> dict[str, Any]:
    return {"start": start, "end": end, "label_id": label, "prob": prob}


def test_words_have_their_first_token_and_no_blanks() -> None:
    text = "the  cats sat"
    #        <s>  the   _     _cat    s        sat       </s>
    offsets = [(0, 0), (0, 3), (3, 4), (4, 8), (8, 9), (9, 13), (0, 0)]
    word_ids = [None, 0, 1, 2, 2, 3, None]
    assert words_of(word_ids, offsets, text) == [Word(0, 3, 1), Word(5, 9, 3), Word(10, 13, 5)]


def test_tags_begin_and_go_on() -> None:
    words = split("Ada Lovelace met Charles Babbage Ltd")
    tags = tags_of([span(0, 12, 0), span(17, 32, 0, 0.8), span(33, 36, 1, 0.5)], words, labels=2)
    assert tags.argmax(axis=1).tolist() == [1, 2, 0, 1, 2, 0]
    np.testing.assert_allclose(tags.sum(axis=1), 1)
    np.testing.assert_allclose(tags[3], [0.2, 0.8, 0, 0, 0])
    np.testing.assert_allclose(tags[5], [0.5, 0, 0, 0.5, 0])


def test_a_word_belongs_to_the_most_probable_of_overlapping_spans() -> None:
    words = split("new york times")
    tags = tags_of([span(0, 8, 0, 0.6), span(4, 14, 1, 0.9)], words, labels=2)
    assert tags.argmax(axis=1).tolist() == [1, 3, 4]
    tags = tags_of([span(0, 8, 0), span(4, 14, 1)], words, labels=2)  # the longer one
    assert tags.argmax(axis=1).tolist() == [1, 3, 4]
    tags = tags_of([span(0, 14, 0, 0.6), span(4, 8, 1, 0.9)], words, labels=2)
    assert tags.argmax(axis=1).tolist() == [1, 3, 1]  # what is interrupted begins anew
    tags = tags_of([span(5, 6, 0)], words, labels=2)  # a part of a word is enough
    assert tags.argmax(axis=1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_spans_become_tags_and_spans_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = split(" ".join("w" * n for n in rng.integers(1, 6, size=rng.integers(1, 20))))
    spans, at = [], 0
    while at < len(words):
        length = int(rng.integers(1, 4))
        if rng.random() < 0.6:
            last = words[min(at + length, len(words)) - 1]
            spans.append(span(words[at].start, last.end, int(rng.integers(0, 3)), 1.0))
        at += length
    found = spans_of(tags_of(spans, words, labels=3), words)
    assert [{**one, "agreement": None} for one in spans] == found


@pytest.mark.parametrize("seed", range(20))
def test_the_best_tags_are_those_of_all_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(5), size=int(rng.integers(1, 6)))

    def allowed(tags: tuple[int, ...]) -> bool:
        before = (0, *tags)
        return all(
            tag == 0 or tag % 2 == 1 or last in (tag, tag - 1)
            for last, tag in itertools.pairwise(before)
        )

    def score(tags: tuple[int, ...]) -> float:
        return sum(np.log(row[tag]) for row, tag in zip(probs, tags, strict=True))

    expected = max(filter(allowed, itertools.product(range(5), repeat=len(probs))), key=score)
    assert best_tags(probs).tolist() == list(expected)


def test_the_probability_of_a_span_is_the_mean_over_its_words() -> None:
    probs = np.array([[0.1, 0.7, 0.2, 0, 0], [0.2, 0.1, 0.6, 0.1, 0], [0.9, 0.1, 0, 0, 0]])
    [found] = spans_of(probs, split("new york is"))
    assert (found["start"], found["end"], found["label_id"]) == (0, 8, 0)
    assert found["prob"] == pytest.approx((0.9 + 0.7) / 2)
    assert spans_of(np.zeros((0, 5)), []) == []
