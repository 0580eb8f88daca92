"""What it gives to choose rows, and to adapt their labels: students on Debian sections and CLINC.

    python benchmarks/selection.py --packages D/lists/..._bookworm_main_binary-amd64_Packages

The Debian texts are the synopses of the package index (see shared/data/README.md, 6.1, for the apt
commands): 16 sections, at most 500 each, split into 3,600 rows to train on, 800 to choose settings on
and the rest to test. Students are small heads on frozen MiniLM vectors of length 8. With --cache the
vectors are kept, and the parts that are not asked for by --parts. Parts are skipped when their data
are absent. Writes benchmarks/results/selection.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from selection_adapt import adapted, missing
from selection_bed import (
    SEEDS,
    Bed,
    debian,
    gold_of,
    one_hot,
    scores,
    softmax,
    spread,
    student,
    taught,
    unlike_teachers,
)
from selection_clinc import learning_with_less, queries

from llmlabel.data import load, part
from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.refine.aggregate import aggregate
from llmlabel.select import chosen, row_vectors
from llmlabel.select.duplicates import drop_near_duplicates
from llmlabel.select.prune import keep_random, keep_top
from llmlabel.select.review import review_queue
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"


# ------------------------------------------------------------------- pruning and distillation


def pruning(bed: Bed) -> str:
    """A random share of the rows, with gold, with the mean, with the teacher alone."""
    lines = [
        "## A random share of the rows, with and without a teacher (`keep_random`)",
        "",
        "The teacher is the same head, trained on all rows. KD at temperature 2, weight 1 (no gold); the "
        "mean is 0.5 / 0.5. Test accuracy, %, 5 seeds of the choice and of the student.",
        "",
        "| labels | kept | gold | mean | teacher alone | gain |",
        "|---|---|---|---|---|---|",
    ]
    x, test = row_vectors(bed.pool), row_vectors(bed.test)
    count = len(bed.labels)
    for noise, shares in ((0.0, (0.02, 0.05, 0.1, 0.3, 1.0)), (0.3, (0.05, 0.3))):
        rng = np.random.default_rng(0)
        given = gold_of(bed.pool)
        flipped = rng.uniform(size=len(given)) < noise
        given = np.where(flipped, rng.integers(count, size=len(given)), given)
        gold = one_hot(given, count)
        teacher = student(x, gold, seed=100, steps=500)
        soft = softmax(teacher(x), 2.0)
        lines.append(f"| {noise:.0%} noise | teacher | {bed.accuracy(teacher(test)):.1f} | | | |")
        for share in shares:
            found: dict[str, list[float]] = {"gold": [], "mean": [], "kd": []}
            for seed in SEEDS:
                kept = np.array(keep_random(bed.pool, share=share, seed=seed)["selected"][:])
                some = {"seed": seed}
                found["gold"].append(bed.accuracy(student(x[kept], gold[kept], **some)(test)))
                both = mixed_loss(gold[kept], soft[kept])
                found["mean"].append(
                    bed.accuracy(student(x[kept], gold[kept], loss=both, **some)(test))
                )
                found["kd"].append(
                    bed.accuracy(student(x[kept], soft[kept], temperature=2.0, **some)(test))
                )
            gain = np.mean(found["kd"]) - np.mean(found["gold"])
            cells = " | ".join(spread(values) for values in found.values())
            lines.append(f"| {noise:.0%} noise | {share:.0%} | {cells} | {gain:+.1f} |")
    return "\n".join(lines) + "\n"


def mixed_loss(
    gold: np.ndarray, soft: np.ndarray
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Half cross-entropy with gold, half with the teacher at temperature 2."""
    hard, given = torch.from_numpy(gold).float(), torch.from_numpy(soft).float()

    def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        kd = 4 * soft_cross_entropy(logits / 2, given[rows])
        return 0.5 * soft_cross_entropy(logits, hard[rows]) + 0.5 * kd

    return loss


# ------------------------------------------------------------------------------- a committee


