"""How good rankings of very many labels are: P@k, R@k, nDCG@k and their propensity-scored forms.

Also where it comes from: the share of frequent, of rare and of unseen labels.

Scores and gold are CSR of (rows, labels). What a row does not store is ranked after all that it
stores, and is no hit. A row without gold counts, with 0.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from llmlabel.data import label_csr, require_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels


def ranked(scores: csr_array, *, k: int) -> Int[np.ndarray, "rows k"]:
    """The `k` labels of the highest stored scores of each row; of equal ones the lower id; then -1."""
    rows = _rows(scores)
    order = np.lexsort((scores.indices, -scores.data, rows))
    return _table(scores.indices[order], scores, k=k, absent=-1)


def ranking_scores(
    scores: csr_array,
    gold: csr_array,
    *,
    ks: tuple[int, ...] = (1, 3, 5),
    inverse_propensity: Float[np.ndarray, " labels"] | None = None,
) -> dict[str, float]:
    """`P@k`, `R@k` and `nDCG@k` for each k, and with propensities `PSP@k` and `PSnDCG@k`.

    Jain et al. 2016 (doi 10.1145/2939672.2939756), section 6. The propensity-scored ones are divided
    by the best that any ranking of the same rows could reach, summed before dividing.
    """
    _check_ks(ks)
    if scores.shape != gold.shape:
        raise ValueError(
            f"scores are of {scores.shape[0]} rows and {scores.shape[1]} labels, gold of "
            f"{gold.shape[0]} and {gold.shape[1]}; both must be of the same rows and label space"
        )
    most = max(ks)
    top, gold = ranked(scores, k=most), csr_array(gold != 0, dtype=np.float64)
    hits = _held(top, gold)
    discount = 1 / np.log2(np.arange(most) + 2)
    true = np.diff(gold.indptr)
    ideal = np.cumsum(_table(gold.data, gold, k=most, absent=0) * discount, axis=1)
    gain = np.cumsum(hits, axis=1)
    discounted = _divided(np.cumsum(hits * discount, axis=1), ideal)
    found = {}
    for k in ks:
        found[f"P@{k}"] = float(gain[:, k - 1].mean() / k)
        found[f"R@{k}"] = float(_divided(gain[:, k - 1], true).mean())
        found[f"nDCG@{k}"] = float(discounted[:, k - 1].mean())
    if inverse_propensity is None:
        return found
    weights = hits * inverse_propensity[top]  # -1 reads the last label and is no hit
    own = inverse_propensity[gold.indices]
    order = np.lexsort((-own, _rows(gold)))
    best = _table(own[order], gold, k=most, absent=0)
    reached, possible = np.cumsum(weights, axis=1).sum(axis=0), np.cumsum(best, axis=1).sum(axis=0)
    pair = [
        _divided(np.cumsum(some * discount, axis=1), ideal).sum(axis=0) for some in (weights, best)
    ]
    for k in ks:
        found[f"PSP@{k}"] = float(_divided(reached, possible)[k - 1])
        found[f"PSnDCG@{k}"] = float(_divided(*pair)[k - 1])
    return found


def inverse_propensity(
    gold: csr_array, *, a: float = 0.55, b: float = 1.5
) -> Float[np.ndarray, " labels"]:
    """1 + C (n + B)^-A of each label that is gold in n of the N training rows.

    Jain et al. 2016, section 4, with C = (log N - 1)(B + 1)^A: how many times a rare label is more
    likely to have been forgotten. A and B are 0.5 and 0.4 for Wikipedia, 0.6 and 2.6 for Amazon.
    """
    count = np.bincount(gold.indices[gold.data != 0], minlength=gold.shape[1])
    c = (np.log(gold.shape[0]) - 1) * (b + 1) ** a
    weights: np.ndarray = 1 + c * (count + b) ** -a
    return weights


def frequency_groups(
    counts: Int[np.ndarray, " labels"], *, groups: int = 10
) -> Int[np.ndarray, " labels"]:
    """The group of each label by how often it is gold in training: 0 is the most frequent tenth.

    The rarest are in the last group, labels that never occur in -1 (zero-shot). Labels that are
    equally frequent stay together, in the group of the middle one of them, so that nothing depends on
    their order; groups can be unequal or empty.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if counts.size and counts.min() < 0:
        raise ValueError(
            f"a label cannot be gold {counts.min()} times; give counts of training rows"
        )
    times, place, labels = np.unique(-counts, return_inverse=True, return_counts=True)
    labels = np.where(times < 0, labels, 0)
    after = np.cumsum(labels)
    group = np.where(times < 0, groups * (2 * after - labels) // max(2 * int(labels.sum()), 1), -1)
    found: np.ndarray = group[place]
    return found


def ranking_by_frequency(
    scores: csr_array,
    gold: csr_array,
    counts: Int[np.ndarray, " labels"],
    *,
    k: int,
    groups: int = 10,
) -> list[dict[str, Any]]:
    """Which labels `P@k` comes from: a line for each of `frequency_groups`, zero-shot ones last.

    Each line has `group` (1 = the most frequent, or "zero-shot"), the number of `labels`, `least` and
    `most` training rows of one, the `gold` pairs and `hits` among the first k of these rows, the part
    `P@k` of the whole P@k (the lines sum up to it), and the recall `R@k` = hits / gold over pairs.
    """
    if not len(counts) == scores.shape[1] == gold.shape[1]:
        raise ValueError(
            f"{scores.shape[1]} labels have scores, {gold.shape[1]} gold and {len(counts)} counts; "
            "all must be of one label space"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of labels that count; got {k}")
    of = frequency_groups(counts, groups=groups)
    true, top = csr_array(gold != 0), ranked(scores, k=k)
    hit = top[_held(top, true)]
    lines = []
    for group in (*range(groups), -1):
        own = counts[of == group]
        pairs, hits = int((of[true.indices] == group).sum()), int((of[hit] == group).sum())
        lines.append(
            {
                "group": "zero-shot" if group < 0 else group + 1,
                "labels": len(own),
                "least": int(own.min()) if own.size else None,
                "most": int(own.max()) if own.size else None,
                "gold": pairs,
                "hits": hits,
                f"P@{k}": hits / (k * len(top)),
                f"R@{k}": hits / pairs if pairs else 0.0,
            }
        )
    return lines


def measure_ranking(
    sources: dict[str, Dataset],
    labels: LabelSpace,
    *,
    training: Dataset | None = None,
    ks: tuple[int, ...] = (1, 3, 5),
    a: float = 0.55,
    b: float = 1.5,
) -> dict[str, dict[str, float]]:
    """`ranking_scores` of each source, over its rows whose gold is known, and the recall of all stored.

    What a row lists in `excluded_ids` is taken out of its ranking; gold that is listed there is not found.

    Args:
        sources: name -> rows with `gold` and soft labels.
        labels: their label space.
        training: rows with `gold` whose counts give the propensities; null leaves the propensity-scored
            numbers out.
        ks: how many labels of a row count.
        a: of the propensities, see `inverse_propensity`.
        b: see there.

    Raises:
        ValueError: a source has no row whose gold is known.
    """
    _check_ks(ks)
    weights = None
    if training is not None:
        weights = inverse_propensity(label_csr(training, labels), a=a, b=b)
    found = {}
    for name, dataset in sources.items():
        require_columns(dataset, "gold")
        known = np.flatnonzero([own is not None for own in dataset["gold"][:]])
        if not len(known):
            raise ValueError(f"measure_ranking: no row of the source {name!r} has known gold")
        rows = dataset.select(known)
        gold, probs = label_csr(rows, labels), counted(rows, labels)
        most = int(np.diff(probs.indptr).max(initial=1))
        numbers = ranking_scores(probs, gold, ks=(*ks, most), inverse_propensity=weights)
        kept = {key: value for key, value in numbers.items() if int(key.partition("@")[2]) in ks}
        found[name] = {"rows": float(len(known)), **kept, "R@stored": numbers[f"R@{most}"]}
    return found


def counted(dataset: Dataset, labels: LabelSpace) -> csr_array:
    """The soft labels of each row without what it lists in `excluded_ids`."""
    probs = SoftLabels.from_dataset(dataset, labels).probs
    if "excluded_ids" not in dataset.column_names:
        return probs
    left_out = label_csr(dataset, labels, column="excluded_ids")
    return without_pairs(probs, np.column_stack(left_out.nonzero()).astype(np.int64))


def without_pairs(scores: csr_array, pairs: Int[np.ndarray, "pairs 2"]) -> csr_array:
    """The scores without those of (row, label) pairs, such as a text and the label that is its title."""
    rows, labels = _rows(scores), scores.shape[1]
    keep = ~np.isin(rows * labels + scores.indices, pairs[:, 0] * labels + pairs[:, 1])
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[keep], minlength=scores.shape[0]))])
    return csr_array((scores.data[keep], scores.indices[keep], indptr), shape=scores.shape)


