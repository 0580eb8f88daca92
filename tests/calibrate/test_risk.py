import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import risk as reference
from scipy.sparse import csr_array

from llmlabel.calibrate import risk as module
from llmlabel.calibrate.bounds import risk_p_values, upper_bound
from llmlabel.calibrate.per_label import LabelThresholds, fit_label_thresholds, predict_label_sets
from llmlabel.calibrate.risk import (
    RiskControl,
    fit_risk,
    predict_risk_sets,
    risk_curve,
)
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
RISKS = ("false_negative", "false_positive", "false_discovery", "f1", "size")


def space(labels: int, *, multilabel: bool = True) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def random_rows(seed: int, count: int, labels: int = 6, noise: float = 0.2) -> tuple[Dataset, list]:
    """Rows with ties, labels not stored, rows without a soft label and rows without a true label."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(0.3, 0.9, (count, labels))
    gold = [np.flatnonzero(row).tolist() for row in rng.random((count, labels)) < chance]
    probs = np.clip(chance + rng.normal(0, noise, chance.shape), 0, 1)
    probs = (probs * 32).round() / 32
    probs[rng.random(count) < 0.02] = 0
    ids = [f"{seed}/{i}" for i in range(count)]
    soft = SoftLabels.from_dense(probs, space(labels))
    return soft.add_to(Dataset.from_dict({"id": ids, "gold": gold})), soft.dense().tolist()


def table(probs: list[list[float]], gold: list[Any], *, multilabel: bool = True) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    where = space(len(probs[0]), multilabel=multilabel)
    return SoftLabels.from_dense(np.array(probs), where).add_to(rows)


def golds(rows: Dataset, labels: int) -> csr_array:
    matrix = np.zeros((len(rows), labels), dtype=bool)
    for row, some in enumerate(rows["gold"]):
        matrix[row, some] = True
    return csr_array(matrix)


@pytest.mark.parametrize("risk", RISKS)
@SEEDS
def test_the_curve_equals_the_twin_at_every_threshold(seed: int, risk: Any) -> None:
    rows, probs = random_rows(seed, 25)
    soft = SoftLabels.from_dataset(rows, space(6))
    curve = risk_curve(soft.probs, golds(rows, 6), risk, max_size=2)
    scores = sorted({p for row in probs for p in row if p > 0}, reverse=True)
    assert curve.thresholds.tolist() == [math.inf, *scores]
    gold = rows["gold"][:]
    expected = [float(reference.total(risk, probs, gold, t, 2)) for t in curve.thresholds]
    assert curve.totals.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bound", ["hoeffding_bentkus", "hoeffding", "binomial"])
@SEEDS
def test_p_values_equal_the_twin(seed: int, bound: str) -> None:
    rng = np.random.default_rng(seed)
    rows, alpha = int(rng.integers(1, 80)), float(rng.uniform(0.01, 0.9))
    totals = rng.uniform(0, rows, 9) if bound != "binomial" else rng.integers(0, rows + 1, 9) * 1.0
    totals[0] = 0.0
    found = risk_p_values(totals, rows=rows, alpha=alpha, bound=bound).tolist()
    expected = [reference.p_value(one, rows, alpha, bound) for one in totals.tolist()]
    assert found == pytest.approx(expected, rel=1e-9)
    for total in totals.tolist():
        upper = upper_bound(total, rows=rows, delta=0.1, bound=bound)
        for rate, low, high in ((upper + 1e-7, 0, 0.1), (upper - 1e-7, 0.1, math.inf)):
            if total / rows < rate < 1:
                assert low <= reference.p_value(total, rows, rate, bound) <= high


@pytest.mark.parametrize(
    ("risk", "method", "alpha"),
    [
        ("false_negative", "crc", 0.2),
        ("false_negative", "rcps", 0.35),
        ("false_negative", "ltt", 0.35),
        ("false_positive", "crc", 0.1),
        ("false_positive", "rcps", 0.2),
        ("false_discovery", "ltt", 0.4),
        ("f1", "ltt", 0.7),
        ("size", "crc", 0.2),
        ("size", "rcps", 0.2),
    ],
)
@SEEDS
def test_thresholds_equal_the_twin(seed: int, risk: Any, method: Any, alpha: float) -> None:
    rows, probs = random_rows(seed, 50)
    max_size = 2 if risk == "size" else None
    bound = None if method == "crc" else "binomial" if risk == "size" else "hoeffding_bentkus"
    expected = reference.control(
        risk, probs, rows["gold"][:], alpha, delta=0.2, bound=bound, max_size=max_size
    )
    if expected is None:
        with pytest.raises(ValueError, match="cannot certify"):
            fit_risk(
                rows, space(6), risk=risk, alpha=alpha, method=method, delta=0.2, max_size=max_size
            )
        return
    fitted = fit_risk(
        rows, space(6), risk=risk, alpha=alpha, method=method, delta=0.2, max_size=max_size
    )
    assert fitted.threshold == expected[0]
    assert fitted.found == pytest.approx(float(expected[1]) / 50, abs=1e-9)
    assert fitted.found <= fitted.upper <= alpha + 1e-9
    sets = predict_risk_sets(rows, space(6), fitted)
    for row, some in zip(probs, sets["set_ids"], strict=True):
        inside = reference.said(row, expected[0])
        assert some == sorted(inside, key=lambda k, row=row: (-row[k], k))
    assert sets.features["set_ids"] == List(Value("int32"))
    assert fitted.mean_size == sum(len(some) for some in sets["set_ids"]) / 50
    if seed:
        return
    order = np.random.default_rng(seed).permutation(50)
    again = fit_risk(
        rows.select(order),
        space(6),
        risk=risk,
        alpha=alpha,
        method=method,
        delta=0.2,
        max_size=max_size,
    )
    assert again == fitted


def test_hoeffding_is_looser_than_hoeffding_bentkus() -> None:
    rows, _ = random_rows(0, 400)
    fits = {
        bound: fit_risk(rows, space(6), method="rcps", alpha=0.2, bound=bound)
        for bound in ("hoeffding", "hoeffding_bentkus")
    }
    assert fits["hoeffding"].threshold < fits["hoeffding_bentkus"].threshold
    assert fits["hoeffding"].found + math.sqrt(math.log(10) / 800) <= 0.2


def test_crc_by_hand() -> None:
    """Nine rows and alpha = 0.2: the sum of losses may be 1, so one row may be missed whole."""
    probs = [[0.5 + k / 100, 0.05] for k in range(9)]
    rows = table(probs, [[0]] * 9)
    fitted = fit_risk(rows, space(2), alpha=0.2)
    assert fitted.threshold == pytest.approx(0.51)
    assert (fitted.found, fitted.upper) == (pytest.approx(1 / 9), pytest.approx(0.2))
    assert predict_risk_sets(rows, space(2), fitted)["set_ids"][:] == [[]] + [[0]] * 8


def test_one_label_a_row_has_the_exact_bound() -> None:
    """60 rows, alpha = 0.1: P(Bin(60, 0.1) <= 2) = 0.053 and <= 3 is 0.137."""
    probs = [[k / 100, 1 - k / 100] for k in range(1, 61)]
    rows = table(probs, [[0]] * 60, multilabel=False)
    where = space(2, multilabel=False)
    fitted = fit_risk(rows, where, method="rcps", alpha=0.1, delta=0.1)
    assert (fitted.bound, fitted.found) == ("binomial", pytest.approx(2 / 60))
    assert fitted.threshold == pytest.approx(0.03)
    assert fit_risk(rows, where, method="rcps", alpha=0.1, delta=0.14).threshold == pytest.approx(
        0.04
    )


def test_the_threshold_of_lac_is_that_of_crc_where_a_row_has_one_label() -> None:
    from llmlabel.calibrate.conformal import fit_conformal

    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 73)
    rows = table(probs.tolist(), rng.integers(0, 4, (73, 1)).tolist(), multilabel=False)
    where = space(4, multilabel=False)
    lac = fit_conformal(rows, where, alpha=0.1)
    assert fit_risk(rows, where, alpha=0.1).threshold == pytest.approx(1 - lac.threshold, abs=1e-12)


@SEEDS
def test_label_thresholds_equal_the_twin(seed: int) -> None:
    rows, probs = random_rows(seed, 60, labels=12)
    keep = np.random.default_rng(seed).random(12) < 0.5  # the others become rare
    gold = [[k for k in some if keep[k] or i < 9] for i, some in enumerate(rows["gold"])]
    rows = table(probs, gold)
    fitted = fit_label_thresholds(rows, space(12), alpha=0.1)
    expected = reference.label_thresholds(probs, gold, 0.1, 12)
    assert list(zip(fitted.thresholds, fitted.sources, strict=True)) == expected
    assert fitted.rows == tuple(sum(k in some for some in gold) for k in range(12))
    sets = predict_label_sets(rows, space(12), fitted)["set_ids"]
    for row, some in zip(probs, sets, strict=True):
        inside = [k for k in range(12) if row[k] >= expected[k][0] and row[k] > 0]
        assert some == sorted(inside, key=lambda k, row=row: (-row[k], k))


def test_label_thresholds_by_hand() -> None:
    """alpha = 0.25 needs 3 rows; label 1 has 2, label 2 none, and label 3 is hardly ever stored."""
    probs = [[0.9, 0.2, 0.1, 0.0], [0.5, 0.3, 0.1, 0.0], [0.7, 0.0, 0.1, 0.6], [0.0, 0.0, 0.2, 0.0]]
    fitted = fit_label_thresholds(
        table(probs, [[0, 1, 3], [0, 1, 3], [0, 3], []]), space(4), alpha=0.25
    )
    assert fitted.thresholds == pytest.approx((0.5, 0.0, 0.0, 0.0))
    # Three allow none of them to be missed: the smallest of 0.9, 0.5, 0.7 itself.
    assert fitted.rows == (3, 2, 0, 3)
    assert fitted.sources == ("own", "unreachable", "unreachable", "unreachable")
    more = fit_label_thresholds(table(probs, [[0, 1], [0, 1], [0], [2]]), space(4), alpha=0.25)
    assert more.sources == ("own", "rare", "rare", "rare")
    assert more.thresholds == pytest.approx((0.5, 0.2, 0.2, 0.2))


def test_results_survive_json() -> None:
    rows, _ = random_rows(1, 60)
    one = fit_risk(rows, space(6), risk="size", max_size=2, alpha=0.3, method="ltt")
    empty = fit_risk(table([[0.5, 0.1]] * 20, [[]] * 20), space(2), alpha=0.2)
    assert empty.threshold == math.inf  # nothing is true, so nothing has to be said
    for fitted in (one, empty):
        adapter = TypeAdapter(RiskControl)
        assert adapter.validate_json(adapter.dump_json(fitted)) == fitted
    own = fit_label_thresholds(rows, space(6))
    adapter = TypeAdapter(LabelThresholds)
    assert adapter.validate_json(adapter.dump_json(own)) == own


def test_rows_of_unknown_gold_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, probs = random_rows(2, 60)
    fitted = fit_risk(table(probs, rows["gold"][:]), space(6), alpha=0.2)
    gold = [*rows["gold"], None, None]
    longer = table([*probs, [0.9] * 6, [0.0] * 6], gold)
    monkeypatch.setattr(module, "_BLOCK_CELLS", 42)  # 7 rows a block
    assert fit_risk(longer, space(6), alpha=0.2) == fitted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must lie strictly between 0 and 1; got 0.0"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1; got 1.0"),
        ({"risk": "f1"}, "crc needs a risk that only rises or only falls .* f1 does not"),
        ({"risk": "false_discovery", "method": "rcps"}, "rcps needs a risk .* use method='ltt'"),
        ({"risk": "size"}, "max_size is for risk='size', where it is 1 or more; got max_size=None"),
        ({"max_size": 3}, "max_size is for risk='size'.*with risk='false_negative'"),
        ({"alpha": 0.01}, r"cannot certify false_negative <= 0.01: needs n >= 99 .* there are 60"),
        ({"alpha": 0.03, "method": "rcps"}, "needs n >= 76 gold rows, there are 60"),
        ({"alpha": 0.1, "method": "rcps", "bound": "hoeffding"}, "needs n >= 116 gold rows"),
        ({"alpha": 0.05, "risk": "f1", "method": "ltt"}, "f1 <= 0.05: needs n >= 104 gold rows"),
        ({"alpha": 0.02}, "cannot certify false_negative <= 0.02: 0.[0-9]+ of the true labels are"),
        (
            {"alpha": 0.1, "risk": "f1", "method": "ltt"},
            "cannot certify f1 loss <= 0.1: at the best",
        ),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    rows, _ = random_rows(3, 60, noise=0.5)
    with pytest.raises(ValueError, match=message):
        fit_risk(rows, space(6), **settings)


def test_refusals_that_need_rows_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"risk must be one of false_negative, .*; got recall"):
        module._check("recall", "crc", "hoeffding", alpha=0.1, delta=0.1, max_size=None)
    wrong = table([[0.9, 0.1]] * 60, [[1]] * 60)
    with pytest.raises(ValueError, match=r"cannot certify false_discovery <= 0.1 at any threshold"):
        fit_risk(wrong, space(2), risk="false_discovery", method="ltt")
    with pytest.raises(ValueError, match="needs n >= 9 gold labels, there are 2"):
        fit_label_thresholds(table([[0.9, 0.1]] * 2, [[1], [0]]), space(2))
    with pytest.raises(ValueError, match="alpha must lie strictly"):
        fit_label_thresholds(wrong, space(2), alpha=1.0)
    several = table([[0.5, 0.5]] * 9, [[0, 1]] * 9, multilabel=False)
    with pytest.raises(ValueError, match="multi-label rows have no single true label"):
        fit_risk(several, space(2, multilabel=False))
    rows, _ = random_rows(0, 60)
    with pytest.raises(ValueError, match="fitted in label space"):
        predict_risk_sets(rows, space(6), fit_risk(wrong, space(2)))
    routed = rows.add_column("route", ["person"] * 60)
    with pytest.raises(ValueError, match="60 of 60 gold rows have been routed"):
        fit_risk(routed, space(6))
    with pytest.raises(ValueError, match="60 of 60 gold rows have been routed"):
        fit_label_thresholds(routed, space(6))


def test_thresholds_equal_those_of_mapie() -> None:
    """On a grid of 0.01, between whose points all probabilities lie, both see the same sets."""
    pytest.importorskip("mapie")
    from mapie.risk_control import MultiLabelClassificationController

    rng = np.random.default_rng(0)
    chance = rng.beta(0.5, 2, (400, 12))
    truth = rng.random(chance.shape) < chance
    truth[~truth.any(axis=1), 0] = True  # it wants a true label in every row
    probs = (chance * 99).astype(int) / 100 + 0.005
    rows = table(probs.tolist(), [np.flatnonzero(row).tolist() for row in truth])
    for method, bound in (("crc", None), ("rcps", "hoeffding")):
        control = MultiLabelClassificationController(
            predict_function=lambda X: X,
            risk="recall",
            method=method,
            target_level=0.85,
            confidence_level=0.9 if bound else None,
            rcps_bound=bound,
        )
        control.calibrate(probs, truth.astype(int))
        fitted = fit_risk(
            rows, space(12), alpha=0.15, method=method, bound=bound or "hoeffding_bentkus"
        )
        sets = control.predict(probs)[:, :, 0]
        ours = predict_risk_sets(rows, space(12), fitted)["set_ids"]
        assert [sorted(some) for some in ours] == [np.flatnonzero(row).tolist() for row in sets]
