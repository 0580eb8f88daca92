"""Slow twins of `llmlabel.labelspace.graph`: everything from its definition, by recursion."""

import itertools
import random

from llmlabel.labelspace import LabelSpace


def random_dag(seed: int, *, most: int = 14) -> LabelSpace:
    """Some roots; every other label has one to three parents among those before it, then shuffled."""
    rng = random.Random(seed)
    count = rng.randint(2, most)
    parents = [
        tuple(rng.sample(range(i), min(i, rng.choice([0, 1, 1, 1, 2, 3])))) for i in range(count)
    ]
    place = list(range(count))
    rng.shuffle(place)
    ids = [f"n{i}" for i in range(count)]
    return LabelSpace(
        ids=tuple(ids[i] for i in place),
        names=tuple(ids[i] for i in place),
        descriptions=("",) * count,
        parents=tuple(tuple(ids[p] for p in parents[i]) for i in place),
    )


def above(labels: LabelSpace, label: int) -> set[int]:
    """The label and everything above it."""
    return {label}.union(*(above(labels, labels.index(p)) for p in labels.parents[label]))


def node_probs(probs: list[list[float]], labels: LabelSpace) -> list[list[float]]:
    lines = [above(labels, label) for label in range(len(labels))]
    return [
        [sum(row[j] for j in range(len(labels)) if i in lines[j]) for i in range(len(labels))]
        for row in probs
    ]


def distances(labels: LabelSpace) -> list[list[float]]:
    """Floyd and Warshall, with a point above the roots."""
    n = len(labels)
    far = [[0.0 if i == j else float("inf") for j in range(n + 1)] for i in range(n + 1)]
    for child, parents in enumerate(labels.parents):
        for other in [labels.index(p) for p in parents] or [n]:
            far[child][other] = far[other][child] = 1.0
    for k, i, j in itertools.product(range(n + 1), repeat=3):
        far[i][j] = min(far[i][j], far[i][k] + far[k][j])
    return [row[:n] for row in far[:n]]


def paths(labels: LabelSpace, label: int) -> set[tuple[int, ...]]:
    if not labels.parents[label]:
        return {(label,)}
    return {
        (*path, label) for p in labels.parents[label] for path in paths(labels, labels.index(p))
    }


def lowest_common_ancestors(labels: LabelSpace, a: int, b: int) -> set[int]:
    common = above(labels, a) & above(labels, b)
    return {c for c in common if not any(c in above(labels, d) for d in common - {c})}


def answer(probs: list[float], labels: LabelSpace) -> int:
    mass = node_probs([probs], labels)[0]
    some = [i for i in range(len(labels)) if not labels.parents[i]]
    at, least = -1, 0.0
    while some:
        best = max(some, key=lambda i: (round(mass[i], 12), -i))
        if not mass[best] > least:
            break
        at, least = best, probs[best]
        some = [i for i in range(len(labels)) if labels.ids[at] in labels.parents[i]]
    return at
