"""Crowd aggregation: accuracy and likelihood on recorded votes, and speed beside crowd-kit.

    python benchmarks/annotators.py --crowdkit ../crowdkit-venv/bin/python

Reads ../shared/data/sdg_benchmark (votes of 15 systems) and wrench_small (73 regular expressions).
Gold measures, and chooses a method where the table says so; no method reads it. `--crowdkit` names a
Python with crowd-kit, which then runs on the same random votes; without it that part is skipped.
Writes benchmarks/results/annotators.md.
"""

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from llmlabel import metrics
from llmlabel.data import with_columns
from llmlabel.files import write_text
from llmlabel.labelspace import load_labels
from llmlabel.refine.aggregate import aggregate, combine, vote_confidence
from llmlabel.refine.annotators import dawid_skene
from llmlabel.refine.votes import VOTES, Votes, vote_lists

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
METHODS = (
    *("majority", "softmax", "wawa", "zbs", "glad", "mace", "dawid_skene", "mean_of_methods"),
)
PEER = """
import json, sys, time, warnings
import numpy as np, pandas as pd
warnings.simplefilter("ignore")
from crowdkit.aggregation import DawidSkene
votes = np.load(sys.argv[1])
table = pd.DataFrame({"task": votes["row"], "worker": votes["source"], "label": votes["label"]})
taken = []
for _ in range(3):
    start = time.perf_counter()
    probs = DawidSkene().fit_predict_proba(table)
    taken.append(time.perf_counter() - start)
probs = probs.sort_index().reindex(columns=sorted(probs.columns)).to_numpy()
np.save(sys.argv[2], probs)
print(json.dumps({"seconds": min(taken)}))
"""


def hard_votes(answers: np.ndarray, names: list[str], labels: int) -> Votes:
    """Votes of a matrix rows x sources of label ids, -1 where a source abstains."""
    row, source = np.nonzero(answers >= 0)
    label = answers[row, source]
    return Votes(row, source, label, np.ones(len(row)), tuple(names), len(answers), labels)


