"""Words that tell labels apart: linear classifiers over the few labels that come into question.

`llmlabel.label.profiles.label_lexical` finds labels for a row, and a classifier of each label decides
among the rows that it is found for. So XR-Linear (PECOS, Yu et al., arXiv 2010.05878) matches and
ranks, with a tree of labels for the matching and a hinge loss. It is worth most where labels have many
rows; where they have few it does no harm.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.special import expit, logit

from llmlabel.calibrate.provenance import shared_rows
from llmlabel.data import require_columns
from llmlabel.label.profiles import Words, check_prior, in_parts, label_by_words, table_of
from llmlabel.label.retrieval import probabilities
from llmlabel.labelspace import LabelSpace

_UPDATES, _STEPS = 2, 10
"""Updates of a label's weights, and steps of conjugate gradients in each.

More of them, Newton's steps, a bias or a stronger penalty were no better on held-out rows of finna_yso
and of Debian's tags: few updates keep weights small, too.
"""

_LEAST = 1e-3
"""Weights below it are dropped: a word of a text has at most length 1."""


def label_linear(  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    prior: float = 2.5,
    candidates: int = 50,
    strength: float = 1.0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the `candidates` labels that `label_lexical` finds, with probabilities of a classifier.

    The log-odds of a label are those of its profile (a logistic regression of cosine, best cosine of
    the row and frequency, the same for all labels) plus x'w, where w is fitted by ridge-penalised
    logistic regression on the label's rows and on the pool rows that it is found for. A label of few
    rows hardly moves from its profile. In a single-label space the labels of a row compete.

    Differs from XR-Linear: no tree, log-loss, and the profile stays part of the score.

    Args:
        dataset: rows with `id` and `text`, none of which is in the pool.
        pool: training rows with the same columns and `gold`.
        labels: the label space of both.
        prior: see `label_lexical`.
        candidates: labels of a row that come into question.
        strength: of the penalty of a label's weights.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: an argument is out of bounds, no pool row has text and gold, or a row is in the
            pool.
    """
    check_prior(prior, candidates)
    if not 0 < strength < np.inf:
        raise ValueError(f"strength must be above 0, the weight of the penalty; got {strength}")
    require_columns(dataset, "id", "text")
    if known := int(shared_rows(dataset, pool).sum()):
        raise ValueError(
            f"{known} of {len(dataset)} rows are in the pool, whose labels the classifiers know; leave "
            "them out, or use label_lexical, for which a row is no evidence for itself"
        )
    words = Words.read(pool, labels, prior)
    name = f"linear@{words.digest([prior, candidates, strength, labels.fingerprint])}"
    fitted: list[_Classifiers] = []

    def read(rows: Dataset) -> csr_array:
        if not fitted:  # not before a block has to be computed
            fitted.append(_fitted(words, pool, candidates, strength))
        vectors = words.vectors_of(rows["text"][:])
        ids, cosines = words.nearest(rows, vectors, candidates)
        logits = fitted[0].logits(vectors, ids, cosines)
        values = probabilities(logits, 1.0, 0.0, multilabel=labels.multilabel)
        return table_of(ids, np.where(cosines != 0, values, 0.0), len(labels))

    return label_by_words(
        dataset, read, labels, name=name, step="label_linear", block_rows=block_rows, output=output
    )


@dataclass(frozen=True, eq=False)
class _Classifiers:
    """What all labels share, weights of each label, and how many rows it has."""

    shared: Float[np.ndarray, " three"]
    bias: float
    weights: csr_array
    counts: Int[np.ndarray, " labels"]

    def logits(
        self,
        vectors: csr_array,
        ids: Int[np.ndarray, "rows some"],
        cosines: Float[np.ndarray, "rows some"],
    ) -> Float[np.ndarray, "rows some"]:
        best = np.broadcast_to(cosines.max(axis=1, keepdims=True), cosines.shape)
        features = np.stack([cosines, best, np.log1p(self.counts[ids])], axis=2)
        scores = (vectors @ self.weights.T).toarray()
        found: np.ndarray = features @ self.shared + self.bias + np.take_along_axis(scores, ids, 1)
        return found


