"""What DL, DH and TMH cost and how right they are, and how fast one text walks down a large tree.

    python benchmarks/hierarchy.py ../shared/data

SmolLM2-135M and MiniLM on clinc150 (10 domains, 150 intents): accuracy against prompts and tokens of
each strategy, zero-shot and with 8 demonstrations by similarity. Then single texts down the
Harmonized System and ICD-10-CM (see label_spaces.py). Writes benchmarks/results/hierarchy.md.
The number of candidates and the way to list them were chosen on validation rows.
"""

import argparse
import gc
import json
import resource
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from label_spaces import ICD, hs_codes, icd

from llmlabel.data import gold_index, load, part, with_columns
from llmlabel.engine.hf import HFEngine
from llmlabel.label.demonstrations import choose_demonstrations, rows_in_pool
from llmlabel.label.hierarchy import label_hierarchy
from llmlabel.label.shortlist import shortlist
from llmlabel.labelspace import LabelSpace
from llmlabel.labelspace.graph import answers, node_probs
from llmlabel.metrics import binomial_interval
from llmlabel.models import MINILM, SMOLLM2, fetch, load_encoder
from llmlabel.softlabels import SoftLabels

SHOWN = 8
WALKS = 20
CHOICES = (
    "- Chosen on 60 validation rows (TMH, accuracy and computed tokens): 5 candidates with all children "
    "listed 0.283 and 69, only the candidates listed 0.167 and 111 (3 candidates: 0.317 and 50, 0.233 "
    "and 71; but MiniLM finds only 0.82 of the true intents among 3, 0.90 among 5); keep=1 and keep=2 "
    "alike. A domain once chosen wrongly costs TMH what MiniLM knew."
)
"""What was measured once, before the settings below were fixed."""


# ------------------------------------------------------------------------------------- clinc150


def clinc(folder: Path) -> tuple[dict[str, Dataset], LabelSpace]:
    """In-scope rows of each split in random order, and the tree; domains stand first."""
    tree = json.loads((folder / "taxonomy.json").read_text("utf-8"))
    nodes = [(f"domain {domain}", domain, ()) for domain in tree]
    nodes += [(one, one, (f"domain {domain}",)) for domain, some in tree.items() for one in some]
    labels = LabelSpace(
        tuple(id for id, _, _ in nodes),
        tuple(name.replace("_", " ") for _, name, _ in nodes),
        ("",) * len(nodes),
        tuple(parents for _, _, parents in nodes),
    )
    every = load(folder / "clinc150_oos.jsonl")
    inside = every.select([n for n, label in enumerate(every["label"][:]) if label != "oos"])
    gold = [[labels.index(label)] for label in inside["label"][:]]
    rows = with_columns(inside, {"gold": (gold, List(Value("int32")))})
    splits = {}
    for split in ("train", "validation", "test"):
        some = part(rows, split=split)
        splits[split] = some.select(np.random.default_rng(0).permutation(len(some)))
    return splits, labels


def with_candidates(rows: Dataset, labels: LabelSpace, encoder: Any, *, k: int) -> Dataset:
    """The `k` leaves nearest to each row."""
    leaves = labels.leaves
    flat = LabelSpace(
        tuple(labels.ids[leaf] for leaf in leaves),
        tuple(labels.names[leaf] for leaf in leaves),
        ("",) * len(leaves),
        ((),) * len(leaves),
    )
    near = shortlist(rows, encoder, flat, k=k)["candidates"][:]
    found = [[leaves[at] for at in some] for some in near]
    return with_columns(rows, {"candidates": (found, List(Value("int32")))})


@dataclass
class Measured:
    """One row of the table."""

    name: str
    rows: int
    right: float
    macro_f1: float
    domain: float
    given_domain: float
    calls: float
    tokens: float
    computed: float
    texts_per_second: float
    consistent: int
    errors: int

    @property
    def cells(self) -> str:
        """As a line of Markdown."""
        low, high = binomial_interval(round(self.right * self.rows), self.rows)
        return (
            f"| {self.name} | {self.rows} | {self.right:.3f} ({low:.2f} to {high:.2f}) "
            f"| {self.macro_f1:.3f} | {self.domain:.3f} | {self.given_domain:.3f} "
            f"| {self.calls:.2f} | {self.tokens:.0f} | {self.computed:.0f} "
            f"| {self.texts_per_second:.2f} | {self.consistent} |"
        )


