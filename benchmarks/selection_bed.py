"""The Debian sections, and the small students of benchmarks/selection.py and benchmarks/compress.py."""

import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, List, Value

from llmlabel import models
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.soft import soft_cross_entropy, weighted_mean
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

SECTIONS = (
    *("admin", "editors", "fonts", "games", "gnome", "graphics", "kde", "mail"),
    *("math", "net", "science", "sound", "text", "utils", "web", "x11"),
)
SEEDS = range(5)
LENGTH = 8.0  # of the students' inputs


@dataclasses.dataclass(frozen=True)
class Bed:
    """Rows with gold and `vector`, and the label vectors."""

    labels: LabelSpace
    pool: Dataset
    validation: Dataset
    test: Dataset
    anchors: Dataset

    def accuracy(self, logits: np.ndarray, rows: Dataset | None = None) -> float:
        """Per cent of rows (of the test rows) whose highest logit is gold."""
        gold = gold_of(self.test if rows is None else rows)
        return 100 * float((logits.argmax(axis=1) == gold).mean())


def gold_of(rows: Dataset) -> np.ndarray:
    return np.array([gold[0] for gold in rows["gold"]])


def debian_rows(packages: Path) -> list[tuple[str, str, str]]:
    """Name, synopsis and section of at most 500 packages of each section."""
    found, seen = [], set()
    for block in packages.read_text("utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", block, flags=re.M))
        text, section = fields.get("Description", ""), fields.get("Section", "")
        if section in SECTIONS and len(text.split()) >= 3 and text not in seen:
            seen.add(text)
            found.append((fields["Package"], text, section))
    random.Random(0).shuffle(found)
    kept: list[tuple[str, str, str]] = []
    counts = dict.fromkeys(SECTIONS, 0)
    for row in found:
        if counts[row[2]] < 500:
            counts[row[2]] += 1
            kept.append(row)
    return kept


def vectors_of(texts: list[str], cache: Path | None, name: str) -> np.ndarray:
    """MiniLM's vectors, from the cache if they are there."""
    path = cache / f"{name}.npz" if cache else None
    if path and path.is_file():
        return np.load(path)["vectors"]
    encoder = models.load_encoder(models.MINILM)
    found = encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, vectors=found)
    return found


def debian(packages: Path, cache: Path | None) -> Bed:
    labels = load_labels(
        [{"id": s, "name": s, "description": f"software package about {s}"} for s in SECTIONS]
    )
    rows = debian_rows(packages)
    vectors = vectors_of([text for _, text, _ in rows], cache, "debian")
    table = Dataset.from_dict({"id": [r[0] for r in rows], "text": [r[1] for r in rows]})
    gold = [[labels.index(r[2])] for r in rows]
    table = with_columns(
        table,
        {"gold": (gold, List(Value("int32"))), "vector": (list(vectors), List(Value("float32")))},
    )
    order = np.random.RandomState(0).permutation(len(rows))  # the split of the reference
    texts = [f"software package about {s}" for s in SECTIONS]
    anchors = with_columns(
        Dataset.from_dict({"id": list(SECTIONS)}),
        {"vector": (list(vectors_of(texts, cache, "sections")), List(Value("float32")))},
    )
    return Bed(
        labels,
        table.select(order[:3600]),
        table.select(order[3600:4400]),
        table.select(order[4400:]),
        anchors,
    )


def student(  # one plain choice each
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    temperature: float = 1.0,
    steps: int = 300,
    hidden: int = 256,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
    """A head on vectors: 384-256-labels (or linear), AdamW 5e-3, cosine, batches of 128."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.from_numpy(LENGTH * inputs).float()
        y = torch.from_numpy(targets).float()
        w = torch.ones(len(x)) if weights is None else torch.from_numpy(weights).float()
        keep = w > 0
        x, y, w = x[keep], y[keep], w[keep]
        layers = [torch.nn.Linear(x.shape[1], hidden or y.shape[1])]
        if hidden:
            layers += [torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(hidden, y.shape[1])]
        head = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            logits = head(x[rows])
            if loss is None:
                losses = temperature**2 * soft_cross_entropy(logits / temperature, y[rows])
            else:
                losses = loss(logits, rows)
            optimizer.zero_grad()
            weighted_mean(losses, w[rows]).backward()
            optimizer.step()
            schedule.step()
        head.eval()

    def predict(vectors: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return head(torch.from_numpy(LENGTH * vectors).float()).numpy()

    return predict


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def one_hot(gold: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count)[gold]


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def scores(bed: Bed, make: Callable[[int], np.ndarray]) -> list[float]:
    return [bed.accuracy(make(seed)) for seed in SEEDS]


def trained(bed: Bed, rows: Dataset, targets: np.ndarray, **options: object) -> list[float]:
    """Test accuracy of students of these rows, one a seed; `weight` counts where it is there."""
    x, test = row_vectors(rows), row_vectors(bed.test)
    if "weight" in rows.column_names:
        options["weights"] = np.array(rows["weight"][:], dtype=np.float64)
    return scores(bed, lambda seed: student(x, targets, seed=seed, **options)(test))


def taught(bed: Bed, rows: Dataset) -> tuple[list[float], float]:
    """Accuracy of students of the rows' soft labels, and of the labels."""
    probs = SoftLabels.from_dataset(rows, bed.labels).dense()
    return trained(bed, rows, probs), bed.accuracy(probs, rows)


def unlike_teachers(bed: Bed, known: Dataset, rows: Dataset) -> dict[str, Dataset]:
    """Five unlike teachers, four of which learn from 300 to 600 of the known rows, label others."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    gold, texts, x = gold_of(known), known["text"][:], row_vectors(known)
    found: dict[str, np.ndarray] = {}
    for name, start, options in (
        ("words", 0, {"ngram_range": (1, 1)}),
        ("4-characters", 600, {"analyzer": "char_wb", "ngram_range": (4, 4)}),
    ):
        reader = HashingVectorizer(n_features=2**16, alternate_sign=False, **options)
        some = slice(start, start + 600)
        linear = LogisticRegression(C=20, max_iter=300).fit(
            reader.transform(texts[some]), gold[some]
        )
        found[name] = linear.predict_proba(reader.transform(rows["text"][:]))
    for name, start in (("head A", 0), ("head B", 600)):
        some = slice(start, start + 300)
        head = student(x[some], one_hot(gold[some], len(bed.labels)), seed=11)
        found[name] = softmax(head(row_vectors(rows)))
    found["zero-shot"] = softmax(20 * row_vectors(rows) @ row_vectors(bed.anchors).T)
    return {
        name: SoftLabels.from_dense(probs, bed.labels).add_to(rows) for name, probs in found.items()
    }
