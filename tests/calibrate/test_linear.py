import numpy as np
import pytest
from reference import scaling as reference
from scipy.sparse import csr_array

from llmlabel.calibrate.linear import (
    GoldRows,
    dirichlet_loss,
    dirichlet_scaled,
    fit_dirichlet,
    fit_vector,
    vector_loss,
    vector_scaled,
)
from llmlabel.calibrate.temperature import scale, scale_odds

SEEDS = pytest.mark.parametrize("seed", range(20))


def random_rows(seed: int, *, multilabel: bool = False) -> tuple[np.ndarray, np.ndarray, GoldRows]:
    """Probabilities with gaps and missing mass, what is true, and both as the functions read them."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(8, 40)), int(rng.integers(2, 6))
    probs = rng.dirichlet(np.ones(labels), rows) * rng.uniform(0.7, 1, (rows, 1))
    gaps = rng.random(probs.shape) < 0.2
    gaps[np.arange(rows), rng.integers(0, labels, rows)] = False  # a row stores one at least
    probs[gaps] = 0
    if multilabel:
        true = rng.random(probs.shape) < probs
    else:
        true = np.eye(labels, dtype=bool)[rng.integers(0, labels, rows)]
    return probs, true, gold_rows(probs, true, multilabel=multilabel)


def gold_rows(probs: np.ndarray, true: np.ndarray, *, multilabel: bool = False) -> GoldRows:
    sparse = csr_array(probs)
    rows = np.repeat(np.arange(len(probs)), np.diff(sparse.indptr))
    hits = true[rows, sparse.indices] * 1.0
    stored = csr_array((hits, sparse.indices, sparse.indptr), shape=sparse.shape)
    return GoldRows(sparse, stored, multilabel)


@SEEDS
def test_scaled_rows_equal_the_twins(seed: int) -> None:
    probs, _, gold = random_rows(seed)
    rng = np.random.default_rng(seed)
    labels = probs.shape[1]
    bias, weight, matrix = (rng.normal(0, 1, shape) for shape in (labels, labels, (labels, labels)))
    found = vector_scaled(gold.probs, weight, bias, multilabel=False).toarray()
    twin = [reference.vector_scaled(row, weight, bias) for row in probs.tolist()]
    np.testing.assert_allclose(found, twin, rtol=1e-10)
    found = dirichlet_scaled(gold.probs, matrix, bias).toarray()
    twin = [reference.dirichlet_scaled(row, matrix, bias) for row in probs.tolist()]
    np.testing.assert_allclose(found, twin, rtol=1e-10)
    np.testing.assert_allclose(found.sum(axis=1), probs.sum(axis=1), rtol=1e-12)
    odds = vector_scaled(gold.probs, weight, bias, multilabel=True)
    places = zip(gold.probs.data.tolist(), gold.probs.indices, strict=True)
    twin = [reference.odds_scaled(p, weight[at], bias[at]) for p, at in places]
    np.testing.assert_allclose(odds.data, twin, rtol=1e-10)


@SEEDS
def test_losses_and_gradients_equal_the_twins(seed: int) -> None:
    probs, true, gold = random_rows(seed)
    rng = np.random.default_rng(seed)
    labels = probs.shape[1]
    bias, weight, matrix = (rng.normal(0, 1, shape) for shape in (labels, labels, (labels, labels)))
    how = {"start": 0.7, "strength": 0.3}
    twin = probs.tolist(), true.argmax(axis=1).tolist()
    numbers = probs.tolist(), true.tolist()

    def vector(theta: list[float]) -> float:
        return reference.vector_loss(*twin, theta[:labels], theta[labels:], **how)

    def odds(theta: list[float]) -> float:
        return reference.odds_loss(*numbers, theta[:labels], theta[labels:], **how)

    def dirichlet(theta: list[float]) -> float:
        rows = [theta[i * labels : (i + 1) * labels] for i in range(labels)]
        return reference.dirichlet_loss(*twin, rows, theta[labels**2 :], **how)

    several = GoldRows(gold.probs, gold.hits, multilabel=True)
    for slow, found, parts in (
        (vector, vector_loss(weight, bias, gold, **how), (weight, bias)),
        (odds, vector_loss(weight, bias, several, **how), (weight, bias)),
        (dirichlet, dirichlet_loss(matrix, bias, gold, **how), (matrix, bias)),
    ):
        theta = np.concatenate([part.ravel() for part in parts]).tolist()
        assert found[0] == pytest.approx(slow(theta), rel=1e-10)
        slopes = [reference.slope(slow, theta, at) for at in range(len(theta))]
        got = np.concatenate([part.ravel() for part in found[1:]])
        np.testing.assert_allclose(got, slopes, atol=1e-8)


@SEEDS
@pytest.mark.parametrize("multilabel", [False, True])
def test_a_fit_is_where_the_twin_no_longer_falls(seed: int, multilabel: bool) -> None:
    probs, true, gold = random_rows(seed, multilabel=multilabel)
    how = {"start": 0.8, "strength": 0.05}
    weight, bias = fit_vector(gold, **how)
    labels, seen = len(bias), gold.seen()
    twin = probs.tolist(), true.tolist() if multilabel else true.argmax(axis=1).tolist()
    slow = reference.odds_loss if multilabel else reference.vector_loss
    theta = [*weight.tolist(), *bias.tolist()]
    for at in range(2 * labels):
        slope = reference.slope(lambda t: slow(*twin, t[:labels], t[labels:], **how), theta, at)
        assert abs(slope) < 1e-5 or not seen[at % labels]
    assert (weight[~seen] == 0.8).all()
    assert (bias[~seen] == 0).all()
    if multilabel:
        return
    matrix, bias = fit_dirichlet(gold, **how)
    theta = [*matrix.ravel().tolist(), *bias.tolist()]

    def loss(theta: list[float]) -> float:
        rows = [theta[i * labels : (i + 1) * labels] for i in range(labels)]
        return reference.dirichlet_loss(*twin, rows, theta[labels**2 :], **how)

    for at in range(labels**2 + labels):
        row = at // labels if at < labels**2 else at - labels**2
        assert abs(reference.slope(loss, theta, at)) < 1e-5 or not seen[row]
    assert (matrix[~seen] == 0.8 * np.eye(labels)[~seen]).all()


@SEEDS
def test_a_very_strong_pull_is_the_temperature(seed: int) -> None:
    _, _, gold = random_rows(seed)
    how = {"start": 1 / 1.6, "strength": 1e9}
    expected = scale(gold.probs, 1.6).toarray()
    found = vector_scaled(gold.probs, *fit_vector(gold, **how), multilabel=False)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    found = dirichlet_scaled(gold.probs, *fit_dirichlet(gold, **how))
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    _, _, several = random_rows(seed, multilabel=True)
    odds = vector_scaled(several.probs, *fit_vector(several, **how), multilabel=True)
    np.testing.assert_allclose(odds.data, scale_odds(several.probs, 1.6).data, rtol=1e-6)


def test_a_temperature_per_label_has_no_intercept_and_stays_within_bounds() -> None:
    rng = np.random.default_rng(0)
    probs = np.column_stack([rng.uniform(0.05, 0.95, 4000) for _ in range(2)])
    odds = np.log(probs / (1 - probs))
    true = rng.random(probs.shape) < 1 / (1 + np.exp(-odds * [0.5, 2.0]))
    gold = gold_rows(probs, true, multilabel=True)
    weight, bias = fit_vector(gold, start=1.0, strength=1e-6, intercepts=False)
    assert weight == pytest.approx([0.5, 2.0], rel=0.08)
    assert bias.tolist() == [0.0, 0.0]
    sure = gold_rows(probs, probs > 0.5, multilabel=True)
    weight, _ = fit_vector(sure, start=1.0, strength=1e-9, intercepts=False)
    assert weight == pytest.approx([20, 20])


def test_dirichlet_without_pull_equals_a_logistic_regression_of_the_logarithms() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(3), 400)
    mixed = probs @ np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])
    true = np.eye(3, dtype=bool)[[rng.choice(3, p=row) for row in mixed]]
    fit = fit_dirichlet(gold_rows(probs, true), start=1.0, strength=1e-9)
    found = dirichlet_scaled(csr_array(probs), *fit).toarray()
    model = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit(np.log(probs), true.argmax(axis=1))
    np.testing.assert_allclose(found, model.predict_proba(np.log(probs)), atol=1e-3)
