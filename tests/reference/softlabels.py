"""Twins of `llmlabel.softlabels`, of one row; None is a label not stored."""

import math


def from_scores(scores, multilabel):
    if multilabel:
        return [0.0 if math.isnan(s) else math.exp(s) for s in scores]
    if any(math.isnan(s) for s in scores) or max(scores) == -math.inf:
        return [0.0] * len(scores)
    joint = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(joint) for p in joint]


def ranked(row):
    """Stored (id, probability), most probable first, of equal ones the lower id first."""
    return sorted(((k, p) for k, p in enumerate(row) if p is not None), key=lambda e: (-e[1], e[0]))


def log_dense(row, floor):
    missing = max(1 - sum(p for p in row if p is not None), 0)
    share = missing / max(row.count(None), 1)
    return [math.log(max(share if p is None else p, floor)) for p in row]
