import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import risk as reference

from llmlabel.calibrate.bounds import binomial_upper
from llmlabel.calibrate.selective import (
    Selective,
    audit_rows,
    first_threshold,
    fit_budget,
    fit_selective,
    refuse_routed,
    route,
    selective_threshold,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
NAMES = ("bug", "praise", "other")
SPACE = LabelSpace(NAMES, NAMES, ("",) * 3, ((),) * 3)


def draw(seed: int, count: int, *, name: str = "row", decimals: int = 2) -> Dataset:
    """Calibrated rows: the most probable label is right as often as it says."""
    rng = np.random.default_rng(seed)
    top = rng.uniform(0.4, 1, count).round(decimals)
    probs = np.stack([top, (1 - top) * 0.75, (1 - top) * 0.25], axis=1)
    gold = [[int(rng.choice(3, p=p / p.sum()))] for p in probs]
    rows = Dataset.from_dict({"id": [f"{name}{i}" for i in range(count)], "gold": gold})
    return SoftLabels.from_dense(probs, SPACE).add_to(rows)


def confidence_of(rows: Dataset) -> np.ndarray:
    return np.array([max(some) for some in rows["label_probs"]], dtype=np.float64)


@SEEDS
def test_the_walk_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 40, 120) / 40
    wrong = rng.random(120) > 0.55 + 0.45 * confidence
    start, target = float(rng.choice([0.9, 0.975, 0.66])), float(rng.choice([0.1, 0.25, 0.5]))
    found = selective_threshold(confidence, wrong, target=target, delta=0.2, start=start)
    expected = reference.selective(confidence.tolist(), wrong.tolist(), target, 0.2, start)
    assert found == expected
    best = first_threshold(confidence, wrong, target=target)
    tails = {
        c: reference.binomial_tail(
            int(wrong[confidence >= c].sum()), int((confidence >= c).sum()), target
        )
        for c in confidence.tolist()
    }
    assert tails[best] == pytest.approx(min(tails.values()), rel=1e-9)


@SEEDS
def test_the_binomial_bound_inverts_the_tail(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 90))
    errors = int(rng.integers(0, rows))
    bound = binomial_upper(errors, rows, delta=0.07)
    assert reference.binomial_tail(errors, rows, bound) == pytest.approx(0.07, rel=1e-7)
    assert binomial_upper(rows, rows, delta=0.07) == 1.0


def test_the_fit_tests_on_four_fifths_and_keeps_what_it_says() -> None:
    rows = draw(0, 900)
    fitted = fit_selective(rows, SPACE, target=0.2, delta=0.1)
    assert 650 < fitted.rows < 790  # a fifth chose the start
    assert (fitted.bound, fitted.delta, fitted.confidence) == (0.2, 0.1, "probability")
    assert 0.3 < fitted.kept < 0.7
    assert fitted.error < 0.2
    kept = round(fitted.kept * fitted.rows)
    assert binomial_upper(round(fitted.error * kept), kept, delta=0.1) <= 0.2
    order = np.random.default_rng(1).permutation(900)
    assert fit_selective(rows.select(order), SPACE, target=0.2, delta=0.1) == fitted
    assert fit_selective(rows, SPACE, target=0.2, seed=1) != fitted
    easier = fit_selective(rows, SPACE, target=0.5, delta=0.1)
    assert (easier.threshold, easier.kept) == (-math.inf, 1.0)
    adapter = TypeAdapter(Selective)
    for one in (fitted, easier):
        assert adapter.validate_json(adapter.dump_json(one)) == one


