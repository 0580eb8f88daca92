"""Best-first reading: exact where it reads, an honest bound where it does not."""

import math

import numpy as np
import pytest

from llmlabel.engine.bestfirst import MOST_IDS, BestFirst, Branches, Step, Wish
from llmlabel.engine.labeltrie import LabelTrie


def random_case(seed: int) -> tuple[list[list[int]], dict[tuple[int, ...], dict[int, float]]]:
    """Label sequences, and a model: next-token log-probabilities after each path, sharp or flat."""
    rng = np.random.default_rng(seed)
    unique = {tuple(rng.integers(3, 9, rng.integers(1, 5)).tolist()) for _ in range(40)}
    sequences = [[*s, 0] for s in sorted(unique)]
    model: dict[tuple[int, ...], dict[int, float]] = {}
    for sequence in sequences:
        for length in range(len(sequence)):
            path = tuple(sequence[:length])
            if path not in model:
                logits = rng.normal(size=10) * (1 + 3 * (seed % 3))
                model[path] = dict(enumerate((logits - np.logaddexp.reduce(logits)).tolist()))
    return sequences, model


def slow_joint(sequence: list[int], model: dict[tuple[int, ...], dict[int, float]]) -> float:
    return sum(model[tuple(sequence[:i])][token] for i, token in enumerate(sequence))


def read(
    seed: int,
    *,
    max_missing: float,
    rows: int = 1,
    max_reads: int | None = None,
    candidates: list[list[int]] | None = None,
) -> tuple[BestFirst, list[float], int]:
    """Reads all rows of a case from a model that writes on greedily; the last is its requests."""
    sequences, model = random_case(seed)
    trie = LabelTrie.of(sequences)
    reading = BestFirst(
        trie, rows, max_missing=max_missing, max_reads=max_reads, candidates=candidates
    )
    asked = 0
    while wanted := [(row, int(node)) for row, nodes in reading.round() for node in nodes]:
        for row, node in wanted:
            branches = Branches(trie, None if candidates is None else candidates[row])
            wishes = branches.wishes(node)
            asked += len(wishes)
            path = tuple(trie.path(node))
            reading.walk(row, node, [written(model, path, wish) for wish in wishes], branches)
    return reading, [slow_joint(s, model) for s in sequences], asked


def written(
    model: dict[tuple[int, ...], dict[int, float]], path: tuple[int, ...], wish: Wish
) -> list[Step]:
    """What a greedy model answers; it stops with the end token 0."""
    steps: list[Step] = []
    while len(steps) < wish.steps:
        nothing = dict.fromkeys(range(10), -5.0)  # off the trie: of no interest
        values = model.get(path, nothing)
        token = max(wish.written or range(10), key=values.__getitem__)
        steps.append(Step({one: values[one] for one in wish.ids}, token))
        if token == 0:
            break
        path = (*path, token)
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_nothing_missing_allowed_reads_every_label_exactly(seed: int) -> None:
    reading, expected, _ = read(seed, max_missing=0.0, rows=2)
    np.testing.assert_allclose(reading.log_probs, [expected] * 2, rtol=1e-12)
    assert reading.unread.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("max_missing", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(20))
def test_what_was_read_is_exact_and_the_rest_is_bounded(seed: int, max_missing: float) -> None:
    reading, expected, asked = read(seed, max_missing=max_missing)
    was_read = np.isfinite(reading.log_probs[0])
    np.testing.assert_allclose(
        reading.log_probs[0, was_read], np.array(expected)[was_read], rtol=1e-12
    )
    found = math.fsum(math.exp(e) for e, r in zip(expected, was_read, strict=True) if r)
    lost = math.fsum(math.exp(e) for e, r in zip(expected, was_read, strict=True) if not r)
    assert lost <= reading.unread[0] + 1e-15
    assert reading.unread[0] <= max_missing * (found + reading.unread[0]) + 1e-15
    assert asked <= read(seed, max_missing=0.0)[2]
    assert asked < len(reading.trie)  # reading on


def test_a_sharp_model_needs_few_reads() -> None:
    assert read(2, max_missing=1e-3)[2] < 0.5 * read(2, max_missing=0.0)[2]


@pytest.mark.parametrize("seed", range(5))
def test_only_candidates_are_read_and_only_they_count(seed: int) -> None:
    candidates = [[0, 3, 5], [1]]
    reading, expected, _ = read(seed, max_missing=0.0, rows=2, candidates=candidates)
    for row, some in enumerate(candidates):
        assert np.flatnonzero(np.isfinite(reading.log_probs[row])).tolist() == some
        np.testing.assert_allclose(
            reading.log_probs[row, some], np.array(expected)[some], rtol=1e-12
        )
    assert reading.unread.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_of_reads_is_kept_and_what_is_left_is_bounded(seed: int) -> None:
    reading, expected, _ = read(seed, max_missing=0.0, max_reads=24)
    was_read = np.isfinite(reading.log_probs[0])
    np.testing.assert_allclose(
        reading.log_probs[0, was_read], np.array(expected)[was_read], rtol=1e-12
    )
    assert 24 <= reading.reads[0] <= 24 + 4 * 16  # what the model wrote on along comes for free
    lost = math.fsum(math.exp(e) for e, r in zip(expected, was_read, strict=True) if not r)
    assert lost <= reading.unread[0] * (1 + 1e-12)
    with pytest.raises(ValueError, match="max_reads must be at least 1; got 0"):
        read(seed, max_missing=0.0, max_reads=0)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_missing must be at least 0 and below 1; got 1\.0"):
        BestFirst(LabelTrie.of([[1, 0]]), 1, max_missing=1.0)


def test_a_large_fan_out_is_split() -> None:
    trie = LabelTrie.of([[3 + n, 0] for n in range(300)])
    wishes = Branches(trie, None).wishes(0)
    assert [len(wish.ids) for wish in wishes] == [MOST_IDS, MOST_IDS, 44]
    assert {wish.steps for wish in wishes} == {1}
    (few,) = Branches(trie, [5, 290]).wishes(0)
    assert few.ids == (0, 8, 293)
    assert few.steps == 2
