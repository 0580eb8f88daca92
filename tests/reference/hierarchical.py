"""Twins of the scores of hierarchies, edges and clusters in `llmlabel.metrics`."""

import math
from collections import Counter


def ancestor_set(label, parents):
    """The label and all above it; a root that is the only one is left out."""
    if label < 0:
        return set()
    found = {label}
    for parent in parents[label]:
        found |= ancestor_set(parent, parents)
    roots = [node for node, some in enumerate(parents) if not some]
    return found - set(roots) if len(roots) == 1 else found


def hierarchical_scores(predicted, gold, parents):
    hits = guesses = truths = 0
    for p, g in zip(predicted, gold, strict=True):
        p_set, g_set = ancestor_set(p, parents), ancestor_set(g, parents)
        hits, guesses, truths = hits + len(p_set & g_set), guesses + len(p_set), truths + len(g_set)
    precision = hits / guesses if guesses else 0.0
    recall = hits / truths if truths else 0.0
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
    }


def ways_up(label, parents):
    """(node, edges) of every way from a label up to a node; -1 is above all roots."""
    found = [(label, 0)]
    if label >= 0:
        for parent in parents[label] or [-1]:
            found += [(node, edges + 1) for node, edges in ways_up(parent, parents)]
    return found


def tree_induced_error(predicted, gold, parents):
    total = 0
    for p, g in zip(predicted, gold, strict=True):
        ups, downs = ways_up(p, parents), ways_up(g, parents)
        total += min(a + b for node, a in ups for other, b in downs if node == other)
    return total / len(gold)


def entropy(groups):
    return -sum(n / len(groups) * math.log(n / len(groups)) for n in Counter(groups).values())


def nmi(a, b):
    mutual = entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True)))
    mean = (entropy(a) + entropy(b)) / 2
    return mutual / mean if mean else 1.0


def ari(a, b):
    """From the four kinds of pairs of rows, Hubert and Arabie 1985."""
    both = first = second = pairs = 0
    for i in range(len(a)):
        for j in range(i):
            pairs += 1
            first += a[i] == a[j]
            second += b[i] == b[j]
            both += a[i] == a[j] and b[i] == b[j]
    expected = first * second / pairs if pairs else 0.0
    most = (first + second) / 2
    return (both - expected) / (most - expected) if most != expected else 1.0