def sdg() -> tuple[dict[str, Votes], np.ndarray, np.ndarray]:
    """Votes of three groups of systems, the true answers, and the text of each row by number."""
    lines = (DATA / "sdg_benchmark" / "sdg_benchmark.jsonl").read_text("utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    names = sorted(rows[0]["votes"])
    families = ("openai", "deepseek", "llama", "mixtral", "gemini", "anthropic")
    llms = [name for name in names if name.startswith(families)]
    others = [name for name in names if name not in llms]
    groups = {"all 15 systems": names, "9 language models": llms, "6 others": others}
    votes = {
        title: hard_votes(np.array([[row["votes"][n] for n in of] for row in rows]), of, 2)
        for title, of in groups.items()
    }
    gold = np.array([int(row["label"] == "relevant") for row in rows])
    texts = np.unique([row["text"] for row in rows], return_inverse=True)[1]
    return votes, gold, texts


def line(name: str, probs: np.ndarray, gold: np.ndarray) -> str:
    return (
        f"| {name} | {metrics.accuracy(probs, gold):.4f} | {metrics.nll(probs, gold):.3f} | "
        f"{metrics.brier(probs, gold):.3f} | {metrics.ece(probs, gold):.3f} |"
    )


HEADER = ["| method | accuracy | NLL | Brier | ECE |", "|---|---|---|---|---|"]


def recorded_systems() -> list[str]:
    """Every method on the recorded systems, and a cross-validated choice among them."""
    votes, gold, texts = sdg()
    lines = ["## sdg_benchmark: 1,251 yes/no questions, recorded answers of 15 systems", ""]
    found: dict[str, np.ndarray] = {}
    for title, cast in votes.items():
        table = {method: combine(cast, method) for method in METHODS}
        found |= {f"{title}: {method}": probs for method, probs in table.items()}
        recipe = dawid_skene(cast, smoothing=0.01, iterations=50, tolerance=-np.inf)
        lines += [f"{title}:", "", *HEADER]
        lines += [line(method, probs, gold) for method, probs in table.items()]
        lines += [line("dawid_skene, 50 steps, smoothing 0.01", recipe.probs, gold), ""]
        singles = [metrics.nll(table[method], gold) for method in METHODS[:-1]]
        mean = metrics.nll(table["mean_of_methods"], gold)
        lines += [f"NLL of the mean {mean:.3f}, median method {np.median(singles):.3f}.", ""]
    cast = votes["all 15 systems"]
    probs = found["all 15 systems: majority"]
    confidence, agreement = vote_confidence(cast, probs.argmax(axis=1))
    right = metrics.correct(probs, gold)
    lines += [
        "Majority of all 15, by the number of systems that agree with it. Area under the "
        f"risk-coverage curve (lower is better): {metrics.aurc(confidence, right):.4f} by consensus "
        f"confidence, {metrics.aurc(probs.max(axis=1), right):.4f} by vote share: these votes have no "
        "probabilities, so the former says nothing.",
        *("", "| at least | rows kept | accuracy |", "|---|---|---|"),
    ]
    for least in (8, 10, 12, 14, 15):
        kept = agreement >= least
        lines.append(f"| {least} | {kept.mean():.1%} | {right[kept].mean():.4f} |")
    lines.append("")
    answers = cast.label.reshape(cast.rows, -1)
    single = {name: np.eye(2)[answers[:, at]] for at, name in enumerate(cast.names)}
    best = max(single, key=lambda name: metrics.accuracy(single[name], gold))
    lines += [
        "Choice of one of the 24 by 5-fold cross-validation (texts kept together), accuracy on the "
        "held-out rows, mean and worst of 20 divisions into folds. Best single system, with "
        f"hindsight: {best}, {metrics.accuracy(single[best], gold):.4f}.",
        "",
        "| chosen by | from | accuracy, mean | worst | most often chosen |",
        "|---|---|---|---|---|",
    ]
    for criterion, of in (("NLL", found), ("accuracy", found), ("accuracy", single)):
        runs = [held_out(of, gold, texts, criterion, seed) for seed in range(20)]
        right = [accuracy for accuracy, _ in runs]
        name, times = Counter(one for _, chosen in runs for one in chosen).most_common(1)[0]
        kind = "methods" if of is found else "single systems"
        lines.append(
            f"| {criterion} | {kind} | {np.mean(right):.4f} | {min(right):.4f} | {name} "
            f"({times} of 100) |"
        )
    return [*lines, ""]


def held_out(
    found: dict[str, np.ndarray], gold: np.ndarray, texts: np.ndarray, criterion: str, seed: int
) -> tuple[float, list[str]]:
    """Accuracy on held-out rows of what is best on the others, and what that was in each fold."""
    fold = np.random.default_rng(seed).integers(0, 5, texts.max() + 1)[texts]
    right, chosen = np.zeros(len(gold), dtype=bool), []
    score: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "NLL": lambda probs, gold: -metrics.nll(probs, gold),
        "accuracy": metrics.accuracy,
    }
    for number in range(5):
        train, test = fold != number, fold == number
        best = max(found, key=lambda name: score[criterion](found[name][train], gold[train]))
        right[test] = metrics.correct(found[best][test], gold[test])
        chosen.append(best)
    return float(right.mean()), chosen


