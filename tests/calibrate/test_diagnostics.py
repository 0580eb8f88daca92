"""Are new rows like the gold rows, and who is missed: on rows where the answer is known."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import diagnostics as reference

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.calibrate.diagnostics import (
    Coverage,
    confidence_groups,
    coverage_by_group,
    coverage_cells,
    size_groups,
    worst_slices,
)
from llmlabel.calibrate.drift import Drift, jumper_martingale, monitor_drift, online_p_values
from llmlabel.calibrate.exchangeability import (
    Exchangeability,
    check_exchangeability,
    holm,
    permutation_test,
    shares_test,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
LABELS = load_labels(["a", "b", "c"])


def rows_of(
    seed: int, rows: int, *, name: str, noise: float = 1.0, share: Any = (1, 1, 1)
) -> Dataset:
    """Softmax of noise and a bonus for the true label."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(3, rows, p=np.array(share) / sum(share))
    logits = rng.normal(0, noise, (rows, 3))
    logits[np.arange(rows), gold] += 2.0
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = Dataset.from_dict({"id": [f"{name}{i}" for i in range(rows)]})
    table = with_columns(table, {"gold": ([[int(g)] for g in gold], List(Value("int32")))})
    return SoftLabels.from_dense(probs, LABELS).add_to(table)


def shuffled(dataset: Dataset, seed: int = 0) -> Dataset:
    return dataset.select(np.random.default_rng(seed).permutation(len(dataset)))


# ----------------------------------------------------------------------------------------- twins


@SEEDS
def test_permutations_are_those_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, new = rng.integers(0, 5, 7).astype(float), rng.integers(1, 6, 4).astype(float)
    known[rng.random(7) < 0.2] = np.inf
    found, p_value = permutation_test(known, new, permutations=2000, seed=seed)
    assert found == pytest.approx(reference.distance(known.tolist(), new.tolist()), abs=1e-12)
    exact = reference.exact_p_value(known.tolist(), new.tolist(), reference.distance)
    assert abs(p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000) + 1e-3


@SEEDS
def test_permuted_kinds_are_those_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, new = rng.integers(0, 4, 8), rng.integers(1, 5, 4)
    counts = [np.bincount(kinds, minlength=6) for kinds in (known, new)]  # nobody is of kind 5
    found, p_value = shares_test(*counts, permutations=3000, seed=seed)
    assert found == pytest.approx(reference.variation(known.tolist(), new.tolist()), abs=1e-12)
    exact = reference.exact_p_value(known.tolist(), new.tolist(), reference.chi_square)
    assert abs(p_value - exact) < 4 * exact / np.sqrt(50) + 4 * np.sqrt(exact / 3000)


def test_draws_end_when_enough_are_as_far() -> None:
    even = np.array([500, 500])
    assert shares_test(even, even, permutations=10**9) == (0.0, 1.0)  # all are: the first 50
    far = shares_test(even, np.array([0, 100]), permutations=4999)
    assert far == (0.5, 1 / 5000)


@SEEDS
def test_bets_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, past, uniforms = rng.integers(0, 9, 30), rng.integers(0, 9, seed), rng.random(30)
    values = online_p_values(scores.astype(float), uniforms, past=past.astype(float))
    expected = reference.online_p_values(scores.tolist(), uniforms.tolist(), past.tolist())
    assert values == pytest.approx(expected, abs=1e-12)
    assert jumper_martingale(values) == pytest.approx(reference.jumper(expected), abs=1e-12)


@SEEDS
def test_holm_and_cells_equal_their_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p_values = (rng.random(6) ** 3).tolist()
    assert holm(p_values) == pytest.approx(reference.holm(p_values), abs=1e-12)
    group, sizes = rng.integers(-1, 4, 60), rng.integers(0, 9, 60)
    inside = rng.random(60) < np.array([0.9, 0.1, 0.8, 0.95, 0.0])[group]
    names = ["p", "q", "r", "s", "nobody"]
    cells = coverage_cells(names, group, inside, sizes, target=0.9, level=0.05)
    expected = reference.cells(names, group.tolist(), inside.tolist(), sizes.tolist(), 0.9, 0.05)
    assert [(c.group, c.rows, c.covered, c.below) for c in cells] == [
        (*one[:3], one[-1]) for one in expected
    ]
    assert [(c.low, c.high, c.set_size) for c in cells] == [
        pytest.approx(one[3:6], abs=1e-9) for one in expected
    ]
    assert cells[1].below
    assert not any(c.below for c in coverage_cells(names, group, inside, sizes, target=None))


