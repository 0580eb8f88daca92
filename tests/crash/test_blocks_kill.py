"""Processes that share one folder of blocks, and processes that are killed over it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROWS, BLOCK_ROWS = 480, 4  # so many that twenty killed processes do not finish them
PROGRAM = f"""
import os, sys, time
from pathlib import Path
from datasets import Dataset
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels

class Slow(FakeEngine):
    def score(self, chats, labels, **given):
        time.sleep(float(sys.argv[2]))
        with open("asked", "a") as file:
            file.write("".join(chat[-1]["content"].split()[2] + chr(10) for chat in chats))
        return super().score(chats, labels, **given)

numbers = range({ROWS})
rows = Dataset.from_dict({{"id": [str(n) for n in numbers], "text": [f"bug {{n}}" for n in numbers]}})
labels = load_labels(["bug", "praise"])
got = label_direct(rows, Slow(), labels, block_rows={BLOCK_ROWS}, output=Path(sys.argv[1]))
print(got.num_rows, flush=True)
got.to_parquet(sys.argv[1] + "/result.parquet")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "asked").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def started(output: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "program.py", output, str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


def kept(output: str) -> dict[Path, tuple[int, bytes]]:
    files = sorted((Path(output) / "blocks").glob("[!.]*.parquet"))  # not what is being written
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def asked() -> list[str]:
    return Path("asked").read_text().split()


def test_the_second_process_is_refused(here: Path) -> None:
    with started("output", 0.2) as first:
        while not kept("output"):
            assert first.poll() is None
            time.sleep(0.05)
        with started("output", 0.0) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert said.splitlines()[-1] == (
            "RuntimeError: another process is running in output/blocks; wait for it, or give "
            "another output folder"
        )
        with started("elsewhere", 0.0) as third:
            assert third.communicate(timeout=60)[0].strip() == str(ROWS)
        assert first.poll() is None
        first.kill()
    some = kept("output")
    assert 1 <= len(some) < ROWS // BLOCK_ROWS
    with started("output", 0.0) as again:  # the lock died with its owner
        assert again.communicate(timeout=60)[0].strip() == str(ROWS)
    assert {file: mark for file, mark in kept("output").items() if file in some} == some
    contents = [[content for _, content in kept(name).values()] for name in ("output", "elsewhere")]
    assert contents[0] == contents[1]


def test_killed_twenty_times(here: Path) -> None:
    with started("whole", 0.0) as process:
        process.communicate(timeout=60)
    Path("asked").write_text("")
    rng = np.random.default_rng(0)
    before: dict[Path, tuple[int, bytes]] = {}
    kills = 0
    for moment in rng.uniform(0.0, 0.15, 20):
        with started("output", 0.05) as process:
            until = time.monotonic() + 20
            while len(kept("output")) == len(before) and time.monotonic() < until:
                if process.poll() is not None:
                    break
                time.sleep(0.01)
            time.sleep(moment)
            kills += process.poll() is None
            process.kill()
        now = kept("output")
        assert {file: now[file] for file in before} == before  # none computed again
        before = now
    assert kills == 20
    with started("output", 0.0) as process:
        assert process.communicate(timeout=60)[0].strip() == str(ROWS)
    assert set(asked()) == {str(n) for n in range(ROWS)}
    assert len(asked()) - ROWS <= kills * BLOCK_ROWS  # at most the block in work of each kill
    whole = [(file.name, content) for file, (_, content) in kept("whole").items()]
    assert [(file.name, content) for file, (_, content) in kept("output").items()] == whole
    result = [Path(name, "result.parquet").read_bytes() for name in ("whole", "output")]
    assert result[0] == result[1]
