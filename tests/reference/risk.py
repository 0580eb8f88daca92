"""Twins of `llmlabel.calibrate.risk`, `per_label` and `selective`: every threshold, row by row."""

import math
from fractions import Fraction


def said(row, threshold):
    return {label for label, p in enumerate(row) if p >= threshold and p > 0}


def loss(risk, row_set, true, labels, max_size):
    hits = len(row_set & true)
    if risk == "false_negative":
        return Fraction(len(true) - hits, len(true)) if true else Fraction(0)
    if risk == "false_positive":
        others = labels - len(true)
        return Fraction(len(row_set) - hits, others) if others else Fraction(0)
    if risk == "false_discovery":
        return Fraction(len(row_set) - hits, len(row_set)) if row_set else Fraction(0)
    if risk == "f1":
        both = len(row_set) + len(true)
        return 1 - Fraction(2 * hits, both) if both else Fraction(0)
    return Fraction(int(len(row_set) > max_size))


def total(risk, probs, golds, threshold, max_size=None):
    return sum(
        (
            loss(risk, said(row, threshold), set(gold), len(row), max_size)
            for row, gold in zip(probs, golds, strict=True)
        ),
        Fraction(0),
    )


def binomial_tail(k, n, p):
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def p_value(losses, n, alpha, bound):
    if bound == "binomial":
        return binomial_tail(int(losses), n, alpha)
    mean = float(losses) / n
    if bound == "hoeffding":
        return math.exp(-2 * n * max(alpha - mean, 0) ** 2)
    if mean >= alpha:
        hoeffding = 1.0
    else:
        first = mean * math.log(mean / alpha) if mean else 0.0
        hoeffding = math.exp(-n * (first + (1 - mean) * math.log((1 - mean) / (1 - alpha))))
    return min(hoeffding, math.e * binomial_tail(math.ceil(losses), n, alpha))


def control(risk, probs, golds, alpha, *, delta=None, bound=None, max_size=None):
    """The threshold and the sum of losses there; None where nothing is certified."""
    n = len(probs)
    scores = sorted({p for row in probs for p in row if p > 0}, reverse=True)
    sums = {t: total(risk, probs, golds, t, max_size) for t in [math.inf, *scores]}

    def walk(start, thresholds, level):
        """The certified thresholds and their sums, until the first that is not."""
        for threshold in [start, *thresholds]:
            if threshold not in sums:
                sums[threshold] = total(risk, probs, golds, threshold, max_size)
            losses = sums[threshold]
            if bound is None:
                passes = (losses + 1) / Fraction(n + 1) <= Fraction(str(alpha))
            else:
                passes = p_value(losses, n, alpha, bound) <= level
            if not passes:
                return
            yield threshold, losses

    if risk == "f1":
        starts = [1 - (number + 0.5) / 20 for number in range(20)]
        found = [
            one
            for start in starts
            for one in walk(start, [s for s in scores if s < start], delta / 20)
        ]
        return min(found, key=lambda one: (one[1], found.index(one)), default=None)
    if risk == "false_negative":
        found = list(walk(scores[-1], [*scores[-2::-1], math.inf], delta))
    else:
        found = list(walk(math.inf, scores, delta))[1:]
    return found[-1] if found else None


def label_thresholds(probs, golds, alpha, labels):
    share = Fraction(str(alpha))
    own = {label: [] for label in range(labels)}
    for row, gold in zip(probs, golds, strict=True):
        for label in gold:
            own[label].append(row[label])

    def quantile(scores):
        allowed = math.floor(share * (len(scores) + 1))
        return sorted(scores)[allowed - 1] if allowed else None

    rare = [p for scores in own.values() if quantile(scores) is None for p in scores]
    every = [p for scores in own.values() for p in scores]
    found = []
    for label in range(labels):
        threshold, source = quantile(own[label]), "own"
        if threshold is None:
            threshold, source = quantile(rare), "rare"
        if threshold is None:
            threshold, source = quantile(every), "all"
        found.append((threshold, source if threshold > 0 else "unreachable"))
    return found


def selective(confidence, wrong, target, delta, start):
    """From the start downwards, until a test fails."""
    found = None
    for threshold in [start, *sorted({c for c in confidence if c < start}, reverse=True)]:
        kept = [w for c, w in zip(confidence, wrong, strict=True) if c >= threshold]
        if binomial_tail(sum(kept), len(kept), target) > delta:
            return found
        found = threshold
    return -math.inf