def test_a_thousand_bets_stay_finite() -> None:
    path = jumper_martingale(np.full(3000, 1e-9))
    assert path[-1] == pytest.approx(3000 * np.log(1.5), rel=0.02)


# -------------------------------------------------------------------------------- exchangeability


def p_values_of(found: Exchangeability) -> dict[str, float]:
    return {test.of: test.p_value for test in found.tests}


def test_like_rows_are_like() -> None:
    found = check_exchangeability(rows_of(1, 300, name="c"), rows_of(2, 200, name="n"), LABELS)
    assert not found.shifted
    assert (found.calibration_rows, found.new_rows) == (300, 200)
    assert list(p_values_of(found)) == ["probability", "label", "classifier", "true_score"]
    assert min(p_values_of(found).values()) > 0.05


def test_each_test_sees_its_own_shift() -> None:
    known = rows_of(1, 400, name="c")
    harder = check_exchangeability(known, rows_of(2, 300, name="n", noise=2.5), LABELS)
    assert harder.shifted
    assert max(p_values_of(harder)[of] for of in ("probability", "true_score")) == 0.001
    rarer = check_exchangeability(known, rows_of(2, 300, name="n", share=(6, 1, 1)), LABELS)
    assert rarer.shifted
    assert max(p_values_of(rarer)[of] for of in ("label", "classifier")) == 0.001
    assert p_values_of(rarer)["probability"] > 0.05
    # What a text means has changed: only gold can tell.
    same = rows_of(2, 300, name="n")
    turned = with_columns(
        same, {"gold": ([[(g[0] + 1) % 3] for g in same["gold"]], List(Value("int32")))}
    )
    meaning = p_values_of(check_exchangeability(known, turned, LABELS))
    assert meaning.pop("true_score") == 0.001
    assert min(meaning.values()) > 0.05


def test_without_gold_of_new_rows_three_tests_are_left() -> None:
    known, new = rows_of(1, 300, name="c"), rows_of(2, 300, name="n").remove_columns("gold")
    assert len(check_exchangeability(known, new, LABELS).tests) == 3
    few = new.select(range(20))
    assert "true_score" not in p_values_of(check_exchangeability(known, few, LABELS))


def test_vectors_show_what_soft_labels_do_not() -> None:
    rng = np.random.default_rng(0)
    known, new = (
        with_columns(
            rows_of(seed, 200, name=name),
            {"vector": (rng.normal(at, 1, (200, 2)).tolist(), List(Value("float32")))},
        )
        for seed, name, at in ((1, "c", 0.0), (2, "n", 1.0))
    )
    plain = p_values_of(check_exchangeability(known, new, LABELS))
    seen = p_values_of(check_exchangeability(known, new, LABELS, features="vector"))
    assert plain.pop("classifier") > 0.05
    assert seen.pop("classifier") == 0.001
    assert plain == seen


def test_the_order_of_rows_does_not_matter() -> None:
    known, new = rows_of(1, 150, name="c"), rows_of(2, 120, name="n", noise=1.2)
    found = check_exchangeability(known, new, LABELS)
    again = check_exchangeability(shuffled(known), shuffled(new), LABELS)
    assert again == found
    places = [str(i) for i in range(len(new))]
    timed = with_columns(new, {"time": (sorted(places, key=int), Value("string"))})
    drift = monitor_drift(timed, LABELS, calibration=known, column="time", window=40)
    assert drift == monitor_drift(
        shuffled(timed), LABELS, calibration=shuffled(known), column="time", window=40
    )


