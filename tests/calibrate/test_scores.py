import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import TypeAdapter
from reference import conformal as reference
from scipy.sparse import csr_array

from llmlabel.calibrate import scores
from llmlabel.calibrate.scores import (
    Nonconformity,
    block_scores,
    sets_of,
    stored_scores,
    true_scores,
)
from llmlabel.calibrate.streams import scores_of_blocks, sets_of_blocks

SEEDS = pytest.mark.parametrize("seed", range(20))
PLAIN = Nonconformity("aps", randomised=False)
HOW = [
    Nonconformity("lac"),
    Nonconformity("aps"),
    PLAIN,
    Nonconformity("raps", penalty=0.03, free_labels=2),
    Nonconformity("raps", penalty=0.03, randomised=False),
    Nonconformity("saps", penalty=0.02),
    Nonconformity("saps", penalty=0.02, randomised=False),
    Nonconformity("margin"),
]


def score_name(how: Nonconformity) -> str:
    return getattr(how.score, "__name__", str(how.score))


EACH = pytest.mark.parametrize("how", HOW, ids=lambda how: f"{score_name(how)}-{how.randomised}")


def squared(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return 1 - probs**2 + uniforms[:, None] / 8


def twin(row: list[float], u: float, how: Nonconformity) -> list[float]:
    u = u if how.randomised else 1.0
    match how.score:
        case "raps":
            return reference.raps(row, u, how.penalty, how.free_labels)
        case "saps":
            return reference.saps(row, u, how.penalty)
    return getattr(reference, str(how.score))(row, u)


def votes(seed: int, rows: int = 12, labels: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Rows with many ties, labels of probability 0, and rows of nothing; and uniform numbers."""
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 4, (rows, labels)) * (rng.random((rows, labels)) < 0.8)
    probs = probs / np.maximum(probs.sum(axis=1, keepdims=True), 1)
    probs[rng.random(rows) < 0.1] = 0
    return probs.astype(np.float32), rng.random(rows)


def exactly(found: csr_array, expected: np.ndarray) -> bool:
    assert found.dtype == bool
    assert found.has_sorted_indices
    assert found.indices.dtype == np.int32
    return found.nnz == expected.sum() and bool((found.toarray() == expected).all())


@EACH
@SEEDS
def test_scores_equal_the_twins(seed: int, how: Nonconformity) -> None:
    probs, uniforms = votes(seed)
    expected = [twin(row, u, how) for row, u in zip(probs.tolist(), uniforms.tolist(), strict=True)]
    found = block_scores(probs, how, uniforms)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    assert np.isinf(found[probs == 0]).all()
    sparse = csr_array(probs)
    rows, ids = sparse.nonzero()
    assert stored_scores(sparse, how, uniforms).tolist() == found[rows, ids].tolist()


@SEEDS
def test_prevalence_adjusted_scores_equal_the_twin(seed: int) -> None:
    probs, uniforms = votes(seed)
    prior = tuple(np.random.default_rng(seed).dirichlet(np.ones(7)).tolist())
    how = Nonconformity(prior=prior)
    expected = [reference.adjusted(row, prior) for row in probs.tolist()]
    assert block_scores(probs, how, uniforms).tolist() == expected


@pytest.mark.parametrize("how", [*HOW, Nonconformity(squared)], ids=score_name)
@SEEDS
def test_true_scores_are_those_of_the_block_to_the_last_bit(seed: int, how: Nonconformity) -> None:
    """Otherwise ties at the threshold would fall apart: a set is cut at a true label's score."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(60, 0.2), 30).astype(np.float32)
    probs[:10] = votes(seed, 10, 60)[0]
    uniforms, gold = rng.random(30), rng.integers(-1, 60, 30)
    every = block_scores(probs, how, uniforms)
    expected = np.where(gold >= 0, every[np.arange(30), gold], np.inf).tolist()
    assert true_scores(probs, gold, how, uniforms).tolist() == expected
    assert true_scores(csr_array(probs), gold, how, uniforms).tolist() == expected
    double = true_scores(probs.astype(np.float64), gold, how, uniforms)
    assert double.tolist() == expected
    fine = rng.dirichlet(np.full(60, 0.2), 30)  # 53 bits: plain sums depend on their order
    every = block_scores(fine, how, uniforms)
    expected = np.where(gold >= 0, every[np.arange(30), gold], np.inf).tolist()
    assert true_scores(csr_array(fine), gold, how, uniforms).tolist() == expected
    order = rng.permutation(60)
    assert (block_scores(fine[:, order], how, uniforms) == every[:, order]).all()


def test_masses_add_up_in_any_order() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(3000, 0.05), 5).astype(np.float32)
    order = rng.permutation(3000)
    one = block_scores(probs, PLAIN, np.ones(5))
    two = block_scores(probs[:, order], PLAIN, np.ones(5))
    where = probs[:, order] > 1e-8  # distinct: ties rank by id, which the order changes
    assert (one[:, order][where] == two[where]).all()


@pytest.mark.parametrize(
    "how",
    [*HOW, Nonconformity(squared), Nonconformity(prior=(0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05))],
    ids=lambda how: f"{score_name(how)}-{how.randomised}-{how.prior is not None}",
)
@SEEDS
def test_sets_are_the_scores_up_to_the_threshold(seed: int, how: Nonconformity) -> None:
    probs, uniforms = votes(seed)
    every = block_scores(probs, how, uniforms)
    rng = np.random.default_rng(seed)
    limit = float(rng.choice(every[np.isfinite(every)]))  # one that is met exactly
    labels = np.where(rng.random((1, 7)) < 0.2, np.inf, limit + 0.01)
    rows = rng.choice(every[np.isfinite(every)], (12, 1))
    for limits in (limit, -5.0, math.inf, labels, labels[0], rows, rows + labels):
        assert exactly(sets_of(probs, limits, how, uniforms), every <= limits)
        assert exactly(sets_of(csr_array(probs), limits, how, uniforms), every <= limits)


@EACH
def test_long_prefixes(how: Nonconformity, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.full(400, 0.3), 40).astype(np.float32)
    probs[:20] = np.round(probs[:20] * 200) / 200  # ties of hundreds, at the cut of a prefix
    probs[:20] /= np.maximum(probs[:20].sum(axis=1, keepdims=True), 1)
    uniforms = rng.random(40)
    every = block_scores(probs, how, uniforms)
    for limit in np.quantile(every[np.isfinite(every)], [0.02, 0.1, 0.5, 0.97], method="lower"):
        expected = every <= limit
        assert exactly(sets_of(probs, limit, how, uniforms), expected)
        monkeypatch.setattr(scores, "_CELLS", 900)  # blocks of a few rows
        assert exactly(sets_of(csr_array(probs), limit, how, uniforms), expected)
        monkeypatch.undo()


def test_lac_compares_as_float64_does() -> None:
    """1 - p of neighbouring float32, at thresholds in between: no rounding of the threshold."""
    base = np.float32(0.1)
    near = [base]
    for _ in range(6):
        near.append(np.nextafter(near[-1], np.float32(1)))
    probs = np.array([near], dtype=np.float32)
    for p in near:
        for limit in (1 - float(p), np.nextafter(1 - float(p), 0), np.nextafter(1 - float(p), 1)):
            expected = 1 - probs.astype(np.float64) <= limit
            assert exactly(sets_of(probs, limit, Nonconformity(), np.zeros(1)), expected)
    tiny = np.array([[1e-30, 1e-45, 0.0]], dtype=np.float32)
    assert sets_of(tiny, 1.0, Nonconformity(), np.zeros(1)).toarray().tolist() == [
        [True, True, False]
    ]


@EACH
def test_scores_never_fall_with_the_rank(how: Nonconformity) -> None:
    rng = np.random.default_rng(1)
    probs = np.sort(rng.dirichlet(np.full(300, 0.1), 20).astype(np.float32))[:, ::-1]
    for row in block_scores(probs, how, rng.random(20)):
        stored = row[np.isfinite(row)]
        assert all(one <= two for one, two in pairwise(stored.tolist()))


@EACH
def test_blocks_may_be_cut_anywhere(how: Nonconformity) -> None:
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.full(50, 0.3), 60).astype(np.float32)
    gold = rng.integers(-1, 50, 60)
    whole = scores_of_blocks([(probs, gold)], how, seed=4)
    cuts = [0, 1, 20, 45, 60]
    parts = list(pairwise(cuts))
    dense = scores_of_blocks(((probs[a:b], gold[a:b]) for a, b in parts), how, seed=4)
    sparse = scores_of_blocks(((csr_array(probs[a:b]), gold[a:b]) for a, b in parts), how, seed=4)
    assert whole.tolist() == dense.tolist() == sparse.tolist()
    uniforms = np.random.default_rng(4).random(60)
    assert whole.tolist() == true_scores(probs, gold, how, uniforms).tolist()
    limit = float(np.median(whole[np.isfinite(whole)]))
    expected = sets_of(probs, limit, how, uniforms).toarray()
    assert exactly(sets_of_blocks((probs[a:b] for a, b in parts), limit, how, seed=4), expected)
    mixed = (csr_array(probs[a:b]) if a else probs[a:b] for a, b in parts)
    assert exactly(sets_of_blocks(mixed, limit, how, seed=4), expected)


