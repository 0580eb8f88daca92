"""Twins of the numeric functions of `llmlabel.taxonomy` that induce and measure labels."""

import math


def information(probs):
    rows, labels = len(probs), len(probs[0])
    mean = [sum(row[label] for row in probs) / rows for label in range(labels)]

    def entropy(shares):
        return -sum(p * math.log(p) for p in shares if p > 0)

    return entropy(mean) - sum(map(entropy, probs)) / rows


def position_free(log_probs, orders):
    count = len(log_probs[0])
    means = [
        sum(row[order.index(one)] for row, order in zip(log_probs, orders, strict=True))
        / len(orders)
        for one in range(count)
    ]
    return [math.exp(one) / sum(map(math.exp, means)) for one in means]
