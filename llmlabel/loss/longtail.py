"""Losses of many labels, few of them frequent and not all of them given.

Zhang et al., "Learning in Imperfect Environment: Multi-Label Classification with Long-Tailed
Distribution and Partial Labels" (COMIC, arXiv 2304.10539): correct missing labels
(`LabelCorrector`), weigh by frequency and sign (`multi_focal_loss`), balance a head and a tail
classifier (`llmlabel.loss.head_tail`). The public code leaves the balance out and adds co-occurrence
factors; this is the paper's.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmlabel.loss.robust import sum_over_processes
from llmlabel.loss.soft import upcast

Gamma = float | Float[Tensor, " labels"]


def asymmetric_loss(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    gamma_pos: Gamma = 0.0,
    gamma_neg: Gamma = 4.0,
    clip: float = 0.05,
) -> Float[Tensor, " rows"]:
    """-sum_k t_k (1 - p_k)^g+ log p_k + (1 - t_k) r_k^g- log(1 - r_k), r_k = max(p_k - clip, 0).

    Ridnik et al., "Asymmetric Loss For Multi-Label Classification" (arXiv 2009.14119), section 2,
    with p the logistic function of the logits. The binary cross-entropy at g+ = g- = clip = 0.

    Differs from the paper: its code holds the focusing factors constant in the backward pass; here
    the gradient is that of the formula.

    Args:
        logits: of the labels, finite.
        targets: one event a label.
        gamma_pos: g+, one number or one a label.
        gamma_neg: g-, one number or one a label.
        clip: a negative below this probability adds nothing.
    """
    logits = upcast(logits)
    return focal(
        logsigmoid(logits), logsigmoid(-logits), upcast(targets), (gamma_pos, gamma_neg), clip
    )


def head_tail_factors(
    counts: Float[Tensor, " labels"], *, power: float = 1 / 3
) -> Float[Tensor, " labels"]:
    """(1 - ln(count / max count))^power: 1 for the most frequent label, more for rarer ones.

    The factor of COMIC's code, which has 1/3 for its modifier and 1/6 for its corrector. `counts`
    may be those of corrected labels, as they change while training.

    Differs from the code: a label never given counts as given once, where it was infinite.
    """
    counts = upcast(counts).clamp(min=1)
    return (1 - (counts / counts.amax()).log()) ** power


def multi_focal_loss(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    head_tail: Float[Tensor, " labels"],
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 3.0,
    head_tail_pos: float = 0.0,
    head_tail_neg: float = 1.0,
    clip: float = 0.05,
) -> Float[Tensor, " rows"]:
    """`asymmetric_loss` whose exponents grow for rare labels: COMIC's multi-focal modifier.

    g+ = `gamma_pos` + `head_tail_pos` h and g- = `gamma_neg` + `head_tail_neg` h, h = `head_tail`.
    The paper wants `gamma_neg` >= `gamma_pos`. Defaults are those of its code.

    Differs from the paper: the shift `clip` of the asymmetric loss, as its code has; 0 is the
    paper.
    Differs from the code: no weight and no co-occurrence factor on the loss.
    """
    return asymmetric_loss(
        logits,
        targets,
        gamma_pos=gamma_pos + head_tail_pos * head_tail,
        gamma_neg=gamma_neg + head_tail_neg * head_tail,
        clip=clip,
    )


class LabelCorrector(torch.nn.Module):
    """Recovers labels that nobody gave: COMIC's reflective label corrector.

    A label c not given is added where p_c > max(tau, P_c), P_c the running mean of p_c over all
    rows up to the last `synchronize`, which is to be called after every update: so micro-batches
    and processes do not change the result. The paper starts in the second epoch.

    COMIC multiplies the loss on corrected targets by rows / positives of the batch: give
    `weighted_mean` the corrected positives per row as `total`.

    Args:
        labels: number of labels.
        tau: lowest probability of a label that is added; 0.7 was the paper's best.
    """

    sums: Tensor
    rows: Tensor
    _sums: Tensor
    _rows: Tensor

    def __init__(self, labels: int, *, tau: float = 0.7) -> None:
        super().__init__()
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie strictly between 0 and 1; got {tau}")
        self.tau = tau
        for name, persistent in (("sums", True), ("_sums", False)):
            self.register_buffer(name, torch.zeros(labels), persistent=persistent)
        for name, persistent in (("rows", True), ("_rows", False)):
            zero = torch.zeros((), dtype=torch.float64)  # in which weights add up exactly enough
            self.register_buffer(name, zero, persistent=persistent)

    @torch.no_grad()
    def forward(
        self,
        logits: Float[Tensor, "rows labels"],
        targets: Float[Tensor, "rows labels"],
        *,
        weights: Float[Tensor, " rows"] | None = None,
    ) -> tuple[Float[Tensor, "rows labels"], Bool[Tensor, "rows labels"]]:
        """The targets with what was added, and what was added, for a record of it.

        Args:
            logits: of the rows; one that is not finite says nothing about P_c.
            targets: the labels given; 0 is a label not given.
            weights: what each row counts in P_c, 0 for one that only fills a batch; null is 1.
        """
        probs = upcast(logits).sigmoid()
        counted = torch.isfinite(probs).all(dim=1)
        shares = counted.to(self.rows)
        if weights is not None:
            shares = shares * weights.to(shares)
        known = torch.where(counted[:, None], probs, 0.0)
        self._sums += (shares.to(known)[:, None] * known).sum(dim=0).to(self._sums)
        self._rows += shares.sum()
        mean = (self.sums / self.rows.clamp(min=1)).to(probs)
        added = (probs > mean.clamp(min=self.tau)) & (targets == 0)
        return torch.where(added, 1.0, targets), added

    def synchronize(self) -> None:
        """Takes the rows of all processes since the last call into the running means."""
        self.sums += sum_over_processes(self._sums)
        self.rows += sum_over_processes(self._rows)
        self.forget()

    def forget(self) -> None:
        """Lets go of the rows since the last `synchronize`."""
        self._sums.zero_()
        self._rows.zero_()


class LongTailLoss(torch.nn.Module):
    """COMIC's modifier and corrector together, with the state that they keep.

    L_mfm on the labels given plus, after some epochs, `correction_weight` (rows / labels given)
    L_mfm on what `LabelCorrector` makes of them. There h follows the counts of corrected labels.
    Call `keep` after every update, when the weights have changed.

    Differs from the paper: rows / labels is that of all training rows, not of a batch, so that rows
    do not depend on each other.

    Args:
        counts: rows of each label among the labels given, by their weights.
        rows: number of training rows; an epoch.
        tau: see `LabelCorrector`; null corrects nothing.
        start_epoch: epochs before labels are corrected.
        correction_weight: lambda_c / lambda_m.
        **modifier: see `multi_focal_loss`.
    """

    counts: Tensor
    found: Tensor
    _found: Tensor

    def __init__(
        self,
        counts: Float[Tensor, " labels"],
        rows: int,
        *,
        tau: float | None = 0.7,
        start_epoch: int = 1,
        correction_weight: float = 1.0,
        **modifier: float,
    ) -> None:
        super().__init__()
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0; got {start_epoch}")
        for name, value in {"correction_weight": correction_weight, **modifier}.items():
            if not 0 <= value < (1 if name == "clip" else float("inf")):
                most = " and below 1" if name == "clip" else ""
                raise ValueError(f"{name} must be at least 0{most}; got {value}")
        self.rows, self.start_epoch, self.modifier = rows, start_epoch, modifier
        self.scale = correction_weight * rows / max(1.0, float(counts.sum()))
        self.corrector = None if tau is None else LabelCorrector(len(counts), tau=tau)
        self.register_buffer("counts", upcast(counts).float(), persistent=False)
        # one more than labels: the last counts the rows that were corrected
        for name, persistent in (("found", True), ("_found", False)):
            self.register_buffer(name, torch.zeros(len(counts) + 1), persistent=persistent)

    def forward(
        self,
        logits: Float[Tensor, "rows labels"],
        targets: Float[Tensor, "rows labels"],
        *,
        weights: Float[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """The loss of each row, which is not multiplied by its weight.

        Args:
            logits: of the rows.
            targets: the labels given.
            weights: what each row counts in all that is remembered, 1 on average over all rows;
                null is 1.
        """
        values = self.modified(logits, targets)
        if self.corrector is None:
            return values
        corrected, _ = self.corrector(logits.detach(), targets, weights=weights)
        # An epoch's weights add up to its rows, but for what rounding takes of them.
        if self.corrector.rows < self.start_epoch * self.rows * (1 - 1e-9):
            return values
        known = upcast(corrected)
        shares = known.new_ones(len(known)) if weights is None else weights.to(known)
        self._found[:-1] += (shares[:, None] * known).sum(dim=0).to(self._found)
        self._found[-1] += shares.sum().to(self._found)
        share = self.rows / self.found[-1].clamp(min=1)
        now = torch.where(self.found[-1] > 0, self.found[:-1] * share, self.counts)
        return values + self.scale * self._modified(logits, corrected, now)

    def modified(
        self, logits: Float[Tensor, "rows labels"], targets: Float[Tensor, "rows labels"]
    ) -> Float[Tensor, " rows"]:
        """L_mfm alone, which changes no state; for rows that are not trained on."""
        return self._modified(logits, targets, self.counts)

    @torch.no_grad()
    def keep(self) -> None:
        """Takes in what all processes saw since the last call."""
        if self.corrector is not None:
            self.corrector.synchronize()
        self.found += sum_over_processes(self._found)
        self._found.zero_()

    def synchronize(self) -> None:
        """Forgets what was seen since `keep`, in an update that failed; processes agree already."""
        if self.corrector is not None:
            self.corrector.forget()
        self._found.zero_()

    def added_per_row(self) -> float:
        """Labels that were added to a row on average, where rows were corrected."""
        if not self.found[-1]:
            return 0.0
        return float(self.found[:-1].sum() / self.found[-1] - self.counts.sum() / self.rows)

    def _modified(self, logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        factors = head_tail_factors(counts).to(logits.device)
        return multi_focal_loss(logits, targets, factors, **self.modifier)


def focal(
    log_p: Tensor, log_not: Tensor, targets: Tensor, gammas: tuple[Gamma, Gamma], clip: float
) -> Tensor:
    """The asymmetric loss of probabilities given as log p and log(1 - p); see `asymmetric_loss`."""
    gamma_pos, gamma_neg = (
        torch.as_tensor(g, dtype=log_p.dtype, device=log_p.device) for g in gammas
    )
    positive = (gamma_pos * log_not).exp() * log_p
    if clip:
        counts = log_p.exp() > clip
        shifted = torch.where(counts, log_p.exp() - clip, 1.0)
        negative = (gamma_neg * shifted.log()).exp() * (log_not.exp() + clip).log()
        negative = torch.where(counts, negative, 0.0)
    else:
        negative = (gamma_neg * log_p).exp() * log_not
    return -(targets * positive + (1 - targets) * negative).sum(dim=1)
