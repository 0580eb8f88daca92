"""Slow twins of the walk down a hierarchy: every path by itself, and the beam by its definition."""

from collections.abc import Callable, Mapping, Sequence

Shares = Callable[[int], Mapping[int, float]]
"""A node -> the share of each child; what is missing to 1 stops at the node."""


def every_path(children: Mapping[int, Sequence[int]], shares: Shares) -> dict[int, float]:
    """Probability that the answer stops at each node; -1 is the point above the roots."""
    stops: dict[int, float] = {}

    def follow(path: list[int], prob: float) -> None:
        node = path[-1]
        below = shares(node) if children[node] else {}
        stops[node] = stops.get(node, 0.0) + prob * (1.0 - sum(below.values()))
        for child, share in below.items():
            follow([*path, child], prob * share)

    follow([-1], 1.0)
    return stops


def longest_way(children: Mapping[int, Sequence[int]], node: int) -> int:
    """Edges of the longest way from -1 down to a node."""
    if node == -1:
        return 0
    return 1 + max(longest_way(children, p) for p, some in children.items() if node in some)


def beam(
    children: Mapping[int, Sequence[int]], shares: Shares, *, keep: int, min_mass: float = 0.0
) -> tuple[dict[int, float], int]:
    """Stops as in `every_path` when only the `keep` heaviest nodes of a level are read; and reads."""
    mass = {-1: 1.0}
    stops: dict[int, float] = {}
    reads = 0
    level = {node: longest_way(children, node) for node in children}
    for number in range(max(level.values()) + 1):
        here = sorted((n for n in mass if level[n] == number), key=lambda n: (-mass[n], n))
        left = keep
        for node in here:
            own = mass.pop(node)
            free = len(children[node]) == 1
            if children[node] and (free or (left > 0 and own >= min_mass)):
                below = {children[node][0]: 1.0} if free else shares(node)
                left -= not free
                reads += not free
                for child, share in below.items():
                    mass[child] = mass.get(child, 0.0) + own * share
                own *= 1.0 - sum(below.values())
            stops[node] = stops.get(node, 0.0) + own
    return stops, reads
