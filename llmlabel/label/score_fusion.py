"""Several rankings of the same rows become one, with probabilities that mean what they say.

Sources are soft labels that store few labels of a row: a dual encoder, a memory of training rows, a
linear model, a language model over few candidates. What a weighted sum needs, weights and a common
scale, is fitted on rows with gold that no source has learned from.

RAE-XMC (Wang et al., arXiv 2502.10615) gives label names and a memory of training rows one
weight each, for one encoder. Differs from the paper: any sources, and weights that are fitted to be
probabilities.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.calibrate.provenance import engines_of, fitted_on, refuse_trained
from llmlabel.calibrate.selective import refuse_routed
from llmlabel.calibrate.temperature import MIN_ROWS, log_odds
from llmlabel.data import label_csr, rows_of, with_columns, with_gold
from llmlabel.label.embedding import TEXT_CUT
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

FEATURES = ("log_odds", "log_rank", "absent")
"""What is read of each source, for a label of a row."""

_LOWEST = -16.0
"""Log-odds of a label in a row of which a source says nothing at all."""

_BLOCK_ROWS = 4096
"""Rows fused at a time."""


@dataclass(frozen=True)
class Fusion:
    """Weights of sources, and how good what they give is on the rows that they were fitted on.

    They are the same for all labels, so labels that come later need none of their own.

    Attributes:
        sources: Names, in the order of the weights.
        weights: Of each source for each of `FEATURES`.
        frequency: Weight of log(1 + number of training rows that have the label).
        bias: What every label starts with.
        multilabel: Whether each label is a yes or no of its own.
        rows: Rows fitted on.
        nll: Mean negative log-likelihood, in nats, of their gold: of a row, or with several labels of
            a label that some source stores.
        ceiling: Share of the true labels that some source stores, averaged over the rows.
        label_space: Fingerprint of the label space fitted in.
        engines: Who made the soft labels of each source.
        data_sha: Hash of ids, gold and soft labels of the rows.
    """

    sources: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    frequency: float
    bias: float
    multilabel: bool
    rows: int
    nll: float
    ceiling: float
    label_space: str
    engines: dict[str, tuple[str, ...]]
    data_sha: str


def fit_fusion(
    sources: dict[str, Dataset], labels: LabelSpace, *, training: Dataset | None = None
) -> Fusion:
    """Fits the weights by logistic regression over all labels that some source stores for a row.

    For each source it reads the log-odds of a label, the logarithm of its rank, and that the source
    does not store it (it then has the lowest log-odds and the rank after the last one of the row);
    beside them how often the label is gold in `training`. In a single-label space the labels of a row
    compete, and with that none of them is true, which becomes missing mass.

    A source may not have learned from these rows: their labels would look better than those of new
    rows, and get too much weight. Once the weights are there, it may learn from them too.

    Args:
        sources: name -> soft labels of the same rows, found by `id`; the first has `gold`. Rows of
            unknown gold and, in a single-label space, of none of the labels are left out.
        labels: their label space.
        training: rows with `gold` that sources learned from: how often it has a label tells how
            probable the label is. Without them nothing is read of it.

    Raises:
        ValueError: fewer than 10 usable rows; rows whose `split` is "test" or that are in `training`.
    """
    if not sources:
        raise ValueError("sources is empty; give at least one, as name -> dataset")
    first = with_gold(next(iter(sources.values())))
    if "split" in first.column_names and (test := first["split"][:].count("test")):
        raise ValueError(
            f"{test} of {len(first)} rows are test rows, which a fusion must not see; fit it on rows "
            "of validation"
        )
    refuse_routed(first)
    refuse_trained(first, training)
    gold = label_csr(first, labels)
    usable = np.flatnonzero((np.diff(gold.indptr) > 0) | labels.multilabel)
    if len(usable) < MIN_ROWS:
        raise ValueError(
            f"a fusion needs at least {MIN_ROWS} rows with gold; {len(usable)} have it"
        )
    first, gold = first.select(usable), gold[usable]
    soft = _aligned(sources, first, labels).values()
    pairs, features = _features([some.probs for some in soft], _frequency(training, labels))
    if not len(features):
        raise ValueError(
            f"no source ({', '.join(sources)}) stores a label for any of the {len(usable)} rows with "
            "gold, so there is nothing to weigh; look at their `error`"
        )
    hits = np.asarray(gold[pairs[0], pairs[1]] > 0, dtype=np.float64).ravel()
    weights, bias, nll = _fitted(
        features, hits, pairs[0], len(usable), multilabel=labels.multilabel
    )
    true = np.diff(gold.indptr)
    found = np.bincount(pairs[0], weights=hits, minlength=len(usable))[true > 0] / true[true > 0]
    stored = csr_array((features[:, 0], pairs), shape=gold.shape)
    width = len(FEATURES)
    return Fusion(
        tuple(sources),
        tuple(tuple(weights[i * width : (i + 1) * width].tolist()) for i in range(len(sources))),
        float(weights[-1]),
        bias,
        labels.multilabel,
        len(usable),
        nll,
        float(found.mean()) if found.size else math.nan,
        labels.fingerprint,
        {name: engines_of(rows) for name, rows in sources.items()},
        fitted_on(first, labels, stored)[1],
    )


def fuse(
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    fusion: Fusion,
    training: Dataset | None = None,
    k: int = 100,
) -> Dataset:
    """The rows of the first source with the soft labels that all sources give together.

    Probabilities are calibrated as far as these rows are like those of `fit_fusion`; a label that no
    source stores cannot come back, and `fusion.ceiling` says how many true ones that were.

    Args:
        sources: name -> soft labels of the same rows, those of the fit by name.
        labels: their label space; it may have other labels than that of the fit.
        fusion: what `fit_fusion` gave.
        training: rows with `gold` whose labels are counted, where the fit counted any.
        k: labels to store.

    Raises:
        ValueError: a source is missing or unknown, or rows, labels or training do not fit.
    """
    if {*sources} != {*fusion.sources}:
        raise ValueError(
            f"the fusion was fitted on the sources {', '.join(fusion.sources)}; got "
            f"{', '.join(sources) or 'none'}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of labels to store; got {k}")
    if fusion.multilabel != labels.multilabel:
        raise ValueError(
            "the fusion was fitted where a row has "
            + ("any number of labels" if fusion.multilabel else "one label")
            + ", and this label space is of the other kind; fit it again"
        )
    if fusion.frequency and training is None:
        raise ValueError("the fusion weighs how frequent labels are; give training= as in its fit")
    first = next(iter(sources.values()))
    aligned = _aligned({name: sources[name] for name in fusion.sources}, first, labels)
    frequency = _frequency(training, labels)
    weights = np.array([w for some in fusion.weights for w in some] + [fusion.frequency])
    parts = []
    for start in range(0, len(first), _BLOCK_ROWS):
        some = [soft.probs[start : start + _BLOCK_ROWS] for soft in aligned.values()]
        pairs, features = _features(some, frequency)
        logits = features @ weights + fusion.bias
        values = _probabilities(logits, pairs[0], some[0].shape[0], multilabel=labels.multilabel)
        values = np.maximum(
            values, np.finfo(np.float32).tiny
        )  # none becomes one that nobody stores
        parts.append(csr_array((values, pairs), shape=some[0].shape))
    stacked = _stacked(parts, len(labels))
    fused = SoftLabels(stacked, labels.fingerprint, labels.multilabel).top(k)
    content = json.dumps(asdict(fusion), sort_keys=True).encode()
    name = f"fusion:{'+'.join(fusion.sources)}@{hashlib.sha256(content).hexdigest()[:8]}"
    nothing = [None] * len(first)
    return with_columns(
        fused.add_to(first),
        {
            "engine": ([name] * len(first), Value("string")),
            "error": (_errors(sources, fused), Value("string")),
            "label_mass": (nothing, Value("float32")),
            "prompt_sha": (nothing, Value("string")),
        },
    )


def _aligned(
    sources: dict[str, Dataset], first: Dataset, labels: LabelSpace
) -> dict[str, SoftLabels]:
    """The soft labels of each source for the rows of the first, by id."""
    rows = {name: rows_of(first, source, f"source {name!r}") for name, source in sources.items()}
    for name, other in rows.items():
        if "text" in other.column_names and "text" in first.column_names:
            differ = np.flatnonzero(np.array(other["text"][:]) != np.array(first["text"][:]))
            if differ.size:
                id = first[int(differ[0])]["id"]
                raise ValueError(
                    f"the row with id {id!r} has another text in source {name!r}; sources must "
                    "label the same rows"
                )
    return SoftLabels.from_sources(rows, labels)


def _frequency(training: Dataset | None, labels: LabelSpace) -> Float[np.ndarray, " labels"]:
    """log(1 + rows that have the label)."""
    if training is None:
        return np.zeros(len(labels))
    gold = label_csr(training, labels)
    return np.log1p(np.bincount(gold.indices, minlength=len(labels)))


def _errors(sources: dict[str, Dataset], fused: SoftLabels) -> list[str | None]:
    """Why a row has no label, or that its text was cut; what the first source that knows says."""
    first = next(iter(sources.values()))
    told: list[list[str | None]] = [
        rows_of(first, source, name)["error"][:]
        for name, source in sources.items()
        if "error" in source.column_names
    ]
    found: list[str | None] = []
    for row, labels in enumerate(np.diff(fused.probs.indptr).tolist()):
        said = [error for errors in told if (error := errors[row])]
        if labels:
            said = [error for error in said if error.startswith(TEXT_CUT)]
        found.append(said[0] if said else None if labels else "no source has a label")
    return found


# --------------------------------------------------------------------------------------- numerics

_Pairs = tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]
"""Row and label, by row and then by label."""


def _features(
    sources: list[csr_array], frequency: Float[np.ndarray, " labels"]
) -> tuple[_Pairs, Float[np.ndarray, "pairs features"]]:
    """What is read of each label that some source stores for a row."""
    rows, labels = sources[0].shape
    stored = [_stored(probs) for probs in sources]
    keys = [np.repeat(np.arange(rows), np.diff(p.indptr)) * labels + p.indices for p in stored]
    pairs = np.unique(np.concatenate(keys))
    row, label = np.divmod(pairs, labels)
    found = np.zeros((len(pairs), len(FEATURES) * len(sources) + 1))
    for i, (probs, own) in enumerate(zip(stored, keys, strict=True)):
        odds, counts = np.clip(log_odds(probs.data), _LOWEST, -_LOWEST), np.diff(probs.indptr)
        lowest = np.full(rows, _LOWEST)
        np.minimum.at(least := np.full(rows, np.inf), own // labels, odds)
        lowest[counts > 0] = least[counts > 0]
        at = np.searchsorted(pairs, own)
        block = found[:, len(FEATURES) * i : len(FEATURES) * (i + 1)]
        block[:] = np.stack([lowest[row], np.log1p(counts[row]), np.ones(len(pairs))], axis=1)
        block[at, 0], block[at, 1], block[at, 2] = odds, np.log1p(_ranks(probs)), 0.0
    found[:, -1] = frequency[label]
    return (row, label), found


def _stored(probs: csr_array) -> csr_array:
    """Without zeros, which say no more than a label that is not stored."""
    if (probs.data > 0).all():
        return probs
    probs = probs.copy()
    probs.eliminate_zeros()
    return probs


def _ranks(probs: csr_array) -> Int[np.ndarray, " stored"]:
    """The place of each label in its row from 0: falling probability, then rising label."""
    rows = np.repeat(np.arange(probs.shape[0]), np.diff(probs.indptr))
    order = np.lexsort((probs.indices, -probs.data, rows))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - probs.indptr[rows]
    return ranks


def _fitted(
    features: Float[np.ndarray, "pairs features"],
    hits: Float[np.ndarray, " pairs"],
    row: Int[np.ndarray, " pairs"],
    rows: int,
    *,
    multilabel: bool,
) -> tuple[Float[np.ndarray, " features"], float, float]:
    """Weights, bias and the mean negative log-likelihood that they reach."""
    from scipy.optimize import minimize

    mean, deviation = features.mean(axis=0), features.std(axis=0)
    flat = deviation < 1e-9  # such as that a source stores all labels: no weight
    x = (features - mean) / np.where(flat, 1.0, deviation)
    x[:, flat] = 0.0

    # Of variance 1 they have the prior N(0, 1), as has the bias of labels that compete: where none
    # was ever missing it would grow without end.
    prior = np.full(x.shape[1] + 1, 0.5 / (len(x) if multilabel else rows))
    prior[-1] *= not multilabel

    def loss(theta: Any) -> tuple[float, Any]:
        value, by_logit = fusion_loss(
            x @ theta[:-1] + theta[-1], hits, row, rows, multilabel=multilabel
        )
        pull = prior * theta
        return value + float(pull @ theta), np.append(by_logit @ x, by_logit.sum()) + 2 * pull

    start = np.zeros(x.shape[1] + 1)
    theta = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    weights = np.where(flat, 0.0, theta[:-1] / np.where(flat, 1.0, deviation))
    bias = float(theta[-1] - weights @ mean)
    nll, _ = fusion_loss(features @ weights + bias, hits, row, rows, multilabel=multilabel)
    return weights, bias, nll


def fusion_loss(
    logits: Float[np.ndarray, " pairs"],
    hits: Float[np.ndarray, " pairs"],
    row: Int[np.ndarray, " pairs"],
    rows: int,
    *,
    multilabel: bool,
) -> tuple[float, Float[np.ndarray, " pairs"]]:
    """Mean negative log-likelihood and its gradient by the logits.

    With `multilabel` over pairs, each a yes or no; else over rows, whose labels compete with a label
    of logit 0 that stands for all that are not stored, true where none of the others is.
    """
    probs = _probabilities(logits, row, rows, multilabel=multilabel)
    if multilabel:
        losses = np.logaddexp(0, -np.where(hits > 0, logits, -logits))
        return float(losses.mean()), (probs - hits) / len(logits)
    total = _log_total(logits, row, rows)
    return float((total.sum() - (hits * logits).sum()) / rows), (probs - hits) / rows


def _probabilities(
    logits: Float[np.ndarray, " pairs"],
    row: Int[np.ndarray, " pairs"],
    rows: int,
    *,
    multilabel: bool,
) -> Float[np.ndarray, " pairs"]:
    from scipy.special import expit

    if multilabel:
        values: np.ndarray = expit(logits)
        return values
    shares: np.ndarray = np.exp(logits - _log_total(logits, row, rows)[row])
    return shares


def _log_total(
    logits: Float[np.ndarray, " pairs"], row: Int[np.ndarray, " pairs"], rows: int
) -> Float[np.ndarray, " rows"]:
    """log(1 + sum of exp of the logits of each row)."""
    np.maximum.at(peak := np.zeros(rows), row, logits)
    total = np.bincount(row, weights=np.exp(logits - peak[row]), minlength=rows)
    logs: np.ndarray = peak + np.log(total + np.exp(-peak))
    return logs


def _stacked(parts: list[csr_array], labels: int) -> csr_array:
    from scipy.sparse import vstack

    return csr_array(vstack(parts)) if parts else csr_array((0, labels))
