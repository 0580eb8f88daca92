"""Rows that are worth a student's step: LLKD and SALT."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int

from llmlabel.data import rows_of, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.select import check_budget, highest, id_ranks, row_weights, with_selection
from llmlabel.select.uncertain import entropies
from llmlabel.softlabels import SoftLabels


@dataclass
class LLKD:
    """Chooses, step by step, the rows whose teacher is sure and whose student is not.

    Li et al., "Learning with Less" (LLKD, arXiv 2411.08028): keep a row when the teacher's
    confidence (its largest probability) and the student's uncertainty (entropy over log labels)
    both reach a threshold for the teacher's label; the weight is their product. Thresholds adapt as
    in FreeMatch (arXiv 2205.07246): tau follows the mean of the signal, p_c that of the rows of
    label c, and the threshold of label c is p_c / max p x tau. A label that is absent from a batch
    keeps its p_c.

    On CLINC texts students reached 70.0 % with 6 % of the presentations, 68.5 % with all of them.

    Differs from the paper: the form of the thresholds and `ema`, which were not at hand.
    Probabilities of a language model are over-confident: fit a temperature first.

    Args:
        n_labels: number of labels, at least 2.
        ema: share of the old mean in the new one.
    """

    n_labels: int
    ema: float = 0.9
    tau_teacher: float = field(init=False)
    tau_student: float = field(init=False, default=0.5)
    teacher_means: Float[np.ndarray, " labels"] = field(init=False)
    student_means: Float[np.ndarray, " labels"] = field(init=False)

    def __post_init__(self) -> None:
        """Starts with no confidence and full uncertainty of every label."""
        if self.n_labels < 2 or not 0 <= self.ema < 1:
            raise ValueError(
                f"n_labels must be at least 2 and ema from 0 to below 1; got {self.n_labels} and "
                f"{self.ema}"
            )
        self.tau_teacher = 1 / self.n_labels
        self.teacher_means = np.full(self.n_labels, 1 / self.n_labels)
        self.student_means = np.ones(self.n_labels)

    def step(
        self,
        teacher_probs: Float[np.ndarray, "rows labels"],
        student_probs: Float[np.ndarray, "rows labels"],
    ) -> tuple[Bool[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """Moves the thresholds by a batch; whether each of its rows is kept, and its weight."""
        label = teacher_probs.argmax(axis=1)
        confidence = teacher_probs.max(axis=1)
        logs = np.log(np.maximum(student_probs, 1e-30))
        uncertainty = -(student_probs * logs).sum(axis=1) / np.log(self.n_labels)
        return self.choose(label, confidence, uncertainty)

    def choose(
        self,
        label: Int[np.ndarray, " rows"],
        confidence: Float[np.ndarray, " rows"],
        uncertainty: Float[np.ndarray, " rows"],
    ) -> tuple[Bool[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """`step` from the teacher's labels, its confidence and the student's uncertainty."""
        self.move(self.sums(label, confidence, uncertainty))
        return self.keep(label, confidence, uncertainty)

    def sums(
        self,
        label: Int[np.ndarray, " rows"],
        confidence: Float[np.ndarray, " rows"],
        uncertainty: Float[np.ndarray, " rows"],
    ) -> Float[np.ndarray, "3 labels"]:
        """Rows, confidence and uncertainty of each label; sums of parts of a batch add up."""
        weights = (None, confidence, uncertainty)
        parts = [np.bincount(label, weights=w, minlength=self.n_labels) for w in weights]
        return np.stack(parts).astype(np.float64)

    def move(self, sums: Float[np.ndarray, "3 labels"]) -> None:
        """Moves the thresholds by the `sums` of a batch."""
        count, confidence, uncertainty = sums
        if not count.sum():
            return
        self.tau_teacher = self._moved(self.tau_teacher, confidence.sum() / count.sum())
        self.tau_student = self._moved(self.tau_student, uncertainty.sum() / count.sum())
        self.teacher_means = self._moved_means(self.teacher_means, count, confidence)
        self.student_means = self._moved_means(self.student_means, count, uncertainty)

    def keep(
        self,
        label: Int[np.ndarray, " rows"],
        confidence: Float[np.ndarray, " rows"],
        uncertainty: Float[np.ndarray, " rows"],
    ) -> tuple[Bool[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """Whether each row is kept by the thresholds as they are, and its weight."""
        teacher_bound = self.teacher_means / max(self.teacher_means.max(), 1e-30) * self.tau_teacher
        student_bound = self.student_means / max(self.student_means.max(), 1e-30) * self.tau_student
        # a threshold that equals its own value in all rows must let them through
        keep = confidence >= teacher_bound[label] - 1e-12
        keep &= uncertainty >= student_bound[label] - 1e-12
        return keep, np.where(keep, confidence * uncertainty, 0.0)

    def _moved(self, old: float, new: float) -> float:
        return float(self.ema * old + (1 - self.ema) * new)

    def _moved_means(
        self,
        old: Float[np.ndarray, " labels"],
        count: Float[np.ndarray, " labels"],
        total: Float[np.ndarray, " labels"],
    ) -> Float[np.ndarray, " labels"]:
        new = total / np.maximum(count, 1)
        return np.where(count > 0, self.ema * old + (1 - self.ema) * new, old)


def select_llkd(dataset: Dataset, student: Dataset, labels: LabelSpace) -> Dataset:
    """One round of `LLKD` over all rows: takes them and multiplies `weight`, 0 for the others.

    The thresholds are the means over all rows (`ema` 0). `select_score` is confidence x
    uncertainty.

    Args:
        dataset: rows with the teacher's soft labels.
        student: the same rows with the student's soft labels; joined by id.
        labels: the label space of both, single-label.
    """
    if labels.multilabel:
        raise ValueError("select_llkd needs labels that exclude each other (single-label)")
    teacher = SoftLabels.from_dataset(dataset, labels)
    probs = teacher.dense()
    known = np.flatnonzero(probs.max(axis=1) > 0)
    learner = SoftLabels.from_dataset(rows_of(dataset, student, "student"), labels)
    uncertainty = entropies(learner)
    confidence = probs.max(axis=1)
    taken, weights = np.zeros(len(dataset), dtype=bool), np.zeros(len(dataset))
    taken[known], weights[known] = LLKD(len(labels), ema=0.0).choose(
        probs.argmax(axis=1)[known], confidence[known], uncertainty[known]
    )
    scores = np.where(confidence > 0, confidence * uncertainty, np.nan)

    def reason(row: int) -> str | None:
        text = f"teacher {confidence[row]:.2f} sure, student {uncertainty[row]:.2f} uncertain"
        return text if taken[row] else None

    found = with_selection(dataset, taken, scores, reason)
    weights = (weights * row_weights(dataset)).astype(np.float32)
    return with_columns(found, {"weight": (weights, Value("float32"))})


def select_learnable(
    dataset: Dataset,
    small: Dataset,
    labels: LabelSpace,
    *,
    budget: int,
    k: int = 10,
    prefer: Literal["hard", "easy"] = "hard",
) -> Dataset:
    """Takes rows that a small model, stopped early, finds hard yet has in reach; or the easy ones.

    Rawat et al., "A Little Help Goes a Long Way" (SALT, arXiv 2410.18779), equation 10: the loss of
    the small model where the true token is among its `k` most probable ones. `select_score` is
    minus log the small model's probability of the row's label, negative for "easy"; a row whose
    label is not among the small model's `k` has none and is never taken. The paper's own gain from
    this choice is within noise.

    Differs from the paper: a row has one label, where a sequence has the median of its tokens
    (`learnable_score`).

    Args:
        dataset: rows with the soft labels to be learned; their most probable label is the target.
        small: the same rows with the small model's soft labels; joined by id.
        labels: the label space of both, single-label.
        budget: rows to take.
        k: labels in reach; below the number of labels, or nothing is out of reach.
        prefer: which end is taken.
    """
    if labels.multilabel:
        raise ValueError("select_learnable needs labels that exclude each other (single-label)")
    check_budget(budget, len(dataset))
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    target = SoftLabels.from_dataset(dataset, labels)
    guess = SoftLabels.from_dataset(rows_of(dataset, small, "small"), labels)
    rows = np.arange(len(dataset))
    label = np.asarray(target.probs.argmax(axis=1)).ravel()
    probs = guess.top(k).dense()[rows, label]
    reachable = (probs > 0) & (np.diff(target.probs.indptr) > 0)
    loss = -np.log(np.where(reachable, probs, 1.0))
    scores = np.where(reachable, loss if prefer == "hard" else -loss, np.nan)
    taken = highest(scores, id_ranks(dataset), budget=budget)

    def reason(row: int) -> str | None:
        if not reachable[row]:
            return f"not among the small model's {k} labels"
        return f"{prefer}: loss {loss[row]:.2f} of the small model" if taken[row] else None

    return with_selection(dataset, taken, scores, reason)


def learnable_score(
    log_probs: Float[np.ndarray, " tokens"],
    in_top_k: Bool[np.ndarray, " tokens"],
    *,
    masked: Literal["drop", "zero"] = "drop",
) -> float:
    """Median loss of a text's tokens, SALT equation 10; higher is harder, NaN where nothing is left.

    Args:
        log_probs: the small model's log-probability of each token of the text.
        in_top_k: whether the token is among the `k` that the small model finds most probable.
        masked: whether tokens out of reach are dropped or count as 0; the paper leaves it open.
    """
    losses = -log_probs[in_top_k] if masked == "drop" else np.where(in_top_k, -log_probs, 0.0)
    return float(np.median(losses)) if losses.size else float("nan")
