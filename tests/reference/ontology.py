"""Slow twins of llmlabel.taxonomy: term typing, the attention over labels, graphs without cycles."""

import itertools
import math


def has_cycle(edges):
    """Whether (child, parent) pairs form a cycle: by taking away whoever has no parent left."""
    labels = {label for edge in edges for label in edge}
    while labels:
        free = {a for a in labels if not any(c == a and p in labels for c, p in edges)}
        if not free:
            return True
        labels -= free
    return False


def best_acyclic(edges, gains):
    """Highest total gain of any subset of edges without a cycle, by trying all of them."""
    best = 0.0
    for chosen in itertools.product((False, True), repeat=len(edges)):
        some = [edge for edge, is_in in zip(edges, chosen, strict=True) if is_in]
        total = sum(gain for gain, is_in in zip(gains, chosen, strict=True) if is_in)
        if total > best and not has_cycle(some):
            best = total
    return best


def best_branching(edges, gains, labels):
    """Highest total gain where every label takes one parent or none, by trying all choices."""
    best = 0.0
    for choice in itertools.product(
        *([None] + [i for i, edge in enumerate(edges) if edge[0] == a] for a in range(labels))
    ):
        taken = [i for i in choice if i is not None]
        total = sum(gains[i] for i in taken)
        if total > best and not has_cycle([edges[i] for i in taken]):
            best = total
    return best


def attention(children, parents, itself, weights):
    """Log-mass of every parent and of none, for every child; all loops.

    `weights`: query, key (heads x head_dim x dim), their biases (heads x head_dim), gains
    (head_dim) and `none` (one logit a head), as nested lists.
    """

    def projected(x, matrix, bias, gain, eps):
        y = [
            sum(w * v for w, v in zip(row, x, strict=True)) + b
            for row, b in zip(matrix, bias, strict=True)
        ]
        size = math.sqrt(sum(v * v for v in y) / len(y) + eps)
        return [g * v / size for g, v in zip(gain, y, strict=True)]

    heads = len(weights["query"])
    rows = []
    for child, own in zip(children, itself, strict=True):
        mass = [0.0] * (len(parents) + 1)
        for head in range(heads):
            q = projected(
                child,
                weights["query"][head],
                weights["query_bias"][head],
                weights["query_gain"],
                weights["eps"],
            )
            logits = []
            for number, parent in enumerate(parents):
                k = projected(
                    parent,
                    weights["key"][head],
                    weights["key_bias"][head],
                    weights["key_gain"],
                    weights["eps"],
                )
                dot = sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q))
                logits.append(-math.inf if number == own else dot)
            logits.append(weights["none"][head])
            top = max(logits)
            exps = [math.exp(value - top) for value in logits]
            for number, value in enumerate(exps):
                mass[number] += value / sum(exps) / heads
        rows.append([math.log(value) if value > 0 else -math.inf for value in mass])
    return rows


def ensemble_weights(similarities, temperature):
    """The weights of arXiv 2508.19428 as its reference code has them, line by line."""
    confidences, entropies = [], []
    for matrix in similarities:
        conf, entropy = [], []
        for row in matrix:
            exps = [math.exp((value - max(row)) / temperature) for value in row]
            p = [value / sum(exps) for value in exps]
            h = -sum(value * math.log(value + 1e-10) for value in p)
            entropy.append(h)
            conf.append(max(p) * (1 - h / math.log(len(row))))
        confidences.append(sum(conf) / len(conf))
        entropies.append(sum(entropy) / len(entropy))
    raw = [
        0.7 * c / sum(confidences) + 0.3 * (1 - e / sum(entropies))
        for c, e in zip(confidences, entropies, strict=True)
    ]
    return [value / sum(raw) for value in raw]


def ensemble_scores(similarities, weights):
    """Weighted sum of the cosine matrices."""
    return [
        [
            sum(w * matrix[i][j] for w, matrix in zip(weights, similarities, strict=True))
            for j in range(len(similarities[0][0]))
        ]
        for i in range(len(similarities[0]))
    ]


def votes(cosines, types_of, types, k, scale):
    """Share of each type among the k nearest, weighted by exp(scale x cosine)."""
    nearest = sorted(range(len(cosines)), key=lambda i: (-round(cosines[i], 6), i))[:k]
    nearest = [i for i in nearest if cosines[i] > -math.inf]
    weight = [0.0] * types
    for i in nearest:
        share = math.exp(scale * (cosines[i] - 1.0)) / len(types_of[i])
        for label in types_of[i]:
            weight[label] += share
    total = sum(weight)
    return [value / total for value in weight] if total else weight


def attention_loss(network, children, parents, itself, edges):
    """Mean over children of -log mass of their parents, from one einsum and plain softmaxes."""
    import torch  # the gradients of the twin come from autograd

    def heads(x, linear, norm):
        y = torch.einsum("od,xd->xo", linear.weight, x) + linear.bias
        y = y.reshape(len(x), network.heads, -1)
        return y / (y.pow(2).mean(dim=2, keepdim=True) + 1e-6).sqrt() * norm.weight

    q = heads(children, network.query, network.query_norm)
    k = heads(parents, network.key, network.key_norm)
    logits = torch.einsum("chd,phd->chp", q, k) / math.sqrt(q.shape[2])
    none = network.none.reshape(1, -1, 1).expand(len(children), -1, 1)
    total = 0.0
    for row, some in enumerate(edges):
        keep = [j for j in range(len(parents)) if j != itself[row]]
        all_logits = torch.cat([logits[row][:, keep], none[row]], dim=1)
        mass = all_logits.softmax(dim=1).mean(dim=0)
        columns = [keep.index(j) if j < len(parents) else len(keep) for j in some]
        total = total - mass[columns].log().mean() / len(edges)
    return total


def best_f1(scores, truth):
    """Highest F1 of any threshold that is one of the scores."""
    best = 0.0
    for threshold in scores:
        chosen = [score >= threshold for score in scores]
        hits = sum(a and b for a, b in zip(chosen, truth, strict=True))
        best = max(best, 2 * hits / (sum(chosen) + sum(truth)))
    return best
