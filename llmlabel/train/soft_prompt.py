"""What a soft prompt begins as, and what a frozen decoder keeps of it for the texts that go on there."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmlabel.labelspace import LabelSpace


def check_choices(settings: dict[str, Any]) -> None:
    """Refuses what a prompt cannot begin as, or be trained by."""
    if settings["prompt_tokens"] < 1:
        raise ValueError(f"prompt_tokens must be at least 1; got {settings['prompt_tokens']}")
    if settings["init"] not in ("labels", "random"):
        raise ValueError(f"init is 'labels' or 'random'; got {settings['init']!r}")
    if settings["pos_weight"] not in (None, "balanced"):
        raise ValueError(f"pos_weight is 'balanced' or null; got {settings['pos_weight']!r}")


def first_prompt(tokenizer: Any, labels: LabelSpace, settings: dict[str, Any]) -> list[int]:
    """The tokens whose embeddings a prompt begins as; of `init=labels` in any order of the labels."""
    rng = np.random.default_rng(settings["seed"])
    size = settings["prompt_tokens"]
    if settings["init"] == "random":
        words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        found: list[int] = rng.choice(words, size).tolist()
        return found
    names = " ".join(sorted(labels.names))
    words = list(tokenizer(names, add_special_tokens=False).input_ids)
    drawn = [rng.permutation(words) for _ in range(-(-size // len(words)))]
    return np.concatenate(drawn)[:size].tolist()


def keys_and_values(backbone: Any, **given: Tensor) -> tuple[Any, dict[str, Any]]:
    """Of what stands before; and the arguments with which a backbone goes on from there."""
    from transformers import DynamicCache

    takes = inspect.signature(backbone.forward).parameters  # versions name it differently
    kept = DynamicCache(config=backbone.config)
    going_on = {"cache" if "cache" in takes else "past_key_values": kept, "use_cache": True}
    backbone(**given, **going_on)
    return kept, going_on


def keep_matrices(model: Any, dtype: torch.dtype) -> None:
    """Keeps the matrices of a frozen model in a number format, for `as_kept`.

    Autocast casts what is not trained again in every pass, which takes as long as a small pass itself.
    """
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # a head that shares the embeddings' leaves them be
            weight = module.weight.detach().to(dtype)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)


def as_kept(model: Any) -> AbstractContextManager[Any]:
    """Computes in the number format in which matrices are kept, if they are."""
    for parameter in model.parameters():
        if parameter.dtype != torch.float32:
            return torch.autocast(parameter.device.type, dtype=parameter.dtype)
    return nullcontext()


def check_prompted(backbone: Any, model: str, settings: dict[str, Any]) -> None:
    """Refuses what cannot be trained with a prompt whose keys and values all rows share."""
    if settings["gradient_checkpointing"]:
        raise ValueError(
            "gradient_checkpointing=True: a prompt's keys and values are computed once for all rows "
            "of a pass, and so not again; leave it out and lower pass_tokens"
        )
    if not _goes_on(backbone):
        raise ValueError(
            f"model={model}: {type(backbone).__name__} does not read a text as what goes on after a "
            "prompt; give a decoder, or use llmlabel.train.classifier.train_classifier"
        )


@torch.no_grad()
def _goes_on(backbone: Any) -> bool:
    """Whether it keeps keys and values, which no later token changes."""
    try:
        kept, _ = keys_and_values(backbone, input_ids=torch.tensor([[1, 2]]))
        one, other = (
            backbone(input_ids=torch.tensor([[1, later]])).last_hidden_state[0, 0]
            for later in (2, 3)
        )
        tokens = kept.get_seq_length()
    except (TypeError, ValueError):  # takes none, or keeps something else
        return False
    return bool(tokens == 2) and torch.allclose(one, other, rtol=1e-6, atol=1e-6)
