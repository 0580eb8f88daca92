"""A low-rank projector that regenerates soft labels from embeddings, instead of labels that are stored.

The store is a folder with `projector.safetensors`: two thin matrices, and a header that pins the
label space and the encoder. Worth it where rows x labels is far above rank x (labels + width); for
few labels the bytes of `llmlabel.refine.compress.TopK` are fewer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float
from scipy.sparse import vstack

from llmlabel.data import require_columns, rows_of
from llmlabel.files import commit
from llmlabel.labelspace import LabelSpace
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

FILE = "projector.safetensors"

_LOWEST_PROB = 1e-4
"""Teacher probabilities below this are noise whose logarithm would fill the rank."""


@dataclass(frozen=True)
class LowRank:
    """Label vectors plus a change of rank `rank`: rank x (labels + width) x 4 bytes for all rows.

    HeLlO (arXiv 2408.08201): f(x) = W e(x), W the embeddings of the labels' texts plus A B. Rank 0
    stores nothing and is the zero-shot classifier by cosine; a rank of the number of labels is a
    full linear head. The error of the projector becomes noise of the labels: compare what is
    restored with the teacher.

    Differs from the paper: the encoder stays as it is (no LoRA inside); A B is the least-squares
    optimum (reduced-rank regression, Izenman 1975) on the teacher's log-probabilities, centred per
    row and cut at 1e-4, not trained; no cross-entropy term.

    Args:
        rank: of the change.
        anchors: rows whose `id` is a label's id, with the `vector` of its text, for every label.
        scale: of the cosine, the inverse of a temperature.
        ridge: added to the squares of the vectors, relative to their mean.
    """

    rank: int
    anchors: Dataset
    scale: float = 20.0
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0; got {self.rank}")
        if not (self.scale > 0 and self.ridge > 0):
            raise ValueError(
                f"scale and ridge must be above 0; got scale={self.scale}, ridge={self.ridge}"
            )


def reduced_rank(
    gram: Float[np.ndarray, "width width"],
    cross: Float[np.ndarray, "width labels"],
    *,
    rank: int,
    ridge: float,
) -> tuple[Float[np.ndarray, "width rank"], Float[np.ndarray, "rank labels"]]:
    """The factors of the M of rank `rank` that minimises |V M - D|^2 + penalty |M|^2.

    Args:
        gram: V'V of the rows' vectors V.
        cross: V'D with what is to be fitted.
        rank: of M, at most the smaller side of `cross`.
        ridge: penalty / mean of the diagonal of `gram`.
    """
    width = len(gram)
    penalised = gram + ridge * max(np.trace(gram) / width, 1e-12) * np.eye(width)
    root = np.linalg.cholesky(penalised)
    whitened = np.linalg.solve(root, cross)  # its best approximation is that of the fitted values
    left, values, right = np.linalg.svd(whitened, full_matrices=False)
    rank = min(rank, len(values))
    return np.linalg.solve(root.T, left[:, :rank] * values[:rank]), right[:rank]


def project(
    vectors: Float[np.ndarray, "rows width"],
    anchors: Float[np.ndarray, "labels width"],
    left: Float[np.ndarray, "width rank"],
    right: Float[np.ndarray, "rank labels"],
    *,
    scale: float,
) -> Float[np.ndarray, "rows labels"]:
    """Logarithm of softmax(`scale` cosine + vector A B)."""
    unit = _unit(vectors)
    logits = scale * unit @ _unit(anchors).T + unit @ left @ right
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def write(
    dataset: Dataset,
    labels: LabelSpace,
    codec: LowRank,
    output: Path,
    *,
    version: int,
    block_rows: int,
) -> Path:
    """Fits the projector to the rows that have a soft label, block by block, and writes it."""
    from safetensors.numpy import save_file

    if labels.multilabel:
        raise ValueError("LowRank needs a single-label space; use TopK or Dense")
    anchors = _anchors(codec.anchors, labels)
    width = anchors.shape[1]
    gram, cross = np.zeros((width, width)), np.zeros((width, len(labels)))
    for start in range(0, len(dataset), block_rows):
        rows = dataset.select(range(start, min(start + block_rows, len(dataset))))
        soft = SoftLabels.from_dataset(rows, labels)
        labelled = np.flatnonzero(np.diff(soft.probs.indptr) > 0)
        if not labelled.size:
            continue
        unit = _unit(_of_width(row_vectors(rows.select(labelled)), width))
        target = soft.log_dense(floor=_LOWEST_PROB)[labelled]
        target -= target.mean(axis=1, keepdims=True)
        zero_shot = codec.scale * unit @ _unit(anchors).T
        gram += unit.T @ unit
        cross += unit.T @ (target - (zero_shot - zero_shot.mean(axis=1, keepdims=True)))
    left, right = reduced_rank(gram, cross, rank=codec.rank, ridge=codec.ridge)
    head = {
        "version": version,
        "codec": {"name": "LowRank", "rank": codec.rank, "scale": codec.scale},
        "label_space": labels.fingerprint,
        "anchors": _mark(anchors),
        "rows": len(dataset),
    }
    tensors = {"left": left.astype(np.float32), "right": np.ascontiguousarray(right, np.float32)}
    commit(
        output / FILE,
        lambda temporary: save_file(tensors, temporary, metadata={"llmlabel": json.dumps(head)}),
    )
    return output


def read(
    store: Path,
    labels: LabelSpace,
    texts: Dataset | None,
    anchors: Dataset | None,
    *,
    version: int,
    block_rows: int,
) -> Dataset:
    """The soft labels that the projector gives to `texts`, in which nothing else is changed.

    Rows x labels numbers are in memory for `block_rows` rows at a time, beside what is returned.
    """
    from safetensors.numpy import load_file

    if texts is None or anchors is None:
        raise ValueError(f"{store}: a projector needs texts= and anchors=, with their vectors")
    head = header(store)
    check_header(store / FILE, head, labels, version=version)
    vectors = _anchors(anchors, labels)
    mark = _mark(vectors)
    if len(mark) != len(head["anchors"]) or not np.allclose(mark, head["anchors"], atol=1e-2):
        raise ValueError(
            f"{store}: the label vectors are not those that the projector was made with; use the "
            "same encoder and label texts"
        )
    require_columns(texts, "id")
    found = load_file(store / FILE)
    rows = _of_width(row_vectors(texts), vectors.shape[1])
    left, right = found["left"].astype(np.float64), found["right"].astype(np.float64)
    blocks = []
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        log_probs = project(block, vectors, left, right, scale=head["codec"]["scale"])
        blocks.append(SoftLabels.from_scores(log_probs, labels).probs)
    return SoftLabels(vstack(blocks, format="csr"), labels.fingerprint).add_to(texts)


def header(store: Path) -> dict[str, Any]:
    """What the file says of itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(store / FILE, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{store / FILE}: not a whole file ({error}); compress again") from None
    if "llmlabel" not in metadata:
        raise ValueError(f"{store / FILE}: this is no projector; give a folder of compress")
    head: dict[str, Any] = json.loads(metadata["llmlabel"])
    return head


def check_header(
    path: Path, head: dict[str, Any], labels: LabelSpace | None, *, version: int
) -> None:
    """Refuses a store of another version of the format or of another label space."""
    if head["version"] != version:
        raise ValueError(
            f"{path}: the store has format version {head['version']}, this llmlabel reads "
            f"{version}; compress the labels again"
        )
    if labels is not None and head["label_space"] != labels.fingerprint:
        raise ValueError(
            f"{path}: the store holds soft labels of label space {head['label_space']}, but the "
            f"label space given is {labels.fingerprint}; load the one that made them"
        )


def _anchors(anchors: Dataset, labels: LabelSpace) -> Float[np.ndarray, "labels width"]:
    """The vector of each label, in the order of the space."""
    require_columns(anchors, "id")
    there = set(anchors["id"][:])
    if absent := [id for id in labels.ids if id not in there]:
        raise ValueError(f"anchors has no row with the id of label {absent[0]!r}; give every label")
    wanted = Dataset.from_dict({"id": list(labels.ids)})
    return row_vectors(rows_of(wanted, anchors, "anchors"))


def _of_width(vectors: Float[np.ndarray, "rows w"], width: int) -> Float[np.ndarray, "rows w"]:
    if vectors.shape[1] != width:
        raise ValueError(
            f"vectors of width {vectors.shape[1]} do not fit label vectors of width {width}; use "
            "one encoder for both"
        )
    return vectors


def _unit(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _mark(vectors: Float[np.ndarray, "labels width"]) -> list[float]:
    """Eight numbers that tell label vectors from others, equal within rounding on any machine."""
    position = np.arange(1, len(vectors) + 1) / len(vectors)
    parts = np.array_split(position @ _unit(vectors), min(8, vectors.shape[1]))
    return [round(float(part.sum()), 4) for part in parts]
