"""Which labels an update encodes, and what is remembered of the others' vectors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

Negatives = Literal["all", "cached", "ann", "inbatch"]

_BLOCK = 8192
"""Labels that rows are compared with at a time."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Labels that an update encodes."""

    ids: Int[np.ndarray, " some"]
    """Ascending."""
    weights: Float[np.ndarray, " some"]
    """What the gradient of each counts."""
    turn: int
    """Of `refresh`, after the update."""


@dataclass(eq=False)
class LabelPool:
    """The labels of an update, and the vectors that `cached` and `ann` remember.

    An update encodes the labels of its rows, `hard_labels` more that are hard to tell from them, and
    `refresh` of all labels in turn. `cached` compares with all labels, those not encoded by their
    vectors of an earlier update (arXiv 2310.10636 encodes all, twice, in every update: `all`); `ann`
    and `inbatch` compare with the encoded ones alone.

    In `cached` the labels in turn stand for all that are not encoded: their gradients count so many
    times more. Without that the gradient of the labels, which sums to almost nothing in a softmax,
    would pull all labels towards all texts, as only positives would have one.
    """

    negatives: Negatives
    labels: int
    refresh: float
    hard_labels: int
    gradient_filter: float
    temperature: float
    vectors: Float[Tensor, "labels width"] | None = None
    """Of all labels, from when each was encoded last; bfloat16."""
    label_tokens: int = 0
    """Encoded in the training, those of a second pass again."""
    seed: int = 0
    """Of the turn of the labels."""
    rank: int = 0
    """Of this process, which compares with its part of the labels when it looks for hard ones."""
    processes: int = 1
    _turn: int = 0
    _order: Int[np.ndarray, " labels"] = field(init=False, repr=False)
    _pending: tuple[Tensor, Tensor | None, int, int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """A sample in turn is a random one: neighbours in a label space are alike."""
        self._order = np.random.default_rng(self.seed).permutation(self.labels)

    @property
    def remembers(self) -> bool:
        """Whether the vectors of all labels must be there before the first update."""
        return self.negatives in ("cached", "ann")

    def choose(
        self,
        texts: Float[Tensor, "rows width"],
        given: csr_array,
        left_out: csr_array,
        named: Int[np.ndarray, " named"],
    ) -> Chosen:
        """The labels that an update encodes.

        Args:
            texts: vectors of all rows of the update.
            given: their positives, which are always encoded.
            left_out: labels that are no negatives of a row.
            named: more labels to encode, such as negatives that were mined.
        """
        if self.negatives == "all":
            return Chosen(np.arange(self.labels), np.ones(self.labels), 0)
        chosen = np.zeros(self.labels, dtype=bool)
        chosen[given.indices] = True
        chosen[named] = True
        if self.negatives == "inbatch":
            ids = np.flatnonzero(chosen)
            return Chosen(ids, np.ones(len(ids)), 0)
        wanted = min(self.hard_labels, int((~chosen).sum()))
        if wanted:
            chosen[self._hard(texts, given, left_out, chosen, wanted)] = True
        count = max(round(self.refresh * self.labels), int(self.refresh > 0))
        in_turn = self._order[(self._turn + np.arange(count)) % self.labels]
        drawn = in_turn[~chosen[in_turn]]
        weights = np.ones(self.labels)
        if self.negatives == "cached" and len(drawn):
            weights[drawn] = (~chosen).sum() / len(drawn)
        chosen[drawn] = True
        ids = np.flatnonzero(chosen)
        return Chosen(ids, weights[ids], (self._turn + count) % self.labels)

    def _hard(
        self,
        texts: Float[Tensor, "rows width"],
        given: csr_array,
        left_out: csr_array,
        chosen: np.ndarray,
        wanted: int,
    ) -> Int[np.ndarray, " hard"]:
        """Labels not chosen yet that would get the longest gradients."""
        if self.negatives == "cached":
            pull = self._pull(texts, given, left_out)
            pull[chosen] = -np.inf
            order = np.argsort(-pull, kind="stable")[:wanted]
            return order[pull[order] >= self.gradient_filter]
        each = 2 * -(-wanted // len(texts))  # rows that are alike have the same ones near
        blocks = self._blocks(texts, given, left_out, chosen)
        near = self._nearest(blocks, texts.new_empty(len(texts), 0), each).tolist()
        found: dict[int, None] = {}
        for place in zip(*near, strict=True):  # the nearest of every row first
            found |= {label: None for label in place if label >= 0}
        return np.array(list(found)[:wanted], dtype=np.int64)

    def _pull(
        self, texts: Float[Tensor, "rows width"], given: csr_array, left_out: csr_array
    ) -> Float[np.ndarray, " labels"]:
        """For each label the sum over rows of its share among the row's negatives."""
        total = torch.full((len(texts),), -torch.inf, device=texts.device)
        for _, scores in self._blocks(texts, given, left_out):
            total = torch.logaddexp(total, scores.logsumexp(dim=1))
        total = self.everyones(total[None]).logsumexp(dim=0)
        pull = torch.zeros(self.labels, device=texts.device)
        for ids, scores in self._blocks(texts, given, left_out):
            pull[ids] = (scores - total[:, None]).exp_().nan_to_num_(0.0).sum(dim=0)
        found: np.ndarray = self.everyones(pull[None]).sum(dim=0).double().cpu().numpy()
        return found

    def _nearest(
        self,
        blocks: Iterator[tuple[Int[Tensor, " block"], Tensor]],
        best: Float[Tensor, "rows 0"],
        k: int,
    ) -> Int[Tensor, "rows k"]:
        """Labels of the highest scores, then -1; `best` has the rows' format."""

        def highest(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            best, order = scores.topk(min(k, scores.shape[1]), dim=1)
            return best, ids.gather(1, order)

        found = best.long()
        for ids, scores in blocks:
            own = ids.expand(len(scores), -1)
            best, found = highest(torch.cat([best, scores], 1), torch.cat([found, own], 1))
        # a process may have a label less than another
        short = min(k, self.labels // self.processes + 1) - best.shape[1]
        best = torch.nn.functional.pad(best, (0, short), value=-torch.inf)
        found = torch.nn.functional.pad(found, (0, short), value=-1)
        best, found = (self.everyones(part[None]) for part in (best, found))
        best, found = highest(torch.cat([*best], dim=1), torch.cat([*found], dim=1))
        return torch.where(best == -torch.inf, -1, found)

    @torch.no_grad()
    def _blocks(
        self,
        texts: Tensor,
        given: csr_array,
        left_out: csr_array,
        without: Bool[np.ndarray, " labels"] | None = None,
    ) -> Iterator[tuple[Int[Tensor, " block"], Tensor]]:
        """Labels of this process, and their scores (rows, block), -inf where no negative is."""
        vectors = self._known()
        masked = given.astype(bool) + left_out.astype(bool)
        rows = np.repeat(np.arange(masked.shape[0]), np.diff(masked.indptr))
        own = np.arange(self.rank, self.labels, self.processes)
        for start in range(0, len(own), _BLOCK):
            ids = own[start : start + _BLOCK]
            index = torch.from_numpy(ids).to(texts.device)
            scores = texts @ vectors[index].to(texts).T / self.temperature
            place = np.searchsorted(ids, masked.indices)
            place[place == len(ids)] = 0
            here = ids[place] == masked.indices
            where = (torch.from_numpy(rows[here]), torch.from_numpy(place[here]))
            scores[tuple(part.long().to(texts.device) for part in where)] = -torch.inf
            if without is not None:
                scores[:, torch.from_numpy(without[ids])] = -torch.inf
            yield index, scores

    def everyones(self, own: Tensor) -> Tensor:
        """The tensors of all processes, one after the other."""
        if self.processes == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    def _known(self) -> Tensor:
        if self.vectors is None:
            raise RuntimeError("the labels have not been encoded yet")
        return self.vectors

    def remember_later(self, chosen: Chosen, vectors: Tensor | None, tokens: int) -> None:
        """What counts as soon as the update has succeeded; see `commit`."""
        self._pending = (torch.from_numpy(chosen.ids), vectors, chosen.turn, tokens)

    def commit(self) -> None:
        """Takes what the last update has found."""
        if self._pending is None:
            return
        chosen, vectors, self._turn, tokens = self._pending
        self.label_tokens += tokens
        if self.vectors is not None and vectors is not None:
            self.vectors[chosen.to(self.vectors.device)] = vectors.to(self.vectors)
        self._pending = None

    # ------------------------------------------------------------------- what a checkpoint keeps

    def state_dict(self) -> dict[str, Tensor]:
        """Vectors, whose turn it is, and tokens counted."""
        kept = {"counts": torch.tensor([self._turn, self.label_tokens])}
        return kept if self.vectors is None else kept | {"vectors": self.vectors}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """The opposite."""
        self._turn, self.label_tokens = state_dict["counts"].tolist()
        if "vectors" in state_dict:
            kept = state_dict["vectors"]
            self.vectors = kept if self.vectors is None else kept.to(self.vectors)

    def synchronize(self) -> None:
        """Nothing to do: every process remembers all labels."""
