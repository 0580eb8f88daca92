"""The whole path of a soft label in one table: sources, their aggregates, students of each, stores.

    python benchmarks/softlabels.py --work /tmp/softlabels --packages D/lists/..._Packages

BBC News (texts of 25 words): SmolLM2 and zero-shot MiniLM as in recipes/quickstart.yaml, the rules
of recipes/weak.yaml, and k-NN from 5 gold rows a section. Debian sections: the five unlike teachers
of benchmarks/selection.py. Each source and each aggregate labels all rows; a small head on MiniLM's
vectors learns what it says about the train rows. The aggregate of the lowest NLL on validation rows
is then stored in few bytes. --work keeps vectors, answers of the language model and the lines of
each data set, so that --cases may ask for one at a time. A data set that is not there is skipped.
Writes benchmarks/results/softlabels.md.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from annotators import METHODS
from datasets import Dataset, Value, concatenate_datasets
from selection_bed import SEEDS, Bed, debian, gold_of, one_hot, spread, trained, unlike_teachers
from weak import Remembers

from llmlabel import metrics, models
from llmlabel.calibrate.temperature import apply_temperature, fit_temperature
from llmlabel.data import first_words, gold_index, load, part, split, with_columns
from llmlabel.engine.hf import HFEngine
from llmlabel.files import write_text
from llmlabel.label.direct import label_direct
from llmlabel.label.embedding import embed, embed_labels, label_embedding
from llmlabel.label.neighbours import label_neighbours
from llmlabel.label.weak import label_weak
from llmlabel.labelspace import load_labels
from llmlabel.recipe import load_recipe
from llmlabel.refine.aggregate import aggregate, committee_weights
from llmlabel.refine.codecs import Dense, TopK, TwoDistances
from llmlabel.refine.compress import compress, restore, store_size
from llmlabel.refine.debias import batch_calibration
from llmlabel.select import row_vectors
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
SHOTS = 5
CODECS = {
    "top 1, smoothed": TopK(1),
    "two distances": TwoDistances(),
    "top 3, 8 bits, smoothed": TopK(3, bits=8),
    "all, 32 bits": Dense(32),
}
HEADER = (
    "| data | kind | row | accuracy, % | NLL | Brier | ECE | student, % | bytes a row |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A bed, and soft labels of its pool, validation and test rows, in this order.

    `sources` are combined, `raw` is shown beside them.
    """

    name: str
    bed: Bed
    sources: dict[str, Dataset]
    raw: dict[str, Dataset]


def together(bed: Bed) -> Dataset:
    """All rows that are labelled, with the column `split`."""
    parts = {"train": bed.pool, "validation": bed.validation, "test": bed.test}
    rows = [
        with_columns(
            some.select_columns(["id", "text", "gold", "vector"]),
            {"split": ([name] * len(some), Value("string"))},
        )
        for name, some in parts.items()
    ]
    return concatenate_datasets(rows)


# -------------------------------------------------------------------------------- the data sets


def bbc(work: Path) -> Case:
    """Four sources without a common weakness; only k-NN has seen gold, of rows kept apart."""
    recipe, rules = load_recipe("quickstart").assignments, load_recipe("weak").assignments
    labels = load_labels(recipe["labels"]["source"])
    articles = load(
        recipe["articles"]["path"], gold="label", labels=labels, encoding=["utf-8", "cp1252"]
    )
    texts = first_words(articles, words=recipe["short"]["words"])
    texts = split(texts, shares={"train": 0.5, "validation": 0.15, "test": 0.35}, seed=0)
    texts = embed(texts, models.MINILM, output=work / "bbc" / "vectors")
    encoder = Remembers(models.load_encoder(models.MINILM))
    encoder.known = dict(zip(texts["text"], row_vectors(texts), strict=True))
    train, gold = part(texts, split="train"), gold_index(part(texts, split="train"), labels)
    order = np.random.default_rng(0).permutation(len(train))
    shown = np.concatenate([order[gold[order] == c][:SHOTS] for c in range(len(labels))])
    bed = Bed(
        labels,
        train.select(np.setdiff1d(order, shown)),
        part(texts, split="validation"),
        part(texts, split="test"),
        embed_labels(labels, encoder),
    )
    rows = together(bed)
    raw = label_direct(
        rows,
        HFEngine(models.SMOLLM2),
        labels,
        demonstrations=recipe["llm_raw"]["demonstrations"],
        output=work / "bbc" / "smollm2",
    )
    zero_shot = label_embedding(rows, encoder, labels)
    functions = [dict(one) for one in rules["functions"] if "question" not in one]
    voted = label_weak(rows, functions, labels, encoder=encoder)
    sources = {
        "SmolLM2, bias corrected": batch_calibration(raw, labels),
        "MiniLM, bias corrected": batch_calibration(zero_shot, labels),
        "12 rules, softmax of votes": aggregate(voted, labels, method="softmax"),
        f"k-NN, {SHOTS} gold rows a section": label_neighbours(
            rows, train.select(shown), labels, unknown=0.05
        ),
    }
    return Case("BBC", bed, sources, {"SmolLM2": raw, "MiniLM": zero_shot})