def committee(bed: Bed) -> str:
    """Five unlike teachers label 2,400 texts; students of each and of all."""
    known, fresh = bed.pool.select(range(1200)), bed.pool.select(range(1200, 3600))
    sources = unlike_teachers(bed, known, fresh)
    lines = [
        "## A committee of unlike teachers (`aggregate`)",
        "",
        "2,400 texts without gold. Teachers: hashed words and hashed 4-character grams with 600 texts "
        "each, two heads on MiniLM with 300 each, zero-shot MiniLM. Accuracy, %, 5 seeds.",
        "",
        "| labels of | labels right | student |",
        "|---|---|---|",
    ]
    best = 0.0
    for name, rows in sources.items():
        values, right = taught(bed, rows)
        best = max(best, float(np.mean(values)))
        lines.append(f"| {name} | {right:.1f} | {spread(values)} |")
    for method in ("log_average", "average", "majority"):
        rows = aggregate(sources, bed.labels, method=method).remove_columns("weight")
        values, right = taught(bed, rows)
        gain = np.mean(values) - best
        lines.append(f"| all five, {method} | {right:.1f} | {spread(values)} ({gain:+.1f}) |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------- the surest rows, and a queue


def surest(bed: Bed) -> str:
    """Soft labels of a teacher with 640 gold rows: alone, on all rows, on the surest of a label."""
    gold = one_hot(gold_of(bed.pool), len(bed.labels))
    x = row_vectors(bed.pool)
    teacher = student(x[:640], gold[:640], seed=100)
    rows = SoftLabels.from_dense(softmax(teacher(x)), bed.labels).add_to(bed.pool)
    fresh = rows.select(range(640, len(rows)))
    soft = softmax(teacher(x))
    few = keep_top(fresh, bed.labels, per_label=50)
    kept = np.concatenate([np.ones(640), np.array(few["weight"][:])])
    test = row_vectors(bed.test)
    cells = {
        "gold of 640 rows": scores(bed, lambda s: student(x[:640], gold[:640], seed=s)(test)),
        "soft labels of the same rows": scores(
            bed, lambda s: student(x[:640], soft[:640], seed=s)(test)
        ),
        "soft labels of all 3,600 rows": scores(bed, lambda s: student(x, soft, seed=s)(test)),
        "and of the 50 surest of each label": scores(
            bed, lambda s: student(x, soft, weights=kept, seed=s)(test)
        ),
    }
    lines = [
        "## No gold while distilling (`keep_top`)",
        "",
        f"Teacher: a head of 640 rows with gold, {bed.accuracy(teacher(test)):.1f} %.",
        "",
        "| targets | student |",
        "|---|---|",
    ]
    lines += [f"| {name} | {spread(values)} |" for name, values in cells.items()]
    return "\n".join(lines) + "\n" + queue(bed, rows)


def queue(bed: Bed, rows: Dataset) -> str:
    """Errors that people repair in an hour."""
    fresh = rows.select(range(640, len(rows)))
    wrong = SoftLabels.from_dataset(fresh, bed.labels).dense().argmax(axis=1) != gold_of(fresh)
    queued = chosen(review_queue(fresh, bed.labels, budget_seconds=3600.0))
    wrong_ids = {id for id, bad in zip(fresh["id"], wrong, strict=True) if bad}
    found = sum(id in wrong_ids for id in queued["id"])
    seconds = [5 + 0.25 * len(text.split()) for text in fresh["text"]]
    order = np.random.default_rng(0).permutation(len(fresh))
    at_random = int((np.cumsum(np.array(seconds)[order]) <= 3600).sum())
    lucky = int(wrong[order[:at_random]].sum())
    return (
        f"\n## An hour of review (`review_queue`)\n\nOf {len(fresh)} labels {int(wrong.sum())} are "
        f"wrong. The queue has {len(queued)} rows and finds {found} of them; rows in random order, "
        f"{at_random} in the hour, {lucky}.\n"
    )


# -------------------------------------------------------------------------------- other things


def duplicates(data: Path) -> str:
    """Training rows of banking77 that repeat a test row."""
    table = load(data / "banking77" / "banking77.jsonl")
    train, test = part(table, split="train"), part(table, split="test")
    start = time.perf_counter()
    found = drop_near_duplicates(train, test)
    seconds = time.perf_counter() - start
    gone = [r for r in found if not r["selected"]]
    exact = sum(r["select_score"] == 1 for r in gone)
    rng = np.random.default_rng(0)
    planted = []
    for row in test.select(range(300)):
        words = row["text"].split()
        planted.append(" ".join([*words, "please"]) if rng.uniform() < 0.5 else row["text"].upper())
    copies = Dataset.from_dict({"id": [str(i) for i in range(300)], "text": planted})
    caught = 300 - sum(drop_near_duplicates(copies, test)["selected"][:])
    examples = [
        f"`{r['text'].strip()}`: {r['select_reason']}" for r in gone if r["select_score"] < 1
    ]
    return (
        "## Rows that repeat the evaluation (`drop_near_duplicates`)\n\n"
        f"banking77: {len(gone)} of {len(train)} training rows repeat one of {len(test)} test rows, "
        f"{exact} of them have all grams in common. Of 300 test rows planted in capitals or with a "
        f"word more {caught} are found. {len(train) / seconds:.0f} rows/s. For example "
        f"{examples[0] if examples else 'none'}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="Packages file of Debian bookworm main")
    parser.add_argument("--data", type=Path, default=DATA, help="shared/data")
    parser.add_argument("--cache", type=Path, help="folder of MiniLM's vectors")
    parser.add_argument("--parts", nargs="+", help="only these; the results of others stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = arguments.parts
    done = arguments.cache / "selection.json" if arguments.cache else None
    kept: dict[str, str] = json.loads(done.read_text("utf-8")) if done and done.is_file() else {}
    makers: dict[str, Callable[[], str]] = {
        "queries": lambda: queries(arguments.data, range(6), soft=True),
        "queries_hard": lambda: queries(arguments.data, range(6), soft=False),
        "llkd": lambda: learning_with_less(arguments.data, range(5)),
        "duplicates": lambda: duplicates(arguments.data),
        "missing": lambda: missing(arguments.data),
    }
    if arguments.packages and arguments.packages.is_file():
        bed = debian(arguments.packages, arguments.cache)
        makers |= {
            "pruning": lambda: pruning(bed),
            "committee": lambda: committee(bed),
            "bands": lambda: adapted(bed, arguments.cache),
            "surest": lambda: surest(bed),
        }
    else:
        print("no --packages: the parts on Debian sections are skipped")
    for name, make in makers.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        try:
            kept[name] = make()
        except FileNotFoundError as error:
            print(f"{name} is skipped: {error}")
            continue
        print(kept[name], f"({time.perf_counter() - start:.0f} s)", flush=True)
    intro = (
        "# Selected rows and adapted labels\n\n`python benchmarks/selection.py --packages PACKAGES`. "
        "Small students on one machine and one split: differences below a point are noise.\n"
    )
    order = (
        "pruning",
        "committee",
        "bands",
        "surest",
        "queries",
        "queries_hard",
        "llkd",
        "duplicates",
        "missing",
    )
    text = "\n".join([intro, *(kept[name] for name in order if name in kept)])
    (HERE / "results" / "selection.md").write_text(text, "utf-8")
    if done:
        done.write_text(json.dumps(kept, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()
