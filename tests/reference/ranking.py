"""Twins of `llmlabel.metrics.ranking`, one row after another."""

import math
from fractions import Fraction


def ranked(row, k):
    """`row` is a dict of label -> score."""
    return sorted(row, key=lambda label: (-row[label], label))[:k]


def discounted(gains):
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))


def scores(rows, gold, k, weight):
    precision = recall = ndcg = 0.0
    psp = best_psp = psndcg = best_psndcg = 0.0
    for row, true in zip(rows, gold, strict=True):
        top = ranked(row, k)
        precision += sum(label in true for label in top) / k
        psp += sum(weight[label] for label in top if label in true) / k
        best = sorted((weight[label] for label in true), reverse=True)[:k]
        best_psp += sum(best) / k
        if true:
            ideal = discounted([1.0] * min(k, len(true)))
            recall += sum(label in true for label in top) / len(true)
            ndcg += discounted([float(label in true) for label in top]) / ideal
            psndcg += discounted([weight[x] if x in true else 0.0 for x in top]) / ideal
            best_psndcg += discounted(best) / ideal
    return {
        f"P@{k}": precision / len(rows),
        f"R@{k}": recall / len(rows),
        f"nDCG@{k}": ndcg / len(rows),
        f"PSP@{k}": psp / best_psp if best_psp else 0.0,
        f"PSnDCG@{k}": psndcg / best_psndcg if best_psndcg else 0.0,
    }


def inverse_propensity(gold, labels, a, b):
    rows = len(gold)
    c = (math.log(rows) - 1) * (b + 1) ** a
    counts = [sum(label in true for true in gold) for label in range(labels)]
    return [1 + c * (count + b) ** (-a) for count in counts]


def frequency_group(counts, label, groups):
    """How much of the labels that occur lies before the middle of those that are as frequent."""
    if not counts[label]:
        return -1
    seen = sum(count > 0 for count in counts)
    before = sum(count > counts[label] for count in counts)
    equal = sum(count == counts[label] for count in counts)
    return math.floor(Fraction(2 * before + equal, 2 * seen) * groups)


def by_frequency(rows, gold, counts, k, groups):
    """(labels, gold pairs, hits) of each group, the unseen labels last."""
    of = [frequency_group(counts, label, groups) for label in range(len(counts))]
    lines = []
    for group in [*range(groups), -1]:
        pairs = sum(of[label] == group for true in gold for label in true)
        hits = sum(
            of[label] == group
            for row, true in zip(rows, gold, strict=True)
            for label in ranked(row, k)
            if label in true
        )
        lines.append((sum(each == group for each in of), pairs, hits))
    return lines
