"""Which labels mining takes for true and which for hard negatives, on labels that are known to be true.

    python benchmarks/mining.py --part teacher judge

One given label of each of 2,000 train rows of finna_yso is hidden. The teacher is MiniLM as it is,
which has seen none of the labels. `judge` asks SmolLM2-135M about a true label, a random one and a
mined negative of 80 rows. Results go to benchmarks/results/mining.md, a part at a time.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from llmlabel import models
from llmlabel.data import load, part, with_columns
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.label.judge import judge, probe_auc
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.train.mining import mine_negatives

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data" / "finna_yso"
RESULT = HERE / "results" / "mining.md"
ROWS, NEAREST, TAKEN, JUDGED = 2000, 50, 10, 80
SETTINGS: list[dict[str, Any]] = [
    {"rule": "none"},
    *({"rule": "perc_pos", "value": v, "positive": "max"} for v in (1.0, 0.95, 0.9, 0.8)),
    *({"rule": "perc_pos", "value": v, "positive": "mean"} for v in (1.0, 0.95)),
    *({"rule": "perc_pos", "value": v, "positive": "min"} for v in (1.0, 0.95)),
    *({"rule": "margin_pos", "value": v, "positive": "max"} for v in (0.05, 0.1)),
    *({"rule": "abs", "value": v} for v in (0.5, 0.4, 0.3)),
]


class Held:
    """An encoder that remembers what it has read."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.kept = encoder, dict[str, np.ndarray]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        """One vector a text; `options` are those of `unit_vectors`."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.kept]:
            self.kept |= dict(zip(new, unit_vectors(self.encoder, new), strict=True))
        return np.stack([self.kept[text] for text in texts])


def problem(data: Path) -> tuple[Dataset, LabelSpace, list[int]]:
    """Rows with all their labels but one, the label space, and the label that each row lacks."""
    known = load(data / "labels.jsonl.gz", text="name", id="label")
    names = known["name"][:]
    labels = load_labels(
        [
            {"id": id, "name": name if names.count(name) == 1 else f"{name} [{id}]"}
            for id, name in zip(known["label"][:], names, strict=True)
        ],
        multilabel=True,
    )
    rows = part(load(data / "finna_yso.jsonl.gz", gold="labels", labels=labels), split="train")
    rows = rows.select(range(ROWS))
    hidden, left = [], []
    for id, gold in zip(rows["id"][:], rows["gold"][:], strict=True):
        place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big") % len(gold)
        hidden.append(gold[place])
        left.append(gold[:place] + gold[place + 1 :])
    return with_columns(rows, {"gold": (left, List(Value("int32")))}), labels, hidden


def name_of(setting: dict[str, Any]) -> str:
    return ", ".join(str(value) for value in setting.values())


def teacher(rows: Dataset, labels: LabelSpace, hidden: list[int], encoder: Held) -> list[str]:
    lines = [
        f"## One hidden label of each of {ROWS:,} rows",
        "",
        f"The {NEAREST} nearest labels that a row was not given are looked at. In them lies the hidden "
        "label of HERE of the rows, the others can do no harm. Removed: hidden labels that are "
        "excluded. Kept: the other labels of the 50 that are not excluded; nobody knows how many of "
        f"them are true. Trained on: rows whose hidden label is among the {TAKEN} negatives, the "
        "hardest ones, or one in five of the 50.",
        "",
        "| rule, value, positive | removed, % of those in the 50 | % of all | kept, % | rows with "
        f"{TAKEN} negatives, % | trained on, topk, % | cyclic, % |",
        "|---|---|---|---|---|---|---|",
    ]
    found_at = np.zeros(len(rows), dtype=bool)
    for setting in SETTINGS:
        got = mine_negatives(rows, labels, encoder, k=NEAREST, count=NEAREST, **setting)
        excluded, rest = got["excluded_ids"][:], got["negative_ids"][:]
        out = np.array([h in some for h, some in zip(hidden, excluded, strict=True)])
        if setting["rule"] == "none":
            found_at = np.array([h in some for h, some in zip(hidden, rest, strict=True)])
        others = sum(h in some for h, some in zip(hidden, rest, strict=True))
        kept = (sum(map(len, rest)) - others) / (NEAREST * len(rows) - found_at.sum())
        used = [np.mean([h in some[:TAKEN] for h, some in zip(hidden, rest, strict=True)])]
        cyclic = mine_negatives(
            rows, labels, encoder, k=NEAREST, count=TAKEN, sample="cyclic", **setting
        )["negative_ids"][:]
        used.append(np.mean([h in some for h, some in zip(hidden, cyclic, strict=True)]))
        full = np.mean([len(some) >= TAKEN for some in rest])
        shares = (out[found_at].mean(), out.mean(), kept, full, *used)
        lines.append(
            f"| {name_of(setting)} | " + " | ".join(f"{100 * x:.1f}" for x in shares) + " |"
        )
    lines[2] = lines[2].replace("HERE", f"{100 * found_at.mean():.1f} %")
    return lines


