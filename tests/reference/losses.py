"""Twins of `llmlabel.loss.robust`, `longtail` and `sets`: one row, the formula as it stands."""

import itertools
import math

from reference.soft import log_softmax, sigmoid, softmax


def clamp(value, low=1e-4, high=1 - 1e-4):
    return min(max(value, low), high)


def early_learning_step(target, logits, beta):
    """The next target of a row."""
    probs = [clamp(p) for p in softmax(logits)]
    return [beta * t + (1 - beta) * p / sum(probs) for t, p in zip(target, probs, strict=True)]


def early_learning_penalty(logits, target):
    probs = [clamp(p) for p in softmax(logits)]
    return math.log(1 - sum(t * p for t, p in zip(target, probs, strict=True)))


def early_learning_penalty_of_events(logits, target):
    total = 0.0
    for z, t in zip(logits, target, strict=True):
        p = clamp(sigmoid(z))
        total += math.log(1 - (t * p + (1 - t) * (1 - p)))
    return total


def largest(target, k):
    """The target with all but its `k` largest entries at 0."""
    kept = sorted(range(len(target)), key=lambda c: (-target[c], c))[:k]
    return [t if c in kept else 0.0 for c, t in enumerate(target)]


def focal(p, not_p, target, gamma_pos, gamma_neg, clip):
    shifted = max(p - clip, 0.0)
    positive = not_p**gamma_pos * math.log(p)
    negative = (
        shifted**gamma_neg * math.log(1 - shifted) if clip else p**gamma_neg * math.log(not_p)
    )
    return -(target * positive + (1 - target) * negative)


def asymmetric_loss(logits, targets, gamma_pos, gamma_neg, clip):
    return sum(
        focal(sigmoid(z), sigmoid(-z), t, gp, gn, clip)
        for z, t, gp, gn in zip(logits, targets, gamma_pos, gamma_neg, strict=True)
    )


def head_tail_factors(counts, power):
    return [(1 - math.log(count / max(counts))) ** power for count in counts]


def corrected(logits, targets, means, tau):
    rows = zip(logits, targets, means, strict=True)
    return [1.0 if t == 0 and sigmoid(z) > max(tau, mean) else t for z, t, mean in rows]


def balance_loss(head, tail, balanced, targets, gamma_pos, gamma_neg, clip, power):
    def size(logits):
        return asymmetric_loss(logits, targets, gamma_pos, gamma_neg, clip) ** power

    def taught(logits):
        total = 0.0
        for z, b, t, gp, gn in zip(logits, balanced, targets, gamma_pos, gamma_neg, strict=True):
            p = sigmoid(z) * sigmoid(b)
            total += focal(p, 1 - p, t, gp, gn, clip)
        return total

    kappa = size(head) / (size(head) + size(tail))
    return kappa * taught(head) + (1 - kappa) * taught(tail)


def cosine_logits(features, weights, moving, amount, rho, eta):
    """One group: rho w . (f / |f| + amount (projection on the moving vector)) / (|w| + eta)."""
    unit = [f / norm(features) for f in features]
    direction = [e / norm(moving) if any(moving) else 0.0 for e in moving]
    along = dot(unit, direction)
    seen = [u + amount * along * d for u, d in zip(unit, direction, strict=True)]
    return [rho * dot(w, seen) / (norm(w) + eta) for w in weights]


def set_cross_entropy(logits, members, empty, scheme, empty_weight):
    """The best of all assignments, tried one by one."""
    log_probs = [log_softmax(step) for step in logits]
    reach = len(logits) if scheme == "all" else len(members)
    best, found = -1.0, None
    for steps in itertools.permutations(range(reach), len(members)):
        score = sum(math.exp(log_probs[t][label]) for t, label in zip(steps, members, strict=True))
        if score > best:
            best, found = score, dict(zip(steps, members, strict=True))
    total = weights = 0.0
    for t, log_prob in enumerate(log_probs):
        label = found.get(t, empty)
        weight = empty_weight if label == empty else 1.0
        total -= weight * log_prob[label]
        weights += weight
    return total / weights if weights else 0.0


def cosine_costs(logits, members, embeddings):
    costs = []
    for step in logits:
        probs = softmax(step)
        expected = [dot(probs, column) for column in zip(*embeddings, strict=True)]
        costs.append(
            [
                1 - dot(expected, embeddings[j]) / (norm(expected) * norm(embeddings[j]))
                for j in members
            ]
        )
    return costs


def transport_plan(costs, method, beta, iterations):
    m, n = len(costs), len(costs[0])
    kernel = [[math.exp(-cost / beta) for cost in row] for row in costs]
    plan, b = [[1.0] * n for _ in range(m)], [1 / n] * n
    for _ in range(iterations):
        if method == "ipot":
            q = [
                [k * p for k, p in zip(*rows, strict=True)]
                for rows in zip(kernel, plan, strict=True)
            ]
        else:
            q = kernel
        a = [1 / (m * dot(row, b)) for row in q]
        b = [1 / (n * dot(column, a)) for column in zip(*q, strict=True)]
        plan = [[a[i] * q[i][j] * b[j] for j in range(n)] for i in range(m)]
    return plan


def transport_loss(costs, plan):
    return sum(dot(cost, share) for cost, share in zip(costs, plan, strict=True))


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def norm(vector):
    return math.sqrt(dot(vector, vector))
