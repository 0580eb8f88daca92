from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmlabel.train.network import PromptTuned, load_backbone
from llmlabel.train.shards import divide_by_layer, divided_like, gathered, make_whole

# What is divided is tested in tests/launch/test_accelerate.py, by two processes.


def accelerator(kind: str, *, version: int = 2, names: list[str] | None = None) -> Any:
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=names)
    return SimpleNamespace(
        distributed_type=f"DistributedType.{kind}",
        is_fsdp2=kind == "FSDP" and version == 2,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )


@pytest.mark.parametrize(("given", "layers"), [(None, ["LlamaDecoderLayer"]), (["Mine"], ["Mine"])])
def test_layers_are_divided_one_by_one(
    tiny_decoder: Path, given: list[str] | None, layers: list[str]
) -> None:
    network = torch.nn.Sequential(load_backbone(str(tiny_decoder), settings={}))
    found = accelerator("FSDP", names=given)
    divide_by_layer(found, network)
    assert found.state.fsdp_plugin.transformer_cls_names_to_wrap == layers


def test_unknown_ways_to_share_the_work_are_refused() -> None:
    network = torch.nn.Linear(2, 2)
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        divide_by_layer(accelerator(kind), network)
    for kind, version in (("DEEPSPEED", 2), ("FSDP", 1), ("MEGATRON_LM", 2)):
        with pytest.raises(ValueError, match=f"distributed_type {kind} cannot train here; launch"):
            divide_by_layer(accelerator(kind, version=version), network)


def test_a_prompt_is_not_trained_by_fsdp(tiny_decoder: Path) -> None:
    backbone = load_backbone(str(tiny_decoder), settings={})
    network = PromptTuned(backbone, torch.zeros(2, 32), labels=2)
    with pytest.raises(ValueError, match=r"a prompt cannot be trained by FSDP, .*/ddp.yaml"):
        divide_by_layer(accelerator("FSDP"), network)


def test_whole_weights_stay_what_they_are() -> None:
    network = torch.nn.Linear(2, 2)
    before = dict(network.named_parameters())
    now = gathered(before)
    assert all(now[name].data_ptr() == value.data_ptr() for name, value in before.items())
    assert not any(value.requires_grad for value in now.values())
    assert divided_like(now["weight"], network.weight) is now["weight"]
    make_whole(network, before)
    assert all(network.get_parameter(name) is value for name, value in before.items())
