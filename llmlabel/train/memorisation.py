"""Which training labels a student has learned by heart although its early epochs said otherwise.

A network fits clean labels first (Liu et al., arXiv 2007.00151). `train_classifier` with
`early_learning` keeps what it said of each training row, averaged over the epochs; where that is
another label than the given one, the given one is suspect (argmax t != y, the paper's code). With
`penalty_weight: 0` the training itself is not changed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value
from jaxtyping import Bool, Float, Int

from llmlabel import metrics
from llmlabel.data import gold_index, read_parquet, require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels
from llmlabel.train.classifier import predict
from llmlabel.train.settings import EARLY


def find_memorised(
    dataset: Dataset, labels: LabelSpace, *, model: Path, output: Path | None = None
) -> Dataset:
    """Adds `suspect`, `memorised`, `early_id` and `early_margin`, null in rows not trained on.

    The margin is how much more of the early epochs' probability the given label has than any other
    (the normalized margin of Northcutt et al., arXiv 1911.00068); where it is below 0 the given label
    is suspect, and the lower it is the more.

    Args:
        dataset: rows with the soft labels that were trained on; the most probable is the given one.
        labels: their label space, single-label.
        model: a folder of `train_classifier` with `early_learning`.
        output: folder that keeps finished blocks of the student's predictions.

    Raises:
        ValueError: the model remembers nothing, or labels do not exclude each other.
    """
    require_columns(dataset, "id", "text", "label_ids", "label_probs")
    early, trained = _early(dataset, labels, model)
    given = _first(SoftLabels.from_dataset(dataset, labels).dense())
    said = _first(
        SoftLabels.from_dataset(predict(dataset, model=model, output=output), labels).dense()
    )
    known = trained & (given >= 0)
    first = _first(early)
    suspect = first != given
    columns = {
        "suspect": (suspect, Value("bool")),
        "memorised": (suspect & (said == given), Value("bool")),
        "early_id": (first, Value("int32")),
        "early_margin": (_margins(early, given), Value("float32")),
    }
    found = {
        name: ([v if k else None for v, k in zip(values.tolist(), known, strict=True)], kind)
        for name, (values, kind) in columns.items()
    }
    return with_columns(dataset, found)


def measure_memorised(dataset: Dataset, labels: LabelSpace) -> dict[str, Any]:
    """How many labels are suspect or learned by heart, and how often the suspicion is right.

    Args:
        dataset: what `find_memorised` gives; with `gold`, in whatever rows it is known, precision and
            recall of `suspect` as a finder of wrong labels are among the numbers.
        labels: the label space.

    Returns:
        JSON: `rows` that were trained on, shares `suspect` and `memorised`; `labels`, for each given
        label that is suspect anywhere, by id, the most often suspect first: its rows, how many are
        suspect and memorised, and the label that the early epochs found in most of them; with gold
        `gold_rows`, `wrong` (share of wrong labels), `precision`, `recall` (null where there is nothing
        to divide by), and `memorised_wrong`, the share of wrong labels that were learned by heart.
    """
    require_columns(dataset, "suspect", "memorised", "early_id", "label_ids", "label_probs")
    known = np.array([value is not None for value in dataset["suspect"]], dtype=bool)
    some = dataset.select(np.flatnonzero(known))
    suspect, memorised = (np.array(some[name][:], dtype=bool) for name in ("suspect", "memorised"))
    given = _first(SoftLabels.from_dataset(some, labels).dense())
    early = np.array(some["early_id"][:], dtype=np.int64)
    found: dict[str, Any] = {
        "rows": len(some),
        "suspect": _share(suspect),
        "memorised": _share(memorised),
        "labels": _by_label(labels, given, early, suspect, memorised),
    }
    if "gold" not in dataset.column_names:
        return found
    sure = np.array([ids is not None for ids in some["gold"]], dtype=bool)
    if not sure.any():
        return found
    gold = gold_index(some.select(np.flatnonzero(sure)), labels)
    wrong, suspect, memorised = given[sure] != gold, suspect[sure], memorised[sure]
    return found | {
        "gold_rows": int(sure.sum()),
        "wrong": _share(wrong),
        "precision": _share(wrong[suspect]),
        "recall": _share(suspect[wrong]),
        "memorised_wrong": _share(memorised[wrong]),
    }


def early_probs(
    dataset: Dataset, labels: LabelSpace, *, model: Path
) -> Float[np.ndarray, "rows labels"]:
    """What the early epochs said of each row, as `cleanlab.filter.find_label_issues` takes it.

    Raises:
        ValueError: a row was not trained on.
    """
    require_columns(dataset, "id")
    early, trained = _early(dataset, labels, model)
    if not trained.all():
        row = int(np.flatnonzero(~trained)[0])
        raise ValueError(
            f"the row with id {dataset['id'][row]!r} was not trained on; take out the rows whose "
            "`suspect` is null"
        )
    return early / early.sum(axis=1, keepdims=True)


def _early(
    dataset: Dataset, labels: LabelSpace, model: Path
) -> tuple[Float[np.ndarray, "rows labels"], Any]:
    """The remembered distribution of each row, 0 and False where it was not trained on."""
    if labels.multilabel:
        raise ValueError(
            "memorised labels are found where labels exclude each other (single-label)"
        )
    file = model / EARLY
    if not file.is_file():
        raise ValueError(
            f"model folder {model}: {EARLY} is missing; train with early_learning, whose "
            "penalty_weight may be 0"
        )
    kept = read_parquet(file)
    place = {id: row for row, id in enumerate(kept["id"][:])}
    rows = np.array([place.get(str(id), -1) for id in dataset["id"]], dtype=np.int64)
    dense = SoftLabels.from_dataset(kept, labels).dense()
    found = np.where(rows[:, None] >= 0, dense[rows], 0.0)
    return found, found.sum(axis=1) > 0


def _first(probs: Float[np.ndarray, "rows labels"]) -> Int[np.ndarray, " rows"]:
    """The most probable label, -1 without one."""
    return metrics.predicted(probs)


def _margins(
    early: Float[np.ndarray, "rows labels"], given: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """The share of each given label less the highest share of another one."""
    shares = early / np.maximum(early.sum(axis=1, keepdims=True), 1e-30)
    place = np.arange(len(shares)), given
    own = shares[place]
    shares[place] = 0.0
    margins: Float[np.ndarray, " rows"] = own - shares.max(axis=1)
    return margins


def _by_label(
    labels: LabelSpace,
    given: Int[np.ndarray, " rows"],
    early: Int[np.ndarray, " rows"],
    suspect: Bool[np.ndarray, " rows"],
    memorised: Bool[np.ndarray, " rows"],
) -> dict[str, dict[str, Any]]:
    count = len(labels)
    rows, suspects, learned = (
        np.bincount(some, minlength=count)
        for some in (given, given[suspect], given[memorised & suspect])
    )
    found = {}
    for label in np.argsort(-suspects, kind="stable")[: np.count_nonzero(suspects)].tolist():
        said = np.bincount(early[suspect & (given == label)], minlength=count)
        found[labels.ids[label]] = {
            **{"rows": int(rows[label]), "suspect": int(suspects[label])},
            **{"memorised": int(learned[label]), "early": labels.ids[int(said.argmax())]},
        }
    return found


def _share(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
