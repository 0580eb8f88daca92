"""Twins of the choices of `llmlabel.label.demonstrations` and `shortlist`, by loops over lists."""

import math


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def k_center(points, count):
    """Greedy cover: start nearest to the mean, then always the point farthest from its center."""
    mean = [sum(p[d] for p in points) / len(points) for d in range(len(points[0]))]
    chosen = [min(range(len(points)), key=lambda i: (squared(points[i], mean), i))]
    while len(chosen) < count:
        rest = [i for i in range(len(points)) if i not in chosen]
        near = {i: min(squared(points[i], points[c]) for c in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (near[i], -i)))
    return chosen


def top_k(scores, k):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i for i in order if scores[i] > -math.inf][:k]


def recall(shortlists, gold, k):
    shares = [
        sum(label in some[:k] for label in true) / len(true)
        for some, true in zip(shortlists, gold, strict=True)
        if true
    ]
    return sum(shares) / len(shares)
