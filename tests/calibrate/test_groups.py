"""Thresholds of labels and of groups of rows, and what stands in for those of too few rows."""

import math
import re
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import conformal as split
from reference import groups as reference

from llmlabel.calibrate import written
from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.groups import (
    GroupConformal,
    fit_class_conformal,
    fit_group_conformal,
    group_report,
    predict_group_sets,
)
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))

# 0 and 1 are roots; 2, 3 and 4 below 0; 5 below 1; 6 below 3 and 5; 7 below 6.
PARENTS: tuple[tuple[int, ...], ...] = ((), (), (0,), (0,), (0,), (1,), (3, 5), (6,))


def space(labels: int, parents: tuple[tuple[int, ...], ...] | None = None) -> LabelSpace:
    ids = tuple(f"l{k}" for k in range(labels))
    above = tuple(tuple(ids[p] for p in some) for some in parents or ((),) * labels)
    return LabelSpace(ids, ids, ("",) * labels, above)


def table(probs: Any, gold: list[int], labels: LabelSpace, *, name: str = "r") -> Dataset:
    golds = [[] if g < 0 else [int(g)] for g in gold]
    rows = Dataset.from_dict({"id": [f"{name}{i}" for i in range(len(gold))], "gold": golds})
    return SoftLabels.from_dense(np.array(probs, dtype=np.float64), labels).add_to(rows)


def random_rows(seed: int, rows: int, labels: LabelSpace) -> tuple[Dataset, np.ndarray, list[int]]:
    """A long tail, ties, labels not stored, gold that is none of the labels."""
    rng = np.random.default_rng(seed)
    size = len(labels)
    probs = rng.integers(0, 30, (rows, size)).astype(np.float64) ** 2
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1)
    share = 1 / np.arange(1, size + 1) ** 1.5
    gold = rng.choice(size, rows, p=share / share.sum())
    gold[rng.random(rows) < 0.02] = -1
    dataset = table(probs, gold.tolist(), labels, name=f"{seed}/")
    dense = SoftLabels.from_dataset(dataset, labels).dense()
    return dataset, dense, gold.tolist()


def lac(dense: np.ndarray, gold: list[int]) -> list[float]:
    own = [row[g] if g >= 0 else 0.0 for row, g in zip(dense, gold, strict=True)]
    return [1 - p if p > 0 else math.inf for p in own]


def counted(counts: list[int], *, seed: int = 0, labels: LabelSpace | None = None) -> Dataset:
    """So many rows of each label, all with random distributions over all labels."""
    labels = labels or space(len(counts))
    gold = np.repeat(np.arange(len(counts)), counts)
    probs = np.random.default_rng(seed).dirichlet(np.ones(len(labels)), len(gold))
    return table(probs, gold.tolist(), labels)


# -------------------------------------------------------------------------------------------- twins


@SEEDS
def test_the_chain_equals_the_twin(seed: int) -> None:
    labels = space(8, PARENTS)
    dataset, dense, gold = random_rows(seed, 25 + 6 * seed, labels)
    scores = lac(dense, gold)
    chains: list[tuple[Any, ...]] = [(), ("marginal",), ("parent",), ("parent", "marginal")]
    for fallback in chains:
        fitted = fit_class_conformal(dataset, labels, alpha=0.2, fallback=fallback)
        expected = reference.chain(scores, gold, 8, 0.2, PARENTS, ("class", *fallback))
        assert [one.level for one in fitted.thresholds] == [level for level, _ in expected]
        assert [one.value for one in fitted.thresholds] == [value for _, value in expected]
        assert [one.rows for one in fitted.thresholds] == [gold.count(k) for k in range(8)]
        assert fitted.marginal == reference.quantile(scores, 0.2)
        promised = {"class", "all"}
        assert [one.guaranteed for one in fitted.thresholds] == [e[0] in promised for e in expected]


