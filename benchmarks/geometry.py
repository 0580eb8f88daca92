"""Loki: how fast the mean of 100,000 labels is, and what it does for labels that were never seen.

    python benchmarks/geometry.py ../shared/data

Speed: 1,000 rows of 10 labels out of 100,000, in a random tree and with 384 numbers a label. Texts:
banking77 with half of the labels observed, MiniLM vectors, logistic regression on the train rows of
observed labels; how much to sharpen is chosen inside these rows, with half of the observed labels in
the part of the unobserved ones. Active selection: labels of hs_codes that can be reached. Writes
benchmarks/results/geometry.md.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from llmlabel.data import gold_index, load, part
from llmlabel.label.embedding import unit_vectors
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.models import MINILM, load_encoder
from llmlabel.refine.geometry import frechet_mean, frechet_predict
from llmlabel.refine.locus import next_label, reachable_labels
from llmlabel.softlabels import SoftLabels

LABELS, ROWS, SUPPORT, WIDTH, REPEATS = 100_000, 1_000, 10, 384, 5
SPLITS, BUDGET, DRAWS = 5, 100, 5
Part = tuple[np.ndarray, np.ndarray]  # vectors and true labels
Sharpening = tuple[int | None, float]  # top and temperature
SHARPENING = [(top, t) for top in (None, 5) for t in (0.5, 1.0, 2.0, 4.0)]


def speed() -> list[str]:
    rng = np.random.default_rng(0)
    ids = tuple(map(str, range(LABELS)))
    parents = ((), *((str(rng.integers(child)),) for child in range(1, LABELS)))
    tree = LabelSpace(ids, ids, ("",) * LABELS, parents)
    some = rng.integers(LABELS, size=(ROWS, SUPPORT))
    mass = rng.dirichlet(np.full(SUPPORT, 0.3), ROWS)
    bounds = np.arange(0, ROWS * SUPPORT + 1, SUPPORT)
    probs = csr_array((mass.ravel(), some.ravel(), bounds), (ROWS, LABELS))
    vectors = rng.standard_normal((LABELS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lines = []
    for name, options in {
        "random tree": {},
        f"{WIDTH} numbers a label": {"embeddings": vectors},
    }.items():
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            frechet_mean(probs, tree, **options)
            seconds.append(time.perf_counter() - started)
        lines.append(row(name, seconds))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for start in range(0, LABELS, 8192):
            _ = vectors[:ROWS] @ vectors[start : start + 8192].T
        seconds.append(time.perf_counter() - started)
    return [*lines, row("(the multiplication alone)", seconds)]


def row(name: str, seconds: list[float]) -> str:
    return f"| {name} | {seconds[0]:.2f} | {min(seconds):.2f} | {np.median(seconds):.2f} |"


def banking(folder: Path) -> tuple[Dataset, Dataset, LabelSpace]:
    names = json.loads((folder / "labels.json").read_text("utf-8"))["labels"]
    labels = load_labels([{"id": name, "name": name.replace("_", " ")} for name in names])
    rows = load(folder / "banking77.jsonl", gold="label", labels=labels)
    return part(rows, split="train"), part(rows, split="test"), labels


class LabelVectors:
    """The encoder of the labels, asked once."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str], **options: object) -> np.ndarray:  # noqa: D102
        return self.vectors


def answered(
    train: Part, vectors: np.ndarray, labels: LabelSpace, observed: np.ndarray
) -> tuple[Dataset, LabelSpace]:
    """Soft labels of the vectors over the observed labels (positions, ascending)."""
    kept = np.isin(train[1], observed)
    model = LogisticRegression(C=10, max_iter=300).fit(train[0][kept], train[1][kept])
    space = load_labels([labels.ids[label] for label in observed])
    rows = Dataset.from_dict({"id": [str(row) for row in range(len(vectors))]})
    return SoftLabels.from_dense(model.predict_proba(vectors), space).add_to(rows), space


def loki(
    soft: Dataset,
    labels: LabelSpace,
    space: LabelSpace,
    vectors: np.ndarray,
    sharpening: Sharpening,
) -> np.ndarray:
    top, temperature = sharpening
    encoder = LabelVectors(vectors)
    got = frechet_predict(
        soft, labels, observed=space, encoder=encoder, top=top, temperature=temperature, keep=1
    )
    return np.array([ids[0] for ids in got["label_ids"][:]])


def scores(
    answers: np.ndarray, gold: np.ndarray, vectors: np.ndarray, observed: np.ndarray
) -> list[float]:
    """Mean squared distance and accuracy on all rows, those of observed labels, and the others."""
    seen, right = np.isin(gold, observed), answers == gold
    far = np.square(vectors[answers] - vectors[gold]).sum(axis=1)
    return [each[some].mean() for each in (far, right) for some in (seen | True, seen, ~seen)]


