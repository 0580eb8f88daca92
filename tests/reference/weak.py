"""Labeling functions and concept fusion, one row and one number at a time."""

import math


def measure(votes: list[dict[str, int]], gold: list[int | None]) -> dict[str, dict]:
    """Votes of each row as function -> label."""
    names = sorted({name for row in votes for name in row})
    found = {}
    for name in names:
        covered = overlapped = conflicting = right = judged = 0
        for row, true in zip(votes, gold, strict=True):
            if name not in row:
                continue
            others = [label for other, label in row.items() if other != name]
            covered += 1
            overlapped += len(others) > 0
            conflicting += any(label != row[name] for label in others)
            if true is not None:
                judged += 1
                right += row[name] == true
        found[name] = {
            "coverage": covered / len(votes),
            "overlap": overlapped / len(votes),
            "conflict": conflicting / len(votes),
            "gold_votes": judged,
            "accuracy": right / judged if judged else None,
        }
    return found


def label_similarity(
    cosines: list[float | None], gold: list[list[int]], label: int, top: int
) -> float | None:
    """Mean cosine of the nearest `top` references that have the label."""
    known = sorted(
        (c for c, of in zip(cosines, gold, strict=True) if label in of and c is not None),
        reverse=True,
    )[:top]
    return sum(known) / len(known) if known else None


def ranks(similarities: list[float | None]) -> list[float]:
    """1 is the most similar label; equal ones share the mean of their ranks; None is last."""
    values = [-math.inf if one is None else one for one in similarities]
    found = []
    for value in values:
        above = sum(other > value for other in values)
        equal = sum(other == value for other in values)
        found.append(above + (equal + 1) / 2)
    return found


def fused(view_ranks: list[list[float]], weights: list[float], k: float) -> list[float]:
    """Of one item: weighted reciprocal ranks, then min-max over its labels."""
    labels = range(len(view_ranks[0]))
    raw = [
        sum(w / (k + rank[label]) for w, rank in zip(weights, view_ranks, strict=True))
        for label in labels
    ]
    low, high = min(raw), max(raw)
    return [0.0 if high == low else (value - low) / (high - low) for value in raw]


def loss(scores: list[list[float]], known: list[list[int]], floor: float) -> float:
    """Mean of -log(score + floor) over the known labels of all items."""
    terms = [
        -math.log(row[label] + floor) for row, of in zip(scores, known, strict=True) for label in of
    ]
    return sum(terms) / len(terms)
