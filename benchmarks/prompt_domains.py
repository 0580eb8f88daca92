"""Soft prompt generation (SPG) on the turns of multidogo, each of its 6 domains left out once.

    python benchmarks/prompt_domains.py ../shared/data/multidogo --work FOLDER --part run
    python benchmarks/prompt_domains.py ../shared/data/multidogo --work FOLDER --part write

MiniLM, frozen, reads the intents that all domains have after a prompt: the words that prompts begin as
(zero-shot), the mean of the other domains' prompts, and prompts drawn for each text, by SPG or by a
generator that learns by squared errors. Nothing is chosen, on test rows or others: one fixed setting.
What was found is kept in FOLDER; `write` makes benchmarks/results/prompt_domains.md of it.
"""

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value

from llmlabel import models
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import accuracy
from llmlabel.softlabels import SoftLabels
from llmlabel.train import checkpoint
from llmlabel.train.loop import Objective, fit
from llmlabel.train.prompt_generator import predict_by_prompts, train_prompt_generator
from llmlabel.train.prompt_networks import load_generator, save_generator, text_vectors
from llmlabel.train.settings import settle

INTENTS = {
    "openinggreeting": "greeting",
    "closinggreeting": "goodbye",
    "confirmation": "yes, that is right",
    "rejection": "no",
    "contentonly": "giving information",
    "thankyou": "thank you",
    "outofdomain": "off topic",
}
MOST = 20  # turns of an intent in a domain


def truth(rows: list[dict[str, Any]], labels: LabelSpace) -> np.ndarray:
    return np.array([[float(name in row["labels"]) for name in labels.names] for row in rows])


