"""Twins of `llmlabel.select`: the papers' rules, row by row."""

import math


def rad_value(probs, gains, mistakes, penalise):
    """What is left of the gain when the worst `mistakes` rows are wrong."""
    parts = sorted((p * g for p, g in zip(probs, gains, strict=True)), reverse=True)
    return sum(parts[mistakes:]) - (sum(parts[:mistakes]) if penalise else 0.0)


def inclusion(probs, budget):
    """Caps at 1 and shares what is over in proportion, until nothing is over."""
    share = [budget * p for p in probs]
    while max(share) > 1 + 1e-12:
        full = [s >= 1 for s in share]
        left = budget - sum(full)
        free = sum(p for p, f in zip(probs, full, strict=True) if not f)
        share = [1.0 if f else left * p / free for p, f in zip(probs, full, strict=True)]
    return share


def llkd(batches, count, ema):
    """Keep and weight of each row of each batch; a batch has (teacher, student) distributions."""
    tau_t, tau_s = 1 / count, 0.5
    p_t, p_s = [1 / count] * count, [1.0] * count
    found = []
    for teacher, student in batches:
        label = [row.index(max(row)) for row in teacher]
        conf = [max(row) for row in teacher]
        unc = [-sum(p * math.log(p) for p in row if p > 0) / math.log(count) for row in student]
        tau_t = ema * tau_t + (1 - ema) * sum(conf) / len(conf)
        tau_s = ema * tau_s + (1 - ema) * sum(unc) / len(unc)
        for c in range(count):
            mine = [i for i, known in enumerate(label) if known == c]
            if mine:
                p_t[c] = ema * p_t[c] + (1 - ema) * sum(conf[i] for i in mine) / len(mine)
                p_s[c] = ema * p_s[c] + (1 - ema) * sum(unc[i] for i in mine) / len(mine)
        keep = [
            conf[i] >= p_t[c] / max(p_t) * tau_t - 1e-12
            and unc[i] >= p_s[c] / max(p_s) * tau_s - 1e-12
            for i, c in enumerate(label)
        ]
        found.append((keep, [k * a * b for k, a, b in zip(keep, conf, unc, strict=True)]))
    return found


def best_of_each(best, score, ranks, count):
    """Label by label: the first `count(rows with a score above 0)` of its rows."""
    kept = [False] * len(best)
    for label in set(best):
        rows = [i for i in range(len(best)) if best[i] == label and score[i] > 0]
        rows.sort(key=lambda i: (-score[i], ranks[i]))
        for row in rows[: count(len(rows))]:
            kept[row] = True
    return kept


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return (ordered[middle] + ordered[-1 - middle]) / 2


def k_center(vectors, budget, known, first):
    """Farthest first, by distances of vectors of length 1."""
    unit = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in vectors]
    taken = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in known]
    rows, distances = [], []
    for _ in range(budget):
        if not taken:
            best, far = first, 2.0
        else:
            gaps = [
                -1.0 if i in rows else min(math.dist(v, other) for other in taken)
                for i, v in enumerate(unit)
            ]
            far = max(gaps)
            best = gaps.index(far)
        rows.append(best)
        distances.append(far)
        taken.append(unit[best])
    return rows, distances


def gradients(probs, vectors):
    """(p - one-hot of its best label) times the vector, written out."""
    found = []
    for p, v in zip(probs, vectors, strict=True):
        best = p.index(max(p))
        found.append([(q - (c == best)) * x for c, q in enumerate(p) for x in v])
    return found


def badge(probs, vectors, budget, uniforms):
    """k-means++ seeding on whole gradients; the same uniform numbers make the same draws."""
    whole = gradients(probs, vectors)
    rows, distances = [], []
    for place in range(budget):
        near = [min((math.dist(g, whole[r]) ** 2 for r in rows), default=1.0) for g in whole]
        mass = [0.0 if i in rows else d for i, d in enumerate(near)]
        point = uniforms[place] * sum(mass)
        row = next(i for i in range(len(mass)) if point < sum(mass[: i + 1]))
        rows.append(row)
        distances.append(near[row] if place else sum(x * x for x in whole[row]))
    return rows, distances


def grams(text, characters):
    plain = " ".join("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())
    if not plain:
        return set()
    return {plain[i : i + characters] for i in range(max(len(plain) - characters + 1, 1))}


def most_similar(text, others, characters):
    """The highest Jaccard similarity with any of the others, by comparing all pairs."""
    mine = grams(text, characters)
    best = 0.0
    for other in others:
        them = grams(other, characters)
        if mine | them:
            best = max(best, len(mine & them) / len(mine | them))
    return best


def review(errors, seconds, budget):
    """Greedy by errors per second, passing over what does not fit."""
    taken = []
    for row in sorted(range(len(errors)), key=lambda i: (-errors[i] / seconds[i], i)):
        if errors[row] > 0 and seconds[row] <= budget:
            taken.append(row)
            budget -= seconds[row]
    return sorted(taken)
