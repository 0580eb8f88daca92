"""Labels without a single example: what their texts and their place in a graph say about them.

Zero-shot learning with knowledge graphs (survey: arXiv 2112.10006): labels with examples, the seen
ones, teach how a label's text lies to its rows, and that is carried over to the unseen ones. Both
kinds may be answered (the generalized setting), so unseen labels need a head start (`seen_bias`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, diags_array, eye_array

from llmlabel.data import gold_index
from llmlabel.label.embedding import label_vectors, readable_vectors
from llmlabel.label.memory import (
    Memory,
    apart,
    check_width,
    directions,
    gram,
    label_by_memory,
    normalised,
    read_pool,
    refuse_multilabel,
)
from llmlabel.label.nearest import Own
from llmlabel.labelspace import LabelSpace

Method = Literal["mapping", "propagation"]
Edges = Sequence[tuple[str, str]]

BIASES = tuple(float(bias) for bias in np.arange(-10, 31) / 50)
"""What `bias_curve` tries."""


def label_zero_shot(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    pool: Dataset,
    anchors: Dataset,
    labels: LabelSpace,
    *,
    method: Method = "propagation",
    seen_bias: float = 0.0,
    edges: Edges | None = None,
    hops: int = 2,
    ridge: float = 0.1,
    class_ridge: float = 1.0,
    scale: float = 20.0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds soft labels over all labels of a pool that has rows of some of them only.

    - `mapping`: `eszsl`, from the vector of a text to that of its label.
    - `propagation`: `propagate`, from the names of the labels and their neighbours to prototypes.

    Scores become softmax(`scale` x (score - `seen_bias` of a seen label)): calibrated stacking
    (Chao et al., arXiv 1605.04253, equation 2), without which unseen labels are hardly answered. In
    a hierarchy the leaves and the labels of the pool can be answered.

    On CLINC150 with 30 of 150 intents unseen (benchmarks/results/embedding.md) label names alone
    reach a harmonic accuracy of 68.9 %, `propagation` with the defaults 74.4 %. It takes a `seen_bias`
    and a `ridge` from `bias_curve`, on other gold rows of seen intents, to reach 84.8 % with
    `propagation` and 74.7 % with `mapping`; then the prototypes of seen labels beside the bare names
    of unseen ones (a huge `ridge`) reach 82.4 % already, `propagation` without the graph 84.3 % and
    with a shuffled one 84.0 %, so the graph itself brings very little.

    Args:
        dataset: rows with `id`, `text` and `vector`.
        pool: rows with the same columns and gold; those with the id or words of a row of `dataset`
            are left out.
        anchors: the labels' vectors, see `llmlabel.label.embedding.embed_labels`. Their texts must
            not come from the rows to label.
        labels: the label space, single-label.
        method: see above.
        seen_bias: see above; `choose_seen_bias` of a `bias_curve` finds it without rows of unseen labels.
        edges: pairs of ids or names of labels that are neighbours; by default parents and children.
        hops: steps of `propagation` along edges; 0 leaves the graph out.
        ridge: how little the map is trusted: lambda of `propagate`, gamma of `eszsl`.
        class_ridge: lambda of `eszsl`.
        scale: sharpness of the softmax.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.
    """
    memory = apart(_pool(pool, labels, "label_zero_shot"), dataset)
    names = label_vectors(anchors, labels)
    graph = label_graph(labels, edges) if method == "propagation" and hops else None
    weights = class_weights(
        memory, names, graph=graph, method=method, hops=hops, ridge=ridge, class_ridge=class_ridge
    )
    seen = _seen(memory)
    penalty = np.where(seen, seen_bias, 0.0)
    penalty[~(seen | _leaves(labels))] = np.inf

    def read(vectors: Float[np.ndarray, "rows width"], own: Own) -> csr_array:
        return csr_array(normalised(scale * (vectors @ weights.T - penalty)))

    digest = [method, seen_bias, scale, weights.round(6).tolist()]
    return label_by_memory(
        dataset,
        memory,
        read,
        labels,
        choice=["zero_shot", *digest],
        block_rows=block_rows,
        output=output,
    )


def choose_seen_bias(curve: Mapping[float, float]) -> float:
    """The `seen_bias` at the peak of a `bias_curve`; of equal ones the lowest."""
    return min(curve, key=lambda bias: (-round(curve[bias], 9), bias))


