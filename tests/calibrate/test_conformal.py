"""Thresholds, the sets that they give, and what they were fitted on."""

import functools
import importlib
import math

import numpy as np
import pytest
from calibrate.rows import SEEDS, random_rows, space, table, voted
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import conformal as reference

from llmlabel.calibrate import written
from llmlabel.calibrate.conformal import Conformal, calibration_rows, fit_conformal, predict_sets
from llmlabel.calibrate.p_values import p_values
from llmlabel.calibrate.quantile import conformal_quantile, row_uniforms
from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

TWINS = {"lac": reference.lac, "aps": reference.aps}
BOTH = pytest.mark.parametrize("score", ["lac", "aps"])


@SEEDS
def test_uniforms_equal_the_twin(seed: int) -> None:
    ids = ["", "a", "\u00e4", f"{seed}/1"]
    found = row_uniforms(ids, seed=seed).tolist()
    assert found == [reference.uniform(row_id, seed) for row_id in ids]
    assert row_uniforms([], seed=seed).tolist() == []


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

    monkeypatch.setattr(written, "BLOCK_CELLS", 35)  # 7 rows a block
    assert fit_conformal(gold_rows, space(5), alpha=0.2, score=score, seed=seed) == fitted
    assert predict_sets(new_rows, space(5), fitted)["set_ids"][:] == expected


@BOTH
def test_the_order_of_the_rows_changes_nothing(score: str) -> None:
    rows, _ = random_rows(3, 50, 5)
    fitted = fit_conformal(rows, space(5), alpha=0.2, score=score)
    order = np.random.default_rng(0).permutation(50)
    assert fit_conformal(rows.select(order), space(5), alpha=0.2, score=score) == fitted
    sets = predict_sets(rows, space(5), fitted)["set_ids"][:]
    shuffled = predict_sets(rows.select(order), space(5), fitted)["set_ids"][:]
    assert shuffled == [sets[i] for i in order]


def test_the_seed_matters_for_aps_only() -> None:
    rows, _ = random_rows(3, 50, 5)
    lac = {fit_conformal(rows, space(5), alpha=0.2, seed=s).threshold for s in range(5)}
    aps = {
        fit_conformal(rows, space(5), alpha=0.2, score="aps", seed=s).threshold for s in range(5)
    }
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
    with pytest.raises(ValueError, match=r"alpha=0\.1 is unreachable: only 17 of 19 gold rows"):
        fit_conformal(table(probs, gold), space(2), alpha=0.1)
    fitted = fit_conformal(table(probs, gold), space(2), alpha=0.1, unreachable="every label")
    assert fitted.threshold == math.inf  # two of 19: the 18th is infinite
    new = table([[0.25, 0.75], [0.0, 0.0], [1.0, 0.0]], [[]] * 3)
    assert predict_sets(new, space(2), fitted)["set_ids"][:] == [[1, 0], [0, 1], [0, 1]]
    adapter = TypeAdapter(Conformal)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


@BOTH
def test_rows_without_the_true_label_weigh_in_the_threshold(score: str) -> None:
    probs = [[0.9375, 0.0625]] * 16 + [[0.75, 0.25]] * 2 + [[0.0, 0.0]] + [[0.0, 1.0]]
    fitted = fit_conformal(table(probs, [[0]] * 20), space(2), alpha=0.2, score=score)
    full = fit_conformal(table(probs[:18], [[0]] * 18), space(2), alpha=0.2, score=score)
    assert (fitted.recall, fitted.rows) == (0.9, 20)
    assert full.recall == 1.0
    assert fitted.threshold > full.threshold  # the 17th of 20 scores instead of the 16th of 18
    sets = predict_sets(table(probs[17:], [[]] * 3), space(2), fitted)["set_ids"][:]
    assert sets[1] == []
    with pytest.raises(ValueError, match="unreachable") as refused:
        fit_conformal(table(probs, [[0]] * 20), space(2), alpha=0.05, score=score)
    assert str(refused.value) == (
        "alpha=0.05 is unreachable: only 18 of 20 gold rows have their true label among the labels "
        "stored (shortlist recall 0.90, 0 rows with none of the labels); store more labels a row, "
        "or allow alpha=0.143 (unreachable='every label' makes sets of all labels)"
    )
    assert fit_conformal(table(probs, [[0]] * 20), space(2), alpha=0.143).threshold == 0.25