def test_a_budget_of_people_bounds_the_rest() -> None:
    gold, pool = draw(0, 500), draw(1, 300, name="new")
    fitted = fit_budget(gold, pool, SPACE, people=100, delta=0.1)
    own = confidence_of(pool)
    routed = route(pool, SPACE, fitted)
    people = np.array(routed["route"]) == "person"
    assert fitted.threshold == np.sort(own)[100]
    assert 90 < people.sum() <= 100  # those as confident as the last one stay together
    assert own[people].max() < own[~people].min()
    kept = confidence_of(gold) >= fitted.threshold
    wrong = np.array(
        [ids[0] != g[0] for ids, g in zip(gold["label_ids"], gold["gold"], strict=True)]
    )
    assert fitted.bound == binomial_upper(int(wrong[kept].sum()), int(kept.sum()), delta=0.1)
    assert (fitted.error, fitted.kept, fitted.rows) == (wrong[kept].mean(), kept.mean(), 500)
    everything = fit_budget(gold, pool, SPACE, people=0)
    assert (everything.threshold, everything.kept) == (-math.inf, 1.0)
    assert set(route(pool, SPACE, everything)["route"]) == {"model"}
    assert fitted.bound < everything.bound


def test_set_sizes_and_columns_are_confidences_too() -> None:
    """One label in the set is surest; none, and null, are the least sure."""
    rows = draw(0, 600, decimals=1)
    top = confidence_of(rows)
    sizes = np.where(top > 0.8, 1, np.where(top > 0.6, 2, 0))
    rows = with_columns(
        rows,
        {
            "set_ids": ([list(range(n)) for n in sizes.tolist()], List(Value("int32"))),
            "credibility": ([None if t < 0.45 else t for t in top.tolist()], Value("float64")),
        },
    )
    by_size = fit_selective(rows, SPACE, target=0.2, confidence="set_size")
    assert by_size.threshold == -1.0
    routes = np.array(route(rows, SPACE, by_size)["route"])
    assert (routes == np.where(sizes == 1, "model", "person")).all()
    by_column = fit_selective(rows, SPACE, target=0.25, confidence="credibility")
    same = fit_selective(rows, SPACE, target=0.25)
    assert by_column.threshold == pytest.approx(same.threshold)
    assert (by_column.error, by_column.kept) == (same.error, same.kept)
    routes = np.array(route(rows, SPACE, by_column)["route"])
    assert (routes[top < 0.45] == "person").all()
    with pytest.raises(ValueError, match="the column 'set_ids' holds other things than numbers"):
        fit_selective(rows, SPACE, target=0.3, confidence="set_ids")


def test_none_of_the_labels_and_no_label_are_wrong() -> None:
    probs = np.tile([0.9, 0.1, 0.0], (120, 1))
    probs[100:110] = 0
    gold: list[Any] = [[0]] * 110 + [[]] * 10
    rows = SoftLabels.from_dense(probs, SPACE).add_to(
        Dataset.from_dict({"id": [str(i) for i in range(120)], "gold": gold})
    )
    fitted = fit_budget(rows, draw(0, 9, name="new"), SPACE, people=0)
    assert fitted.error == 20 / 120


def test_the_audit_is_drawn_whatever_the_confidence() -> None:
    pool = draw(1, 4000, name="new")
    fitted = fit_selective(draw(0, 900), SPACE, target=0.2)
    routed = route(pool, SPACE, fitted, audit=0.1)
    routes = np.array(routed["route"])
    plain = np.array(route(pool, SPACE, fitted)["route"])
    drawn = routes == "audit"
    assert abs(drawn.mean() - 0.1) < 4 * math.sqrt(0.09 / 4000)
    share = (plain == "person").mean()  # the same among those drawn
    assert abs((plain[drawn] == "person").mean() - share) < 4 * math.sqrt(share * (1 - share) / 400)
    assert (routes[~drawn] == plain[~drawn]).all()
    order = np.random.default_rng(0).permutation(4000)
    assert route(pool.select(order), SPACE, fitted, audit=0.1)["route"][:] == routes[order].tolist()
    assert (np.array(route(pool, SPACE, fitted, audit=0.1, seed=1)["route"]) != routes).any()


