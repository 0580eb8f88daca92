"""Twins of `llmlabel.refine.adapt`: the rules of the papers, row by row."""


def ferkd(value, low, middle, high):
    """Equation of FerKD; an equality is in none of its conditions for a drop or a hard label."""
    if value < low or value > high:
        return "drop"
    return "soften" if value < middle else "keep"


def softened(hard, count, smoothing):
    return [1 - smoothing if c == hard else smoothing / (count - 1) for c in range(count)]


def comic(probs, given, tau):
    """Labels added to each row; a row without any probability does not count in the means."""
    read = [row for row in probs if any(row)]
    count = len(probs[0])
    means = [sum(row[c] for row in read) / len(read) for c in range(count)]
    return [
        [c for c in range(count) if row[c] > max(tau, means[c]) and c not in known]
        for row, known in zip(probs, given, strict=True)
    ]
