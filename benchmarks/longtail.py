"""Long-tailed labels of which 40 % are missing: COMIC beside BCE, focal and asymmetric loss.

    python benchmarks/longtail.py ../shared/data/goemotions --work FOLDER --part embed zipf balanced write

GoEmotions, 28 labels, frozen MiniLM vectors, heads of one linear layer. `zipf`: train rows whose labels
fall off like rank^-1.5, from 1,500 rows to about 10, and 40 % of their labels deleted at random.
`balanced`: 70 rows of every label, nothing deleted. Learning rate, epochs and tau are chosen
by the first seed's mAP on validation rows, whose labels are all there; test rows measure only. What a part found is kept in
FOLDER; `write` makes benchmarks/results/longtail.md of it.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlabel.loss.head_tail import HeadTail, HeadTailBalancer, balance_loss
from llmlabel.loss.longtail import (
    LongTailLoss,
    asymmetric_loss,
)

HERE = Path(__file__).parent
SEEDS = range(3)
MISSING = 0.4
SHOTS = {"many": (100, 10**9), "medium": (20, 100), "few": (0, 20)}  # of the paper


# -------------------------------------------------------------------------------------- the rows


def read(data: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    with gzip.open(data / "goemotions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    labels = sorted({label for row in rows for label in row["labels"]})
    parts = {name: [r for r in rows if r["split"] == name] for name in ("validation", "test")}
    parts["validation"], parts["test"] = parts["validation"][:1500], parts["test"][:4000]
    seen = {row["text"] for some in parts.values() for row in some}
    parts["train"] = [r for r in rows if r["split"] == "train" and r["text"] not in seen]
    return parts, labels


def matrix(rows: list[dict[str, Any]], labels: list[str]) -> np.ndarray:
    found = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for number, row in enumerate(rows):
        found[number, [labels.index(label) for label in row["labels"]]] = 1
    return found


def rows_with(truth: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows that give each label about the wanted number, rare labels first."""
    order = np.random.default_rng(0).permutation(len(truth))
    counts, taken = np.zeros(len(wanted)), np.zeros(len(truth), dtype=bool)
    for label in np.argsort(wanted, kind="stable"):
        for row in order[truth[order, label] > 0]:
            if counts[label] >= wanted[label]:
                break
            if not taken[row] and (counts + truth[row] <= wanted).all():
                counts, taken[row] = counts + truth[row], True
    return np.flatnonzero(taken)


def embed(data: Path, work: Path) -> None:
    from llmlabel import models
    from llmlabel.label.embedding import unit_vectors

    parts, labels = read(data)
    truth = matrix(parts["train"], labels)
    ranks = np.empty(len(labels))
    ranks[np.argsort(-truth.sum(axis=0), kind="stable")] = np.arange(1, len(labels) + 1)
    train = {
        "zipf": rows_with(truth, np.floor(1500 * ranks**-1.5)),
        "balanced": rows_with(truth, np.full(len(labels), 70.0)),
    }
    encoder = models.load_encoder(models.MINILM)
    found: dict[str, np.ndarray] = {}
    for name in ("validation", "test"):
        found[f"{name} x"] = unit_vectors(encoder, [row["text"] for row in parts[name]])
        found[f"{name} y"] = matrix(parts[name], labels)
    for name, chosen in train.items():
        texts = [parts["train"][row]["text"] for row in chosen]
        found[f"{name} x"], found[f"{name} y"] = unit_vectors(encoder, texts), truth[chosen]
    np.savez(work / "goemotions.npz", **found)


# ------------------------------------------------------------------------------------- one training


BASELINES = {
    "BCE": {"gamma_neg": 0.0, "clip": 0.0},
    "focal, 2": {"gamma_pos": 2.0, "gamma_neg": 2.0, "clip": 0.0},
    "ASL, 4, .05": {"gamma_neg": 4.0, "clip": 0.05},
}
"""What is given to `asymmetric_loss`."""
PARTS = {
    "COMIC: modifier": "M",
    "COMIC: corrector": "C",
    "COMIC: modifier, corrector (`longtail` of the trainer)": "MC",
    "COMIC: modifier, balancer": "MH",
    "COMIC: corrector, balancer": "CH",
    "COMIC": "MCH",
}
MODIFIER = {"gamma_neg": 3.0, "head_tail_neg": 1.0, "clip": 0.05}
NO_MODIFIER = {"gamma_neg": 0.0, "head_tail_neg": 0.0, "clip": 0.0}
RATES = (1e-3, 3e-3, 1e-2)
EPOCHS, EVERY = 24, 2
BATCH = 128


