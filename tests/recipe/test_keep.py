"""Fingerprints, and results that come back as they were."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from llmlabel import models
from llmlabel.calibrate.conformal import Conformal
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.recipe import keep
from llmlabel.recipe.calls import Recipe, bind


@dataclasses.dataclass(frozen=True)
class Pair:
    first: float
    rest: tuple[int, ...]


ROWS = Dataset.from_dict(
    {"id": ["a", "b"], "label_ids": [[1, 0], []], "label_probs": [[0.75, 0.25], []]},
    features=Features(
        {
            "id": Value("string"),
            "label_ids": List(Value("int32")),
            "label_probs": List(Value("float32")),
        }
    ),
)


@pytest.mark.parametrize(
    ("value", "returns", "kind"),
    [
        (load_labels(["bug", {"id": "x", "description": "Lob, \u2028 Größe"}]), LabelSpace, "json"),
        (Conformal(0.1, "lac", math.inf, 3, 0, "f"), Conformal, "json"),
        (Pair(0.1 + 0.2, (1, 2)), Pair, "json"),
        ({2: Pair(1e-300, ())}, dict[int, Pair], "json"),
        ({"a": [1, None, "x"], "b": {"c": 0.5}}, dict[str, Any], "json"),
        ({"a": [1, None]}, Any, "json"),
        ("text", str, "json"),
        (None, int | None, "json"),
    ],
)
def test_a_value_comes_back_equal(tmp_path: Path, value: Any, returns: Any, kind: str) -> None:
    assert keep.keep(value, tmp_path, returns=returns, fingerprint="f", arguments={}) == kind
    again = keep.load_kept(tmp_path, returns=returns)
    assert again == value
    assert type(again) is type(value)


def test_a_dataset_comes_back_with_its_types(tmp_path: Path) -> None:
    assert keep.keep(ROWS, tmp_path, returns=Dataset, fingerprint="f", arguments={}) == "dataset"
    again = keep.load_kept(tmp_path, returns=Dataset)
    assert again.to_dict() == ROWS.to_dict()
    assert again.features == ROWS.features
    some = ROWS.select([1])  # the table in memory still has both rows
    keep.keep(some, tmp_path, returns=Dataset, fingerprint="f", arguments={})
    assert keep.load_kept(tmp_path, returns=Dataset)["id"][:] == ["b"]


def test_a_path_moves_with_its_run_when_it_is_inside(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "student"
    (folder / "model").mkdir(parents=True)
    keep.keep(folder / "model", folder, returns=Path, fingerprint="f", arguments={})
    moved = (tmp_path / "runs").rename(tmp_path / "moved") / "student"
    assert keep.load_kept(moved, returns=Path) == moved / "model"
    outside = tmp_path / "elsewhere"
    keep.keep(outside, moved, returns=Path, fingerprint="f", arguments={})
    assert keep.load_kept(moved, returns=Path) == outside
    assert keep.read_kept(moved, "f") is None  # nothing is there
    outside.touch()
    assert keep.read_kept(moved, "f") == {
        "fingerprint": "f",
        "arguments": {},
        "kind": "path",
        "path": outside.as_posix(),
        "inside": False,
        "files": {},
    }
    assert keep.read_kept(moved, "g") is None


def test_a_relative_path_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = Path("labeled.jsonl")
    outside.touch()
    keep.keep(outside, Path("runs/file"), returns=Path, fingerprint="f", arguments={})
    assert keep.read_kept(Path("runs/file"), "f") is not None
    assert keep.load_kept(Path("runs/file"), returns=Path) == outside


@pytest.mark.parametrize("value", [{1, 2}, np.ones(2), object(), {"a": np.float32(1)}])
def test_what_json_does_not_know_is_not_kept(tmp_path: Path, value: Any) -> None:
    assert keep.keep(value, tmp_path, returns=Any, fingerprint="f", arguments={}) is None
    assert list(tmp_path.iterdir()) == []


def test_the_note_is_written_after_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_json = keep.write_json

    def watch(path: Path, content: Any) -> None:
        written.append(path.name)
        write_json(path, content)

    monkeypatch.setattr(keep, "write_json", watch)
    keep.keep({"a": 1}, tmp_path, returns=Any, fingerprint="f", arguments={"x": "y"})
    assert written == ["value.json", "kept.json"]
    note = json.loads((tmp_path / "kept.json").read_text())
    assert note == {
        "fingerprint": "f",
        "arguments": {"x": "y"},
        "kind": "json",
        "files": {"value.json": "12 4b19891530d27c84"},
    }


@pytest.mark.parametrize("damage", [b"", b'{"a', b'{\n "a": 2\n}\n'])
def test_a_damaged_value_is_not_whole(tmp_path: Path, damage: bytes) -> None:
    keep.keep({"a": 1}, tmp_path, returns=Any, fingerprint="f", arguments={})
    note = keep.read_kept(tmp_path, "f")
    assert note is not None
    (tmp_path / "note.txt").write_text("somebody's own file")
    assert keep.is_whole(tmp_path, note)
    (tmp_path / "value.json").write_bytes(damage)
    assert not keep.is_whole(tmp_path, note)


def test_a_damaged_model_folder_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "_QUICK_BYTES", 4)
    for name, content in {"head": b"1234", "weights": b"12345", "blocks/a": b"1"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    keep.keep(tmp_path, tmp_path, returns=Path, fingerprint="f", arguments={})
    note = keep.read_kept(tmp_path, "f")
    assert note is not None
    assert note["files"] == {"head": "4 f595bcc5e8a3d0c9", "weights": "5"}
    (tmp_path / "blocks" / "a").unlink()
    assert keep.is_whole(tmp_path, note)
    (tmp_path / "weights").write_bytes(b"1234")
    assert not keep.is_whole(tmp_path, note)
    (tmp_path / "weights").write_bytes(b"54321")
    assert keep.is_whole(tmp_path, note)  # too large to read each time: size only
    (tmp_path / "head").write_bytes(b"4321")
    assert not keep.is_whole(tmp_path, note)


@pytest.mark.parametrize("content", [{"fingerprint": "f"}, {"fingerprint": "f", "kind": "json"}])
def test_a_note_without_what_it_needs_keeps_nothing(tmp_path: Path, content: Any) -> None:
    keep.write_json(tmp_path / "value.json", {"a": 1})
    keep.write_json(tmp_path / "kept.json", content)
    assert keep.read_kept(tmp_path, "f") is None
    (tmp_path / "file").touch()
    assert keep.read_json(tmp_path / "file" / "kept.json") is None


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RuntimeError, match=r"run folder .*file/r cannot be written .*--output"),
        keep.lock(tmp_path / "file" / "r"),
    ):
        pass


# ------------------------------------------------------------------------------------- fingerprints


def marks(tmp_path: Path, **assignments: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in bind(Recipe("r", Path("r.yaml"), assignments)).items():
        found[name] = keep.fingerprint(value, found)[0]
    return found


def test_a_default_written_out_changes_nothing_and_another_value_does(tmp_path: Path) -> None:
    labels = {"call": "llmlabel.labelspace.load_labels", "source": ["bug", "praise"]}
    first = marks(tmp_path, labels=labels)
    assert first == marks(tmp_path, labels=labels | {"multilabel": False})
    assert first != marks(tmp_path, labels=labels | {"multilabel": True})
    assert first != marks(tmp_path, labels=labels | {"source": ["praise", "bug"]})
    assert (
        first["labels"]
        == marks(tmp_path, source=["bug", "praise"], labels=labels | {"source": "${source}"})[
            "labels"
        ]
    )


def test_a_prompt_counts_by_its_content(tmp_path: Path) -> None:
    prompt = tmp_path / "own.jinja"
    prompt.write_text("one")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n')
    recipe = {
        "labels": {"call": "llmlabel.labelspace.load_labels", "source": ["bug", "praise"]},
        "texts": {"call": "llmlabel.data.load", "path": str(texts)},
        "engine": {"call": "llmlabel.engine.fake.FakeEngine"},
        "labeled": {
            "call": "llmlabel.label.direct.label_direct",
            "dataset": "${texts}",
            "engine": "${engine}",
            "labels": "${labels}",
            "prompt": str(prompt),
        },
    }
    first = marks(tmp_path, **recipe)
    copy = tmp_path / "copy.jinja"
    copy.write_text("one")
    recipe["labeled"]["prompt"] = str(copy)
    assert marks(tmp_path, **recipe) == first
    copy.write_text("two")
    changed = marks(tmp_path, **recipe)
    assert [name for name in first if first[name] != changed[name]] == ["labeled"]


def test_a_package_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    texts = {"call": "llmlabel.data.load", "path": "package:surely_not_installed/x.csv"}
    with pytest.raises(FileNotFoundError, match="surely_not_installed"):
        marks(tmp_path, texts=texts)


def test_the_content_of_a_folder_is_its_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.txt").write_text("x")
    first = models.content_sha(folder)
    assert models.content_sha(folder) == first
    (folder / "a" / "1.txt").rename(folder / "a" / "2.txt")
    renamed = models.content_sha(folder)
    (folder / "a" / "2.txt").write_text("y")
    assert len({first, renamed, models.content_sha(folder)}) == 3


def test_a_large_file_is_known_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_LARGE_BYTES", 3)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1234")
    first = models.content_sha(path)
    os.utime(path, ns=(0, 0))
    assert models.content_sha(path) != first
    path.write_bytes(b"123")
    small = models.content_sha(path)
    os.utime(path, ns=(0, 0))
    assert models.content_sha(path) == small


def test_sweep_takes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a" / ".tmp-1-x").mkdir(parents=True)
    (tmp_path / "a" / ".tmp-1-x" / "inner").write_text("half")
    (tmp_path / ".old-2-y").write_text("old")
    (tmp_path / "a" / "kept.json").write_text("{}")
    (tmp_path / ".lock").write_text("")
    keep.sweep(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == [".lock", "a", "a/kept.json"]
