"""What self-training does for a small model on two-domain tasks, each variant with its ablations.

    python benchmarks/selftrain.py --work /tmp/selftrain --seeds 0 --variants "reinforce, 2 rounds"

SmolLM2-135M in bfloat16 labels 400 train rows of two domains of CLINC150 by the domains' names, with
at most 2,000 calls. Gold serves for measuring only. A run is compared with the manual prompt without
demonstrations, as it is and with the label preference taken out. The folder --work keeps answers and
finished runs, so tasks, variants and seeds may be asked for one by one;
benchmarks/results/selftrain.md is written from all runs in it.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from llmlabel.data import gold_index, load, with_columns
from llmlabel.engine import Engine
from llmlabel.engine.cache import CachedEngine
from llmlabel.engine.hf import HFEngine
from llmlabel.label.demonstrations import choose_demonstrations
from llmlabel.label.direct import label_direct
from llmlabel.label.selftrain import label_selftrain, reliable_rows
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import correct
from llmlabel.models import SMOLLM2
from llmlabel.refine.aggregate import aggregate
from llmlabel.refine.bias import changes, gain_interval
from llmlabel.refine.debias import batch_calibration
from llmlabel.softlabels import SoftLabels

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
ROWS, BUDGET = 400, 2000
TASKS = {
    "travel/auto": ("travel", "auto_and_commute"),
    "work/small talk": ("work", "small_talk"),
    "banking/travel": ("banking", "travel"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "reinforce, 1 round": {"rounds": 1},
    "reinforce, 2 rounds": {"rounds": 2},
    "reinforce, 3 rounds, 4 samples": {"rounds": 3, "samples": 4},
    "bdpl, 2 rounds": {"rounds": 2, "optimiser": "bdpl"},
    "textual, 2 rounds": {"rounds": 2, "optimiser": "textual", "samples": 4, "batch_rows": 20},
    "reinforce, 2 rounds, off in training": {"rounds": 2, "demonstrations_in_training": False},
    "reinforce, 2 rounds, no demonstrations": {"rounds": 2, "demonstrations": 0},
}
UNLEARNED = {"demonstrations only, 2 rounds": 2, "demonstrations only, 4 rounds": 4}
"""The same rounds with the manual prompt: 1,200 and 2,000 calls."""


def task(data: Path, domains: tuple[str, str], seed: int) -> tuple[Dataset, LabelSpace]:
    """Train rows of two domains, without their gold for the labeler, and the label space."""
    labels = load_labels([{"id": one, "name": one.replace("_", " ")} for one in domains])
    table = load(data / "clinc150_oos" / "clinc150_oos.jsonl")
    pairs = zip(table["split"], table["domain"], strict=True)
    own = [i for i, (split, domain) in enumerate(pairs) if split == "train" and domain in domains]
    rows = table.select(np.random.default_rng(seed).permutation(own)[:ROWS])
    gold = [[labels.index(domain)] for domain in rows["domain"]]
    return with_columns(rows, {"gold": (gold, List(Value("int32")))}), labels


def unlearned(
    rows: Dataset, labels: LabelSpace, engine: Engine, seed: int, rounds: int
) -> tuple[Dataset, dict[str, Any]]:
    """What `label_selftrain` does where label preferences are taken out, but for the prompt."""
    direct = label_direct(rows, engine, labels, prompt="label/selftrain")
    found, notes = {"manual": batch_calibration(direct, labels)}, []
    for number in range(1, rounds + 1):
        belief = aggregate(found, labels)
        probs = SoftLabels.from_dataset(belief, labels).dense()
        pool = belief.select(reliable_rows(probs, rows["id"][:], share=0.2))
        shown = choose_demonstrations(
            *(rows, pool, labels), n=8, method="fixed", answers="soft", seed=seed + number
        )
        now = label_direct(shown, engine, labels, prompt="label/selftrain")
        found[f"round {number}"] = batch_calibration(now, labels)
        note = {"reliable": pool["id"][:], "learned": {}, "loss": 0.0, "loss before": 0.0}
        notes.append(note)
    preference = {"taken out": True}
    report = {"calls": len(rows) * (1 + rounds), "rounds": notes, "label preference": preference}
    return aggregate(found, labels), report


def trained(
    rows: Dataset, labels: LabelSpace, engine: Engine, seed: int, given: dict[str, Any]
) -> tuple[Dataset, dict[str, Any]]:
    """A run of `label_selftrain` and its report."""
    with tempfile.TemporaryDirectory() as folder:
        learned = label_selftrain(
            *(rows, engine, labels), budget_calls=BUDGET, seed=seed, output=Path(folder), **given
        )
        return learned, json.loads((Path(folder) / "selftrain.json").read_text("utf-8"))


def measured(
    rows: Dataset, labels: LabelSpace, engine: Engine, seed: int, variant: str
) -> dict[str, Any]:
    """One run beside the manual prompt; shares of rows, and counts for pooling."""
    texts = rows.select_columns(["id", "text"])
    manual = label_direct(texts, engine, labels, prompt="label/selftrain")
    if variant in UNLEARNED:
        learned, report = unlearned(texts, labels, engine, seed, UNLEARNED[variant])
    else:
        learned, report = trained(texts, labels, engine, seed, VARIANTS[variant])
    calibrated = batch_calibration(manual, labels)
    gold = gold_index(rows, labels)
    right = {
        name: correct(SoftLabels.from_dataset(table, labels).dense(), gold)
        for name, table in {"manual": manual, "calibrated": calibrated, "learned": learned}.items()
    }
    start = right["calibrated" if report["label preference"]["taken out"] else "manual"]
    reliable = np.isin(rows["id"][:], list(report["rounds"][0]["reliable"]))
    return {
        **{name: float(hits.mean()) for name, hits in right.items()},
        "changes": {
            name: changes(right[name], right["learned"]) for name in ("manual", "calibrated")
        },
        "reliable": float(start[reliable].mean()),
        "rest": float(start[~reliable].mean()),
        "calls": report["calls"],
        "taken out": report["label preference"]["taken out"],
        "kept": [bool(one["loss"] < one["loss before"]) for one in report["rounds"]],
        "learned prompt": report["rounds"][-1]["learned"],
    }


def section(seed: str, runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A table of one seed in Markdown; runs by variant and task."""
    tasks = [name for name in TASKS if all(name in some for some in runs.values())]
    lines = [
        f"## Seed {seed}",
        "",
        f"| | {' | '.join(tasks)} | mean | gain, 95 % | reliable - rest | prompts kept | calls |",
        f"|---|{'---|' * (len(tasks) + 5)}",
    ]
    first = next(iter(runs.values()))
    for title, key in (("manual prompt", "manual"), ("the same, preference out", "calibrated")):
        shares = [first[name][key] for name in tasks]
        lines.append(f"| {title} | {_shares(shares)} | | | | {ROWS} |")
    for variant, some in runs.items():
        found = [some[name] for name in tasks]
        won, lost = np.sum([one["changes"]["calibrated"] for one in found], axis=0).tolist()
        low, high = gain_interval(won, lost, ROWS * len(tasks))
        gain = 100 * (won - lost) / (ROWS * len(tasks))
        apart = " / ".join(f"{100 * (one['reliable'] - one['rest']):.0f}" for one in found)
        kept = [kept for one in found for kept in one["kept"]]
        calls = max(one["calls"] for one in found)
        lines.append(
            f"| {variant} | {_shares([one['learned'] for one in found])} | "
            f"{gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | {apart} | "
            f"{f'{sum(kept)} of {len(kept)}' if variant in VARIANTS else ''} | {calls} |"
        )
    return "\n".join(lines) + "\n"


