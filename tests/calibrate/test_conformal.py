import importlib
import math

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import conformal as reference

from llmlabel.calibrate import conformal
from llmlabel.calibrate.conformal import (
    Conformal,
    aps_scores,
    conformal_quantile,
    fit_conformal,
    lac_scores,
    predict_sets,
    row_uniforms,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

TWINS = {"lac": reference.lac, "aps": reference.aps}
BOTH = pytest.mark.parametrize("score", ["lac", "aps"])
SEEDS = pytest.mark.parametrize("seed", range(20))


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def random_rows(seed: int, count: int, labels: int) -> tuple[Dataset, list[list[float]]]:
    """Rows with ties, missing mass, none-of-these, and no soft label; and what is stored of them."""
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 9, (count, labels)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1) * rng.choice([1, 1.25], (count, 1))
    probs[rng.random(count) < 0.1] = 0
    guess = np.where(rng.random(count) < 0.7, probs.argmax(axis=1), rng.integers(0, labels, count))
    gold = [[] if rng.random() < 0.03 else [int(g)] for g in guess]
    ids = [f"{seed}/{i}" for i in range(count)]
    soft = SoftLabels.from_dense(probs, space(labels))
    dataset = soft.add_to(Dataset.from_dict({"id": ids, "gold": gold}))
    return dataset, soft.dense().tolist()


def table(probs: list[list[float]], gold: list[list[int]]) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(np.array(probs), space(len(probs[0]))).add_to(rows)


@SEEDS
def test_scores_equal_the_twins(seed: int) -> None:
    dataset, rows = random_rows(seed, 20, 6)
    uniforms = row_uniforms(dataset["id"], seed=seed)
    assert uniforms.tolist() == [reference.uniform(row_id, seed) for row_id in dataset["id"]]
    probs = np.array(rows)
    for i, u in enumerate(uniforms.tolist()):
        assert lac_scores(probs)[i].tolist() == reference.lac(rows[i], u)
        expected = reference.aps(rows[i], u)
        assert aps_scores(probs, uniforms)[i].tolist() == pytest.approx(expected, abs=1e-15)


def test_aps_of_a_known_row() -> None:
    probs = np.array([[0.1, 0.6, 0.3]])
    assert aps_scores(probs, np.ones(1))[0].tolist() == pytest.approx([1.0, 0.6, 0.9])
    assert aps_scores(probs, np.zeros(1))[0].tolist() == pytest.approx([0.9, 0.0, 0.6])
    assert aps_scores(probs, np.full(1, 0.5))[0].tolist() == pytest.approx([0.95, 0.3, 0.75])
    tie = aps_scores(np.array([[0.25, 0.5, 0.25]]), np.ones(1))
    assert tie[0].tolist() == [0.75, 0.5, 1.0]


@SEEDS
def test_quantile_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 15, int(rng.integers(1, 60))) / 16
    for alpha in (0.01, 0.1, 0.3, 0.7, float(rng.uniform(0.01, 0.99))):
        expected = reference.quantile(scores.tolist(), alpha)
        assert conformal_quantile(scores, alpha) == expected


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [(99, 0.1, 90), (100, 0.1, 91), (9, 0.1, 9), (9, 0.7, 3), (19, 0.05, 19), (999, 0.7, 300)],
)
def test_quantile_is_the_exact_order_statistic(n: int, alpha: float, k: int) -> None:
    ranks = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(ranks, alpha) == k


def test_quantile_beyond_the_last_score_is_infinite() -> None:
    assert conformal_quantile(np.arange(8.0), 0.1) == math.inf
    assert conformal_quantile(np.arange(9.0), 0.1) == 8.0


