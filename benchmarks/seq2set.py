"""Decoders of label sets and of label sequences on GoEmotions (28 labels), MiniLM frozen.

    python benchmarks/seq2set.py ../shared/data/goemotions --work FOLDER --part seq2set
    python benchmarks/seq2set.py ../shared/data/goemotions --work FOLDER --part trainer
    python benchmarks/seq2set.py ../shared/data/goemotions --work FOLDER --part write

`seq2set`: all decoders have the same network, rows, updates and first weights, and read the same
token states of MiniLM, computed once; only the loss differs (or, with teacher forcing, what they are
fed in training). `trainer`: the first of them by `train_seq2set`, with the backbone in the loop. Half
of the rows have several labels. Nothing is chosen on test rows: every run has a fixed number of
epochs, and the one threshold there is comes from validation rows. What a part found is kept in FOLDER
run by run; `write` makes benchmarks/results/seq2set.md of it.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from llmlabel import models
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import macro_f1_multilabel, micro_f1
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint
from llmlabel.train.loop import Objective, fit
from llmlabel.train.network import load_backbone, padded, pool
from llmlabel.train.seq2set import (
    predict_label_sets,
    said_probs,
    set_losses,
    train_seq2set,
)
from llmlabel.train.set_decoder import SetDecoder
from llmlabel.train.settings import settle

ROWS = {"train": 4000, "validation": 800, "test": 1600}
TRAINING = {
    "num_train_epochs": 8,
    "head_learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 8.0,
    "per_device_train_batch_size": 32,
    "max_length": 64,
    "dtype": "float32",
}
WIDTH = 128
DECODERS = {
    "set loss, lambda 8": {"loss": "set", "transport_weight": 8.0},
    "set loss, lambda 0": {"loss": "set", "transport_weight": 0.0},
    "sequence, frequent first": {"loss": "sequence"},
    "sequence, random order": {"loss": "sequence", "order": "random"},
    "sequence, frequent first, teacher forcing": {"loss": "sequence", "fed": True},
    "sequence, random order, teacher forcing": {"loss": "sequence", "order": "random", "fed": True},
    "set loss, lambda 0, random order": {"loss": "set", "transport_weight": 0.0, "order": "random"},
}


def emotions(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], LabelSpace]:
    """Rows of each split, half of them with several labels, and the label space."""
    with gzip.open(folder / "goemotions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = sorted({name for row in rows for name in row["labels"]})
    rng = np.random.default_rng(0)
    found = {}
    for split, count in ROWS.items():
        own = [row for row in rows if row["split"] == split and row["text"].strip()]
        several = [row for row in own if len(row["labels"]) > 1]
        one = [row for row in own if len(row["labels"]) == 1]
        chosen = [
            some[i] for some in (several, one) for i in rng.permutation(len(some))[: count // 2]
        ]
        found[split] = [chosen[i] for i in rng.permutation(len(chosen))]
    return found, load_labels(names, multilabel=True)


def truth(rows: list[dict[str, Any]], labels: LabelSpace) -> np.ndarray:
    found = np.zeros((len(rows), len(labels)))
    for row, one in enumerate(rows):
        found[row, [labels.index(name) for name in one["labels"]]] = 1.0
    return found


def table(rows: list[dict[str, Any]], labels: LabelSpace) -> Dataset:
    plain = Dataset.from_dict(
        {"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]}
    )
    return SoftLabels.from_dense(truth(rows, labels), labels).add_to(plain)


@torch.inference_mode()
def states_of(texts: list[str]) -> list[torch.Tensor]:
    """MiniLM's token states of each text."""
    from transformers import AutoTokenizer

    source = models.fetch(models.MINILM)
    backbone = load_backbone(source, settings={}).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    limit = TRAINING["max_length"]
    tokens = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        ids, mask = padded([tokens[row] for row in chosen])
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        found |= {row: hidden[i, : len(tokens[row])].clone() for i, row in enumerate(chosen)}
    return [found[row] for row in range(len(texts))]


