"""Settings of a score that are chosen on rows of their own."""

import numpy as np
import pytest
from calibrate.rows import random_rows, space, table
from datasets import Dataset
from reference import conformal as reference

from llmlabel.calibrate import tuning
from llmlabel.calibrate.conformal import Conformal, fit_conformal, predict_sets
from llmlabel.calibrate.quantile import row_uniforms
from llmlabel.calibrate.tuning import label_prior
from llmlabel.softlabels import SoftLabels


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