def rules() -> list[str]:
    """Regular expressions that each vote for one label only."""
    raw = gzip.decompress((DATA / "wrench_small" / "sms.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(one) for one in raw.split("\n")[:-1]]
    rows = [row for row in rows if row["split"] == "train"]
    answers = np.array([row["weak_labels"] for row in rows])
    cast = hard_votes(answers, [f"rule {n}" for n in range(answers.shape[1])], 2)
    gold, covered = np.array([row["label_id"] for row in rows]), cast.voted
    lines = [
        f"## wrench_small: 73 rules for SMS spam, {covered.sum()} covered rows of {len(rows)}",
        *("", *HEADER),
    ]
    for method in METHODS[:-2]:
        lines.append(line(method, combine(cast, method)[covered], gold[covered]))
    for name, options in (
        ("as it is", {}),
        ("50 steps, smoothing 0.01", {"iterations": 50, "tolerance": -np.inf, "smoothing": 0.01}),
    ):
        probs = dawid_skene(cast, abstention="response", **options).probs
        name = f"dawid_skene, abstention as a response, {name}"
        lines.append(line(name, probs[covered], gold[covered]))
    try:
        dawid_skene(cast)
    except ValueError as error:
        lines += ["", f"Without abstentions, refused: {error}."]
    return [*lines, ""]


def random_votes(rows: int, *, seed: int, votes: int = 10, labels: int = 10) -> Votes:
    """Ten votes a row by 50 sources that know the label in 20 to 70 % of their rows, else guess."""
    rng = np.random.default_rng(seed)
    gold, accuracy = rng.integers(0, labels, rows), rng.uniform(0.2, 0.7, 50)
    begin = rng.integers(0, 50, rows)
    source = np.sort((begin[:, None] + np.arange(votes)) % 50, axis=1)
    wrong = rng.integers(0, labels, (rows, votes))
    label = np.where(rng.random((rows, votes)) < accuracy[source], gold[:, None], wrong)
    row = np.repeat(np.arange(rows, dtype=np.int32), votes)
    return Votes(
        *(row, source.ravel().astype(np.int32), label.ravel().astype(np.int32)),
        *(np.ones(row.size), tuple(f"s{n:02}" for n in range(50)), rows, labels),
    )


def measure(rows: int, *, table: bool) -> None:
    """Prints seconds and peak memory of Dawid-Skene, on arrays or on a table with `votes`."""
    votes = random_votes(rows, seed=0)
    if table:
        labels = load_labels([str(n) for n in range(votes.labels)])
        entries = pa.table(
            {
                "source": pa.array(votes.names).take(pa.array(votes.source)),
                "label_id": pa.array(votes.label),
                "prob": pa.nulls(len(votes.row), pa.float32()),
            }
        )
        column = vote_lists(votes.row, entries, rows=rows)
        dataset = Dataset.from_dict({"id": np.arange(rows).astype(str)})
        dataset = with_columns(dataset, {"votes": (column, VOTES)})
        del votes, entries, column
        start = time.perf_counter()
        aggregate(dataset, labels, method="dawid_skene")
    else:
        start = time.perf_counter()
        dawid_skene(votes)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def speed(rows: int, peer: Path | None, peer_rows: int) -> list[str]:
    lines = ["## Speed: Dawid-Skene, 10 votes a row, 10 labels, 50 sources", ""]
    lines += ["| what | rows | seconds | peak memory, MB |", "|---|---|---|---|"]
    for name, option in (("arrays", []), ("table with `votes`, read and written", ["--table"])):
        command = [sys.executable, __file__, "--measure", str(rows), *option]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        lines.append(f"| {name} | {rows:,} | {told['seconds']:.1f} | {told['peak_mb']:.0f} |")
    if peer is None:
        return [*lines, "", "crowd-kit: not asked for.", ""]
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "votes.npz", Path(folder) / "probs.npy"
        votes = random_votes(peer_rows, seed=0)
        np.savez(given, row=votes.row, source=votes.source, label=votes.label)
        command = [str(peer), "-c", PEER, str(given), str(got)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs, probs = json.loads(done.stdout)["seconds"], np.load(got)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        fitted = dawid_skene(votes)
        taken.append(time.perf_counter() - start)
    ours = min(taken)
    apart = float(np.abs(fitted.probs - probs).max())
    lines += [
        f"| arrays | {peer_rows:,} | {ours:.2f} | |",
        f"| crowd-kit | {peer_rows:,} | {theirs:.2f} | |",
        "",
        f"In one run on the same {peer_rows:,} rows: {theirs / ours:.0f} times as fast as crowd-kit (best of 3 each), "
        f"{len(fitted.log_likelihoods)} steps, largest difference of a probability {apart:.1e}.",
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crowdkit", type=Path, help="a Python that has crowd-kit")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--crowdkit-rows", type=int, default=100_000)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    if arguments.measure:
        measure(arguments.measure, table=arguments.table)
        return
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not there")
        return
    lines = ["# Crowd aggregation", "", "`python benchmarks/annotators.py --crowdkit PYTHON`.", ""]
    lines += recorded_systems() + rules()
    lines += speed(arguments.rows, arguments.crowdkit, arguments.crowdkit_rows)
    text = "\n".join(lines)
    write_text(HERE / "results" / "annotators.md", text)
    print(text)


if __name__ == "__main__":
    main()
