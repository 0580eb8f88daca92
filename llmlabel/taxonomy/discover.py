"""Finds categories that nobody named yet among known ones, and asks a person about the right rows.

Ma et al., "Active Generalized Category Discovery" (AGCD, arXiv 2403.04272), on vectors of texts. In
rounds: `with_new_labels` makes room, `discover` finds clusters and says which rows to ask about next,
a person or a language model writes the `gold` of these, `discover` goes on from there. Which of the
new labels a kind of text gets first is the asked one's choice; clusters are renumbered to follow it,
so that `new-3` stays `new-3`. `name_new_labels` reads the clusters and names what has no name.
"""

import dataclasses
from pathlib import Path

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from llmlabel import models
from llmlabel.data import gold_index, require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import predicted
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.cluster import cluster_taxonomy

_STARTS = 10
_MOST_STEPS = 100

_Vectors = Float[np.ndarray, "rows width"]
_Centres = Float[np.ndarray, "labels width"]
_Labels = Int[np.ndarray, " rows"]


def with_new_labels(labels: LabelSpace, *, new: int) -> LabelSpace:
    """The known labels, then `new-1`, `new-2` and so on, for categories yet to be found.

    Their number is taken as known, as in the paper.
    """
    if new < 1:
        raise ValueError(f"new must be at least 1, the number of labels to find; got {new}")
    ids = [f"new-{number}" for number in range(1, new + 1)]
    if taken := [id for id in ids if id in labels.ids]:
        raise ValueError(
            f"the label {taken[0]!r} is there already; make room for new ones only once"
        )
    blank = ((),) * new
    return dataclasses.replace(
        labels,
        ids=(*labels.ids, *ids),
        names=(*labels.names, *(id.replace("-", " ") for id in ids)),
        descriptions=(*labels.descriptions, *[""] * new),
        parents=(*labels.parents, *blank),
        parent_probs=(*labels.parent_probs, *blank) if labels.parent_probs else (),
    )


