import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.engine import Scores
from llmlabel.engine.fake import FakeEngine
from llmlabel.label import scale
from llmlabel.label.direct import label_direct
from llmlabel.label.scale import label_at_scale
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.prompt import Chat

FAKE = "llmlabel.engine.fake.FakeEngine"
LABELS = ["bug", "praise", {"id": "q", "name": "question", "description": "asks"}]


@pytest.fixture
def labels() -> LabelSpace:
    return load_labels(LABELS)


def table(rows: int) -> Dataset:
    texts = [f"a bug number {n}" if n % 7 else "" for n in range(rows)]
    return Dataset.from_dict({"mine": list(range(rows)), "id": list(range(rows)), "text": texts})


# ------------------------------------------------------------------------------------- without Ray


def test_what_cannot_run_is_refused_before_anything_runs(labels: LabelSpace) -> None:
    with pytest.raises(ValueError, match="actors must be at least 1; got 0"):
        label_at_scale(table(2), FAKE, labels, actors=0)
    for path in ("os.system", "llmlabel.engine.nowhere.Engine", "llmlabel.files.commit", ""):
        with pytest.raises(ValueError, match=rf"engine='{path}' is no path such as llmlabel\.eng"):
            label_at_scale(table(2), path, labels, actors=1)
    with pytest.raises(ValueError, match="label_direct has no option 'promt' to pass on"):
        label_at_scale(table(2), FAKE, labels, actors=1, promt="label/direct")


@pytest.mark.parametrize("name", ["Path", "chat_seeds", "nothing", "Reply"])
def test_only_classes_of_the_engines_module_are_made(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}' is no class that is defined in llmlabel"):
        scale._made(f"llmlabel.engine.hf.{name}", {})


def test_without_ray_it_says_what_to_install(
    labels: LabelSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ImportError, match=r"pip install 'llmlabel\[scale\]'.*label_direct does"):
        label_at_scale(table(2), FAKE, labels, actors=1)


# ---------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the tests of this file; starting it takes 5 seconds."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


# Ray reads a setting of its own that it has deprecated
ray_warns = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning:ray")


@ray_warns
@pytest.mark.slow
def test_two_actors_say_what_one_process_says(
    cluster: None, labels: LabelSpace, tmp_path: Path
) -> None:
    rows = table(50).add_column("candidates", [[0, 2] if n % 3 else None for n in range(50)])
    noise = {"noise": 2.0}
    given: dict[str, Any] = {"actors": 2, "block_rows": 8, "min_mass": 0.5}
    got = label_at_scale(rows, FAKE, labels, engine_args=noise, output=tmp_path, **given)
    expected = label_direct(rows, FakeEngine(**noise), labels, min_mass=0.5)
    assert got.column_names == expected.column_names
    assert got.features == expected.features
    assert got.to_dict() == expected.to_dict()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    assert len(files) == 7
    # more rows: only the last block, which was not full, is computed again
    more = label_at_scale(
        rows.select(range(40)), FAKE, labels, engine_args=noise, output=tmp_path, **given
    )
    assert more.to_dict() == expected.select(range(40)).to_dict()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")} == files
    with pytest.raises(ValueError, match=r"engine_args\.noise was 2\.0 and is 1\.0"):
        label_at_scale(rows, FAKE, labels, engine_args={"noise": 1.0}, output=tmp_path, **given)
    with pytest.raises(ValueError, match=r"label space has changed \(gone: 'q'\)"):
        label_at_scale(
            rows, FAKE, load_labels(LABELS[:2]), engine_args=noise, output=tmp_path, **given
        )


@ray_warns
@pytest.mark.slow
def test_an_actor_that_dies_is_started_again(
    cluster: None, labels: LabelSpace, tmp_path: Path
) -> None:
    class Mortal(FakeEngine):
        def __init__(self, *, note: str) -> None:
            super().__init__()
            self.note = Path(note)

        def score(self, chats: Sequence[Chat], labels: Sequence[str], **given: Any) -> Scores:
            if not self.note.exists():
                self.note.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(chats, labels, **given)

    note = tmp_path / "killed"
    got = label_at_scale(
        table(30), Mortal, labels, engine_args={"note": str(note)}, actors=2, block_rows=5
    )
    assert int(note.read_text()) != os.getpid()
    assert got.to_dict() == label_direct(table(30), FakeEngine(), labels).to_dict()


@ray_warns
@pytest.mark.slow
def test_an_engine_that_fails_is_one_line(
    cluster: None, labels: LabelSpace, tmp_path: Path
) -> None:
    class Broken(FakeEngine):
        def score(self, chats: Sequence[Chat], labels: Sequence[str], **given: Any) -> Scores:
            if any("number 9" in chat[-1]["content"] for chat in chats):
                raise ValueError("the model is broken")
            return super().score(chats, labels, **given)

    with pytest.raises(RuntimeError, match=r"^an engine failed: ValueError: the model is broken$"):
        label_at_scale(table(12), Broken, labels, actors=1, block_rows=2, output=tmp_path)
    assert len(list(tmp_path.rglob("*.parquet"))) == 4  # those before it
    with pytest.raises(RuntimeError, match=r"^an engine failed: TypeError: .* argument 'noisy'$"):
        label_at_scale(table(2), FAKE, labels, engine_args={"noisy": 1}, actors=1)


PROGRAM = """
import os, sys, time
from pathlib import Path
from datasets import Dataset
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.scale import label_at_scale
from llmlabel.labelspace import load_labels

class Slow(FakeEngine):
    def score(self, chats, labels, **given):
        time.sleep(0.2)
        with open(os.environ["ASKED"], "a") as file:
            file.write("".join(chat[-1]["content"].split()[2] + chr(10) for chat in chats))
        return super().score(chats, labels, **given)

rows = Dataset.from_dict({"id": [str(n) for n in range(60)], "text": [f"bug {n}" for n in range(60)]})
got = label_at_scale(
    rows, Slow, load_labels(["bug", "praise"]), engine_args={"mass": 0.8}, actors=2,
    block_rows=2, output=Path(sys.argv[1]),
)
got.to_parquet(sys.argv[2])
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    log, output, result = tmp_path / "log", tmp_path / "output", tmp_path / "result.parquet"
    log.touch()
    command = [sys.executable, str(program), str(output), str(result)]
    environment = {**os.environ, "ASKED": str(log), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        for _ in range(600):
            if len(list(output.rglob("*.parquet"))) >= 5:
                break
            time.sleep(0.1)
        first.kill()
    kept = {file.name: file.stat().st_mtime_ns for file in output.rglob("*.parquet")}
    assert 5 <= len(kept) < 30
    assert not result.exists()
    time.sleep(3)  # its actors notice that nobody wants them any more
    asked_before = log.read_text().split()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    now = {file.name: file.stat().st_mtime_ns for file in output.rglob("*.parquet")}
    assert len(now) == 30
    assert {name: now[name] for name in kept} == kept
    asked_again = log.read_text().split()[len(asked_before) :]
    assert len(asked_again) == len(set(asked_again)) == 60 - 2 * len(kept)
    got = Dataset.from_parquet(str(result), cache_dir=str(tmp_path / "cache"))
    assert got["id"][:] == [str(n) for n in range(60)]
    labels = load_labels(["bug", "praise"])
    expected = label_direct(got.select_columns(["id", "text"]), FakeEngine(mass=0.8), labels)
    np.testing.assert_array_equal(got["label_probs"][:], expected["label_probs"][:])
