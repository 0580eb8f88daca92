import functools
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import conformal as reference

from llmlabel.calibrate import tuning, written
from llmlabel.calibrate.conformal import Conformal, calibration_rows, fit_conformal, predict_sets
from llmlabel.calibrate.online import Online
from llmlabel.calibrate.p_values import p_values
from llmlabel.calibrate.quantile import conformal_p_values, conformal_quantile, row_uniforms
from llmlabel.calibrate.saved import load_calibrator, save_calibrator
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.calibrate.temperature import Temperature
from llmlabel.calibrate.tuning import label_prior
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

TWINS = {"lac": reference.lac, "aps": reference.aps}
ALL = ["lac", "aps", "raps", "saps", "margin"]
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
    probs[rng.random(count) < 0.04] = 0
    guess = np.where(rng.random(count) < 0.85, probs.argmax(axis=1), rng.integers(0, labels, count))
    gold = [[] if rng.random() < 0.03 else [int(g)] for g in guess]
    ids = [f"{seed}/{i}" for i in range(count)]
    soft = SoftLabels.from_dense(probs, space(labels))
    dataset = soft.add_to(Dataset.from_dict({"id": ids, "gold": gold}))
    return dataset, soft.dense().tolist()


def table(probs: list[list[float]], gold: list[list[int]]) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(np.array(probs), space(len(probs[0]))).add_to(rows)


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


# ------------------------------------------------------------------------------------ p-values