@BOTH
@SEEDS
def test_sets_equal_the_twin(seed: int, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gold_rows, gold_probs = random_rows(seed, 60, 5)
    new_rows, new_probs = random_rows(seed + 1000, 40, 5)
    gold = [g[0] if g else -1 for g in gold_rows["gold"]]
    fitted = fit_conformal(gold_rows, space(5), alpha=0.2, score=score, seed=seed)
    twin = TWINS[score]
    limit = reference.threshold(gold_rows["id"], gold_probs, gold, 0.2, twin, seed)
    assert fitted.threshold == pytest.approx(limit, rel=1e-12)
    assert (fitted.alpha, fitted.score, fitted.rows, fitted.seed) == (0.2, score, 60, seed)
    # The threshold itself from here on: the sums of both differ in the last digit.
    sets = predict_sets(new_rows, space(5), fitted)
    slack = fitted.threshold + 1e-12
    expected = reference.sets(new_rows["id"], new_probs, slack, twin, seed)
    assert sets["set_ids"][:] == expected
    assert sets.features["set_ids"] == List(Value("int32"))
    assert sets["gold"][:] == new_rows["gold"][:]

    monkeypatch.setattr(conformal, "_BLOCK_CELLS", 35)  # 7 rows a block
    assert fit_conformal(gold_rows, space(5), alpha=0.2, score=score, seed=seed) == fitted
    assert predict_sets(new_rows, space(5), fitted)["set_ids"][:] == expected


@BOTH
def test_the_order_of_the_rows_changes_nothing(score: str) -> None:
    rows, _ = random_rows(3, 50, 5)
    fitted = fit_conformal(rows, space(5), score=score)
    order = np.random.default_rng(0).permutation(50)
    assert fit_conformal(rows.select(order), space(5), score=score) == fitted
    sets = predict_sets(rows, space(5), fitted)["set_ids"][:]
    shuffled = predict_sets(rows.select(order), space(5), fitted)["set_ids"][:]
    assert shuffled == [sets[i] for i in order]


def test_the_seed_matters_for_aps_only() -> None:
    rows, _ = random_rows(3, 50, 5)
    lac = {fit_conformal(rows, space(5), score="lac", seed=s).threshold for s in range(5)}
    aps = {fit_conformal(rows, space(5), score="aps", seed=s).threshold for s in range(5)}
    assert (len(lac), len(aps)) == (1, 5)


def test_lac_by_hand() -> None:
    probs = [[p, 1 - p] for p in (0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0)]
    fitted = fit_conformal(table(probs, [[0]] * 9), space(2), alpha=0.2)
    assert fitted.threshold == 0.4375  # the 8th smallest of 9 scores
    new = table([[0.5625, 0.4375], [0.5, 0.5], [0.25, 0.75], [0.0, 0.0]], [[]] * 4)
    sets = predict_sets(new, space(2), fitted)
    assert sets["set_ids"][:] == [[0], [], [1], []]  # p >= 0.5625 is inside


def test_gold_that_is_none_of_the_labels_counts_as_missed() -> None:
    probs = [[0.9375, 0.0625]] * 18 + [[0.5, 0.5]]
    gold = [[0]] * 18 + [[]]
    assert fit_conformal(table(probs, gold), space(2), alpha=0.1).threshold == 0.0625
    gold[0] = []
    fitted = fit_conformal(table(probs, gold), space(2), alpha=0.1)  # two of 19: 18th is infinite
    assert fitted.threshold == math.inf
    new = table([[0.25, 0.75], [0.0, 0.0]], [[]] * 2)
    assert predict_sets(new, space(2), fitted)["set_ids"][:] == [[1, 0], [0, 1]]
    adapter = TypeAdapter(Conformal)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_rows_without_a_soft_label_weigh_in_the_threshold() -> None:
    probs = [[0.9375, 0.0625]] * 17 + [[0.0, 0.0]] * 2
    fitted = fit_conformal(table(probs, [[0]] * 19), space(2), alpha=0.1)
    assert fitted.threshold == 1.0
    sets = predict_sets(table(probs[16:18], [[]] * 2), space(2), fitted)
    assert sets["set_ids"][:] == [[0, 1], [0, 1]]
    aps = fit_conformal(table(probs, [[0]] * 19), space(2), alpha=0.1, score="aps")
    assert predict_sets(table(probs[17:], [[]] * 2), space(2), aps)["set_ids"][0] == [0, 1]


def test_no_rows_give_no_sets() -> None:
    rows, _ = random_rows(3, 50, 5)
    fitted = fit_conformal(rows, space(5))
    assert predict_sets(rows.select([]), space(5), fitted)["set_ids"][:] == []


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_alpha_must_be_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1; got"):
        fit_conformal(table([[1.0, 0.0]] * 20, [[0]] * 20), space(2), alpha=alpha)


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.01, 99), (0.3, 3)])
def test_too_few_gold_rows_for_alpha(alpha: float, needed: int) -> None:
    few = table([[1.0, 0.0]] * (needed - 1), [[0]] * (needed - 1))
    message = f"alpha={alpha} needs at least {needed} gold rows; there are {needed - 1} "
    with pytest.raises(ValueError, match=message):
        fit_conformal(few, space(2), alpha=alpha)
    enough = table([[1.0, 0.0]] * needed, [[0]] * needed)
    assert fit_conformal(enough, space(2), alpha=alpha).threshold == 0.0


