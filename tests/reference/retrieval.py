"""Twins of `llmlabel.loss.retrieval`, of one row: loss, and its gradient for the scores."""

import math

from reference.soft import log_sigmoid, sigmoid

FLOOR = 1e-8


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def shares(relevance):
    """{label: weight} of the positives."""
    total = sum(relevance.values())
    return {p: v / total for p, v in relevance.items() if v > 0}


def decoupled_softmax(scores, relevance):
    negatives = [j for j in range(len(scores)) if j not in relevance]
    loss, gradient = 0.0, [0.0] * len(scores)
    for p, w in shares(relevance).items():
        competing = [p, *negatives]
        log_z = log_sum_exp([scores[j] for j in competing])
        loss += w * (log_z - scores[p])
        for j in competing:
            gradient[j] += w * (math.exp(scores[j] - log_z) - (j == p))
    return loss, gradient


def candidates(scores, relevance):
    return [j for j in range(len(scores)) if relevance.get(j) != 0]


def softmax(scores, relevance):
    weights, among = shares(relevance), candidates(scores, relevance)
    log_z = log_sum_exp([scores[j] for j in among])
    loss, gradient = 0.0, [0.0] * len(scores)
    for p, w in weights.items():
        loss += w * (log_z - scores[p])
        for j in among:
            gradient[j] += w * (math.exp(scores[j] - log_z) - (j == p))
    return loss, gradient


def kl(scores, relevance):
    loss, gradient = softmax(scores, relevance)
    return loss + sum(w * math.log(w) for w in shares(relevance).values()), gradient


def symmetric_kl(scores, relevance):
    weights, among = shares(relevance), candidates(scores, relevance)
    log_z = log_sum_exp([scores[j] for j in among])
    log_p = {j: scores[j] - log_z for j in among}
    ratio = {j: log_p[j] - math.log(max(weights.get(j, 0.0), FLOOR)) for j in among}
    reverse = sum(math.exp(log_p[j]) * ratio[j] for j in among)
    loss, gradient = kl(scores, relevance)
    gradient = [g / 2 for g in gradient]
    for j in among:
        gradient[j] += math.exp(log_p[j]) * (ratio[j] - reverse) / 2
    return (loss + reverse) / 2, gradient


def bce(scores, relevance):
    loss, gradient = 0.0, [0.0] * len(scores)
    for j in candidates(scores, relevance):
        r = relevance.get(j, 0.0)
        loss -= r * log_sigmoid(scores[j]) + (1 - r) * log_sigmoid(-scores[j])
        gradient[j] = sigmoid(scores[j]) - r
    return loss, gradient


def shift(scores, k):
    """t of sum s(score + t) = k by bisection, with what high labels lack to 1 summed apart."""
    low, high = -max(scores) - 100, -min(scores) + 100
    for _ in range(200):
        t = (low + high) / 2
        x = [s + t for s in scores]
        excess = sum(v >= 0 for v in x) - k
        excess += math.fsum(-sigmoid(-v) if v >= 0 else sigmoid(v) for v in x)
        low, high = (t, high) if excess < 0 else (low, t)
    return (low + high) / 2


def soft_topk(scores, relevance, k, alpha):
    among = candidates(scores, relevance)
    loss, gradient = 0.0, [0.0] * len(scores)
    if len(among) <= k:
        return loss, gradient
    t = shift([alpha * scores[j] for j in among], k)
    x = {j: alpha * scores[j] + t for j in among}
    v = {j: alpha * sigmoid(x[j]) * sigmoid(-x[j]) for j in among}
    for p, w in shares(relevance).items():
        loss -= w * log_sigmoid(x[p])
        for j in among:
            gradient[j] -= w * alpha * sigmoid(-x[p]) * ((j == p) - v[j] / sum(v.values()))
    return loss, gradient


def retrieval_loss(name, scores, relevance, k=5, alpha=2.0):
    """`relevance` is {label: value}; a row without positives has loss 0."""
    if not any(relevance.values()):
        return 0.0, [0.0] * len(scores)
    if name == "soft_topk":
        return soft_topk(scores, relevance, k, alpha)
    return globals()[name](scores, relevance)
