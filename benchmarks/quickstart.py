"""The quickstart's student beside what one would do without llmlabel, on the same rows and words.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4

Baselines, all on frozen MiniLM embeddings: zero-shot by label descriptions; four rounds of
self-training a logistic regression on each label's most confident 60 % of the train rows, started
from the zero-shot labels (no gold); a logistic regression on up to 1,000 gold train rows. Accuracy
is on the test rows; each seed splits the rows anew and runs the recipe (what does not depend on the
split is kept). Writes benchmarks/results/quickstart.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from llmlabel.data import gold_index, read_parquet
from llmlabel.label.embedding import label_embedding
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import binomial_interval
from llmlabel.models import MINILM, load_encoder
from llmlabel.recipe import load_recipe, run
from llmlabel.softlabels import SoftLabels

SOURCES = {
    "llm": "SmolLM2, bias corrected",
    "consensus": "consensus of both teachers",
    "student": "llmlabel student",
}


def self_training(
    embeddings: np.ndarray,
    start: np.ndarray,
    train: np.ndarray,
    rounds: int = 4,
    share: float = 0.6,
) -> np.ndarray:
    """Labels of all rows after `rounds` of refitting on each label's most confident rows."""
    probs = start
    for _ in range(rounds):
        best, confidence = probs.argmax(axis=1), probs.max(axis=1)
        kept: list[int] = []
        for label in range(probs.shape[1]):
            rows = train[best[train] == label]
            order = rows[np.argsort(-confidence[rows], kind="stable")]
            kept += order[: int(np.ceil(share * len(rows)))].tolist()
        model = LogisticRegression(max_iter=1000).fit(embeddings[kept], best[kept])
        probs = np.zeros_like(start)
        probs[:, model.classes_] = model.predict_proba(embeddings)
    return probs.argmax(axis=1)


def accuracies(run_folder: Path) -> dict[str, tuple[int, int]]:
    """Right and all test rows of a finished run, for the baselines and its own sources."""
    texts = read_parquet(run_folder / "texts" / "value.parquet")
    note = json.loads((run_folder / "labels" / "value.json").read_text("utf-8"))
    labels = LabelSpace(**{name: _tuples(value) for name, value in note.items()})
    gold = gold_index(texts, labels)
    split = np.array(texts["split"][:])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    encoder = load_encoder(MINILM)
    embeddings = encoder.encode(
        texts["text"][:], normalize_embeddings=True, show_progress_bar=False
    )
    start = SoftLabels.from_dataset(label_embedding(texts, encoder, labels), labels).dense()
    some = np.random.default_rng(0).permutation(train)[:1000]
    supervised = LogisticRegression(max_iter=1000).fit(embeddings[some], gold[some])
    predictions = {
        "MiniLM zero-shot": start.argmax(axis=1),
        "self-training, frozen MiniLM": self_training(embeddings, start, train),
        "1000 gold rows, frozen MiniLM": supervised.predict(embeddings),
    }
    for name, shown in SOURCES.items():
        rows = read_parquet(run_folder / name / "value.parquet")
        predictions[shown] = SoftLabels.from_dataset(rows, labels).dense().argmax(axis=1)
    found = {
        name: (int((predicted[test] == gold[test]).sum()), len(test))
        for name, predicted in predictions.items()
    }
    sets = read_parquet(run_folder / "sets" / "value.parquet")["set_ids"][:]
    found["coverage of the sets"] = (sum(int(gold[i]) in sets[i] for i in test), len(test))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the split")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as short.words=60")
    arguments = parser.parse_args()
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for seed in arguments.seeds:
        recipe = load_recipe("quickstart", [f"texts.seed={seed}", *arguments.overrides])
        run(recipe, output=arguments.output)
        for name, counts in accuracies(arguments.output / "quickstart").items():
            found.setdefault(name, {})[seed] = counts
    result = {}
    for name, counts in found.items():
        shares = {seed: round(right / rows, 4) for seed, (right, rows) in counts.items()}
        low, high = binomial_interval(*counts[arguments.seeds[0]])
        mean = round(float(np.mean(list(shares.values()))), 4)
        result[name] = {"mean": mean, "by_seed": shares, "interval_of_first": [low, high]}
        print(f"{name:32} mean {mean:.4f}  " + "  ".join(f"{v:.4f}" for v in shares.values()))
    name = "-".join(["quickstart", *arguments.overrides]).replace("=", "-")
    output = Path(__file__).parent / "results" / f"{name}.json"
    output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
