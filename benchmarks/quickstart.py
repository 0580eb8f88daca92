"""The quickstart's student beside what one would do without llmlabel, on the same rows and words.

    llmlabel run recipes/quickstart.yaml && python benchmarks/quickstart.py

Baselines, all on frozen MiniLM embeddings: zero-shot by label descriptions; four rounds of
self-training a logistic regression on each label's most confident 60 % of the train rows, started
from the zero-shot labels (no gold); a logistic regression on up to 1,000 gold train rows. Accuracy
is on the test rows of the run, with its 95 % interval. Writes benchmarks/results/quickstart.json.
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
from llmlabel.softlabels import SoftLabels


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--name", default="quickstart", help="name of the result file")
    arguments = parser.parse_args()
    texts = read_parquet(arguments.run / "texts" / "value.parquet")
    note = json.loads((arguments.run / "labels" / "value.json").read_text("utf-8"))
    labels = LabelSpace(**{k: _tuples(v) for k, v in note.items()})
    gold = gold_index(texts)
    split = np.array(texts["split"][:])
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")

    encoder = load_encoder(MINILM)
    embeddings = encoder.encode(
        texts["text"][:], normalize_embeddings=True, show_progress_bar=False
    )
    zero_shot = label_embedding(texts, encoder, labels)
    start = SoftLabels.from_dataset(zero_shot, labels).dense()
    some = np.random.default_rng(0).permutation(train)[:1000]
    supervised = LogisticRegression(max_iter=1000).fit(embeddings[some], gold[some])

    predictions = {
        "MiniLM zero-shot": start.argmax(axis=1),
        "self-training, frozen MiniLM": self_training(embeddings, start, train),
        f"{len(some)} gold rows, frozen MiniLM": supervised.predict(embeddings),
    }
    for name, shown in {
        "llm": "SmolLM2, bias corrected",
        "consensus": "consensus of both teachers",
        "student": "llmlabel student",
    }.items():
        rows = read_parquet(arguments.run / name / "value.parquet")
        predictions[shown] = SoftLabels.from_dataset(rows, labels).dense().argmax(axis=1)
    words = sorted({len(text.split()) for text in texts["text"]})[-1]
    result = {"words": words, "rows": len(texts), "test_rows": len(test), "accuracy": {}}
    for name, predicted in predictions.items():
        right = int((predicted[test] == gold[test]).sum())
        low, high = binomial_interval(right, len(test))
        result["accuracy"][name] = {
            "value": round(right / len(test), 4),
            "interval": [round(low, 4), round(high, 4)],
        }
        print(f"{name:36} {right / len(test):.4f}  [{low:.3f}, {high:.3f}]")
    output = Path(__file__).parent / "results" / f"{arguments.name}.json"
    output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
