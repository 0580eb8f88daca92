"""Running a recipe: what is kept, what is computed again, and what happens when a step fails."""

import errno
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from llmlabel.recipe import Results, StepError, keep, load_recipe, run

STEPS = '''
import dataclasses, errno, os, sqlite3
from pathlib import Path
from typing import Any, Protocol
import numpy as np
from datasets import Dataset

DID: list[str] = []

class Engine(Protocol):
    name: str

class Big:
    """Stands for a model in memory."""
    alive = 0
    def __init__(self, *, model: str = "tiny", inner: Engine | None = None):
        DID.append(f"load {model}")
        self.name, self.inner = model, inner
        Big.alive += 1
    def __del__(self):
        Big.alive -= 1

@dataclasses.dataclass(frozen=True)
class Fitted:
    value: float
    sizes: tuple[int, ...]

@dataclasses.dataclass(frozen=True)
class Matrix:
    values: np.ndarray

def rows(path: Path, *, seed: int = 0) -> Dataset:
    DID.append("rows")
    return Dataset.from_dict({"text": path.read_text().split(), "n": [seed] * 3})

def shout(dataset: Dataset, engine: Engine, *, ending: str = "!") -> Dataset:
    DID.append(f"shout {Big.alive}")
    texts = [text.upper() + ending for text in dataset["text"]]
    return Dataset.from_dict({"text": texts, "n": dataset["n"][:]})

def fit(dataset: Dataset, *, scale: float = 1.0) -> Fitted:
    DID.append("fit")
    return Fitted(scale * len(dataset), (len(dataset), 1))

def train(dataset: Dataset, *, output: Path, steps: int = 1) -> Path:
    DID.append("train")
    (output / "model").mkdir(exist_ok=True)
    (output / "model" / "weights.txt").write_text(str(steps))
    return output / "model"

def score(sources: dict[str, Dataset], fitted: Fitted, model: Path, *, output: Path) -> dict[str, Any]:
    DID.append("score")
    total = sum(len(dataset) for dataset in sources.values())
    return {"summary": {"rows": total, "nan": float("nan")}, "weights": (model / "weights.txt").read_text()}

def positions() -> dict[int, tuple[int, ...]]:
    return {3: (1, 2)}

def matrix() -> Matrix:
    DID.append("matrix")
    return Matrix(np.ones(2))

def untyped(value):
    DID.append("untyped")
    return {value}

def size(value: Any) -> int:
    DID.append("size")
    return len(value.values if isinstance(value, Matrix) else value)

def write(fitted: Fitted, path: Path) -> None:
    DID.append("write")
    path.write_text(str(fitted.value))

def fail(kind: str, dataset: Dataset | None = None) -> int:
    DID.append("fail")
    kinds = {"value": ValueError("first line\\nsecond"), "type": TypeError("a bug"),
             "interrupt": KeyboardInterrupt(), "missing": ImportError("x", name="vllm"),
             "file": FileNotFoundError(errno.ENOENT, "No such file", "data.bin"),
             "server": RuntimeError(""), "none": None,
             "sqlite": sqlite3.OperationalError("database or disk is full")}
    if kind == "disk":
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("writing failed") from error
    if kinds[kind]:
        raise kinds[kind]
    return 5
'''

RECIPE = """
seed: 4
texts: {call: toolbox.steps.rows, path: texts.txt, seed: "${seed}"}
engine: {call: toolbox.steps.Big}
wrapped: {call: toolbox.steps.Big, model: cache, inner: "${engine}"}
loud: {call: toolbox.steps.shout, dataset: "${texts}", engine: "${wrapped}"}
fitted: {call: toolbox.steps.fit, dataset: "${loud}", scale: 0.5}
model: {call: toolbox.steps.train, dataset: "${loud}"}
sources: {loud: "${loud}", plain: "${texts}"}
numbers: {call: toolbox.steps.score, sources: "${sources}", fitted: "${fitted}", model: "${model}"}
"""
EVERYTHING = ["rows", "load tiny", "load cache", "shout 2", "fit", "train", "score"]


