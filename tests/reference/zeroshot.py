"""Twins of `llmlabel.label.zeroshot`."""

import math


def gcn_layer(edges, count, features, weights):
    """sum_j (A + I)_ij / sqrt(d_i d_j) x_j W."""
    linked = [{i} for i in range(count)]
    for a, b in edges:
        linked[a].add(b)
        linked[b].add(a)
    mixed = [
        [
            sum(features[j][x] / math.sqrt(len(linked[i]) * len(linked[j])) for j in linked[i])
            for x in range(len(features[0]))
        ]
        for i in range(count)
    ]
    return [
        [sum(row[x] * weights[x][y] for x in range(len(row))) for y in range(len(weights[0]))]
        for row in mixed
    ]


def eszsl_objective(w, x, s, y, gamma, lam):
    """||X W S' - Y||^2 + gamma ||W S'||^2 + lambda ||X W||^2 + gamma lambda ||W||^2."""

    def product(a, b):
        return [
            [sum(p * q for p, q in zip(r, c, strict=True)) for c in zip(*b, strict=True)] for r in a
        ]

    def square(a):
        return sum(v * v for row in a for v in row)

    turned = [list(column) for column in zip(*s, strict=True)]
    scores = product(product(x, w), turned)
    loss = square(
        [[p - q for p, q in zip(a, b, strict=True)] for a, b in zip(scores, y, strict=True)]
    )
    loss += gamma * square(product(w, turned)) + lam * square(product(x, w))
    return loss + gamma * lam * square(w)


def harmonic(predicted, gold, seen):
    right = {True: [], False: []}
    for p, g in zip(predicted, gold, strict=True):
        right[bool(seen[g])].append(p == g)
    if not right[True] or not right[False]:
        return 0.0
    s, u = (sum(some) / len(some) for some in right.values())
    return 2 * s * u / (s + u) if s + u else 0.0