def sections(packages: Path, cache: Path) -> Case:
    """Five teachers of 1,200 gold rows (zero-shot MiniLM of none) label the 2,400 others."""
    bed = debian(packages, cache)
    known = bed.pool.select(range(1200))
    bed = dataclasses.replace(bed, pool=bed.pool.select(range(1200, 3600)))
    return Case("Debian", bed, unlike_teachers(bed, known, together(bed)), {})


# ------------------------------------------------------------------------------------ the rows


def aggregates(case: Case) -> dict[str, Dataset]:
    """Every way to make one soft label of the sources; `weight` only where its use is the point."""
    labels = case.bed.labels
    checks = {name: part(table, split="validation") for name, table in case.sources.items()}
    prior = {name: checked(case, table)[0] for name, table in case.sources.items()}
    scaled = {
        name: apply_temperature(table, labels, fit_temperature(checks[name], labels))
        for name, table in case.sources.items()
    }
    found = {
        method: aggregate(case.sources, labels, method=method)
        for method in ("average", "log_average", *METHODS)
    }
    weights = committee_weights(prior)
    found["log_average, committee weights"] = aggregate(case.sources, labels, weights=weights)
    for method in ("average", "log_average"):
        found[f"{method}, sources scaled"] = aggregate(scaled, labels, method=method)
        fitted = fit_temperature(part(found[method], split="validation"), labels)
        found[f"{method}, result scaled"] = apply_temperature(found[method], labels, fitted)
    plain = {name: table.remove_columns("weight") for name, table in found.items()}
    return plain | {"log_average, weights of the consensus": found["log_average"]}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `cells` hold pairs of numbers, of train and of test rows."""

    kind: str
    name: str
    cells: list[str]
    students: list[float]
    size: str


def measured(case: Case, kind: str, name: str, table: Dataset, *, size: str = "") -> Row:
    """What labels are worth by themselves, and to students that learn those of the train rows."""
    labels, pairs = case.bed.labels, []
    for wanted in ("train", "test"):
        if wanted not in table["split"][:]:
            pairs.append(["-"] * 4)
            continue
        rows = part(table, split=wanted)
        soft, gold = SoftLabels.from_dataset(rows, labels), gold_of(rows)
        probs = soft.dense()
        pairs.append(
            [
                f"{100 * metrics.accuracy(probs, gold):.1f}",
                f"{metrics.nll(completed(soft), gold):.2f}",
                f"{metrics.brier(probs, gold):.2f}",
                f"{metrics.ece(probs, gold):.2f}",
            ]
        )
    rows = part(table, split="train")
    soft = SoftLabels.from_dataset(rows, labels)
    labelled = np.flatnonzero(soft.dense().any(axis=1))
    if len(labelled) < len(rows):
        name = f"{name} (labels {len(labelled) / len(rows):.0%})"
    students = trained(case.bed, rows.select(labelled), completed(soft)[labelled])
    cells = [" / ".join(pair) for pair in zip(*pairs, strict=True)]
    return Row(kind, name, cells, students, size or f"{4 * len(labels)}")


def completed(soft: SoftLabels) -> np.ndarray:
    """All probabilities, what a row misses spread over the labels that it does not store."""
    return np.exp(soft.log_dense())


def checked(case: Case, table: Dataset) -> tuple[float, float]:
    """Accuracy and NLL of the labels of the validation rows."""
    rows = part(table, split="validation")
    soft, gold = SoftLabels.from_dataset(rows, case.bed.labels), gold_of(rows)
    return metrics.accuracy(soft.dense(), gold), metrics.nll(completed(soft), gold)


def stores(case: Case, table: Dataset) -> list[Row]:
    """What is left of the train rows' labels after they were written in few bytes."""
    labels, rows = case.bed.labels, part(table, split="train")
    found = []
    for codec_name, codec in CODECS.items():
        with tempfile.TemporaryDirectory() as folder:
            store = compress(rows, labels, codec=codec, output=Path(folder) / "store")
            back = SoftLabels.from_dataset(restore(store, labels), labels)
            cost = store_size(store)
        size = f"{cost.payload_bytes} ({cost.bytes_per_row:.0f})"
        found.append(measured(case, "store", codec_name, back.add_to(rows), size=size))
    hard = one_hot(SoftLabels.from_dataset(rows, labels).dense().argmax(axis=1), len(labels))
    hard_rows = SoftLabels.from_dense(hard, labels).add_to(rows)
    return [*found, measured(case, "store", "hard label", hard_rows, size="1")]


