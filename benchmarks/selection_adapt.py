"""Adapted labels for benchmarks/selection.py: bands and mixtures with gold, labels that are missing."""

import re
from pathlib import Path

import numpy as np
from datasets import Dataset, List, Value
from selection_bed import Bed, gold_of, one_hot, softmax, spread, student, taught, vectors_of

from llmlabel.data import load, part, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.adapt import adapt_bands, correct_missing, mix_gold
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels


def crops(bed: Bed, cache: Path | None) -> Dataset:
    """Four word spans, 25 to 100 % of the words, of each of the pool's first 900 texts."""
    rng = np.random.default_rng(0)
    ids, texts, gold = [], [], []
    for row in bed.pool.select(range(900)):
        words = row["text"].split()
        for number in range(4):
            size = max(round(rng.uniform(0.25, 1) * len(words)), 1)
            start = int(rng.integers(len(words) - size + 1))
            ids.append(f"{row['id']}/{number}")
            texts.append(" ".join(words[start : start + size]))
            gold.append(row["gold"])
    return with_columns(
        Dataset.from_dict({"id": ids, "text": texts}),
        {
            "gold": (gold, List(Value("int32"))),
            "vector": (list(vectors_of(texts, cache, "crops")), List(Value("float32"))),
        },
    )


def adapted(bed: Bed, cache: Path | None) -> str:
    """FerKD's bands, with a weak and a good teacher; the cuts are chosen on validation rows."""
    rows = crops(bed, cache)
    x = row_vectors(rows)
    whole = row_vectors(bed.pool)
    good = student(whole, one_hot(gold_of(bed.pool), len(bed.labels)), seed=100, steps=500)
    weak = softmax(20 * x @ row_vectors(bed.anchors).T)
    lines = [
        "## Bands on views of a text (`adapt_bands`, `mix_gold`)",
        "",
        "900 texts with gold, four word spans each, labelled by the teacher; smoothing 0.1. Bands are "
        "the best of four by students on the validation rows. Test accuracy, %, 5 seeds.",
        "",
        "| targets | zero-shot teacher | teacher of all 3,600 rows |",
        "|---|---|---|",
    ]
    table: dict[str, list[str]] = {}
    for probs in (weak, softmax(good(x))):
        labelled = SoftLabels.from_dense(probs, bed.labels).add_to(rows)
        ways = {
            f"teacher alone, {bed.accuracy(probs, rows):.0f} % right": labelled,
            "gold, smoothed": adapt_bands(
                labelled, bed.labels, statistic="gold", cuts=(0.5,), actions=("soften", "soften")
            ),
            "mean of both": mix_gold(labelled, bed.labels, kd_weight=0.5),
            "bands, gold probability": best_bands(bed, labelled, "gold"),
            "bands, largest probability": best_bands(bed, labelled, "max"),
        }
        for name, adapted_rows in ways.items():
            key = re.sub(r", \d+ % right", "", name)
            values, _ = taught(bed, adapted_rows)
            right = f" ({name.rpartition(', ')[2]})" if "right" in name else ""
            table.setdefault(key, []).append(spread(values) + right)
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in table.items()]
    return "\n".join(lines) + "\n"


def best_bands(bed: Bed, rows: Dataset, statistic: str) -> Dataset:
    """The bands whose students are best on the validation rows."""
    inputs, unseen = row_vectors(rows), row_vectors(bed.validation)

    def right(cuts: tuple[float, float, float]) -> float:
        some = adapt_bands(rows, bed.labels, statistic=statistic, cuts=cuts)
        probs = SoftLabels.from_dataset(some, bed.labels).dense()
        weights = np.array(some["weight"][:])
        found = [
            bed.accuracy(student(inputs, probs, weights=weights, seed=seed)(unseen), bed.validation)
            for seed in (50, 51)
        ]
        return float(np.mean(found))

    choices = [(0.01, 0.3, 0.99), (0.02, 0.5, 0.99), (0.05, 0.2, 0.95), (0.001, 0.7, 0.999)]
    return adapt_bands(rows, bed.labels, statistic=statistic, cuts=max(choices, key=right))


def missing(data: Path) -> str:
    """40 % of the gold labels of GoEmotions are deleted, and corrected."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    table = load(data / "goemotions" / "goemotions.jsonl.gz")
    rows = part(table, split="train").select(range(8000))
    labels = load_labels(sorted({label for r in rows for label in r["labels"]}), multilabel=True)
    truth = [{labels.index(label) for label in r["labels"]} for r in rows]
    rng = np.random.default_rng(0)
    kept = [sorted(c for c in some if rng.uniform() >= 0.4) for some in truth]
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(rows["text"][:])
    present = np.zeros((len(rows), len(labels)), dtype=int)
    for i, some in enumerate(kept):
        present[i, some] = 1
    half = np.arange(len(rows)) % 2
    probs = np.zeros(present.shape)
    for fold in (0, 1):  # a row is never labelled by a model that has seen it
        model = OneVsRestClassifier(LogisticRegression(C=5)).fit(
            words[half == fold], present[half == fold]
        )
        probs[half != fold] = model.predict_proba(words[half != fold])
    given = with_columns(rows, {"gold": (kept, List(Value("int32")))})
    given = SoftLabels.from_dense(probs, labels).add_to(given)
    lines = [
        "## Labels that are missing (`correct_missing`)",
        "",
        "GoEmotions, 8,000 rows, 40 % of the labels deleted; TF-IDF and logistic regression, each half "
        "of the rows labelled by the model of the other half.",
        "",
        "| tau | labels added | of them deleted before, % | of the deleted found, % |",
        "|---|---|---|---|",
    ]
    deleted = sum(len(some) - len(left) for some, left in zip(truth, kept, strict=True))
    for tau in (0.3, 0.5, 0.7):
        added = correct_missing(given, labels, tau=tau)["added_ids"][:]
        right = sum(len(set(some) & true) for some, true in zip(added, truth, strict=True))
        total = sum(map(len, added))
        lines.append(
            f"| {tau} | {total} | {100 * right / max(total, 1):.0f} | {100 * right / deleted:.1f} |"
        )
    return "\n".join(lines) + "\n"