def chosen_sharpening(
    train: Part, labels: LabelSpace, vectors: np.ndarray, order: np.ndarray, seed: int
) -> Sharpening:
    """Of rows of the observed labels only: half of these labels play the unobserved ones."""
    observed, shown = np.sort(order[: len(labels) // 2]), np.sort(order[: len(labels) // 4])
    inner = load_labels([{"id": labels.ids[i], "name": labels.names[i]} for i in observed])
    own = np.isin(train[1], observed)
    half = np.random.default_rng(seed).random(len(own)) < 0.5
    place = np.full(len(labels), -1)
    place[observed] = np.arange(len(observed))
    fit, held = [(train[0][some], place[train[1][some]]) for some in (own & half, own & ~half)]
    soft, space = answered(fit, held[0], inner, place[shown])
    errors = []
    for sharpening in SHARPENING:
        answers = loki(soft, inner, space, vectors[observed], sharpening)
        errors.append(scores(answers, held[1], vectors[observed], place[shown])[0])
    return SHARPENING[int(np.argmin(errors))]


def texts(folder: Path, file: Path | None) -> list[str]:
    train_set, test_set, labels = banking(folder)
    if file is not None and file.is_file():
        vectors = np.load(file)
    else:
        everything = [*train_set["text"][:], *test_set["text"][:], *labels.texts()]
        vectors = unit_vectors(load_encoder(MINILM), everything)
        if file is not None:
            np.save(file, vectors)
    rows, test_rows, names = np.split(vectors, [len(train_set), len(train_set) + len(test_set)])
    train, gold = (rows, gold_index(train_set, labels)), gold_index(test_set, labels)
    table: dict[str, list[list[float]]] = {"argmax": [], "Loki": [], "Loki, not sharpened": []}
    picked = []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(labels))
        observed = np.sort(order[: len(labels) // 2])
        picked.append(chosen_sharpening(train, labels, names, order, seed))
        soft, space = answered(train, test_rows, labels, observed)
        best = observed[SoftLabels.from_dataset(soft, space).dense().argmax(axis=1)]
        mean = loki(soft, labels, space, names, picked[-1])
        plain = loki(soft, labels, space, names, (None, 1.0))
        for name, found in zip(table, (best, mean, plain), strict=True):
            table[name].append(scores(found, gold, names, observed))
    gains = np.array(table["argmax"])[:, 0] - np.array(table["Loki"])[:, 0]
    unseen = [f"{one[5]:.3f}" for one in table["Loki"]]
    return [
        *(
            f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in np.mean(some, axis=0)) + " |"
            for name, some in table.items()
        ),
        "",
        f"Loki is nearer in {(gains > 0).sum()} of {SPLITS} splits, by {gains.min():.3f} to "
        f"{gains.max():.3f}. Its accuracy on unobserved labels, split by split: {', '.join(unseen)}. "
        f"Chosen (top, temperature): {', '.join(str(one) for one in picked)}.",
    ]


def selection(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        nodes = [json.loads(line) for line in lines]
    ids = {node["id"] for node in nodes}
    labels = load_labels(
        [
            {"id": n["id"], "name": n["id"], "parents": [n["parent"]] if n["parent"] in ids else []}
            for n in nodes
        ]
    )
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(DRAWS):
        order = rng.permutation(len(labels)).tolist()
        observed = order[:1]
        while len(observed) < BUDGET and (found := next_label(labels, observed)) is not None:
            observed.append(found)
        reached.append([len(reachable_labels(labels, some)) for some in (order[:BUDGET], observed)])
    at_random, active = np.mean(reached, axis=0)
    worse = sum(b <= a for a, b in reached)
    return (
        f"Of the {len(labels):,} labels of hs_codes {BUDGET} observed ones reach {at_random:.0f} when "
        f"drawn at random and {active:.0f} when each is the farthest from what is reached (mean of "
        f"{DRAWS} first labels; no better in {worse} of them)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with banking77 and hs_codes")
    parser.add_argument("--vectors", type=Path, help="an .npy file that keeps the vectors")
    arguments = parser.parse_args()
    if not (arguments.data / "banking77").is_dir():
        raise SystemExit(
            f"{arguments.data}: no banking77 there; this benchmark needs it and hs_codes"
        )
    lines = [
        "# Loki: the mean of a distribution instead of its top",
        "",
        "Written by `python benchmarks/geometry.py ../shared/data`.",
        "",
        f"`frechet_mean` of {ROWS:,} rows with {SUPPORT} labels each out of {LABELS:,}, seconds:",
        "",
        "| labels | first call | best | median |",
        "|---|---|---|---|",
        *speed(),
        "",
        f"banking77, half of the 77 labels observed, mean of {SPLITS} splits of the labels. Distance: "
        "mean squared, between MiniLM vectors (length 1) of the names of the answer and the true "
        "label.",
        "",
        "| answer | distance | observed | unobserved | accuracy | observed | unobserved |",
        "|---|---|---|---|---|---|---|",
        *texts(arguments.data / "banking77", arguments.vectors),
        "",
        selection(arguments.data / "hs_codes" / "hs_codes.jsonl.gz"),
    ]
    output = Path(__file__).parent / "results" / "geometry.md"
    output.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