def test_a_reachable_target_that_few_rows_cannot_prove_gives_every_label() -> None:
    probs = [[0.9375, 0.0625]] * 14 + [[0.0, 0.0]]  # 1 of 15 is lost, and the 15th score is needed
    fitted = fit_conformal(table(probs, [[0]] * 15), space(2), alpha=0.1)
    assert (fitted.threshold, fitted.recall) == (math.inf, 14 / 15)
    sets = predict_sets(table(probs[13:], [[]] * 2), space(2), fitted)["set_ids"][:]
    assert sets == [[0, 1], [0, 1]]


def test_no_rows_give_no_sets() -> None:
    rows, _ = random_rows(3, 50, 5)
    fitted = fit_conformal(rows, space(5), alpha=0.2)
    assert p_values(rows.select([]), space(5), fitted)["p_value"][:] == []
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
    for predict in (predict_sets, p_values):
        with pytest.raises(
            ValueError, match=r"fitted in label space 0123456789abcdef, .* fit it again"
        ):
            predict(rows, space(2), other)


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


# ----------------------------------------------------------------------------------- other settings


def test_an_empty_set_may_take_the_most_probable_label() -> None:
    probs = [[p, 1 - p] for p in (0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0)]
    fitted = fit_conformal(table(probs, [[0]] * 9), space(2), alpha=0.2)
    new = table([[0.5625, 0.4375], [0.5, 0.5], [0.4375, 0.53125], [0.0, 0.0]], [[]] * 4)
    assert predict_sets(new, space(2), fitted)["set_ids"][:] == [[0], [], [], []]
    filled = predict_sets(new, space(2), fitted, empty="top")
    assert filled["set_ids"][:] == [[0], [0], [1], []]


