"""Which settings can be trained with."""

import inspect
from typing import Any

import numpy as np
import pytest

from llmlabel.train import settings as settings_module
from llmlabel.train.settings import learning_rate_factor, settle, settle_student

ROWS, LABELS, WIDTH = 30, 3, 6


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_and_falls(kind: str) -> None:
    given = {"warmup_ratio": 0.2, "lr_scheduler_type": kind}
    factors = [learning_rate_factor(update, 10, given) for update in range(10)]
    assert factors[:2] == [0.5, 1.0]
    left = [(10 - update) / 8 for update in range(2, 10)]
    expected = {
        "linear": left,
        "cosine": [(1 - np.cos(np.pi * value)) / 2 for value in left],
        "constant": [1.0] * 8,
    }[kind]
    np.testing.assert_allclose(factors[2:], expected)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="there is no setting 'learning_rat'"):
        settle({"learning_rat": 1.0})
    with pytest.raises(
        ValueError, match="lr_scheduler_type is one of linear, cosine, constant; got"
    ):
        settle({"lr_scheduler_type": "step"})
    for name in ("pass_tokens", "max_grad_norm", "early_stopping_patience", "save_steps"):
        with pytest.raises(ValueError, match=f"{name} must be above 0; got 0"):
            settle({name: 0})
    with pytest.raises(ValueError, match="max_steps must be above 0, or -1; got -2"):
        settle({"max_steps": -2})
    assert settle({"learning_rate": 0.1})["head_learning_rate"] == 0.5
    with pytest.raises(ValueError, match="pooling is one of last, mean, max; got 'avg'"):
        settle_student({"pooling": "avg"})
    with pytest.raises(ValueError, match="bidirectional_from=2 has no meaning without bidir"):
        settle_student({"bidirectional_from": 2})
    assert settle_student({"bidirectional_from": 2, "bidirectional": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": 2.5}, "max_steps must be a whole number; got 2.5"),
        ({"num_train_epochs": 1.5}, "num_train_epochs must be a whole number; got 1.5"),
        ({"num_train_epochs": float("inf")}, "num_train_epochs must be a whole number; got inf"),
        ({"num_train_epochs": None}, "num_train_epochs must be a whole number; got None"),
        ({"seed": 1.5}, "seed must be a whole number; got 1.5"),
        ({"seed": True}, "seed must be a whole number; got True"),
        ({"seed": -1}, "seed must be between 0 and 9223372036854775807; got -1"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number; got '1e-4'"),
        ({"learning_rate": None}, "learning_rate must be a number; got None"),
        ({"weight_decay": float("nan")}, "weight_decay must be between 0 and 1; got nan"),
    ],
)
def test_settings_are_numbers(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        inspect.unwrap(settle)(given)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_whole_floats_are_taken_as_they_are_meant() -> None:
    given: Any = {
        "max_steps": 2.0,
        "seed": np.int64(3),
        "learning_rate": np.float32(0.5),
        "save_steps": None,
        "max_grad_norm": None,
    }
    found = inspect.unwrap(settle)(given)
    assert {name: found[name] for name in given} == {
        **{"max_steps": 2, "seed": 3, "learning_rate": 0.5},
        **{"save_steps": None, "max_grad_norm": None},
    }
    assert [type(found[name]) for name in ("max_steps", "seed", "learning_rate")] == [
        *(int, int, float)
    ]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to=wandb: the package wandb is missing; install"):
        settle({"report_to": "wandb"})
    assert settle({})["report_to"] == "none"
