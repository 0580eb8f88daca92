"""A student learns from a teacher's soft labels and from gold labels at once.

L = (1 - alpha) CE(gold) + alpha T^2 D(teacher, student), both at temperature T in D. In this loop live

- distillation on pruned data (arXiv 2403.07854): alpha near 1 where few rows are kept;
- SALT (arXiv 2410.18779): a small teacher for the first `kd_steps` updates, then gold alone;
- LLKD (arXiv 2411.08028): in every update only rows whose teacher is sure and whose student is not;
- label-free distillation (SSLD, arXiv 2103.05959): alpha 1 and `symmetric_kl`;
- self-distillation: a student's own predictions are the soft labels of the next one.

The teacher labels first, with any of `llmlabel.label`: no engine runs while a student is trained.
"""

from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from scipy.sparse import csr_array, vstack
from torch import Tensor

from llmlabel.data import gold_matrix
from llmlabel.labelspace import LabelSpace
from llmlabel.loss.robust import sum_over_processes
from llmlabel.loss.soft import (
    Divergence,
    binary_cross_entropy,
    binary_distillation_loss,
    distillation_loss,
    soft_cross_entropy,
)
from llmlabel.select.learnable import LLKD
from llmlabel.train.classifier import keep_calibration
from llmlabel.train.settings import StudentTraining, settle_student
from llmlabel.train.student import Rows, csr_sha, train_student, training_rows

Selection = Literal["all", "llkd"]
"""Which rows of an update take part in it."""


def distill(  # noqa: PLR0913 - each knob of a training is an override of a recipe
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divergence: Divergence = "kl",
    kd_steps: int | None = None,
    select: Selection = "all",
    validation: Dataset | None = None,
    **training: Unpack[StudentTraining],
) -> Path:
    """Trains a student on soft labels and on the gold that there is; writes its folder.

    Rows without gold learn from the teacher alone. Measured (benchmarks/results/selection.md, 16
    Debian sections): alpha 1 gains 6.6 points on 5 % of the rows and 15.2 where 30 % of the labels
    are wrong, nothing on all rows; `llmlabel.select.prune.kd_weight` gives an alpha for a share.
    LLKD was 1.5 points above all rows with 6 % of the presentations; with a teacher that makes no
    mistakes it was 1.3 points below.

    Args:
        dataset: rows with the teacher's soft labels and, where alpha is below 1 or `kd_steps` is
            given, `gold`.
        labels: the label space of both.
        model: see `llmlabel.train.classifier.train_classifier`, as for `output`, `validation` and
            `training`.
        output: see there.
        alpha: share of the teacher, from 0 to 1.
        temperature: T; above 1 it shows more of what the teacher thinks of the other labels.
        divergence: D; in a multi-label space it is the binary cross-entropy.
        kd_steps: updates with the teacher; later ones are of gold alone, so that rows without gold
            have no part in them. Each row with gold then counts as much more as there are fewer of
            them, so that updates stay as large as they were.
        select: `llkd` takes part in an update only with rows that the thresholds of
            `llmlabel.select.learnable.LLKD` let through, and weighs them. Differs from there: the
            thresholds move after an update, by all its rows, so that neither passes nor processes
            change the result.
        validation: see `train_classifier`.
        **training: see `llmlabel.train.settings.StudentTraining`.

    Raises:
        ValueError: a setting is out of range, or gold is asked for and no row has any.
    """
    given: dict[str, Any] = {
        "alpha": alpha,
        "temperature": temperature,
        "divergence": divergence,
        "kd_steps": kd_steps,
        "select": select,
    }
    _check(given, labels)
    settings = settle_student(training)
    rows = training_rows(dataset, labels)
    gold, has_gold = _gold(dataset, rows, labels)
    if not has_gold.any() and (alpha < 1 or kd_steps is not None):
        raise ValueError(
            "alpha below 1 and kd_steps need gold, and no row has any; load it, or give alpha=1 "
            "without kd_steps"
        )
    alone = float(rows.weights.sum() / max(rows.weights[has_gold.numpy()].sum(), 1e-300))
    course = _Course(len(labels))

    def losses(logits: Tensor, chosen: list[int]) -> Float[Tensor, " some"]:
        teaches = kd_steps is None or course.updates < kd_steps
        share = torch.where(has_gold[chosen], alpha if teaches else 0.0, float(teaches)).to(logits)
        true = torch.from_numpy(gold[chosen].toarray()).to(logits)
        said = rows.block(chosen).to(logits)
        compare = binary_cross_entropy if labels.multilabel else soft_cross_entropy
        taught = (
            binary_distillation_loss(logits, said, said, alpha=1.0, temperature=temperature)
            if labels.multilabel
            else distillation_loss(
                logits, said, said, alpha=1.0, temperature=temperature, divergence=divergence
            )
        )
        values = (1 - share) * has_gold[chosen].to(logits) * compare(logits, true) + share * taught
        if not teaches:
            return alone * values
        return values * course.weights(said, logits) if select == "llkd" else values

    folder = train_student(
        rows,
        labels,
        losses,
        settings | given,
        model=model,
        output=output,
        validation=validation,
        memory=course,
        after_update=course.end_update,
        told={"gold_rows": int(has_gold.sum()), "gold_sha": csr_sha(gold, has_gold.numpy())},
    )
    keep_calibration(folder, validation, labels)
    return folder