def test_no_blocks() -> None:
    assert scores_of_blocks([], PLAIN, seed=0).shape == (0,)
    assert sets_of_blocks([], 0.5, PLAIN, seed=0).shape == (0, 0)
    nothing = csr_array((0, 5), dtype=np.float32)
    assert sets_of(nothing, 0.5, PLAIN, np.zeros(0)).shape == (0, 5)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (math.nan, "block 1: row 1 sums to nan; each row must hold probabilities"),
        (1.5, r"block 1: row 1 sums to 1\.5"),
        (-0.25, r"block 1: it holds -0\.25"),
    ],
)
def test_a_block_that_holds_no_probabilities(value: float, line: str) -> None:
    good, bad = np.full((2, 2), 0.5, dtype=np.float32), np.zeros((2, 2), dtype=np.float32)
    bad[1, 0] = value
    for block in (bad, csr_array(bad)):
        with pytest.raises(ValueError, match=line):
            sets_of_blocks([good, block], 0.5, PLAIN, seed=0)
        with pytest.raises(ValueError, match=line):
            scores_of_blocks([(good, np.zeros(2, int)), (block, np.zeros(2, int))], PLAIN, seed=0)


def test_a_sparse_array_out_of_order() -> None:
    messy = csr_array(
        (np.array([0.25, 0.5, 0.25], np.float32), np.array([2, 0, 1]), np.array([0, 3])),
        shape=(1, 3),
    )
    found = true_scores(messy, np.array([2]), PLAIN, np.ones(1))
    assert found.tolist() == [1.0]  # the higher id of two equal ones ranks last
    assert sets_of(messy, 0.75, PLAIN, np.ones(1)).toarray().tolist() == [[True, True, False]]
    assert messy.indices.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"penalty": -1.0}, r"penalty must be a number from 0 on; got -1\.0"),
        ({"penalty": math.nan}, "penalty must be a number from 0 on; got nan"),
        ({"free_labels": -1}, "free_labels must be 0 or more; got -1"),
        (
            {"score": "aps", "prior": (0.5, 0.5)},
            "a prior adjusts the score lac only; got score=aps",
        ),
        ({"prior": (1.0, 0.0)}, r"above 0 everywhere; label 1 has 0\.0"),
        ({"prior": (1.0, math.nan)}, "above 0 everywhere; label 1 has nan"),
    ],
)
def test_settings_that_make_no_score(settings: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Nonconformity(**settings)


def test_a_prior_of_another_number_of_labels() -> None:
    probs = np.full((1, 3), 0.25, dtype=np.float32)
    with pytest.raises(ValueError, match="the prior has 2 labels, the rows have 3"):
        sets_of(probs, 0.5, Nonconformity(prior=(0.5, 0.5)), np.zeros(1))


def test_a_function_that_gives_no_scores() -> None:
    probs = np.full((2, 3), 0.25, dtype=np.float32)
    for function in (lambda p, u: p[:, 0], lambda p, u: p * math.nan):
        with pytest.raises(ValueError, match="must give one number for each of"):
            block_scores(probs, Nonconformity(function), np.zeros(2))


def test_it_is_json() -> None:
    adapter = TypeAdapter(Nonconformity)
    how = Nonconformity("raps", penalty=0.1, free_labels=3)
    assert adapter.validate_json(adapter.dump_json(how)) == how