def batch(states: list[torch.Tensor], chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    own = [states[row] for row in chosen]
    mask = [torch.ones(len(one), dtype=torch.long) for one in own]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(own, batch_first=True), pad(mask, batch_first=True)


# --------------------------------------------------------------------------------- what is compared


def sequences(targets: np.ndarray, order: str, steps: int, seed: int) -> torch.Tensor:
    """The labels of each row, most frequent first or in an order of its own, then "nothing"."""
    labels = targets.shape[1]
    rank = (-targets.sum(axis=0)).argsort(kind="stable").argsort()
    rng = np.random.default_rng(seed)
    found = np.full((len(targets), steps), labels)
    for row, target in enumerate(targets):
        own = np.flatnonzero(target)
        own = rng.permutation(own) if order == "random" else own[rank[own].argsort()]
        found[row, : len(own)] = own[:steps]
    return torch.from_numpy(found)


def sequence_losses(goal: torch.Tensor, empty: int, empty_weight: float) -> Callable[..., Any]:
    """As `set_cross_entropy`, but each step has the label that stands there."""

    def losses(logits: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        labels = goal[chosen]
        surprise = -logits.log_softmax(dim=2).gather(2, labels[:, :, None])[:, :, 0]
        weights = torch.ones_like(surprise).masked_fill(labels == empty, empty_weight)
        return (weights * surprise).sum(dim=1) / weights.sum(dim=1)

    return losses


def decoder_of(
    given: dict[str, Any], found: dict[str, Any], *, seed: int, output: Path
) -> SetDecoder:
    """Trained by the loop of all trainers, on states that were computed before."""
    targets, states = found["train"]
    empty = targets.shape[1]
    steps = int(targets.sum(axis=1).max())
    settings = settle({**TRAINING, "seed": seed})
    settings |= {"scheme": "all", "empty_weight": 0.2}
    goal = sequences(targets, given.get("order", "frequent"), steps, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SetDecoder(
            found["vectors"], text_width=384, width=WIDTH, steps=steps, dropout=0.2
        )
        losses = sequence_losses(goal, empty, settings["empty_weight"])
        if given["loss"] == "set":
            settings["transport_weight"] = given["transport_weight"]
            sets = torch.where(goal == empty, -1, goal)
            losses = set_losses(sets, network.vectors, settings)

        def inputs(chosen: list[int]) -> tuple[torch.Tensor, ...]:
            fed = (goal[chosen],) if given.get("fed") else ()
            return (*batch(states, chosen), *fed)

        objective = Objective(
            network,
            [{"params": list(network.parameters()), "lr": settings["head_learning_rate"]}],
            [str(row) for row in range(len(states))],
            [len(one) for one in states],
            np.ones(len(states)),
            inputs,
            losses,
        )
        fit(objective, settings, name="decoder", key=str([given, seed]), output=output)
    checkpoint.remove(output)
    return network.eval()


@torch.inference_mode()
def said(network: SetDecoder, states: list[torch.Tensor]) -> np.ndarray:
    """The probability of what was said first; 0 elsewhere."""
    parts = [
        said_probs(network(*batch(states, list(range(start, min(start + 64, len(states)))))))
        for start in range(0, len(states), 64)
    ]
    return np.vstack(parts)


def scores(probs: np.ndarray, gold: np.ndarray, *, threshold: float = 0.0) -> dict[str, float]:
    here = probs > threshold
    right = gold >= 0.5
    return {
        "micro_f1": micro_f1(here, right),
        "macro_f1": macro_f1_multilabel(here, right),
        "labels": float(here.sum(axis=1).mean()),
        "micro_f1_of_0.5": micro_f1(probs >= 0.5, right),
    }


def linear(found: dict[str, Any], *, seed: int) -> dict[str, dict[str, float]]:
    """A linear head on the mean of the tokens, one logit a label, binary cross-entropy."""
    pooled = {
        split: torch.stack(
            [pool(s[None], torch.ones(1, len(s)), "mean")[0] for s in found[split][1]]
        )
        for split in ROWS
    }
    targets = torch.from_numpy(found["train"][0]).float()
    settings = settle({**TRAINING, "seed": seed, "head_learning_rate": 1e-2})
    head = torch.nn.Linear(384, targets.shape[1])
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def losses(logits: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets[chosen], reduction="none"
        ).sum(dim=1)

    objective = Objective(
        head,
        [{"params": list(head.parameters()), "lr": settings["head_learning_rate"]}],
        [str(row) for row in range(len(targets))],
        [1] * len(targets),
        np.ones(len(targets)),
        lambda chosen: (pooled["train"][chosen],),
        losses,
    )
    fit(objective, settings, name="linear", key=str(seed), output=Path("none"))
    probs = {split: head(pooled[split]).sigmoid().detach().double().numpy() for split in ROWS}
    right = found["validation"][0] >= 0.5
    tried = np.linspace(0.05, 0.6, 56)
    best = max(tried, key=lambda value: micro_f1(probs["validation"] > value, right))
    gold = found["test"][0]
    return {
        "binary cross-entropy, from 0.5": scores(probs["test"], gold, threshold=0.5),
        "binary cross-entropy, threshold of validation rows": scores(
            probs["test"], gold, threshold=float(best)
        ),
    }


# -------------------------------------------------------------------------------------------- parts


def keep(work: Path, name: str, result: dict[str, Any]) -> None:
    file = work / "seq2set.json"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(kept | {name: result}, indent=1), "utf-8")


def compare(
    rows: dict[str, list[dict[str, Any]]], labels: LabelSpace, work: Path, *, seeds: list[int]
) -> None:
    """All runs that are not kept yet."""
    file = work / "seq2set.json"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    found: dict[str, Any] = {}
    started = time.perf_counter()
    for split, own in rows.items():
        found[split] = (truth(own, labels), states_of([row["text"] for row in own]))
    vectors = torch.stack([one.mean(dim=0) for one in states_of(labels.texts())])
    found["vectors"] = torch.nn.functional.normalize(vectors, dim=1)
    print(f"token states: {time.perf_counter() - started:.0f} s", flush=True)
    gold = found["test"][0]
    for seed in seeds:
        if f"binary cross-entropy, from 0.5 #{seed}" not in kept:
            for name, result in linear(found, seed=seed).items():
                keep(work, f"{name} #{seed}", result)
        for name, given in DECODERS.items():
            if f"{name} #{seed}" in kept:
                continue
            started = time.perf_counter()
            network = decoder_of(given, found, seed=seed, output=work / "run")
            seconds = time.perf_counter() - started
            result = scores(said(network, found["test"][1]), gold) | {"seconds": seconds}
            print(name, seed, {k: round(v, 3) for k, v in result.items()}, flush=True)
            keep(work, f"{name} #{seed}", result)


def trainer(rows: dict[str, list[dict[str, Any]]], labels: LabelSpace, work: Path) -> None:
    """The public functions from texts to columns."""
    started = time.perf_counter()
    folder = train_seq2set(
        table(rows["train"], labels),
        labels,
        model=models.MINILM,
        output=work / "model",
        width=WIDTH,
        **TRAINING,
    )
    seconds = time.perf_counter() - started
    test = table(rows["test"], labels).select_columns(["id", "text"])
    got = predict_label_sets(test, model=folder)
    probs = SoftLabels.from_dataset(got, labels).dense()
    result = scores(probs, truth(rows["test"], labels)) | {"seconds": seconds}
    print(result)
    keep(work, "train_seq2set, lambda 8 #0", result)


def write(rows: dict[str, list[dict[str, Any]]], work: Path) -> None:
    kept = json.loads((work / "seq2set.json").read_text("utf-8"))
    names = list(dict.fromkeys(name.rpartition(" #")[0] for name in kept))
    size = np.mean([len(row["labels"]) for row in rows["test"]])
    lines = [
        "# Sets, sequences and single labels: what a decoder on frozen MiniLM learns of GoEmotions",
        "",
        "Written by `python benchmarks/seq2set.py ../shared/data/goemotions --work FOLDER --part write`.",
        "",
        f"{len(rows['train']):,} train rows, {len(rows['test']):,} test rows ({size:.2f} labels each), "
        f"28 labels, {TRAINING['num_train_epochs']} epochs, decoders of width {WIDTH}, nothing chosen "
        "on test rows. F1 of the labels that were said; mean of the seeds, and each.",
        "",
        "| | micro-F1 | of each seed | macro-F1 | labels a row | micro-F1 of those from 0.5 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs = [result for key, result in kept.items() if key.rpartition(" #")[0] == name]
        mean = {what: np.mean([run.get(what, np.nan) for run in runs]) for what in SHOWN}
        each = ", ".join(f"{run['micro_f1']:.3f}" for run in runs)
        seconds = "" if np.isnan(mean["seconds"]) else f"{mean['seconds']:.0f}"
        lines.append(
            f"| {name} | {mean['micro_f1']:.3f} | {each} | {mean['macro_f1']:.3f} | "
            f"{mean['labels']:.2f} | {mean['micro_f1_of_0.5']:.3f} | {seconds} |"
        )
    runs_of = {
        name: [run["micro_f1"] for key, run in kept.items() if key.rpartition(" #")[0] == name]
        for name in names
    }
    f1 = {name: float(np.mean(values)) for name, values in runs_of.items()}
    seeds = min(len(runs_of[name]) for name in DECODERS)
    ordered, mixed = f1["sequence, frequent first"], f1["sequence, random order"]
    several = f1["set loss, lambda 0"]
    lines += [
        "",
        f"Set loss over the sequence with frequent labels first: {several - ordered:+.3f}. What a random "
        f"order adds to the sequence: {mixed - ordered:+.3f}, to the set loss: "
        f"{f1['set loss, lambda 0, random order'] - several:+.3f} (0 by construction). "
        f"Lambda 8 over 0: {f1['set loss, lambda 8'] - several:+.3f}. With {len(rows['test']):,} test "
        f"rows and {seeds} seed(s), differences below 0.02 show nothing.",
        "",
        "A label that a decoder says may have less than 0.5 there: what counts labels from 0.5 on finds "
        "the lower F1 of the last column but one. The linear heads see the mean of the tokens and no "
        "attention; seconds are of a machine with other work.",
    ]
    file = Path(__file__).parent / "results" / "seq2set.md"
    file.write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


SHOWN = ("micro_f1", "macro_f1", "labels", "micro_f1_of_0.5", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of goemotions")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was found")
    parser.add_argument("--part", nargs="+", choices=["seq2set", "trainer", "write"], required=True)
    parser.add_argument("--rows", type=int, help="train rows, for a trial")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    if not (given.data / "goemotions.jsonl.gz").is_file():
        print(f"{given.data}: no goemotions.jsonl.gz here; skipped")
        return
    if given.rows:
        ROWS.update(train=given.rows, validation=given.rows // 2, test=given.rows // 2)
    given.work.mkdir(parents=True, exist_ok=True)
    rows, labels = emotions(given.data)
    for part in given.part:
        if part == "seq2set":
            compare(rows, labels, given.work, seeds=given.seeds)
        elif part == "trainer":
            trainer(rows, labels, given.work)
        else:
            write(rows, given.work)


if __name__ == "__main__":
    main()