def report(case: Case) -> tuple[list[str], str]:
    """The lines of the table, and a sentence on what validation rows chose."""
    bed = case.bed
    rows = [measured(case, "raw", name, table) for name, table in case.raw.items()]
    combined = aggregates(case)
    single = max(case.sources, key=lambda name: checked(case, case.sources[name])[0])
    best = min(combined, key=lambda name: checked(case, combined[name])[1])
    means: dict[str, float] = {}  # of students
    for kind, tables in (("source", case.sources), ("aggregate", combined)):
        for name, table in tables.items():
            row = measured(case, kind, name, table)
            means[name] = float(np.mean(row.students))
            if name in (single, best):
                row = dataclasses.replace(row, name=f"**{row.name}**")
            rows.append(row)
    kept = stores(case, combined[best])
    gold = one_hot(gold_of(bed.pool), len(bed.labels))
    learned = trained(bed, bed.pool, gold)
    rows += [*kept, Row("gold", "of the train rows, to compare", [""] * 4, learned, "1")]
    lines = [
        f"| {case.name} | {row.kind} | {row.name} | {' | '.join(row.cells)} | "
        f"{spread(row.students)} | {row.size} |"
        for row in rows
    ]
    taught_best = max(case.sources, key=means.__getitem__)
    lost = ", ".join(
        f"{row.name} {np.mean(row.students) - means[best]:+.1f} at {row.size.split()[0]}"
        for row in kept
    )
    sentence = (
        f"{case.name}: {len(bed.pool):,} train, {len(bed.validation):,} validation and "
        f"{len(bed.test):,} test rows, {len(bed.labels)} labels. On validation rows {single} is the "
        f"source most often right, {best} the aggregate of the lowest NLL. Its students reach "
        f"{means[best]:.1f} %, {means[best] - means[single]:+.1f} points to those of that source, "
        f"{means[best] - means[taught_best]:+.1f} to the best of a source (by test rows, "
        f"{taught_best}); those of gold {np.mean(learned):.1f} %. From a store (points, bytes of a "
        f"row): {lost}."
    )
    return lines, sentence


NOTES = """Accuracy, NLL, Brier and ECE are of the labels, on train / test rows. NLL is in nats; a row
without a label is wrong, and has the NLL of chance. `student`: test accuracy of a small head on
MiniLM's vectors that learned the labels of the train rows, {seeds} seeds; differences below a point
are noise. `bytes a row`: 4 for each label, as float32; of a store, those of the labels (in the
file, with keys). `raw` is before bias correction, and not combined; what is chosen is **bold**.

Gold: on BBC, {shots} train rows a section are the memory of k-NN, and not among the train rows here;
on Debian four of the teachers learned from 1,200 other rows. Gold of validation rows fits
temperatures (`scaled`), weighs the committee, and chooses. Test rows only measure. Bias correction
and the methods that model annotators see all rows, without gold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--packages", type=Path, help="Packages file of Debian bookworm main")
    parser.add_argument("--cases", nargs="+", help="only these; the lines of others stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Case]] = {"BBC": lambda: bbc(arguments.work)}
    if arguments.packages and arguments.packages.is_file():
        makers["Debian"] = lambda: sections(arguments.packages, arguments.work)
    else:
        print("no --packages: Debian sections are skipped")
    done = arguments.work / "softlabels.json"
    kept = json.loads(done.read_text("utf-8")) if done.is_file() else {}
    for name, make in makers.items():
        if arguments.cases and name not in arguments.cases:
            continue
        try:
            lines, sentence = report(make())
        except FileNotFoundError as error:
            print(f"{name} is skipped: {error}")
            continue
        kept[name] = {"lines": lines, "sentence": sentence}
        write_text(done, json.dumps(kept, ensure_ascii=False, indent=1))
    found = [kept[name] for name in ("BBC", "Debian") if name in kept]
    text = "\n".join(
        [
            "# Soft labels, from sources to students",
            "",
            "`python benchmarks/softlabels.py --work FOLDER --packages PACKAGES`.",
            "",
            HEADER,
            *(line for one in found for line in one["lines"]),
            "",
            *(f"{one['sentence']}\n" for one in found),
            NOTES.format(seeds=len(SEEDS), shots=SHOTS),
            "",
        ]
    )
    write_text(HERE / "results" / "softlabels.md", text)
    print(text)


if __name__ == "__main__":
    main()