def average_precision(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each label; NaN where no row has it."""
    ordered = np.take_along_axis(truth, np.argsort(-scores, axis=0, kind="stable"), axis=0)
    precision = np.cumsum(ordered, axis=0) / np.arange(1, len(ordered) + 1)[:, None]
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (precision * ordered).sum(axis=0) / ordered.sum(axis=0)
    return found


def one(kept: Any, name: str, method: str, rate: float, seed: int, tau: float) -> dict[str, Any]:
    """Precision after every epoch, and how right the labels are that the corrector adds."""
    x, truth = (torch.from_numpy(kept[f"{name} {what}"]).float() for what in "xy")
    x, draw = x * 8, torch.Generator().manual_seed(seed)
    given = truth * (torch.rand(truth.shape, generator=draw) >= (name == "zipf") * MISSING)
    parts, settings = PARTS.get(method, ""), BASELINES.get(method, BASELINES["BCE"])
    loss = None
    if parts:
        more = MODIFIER if "M" in parts else NO_MODIFIER
        settings = {key: more[key] for key in ("gamma_neg", "clip")}
        counts = given.sum(dim=0)
        loss = LongTailLoss(counts, len(x), tau=tau if "C" in parts else None, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Linear(x.shape[1], truth.shape[1])
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.constant_(network.bias, -3.0)
    if "H" in parts:
        network = HeadTailBalancer(x.shape[1], truth.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.0)
    curves = []
    for epoch in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(x), generator=draw).split(BATCH):
            optimizer.zero_grad()
            # that of scikit-learn's LogisticRegression at C = 1 on vectors of length 1
            penalty = 0.0 if "H" in parts else 32 / len(x) * network.weight.square().sum()
            (values(network(x[rows]), given[rows], loss, settings).mean() + penalty).backward()
            optimizer.step()
            if isinstance(loss, LongTailLoss):
                loss.keep()
            if isinstance(network, HeadTailBalancer):
                network.synchronize()
        network.eval()
        if epoch % EVERY == EVERY - 1:
            curves.append(measured(network, kept, loss, (x, truth, given)))
    return {"curves": curves, "counts": truth.sum(dim=0).tolist()}


def values(out: Any, targets: torch.Tensor, loss: Any, settings: dict[str, float]) -> torch.Tensor:
    """The loss of each row; with a balancer, of its three classifiers and what binds them."""
    if isinstance(out, HeadTail):
        both = loss.modified(out.head, targets) + loss.modified(out.tail, targets)
        return loss(out.balanced, targets) + both + balance_loss(out, targets, **settings)
    return asymmetric_loss(out, targets, **settings) if loss is None else loss(out, targets)


@torch.no_grad()
def measured(network: Any, kept: Any, loss: Any, train: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    def logits(x: torch.Tensor) -> torch.Tensor:
        out = network(x)
        return out.balanced if isinstance(out, HeadTail) else out

    found: dict[str, Any] = {}
    for what in ("validation", "test"):
        said = logits(torch.from_numpy(kept[f"{what} x"]).float() * 8)
        found[what] = average_precision(said.numpy(), kept[f"{what} y"]).tolist()
    if loss is not None and loss.corrector is not None:
        x, truth, given = train
        mean = loss.corrector.sums / loss.corrector.rows
        added = (logits(x).sigmoid() > mean.clamp(min=loss.corrector.tau)) & (given == 0)
        right = (added & (truth > 0)).sum()
        found["added"] = [float(n) for n in (added.sum(), right, truth.sum() - given.sum())]
    return found


def run(work: Path, name: str, methods: list[str], taus: list[float]) -> None:
    """The first seed with all settings, the others with the one that is best on validation rows."""
    kept = dict(np.load(work / "goemotions.npz"))
    file = work / f"{name}.json"
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def ensure(key: str, seed: int) -> None:
        method, tau, rate = json.loads(key)
        if len(found.setdefault(key, [])) == seed:
            found[key].append(one(kept, name, method, rate, seed, tau))
            file.write_text(json.dumps(found), "utf-8")

    for method in methods:
        for tau in taus if "C" in PARTS.get(method, "") else [0.0]:
            for rate in RATES:
                ensure(json.dumps([method, tau, rate]), 0)
    for seed in SEEDS[1:]:
        for method in methods:
            ensure(best_of(found, method)[0], seed)


# ---------------------------------------------------------------------------------------- the page


def best_of(found: dict[str, Any], method: str) -> tuple[str, int]:
    """Setting and epoch that are best on the validation rows of the first seed."""
    best: tuple[float, str, int] = (-1.0, "", 0)
    for key, runs in found.items():
        if json.loads(key)[0] == method and runs:
            curve = [np.nanmean(now["validation"]) for now in runs[0]["curves"]]
            best = max(best, (float(max(curve)), key, int(np.argmax(curve))))
    return best[1:]


def chosen(found: dict[str, Any], method: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Threshold, learning rate and epochs, and what each seed was after them."""
    key, epoch = best_of(found, method)
    told = [f"{n:g}" for n in json.loads(key)[1:]]
    return [*told, str(EVERY * (epoch + 1))], [
        run["curves"][epoch] | {"counts": run["counts"]} for run in found[key]
    ]


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| loss | all labels | by seed | many | medium | few | labels added: right | of the missing |"
        " tau, rate, epochs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in [*BASELINES, *PARTS]:
        if not any(json.loads(key)[0] == method for key in found):
            continue
        told, seeds = chosen(found, method)
        counts = np.array(seeds[0]["counts"])
        shots = [(counts >= 0)] + [
            (counts >= low) & (counts < high) for low, high in SHOTS.values()
        ]
        scores = 100 * np.array([seed["test"] for seed in seeds], dtype=np.float64)
        cells = [f"{np.nanmean(scores[:, own]):.2f}" if own.any() else "-" for own in shots]
        cells.insert(1, " ".join(f"{np.nanmean(seed):.2f}" for seed in scores))
        added = np.sum([seed.get("added", [0, 0, 0]) for seed in seeds], axis=0)
        cells += [f"{added[1] / n:.2f}" if n else "-" for n in (added[0], added[2])]
        lines.append(f"| {method} | " + " | ".join(cells) + " | " + ", ".join(told) + " |")
    return lines


def page(work: Path) -> str:
    kept = np.load(work / "goemotions.npz")
    rows = {name: len(kept[f"{name} x"]) for name in ("zipf", "balanced", "validation", "test")}
    parts = {name: json.loads((work / f"{name}.json").read_text("utf-8")) for name in NAMES}
    return "\n".join(
        [
            "# A long tail of labels, of which 40 % are missing: GoEmotions on frozen MiniLM vectors",
            "",
            "Written by `python benchmarks/longtail.py ../shared/data/goemotions --work FOLDER --part "
            "write`.",
            "",
            f"mAP in %, on {rows['test']:,} test rows, the mean of {len(SEEDS)} seeds, which draw the "
            "missing labels and the order of rows. Many, medium, few: labels with over 100, 20 to 100 "
            "and below 20 train rows before labels were deleted. Learning rate, epochs and tau by the "
            f"first seed's mAP on {rows['validation']:,} validation rows with all their labels. Labels added: "
            "those of the train rows that the corrector would add after these epochs, and the share that "
            "had been deleted; then the share of the deleted labels that it finds. "
            "Heads without the balancer have an L2 penalty, chosen before; those with it have none, so its "
            "lines are no clean ablation.",
            "",
            f"## 40 % missing, {rows['zipf']:,} train rows, 1,500 to 10 a label",
            "",
            *table(parts["zipf"]),
            "",
            f"## Nothing missing, {rows['balanced']:,} train rows, 70 a label",
            "",
            *table(parts["balanced"]),
            "",
        ]
    )


NAMES = ("zipf", "balanced")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=["embed", *NAMES, "write"], default=[])
    parser.add_argument("--methods", nargs="+", default=[*BASELINES, *PARTS])
    parser.add_argument("--taus", nargs="+", type=float, default=[0.7, 0.9])
    given = parser.parse_args()
    if not given.data.is_dir():
        raise SystemExit(f"{given.data} is missing; nothing is measured")
    given.work.mkdir(parents=True, exist_ok=True)
    if "embed" in given.part:
        embed(given.data, given.work)
    for name in NAMES:
        if name in given.part:
            run(given.work, name, given.methods, given.taus)
    if "write" in given.part:
        (HERE / "results" / "longtail.md").write_text(page(given.work), "utf-8")


if __name__ == "__main__":
    main()
