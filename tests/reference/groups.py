"""Twins of `llmlabel.calibrate.groups` and `llmlabel.calibrate.shift`."""

import itertools
import math
from fractions import Fraction


def quantile(scores, alpha):
    k = math.ceil((len(scores) + 1) * (1 - Fraction(str(alpha))))
    return sorted(scores)[k - 1] if k <= len(scores) else math.inf


def needed(alpha):
    n = 0
    while quantile([0.0] * n, alpha) == math.inf:
        n += 1
    return n


def own(scores, gold, label, alpha):
    mine = [s for s, g in zip(scores, gold, strict=True) if g == label]
    return quantile(mine, alpha) if len(mine) >= needed(alpha) else None


def parent(scores, gold, label, alpha, parents):
    """Breadth first: the nearest label above with enough rows at or below it."""

    def reaches(node, top):
        return node == top or any(reaches(p, top) for p in parents[node])

    level = list(parents[label])
    while level:
        for node in level:
            mine = [s for s, g in zip(scores, gold, strict=True) if g >= 0 and reaches(g, node)]
            if len(mine) >= needed(alpha):
                return node, quantile(mine, alpha)
        level = [p for node in level for p in parents[node]]
    return None


def chain(scores, gold, labels, alpha, parents, levels):
    """(level, threshold) of each label, without clusters."""
    found = []
    for label in range(labels):
        answer = ("all", math.inf)
        for level in levels:
            if level == "class" and (q := own(scores, gold, label, alpha)) is not None:
                answer = (level, q)
            elif level == "parent" and (p := parent(scores, gold, label, alpha, parents)):
                answer = (level, p[1])
            elif level == "marginal":
                answer = (level, quantile(scores, alpha))
            if answer[0] != "all":
                break
        found.append(answer)
    return found


def interpolate(threshold, marginal, tau, scores):
    finite = [s for s in scores if s < math.inf]
    own = max(finite) if threshold == math.inf and finite else threshold
    return own if tau == 1 else tau * own + (1 - tau) * marginal


def linear_quantile(scores, level):
    ordered = sorted(scores)
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def clusters(points, weights, many):
    """The best of all ways to part weighted points into `many` clusters; numbered by first point."""
    best, kept = math.inf, None
    for way in itertools.product(range(many), repeat=len(points)):
        if sorted(set(way)) != list(range(many)) or list(dict.fromkeys(way)) != list(range(many)):
            continue
        cost = 0.0
        for cluster in range(many):
            mine = [i for i, c in enumerate(way) if c == cluster]
            mass = sum(weights[i] for i in mine)
            for axis in range(len(points[0])):
                centre = sum(weights[i] * points[i][axis] for i in mine) / mass
                cost += sum(weights[i] * (points[i][axis] - centre) ** 2 for i in mine)
        if cost < best:
            best, kept = cost, list(way)
    return kept


def cluster_labels(scores, gold, uniforms, labels, alpha, fewest, many):
    """Ding et al. 2023: the cluster of each label, and which rows calibrate."""
    counts = [gold.count(label) for label in range(labels)]
    rest = [
        u >= 0.5 and (g < 0 or counts[g] >= needed(alpha))
        for u, g in zip(uniforms, gold, strict=True)
    ]
    finite = [s for s in scores if s < math.inf]
    points, weights, embedded = [], [], []
    for label in range(labels):
        mine = [
            min(s, max(finite))
            for s, g, kept in zip(scores, gold, rest, strict=True)
            if g == label and not kept
        ]
        if len(mine) >= fewest:
            levels = [0.5, 0.6, 0.7, 0.8, 0.9, 1 - alpha]
            points.append([linear_quantile(mine, level) for level in levels])
            weights.append(math.sqrt(len(mine)))
            embedded.append(label)
    found = [-1] * labels
    if 1 < many < len(embedded):
        for label, cluster in zip(embedded, clusters(points, weights, many), strict=True):
            found[label] = cluster
    return found, rest


def weighted_threshold(scores, weights, own, alpha):
    """Tibshirani et al. 2019: the row itself stands at infinity with its own weight."""
    pairs = sorted(zip(scores, map(Fraction, weights), strict=True))
    total = sum(Fraction(w) for w in weights) + Fraction(own)
    mass = Fraction(0)
    for score, weight in pairs:
        mass += weight
        if mass >= (1 - Fraction(str(alpha))) * total:
            return score
    return math.inf


def effective(weights):
    return sum(weights) ** 2 / sum(w * w for w in weights)
