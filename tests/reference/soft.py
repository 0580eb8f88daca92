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


def shares(targets):
    mass = sum(targets)
    return mass, [t / mass if mass else 0.0 for t in targets]


def reverse_kl_divergence(logits, targets, floor=1e-8):
    mass, known = shares(targets)
    pairs = zip(known, log_softmax(logits), strict=True)
    return mass * sum(math.exp(lq) * (lq - math.log(max(t, floor))) for t, lq in pairs)


def jensen_shannon_divergence(logits, targets):
    mass, known = shares(targets)
    total = 0.0
    for t, q in zip(known, softmax(logits), strict=True):
        middle = (t + q) / 2
        total += (t * math.log(t / middle) if t else 0) + (q * math.log(q / middle) if q else 0)
    return mass * total / 2


def symmetric_kl_divergence(logits, targets):
    mass, known = shares(targets)
    return (mass * kl_divergence(logits, known) + reverse_kl_divergence(logits, targets)) / 2


def temper(probs, temperature):
    powers = [p ** (1 / temperature) for p in probs]
    return [sum(probs) * power / sum(powers) if power else 0.0 for power in powers]


def distillation_loss(logits, targets, teacher, alpha, temperature, divergence):
    cool = [z / temperature for z in logits]
    taught = divergence(cool, temper(teacher, temperature))
    return (1 - alpha) * soft_cross_entropy(logits, targets) + alpha * temperature**2 * taught


def weighted_binary_cross_entropy(logits, targets, pos_weight):
    total = 0.0
    for z, t, w in zip(logits, targets, pos_weight, strict=True):
        total -= w * t * log_sigmoid(z) + (1 - t) * log_sigmoid(-z)
    return total


def slope(function, logits, step=1e-5):
    """Its gradient by central differences."""
    found = []
    for k in range(len(logits)):
        up, down = list(logits), list(logits)
        up[k] += step
        down[k] -= step
        found.append((function(up) - function(down)) / (2 * step))
    return found
