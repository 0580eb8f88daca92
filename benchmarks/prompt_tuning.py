"""Prompt tuning on GoEmotions (28 labels): read once (PTEC), written (PT), or embeddings alone.

    python benchmarks/prompt_tuning.py ../shared/data/goemotions --work FOLDER --part embed search
    python benchmarks/prompt_tuning.py ../shared/data/goemotions --work FOLDER --part pt --epochs 2
    python benchmarks/prompt_tuning.py ../shared/data/goemotions --work FOLDER --part ptec --epochs 24 --by micro_f1
    python benchmarks/prompt_tuning.py ../shared/data/goemotions --work FOLDER --part write

All have the same frozen SmolLM2-135M, train rows and test rows. `embed`: its last token as a vector,
for a linear head (CH) and the nearest neighbours. `search`: learning rates, by validation rows after
one pass over the first of the train rows. `ptec` and `pt`: the trainings with the best rates `--by` the
loss, where the epoch with the lowest is kept, or by the micro-F1, where it is the last of `--epochs`:
with balanced positives the loss of few rows hangs on the rarest labels. What a part found is kept in
FOLDER, and unfinished trainings go on there; `write` makes benchmarks/results/prompt_tuning.md of it.
Nothing is chosen on test rows.
"""

import argparse
import gzip
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from llmlabel import models
from llmlabel.engine.labelsets import label_sets
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import macro_f1_multilabel, micro_f1
from llmlabel.softlabels import SoftLabels
from llmlabel.train.network import load_backbone, load_classifier, padded, pool
from llmlabel.train.prompt_tuning import train_prompt
from llmlabel.train.prompt_writer import load_writer, written
from llmlabel.train.student import probabilities
from llmlabel.train.text_to_text import train_text_to_text

ROWS = {"train": 400, "validation": 80, "test": 400}
TRAINING: dict[str, Any] = {
    "prompt_tokens": 20,
    "per_device_train_batch_size": 8,
    "max_length": 64,
}
SEARCHED = 200  # train rows
RATES: dict[str, list[dict[str, float]]] = {
    "ptec": [
        {"learning_rate": 5e-3, "head_learning_rate": 5e-3},
        {"learning_rate": 1e-3, "head_learning_rate": 5e-3},
        {"learning_rate": 5e-3, "head_learning_rate": 2e-3},
        {"learning_rate": 5e-3, "head_learning_rate": 7e-4},
        {"learning_rate": 5e-3, "head_learning_rate": 2e-4},
    ],
    "pt": [{"learning_rate": 5e-3}],
}
TRAINERS = {"ptec": train_prompt, "pt": train_text_to_text}