def voted(seed: int, count: int, *, name: str = "v") -> Dataset:
    """Soft labels from 5 votes a row, of which gold wins 3 on average: nearly all scores tie."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 4, count)
    cast = np.where(rng.random((count, 5)) < 0.6, gold[:, None], rng.integers(0, 4, (count, 5)))
    probs = (cast[:, :, None] == np.arange(4)).mean(axis=1)
    rows = {"id": [f"{name}{seed}/{i}" for i in range(count)], "gold": gold[:, None].tolist()}
    return SoftLabels.from_dense(probs, space(4)).add_to(Dataset.from_dict(rows))


@SEEDS
def test_p_values_equal_the_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    calibration = np.sort(rng.integers(0, 9, int(rng.integers(1, 40))) / 8)
    calibration[rng.random(len(calibration)) < 0.1] = math.inf
    calibration.sort()
    scores = np.append(rng.integers(-1, 10, 30) / 8, math.inf)
    uniforms = rng.random(31)
    plain = [reference.p_value(s, calibration.tolist()) for s in scores.tolist()]
    found = conformal_p_values(scores, calibration)
    assert found.tolist() == [float(p) for p in plain]
    smoothed = [
        reference.smoothed(s, calibration.tolist(), u)
        for s, u in zip(scores.tolist(), uniforms.tolist(), strict=True)
    ]
    assert conformal_p_values(scores, calibration, uniforms).tolist() == pytest.approx(smoothed)
    for alpha in (0.05, 0.1, 0.2, 0.5, 0.7, float(rng.uniform(0.01, 0.99))):
        inside = scores <= conformal_quantile(calibration, alpha)
        assert (found > alpha).tolist() == inside.tolist()


@pytest.mark.parametrize("score", ALL)
def test_sets_are_the_labels_with_p_values_above_alpha(score: str) -> None:
    for seed in range(5):
        gold_rows, _ = random_rows(seed, 60, 5)
        new_rows, _ = random_rows(seed + 1000, 40, 5)
        settings = {"penalty": 0.02, "free_labels": 1} if score in ("raps", "saps") else {}
        fitted = fit_conformal(
            gold_rows, space(5), alpha=0.2, score=score, seed=seed,
            **settings,
        )  # fmt: skip
        lost = sum(map(math.isinf, fitted.scores))
        found = p_values(new_rows, space(5), fitted, ties="keep")
        sets = predict_sets(new_rows, space(5), fitted)["set_ids"]
        drawn = p_values(new_rows, space(5), fitted)
        drawn_sets = predict_sets(new_rows, space(5), fitted, ties="draw")["set_ids"]
        for table_, chosen in ((found, sets), (drawn, drawn_sets)):
            for ids, values, members in zip(
                table_["label_ids"], table_["label_p_values"], chosen, strict=True
            ):
                assert [k for k, p in zip(ids, values, strict=True) if p > 0.2] == members
        for plain, smooth, ids in zip(
            found["label_p_values"], drawn["label_p_values"], drawn["label_ids"], strict=True
        ):
            assert len(plain) == len(ids)
            assert all(s <= p for s, p in zip(smooth, plain, strict=True))
        for largest, values in zip(found["p_value"], found["label_p_values"], strict=True):
            assert largest == max(values, default=(1 + lost) / 61)


def test_p_values_stand_beside_the_labels_as_they_are_given() -> None:
    fitted = fit_conformal(voted(0, 200), space(4), alpha=0.1)
    rows = voted(1, 30)
    turned = with_columns(
        rows,
        {
            "label_ids": ([ids[::-1] for ids in rows["label_ids"]], List(Value("int32"))),
            "label_probs": ([p[::-1] for p in rows["label_probs"]], List(Value("float32"))),
        },
    )
    expected = [p[::-1] for p in p_values(rows, space(4), fitted)["label_p_values"]]
    assert p_values(turned, space(4), fitted)["label_p_values"][:] == expected
    assert any(len(set(row)) > 1 for row in expected)


def test_smoothed_p_values_of_votes_are_uniform_and_others_are_not() -> None:
    kstest = importlib.import_module("scipy.stats").kstest
    fitted = fit_conformal(voted(0, 4000), space(4), alpha=0.1)
    assert len(set(fitted.scores)) <= 7  # 0 to 4 fifths and infinity
    found = {}
    for ties in ("draw", "keep"):
        rows = p_values(voted(1, 4000), space(4), fitted, ties=ties)
        true = [
            dict(zip(ids, values, strict=True)).get(gold[0])
            for ids, values, gold in zip(
                rows["label_ids"], rows["label_p_values"], rows["gold"], strict=True
            )
        ]
        found[ties] = np.array([p for p in true if p is not None])
    lost = np.isinf(
        fitted.scores
    ).mean()  # true labels that nobody voted for: the smallest p-values
    rescaled = (found["draw"] - lost) / (1 - lost)
    assert kstest(rescaled, "uniform").pvalue > 0.01
    assert kstest((found["keep"] - lost) / (1 - lost), "uniform").pvalue < 1e-20


def test_drawn_ties_cover_as_much_as_asked_for_and_no_more() -> None:
    """Votes leave six scores: a threshold takes a whole tie in, or leaves it out."""
    fitted = fit_conformal(voted(0, 4000), space(4), alpha=0.15)
    new = voted(1, 4000)
    covered = {}
    for ties in ("keep", "draw"):
        sets = predict_sets(new, space(4), fitted, ties=ties)
        hits = [g[0] in ids for g, ids in zip(sets["gold"], sets["set_ids"], strict=True)]
        covered[ties] = sum(hits) / len(hits)
    assert abs(covered["draw"] - 0.85) < 4 * math.sqrt(0.85 * 0.15 * 2 / 4000)
    assert covered["keep"] > 0.88


def test_p_values_need_the_scores() -> None:
    rows = voted(0, 100)
    short = fit_conformal(rows, space(4), keep_scores=False)
    assert short.scores is None
    assert (
        predict_sets(rows, space(4), short)["set_ids"][:]
        == (predict_sets(rows, space(4), fit_conformal(rows, space(4)))["set_ids"][:])
    )
    with pytest.raises(ValueError, match="fitted without; fit it with keep_scores=True"):
        p_values(rows, space(4), short)
    with pytest.raises(ValueError, match="fitted without; fit it with keep_scores=True"):
        predict_sets(rows, space(4), short, ties="draw")


# ------------------------------------------------------------------------------ other settings


def test_an_empty_set_may_take_the_most_probable_label() -> None:
    probs = [[p, 1 - p] for p in (0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0)]
    fitted = fit_conformal(table(probs, [[0]] * 9), space(2), alpha=0.2)
    new = table([[0.5625, 0.4375], [0.5, 0.5], [0.4375, 0.53125], [0.0, 0.0]], [[]] * 4)
    assert predict_sets(new, space(2), fitted)["set_ids"][:] == [[0], [], [], []]
    filled = predict_sets(new, space(2), fitted, empty="top")
    assert filled["set_ids"][:] == [[0], [0], [1], []]


def long_tailed(seed: int, count: int, labels: int = 30) -> Dataset:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, labels, count)
    logits = rng.normal(0, 1, (count, labels))
    logits[np.arange(count), gold] += rng.normal(4, 1, count)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = {"id": [f"{seed}/{i}" for i in range(count)], "gold": gold[:, None].tolist()}
    return SoftLabels.from_dense(probs, space(labels)).add_to(Dataset.from_dict(rows))


def sizes(rows: Dataset, fitted: Conformal) -> list[int]:
    return [len(ids) for ids in predict_sets(rows, space(30), fitted)["set_ids"]]


def test_raps_is_tuned_on_a_part_of_its_own() -> None:
    rows, new = long_tailed(0, 400), long_tailed(1, 400)
    fitted = fit_conformal(rows, space(30), score="raps")
    assert (fitted.tuning_rows, fitted.rows) == (80, 320)
    # The threshold is that of the other rows alone, with what was chosen given.
    points = row_uniforms([f"tuning/{row_id}" for row_id in rows["id"]], seed=0)
    others = rows.select(np.flatnonzero(points > np.sort(points)[79]))
    given = {"penalty": fitted.penalty, "free_labels": fitted.free_labels}
    alone = fit_conformal(others, space(30), score="raps", **given)
    assert (alone.threshold, alone.tuning_rows) == (fitted.threshold, 0)
    assert alone.scores == fitted.scores
    # k_reg is the conformal quantile of the ranks of the true labels.
    part = rows.select(np.flatnonzero(points <= np.sort(points)[79]))
    ranks = [
        1 + ids.index(gold[0]) for ids, gold in zip(part["label_ids"], part["gold"], strict=True)
    ]
    assert fitted.free_labels == reference.quantile(ranks, 0.1)
    # Smaller sets than without the penalty, and no long ones.
    plain = fit_conformal(rows, space(30), score="aps")
    assert fitted.penalty > 0
    assert sum(sizes(new, fitted)) < sum(sizes(new, plain))
    assert max(sizes(new, fitted)) < max(sizes(new, plain))
    order = np.random.default_rng(0).permutation(400)
    assert fit_conformal(rows.select(order), space(30), score="raps") == fitted
    assert fit_conformal(rows, space(30), score="raps", seed=1).scores != fitted.scores


def test_the_penalty_is_the_one_with_the_smallest_sets_on_the_tuning_rows() -> None:
    rows = long_tailed(2, 300)
    fitted = fit_conformal(rows, space(30), score="saps", tuning_share=0.5)
    points = row_uniforms([f"tuning/{row_id}" for row_id in rows["id"]], seed=0)
    part = rows.select(np.flatnonzero(points <= np.sort(points)[149]))
    totals = {}
    for penalty in tuning._PENALTIES:
        one = fit_conformal(part, space(30), score="saps", penalty=penalty)
        totals[penalty] = sum(sizes(part, one))
    assert totals[fitted.penalty] == min(totals.values()) < max(totals.values())


def test_too_few_rows_for_two_parts() -> None:
    line = (
        r"alpha=0\.1: choosing the settings of the score splits the 30 gold rows, and 6 in one part "
        r"are fewer than the 9 needed; give penalty="
    )
    with pytest.raises(ValueError, match=line):
        fit_conformal(long_tailed(0, 30), space(30), score="raps")
    with pytest.raises(ValueError, match=r"tuning_share must lie strictly .* got 1\.0"):
        fit_conformal(long_tailed(0, 30), space(30), score="saps", tuning_share=1.0)
    settings = {"penalty": 0.1, "free_labels": 2}
    assert fit_conformal(long_tailed(0, 30), space(30), score="raps", **settings).rows == 30


def test_prevalence_adjusted_sets() -> None:
    rows, new = random_rows(1, 80, 5)[0], random_rows(2, 40, 5)
    prior = label_prior(random_rows(3, 200, 5)[0], space(5))
    fitted = fit_conformal(rows, space(5), alpha=0.2, prior=prior)
    limit = fitted.threshold
    expected = reference.sets(
        new[0]["id"], new[1], limit, lambda row, u: reference.adjusted(row, prior), 0
    )
    assert predict_sets(new[0], space(5), fitted)["set_ids"][:] == expected
    assert expected != predict_sets(
        new[0], space(5), fit_conformal(rows, space(5), alpha=0.2)
    )["set_ids"][:]  # fmt: skip


def test_label_prior() -> None:
    rows = table([[0.75, 0.25], [0.25, 0.5], [0.0, 0.0]], [[0], [], [0]])
    # 1 and 0.75 of mass, 2 and 0 gold rows; half a row more for each of two labels
    assert label_prior(rows, space(2)) == pytest.approx([1.5 / 2.75, 1.25 / 2.75])
    assert label_prior(rows, space(2), source="gold") == pytest.approx([2.5 / 3, 0.5 / 3])


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


# --------------------------------------------------------------------------- what was fitted on


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


@pytest.mark.parametrize("score", ALL)
def test_a_saved_threshold_predicts_the_same(score: str, tmp_path: Path) -> None:
    rows, new = voted(0, 200), voted(1, 30)
    fitted = fit_conformal(rows, space(4), score=score, alpha=0.2)
    path = save_calibrator(fitted, tmp_path / "sub" / "conformal.json")
    loaded = load_calibrator(path)
    assert loaded == fitted
    assert json.loads(path.read_text())["type"] == "llmlabel.calibrate.conformal.Conformal"
    for ties in ("keep", "draw"):
        one = predict_sets(new, space(4), loaded, ties=ties)["set_ids"][:]
        assert one == predict_sets(new, space(4), fitted, ties=ties)["set_ids"][:]


def test_other_calibrators_are_saved_too(tmp_path: Path) -> None:
    one = Temperature(1.5, 0.7, 0.6, 20, "f")
    assert load_calibrator(save_calibrator(one, tmp_path / "t.json")) == one
    infinite = Conformal(0.1, "lac", math.inf, 20, 0, "f", scores=(0.5, math.inf))
    assert load_calibrator(save_calibrator(infinite, tmp_path / "c.json")) == infinite
    with pytest.raises(ValueError, match=r"LabelSpace is no fitted dataclass"):
        save_calibrator(space(2), tmp_path / "no.json")
    how = Nonconformity(lambda probs, uniforms: 1 - probs)
    start = Online(0.1, 0.005, 0.1, (), None, 0, 0, how, 0, "f")
    with pytest.raises(ValueError, match=r"Online holds what JSON cannot, such as a function"):
        save_calibrator(start, tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "c.json: not a calibrator that save_calibrator wrote .*save it again"),
        ("[]", "c.json: not a calibrator that save_calibrator wrote .*save it again"),
        ('{"type": "llmlabel.calibrate.conformal.Conformal"}', "c.json: not a calibrator"),
        ('{"type": 3, "value": {}}', "c.json: 3 is no fitted dataclass"),
        (
            '{"type": "llmlabel.calibrate.conformal.Conformal", "value": {"alpha": "x"}}',
            "c.json: not a calibrator .*alpha",
        ),
        ('{"type": "os.path", "value": 1}', "c.json: os.path is no fitted dataclass"),
        (
            '{"type": "llmlabel.calibrate.conformal.Path", "value": "x"}',
            "conformal.Path is no fitted dataclass",
        ),
        (
            '{"type": "llmlabel.calibrate.nothing.Conformal", "value": {}}',
            "nothing.Conformal is no fitted dataclass",
        ),
    ],
)
def test_what_is_no_calibrator(content: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=line):
        load_calibrator(tmp_path / "c.json")