def test_what_cannot_be_fitted_is_refused() -> None:
    rows = table([[1.0, 0.0]] * 20, [[0]] * 20)
    with pytest.raises(ValueError, match=r"this one is multi-label .*multilabel=false"):
        fit_conformal(rows, space(2, multilabel=True))
    with pytest.raises(ValueError, match="row with id 'r19' has the gold labels"):
        fit_conformal(table([[1.0, 0.0]] * 20, [[0]] * 19 + [[0, 1]]), space(2))
    with pytest.raises(ValueError, match="column 'gold' is missing"):
        fit_conformal(rows.remove_columns("gold"), space(2))
    other = Conformal(0.1, "lac", 0.5, 20, 0, "0123456789abcdef")
    with pytest.raises(
        ValueError, match=r"fitted in label space 0123456789abcdef, .* fit it again"
    ):
        predict_sets(rows, space(2), other)


def test_lac_sets_are_those_of_mapie() -> None:
    pytest.importorskip("mapie")
    classification = importlib.import_module("mapie.classification")
    base = importlib.import_module("sklearn.base")

    class Columns(base.ClassifierMixin, base.BaseEstimator):
        """Its inputs are its probabilities."""

        classes_ = np.arange(5)
        n_features_in_ = 5

        def fit(self, x: np.ndarray, y: np.ndarray) -> "Columns":
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(axis=1)

    for seed in range(5):
        rng = np.random.default_rng(seed)
        probs = rng.dirichlet(np.ones(5), 300).astype(np.float32).astype(np.float64)
        gold = np.array([rng.choice(5, p=p / p.sum()) for p in probs])
        peer = classification.SplitConformalClassifier(
            Columns(), confidence_level=0.9, conformity_score="lac", prefit=True
        )
        _, expected = peer.conformalize(probs[:200], gold[:200]).predict_set(probs[200:])
        cal = table(probs[:200].tolist(), [[int(g)] for g in gold[:200]])
        new = table(probs[200:].tolist(), [[]] * 100)
        sets = predict_sets(new, space(5), fit_conformal(cal, space(5)))["set_ids"]
        found = [sorted(ids) for ids in sets]
        assert found == [np.flatnonzero(row).tolist() for row in expected[:, :, 0]]


def test_rows_whose_gold_nobody_knows_are_left_out() -> None:
    labels = load_labels(["a", "b"])
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1.0, 1.0], size=100)
    gold = [[int(p.argmax())] if i < 30 else None for i, p in enumerate(probs)]
    ids = [f"r{i}" for i in range(100)]
    rows = SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict({"id": ids, "text": ids}))
    rows = with_columns(rows, {"gold": (gold, List(Value("int32")))})
    found = fit_conformal(rows, labels, alpha=0.1)
    assert found == fit_conformal(rows.select(range(30)), labels, alpha=0.1)
    assert found.rows == 30
    assert np.isfinite(found.threshold)
