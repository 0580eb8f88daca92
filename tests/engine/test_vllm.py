"""What only vLLM does: adapters, embeddings, classification heads; on the CPU build or a GPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmlabel import models
from llmlabel.prompt import render

pytestmark = pytest.mark.vllm
TEXTS = ["The cat sat on the mat.", "Shares fell.", "x"]


@pytest.fixture(autouse=True, scope="module")
def _vllm() -> None:
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.fetch(models.SMOLLM2), dtype="float32")


def test_embeddings_are_the_last_state_of_length_one(smollm2: Any) -> None:
    import torch
    from transformers import AutoTokenizer

    from llmlabel.engine.vllm_pooling import VLLMEncoder

    encoder = VLLMEncoder(models.SMOLLM2, dtype="float32", enforce_eager=True)
    got = encoder.encode(TEXTS, convert_to_numpy=True, show_progress_bar=False)
    tokenizer = AutoTokenizer.from_pretrained(models.fetch(models.SMOLLM2))
    for text, vector in zip(TEXTS, got, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            state = smollm2.base_model(ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, (state / state.norm()).numpy(), atol=1e-3)
    assert encoder.encode([""]).shape == (1, 576)


def test_classification_equals_transformers(smollm2: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from llmlabel.engine.vllm_pooling import VLLMClassifier

    config = LlamaConfig(**{**smollm2.config.to_dict(), "num_labels": 4, "pad_token_id": 2})
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(smollm2.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(4, 576, generator=torch.manual_seed(0)) * 0.05)
    tokenizer = AutoTokenizer.from_pretrained(models.fetch(models.SMOLLM2))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got = VLLMClassifier(tmp_path, dtype="float32", enforce_eager=True).classify(TEXTS)
    for text, probs in zip(TEXTS, got, strict=True):
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([tokenizer(text).input_ids])).logits[0]
        np.testing.assert_allclose(probs, logits.softmax(0).numpy(), atol=1e-3)
    assert np.ptp(got, axis=0).max() > 0.01  # the texts matter


def test_an_adapter_answers_in_the_models_place(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    from llmlabel.engine.hf import HFEngine
    from llmlabel.engine.vllm import VLLMEngine

    base = AutoModelForCausalLM.from_pretrained(models.fetch(models.SMOLLM2), dtype="float32")
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    reading = HFEngine(models.SMOLLM2, dtype="float32", max_tokens=400)
    chats = [render("label/direct", text=text, labels=["cat", "business"]) for text in TEXTS]
    plain = reading.score(chats, ["cat", "business"]).log_probs
    reading.model.load_state_dict(merged.state_dict())
    expected = reading.score(chats, ["cat", "business"]).log_probs
    engine = VLLMEngine(
        models.SMOLLM2,
        dtype="float32",
        max_tokens=400,
        adapter=tmp_path / "adapter",
        enforce_eager=True,
    )
    got = engine.score(chats, ["cat", "business"]).log_probs
    assert np.abs(plain - expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_seeded_replies_to_more_prompts_than_one_step_reads() -> None:
    from llmlabel.engine.vllm import VLLMEngine

    engine = VLLMEngine(models.SMOLLM2, max_tokens=2048, enforce_eager=True)
    chats = [render("label/direct", text=f"{i} " + "a word " * 600, labels=["x"]) for i in range(6)]
    replies = engine.generate(chats, max_tokens=4, temperature=0.7, seed=1)
    assert all(reply.error is None and reply.text for reply in replies)