@pytest.fixture
def did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the steps of the package `toolbox` did, in order."""
    (tmp_path / "toolbox").mkdir()
    (tmp_path / "toolbox" / "steps.py").write_text(STEPS)
    (tmp_path / "texts.txt").write_text("a b c")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # half of the time of these tests
    import toolbox.steps

    yield toolbox.steps.DID
    for name in ("toolbox", "toolbox.steps"):
        del sys.modules[name]


def go(text: str = RECIPE, *overrides: str, force: bool = False) -> Results:
    path = Path("chain.yaml")
    path.write_text(text)
    return run(load_recipe(path, overrides), allow=["toolbox"], force=force)


def states() -> dict[str, str]:
    notes = json.loads(Path("runs/chain/run.json").read_text())["variables"]
    return {name: note["state"] for name, note in notes.items()}


def files() -> dict[str, bytes]:
    folder = Path("runs/chain")
    some = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in some
        if path.name not in ("run.json", ".lock", "error.log")
    }


# --------------------------------------------------------------------------------------- values


def test_a_run_computes_every_variable_once(did: list[str]) -> None:
    results = go()
    assert did == EVERYTHING
    assert list(results) == ["seed", "texts", "loud", "fitted", "model", "sources", "numbers"]
    assert results["seed"] == 4
    assert results["texts"].to_dict() == {"text": ["a", "b", "c"], "n": [4, 4, 4]}
    assert results["loud"]["text"][:] == ["A!", "B!", "C!"]
    assert (results["fitted"].value, results["fitted"].sizes) == (1.5, (3, 1))
    assert results["model"] == Path("runs/chain/model/model")
    assert results["sources"]["plain"]["n"][:] == [4, 4, 4]
    assert results["numbers"]["summary"]["rows"] == 6
    assert results["numbers"]["summary"]["nan"] != results["numbers"]["summary"]["nan"]
    assert did == EVERYTHING  # reading the values runs nothing
    assert states() == {
        "seed": "given",
        "texts": "computed",
        "engine": "built",
        "wrapped": "built",
        "loud": "computed",
        "fitted": "computed",
        "model": "computed",
        "sources": "given",
        "numbers": "computed",
    }


def test_live_objects_are_released_after_their_last_use(did: list[str]) -> None:
    text = RECIPE + 'louder: {call: toolbox.steps.shout, dataset: "${loud}", engine: "${engine}"}\n'
    go(text)
    assert did == [*EVERYTHING, "shout 1"]  # the wrapper is gone, what it wrapped is still needed
    import toolbox.steps

    assert toolbox.steps.Big.alive == 0


def test_a_live_object_is_not_held_for_what_is_kept(did: list[str]) -> None:
    go()
    text = (
        RECIPE
        + """