def macro_f1(found: np.ndarray, gold: np.ndarray) -> float:
    """Mean F1 over the true labels of these rows."""
    scores = []
    for label in np.unique(gold):
        hits = np.sum((found == label) & (gold == label))
        scores.append(2 * hits / (np.sum(found == label) + np.sum(gold == label)))
    return float(np.mean(scores))


def measure(
    name: str, rows: Dataset, engine: HFEngine, labels: LabelSpace, **options: Any
) -> Measured:
    computed, started = engine.usage.computed_tokens, time.perf_counter()
    got = label_hierarchy(rows, engine, labels, **options)
    seconds = time.perf_counter() - started
    probs, gold = SoftLabels.from_dataset(got, labels).dense(), gold_index(rows, labels)
    mass = node_probs(probs, labels)
    domains = np.array([labels.parent_positions[leaf][0] for leaf in gold])
    roots = np.array(labels.roots)
    domain_right = roots[mass[:, roots].argmax(axis=1)] == domains
    within = [
        max(labels.children[d], key=row.__getitem__) == leaf
        for d, row, leaf in zip(domains, mass, gold, strict=True)
    ]
    below = [[mass[:, c] for c in labels.children[d]] for d in labels.roots]
    least = np.array([np.max(some, axis=0) for some in below]).T
    found = answers(probs, labels)
    one = Measured(
        name,
        len(rows),
        float((found == gold).mean()),
        macro_f1(found, gold),
        float(domain_right.mean()),
        float(np.mean(np.array(within)[domain_right])) if domain_right.any() else 0.0,
        float(np.mean(got["calls"][:])),
        float(np.mean(got["prompt_tokens"][:])),
        (engine.usage.computed_tokens - computed) / len(rows),
        len(rows) / seconds,
        int((mass[:, roots] >= least - 1e-12).all(axis=1).sum()),
        sum(error is not None for error in got["error"][:]),
    )
    print(one.cells, flush=True)
    return one


HEAD = (
    "| strategy | rows | accuracy (95 %) | macro-F1 | domain | intent, domain right | prompts "
    "| prompt tokens | computed tokens | texts/s | consistent rows |\n" + "|---" * 11 + "|"
)


@dataclass
class Setting:
    """What all strategies are measured on."""

    engine: HFEngine
    encoder: Any
    labels: LabelSpace
    pool: Dataset
    rows: Dataset
    """With `candidates`."""
    dear: int
    """So many of the rows are read by strategies that take seconds a row."""
    keep: int

    def strategies(self, rows: Dataset, suffix: str) -> list[Measured]:
        """All three on the same rows."""
        found = []
        for strategy in ("dl", "dh", "tmh"):
            options: dict[str, Any] = {"keep": self.keep} if strategy == "tmh" else {}
            options["list_all"] = True  # so that rows share more of the prompt
            name = f"{strategy.upper()}, {suffix}"
            found.append(
                measure(name, rows, self.engine, self.labels, strategy=strategy, **options)
            )
        return found

    def whole(self) -> Dataset:
        """The dear rows, all leaves allowed."""
        return self.rows.select(range(self.dear)).remove_columns("candidates")

    def shown(self, rows: Dataset) -> Dataset:
        """With the nearest train rows as demonstrations."""
        return choose_demonstrations(
            rows, self.pool, self.labels, n=SHOWN, method="similarity", encoder=self.encoder
        )


def setting(
    folder: Path, engine: HFEngine, encoder: Any, *, rows: int, dear: int, k: int, keep: int
) -> Setting:
    splits, labels = clinc(folder)
    test = with_candidates(splits["test"].select(range(rows)), labels, encoder, k=k)
    measure("warm-up", test.select(range(4)), engine, labels, strategy="tmh")
    print(HEAD)
    return Setting(engine, encoder, labels, splits["train"], test, dear, keep)


