"""Twins of `llmlabel.calibrate.temperature`."""

import math


def scale(row, temperature):
    powers = [math.exp(math.log(p) / temperature) if p > 0 else 0.0 for p in row]
    return [sum(row) * power / sum(powers) if sum(powers) else 0.0 for power in powers]


def nll(probs, gold, temperature):
    likelihoods = [scale(row, temperature)[g] for row, g in zip(probs, gold, strict=True)]
    return -sum(math.log(max(p, 1e-12)) for p in likelihoods) / len(gold)


def fit(probs, gold):
    """The best of a fine grid, and then of a finer one around it."""
    low, high = math.log(0.05), math.log(20)
    for _ in range(4):
        grid = [low + (high - low) * i / 40 for i in range(41)]
        best = min(range(41), key=lambda i: nll(probs, gold, math.exp(grid[i])))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    return math.exp(grid[best])


def scale_odds(p, temperature):
    odds = (p / (1 - p)) ** (1 / temperature)
    return odds / (1 + odds)


def odds_nll(probs, gold, temperature):
    """Mean over the stored labels of all rows, each a yes or no."""
    losses = []
    for row, true in zip(probs, gold, strict=True):
        for label, p in enumerate(row):
            if p > 0:
                scaled = scale_odds(p, temperature)
                losses.append(-math.log(max(scaled if label in true else 1 - scaled, 1e-12)))
    return sum(losses) / len(losses)
