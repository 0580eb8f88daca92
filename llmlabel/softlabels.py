"""A probability for every label of every row, and the columns of a table that hold it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array

from llmlabel.data import require_columns, with_columns
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace

LABEL_COLUMNS = (
    *("label_ids", "label_probs", "label_space"),
    *("label_mass", "engine", "prompt_sha", "error"),
)
"""What every labeler writes, teacher or student; null where it has no meaning."""

VOTES = List({"source": Value("string"), "label_id": Value("int32"), "prob": Value("float32")})
"""The type of the column `votes`."""

_ROUNDING = 1e-6
"""A row of float32 probabilities that sums to 1 does so within this."""

_MAX_SUM = 1 + 1e-3
"""More than this in one row of a single-label space is no distribution (half precision included)."""


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """One distribution over the labels a row; a label not stored has a small, unknown probability.

    A row without any stored label has no soft label at all (its reply could not be read).

    Attributes:
        probs: Shape (rows, labels), float32.
        space: Fingerprint of the label space that the columns of `probs` refer to.
        multilabel: Whether each label has a probability of its own, so that rows need not sum to 1.
    """

    probs: csr_array
    space: str
    multilabel: bool = False

    def __post_init__(self) -> None:
        """Brings `probs` into the one form that the methods rely on: float32, ids ascending."""
        probs = csr_array(self.probs, dtype=np.float32)
        if not probs.has_canonical_format:
            probs = probs.copy()  # the caller's array stays as it is
            probs.sum_duplicates()
        object.__setattr__(self, "probs", probs)

    @classmethod
    def from_dense(
        cls, probs: Float[np.ndarray, "rows labels"], labels: LabelSpace
    ) -> "SoftLabels":
        """Stores every probability above 0; a row of zeros is a row without a soft label.

        Raises:
            ValueError: If the columns are not the labels, or a row holds no probabilities.
        """
        _check_width(probs, labels)
        probs = probs.astype(np.float32)
        _check_probs(csr_array(probs), labels, row_name=lambda row: f"row {row}")
        return cls(csr_array(probs), labels.fingerprint, labels.multilabel)

    @classmethod
    def from_scores(
        cls,
        log_probs: Float[np.ndarray, "rows labels"],
        labels: LabelSpace,
        *,
        unread: Float[np.ndarray, " rows"] | None = None,
    ) -> "SoftLabels":
        """Turns natural-log joint probabilities of the labels into soft labels.

        Single-label: the softmax over the label set. Multi-label: the exponential of each, as it is.
        Nothing is invented where nothing was read: a row of -inf, and in a single-label space a row
        with a NaN anywhere, has no soft label; in a multi-label space a NaN is a label not stored.

        Args:
            log_probs: -inf is a label not read; it is not stored.
            labels: their label space.
            unread: probability that a row's labels not read have together at most. A single-label
                row then sums to found / (found + unread), and what is missing to 1 is the bound.

        Raises:
            ValueError: If the columns are not the labels, or a multi-label score is above 0.
        """
        _check_width(log_probs, labels)
        scores = log_probs.astype(np.float64)
        if not labels.multilabel:
            scores[~(scores < np.inf).all(axis=1)] = -np.inf  # NaN and +inf
            peak = scores.max(axis=1, keepdims=True)
            peak = np.where(np.isfinite(peak), peak, 0.0)
            joint = np.exp(scores - peak)
            total = joint.sum(axis=1, keepdims=True)
            if unread is not None:
                total += np.where(total > 0, unread[:, None] * np.exp(-peak), 0.0)
            return cls.from_dense(joint / np.where(total > 0, total, 1.0), labels)
        return cls.from_dense(np.exp(np.nan_to_num(scores, nan=-np.inf, posinf=np.inf)), labels)

    @classmethod
    def from_dataset(cls, dataset: Dataset, labels: LabelSpace) -> "SoftLabels":
        """Reads `label_ids` and `label_probs`; a null or empty list is a row without a soft label.

        Raises:
            ValueError: If a column is missing, the rows were labelled in another label space, or a
                row holds anything but a distribution over `labels`.
        """
        require_columns(dataset, "label_ids", "label_probs", "label_space")
        table = arrow_table(dataset.select_columns(["label_ids", "label_probs", "label_space"]))
        for space in table["label_space"].unique().to_pylist():
            if space != labels.fingerprint:
                raise ValueError(
                    f"the rows carry soft labels of label space {space}, but the label space given "
                    f"is {labels.fingerprint}; load the one that made them, or label the rows again"
                )
        row_name = _row_name(dataset)
        ids, indptr = _flatten(table["label_ids"], pa.int64())
        values, indptr_probs = _flatten(table["label_probs"], pa.float32())
        if (differ := np.flatnonzero(indptr != indptr_probs)).size:
            raise ValueError(
                f"{row_name(int(differ[0]) - 1)}: label_ids and label_probs differ in length"
            )
        if (outside := np.flatnonzero((ids < 0) | (ids >= len(labels)))).size:
            at = int(outside[0])
            raise ValueError(
                f"{row_name(_row_of(at, indptr))}: label id {ids[at]} is outside the label space, "
                f"which has ids 0 to {len(labels) - 1}"
            )
        probs = csr_array((values, ids, indptr), shape=(len(dataset), len(labels)))
        _check_unique(probs, row_name=row_name)
        _check_probs(probs, labels, row_name=row_name)
        return cls(probs, labels.fingerprint, labels.multilabel)

    @classmethod
    def from_sources(
        cls, sources: dict[str, Dataset], labels: LabelSpace
    ) -> dict[str, "SoftLabels"]:
        """`from_dataset` of several tables; what is wrong names its source."""
        found = {}
        for name, dataset in sources.items():
            try:
                found[name] = cls.from_dataset(dataset, labels)
            except ValueError as error:
                raise ValueError(f"source {name!r}: {error}") from None
        return found

    @property
    def missing_mass(self) -> Float[np.ndarray, " rows"]:
        """Probability that each row leaves to labels not stored; 1 for a row without a soft label.

        What float32 cannot tell from a full row (below 1e-6) is 0.

        Raises:
            ValueError: In a multi-label space, whose rows have no total to fall short of.
        """
        if self.multilabel:
            raise ValueError(
                "missing mass is defined for a single-label space only; in this multi-label space "
                "a label not stored is simply improbable"
            )
        missing = np.clip(1.0 - _row_sums(self.probs), 0.0, 1.0)
        return np.where(missing < _ROUNDING, 0.0, missing)

    def dense(self) -> Float[np.ndarray, "rows labels"]:
        """All probabilities as float64; 0 where a label is not stored."""
        dense: np.ndarray = self.probs.astype(np.float64).toarray()
        return dense

    def log_dense(self, *, floor: float = 1e-12) -> Float[np.ndarray, "rows labels"]:
        """Natural logarithm of all probabilities, none below log(`floor`).

        In a single-label space the missing mass of a row is spread evenly over its labels not
        stored, so a row without a soft label is uniform; in a multi-label space these get `floor`.
        """
        probs = self.dense()
        if not self.multilabel:
            stored = np.zeros(probs.shape, dtype=bool)
            stored[self._rows(), self.probs.indices] = True
            unstored = np.maximum((~stored).sum(axis=1), 1)
            probs = np.where(stored, probs, (self.missing_mass / unstored)[:, None])
        return np.log(np.maximum(probs, floor))

    def top(self, k: int) -> "SoftLabels":
        """Keeps the `k` most probable labels of each row; of equal ones, those with lower ids.

        Raises:
            ValueError: If `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, the number of labels to keep; got {k}")
        kept = np.minimum(np.diff(self.probs.indptr), k)
        indptr = np.concatenate([[0], np.cumsum(kept)])
        rank = np.arange(self.probs.nnz) - np.repeat(
            self.probs.indptr[:-1], np.diff(self.probs.indptr)
        )
        order = self._most_probable_first()[rank < k]
        probs = csr_array(
            (self.probs.data[order], self.probs.indices[order], indptr), shape=self.probs.shape
        )
        return SoftLabels(probs, self.space, self.multilabel)

    def add_to(self, dataset: Dataset) -> Dataset:
        """Adds `label_ids` and `label_probs`, most probable first (equal ones: lower id first).

        Also adds `label_space`. `from_dataset` gives back exactly these values.

        Raises:
            ValueError: If the dataset has another number of rows.
        """
        rows = self.probs.shape[0]
        if rows != len(dataset):
            raise ValueError(f"soft labels of {rows} rows do not fit a dataset of {len(dataset)}")
        order = self._most_probable_first()
        offsets = pa.array(self.probs.indptr, pa.int32())
        ids = pa.array(self.probs.indices[order], pa.int32())
        probs = pa.array(self.probs.data[order], pa.float32())
        return with_columns(
            dataset,
            {
                "label_ids": (pa.ListArray.from_arrays(offsets, ids), List(Value("int32"))),
                "label_probs": (pa.ListArray.from_arrays(offsets, probs), List(Value("float32"))),
                "label_space": (pa.repeat(self.space, rows), Value("string")),
            },
        )

    def _rows(self) -> Int[np.ndarray, " stored"]:
        """The row of each stored probability."""
        return np.repeat(np.arange(self.probs.shape[0]), np.diff(self.probs.indptr))

    def _most_probable_first(self) -> Int[np.ndarray, " stored"]:
        """Order of the stored probabilities: by row, falling probability, rising label id."""
        # One integer key a value: the bits of floats >= 0 sort like the floats (+ 0.0 removes -0.0).
        # A stable sort of a key that is in row order already costs rows * k log k only, and keeps
        # equal probabilities in the order of their ids.
        bits = (self.probs.data + np.float32(0.0)).view(np.uint32).astype(np.int64)
        order: np.ndarray = np.argsort((self._rows() << 32) - bits, kind="stable")
        return order


def _check_width(columns: Float[np.ndarray, "rows labels"], labels: LabelSpace) -> None:
    if columns.shape[1] != len(labels):
        raise ValueError(f"{columns.shape[1]} columns do not fit a space of {len(labels)} labels")


def _check_probs(probs: csr_array, labels: LabelSpace, *, row_name: Callable[[int], str]) -> None:
    """Raises a ValueError that names the first row whose stored values are no probabilities."""
    if (wrong := np.flatnonzero(~(probs.data >= 0))).size:
        row = _row_of(int(wrong[0]), probs.indptr)
        raise ValueError(
            f"{row_name(row)}: {probs.data[wrong[0]]} is no probability; a label that was not read "
            "is left out, and a row that was not read has no label"
        )
    if labels.multilabel:
        if (wrong := np.flatnonzero(probs.data > _MAX_SUM)).size:
            row = _row_of(int(wrong[0]), probs.indptr)
            raise ValueError(f"{row_name(row)}: {probs.data[wrong[0]]} is above 1, no probability")
        return
    total = _row_sums(probs)
    if (wrong := np.flatnonzero(total > _MAX_SUM)).size:
        raise ValueError(
            f"{row_name(int(wrong[0]))}: the probabilities sum to {total[wrong[0]]:.6g}; normalise "
            "them, or load the label space with multilabel=true"
        )


def _row_sums(probs: csr_array) -> Float[np.ndarray, " rows"]:
    sums: np.ndarray = probs.astype(np.float64).sum(axis=1)  # dtype= would come after the summing
    return sums


def _check_unique(probs: csr_array, *, row_name: Callable[[int], str]) -> None:
    """Raises a ValueError that names the first row that stores a label twice."""
    ordered = probs.sorted_indices()
    rows = np.repeat(np.arange(probs.shape[0]), np.diff(ordered.indptr))
    twice = np.flatnonzero((np.diff(ordered.indices) == 0) & (np.diff(rows) == 0))
    if twice.size:
        label, row = ordered.indices[twice[0]], int(rows[twice[0]])
        raise ValueError(f"{row_name(row)}: label id {label} occurs twice in label_ids")


def _row_of(stored: int, indptr: Int[np.ndarray, " bounds"]) -> int:
    return int(np.searchsorted(indptr, stored, side="right")) - 1


def _row_name(dataset: Dataset) -> Callable[[int], str]:
    if "id" not in dataset.column_names:
        return lambda row: f"row {row}"
    return lambda row: f"row with id {dataset[row]['id']!r}"


def _flatten(
    lists: pa.ChunkedArray, value_type: pa.DataType
) -> tuple[Shaped[np.ndarray, " stored"], Int[np.ndarray, " bounds"]]:
    """Values of all lists and where each list begins (and the last one ends)."""
    array = lists.cast(pa.list_(value_type)).combine_chunks()
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = array.flatten()
    absent = -1 if pa.types.is_integer(value_type) else float("nan")  # both are refused later
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return values.fill_null(absent).to_numpy(zero_copy_only=False), indptr
