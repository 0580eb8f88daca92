"""Twins of `llmlabel.label.score_fusion`: one label of one row at a time."""

import math

LOWEST = -16.0


def odds(p):
    return min(max(math.log(p) - math.log1p(-p), LOWEST), -LOWEST)


def features(sources, row, label, counts):
    """`sources`: for each a list of rows, each a dict label -> probability."""
    found = []
    for source in sources:
        stored = source[row]
        if label in stored:
            order = sorted(stored, key=lambda other: (-stored[other], other))
            found += [odds(stored[label]), math.log1p(order.index(label)), 0.0]
        else:
            least = min((odds(p) for p in stored.values()), default=LOWEST)
            found += [least, math.log1p(len(stored)), 1.0]
    return [*found, math.log1p(counts[label])]


def candidates(sources, row):
    return sorted({label for source in sources for label in source[row]})


def fused(sources, row, counts, weights, bias, multilabel):
    """Label -> probability."""
    logits = {
        label: bias
        + sum(w * x for w, x in zip(weights, features(sources, row, label, counts), strict=True))
        for label in candidates(sources, row)
    }
    if multilabel:
        return {label: 1 / (1 + math.exp(-z)) for label, z in logits.items()}
    total = 1 + sum(math.exp(z) for z in logits.values())
    return {label: math.exp(z) / total for label, z in logits.items()}


def nll(sources, golds, counts, weights, bias, multilabel):
    losses = []
    for row, gold in enumerate(golds):
        probs = fused(sources, row, counts, weights, bias, multilabel)
        if multilabel:
            losses += [-math.log(p if label in gold else 1 - p) for label, p in probs.items()]
        else:
            losses.append(-math.log(probs.get(gold[0], 1 - sum(probs.values()))))
    return sum(losses) / len(losses)
