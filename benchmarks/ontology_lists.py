"""The lists of LLMs4OL and the encoders that benchmarks/ontology.py measures with."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import rankdata

from llmlabel.data import part, split
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import edge_scores
from llmlabel.models import MINILM, SMOLLM2, fetch, load_encoder
from llmlabel.taxonomy.edges import best_threshold


class Kept:
    """An encoder that computes each text once."""

    def __init__(self, encode: Callable[[list[str]], np.ndarray]) -> None:
        self.compute, self.known = encode, dict[str, np.ndarray]()

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        """One vector of length 1 per text."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            vectors = self.compute(new)
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
            self.known.update(zip(new, vectors, strict=True))
        return np.stack([self.known[text] for text in texts])


def minilm() -> Kept:
    model = load_encoder(MINILM)
    return Kept(lambda texts: unit_vectors(model, texts))


def character_grams(texts: list[str]) -> Kept:
    """TF-IDF of character n-grams, learned from these texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True).fit(texts)
    return Kept(lambda some: grams.transform(some).toarray())


def smollm2_states() -> Kept:
    """Mean of the last hidden states of SmolLM2."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = fetch(SMOLLM2)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def encode(texts: list[str]) -> np.ndarray:
        found = []
        for at in range(0, len(texts), 64):
            batch = tokenizer(texts[at : at + 64], padding=True, return_tensors="pt")
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found)

    return Kept(encode)


def readable(name: str) -> str:
    """MedicalBusiness -> Medical Business."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", name)
    return " ".join(apart.split())


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    ranks, positives = rankdata(scores), int(truth.sum())
    wins = ranks[truth].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(truth) - positives)))


class Edges:
    """One list of pairs: the full matrix of test children x all other nodes, and its truth."""

    def __init__(self, file: Path, encoder: Encoder) -> None:
        rows = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        self.pairs = {
            name: sorted(
                {(r["child"].strip(), r["parent"].strip()) for r in rows if r["split"] == name}
            )
            for name in ("train", "test")
        }
        ids = sorted({node for some in self.pairs.values() for pair in some for node in pair})
        self.labels = load_labels([{"id": id, "name": readable(id)} for id in ids])
        self.vectors = unit_vectors(encoder, self.labels.names)
        self.children = sorted({child for child, _ in self.pairs["test"]})
        self.asked = np.array([self.labels.index(child) for child in self.children])
        self.truth = self.matrix(self.children, self.pairs["test"])
        # what is known from training is neither to be found nor wrong, nor is a child itself
        known = self.matrix(self.children, self.pairs["train"])
        self.counts = ~known & (np.arange(len(self.labels)) != self.asked[:, None])

    def matrix(self, children: list[str], pairs: list[tuple[str, str]]) -> np.ndarray:
        """Which of the pairs each child and node are."""
        place = {child: row for row, child in enumerate(children)}
        found = np.zeros((len(children), len(self.labels)), dtype=bool)
        for child, parent in pairs:
            if child in place:
                found[place[child], self.labels.index(parent)] = True
        return found

    def train_pairs(self) -> Dataset:
        """What may be learned."""
        names = dict(zip(self.labels.ids, self.labels.names, strict=True))
        child, parent = zip(*self.pairs["train"], strict=True)
        return Dataset.from_dict(
            {"child": [names[c] for c in child], "parent": [names[p] for p in parent]}
        )

    def cosine_threshold(self, nodes: np.ndarray) -> float:
        """The best on all pairs of a training child and one of these nodes."""
        children = sorted({child for child, _ in self.pairs["train"]})
        rows = np.array([self.labels.index(child) for child in children])
        cosines = self.vectors[rows] @ self.vectors[nodes].T
        truth = self.matrix(children, self.pairs["train"])[:, nodes]
        apart = nodes != rows[:, None]
        return best_threshold(cosines[apart], truth[apart])[0]

    def train_nodes(self, *, parents_only: bool) -> np.ndarray:
        """Nodes of the training pairs, or only those that are parents in them."""
        pairs = self.pairs["train"]
        found = {parent for _, parent in pairs} | (
            {c for c, _ in pairs} if not parents_only else set()
        )
        return np.array(sorted(self.labels.index(node) for node in found))

    def scores(self, matrix: np.ndarray) -> str:
        """AUC and accuracy of the best parent."""
        best = np.where(self.counts, matrix, -np.inf).argmax(axis=1)
        top = self.truth[np.arange(len(best)), best].mean()
        return f"{auc(matrix[self.counts], self.truth[self.counts]):.3f} | {top:.3f}"

    def edge_scores(self, chosen: np.ndarray) -> str:
        """F1, precision and recall of chosen cells."""
        rows, columns = np.nonzero(chosen & self.counts)
        ids = self.labels.ids
        pairs = [(self.children[i], ids[j]) for i, j in zip(rows, columns, strict=True)]
        found = edge_scores(pairs, self.pairs["test"])
        return f"{found['f1']:.3f} | {found['precision']:.3f} | {found['recall']:.3f}"

    def chosen(self, tree: LabelSpace) -> np.ndarray:
        """The cells that are edges of a label space."""
        found = np.zeros(self.truth.shape, dtype=bool)
        for row, child in enumerate(self.asked):
            found[row, list(tree.parent_positions[child])] = True
        return found


def sweet(data: Path) -> tuple[Dataset, LabelSpace]:
    return typing_rows([json.loads(line) for line in (data / "typing_sweet.jsonl").open()])


def wordnet(data: Path, rows: int = 4000) -> tuple[Dataset, LabelSpace]:
    with gzip.open(data / "typing_wordnet.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    some = np.random.default_rng(0).permutation(len(lines))[:rows]
    return typing_rows([lines[i] for i in sorted(some.tolist())])


def typing_rows(lines: list[dict[str, Any]]) -> tuple[Dataset, LabelSpace]:
    types = load_labels(sorted({line["labels"][0] for line in lines}))
    rows = {
        "id": [f"t{i}" for i in range(len(lines))],  # the ids of the file leak answers
        "text": [line["text"] for line in lines],
        "sentence": [line.get("sentence", "") for line in lines],
        "gold": [[types.index(line["labels"][0])] for line in lines],
    }
    return Dataset.from_dict(rows), types


def parts(rows: Dataset, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Train, validation, test by a hash of the words of the term; then the sentence is added."""
    drawn = split(rows, shares={"train": 0.6, "validation": 0.2, "test": 0.2}, seed=seed)
    texts = [
        f"{row['text']}: {row['sentence']}" if row["sentence"] else row["text"] for row in drawn
    ]
    whole = drawn.rename_column("text", "term").add_column("text", texts)
    train, validation, test = (part(whole, split=s) for s in ("train", "validation", "test"))
    return train, validation, test
