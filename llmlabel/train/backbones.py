"""What a backbone has to be, and how the tokens of a decoder see later ones."""

import re
from typing import Any


def check_reads_texts(backbone: Any, model: str) -> None:
    """Refuses what has no vectors of the tokens of a text, such as T5 or a model of images."""
    if (
        backbone.config.is_encoder_decoder
        or not hasattr(backbone.config, "hidden_size")
        or getattr(backbone, "main_input_name", "") != "input_ids"
    ):
        raise ValueError(
            f"model {model}: {type(backbone).__name__} does not read a text into one vector a token; "
            "give a decoder or an encoder of texts, such as Qwen/Qwen3-0.6B or all-MiniLM-L6-v2"
        )


def check_targets(backbone: Any, targets: str | list[str]) -> None:
    """PEFT says nothing of a name in a list that no layer has."""
    if targets == "all-linear":
        return
    modules = backbone.named_modules()
    layers = [name for name, one in modules if getattr(getattr(one, "weight", 0), "ndim", 0) == 2]
    for target in [targets] if isinstance(targets, str) else targets or [""]:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"lora: targets={targets!r} is no regular expression ({error}); give one, a list of names "
                "of layers, or 'all-linear'"
            ) from None
        if not any(re.fullmatch(pattern, name) for name in layers):
            there = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise ValueError(
                f"lora: targets={targets!r}: {type(backbone).__name__} has no layer {target!r}; it has "
                f"{', '.join(there)}"
            )


def see_later_tokens(backbone: Any, *, first_layer: int = 0) -> None:
    """Takes the causal mask away (LS-unLLaMA), from one layer upward; padding stays unseen.

    Differs from the reference code, where every token attends to padding too.

    Raises:
        ValueError: there is no such layer, or the layers cannot be told apart.
    """
    if first_layer == 0:
        backbone.config.is_causal = False
        return
    from transformers.masking_utils import create_bidirectional_mask

    layers = getattr(backbone, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"bidirectional_from={first_layer}: the layers of {type(backbone).__name__} have no "
            "masks of their own; leave it 0"
        )
    if not 0 <= first_layer < len(layers):
        raise ValueError(f"bidirectional_from={first_layer}: the layers are 0 to {len(layers) - 1}")
    now: dict[str, Any] = {}

    def remember(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        now["mask"] = named.get("attention_mask")

    def widen(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = arguments[0] if arguments else named["hidden_states"]
        mask = create_bidirectional_mask(
            config=backbone.config, inputs_embeds=hidden, attention_mask=now["mask"]
        )
        return arguments, named | {"attention_mask": mask}

    backbone.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in layers[first_layer:]:
        layer.self_attn.is_causal = False  # what sdpa goes by where there is no mask
        layer.register_forward_pre_hook(widen, with_kwargs=True)
