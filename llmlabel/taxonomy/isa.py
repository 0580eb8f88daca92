"""Which types are kinds of which others: is-a edges with a probability each.

Task C of "Heterogeneous LLM Methods for Ontology Learning" (arXiv 2508.19428): a light attention
layer learns from known pairs, proposes the most probable parents of every label, and a language
model may judge these. `llmlabel.taxonomy.edges` makes a label space of them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.special import expit

from llmlabel import models
from llmlabel.data import require_columns, split
from llmlabel.files import commit, write_text
from llmlabel.label.embedding import Encoder, encoder_name, unit_vectors
from llmlabel.label.shortlist import top_k
from llmlabel.labelspace import LabelSpace
from llmlabel.taxonomy.attention import Children, TaxonomyAttention, log_mass, train_attention
from llmlabel.taxonomy.edges import best_threshold, logistic

_PROBE = ("living thing", "animal", "vehicle", "place")
"""Texts whose vectors tell whether an encoder is the one that a layer was trained with."""
_LEAST = -30.0
"""Log-mass below it counts as it."""


def isa_pairs(labels: LabelSpace) -> Dataset:
    """The edges of a label space as `child` and `parent`, texts; null is the parent of a root."""
    texts = labels.texts()
    rows = [
        (texts[child], texts[parent] if parent >= 0 else None)
        for child, parents in enumerate(labels.parent_positions)
        for parent in parents or (-1,)
    ]
    kinds = pa.schema([("child", pa.string()), ("parent", pa.string())])
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return Dataset(pa.Table.from_arrays(columns, schema=kinds))


def fit_isa(
    pairs: Dataset,
    encoder: str | Path | Encoder,
    *,
    output: Path,
    heads: int = 4,
    num_train_epochs: int = 20,
    learning_rate: float = 1e-3,
    unseen: Literal["child", "parent"] = "child",
    seed: int = 0,
) -> Path:
    """Learns from known pairs which texts are parents of which, and writes the layer.

    A fifth of the children (or the children of a fifth of the parents, by `unseen`) is first left
    out, by a hash of their text. On these, against all texts of the pairs, are chosen: the number of
    epochs and a threshold by the F1 of edges, and the curve that turns mass into a probability
    (Platt 1999). Then all pairs are learned.

    Differs from the paper: it validates on the test part, on balanced blocks of 32 by 32. Vectors
    are never trained, as in its frozen variant.

    Args:
        pairs: rows with `child` and `parent`, texts; a null parent says that there is none.
        encoder: path, hub name, `package:` source, or anything with `encode`.
        output: folder of the layer.
        heads: of `TaxonomyAttention`.
        num_train_epochs: the most epochs.
        learning_rate: its peak.
        unseen: what the validation part has not been trained on: new children of known parents, or
            new parents.
        seed: of the split, the start and the order.

    Returns:
        `output`.

    Raises:
        ValueError: there are too few pairs to hold some out.
    """
    texts, edges = _graph(pairs)
    held = _held_out(texts, edges, unseen=unseen, seed=seed)
    ready = models.load_encoder(encoder)
    vectors = unit_vectors(ready, texts)
    schedule: dict[str, Any] = {
        "epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    chosen = _validated(vectors, edges, held, heads=heads, schedule=schedule)
    network = TaxonomyAttention(vectors.shape[1], heads=heads, seed=seed)
    everyone = _children(vectors, edges, range(len(texts)))
    losses = train_attention(network, everyone, _tensor(vectors), stop=chosen["epoch"], **schedule)
    card = {
        "encoder": encoder_name(encoder, _PROBE),
        "dim": vectors.shape[1],
        "heads": heads,
        **chosen,
        "held_out": [texts[child] for child in sorted(held)],
        "settings": {**schedule, "unseen": unseen},
        "texts": len(texts),
        "children": len(edges),
        "loss": losses,
        "versions": {name: version(name) for name in ("llmlabel", "torch")},
    }
    return _save(network, card, output)


def isa_edges(
    labels: LabelSpace,
    model: Path,
    encoder: str | Path | Encoder,
    *,
    children: list[str] | None = None,
    top: int = 5,
    block_rows: int = 128,
) -> Dataset:
    """The `top` most probable parents of every label, among all others, as a table of edges.

    One row per edge, the edges of a child together, the most probable first: `id`, `child` and
    `parent` (ids of labels), `text` and `candidate` (their texts, as `llmlabel.label.judge.judge`
    reads them), `prob`, `mass` (of the attention) and `none_mass` (that on no parent at all).

    Args:
        labels: who may be child and parent.
        model: folder that `fit_isa` wrote.
        encoder: the one that it was trained with.
        children: ids of the labels that look for parents; all when not given.
        top: edges per child; fewer where there are not so many others.
        block_rows: children scored at a time; memory grows with it, results do not change.

    Raises:
        ValueError: the encoder is another, or `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, the number of parents to propose; got {top}")
    asked = range(len(labels)) if children is None else [labels.index(one) for one in children]
    columns: dict[str, list[Any]] = {name: [] for name in ("child", "parent", "mass", "none_mass")}
    texts = labels.texts()
    isa = load_isa(model)
    place = np.array(asked, dtype=np.int64)
    at = 0
    for block in isa.log_mass(
        [texts[child] for child in asked], texts, encoder, itself=place, block_rows=block_rows
    ):
        for scores, best in zip(block, top_k(block[:, :-1], top), strict=True):
            columns["child"] += [asked[at]] * len(best)
            columns["parent"] += best
            columns["mass"] += scores[best].tolist()
            columns["none_mass"] += [scores[-1]] * len(best)
            at += 1
    pairs = list(zip(columns["child"], columns["parent"], strict=True))
    mass = np.array(columns["mass"], dtype=np.float64)
    return Dataset.from_dict(
        {
            "id": [json.dumps([labels.ids[a], labels.ids[b]]) for a, b in pairs],
            "child": [labels.ids[a] for a, _ in pairs],
            "parent": [labels.ids[b] for _, b in pairs],
            "text": [texts[a] for a, _ in pairs],
            "candidate": [texts[b] for _, b in pairs],
            "prob": isa.probability(mass).astype(np.float32),
            "mass": np.exp(mass).astype(np.float32),
            "none_mass": np.exp(columns["none_mass"]).astype(np.float32),
        }
    )


# ------------------------------------------------------------------------------- a trained layer


@dataclass(frozen=True)
class Isa:
    """A layer that `fit_isa` wrote, and its card."""

    network: TaxonomyAttention
    card: dict[str, Any]

    def log_mass(
        self,
        children: list[str],
        candidates: list[str],
        encoder: str | Path | Encoder,
        *,
        itself: Int[np.ndarray, " children"],
        block_rows: int = 128,
    ) -> Iterator[Float[np.ndarray, "rows columns"]]:
        """See `llmlabel.taxonomy.attention.log_mass`; of texts.

        Raises:
            ValueError: the encoder is not the one of the training.
        """
        if (name := encoder_name(encoder, _PROBE)) != self.card["encoder"]:
            raise ValueError(
                f"isa: the layer was trained with {self.card['encoder']}, and this is {name}; give "
                "the same encoder, or train it again"
            )
        ready = models.load_encoder(encoder)
        asked, all_vectors = unit_vectors(ready, children), unit_vectors(ready, candidates)
        return log_mass(self.network, asked, all_vectors, itself, block_rows=block_rows)

    def probability(self, log_mass: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """That an edge is true, by its mass."""
        return _probability(log_mass, self.card["slope"], self.card["intercept"])


def load_isa(folder: Path) -> Isa:
    """Reads what `fit_isa` wrote.

    Raises:
        FileNotFoundError: there is no such layer.
    """
    from safetensors.torch import load_file

    if not (folder / "isa.json").is_file():
        raise FileNotFoundError(f"{folder}: isa.json is missing; give a folder that fit_isa wrote")
    card = json.loads((folder / "isa.json").read_text("utf-8"))
    network = TaxonomyAttention(card["dim"], heads=card["heads"])
    network.load_state_dict(load_file(folder / "isa.safetensors"))
    return Isa(network, card)


def _save(network: TaxonomyAttention, card: dict[str, Any], folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "isa.json").unlink(missing_ok=True)  # a folder without it is unfinished
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    commit(folder / "isa.safetensors", lambda path: save_file(state, path))
    write_text(folder / "isa.json", json.dumps(card, indent=2))
    return folder


def _probability(
    log_mass: Float[np.ndarray, "*any"], slope: float, intercept: float
) -> Float[np.ndarray, "*any"]:
    probs: Float[np.ndarray, "*any"] = expit(slope * np.maximum(log_mass, _LEAST) + intercept)
    return probs


# ------------------------------------------------------------------------------------ training


def _graph(pairs: Dataset) -> tuple[list[str], dict[int, tuple[int, ...]]]:
    """All texts in the order of the alphabet, and child -> its parents; () for a known root."""
    require_columns(pairs, "child", "parent")
    rows = sorted(
        {
            (child, parent or "")
            for child, parent in zip(pairs["child"][:], pairs["parent"][:], strict=True)
        }
    )
    if wrong := [child for child, parent in rows if not child or child == parent]:
        raise ValueError(
            f"fit_isa: {wrong[0]!r} is an empty child or its own parent; leave this pair out"
        )
    texts = sorted({text for pair in rows for text in pair if text})
    place = {text: i for i, text in enumerate(texts)}
    found: dict[int, tuple[int, ...]] = {}
    for child, parent in rows:
        some = found.get(place[child], ())
        found[place[child]] = (*some, place[parent]) if parent else some
    return texts, found


def _held_out(
    texts: list[str], edges: dict[int, tuple[int, ...]], *, unseen: str, seed: int
) -> set[int]:
    """The children of the validation part."""
    drawn = split(
        Dataset.from_dict({"text": texts}), shares={"train": 0.8, "validation": 0.2}, seed=seed
    )["split"][:]
    if unseen == "child":
        held = {child for child in edges if drawn[child] == "validation"}
    else:
        held = {
            child
            for child, parents in edges.items()
            if any(drawn[parent] == "validation" for parent in parents)
        }
    counts = [sum(bool(edges[child]) for child in some) for some in (held, edges.keys() - held)]
    if min(counts) < 1:
        raise ValueError(
            f"fit_isa: {len(edges)} children are too few to hold some out; {counts[0]} with a "
            f"parent would be held out and {counts[1]} trained on; give more pairs, or another seed="
        )
    return held


def _validated(
    vectors: Float[np.ndarray, "texts dim"],
    edges: dict[int, tuple[int, ...]],
    held: set[int],
    *,
    heads: int,
    schedule: dict[str, Any],
) -> dict[str, Any]:
    """What the held-out children choose: the epoch, the threshold, the curve of probability."""
    network = TaxonomyAttention(vectors.shape[1], heads=heads, seed=schedule["seed"])
    taught = {child: parents for child, parents in edges.items() if child not in held}
    seen = sorted({*taught, *(parent for parents in taught.values() for parent in parents)})
    asked = np.array(sorted(held), dtype=np.int64)
    truth = np.zeros((len(asked), len(vectors)), dtype=bool)
    for row, child in enumerate(asked.tolist()):
        truth[row, list(edges[child])] = True
    pairs = np.arange(len(vectors)) != asked[:, None]  # nobody asks for itself
    best: dict[str, Any] = {"f1": -1.0}
    history: list[float] = []

    def look(epoch: int) -> None:
        scores = np.concatenate([*log_mass(network, vectors[asked], vectors, asked)])[:, :-1]
        threshold, f1 = best_threshold(scores[pairs], truth[pairs])
        history.append(f1)
        if f1 >= best["f1"]:  # of equal ones the last, which has seen more
            best.update(epoch=epoch, f1=f1, mass=threshold, scores=scores)

    train_attention(
        network,
        _children(vectors, taught, seen),
        _tensor(vectors[seen]),
        after_epoch=look,
        **schedule,
    )
    scores = best.pop("scores")[pairs]
    weights, intercept = logistic(np.maximum(scores, _LEAST)[:, None], truth[pairs])
    mass = np.array([best.pop("mass")])
    threshold = float(_probability(mass, float(weights[0]), intercept)[0])
    return {
        "epoch": best["epoch"],
        "threshold": threshold,
        "slope": float(weights[0]),
        "intercept": intercept,
        "validation": {"children": len(asked), "f1": best["f1"], "f1_by_epoch": history},
    }


def _children(
    vectors: Float[np.ndarray, "texts dim"], edges: dict[int, tuple[int, ...]], candidates: Any
) -> Children:
    place = {text: column for column, text in enumerate(candidates)}
    return Children(
        _tensor(vectors[list(edges)]),
        torch.tensor([place.get(child, -1) for child in edges]),
        [tuple(place[parent] for parent in some) or (len(place),) for some in edges.values()],
    )


def _tensor(vectors: Float[np.ndarray, "rows dim"]) -> torch.Tensor:
    return torch.from_numpy(vectors.astype(np.float32))
