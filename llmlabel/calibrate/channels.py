"""Noise of pseudo-labels undone: the share of true labels that each threshold covers."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import one_of
from llmlabel.calibrate.scores import Nonconformity, stored_scores
from llmlabel.labelspace import LabelSpace

Channel: TypeAlias = float | np.ndarray
"""Share of wrong pseudo-labels, any other label being as probable; or P(pseudo-label | label)."""

Kind: TypeAlias = Literal["uniform", "matrix"]
"""What is estimated."""

_ROUNDING = 1e-9  # sums of weights in another order differ by less
_MOST_DOUBTFUL = 1e6  # condition number from which on the noise of a matrix cannot be undone


@dataclass(frozen=True)
class CoverageCurve:
    """The share of true labels that each threshold covers, as estimated; thresholds ascending."""

    thresholds: Float[np.ndarray, " thresholds"]
    coverage: Float[np.ndarray, " thresholds"]
    slack: float
    """All of them are at most this below the estimate, but for a share delta of draws."""

    def first(self, target: float) -> float | None:
        """The smallest threshold that covers so much."""
        reached = np.flatnonzero(self.coverage >= target - _ROUNDING)
        return float(self.thresholds[reached[0]]) if reached.size else None

    def at(self, threshold: float) -> float:
        """The estimate, between 0 and 1; an infinite threshold covers every label."""
        if threshold == math.inf:
            return 1.0
        place = int(np.searchsorted(self.thresholds, threshold, side="right")) - 1
        return float(np.clip(self.coverage[place], 0, 1)) if place >= 0 else 0.0


def estimate_noise(
    given: Int[np.ndarray, " rows"],
    gold: Int[np.ndarray, " rows"],
    labels: LabelSpace,
    kind: Kind,
) -> Channel:
    """The share of wrong pseudo-labels among rows with gold, or P(pseudo-label | gold).

    A ValueError says if there are no rows, or for a matrix none of some label.
    """
    one_of("noise", kind, Kind)
    if not len(gold):
        raise ValueError(
            "no row has both gold and a pseudo-label, so the noise cannot be estimated; label some "
            "rows, drawn at random, or give noise= as a number or matrix"
        )
    if kind == "uniform":
        return float((given != gold).mean())
    counts = np.zeros((len(labels), len(labels)))
    np.add.at(counts, (gold, given), 1)
    totals = counts.sum(axis=1, keepdims=True)
    if (unseen := np.flatnonzero(totals[:, 0] == 0)).size:
        raise ValueError(
            f"label {labels.ids[unseen[0]]!r} has no row with both gold and a pseudo-label, so its row "
            f"of the noise matrix is unknown ({unseen.size} such labels of {len(labels)}); label some "
            "of its rows, or take noise='uniform'"
        )
    return np.asarray(counts / totals)


def inverse_noise(
    channel: Float[np.ndarray, "labels labels"],
) -> Float[np.ndarray, "labels labels"]:
    """The inverse of P(pseudo-label | label); rows sum to 1, and some weights are below 0.

    A ValueError says if rows are no distributions, or pseudo-labels of some labels are too alike.
    """
    fine = (channel >= 0).all(axis=1) & (np.abs(channel.sum(axis=1) - 1) < 1e-6)
    if (wrong := np.flatnonzero(~fine)).size:
        raise ValueError(
            f"row {wrong[0]} of the noise matrix is {channel[wrong[0]].tolist()}; it must hold "
            "P(pseudo-label | label): numbers from 0 on that sum to 1"
        )
    if not np.linalg.cond(channel) < _MOST_DOUBTFUL:
        raise ValueError(
            "the noise matrix has no inverse: some labels get the same pseudo-labels, so nothing tells "
            "them apart; merge these labels, or estimate the noise on more gold rows"
        )
    return np.asarray(np.linalg.inv(channel))


def coverage_curve(
    probs: csr_array,
    given: Int[np.ndarray, " rows"],
    channel: Channel,
    how: Nonconformity,
    uniforms: Float[np.ndarray, " rows"],
    delta: float,
) -> CoverageCurve:
    """Adds up the weights of all stored labels in the order of their scores."""
    rows, labels = probs.shape
    row = np.repeat(np.arange(rows), np.diff(probs.indptr))
    level = math.sqrt(math.log(2 / delta) / (2 * rows))
    # Of a mean of functions that are no steps the inequality holds at this level: by Jensen and
    # Markov, P(excess > a) <= integral of exp(-2nt^2) from b on / (a - b) <= exp(-2nb^2).
    wide = level + 1 / (4 * rows * level)
    if isinstance(channel, np.ndarray):
        if channel.shape != (labels, labels):
            raise ValueError(f"the noise matrix has shape {channel.shape}, not {(labels, labels)}")
        inverse = inverse_noise(channel)
        weights = inverse[given[row], probs.indices]
        parts = (np.maximum(part, 0).sum(axis=1).max() for part in (inverse, -inverse))
        slack = wide * float(sum(parts))
    else:
        spread = _spread(channel, labels)
        weights = ((probs.indices == given[row]) - spread / labels) / (1 - spread)
        slack = (level + spread * wide) / (1 - spread)
    scores = stored_scores(probs, how, uniforms)
    order = np.lexsort((weights, scores))  # so that sums do not depend on the order of the rows
    order = order[: np.isfinite(scores).sum()]
    scores, sums = scores[order], np.cumsum(weights[order])
    last = np.flatnonzero(np.append(np.diff(scores) > 0, True)) if len(scores) else np.arange(0)
    return CoverageCurve(scores[last], sums[last] / rows, slack)


def _spread(wrong: float, labels: int) -> float:
    """The share of rows whose label is drawn anew from all labels, the true one among them."""
    chance = 1 - 1 / labels
    if not 0 <= wrong < chance - _ROUNDING:
        raise ValueError(
            f"the share of wrong pseudo-labels must be from 0 to below {chance:.3g}, that of labels "
            f"drawn at random from {labels}; it is {wrong:.3g} (such labels say nothing)"
        )
    return wrong / chance
