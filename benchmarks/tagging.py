"""Causal and bidirectional taggers (LS-LLaMA and LS-unLLaMA) of SmolLM2-135M on named entities.

    python benchmarks/tagging.py TRAIN TEST --columns 1 2 --work FOLDER --part causal bidirectional write

TRAIN and TEST are CoNLL files: a token a line, an empty line behind a sentence, tags as B-PER, I-PER, O;
`--columns` says where token and tag stand. Nothing of them comes with llmlabel. With a free licence there
are for example (names of GitHub repositories)

- UniversalNER/UNER_English-EWT, CC BY-SA 4.0: en_ewt-ud-dev.iob2, en_ewt-ud-test.iob2, columns 1 2;
- leondz/emerging_entities_17, CC BY 4.0: wnut17train.conll, emerging.test.annotated, columns 0 1.

Both taggers have the same rows, settings, updates and seed; the number of epochs is fixed, so that
nothing is chosen on test rows. A training that was stopped goes on where it was, and FOLDER keeps what
was found; `write` makes benchmarks/results/tagging.md of it. `rows` writes tagged.jsonl, texts.jsonl and
labels.yaml into FOLDER, for recipes/ls_unllama_ner.yaml.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from llmlabel import models
from llmlabel.data import plain_words, with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.refine.views import SPANS
from llmlabel.train.spans import spans_of, tags_of
from llmlabel.train.tokens import _tokenizer, _words, measure_spans, predict_spans, train_tagger

TRAINING = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 8,
    "max_length": 64,
}

Row = dict[str, Any]


def sentences(file: Path, columns: tuple[int, int]) -> list[Row]:
    """Tokens joined by blanks, and the spans of their tags by name."""
    found: list[Row] = []
    text, spans = "", []
    for line in [*file.read_text("utf-8").split("\n"), ""]:
        parts = line.split("\t")
        if len(parts) <= max(columns):
            if text:
                found.append({"id": f"{file.stem} {len(found)}", "text": text, "spans": spans})
            text, spans = "", []
            continue
        token, tag = (parts[at].strip() for at in columns)
        start = len(text) + bool(text)
        text = f"{text} {token}".strip()
        kind, _, label = tag.partition("-")
        if kind == "B" or (kind == "I" and not (spans and spans[-1]["end"] == start - 1)):
            spans.append({"start": start, "end": len(text), "label": label})
        elif kind == "I":
            spans[-1]["end"] = len(text)
    return found


def tables(given: argparse.Namespace) -> tuple[dict[str, Dataset], LabelSpace]:
    """Rows that are read whole; no text of a test row is trained on."""
    columns = tuple(given.columns)
    train, test = (sentences(file, columns) for file in (given.train, given.test))
    labels = load_labels(sorted({span["label"] for row in train for span in row["spans"]}))
    tokenizer, rng = _tokenizer(models.SMOLLM2), np.random.default_rng(0)
    limit = TRAINING["max_length"]
    train, test = (
        [row for row in rows if _words(tokenizer, row["text"], limit)[2] <= limit]
        for rows in (train, test)
    )
    train, test = ([rows[at] for at in rng.permutation(len(rows))] for rows in (train, test))
    train = train[: given.rows]
    seen = {plain_words(row["text"]) for row in train}
    test = [row for row in test if plain_words(row["text"]) not in seen][: given.test_rows]
    return {"train": table(train, labels), "test": table(test, labels)}, labels


def table(rows: list[Row], labels: LabelSpace) -> Dataset:
    plain = Dataset.from_dict({name: [row[name] for row in rows] for name in ("id", "text")})
    spans = [
        [
            {
                **{"start": span["start"], "end": span["end"], "prob": None, "agreement": None},
                "label_id": labels.index(span["label"]),
            }
            for span in row["spans"]
        ]
        for row in rows
    ]
    return with_columns(plain, {"spans": (spans, SPANS)})


def ceiling(rows: Dataset, labels: LabelSpace) -> float:
    """F1 of the true spans themselves, once they are tags of the tokenizer's words."""
    tokenizer = _tokenizer(models.SMOLLM2)
    found = []
    for text, spans in zip(rows["text"], rows["spans"], strict=True):
        _, words, _ = _words(tokenizer, text, TRAINING["max_length"])
        found.append(spans_of(tags_of(spans, words, labels=len(labels)), words))
    return measure_spans(with_columns(rows, {"spans": (found, SPANS)}), rows, labels)["f1"]


def run(
    part: str, rows: dict[str, Dataset], labels: LabelSpace, given: argparse.Namespace
) -> dict[str, Any]:
    folder = given.work / f"{part}-{given.seed}"
    if not (folder / "model_card.json").is_file():
        train_tagger(
            rows["train"],
            labels,
            model=models.SMOLLM2,
            output=folder,
            bidirectional=part == "bidirectional",
            num_train_epochs=given.epochs,
            seed=given.seed,
            **TRAINING,
        )
    texts = rows["test"].select_columns(["id", "text"])
    got = predict_spans(texts, model=folder)
    got.select_columns(["id", "spans"]).to_json(given.work / f"{folder.name}.jsonl")
    return measure_spans(got, rows["test"], labels)


def keep(work: Path, name: str, result: dict[str, Any]) -> None:
    file = work / "tagging.json"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(kept | {name: result}, indent=2), "utf-8")


