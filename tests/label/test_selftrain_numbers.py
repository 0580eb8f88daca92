"""The numbers behind a learned prompt, beside slow twins and by hand."""

import itertools

import numpy as np
import pytest
from reference import selftrain as reference

from llmlabel.label.promptsearch import (
    agreement,
    bdpl_gradient,
    clip_norm,
    draw,
    pmi_ngrams,
    project_to_simplex,
    reinforce_gradient,
)
from llmlabel.label.selftrain import reliable_rows
from llmlabel.label.trials import centred, common


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Word probabilities above 0, drawn prompts, losses."""
    rng = np.random.default_rng(seed)
    positions, words, samples = rng.integers(1, 5), rng.integers(2, 7), rng.integers(2, 9)
    probs = rng.dirichlet(np.ones(words), size=positions)
    return probs, draw(probs, rng.random((samples, positions))), rng.normal(size=samples)


# ----------------------------------------------------------------------------------- estimators


def test_the_estimate_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    probs = np.array([[0.5, 0.2, 0.3], [0.25, 0.4, 0.35]])
    table = {prompt: float(rng.uniform()) for prompt in itertools.product(range(3), repeat=2)}
    exact = np.array(reference.exact_gradient(probs.tolist(), table))
    losses = np.array([[table[i, j] for j in range(3)] for i in range(3)])
    found = np.zeros_like(probs)
    for numbers in rng.random((5_000, 20, 2)):  # 100,000 draws
        drawn = draw(probs, numbers)
        found += reinforce_gradient(probs, drawn, losses[drawn[:, 0], drawn[:, 1]]) / 5_000
    # The baseline takes the expected loss from all words of a position alike. A row of one and the
    # same number moves no distribution, since the projection takes it out again.
    expected_loss = float(np.einsum("i,j,ij", *probs, losses))
    np.testing.assert_allclose(found, exact - expected_loss, atol=1e-2)
    assert np.ptp(exact, axis=1).min() > 0.1  # ten times what is allowed
    moved = [project_to_simplex(probs - 0.3 * g) for g in (exact, exact - expected_loss)]
    np.testing.assert_allclose(*moved, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_estimators_equal_the_loops(seed: int) -> None:
    probs, drawn, losses = case(seed)
    told = (probs.tolist(), drawn.tolist(), losses.tolist())
    plain = np.array(reference.reinforce(*told))
    np.testing.assert_allclose(reinforce_gradient(probs, drawn, losses), plain, atol=1e-6)
    np.testing.assert_allclose(
        bdpl_gradient(probs, drawn, losses), reference.bdpl(*told), 1e-6, 1e-6
    )
    # -1/p for the words that were not drawn adds nothing but a factor of 2
    np.testing.assert_allclose(reference.bdpl(*told), 2 * plain, 1e-6, 1e-6)


def test_a_word_that_is_never_drawn_gets_no_gradient() -> None:
    probs = np.array([[0.0, 0.5, 0.5]])
    drawn, losses = np.array([[1], [2]]), np.array([1.0, 3.0])
    np.testing.assert_array_equal(reinforce_gradient(probs, drawn, losses), [[0.0, -2.0, 2.0]])
    np.testing.assert_array_equal(bdpl_gradient(probs, drawn, losses), [[0.0, -4.0, 4.0]])


def test_one_step_by_hand() -> None:
    probs = np.array([[0.5, 0.5]])
    gradient = reinforce_gradient(probs, np.array([[0], [1]]), np.array([0.1, 0.3]))
    # advantages -0.1 and 0.1 over 2 - 1 samples, each over p = 0.5
    np.testing.assert_allclose(gradient, [[-0.2, 0.2]])
    np.testing.assert_allclose(project_to_simplex(probs - 0.5 * gradient), [[0.6, 0.4]])
    np.testing.assert_allclose(clip_norm(gradient, most=0.1), gradient * 0.1 / np.sqrt(0.08))
    np.testing.assert_array_equal(clip_norm(gradient, most=0.3), gradient)


# --------------------------------------------------------------------- projection and drawing


@pytest.mark.parametrize("seed", range(20))
def test_projection_equals_bisection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.uniform(-1, 1), rng.uniform(0.01, 2), size=(4, rng.integers(1, 9)))
    found = project_to_simplex(values)
    expected = [reference.project(row) for row in values.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-15)


def test_rows_that_sum_to_less_than_1_are_brought_to_1() -> None:
    # what the bisection of BDPL's code leaves at 0.95
    np.testing.assert_allclose(project_to_simplex(np.full((1, 50), 0.019)), 0.02, rtol=1e-12)
    np.testing.assert_allclose(project_to_simplex(np.array([[0.5, -3.0, 0.1]])), [[0.7, 0, 0.3]])
    np.testing.assert_array_equal(project_to_simplex(np.array([[9.0, 2.0]])), [[1, 0]])


@pytest.mark.parametrize("seed", range(20))
def test_draws_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = project_to_simplex(rng.normal(size=(3, 5)))  # with zeros
    uniforms = rng.random((40, 3))
    drawn = draw(probs, uniforms)
    assert drawn.tolist() == reference.draw(probs.tolist(), uniforms.tolist())
    assert (np.take_along_axis(probs, drawn.T, axis=1) > 0).all()  # never a word of probability 0


def test_draws_at_the_edges() -> None:
    probs = np.array([[0.0, 0.3, 0.7, 0.0]])
    numbers = np.array([[0.0], [0.3], [np.nextafter(1.0, 0.0)]])
    assert draw(probs, numbers).tolist() == [[1], [2], [2]]


# ------------------------------------------------------------------------------------- n-grams


def test_words_that_belong_together_stay_together() -> None:
    texts = ["my new york trip"] * 5 + ["A trip, my friend"] * 5 + ["my trip"] * 5 + ["", "once"]
    # 35 pairs of neighbours; log(35 c(ab) / (c(a) c(b))) is 1.95 for "new york" and "a trip,",
    # 1.25 for "york trip", 0.85 for "my new", "trip, my" and "my friend", 0.15 for "my trip".
    assert pmi_ngrams(texts, most=9) == ["my", "a trip", "friend", "new york trip", "trip"]
    assert pmi_ngrams(texts, most=2) == ["my", "a trip"]
    assert pmi_ngrams(texts, most=9, min_pmi=1.5)[1:] == ["trip", "a trip", "friend", "new york"]
    assert pmi_ngrams(texts, most=9, longest=2) == ["my", "a trip", "friend", "trip"]
    assert pmi_ngrams(texts, most=9, min_count=6) == ["my", "trip"]
    assert pmi_ngrams(texts[::-1], most=9) == pmi_ngrams(texts, most=9)


def test_marks_alone_are_no_words() -> None:
    assert pmi_ngrams(["- !!! (what?) ..."] * 9, most=5, min_pmi=99.0) == ["what"]


# -------------------------------------------------------------------------- rows and agreement


@pytest.mark.parametrize("seed", range(20))
def test_reliable_rows_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, labels = rng.integers(1, 40), rng.integers(2, 5)
    probs = rng.dirichlet(np.ones(labels), size=rows).round(1)  # with ties
    probs[rng.random(rows) < 0.2] = 0
    ids = [f"r{i}" for i in rng.permutation(rows)]
    share = float(rng.choice([0.05, 0.2, 0.5, 1.0]))
    expected = reference.reliable(probs.tolist(), ids, share)
    assert reliable_rows(probs, ids, share=share) == expected


def test_no_label_takes_more_than_its_part() -> None:
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.4, 0.6], [0.0, 0.0]])
    assert reliable_rows(probs, ["a", "b", "c", "d", "e"], share=0.5) == [2, 3]
    assert reliable_rows(probs, ["a", "b", "c", "d", "e"], share=1.0) == [0, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_agreement_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 3, size=(2, 30))
    other = np.where(rng.random(30) < 0.5, one, other)
    expected = reference.kappa(one.tolist(), other.tolist())
    assert agreement(one, other) == pytest.approx(expected, abs=1e-12)


def test_one_answer_to_everything_is_no_agreement() -> None:
    assert agreement(np.zeros(9, dtype=int), np.zeros(9, dtype=int)) == 0.0
    assert agreement(np.arange(9) % 2, np.arange(9) % 2) == 1.0
    assert agreement(np.arange(8) % 2, np.arange(8) // 4) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_corrected_loss_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs = np.log(rng.dirichlet(np.ones(3), size=7))
    targets = rng.integers(0, 3, size=7)
    found = -centred(log_probs)[np.arange(7), targets].mean()
    expected = reference.corrected_loss(log_probs.tolist(), targets.tolist())
    assert found == pytest.approx(expected, abs=1e-12)
    both = centred(np.stack([log_probs, log_probs + np.array([5.0, 0.0, -1.0])]))
    np.testing.assert_allclose(both[1], both[0], atol=1e-12)  # a preference of a label is gone


def test_the_demonstrations_of_most_rows() -> None:
    usual, own = [{"text": "a", "label": "x"}], [{"text": "b", "label": "x"}]
    assert common([own, usual, usual]) == usual
    assert common([[], []]) == []