def discover(
    dataset: Dataset,
    labels: LabelSpace,
    encoder: str | Path | Encoder,
    *,
    known: int,
    queries: int,
    round: int = 1,
    temperature: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Adds a soft label over known and new labels, and the rows to ask about next as `query`.

    Spherical k-means in which rows with gold stay in the cluster of their label, from the best of 10
    starts (k-means++, Arthur and Vassilvitskii 2007, for labels without gold). Later rounds start
    labels with gold from these rows, and others from their cluster of the round before, renumbered
    by `stable_mapping`. A row's soft label is softmax(cosine with each centre / `temperature`), gold
    or not. `query` is the place in the order of `novel_queries` among rows with unknown gold (1 is
    first, null is not asked), `query_reason` what is doubtful. A text without a character to read
    gets no label and an `error`.

    Differs from the paper: clusters of vectors as they are, instead of a network trained in each
    round.

    Args:
        dataset: rows with `id`, `text` and `gold` (positions in `labels`, null where unknown); from
            round 2 on the result of the round before, with the gold of its queries filled in.
        labels: from `with_new_labels`, flat and single-label; the same in all rounds.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        known: how many labels, the first ones, are not new; each needs a row with gold.
        queries: rows to ask about.
        round: from 1; the first asks about sure rows of new clusters, later ones about doubtful ones.
        temperature: of the soft label, and so of its margins.
        seed: of the starts.

    Raises:
        ValueError: a column is missing or of another label space, a number is out of range, a known
            label has no gold, or there are fewer rows than labels to find.
    """
    require_columns(dataset, "id", "text", "gold")
    texts, ids = dataset["text"][:], [str(id) for id in dataset["id"][:]]
    order = sorted(range(len(ids)), key=ids.__getitem__)  # nothing depends on the order of rows
    rows = np.array([row for row in order if texts[row].strip()], dtype=np.int64)
    gold = gold_index(dataset, labels)[rows]
    _check(labels, gold, known=known, queries=queries, round=round, temperature=temperature)
    before = gold
    if round > 1:
        last = SoftLabels.from_dataset(dataset, labels).top(1).probs.toarray()[rows]
        before = _renumbered(predicted(last), gold, len(labels))
    ready = models.load_encoder(encoder)
    vectors = unit_vectors(ready, [texts[row] for row in rows])
    centres = _best_centres(vectors, before, gold, len(labels), seed)
    probs = np.zeros((len(ids), len(labels)))
    logits = vectors @ centres.T / temperature
    probs[rows] = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    unknown = np.array([value is None for value in dataset["gold"][:]])
    askable = rows[unknown[rows]]
    picked = askable[novel_queries(probs[askable], known, queries, round=round)]
    place = {row: number for number, row in enumerate(picked.tolist(), start=1)}
    reasons = [_reason(probs[row], labels) if row in place else None for row in range(len(ids))]
    return with_columns(
        SoftLabels.from_dense(probs, labels).add_to(dataset),
        {
            "engine": ([encoder_name(encoder, labels.texts())] * len(ids), Value("string")),
            "error": ([None if text.strip() else "empty text" for text in texts], Value("string")),
            "label_mass": ([None] * len(ids), Value("float32")),
            "prompt_sha": ([None] * len(ids), Value("string")),
            "query": ([place.get(row) for row in range(len(ids))], Value("int32")),
            "query_reason": (reasons, Value("string")),
        },
    )


def novel_queries(
    probs: Float[np.ndarray, "rows labels"],
    known: int,
    n: int,
    *,
    round: int,
    adaptive_round: int = 2,
) -> Int[np.ndarray, " queries"]:
    """The positions of the `n` rows to ask about, first ones first (the paper's Adaptive-Novel).

    Rows are ordered by margin (first less second probability), before `adaptive_round` the surest
    first, from it on the most doubtful. Of each cluster of a new label the first n // (number of new
    labels) are taken, then the first of what is left of all these clusters.

    Differs from the paper: where these clusters have fewer than `n` rows together, the first of all
    others follow, instead of an error.

    Args:
        probs: of rows that may be asked about; new labels come after the known ones.
        known: how many labels are not new.
        n: how many rows to take; all where there are fewer.
        round: from 1.
        adaptive_round: the first round that asks about doubtful rows.
    """
    two = np.sort(probs, axis=1)[:, -2:]
    margins = two[:, 1] - two[:, 0]
    order = np.argsort(margins if round >= adaptive_round else -margins, kind="stable")
    clusters = probs.argmax(axis=1)[order]
    share = n // max(probs.shape[1] - known, 1)
    chosen = [order[clusters == label][:share] for label in range(known, probs.shape[1])]
    every = np.concatenate([*chosen, order[clusters >= known], order])
    _, first = np.unique(every, return_index=True)
    return every[np.sort(first)][:n]


def stable_mapping(clusters: _Labels, true: _Labels, labels: int) -> Int[np.ndarray, " labels"]:
    """The cluster of each label: the permutation that agrees with the most rows (Hungarian method).

    Of equally good ones that which leaves the most labels at the cluster of their own number, so a
    label that no row has keeps it as long as nobody needs it. Rows of -1 on either side do not count.

    Differs from the paper: there it is left to chance who gets the clusters that nobody claims.
    """
    stay = np.eye(labels) / (2 * labels)  # together less than one row
    agree = _contingency(clusters, true, labels) + stay
    _, label_of = linear_sum_assignment(agree, maximize=True)
    return np.argsort(label_of)


def gcd_metrics(clusters: _Labels, gold: _Labels, known: int) -> dict[str, float]:
    """Accuracy over `all` rows and over those of `old` and `new` labels, clusters in the best order.

    One assignment of clusters to labels (Hungarian method) for all rows, as in the paper ("v2" of
    its code; "v1" assigns old and new rows apart, which is easier). Rows without gold (-1) are left
    out, rows without a cluster are wrong; 0 where there are no such rows.

    Args:
        clusters: any numbers, -1 for none.
        gold: labels; those below `known` are old.
        known: the number of old labels.
    """
    size = int(max(clusters.max(initial=0), gold.max(initial=0))) + 1
    right = (stable_mapping(clusters, gold, size)[gold] == clusters) & (gold >= 0)

    def share(some: Bool[np.ndarray, " rows"]) -> float:
        return float(right[some].mean()) if some.any() else 0.0

    return {
        "all": share(gold >= 0),
        "old": share((gold >= 0) & (gold < known)),
        "new": share(gold >= known),
    }


def query_metrics(gold: _Labels, known: int, labels: int) -> dict[str, float]:
    """How well the rows asked about, given by their true labels, tell of the new ones.

    `novel_ratio` is the share of them that have a new label, `novel_coverage` the share of new
    labels that were met, `novel_uniformity` the entropy of the new labels met over its maximum.
    """
    counts = np.bincount(gold[gold >= known] - known, minlength=labels - known)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return {
        "novel_ratio": float(counts.sum() / max(len(gold), 1)),
        "novel_coverage": float((counts > 0).mean()),
        "novel_uniformity": float(-(shares * np.log(shares)).sum() / np.log(max(len(counts), 2))),
    }


def name_new_labels(
    dataset: Dataset,
    labels: LabelSpace,
    engine: Engine,
    *,
    known: int,
    use_case: str,
    seed: int = 0,
    output: Path | None = None,
) -> LabelSpace:
    """The label space with names and descriptions of the new labels by `cluster_taxonomy`.

    Ids stay; a label that no row has as its most probable one keeps its name. Rows are moved to the
    result by `llmlabel.refine.carry.carry_over`.

    Args:
        dataset: a result of `discover`.
        labels: the label space of it.
        engine: who names.
        known: how many labels, the first ones, are not new.
        use_case: what the labels are for, in a few words.
        seed: of the sampling.
        output: folder that keeps every call as soon as it is answered; the same call continues there.

    Raises:
        ValueError: rows lie in fewer than two of the new labels.
    """
    require_columns(dataset, "id", "text")
    first = SoftLabels.from_dataset(dataset, labels).top(1).probs
    found = np.full(len(dataset), -1)
    found[np.diff(first.indptr) > 0] = first.indices
    numbers, clusters = np.unique(found, return_inverse=True)
    clusters = clusters - np.searchsorted(numbers, known)
    near = first.max(axis=1).toarray().ravel()
    rows = with_columns(
        dataset.select_columns(["id", "text"]),
        {
            "cluster": (np.where(found >= known, clusters, -1), Value("int32")),
            "centrality": (near, Value("float32")),
        },
    )
    named = cluster_taxonomy(rows, engine, use_case=use_case, seed=seed, output=output).labels
    names, descriptions = list(labels.names), list(labels.descriptions)
    taken = {name.casefold() for name in labels.names[:known]}
    for number, label in enumerate(numbers[numbers >= known].tolist()):
        names[label], descriptions[label] = named.names[number], named.descriptions[number]
        if names[label].casefold() in taken:
            names[label] = f"{names[label]} ({labels.names[label]})"
    return dataclasses.replace(labels, names=tuple(names), descriptions=tuple(descriptions))


# ------------------------------------------------------------------------------------ clusters


def _renumbered(clusters: _Labels, gold: _Labels, labels: int) -> _Labels:
    """The label of rows with gold, and of rows in the cluster of a label that has no gold.

    Where a label has gold, its rows tell more than a cluster that may hold two categories, or half a
    one: the next round starts from them alone.
    """
    label_of = np.argsort(stable_mapping(clusters, gold, labels))
    label = np.where(clusters >= 0, label_of[clusters], -1)
    has_gold = np.bincount(gold[gold >= 0], minlength=labels) > 0
    return np.where(gold >= 0, gold, np.where(has_gold[label], -1, label))


def _best_centres(
    vectors: _Vectors, before: _Labels, gold: _Labels, labels: int, seed: int
) -> _Centres:
    """Centres of length 1; labels that no row has `before` are drawn, and the best draw is kept."""
    drawn = labels - len(np.unique(before[before >= 0]))
    if (free := int((gold < 0).sum())) < drawn:
        raise ValueError(
            f"discover: {drawn} labels are to be found in {free} rows; give more rows, or room for "
            "fewer new labels"
        )
    best, most = np.zeros((labels, vectors.shape[1])), -np.inf
    for start in range(_STARTS if drawn else 1):
        centres = _drawn(vectors, before, gold, labels, np.random.default_rng([seed, start]))
        centres, nearness = _settled(vectors, centres, gold)
        if nearness > most:
            best, most = centres, nearness
    return best


def _drawn(
    vectors: _Vectors, before: _Labels, gold: _Labels, labels: int, rng: np.random.Generator
) -> _Centres:
    """Means of the rows of each label; for labels without, rows far from all centres so far."""
    centres = _means(vectors, before, np.zeros((labels, vectors.shape[1])))
    has = np.bincount(before[before >= 0], minlength=labels) > 0
    nearest = (vectors @ centres[has].T).max(axis=1, initial=-1.0)
    for label in np.flatnonzero(~has):
        # |a - b|^2 = 2 - 2 cosine; rows with gold are no candidates
        weights = np.where(gold < 0, np.maximum(1.0 - nearest, 1e-12), 0.0)
        centres[label] = vectors[rng.choice(len(vectors), p=weights / weights.sum())]
        nearest = np.maximum(nearest, vectors @ centres[label])
    return centres


def _settled(vectors: _Vectors, centres: _Centres, gold: _Labels) -> tuple[_Centres, float]:
    """Spherical k-means with the rows of gold in place; and the sum of cosines with own centres."""
    found = np.full(len(vectors), -1)
    for _ in range(_MOST_STEPS):
        cosines = vectors @ centres.T
        last, found = found, np.where(gold >= 0, gold, cosines.argmax(axis=1))
        if (found == last).all():
            break
        centres = _means(vectors, found, centres)
    return centres, float(np.take_along_axis(vectors @ centres.T, found[:, None], axis=1).sum())


def _means(vectors: _Vectors, found: _Labels, centres: _Centres) -> _Centres:
    """The direction of each label's rows; a label without rows stays where it is."""
    sums = np.zeros_like(centres)
    np.add.at(sums, found[found >= 0], vectors[found >= 0])
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 1e-9, sums / np.maximum(lengths, 1e-9), centres)