def difference(rows: Dataset, work: Path, seed: str) -> tuple[float, float]:
    """95 % interval of what taking the mask away adds to F1: paired bootstrap over test rows."""

    def keys(spans: list[dict[str, Any]]) -> set[tuple[int, int, int]]:
        return {(span["start"], span["end"], span["label_id"]) for span in spans}

    true = [keys(spans) for spans in rows["spans"]]
    counts = []
    for part in ("causal", "bidirectional"):
        lines = (work / f"{part}-{seed}.jsonl").read_text("utf-8").splitlines()
        said = {row["id"]: keys(row["spans"] or []) for row in map(json.loads, lines)}
        pairs = [(said[id], one) for id, one in zip(rows["id"], true, strict=True)]
        counts.append([(2 * len(a & b), len(a) + len(b)) for a, b in pairs])
    drawn = np.random.default_rng(0).integers(len(true), size=(2000, len(true)))
    sums = np.array(counts)[:, drawn].sum(axis=2)
    f1 = sums[..., 0] / sums[..., 1]
    low, high = np.quantile(f1[1] - f1[0], [0.025, 0.975])
    return float(low), float(high)


def write_rows(rows: dict[str, Dataset], labels: LabelSpace, work: Path) -> None:
    rows["train"].select_columns(["id", "text", "spans"]).to_json(work / "tagged.jsonl")
    rows["test"].select_columns(["id", "text"]).to_json(work / "texts.jsonl")
    (work / "labels.yaml").write_text(json.dumps(list(labels.ids)), "utf-8")


def write(rows: dict[str, Dataset], labels: LabelSpace, given: argparse.Namespace) -> None:
    kept = json.loads((given.work / "tagging.json").read_text("utf-8"))
    spans = {name: sum(map(len, some["spans"])) for name, some in rows.items()}
    shown = [id for id in labels.ids if any(id in some["labels"] for some in kept.values())]
    lines = [
        "# Tagging named entities with and without the causal mask: SmolLM2-135M and LoRA",
        "",
        f"Written by `python benchmarks/tagging.py {given.train.name} {given.test.name} --columns "
        f"{given.columns[0]} {given.columns[1]} --work FOLDER --rows {given.rows} --test-rows "
        f"{given.test_rows} --epochs {given.epochs} --part causal bidirectional write`.",
        "",
        f"{len(rows['train']):,} sentences of {given.train.name} with {spans['train']:,} entities are "
        f"trained on, {len(rows['test']):,} of {given.test.name} with {spans['test']:,} are tested; none "
        f"has more than {TRAINING['max_length']} tokens, and no text is in both. {given.epochs} epochs, "
        f"learning rate {TRAINING['learning_rate']:g}, batches of "
        f"{TRAINING['per_device_train_batch_size']}; fixed before, nothing chosen on test rows. Whole "
        f"spans with their label; the true spans themselves have {ceiling(rows['test'], labels):.3f} once "
        "they are tags of the tokenizer's words.",
        "",
        f"| | seed | F1 | precision | recall |{''.join(f' F1 of {id} |' for id in shown)}",
        f"|---|---|---|---|---|{'---|' * len(shown)}",
    ]
    for name, some in kept.items():
        part, _, seed = name.rpartition("-")
        each = "".join(f" {some['labels'].get(id, {'f1': 0})['f1']:.3f} |" for id in shown)
        lines.append(
            f"| {part} | {seed} | {some['f1']:.3f} | {some['precision']:.3f} | {some['recall']:.3f} |"
            f"{each.rstrip()}"
        )
    for seed in dict.fromkeys(name.rpartition("-")[2] for name in kept):
        if {f"causal-{seed}", f"bidirectional-{seed}"} <= set(kept):
            low, high = difference(rows["test"], given.work, seed)
            more = kept[f"bidirectional-{seed}"]["f1"] - kept[f"causal-{seed}"]["f1"]
            lines += [
                "",
                f"Seed {seed}: without the mask F1 is {more:+.3f} ({low:+.3f} to {high:+.3f}, ",
            ]
            lines[-1] += "95 % of paired bootstraps over test sentences)."
    file = Path(__file__).parent / "results" / "tagging.md"
    file.write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="a CoNLL file")
    parser.add_argument("test", type=Path, help="another one")
    parser.add_argument("--columns", type=int, nargs=2, default=[0, 1], help="of token and tag")
    parser.add_argument("--work", type=Path, required=True, help="keeps what was found")
    parser.add_argument(
        "--part", nargs="+", choices=["rows", "causal", "bidirectional", "write"], required=True
    )
    parser.add_argument("--rows", type=int, default=2000, help="train rows")
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if absent := [file for file in (given.train, given.test) if not file.is_file()]:
        print(f"{absent[0]}: no such file; skipped (the head of this script says where to get one)")
        return
    given.work.mkdir(parents=True, exist_ok=True)
    rows, labels = tables(given)
    for part in given.part:
        if part == "rows":
            write_rows(rows, labels, given.work)
        elif part == "write":
            write(rows, labels, given)
        else:
            result = run(part, rows, labels, given)
            print(part, result)
            keep(given.work, f"{part}-{given.seed}", result)


if __name__ == "__main__":
    main()
