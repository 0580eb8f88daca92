"""Are new rows like the gold rows: on rows where the answer is known."""

from typing import Any

import numpy as np
import pytest
from calibrate.shifts import LABELS, SEEDS, rows_of, shuffled
from datasets import List, Value
from pydantic import TypeAdapter
from reference import diagnostics as reference

from llmlabel.calibrate.drift import Drift, monitor_drift
from llmlabel.calibrate.exchangeability import (
    Exchangeability,
    check_exchangeability,
    permutation_test,
    shares_test,
)
from llmlabel.data import with_columns

# -------------------------------------------------------------------------------------------- twins


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


# ----------------------------------------------------------------------------- like and unlike rows


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


# ---------------------------------------------------------------------------------------- bad input


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
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    known, new = rows_of(1, 100, name="c"), rows_of(2, 100, name="n")
    with pytest.raises(ValueError, match=message):
        call(known, new)
