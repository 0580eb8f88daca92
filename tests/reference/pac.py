"""Twins of `llmlabel.calibrate.pac`: binomial sums in fractions, and every choice of holes."""

import functools
import math
from fractions import Fraction
from itertools import combinations


def allowed(rows, epsilon, delta):
    """The most errors that certify; -1 where there are none."""
    p, total, errors = Fraction(str(epsilon)), Fraction(0), -1
    for k in range(rows + 1):
        total += math.comb(rows, k) * p**k * (1 - p) ** (rows - k)
        if total > Fraction(str(delta)):
            break
        errors = k
    return errors


def threshold(scores, errors):
    return min(t for t in scores if sum(score > t for score in scores) <= errors)


def below(parents, node):
    """The subtree of a node."""
    found = {node}
    for other in range(node + 1, len(parents)):
        if parents[other] in found:
            found.add(other)
    return found


@functools.cache
def partial_trees(parents, holes):
    """What is kept, for every choice of at most so many subtrees to cut off."""
    nodes = frozenset(range(len(parents)))
    subtrees = [below(parents, node) for node in sorted(nodes)]
    found = set()
    for count in range(holes + 1):
        for some in combinations(nodes, count):
            cut = set().union(*(subtrees[node] for node in some))
            if len(cut) == sum(len(subtrees[node]) for node in some):  # disjoint
                found.add(nodes - cut)
    return found


def most_kept(parents, costs, budget, holes, *, inside=None, holding=frozenset()):
    """The most nodes that can be kept within `inside` and with all of `holding`."""
    return max(
        len(kept)
        for kept in partial_trees(parents, holes)
        if sum(costs[node] for node in kept) <= budget + 1e-9
        and (inside is None or kept <= inside)
        and holding <= kept
    )