def table(rows: list[dict[str, Any]], labels: LabelSpace) -> Dataset:
    plain = Dataset.from_dict(
        {"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]}
    )
    return SoftLabels.from_dense(truth(rows, labels), labels).add_to(plain)


def turns(folder: Path, labels: LabelSpace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Split -> domain -> turns with one of the intents that all domains have."""
    with gzip.open(folder / "multidogo.jsonl.gz", "rt", encoding="utf-8") as file:
        talks = [json.loads(line) for line in file]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"train": {}, "test": {}}
    counts: dict[tuple[str, str, str], int] = {}
    for talk in talks:
        lines = talk["text"].split("\n")
        for number, (line, intent) in enumerate(zip(lines, talk["turn_intents"], strict=True)):
            text = line.removeprefix("CUSTOMER: ").strip()
            key = (talk["split"], talk["domain"], str(intent))
            if talk["split"] not in found or intent not in INTENTS or not text:
                continue
            counts[key] = counts.get(key, 0) + 1
            if counts[key] <= MOST:
                row = {"id": f"{talk['id']}:{number}", "text": text, "labels": [INTENTS[intent]]}
                found[talk["split"]].setdefault(talk["domain"], []).append(row)
    return found


def regressed(folder: Path, texts: list[str], prompts: torch.Tensor, output: Path) -> Path:
    """The folder of a generator without noise or judge, which learns by squared errors."""
    reader, generator, own, tokenizer, labels, card = load_generator(folder)
    settings = settle({"num_train_epochs": 20, "head_learning_rate": 1e-3})
    vectors = text_vectors(reader.backbone, tokenizer, texts, card["settings"])
    objective = Objective(
        generator.train(),
        [{"params": list(generator.parameters()), "lr": 1e-3}],
        [str(row) for row in range(len(texts))],
        [1] * len(texts),
        np.ones(len(texts)),
        lambda chosen: (torch.zeros_like(vectors[chosen]), vectors[chosen]),
        lambda made, chosen: (
            (generator.places(made) - generator.places(prompts[chosen])) ** 2
        ).mean(dim=1),
    )
    fit(objective, settings, name="regressed", key="regressed", output=output)
    checkpoint.remove(output)
    save_generator(generator, own, labels, card, output)
    return output


def domains(folder: Path, work: Path, *, seed: int) -> None:
    """Each domain left out once: what its turns are after four kinds of prompts."""
    labels = load_labels(list(INTENTS.values()))
    found = turns(folder, labels)
    for left in sorted(found["train"]):
        if f"without {left} #{seed}" in kept(work):
            continue
        rows = [(name, row) for name, own in found["train"].items() if name != left for row in own]
        plain = table([row for _, row in rows], labels)
        named = with_columns(plain, {"domain": ([name for name, _ in rows], Value("string"))})
        output = work / f"without_{left}_{seed}"
        started = time.perf_counter()
        train_prompt_generator(
            named,
            labels,
            domain="domain",
            model=models.MINILM,
            output=output,
            seed=seed,
            domain_epochs=6,
            num_train_epochs=20,
            max_length=64,
        )
        seconds = time.perf_counter() - started
        order = sorted({name for name, _ in rows})
        prompts = load_generator(output)[2]["prompts"]
        goal = prompts[[order.index(name) for name, _ in rows]]
        squared = work / f"squared_{left}_{seed}"
        regressed(output, [row["text"] for _, row in rows], goal, squared)
        test = found["test"][left]
        gold = truth(test, labels).argmax(axis=1)
        texts = table(test, labels).select_columns(["id", "text"])
        result: dict[str, Any] = {"rows": len(rows), "test": len(test), "seconds": seconds}
        for name, source, given in (
            ("zero-shot", output, {"prompt": "template"}),
            ("mean of the domains", output, {"prompt": "mean"}),
            ("generated", output, {}),
            ("generated, 1 draw", output, {"draws": 1}),
            ("generated by squared errors", squared, {}),
        ):
            got = predict_by_prompts(texts, model=source, **given)
            probs = SoftLabels.from_dataset(got, labels).dense()
            result[name] = accuracy(probs, gold)
        keep(work, f"without {left} #{seed}", result)


KINDS = {
    "zero-shot": "zero-shot",
    "mean of the domains": "mean of the domains' prompts",
    "generated": "generated (SPG)",
    "generated, 1 draw": "SPG, 1 draw",
    "generated by squared errors": "generator of squared errors",
}


def write(work: Path) -> None:
    runs = {name: one for name, one in kept(work).items() if name.startswith("without ")}
    lines = [
        "# Soft prompt generation: a domain of multidogo left out, MiniLM frozen",
        "",
        "Written by `python benchmarks/prompt_domains.py ../shared/data/multidogo --work FOLDER --part "
        "write`.",
        "",
        f"Turns with one of the 7 intents that all domains have, at most {MOST} of each; prompts of the "
        "other five domains are learned, and so is what draws a prompt for a text. Accuracy on test "
        "turns of the domain that no training saw.",
        "",
        f"| left out | turns | {' | '.join(KINDS.values())} |",
        f"|---|---|{'---|' * len(KINDS)}",
    ]
    for name, one in runs.items():
        values = " | ".join(f"{one[kind]:.3f}" for kind in KINDS)
        lines.append(f"| {name.split()[1]} | {one['test']} | {values} |")
    means = " | ".join(f"{np.mean([one[kind] for one in runs.values()]):.3f}" for kind in KINDS)
    total = sum(one["test"] for one in runs.values())
    lines.append(f"| mean | {total} | {means} |")
    better, above = (
        sum(one["generated"] >= one[other] for one in runs.values())
        for other in ("zero-shot", "mean of the domains")
    )
    said = (
        f"Generated prompts are at least as right as zero-shot in {better} of {len(runs)}, and as the plain "
        f"mean of the domains' prompts in {above} of {len(runs)}. One seed and one setting; a turn is "
        "about 0.007 of a domain's accuracy."
    )
    if all(one["generated"] == one["generated, 1 draw"] for one in runs.values()):
        said += " One draw and eight are equally right: the generator hardly uses its noise."
    lines += ["", said]
    file = Path(__file__).parent / "results" / "prompt_domains.md"
    file.write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


def keep(work: Path, name: str, result: dict[str, Any]) -> None:
    print(name, result, flush=True)
    file = work / "found.json"
    file.write_text(json.dumps(kept(work) | {name: result}, indent=1), "utf-8")


def kept(work: Path) -> dict[str, Any]:
    file = work / "found.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of multidogo")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was found")
    parser.add_argument("--part", nargs="+", choices=["run", "write"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not (given.data / "multidogo.jsonl.gz").is_file():
        print(f"{given.data}: no multidogo.jsonl.gz here; skipped")
        return
    given.work.mkdir(parents=True, exist_ok=True)
    for part in given.part:
        if part == "run":
            domains(given.data, given.work, seed=given.seed)
        else:
            write(given.work)


if __name__ == "__main__":
    main()
