"""Weights that FSDP divides among processes. All processes must call these functions, at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmlabel.train.network import PromptTuned


def divide_by_layer(accelerator: Any, network: torch.nn.Module) -> None:
    """Lets FSDP put the layers of the backbone together one at a time, where nobody says otherwise.

    Raises:
        ValueError: the processes share their work in a way that this training does not know.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if accelerator.is_fsdp2:
        if isinstance(network, PromptTuned):
            raise ValueError(
                "a prompt cannot be trained by FSDP, which gives each layer's weights away before the "
                "prompt's gradient is known; launch with recipes/accelerate/ddp.yaml"
            )
        plugin = accelerator.state.fsdp_plugin
        present = {type(inner).__name__ for inner in network.modules()}
        named = {
            name
            for inner in network.modules()
            for name in getattr(inner, "_no_split_modules", None) or ()
        }
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = sorted(named & present)
    elif kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"distributed_type {kind} cannot train here; launch with recipes/accelerate/ddp.yaml, or "
            "with fsdp.yaml there (fsdp_version 2)"
        )


def divide_again(module: torch.nn.Module) -> None:
    """After a pass without gradients some weights are still whole."""
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of divided ones; others as they are."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in tensors.items()
    }


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The opposite, for a value of a parameter or one that an optimizer keeps of it."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    value = tensor.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def make_whole(module: torch.nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Puts whole weights in the place of divided ones, by name, for saving; the CPU holds them."""
    for name, value in gathered(parameters).items():
        if isinstance(parameters[name], DTensor):
            holder, _, own = name.rpartition(".")
            setattr(module.get_submodule(holder), own, torch.nn.Parameter(value.cpu()))


def kept_states(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """What an optimizer remembers of each of its parameters, whole, by `optimizer.<number>`."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{number}": gathered(state) for number, state in states.items()}


def give_states(optimizer: Any, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The opposite; `kept` may have other names too."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        number: {
            what: divided_like(value, parameter)
            for what, value in kept[f"optimizer.{number}"].items()
        }
        for number, parameter in enumerate(parameters)
        if f"optimizer.{number}" in kept
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
