"""Twins of `llmlabel.calibrate.noise`, with the noise undone in fractions."""

import math
from fractions import Fraction


def inverse(matrix):
    """By Gauss and Jordan."""
    size = len(matrix)
    rows = [
        [*map(Fraction, row), *(Fraction(i == j) for j in range(size))]
        for i, row in enumerate(matrix)
    ]
    for i in range(size):
        pivot = next(j for j in range(i, size) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]


def uniform(wrong, labels):
    """P(pseudo-label | label), every other label being as probable."""
    other = Fraction(str(wrong)) / (labels - 1)
    return [
        [1 - Fraction(str(wrong)) if i == j else other for j in range(labels)]
        for i in range(labels)
    ]


def coverage(scores, given, matrix, threshold):
    """Sesia et al. 2023: the pseudo-labels, reweighed, tell the coverage of the labels."""
    weights = inverse(matrix)
    total = Fraction(0)
    for row, label in zip(scores, given, strict=True):
        total += sum(weights[label][k] for k, score in enumerate(row) if score <= threshold)
    return total / len(scores)


def threshold(scores, given, matrix, alpha):
    n = len(scores)
    target = Fraction(math.ceil((n + 1) * (1 - Fraction(str(alpha)))), n)
    for candidate in sorted({s for row in scores for s in row if s < math.inf}):
        if coverage(scores, given, matrix, candidate) >= target:
            return candidate
    return None


def slack(wrong, labels, rows, delta):
    """Penso et al. 2025 with one side, the second curve being no step function."""
    spread = wrong * labels / (labels - 1)
    level = math.sqrt(math.log(2 / delta) / (2 * rows))
    return (level + spread * level * (1 + 1 / (2 * math.log(2 / delta)))) / (1 - spread)
