"""The gradient of an update of a dual encoder, in one process or divided among many."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel.loss.retrieval import Fixed, Relevance, retrieval_loss
from llmlabel.loss.soft import weighted_mean
from llmlabel.train.label_pool import Chosen, LabelPool
from llmlabel.train.loop import Update, trained
from llmlabel.train.settings import number_format
from llmlabel.train.towers import Encoded, Towers, encode

Positives = Literal["all", "sampled"]


@dataclass(eq=False)
class Step:
    """The gradient of an update."""

    towers: Towers
    soft: csr_array
    left_out: csr_array
    """Labels that are neither true nor negatives of a row."""
    named: csr_array
    """Labels that an update with the row encodes too."""
    weights: Float[np.ndarray, " rows"]
    text_tokens: list[list[int]]
    label_tokens: list[list[int]]
    settings: dict[str, Any]
    pool: LabelPool

    def gradient(self, update: Update) -> Float[Tensor, ""]:
        """Of all rows of an update over its labels; see `llmlabel.train.loop.Objective`."""
        accelerator = update.accelerator
        rank, count = accelerator.process_index, accelerator.num_processes
        self.pool.rank, self.pool.processes = rank, count
        seed = int(torch.randint(2**62, ()))  # of the update and the process
        if self.pool.remembers:
            if self.pool.vectors is None:
                self.pool.vectors = self.vectors(None).bfloat16()
                different = set(map(tuple, self.label_tokens))
                self.pool.label_tokens += sum(map(len, different))
            self.pool.vectors = self.pool.vectors.to(accelerator.device)
        mine = update.rows[rank::count]
        texts = self._encode(self.towers.texts, [self.text_tokens[row] for row in mine], seed)
        everyones = _gathered(texts.vectors.detach(), len(update.rows), accelerator)
        everyones.requires_grad_()
        given, left_out = self._positives(update)
        named = self.named[update.rows].indices
        chosen = self.pool.choose(everyones.detach(), given, left_out, named)
        own = chosen.ids[rank::count]
        fresh = self._encode(self.towers.labels, [self.label_tokens[n] for n in own], seed + 1)
        others = self._others(chosen.ids)[rank::count]
        fixed = None
        if self.pool.vectors is not None and len(others):
            rows = torch.from_numpy(others).to(self.pool.vectors.device)
            fixed = Fixed(self.pool.vectors, rows)
        losses = retrieval_loss(
            everyones,
            fresh.vectors,
            relevance(given, left_out, np.concatenate([own, others]), everyones.device),
            loss=self.settings["loss"],
            temperature=self.settings["temperature"],
            k=self.settings["top_k"],
            group=torch.distributed.group.WORLD if count > 1 else None,
            fixed=fixed,
        )
        weights = torch.from_numpy(self.weights[update.rows]).to(losses)
        loss = weighted_mean(losses, weights, total=update.total)
        torch.autograd.backward(loss)
        if everyones.grad is not None:
            texts.vectors.grad = everyones.grad[rank::count].contiguous()
        if fresh.vectors.grad is not None:
            counts = torch.from_numpy(chosen.weights[rank::count])
            fresh.vectors.grad *= counts.to(fresh.vectors)[:, None]
        texts.backward()
        fresh.backward()
        _sum_gradients(self.towers, accelerator)
        self._remember(chosen, fresh, accelerator)
        return loss.detach() * update.total / count

    def _positives(self, update: Update) -> tuple[csr_array, csr_array]:
        """Relevances of the rows of an update, and labels that are neither positive nor negative."""
        given, left_out = self.soft[update.rows], self.left_out[update.rows]
        if self.settings["positives"] == "all":
            return given, left_out
        rng = np.random.default_rng([self.settings["seed"], update.number])
        # the largest of log p + Gumbel noise is a draw by p
        keys = np.log(given.data) + rng.gumbel(size=given.nnz)
        owner = np.repeat(np.arange(given.shape[0]), np.diff(given.indptr))
        order = np.lexsort((keys, owner))
        drawn = np.zeros(given.nnz, dtype=bool)
        drawn[order[given.indptr[1:] - 1]] = True
        one, rest = given.copy(), given.copy()
        one.data, rest.data = np.where(drawn, 1.0, 0.0), np.where(drawn, 0.0, 1.0)
        one.eliminate_zeros()
        rest.eliminate_zeros()
        # of a softmax they stay among the negatives, as in the paper
        is_softmax = self.settings["loss"] == "softmax"
        return one, left_out if is_softmax else csr_array(left_out + rest)

    def _remember(self, chosen: Chosen, fresh: Encoded, accelerator: Any) -> None:
        """What the update has encoded, once it has succeeded."""
        tokens = accelerator.reduce(torch.tensor(fresh.tokens, device=fresh.vectors.device), "sum")
        every = None
        if self.pool.remembers:
            every = _gathered(fresh.vectors.detach(), len(chosen.ids), accelerator)
        self.pool.remember_later(chosen, every, int(tokens))

    def _others(self, chosen: Int[np.ndarray, " some"]) -> Int[np.ndarray, " others"]:
        """Labels that an update compares with by their remembered vectors."""
        if self.settings["negatives"] != "cached":
            return np.zeros(0, dtype=np.int64)
        return np.setdiff1d(np.arange(self.pool.labels), chosen, assume_unique=True)

    def _encode(self, tower: Any, tokens: list[list[int]], seed: int) -> Encoded:
        device = next(tower.parameters()).device
        return encode(
            tower,
            tokens,
            pass_tokens=self.settings["pass_tokens"],
            seed=seed,
            dtype=number_format(self.settings["dtype"], device),
        )

    @torch.no_grad()
    def vectors(self, texts: list[list[int]] | None) -> Float[Tensor, "some width"]:
        """Vectors of tokenised texts, or of all labels where it is null; without dropout."""
        tower = self.towers.labels if texts is None else self.towers.texts
        tokens = self.label_tokens if texts is None else texts
        was = tower.training
        tower.eval()
        found = encode(
            tower, tokens, pass_tokens=self.settings["pass_tokens"], seed=0, keep_graph=False
        )
        tower.train(was)
        return found.vectors.detach()


def relevance(
    given: csr_array,
    left_out: csr_array,
    pool: Int[np.ndarray, " pool"],
    device: torch.device | str = "cpu",
) -> Relevance:
    """Of rows over a part of the labels, whose positions in `pool` become their ids."""
    place = np.full(given.shape[1], -1)
    place[pool] = np.arange(len(pool))
    rows = np.concatenate([_owners(given), _owners(left_out)])
    ids = place[np.concatenate([given.indices, left_out.indices])]
    values = np.concatenate([given.data, np.zeros(left_out.nnz)])
    here = ids >= 0
    rows, ids, values = rows[here], ids[here], values[here]
    order = np.lexsort((ids, rows))
    counts = np.bincount(rows, minlength=given.shape[0])
    return Relevance(
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])).to(device),
        torch.from_numpy(ids[order]).to(device),
        torch.from_numpy(values[order]).to(device, torch.float32),
    )


def _owners(matrix: csr_array) -> Int[np.ndarray, " stored"]:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _gathered(
    own: Float[Tensor, "own width"], total: int, accelerator: Any
) -> Float[Tensor, "total width"]:
    """The vectors of all processes, of which each has every n-th."""
    count = accelerator.num_processes
    if count == 1:
        return own.clone()
    most = -(-total // count)
    padded = torch.zeros(most, own.shape[1], device=own.device)
    padded[: len(own)] = own
    parts = accelerator.gather(padded).view(count, most, -1)
    return parts.transpose(0, 1).reshape(count * most, -1)[:total].clone()


def _sum_gradients(towers: Towers, accelerator: Any) -> None:
    """Every process gets the sum of all; in one exchange."""
    if accelerator.num_processes == 1:
        return
    weights = list(trained(towers).values())
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    flat = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    torch.distributed.all_reduce(flat)
    start = 0
    for weight in weights:
        weight.grad = flat[start : start + weight.numel()].view_as(weight).clone()
        start += weight.numel()
