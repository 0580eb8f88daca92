"""Twins of `llmlabel.calibrate.scaling`, `linear` and `venn_abers`."""

import math


def softmax_at(logits, stored, total):
    """Shares of `total` by the exponentials of the stored logits."""
    powers = [math.exp(z) if there else 0.0 for z, there in zip(logits, stored, strict=True)]
    return [total * power / sum(powers) for power in powers]


def vector_scaled(row, weight, bias):
    stored, total = [p > 0 for p in row], sum(row)
    logits = [
        w * math.log(p / total) + b if p > 0 else 0.0
        for p, w, b in zip(row, weight, bias, strict=True)
    ]
    return softmax_at(logits, stored, total)


def dirichlet_scaled(row, weight, bias):
    stored, total = [p > 0 for p in row], sum(row)
    unread = max(max(1 - total, 0.0) / max(stored.count(False), 1), 1e-6)
    logs = [math.log(p if p > 0 else unread) for p in row]
    logits = [
        sum(w * x for w, x in zip(ws, logs, strict=True)) + b
        for ws, b in zip(weight, bias, strict=True)
    ]
    return softmax_at(logits, stored, total)


def odds_scaled(p, weight, bias):
    return 1 / (1 + math.exp(-(weight * math.log(p / (1 - p)) + bias)))


def log_loss(rows, gold):
    """Mean over rows whose gold is stored, counted over all rows, of shares of what a row stores."""
    total = 0.0
    for row, g in zip(rows, gold, strict=True):
        if row[g] > 0:
            total -= math.log(row[g] / sum(row))
    return total / len(rows)


def vector_loss(probs, gold, weight, bias, start, strength):
    rows = [vector_scaled(row, weight, bias) for row in probs]
    pull = sum((w - start) ** 2 + b**2 for w, b in zip(weight, bias, strict=True)) / len(bias)
    return log_loss(rows, gold) + strength * pull


def dirichlet_loss(probs, gold, weight, bias, start, strength):
    labels = len(bias)
    rows = [dirichlet_scaled(row, weight, bias) for row in probs]
    off = sum(weight[i][j] ** 2 for i in range(labels) for j in range(labels) if i != j)
    on = sum((weight[i][i] - start) ** 2 for i in range(labels))
    pull = off / (labels * (labels - 1)) + on / labels + sum(b**2 for b in bias) / labels
    return log_loss(rows, gold) + strength * pull


def odds_loss(probs, hits, weight, bias, start, strength):
    """Several labels a row: a mean over all stored labels."""
    losses = []
    for row, true in zip(probs, hits, strict=True):
        for p, hit, w, b in zip(row, true, weight, bias, strict=True):
            if p > 0:
                q = odds_scaled(p, w, b)
                losses.append(-math.log(q if hit else 1 - q))
    pull = sum((w - start) ** 2 + b**2 for w, b in zip(weight, bias, strict=True)) / len(bias)
    return sum(losses) / len(losses) + strength * pull


def slope(loss, theta, at, step=1e-5):
    """The derivative by one number, by differences."""
    up, down = list(theta), list(theta)
    up[at] += step
    down[at] -= step
    return (loss(up) - loss(down)) / (2 * step)


def pooled(values, weights):
    """Isotonic regression by pooling neighbours that violate the order."""
    blocks = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            v, w, n = blocks.pop()
            v0, w0, n0 = blocks.pop()
            blocks.append([(v * w + v0 * w0) / (w + w0), w + w0, n + n0])
    return [value for value, _, n in blocks for _ in range(n)]


def isotonic_at(scores, hits, new):
    """The isotonic regression of hits on scores, at one of the scores."""
    points = sorted(set(scores))
    groups = [[h for s, h in zip(scores, hits, strict=True) if s == point] for point in points]
    means = [sum(group) / len(group) for group in groups]
    return pooled(means, [len(group) for group in groups])[points.index(new)]


def venn_abers(scores, hits, new):
    """p0 and p1 as they are defined: two regressions for each new score."""
    return tuple(isotonic_at([*scores, new], [*hits, hit], new) for hit in (False, True))
