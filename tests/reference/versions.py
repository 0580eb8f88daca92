"""Labels carried over to a new version, by loops over lists; labels are ids. And an example."""

from llmlabel.labelspace import load_labels

Parents = dict[str, list[str]]

OLD = load_labels(
    [
        {"id": "animal"},
        {"id": "cat", "parent": "animal"},
        {"id": "dog", "parent": "animal"},
        {"id": "wolf", "parent": "animal"},
        {"id": "bird", "name": "birds", "parent": "animal"},
        {"id": "plant"},
        {"id": "tree", "parent": "plant"},
        {"id": "moss", "parent": "plant"},
        {"id": "stone", "description": "a mineral"},
    ]
)
NEW = load_labels(
    [
        {"id": "animal"},
        {"id": "housecat", "parent": "animal"},
        {"id": "wildcat", "parent": "animal"},
        {"id": "canine", "parent": "animal"},
        {"id": "bird", "name": "feathered", "parent": "animal"},
        {"id": "plant"},
        {"id": "tree", "parent": "animal"},
        {"id": "rock", "name": "stone", "description": "a mineral"},
        {"id": "fungus"},
    ]
)
SAME = {
    "cat": ["housecat", "wildcat"],
    "dog": ["canine"],
    "wolf": ["canine"],
    "stone": ["rock"],
}
"""What became of the old labels, with every kind of change among it."""


def above(parents: Parents, label: str) -> set[str]:
    """The label and everything above it."""
    return {label}.union(*(above(parents, parent) for parent in parents[label]))


def depth(parents: Parents, label: str) -> int:
    return min((1 + depth(parents, parent) for parent in parents[label]), default=0)


def lowest(parents: Parents, some: list[str], order: list[str]) -> str | None:
    """The lowest label above all of these; of several the deepest, then the first."""
    common = [c for c in order if all(c in above(parents, one) for one in some)]
    common = [c for c in common if not any(c != d and c in above(parents, d) for d in common)]
    return max(common, key=lambda c: (depth(parents, c), -order.index(c)), default=None)


def place(old: Parents, new: Parents, successors: dict[str, list[str]], label: str) -> str | None:
    """Where the probability of an old label goes."""
    some = list(successors[label])
    if not some:
        places = [place(old, new, successors, parent) for parent in old[label]]
        some = [one for one in places if one is not None]
    return lowest(new, some, list(new)) if some else None


def carried(
    row: dict[str, float],
    old: Parents,
    new: Parents,
    successors: dict[str, list[str]],
    *,
    multilabel: bool,
) -> dict[str, float]:
    """The soft label of a row in the new version."""
    found: dict[str, float] = {}
    for label, prob in row.items():
        target = place(old, new, successors, label)
        if target is not None:
            before = found.get(target, 0.0)
            found[target] = max(before, prob) if multilabel else before + prob
    return found


def mapping(pairs: list[tuple[str, str]], share: float) -> dict[str, set[str]]:
    """Old label -> new labels, from the two answers of each row; ties by name."""
    olds, news = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    count = {(a, b): pairs.count((a, b)) for a in olds for b in news}
    found: dict[str, set[str]] = {a: set() for a in olds}
    for a in olds:
        for b in news:
            if not count[a, b] or count[a, b] < share * sum(count[a, c] for c in news):
                continue
            largest_of_row = max(news, key=lambda c: count[a, c]) == b
            largest_of_column = max(olds, key=lambda c: count[c, b]) == a
            if largest_of_row or largest_of_column:
                found[a].add(b)
    return found