def emotions(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], LabelSpace]:
    """The first rows of each split, and the label space."""
    with gzip.open(folder / "goemotions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = sorted({name for row in rows for name in row["labels"]})
    found = {
        split: [row for row in rows if row["split"] == split and row["text"].strip()][:count]
        for split, count in ROWS.items()
    }
    return found, load_labels(names, multilabel=True)


def truth(rows: list[dict[str, Any]], labels: LabelSpace) -> np.ndarray:
    return np.array([[float(name in row["labels"]) for name in labels.names] for row in rows])


def table(rows: list[dict[str, Any]], labels: LabelSpace) -> Dataset:
    plain = Dataset.from_dict(
        {"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]}
    )
    return SoftLabels.from_dense(truth(rows, labels), labels).add_to(plain)


def f1(said: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    right = gold >= 0.5
    return {
        "macro_f1": macro_f1_multilabel(said, right),
        "micro_f1": micro_f1(said, right),
        "labels": float(said.sum(axis=1).mean()),
    }


def keep(work: Path, name: str, result: dict[str, Any]) -> None:
    print(name, result, flush=True)
    file = work / "found.json"
    file.write_text(json.dumps(kept(work) | {name: result}, indent=1), "utf-8")


def kept(work: Path) -> dict[str, Any]:
    file = work / "found.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


# ---------------------------------------------------------------------------- embeddings, unchanged


@torch.inference_mode()
def embedded(texts: list[str], model: str) -> np.ndarray:
    """The last token's state of each text."""
    from transformers import AutoTokenizer

    source = models.fetch(model)
    backbone = load_backbone(source, settings={}).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    limit = TRAINING["max_length"]
    tokens = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
    found = np.zeros((len(texts), backbone.config.hidden_size))
    order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        ids, mask = padded([tokens[row] for row in chosen])
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        found[chosen] = pool(hidden, mask, "last").double().numpy()
    return found


def embed(rows: dict[str, Any], labels: LabelSpace, work: Path, model: str) -> None:
    """A linear head (C of validation rows) and the nearest neighbours (k of validation rows)."""
    from sklearn.linear_model import LogisticRegression

    vectors = {split: embedded([row["text"] for row in own], model) for split, own in rows.items()}
    gold = {split: truth(own, labels) for split, own in rows.items()}
    mean, spread = vectors["train"].mean(axis=0), vectors["train"].std(axis=0) + 1e-6
    vectors = {split: (one - mean) / spread for split, one in vectors.items()}
    seen = [k for k in range(len(labels)) if 0 < gold["train"][:, k].sum() < len(gold["train"])]

    def head(c: float) -> dict[str, np.ndarray]:
        said = {split: np.zeros(gold[split].shape, dtype=bool) for split in gold}
        for k in seen:
            made = LogisticRegression(C=c, class_weight="balanced", max_iter=200)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.fit(vectors["train"], gold["train"][:, k])
            for split, one in vectors.items():
                said[split][:, k] = made.predict(one) > 0.5
        return said

    units = {s: one / np.linalg.norm(one, axis=1, keepdims=True) for s, one in vectors.items()}

    def nearest(count: int) -> dict[str, np.ndarray]:
        found = {}
        for split in ("validation", "test"):
            near = np.argsort(-(units[split] @ units["train"].T), axis=1, kind="stable")
            found[split] = gold["train"][near[:, :count]].mean(axis=1) >= 0.5
        return found

    for name, make, tried in (
        ("CH", head, [1e-4, 1e-3, 1e-2, 1e-1]),
        ("kNN", nearest, [1, 3, 5, 10]),
    ):
        said = {value: make(value) for value in tried}
        best = max(tried, key=lambda v: f1(said[v]["validation"], gold["validation"])["macro_f1"])
        keep(work, name, f1(said[best]["test"], gold["test"]) | {"chosen": best})
    everything = np.ones(gold["test"].shape, dtype=bool)
    keep(work, "all labels, always", f1(everything, gold["test"]))


# ------------------------------------------------------------------------------------------ prompts


def run(
    method: str,
    rows: list[dict[str, Any]],
    labels: LabelSpace,
    output: Path,
    **given: Any,
) -> dict[str, Any]:
    """A training, or the rest of it; its model card."""
    if not (output / "model_card.json").is_file():
        TRAINERS[method](table(rows, labels), labels, output=output, **{**TRAINING, **given})
    card: dict[str, Any] = json.loads((output / "model_card.json").read_text("utf-8"))
    return card


def trained(
    method: str,
    rows: dict[str, Any],
    labels: LabelSpace,
    output: Path,
    given: argparse.Namespace,
) -> dict[str, Any]:
    return run(
        method,
        rows["train"],
        labels,
        output,
        model=given.model,
        seed=given.seed,
        validation=table(rows["validation"], labels) if given.by == "loss" else None,
        num_train_epochs=given.epochs,
        **best_rates(given.work, method, given.by),
    )


def validated(card: dict[str, Any]) -> dict[str, Any]:
    if "validation" not in card:
        return {}
    epochs = card["validation"]["epochs"]
    return {
        "validation": [one["loss"] for one in epochs],
        "best_epoch": card["validation"]["best_epoch"],
    }


def name_of(method: str, given: argparse.Namespace) -> str:
    return f"{method.upper()}, {given.epochs} epochs #{given.seed}"


def search(rows: dict[str, Any], labels: LabelSpace, work: Path, model: str, method: str) -> None:
    for rates in RATES[method]:
        name = f"search {method} {' '.join(map(str, rates.values()))}"
        if name in kept(work):
            continue
        card = run(
            method,
            rows["train"][:SEARCHED],
            labels,
            work / name.replace(" ", "_"),
            model=model,
            validation=table(rows["validation"], labels),
            num_train_epochs=1,
            **rates,
        )
        keep(work, name, {"rates": rates} | card["validation"]["epochs"][0])


def best_rates(work: Path, method: str, by: str) -> dict[str, float]:
    """Those of the lowest validation loss, or the highest micro-F1."""
    tried = [one for name, one in kept(work).items() if name.startswith(f"search {method} ")]
    best = min(tried, key=lambda one: one["loss"] if by == "loss" else -one[by])
    found: dict[str, float] = best["rates"]
    return found


class Tokens:
    """Counts what a layer computes."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.computed = 0
        layer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, given: Any, named: Any) -> None:
        hidden = given[0] if given else named["hidden_states"]
        self.computed += hidden.shape[0] * hidden.shape[1]


def ece(probs: np.ndarray, gold: np.ndarray) -> float:
    """Of each label of each row as an event of its own, in 10 bins of equal width."""
    bins = np.minimum((probs * 10).astype(int), 9)
    gaps = [abs((probs - gold)[bins == b].sum()) for b in range(10)]
    return float(sum(gaps) / probs.size)


def ptec(rows: dict[str, Any], labels: LabelSpace, given: argparse.Namespace) -> None:
    work, name = given.work, name_of("ptec", given)
    output = work / f"ptec_{given.epochs}_{given.seed}"
    card = trained("ptec", rows, labels, output, given)
    network, tokenizer, _ = load_classifier(output)
    tokens = tokens_of(tokenizer, rows["test"])
    counted = Tokens(network.backbone.layers[0])
    started = time.perf_counter()
    probs = probabilities(network, tokens, labels, 2048)
    gold = truth(rows["test"], labels)
    # A positive of a rare label counted `weight` times, which its odds say too.
    counts = truth(rows["train"], labels).sum(axis=0)
    weight = np.where(counts > 0, counts.max() / np.maximum(counts, 1), 1.0)
    plain = probs / (probs + weight * (1 - probs))
    result = f1(probs >= 0.5, gold) | {
        "loss": card["loss"],
        **validated(card),
        "rates": best_rates(work, "ptec", given.by),
        "by": given.by,
        "ece": ece(probs, gold),
        "ece_unweighted": ece(plain, gold),
        "computed": counted.computed,
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "test_seconds": time.perf_counter() - started,
    }
    keep(work, name, result)


def pt(rows: dict[str, Any], labels: LabelSpace, given: argparse.Namespace) -> None:
    work, name = given.work, name_of("pt", given)
    output = work / f"pt_{given.epochs}_{given.seed}"
    card = trained("pt", rows, labels, output, given)
    network, tokenizer, _, _ = load_writer(output)
    tokens = tokens_of(tokenizer, rows["test"])
    between = tokenizer("\n").input_ids
    most = card["settings"]["max_labels"]
    sets = label_sets(tokenizer, labels.names, before="\n", most=most)
    counted = Tokens(network.model.model.layers[0])
    started = time.perf_counter()
    replies = written(network, [own + between for own in tokens], sets, 2048)
    said = np.zeros((len(replies), len(labels)), dtype=bool)
    for row, reply in enumerate(replies):
        said[row, sets.read(reply)] = True
    gold = truth(rows["test"], labels)
    prompt = TRAINING["prompt_tokens"] + len(between) - 1
    result = f1(said, gold) | {
        "loss": card["loss"],
        **validated(card),
        "rates": best_rates(work, "pt", given.by),
        "by": given.by,
        "ece": ece(said.astype(float), gold),
        "computed": counted.computed,
        "computed_alone": sum(
            prompt + len(o) + len(r) for o, r in zip(tokens, replies, strict=True)
        ),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "test_seconds": time.perf_counter() - started,
    }
    keep(work, name, result)


def tokens_of(tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    limit = TRAINING["max_length"]
    return [tokenizer(row["text"], truncation=True, max_length=limit).input_ids for row in rows]


# -------------------------------------------------------------------------------------------- page


def write(work: Path) -> None:
    found = kept(work)
    lines = [
        "# Prompt tuning: GoEmotions read once (PTEC), written (PT), or embeddings alone",
        "",
        "Written by `python benchmarks/prompt_tuning.py ../shared/data/goemotions --work FOLDER --part write`.",
        "",
        f"## {ROWS['train']} train rows of GoEmotions, 28 labels, SmolLM2-135M frozen",
        "",
        f"The first {ROWS['train']} train, {ROWS['validation']} validation and {ROWS['test']} test rows; a "
        f"prompt of {TRAINING['prompt_tokens']} tokens; batches of 8, so that an epoch has 50 updates. "
        "Nothing is chosen on test rows: C and k by the macro-F1 of validation rows, learning rates by "
        f"their loss or micro-F1 after one epoch of {SEARCHED} train rows. One seed.",
        "",
        "| | macro-F1 | micro-F1 | labels a row | ECE | computed tokens a text | folder, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ["PTEC", "PT", "CH", "kNN", "all labels"]
    for name in [one for one in found if one.partition(",")[0] in names]:
        one = found[name]
        told = [f"{one[what]:.3f}" for what in ("macro_f1", "micro_f1")] + [f"{one['labels']:.2f}"]
        told += [f"{one['ece']:.3f}" if "ece" in one else ""]
        told += [f"{one['computed'] / ROWS['test']:.1f}" if "computed" in one else ""]
        told += [f"{one['bytes']:,}" if "bytes" in one else ""]
        lines.append(f"| {' | '.join([name, *told])} |")
    lines += ["", *notes(found), ""]
    lines += ["| learning rates tried | validation loss | validation micro-F1 |", "|---|---|---|"]
    for name in [one for one in found if one.startswith("search ")]:
        method, *rates = name.split()[1:]
        what = " and ".join(rates)
        right = f"{found[name]['micro_f1']:.3f}" if "micro_f1" in found[name] else ""
        lines.append(f"| {method.upper()}: {what} | {found[name]['loss']:.2f} | {right} |")
    file = Path(__file__).parent / "results" / "prompt_tuning.md"
    file.write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


def notes(found: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    lines = []
    for name in [one for one in found if one.startswith(("PTEC, ", "PT, "))]:
        one = found[name]
        missed = [other for other in ("CH", "kNN") if one["macro_f1"] <= found[other]["macro_f1"]]
        said = f"is below {' and '.join(missed)}" if missed else "is above CH and kNN"
        rates = " and ".join(f"{rate:g}" for rate in one["rates"].values())
        by = "micro-F1" if one.get("by") == "micro_f1" else "loss"
        some = "" if "by" in one else " among the first three"
        line = f"{name} (learning rates {rates}, chosen by {by}{some}) {said} by macro-F1; training loss of "
        line += "each epoch " + ", ".join(f"{loss:.2f}" for loss in one["loss"])
        if "validation" in one:
            line += ", validation loss " + ", ".join(f"{loss:.2f}" for loss in one["validation"])
            line += f", epoch {one['best_epoch'] + 1} kept, which is the lowest"
        lines += [line + ".", ""]
    if any(one.get("by") == "micro_f1" for one in found.values()):
        lines += [
            "Runs whose rates were chosen by micro-F1 were set up after the test scores of the shorter ones "
            "had been seen; neither rates nor epochs were chosen by these. Runs of different numbers of "
            "epochs are no comparison of PTEC with PT.",
            "",
        ]
    read = [one for name, one in found.items() if name.startswith("PTEC, ")]
    wrote = [one for name, one in found.items() if name.startswith("PT, ")]
    if read:
        plain = ", ".join(f"{one['ece_unweighted']:.3f}" for one in read)
        lines += [
            "ECE counts each label of each text as an event. PTEC's probabilities are of positives that "
            "count more the rarer their label is; with their odds divided by that weight, its ECE is "
            f"{plain}. PT says no probabilities: its ECE is the share of wrong decisions.",
        ]
    if read and wrote:
        one, other = read[-1], wrote[-1]
        share, alone = (one["computed"] / other[what] for what in ("computed", "computed_alone"))
        lines += [
            "",
            f"PTEC computes {alone:.2f} of the tokens of `generate`, which reads the prompt again for each "
            f"text, and {share:.2f} of ours, which shares it (padding counts).",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was found")
    parser.add_argument("--part", nargs="+", choices=PARTS, required=True)
    parser.add_argument("--model", default=models.SMOLLM2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2, help="of the parts ptec and pt")
    parser.add_argument(
        "--by",
        choices=["loss", "micro_f1"],
        default="loss",
        help="what of the validation rows chooses the rates; loss chooses the epoch too",
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for part in given.part:
        if part == "write":
            write(given.work)
            continue
        file = "goemotions.jsonl.gz"
        if not (given.data / file).is_file():
            print(f"{given.data}: no {file} here; skipped")
            continue
        rows, labels = emotions(given.data)
        if part == "embed" and "kNN" not in kept(given.work):
            embed(rows, labels, given.work, given.model)
        elif part == "search":
            for method in RATES:
                search(rows, labels, given.work, given.model, method)
        elif part in ("ptec", "pt") and name_of(part, given) not in kept(given.work):
            {"ptec": ptec, "pt": pt}[part](rows, labels, given)


PARTS = ["embed", "search", "ptec", "pt", "write"]


if __name__ == "__main__":
    main()
