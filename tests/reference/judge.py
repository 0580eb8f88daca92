"""Twins of `llmlabel.label.judge`."""

import math


def match(log_probs, yes):
    """P(yes) / (P(yes) + P(no)) and their sum; None where nothing was read."""
    probs = [math.exp(x) for x in log_probs]
    if not sum(probs):
        return None, 0.0
    return sum(p for p, y in zip(probs, yes, strict=True) if y) / sum(probs), min(sum(probs), 1.0)


def auc(scores, truth):
    """Share of pairs (true, false) in the right order; equal ones count half."""
    wins, pairs = 0.0, 0
    for a, is_true in zip(scores, truth, strict=True):
        for b, other in zip(scores, truth, strict=True):
            if is_true and not other:
                wins += 1.0 if a > b else 0.5 if a == b else 0.0
                pairs += 1
    return wins / pairs
