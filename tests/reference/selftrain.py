"""Learning a prompt from losses by loops over lists; `bdpl` is a port of the public code's formula."""

import itertools
import math


def project(values):
    """Bisection for the v with sum(max(x - v, 0)) = 1."""
    low, high = min(values) - 1, max(values)
    for _ in range(200):
        v = (low + high) / 2
        if sum(max(x - v, 0) for x in values) > 1:
            low = v
        else:
            high = v
    return [max(x - high, 0) for x in values]


def exact_gradient(probs, table):
    """Gradient of the sum over all prompts of (product of p) x loss, each p a free variable."""
    words = range(len(probs[0]))
    found = [[0.0 for _ in words] for _ in probs]
    for prompt in itertools.product(words, repeat=len(probs)):
        for i, word in enumerate(prompt):
            others = math.prod(probs[j][w] for j, w in enumerate(prompt) if j != i)
            found[i][word] += others * table[prompt]
    return found


def reinforce(probs, drawn, losses):
    mean = sum(losses) / len(losses)
    found = [[0.0 for _ in row] for row in probs]
    for prompt, loss in zip(drawn, losses, strict=True):
        for i, word in enumerate(prompt):
            found[i][word] += (loss - mean) / probs[i][word] / (len(losses) - 1)
    return found


def bdpl(probs, drawn, losses):
    """derivative = -1/p, its sign turned at the sampled word; 1 / (I - 1) sum (L_k - mean) d_k."""
    average = sum(losses) / len(losses)
    grad = [[0.0 for _ in row] for row in probs]
    for k, prompt in enumerate(drawn):
        derivative = [[-1 / p for p in row] for row in probs]
        for i, word in enumerate(prompt):
            derivative[i][word] *= -1
        for i, row in enumerate(derivative):
            for j, d in enumerate(row):
                grad[i][j] += 1 / (len(losses) - 1) * (losses[k] - average) * d
    return grad


def draw(probs, uniforms):
    found = []
    for numbers in uniforms:
        prompt = []
        for row, u in zip(probs, numbers, strict=True):
            bounds = itertools.accumulate(row)
            prompt.append(next(word for word, below in enumerate(bounds) if u < below))
        found.append(prompt)
    return found


def kappa(one, other):
    n = len(one)
    same = sum(a == b for a, b in zip(one, other, strict=True)) / n
    chance = sum((one.count(a) / n) * (other.count(a) / n) for a in set(one) | set(other))
    return (same - chance) / (1 - chance)


def reliable(probs, ids, share):
    """The most probable rows first, each unless its label has its full number already."""
    rows = [i for i, row in enumerate(probs) if max(row) > 0]
    cap = math.ceil(share * len(rows) / len(probs[0]) - 1e-9)
    counts, taken = {}, []
    for i in sorted(rows, key=lambda i: (-max(probs[i]), ids[i])):
        label = probs[i].index(max(probs[i]))
        if counts.get(label, 0) < cap:
            counts[label] = counts.get(label, 0) + 1
            taken.append(i)
    return sorted(taken)


def corrected_loss(log_probs, targets):
    """Mean cross-entropy after the mean log-probability of each label is taken out."""
    rows, labels = len(log_probs), len(log_probs[0])
    means = [sum(row[c] for row in log_probs) / rows for c in range(labels)]
    total = 0.0
    for row, target in zip(log_probs, targets, strict=True):
        free = [row[c] - means[c] for c in range(labels)]
        total += math.log(sum(math.exp(x) for x in free)) - free[target]
    return total / rows
