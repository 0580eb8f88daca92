"""Labels from votes by counting them, by weighing who casts them, or by MACE and GLAD.

The model with a confusion matrix for each source is `llmlabel.refine.annotators.dawid_skene`.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import digamma, expit

from llmlabel.refine.votes import Votes

_Rows = Float[np.ndarray, "rows labels"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a method makes of votes.

    Attributes:
        probs: Soft labels; a row without a vote is all 0.
        skill: How far the method trusts each source, in its own measure.
    """

    probs: Float[np.ndarray, "rows labels"]
    skill: Float[np.ndarray, " sources"]


def majority(votes: Votes, *, weights: Float[np.ndarray, " sources"] | None = None) -> _Rows:
    """The share of the votes that each label has."""
    return normalised(votes.counts(weights))


def softmax(votes: Votes, *, weights: Float[np.ndarray, " sources"] | None = None) -> _Rows:
    """The softmax of the number of votes, over all labels; sharper the more votes a row has.

    One of the methods in "Aggregating Soft Labels from Crowd Annotations Improves Uncertainty
    Estimation Under Distribution Shift" (arXiv 2212.09409).
    """
    counts = votes.counts(weights)
    probs = np.exp(counts - counts.max(axis=1, keepdims=True))
    probs[~votes.voted] = 0.0
    return normalised(probs)


def wawa(votes: Votes) -> Estimate:
    """Worker agreement with aggregate: votes weighted by how often a source votes with the majority.

    As defined by crowd-kit (Toloka). Of labels with equally many votes the lowest id is the
    majority; a row whose sources all have skill 0 keeps its vote shares.
    """
    skill = _agreement(votes, votes.counts())
    return Estimate(_weighted(votes, skill), skill)


