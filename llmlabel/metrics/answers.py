"""How good single answers and sets of labels are, compared with gold."""

import numpy as np
from jaxtyping import Bool, Float, Int

Probs = Float[np.ndarray, "rows labels"]
LabelIds = Int[np.ndarray, " rows"]
Sets = Bool[np.ndarray, "rows labels"]


def predicted(probs: Probs) -> LabelIds:
    """The most probable label of each row (of equal ones the lowest id); -1 for a row of zeros."""
    return np.where(probs.max(axis=1) > 0, probs.argmax(axis=1), -1)


def correct(probs: Probs, gold: LabelIds) -> Bool[np.ndarray, " rows"]:
    """Whether the most probable label is the true one; never where no label is true."""
    return (predicted(probs) == gold) & (gold >= 0)


def accuracy(probs: Probs, gold: LabelIds) -> float:
    """Share of rows whose most probable label is the gold one."""
    return float(correct(probs, gold).mean())


def confusion(predicted: LabelIds, gold: LabelIds, labels: int) -> Int[np.ndarray, "labels labels"]:
    """Number of rows by gold label (row) and predicted label (column).

    Rows without a prediction or without a gold label are in no cell.
    """
    known = (predicted >= 0) & (gold >= 0)
    cells = gold[known] * labels + predicted[known]
    return np.bincount(cells, minlength=labels * labels).reshape(labels, labels)


def macro_f1(predicted: LabelIds, gold: LabelIds, labels: int) -> float:
    """Mean F1 of the labels; a label that is neither predicted nor gold anywhere is left out.

    A prediction for a row of no gold label is a false positive of the label predicted.
    """
    hits = np.bincount(gold[(predicted == gold) & (gold >= 0)], minlength=labels)
    guesses = np.bincount(predicted[predicted >= 0], minlength=labels)
    return _macro_f1(hits, guesses + np.bincount(gold[gold >= 0], minlength=labels))


def micro_f1(predicted: Sets, gold: Sets) -> float:
    """F1 over all pairs of row and label together; 0 where nothing is predicted nor gold."""
    total = predicted.sum() + gold.sum()
    return float(2 * (predicted & gold).sum() / total) if total else 0.0


def macro_f1_multilabel(predicted: Sets, gold: Sets) -> float:
    """Mean F1 of the labels; a label that is neither predicted nor gold anywhere is left out."""
    return _macro_f1((predicted & gold).sum(axis=0), predicted.sum(axis=0) + gold.sum(axis=0))


def binomial_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = beta.ppf(tail, successes, trials - successes + 1) if successes > 0 else 0.0
    high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def _macro_f1(hits: Int[np.ndarray, " labels"], total: Int[np.ndarray, " labels"]) -> float:
    """Mean of 2 * true positives / (predicted + gold) over the labels that occur; 0 without any."""
    occurs = total > 0
    return float((2 * hits[occurs] / total[occurs]).mean()) if occurs.any() else 0.0