def squared(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return 1 - probs**2


def other_function(probs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return -probs


def test_a_function_as_score() -> None:
    rows, new = random_rows(1, 80, 5)[0], random_rows(2, 40, 5)[0]
    fitted = fit_conformal(rows, space(5), alpha=0.2, score=squared)
    assert fitted.score == f"{__name__}.squared"
    lac = fit_conformal(rows, space(5), alpha=0.2)
    assert fitted.threshold == pytest.approx(1 - (1 - lac.threshold) ** 2)
    expected = predict_sets(new, space(5), lac)["set_ids"][:]
    assert predict_sets(new, space(5), fitted, score=squared)["set_ids"][:] == expected
    plain = p_values(new, space(5), lac)["p_value"][:]
    assert p_values(new, space(5), fitted, score=squared)["p_value"][:] == plain
    with pytest.raises(ValueError, match=r"the function .*squared as score=, but none is given"):
        predict_sets(new, space(5), fitted)
    with pytest.raises(ValueError, match=r"squared as score=, but .*other_function is given"):
        predict_sets(new, space(5), fitted, score=other_function)
    with pytest.raises(ValueError, match=r"with no function as score=, but .*squared is given"):
        predict_sets(new, space(5), lac, score=squared)
    part = functools.partial(squared)  # has no name of its own
    assert fit_conformal(rows, space(5), alpha=0.2, score=part).score == "functools.partial"


# ------------------------------------------------------------------------------- what was fitted on


def test_gold_rows_that_were_trained_on_are_refused() -> None:
    rows = voted(0, 60)
    rows = with_columns(rows, {"text": ([f"text {i}" for i in range(60)], Value("string"))})
    line = "12 of 60 gold rows are training rows too, .* leave them out"
    with pytest.raises(ValueError, match=line):
        fit_conformal(rows, space(4), training=rows.select(range(12)))
    forced = fit_conformal(rows, space(4), training=rows.select(range(12)), overlap="record")
    assert forced.training_overlap == 12
    assert forced.threshold == fit_conformal(rows, space(4)).threshold
    # Row numbers as ids are the same in any two files: the text decides.
    texts = [f"another text {i}" for i in range(60)]
    other = with_columns(rows, {"text": (texts, Value("string"))})
    assert fit_conformal(rows, space(4), training=other).training_overlap == 0
    assert fit_conformal(rows, space(4)).training_overlap == 0
    bare = rows.remove_columns(["text"])  # where one side has no texts, ids decide
    for gold, training in ((rows, bare), (bare, rows)):
        with pytest.raises(ValueError, match=line):
            fit_conformal(gold, space(4), training=training.select(range(12)))
    with pytest.raises(ValueError, match="training have no column id, by which"):
        fit_conformal(rows, space(4), training=rows.remove_columns(["id"]))


def test_rows_that_the_threshold_was_fitted_on_are_known() -> None:
    rows = voted(0, 60)
    fitted = fit_conformal(rows.select(range(20, 60)), space(4))
    assert calibration_rows(rows, fitted).tolist() == [False] * 20 + [True] * 40
    assert len(predict_sets(rows, space(4), fitted)) == 60
    with pytest.raises(ValueError, match=r"40 of 60 rows are among the 40 gold rows"):
        predict_sets(rows, space(4), fitted, overlap="refuse")
    alone = predict_sets(rows.select(range(20)), space(4), fitted, overlap="refuse")
    assert alone["set_ids"][:] == predict_sets(rows, space(4), fitted)["set_ids"][:20]
    by_hand = Conformal(0.1, "lac", 0.5, 20, 0, space(4).fingerprint)
    assert not calibration_rows(rows, by_hand).any()


def test_soft_labels_of_another_engine_are_refused() -> None:
    def of(rows: Dataset, *names: str | None) -> Dataset:
        values = [names[i % len(names)] for i in range(len(rows))]
        return with_columns(rows, {"engine": (values, Value("string"))})

    rows, new = voted(0, 60), voted(1, 20)
    fitted = fit_conformal(of(rows, "b", None, "a"), space(4))
    assert fitted.engines == ("a", "b")
    expected = predict_sets(new, space(4), fitted)["set_ids"][:]
    for same in (of(new, "a"), of(new, None), of(new, "b", "a")):
        assert predict_sets(same, space(4), fitted)["set_ids"][:] == expected
    line = "fitted on soft labels of a, b, but these rows have those of a, c; fit it again"
    with pytest.raises(ValueError, match=line):
        predict_sets(of(new, "a", "c"), space(4), fitted)
    with pytest.raises(ValueError, match=line):
        p_values(of(new, "a", "c"), space(4), fitted)
    forced = predict_sets(of(new, "a", "c"), space(4), fitted, other_engine="allow")
    assert forced["set_ids"][:] == expected
    plain = fit_conformal(rows, space(4))
    assert plain.engines == ()
    assert predict_sets(of(new, "c"), space(4), plain)["set_ids"][:] == expected


def test_the_hash_tells_what_was_fitted_on() -> None:
    rows = voted(0, 30)
    order = np.random.default_rng(0).permutation(30)
    sha = fit_conformal(rows, space(4)).data_sha
    assert len(sha) == 64
    assert fit_conformal(rows.select(order), space(4)).data_sha == sha
    ids = with_columns(rows, {"id": ([f"x{i}" for i in range(30)], Value("string"))})
    golds = [[(g[0] + (i == 4)) % 4] for i, g in enumerate(rows["gold"])]
    gold = with_columns(rows, {"gold": (golds, List(Value("int32")))})
    halved = [[p / 2 if i == 7 else p for p in ps] for i, ps in enumerate(rows["label_probs"])]
    probs = with_columns(rows, {"label_probs": (halved, List(Value("float32")))})
    shas = {fit_conformal(one, space(4), alpha=0.4).data_sha for one in (rows, ids, gold, probs)}
    assert len(shas) == 4
    assert sha in shas
