"""Twins of `llmlabel.label.profiles`: one label's profile at a time."""

import math


def unit(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length else list(v)


def cosines(row, pool, golds, names, own, prior):
    """The cosine of a row with each label's profile; pool rows in `own` do not count."""
    found = []
    for label, name in enumerate(names):
        total = [prior * x for x in name]
        for i, vector in enumerate(pool):
            if label in golds[i] and i not in own:
                total = [a + b for a, b in zip(total, vector, strict=True)]
        found.append(sum(a * b for a, b in zip(row, unit(total), strict=True)))
    return found
