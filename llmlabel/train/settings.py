"""How models are trained: the settings of every trainer, their defaults, and what follows from them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from numbers import Real
from typing import Any, Literal, TypedDict, get_args

import torch

from llmlabel import models
from llmlabel.train.network import PAPER_LORA, LoRA, Pooling

Schedule = Literal["linear", "cosine", "constant"]
NumberFormat = Literal["auto", "float32", "bfloat16"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow"]

NO_RESULT = ("report_to", "logging_steps", "save_steps")
"""Settings that change nothing in the result."""


class Training(TypedDict, total=False):
    """How a model is trained, under the names of `transformers.TrainingArguments`."""

    num_train_epochs: int
    """Passes over the rows."""
    max_steps: int
    """Updates at most, -1 for no limit; the learning rate falls to 0 until the last one."""
    learning_rate: float
    """Of the adapters or the prompt."""
    head_learning_rate: float | None
    """Of the head; five times `learning_rate` where it is null."""
    lr_scheduler_type: Schedule
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float
    """Share of the updates in which the learning rate rises."""
    weight_decay: float
    """Of AdamW."""
    max_grad_norm: float | None
    """Longer gradients are cut to this length; null cuts none."""
    per_device_train_batch_size: int
    """Rows that a process adds to an update before it accumulates."""
    gradient_accumulation_steps: int
    """How often it does."""
    pass_tokens: int
    """Padded tokens computed at a time, unless a single row has more; saves memory only."""
    max_length: int
    """Tokens per text; longer ones are cut."""
    dtype: NumberFormat
    """Number format of the computation; the weights that are trained stay float32."""
    gradient_checkpointing: bool
    """Computes the backbone twice and keeps less of it in memory."""
    early_stopping_patience: int | None
    """Epochs without a better validation loss until the training stops; null never stops it."""
    save_steps: int | None
    """Updates between two checkpoints; about a minute's where it is null."""
    logging_steps: int
    """Updates between two lines of the tracker."""
    report_to: Tracker
    """Who keeps the curve of the loss; `tensorboard` writes into `logs` in the model's folder."""
    seed: int
    """Of row order, initial weights and dropout."""


class StudentTraining(Training, total=False):
    """How a backbone with adapters and a head is trained."""

    pooling: Pooling
    """`last` for decoders (LS-LLaMA), `mean` for sentence encoders."""
    bidirectional: bool
    """Lets every token of a decoder see all others (LS-unLLaMA)."""
    bidirectional_from: int
    """The first layer, from 0, in which it does."""
    lora: LoRA
    """Adapter settings."""
    load_in_4bit: bool
    """Keeps the backbone's weights in 4 bits (QLoRA); on a GPU, with bitsandbytes."""


_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 2,
    "max_steps": -1,
    "learning_rate": 1e-4,
    "head_learning_rate": None,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": None,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "pass_tokens": 16_384,
    "max_length": 256,
    "dtype": "auto",
    "gradient_checkpointing": False,
    "early_stopping_patience": None,
    "save_steps": None,
    "logging_steps": 10,
    "report_to": "none",
    "seed": 0,
}


_WHOLE = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "pass_tokens",
    "max_length",
    "early_stopping_patience",
    "save_steps",
    "logging_steps",
    "seed",
)
"""Settings that count something."""

_RATES = ("learning_rate", "head_learning_rate", "weight_decay", "warmup_ratio", "max_grad_norm")

_NULL = tuple(name for name, value in _DEFAULTS.items() if value is None)
"""Settings that may be null."""

EARLY = "early.parquet"
"""What the network said of the training rows in the early epochs, where that is remembered."""


@dataclass(frozen=True)
class EarlyLearning:
    """Early-learning regularization (ELR, arXiv 2007.00151); see `llmlabel.loss.robust`."""

    penalty_weight: float = 3.0
    """Lambda; 0 remembers what the network said and changes nothing."""
    beta: float = 0.7
    """Share of the past in what is remembered."""
    top_k: int | None = None
    """Labels remembered of each row; null remembers all."""


@dataclass(frozen=True)
class LongTail:
    """COMIC (arXiv 2304.10539) for few frequent labels, not all given; see `llmlabel.loss.longtail`."""

    gamma_pos: float = 0.0
    """Exponent of positives."""
    gamma_neg: float = 3.0
    """Exponent of negatives; the larger, the less easy ones count."""
    head_tail_pos: float = 0.0
    """What a rare label adds to `gamma_pos`."""
    head_tail_neg: float = 1.0
    """What a rare label adds to `gamma_neg`."""
    clip: float = 0.05
    """A negative below this probability counts nothing."""
    tau: float | None = 0.7
    """Lowest probability of a label that is added where none is stored; null adds none."""
    start_epoch: int = 1
    """Epochs before labels are added."""
    correction_weight: float = 1.0
    """What the loss on corrected labels counts."""


