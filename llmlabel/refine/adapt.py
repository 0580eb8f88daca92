"""Soft labels adapted to how far they can be trusted: bands, weights, gold, labels that are missing."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from llmlabel.data import gold_index, gold_matrix, label_csr, rows_of, with_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_weights
from llmlabel.softlabels import SoftLabels

Action = Literal["keep", "soften", "replace", "drop"]
Statistic = Literal["gold", "max"]


def adapt_bands(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    statistic: Statistic,
    cuts: tuple[float, ...] = (0.02, 0.5, 0.99),
    actions: tuple[Action, ...] = ("drop", "soften", "keep", "drop"),
    smoothing: float = 0.1,
    replacement: Dataset | None = None,
) -> Dataset:
    """Trusts, softens, replaces or drops each row's soft label, by the band that its probability is in.

    Shen, FerKD (arXiv 2312.17473): below the first and above the last cut a row says little and is
    dropped, between the first two its hard label is safer, else the teacher's soft label. Adds
    `band`, what was done with the row. A dropped row keeps its label and gets `weight` 0.

    For weak teachers only, and then the plain mean with gold (`mix_gold`) is as good. On word spans
    of 16 Debian sections a teacher that was right on 38 % of the rows gave students of 52.5 %, with
    bands 62.1 % (gold) or 62.6 % (max), with the mean of gold and soft label 63.2 %; one that was
    right on 67 % gave 68.7 % alone, and with bands 62.4 or 65.1 % (benchmarks/selection.py). Choose
    the cuts on validation rows. Dropping what is easy changes the mix of labels.

    Differs from the paper: the cuts, the smoothing and the statistic, which it leaves open, are
    arguments; a row can be replaced too, the third way of PS-TTL (arXiv 2408.05674).

    Args:
        dataset: rows with soft labels; `gold` is read where it is there, so only of training rows.
        labels: their label space, single-label.
        statistic: the probability of the gold label, or the largest one. By "gold", a row whose
            gold label nobody knows keeps its soft label.
        cuts: rising bounds between bands. A value on a cut belongs to the band above it, or to the
            one below when only the band above is dropped.
        actions: one a band, from low to high. "soften" puts 1 - `smoothing` on the hard label and
            the rest evenly on the others; the hard label is gold, or where there is none the most
            probable label. "replace" takes the label that `replacement` has for the row; where it has
            none, the row keeps its own.
        smoothing: of softened rows.
        replacement: rows with the same ids and other soft labels.

    Raises:
        ValueError: an argument does not fit the others, or a row is not in `replacement`, or twice.
    """
    _check_bands(labels, cuts, actions, smoothing)
    if ("replace" in actions) != (replacement is not None):
        raise ValueError("replacement= and the action 'replace' need each other; give both or none")
    soft = SoftLabels.from_dataset(dataset, labels)
    probs = soft.dense()
    gold = np.full(len(dataset), -1)
    if statistic == "gold" or "gold" in dataset.column_names:
        gold = gold_index(dataset, labels)
    labelled = probs.sum(axis=1) > 0
    judged = labelled & (gold >= 0) if statistic == "gold" else labelled
    rows = np.arange(len(dataset))
    value = probs[rows, gold] if statistic == "gold" else probs.max(axis=1)
    band = np.array(actions)[bands(value, cuts=cuts, actions=actions)]
    band[~judged] = "keep"
    hard = np.where(gold >= 0, gold, probs.argmax(axis=1))
    others = smoothing / (len(labels) - 1)
    softened = others + (1 - smoothing - others) * np.eye(len(labels))[hard]
    probs = np.where((band == "soften")[:, None], softened, probs)
    if replacement is not None:
        same = rows_of(dataset, replacement, "replacement")
        other = SoftLabels.from_dataset(same, labels).dense()
        band[(band == "replace") & ~other.any(axis=1)] = "keep"
        probs = np.where((band == "replace")[:, None], other, probs)
    weights = np.where(band == "drop", 0, row_weights(dataset)).astype(np.float32)
    done = [
        action if known else None for action, known in zip(band.tolist(), labelled, strict=True)
    ]
    columns = {"weight": (weights, Value("float32")), "band": (done, Value("string"))}
    return with_columns(SoftLabels.from_dense(probs, labels).add_to(dataset), columns)


def bands(
    values: Float[np.ndarray, " rows"], *, cuts: Sequence[float], actions: Sequence[Action]
) -> Int[np.ndarray, " rows"]:
    """The band of each value, 0 below the first cut; see `adapt_bands` for values on a cut.

    Values and cuts are compared as float32, as which probabilities are kept.
    """
    values, bounds = values.astype(np.float32), np.array(cuts, dtype=np.float32)
    above = np.searchsorted(bounds, values, side="right")
    below = np.searchsorted(bounds, values, side="left")
    dropped = np.array([action == "drop" for action in actions])
    return np.where(dropped[above] & ~dropped[below], below, above)


def confidence_weights(dataset: Dataset, labels: LabelSpace, *, power: float = 2.0) -> Dataset:
    """Multiplies each row's `weight` by its largest probability to the `power`.

    Abid et al. (arXiv 2508.18799) square the confidence of pseudo-labels. It helps hard labels
    (65.1 to 65.8 % on 16 Debian sections); for soft labels, which say the same themselves, it does
    nothing (65.3 to 65.0 %). A row without a soft label gets 0. Probabilities should be calibrated
    first.

    Raises:
        ValueError: in a multi-label space, or for a negative power.
    """
    if labels.multilabel:
        raise ValueError("confidence_weights needs labels that exclude each other (single-label)")
    if not 0 <= power < np.inf:
        raise ValueError(f"power must be at least 0; got {power}")
    confidence = SoftLabels.from_dataset(dataset, labels).dense().max(axis=1)
    weights = np.where(confidence > 0, np.minimum(confidence, 1.0) ** power, 0.0)
    weights = (row_weights(dataset) * weights).astype(np.float32)
    return with_columns(dataset, {"weight": (weights, Value("float32"))})


def gold_labels(dataset: Dataset, labels: LabelSpace) -> Dataset:
    """Gold as the soft label, for a student of gold; none where nobody knows it.

    Several gold labels of a row share its probability evenly where labels exclude each other.

    Raises:
        ValueError: gold of a row is unknown in a multi-label space, where no label means "none".
    """
    found = label_csr(dataset, labels)
    if labels.multilabel:
        refuse_unknown_gold(dataset)
    else:
        found.data /= np.repeat(found.sum(axis=1), np.diff(found.indptr))
    rows = SoftLabels(found, labels.fingerprint, labels.multilabel).add_to(dataset)
    if not labels.multilabel or "error" in dataset.column_names:
        return rows
    # An empty label without an error says that no label is true.
    return with_columns(rows, {"error": ([None] * len(rows), Value("string"))})


def refuse_unknown_gold(dataset: Dataset) -> None:
    """Raises a ValueError that names a row whose gold nobody knows."""
    for row, ids in enumerate(dataset["gold"][:]):
        if ids is None:
            raise ValueError(
                f"gold of the row with id {dataset[row].get('id')!r} is unknown; take such rows out, as "
                "without a label they would say that they have none"
            )


def mix_gold(dataset: Dataset, labels: LabelSpace, *, kd_weight: float) -> Dataset:
    """(1 - `kd_weight`) gold + `kd_weight` soft label, as the soft label of each training row.

    Cross-entropy with it is the loss (1 - a) CE(gold) + a KD at temperature 1 of "Distilling the
    Knowledge in Data Pruning" (arXiv 2403.07854) and of plain distillation. Where only one of the
    two is known, that one is taken.

    Args:
        dataset: rows to train on, with soft labels and `gold`.
        labels: their label space.
        kd_weight: from 0, gold alone, to 1; `llmlabel.select.prune.kd_weight` ties it to the share
            of rows that are kept.
    """
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must be from 0 to 1; got {kd_weight}")
    soft = SoftLabels.from_dataset(dataset, labels).dense()
    gold = gold_matrix(dataset, labels).astype(np.float64)
    known = np.array([given is not None for given in dataset["gold"][:]], dtype=bool)
    if not labels.multilabel:
        known &= gold.any(axis=1)  # "none of the labels" is no distribution over them
    labelled = soft.sum(axis=1) > 0
    share = np.where(known, np.where(labelled, kd_weight, 0.0), 1.0)[:, None]
    return SoftLabels.from_dense((1 - share) * gold + share * soft, labels).add_to(dataset)


def correct_missing(dataset: Dataset, labels: LabelSpace, *, tau: float = 0.7) -> Dataset:
    """Completes gold lists that name only some of the true labels, by what a model is sure of.

    The correction step of COMIC (Zhang et al., arXiv 2304.10539): a label that is not given becomes
    a target when its probability is above `tau` and above the mean probability of that label, so
    that a label which the model always finds probable is not added to all rows. The soft label
    becomes probability 1 for the given and the added labels; `added_ids` says which were added.
    Most of what is added are frequent labels. A row whose gold nobody knows (null) keeps its soft
    label, gets nothing added and does not count in the means.

    Differs from the paper: the mean is taken over the rows with gold, not along the steps of a
    training; the training loop itself can call `missing_labels` with a mean of its own.

    Args:
        dataset: training rows with soft labels of a model, and with `gold`, true but incomplete.
        labels: their label space, multi-label.
        tau: 0.7 is the paper's best.

    Raises:
        ValueError: in a single-label space, or when `tau` is not between 0 and 1.
    """
    if not labels.multilabel:
        raise ValueError("correct_missing needs a multi-label space, where labels can be missing")
    if not 0 < tau < 1:
        raise ValueError(f"tau must lie strictly between 0 and 1; got {tau}")
    soft = SoftLabels.from_dataset(dataset, labels)
    golds = gold_matrix(dataset, labels)
    known = arrow_table(dataset.select_columns(["gold"]))["gold"].is_valid().to_numpy()
    given, probs = csr_array(golds[known]), soft.probs[known]
    labelled = max(int((np.diff(probs.indptr) > 0).sum()), 1)
    means = np.asarray(probs.astype(np.float64).sum(axis=0)).ravel() / labelled
    added = missing_labels(probs, given, means, tau=tau)
    targets = given.astype(np.float32) + added.astype(np.float32)
    order = np.argsort(np.argsort(~known, kind="stable"))  # known rows come first in the stack
    stacked = vstack([targets, soft.probs[~known]], format="csr")[order]
    found = SoftLabels(stacked, labels.fingerprint, multilabel=True).add_to(dataset)
    lists: list[list[int]] = [[] for _ in range(len(dataset))]
    ids = np.split(added.indices, added.indptr[1:-1])
    for row, mine in zip(np.flatnonzero(known).tolist(), ids, strict=False):
        lists[row] = mine.tolist()
    return with_columns(found, {"added_ids": (lists, List(Value("int32")))})


def missing_labels(
    probs: csr_array, given: csr_array, class_means: Float[np.ndarray, " labels"], *, tau: float
) -> csr_array:
    """True where p_c > max(`tau`, mean of class c) and c is not given; COMIC, section 3.2."""
    sure = probs.tocsr().astype(np.float64)
    bound = np.maximum(np.float64(np.float32(tau)), class_means)  # probabilities are float32
    sure.data = (sure.data > bound[sure.indices]).astype(np.float64)
    added = sure - sure.multiply(given.astype(np.float64))
    added = csr_array(added, dtype=bool)
    added.eliminate_zeros()
    added.sort_indices()
    return added


def _check_bands(
    labels: LabelSpace, cuts: Sequence[float], actions: Sequence[Action], smoothing: float
) -> None:
    if labels.multilabel:
        raise ValueError("adapt_bands needs labels that exclude each other (single-label)")
    if len(actions) != len(cuts) + 1:
        raise ValueError(f"{len(cuts)} cuts make {len(cuts) + 1} bands; got actions {actions}")
    if not all(low < high for low, high in zip((0, *cuts), (*cuts, 1), strict=True)):
        raise ValueError(f"cuts must rise strictly between 0 and 1; got {cuts}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1; got {smoothing}")
