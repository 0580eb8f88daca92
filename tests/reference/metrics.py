"""Twins of `llmlabel.metrics`."""

import math


def predicted(probs):
    return [row.index(max(row)) if max(row) > 0 else -1 for row in probs]


def accuracy(probs, gold):
    right = [p == g and g != -1 for p, g in zip(predicted(probs), gold, strict=True)]
    return sum(right) / len(gold)


def confusion(predicted, gold, labels):
    pairs = list(zip(gold, predicted, strict=True))
    return [[pairs.count((g, p)) for p in range(labels)] for g in range(labels)]


def macro_f1(predicted, gold, labels):
    return macro_f1_multilabel(
        [[p == label for label in range(labels)] for p in predicted],
        [[g == label for label in range(labels)] for g in gold],
    )


def nll(probs, gold, floor):
    likelihoods = [row[g] if g >= 0 else 0.0 for row, g in zip(probs, gold, strict=True)]
    return sum(-math.log(max(p, floor)) for p in likelihoods) / len(gold)


def brier(probs, gold):
    total = 0.0
    for row, g in zip(probs, gold, strict=True):
        total += sum((p - (label == g)) ** 2 for label, p in enumerate(row))
    return total / len(gold)


def reliability(probs, gold, bins):
    top = [max(row) for row in probs]
    right = [p == g and g != -1 for p, g in zip(predicted(probs), gold, strict=True)]
    confidence, correct, count = [], [], []
    for b in range(bins):
        inside = [i for i, t in enumerate(top) if (b / bins < t or b == 0) and t <= (b + 1) / bins]
        count.append(len(inside))
        confidence.append(sum(top[i] for i in inside) / len(inside) if inside else math.nan)
        correct.append(sum(right[i] for i in inside) / len(inside) if inside else math.nan)
    return confidence, correct, count


def ece(probs, gold, bins):
    table = zip(*reliability(probs, gold, bins), strict=True)
    return sum(n * abs(conf - acc) for conf, acc, n in table if n) / len(gold)


def risk_coverage(confidence, correct):
    coverages, risks = [], []
    for threshold in sorted(set(confidence), reverse=True):
        accepted = [r for c, r in zip(confidence, correct, strict=True) if c >= threshold]
        coverages.append(len(accepted) / len(correct))
        risks.append(accepted.count(False) / len(accepted))
    return coverages, risks


def aurc(confidence, correct):
    area, before = 0.0, 0.0
    for coverage, risk in zip(*risk_coverage(confidence, correct), strict=True):
        area += (coverage - before) * risk
        before = coverage
    return area


def coverage(sets, gold):
    return sum(g >= 0 and row[g] for row, g in zip(sets, gold, strict=True)) / len(gold)


def set_size(sets):
    return sum(sum(row) for row in sets) / len(sets)


def binomial_interval(successes, trials, level):
    """The shares at which each tail of the binomial distribution is half of what `level` leaves."""

    def tail(share, counts):
        return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in counts)

    def solve(counts, *, rising):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if (tail(middle, counts) < (1 - level) / 2) == rising:
                low = middle
            else:
                high = middle
        return low

    at_least, at_most = range(successes, trials + 1), range(successes + 1)
    return (
        solve(at_least, rising=True) if successes > 0 else 0.0,
        solve(at_most, rising=False) if successes < trials else 1.0,
    )


def f1(predicted, gold):
    """F1 of two lists of booleans; None where neither has a True."""
    hits = sum(p and g for p, g in zip(predicted, gold, strict=True))
    total = sum(predicted) + sum(gold)
    return 2 * hits / total if total else None


def micro_f1(predicted, gold):
    return f1([p for row in predicted for p in row], [g for row in gold for g in row]) or 0.0


def macro_f1_multilabel(predicted, gold):
    columns = zip(zip(*predicted, strict=True), zip(*gold, strict=True), strict=True)
    values = [f1(p, g) for p, g in columns if any(p) or any(g)]
    return sum(values) / len(values) if values else 0.0


def modularity(edges: list[tuple[int, int]], shares: list[list[float]]) -> float:
    """Sum over all pairs of nodes, as the formula stands; `shares` of each node sum to 1 or 0."""
    nodes = range(len(shares))
    adjacent = [[0.0] * len(shares) for _ in nodes]
    for a, b in edges:
        adjacent[a][b] += 1
        adjacent[b][a] += 1
    degree = [sum(row) for row in adjacent]
    twice = sum(degree)
    total = 0.0
    for i in nodes:
        for j in nodes:
            same = sum(a * b for a, b in zip(shares[i], shares[j], strict=True))
            total += (adjacent[i][j] - degree[i] * degree[j] / twice) * same
    return total / twice
