"""Every shipped recipe: it fits its signatures, and as a program it gives what `run` gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from matplotlib.figure import Figure

from llmlabel.data import read_parquet, save, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.recipe import check, load_recipe, run, to_python
from llmlabel.softlabels import SoftLabels

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")
FAKE = ["engine={call: llmlabel.engine.fake.FakeEngine}"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path) -> Path:
    """A folder with everything the shipped recipes read, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # slow, and no machine crashes here
    labels = load_labels(["cat", "money", "mat"])
    Path("labels.yaml").write_text("[cat, money, mat]\n")
    texts = [f"{labels.names[i % 3]} number {i}" for i in range(60)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    rows = Dataset.from_dict({"id": [str(i) for i in range(60)], "text": texts})
    probs = np.eye(3)[np.arange(60) % 3] * 0.7 + 0.1
    rows = SoftLabels.from_dense(probs, labels).add_to(rows)
    for table in ("label/labeled", "train/predicted"):
        save(rows, Path("runs") / table / "value.parquet")
    sets = with_columns(rows, {"set_ids": ([[i % 3] for i in range(60)], List(Value("int32")))})
    save(sets, Path("runs/calibrate/sets/value.parquet"))
    gold = [{**row, "label": labels.names[i % 3]} for i, row in enumerate(rows)]
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    some = [
        {"text": texts[i], "labels": [labels.names[i % 3]], "split": ["train", "test"][i > 47]}
        for i in range(60)
    ]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    Path("names.txt").write_text("cat\nmoney\nmat\n")
    spans = [
        {"start": 0, "end": 3, "label_id": i % 3, "prob": None, "agreement": None}
        for i in range(60)
    ]
    tagged = [{"text": texts[i], "spans": [spans[i]]} for i in range(60)]
    Path("tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    for i in range(60):
        file = Path("corpus") / labels.names[i % 3] / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(texts[i])
    return tmp_path


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports put their plots together, but leave out the slow last step to SVG."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"<svg/>"))


def overrides(name: str, tiny_encoder: Path, tiny_decoder: Path) -> list[str]:
    news = ["labels.source=[cat, money, mat]", "articles.path=corpus", f"minilm={tiny_encoder}"]
    small = [
        f"student.model={tiny_encoder}",
        "student.num_train_epochs=1",
        "student.max_length=128",
    ]
    many = [
        *("set.source=many.jsonl", "set.labels=names.txt"),
        *("student.num_train_epochs=1", "student.max_length=64"),
    ]
    return {
        "dexml": [*many, "parts.shares={pool: 0.6, held: 0.4}", f"student.model={tiny_encoder}"],
        "xmc_soft": [*many, *FAKE, "parts.shares={read: 0.5, left: 0.5}", f"minilm={tiny_encoder}"],
        "label": FAKE,
        "train": small,
        "calibrate": [],
        "report": [],
        "selftrain": [*FAKE, "labeled.budget_calls=900", "labeled.demonstrations=2"],
        "quickstart": [
            *FAKE,
            "labels.source=[cat, money, mat]",
            "articles.path=corpus",
            f"minilm={tiny_encoder}",
            "llm_raw.demonstrations=[]",
            "first.max_length=128",
            "second.max_length=128",
            "encoder_raw={call: llmlabel.label.direct.label_direct, dataset: '${texts}', "
            "engine: '${engine}', labels: '${labels}'}",
            "texts.shares={train: 0.3, validation: 0.25, calibration: 0.25, test: 0.2}",
        ],
        "taxonomy": [*FAKE, "found.max_labels=4", "found.batch_rows=25", "found.levels=2"],
        "tnt_llm": [
            *FAKE,
            "articles.path=corpus",
            f"minilm={tiny_encoder}",
            "student.max_length=128",
            "texts.shares={sample: 0.5, train: 0.3, test: 0.2}",
        ],
        "htc_topdown": [
            *FAKE,
            "articles.path=corpus",
            f"minilm={tiny_encoder}",
            "labels.source=[{id: pet}, {id: cat, parent: pet}, {id: thing}, "
            "{id: money, parent: thing}, {id: mat, parent: thing}]",
        ],
        "ontology": [*FAKE, *news[1:], "parts.shares={documents: 0.5, left: 0.5}"],
        "comca": [*news, "texts.shares={cache: 0.6, test: 0.4}"],
        "loki": [
            *news[1:],
            "sections.source=[cat, money, mat]",
            "tree.source=[{id: thing}, {id: cat, parent: thing}, {id: mat, parent: thing}, "
            "{id: money}]",
        ],
        "otseq2set": [
            "labeled={call: llmlabel.label.direct.label_direct, dataset: "
            "{call: llmlabel.data.load, path: texts.jsonl}, "
            "engine: {call: llmlabel.engine.fake.FakeEngine}, labels: '${labels}'}",
            *small,
        ],
        "elr": [
            *news,
            "texts.shares={known: 0.1, train: 0.7, test: 0.2}",
            *students("plain", "held"),
        ],
        "llkd": [
            *news,
            "texts.shares={known: 0.1, pool: 0.7, test: 0.2}",
            *students("of_all", "of_chosen"),
        ],
        "ls_llama": [
            *news[:2],
            f"student.model={tiny_decoder}",
            "texts.shares={train: 0.5, validation: 0.2, test: 0.2, left: 0.1}",
            *students("student"),
        ],
        "ls_unllama_ner": [f"student.model={tiny_decoder}", *students("student")],
        "pac": [
            *news,
            "tree.source=[{id: thing}, {id: cat, parent: thing}, {id: mat, parent: thing}, "
            "{id: money}]",
            "texts.shares={gold: 0.7, test: 0.3}",
        ],
        "powerset": [
            *("texts.path=gold.jsonl", "texts.gold=label", f"minilm={tiny_encoder}"),
            *students("student"),
        ],
        "route": [
            *news,
            "texts.shares={scaling: 0.3, gold: 0.5, test: 0.2}",
            *("selective.target=0.9", "routed.audit=0.5", "budget.people=3"),
        ],
        "patent_sdg": [*news, *FAKE, "texts.shares={known: 0.5, test: 0.4, left: 0.1}"],
        "ptec": [
            *FAKE,
            f"student.model={tiny_decoder}",
            *("student.num_train_epochs=1", "student.max_length=128"),
        ],
        "ps_ttl": [*news, "texts.shares={few: 0.3, stream: 0.7}"],
        "singular_kernel": [*news, "texts.shares={gold: 0.4, unlabelled: 0.3, test: 0.3}"],
        "zero_shot": [
            *news,
            "before.source=[cat, money]",
            *(f"{step}.edges=[[mat, money]]" for step in ("curve", "propagated", "no_bias")),
            "curve.folds=2",
            "flat_curve.folds=2",
            "texts.shares={gold: 0.4, validation: 0.3, test: 0.3}",
        ],
        "weak": [
            *FAKE,
            f"minilm={tiny_encoder}",
            "labels.source=[cat, money, mat]",
            "articles.path=corpus",
            "functions=[{name: cats, label: cat, keywords: [cat]}, "
            "{name: coins, label: money, regex: 'mon\\w+'}, "
            "{name: asked, label: mat, question: 'Is it a mat?', threshold: 0.3}]",
        ],
        "crowd": [
            *news,
            "texts.shares={ann: 0.1, ben: 0.1, cem: 0.1, dia: 0.1, eva: 0.1, asked: 0.3, test: 0.2}",
            "texts.seed=3",  # no two of the crowd know the same and answer the same
            *students("of_majority", "of_mean"),
        ],
        "committee": [
            *news,
            *FAKE,
            "texts.shares={few: 0.2, validation: 0.4, pool: 0.2, test: 0.2}",
            *students("of_memory", "of_committee", "of_agreed"),
        ],
        "views": news,
        "bands": [*news, *students("of_soft", "of_gold", "of_mean", "of_bands")],
        "missing_labels": [
            *("texts.path=gold.jsonl", "texts.gold=label"),
            *("checked.path=gold.jsonl", "checked.gold=label"),
            f"minilm={tiny_encoder}",
            *students("of_given", "of_corrected"),
        ],
        "compress": [
            *news,
            *students("of_full", "of_top", "of_distances", "of_projected"),
        ],
        "rad": [
            *news,
            "texts.shares={start: 0.2, archive: 0.2, pool: 0.4, test: 0.2}",
            "budget=8",
            *students("of_rad", "of_margin", "of_random"),
        ],
        "pruning": [*news, "share=0.3", *students("teacher", "from_gold", "from_teacher")],
        "ssld": [
            *news,
            "texts.shares={gold: 0.3, pool: 0.5, test: 0.2}",
            # texts of three words all look alike
            "unseen.threshold=1.0",
            *students("teacher", "of_all", "of_surest"),
        ],
        "salt": [
            *news,
            "texts.shares={start: 0.3, pool: 0.5, test: 0.2}",
            *("random_rows.share=0.3", "hard_rows.budget=8", "steps=1"),
            *students("small", "gold_alone", "two_stages", "to_the_end", "chosen_rows"),
        ],
    }[name]


def students(*names: str) -> list[str]:
    """Trained for a moment, with no longer texts than the tiny encoder reads."""
    return [
        f"{name}.{setting}"
        for name in names
        for setting in ("max_length=128", "num_train_epochs=1")
    ]


def test_all_recipes_are_found() -> None:
    assert [path.stem for path in RECIPES] == [
        "bands",
        "calibrate",
        "comca",
        "committee",
        "compress",
        "crowd",
        "dexml",
        "elr",
        "htc_topdown",
        "label",
        "llkd",
        "loki",
        "ls_llama",
        "ls_unllama_ner",
        "missing_labels",
        "ontology",
        "otseq2set",
        "pac",
        "patent_sdg",
        "powerset",
        "pruning",
        "ps_ttl",
        "ptec",
        "quickstart",
        "rad",
        "report",
        "route",
        "salt",
        "selftrain",
        "singular_kernel",
        "ssld",
        "taxonomy",
        "tnt_llm",
        "train",
        "views",
        "weak",
        "xmc_soft",
        "zero_shot",
    ]


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_python_equals_run(path: Path, place: Path, tiny_encoder: Path, tiny_decoder: Path) -> None:
    recipe = load_recipe(str(path), overrides(path.stem, tiny_encoder, tiny_decoder))
    check(recipe)
    program = to_python(recipe, output=Path("by-python"))
    results = run(recipe, output=Path("by-run"))
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "program.py", "exec"), scope)
    values = scope["main"]()
    kept = {name: results[name] for name in results if isinstance(results[name], Dataset)}
    assert kept
    for name, dataset in kept.items():
        assert values[name].to_dict() == dataset.to_dict(), name


