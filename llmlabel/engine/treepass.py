"""Passes of a decoder over trees of tokens: what several prompts or labels share is computed once.

A tree is a list of tokens, each with the place of the token before it; a mask lets a token see the
tokens on its way to the root only. So many chats with one beginning, and behind each of them all
labels, take one pass.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

_VOCABULARY_BLOCK = 16_384  # rows of the output matrix turned to float32 at a time
_MOST_LOGITS = 2**25  # float32 numbers held at a time: 128 MiB

States = Float[Tensor, "reads width"]
Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer."""


@dataclass
class Tree:
    """Tokens of chats behind their common prefix, merged where they begin alike.

    Attributes:
        tokens: In an order in which every token stands behind its parent.
        parents: Place of the token before; -1 is the end of the common prefix.
        chats: Who is in it.
        ends: Place of each chat's last token.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    chats: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, chat: int, tokens: Sequence[int]) -> None:
        """Adds a chat, along the tokens that are there already."""
        place = -1
        for token in tokens:
            key = (place, token)
            if key not in self._places:
                self._places[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(place)
            place = self._places[key]
        self.chats.append(chat)
        self.ends.append(place)


def trees(rows: Sequence[Sequence[int]], room: Sequence[int], *, most_tokens: int) -> list[Tree]:
    """Chats in trees: neighbours in token order that share at least half of their tokens join.

    Args:
        rows: the tokens of each chat behind the common prefix.
        room: tokens that each chat will need besides its own.
        most_tokens: of a tree of several chats, with their room.
    """
    found: list[Tree] = []
    used, previous = 0, rows[0][:0] if rows else ()
    for chat in sorted(range(len(rows)), key=lambda i: (rows[i], i)):
        own = rows[chat]
        shared = _shared(own, previous) if found else 0
        new = len(own) - shared + room[chat]
        if not found or 2 * shared < len(own) or used + new > most_tokens:
            found.append(Tree())
            used, new = 0, len(own) + room[chat]
        found[-1].add(chat, own)
        used, previous = used + new, own
    return found


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with; at least one token of each row stays outside."""
    first, last = min(rows), max(rows)  # all others lie between these two
    return min(_shared(first, last), min(map(len, rows)) - 1)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def batches(sizes: Sequence[int], *, most_tokens: int) -> list[list[int]]:
    """Trees of similar size together, so many that number x largest size fits the budget."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    found: list[list[int]] = []
    for tree in order:
        if not found or (len(found[-1]) + 1) * sizes[found[-1][0]] > most_tokens:
            found.append([])
        found[-1].append(tree)
    return found


class Decoder:
    """A causal language model of transformers whose base model is run over trees.

    Attributes:
        plain_head: Whether logits are the output matrix times the last layer and no more, so that
            they are computed at the read positions only and in float32; else by the model's head.
        computed_tokens: Tokens of all passes, without padding.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.plain_head = model, True
        self.computed_tokens = 0
        # transformers renamed the argument in 5.20; the signature tells which one this version has.
        forward = inspect.signature(type(model.base_model).forward).parameters
        self.cache_argument = "cache" if "cache" in forward else "past_key_values"

    def prefix(self, ids: list[int]) -> Prefix:
        """The keys and values of tokens that all chats begin with."""
        if not ids:
            return []
        cache = DynamicCache()
        self.model.base_model(
            torch.tensor([ids], device=self.model.device),
            **{self.cache_argument: cache, "use_cache": True},
        )
        self.computed_tokens += len(ids)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def log_probs(
        self, states: States, reads: Int[np.ndarray, " tokens"], tokens: Int[np.ndarray, " tokens"]
    ) -> Float[np.ndarray, " tokens"]:
        """Next-token log-probabilities: of each of `tokens` at the state `reads` points to."""
        at, ids = torch.from_numpy(reads), torch.from_numpy(tokens)
        found = torch.empty(len(tokens), dtype=torch.float32)
        step = max(1, _MOST_LOGITS // _VOCABULARY_BLOCK)
        for start in range(0, len(states), step):
            mine = ((at >= start) & (at < start + step)).nonzero()[:, 0]
            found[mine] = self._some_log_probs(
                states[start : start + step], at[mine] - start, ids[mine]
            ).cpu()
        return found.double().numpy()

    def _some_log_probs(self, states: States, at: Tensor, ids: Tensor) -> Tensor:
        if not self.plain_head:  # then these are logits
            return states.float().log_softmax(dim=-1)[at, ids]
        weight = self.model.get_output_embeddings().weight
        log_z = torch.full(states.shape[:1], -torch.inf, device=states.device)
        wanted = torch.empty(len(ids), device=states.device)
        low = 0
        for block in weight.split(_VOCABULARY_BLOCK):
            logits = _exact_product(states, block)
            mine = ((ids >= low) & (ids < low + len(block))).nonzero()[:, 0]
            wanted[mine.to(states.device)] = logits[at[mine], ids[mine] - low]
            peak = logits.amax(dim=1)  # by hand: torch.logsumexp takes five times as long on a CPU
            total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
            log_z = torch.logaddexp(log_z, peak + total.log())
            low += len(block)
        return wanted - log_z[at.to(states.device)]


def _exact_product(states: States, weight: Float[Tensor, "block width"]) -> Tensor:
    """The product of states and transposed weights, in float32.

    Half-precision inputs take the hardware's half-precision products, which are exact in float32,
    and are summed in float32: the speed of bfloat16 without its rounding of the logits.
    """
    half = states.dtype != torch.float32
    before = torch.get_float32_matmul_precision()
    try:
        if half and states.dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        return states.float() @ weight.float().T
    finally:
        torch.set_float32_matmul_precision(before)


class Pass:
    """Trees side by side in one batch, with the cache of what has been computed of them."""

    def __init__(self, decoder: Decoder, trees: int, prefix: Prefix) -> None:
        self.decoder = decoder
        self.cache = DynamicCache()
        self.prefix = prefix[0][0].shape[2] if prefix else 0
        for layer, (keys, values) in enumerate(prefix):
            shape = (trees, -1, -1, -1)
            self.cache.update(keys.expand(shape), values.expand(shape), layer)
        self.above = np.zeros((trees, 0, 0), dtype=bool)
        self.depths = np.zeros((trees, 0), dtype=np.int64)

    def extend(
        self,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        reads: Sequence[Sequence[int]],
    ) -> States:
        """Computes more tokens of each tree.

        Args:
            tokens: per tree.
            parents: their places among all tokens of the tree, these included; places count the
                padding of earlier calls (see `places`); -1 is the end of the prefix.
            reads: per tree the places of the new tokens whose states are wanted.

        Returns:
            The states, tree by tree in the order of `reads`; logits where the head is not plain.
        """
        old, width = self.places, max(map(len, tokens))
        self._grow(parents, width)
        ids = torch.zeros(len(tokens), width, dtype=torch.long)
        for tree, own in enumerate(tokens):
            ids[tree, : len(own)] = torch.tensor(own, dtype=torch.long)
        model, dtype = self.decoder.model, self.decoder.model.dtype
        visible = torch.ones(len(tokens), 1, width, self.prefix + old + width, dtype=torch.bool)
        visible[:, 0, :, self.prefix :] = torch.from_numpy(self.above[:, old:])
        # Masks as numbers, since not every attention implementation takes booleans.
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )
        arguments: dict[str, Any] = {
            "attention_mask": mask.to(model.device),
            "position_ids": torch.from_numpy(self.depths[:, old:]).to(model.device),
            self.decoder.cache_argument: self.cache,
            "use_cache": True,
        }
        self.decoder.computed_tokens += sum(map(len, tokens))
        rows = torch.tensor([tree for tree, some in enumerate(reads) for _ in some])
        places = torch.tensor([place - old for some in reads for place in some])
        if self.decoder.plain_head:
            hidden = model.base_model(ids.to(model.device), **arguments).last_hidden_state
            return hidden[rows.to(model.device), places.to(model.device)]
        kept, places = torch.unique(places, return_inverse=True)
        out = model(ids.to(model.device), logits_to_keep=kept.to(model.device), **arguments)
        return out.logits[rows.to(model.device), places.to(model.device)]

    @property
    def places(self) -> int:
        """Tokens of each tree so far, with padding: the place of the next one."""
        return int(self.above.shape[1])

    def _grow(self, parents: Sequence[Sequence[int]], width: int) -> None:
        trees, old = self.above.shape[:2]
        above = np.zeros((trees, old + width, old + width), dtype=bool)
        above[:, :old, :old] = self.above
        depths = np.full((trees, old + width), self.prefix)
        depths[:, :old] = self.depths
        new = np.arange(old, old + width)
        above[:, new, new] = True  # padding too, so that its softmax has something to see
        for tree, own in enumerate(parents):
            for place, parent in enumerate(own, start=old):
                if parent >= 0:
                    above[tree, place] |= above[tree, parent]
                    depths[tree, place] = depths[tree, parent] + 1
        self.above, self.depths = above, depths
