"""What shortlists and demonstrations do for `label_direct` with SmolLM2 on banking77 (77 labels).

    python benchmarks/direct.py ../shared/data/banking77

Test rows are drawn with seed 0, demonstrations come from the train rows and their gold labels.
Writes benchmarks/results/direct.md. Bias correction is left out: it needs about as many rows as
there are labels, and each row here has another ten of them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from datasets import Dataset

from llmlabel.data import gold_index, load, part
from llmlabel.engine.hf import HFEngine
from llmlabel.label.demonstrations import choose_demonstrations, rows_in_pool
from llmlabel.label.direct import label_direct
from llmlabel.label.judge import judge, probe_auc, probe_pairs
from llmlabel.label.shortlist import shortlist, shortlist_recall
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import accuracy, binomial_interval, nll
from llmlabel.models import MINILM, SMOLLM2, load_encoder
from llmlabel.softlabels import SoftLabels

RECALL_ROWS, LABEL_ROWS, JUDGE_ROWS = 300, 100, 100
K, SHOWN = 10, 4


def banking(folder: Path) -> tuple[Dataset, Dataset, LabelSpace]:
    """Train rows, test rows in random order, labels."""
    names = json.loads((folder / "labels.json").read_text("utf-8"))["labels"]
    labels = load_labels([{"id": name, "name": name.replace("_", " ")} for name in names])
    rows = load(folder / "banking77.jsonl", gold="label", labels=labels)
    test = part(rows, split="test")
    order = np.random.default_rng(0).permutation(len(test))
    return part(rows, split="train"), test.select(order), labels


def labelled(name: str, rows: Dataset, engine: HFEngine, labels: LabelSpace) -> str:
    """One row of the table of accuracies."""
    started = time.perf_counter()
    got = label_direct(rows, engine, labels)
    seconds = time.perf_counter() - started
    probs, gold = SoftLabels.from_dataset(got, labels).dense(), gold_index(rows, labels)
    right = accuracy(probs, gold)
    low, high = binomial_interval(round(right * len(gold)), len(gold))
    errors = sum(error is not None for error in got["error"][:])
    return (
        f"| {name} | {right:.3f} | {low:.3f} to {high:.3f} | {nll(probs, gold):.2f} | "
        f"{np.mean(got['label_mass'][:]):.3f} | {errors} | {len(rows) / seconds:.1f} |"
    )


def nearest_right(rows: Dataset, labels: LabelSpace) -> float:
    """How often the demonstration beside the text, the most similar one, has the row's label."""
    nearest = [labels.index(shown[-1]["label"]) for shown in rows["demonstrations"][:]]
    return float((np.array(nearest) == gold_index(rows, labels)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of banking77")
    train, test, labels = banking(parser.parse_args().data)
    encoder, engine = load_encoder(MINILM), HFEngine(SMOLLM2)
    listed = shortlist(test.select(range(RECALL_ROWS)), encoder, labels, k=20)
    recall = shortlist_recall(listed, labels)
    few = shortlist(test.select(range(LABEL_ROWS)), encoder, labels, k=K)
    near = choose_demonstrations(few, train, labels, n=SHOWN, method="similarity", encoder=encoder)
    fixed = choose_demonstrations(few, train, labels, n=SHOWN, method="fixed")
    probe = probe_auc(judge(probe_pairs(test.select(range(JUDGE_ROWS)), labels), engine))
    lines = [
        "# Shortlists, demonstrations and the judge: SmolLM2-135M and MiniLM on banking77",
        "",
        "Written by `python benchmarks/direct.py ../shared/data/banking77`.",
        "",
        f"Recall of MiniLM's shortlist ({RECALL_ROWS} test rows): "
        + ", ".join(f"{share:.3f} at {k}" for k, share in recall.items())
        + ".",
        "",
        f"Labels of {LABEL_ROWS} test rows, without bias correction; of these "
        f"{rows_in_pool(few, train)} also stand in the "
        f"train rows, and are not shown themselves. Shortlist of {K}; the first candidate alone is "
        f"right for {shortlist_recall(few, labels)[1]:.3f}, any of them for "
        f"{shortlist_recall(few, labels)[K]:.3f}. The label of the nearest demonstration alone, "
        f"without a language model, is right for {nearest_right(near, labels):.3f}. A true label "
        "outside the shortlist counts in the NLL with a probability of 1e-12.",
        "",
        "| prompt | accuracy | 95 % interval | NLL | label mass | errors | texts/s |",
        "|---|---|---|---|---|---|---|",
        labelled(f"{K} candidates", few, engine, labels),
        labelled(f"{K} candidates, {SHOWN} demonstrations by similarity", near, engine, labels),
        labelled(f"{K} candidates, {SHOWN} fixed demonstrations", fixed, engine, labels),
        "",
        f"Judge (`label/judge`) on {int(probe['positives'])} true and {int(probe['negatives'])} "
        f"random false pairs of test text and label: AUC {probe['auc']:.3f}.",
    ]
    output = Path(__file__).parent / "results" / "direct.md"
    output.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
