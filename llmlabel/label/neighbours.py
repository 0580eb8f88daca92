"""Soft labels from labelled texts that lie near: a memory of vectors, read by similarity.

All functions read the column `vector` (see `llmlabel.label.embedding.embed`) and learn nothing but
means. A row is never its own neighbour: what a pool holds with the id or the words of a row does not
count for it. A row without a vector gets no label and an `error`.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.label.embedding import label_vectors, readable_vectors
from llmlabel.label.memory import (
    Answers,
    apart,
    check_unknown,
    check_width,
    directions,
    gram,
    label_by_memory,
    normalised,
    read_pool,
    refuse_multilabel,
    vote,
    with_labels,
)
from llmlabel.label.nearest import CHUNK, Own, Search, evenly, finder, search_name
from llmlabel.labelspace import LabelSpace

Centring = Literal["none", "cache", "all"]

_CENTRED = 10_000
"""Pool rows over which a label's mean in the cache is taken; more make it hardly better."""


def label_neighbours(  # noqa: PLR0913  # what votes, how, how it is found, and where to keep it
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    k: int = 10,
    scale: float = 1 / 0.07,
    unknown: float = 0.0,
    answers: Answers = "gold",
    search: Search = "exact",
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the mean label of each row's `k` nearest pool rows, weighted by exp(`scale` x cosine).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv
    1805.01978), section 3.4, with its temperature 0.07. In a multi-label space the mean is that of
    each label alone. A pool row that is none of the labels leaves its share missing.

    Differs from the paper: k is 10, not 200, for pools of few rows a label; `unknown`.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: labelled rows with the same columns, and an answer.
        labels: the label space of both.
        k: neighbours that vote; all rows of a smaller pool.
        scale: sharpness; the inverse of a temperature in cosine units.
        unknown: share of each distribution left missing, for labels that no neighbour has; choose
            it on validation rows, for 0 says that they are impossible. Single-label only.
        answers: `gold` of the pool, or its soft labels.
        search: "exact" compares every row with every pool row, in blocks. "usearch" builds an
            index (HNSW) for pools of a million rows; it can miss a neighbour, and so can an index
            of faiss or usearch of your own, which knows the pool's rows by their position.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: an argument is out of bounds, or no pool row has an answer.
    """
    check_unknown(unknown, labels)
    memory = read_pool(pool, labels, answers=answers)
    find = finder(memory.vectors, k=k, search=search, rows=memory.rows)

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        found, cosines = find(vectors, own)
        weights = normalised(scale * cosines)
        return (1 - unknown) * vote(found, weights, memory.targets)

    choice = ["neighbours", k, scale, unknown, search_name(search)]
    return label_by_memory(
        dataset, memory, read, labels, choice=choice, block_rows=block_rows, output=output
    )


def label_prototypes(
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    scale: float = 10.0,
    answers: Answers = "gold",
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds softmax(`scale` x cosine) of each row and the mean vector of each label's pool rows.

    Prototypes of Snell et al. (arXiv 1703.05175, equations 1 and 2), soft labels of PS-TTL (arXiv
    2408.05674). A soft pool row counts for each label by its probability.

    Differs from the papers: cosines instead of squared distances (as PS-TTL); a label without a
    pool row is not stored, where PS-TTL gives it the cosine 0; what a row itself has added to the
    means is taken out for that row.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: labelled rows with the same columns, and an answer.
        labels: the label space of both, single-label.
        scale: sharpness; 10 is PS-TTL's.
        answers: `gold` of the pool, or its soft labels.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    refuse_multilabel(labels, "label_prototypes")
    memory = read_pool(pool, labels, answers=answers)
    sums, mass = memory.sums(), np.asarray(memory.targets.sum(axis=0))
    means = directions(sums)

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        cosines = np.where(mass > 0, vectors @ means.T, -np.inf)
        for row, entries in enumerate(own):
            if entries:  # the means without it, which differ for its own labels alone
                mine = memory.targets[list(entries)]
                touched = np.unique(mine.indices)
                part = mine[:, touched]
                rest = sums[touched] - part.T @ memory.vectors[list(entries)]
                left = mass[touched] - np.asarray(part.sum(axis=0)) > 1e-6
                cosines[row, touched] = np.where(left, directions(rest) @ vectors[row], -np.inf)
        return csr_array(normalised(scale * cosines))

    choice = ["prototypes", scale]
    return label_by_memory(
        dataset, memory, read, labels, choice=choice, block_rows=block_rows, output=output
    )


def label_test_time(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    labels: LabelSpace,
    *,
    scale: float = 10.0,
    cuts: tuple[float, float] = (0.2, 0.5),
    queue: int = 128,
    momentum: float = 0.5,
    step_rows: int = 16,
    seed: int = 0,
) -> Dataset:
    """Adds soft labels of prototypes that follow the rows as these stream by.

    PS-TTL (arXiv 2408.05674, its code at commit bd71819977): each label has a queue of vectors,
    first in, first out, that begins with its pool rows; after each step prototype <- `momentum` x
    prototype + (1 - `momentum`) x mean of the queue, and a row's soft label is softmax(`scale` x
    cosine). By its largest probability a row is ignored, in doubt, or trusted.

    A row's label depends on which others there are, though not on how they are sorted: they stream
    by in an order drawn from `seed` and the ids. Conformal calibration does not hold there. On CLINC150
    with 5 rows an intent it was no better than `label_prototypes` (benchmarks/results/embedding.md).

    Differs from the paper: there is no network to train and no teacher that follows it, so a row
    acts through the queue of its most probable label, a trusted row with weight 1, one in doubt
    with its probability; the bands are quantiles of the confidence at the beginning, because the
    constants 0.9 and 0.5 are never reached on text; a row is labelled before it moves a prototype,
    so that it is no evidence for itself.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: few labelled rows with the same columns, and gold. Those with the id or words of a row
            of `dataset` are left out.
        labels: the label space of both, single-label.
        scale: sharpness; 10 is the paper's.
        cuts: shares of the rows below the band of doubt, and below that of trust.
        queue: length of each label's queue.
        momentum: of the prototypes.
        step_rows: rows labelled between two updates; 1 in the paper.
        seed: of the order.
    """
    refuse_multilabel(labels, "label_test_time")
    if not 0 <= cuts[0] <= cuts[1] <= 1:
        raise ValueError(f"cuts must be two rising shares from 0 to 1; got {cuts}")
    if queue < 1 or step_rows < 1 or not 0 <= momentum <= 1:
        got = f"{queue}, {step_rows}, {momentum}"
        raise ValueError(f"queue and step_rows must be at least 1, momentum from 0 to 1; got {got}")
    memory = apart(read_pool(pool, labels, answers="gold"), dataset)
    taught = memory.targets.tocoo()  # a row of none of the labels teaches nothing
    vectors, rows = readable_vectors(dataset)
    if not len(rows):
        raise ValueError("no row has a vector; embed the rows")
    check_width(vectors, memory.vectors)
    ids = dataset["id"][:]
    order = np.argsort([_draw(ids[row], seed) for row in rows.tolist()], kind="stable")
    probs = np.zeros((len(dataset), len(labels)))
    probs[rows[order]] = test_time_probs(
        vectors[order],
        memory.vectors[taught.row],
        taught.col,
        labels=len(labels),
        scale=scale,
        cuts=cuts,
        queue=queue,
        momentum=momentum,
        step_rows=step_rows,
    )
    choice = ["test_time", scale, cuts, queue, momentum, step_rows, seed]
    name = f"test_time@{memory.digest(choice)}"
    return with_labels(dataset, csr_array(probs), rows, labels, name)


def test_time_probs(  # noqa: PLR0913  # one plain choice each
    vectors: Float[np.ndarray, "rows width"],
    few: Float[np.ndarray, "pool width"],
    classes: Int[np.ndarray, " pool"],
    *,
    labels: int,
    scale: float,
    cuts: tuple[float, float],
    queue: int,
    momentum: float,
    step_rows: int,
) -> Float[np.ndarray, "rows labels"]:
    """The soft labels of `label_test_time`, of rows in the order in which they stream by."""
    members = [[(v, 1.0) for v in few[classes == c][-queue:]] for c in range(labels)]
    prototypes = np.array([_mean(some, few.shape[1]) for some in members])
    known = np.array([bool(some) for some in members])

    def label(some: Float[np.ndarray, "some width"]) -> Float[np.ndarray, "some labels"]:
        cosines = some @ directions(prototypes).T
        return normalised(scale * np.where(known, cosines, -np.inf))

    start = np.concatenate([label(vectors[i : i + CHUNK]) for i in range(0, len(vectors), CHUNK)])
    low, high = np.quantile(start.max(axis=1), cuts)
    probs = np.zeros((len(vectors), labels))
    means = prototypes.copy()
    for i in range(0, len(vectors), step_rows):
        step = slice(i, i + step_rows)
        probs[step] = label(vectors[step])
        confidence = probs[step].max(axis=1)
        best = probs[step].argmax(axis=1)
        for vector, c, sure in zip(vectors[step], best, confidence, strict=True):
            if sure > low:
                members[c] = [*members[c], (vector, 1.0 if sure > high else float(sure))][-queue:]
        for c in np.unique(best[confidence > low]):
            means[c] = _mean(members[c], few.shape[1])
        prototypes = momentum * prototypes + (1 - momentum) * means
    return probs


def _mean(members: list[tuple[np.ndarray, float]], width: int) -> Float[np.ndarray, " width"]:
    if not members:
        return np.zeros(width)
    vectors, weights = zip(*members, strict=True)
    return np.average(np.array(vectors, dtype=np.float64), axis=0, weights=np.array(weights))


def _draw(id: object, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest()


def label_cache(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    anchors: Dataset,
    labels: LabelSpace,
    *,
    shots: int = 16,
    alpha: float = 0.6,
    beta: float = 1.0,
    ratio: float = 1.17,
    centring: Centring = "all",
    scale: float = 20.0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds soft labels of label names and of unlabelled texts that resemble them (ComCa).

    ComCa (arXiv 2503.19145, its code at commit 0a4d5e40), the cache of Tip-Adapter with soft
    values: keys K are `shots` pool texts a label, values V = `alpha` K T' + (1 - `alpha`) onehot,
    each row brought to the mean and deviation of the zero-shot scores; scores x T' + `ratio`
    exp(-`beta` (1 - x K')) V; softmax.

    ComCa is scored per label, where an offset of a label does no harm; for the most probable label
    it is fatal (accuracy 51.7 to 9.2 % on Debian sections). So each label's mean over the pool is
    taken from its scores (`centring`), or take `alpha` 0.

    Differs from the paper: no queries composed with objects, no retrieval from captions: the pool
    text belongs to the label whose centred cosine is highest, and each label keeps its highest; the
    mean and deviation are those of the pool's cosines, not the constants of a CLIP; the sum is
    times 16 / `shots`, so that `ratio` means the same for all; `scale` instead of a division by the
    largest score, which flips signs below 0.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: unlabelled rows with the same columns; those of `dataset` may be among them, but are
            no exemplar for themselves.
        anchors: the labels' vectors, see `llmlabel.label.embedding.embed_labels`.
        labels: the label space, single-label.
        shots: exemplars of a label; fewer where fewer pool texts belong to it.
        alpha: share of the soft values.
        beta: sharpness of the affinity.
        ratio: weight of the cache beside the label names.
        centring: subtract each label's mean over the pool from its cache score, from all, or not.
        scale: sharpness of the softmax.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    refuse_multilabel(labels, "label_cache")
    if shots < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"shots must be at least 1, alpha from 0 to 1; got {shots}, {alpha}")
    memory, names = read_pool(pool, labels, answers=None), label_vectors(anchors, labels)
    check_width(memory.vectors, names)
    kept, belongs = exemplars(memory.vectors, names, shots=shots)
    place = {entry: i for i, entry in enumerate(kept.tolist())}
    keys = memory.vectors[kept].astype(np.float64)
    onehot = csr_array(
        (np.ones(len(kept)), (np.arange(len(kept)), belongs)), (len(kept), len(labels))
    )
    factors = _row_factors(keys, belongs, names, memory.vectors, alpha=alpha)
    weight = ratio * 16 / shots

    def cache(
        vectors: Float[np.ndarray, "rows width"], own: Own
    ) -> Float[np.ndarray, "rows labels"]:
        affinity = np.exp(-beta * (1 - vectors @ keys.T))
        for row, entries in enumerate(own):
            affinity[row, [place[entry] for entry in entries if entry in place]] = 0
        affinity *= factors
        # V itself, keys x labels, is never there: its rows are affine in K T' and the label
        return weight * (alpha * (affinity @ keys) @ names.T + (1 - alpha) * (affinity @ onehot))

    means = np.zeros(len(labels))
    if centring != "none":
        taken = evenly(len(memory.ids), _CENTRED)
        for some in np.array_split(taken, -(-len(taken) // CHUNK)):
            own = [[entry] for entry in some.tolist()]
            means += cache(memory.vectors[some], own).sum(axis=0) / len(taken)
    if centring == "all":
        means += memory.vectors.mean(axis=0, dtype=np.float64) @ names.T

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        scores = vectors @ names.T + cache(vectors, own)
        return csr_array(normalised(scale * (scores - means)))

    digest = [shots, alpha, beta, ratio, centring, scale, names.round(6).tolist()]
    return label_by_memory(
        dataset,
        memory,
        read,
        labels,
        choice=["cache", *digest],
        block_rows=block_rows,
        output=output,
    )


def exemplars(
    vectors: Float[np.ndarray, "pool width"],
    names: Float[np.ndarray, "labels width"],
    *,
    shots: int,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " kept"]]:
    """Pool rows that stand for a label, and that label; see `label_cache`."""
    means = vectors.mean(axis=0, dtype=np.float64) @ names.T
    best, score = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors))
    for i in range(0, len(vectors), CHUNK):
        centred = (vectors[i : i + CHUNK] @ names.T - means).round(6)
        best[i : i + CHUNK], score[i : i + CHUNK] = centred.argmax(axis=1), centred.max(axis=1)
    order = np.lexsort((np.arange(len(vectors)), -score, best))
    starts = np.searchsorted(best[order], best[order], side="left")
    kept = order[np.arange(len(order)) - starts < shots]
    return kept, best[kept]


def _row_factors(
    keys: Float[np.ndarray, "keys width"],
    belongs: Int[np.ndarray, " keys"],
    names: Float[np.ndarray, "labels width"],
    vectors: Float[np.ndarray, "pool width"],
    *,
    alpha: float,
) -> Float[np.ndarray, " keys"]:
    """What brings each row of values to the deviation of the pool's zero-shot scores."""
    count = len(vectors) * len(names)
    mean = vectors.mean(axis=0, dtype=np.float64) @ names.mean(axis=0)
    deviation = np.sqrt(np.sum((names @ gram(vectors)) * names) / count - mean**2)
    factors = np.ones(len(keys))
    for i in range(0, len(keys), CHUNK):
        values = alpha * keys[i : i + CHUNK] @ names.T
        values[np.arange(len(values)), belongs[i : i + CHUNK]] += 1 - alpha
        factors[i : i + CHUNK] = deviation / np.maximum(values.std(axis=1), 1e-12)
    return factors
