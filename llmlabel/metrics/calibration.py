"""How far probabilities can be believed: log-loss, Brier score, calibration error, risk by confidence."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from llmlabel.metrics.answers import LabelIds, Probs, correct

Binning = Literal["width", "mass"]
"""Bins of equal width, or of equally many values."""


@dataclass(frozen=True)
class BrierParts:
    """A Brier score and what it is made of: reliability - resolution + uncertainty + remainder.

    Attributes:
        brier: The score; lower is better.
        reliability: How far probabilities are from the frequencies in their bins; 0 is calibrated.
        resolution: How far those frequencies are from the base rates; higher is better.
        uncertainty: Of the gold labels alone; no forecast changes it.
        remainder: What the bins blur: the variance of the probabilities inside a bin, minus twice
            their covariance with the gold label. 0 where each bin holds one value.
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    remainder: float


def nll(probs: Probs, gold: LabelIds, *, floor: float = 1e-12) -> float:
    """Mean negative log-likelihood in nats; the probability of gold counts as at least `floor`.

    A row whose gold is none of these has the likelihood `floor`.
    """
    picked = probs[np.arange(len(gold)), gold].astype(np.float64)  # -1 reads the last label
    return float(-np.log(np.maximum(np.where(gold >= 0, picked, 0.0), floor)).mean())


def brier(probs: Probs, gold: LabelIds) -> float:
    """Brier score, multi-class: mean over rows of the summed squared error, between 0 and 2.

    A row whose gold is none of these has the target 0 for every label.
    """
    return float(((probs.astype(np.float64) - _targets(probs, gold)) ** 2).sum(axis=1).mean())


def brier_parts(
    probs: Probs, gold: LabelIds, *, bins: int = 10, binning: Binning = "width"
) -> BrierParts:
    """The Brier score taken apart, summed over the labels, each with bins of its own.

    Murphy 1973 (doi 10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2), with the remainder of bins
    that hold several values, Stephenson et al. 2008 (doi 10.1175/2007WAF2006116.1).
    """
    targets = _targets(probs, gold)
    rows, base = len(gold), targets.mean(axis=0)
    mean, share, count = _label_bins(probs, targets, bins=bins, binning=binning)
    weight = count / rows
    filled = count > 0
    off = np.where(filled, mean - share, 0.0)
    away = np.where(filled, share - base[:, None], 0.0)
    reliability, resolution = float((weight * off**2).sum()), float((weight * away**2).sum())
    uncertainty, score = float((base * (1 - base)).sum()), brier(probs, gold)
    remainder = score - (reliability - resolution + uncertainty)
    return BrierParts(score, reliability, resolution, uncertainty, remainder)


def binned(
    values: Float[np.ndarray, " values"],
    hits: Num[np.ndarray, " values"] | Bool[np.ndarray, " values"],
    *,
    bins: int = 10,
    binning: Binning = "width",
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Mean value, share of hits and number of values in each bin.

    Bin i of equal width is (i/bins, (i+1)/bins]; 0 belongs to the first. Bins of equal mass are
    those of `quantile_bins`. An empty bin has NaN, NaN and 0.
    """
    if binning == "mass":
        index = quantile_bins(values, bins=bins)
    else:
        # Against the edges themselves: value * bins would round 0.2 * 15 up into the next bin.
        index = np.searchsorted(np.arange(1, bins) / bins, values, side="left")
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        mean = np.bincount(index, weights=values, minlength=bins) / count
        share = np.bincount(index, weights=hits, minlength=bins) / count
    return mean, share, count


def quantile_bins(
    values: Float[np.ndarray, " values"] | Int[np.ndarray, " values"], *, bins: int = 10
) -> Int[np.ndarray, " values"]:
    """Bins of as equally many values as ties allow: equal values share one, the lowest they fit."""
    last = -(-len(values) * np.arange(1, bins) // bins) - 1  # the last value of each bin but one
    return np.searchsorted(np.sort(values)[last[last >= 0]], values, side="left")


def reliability(
    probs: Probs, gold: LabelIds, *, bins: int = 10, binning: Binning = "width"
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Mean confidence, accuracy and number of rows in bins of the top probability, as in `binned`."""
    confidence = probs.max(axis=1).astype(np.float64)
    return binned(confidence, correct(probs, gold), bins=bins, binning=binning)


def ece(probs: Probs, gold: LabelIds, *, bins: int = 10, binning: Binning = "width") -> float:
    """Expected calibration error of the top probability, Guo et al. 2017 (arXiv 1706.04599), eq. 3.

    With bins of equal mass it is that of Nguyen and O'Connor 2015 (arXiv 1508.05154).
    """
    return calibration_error(*reliability(probs, gold, bins=bins, binning=binning))


def classwise_ece(
    probs: Probs, gold: LabelIds, *, bins: int = 10, binning: Binning = "width"
) -> float:
    """Mean over all labels of the calibration error of that label's own probability.

    Kull et al. 2019 (arXiv 1910.12656). With many labels nearly all probabilities are
    near 0 and so is this; compare it between methods, not between label spaces.
    """
    table = _label_bins(probs, _targets(probs, gold), bins=bins, binning=binning)
    return float(np.mean([calibration_error(*label) for label in zip(*table, strict=True)]))


def calibration_error(
    mean: Float[np.ndarray, " bins"],
    share: Float[np.ndarray, " bins"],
    count: Int[np.ndarray, " bins"],
) -> float:
    """Mean distance of value and share of hits over the values of a table of `binned`."""
    filled = count > 0
    gap = np.abs(mean[filled] - share[filled])
    return float((gap * count[filled]).sum() / count.sum())


def risk_coverage(
    confidence: Float[np.ndarray, " rows"], correct: Bool[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " levels"], Float[np.ndarray, " levels"]]:
    """Error rate of the rows that are at least so confident, against the share of such rows.

    One point for each distinct confidence, the most confident first; rows of equal confidence enter
    together, so the order of the rows changes nothing.
    """
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    last = np.append(np.flatnonzero(np.diff(falling) != 0), len(falling) - 1)
    accepted = last + 1
    errors = np.cumsum(~correct[order])[last]
    return accepted / len(falling), errors / accepted


def aurc(confidence: Float[np.ndarray, " rows"], correct: Bool[np.ndarray, " rows"]) -> float:
    """Area under the risk-coverage curve: mean risk over all coverages, lower is better.

    Geifman et al. 2019 (arXiv 1805.08206). Differs from the paper: rows of equal
    confidence enter together, each at the risk of their group, instead of in the order they have.
    """
    coverages, risks = risk_coverage(confidence, correct)
    return float((np.diff(coverages, prepend=0.0) * risks).sum())


def _targets(probs: Probs, gold: LabelIds) -> Bool[np.ndarray, "rows labels"]:
    targets: np.ndarray = gold[:, None] == np.arange(probs.shape[1])
    return targets


def _label_bins(
    probs: Probs, targets: Bool[np.ndarray, "rows labels"], *, bins: int, binning: Binning
) -> tuple[
    Float[np.ndarray, "labels bins"],
    Float[np.ndarray, "labels bins"],
    Int[np.ndarray, "labels bins"],
]:
    """`binned` of the probability of each label."""
    columns = zip(probs.T.astype(np.float64), targets.T, strict=True)
    tables = [binned(column, hits, bins=bins, binning=binning) for column, hits in columns]
    mean, share, count = (np.stack(column) for column in zip(*tables, strict=True))
    return mean, share, count
