import dataclasses
import itertools
import math

import numpy as np
import pytest
from datasets import Dataset
from pydantic import TypeAdapter
from reference import powerset as reference
from scipy.sparse import csr_array

from llmlabel.calibrate import powerset as module
from llmlabel.calibrate.powerset import (
    Powerset,
    Region,
    binary_relevance,
    fit_powerset,
    p_values,
    predict_powerset,
    regions,
    set_scores,
)
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))


def space(labels: int, *, multilabel: bool = True) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def random_rows(seed: int, count: int, labels: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Rows, what float32 kept of their probabilities, and their true label sets.

    The probabilities are multiples of 1/64: all sums are exact, so ties are ties in every order.
    """
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 65, (count, labels)) / 64 * (rng.random((count, labels)) < 0.6)
    truth = rng.random((count, labels)) < probs
    rows = {
        "id": [f"{seed}/{i}" for i in range(count)],
        "gold": [np.flatnonzero(row).tolist() for row in truth],
    }
    soft = SoftLabels.from_dense(probs, space(labels))
    return soft.add_to(Dataset.from_dict(rows)), soft.dense(), truth


def region_of(row: list[float], threshold: float) -> Region:
    """The region of one row with power 1."""
    dataset = SoftLabels.from_dense(np.array([row]), space(len(row))).add_to(
        Dataset.from_dict({"id": ["a"]})
    )
    fitted = Powerset(0.5, 1.0, (threshold,), space(len(row)).fingerprint)
    return next(regions(dataset, space(len(row)), fitted))


@SEEDS
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_regions_equal_the_twin(seed: int, power: float) -> None:
    labels = 2 + seed % 6
    gold_rows, gold_probs, truth = random_rows(seed, 40, labels)
    new_rows, new_probs, _ = random_rows(seed + 1000, 10, labels)
    alpha = (0.05, 0.1, 0.2, 0.5)[seed % 4]
    fitted = fit_powerset(gold_rows, space(labels), alpha=alpha, power=power)
    true_sets = [tuple(np.flatnonzero(row).tolist()) for row in truth]
    scores = [reference.score(r, s, power) for r, s in zip(gold_probs, true_sets, strict=True)]
    assert list(fitted.scores) == sorted(scores)

    for row, region in zip(new_probs, regions(new_rows, space(labels), fitted), strict=True):
        expected, every = reference.region(row, scores, alpha, power)
        found = list(region)
        assert sorted(some for some, _ in found) == sorted(expected)
        assert [own for _, own in found] == [every[some] for some in expected]
        assert region.count() == (len(expected),) * 2
        for some, own in every.items():
            assert region.distance(some) == own
            assert (some in region) == (some in expected)
            assert p_values(fitted, np.array([own])) == [reference.p_value(own, scores)]
        unsure = {k for k in range(labels) if len({k in some for some in expected}) == 2}
        assert set(region.uncertain().tolist()) == unsure


@SEEDS
def test_columns_equal_the_twin(seed: int) -> None:
    labels = 5
    gold_rows, _, _ = random_rows(seed, 30, labels)
    new_rows, new_probs, _ = random_rows(seed + 1000, 10, labels)
    fitted = fit_powerset(gold_rows, space(labels), alpha=0.3)
    predicted = predict_powerset(new_rows, space(labels), fitted, top=3)
    for row, out in zip(new_probs, predicted, strict=True):
        expected, every = reference.region(row, fitted.scores, 0.3, 2.0)
        values = [reference.p_value(own, fitted.scores) for own in sorted(every.values())[:2]]
        possible = {k for some in expected for k in some}
        assert out["set_ids"] == sorted(possible, key=lambda k, row=row: (-row[k], k))
        in_all = set.intersection(*map(set, expected)) if expected else set()
        assert out["certain_ids"] == sorted(in_all)
        assert len(out["label_sets"]) == min(3, len(expected))
        distances = [every[tuple(some)] for some in out["label_sets"]]
        assert distances == [every[some] for some in expected[:3]]
        assert out["capped"] == (len(expected) > 3)
        assert (out["sets_least"], out["sets_most"]) == (len(expected), len(expected))
        assert (out["credibility"], 1 - out["confidence"]) == pytest.approx(values, abs=1e-6)


@SEEDS
def test_bounds_hold_the_count_and_are_close(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = rng.beta(0.3, 1.5, 14)
    region = region_of(row.tolist(), float(np.minimum(row, 1 - row).sum() + rng.uniform(1, 4)))
    exact, same = region.count(exact=2**15)
    assert exact == same == len(list(region))
    low, high = region.count(exact=8)
    assert exact * 0.97 <= low <= exact <= high <= exact * 1.03
    rough_low, rough_high = region.count(exact=8, cells=64)
    assert rough_low <= exact <= rough_high
    assert rough_high - rough_low >= high - low


@SEEDS
def test_subsets_equal_the_twin(seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 6, 10).astype(np.float64)
    for capacity in (0, 3, 11, 60):
        assert module._subsets(cells, capacity) == reference.subsets(cells.tolist(), capacity)


def test_counts_of_many_labels() -> None:
    assert region_of([0.0] * 90, 3.5).count() == (math.comb(90, 3) + math.comb(90, 2) + 91,) * 2
    low, high = region_of([0.5] * 90, 45.0).count()
    assert low <= 2.0**90 <= high < low * 1.001
    low, high = region_of([0.5] * 2000, 1000.0).count()
    assert (low, high) == (2.0**1000, math.inf)
    everything = dataclasses.replace(region_of([0.25] * 3, 1.0), threshold=math.inf)
    assert everything.count() == (8, 8)
    assert len(list(everything)) == 8


def test_five_hundred_labels_come_in_order() -> None:
    probs = np.random.default_rng(0).beta(0.02, 5, 500)
    found = list(itertools.islice(region_of(probs.tolist(), 400.0), 1000))
    distances = [own for _, own in found]
    assert distances == sorted(distances)
    assert len({some for some, _ in found}) == 1000
    assert found[0][0] == tuple(np.flatnonzero(probs > 0.5).tolist())


def test_a_larger_alpha_gives_a_smaller_region() -> None:
    gold_rows, _, _ = random_rows(1, 60, 6)
    new_rows, _, _ = random_rows(2, 10, 6)
    found = []
    for alpha in (0.05, 0.1, 0.2, 0.4):
        fitted = fit_powerset(gold_rows, space(6), alpha=alpha)
        found.append([{some for some, _ in r} for r in regions(new_rows, space(6), fitted)])
    for larger, smaller in itertools.pairwise(found):
        assert all(b <= a for a, b in zip(larger, smaller, strict=True))
    assert sum(map(len, found[0])) > sum(map(len, found[-1]))


def test_better_probabilities_give_fewer_label_sets() -> None:
    rng = np.random.default_rng(0)
    probs = rng.beta(0.2, 1.0, (400, 8))
    truth = rng.random(probs.shape) < probs
    sizes = []
    for noise in (0.0, 0.4):
        seen = np.clip(probs + rng.normal(0, noise, probs.shape), 0, 1)
        rows = {"id": list(map(str, range(400))), "gold": [np.flatnonzero(t) for t in truth]}
        rows = SoftLabels.from_dense(seen, space(8)).add_to(Dataset.from_dict(rows))
        fitted = fit_powerset(rows.select(range(300)), space(8))
        new = predict_powerset(rows.select(range(300, 400)), space(8), fitted)
        sizes.append(np.mean(new["sets_most"]))
    assert sizes[0] * 1.5 < sizes[1]


def test_an_empty_region_stays_empty_unless_asked() -> None:
    rows = {"id": ["a"], "gold": [[]]}
    row = SoftLabels.from_dense(np.array([[0.75, 0.5]]), space(2)).add_to(Dataset.from_dict(rows))
    fitted = Powerset(0.5, 1.0, (0.25,), space(2).fingerprint)  # the row's nearest set is .75 away
    kept = predict_powerset(row, space(2), fitted)[0]
    assert (kept["set_ids"], kept["certain_ids"], kept["label_sets"]) == ([], [], [])
    assert (kept["sets_least"], kept["sets_most"], kept["capped"]) == (0, 0, False)
    assert kept["credibility"] == 0.5
    filled = predict_powerset(row, space(2), fitted, empty="best")[0]
    assert (filled["set_ids"], filled["certain_ids"], filled["label_sets"]) == ([0], [0], [[0]])
    assert (filled["sets_least"], filled["sets_most"], filled["capped"]) == (1, 1, False)


def test_a_row_without_a_soft_label_has_probability_zero_everywhere() -> None:
    region = region_of([0.0, 0.0, 0.0], 1.0)
    assert list(region) == [((), 0.0), ((0,), 1.0), ((1,), 1.0), ((2,), 1.0)]


def test_zeros_stored_and_the_order_of_rows_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, probs, truth = random_rows(4, 50, 6)
    full = csr_array(probs)
    stored = csr_array(
        (probs.ravel(), np.tile(np.arange(6), 50), np.arange(0, 301, 6)), shape=(50, 6)
    )
    assert stored.nnz > full.nnz
    assert set_scores(full, truth).tolist() == set_scores(stored, truth).tolist()
    fitted = fit_powerset(rows, space(6))
    order = np.random.default_rng(0).permutation(50)
    monkeypatch.setattr(module, "_BLOCK_CELLS", 42)  # 7 rows a block
    assert fit_powerset(rows.select(order), space(6)) == fitted


def test_the_fit_is_json() -> None:
    rows, _, _ = random_rows(4, 50, 6)
    fitted = fit_powerset(rows, space(6))
    adapter = TypeAdapter(Powerset)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


@SEEDS
def test_binary_relevance_equals_the_twin(seed: int) -> None:
    _, gold_probs, truth = random_rows(seed, 40, 3)
    _, probs, _ = random_rows(seed + 1000, 10, 3)
    may, may_not = binary_relevance(gold_probs, truth, probs, alpha=0.3)
    for i, row in enumerate(probs.tolist()):
        expected = reference.relevance(gold_probs.tolist(), truth.tolist(), row, 0.3)
        assert list(zip(may[i].tolist(), may_not[i].tolist(), strict=True)) == expected
    may, may_not = binary_relevance(gold_probs, truth, probs, alpha=0.05)  # 59 rows are needed
    assert may.all()
    assert may_not.all()


def test_refusals() -> None:
    rows, _, _ = random_rows(0, 40, 3)
    with pytest.raises(ValueError, match="between 0 and 1; got 1"):
        fit_powerset(rows, space(3), alpha=1.0)
    with pytest.raises(ValueError, match=r"power must be a number from 1 on; got 0.5"):
        fit_powerset(rows, space(3), power=0.5)
    with pytest.raises(ValueError, match=r"alpha=0.02 needs n >= 49 gold rows; there are 40"):
        fit_powerset(rows, space(3), alpha=0.02)
    with pytest.raises(ValueError, match="one label a row"):
        fit_powerset(rows, space(3, multilabel=False))
    fitted = fit_powerset(rows, space(3))
    with pytest.raises(ValueError, match="were fitted in label space"):
        list(regions(rows, space(4), fitted))
    with pytest.raises(ValueError, match="top must be 0 or more"):
        predict_powerset(rows, space(3), fitted, top=-1)


@pytest.mark.parametrize("labels", [4, 8, 12])
def test_counts_equal_those_of_mulaconf(labels: int) -> None:
    mulaconf = pytest.importorskip("mulaconf")
    rng = np.random.default_rng(labels)
    # It computes in float32; squares of multiples of 1/64 are exact there, so ties stay ties.
    probs = np.round(rng.beta(0.4, 1.2, (540, labels)) * 64) / 64
    truth = rng.random(probs.shape) < probs
    peer = mulaconf.InductiveConformalPredictor(
        probs[:100], truth[:100].astype(int), measure="norm"
    )
    peer.calibrate(probs[100:500], truth[100:500].astype(int))
    listed = peer.predict(probs[500:])
    listed.non_empty_prediction_regions = False
    scores = set_scores(csr_array(probs[100:500]), truth[100:500])
    name = space(labels).fingerprint
    rows = SoftLabels.from_dense(probs[500:], space(labels)).add_to(
        Dataset.from_dict({"id": list(map(str, range(40)))})
    )
    for alpha in (0.05, 0.1, 0.2):
        fitted = Powerset(alpha, 2.0, tuple(np.sort(scores).tolist()), name)
        own = [region.count() for region in regions(rows, space(labels), fitted)]
        assert own == [(len(some),) * 2 for some in listed(significance_level=alpha)]
