"""Label probabilities the slow way: one pass of the model per label, in float64."""

from typing import Any

import torch


def joint_log_prob(model: Any, prompt: list[int], reply: list[int]) -> float:
    """Sum over the reply's tokens of log p(token | everything before)."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + reply])).logits[0].double()
    log_probs = logits.log_softmax(dim=-1)
    return sum(log_probs[len(prompt) - 1 + i, t].item() for i, t in enumerate(reply))
