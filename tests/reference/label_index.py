"""Twins of `llmlabel.label.index` and `llmlabel.label.retrieval`: one cosine at a time."""

import math


def nearest(vector, labels, k):
    """(cosine, label) of the k nearest; cosines to 6 digits, of equal ones the lower label."""
    cosines = [sum(x * y for x, y in zip(vector, label, strict=True)) for label in labels]
    order = sorted(range(len(labels)), key=lambda i: (-round(cosines[i], 6), i))
    return [(cosines[i], i) for i in order[:k]]


def probs(cosines, scale, midpoint, multilabel):
    if multilabel:
        return [1 / (1 + math.exp(-scale * (c - midpoint))) for c in cosines]
    odds = [math.exp(scale * c) for c in cosines]
    return [o / sum(odds) for o in odds]


def recall(ranked, gold, k):
    """Mean over rows with gold of the share that is among the first k."""
    shares = [
        len(set(some[:k]) & set(true)) / len(set(true))
        for some, true in zip(ranked, gold, strict=True)
        if true
    ]
    return sum(shares) / len(shares)
