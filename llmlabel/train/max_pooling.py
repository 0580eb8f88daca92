"""Each label's largest logit over the tokens of a text, without keeping the logits of all tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SCORES = 2**24
"""Logits of tokens that are held at a time, 64 MB of float32."""


def largest_scores(
    hidden: Float[Tensor, "rows tokens width"],
    mask: Int[Tensor, "rows tokens"],
    weight: Float[Tensor, "labels width"],
) -> Float[Tensor, "rows labels"]:
    """The maximum of `hidden @ weight.T` over the tokens where `mask` is 1.

    Labels are taken in blocks, which the backward pass computes again.
    """
    parts = torch.split(weight, max(1, _SCORES // mask.numel()))
    if len(parts) == 1:
        return _largest(hidden, mask, weight)
    found = [checkpoint(_largest, hidden, mask, part, use_reentrant=False) for part in parts]
    return torch.cat(found, dim=1)


def _largest(hidden: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    scores = torch.nn.functional.linear(hidden, weight)
    return scores.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)
