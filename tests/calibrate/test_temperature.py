import math

import numpy as np
import pytest
from datasets import Dataset
from pydantic import TypeAdapter
from reference import temperature as reference
from scipy.sparse import csr_array

from llmlabel.calibrate.temperature import (
    Temperature,
    apply_temperature,
    fit_temperature,
    nll_at,
    scale,
    scale_odds,
)
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import nll
from llmlabel.softlabels import SoftLabels


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def table(probs: np.ndarray, gold: list[list[int]]) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(probs, space(probs.shape[1])).add_to(rows)


def random_case(seed: int, *, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Gold drawn from softmax(z), probabilities softmax(sharpness * z) with gaps and empty rows."""
    rng = np.random.default_rng(seed)
    rows, labels = 60, int(rng.integers(2, 7))
    true = softmax(rng.normal(0, 1.5, (rows, labels)))
    gold = np.array([rng.choice(labels, p=p) for p in true])
    return true**sharpness / (true**sharpness).sum(axis=1, keepdims=True), gold


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(20))
def test_scaling_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs, gold = random_case(seed, sharpness=2.0)
    probs[rng.random(probs.shape) < 0.2] = 0  # rows with missing mass
    probs[rng.random(len(probs)) < 0.2] = 0  # rows without a soft label
    temperature = float(np.exp(rng.uniform(np.log(0.05), np.log(20))))
    scaled = scale(csr_array(probs), temperature).toarray()
    expected = [reference.scale(row, temperature) for row in probs.tolist()]
    np.testing.assert_allclose(scaled, expected, rtol=1e-11)
    np.testing.assert_allclose(scaled.sum(axis=1), probs.sum(axis=1), rtol=1e-12)
    value = nll_at(csr_array(probs), gold, temperature)
    expected_nll = reference.nll(probs.tolist(), gold.tolist(), temperature)
    assert value == pytest.approx(expected_nll, rel=1e-12)
    assert value == pytest.approx(nll(scaled, gold), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_the_fit_equals_the_grid_of_the_twin(seed: int, sharpness: float) -> None:
    probs, gold = random_case(seed, sharpness=sharpness)
    dataset = table(probs, [[g] for g in gold.tolist()])
    labels = space(probs.shape[1])
    stored = SoftLabels.from_dataset(dataset, labels).dense().tolist()
    fitted = fit_temperature(dataset, labels)
    assert fitted.value == pytest.approx(reference.fit(stored, gold.tolist()), rel=1e-3)
    assert fitted.nll_before == pytest.approx(reference.nll(stored, gold.tolist(), 1.0), rel=1e-12)
    after = reference.nll(stored, gold.tolist(), fitted.value)
    assert fitted.nll_after == pytest.approx(after, rel=1e-12)
    assert (fitted.rows, fitted.label_space) == (60, labels.fingerprint)


def test_the_fit_finds_the_sharpness_of_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    true = softmax(rng.normal(0, 2, (4000, 4)))
    gold = [[int(rng.choice(4, p=p))] for p in true]
    probs = true**2.5 / (true**2.5).sum(axis=1, keepdims=True)
    assert fit_temperature(table(probs, gold), space(4)).value == pytest.approx(2.5, rel=0.08)


def test_the_fit_equals_that_of_scikit_learn() -> None:
    pytest.importorskip("sklearn", minversion="1.8")
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Logits(ClassifierMixin, BaseEstimator):
        def decision_function(self, logits: np.ndarray) -> np.ndarray:
            return logits

        def predict(self, logits: np.ndarray) -> np.ndarray:
            return logits.argmax(axis=1)

        def fit(self, logits: np.ndarray, gold: np.ndarray) -> "Logits":
            self.classes_ = np.unique(gold)
            return self

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (400, 4))
    gold = np.array([rng.choice(4, p=p) for p in softmax(logits)])
    fitted = Logits().fit(logits, gold)
    model = CalibratedClassifierCV(FrozenEstimator(fitted), method="temperature")
    expected = model.fit(logits * 2.5, gold).predict_proba(logits * 2.5)
    dataset = table(softmax(logits * 2.5), [[g] for g in gold.tolist()])
    applied = apply_temperature(dataset, space(4), fit_temperature(dataset, space(4)))
    found = SoftLabels.from_dataset(applied, space(4)).dense()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_applying_it_gives_the_likelihood_that_the_fit_promised() -> None:
    probs, gold = random_case(5, sharpness=3.0)
    labels = space(probs.shape[1])
    dataset = table(probs, [[g] for g in gold.tolist()])
    fitted = fit_temperature(dataset, labels)
    assert fitted.nll_after < fitted.nll_before
    applied = apply_temperature(dataset, labels, fitted)
    after = SoftLabels.from_dataset(applied, labels).dense()
    assert nll(after, gold) == pytest.approx(fitted.nll_after, rel=1e-6)
    assert applied["label_ids"][:] == dataset["label_ids"][:]
    assert applied["gold"][:] == dataset["gold"][:]


def test_temperature_one_changes_nothing_and_missing_mass_stays() -> None:
    labels = space(3)
    dataset = table(np.array([[0.5, 0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), [[0]] * 3)
    same = apply_temperature(dataset, labels, Temperature(1.0, 0.0, 0.0, 10, labels.fingerprint))
    assert same["label_probs"][:] == [[0.5, 0.25], [], [1.0]]
    sharper = apply_temperature(dataset, labels, Temperature(0.5, 0.0, 0.0, 10, labels.fingerprint))
    assert sharper["label_probs"][0] == pytest.approx([0.6, 0.15])
    assert sharper["label_probs"][1] == []
    unread = table(np.zeros((2, 3)), [[0]] * 2)
    hot = apply_temperature(unread, labels, Temperature(2.0, 0.0, 0.0, 10, labels.fingerprint))
    assert hot["label_probs"][:] == [[], []]


def test_powers_of_small_probabilities_do_not_underflow() -> None:
    scaled = scale(csr_array(np.array([[1e-30, 2e-30], [0.0, 1.0]])), 0.05).toarray()
    np.testing.assert_allclose(scaled[0], [3e-30 / (1 + 2**20), 3e-30 / (1 + 2**-20)], rtol=1e-9)


def test_rows_that_say_nothing_are_left_out() -> None:
    probs, gold = random_case(7, sharpness=3.0)
    labels = space(probs.shape[1])
    golds = [[g] for g in gold.tolist()]
    unread = np.zeros((3, len(labels)))
    more = table(
        np.concatenate([unread, probs, np.full((2, len(labels)), 1 / len(labels))]),
        [[0], [0], [0], *golds, [], []],
    )
    plain = fit_temperature(more.select(range(3, len(more) - 2)), labels)
    assert plain.rows == len(golds)
    assert fit_temperature(more, labels) == plain


def test_a_fit_that_helps_nothing_is_one() -> None:
    dataset = table(np.full((10, 2), 0.5), [[0]] * 10)  # no temperature changes these
    fitted = fit_temperature(dataset, space(2))
    assert (fitted.value, fitted.nll_after) == (1.0, fitted.nll_before)
    assert fitted.nll_before == pytest.approx(math.log(2))


def test_temperatures_stay_within_bounds() -> None:
    right = table(np.tile([0.6, 0.4], (20, 1)), [[0]] * 20)
    assert fit_temperature(right, space(2)).value == pytest.approx(0.05, rel=0.01)
    wrong = table(np.tile([0.4, 0.6], (20, 1)), [[0]] * 20)
    assert fit_temperature(wrong, space(2)).value == pytest.approx(20, rel=0.01)


def test_what_cannot_be_fitted_is_refused() -> None:
    dataset = table(np.full((12, 2), 0.5), [[0]] * 9 + [[]] * 3)
    with pytest.raises(ValueError, match=r"at least 10 rows .* 9 of 12 rows have both"):
        fit_temperature(dataset, space(2))
    with pytest.raises(ValueError, match="column 'gold' is missing"):
        fit_temperature(dataset.remove_columns("gold"), space(2))
    several = table(np.full((12, 2), 0.5), [[0]] * 11 + [[0, 1]])
    with pytest.raises(ValueError, match="row with id 'r11' has the gold labels"):
        fit_temperature(several, space(2))
    fitted = Temperature(2.0, 0.0, 0.0, 10, "0123456789abcdef")
    with pytest.raises(
        ValueError, match=r"fitted in label space 0123456789abcdef, .* fit it again"
    ):
        apply_temperature(dataset, space(2), fitted)


@pytest.mark.parametrize("seed", range(20))
def test_several_labels_share_a_temperature_of_their_odds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, labels = 40, space(int(rng.integers(1, 4)) + 1, multilabel=True)
    probs = rng.uniform(0.05, 0.95, (rows, len(labels)))
    probs[rng.random(probs.shape) < 0.2] = 0  # not stored
    gold = [[k for k in range(len(labels)) if rng.random() < 0.4] for _ in range(rows)]
    table = Dataset.from_dict({"id": [f"r{i}" for i in range(rows)], "gold": gold})
    dataset = SoftLabels.from_dense(probs, labels).add_to(table)
    stored = SoftLabels.from_dataset(dataset, labels).dense().tolist()
    fitted = fit_temperature(dataset, labels)
    assert fitted.nll_before == pytest.approx(reference.odds_nll(stored, gold, 1.0), rel=1e-9)
    assert fitted.nll_after == pytest.approx(
        reference.odds_nll(stored, gold, fitted.value), rel=1e-9
    )
    for other in (0.05, 0.5, 0.99 * fitted.value, 1.01 * fitted.value, 2.0, 20.0):
        if 0.05 <= other <= 20:
            assert fitted.nll_after <= reference.odds_nll(stored, gold, other) + 1e-6
    after = SoftLabels.from_dataset(apply_temperature(dataset, labels, fitted), labels).dense()
    expected = [[reference.scale_odds(p, fitted.value) for p in row] for row in stored]
    np.testing.assert_allclose(after, expected, rtol=1e-5)


def test_sure_yes_and_no_stay_within_what_can_be_said() -> None:
    probs = csr_array(np.array([[1.0, 0.5, 0.001]]))
    assert scale_odds(probs, 1.0).toarray().tolist() == [[1.0, 0.5, 0.001]]
    cooled = scale_odds(probs, 0.5).toarray()[0]
    assert cooled == pytest.approx([1.0, 0.5, 1.002e-6], rel=1e-3)
    stored = csr_array((np.array([0.0, 1.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 2))
    warm = scale_odds(stored, 20.0).data
    odds = 2 ** (25 / 20)  # 1 counts as 1 - 2^-25
    assert warm.tolist() == pytest.approx([0.0, odds / (1 + odds)])


def test_a_temperature_survives_json() -> None:
    adapter = TypeAdapter(Temperature)
    fitted = Temperature(1.5, 0.7, 0.6, 12, "0123456789abcdef")
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted
