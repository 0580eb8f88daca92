"""The layer that says which label is the parent of which, and how it is trained.

Attention in which children ask and possible parents answer, over vectors of label texts that stay
as they are; task C of "Heterogeneous LLM Methods for Ontology Learning" (arXiv 2508.19428).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_BATCH = 64
_START_SCALE = 20.0
"""Inverse temperature of cosines before training, as of `llmlabel.label.embedding`."""


class TaxonomyAttention(torch.nn.Module):
    """A soft adjacency matrix: mean over heads of softmax over all candidate parents.

    q = RMSNorm(W_q child), k = RMSNorm(W_k parent), each head by itself; A = mean over heads of
    softmax(q k / sqrt(head_dim)) (arXiv 2508.19428, the taxonomy part).

    Differs from the paper: the softmax is over all candidates and not over those of a block, so
    nothing depends on the size of blocks; a label is no candidate of its own; one more candidate,
    "none", has a logit of its own in each head, so that a label without a parent gives its mass
    there; as many key heads as query heads; both projections begin equal, as parts of one rotation,
    so that an untrained layer is a softmax of cosines.

    Args:
        dim: width of the vectors.
        heads: attention heads, each of `dim // heads` dimensions.
        seed: of the rotation.
    """

    def __init__(self, dim: int, *, heads: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= heads <= dim:
            raise ValueError(
                f"heads must be from 1 to {dim}, the width of the vectors; got {heads}"
            )
        self.heads, width = heads, dim // heads
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        self.query, self.key = (torch.nn.Linear(dim, heads * width) for _ in range(2))
        self.query_norm, self.key_norm = (torch.nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.none = torch.nn.Parameter(torch.zeros(heads))
        with torch.no_grad():
            for linear in (self.query, self.key):
                linear.weight.copy_(rotation[: heads * width])
                linear.bias.zero_()
            for norm in (self.query_norm, self.key_norm):
                norm.weight.fill_((_START_SCALE / width**0.5) ** 0.5)

    def forward(
        self,
        children: Float[Tensor, "children dim"],
        parents: Float[Tensor, "parents dim"],
        itself: Int[Tensor, " children"],
    ) -> Float[Tensor, "children parents+1"]:
        """Natural logarithm of the mass on each parent and, last, on none.

        Args:
            children: vectors of those who ask.
            parents: vectors of all candidates.
            itself: where each child stands among the candidates, -1 where it does not.
        """
        return self.ask(children, self.keys(parents), itself)

    def keys(self, parents: Float[Tensor, "parents dim"]) -> Float[Tensor, "parents heads width"]:
        """What children of any number can ask, so that it is computed once."""
        keys: Tensor = self.key_norm(self.key(parents).unflatten(1, (self.heads, -1)))
        return keys

    def ask(
        self,
        children: Float[Tensor, "children dim"],
        keys: Float[Tensor, "parents heads width"],
        itself: Int[Tensor, " children"],
    ) -> Float[Tensor, "children parents+1"]:
        """`forward` with the keys of the parents."""
        queries = self.query_norm(self.query(children).unflatten(1, (self.heads, -1)))
        logits = torch.einsum("chd,phd->hcp", queries, keys) / keys.shape[2] ** 0.5
        own = torch.arange(len(keys), device=itself.device) == itself[:, None]
        # A finite number, since the gradient of a logarithm of nothing but zeros is not one.
        logits = logits.masked_fill(own, -1e9)
        none = self.none[:, None, None].expand(-1, len(children), 1)
        log_mass = torch.cat([logits, none], dim=2).log_softmax(dim=2).logsumexp(dim=0)
        log_mass = log_mass - float(np.log(self.heads))
        return torch.cat([log_mass[:, :-1].masked_fill(own, -torch.inf), log_mass[:, -1:]], dim=1)


@dataclass(frozen=True)
class Children:
    """Who asks, and what is true of them.

    Attributes:
        vectors: of the children.
        itself: where each stands among the candidates, -1 where it does not.
        parents: positions of its parents among the candidates; (n,), n candidates, is none.
    """

    vectors: Float[Tensor, "children dim"]
    itself: Int[Tensor, " children"]
    parents: list[tuple[int, ...]]


def train_attention(
    network: TaxonomyAttention,
    children: Children,
    candidates: Float[Tensor, "candidates dim"],
    *,
    epochs: int,
    learning_rate: float,
    stop: int | None = None,
    seed: int = 0,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[float]:
    """Trains in place, and returns the mean loss of each epoch.

    AdamW, batches of 64 children against all candidates; the learning rate rises in the first tenth
    of the updates and then falls as a cosine.

    Args:
        network: what is trained.
        children: those that are learned from.
        candidates: vectors of all candidates.
        epochs: that the learning rate is planned for.
        learning_rate: its peak.
        stop: after how many epochs to end; all of them when not given.
        seed: of the order of the children.
        after_epoch: called with the number of each epoch that is over, from 1.
    """
    flat = [p for p in network.parameters() if p.ndim == 1]  # gains, biases: no weight decay
    groups: list[dict[str, Any]] = [
        {"params": [network.query.weight, network.key.weight]},
        {"params": flat, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.01)
    columns, shares = padded(children.parents)
    generator = torch.Generator().manual_seed(seed)
    updates = epochs * math.ceil(len(columns) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, updates))
    losses = []
    for epoch in range(1, (stop or epochs) + 1):
        total = 0.0
        for rows in torch.split(torch.randperm(len(columns), generator=generator), _BATCH):
            log_mass = network(children.vectors[rows], candidates, children.itself[rows])
            loss = mass_loss(log_mass, columns[rows], shares[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(columns))
        after_epoch(epoch)
    return losses


def mass_loss(
    log_mass: Float[Tensor, "children columns"],
    columns: Int[Tensor, "children most"],
    shares: Float[Tensor, "children most"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the mass against true parents that share a child equally.

    Differs from the paper, which takes a weighted binary cross-entropy of each cell, as if a child
    with five parents could give each of them all of its mass.

    Args:
        log_mass: what `TaxonomyAttention` gives.
        columns: of the true parents, or of none; see `padded`.
        shares: 1 / number of parents; 0 fills up.
    """
    return -(log_mass.gather(1, columns) * shares).sum(dim=1).mean()


def padded(
    parents: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "children most"], Float[Tensor, "children most"]]:
    """Columns and shares of `mass_loss`; what fills up repeats the first column, with share 0."""
    most = max(map(len, parents))
    columns = [[*some, *[some[0]] * (most - len(some))] for some in parents]
    shares = [[1 / len(some)] * len(some) + [0.0] * (most - len(some)) for some in parents]
    return torch.tensor(columns), torch.tensor(shares)


def log_mass(
    network: TaxonomyAttention,
    children: Float[np.ndarray, "children dim"],
    candidates: Float[np.ndarray, "candidates dim"],
    itself: Int[np.ndarray, " children"],
    *,
    block_rows: int = 128,
) -> Iterator[Float[np.ndarray, "rows columns"]]:
    """The mass of `TaxonomyAttention`, block by block of children, each against all candidates.

    In float64, so that how children share blocks is not seen in the result.
    """
    exact = copy.deepcopy(network).double().requires_grad_(requires_grad=False)
    keys = exact.keys(torch.from_numpy(candidates.astype(np.float64)))
    for at in range(0, len(children), block_rows):
        rows = slice(at, at + block_rows)
        asked = torch.from_numpy(children[rows].astype(np.float64))
        yield exact.ask(asked, keys, torch.from_numpy(itself[rows])).numpy()


def _pace(step: int, updates: int) -> float:
    warmup = max(1.0, updates / 10)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / updates))