def _check_ks(ks: tuple[int, ...]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of labels, each at least 1; got {ks}")


def _rows(matrix: csr_array) -> Int[np.ndarray, " stored"]:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def _table(
    values: Float[np.ndarray, " stored"] | Int[np.ndarray, " stored"],
    matrix: csr_array,
    *,
    k: int,
    absent: int,
) -> Float[np.ndarray, "rows k"] | Int[np.ndarray, "rows k"]:
    """The first `k` of the values of each row, which lie where those of the matrix do."""
    rank = np.arange(len(values)) - np.repeat(matrix.indptr[:-1], np.diff(matrix.indptr))
    table = np.full((matrix.shape[0], k), absent, dtype=values.dtype)
    first = rank < k
    table[_rows(matrix)[first], rank[first]] = values[first]
    return table


def _held(top: Int[np.ndarray, "rows k"], gold: csr_array) -> Bool[np.ndarray, "rows k"]:
    keys = np.arange(len(top))[:, None] * gold.shape[1] + top
    return np.isin(keys, _rows(gold) * gold.shape[1] + gold.indices) & (top >= 0)


def _divided(
    a: Float[np.ndarray, "..."] | Int[np.ndarray, "..."],
    b: Float[np.ndarray, "..."] | Int[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """A / b, and 0 where b is."""
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=b > 0)
