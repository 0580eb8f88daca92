"""Twins of `llmlabel.calibrate.cross`, one label at a time; folds are lists of scores."""

from fractions import Fraction


def p_value(scores, folds):
    """Vovk 2015: of all gold rows, each beside the new row as its own fold's model scores it."""
    count = sum(1 for s, fold in zip(scores, folds, strict=True) for known in fold if known >= s)
    return Fraction(1 + count, 1 + sum(map(len, folds)))


def e_value(scores, folds):
    """Vovk 2025: the score against the mean of the bag it is in, averaged over folds."""
    values = []
    for s, fold in zip(scores, folds, strict=True):
        bag = [*fold, s]
        mean = sum(bag) / len(bag)
        values.append(s / mean if mean else 0.0)
    return sum(values) / len(values)


def twice_level(alpha, rows, folds):
    """Where 2 (level (n + 1) + K - 1) / (n + K), the bound of Vovk et al. 2018, is alpha."""
    return (Fraction(str(alpha)) * (rows + folds) / 2 - folds + 1) / (rows + 1)
