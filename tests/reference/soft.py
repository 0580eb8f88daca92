"""Twins of `llmlabel.loss.soft`, of one row, and their gradients for the logits."""

import math


def softmax(logits):
    powers = [math.exp(z - max(logits)) for z in logits]
    return [power / sum(powers) for power in powers]


def log_softmax(logits):
    top = max(logits)
    return [z - top - math.log(sum(math.exp(y - top) for y in logits)) for z in logits]


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def log_sigmoid(z):
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def soft_cross_entropy(logits, targets):
    return -sum(t * lp for t, lp in zip(targets, log_softmax(logits), strict=True) if t)


def soft_cross_entropy_gradient(logits, targets):
    return [sum(targets) * q - t for q, t in zip(softmax(logits), targets, strict=True)]


def kl_divergence(logits, targets):
    pairs = zip(targets, log_softmax(logits), strict=True)
    return sum(t * (math.log(t) - lp) for t, lp in pairs if t)


kl_divergence_gradient = soft_cross_entropy_gradient  # the entropy of the targets is constant


def binary_cross_entropy(logits, targets):
    total = 0.0
    for z, t in zip(logits, targets, strict=True):
        total -= t * log_sigmoid(z) + (1 - t) * log_sigmoid(-z)
    return total


def binary_cross_entropy_gradient(logits, targets):
    return [sigmoid(z) - t for z, t in zip(logits, targets, strict=True)]


def weighted_mean(values, weights, total):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / (total or sum(weights))
