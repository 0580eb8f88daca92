"""Prediction sets of a cheap classifier prune the labels that SmolLM2-135M is asked for.

    python benchmarks/prune_labels.py ../shared/data --rows 60

banking77: TF-IDF and logistic regression on 3,000 train rows make the sets, thresholds come from 1,000
other train rows. Tokens are counted over all 3,080 test rows; `--rows` of them are labelled by SmolLM2,
with all 77 labels and with those of the sets. Writes benchmarks/results/prune_labels.md.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import training
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from llmlabel import models
from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.data import gold_index
from llmlabel.engine.hf import HFEngine
from llmlabel.label.direct import label_direct
from llmlabel.label.prune_labels import label_pruned, measure_pruning, prune_labels
from llmlabel.metrics import accuracy
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

ALPHAS = (0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    given = parser.parse_args()
    train, test, labels = training.rows_of("banking77", given.data)
    order = np.random.default_rng(0).permutation(len(train))
    fit, held = train.select(order[:3000]), train.select(order[3000:4000])
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=30, max_iter=300)
    model.fit(vectors.fit_transform(fit["text"][:]), gold_index(fit, labels))

    def soft(rows: Dataset) -> Dataset:
        probs = np.zeros((len(rows), len(labels)))
        probs[:, model.classes_] = model.predict_proba(vectors.transform(rows["text"][:]))
        plain = rows.remove_columns([c for c in LABEL_COLUMNS if c in rows.column_names])
        return SoftLabels.from_dense(probs, labels).add_to(plain)

    def right(rows: Dataset) -> float:
        return accuracy(SoftLabels.from_dataset(rows, labels).dense(), gold_index(rows, labels))

    held, test = soft(held), soft(test)
    few = training.some(test, given.rows)
    asked = few.remove_columns([c for c in LABEL_COLUMNS if c in few.column_names])
    started = time.process_time()
    whole = label_direct(asked, HFEngine(models.SMOLLM2), labels)
    seconds = time.process_time() - started
    lines = [
        "# Sets that prune a prompt: banking77",
        "",
        f"Written by `python benchmarks/prune_labels.py ../shared/data --rows {given.rows}`.",
        "",
        f"TF-IDF and logistic regression on 3,000 rows: accuracy {right(test):.3f} on 3,080 test rows. "
        "LAC sets from 1,000 calibration rows; a row with one label in its set is not asked. Tokens are "
        "those sent, of all test rows (partly estimated); most of what is saved is rows not asked.",
        "",
        f"SmolLM2-135M on {len(few)} of the rows, all 77 labels: accuracy {right(whole):.3f}, "
        f"{seconds:.0f} s of the processor; the classifier on these rows {right(few):.3f}.",
        "",
        "| alpha | true label pruned (95 % interval) | rows asked | labels listed | tokens saved | "
        "SmolLM2 with the sets | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for alpha in ALPHAS:
        threshold = fit_conformal(held, labels, alpha=alpha)
        found = measure_pruning(
            prune_labels(predict_sets(test, labels, threshold), labels),
            labels,
            models.fetch(models.SMOLLM2),
            alpha=alpha,
        )
        pruned = prune_labels(predict_sets(few, labels, threshold), labels)
        started = time.process_time()
        said = label_pruned(pruned, HFEngine(models.SMOLLM2), labels)
        seconds = time.process_time() - started
        low, high = found.missed_interval or (0.0, 1.0)
        lines.append(
            f"| {alpha} | {found.missed:.3f} ({low:.3f} to {high:.3f}) | {found.asked} | "
            f"{found.mean_labels:.1f} | {found.saved:.1%} | {right(said):.3f} | {seconds:.0f} |"
        )
    page = Path(__file__).parent / "results" / "prune_labels.md"
    page.write_text("\n".join([*lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