def bias_curve(  # noqa: PLR0913  # as for label_zero_shot
    pool: Dataset,
    validation: Dataset,
    anchors: Dataset,
    labels: LabelSpace,
    *,
    method: Method = "propagation",
    edges: Edges | None = None,
    hops: int = 2,
    ridge: float = 0.1,
    class_ridge: float = 1.0,
    folds: int = 5,
    seed: int = 0,
) -> dict[float, float]:
    """`seen_bias` -> mean `harmonic` over folds of seen labels that play unseen ones.

    The labels of the pool are dealt to `folds`; those of a fold lose their pool rows, and only
    labels of the pool can be answered. Its peak also tells which `ridge` or `hops` to take.

    Args:
        pool: as for `label_zero_shot`.
        validation: other rows with `vector` and gold; rows of unseen labels are not looked at.
        anchors: as there.
        labels: as there.
        method: as there.
        edges: as there.
        hops: as there.
        ridge: as there.
        class_ridge: as there.
        folds: shares of the labels; 1 / folds of them should be the share that is unseen.
        seed: of the deal.
    """
    memory = apart(_pool(pool, labels, "bias_curve"), validation)
    names = label_vectors(anchors, labels)
    graph = label_graph(labels, edges) if method == "propagation" and hops else None
    taught = np.flatnonzero(_seen(memory))
    if not 2 <= folds <= len(taught):
        raise ValueError(
            f"folds must be from 2 to {len(taught)}, the labels of the pool; got {folds}"
        )
    vectors, rows = readable_vectors(validation)
    gold = gold_index(validation, labels)[rows]
    usable = np.isin(gold, taught)
    if not usable.any():
        raise ValueError("no row of validation has a label of the pool; give rows that do")
    vectors, truth = vectors[usable], np.searchsorted(taught, gold[usable])
    values = np.zeros(len(BIASES))
    for hidden in np.array_split(np.random.default_rng(seed).permutation(taught), folds):
        kept = ~np.isin(memory.targets.indices, hidden)  # one label a row
        part = memory.take(np.flatnonzero(kept))
        weights = class_weights(
            part, names, graph=graph, method=method, hops=hops, ridge=ridge, class_ridge=class_ridge
        )
        scores, seen = vectors @ weights[taught].T, ~np.isin(taught, hidden)
        values += [harmonic((scores - bias * seen).argmax(axis=1), truth, seen) for bias in BIASES]
    return dict(zip(BIASES, (values / folds).tolist(), strict=True))


def harmonic(
    predicted: Int[np.ndarray, " rows"],
    gold: Int[np.ndarray, " rows"],
    seen: Bool[np.ndarray, " labels"],
) -> float:
    """H = 2 S U / (S + U), S and U the accuracies on rows of seen and unseen labels.

    Per row, not per label. 0 where one kind has no rows.
    """
    right, known = predicted == gold, seen[gold]
    if known.all() or not known.any():
        return 0.0
    s, u = right[known].mean(), right[~known].mean()
    return float(2 * s * u / (s + u)) if s + u else 0.0


def class_weights(
    memory: Memory,
    names: Float[np.ndarray, "labels width"],
    *,
    graph: csr_array | None,
    method: Method,
    hops: int,
    ridge: float,
    class_ridge: float,
) -> Float[np.ndarray, "labels width"]:
    """What the vector of a text is multiplied with to give the score of each label."""
    check_width(memory.vectors, names)
    if min(ridge, class_ridge) <= 0 or hops < 0:
        raise ValueError(
            f"ridge and class_ridge must be above 0, hops at least 0; got {ridge}, {class_ridge}, "
            f"{hops}"
        )
    seen = _seen(memory)
    sums = memory.sums()
    if method == "mapping":
        learned = eszsl(
            gram(memory.vectors), sums[seen].T, names[seen], gamma=ridge, lam=class_ridge
        )
        return names @ learned.T
    features = names
    for _ in range(hops if graph is not None else 0):
        assert graph is not None  # for mypy
        features = gcn_layer(graph, features)
    return propagate(features, names, directions(sums), seen, ridge=ridge)


# --------------------------------------------------------------------------------- the two methods