def judged(rows: Dataset, labels: LabelSpace, hidden: list[int], encoder: Held) -> list[str]:
    """Pairs of three kinds, in the order of the rows, so that a query's stand together."""
    from llmlabel.engine.hf import HFEngine

    engine = HFEngine(models.SMOLLM2)
    some = rows.select(range(JUDGED))
    mined = mine_negatives(some, labels, encoder, k=NEAREST, count=1)["negative_ids"][:]
    texts, pairs = labels.texts(), []
    for row, (text, gold) in enumerate(zip(some["text"][:], some["gold"][:], strict=True)):
        rng = np.random.default_rng(row)
        far = rng.choice(np.setdiff1d(np.arange(len(labels)), [*gold, hidden[row]]))
        kinds = {"true": [hidden[row]], "random": [int(far)], "mined": mined[row] or []}
        pairs += [
            {"id": f"{row}/{kind}", "text": text, "candidate": texts[one], "kind": kind}
            for kind, ones in kinds.items()
            for one in ones
        ]
    got = judge(Dataset.from_list(pairs), engine)
    cosines = (
        unit_vectors(encoder, got["text"][:]) * unit_vectors(encoder, got["candidate"][:])
    ).sum(1)
    both = {
        "SmolLM2-135M": got,
        "MiniLM, cosine": got.remove_columns("match").add_column("match", cosines),
    }
    lines = [
        f"## Who tells a true label from a false one, {JUDGED} rows",
        "",
        "AUC of the hidden label of each row against a label drawn at random, and against the hardest "
        "negative of `perc_pos, 0.95, max` (which MiniLM itself chose, and some of which are true). "
        f"SmolLM2 read yes or no from {np.mean(got['match_mass'][:]):.2f} of its probability.",
        "",
        "| judge | against random | against mined |",
        "|---|---|---|",
    ]
    for name, answers in both.items():
        cells = []
        for kind in ("random", "mined"):
            chosen = [i for i, k in enumerate(answers["kind"][:]) if k in ("true", kind)]
            rest = answers.select(chosen)
            truth = [k == "true" for k in rest["kind"][:]]
            auc = probe_auc(with_columns(rest, {"is_match": (truth, Value("bool"))}))["auc"]
            cells.append(f"{auc:.3f} ± {error(auc, sum(truth), len(truth) - sum(truth)):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def error(auc: float, true: int, false: int) -> float:
    """Standard error of an AUC: Hanley and McNeil (1982)."""
    a, b = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (true - 1) * (a - auc**2) + (false - 1) * (b - auc**2)
    return float(np.sqrt(max(spread, 0) / (true * false)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", nargs="+", choices=("teacher", "judge"), default=["teacher", "judge"]
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, help="folder that keeps the parts that were measured")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise SystemExit(f"{args.data}: not there; skipped")
    work = args.work or RESULT.parent
    file = work / "mining.json"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    rows, labels, hidden = problem(args.data)
    encoder = Held(models.load_encoder(models.MINILM))
    for name, measure in (("teacher", teacher), ("judge", judged)):
        if name in args.part:
            kept[name] = measure(rows, labels, hidden, encoder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1), "utf-8")
    lines = ["# Negatives and labels that nobody gave", "", "`python benchmarks/mining.py`", ""]
    for name in ("teacher", "judge"):
        lines += [*kept.get(name, [f"({name}: not measured)"]), ""]
    RESULT.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    main()
