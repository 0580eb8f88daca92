"""Twins of `llmlabel.calibrate.exchangeability`, `drift` and `diagnostics`."""

import itertools
import math


def distance(known, new):
    """Kolmogorov-Smirnov."""

    def share(values, cut):
        return sum(v <= cut for v in values) / len(values)

    return max(abs(share(known, c) - share(new, c)) for c in [*known, *new])


def exact_p_value(known, new, statistic):
    """Over every choice of the new rows."""
    pooled = [*known, *new]
    observed, further, of = statistic(known, new), 0, 0
    for chosen in itertools.combinations(range(len(pooled)), len(new)):
        here = [pooled[i] for i in chosen]
        rest = [v for i, v in enumerate(pooled) if i not in chosen]
        further += statistic(rest, here) >= observed - 1e-9
        of += 1
    return further / of


def chi_square(known, new):
    pooled = [*known, *new]
    return sum(
        (new.count(kind) - pooled.count(kind) * len(new) / len(pooled)) ** 2 / pooled.count(kind)
        for kind in set(pooled)
    )


def variation(known, new):
    kinds = {*known, *new}
    return sum(abs(known.count(k) / len(known) - new.count(k) / len(new)) for k in kinds) / 2


def online_p_values(scores, uniforms, past):
    found = []
    for t, (score, u) in enumerate(zip(scores, uniforms, strict=True)):
        seen = [*past, *scores[: t + 1]]
        above = sum(s > score for s in seen)
        found.append((above + u * sum(s == score for s in seen)) / len(seen))
    return found


def jumper(p_values):
    """Vovk et al. 2021, algorithm 1, with the money itself."""
    money, path = {-1: 1 / 3, 0: 1 / 3, 1: 1 / 3}, []
    for p in p_values:
        total = sum(money.values())
        money = {e: 0.99 * c + 0.01 / 3 * total for e, c in money.items()}
        money = {e: c * (1 + e * (p - 0.5)) for e, c in money.items()}
        path.append(math.log(sum(money.values())))
    return path


def holm(p_values):
    """Step down: reject the smallest at level / k, the next at level / (k - 1), ..."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = {}
    for place, i in enumerate(order):
        adjusted[i] = min(
            1.0, max((len(p_values) - k) * p_values[order[k]] for k in range(place + 1))
        )
    return [adjusted[i] for i in range(len(p_values))]


def tail(covered, rows, target):
    """P(at most so many covered)."""
    return sum(
        math.comb(rows, k) * target**k * (1 - target) ** (rows - k) for k in range(covered + 1)
    )


def interval(covered, rows):
    """Clopper and Pearson by bisection of the tails."""

    def where(holds):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    lower = where(lambda p: 1 - tail(covered - 1, rows, p) < 0.025) if covered else 0.0
    upper = where(lambda p: tail(covered, rows, p) > 0.025) if covered < rows else 1.0
    return lower, upper


def cells(names, group, inside, sizes, target, level):
    found = []
    for at, name in enumerate(names):
        mine = [i for i, g in enumerate(group) if g == at]
        if mine:
            hits = sum(inside[i] for i in mine)
            below = tail(hits, len(mine), target) <= level / len({g for g in group if g >= 0})
            size = sum(sizes[i] for i in mine) / len(mine)
            found.append((name, len(mine), hits, *interval(hits, len(mine)), size, below))
    return found
