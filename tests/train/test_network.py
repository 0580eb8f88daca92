from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from transformers import LlamaModel, T5Config, T5Model, ViTConfig, ViTModel

from llmlabel.labelspace import load_labels
from llmlabel.loss.soft import binary_cross_entropy, soft_cross_entropy
from llmlabel.train import max_pooling
from llmlabel.train.max_pooling import largest_scores
from llmlabel.train.network import (
    LabelSupervised,
    LoRA,
    Pooling,
    TokenSupervised,
    check_output,
    load_backbone,
    new_network,
    padded,
    pool,
)
from llmlabel.train.settings import settle_student


@pytest.mark.parametrize("seed", range(20))
def test_pooling_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, tokens, width = (int(n) for n in rng.integers(1, 7, 3))
    hidden = torch.from_numpy(rng.normal(size=(rows, tokens, width)))
    lengths = rng.integers(1, tokens + 1, rows)
    mask = torch.from_numpy((np.arange(tokens) < lengths[:, None]).astype(np.int64))
    for row, length in enumerate(lengths):
        own = hidden[row, :length]
        assert torch.equal(pool(hidden, mask, "last")[row], own[-1])
        torch.testing.assert_close(pool(hidden, mask, "mean")[row], own.mean(dim=0))


@pytest.mark.parametrize("seed", range(20))
def test_maxima_of_blocks_of_labels_equal_those_of_all_with_their_gradients(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward pass needs is computed again: no logits of tokens are kept."""
    rng = np.random.default_rng(seed)
    rows, tokens, width, labels = (int(n) for n in rng.integers(2, 9, 4))
    lengths = rng.integers(1, tokens + 1, rows)
    mask = torch.from_numpy((np.arange(tokens) < lengths[:, None]).astype(np.int64))
    hidden, weight, given = (
        torch.from_numpy(rng.normal(size=size))
        for size in ((rows, tokens, width), (labels, width), (rows, labels))
    )
    if seed % 4 == 0:
        weight[:] = 0  # as before training: all tokens share the gradient
    for one in (hidden, weight):
        one.requires_grad_()
    expected = torch.stack(
        [(own[:n] @ weight.T).amax(dim=0) for own, n in zip(hidden, lengths, strict=True)]
    )
    slopes = torch.autograd.grad(expected, (hidden, weight), given)
    kept: list[int] = []
    for most in (2**24, 2 * mask.numel(), 1):
        monkeypatch.setattr(max_pooling, "_SCORES", most)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value: kept.append(value.numel()) or value, lambda value: value
        ):
            found = largest_scores(hidden, mask, weight)
        torch.testing.assert_close(found, expected)
        for got, slope in zip(
            torch.autograd.grad(found, (hidden, weight), given), slopes, strict=True
        ):
            torch.testing.assert_close(got, slope)
        if most == 1:
            assert max(kept, default=0) <= max(hidden.numel(), weight.numel())


def network_of(folder: Path, how: Pooling, implementation: str, **settings: Any) -> LabelSupervised:
    """A classifier of five labels with a random head."""
    backbone = load_backbone(str(folder), settings=settings)
    backbone.set_attn_implementation(implementation)
    network = LabelSupervised(backbone, labels=5, pooling=how).eval()
    network.score.weight.data = random_head()
    return network


def random_head() -> torch.Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) / 4


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def reference_logits(
    folder: Path, ids: torch.Tensor, weight: torch.Tensor, *, bidirectional: bool, bias: float = 0.0
) -> torch.Tensor:
    """Of every token, by the paper's formula: a 4-D mask of zeros lets every token see all."""
    rows, tokens = ids.shape
    seen = {"attention_mask": torch.zeros(rows, 1, tokens, tokens)} if bidirectional else {}
    return LlamaModel.from_pretrained(folder)(ids, **seen).last_hidden_state @ weight.T + bias


POOLED: dict[Pooling, Any] = {
    "last": lambda logits: logits[:, -1],
    "mean": lambda logits: logits.mean(dim=1),
    "max": lambda logits: logits.max(dim=1).values,
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_logits_and_losses_equal_those_of_the_reference(
    tiny_decoder: Path, how: Pooling, implementation: str, bidirectional: bool
) -> None:
    ids, gold = random_ids(4, 9), torch.tensor([0, 3, 4, 3])
    network = network_of(tiny_decoder, how, implementation, bidirectional=bidirectional)
    weight = network.score.weight.data
    each = reference_logits(tiny_decoder, ids, weight, bidirectional=bidirectional)
    expected = POOLED[how](each)
    with torch.inference_mode():
        logits = network(ids, torch.ones_like(ids))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    for others in {"last", "mean", "max"} - {how}:
        assert (logits - POOLED[others](each)).abs().max() > 0.1
    targets = one_hot(gold, 5).float()
    several = targets + one_hot((gold + 1) % 5, 5)
    for ours, theirs in [
        (soft_cross_entropy(logits, targets), cross_entropy(expected, gold)),
        (
            binary_cross_entropy(logits, several),
            5 * binary_cross_entropy_with_logits(expected, several),
        ),
    ]:
        torch.testing.assert_close(ours.mean(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_token_logits_equal_those_of_the_reference(tiny_decoder: Path, bidirectional: bool) -> None:
    ids = random_ids(3, 8)
    network = TokenSupervised(
        load_backbone(str(tiny_decoder), settings={"bidirectional": bidirectional}), tags=5
    ).eval()
    network.score.weight.data = random_head()
    network.score.bias.data.fill_(0.3)
    expected = reference_logits(
        tiny_decoder, ids, network.score.weight.data, bidirectional=bidirectional, bias=0.3
    )
    with torch.inference_mode():
        logits = network(ids, torch.ones_like(ids))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
@pytest.mark.parametrize("seen", [{}, {"bidirectional": True}, {"bidirectional_from": 1}])
def test_padding_changes_no_probability(
    tiny_decoder: Path, how: Pooling, implementation: str, seen: dict[str, Any]
) -> None:
    settings = {"bidirectional": bool(seen), **seen}
    network = network_of(tiny_decoder, how, implementation, **settings)
    ids = random_ids(1, 9)
    with torch.inference_mode():
        alone = network(ids, torch.ones_like(ids)).softmax(dim=1)
        for pads in (1, 7, 40):
            longer, mask = padded([ids[0].tolist(), [5] * (9 + pads)])
            with_pads = network(longer, mask).softmax(dim=1)[:1]
            assert (with_pads - alone).abs().max() < 1e-5


def test_padding_changes_the_reference_the_more_the_longer_it_is(tiny_decoder: Path) -> None:
    """Its mask of zeros lets tokens see padding, and the mean is over padding too."""
    ids, weight = random_ids(1, 9), torch.eye(32)
    padded_ids = [torch.cat([ids, ids.new_zeros(1, pads)], dim=1) for pads in (0, 2, 8, 32)]
    alone, *longer = [
        reference_logits(tiny_decoder, one, weight, bidirectional=True).mean(dim=1)
        for one in padded_ids
    ]
    off = [(one - alone).abs().mean().item() for one in longer]
    assert 0.1 < off[0] < off[1] < off[2]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("first_layer", [0, 1, 2, None])
def test_later_tokens_are_seen_only_without_the_causal_mask(
    tiny_decoder: Path, implementation: str, with_mask: bool, rows: int, first_layer: int | None
) -> None:
    """None: they are seen nowhere; else from that layer upward."""
    settings = {"bidirectional": first_layer is not None, "bidirectional_from": first_layer or 0}
    backbone = load_backbone(str(tiny_decoder), settings=settings).eval()
    backbone.set_attn_implementation(implementation)
    states = []
    for last in (8, 9):
        ids = torch.tensor([[5, 6, 7, last]] * rows)
        more: dict[str, Any] = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
        with torch.inference_mode():
            found = backbone(ids, output_hidden_states=True, **more).hidden_states
        states.append(torch.stack(found))
    changes = (states[0] - states[1]).abs().amax(dim=(1, 3))  # of each layer's output and token
    for layer, change in enumerate(changes[1:]):
        seen = first_layer is not None and layer >= first_layer
        for earlier in range(3):
            assert (change[earlier] > 1e-3) if seen else (change[earlier] == 0)


def test_there_is_no_such_layer(tiny_decoder: Path, tiny_encoder: Path) -> None:
    given = {"bidirectional": True, "bidirectional_from": 3}
    with pytest.raises(ValueError, match="bidirectional_from=3: the layers are 0 to 2"):
        load_backbone(str(tiny_decoder), settings=given)
    with pytest.raises(
        ValueError, match="bidirectional_from=3: the layers of BertModel have no mas"
    ):
        load_backbone(str(tiny_encoder), settings=given)


def test_a_pooler_that_is_never_used_is_dropped(tiny_encoder: Path) -> None:
    backbone = load_backbone(str(tiny_encoder), settings={"bidirectional": False})
    assert backbone.pooler is None
    assert backbone(torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 32)


def test_a_folder_of_another_kind_of_student_is_refused(tmp_path: Path) -> None:
    prompted: dict[str, Any] = {"prompt_tokens": 3}
    for name in ("model_card.json", "head.safetensors", "labels.json", ".checkpoint.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()  # a tracker's, of a training that is not finished
    for settings in ({}, prompted):
        check_output(tmp_path, settings)
    (tmp_path / "mine.parquet").touch()
    check_output(tmp_path, {}, others=["mine.parquet"])
    with pytest.raises(
        ValueError, match=r"holds mine.parquet, which is no file of a student with a"
    ):
        check_output(tmp_path, {})
    (tmp_path / "mine.parquet").unlink()
    (tmp_path / "prompt.safetensors").touch()
    check_output(tmp_path, prompted)
    with pytest.raises(
        ValueError, match=r"prompt.safetensors, .* of a student with adapters; give"
    ):
        check_output(tmp_path, {})
    (tmp_path / "prompt.safetensors").rename(tmp_path / "adapter_model.safetensors")
    check_output(tmp_path, {})
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors, .* of a student with a prompt;"
    ):
        check_output(tmp_path, prompted)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_what_does_not_read_texts_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    small = {"num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    many = {"vocab_size": 30, "decoder_start_token_id": 0, **sizes}
    seen = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4, **small}
    for name, model in (
        ("t5", T5Model(T5Config(**many))),
        ("eyes", ViTModel(ViTConfig(**seen))),
    ):
        folder = save(model, tmp_path / name)
        message = (
            rf"^model .*{name}: {type(model).__name__} does not read a text into one vector a t"
        )
        with pytest.raises(ValueError, match=message):
            load_backbone(str(folder), settings={})


def test_own_errors_come_as_they_are(tiny_decoder: Path, tmp_path: Path) -> None:
    labels = load_labels(["a", "b"])
    given = settle_student({"bidirectional": True, "bidirectional_from": 9})
    with pytest.raises(ValueError, match=r"^bidirectional_from=9: the layers are 0 to 2$"):
        new_network(str(tiny_decoder), labels, given)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^load_in_4bit needs a GPU and the package bitsand"):
            new_network(str(tiny_decoder), labels, settle_student({"load_in_4bit": True}))
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=rf"^model '{tmp_path}' cannot be loaded \("):
        new_network(str(tmp_path), labels, given)


def test_adapters_that_cannot_be_are_refused(tiny_decoder: Path) -> None:
    for given, message in (
        ({"r": 0}, "lora: r must be at least 1, the rank of the adapters; got 0"),
        ({"dropout": 1.0}, "lora: dropout must be from 0 to below 1; got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRA(**given)
    labels = load_labels(["a", "b"])
    there = "it has embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$"
    for targets, missing in ((["q_proj", "zzz"], "zzz"), ("q_proj", "q_proj"), (["j"], "j")):
        settings = settle_student({"lora": LoRA(targets=targets)})
        with pytest.raises(
            ValueError, match=rf"targets=.*: LlamaModel has no layer '{missing}'; {there}"
        ):
            new_network(str(tiny_decoder), labels, settings)
    settings = settle_student({"lora": LoRA(targets="(q_proj")})
    with pytest.raises(ValueError, match=r"targets='\(q_proj' is no regular expression"):
        new_network(str(tiny_decoder), labels, settings)
    for targets in (["q_proj", "mlp.up_proj"], r".*\.v_proj"):
        settings = settle_student({"lora": LoRA(targets=targets)})
        new_network(str(tiny_decoder), labels, settings)
