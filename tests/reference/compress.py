"""Twins of `llmlabel.refine.compress`: one row at a time, over lists."""

import math


def stored(row, k, bits):
    """The k most probable labels and what is left of their probabilities after rounding."""
    best = sorted((c for c, p in enumerate(row) if p > 0), key=lambda c: (-row[c], c))[:k]
    kept = {c: round(row[c] * 255) / 255 if bits == 8 else row[c] for c in best}
    if best:
        kept[best[0]] = max(kept[best[0]], 1 / 255 if bits == 8 else 0)
    return {c: p for c, p in kept.items() if p > 0}


def restored(kept, count, rest):
    """Marginal smoothing and renormalising of FKD; a sum above 1 comes of rounding only."""
    total = sum(kept.values())
    if not kept:
        return [0.0] * count
    if total > 1 - 1e-6 or rest == "renormalise":
        return [kept.get(c, 0.0) / total for c in range(count)]
    if rest == "missing":
        return [kept.get(c, 0.0) for c in range(count)]
    if len(kept) == count:
        return [kept[c] / total for c in range(count)]
    return [kept.get(c, (1 - total) / (count - len(kept))) for c in range(count)]


def distances(row, label):
    """Cross-entropy to a one-hot label, at most 16 nats."""
    return min(-math.log(max(row[label], 1e-300)), 16.0)


def squared_error(vectors, target, weights):
    error = 0.0
    for vector, goal in zip(vectors, target, strict=True):
        for c in range(len(goal)):
            value = sum(v * weights[i][c] for i, v in enumerate(vector))
            error += (value - goal[c]) ** 2
    return error