early: {call: toolbox.steps.shout, dataset: "${texts}", engine: "${engine}"}
late: {call: toolbox.steps.shout, dataset: "${loud}", engine: "${fresh}"}
"""
    )
    did.clear()
    go(text.replace("wrapped:", "fresh: {call: toolbox.steps.Big, model: fresh}\nwrapped:"))
    assert did == ["load tiny", "shout 1", "load fresh", "shout 1"]


def test_the_folder_holds_values_and_what_steps_wrote(did: list[str]) -> None:
    go()
    assert sorted(files()) == [
        "fitted/kept.json",
        "fitted/value.json",
        "loud/kept.json",
        "loud/value.parquet",
        "model/kept.json",
        "model/model/weights.txt",
        "numbers/kept.json",
        "numbers/value.json",
        "texts/kept.json",
        "texts/value.parquet",
    ]
    assert json.loads(Path("runs/chain/fitted/value.json").read_text()) == {
        "value": 1.5,
        "sizes": [3, 1],
    }


def test_run_json_says_what_ran(did: list[str]) -> None:
    go(RECIPE, "fitted.scale=2.0")
    note = json.loads(Path("runs/chain/run.json").read_text())
    assert note["recipe"] == RECIPE
    assert note["assignments"]["fitted"]["scale"] == 2.0
    assert set(note["versions"]) == {
        "python",
        "llmlabel",
        "torch",
        "transformers",
        "datasets",
        "numpy",
    }
    assert note["versions"]["numpy"] == sys.modules["numpy"].__version__
    variable = note["variables"]["loud"]
    assert variable["defaults"] == {"ending": "!"}
    assert variable["kind"] == "dataset"
    assert variable["seconds"] >= 0
    assert variable["started"].endswith("+00:00")
    assert len(variable["fingerprint"]) == 64


# --------------------------------------------------------------------------------------- resuming


def test_the_same_command_again_computes_nothing(did: list[str]) -> None:
    go()
    before = files()
    seconds = json.loads(Path("runs/chain/run.json").read_text())["variables"]["loud"]["seconds"]
    did.clear()
    results = go()
    assert did == []
    assert results["loud"]["text"][:] == ["A!", "B!", "C!"]
    assert files() == before
    assert states()["loud"] == "kept"
    assert states()["engine"] == "not needed"
    after = json.loads(Path("runs/chain/run.json").read_text())["variables"]["loud"]
    assert after["seconds"] == seconds


@pytest.mark.parametrize(
    ("override", "again", "because"),
    [
        ("fitted.scale=0.25", ["fit", "score"], "fitted: computing again, because of scale"),
        ("model.steps=2", ["train", "score"], "model: computing again, because of steps"),
        ("loud.ending=.", EVERYTHING[1:], "loud: computing again, because of ending"),
        (
            "engine.model=other",
            ["load other", "load cache", "shout 2", "fit", "train", "score"],
            "loud: computing again, because of engine",
        ),
        ("seed=5", EVERYTHING, "texts: computing again, because of seed"),
        ("texts.seed=4", [], ""),  # the same value, written otherwise
        ("fitted.scale=5e-1", [], ""),
    ],
)
def test_a_change_computes_again_what_depends_on_it(
    did: list[str],
    caplog: pytest.LogCaptureFixture,
    override: str,
    again: list[str],
    because: str,
) -> None:
    go()
    did.clear()
    with caplog.at_level(logging.INFO, "llmlabel"):
        go(RECIPE, override)
    assert did == again
    assert because in caplog.text


def test_the_content_of_a_file_counts_and_not_its_time(did: list[str]) -> None:
    go()
    did.clear()
    Path("texts.txt").write_text("a b c")
    go()
    assert did == []
    Path("texts.txt").write_text("x y z")
    assert go()["loud"]["text"][:] == ["X!", "Y!", "Z!"]
    assert did == EVERYTHING


def test_a_new_version_computes_again(did: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    go()
    did.clear()
    monkeypatch.setattr(keep, "version", lambda package: "9.9")
    go()
    assert did == EVERYTHING


def test_going_back_never_reads_the_other_value(did: list[str]) -> None:
    text = RECIPE + "bad: {call: toolbox.steps.fail, kind: none}\n"
    first = go(text)["fitted"].value
    with pytest.raises(StepError):
        go(text, "fitted.scale=9.0", "bad.kind=value")
    assert go(text)["fitted"].value == first == 1.5


@pytest.mark.parametrize("lost", ["loud/value.parquet", "loud/kept.json", "model/model"])
def test_what_is_lost_or_half_written_is_computed_again(did: list[str], lost: str) -> None:
    go()
    before = files()
    path = Path("runs/chain") / lost
    path.rename(path.with_name("elsewhere"))
    did.clear()
    go()
    assert ("train" in did, "shout 2" in did) == ("model" in lost, "loud" in lost)
    assert "score" not in did  # the same fingerprints, so what was made from it stays
    assert {name: files()[name] for name in before} == before


def test_a_broken_note_counts_as_nothing_kept(did: list[str]) -> None:
    go()
    Path("runs/chain/fitted/kept.json").write_text('{"fingerprint": "')
    Path("runs/chain/run.json").write_text("[]")
    did.clear()
    go()
    assert did == ["fit"]
    notes = json.loads(Path("runs/chain/run.json").read_text())["variables"]
    assert (notes["numbers"]["state"], notes["numbers"]["kind"]) == ("kept", "json")


def test_force_deletes_and_computes_everything(did: list[str]) -> None:
    go()
    stray = Path("runs/chain/model/block-1")
    stray.touch()
    did.clear()
    go(force=True)
    assert did == EVERYTHING
    assert not stray.exists()


# -------------------------------------------------------------------------------- kinds of results


def test_json_comes_back_as_the_annotation_says(did: list[str]) -> None:
    assert go("p: {call: toolbox.steps.positions}\n")["p"] == {3: (1, 2)}


def test_a_result_that_no_file_can_hold_is_built_only_for_a_call(did: list[str]) -> None:
    text = 'm: {call: toolbox.steps.matrix}\nn: {call: toolbox.steps.size, value: "${m}"}\n'
    results = go(text)
    assert (list(results), results["n"], did) == (["n"], 2, ["matrix", "size"])
    go(text)
    assert did == ["matrix", "size"]


def test_a_result_of_unknown_type_is_computed_and_stays_for_this_run(
    did: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        'u: {call: toolbox.steps.untyped, value: 3}\nn: {call: toolbox.steps.size, value: "${u}"}\n'
    )
    results = go(text)
    assert (results["u"], results["n"], did) == ({3}, 1, ["untyped", "size"])
    assert "u: no file holds a set, so it is not kept" in caplog.text


def test_a_function_without_a_result_writes_every_time(did: list[str]) -> None:
    text = RECIPE + 'saved: {call: toolbox.steps.write, fitted: "${fitted}", path: out.txt}\n'
    assert go(text)["saved"] is None
    Path("out.txt").unlink()
    did.clear()
    go(text)
    assert did == ["write"]
    assert Path("out.txt").read_text() == "1.5"


def test_another_output_is_written_although_the_values_are_the_same(did: list[str]) -> None:
    first = go(RECIPE, "model.output=.")["model"]
    second = go(RECIPE, "model.output=toolbox")["model"]
    assert (first, second) == (Path("model"), Path("toolbox/model"))
    assert second.is_dir()
    assert did.count("train") == 2


def test_a_nested_call_is_part_of_its_variable(did: list[str]) -> None:
    text = """