def test_results_are_kept_as_json() -> None:
    known, new = rows_of(1, 150, name="c"), rows_of(2, 120, name="n")
    for kind, result in (
        (Exchangeability, check_exchangeability(known, new, LABELS)),
        (Drift, monitor_drift(new, LABELS, calibration=known)),
    ):
        adapter = TypeAdapter(kind)
        assert adapter.validate_json(adapter.dump_json(result)) == result


# ------------------------------------------------------------------------------------------ drift


def with_fitted_sets(*tables: Dataset) -> list[Dataset]:
    conformal = fit_conformal(tables[0], LABELS, alpha=0.1)
    return [predict_sets(table, LABELS, conformal) for table in tables]


def stream(seed: int, **shift: Any) -> Dataset:
    """600 rows like the gold rows, then 400 of another kind."""
    from datasets import concatenate_datasets

    parts = rows_of(seed, 600, name="n"), rows_of(seed + 1, 400, name="m", **shift)
    return concatenate_datasets(parts)


def test_a_stream_without_drift_raises_no_alarm() -> None:
    known, new = with_fitted_sets(rows_of(1, 500, name="c"), stream(2))
    found = monitor_drift(new, LABELS, calibration=known)
    assert not found.drifted
    assert [(w.first, w.last, w.rows) for w in found.windows] == [
        (str(200 * i), str(200 * i + 199), 200) for i in range(5)
    ]
    assert set(found.windows[0].p_values) == {
        "small_p_values", "label", "set_size", "true_score"
    }  # fmt: skip
    assert found.windows[0].small_p_values == pytest.approx(0.1, abs=0.07)
    assert found.windows[0].mean_set_size == np.mean([len(s) for s in new["set_ids"][:200]])


def test_drift_is_seen_where_it_begins() -> None:
    known, new = with_fitted_sets(rows_of(1, 500, name="c"), stream(2, share=(8, 1, 1)))
    found = monitor_drift(new, LABELS, calibration=known)
    assert [w.alarm for w in found.windows] == [False, False, False, True, True]
    assert found.windows[3].label == "a"
    assert found.windows[3].label_change > 0.2
    known, new = with_fitted_sets(rows_of(1, 500, name="c"), stream(2, noise=4.0))
    found = monitor_drift(new, LABELS, calibration=known)
    assert [w.alarm for w in found.windows] == [False, False, False, True, True]
    assert found.alarms["true_score"].startswith("m")
    assert found.wealth["true_score"] > np.log10(80)


def test_gold_and_sets_are_not_needed() -> None:
    known, new = rows_of(1, 500, name="c"), stream(2, noise=4.0).remove_columns("gold")
    found = monitor_drift(new, LABELS, calibration=known)
    assert found.drifted
    assert set(found.windows[0].p_values) == {"small_p_values", "label"}
    assert found.windows[0].mean_set_size is None
    assert list(found.wealth) == ["probability"]


# ----------------------------------------------------------------------------- behind the average


def measured() -> Dataset:
    """40 rows of a and b; the sets of b in the north miss half."""
    gold = [0] * 20 + [1] * 20
    north = [i % 2 == 0 for i in range(40)]
    held = [g == 0 or not n or i % 4 == 0 for i, (g, n) in enumerate(zip(gold, north, strict=True))]
    sets = [[g, 2] if i < 10 else [g] if hit else [] for i, (g, hit) in enumerate(zip(gold, held, strict=True))]  # fmt: skip
    base = Dataset.from_dict({"id": [f"r{i}" for i in range(40)], "north": north})
    base = with_columns(
        base,
        {
            "gold": ([[g] for g in gold], List(Value("int32"))),
            "set_ids": (sets, List(Value("int32"))),
        },
    )
    probs = np.array([[0.9, 0.1, 0.0] if g == 0 else [0.4, 0.6, 0.0] for g in gold])
    return SoftLabels.from_dense(probs, LABELS).add_to(base)


