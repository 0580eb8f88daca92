"""Twins of `llmlabel.taxonomy.discover`."""

import itertools
import math
from collections import Counter


def novel_queries(probs, known, n, round, adaptive_round):
    """Adaptive-Novel, one row at a time; then what is left where the paper's code gives up."""
    margins = [sorted(row)[-1] - sorted(row)[-2] for row in probs]
    sign = 1 if round >= adaptive_round else -1
    order = sorted(range(len(probs)), key=lambda row: (sign * margins[row], row))
    clusters = [row.index(max(row)) for row in probs]
    new = range(known, len(probs[0]))
    taken = []
    for cluster in new:
        taken += [row for row in order if clusters[row] == cluster][: n // len(new)]
    for row in order:
        if len(taken) < n and clusters[row] >= known and row not in taken:
            taken.append(row)
    for row in order:
        if len(taken) < n and row not in taken:
            taken.append(row)
    return taken


def gcd_metrics(predicted, gold, known):
    """By trying every assignment of clusters to labels."""
    size = max([*predicted, *gold, 0]) + 1
    pairs = Counter((p, g) for p, g in zip(predicted, gold, strict=True) if p >= 0 and g >= 0)
    best = max(
        itertools.permutations(range(size)),
        key=lambda cluster: (
            sum(pairs[cluster[g], g] for g in range(size)),
            sum(cluster[g] == g for g in range(size)),
        ),
    )

    def share(labels):
        rows = [(p, g) for p, g in zip(predicted, gold, strict=True) if g in labels]
        return sum(best[g] == p for p, g in rows) / len(rows) if rows else 0.0

    return (
        {
            "all": share(range(size)),
            "old": share(range(known)),
            "new": share(range(known, size)),
        },
        pairs,
        best,
    )


def query_metrics(gold, known, labels):
    new = Counter(g for g in gold if g >= known)
    total = sum(new.values())
    entropy = -sum(c / total * math.log(c / total) for c in new.values())
    return {
        "novel_ratio": total / len(gold) if gold else 0.0,
        "novel_coverage": len(new) / (labels - known),
        "novel_uniformity": entropy / math.log(max(labels - known, 2)),
    }
