"""Twins of `llmlabel.calibrate.scores` and `llmlabel.calibrate.conformal`."""

import hashlib
import math
from fractions import Fraction


def uniform(row_id, seed):
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row_id}".encode()).digest()[:8]) / 2**64


def before(row, k):
    """The labels that rank before label k: more probable, or as probable with a lower id."""
    return [j for j, p in enumerate(row) if p > row[k] or (p == row[k] and j < k)]


def stored(row, scores):
    return [s if p > 0 else math.inf for p, s in zip(row, scores, strict=True)]


def lac(row, u):
    """Sadinle et al. 2019."""
    return stored(row, [1 - p for p in row])


def adjusted(row, prior):
    """Ding et al. 2025: p(y | x) / p(y), as a score of "lac"."""
    return stored(row, [1 - p / share for p, share in zip(row, prior, strict=True)])


def aps(row, u):
    """Romano et al. 2020: the mass that sorts before a label, and a random part of its own."""
    return stored(row, [sum(row[j] for j in before(row, k)) + u * row[k] for k in range(len(row))])


def raps(row, u, penalty, free_labels):
    """Angelopoulos et al. 2021: also a penalty for each rank that is not free."""
    ranks = [1 + len(before(row, k)) for k in range(len(row))]
    extra = [penalty * max(0, rank - free_labels) for rank in ranks]
    return [a + b for a, b in zip(aps(row, u), extra, strict=True)]


def saps(row, u, weight):
    """Huang et al. 2024, equation 7: the largest probability, then ranks instead of masses."""
    scores = []
    for k in range(len(row)):
        rank = 1 + len(before(row, k))
        scores.append(u * max(row) if rank == 1 else max(row) + (rank - 2 + u) * weight)
    return stored(row, scores)


def margin(row, u):
    others = [row[:k] + row[k + 1 :] for k in range(len(row))]
    return stored(row, [max(rest, default=0) - p for rest, p in zip(others, row, strict=True)])


def quantile(scores, alpha):
    k = math.ceil((len(scores) + 1) * (1 - Fraction(str(alpha))))
    return sorted(scores)[k - 1] if k <= len(scores) else math.inf


def p_value(score, calibration):
    """Vovk et al. 2005, equation 2.20."""
    return Fraction(1 + sum(s >= score for s in calibration), len(calibration) + 1)


def smoothed(score, calibration, u):
    """Vovk et al. 2005, equation 2.21, the new row being one of those that are equal."""
    more = sum(s > score for s in calibration)
    equal = sum(s == score for s in calibration) + 1
    return (more + u * equal) / (len(calibration) + 1)


def threshold(ids, probs, gold, alpha, score, seed):
    scores = []
    for row_id, row, g in zip(ids, probs, gold, strict=True):
        scores.append(score(row, uniform(row_id, seed))[g] if g >= 0 else math.inf)
    return quantile(scores, alpha)


def sets(ids, probs, limit, score, seed):
    chosen = []
    for row_id, row in zip(ids, probs, strict=True):
        scores = score(row, uniform(row_id, seed))
        inside = [k for k in range(len(row)) if scores[k] <= limit]
        chosen.append(sorted(inside, key=lambda k, row=row: (-row[k], k)))
    return chosen