def _check(given: dict[str, Any], labels: LabelSpace) -> None:
    """Refuses settings that are out of range."""
    alpha, temperature, kd_steps = (given[name] for name in ("alpha", "temperature", "kd_steps"))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the share of the teacher, must be between 0 and 1; got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if kd_steps is not None and kd_steps < 1:
        raise ValueError(
            f"kd_steps must be at least 1; got {kd_steps}; leave it out for all updates"
        )
    for name, kind in (("divergence", Divergence), ("select", Selection)):
        if given[name] not in get_args(kind):
            raise ValueError(f"{name} is one of {', '.join(get_args(kind))}; got {given[name]!r}")
    if given["select"] == "llkd" and labels.multilabel:
        raise ValueError("select='llkd' needs labels that exclude each other (single-label)")


def _gold(
    dataset: Dataset, rows: Rows, labels: LabelSpace
) -> tuple[csr_array, Bool[Tensor, " rows"]]:
    """Of the rows that are trained on: the gold labels, and whether they are known."""
    if "gold" not in dataset.column_names:
        nothing = csr_array((len(rows.ids), len(labels)), dtype=np.float32)
        return nothing, torch.zeros(len(rows.ids), dtype=torch.bool)
    some = dataset.select(rows.kept)
    blocks = [
        csr_array(gold_matrix(some.select(range(i, min(i + 4096, len(some)))), labels))
        for i in range(0, len(some), 4096)
    ]
    found = csr_array(vstack(blocks, format="csr"), dtype=np.float32)
    known = np.array([ids is not None for ids in some["gold"]], dtype=bool)
    if not labels.multilabel:
        sums = found.sum(axis=1)
        known &= sums > 0  # none of these labels: not one to learn
        found.data /= np.repeat(sums, np.diff(found.indptr))
    return found, torch.from_numpy(known)


class _Course:
    """How far a training is, and the thresholds of LLKD."""

    def __init__(self, labels: int) -> None:
        self.updates = 0
        self.thresholds = LLKD(labels) if labels > 1 else None
        self._sums = np.zeros((3, labels))

    def weights(
        self, teacher: Float[Tensor, "rows labels"], logits: Float[Tensor, "rows labels"]
    ) -> Float[Tensor, " rows"]:
        """Confidence x uncertainty of the rows that are let through, 0 of the others."""
        assert self.thresholds is not None
        probs = teacher.double().cpu().numpy()
        student = logits.detach().double().softmax(dim=1)
        entropy = torch.special.entr(student).sum(dim=1) / np.log(student.shape[1])
        signals = (probs.argmax(axis=1), probs.max(axis=1), entropy.cpu().numpy())
        self._sums += self.thresholds.sums(*signals)
        return torch.from_numpy(self.thresholds.keep(*signals)[1]).to(logits)

    def end_update(self) -> None:
        """Moves the thresholds by what all processes saw."""
        self.updates += 1
        sums = sum_over_processes(torch.from_numpy(self._sums))
        if self.thresholds is not None:
            self.thresholds.move(sums.numpy())
        self._sums = np.zeros_like(self._sums)

    def synchronize(self) -> None:
        """Every process knows all after each update."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        state = {"updates": torch.tensor(self.updates)}
        if self.thresholds is not None:
            one = self.thresholds
            state["taus"] = torch.tensor([one.tau_teacher, one.tau_student], dtype=torch.float64)
            state["means"] = torch.from_numpy(np.stack([one.teacher_means, one.student_means]))
        return state

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """The opposite."""
        self.updates = int(state_dict["updates"])
        if self.thresholds is not None:
            one = self.thresholds
            one.tau_teacher, one.tau_student = state_dict["taus"].tolist()
            one.teacher_means, one.student_means = state_dict["means"].numpy()
