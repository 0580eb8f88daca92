"""Twins of `llmlabel.train.mining`: row by row, from the definitions."""


def fused(rankings, k):
    """Reciprocal rank fusion: items by falling sum of 1 / (k + rank), of equal ones the lower."""
    items = {item for ranking in rankings for item in ranking}
    sums = {x: sum(1 / (k + r.index(x) + 1) for r in rankings if x in r) for x in items}
    return sorted(sums, key=lambda x: (-sums[x], x)), sums


def bar(score, rule, value):
    """From which score on a label may be true."""
    if rule == "perc_pos":
        return value * score if score >= 0 else (2 - value) * score
    if rule == "margin_pos":
        return score - value
    return value if rule == "abs" else float("inf")


def cyclic(size, step):
    """Every step-th place, again and again from one place further on."""
    order, start = [], 0
    while len(order) < size:
        place = start
        while place < size:
            order.append(place)
            place += step
        start += 1
    return order


def mined(text, anchors, given, *, k, rule, value, positive, sample, step, count):
    """Excluded labels and negatives of one row: nearest first, of equally near ones the first."""
    scores = [sum(a * b for a, b in zip(text, anchor, strict=True)) for anchor in anchors]
    own = [scores[label] for label in given]
    least = bar(
        {"max": max, "min": min, "mean": lambda x: sum(x) / len(x)}[positive](own), rule, value
    )
    near = sorted((x for x in range(len(anchors)) if x not in given), key=lambda x: -scores[x])[:k]
    excluded = [x for x in near if scores[x] >= least]
    rest = [x for x in near if scores[x] < least]
    places = cyclic(len(rest), step) if sample == "cyclic" else range(len(rest))
    return excluded, [rest[place] for place in sorted(list(places)[:count])]


def judged(given, candidates, *, beta, positive):
    """(label, score) of a row -> labels as true as its own, and the others; None is no score."""
    own = [score for _, score in given if score is not None]
    best = {"max": max, "min": min, "mean": lambda x: sum(x) / len(x)}[positive](own)
    read = [(label, score) for label, score in candidates if score is not None]
    return [x for x, s in read if s > best - beta], [x for x, s in read if s <= best - beta]
