"""P-values of labels, and the sets of those above alpha."""

import importlib
import math

import numpy as np
import pytest
from calibrate.rows import ALL, SEEDS, random_rows, space, voted
from datasets import List, Value
from reference import conformal as reference

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.p_values import p_values
from llmlabel.calibrate.quantile import conformal_p_values, conformal_quantile
from llmlabel.data import with_columns


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
