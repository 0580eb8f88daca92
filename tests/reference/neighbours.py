"""Twins of `llmlabel.label.neighbours`: the papers' formulas, row by row."""

import math


def unit(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length else list(v)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(values):
    known = [v for v in values if v is not None]
    if not known:
        return [0.0] * len(values)
    odds = [0.0 if v is None else math.exp(v - max(known)) for v in values]
    return [o / sum(odds) for o in odds]


def neighbours(row, pool, classes, own, *, labels, k, scale, unknown=0.0):
    """Sum of exp(scale cos) of the k nearest, by label; of equal cosines the first."""
    near = [(-round(dot(row, v), 6), i) for i, v in enumerate(pool) if i not in own]
    near = sorted(near)[:k]
    votes = softmax([scale * dot(row, pool[i]) for _, i in near])
    probs = [0.0] * labels
    for weight, (_, i) in zip(votes, near, strict=True):
        probs[classes[i]] += (1 - unknown) * weight
    return probs


def prototypes(row, pool, classes, own, *, labels, scale):
    cosines = []
    for c in range(labels):
        mine = [v for i, v in enumerate(pool) if classes[i] == c and i not in own]
        mean = [sum(column) / len(mine) for column in zip(*mine, strict=True)] if mine else None
        cosines.append(scale * dot(row, unit(mean)) if mine else None)
    return softmax(cosines)


def quantile(values, share):
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def test_time(rows, pool, classes, *, labels, scale, cuts, queue, momentum, step_rows):
    """PS-TTL without a network."""
    queues = [
        [(v, 1.0) for v, c in zip(pool, classes, strict=True) if c == k] for k in range(labels)
    ]
    queues = [some[-queue:] for some in queues]

    def mean(some):
        total = sum(w for _, w in some)
        return [sum(w * v[i] for v, w in some) / total for i in range(len(rows[0]))]

    protos = [mean(some) if some else None for some in queues]
    known = [some is not None for some in protos]
    protos = [some or [0.0] * len(rows[0]) for some in protos]

    def label(row):
        pairs = zip(protos, known, strict=True)
        return softmax([scale * dot(row, unit(p)) if ok else None for p, ok in pairs])

    start = [max(label(row)) for row in rows]
    low, high = (quantile(start, cut) for cut in cuts)
    found = []
    for begin in range(0, len(rows), step_rows):
        step = rows[begin : begin + step_rows]
        probs = [label(row) for row in step]
        for row, soft in zip(step, probs, strict=True):
            sure, best = max(soft), soft.index(max(soft))
            if sure > low:
                queues[best].append((row, 1.0 if sure > high else sure))
                queues[best] = queues[best][-queue:]
        for c in range(labels):
            if queues[c]:
                target = mean(queues[c])
                protos[c] = [
                    momentum * p + (1 - momentum) * t
                    for p, t in zip(protos[c], target, strict=True)
                ]
        found += probs
    return found


def statistics(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def exemplars(pool, names, shots):
    means = [sum(dot(v, t) for v in pool) / len(pool) for t in names]
    owned = {c: [] for c in range(len(names))}
    for i, v in enumerate(pool):
        centred = [round(dot(v, t) - m, 6) for t, m in zip(names, means, strict=True)]
        best = centred.index(max(centred))
        owned[best].append((-centred[best], i))
    return [(i, c) for c in owned for _, i in sorted(owned[c])[:shots]]


def cache_scores(row, own, pool, names, kept, *, alpha, beta, ratio, shots):
    """The paper's sum with the values V written out; what is itself has the affinity 0."""
    mean, deviation = statistics([dot(v, t) for v in pool for t in names])
    scores = [0.0] * len(names)
    for i, c in kept:
        if i in own:
            continue
        values = [alpha * dot(pool[i], t) + (1 - alpha) * (j == c) for j, t in enumerate(names)]
        m, s = statistics(values)
        values = [(v - m) / s * deviation + mean for v in values]
        affinity = math.exp(-(beta - beta * dot(row, pool[i])))
        scores = [a + affinity * v for a, v in zip(scores, values, strict=True)]
    return [ratio * 16 / shots * s for s in scores]


def cache(rows, owns, pool, names, *, shots, alpha, beta, ratio, centring, scale):
    kept = exemplars(pool, names, shots)
    options = {"alpha": alpha, "beta": beta, "ratio": ratio, "shots": shots}
    each = [cache_scores(v, [i], pool, names, kept, **options) for i, v in enumerate(pool)]
    means = [0.0] * len(names)
    if centring != "none":
        means = [sum(column) / len(pool) for column in zip(*each, strict=True)]
    if centring == "all":
        base = [sum(dot(v, t) for v in pool) / len(pool) for t in names]
        means = [a + b for a, b in zip(means, base, strict=True)]
    found = []
    for row, own in zip(rows, owns, strict=True):
        scores = cache_scores(row, own, pool, names, kept, **options)
        total = [dot(row, t) + s - m for t, s, m in zip(names, scores, means, strict=True)]
        found.append(softmax([scale * t for t in total]))
    return found
