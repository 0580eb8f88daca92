"""Twin of `llmlabel.calibrate.online`: Gibbs and Candes 2021, equation 2, one row after the other."""

import math
from fractions import Fraction


def quantile(scores, level):
    if level <= 0:
        return math.inf
    if level >= 1:
        return -math.inf
    k = math.ceil((len(scores) + 1) * (1 - Fraction(str(level))))
    return sorted(scores)[k - 1] if k <= len(scores) else math.inf


def levels(scores, start, alpha, gamma, window, delay):
    """Of each row the level and the threshold; a score that nobody knows is None."""
    level, past, found = alpha, list(start), []
    for row in range(len(scores)):
        answered = row - delay - 1
        if answered >= 0 and scores[answered] is not None:
            error = 1 if scores[answered] > found[answered][1] else 0
            level = level + gamma * (alpha - error)
            past.append(scores[answered])
        recent = past if window is None else past[-window:]
        found.append((level, quantile(recent, level)))
    return found
