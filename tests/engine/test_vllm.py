"""What only vLLM does: adapters, embeddings, classification heads; on the CPU build or a GPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmlabel import models
from llmlabel.labelspace import load_labels
from llmlabel.prompt import render

pytestmark = pytest.mark.vllm
LABELS = load_labels(["animal", "money", "sport"])
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


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmlabel.softlabels import SoftLabels
    from llmlabel.train.classifier import train_classifier

    kinds = ["The cat sat on the mat.", "Shares fell on Monday.", "They won the match."]
    rows = Dataset.from_dict({"text": [f"{kinds[i % 3]} {i}" for i in range(12)]})
    return train_classifier(
        SoftLabels.from_dense(np.eye(3)[np.arange(12) % 3] * 0.85 + 0.05, LABELS).add_to(rows),
        LABELS,
        model=models.SMOLLM2,
        output=tmp_path_factory.mktemp("student") / "model",
        learning_rate=1e-3,
        num_train_epochs=3,
        per_device_train_batch_size=6,
        max_length=32,
    )


@pytest.mark.parametrize("merged", [True, False])
def test_a_student_is_served_as_it_predicts(student: Path, tmp_path: Path, merged: bool) -> None:
    """Merged with its backbone, and as an adapter with a head beside it; a long text is cut."""
    from llmlabel.engine.vllm_pooling import VLLMClassifier
    from llmlabel.softlabels import SoftLabels
    from llmlabel.train.classifier import predict
    from llmlabel.train.export import export_adapter, export_classifier

    texts = [
        *TEXTS,
        "The striker and the bank agreed on a dog.",
        "They won. " + "Shares fell. " * 30,
    ]
    rows = Dataset.from_dict({"id": [str(i) for i in range(len(texts))], "text": texts})
    expected = SoftLabels.from_dataset(predict(rows, model=student), LABELS).dense()
    # `predict` is in float32. Merging rounds backbone plus adapter once more where a folder is read in
    # bfloat16 (0.0114 seen), so merged weights are compared as they were written.
    given: dict[str, Any] = {
        "dtype": "float32" if merged else "bfloat16",
        "enforce_eager": True,
        "max_tokens": 32,
    }
    if merged:
        got = VLLMClassifier(export_classifier(student, output=tmp_path / "m"), **given)
    else:
        adapter = export_adapter(student, output=tmp_path / "adapter")
        got = VLLMClassifier(models.SMOLLM2, adapter=adapter, **given)
    np.testing.assert_allclose(got.classify(texts), expected, atol=1e-3 if merged else 1e-2)
    assert np.ptp(expected, axis=0).max() > 0.3  # the texts matter


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
