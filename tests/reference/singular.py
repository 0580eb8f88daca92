"""Twins of `llmlabel.label.singular`, and the deep networks whose limit it is."""

import math

from reference.neighbours import dot


def votes(row, pool, classes, *, labels, exponent, k):
    """Sum of distance^-exponent of the k nearest, by label; the mean label of exact copies."""
    near = sorted((-round(dot(row, v), 6), i) for i, v in enumerate(pool))[:k]
    distances = [(math.dist(row, pool[i]), i) for _, i in near]
    copies = [i for distance, i in distances if distance**2 < 1e-10]
    probs = [0.0] * labels
    if copies:
        for i in copies:
            probs[classes[i]] += 1 / len(copies)
        return probs
    for distance, i in distances:
        probs[classes[i]] += distance**-exponent
    return [p / sum(probs) for p in probs]


def two_nn(vectors):
    """(n - 1) / sum of ln(r2 / r1)."""
    total = 0.0
    for i, v in enumerate(vectors):
        distances = sorted(math.dist(v, other) for j, other in enumerate(vectors) if i != j)
        total += math.log(distances[1] / distances[0])
    return (len(vectors) - 1) / total


def leave_one_out(pool, classes, *, labels, exponent, k):
    """Summed Brier score when each row of the pool is left out in turn."""
    total = 0.0
    for i, row in enumerate(pool):
        rest = [v for j, v in enumerate(pool) if j != i]
        others = [c for j, c in enumerate(classes) if j != i]
        if classes[i] not in others:
            continue
        probs = votes(row, rest, others, labels=labels, exponent=exponent, k=k)
        total += sum((p - (c == classes[i])) ** 2 for c, p in enumerate(probs))
    return total


# Normalised dual activations of the paper's code, by the dimension of the sphere that they suit.
POLYNOMIALS = {
    1: lambda x: (x**7 + x) / 2,
    2: lambda x: (x**3 + x) / 2,
    4: lambda x: x**3 / 4 + x**2 / 2 + x / 4,
    8: lambda x: x**3 / 16 + 7 * x**2 / 8 + x / 16,
}


def exponent(phi, step=1e-6):
    """2 alpha = -2 ln phi'(0) / ln phi'(1)."""
    slope_0 = (phi(step) - phi(-step)) / (2 * step)
    slope_1 = (phi(1 + step) - phi(1 - step)) / (2 * step)
    return -2 * math.log(slope_0) / math.log(slope_1)


def deep(phi, cosine, depth):
    """The NNGP kernel: phi o ... o phi."""
    for _ in range(depth):
        cosine = phi(cosine)
    return cosine