def test_the_quickstart_trains_without_gold(
    place: Path, tiny_encoder: Path, tiny_decoder: Path
) -> None:
    """Other true labels: other reports, but the same student to the byte."""
    given = [*overrides("quickstart", tiny_encoder, tiny_decoder), "articles.encoding=utf-8"]
    results = {}
    for shift in (0, 1):
        names = ["cat", "money", "mat"]
        rows = [
            {"id": str(i), "text": f"{names[i % 3]} number {i}", "label": names[(i + shift) % 3]}
            for i in range(60)
        ]
        path = Path(f"gold{shift}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = load_recipe("quickstart", [*given, f"articles.path={path}"])
        results[shift] = run(recipe, output=Path(f"runs{shift}"))
    right, wrong = results[0], results[1]
    assert right["texts"]["gold"][:] != wrong["texts"]["gold"][:]
    assert right["report"]["summary"] != wrong["report"]["summary"]
    for name in ("consensus", "relabeled", "student_raw"):
        assert right[name]["label_probs"][:] == wrong[name]["label_probs"][:]


def test_the_printed_program_runs(place: Path) -> None:
    recipe = load_recipe("label", FAKE)
    (place / "p.py").write_text(to_python(recipe, output=Path("runs")))
    subprocess.run([sys.executable, "p.py"], check=True, timeout=120, capture_output=True)
    rows = [json.loads(line) for line in Path("labeled.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    run(recipe, output=Path("by-run"))
    kept = read_parquet(Path("by-run/label/labeled/value.parquet"))
    assert [row["label_ids"] for row in rows] == kept["label_ids"][:]