def settle_student(training: StudentTraining) -> dict[str, Any]:
    """All settings of a student, checked; see `settle`."""
    settings = settle(
        training,
        pooling="last",
        bidirectional=False,
        bidirectional_from=0,
        lora=PAPER_LORA,
        load_in_4bit=False,
    )
    if settings["pooling"] not in get_args(Pooling):
        raise ValueError(
            f"pooling is one of {', '.join(get_args(Pooling))}; got {settings['pooling']!r}"
        )
    if settings["bidirectional_from"] and not settings["bidirectional"]:
        raise ValueError(
            f"bidirectional_from={settings['bidirectional_from']} has no meaning without "
            "bidirectional=true; give both or none"
        )
    return settings | {"lora": asdict(settings["lora"])}


def settle(training: Training, **defaults: Any) -> dict[str, Any]:
    """All settings, checked; `defaults` are a trainer's own, beside those of all or instead.

    Raises:
        ValueError: a name that is none, or a value with which nothing can be trained.
    """
    settings: dict[str, Any] = {**_DEFAULTS, **defaults}
    if unknown := [name for name in training if name not in settings]:
        raise ValueError(f"there is no setting {unknown[0]!r}; there are {', '.join(settings)}")
    settings |= training
    settings |= checked_numbers(settings, whole=_WHOLE, others=_RATES, null=_NULL)
    if settings["head_learning_rate"] is None:
        settings["head_learning_rate"] = 5 * settings["learning_rate"]
    for name in (
        *("num_train_epochs", "learning_rate", "head_learning_rate", "max_length", "logging_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "pass_tokens"),
        *("max_grad_norm", "early_stopping_patience", "save_steps"),
    ):
        if settings[name] is not None and not 0 < settings[name] < float("inf"):
            raise ValueError(f"{name} must be above 0; got {settings[name]}")
    for name, most in (("weight_decay", 1), ("warmup_ratio", 1), ("seed", 2**63 - 1)):
        if not 0 <= settings[name] <= most:
            raise ValueError(f"{name} must be between 0 and {most}; got {settings[name]}")
    for name, kind in (
        ("lr_scheduler_type", Schedule),
        ("dtype", NumberFormat),
        ("report_to", Tracker),
    ):
        if settings[name] not in get_args(kind):
            raise ValueError(
                f"{name} is one of {', '.join(get_args(kind))}; got {settings[name]!r}"
            )
    _check_tracker(settings["report_to"])
    if settings["max_steps"] == 0 or settings["max_steps"] < -1:
        raise ValueError(f"max_steps must be above 0, or -1; got {settings['max_steps']}")
    return settings


def checked_numbers(
    settings: dict[str, Any],
    *,
    whole: Sequence[str],
    others: Sequence[str],
    null: Sequence[str] = (),
) -> dict[str, Any]:
    """These settings as numbers of Python.

    Raises:
        ValueError: one is no number, or a fraction where something is counted.
    """
    found: dict[str, Any] = {}
    for name in (*whole, *others):
        value, counts = settings[name], name in whole
        if value is None and name in null:
            found[name] = None
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or (counts and value % 1 != 0):
            raise ValueError(f"{name} must be a {'whole ' * counts}number; got {value!r}")
        found[name] = int(value) if counts else float(value)  # 2.0 is the habit of transformers
    return found


def _check_tracker(name: str) -> None:
    """Accelerate says nothing where a tracker is not installed, and keeps no curve."""
    if name != "none" and find_spec(name) is None:
        raise ValueError(
            f"report_to={name}: the package {name} is missing; install it or leave report_to out"
        )


def learning_rate_factor(update: int, steps: int, settings: dict[str, Any]) -> float:
    """Of update 0 ... steps - 1: rises linearly to 1 and falls as `lr_scheduler_type` says."""
    rise = max(1, round(settings["warmup_ratio"] * steps))
    if update + 1 <= rise:
        return (update + 1) / rise
    left = (steps - update) / max(1, steps - rise)
    return {
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "constant": 1.0,
    }[settings["lr_scheduler_type"]]


def number_format(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is never float16, whose gradients vanish without a loss scale."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    best = models.best_dtype(device)
    return best if best == torch.bfloat16 else torch.float32