fitted: {call: toolbox.steps.fit, dataset: {call: toolbox.steps.rows, path: texts.txt}}
"""
    assert go(text)["fitted"].value == 3.0
    go(text, "fitted.dataset.seed=1")
    assert did == ["rows", "fit", "rows", "fit"]


# ------------------------------------------------------------------------------------------ errors

FAILING = RECIPE + 'bad: {call: toolbox.steps.fail, kind: none, dataset: "${loud}"}\n'


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("value", "chain.yaml: bad: first line"),
        ("file", "chain.yaml: bad: No such file: data.bin"),
        ("server", "chain.yaml: bad: RuntimeError"),
        ("missing", "chain.yaml: bad: needs vllm: pip install 'llmlabel[vllm]'"),
        (
            "sqlite",
            "chain.yaml: bad: the disk of runs/chain is full; what is kept stays: free space, run it again",
        ),
        (
            "disk",
            "chain.yaml: bad: the disk of runs/chain is full; what is kept stays: free space, run it again",
        ),
    ],
)
def test_a_failing_step_is_one_line_and_loses_nothing(did: list[str], kind: str, line: str) -> None:
    with pytest.raises(StepError) as caught:
        go(FAILING, f"bad.kind={kind}")
    assert str(caught.value) == f"{line} (details: runs/chain/error.log)"
    assert "in fail" in Path("runs/chain/error.log").read_text()
    did.clear()
    assert go(FAILING)["bad"] == 5
    assert did == ["fail"]


@pytest.mark.parametrize(("kind", "error"), [("type", TypeError), ("interrupt", KeyboardInterrupt)])
def test_a_bug_or_an_interrupt_passes_and_loses_nothing(
    did: list[str], kind: str, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        go(FAILING, f"bad.kind={kind}")
    did.clear()
    go(FAILING)
    assert did == ["fail"]


def test_a_disk_that_is_full_while_a_value_is_written(
    did: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llmlabel.data.save", full)
        with pytest.raises(StepError, match=r"texts: the disk of runs/chain is full"):
            go()
    assert go()["numbers"]["summary"]["rows"] == 6


def test_a_second_process_is_refused(did: list[str]) -> None:
    go()
    with filelock.FileLock("runs/chain/.lock"), pytest.raises(RuntimeError) as caught:
        go()
    assert str(caught.value) == (
        "another process is running in runs/chain; wait for it, or give another --output"
    )
    go()  # the lock is free again


def test_only_the_first_of_many_processes_computes_what_is_no_training(
    did: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go()
    monkeypatch.setenv("RANK", "1")
    met: list[int] = []
    monkeypatch.setattr("llmlabel.recipe.runner._meet", lambda: met.append(len(did)))
    did.clear()
    before = files()
    with filelock.FileLock("runs/chain/.lock"):  # the first one holds it
        results = go(RECIPE, "fitted.scale=0.5", "model.steps=1")
        assert results["loud"]["text"][:] == ["A!", "B!", "C!"]
        go(RECIPE + 'more: {call: toolbox.steps.fit, dataset: "${loud}"}\n')
    assert did == []
    assert met == [0, 0, 0]  # once before each run, and once after the variable that is not kept
    assert files() == before