def zero_shot(one: Setting) -> list[Measured]:
    few = len(one.rows["candidates"][0])
    return [
        *one.strategies(one.whole(), "150 intents"),
        *one.strategies(one.rows, f"MiniLM's {few}"),
    ]


def few_shot(one: Setting) -> list[Measured]:
    return one.strategies(one.shown(one.whole()), f"150 intents, {SHOWN} shots")


def page_of(one: Setting, zero: list[Measured], few: list[Measured]) -> str:
    """The table and what follows from it."""
    gold, lists = gold_index(one.rows, one.labels), one.rows["candidates"][:]
    first = np.array([some[0] for some in lists])
    any_of = np.mean([g in some for g, some in zip(gold, lists, strict=True)])
    shots = one.shown(one.whole())["demonstrations"][:]
    nearest = np.array([one.labels.index(some[-1]["label"]) for some in shots])
    known = gold[: one.dear]
    dl, tmh = zero[0], zero[5]
    table = [*zero, *few]
    gains = [
        f"{a.name[:3].rstrip(',')} {100 * (b.macro_f1 - a.macro_f1):+.1f}"
        for a, b in zip(zero[:3], few, strict=True)
    ]
    lines = [
        HEAD,
        *(some.cells for some in table),
        "",
        f"In-scope test rows, drawn with seed 0; {rows_in_pool(one.rows, one.pool)} of "
        f"{len(one.rows)} also stand in the train rows, and are not shown themselves. Raw, without "
        f"bias correction. TMH keeps the {one.keep} heaviest nodes of a level. Prompt tokens count "
        "all prompts of a row as if nothing were shared; computed tokens are what the model really "
        "computed, the label tries included. `intent, domain right`: of the rows whose heaviest "
        "domain is right, the share whose heaviest intent below it is right. Consistent rows: no "
        f"node has more mass than its parent. {sum(some.errors for some in table)} rows have an "
        "error.",
        "",
        f"- Baselines: MiniLM's nearest intent is right for {np.mean(first == gold):.3f} (macro-F1 "
        f"{macro_f1(first, gold):.3f}; any of its {len(lists[0])} for {any_of:.3f}); the intent of "
        f"the nearest demonstration, on the first {one.dear} rows, for "
        f"{np.mean(nearest == known):.3f} (macro-F1 {macro_f1(nearest, known):.3f}).",
        f"- TMH with MiniLM's candidates labels {tmh.texts_per_second / dl.texts_per_second:.1f} "
        f"times as many texts/s as DL over 150 intents (wanted: 5), accuracy {tmh.right:.3f} "
        f"against {dl.right:.3f} (wanted: no lower).",
        f"- Few-shot against zero-shot over 150 intents, points of macro-F1 (wanted: 5): "
        f"{', '.join(gains)}.",
        CHOICES,
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- large trees


def large_trees(folder: Path) -> Iterator[tuple[str, LabelSpace, list[tuple[str, str]]]]:
    """Name, tree, and texts with the ids of their labels; ICD-10-CM where it can be had."""
    labels = hs_codes(folder).labels
    texts = [(labels.names[leaf], labels.ids[leaf]) for leaf in labels.leaves]
    yield "Harmonized System", labels, texts
    try:
        file = Path(fetch(ICD))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"skipped: {error}")
        return
    codes = ET.parse(file).getroot().iter("diag")
    terms = [
        (str(note.text), str(code.findtext("name")))
        for code in codes
        for note in code.findall("inclusionTerm/note")
    ]
    yield "ICD-10-CM", icd(file).labels, terms


class Remembering:
    """An encoder that embeds each text once, as one who labels many texts does with the labels."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.known = encoder, dict[str, np.ndarray]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        """From memory where the text was seen before."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known.update(zip(new, self.encoder.encode(new, **options), strict=True))
        return np.array([self.known[text] for text in texts])


