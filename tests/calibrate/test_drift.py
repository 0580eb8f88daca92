"""When do new rows stop being like the gold rows: on streams where the answer is known."""

from typing import Any

import numpy as np
import pytest
from calibrate.shifts import LABELS, SEEDS, rows_of, with_fitted_sets
from datasets import Dataset, Value
from reference import diagnostics as reference

from llmlabel.calibrate.drift import jumper_martingale, monitor_drift, online_p_values
from llmlabel.data import with_columns

# -------------------------------------------------------------------------------------------- twins


@SEEDS
def test_bets_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, past, uniforms = rng.integers(0, 9, 30), rng.integers(0, 9, seed), rng.random(30)
    values = online_p_values(scores.astype(float), uniforms, past=past.astype(float))
    expected = reference.online_p_values(scores.tolist(), uniforms.tolist(), past.tolist())
    assert values == pytest.approx(expected, abs=1e-12)
    assert jumper_martingale(values) == pytest.approx(reference.jumper(expected), abs=1e-12)


def test_a_thousand_bets_stay_finite() -> None:
    path = jumper_martingale(np.full(3000, 1e-9))
    assert path[-1] == pytest.approx(3000 * np.log(1.5), rel=0.02)


# ------------------------------------------------------------------------------------------ streams


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


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    known, new = rows_of(1, 100, name="c"), rows_of(2, 100, name="n")
    with pytest.raises(ValueError, match=message):
        call(known, new)