def _shares(shares: list[float]) -> str:
    return " | ".join(f"{share:.3f}" for share in [*shares, float(np.mean(shares))])


HEAD = f"""# Self-training of SmolLM2-135M

`python benchmarks/selftrain.py --work FOLDER`, with `--tasks` and `--variants` for what is in the
table: accuracy on {ROWS} unlabelled rows of two domains of
CLINC150 after at most {BUDGET} calls. *Gain* is in points over the manual prompt with the label
preference taken out, pooled over the tasks, with the exact interval of the rows that changed
(McNemar). *Reliable - rest* is the accuracy of the manual prompt's labels, without preference, on
the rows that the first round takes as reliable minus that on the other rows, in points, task by
task. *Prompts kept* counts the rounds whose learned prompt had less loss than the one before.
*Demonstrations only* is the same without learning a prompt. No gold is read but for measuring.

"""


def main() -> None:
    names = [*VARIANTS, *UNLEARNED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with clinc150_oos")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps answers, runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of rows and draws")
    arguments = parser.parse_args()
    if not (arguments.data / "clinc150_oos").is_dir():
        parser.exit(1, f"{arguments.data}: no clinc150_oos there; give its folder with --data\n")
    file = arguments.work / "runs.json"
    runs = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    engine = CachedEngine(HFEngine(SMOLLM2), arguments.work / "answers.sqlite")
    wanted = itertools.product(arguments.seeds, arguments.variants, arguments.tasks)
    for seed, variant, name in wanted:
        done = runs.setdefault(str(seed), {}).setdefault(variant, {})
        if name not in done:
            rows, labels = task(arguments.data, TASKS[name], seed)
            done[name] = measured(rows, labels, engine, seed, variant)
            file.write_text(json.dumps(runs, indent=1), "utf-8")
        print(seed, variant, name, json.dumps(done[name]), flush=True)
    parts = [
        section(seed, {name: some[name] for name in names if name in some})
        for seed, some in sorted(runs.items())
    ]
    (HERE / "results" / "selftrain.md").write_text(HEAD + "\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
