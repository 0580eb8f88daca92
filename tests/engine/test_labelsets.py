import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from llmlabel.engine.labelsets import LabelSets, label_sets

PARTS = ["Media", "TV", "cat", "catfish", "no", "not", "C++", "a/b", "x: y", "what?", "R&D (new)"]


def random_labels(rng: random.Random) -> list[str]:
    """Labels that begin alike, hold each other, punctuation or a part of the separator."""
    labels: list[str] = []
    while len(labels) < rng.randint(2, 9):
        parts = [rng.choice(PARTS) for _ in range(rng.randint(1, 3))]
        label = rng.choice([" > ", ", ", ": ", "", "; x"[1:]]).join(parts) + rng.choice(
            ["", "", ";", "."]
        )
        if label not in labels and "; " not in label and not label.startswith(" "):
            labels.append(label)
    return labels


def walk(sets: LabelSets, rng: random.Random, *, eager: float = 0.3) -> list[int]:
    """A reply by chance, of allowed tokens; `eager` to end."""
    tokens: list[int] = []
    while not tokens or tokens[-1] != sets.end:
        some = sets.allowed(tokens)
        assert some == sorted(set(some))
        tokens.append(sets.end if sets.end in some and rng.random() < eager else rng.choice(some))
        assert len(tokens) <= sets.longest
    return tokens


def cases(tokenizer: Any, count: int) -> Iterator[tuple[random.Random, LabelSets]]:
    for seed in range(count):
        rng = random.Random(seed)
        labels = random_labels(rng)
        most = rng.choice([None, None, 1, 2, len(labels) + 3])
        before = rng.choice(["", "Labels: ", "\n"])
        yield rng, label_sets(tokenizer, labels, before=before, most=most)


def test_1000_random_replies_are_sets_of_labels(tiny_tokenizer: Any) -> None:
    sizes = []
    for rng, sets in cases(tiny_tokenizer, 100):
        for _ in range(10):
            tokens = walk(sets, rng)
            text = tiny_tokenizer.decode(tokens[:-1])
            found = sets.read(tokens)
            assert sets.parse(text) == found
            assert sorted(text.split("; ")) == sorted(sets.labels[label] for label in found)
            assert len(found) <= (sets.most or len(sets.labels))
            sizes.append(len(found))
    assert len(sizes) == 1000
    assert sum(size > 1 for size in sizes) > 200
    assert max(sizes) >= 5


def test_every_order_of_every_set_can_be_decoded(tiny_tokenizer: Any) -> None:
    """So that the order in which a model has seen a row's labels keeps it from nothing."""
    for rng, sets in cases(tiny_tokenizer, 100):
        size = rng.randint(1, min(sets.most or 99, len(sets.labels)))
        chosen = rng.sample(range(len(sets.labels)), size)
        tokens = sets.encode(chosen)
        for place, token in enumerate(tokens):
            assert token in sets.allowed(tokens[:place])
        assert sets.read(tokens) == sorted(chosen)
        assert sets.parse(sets.write(chosen)) == sorted(chosen)
        assert tiny_tokenizer.decode(tokens[:-1]) == sets.write(chosen)


def test_a_label_may_be_the_beginning_of_another(tiny_tokenizer: Any) -> None:
    sets = label_sets(tiny_tokenizer, ["Media", "Media > TV", "Media;"])
    media, tv, odd = (sets.encode([label])[:-1] for label in range(3))
    after = sets.allowed(media)
    assert sets.end in after
    assert tv[len(media)] in after
    assert odd[len(media)] in after  # of "Media;", and of "Media; ..."
    whole = sets.encode([0, 1, 2])
    assert sets.allowed(whole[:-1]) == [sets.end]  # all labels are used
    assert sets.read(whole) == [0, 1, 2]
    only_tv = [*sets.encode([0, 2])[:-1], *sets.further[1][: len(sets.further[0])]]
    assert sets.end not in sets.allowed(only_tv)  # "Media" would be there twice