def _fitted(words: Words, pool: Dataset, candidates: int, strength: float) -> _Classifiers:
    """From rows that their own labels are no evidence for."""
    from sklearn.linear_model import LogisticRegression

    targets = words.memory.targets
    rows, labels = targets.shape
    known = pool.select(words.memory.rows)
    lists = [
        words.nearest(known.select(some), words.vectors[some], candidates)
        for some in in_parts(np.arange(rows), labels)
    ]
    ids, cosines = (np.concatenate(part) for part in zip(*lists, strict=True))
    row, label = np.repeat(np.arange(rows), ids.shape[1]), ids.ravel()
    hits = np.asarray(targets[row, label]).ravel() > 0
    counts = np.bincount(targets.indices, minlength=labels)
    best = np.repeat(cosines.max(axis=1), ids.shape[1])
    features = np.stack([cosines.ravel(), best, np.log1p(counts[label] - hits)], axis=1)
    if not 0 < hits.sum() < len(hits):
        raise ValueError(
            "the profiles find no label that is true, or none that is not; use label_lexical"
        )
    model = LogisticRegression(C=10.0).fit(features, hits)
    base = expit(model.decision_function(features))
    # true labels that are not found teach their label too, with the lowest odds of the row
    own = np.repeat(np.arange(rows), np.diff(targets.indptr)) * labels + targets.indices
    lost = np.setdiff1d(own, row * labels + label)
    least = base.reshape(ids.shape).min(axis=1)[lost // labels]
    row, label = np.append(row, lost // labels), np.append(label, lost % labels)
    hits, base = np.append(hits, np.ones(len(lost), dtype=bool)), np.append(base, least)
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(labels + 1))
    data, where, indptr = [], [], [0]
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        some = order[start:end]
        weights = residual_weights(
            words.vectors[row[some]], logit(base[some]), hits[some].astype(np.float64), strength
        )
        kept = np.flatnonzero(np.abs(weights) > _LEAST)
        data.append(weights[kept])
        where.append(kept)
        indptr.append(indptr[-1] + len(kept))
    weights = csr_array(
        (np.concatenate(data), np.concatenate(where), indptr),
        shape=(labels, words.vectors.shape[1]),
    )
    return _Classifiers(model.coef_[0], float(model.intercept_[0]), weights, counts)


def residual_weights(
    vectors: csr_array,
    offsets: Float[np.ndarray, " rows"],
    hits: Float[np.ndarray, " rows"],
    strength: float,
    *,
    updates: int = _UPDATES,
    steps: int = _STEPS,
) -> Float[np.ndarray, " features"]:
    """Ridge-penalised logistic regression beside fixed offsets, without a bias.

    Minimises sum of log-losses of offset + x'w plus `strength` / 8 |w|^2 by the quadratic bound of
    Böhning 1992 (the curvature of a log-loss is at most 1/4): every update lowers it. w = X'a, since
    there are fewer rows than words, and a is found by conjugate gradients.
    """
    dual = np.zeros(len(hits))
    for _ in range(updates if len(hits) else 0):
        residual = hits - expit(offsets + vectors @ (vectors.T @ dual))
        # a step from here: (XX' + strength) change = 4 residual - strength dual
        left = 4 * residual - strength * dual
        change, direction, size = np.zeros(len(hits)), left.copy(), float(left @ left)
        for _ in range(steps):
            if size < 1e-12:
                break
            image = vectors @ (vectors.T @ direction) + strength * direction
            step = size / float(direction @ image)
            change += step * direction
            left = left - step * image
            size, before = float(left @ left), size
            direction = left + (size / before) * direction
        dual += change
    weights: np.ndarray = vectors.T @ dual
    return weights
