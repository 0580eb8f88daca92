"""Crowd aggregation by loops over lists of votes (row, source, label, share of a vote)."""

import math

Vote = tuple[int, int, int, float]


def shares(votes: list[Vote], rows: int, labels: int, weights: list[float]) -> list[list[float]]:
    """Weighted vote shares."""
    table = [[0.0] * labels for _ in range(rows)]
    for row, source, label, share in votes:
        table[row][label] += share * weights[source]
    for row, line in enumerate(table):
        total = sum(line)
        table[row] = [value / total for value in line] if total > 0 else line
    return table


def agreement(votes: list[Vote], table: list[list[float]], sources: int) -> list[float]:
    """Share of each source's votes that are for the first best label of their row."""
    agreed, cast = [0.0] * sources, [0.0] * sources
    for row, source, label, share in votes:
        cast[source] += share
        if table[row].index(max(table[row])) == label:
            agreed[source] += share
    return [a / c if c else 0.0 for a, c in zip(agreed, cast, strict=True)]


def wawa(votes: list[Vote], rows: int, labels: int, sources: int) -> list[list[float]]:
    plain = shares(votes, rows, labels, [1.0] * sources)
    return shares(votes, rows, labels, agreement(votes, plain, sources))


def zbs(votes: list[Vote], rows: int, labels: int, sources: int) -> list[list[float]]:
    skill, step = [1 / labels + 1e-5] * sources, 1.0
    for iteration in range(1, 101):
        if iteration % 20 == 0:
            step /= 2
        agreed = agreement(votes, shares(votes, rows, labels, skill), sources)
        skill = [s + step * (a - s) for s, a in zip(skill, agreed, strict=True)]
    return shares(votes, rows, labels, skill)


def dawid_skene(
    votes: list[Vote], rows: int, labels: int, sources: int, steps: int, *, silence: bool = False
) -> tuple[list[list[float]], list[float]]:
    """Posteriors after `steps` of EM, and the log-likelihood before each; every row has a vote.

    With `silence`, a source without a vote on a row gave it the response number `labels`.
    """
    responses = list(votes)
    if silence:
        there = {(row, source) for row, source, _, _ in votes}
        responses += [
            (row, source, labels, 1.0)
            for row in range(rows)
            for source in range(sources)
            if (row, source) not in there
        ]
    posterior = shares(votes, rows, labels, [1.0] * sources)
    likelihoods = []
    for _ in range(steps):
        prior = [sum(line[c] for line in posterior) / rows for c in range(labels)]
        count: dict[tuple[int, int, int], float] = {}
        for row, source, said, share in responses:
            for c in range(labels):
                key = (source, c, said)
                count[key] = count.get(key, 0.0) + posterior[row][c] * share
        count = {key: max(value, 1e-10) for key, value in count.items()}
        total: dict[tuple[int, int], float] = {}
        for (source, c, _), value in count.items():
            total[source, c] = total.get((source, c), 0.0) + value
        logs = [[math.log(max(p, 1e-10)) for p in prior] for _ in range(rows)]
        for row, source, said, share in responses:
            for c in range(labels):
                logs[row][c] += share * math.log(count[source, c, said] / total[source, c])
        likelihood = 0.0
        for row, line in enumerate(logs):
            peak = max(line)
            z = sum(math.exp(x - peak) for x in line)
            likelihood += peak + math.log(z)
            posterior[row] = [math.exp(x - peak) / z for x in line]
        likelihoods.append(likelihood)
    return posterior, likelihoods


def mace_step(
    votes: list[Vote],
    rows: int,
    labels: int,
    knows: list[float],
    guesses: list[float],
    habits: list[list[float]],
) -> tuple[list[list[float]], list[float], list[list[float]]]:
    """Posteriors, expected number of votes by knowledge, and by guess and label."""
    posterior = [[1 / labels] * labels for _ in range(rows)]
    for row, source, label, share in votes:
        for c in range(labels):
            p = guesses[source] * habits[source][label] + (knows[source] if c == label else 0.0)
            posterior[row][c] *= p**share
    posterior = [[p / sum(line) for p in line] for line in posterior]
    knowing = [0.0] * len(knows)
    guessing = [[0.0] * labels for _ in knows]
    for row, source, label, share in votes:
        guess = guesses[source] * habits[source][label]
        known = share * posterior[row][label] * knows[source] / (guess + knows[source])
        knowing[source] += known
        guessing[source][label] += share - known
    return posterior, knowing, guessing


def glad_posterior(
    votes: list[Vote], rows: int, labels: int, skill: list[float], ease: list[float]
) -> list[list[float]]:
    """Posteriors where a vote is right with probability sigmoid(skill x ease)."""
    posterior = [[1 / labels] * labels for _ in range(rows)]
    for row, source, label, share in votes:
        right = 1 / (1 + math.exp(-skill[source] * ease[row]))
        for c in range(labels):
            posterior[row][c] *= (right if c == label else (1 - right) / (labels - 1)) ** share
    return [[p / sum(line) for p in line] for line in posterior]


def glad_loss(
    votes: list[Vote],
    posterior: list[list[float]],
    labels: int,
    skill: list[float],
    log_ease: list[float],
) -> float:
    """Minus the expected log-likelihood, with normal priors around 1; constants left out."""
    loss = sum((x - 1) ** 2 / 2 for x in [*skill, *log_ease])
    for row, source, label, share in votes:
        right = 1 / (1 + math.exp(-skill[source] * math.exp(log_ease[row])))
        believed = posterior[row][label]
        loss -= share * believed * math.log(right)
        loss -= share * (1 - believed) * math.log((1 - right) / (labels - 1))
    return loss


def krippendorff(votes: list[Vote], rows: int) -> float:
    """Alpha for nominal data, by pairs of votes on the same row."""
    by_row = [[label for r, _, label, _ in votes if r == row] for row in range(rows)]
    units = [labels for labels in by_row if len(labels) > 1]
    pooled = [label for labels in units for label in labels]
    observed = sum(
        sum(a != b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j)
        / (len(unit) - 1)
        for unit in units
    ) / len(pooled)
    expected = sum(a != b for i, a in enumerate(pooled) for j, b in enumerate(pooled) if i != j) / (
        len(pooled) * (len(pooled) - 1)
    )
    return 1 - observed / expected


def softness(views: list[list[float]]) -> tuple[float, float, float]:
    """Variance over views, entropy of the softmax of cosines to the unit vectors, their product."""
    labels = range(len(views[0]))
    mean = [sum(view[c] for view in views) / len(views) for c in labels]
    variance = sum((view[c] - mean[c]) ** 2 for view in views for c in labels) / len(views)
    norm = math.sqrt(sum(m * m for m in mean))
    powers = [math.exp(m / norm) for m in mean]
    p = [x / sum(powers) for x in powers]
    entropy = -sum(x * math.log(x) for x in p)
    return variance, entropy, entropy * variance
