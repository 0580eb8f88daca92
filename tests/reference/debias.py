"""Twins of `llmlabel.refine.debias`, `orders` and `bias`: loops over lists."""

import math


def weighted(row, weights):
    products = [p * w for p, w in zip(row, weights, strict=True)]
    return [x / sum(products) for x in products]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def mean_prediction(rows, weights):
    return mean([weighted(row, weights) for row in rows])


def matching_weights(rows, prior):
    """One weight at a time by bisection, in turns, until the mean prediction is the prior."""
    weights = [1.0] * len(prior)
    for _ in range(500):
        for label, share in enumerate(prior):
            low, high = -60.0, 60.0
            for _ in range(60):
                middle = (low + high) / 2
                weights[label] = math.exp(middle)
                is_low = mean_prediction(rows, weights)[label] < share
                low, high = (middle, high) if is_low else (low, middle)
        found = mean_prediction(rows, weights)
        if max(abs(a - b) for a, b in zip(found, prior, strict=True)) < 1e-9:
            break
    return weights


def em_step(rows, source, mix):
    """Saerens et al. 2002, equation 2.9."""
    return mean([weighted(row, [m / s for m, s in zip(mix, source, strict=True)]) for row in rows])


def log_likelihood(rows, source, mix):
    terms = [sum(m * p / s for m, p, s in zip(mix, row, source, strict=True)) for row in rows]
    return sum(math.log(term) for term in terms) / len(rows)


def flips(orders):
    """Share of rows whose most probable label is not the same in all orders."""
    changed = 0
    for rows in zip(*orders, strict=True):
        changed += len({row.index(max(row)) for row in rows}) > 1
    return changed / len(orders[0])


def distance(orders):
    """Mean total variation distance; what is missing to 1 counts as one more label."""
    found = []
    for rows in zip(*orders, strict=True):
        whole = [[*row, 1 - sum(row)] for row in rows]
        for i in range(len(whole)):
            for j in range(i):
                pairs = zip(whole[i], whole[j], strict=True)
                found.append(sum(abs(a - b) for a, b in pairs) / 2)
    return sum(found) / len(found)


def sign_test(won, lost):
    """Two-sided exact p-value of as many wins among the changed rows, when half win by luck."""
    changed = won + lost
    tail = sum(math.comb(changed, i) for i in range(max(won, lost), changed + 1)) / 2**changed
    return min(1.0, 2 * tail)
