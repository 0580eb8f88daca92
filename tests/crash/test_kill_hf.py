"""A labeling by transformers that is killed at 20 random moments ends with the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# The parent imports and never computes, so that a fork of it is a fresh process within milliseconds.
PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
from datasets import Dataset
from llmlabel.engine.hf import HFEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels

model, output, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
words = ["cat", "mat", "business", "sports", "the"]

def work():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(240)]
    rows = Dataset.from_dict({"id": [str(n) for n in range(240)], "text": texts})
    labels = load_labels(["cat", "catfish", "sports", "the mat, no?"])
    engine = HFEngine(model, dtype="float32", pass_tokens=400)
    label_direct(rows, engine, labels, block_rows=4, output=output).to_parquet(output / "result.parquet")

def attempt(seconds):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    start = time.monotonic()
    while seconds is None or time.monotonic() - start < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

def blocks():
    return {f.name: f.stat().st_mtime_ns for f in (output / "blocks").glob("[!.]*.parquet")}

rng, killed, seen = random.Random(1), 0, {}
while killed < kills:
    status = attempt(rng.uniform(0.2, 0.9))
    if status is not None:
        print("ended", status, killed)
        sys.exit(status and 1)
    killed += 1
    now = blocks()
    assert seen.items() <= now.items(), "a committed block was computed again"
    seen = now
print("killed", killed, "blocks", len(seen))
sys.exit(attempt(None))
"""


def run(here: Path, model: Path, output: Path, kills: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(here / "program.py"), str(model), str(output), str(kills)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    return done.stdout


def test_killed_twenty_times(tmp_path: Path, tiny_decoder: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    run(tmp_path, tiny_decoder, tmp_path / "whole", 0)
    said = run(tmp_path, tiny_decoder, tmp_path / "killed", 20)
    assert said.startswith("killed 20 "), said
    files = [
        {
            file.relative_to(tmp_path / name).as_posix(): file.read_bytes()
            for file in sorted((tmp_path / name).rglob("*.parquet"))
            if not file.name.startswith(".tmp-")
        }
        for name in ("whole", "killed")
    ]
    assert len(files[0]) == 61
    assert files[0] == files[1]
