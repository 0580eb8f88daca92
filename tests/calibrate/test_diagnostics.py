"""Who is missed: on rows where the answer is known."""

from typing import Any

import numpy as np
import pytest
from calibrate.shifts import LABELS, SEEDS, rows_of, shuffled, with_fitted_sets
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import diagnostics as reference

from llmlabel.calibrate.diagnostics import (
    Coverage,
    confidence_groups,
    coverage_by_group,
    coverage_cells,
    size_groups,
    worst_slices,
)
from llmlabel.calibrate.exchangeability import (
    check_exchangeability,
    holm,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


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


# ------------------------------------------------------------------------------- behind the average


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


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
