"""Twins of `llmlabel.calibrate.powerset`: every one of the 2^labels label sets."""

from itertools import combinations


def label_sets(labels):
    return [some for size in range(labels + 1) for some in combinations(range(labels), size)]


def score(row, some, power):
    return sum(abs((k in some) - p) ** power for k, p in enumerate(row))


def p_value(own, scores):
    return (sum(other >= own for other in scores) + 1) / (len(scores) + 1)


def region(row, scores, alpha, power):
    """Label sets with a p-value above alpha, the nearest first, and the scores of all."""
    every = {some: score(row, some, power) for some in label_sets(len(row))}
    inside = [some for some in every if p_value(every[some], scores) > alpha]
    return sorted(inside, key=every.__getitem__), every


def subsets(cells, capacity):
    return sum(
        sum(some) <= capacity for n in range(len(cells) + 1) for some in combinations(cells, n)
    )


def relevance(gold_rows, truth, row, alpha):
    """Per label: may it be in, may it be out, at alpha / labels each."""
    may = []
    for k, p in enumerate(row):
        scores = [1 - g[k] if t[k] else g[k] for g, t in zip(gold_rows, truth, strict=True)]
        level = alpha / len(row)
        may.append((p_value(1 - p, scores) > level, p_value(p, scores) > level))
    return may