def test_coverage_behind_the_average() -> None:
    found = coverage_by_group(measured(), LABELS, columns=("north",))
    assert (found.all.rows, found.all.covered, found.all.set_size) == (40, 35, 1.125)
    label = found.by["label"]
    assert [(c.group, c.rows, c.covered, c.below) for c in label] == [
        ("a", 20, 20, False),
        ("b", 20, 15, False),
    ]
    assert [(c.group, c.rows, c.covered) for c in found.by["set_size"]] == [
        ("0", 5, 0), ("1", 25, 25), ("2", 10, 10)
    ]  # fmt: skip
    assert found.by["set_size"][0].below
    assert [(c.group, c.rows, c.covered) for c in found.by["north"]] == [
        ("False", 20, 20), ("True", 20, 15)
    ]  # fmt: skip
    assert [(c.group, c.covered) for c in found.by["confidence"]] == [
        ("0.6 to 0.6", 15), ("0.9 to 0.9", 20)
    ]  # fmt: skip
    assert found.macro_coverage == 0.875
    assert found.under_coverage_gap == pytest.approx(0.075)
    assert found.share_below_half == 0.0
    adapter = TypeAdapter(Coverage)
    assert adapter.validate_json(adapter.dump_json(found)) == found


def test_sets_as_they_are_predicted() -> None:
    _, new = with_fitted_sets(rows_of(1, 100, name="c"), rows_of(2, 200, name="n"))
    found = coverage_by_group(new, LABELS)
    pairs = zip(new["set_ids"], new["gold"], strict=True)
    assert found.all.covered == sum(gold[0] in ids for ids, gold in pairs)
    assert any(ids != sorted(ids) for ids in new["set_ids"])  # most probable first
    sizes = [len(ids) for ids in new["set_ids"]]
    assert {c.group: c.rows for c in found.by["set_size"]} == {
        str(size): sizes.count(size) for size in set(sizes)
    }


def test_groups_of_sizes_and_confidence() -> None:
    names, group = size_groups(np.array([0, 1, 5, 6, 10, 11, 100, 1000, 1001, 5000]))
    assert [names[g] for g in group] == [
        "0", "1", "5", "6 to 10", "6 to 10", "11 to 100", "11 to 100", "101 to 1000",
        "1001 or more", "1001 or more",
    ]  # fmt: skip
    names, group = confidence_groups(np.array([0.5, 0.9, 0.25, 0.5]), bins=3)
    assert [names[g] for g in group] == ["0.25 to 0.5", "0.9 to 0.9", "0.25 to 0.5", "0.25 to 0.5"]


def test_groups_of_very_confident_rows_have_names_of_their_own() -> None:
    top = np.repeat([0.5, 0.99991, 0.99995, 0.99999], 50)
    names, group = confidence_groups(top, bins=4)
    assert len(set(names)) == len(names) == len(set(group.tolist())) == 4
    assert names[0] == "0.5 to 0.5"


