"""How a dual encoder is trained: its settings beside those of all trainers, and what they exclude."""

from typing import Any, get_args

from llmlabel.loss.retrieval import RetrievalLoss
from llmlabel.train.dual_step import Positives
from llmlabel.train.label_pool import Negatives
from llmlabel.train.settings import Training, checked_numbers, settle


class DualTraining(Training, total=False):
    """How a dual encoder is trained, beside what all trainers have."""

    loss: RetrievalLoss
    """See `llmlabel.loss.retrieval.retrieval_loss`."""
    temperature: float
    """What cosines are divided by."""
    top_k: int
    """K of the loss `soft_topk`."""
    positives: Positives
    """`sampled` takes one label of a row in an update, by relevance; the others are left out."""
    negatives: Negatives
    """`all` encodes every label in every update; `cached` compares with all, but encodes few; `ann`
    compares with near ones; `inbatch` with the labels of the update's other rows."""
    refresh: float | None
    """`cached`, `ann`: share of all labels that an update encodes in turn; a hundredth, but at least
    256 labels, where it is null. In `cached` they stand for all that are not encoded."""
    hard_labels: int
    """`cached`, `ann`: labels that an update encodes because they are hard to tell from its rows'."""
    gradient_filter: float
    """`cached`: a hard label whose shares among the rows' negatives sum to less is not encoded."""


def settle_dual(training: DualTraining, labels: int) -> dict[str, Any]:
    """All settings of a dual encoder of so many labels, checked; see `llmlabel.train.settings.settle`."""
    if "head_learning_rate" in training:
        raise ValueError("head_learning_rate: a dual encoder has no head; leave it out")
    if training.get("gradient_checkpointing"):
        raise ValueError(
            "gradient_checkpointing: a dual encoder has its gradient cache instead; lower pass_tokens"
        )
    settings = settle(
        training,
        loss="decoupled_softmax",
        temperature=0.05,
        top_k=5,
        positives="all",
        negatives="cached",
        refresh=None,
        hard_labels=256,
        gradient_filter=0.0,
        num_train_epochs=10,
        learning_rate=5e-5,
        per_device_train_batch_size=128,
        max_length=64,
    )
    if settings["refresh"] is None:
        settings["refresh"] = min(1.0, max(0.01, 256 / labels))
    settings |= checked_numbers(
        settings,
        whole=("top_k", "hard_labels"),
        others=("temperature", "refresh", "gradient_filter"),
    )
    for name, kind in (
        ("loss", RetrievalLoss),
        ("positives", Positives),
        ("negatives", Negatives),
    ):
        if settings[name] not in get_args(kind):
            raise ValueError(
                f"{name} is one of {', '.join(get_args(kind))}; got {settings[name]!r}"
            )
    for name, low, high in (
        ("temperature", 1e-3, 100.0),
        ("top_k", 1, float("inf")),
        ("refresh", 0.0, 1.0),
        ("hard_labels", 0, float("inf")),
        ("gradient_filter", 0.0, float("inf")),
    ):
        if not low <= settings[name] <= high:
            raise ValueError(f"{name} must be between {low} and {high}; got {settings[name]}")
    _check_top_k(settings, labels)
    return settings


def _check_top_k(settings: dict[str, Any], labels: int) -> None:
    """Soft top-k needs more labels than it selects."""
    if settings["loss"] == "soft_topk":
        if settings["top_k"] >= labels:
            raise ValueError(
                f"top_k={settings['top_k']} must be below the number of labels, which is {labels}"
            )
        if settings["negatives"] == "inbatch":
            raise ValueError(
                "loss='soft_topk' needs more labels than top_k in every update, however few rows it "
                "has; give negatives='cached', 'all' or 'ann'"
            )
