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


def bin_edges(values, bins, binning):
    """The upper edge of each bin."""
    if binning == "width":
        return [(b + 1) / bins for b in range(bins)]
    ranked = sorted(values)
    return [ranked[math.ceil(len(values) * (b + 1) / bins) - 1] for b in range(bins)]


def members(values, bins, binning):
    """The positions of the values of each bin: the first whose edge they do not exceed."""
    edges = bin_edges(values, bins, binning)
    found = [[] for _ in range(bins)]
    for i, value in enumerate(values):
        found[next((b for b in range(bins) if value <= edges[b]), bins - 1)].append(i)
    return found


def table(values, hits, bins, binning):
    mean, share, count = [], [], []
    for inside in members(values, bins, binning):
        count.append(len(inside))
        mean.append(sum(values[i] for i in inside) / len(inside) if inside else math.nan)
        share.append(sum(hits[i] for i in inside) / len(inside) if inside else math.nan)
    return mean, share, count


def calibration_error(values, hits, bins, binning):
    rows = zip(*table(values, hits, bins, binning), strict=True)
    return sum(n * abs(mean - share) for mean, share, n in rows if n) / len(values)


def top(probs, gold):
    right = [p == g and g != -1 for p, g in zip(predicted(probs), gold, strict=True)]
    return [max(row) for row in probs], right


def reliability(probs, gold, bins, binning):
    return table(*top(probs, gold), bins, binning)


def ece(probs, gold, bins, binning="width"):
    return calibration_error(*top(probs, gold), bins, binning)


def classwise_ece(probs, gold, bins, binning):
    labels = range(len(probs[0]))
    columns = [([row[k] for row in probs], [g == k for g in gold]) for k in labels]
    return sum(calibration_error(*column, bins, binning) for column in columns) / len(labels)


def brier_parts(probs, gold, bins, binning):
    """The five terms of Stephenson et al. 2008, label by label and bin by bin."""
    total = dict.fromkeys(["reliability", "resolution", "uncertainty", "remainder"], 0.0)
    for k in range(len(probs[0])):
        values, hits, rows = [row[k] for row in probs], [g == k for g in gold], len(gold)
        base = sum(hits) / rows
        total["uncertainty"] += base * (1 - base)
        for inside in members(values, bins, binning):
            if not inside:
                continue
            mean = sum(values[i] for i in inside) / len(inside)
            share = sum(hits[i] for i in inside) / len(inside)
            total["reliability"] += len(inside) * (mean - share) ** 2 / rows
            total["resolution"] += len(inside) * (share - base) ** 2 / rows
            for i in inside:
                spread = values[i] - mean
                total["remainder"] += (spread**2 - 2 * spread * (hits[i] - share)) / rows
    return {"brier": brier(probs, gold)} | total


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


def label_coverage(sets, gold):
    """Coverage of each label that has rows."""
    rows = {label: [i for i, g in enumerate(gold) if g == label] for label in set(gold) - {-1}}
    return [sum(sets[i][label] for i in some) / len(some) for label, some in rows.items()]


def macro_coverage(sets, gold):
    share = label_coverage(sets, gold)
    return sum(share) / len(share) if share else math.nan


def under_coverage_gap(sets, gold, target):
    share = label_coverage(sets, gold)
    return sum(max(0.0, target - c) for c in share) / len(share) if share else math.nan


def share_below(sets, gold, least):
    share = label_coverage(sets, gold)
    return sum(c < least for c in share) / len(share) if share else math.nan


def size_stratified_violation(sets, gold, target, strata):
    gaps = []
    for low, high in strata:
        some = [i for i, row in enumerate(sets) if low <= sum(row) <= high]
        if some:
            hits = sum(gold[i] >= 0 and sets[i][gold[i]] for i in some)
            gaps.append(abs(hits / len(some) - target))
    return max(gaps)


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
