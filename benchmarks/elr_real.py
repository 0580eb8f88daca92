"""Early-learning regularization where the wrong labels are real teachers' own mistakes.

    llmlabel run recipes/committee.yaml
    python benchmarks/elr_real.py --runs runs/committee --work FOLDER --part mlp lora write

The first command has SmolLM2-135M (no demonstrations, bias removed by batch calibration) and MiniLM (names
of the sections) label the first 12 words of BBC articles. Here the most probable label of each teacher is
learned as a certain one, for far longer than is good, by cross-entropy and with ELR. `mlp`: 256
units on MiniLM vectors, all 909 rows of the pool. `lora`: `train_classifier` on MiniLM, 300 of them. Both
are tested on 552 other rows after the last epoch. Gold only measures. What a part found is kept in FOLDER;
`write` makes benchmarks/results/elr_real.md of it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from llmlabel import models
from llmlabel.data import gold_index, part, read_parquet
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.robust import TargetMemory, early_learning_loss
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
TEACHERS = {"SmolLM2": "llm", "MiniLM": "encoder"}
SETTINGS = ("0/.7", "3/.7", "7/.9", "20/.9")
"""Lambda / beta; lambda 0 is the cross-entropy."""
LORA_ROWS, LORA_EPOCHS = 300, 10


def rows_of(runs: Path) -> tuple[dict[str, Dataset], dict[str, Dataset], Dataset, LabelSpace]:
    """What each teacher said of the pool and of the validation rows, and the test rows."""
    labels = load_labels(
        ["business", "entertainment", "politics", "sports", {"id": "tech", "name": "technology"}]
    )
    by = {name: read_parquet(runs / kept / "value.parquet") for name, kept in TEACHERS.items()}
    pools = {name: part(rows, split="pool") for name, rows in by.items()}
    seen = {name: part(rows, split="validation") for name, rows in by.items()}
    return pools, seen, part(by["MiniLM"], split="test"), labels


def first(rows: Dataset, labels: LabelSpace) -> np.ndarray:
    return SoftLabels.from_dataset(rows, labels).dense().argmax(axis=1)


def vectors(rows: Dataset) -> torch.Tensor:
    return torch.tensor(rows["vector"][:]).float() * 8


def mlp(
    rows: Dataset,
    test: Dataset,
    seen: Dataset,
    labels: LabelSpace,
    *,
    setting: tuple[float, float],
    seed: int,
) -> dict[str, Any]:
    """As in benchmarks/training.py: Adam at 2e-3, 60 epochs; batches of 64, as there are fewer rows."""
    x, given, gold = vectors(rows), first(rows, labels), gold_index(rows, labels)
    xt, yt = vectors(test), gold_index(test, labels)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Linear(256, len(labels))
        )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    memory = TargetMemory(rows["id"][:], len(labels), beta=setting[1])
    targets = torch.eye(len(labels))[given]
    accuracy = []
    for _ in range(60):
        for some in torch.randperm(len(x), generator=draw).split(64):
            optimizer.zero_grad()
            early_learning_loss(
                network(x[some]), targets[some], some, memory, penalty_weight=setting[0]
            ).mean().backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(float((network(xt).argmax(dim=1).numpy() == yt).mean()))
    suspect = memory.suspects(torch.from_numpy(given)).numpy()
    with torch.no_grad():
        said = network(x).argmax(dim=1).numpy()
        agrees = network(vectors(seen)).argmax(dim=1).numpy() == first(seen, labels)
    found = {"final": accuracy[-1], "best": max(accuracy), "agrees": float(agrees.mean())}
    return found | numbers(suspect, said, given, gold)


def numbers(
    suspect: np.ndarray, said: np.ndarray, given: np.ndarray, gold: np.ndarray
) -> dict[str, float]:
    wrong = given != gold
    return {
        "memorised": float((said == given)[wrong].mean()),
        "precision": float(wrong[suspect].mean()) if suspect.any() else float("nan"),
        "recall": float(suspect[wrong].mean()),
    }


def lora(
    rows: Dataset,
    test: Dataset,
    labels: LabelSpace,
    work: Path,
    *,
    setting: tuple[float, float],
    seed: int,
) -> dict[str, Any]:
    from llmlabel.train.classifier import predict, train_classifier
    from llmlabel.train.memorisation import early_probs
    from llmlabel.train.settings import EarlyLearning

    chosen = sorted(np.random.default_rng(0).permutation(len(rows))[:LORA_ROWS].tolist())
    rows = rows.select(chosen).select_columns(
        ["id", "text", "gold", "label_ids", "label_probs", "label_space"]
    )
    given, gold = first(rows, labels), gold_index(rows, labels)
    hard = SoftLabels.from_dense(np.eye(len(labels))[given], labels).add_to(rows)
    model = train_classifier(
        hard,
        labels,
        model=models.MINILM,
        output=work,
        pooling="mean",
        num_train_epochs=LORA_EPOCHS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_length=32,
        early_learning=EarlyLearning(penalty_weight=setting[0], beta=setting[1]),
        seed=seed,
    )
    suspect = early_probs(hard, labels, model=model).argmax(axis=1) != given
    right = first(predict(test.select_columns(["id", "text"]), model=model), labels)
    final = float((right == gold_index(test, labels)).mean())
    said = first(predict(hard, model=model), labels)
    return {"final": final, **numbers(suspect, said, given, gold)}


def write(work: Path) -> None:
    found = json.loads((work / "elr_real.json").read_text("utf-8"))
    lines = [
        "# Early-learning regularization and the mistakes of real teachers: BBC News, 12 words",
        "",
        "Written by `python benchmarks/elr_real.py --runs runs/committee --work FOLDER --part write`.",
        "",
        "Accuracy on 552 test rows after the last epoch, by seed; best is the best epoch of the test "
        "rows, to be seen only. Agrees: with the teacher on 158 validation rows, by which lambda and beta are to be chosen without gold. Memorised: of the teacher's wrong labels; flags: rows whose remembered "
        "label is not the given one, as finders of wrong labels.",
        "",
        "| student | teacher (right) | lambda/beta | final | by seed | best | agrees | memorised | flags: precision | recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(key.rpartition(" #")[0] for key in found if "#" in key):
        runs = [value for name, value in found.items() if name.startswith(f"{key} #")]
        kind, teacher, told = key.split()
        cells = [f"{np.mean([run['final'] for run in runs]):.3f}"]
        cells.append(" ".join(f"{run['final']:.3f}" for run in runs))
        for name in ("best", "agrees", "memorised", "precision", "recall"):
            number = np.mean([run.get(name, np.nan) for run in runs])
            cells.append("-" if np.isnan(number) else f"{number:.3f}")
        lines.append(
            f"| {kind} | {teacher} ({found[teacher]:.3f}) | {told} | " + " | ".join(cells) + " |"
        )
    (HERE / "results" / "elr_real.md").write_text("\n".join([*lines, ""]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/committee"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=["mlp", "lora", "write"], default=[])
    given = parser.parse_args()
    if not given.runs.is_dir():
        raise SystemExit(
            f"{given.runs} is missing; run `llmlabel run recipes/committee.yaml` first"
        )
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.work / "elr_real.json"
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    pools, seen, test, labels = rows_of(given.runs)
    for teacher, rows in pools.items():
        found[teacher] = float((first(rows, labels) == gold_index(rows, labels)).mean())
    jobs = [("mlp", seed, t, w) for t in pools for w in SETTINGS for seed in range(2)]
    jobs += [
        ("lora", seed, t, w)
        for seed in range(2)
        for t in pools
        for w in (SETTINGS[0], SETTINGS[-1])
    ]
    for kind, seed, teacher, told in jobs:
        key = f"{kind} {teacher} {told} #{seed}"
        if kind not in given.part or key in found:
            continue
        weight, beta = (float(number) for number in told.split("/"))
        how: Any = {"setting": (weight, beta), "seed": seed}
        if kind == "mlp":
            found[key] = mlp(pools[teacher], test, seen[teacher], labels, **how)
        else:
            folder = given.work / key.replace(" ", "-").replace("/", "-")
            found[key] = lora(pools[teacher], test, labels, folder, **how)
        print(key, found[key], flush=True)
        file.write_text(json.dumps(found, indent=1), "utf-8")
    if "write" in given.part:
        write(given.work)


if __name__ == "__main__":
    main()
