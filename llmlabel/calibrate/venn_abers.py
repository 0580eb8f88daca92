"""Monotone calibration: isotonic regression, and Venn-Abers intervals of a yes or no."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Curve:
    """A map of probabilities that never falls.

    Attributes:
        at: Where it is known, rising.
        low: Its values there; of a Venn-Abers pair those of p0.
        high: Of a Venn-Abers pair those of p1; empty for isotonic regression.
    """

    at: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...] = ()


def fit_isotonic(probs: Float[np.ndarray, " rows"], hits: Bool[np.ndarray, " rows"]) -> Curve:
    """Isotonic regression of hits on probabilities, Zadrozny and Elkan 2002.

    Differs from the paper: values stay between 1/(n + 2) and (n + 1)/(n + 2) for n rows, for no
    number of rows shows that something is impossible.
    """
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(probs) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
    model.fit(probs, hits.astype(np.float64))
    return Curve(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def isotonic(curve: Curve, probs: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """The curve at `probs`: linear between the points where it is known, level outside."""
    return np.interp(probs, curve.at, curve.low)


def fit_venn_abers(probs: Float[np.ndarray, " rows"], hits: Bool[np.ndarray, " rows"]) -> Curve:
    """Inductive Venn-Abers predictors for every new probability at once.

    Vovk, Petej and Fedorova 2015 (arXiv 1511.00213), section 4: p1 of a new row is the isotonic
    regression of all gold rows and the new one, taken to be a hit, at the new one; p0 takes it to be
    none. Whatever the distribution, one of the two is calibrated when rows are exchangeable.
    """
    at = np.unique(probs)
    high = _with_a_hit(at, probs, hits)
    # A miss among rising scores is a hit among falling ones, with the outcomes exchanged.
    low = 1 - _with_a_hit(-at[::-1], -probs, ~hits)[::-1]
    bends = np.flatnonzero((np.diff(high) > 0) | (np.diff(low) > 0))
    # Both ends of each level stretch: p1 is read at the next point above, p0 at the one below.
    keep = np.unique(np.concatenate([[0], bends, bends + 1, [len(at) - 1]]))
    return Curve(*(tuple(values[keep].tolist()) for values in (at, low, high)))


def venn_abers(
    curve: Curve, probs: Float[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """p0 and p1 of new probabilities; below or above all gold rows p0 is 0 or p1 is 1."""
    below = np.searchsorted(curve.at, probs, side="right")
    above = np.searchsorted(curve.at, probs, side="left")
    low, high = np.array([0.0, *curve.low]), np.array([*curve.high, 1.0])
    return low[below], high[above]


def merged(
    low: Float[np.ndarray, " rows"], high: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """p1 / (1 - p0 + p1): the one probability whose log-loss is never far from that of the right one.

    Vovk, Petej and Fedorova 2015, section 5.
    """
    return high / (1 - low + high)


def _with_a_hit(
    at: Float[np.ndarray, " points"],
    scores: Float[np.ndarray, " rows"],
    hits: Bool[np.ndarray, " rows"],
) -> Float[np.ndarray, " points"]:
    """The isotonic regression at each of the distinct scores when one more hit is there.

    The value at point i is the largest over a <= i of the smallest over b >= i of the mean of the
    points a to b with the new hit. Adding a hit at i moves all of the cumulative sum diagram from i
    on by (1, 1), or, seen from there, all before i by (-1, -1): the slope is that of the greatest
    convex minorant of the moved diagram, kept as a stack of corners while i goes up.
    """
    group = np.searchsorted(at, scores)
    sums = [np.bincount(group, weights=w, minlength=len(at)) for w in (np.ones(len(group)), hits)]
    rows, total = (np.concatenate([[0.0], np.cumsum(one)]).tolist() for one in sums)
    return _slopes(rows, total)


def _slopes(x: list[float], y: list[float]) -> Float[np.ndarray, " points"]:
    """What `_with_a_hit` returns, of a cumulative sum diagram that begins at (0, 0).

    Algorithms 1 and 2 of the paper: the top of the stack is where the edge over the new hit begins.
    """
    stack: list[tuple[float, float]] = []
    for point in [*zip(reversed(x), reversed(y), strict=True), (-1.0, -1.0)]:
        _push(stack, point)
    found = []
    for right, height in zip(x[1:], y[1:], strict=True):
        (x0, y0), (x1, y1) = stack[-1], stack[-2]
        found.append((y1 - y0) / (x1 - x0))
        moved = right - 1, height - 1
        if (moved[1] - y0) * (x1 - x0) < (y1 - y0) * (moved[0] - x0):  # below the edge
            stack.pop()
            _push(stack, moved)
    return np.array(found)


def _push(stack: list[tuple[float, float]], point: tuple[float, float]) -> None:
    """Adds a point left of all on the stack; what no longer bends upwards is no corner."""
    x, y = point
    while len(stack) > 1:
        (x0, y0), (x1, y1) = stack[-1], stack[-2]
        if (y0 - y) * (x1 - x0) < (y1 - y0) * (x0 - x):
            break
        stack.pop()
    stack.append(point)