def test_beams_are_sets_too(tiny_decoder: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    sizes = []
    for rng, sets in cases(tiny_tokenizer, 6):
        prompts = tiny_tokenizer(
            [f"text {rng.random()}"[:9] for _ in range(4)], return_tensors="pt"
        )
        length = prompts.input_ids.shape[1]
        made = model.generate(
            **prompts,
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=sets.longest,
            do_sample=False,
            eos_token_id=sets.end,
            pad_token_id=0,
            prefix_allowed_tokens_fn=sets.prefix_allowed_tokens_fn(length),
            output_scores=True,
            return_dict_in_generate=True,
        )
        for row, score in zip(made.sequences, made.sequences_scores, strict=True):
            if score > -1e6:  # a language of one reply leaves a second beam nothing
                sizes.append(len(sets.read(row[length:].tolist())))
    assert len(sizes) > 30
    assert max(sizes) > 1


@lru_cache(maxsize=1)
def guided(tokenizer: Any) -> LLTokenizer:
    return from_tokenizer(tokenizer, eos_token=[tokenizer.eos_token_id])


def accepts(tokenizer: Any, sets: LabelSets, text: str) -> bool:
    matcher = LLMatcher(guided(tokenizer), sets.grammar(), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    return matcher.validate_tokens(tokens) == len(tokens) and (
        matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


def is_reply(sets: LabelSets, text: str) -> bool:
    try:
        return bool(sets.parse(text))
    except ValueError:
        return False


def test_the_grammar_is_the_same_language(tiny_tokenizer: Any) -> None:
    refused = 0
    for rng, sets in cases(tiny_tokenizer, 30):
        text = tiny_tokenizer.decode(walk(sets, rng, eager=0.2)[:-1])
        assert accepts(tiny_tokenizer, sets, text)
        one, other = rng.sample(sets.labels, 2)
        for wrong in (
            f"{one}; {one}",
            f"{one}; {other}; {one}",
            f"{one}; ",
            f"{one};{other}",
            f"{one}, {other}",
            one[:-1],
            f"{one}; {other}",
        ):
            good = is_reply(sets, wrong)
            assert accepts(tiny_tokenizer, sets, wrong) == good, (wrong, sets.labels)
            refused += not good
    assert refused > 125


def test_what_the_grammar_lets_through_is_a_set(tiny_tokenizer: Any) -> None:
    for rng, sets in cases(tiny_tokenizer, 20):
        matcher = LLMatcher(guided(tiny_tokenizer), sets.grammar(), log_level=0)
        tokens: list[int] = []
        while not matcher.is_stopped() and len(tokens) < 200:
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            some = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
            token = sets.end if sets.end in some and rng.random() < 0.3 else rng.choice(some)
            if token == sets.end:
                break
            tokens.append(token)
            matcher.consume_token(token)
        assert is_reply(sets, tiny_tokenizer.decode(tokens))


def test_nothing_is_read_from_what_is_no_reply(tiny_tokenizer: Any) -> None:
    sets = label_sets(tiny_tokenizer, ["cat", "catfish", "not"], most=2)
    tokens = sets.encode([1, 0])
    with pytest.raises(ValueError, match=r"do not come to an end"):
        sets.read(tokens[:-1])
    with pytest.raises(ValueError, match=r"are no label set"):
        sets.read([5, 5, sets.end])
    with pytest.raises(ValueError, match=r"'catfi' is no label"):
        sets.parse("not; catfi")
    with pytest.raises(ValueError, match=r"a label stands there twice"):
        sets.parse("cat; cat")
    with pytest.raises(ValueError, match=r"3 labels, at most 2 are allowed"):
        sets.parse("cat; not; catfish")
    assert sets.allowed([5, 5]) == [sets.end]
    assert sets.allowed(tokens) == [sets.end]
    assert sets.read([*tokens, 7, 7]) == [0, 1]  # padding after the end


def test_labels_that_cannot_be_told_apart(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"label 'a; b' and the separator '; ' cannot be told apart"
    ):
        label_sets(tiny_tokenizer, ["a", "b", "a; b"])
    with pytest.raises(ValueError, match=r"label 'a-' and the separator '--'"):
        label_sets(tiny_tokenizer, ["a-", "b"], separator="--")
    with pytest.raises(ValueError, match=r"most, the labels of a set, must be at least 1; got 0"):
        label_sets(tiny_tokenizer, ["a", "b"], most=0)


def test_what_is_no_set_is_not_written(tiny_tokenizer: Any) -> None:
    sets = label_sets(tiny_tokenizer, ["a", "b", "c"], most=2)
    for labels in ([], [0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"is no set of 1 to 2 labels; leave such a row out"):
            sets.encode(labels)
    with pytest.raises(ValueError, match="a label set needs labels, and there are none"):
        label_sets(tiny_tokenizer, [])


def test_random_walks_reach_all_sets(tiny_tokenizer: Any) -> None:
    sets = label_sets(tiny_tokenizer, ["no", "not", "no; x"[:2] + "t a"], most=2)
    rng = random.Random(0)
    found = {json.dumps(sets.read(walk(sets, rng))) for _ in range(200)}
    assert found == {"[0]", "[1]", "[2]", "[0, 1]", "[0, 2]", "[1, 2]"}
    assert torch.tensor(sets.encode([0, 1])).numel() <= sets.longest