def eszsl(
    features: Float[np.ndarray, "width width"],
    sums: Float[np.ndarray, "width seen"],
    semantics: Float[np.ndarray, "seen attributes"],
    *,
    gamma: float,
    lam: float,
) -> Float[np.ndarray, "width attributes"]:
    """W = (X'X + gamma I)^-1 X'Y S (S'S + lambda I)^-1, so that the scores are x W s'.

    Romera-Paredes and Torr, "An embarrassingly simple approach to zero-shot learning" (ICML 2015),
    equation 5: the minimum of ||X W S' - Y||^2 + gamma ||W S'||^2 + lambda ||X W||^2 + gamma lambda
    ||W||^2 (their section 3.2).

    Differs from the paper: targets Y are 1 and 0, not 1 and -1: of 120 labels -1 pushes all scores
    to one side, and unseen labels below all seen ones.

    Args:
        features: X'X, of the rows X of the seen labels.
        sums: X'Y.
        semantics: S, a row a seen label.
        gamma: of the features.
        lam: of the labels.
    """
    left = np.linalg.solve(features + gamma * np.eye(len(features)), sums @ semantics)
    right = semantics.T @ semantics + lam * np.eye(semantics.shape[1])
    return np.linalg.solve(right, left.T).T


def propagate(
    features: Float[np.ndarray, "labels attributes"],
    names: Float[np.ndarray, "labels width"],
    prototypes: Float[np.ndarray, "labels width"],
    seen: Bool[np.ndarray, " labels"],
    *,
    ridge: float,
) -> Float[np.ndarray, "labels width"]:
    """Prototypes of length 1: those of the seen labels, and for the others predicted ones.

    A prediction is the label's name plus F B, B the ridge regression of (prototype - name) on the
    features F of the seen labels: GCNZ (Wang et al., arXiv 1803.08035, equation 3) in closed form.

    Differs from the paper: the layers have no weights of their own and no ReLU (SGC, arXiv
    1902.07153, equation 8), so that nothing is trained; the targets are class means, not the
    weights of a network; what is predicted is the step from the name.
    """
    known = features[seen]
    dual = np.linalg.solve(
        known @ known.T + ridge * np.eye(len(known)), prototypes[seen] - names[seen]
    )
    predicted = directions(names + features @ (known.T @ dual))
    return np.where(seen[:, None], prototypes, predicted)


def gcn_layer(
    graph: csr_array,
    features: Float[np.ndarray, "labels attributes"],
    weights: Float[np.ndarray, "attributes outputs"] | None = None,
) -> Float[np.ndarray, "labels outputs"]:
    """D^-1/2 (A + I) D^-1/2 X W, without the activation; W is the identity when left out.

    Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks" (arXiv
    1609.02907), equation 2.
    """
    loops = csr_array(graph + eye_array(graph.shape[0]))
    root = diags_array(1 / np.sqrt(np.asarray(loops.sum(axis=1)).ravel()))
    mixed: np.ndarray = root @ loops @ root @ features
    return mixed if weights is None else mixed @ weights


def label_graph(labels: LabelSpace, edges: Edges | None = None) -> csr_array:
    """Adjacency of the labels, symmetric: the given pairs, or parents and children.

    Raises:
        ValueError: there is no edge, a label is not known, or is a neighbour of itself.
    """
    if edges is None:
        pairs = [(c, p) for c, above in enumerate(labels.parent_positions) for p in above]
    else:
        pairs = [(labels.index(one), labels.index(other)) for one, other in edges]
    if not pairs:
        raise ValueError(
            "the labels have no parents, so no graph; give edges=, or hops=0 to use names alone"
        )
    if (loop := next((a for a, b in pairs if a == b), None)) is not None:
        raise ValueError(f"an edge joins {labels.ids[loop]!r} with itself; remove it")
    rows, columns = np.array([*pairs, *((b, a) for a, b in pairs)]).T
    graph = csr_array((np.ones(len(rows)), (rows, columns)), (len(labels), len(labels)))
    graph.sum_duplicates()
    graph.data[:] = 1.0  # an edge given twice is one
    return graph


# ------------------------------------------------------------------------------------------- parts


def _pool(pool: Dataset, labels: LabelSpace, method: str) -> Memory:
    refuse_multilabel(labels, method)
    memory = read_pool(pool, labels, answers="gold")
    taught = memory.targets.tocoo().row
    return memory.take(taught)


def _seen(memory: Memory) -> Bool[np.ndarray, " labels"]:
    return np.bincount(memory.targets.indices, minlength=memory.targets.shape[1]) > 0


def _leaves(labels: LabelSpace) -> Bool[np.ndarray, " labels"]:
    return np.isin(np.arange(len(labels)), labels.leaves)