def zbs(votes: Votes, *, iterations: int = 100) -> Estimate:
    """Zero-based skill: `wawa`, repeated with steps towards the agreement with the weighted majority.

    As defined by crowd-kit (Toloka): the step is 1 and halves every 20 iterations.
    """
    skill = np.full(len(votes.names), 1 / max(len(np.unique(votes.label)), 1) + 1e-5)
    for iteration in range(1, iterations + 1):
        step = 0.5 ** (iteration // 20)
        skill = skill + step * (_agreement(votes, votes.counts(skill)) - skill)
    return Estimate(_weighted(votes, skill), skill)


def average(votes: Votes, *, weights: Float[np.ndarray, " sources"] | None = None) -> _Rows:
    """The mean of the distributions of the sources that voted; missing mass stays missing."""
    first = votes.first()
    weight = np.ones(len(votes.names)) if weights is None else weights
    total = np.bincount(votes.row[first], weights=weight[votes.source[first]], minlength=votes.rows)
    return votes.counts(weight) / np.where(total > 0, total, 1.0)[:, None]


def log_average(
    votes: Votes, *, weights: Float[np.ndarray, " sources"] | None = None, floor: float = 1e-12
) -> _Rows:
    """The mean log-probability of each label, with no probability below `floor`.

    A source's missing mass on a row is spread evenly over the labels that it does not store there.
    -inf in a row without a vote.
    """
    start = np.flatnonzero(votes.first())
    row, source = votes.row[start], votes.source[start]
    length = np.diff(np.append(start, len(votes.row)))
    sums = np.add.reduceat(votes.prob, start) if len(start) else np.zeros(0)
    missing = np.clip(1.0 - sums, 0.0, 1.0)
    missing = np.where(missing < 1e-6, 0.0, missing) / np.maximum(votes.labels - length, 1)
    base = np.log(np.maximum(missing, floor))
    weight = np.ones(len(votes.names)) if weights is None else weights
    over = np.log(np.maximum(votes.prob, floor)) - np.repeat(base, length)
    cell = votes.row.astype(np.int64) * votes.labels + votes.label
    logs = np.bincount(
        cell, weights=over * weight[votes.source], minlength=votes.rows * votes.labels
    ).reshape(votes.rows, votes.labels)
    logs += np.bincount(row, weights=base * weight[source], minlength=votes.rows)[:, None]
    total = np.bincount(row, weights=weight[source], minlength=votes.rows)[:, None]
    return np.where(total > 0, logs / np.where(total > 0, total, 1.0), -np.inf)


def mace(votes: Votes, *, restarts: int = 10, iterations: int = 50, seed: int = 0) -> Estimate:
    """Multi-annotator competence estimation: a source knows the label, or answers by habit.

    Hovy et al. 2013, "Learning Whom to Trust with MACE" (N13-1132), with variational Bayes. The
    skill is the probability that a source knows. Priors are crowd-kit's: Beta(0.5, 0.5) of knowing,
    Dirichlet(10) of habits.

    Differs from the paper: a soft vote counts as a share of a vote for each of its labels.
    """
    rows, seen, few = packed(votes)
    by_name = np.argsort(np.argsort(np.array(votes.names)))  # the order of sources changes nothing
    best, found = -np.inf, None
    for restart in range(restarts):
        rng = np.random.default_rng([seed, restart])
        habits = rng.uniform(1.0, 2.5, (len(votes.names), len(seen)))[by_name]
        knows = rng.uniform(1.0, 2.5, (len(votes.names), 2))[by_name]
        run = mace_run(few, _shares(knows), _shares(habits), iterations=iterations)
        if found is None or run[1] > best:
            found, best = run, run[1]
    assert found is not None
    return Estimate(unpacked(found[0], votes, rows, seen), found[2])


def mace_run(
    votes: Votes,
    knows: Float[np.ndarray, "sources 2"],
    habits: Float[np.ndarray, "sources labels"],
    *,
    iterations: int,
) -> tuple[Float[np.ndarray, "rows labels"], float, Float[np.ndarray, " sources"]]:
    """One run of `mace` from given probabilities: of guessing and knowing, and of each guess.

    Returns:
        Soft labels, the log-likelihood, and the probability that each source knows.
    """
    sources = len(votes.names)
    cell = votes.source.astype(np.int64) * votes.labels + votes.label
    for iteration in range(iterations + 1):
        guess, know = (knows[:, :1] * habits).ravel()[cell], knows[votes.source, 1]
        hit, miss = np.log(guess + know), np.log(guess)
        probs, log_likelihood = _one_label(votes, hit, miss)
        knowing = votes.prob * probs[votes.row, votes.label] * know / (guess + know)
        guessing = votes.prob - knowing
        known = np.stack(
            [np.bincount(votes.source, of, minlength=sources) for of in (guessing, knowing)], axis=1
        )
        if iteration < iterations:
            guesses = np.bincount(cell, guessing, minlength=sources * votes.labels)
            habits = _variational(guesses.reshape(sources, votes.labels), 10.0)
            knows = _variational(known, 0.5)
    skill = (known[:, 1] + 0.5) / (known.sum(axis=1) + 1.0)
    return probs, log_likelihood, skill


def glad(votes: Votes, *, iterations: int = 100, tolerance: float = 1e-5) -> Estimate:
    """A skill of each source and a difficulty of each row.

    Whitehill et al. 2009, "Whose Vote Should Count More", equations 1 to 8: a vote is right with
    probability sigmoid(skill / difficulty), both with normal priors, and all wrong labels are
    equally likely. The maximisation step takes 25 steps of conjugate gradients, as crowd-kit's does.

    Differs from the paper: a soft vote counts as a share of a vote for each of its labels.
    """
    from scipy.optimize import minimize

    rows, seen, few = packed(votes)
    row, source, prob, sources = few.row, few.source, few.prob, len(votes.names)
    if few.labels < 2:
        return Estimate(unpacked(majority(few), votes, rows, seen), np.ones(sources))
    others = np.log(few.labels - 1)
    point = np.ones(sources + few.rows)  # skills, then the logarithms of 1 / difficulty

    def logits(point: Float[np.ndarray, " skills_rows"]) -> Float[np.ndarray, " entries"]:
        return point[source] * np.exp(point[sources + row])

    def loss(point: Float[np.ndarray, " skills_rows"]) -> float:
        at = logits(point)
        right, wrong = -np.logaddexp(0.0, -at), -np.logaddexp(0.0, at) - others
        expected = prob @ (believed * right + (1.0 - believed) * wrong)
        return float(((point - 1.0) ** 2).sum() / 2 - expected)

    def gradient(point: Float[np.ndarray, " skills_rows"]) -> Float[np.ndarray, " skills_rows"]:
        at = logits(point)
        off = prob * (believed - expit(at))
        by_source = np.bincount(source, off * np.exp(point[sources + row]), minlength=sources)
        by_row = np.bincount(row, off * at, minlength=few.rows)
        return point - 1.0 - np.concatenate([by_source, by_row])

    reached = np.inf
    for _ in range(iterations):
        at = logits(point)
        right, wrong = -np.logaddexp(0.0, -at), -np.logaddexp(0.0, at) - others
        probs, _ = _one_label(few, right, wrong)
        believed = probs[row, few.label]
        solved = minimize(loss, point, jac=gradient, method="CG", tol=1e-2, options={"maxiter": 25})
        point, last, reached = solved.x, reached, solved.fun / (len(row) * few.labels)
        if last - reached < tolerance:
            break
    return Estimate(unpacked(probs, votes, rows, seen), point[:sources])


# ------------------------------------------------------------------------------------- arithmetic


def packed(
    votes: Votes,
) -> tuple[Int[np.ndarray, " voted"], Int[np.ndarray, " seen"], Votes]:
    """Rows with votes, labels with votes, and the votes on these alone: nothing else is guessed."""
    voted, seen = votes.voted, np.flatnonzero(np.bincount(votes.label, minlength=votes.labels))
    rows, row, label = np.flatnonzero(voted), votes.row, votes.label
    if len(rows) < votes.rows:
        row = (np.cumsum(voted, dtype=np.int32) - 1)[row]
    if len(seen) < votes.labels:
        place = np.zeros(votes.labels, dtype=np.int32)
        place[seen] = np.arange(len(seen))
        label = place[label]
    few = dataclasses.replace(votes, row=row, label=label, rows=len(rows), labels=len(seen))
    return rows, seen, few


def unpacked(
    probs: _Rows, votes: Votes, rows: Int[np.ndarray, " voted"], seen: Int[np.ndarray, " seen"]
) -> Float[np.ndarray, "all_rows all_labels"]:
    """Soft labels of packed votes among all rows and labels; 0 elsewhere."""
    if probs.shape == (votes.rows, votes.labels):
        return probs
    whole = np.zeros((votes.rows, votes.labels))
    whole[np.ix_(rows, seen)] = probs
    return whole


def _one_label(
    votes: Votes, hit: Float[np.ndarray, " entries"], miss: Float[np.ndarray, " entries"]
) -> tuple[_Rows, float]:
    """Posteriors under a uniform prior, and the log-likelihood.

    `hit` is the log-probability of a vote if its label is the true one, `miss` if any other is.
    """
    cell = votes.row.astype(np.int64) * votes.labels + votes.label
    scores = np.bincount(cell, votes.prob * (hit - miss), minlength=votes.rows * votes.labels)
    base = np.bincount(votes.row, votes.prob * miss, minlength=votes.rows)
    probs, gained = posteriors(scores.reshape(votes.rows, -1), np.full(votes.labels, 0.0))
    return probs, gained + float(base.sum()) - votes.rows * float(np.log(max(votes.labels, 1)))


def posteriors(scores: _Rows, offset: Float[np.ndarray, " labels"]) -> tuple[_Rows, float]:
    """Posteriors of unnormalised log-probabilities (written over), and the log-likelihood."""
    scores += offset
    peak = scores.max(axis=1, keepdims=True, initial=-1e300)
    scores -= peak
    np.exp(scores, out=scores)
    total = np.einsum("rl->r", scores)[:, None]  # many times faster than their sum
    scores /= total
    return scores, float(peak.sum() + np.log(total).sum())


def _shares(values: _Rows) -> _Rows:
    return values / values.sum(axis=1, keepdims=True)


def _variational(counts: _Rows, prior: float) -> _Rows:
    raised = counts + prior
    return np.exp(digamma(raised) - digamma(raised.sum(axis=1, keepdims=True)))


def normalised(values: _Rows) -> _Rows:
    """Each row divided by its sum; a row of zeros stays as it is."""
    total = np.einsum("rl->r", values)[:, None]
    return values / np.where(total > 0, total, 1.0)


def _weighted(votes: Votes, skill: Float[np.ndarray, " sources"]) -> _Rows:
    counts = votes.counts(skill)
    return normalised(np.where(counts.any(axis=1, keepdims=True), counts, votes.counts()))


def _agreement(votes: Votes, counts: _Rows) -> Float[np.ndarray, " sources"]:
    """The share of each source's votes that are for the label with the highest count."""
    agrees = votes.prob * (counts.argmax(axis=1)[votes.row] == votes.label)
    total = np.bincount(votes.source, weights=votes.prob, minlength=len(votes.names))
    agreed = np.bincount(votes.source, weights=agrees, minlength=len(votes.names))
    return agreed / np.where(total > 0, total, 1.0)
