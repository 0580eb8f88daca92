"""Early-learning regularisation: a network is held to what it said before it learned wrong labels.

Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels" (arXiv
2007.00151). A network fits clean labels first. Its own predictions, averaged over the epochs in a
`TargetMemory`, become the target t of a row, and lambda log(1 - <t, p>) pulls against the gradient
of a wrong label.

The regulariser is negative, down to lambda times log 1e-4 = -9.2: a loss of -20 is no error, and
neither early stopping nor a schedule may be led by it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor, distributed

from llmlabel.loss.soft import binary_cross_entropy, soft_cross_entropy, upcast

_CLAMP = 1e-4  # of the paper's code


class TargetMemory(torch.nn.Module):
    """The target of every training row: an average of what the network predicted, in float32.

    Section 4: t <- beta t + (1 - beta) p, from 0, with p = softmax(z), clamped and normalised.

    Its state is a `state_dict` of tensors, to be kept with a checkpoint. It may stay on the CPU
    while the network is on a GPU. Gradients never reach it. A training whose updates may fail calls
    `look` and, once the weights have changed, `keep`, so that the memory is never ahead of the weights;
    `update` is both.

    Differs from the paper: the lower clamp is 1e-4 up to 100 labels and 0.01 / labels beyond, where
    27,000 labels of 1e-4 would have more mass than the prediction.

    Args:
        row_ids: of the training rows, in the order that `index` counts. A checkpoint of other rows,
            or of the same rows in another order, is refused.
        labels: number of labels.
        beta: share of the past; the paper has 0.7, and 0.9 for 100 classes.
        top_k: keeps only the `top_k` largest entries of a target, with 8 bytes each, for label
            spaces where rows x labels x 4 bytes are too many. The others count as 0.
        multilabel: keeps one probability a label instead of a distribution. Our extension; the
            first prediction of a row is its first target, as an average that starts at 0 would say
            "no" to every label.

    Raises:
        ValueError: A setting is out of range.
    """

    targets: Tensor
    ids: Tensor
    seen: Tensor
    key: Tensor
    _fresh: Tensor

    def __init__(
        self,
        row_ids: Sequence[str],
        labels: int,
        *,
        beta: float = 0.7,
        top_k: int | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta, the share of the past, must be from 0 to below 1; got {beta}")
        if top_k is not None and not 1 <= top_k <= labels:
            raise ValueError(f"top_k must be from 1 to the {labels} labels; got {top_k}")
        if top_k is not None and multilabel:
            raise ValueError("top_k is for one label a row; leave it out in a multi-label space")
        self.labels, self.beta, self.top_k, self.multilabel = labels, beta, top_k, multilabel
        rows = len(row_ids)
        self.register_buffer("targets", torch.zeros(rows, top_k or labels))
        self.register_buffer("ids", torch.zeros(rows, top_k or 0, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("key", torch.tensor(_digest(row_ids)))
        self.register_buffer("_fresh", torch.zeros(rows, dtype=torch.bool), persistent=False)
        self._looked: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(
        self, logits: Float[Tensor, "rows labels"], index: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows labels"]:
        """Takes in the predictions of some rows, see `look`; their new targets, as float32."""
        targets = self.look(logits, index)
        self.keep()
        return targets

    @torch.no_grad()
    def look(
        self, logits: Float[Tensor, "rows labels"], index: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows labels"]:
        """The new targets of some rows, as float32, which `keep` takes in.

        Call it once for each presentation of a row. Micro-batches that share an update may come one
        by one, as the memory changes no weight. A row whose prediction is no finite number keeps the
        target that it had.

        Args:
            logits: of the rows.
            index: positions of the rows in the training data; -1 for a row that only fills a batch,
                which changes nothing and whose target is 0.

        Raises:
            ValueError: A position is outside the memory, or occurs twice.
        """
        place = self.targets.device
        index = index.to(place)
        known = index >= 0
        rows = index[known].long()
        self._check(rows)
        new = _clamped(logits, multilabel=self.multilabel).to(place, torch.float32)[known]
        if not self.multilabel:
            new = new / new.sum(dim=1, keepdim=True)
        fine = torch.isfinite(new).all(dim=1)
        new, taken = new[fine], rows[fine]
        old = self.read(taken)
        if self.multilabel:
            old = torch.where(self.seen[taken, None], old, new)
        values, ids = self._kept_of(self.beta * old + (1 - self.beta) * new)
        self._looked.append((taken, values, ids))
        found = self.read(rows)
        found[fine] = self._dense(values, ids)
        targets = torch.zeros(len(index), self.labels, device=place)
        targets[known] = found
        return targets.to(logits.device)

    def keep(self) -> None:
        """Takes in what was looked at since the last call, as the weights have changed."""
        for rows, values, ids in self._looked:
            self.targets[rows], self.ids[rows] = values, ids
            self.seen[rows] = True
            self._fresh[rows] = True
        self._looked.clear()

    def read(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows labels"]:
        """Targets of rows; 0 where a row was never seen."""
        index = index.to(self.targets.device).long()
        return self._dense(self.targets[index], self.ids[index])

    def stored(self) -> csr_array:
        """Targets of all rows, of which only `top_k` are kept; nothing of a row never seen."""
        values = self.targets.cpu().numpy()
        if self.top_k is None:
            return csr_array(values)
        starts = np.arange(len(values) + 1) * self.top_k
        ids = self.ids.cpu().numpy().ravel()
        found = csr_array(
            (values.ravel(), ids, starts), shape=(len(values), self.labels), copy=True
        )
        found.eliminate_zeros()  # before the ids of a row never seen are added up
        found.sort_indices()
        return found

    def suspects(self, given: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Rows whose given label is not the most probable of their target: likely label errors.

        Args:
            given: the label of every training row, in the order of the memory; -1 for none.

        Returns:
            True for a suspect. A row without a label, or never seen, is none.
        """
        if self.multilabel:
            raise ValueError(
                "suspects are rows of one label; read the targets of a multi-label row"
            )
        best = self.targets.argmax(dim=1)
        if self.top_k is not None:
            best = self.ids.gather(1, best[:, None])[:, 0]
        given = given.to(best.device)
        return self.seen & (given >= 0) & (best != given)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Brings together what the processes of a group have seen since the last call.

        All processes call it, at least at the end of every epoch and before a checkpoint: a row
        may be another process's in the next epoch. What an update that failed has looked at is
        forgotten. Without a group it does no more.

        Raises:
            ValueError: Two processes saw the same row in between.
        """
        self._looked.clear()
        if distributed.is_available() and distributed.is_initialized():
            seen_by = sum_over_processes(self._fresh.int())
            if (twice := torch.nonzero(seen_by > 1)).numel():
                raise ValueError(
                    f"row {int(twice[0])} was seen by {int(seen_by[twice[0]])} processes since the "
                    "memory was last synchronized; call synchronize() after every epoch"
                )
            for state in (self.targets, self.ids):
                if state.numel():
                    total = sum_over_processes(state * self._fresh[:, None])
                    state.copy_(torch.where(seen_by[:, None] > 0, total, state))
            self.seen |= seen_by > 0
        self._fresh.zero_()

    def load_state_dict(  # torch's signature
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002
        assign: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Restores a checkpoint.

        Raises:
            ValueError: It is of other rows, or of these in another order.
        """
        if "key" in state_dict and int(state_dict["key"]) != int(self.key):
            raise ValueError(
                f"the target memory in the checkpoint is of {len(state_dict['seen'])} rows that "
                f"are not the {len(self.seen)} training rows in their order; train on the same rows, "
                "or start without the checkpoint"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _check(self, rows: Tensor) -> None:
        if rows.numel() and int(rows.max()) >= len(self.seen):
            raise ValueError(
                f"row {int(rows.max())} is outside the target memory of {len(self.seen)} rows"
            )
        ordered = rows.sort().values
        if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
            raise ValueError(
                f"row {int(twice[0])} occurs twice in one batch; the target memory takes "
                "one prediction a row (index -1 fills a batch)"
            )

    def _kept_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Values and labels of the entries that are kept."""
        if self.top_k is None:
            return targets, self.ids[: len(targets)]
        largest = targets.topk(self.top_k, dim=1)
        return largest.values, largest.indices.int()

    def _dense(self, values: Tensor, ids: Tensor) -> Tensor:
        """The opposite."""
        if self.top_k is None:
            return values
        dense = torch.zeros(len(values), self.labels, device=values.device)
        return dense.scatter_(1, ids.long(), values)


def early_learning_penalty(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    *,
    multilabel: bool = False,
) -> Float[Tensor, " rows"]:
    """log(1 - <t, p>), the paper's regulariser without lambda, from -9.2 to 0.

    The more they agree, the lower.

    The clamp of p is computed in float32, as 1 - 1e-4 is 1 in bfloat16. Where it acts, the gradient
    is 0.

    Args:
        logits: of the rows.
        targets: t, as `TargetMemory.update` returns them, or mixtures of them (ELR+).
        multilabel: the sum over labels of log(1 - (t p + (1 - t)(1 - p))), our extension.
    """
    probs, targets = _clamped(logits, multilabel=multilabel), upcast(targets).detach()
    if multilabel:
        return torch.log1p(-(targets * probs + (1 - targets) * (1 - probs))).sum(dim=1)
    return torch.log1p(-(targets * probs).sum(dim=1))


def early_learning_loss(
    logits: Float[Tensor, "rows labels"],
    targets: Float[Tensor, "rows labels"],
    index: Int[Tensor, " rows"],
    memory: TargetMemory,
    *,
    penalty_weight: float = 3.0,
) -> Float[Tensor, " rows"]:
    """Cross-entropy + lambda log(1 - <t, p>), after `memory` has taken in the rows.

    Args:
        logits: of the rows.
        targets: the labels given, hard or soft.
        index: positions of the rows in `memory`; -1 for a row that only fills a batch.
        memory: of the targets t; its `multilabel` decides which cross-entropy it is.
        penalty_weight: lambda; the paper has 3 for CIFAR-10, 7 for CIFAR-100 and 1 for asymmetric
            noise. At 0 the loss is the cross-entropy.
    """
    remembered = memory.update(logits.detach(), index)
    penalty = early_learning_penalty(logits, remembered, multilabel=memory.multilabel)
    compare = binary_cross_entropy if memory.multilabel else soft_cross_entropy
    return compare(logits, targets) + penalty_weight * torch.where(
        index.to(penalty.device) >= 0, penalty, 0.0
    )


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of what all processes have, where it is; without a group, the values."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    place = values.device
    if distributed.get_backend() == "nccl":  # which cannot send what is on a CPU
        values = values.cuda()
    distributed.all_reduce(values)
    return values.to(place)


def _clamped(logits: Tensor, *, multilabel: bool) -> Tensor:
    values = upcast(logits)
    probs = values.sigmoid() if multilabel else values.softmax(dim=1)
    floor = _CLAMP if multilabel else min(_CLAMP, 100 * _CLAMP / logits.shape[1])
    return probs.clamp(floor, 1 - _CLAMP)


def _digest(row_ids: Sequence[str]) -> int:
    """63 bits that stand for the rows and their order."""
    digest = hashlib.sha256(json.dumps(list(row_ids)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
