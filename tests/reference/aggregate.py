"""Consensus of sources for one row, by loops over lists."""

import math


def log_average(sources: list[list[float]]) -> list[float]:
    """Normalised geometric mean."""
    labels = range(len(sources[0]))
    logs = [sum(math.log(p[c]) for p in sources) / len(sources) for c in labels]
    total = sum(math.exp(x) for x in logs)
    return [math.exp(x) / total for x in logs]


def consensus(spread: float, members: int) -> float:
    """exp(-alpha spread) min(1.1, 1 + beta (n - 2)), alpha 0.1, beta 0.05."""
    return math.exp(-0.1 * spread) * min(1.1, 1 + 0.05 * (members - 2))


def confidence(sources: list[list[float]], label: int) -> float:
    """(0.7 max + 0.3 mean) x consensus over the sources that chose `label`."""
    members = [p for p in sources if p.index(max(p)) == label]
    if not members:
        return 0.0
    scores = [p[label] for p in members]
    mean = [sum(p[c] for p in members) / len(members) for c in range(len(members[0]))]
    overlaps = [sum(min(a, b) for a, b in zip(p, mean, strict=True)) for p in members]
    spread = 1 - sum(overlaps) / len(members)
    base = 0.7 * max(scores) + 0.3 * sum(scores) / len(scores)
    return base * consensus(spread, len(members))
