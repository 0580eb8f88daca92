"""The labels of a very large space whose texts lie nearest: dual encoders, trained or not, at work.

Only the `k` best labels of a row are stored. A true label that is not among them can no longer be
found by anything that reads them, be it a fusion, a language model or a prediction set: report
`stored_recall`, the ceiling of all that follows.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from jaxtyping import Float
from scipy.sparse import csr_array

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import label_csr, require_columns, with_columns
from llmlabel.files import arrow_table
from llmlabel.label.embedding import Encoder, embed, encoder_name, readable_vectors
from llmlabel.label.index import (
    LabelIndex,
    Search,
    check_encoder,
    label_index,
    load_index,
    save_index,
    searched,
    updated,
)
from llmlabel.label.memory import with_labels
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics.ranking import counted, ranking_scores
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

SCALE = 20.0
"""Of an encoder that nobody trained for the labels; that of CLIP's order for sentence encoders."""

_MOST = 12.0
"""Logit of a label of a multi-label space beyond which float32 tells probabilities apart no more."""


def label_retrieval(  # noqa: PLR0913  # one plain choice each
    dataset: Dataset,
    *,
    model: str | Path | Encoder,
    labels: LabelSpace | None = None,
    k: int = 100,
    index: Path | None = None,
    search: Search = "auto",
    scale: float | None = None,
    midpoint: float = 0.5,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the `k` labels whose texts lie nearest, as soft labels.

    Single-label: softmax(`scale` x cosine) over what is stored, as if nothing else were possible.
    Multi-label: each label has sigmoid(`scale` x (cosine - `midpoint`)) for itself. The order within
    a row means what the encoder means; the probabilities mean nothing until they are calibrated on
    rows with gold: by `llmlabel.label.score_fusion.fit_fusion`, which also takes a single source, or
    `llmlabel.calibrate`. A text without a character gets no label and an `error`.

    A true label outside the `k` is lost; `stored_recall` says how many are.

    Args:
        dataset: rows with `id` and `text`.
        model: a folder of `llmlabel.train.dual_encoder`, or any encoder (zero-shot): path, hub name,
            `package:` source, or anything with `encode`.
        labels: what may be answered; for a trained folder its own labels where it is null. Others
            than it was trained on need no training: their texts are encoded.
        k: labels to store; all where there are fewer.
        index: folder of the labels' vectors (`llmlabel.label.index`): read where it is there, brought
            to these labels, and written. Null reads `index` in a trained folder, where it is there,
            and writes nothing.
        search: see `llmlabel.label.index.label_index`; "auto" leaves an index that is there as it is.
        scale: sharpness; null is the inverse of the temperature trained with, or 20; multi-label not
            above 20 or 12 / (1 - `midpoint`), and none above the latter is taken: float32 would lose
            the order.
        midpoint: cosine at which a label of a multi-label space has probability 0.5.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: the index does not belong to the model, `labels` is missing, or a number is out
            of bounds.
    """
    require_columns(dataset, "id", "text")
    towers = _towers(model)
    space = _space(towers, labels)
    _check_k(k)
    sharpness = _sharpness(towers, space, midpoint) if scale is None else scale
    check_sharpness(sharpness, midpoint, multilabel=space.multilabel)
    name = f"retrieval:{towers.name}:{space.fingerprint[:8]}"

    @cache  # not before a block has to be computed
    def ready() -> tuple[Encoder, LabelIndex]:
        texts, reader = towers.load()
        return texts, _vectors(space, reader, towers, index, search)

    def compute(block: Dataset) -> Dataset:
        encoder, vectors = ready()
        embedded = embed(block.select_columns(["id", "text"]), encoder)
        return _labelled(embedded, vectors, k, sharpness, midpoint, name)

    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=json.dumps(
            ["label_retrieval", name, space.fingerprint, k, search, sharpness, midpoint]
        ),
        block_rows=block_rows,
        output=output,
        name="label_retrieval",
    )


def build_label_index(
    model: str | Path | Encoder,
    *,
    output: Path,
    labels: LabelSpace | None = None,
    search: Search = "auto",
) -> Path:
    """Writes the folder that `label_retrieval` and others read as `index`.

    What is there already is brought to these labels: only texts that are new are encoded.

    Args:
        model: see `label_retrieval`, as for `labels`.
        output: the folder.
        labels: see there.
        search: see there.

    Raises:
        ValueError: what is there was made by another model, or `labels` is missing.
    """
    towers = _towers(model)
    space = _space(towers, labels)
    _vectors(space, towers.load()[1], towers, output, search)
    return output


def label_nearest(
    dataset: Dataset,
    index: LabelIndex | Path,
    *,
    k: int = 100,
    scale: float = SCALE,
    midpoint: float = 0.5,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """`label_retrieval` of rows that have a `vector` already (`llmlabel.label.embedding.embed`).

    Args:
        dataset: rows with `id`, `text` and `vector`, of the encoder that reads texts.
        index: the labels, or the folder of `build_label_index`.
        k: see `label_retrieval`, as for all that follows.
        scale: see there.
        midpoint: see there.
        block_rows: see there.
        output: see there.
    """
    _check_k(k)
    require_columns(dataset, "id", "text", "vector")
    index = opened(index)
    check_sharpness(scale, midpoint, multilabel=index.labels.multilabel)
    name = f"retrieval:{index.encoder}:{index.labels.fingerprint[:8]}"
    kept = ("error",) if "error" in dataset.column_names else ()
    key = ["label_nearest", name, index.labels.fingerprint, k, scale, midpoint]
    if output is not None:
        key += [index.sha, index.graph is not None]
    return map_blocks(
        dataset,
        lambda block: _labelled(block, index, k, scale, midpoint, name),
        columns=LABEL_COLUMNS,
        key=json.dumps(key),
        reads=("vector", *kept),
        block_rows=block_rows,
        output=output,
        name="label_nearest",
    )


def stored_recall(
    dataset: Dataset, labels: LabelSpace, *, ks: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
) -> dict[str, float]:
    """`R@k`: the share of a row's true labels among the first k that it stores, over rows with gold.

    The last one is the ceiling of everything that chooses among stored labels. Rows of unknown gold
    and rows of none of the labels do not count; a row that stores nothing finds nothing.

    Raises:
        ValueError: no row has a true label.
    """
    gold = label_csr(dataset, labels)
    rows = np.flatnonzero(np.diff(gold.indptr))
    if not len(rows):
        raise ValueError("stored_recall: no row has a true label in `gold`, so nothing to find")
    scores = counted(dataset, labels)[rows]
    found = ranking_scores(scores, gold[rows], ks=ks)
    return {f"R@{k}": found[f"R@{k}"] for k in ks}


def stored_candidates(dataset: Dataset, labels: LabelSpace, *, k: int = 20) -> Dataset:
    """Adds `candidates`: the first `k` labels that each row stores, for a language model to choose.

    `llmlabel.label.direct.label_direct` and others read the column; what they answer is one more
    source of `llmlabel.label.score_fusion`. A row without a soft label has null, which is all labels.

    Raises:
        ValueError: `k` is below 1, or the soft labels are of another label space.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of candidates; got {k}")
    SoftLabels.from_dataset(dataset, labels)  # refuses soft labels of another space
    lists = arrow_table(dataset.select_columns(["label_ids"]))["label_ids"].to_pylist()
    found = [some[:k] if some else None for some in lists]
    return with_columns(dataset, {"candidates": (found, List(Value("int32")))})


# ------------------------------------------------------------------------------ what reads and what is read


@dataclass(frozen=True)
class _Towers:
    """Who reads texts and labels, before anything is loaded; `labels` are those trained on."""

    name: str
    labels: LabelSpace | None
    scale: float
    load: Callable[[], tuple[Encoder, Encoder]]
    index: Path | None = None


def _towers(model: str | Path | Encoder) -> _Towers:
    folder = models.local_path(model) if isinstance(model, str | Path) else None
    if folder is None or not (folder / "model_card.json").is_file():
        name = encoder_name(model, ["a text", "another"])

        def one() -> tuple[Encoder, Encoder]:
            encoder: Any = models.load_encoder(model)
            return encoder, encoder

        return _Towers(name, None, SCALE, one)
    if not (folder / "encoder").is_dir():
        raise ValueError(
            f"model folder {folder}: it is of a student that reads texts alone, not of a dual encoder; "
            "use the predict function of its trainer, or give a folder of train_dual_encoder"
        )
    with models.loading(folder):
        card = json.loads((folder / "model_card.json").read_text("utf-8"))
        scale = 1 / float(card["settings"]["temperature"])
        made_of = models.model_name(card["model"])
    parts = [folder / part for part in ("model_card.json", "encoder", "label_encoder")]
    shas = " ".join(models.model_sha(part) for part in parts if part.exists())

    def both() -> tuple[Encoder, Encoder]:
        from llmlabel.train.dual_encoder import load_dual_encoder

        dual = load_dual_encoder(folder)
        return dual.texts, dual.labels

    name = f"dual_encoder:{made_of}@{hashlib.sha256(shas.encode()).hexdigest()[:16]}"
    return _Towers(name, load_labels(folder / "labels.json"), scale, both, folder / "index")


def _space(towers: _Towers, labels: LabelSpace | None) -> LabelSpace:
    space = towers.labels if labels is None else labels
    if space is None:
        raise ValueError("labels= is missing: an encoder that nobody trained has none of its own")
    return space


def opened(index: LabelIndex | Path) -> LabelIndex:
    """An index, also one that is given by its folder."""
    return load_index(index) if isinstance(index, Path) else index


def _vectors(
    labels: LabelSpace, encoder: Encoder, towers: _Towers, output: Path | None, search: Search
) -> LabelIndex:
    """The vectors of the labels: as they are kept, brought to what is asked for, or computed."""
    folder = output or towers.index
    if folder is None or not (folder / "index.json").is_file():
        found = label_index(labels, encoder, search=search, name=towers.name)
    else:
        kept = load_index(folder)
        if kept.labels.fingerprint == labels.fingerprint:
            check_encoder(kept, encoder)
            found = searched(kept, search)
        else:
            found = searched(updated(kept, labels, encoder), search)
        if found is kept:
            return found
    if output is not None:
        save_index(found, output)
    return found


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, the number of labels to store; got {k}")


def _sharpness(towers: _Towers, labels: LabelSpace, midpoint: float) -> float:
    """Where none is given."""
    if not labels.multilabel:
        return towers.scale
    scale = min(towers.scale, SCALE)
    return min(scale, _MOST / (1 - midpoint)) if midpoint < 1 else scale


def check_sharpness(scale: float, midpoint: float, *, multilabel: bool) -> None:
    """Raises a ValueError for numbers without a meaning, or that lose the order of the labels."""
    if not 0 < scale < np.inf:
        raise ValueError(f"scale must be above 0, the sharpness of the probabilities; got {scale}")
    if not -1 <= midpoint <= 1:
        raise ValueError(f"midpoint is a cosine, from -1 to 1; got {midpoint}")
    if multilabel and scale * (1 - midpoint) > _MOST * (1 + 1e-9):  # rounding of `_sharpness`
        raise ValueError(
            f"scale x (1 - midpoint) must be at most {_MOST:g} in a multi-label space, or near labels "
            f"all have probability 1 and no order; got scale={scale:g} and midpoint={midpoint:g}"
        )


def _labelled(
    block: Dataset, index: LabelIndex, k: int, scale: float, midpoint: float, name: str
) -> Dataset:
    """The soft labels of rows that have vectors, or say why they have none."""
    vectors, rows = readable_vectors(block)
    probs = csr_array((len(block), len(index.labels)))
    if len(rows):
        ids, cosines = index.search(vectors, k=k)
        values = probabilities(cosines, scale, midpoint, multilabel=index.labels.multilabel)
        at = np.repeat(rows, ids.shape[1])
        probs = csr_array((values.ravel(), (at, ids.ravel())), shape=probs.shape)
    return with_labels(block, probs, rows, index.labels, name)


def probabilities(
    cosines: Float[np.ndarray, "rows k"], scale: float, midpoint: float, *, multilabel: bool
) -> Float[np.ndarray, "rows k"]:
    """See `label_retrieval`; none is 0, which would be a label not stored."""
    if multilabel:
        logits = np.clip(scale * (cosines - midpoint), -80.0, 80.0)
        return 1.0 / (1.0 + np.exp(-logits))
    odds = np.exp(np.maximum(scale * (cosines - cosines.max(axis=1, keepdims=True)), -80.0))
    shares: np.ndarray = odds / odds.sum(axis=1, keepdims=True)
    return shares