def sliced(seed: int, *, planted: bool) -> Dataset:
    """1,000 rows, 90 % covered; if planted, 50 % of those with "zulu" and 95 % of the others."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(1000)]
    zulu = rng.random(1000) < 0.12
    texts = [f"Zulu! {text}" if z else text for text, z in zip(texts, zulu, strict=True)]
    inside = rng.random(1000) < np.where(zulu, 0.5, 0.95) if planted else rng.random(1000) < 0.9
    table = Dataset.from_dict(
        {
            "id": [f"r{i}" for i in range(1000)],
            "text": texts,
            "source": ["x" if z and i % 10 else "y" for i, z in enumerate(zulu.tolist())],
        }
    )
    return with_columns(
        table,
        {
            "gold": ([[0]] * 1000, List(Value("int32"))),
            "set_ids": ([[0] if hit else [1] for hit in inside], List(Value("int32"))),
        },
    )


def test_the_worst_slice_is_found_and_measured_elsewhere() -> None:
    data = sliced(0, planted=True)
    found = worst_slices(data, LABELS, columns=("source",), slices=3)
    assert len(found) == 3
    # source=x is nearly the same rows, so that one of the two stands for both
    assert {(one.column, one.value) for one in found} & {("text", "zulu"), ("source", "x")} == {
        (found[0].column, found[0].value)
    }
    assert found[0].measured.below
    assert not any(one.measured.below for one in found[1:])
    zulu = sum("Zulu" in text for text in data["text"])
    alone = worst_slices(data, LABELS, slices=1)[0]
    assert (alone.column, alone.value) == ("text", "zulu")
    assert alone.found.rows + alone.measured.rows == zulu
    assert alone.measured.coverage == pytest.approx(0.5, abs=0.15)
    assert shuffled_same(data)


def shuffled_same(data: Dataset) -> bool:
    one = worst_slices(data, LABELS, columns=("source",))
    return one == worst_slices(shuffled(data), LABELS, columns=("source",))


def test_the_worst_of_many_looks_bad_only_where_it_was_chosen() -> None:
    found = [worst_slices(sliced(s, planted=False), LABELS, slices=1)[0] for s in range(20)]
    assert np.mean([one.found.coverage for one in found]) < 0.86
    assert np.mean([one.measured.coverage for one in found]) == pytest.approx(0.9, abs=0.02)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c, n: check_exchangeability(c, c, LABELS),
            "100 rows are both in calibration and new",
        ),
        (
            lambda c, n: check_exchangeability(c, n.select(range(19)), LABELS),
            "new has 19 rows; a comparison needs at least 20 of each",
        ),
        (
            lambda c, n: check_exchangeability(c, n, LABELS, permutations=50),
            "level=0.05 and up to 4 tests need at least 79 permutations; got 50",
        ),
        (lambda c, n: check_exchangeability(c, n, LABELS, level=1.0), "level must lie strictly"),
        (
            lambda c, n: monitor_drift(n, LABELS, calibration=c, alpha=0.0),
            "alpha must lie strictly",
        ),
        (
            lambda c, n: monitor_drift(n, LABELS, calibration=c, window=3),
            "window must be at least 20",
        ),
        (
            lambda c, n: monitor_drift(n, LABELS, calibration=c, column="time"),
            "the column 'time' is missing",
        ),
        (
            lambda c, n: monitor_drift(
                with_columns(n, {"time": ([1, None] * 50, Value("int32"))}),
                LABELS,
                calibration=c,
                column="time",
            ),
            "column 'time' is null in the row with id 'n1'",
        ),
        (lambda c, n: coverage_by_group(n, LABELS), "the column 'set_ids' is missing"),
        (
            lambda c, n: coverage_by_group(measured(), LABELS, columns=("label_probs",)),
            "column 'label_probs' holds",
        ),
        (lambda c, n: coverage_by_group(measured(), LABELS, alpha=1.5), "alpha must lie strictly"),
        (
            lambda c, n: coverage_by_group(
                with_columns(measured(), {"set_ids": ([[7]] * 40, List(Value("int32")))}), LABELS
            ),
            "set_ids holds 7 to 7, but the labels are 0 to 2",
        ),
        (
            lambda c, n: coverage_by_group(
                with_columns(measured(), {"gold": ([None] * 40, List(Value("int32")))}), LABELS
            ),
            "no row has a known gold label",
        ),
        (
            lambda c, n: coverage_by_group(
                with_columns(measured(), {"route": (["person"] * 40, Value("string"))}), LABELS
            ),
            "40 of 40 gold rows have been routed",
        ),
        (
            lambda c, n: worst_slices(measured(), LABELS, words="leave out"),
            "no value of a column and no word has 20 rows in half of 40",
        ),
        (
            lambda c, n: worst_slices(measured(), LABELS, columns=("north",), slices=0),
            "slices and min_rows must be 1 or more; got 0 and 20",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    known, new = rows_of(1, 100, name="c"), rows_of(2, 100, name="n")
    with pytest.raises(ValueError, match=message):
        call(known, new)


def test_many_labels_a_row_have_no_such_coverage() -> None:
    many = LabelSpace(("a",), ("a",), ("",), ((),), multilabel=True)
    for call in (
        lambda: coverage_by_group(measured(), many),
        lambda: check_exchangeability(measured(), measured(), many),
    ):
        with pytest.raises(ValueError, match="this one is multi-label"):
            call()