def resident() -> float:
    """MB that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def walk_part(folder: Path, engine: HFEngine, encoder: Any, *, nearest: int) -> str:
    label_hierarchy(
        Dataset.from_dict({"id": ["0"], "text": ["warm up"]}),
        engine,
        LabelSpace(("a", "b"), ("a", "b"), ("", ""), ((), ())),
        strategy="tmh",
    )
    encoder.encode(["warm up"])
    lines = [
        "| tree | nodes | prompts list | median s | slowest s | prompts | prompt tokens | right root "
        "| MB of the tree and the walks | MB in all |\n" + "|---" * 10 + "|",
    ]
    gc.collect()
    before = resident()
    for name, labels, texts in large_trees(folder):
        chosen = np.random.default_rng(0).permutation(len(texts))[: WALKS + 1].tolist()
        for listed in (0, 4000):
            options = {"keep": 1, "encoder": encoder, "nearest": nearest}
            walks = [
                walked(*texts[number], engine, labels, listed_characters=listed, **options)
                for number in chosen
            ][1:]  # the first is a warm-up: it works out who is whose child
            seconds, calls, tokens, right = np.array(walks).T
            lines.append(
                f"| {name} | {len(labels):,} | {'children' if listed else 'nothing'} | {np.median(seconds):.2f} "
                f"| {seconds.max():.2f} | {calls.mean():.1f} | {tokens.mean():.0f} "
                f"| {right.sum():.0f} of {WALKS} | {resident() - before:.0f} | {resident():.0f} |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        f"TMH with keep=1 of single texts, one at a time, {WALKS} after a warm-up, {torch.get_num_threads()} "
        "thread(s): subheadings' own descriptions (Harmonized System) and inclusion terms "
        f"(ICD-10-CM). At a node with more than {nearest} children the {nearest} nearest by MiniLM "
        "are asked about; a child is embedded when it is first met. MB: growth since the models were "
        "loaded, over both trees, most of it torch's own. Wanted: a median under 1 s, under 1 GB. A "
        "model of 135M parameters, raw, seldom finds the right branch: these walks show what one "
        "costs, not what it is worth.",
    ]
    return "\n".join(lines)


def walked(
    text: str, id: str, engine: HFEngine, labels: LabelSpace, **options: Any
) -> tuple[float, int, int, bool]:
    """Seconds, prompts, their tokens, and whether the heaviest root is above the label."""
    row = Dataset.from_dict({"id": ["0"], "text": [text]})
    started = time.perf_counter()
    got = label_hierarchy(row, engine, labels, strategy="tmh", **options)
    seconds = time.perf_counter() - started
    mass: dict[int, float] = defaultdict(float)
    for node, prob in zip(got["label_ids"][0], got["label_probs"][0], strict=True):
        mass[root_of(labels, node)] += prob
    right = max(mass, key=mass.__getitem__) == root_of(labels, labels.index(id))
    return seconds, got["calls"][0], got["prompt_tokens"][0], right


def root_of(labels: LabelSpace, node: int) -> int:
    while labels.parent_positions[node]:
        node = labels.parent_positions[node][0]
    return node


def page(clinc150: str, walks: str) -> str:
    """All results."""
    return (
        "# Hierarchies: DL, DH, TMH with SmolLM2-135M and MiniLM\n\n"
        "Written by `python benchmarks/hierarchy.py ../shared/data`.\n\n"
        f"## Three strategies on clinc150\n\n{clinc150}\n\n"
        f"## One text down a large tree\n\n{walks}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="holds the folders clinc150_oos and hs_codes")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--dear", type=int, default=30, help="rows of strategies that are slow")
    arguments = parser.parse_args()
    if not (arguments.data / "clinc150_oos").is_dir():
        print(f"skipped: there is no {arguments.data / 'clinc150_oos'}")
        return
    encoder, engine = Remembering(load_encoder(MINILM)), HFEngine(SMOLLM2)
    folder = arguments.data / "clinc150_oos"
    one = setting(folder, engine, encoder, rows=arguments.rows, dear=arguments.dear, k=5, keep=2)
    measured = page_of(one, zero_shot(one), few_shot(one))
    walks = walk_part(arguments.data / "hs_codes", engine, encoder, nearest=3)
    text = page(measured, walks)
    (Path(__file__).parent / "results" / "hierarchy.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
