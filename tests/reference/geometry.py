"""Twins of `llmlabel.refine.geometry` and `llmlabel.refine.locus`: every pair, one at a time."""

from collections import deque


def distances(parents):
    """Edges between all labels; -1 is the point above the roots, and no label."""
    near = {node: set() for node in [-1, *range(len(parents))]}
    for child, some in enumerate(parents):
        for parent in some or [-1]:
            near[child].add(parent)
            near[parent].add(child)
    found = []
    for start in range(len(parents)):
        far, waiting = {start: 0}, deque([start])
        while waiting:
            at = waiting.popleft()
            for other in near[at] - set(far):
                far[other] = far[at] + 1
                waiting.append(other)
        found.append([far[node] for node in range(len(parents))])
    return found


def vector_distances(vectors):
    return [
        [sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) ** 0.5 for v in vectors]
        for u in vectors
    ]


def expected(probs, far):
    """F of every label for one row."""
    total = sum(probs)
    return [sum(p * d * d for p, d in zip(probs, row, strict=True)) / total for row in far]


def frechet_mean(probs, far):
    """The first of the labels whose F is least, to 9 digits."""
    if not any(probs):
        return -1
    values = [round(value, 9) for value in expected(probs, far)]
    return values.index(min(values))


def between(observed, far):
    """All labels on a shortest way between two observed ones."""
    return [
        y
        for y in range(len(far))
        if any(far[a][y] + far[y][b] == far[a][b] for a in observed for b in observed)
    ]


def next_label(observed, far):
    reached = between(observed, far)
    away = [min(far[y][r] for r in reached) for y in range(len(far))]
    return away.index(max(away)) if max(away) else None