def _contingency(clusters: _Labels, true: _Labels, labels: int) -> Int[np.ndarray, "labels labels"]:
    both = (clusters >= 0) & (true >= 0)
    cells = clusters[both] * labels + true[both]
    return np.bincount(cells, minlength=labels * labels).reshape(labels, labels)


def _reason(probs: Float[np.ndarray, " labels"], labels: LabelSpace) -> str:
    second, first = np.argsort(probs, kind="stable")[-2:].tolist()
    return (
        f"nearest to {labels.names[first]!r}, then {labels.names[second]!r}; "
        f"margin {probs[first] - probs[second]:.3f}"
    )


def _check(
    labels: LabelSpace,
    gold: _Labels,
    *,
    known: int,
    queries: int,
    round: int,
    temperature: float,
) -> None:
    if labels.multilabel or not labels.is_flat:
        raise ValueError(
            "discover needs a flat, single-label space; take the leaves of a hierarchy"
        )
    if not 0 <= known < len(labels):
        raise ValueError(
            f"known must be below the {len(labels)} labels there are; got {known} (with_new_labels "
            "makes room for new ones)"
        )
    if queries < 0 or round < 1:
        raise ValueError(f"queries={queries} and round={round} must be at least 0 and 1")
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be above 0 and finite; got {temperature}")
    if len(gold) < len(labels):
        raise ValueError(
            f"discover: {len(gold)} rows have a text, fewer than the {len(labels)} labels"
        )
    missing = np.flatnonzero(np.bincount(gold[gold >= 0], minlength=len(labels))[:known] == 0)
    if missing.size:
        raise ValueError(
            f"{missing.size} of {known} known labels have no row with gold, the first is "
            f"{labels.ids[missing[0]]!r}; give each at least one"
        )
