"""Every shipped recipe: it fits its signatures, and as a program it gives what `run` gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value

from llmlabel.data import read_parquet, save, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.recipe import check, load_recipe, run, to_python
from llmlabel.softlabels import SoftLabels

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
FAKE = ["engine={call: llmlabel.engine.fake.FakeEngine}"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path) -> Path:
    """A folder with everything the shipped recipes read, as the working directory."""
    monkeypatch.chdir(tmp_path)
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
    for i in range(60):
        file = Path("corpus") / labels.names[i % 3] / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(texts[i])
    return tmp_path


def overrides(name: str, tiny_encoder: Path) -> list[str]:
    small = [
        f"student.model={tiny_encoder}",
        "student.num_train_epochs=1",
        "student.max_length=128",
    ]
    return {
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
        "ontology": [*FAKE, f"minilm={tiny_encoder}"],
        "weak": [
            *FAKE,
            "labels.source=[cat, money, mat]",
            "articles.path=corpus",
            "functions=[{name: cats, label: cat, keywords: [cat]}, "
            "{name: coins, label: money, regex: 'mon\\w+'}, "
            "{name: asked, label: mat, question: 'Is it a mat?', threshold: 0.3}]",
        ],
    }[name]


def test_all_recipes_are_found() -> None:
    assert [path.stem for path in RECIPES] == [
        "calibrate",
        "htc_topdown",
        "label",
        "ontology",
        "quickstart",
        "report",
        "selftrain",
        "taxonomy",
        "tnt_llm",
        "train",
        "weak",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_python_equals_run(path: Path, place: Path, tiny_encoder: Path) -> None:
    recipe = load_recipe(str(path), overrides(path.stem, tiny_encoder))
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


def test_the_quickstart_trains_without_gold(place: Path, tiny_encoder: Path) -> None:
    """Other true labels: other reports, but the same student to the byte."""
    given = [*overrides("quickstart", tiny_encoder), "articles.encoding=utf-8"]
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