def test_only_the_audit_may_calibrate() -> None:
    fitted = fit_selective(draw(0, 900), SPACE, target=0.2)
    routed = route(draw(1, 1000, name="new"), SPACE, fitted, audit=0.3)
    routes = routed["route"][:]
    answers = [g if r != "model" else None for g, r in zip(routed["gold"], routes, strict=True)]
    answered = with_columns(routed, {"gold": (answers, List(Value("int32")))})
    people = routes.count("person")
    audit = routes.count("audit")
    message = rf"{people} of {people + audit} gold rows have been routed \({people} to a person"
    with pytest.raises(ValueError, match=message):
        fit_selective(answered, SPACE, target=0.2)
    with pytest.raises(ValueError, match=r"audit_rows"):
        refuse_routed(answered)
    fit = audit_rows(answered)
    assert len(fit) == audit
    refuse_routed(fit)
    again = fit_selective(fit, SPACE, target=0.3)
    assert again.rows < audit
    refuse_routed(draw(0, 5))
    refuse_routed(routed.remove_columns("gold"))
    never = with_columns(draw(0, 5), {"route": ([None] * 5, Value("string"))})
    refuse_routed(never)
    assert len(audit_rows(never)) == 5
    with pytest.raises(ValueError, match="none of 5 rows is a random audit"):
        audit_rows(with_columns(never, {"route": (["person"] * 5, Value("string"))}))
    with pytest.raises(ValueError, match="the column 'route' holds 'A7'"):
        refuse_routed(with_columns(never, {"route": (["A7"] * 5, Value("string"))}))


def test_what_is_refused() -> None:
    rows, pool = draw(0, 100), draw(1, 50, name="new")
    with pytest.raises(ValueError, match=r"target must lie strictly between 0 and 1; got 0"):
        fit_selective(rows, SPACE, target=0.0)
    with pytest.raises(ValueError, match=r"delta must lie strictly between 0 and 1; got 1"):
        fit_selective(rows, SPACE, target=0.1, delta=1.0)
    with pytest.raises(
        ValueError, match=r"error <= 0.01: needs n >= 230 gold rows to test, .* of 100"
    ):
        fit_selective(rows, SPACE, target=0.01)
    with pytest.raises(
        ValueError, match=r"cannot certify error <= 0.05: [0-9]+ of the [0-9]+ most"
    ):
        fit_selective(rows, SPACE, target=0.05)
    with pytest.raises(ValueError, match=r"the pool has no rows to route"):
        fit_budget(rows, pool.select([]), SPACE, people=0)
    with pytest.raises(ValueError, match=r"people must be from 0 to 49.*got 50"):
        fit_budget(rows, pool, SPACE, people=50)
    with pytest.raises(ValueError, match=r"delta must lie"):
        fit_budget(rows, pool, SPACE, people=5, delta=0.0)
    with pytest.raises(ValueError, match=r"50 rows of the pool are gold rows too, .* 'row0'"):
        fit_budget(rows, rows.select(range(50)), SPACE, people=5)
    sure = SoftLabels.from_dense(np.tile([1.0, 0, 0], (9, 1)), SPACE).add_to(
        Dataset.from_dict({"id": [f"s{i}" for i in range(9)]})
    )
    with pytest.raises(ValueError, match=r"no gold row is as confident as 1"):
        fit_budget(rows.filter(lambda row: row["label_probs"][0] < 0.99), sure, SPACE, people=5)
    with pytest.raises(ValueError, match=r"this one is multi-label"):
        fit_selective(rows, LabelSpace(NAMES, NAMES, ("",) * 3, ((),) * 3, True), target=0.2)
    fitted = fit_budget(rows, pool, SPACE, people=5)
    with pytest.raises(ValueError, match=r"audit must be a share of at least 0 and below 1; got 1"):
        route(pool, SPACE, fitted, audit=1.0)
    other = LabelSpace(("x", "y", "z"), ("x", "y", "z"), ("",) * 3, ((),) * 3)
    with pytest.raises(ValueError, match=r"fitted in label space"):
        route(pool, other, fitted)
