"""Twins of `llmlabel.calibrate.conformal`."""

import hashlib
import math
from fractions import Fraction


def uniform(row_id, seed):
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row_id}".encode()).digest()[:8]) / 2**64


def lac(row, u):
    return [1 - p for p in row]


def aps(row, u):
    """Romano et al. 2020: the mass that sorts before a label, and a random part of its own."""
    scores = []
    for k, own in enumerate(row):
        before = [p for j, p in enumerate(row) if p > own or (p == own and j < k)]
        scores.append(sum(before) + u * own)
    return scores


def quantile(scores, alpha):
    k = math.ceil((len(scores) + 1) * (1 - Fraction(str(alpha))))
    return sorted(scores)[k - 1] if k <= len(scores) else math.inf


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