@SEEDS
def test_sets_equal_the_twin(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = space(8, PARENTS)
    gold_rows, gold_dense, gold = random_rows(seed, 60, labels)
    new, dense, _ = random_rows(seed + 1000, 40, labels)
    fallback: Any = ("parent", "marginal") if seed % 2 else ("parent",)
    fitted = fit_class_conformal(gold_rows, labels, alpha=0.2, fallback=fallback)
    limits = reference.chain(lac(gold_dense, gold), gold, 8, 0.2, PARENTS, ("class", *fallback))
    expected = []
    for row in dense:
        inside = [
            k
            for k, (_, limit) in enumerate(limits)
            if limit == math.inf or (row[k] > 0 and 1 - row[k] <= limit)
        ]
        expected.append(sorted(inside, key=lambda k, row=row: (-row[k], k)))
    sets = predict_group_sets(new, labels, fitted)
    assert sets["set_ids"][:] == expected
    monkeypatch.setattr(written, "BLOCK_CELLS", 60)  # 7 rows a block
    assert predict_group_sets(new, labels, fitted)["set_ids"][:] == expected
    assert sets.features["set_ids"] == List(Value("int32"))
    assert sets["gold"][:] == new["gold"][:]


@SEEDS
def test_groups_of_rows_equal_the_twin(seed: int) -> None:
    labels = space(5)
    rng = np.random.default_rng(seed)
    dataset, dense, gold = random_rows(seed, 60, labels)
    new, new_dense, _ = random_rows(seed + 1000, 30, labels)
    kinds: list[Any] = [[None, "a", "b", "c", "d"], [None, 7, 1, 2, 3], [None, True, False]][
        seed % 3
    ]
    share = np.array([1.0, 9, 6, 2, 1])[: len(kinds)]
    mine = [kinds[i] for i in rng.choice(len(kinds), 60, p=share / share.sum())]
    theirs = [kinds[i] for i in rng.integers(0, len(kinds), 30)]
    dataset = dataset.add_column("kind", mine)
    new = new.add_column("kind", theirs)
    scores = lac(dense, gold)
    marginal = reference.quantile(scores, 0.3)
    for fallback, otherwise in (("marginal", marginal), ("all", math.inf)):
        fitted = fit_group_conformal(dataset, labels, column="kind", alpha=0.3, fallback=fallback)
        limit = {}
        for one in fitted.thresholds:
            rows = [i for i in range(60) if str(mine[i]) == one.group and mine[i] is not None]
            own = len(rows) >= 3
            assert (one.rows, one.level) == (len(rows), "group" if own else fallback)
            limit[one.group] = (
                reference.quantile([scores[i] for i in rows], 0.3) if own else otherwise
            )
            assert one.value == limit[one.group]
            assert one.guaranteed == (own or fallback == "all")
        assert [*limit] == sorted({str(m) for m in mine if m is not None})
        sets = predict_group_sets(new, labels, fitted)["set_ids"][:]
        for row, kind, found in zip(new_dense, theirs, sets, strict=True):
            cut = otherwise if kind is None else limit.get(str(kind), otherwise)
            inside = {k for k in range(5) if cut == math.inf or (row[k] > 0 and 1 - row[k] <= cut)}
            assert set(found) == inside


# ------------------------------------------------------------------------------------------- levels


def test_a_label_with_no_one_or_eight_rows_falls_back() -> None:
    labels = space(5, ((), (0,), (0,), (0,), ()))
    dataset = counted([0, 1, 8, 9, 30], labels=labels)
    fitted = fit_class_conformal(dataset, labels, alpha=0.1)
    assert [one.level for one in fitted.thresholds] == [
        *("marginal", "parent", "parent", "class", "class")
    ]
    assert [one.source for one in fitted.thresholds] == ["", "l0", "l0", "", ""]
    assert [one.rows for one in fitted.thresholds] == [0, 1, 8, 9, 30]
    assert fitted.without_guarantee == ("l0", "l1", "l2")
    # The 18 rows below the root; the root itself has none above it, and is not its own parent.
    dense, gold = (
        SoftLabels.from_dataset(dataset, labels).dense(),
        np.repeat([1, 2, 3, 4], [1, 8, 9, 30]),
    )
    below = [1 - dense[i, g] for i, g in enumerate(gold) if g < 4]
    assert fitted.thresholds[1].value == fitted.thresholds[2].value == sorted(below)[17]
    assert fitted.thresholds[0].value == fitted.marginal
    everything = fit_class_conformal(dataset, labels, alpha=0.1, fallback=())
    assert [one.value == math.inf for one in everything.thresholds] == [True] * 3 + [False] * 2
    assert [one.level for one in everything.thresholds] == ["all"] * 3 + ["class"] * 2
    assert everything.without_guarantee == ()
    sets = predict_group_sets(dataset, labels, everything)["set_ids"][:]
    assert all({0, 1, 2} <= set(ids) for ids in sets)


def test_the_nearest_parent_with_enough_rows() -> None:
    labels = space(8, PARENTS)
    dataset = counted([10, 10, 0, 1, 3, 9, 0, 2], labels=labels)
    found = fit_class_conformal(dataset, labels, fallback=("parent",)).thresholds
    # 7: its parent 6 has 2 rows, of those above 3 has 3 and 5 has 11. 2: nothing but the root 0.
    assert [(one.level, one.source) for one in found] == [
        *[("class", ""), ("class", ""), ("parent", "l0"), ("parent", "l0"), ("parent", "l0")],
        *[("class", ""), ("parent", "l5"), ("parent", "l5")],
    ]


def test_one_group_is_split_conformal() -> None:
    labels = space(5)
    dataset, _, _ = random_rows(3, 60, labels)
    dataset = dataset.add_column("kind", ["all"] * 60)
    new = random_rows(4, 30, labels)[0].add_column("kind", ["all"] * 30)
    plain = fit_conformal(dataset, labels, alpha=0.2)
    fitted = fit_group_conformal(dataset, labels, column="kind", alpha=0.2)
    assert fitted.thresholds[0].value == fitted.marginal == plain.threshold
    expected = predict_sets(new, labels, plain)["set_ids"][:]
    assert predict_group_sets(new, labels, fitted)["set_ids"][:] == expected
    flat = fit_class_conformal(dataset, labels, alpha=0.2, tau=0.0)
    assert {one.value for one in flat.thresholds} == {plain.threshold}
    assert not any(one.guaranteed for one in flat.thresholds)


def test_interpolated_thresholds_lie_between() -> None:
    dataset = counted([40, 40, 12, 3])
    own = fit_class_conformal(dataset, space(4), fallback=())
    scores = lac(
        SoftLabels.from_dataset(dataset, space(4)).dense(),
        np.repeat(range(4), [40, 40, 12, 3]).tolist(),
    )
    half = fit_class_conformal(dataset, space(4), tau=0.5)
    for single, mixed in zip(own.thresholds[:3], half.thresholds[:3], strict=True):
        assert mixed.value == 0.5 * single.value + 0.5 * own.marginal
    assert own.thresholds[3].value == math.inf
    assert half.thresholds[3].value == 0.5 * max(scores) + 0.5 * own.marginal
    assert [one.level for one in half.thresholds] == ["class"] * 3 + ["all"]


# ----------------------------------------------------------------------------------------- clusters


def clustered(counts: list[int], hard: list[bool], *, seed: int) -> tuple[Dataset, LabelSpace]:
    """Labels whose own probability is near 0.9, or near 0.2."""
    labels, rng = space(len(counts)), np.random.default_rng(seed)
    gold = np.repeat(np.arange(len(counts)), counts)
    own = np.where(np.array(hard)[gold], 0.2, 0.9) + rng.uniform(-0.05, 0.05, len(gold))
    probs = np.repeat(((1 - own) / (len(counts) - 1))[:, None], len(counts), axis=1)
    probs[np.arange(len(gold)), gold] = own
    return table(probs, gold.tolist(), labels), labels


def test_labels_that_are_alike_share_a_threshold() -> None:
    hard = [False, True] * 5
    dataset, labels = clustered([60] * 8 + [3, 0], hard, seed=0)
    fitted = fit_class_conformal(dataset, labels, by="cluster", clusters=2, fallback=("marginal",))
    values = [one.value for one in fitted.thresholds]
    assert len(set(values[:8:2])) == len(set(values[1:8:2])) == 1
    assert values[0] == pytest.approx(0.1, abs=0.051)
    assert values[1] == pytest.approx(0.8, abs=0.051)
    # Rare labels take the quantile of all rows, not every label.
    assert values[8] == values[9] == fitted.marginal < 1
    assert [one.level for one in fitted.thresholds] == ["cluster"] * 8 + ["marginal"] * 2
    assert [one.source for one in fitted.thresholds] == ["0", "1"] * 4 + ["", ""]
    assert fitted.without_guarantee == labels.ids  # a cluster keeps its promise on average only


def test_a_rare_label_takes_the_cluster_that_it_is_most_like() -> None:
    # ceil(1 / alpha) - 1 = 19: 16 rows are too few for a threshold, and enough to compare.
    hard = [False, True, False, True, True, False]
    dataset, labels = clustered([80, 80, 80, 80, 16, 2], hard, seed=1)
    fitted = fit_class_conformal(dataset, labels, alpha=0.05, clusters=2)
    assert [one.level for one in fitted.thresholds] == ["class"] * 4 + ["cluster", "marginal"]
    assert fitted.thresholds[4].source == "1"
    assert fitted.thresholds[4].value == pytest.approx(0.8, abs=0.051)
    plain = fit_class_conformal(dataset, labels, alpha=0.05, fallback=("marginal",))
    assert fitted.thresholds[:4] == plain.thresholds[:4]  # clustering takes no rows from these


# --------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("by", ["class", "cluster"])
@pytest.mark.parametrize("score", ["lac", "aps", "raps"])
def test_the_order_of_the_rows_changes_nothing(by: Any, score: Any) -> None:
    labels = space(8, PARENTS)
    rows, _, _ = random_rows(3, 150, labels)
    new, _, _ = random_rows(4, 50, labels)
    how = Nonconformity(score, penalty=0.01 if score == "raps" else 0.0)
    fitted = fit_class_conformal(rows, labels, score=how, by=by, clusters=2)
    order = np.random.default_rng(0).permutation(150)
    assert fit_class_conformal(rows.select(order), labels, score=how, by=by, clusters=2) == fitted
    sets = predict_group_sets(new, labels, fitted)["set_ids"][:]
    turned = predict_group_sets(new.select(order[order < 50]), labels, fitted)["set_ids"][:]
    assert turned == [sets[i] for i in order[order < 50]]


def test_the_seed_matters_for_random_scores_and_clusters_only() -> None:
    labels = space(8, PARENTS)
    rows, _, _ = random_rows(3, 150, labels)
    for how, by, same in ((Nonconformity(), "class", True), (Nonconformity("aps"), "class", False)):
        fits = [
            fit_class_conformal(rows, labels, score=how, by=by, fallback=("marginal",), seed=seed)
            for seed in (0, 1)
        ]
        assert (fits[0].thresholds == fits[1].thresholds) == same
    dataset, labels = clustered([60] * 8, [False, True] * 4, seed=0)
    fits = [
        fit_class_conformal(dataset, labels, by="cluster", clusters=2, seed=seed) for seed in (0, 1)
    ]
    assert fits[0].thresholds != fits[1].thresholds


def test_aps_uses_the_same_numbers_as_split_conformal() -> None:
    labels = space(5)
    dataset, dense, gold = random_rows(5, 80, labels)
    how = Nonconformity("aps")
    fitted = fit_class_conformal(dataset, labels, score=how, fallback=("marginal",), seed=4)
    scores = []
    for row_id, row, g in zip(dataset["id"], dense.tolist(), gold, strict=True):
        own = split.aps(row, split.uniform(row_id, 4))[g] if g >= 0 and row[g] > 0 else math.inf
        scores.append(own)
    expected = reference.chain(scores, gold, 5, 0.1, PARENTS[:5], ("class", "marginal"))
    assert [one.value for one in fitted.thresholds] == pytest.approx([v for _, v in expected])


def test_what_is_fitted_survives_json() -> None:
    labels = space(8, PARENTS)
    dataset, _, _ = random_rows(3, 60, labels)
    adapter = TypeAdapter(GroupConformal)
    prior = (0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01)
    fits = [
        fit_class_conformal(dataset, labels, fallback=(), score=Nonconformity(prior=prior)),
        fit_class_conformal(dataset, labels, tau=0.9),
        fit_group_conformal(
            dataset.add_column("kind", list("aabc") * 15), labels, column="kind", fallback="all"
        ),
    ]
    assert any(one.value == math.inf for one in fits[0].thresholds)
    for fitted in fits:
        assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_the_report_has_a_row_a_label() -> None:
    labels = space(3)
    fitted = fit_class_conformal(counted([20, 9, 2]), labels)
    report = group_report(fitted)
    assert report.column_names == ["group", "value", "rows", "level", "source", "guaranteed"]
    assert report["group"][:] == ["l0", "l1", "l2"]
    assert report["rows"][:] == [20, 9, 2]
    assert report["level"][:] == ["class", "class", "marginal"]
    assert report["guaranteed"][:] == [True, True, False]
    assert report["value"][2] == fitted.marginal


def test_rows_whose_gold_nobody_knows_are_left_out() -> None:
    labels = space(5)
    dataset, _, gold = random_rows(0, 60, labels)
    known = [[g] if i < 40 and g >= 0 else ([] if i < 40 else None) for i, g in enumerate(gold)]
    rows = with_columns(dataset, {"gold": (known, List(Value("int32")))})
    rows = rows.add_column("kind", ["a", "b"] * 30)
    few = rows.select(range(40))
    assert fit_class_conformal(rows, labels) == fit_class_conformal(few, labels)
    by_kind = fit_group_conformal(rows, labels, column="kind")
    assert by_kind == fit_group_conformal(few, labels, column="kind")
    assert [one.rows for one in by_kind.thresholds] == [20, 20]


# ---------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_fitted_is_refused() -> None:
    labels = space(3)
    dataset = counted([10, 10, 10])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 0.0}, "alpha must lie strictly between 0 and 1; got 0"),
        ({"alpha": math.nan}, "alpha must lie strictly between 0 and 1; got nan"),
        ({"alpha": 0.01}, "alpha=0.01 needs at least 99 gold rows; there are 30 "),
        ({"tau": 1.5}, "tau must lie between 0"),
        ({"clusters": 1}, "clusters must be at least 2; got 1"),
        ({"score": "raps"}, "score 'raps' needs its settings here"),
        ({"score": "saps"}, "score 'saps' needs its settings here"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            fit_class_conformal(dataset, labels, **arguments)
    many = LabelSpace(labels.ids, labels.names, ("",) * 3, ((),) * 3, multilabel=True)
    with pytest.raises(ValueError, match="multi-label"):
        fit_class_conformal(dataset, many)
    with pytest.raises(ValueError, match="the column 'kind' is missing"):
        fit_group_conformal(dataset, labels, column="kind")
    with pytest.raises(ValueError, match=r"column 'gold' holds list.*; groups are strings"):
        fit_group_conformal(dataset, labels, column="gold")
    with pytest.raises(ValueError, match="needs at least 99 gold rows; there are 30 "):
        fit_group_conformal(dataset.add_column("kind", [1] * 30), labels, column="kind", alpha=0.01)
    short = SoftLabels.from_dataset(dataset, labels).top(1).add_to(dataset)
    with pytest.raises(ValueError, match=r"alpha=0.1 is unreachable: only \d+ of 30 gold rows"):
        fit_class_conformal(short, labels)
    fitted = fit_class_conformal(dataset, labels)
    with pytest.raises(ValueError, match=r"fitted in label space .*; fit them again"):
        predict_group_sets(counted([10] * 4), space(4), fitted)


def test_no_rows_give_no_sets() -> None:
    dataset = counted([10, 10, 10])
    fitted = fit_class_conformal(dataset, space(3))
    assert predict_group_sets(dataset.select([]), space(3), fitted)["set_ids"][:] == []
