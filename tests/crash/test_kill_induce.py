"""An induction that is killed at any moment and started again ends with the same bytes."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from crash.killed_runs import contents

pytestmark = pytest.mark.slow

MOST_CHATS = 30
"""In one call: the block of texts between two levels is the largest."""

PROGRAM = """
import hashlib, json, sys, time
from pathlib import Path
from datasets import Dataset
from pydantic import TypeAdapter
from llmlabel.engine import Reply
from llmlabel.engine.fake import FakeEngine
from llmlabel.taxonomy.induce import Taxonomy, induce, summarise

NAMES = "card account transfer refund fee abroad branch cash loan rate".split()

def digest(chat):
    return hashlib.sha256(json.dumps(chat).encode()).hexdigest()[:16]

def said(chat, schema, temperature):
    number = int(digest([chat, temperature]), 16)
    if "summary" in schema["properties"]:
        return json.dumps({"summary": chat[-1]["content"].split("\\n")[0]})
    if number % 3 == 0:
        return "This is no answer."
    some = {NAMES[number % 7], NAMES[number // 7 % 8], NAMES[number // 56 % 10]}
    return json.dumps({"labels": [{"name": f"{one} {number % 99}"} for one in sorted(some)]})

class Slow(FakeEngine):
    def tell(self, what, chats):
        with open(sys.argv[2], "a", encoding="utf-8") as log:
            log.write("".join(f"{what} {digest(chat)}\\n" for chat in chats))

    def generate(self, chats, *, schema, temperature, **given):
        time.sleep(0.05)
        self.tell(f"generate at {temperature}", chats)
        return [Reply(said(chat, schema, temperature), "stop") for chat in chats]

    def score(self, chats, labels, **given):
        time.sleep(0.02)
        scores = super().score(chats, labels, **given)
        self.tell("score", chats)
        return scores

output = Path(sys.argv[1])
words = "card lost fee bank transfer abroad refund pin account money".split()
rows = Dataset.from_dict({
    "id": [f"r{i:02}" for i in range(60)],
    "text": [f"{words[i % 10]} {words[i % 7]} question {i}" for i in range(60)],
})
engine = Slow()
short = summarise(
    rows, engine, use_case="tests", words=5, block_rows=8, output=output / "summarise"
)
found = induce(
    short, engine, use_case="tests", levels=2, min_texts=10, batch_rows=12, runs=2, max_labels=3,
    output=output / "induce",
)
(output / "taxonomy.json").write_bytes(TypeAdapter(Taxonomy).dump_json(found))
"""


def start(output: Path, log: Path) -> "subprocess.Popen[str]":
    output.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(output), str(log)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def to_the_end(output: Path, log: Path) -> None:
    with start(output, log) as process:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def lines(log: Path) -> list[str]:
    return log.read_text("utf-8").splitlines() if log.is_file() else []


def test_killed_at_random_moments(tmp_path: Path) -> None:
    to_the_end(tmp_path / "whole", tmp_path / "whole.log")
    asked, log = lines(tmp_path / "whole.log"), tmp_path / "killed.log"
    rng = np.random.default_rng(0)
    killed = 0
    for _ in range(8):
        enough = len(lines(log)) + rng.integers(1, len(asked) // 4)
        with start(tmp_path / "killed", log) as process:
            while process.poll() is None and len(lines(log)) < enough:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is None:
                killed += 1
                process.kill()
    assert killed >= 4  # later starts may be done before
    to_the_end(tmp_path / "killed", log)
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("induce/calls/")]) >= 10
    assert contents(tmp_path / "killed") == expected
    assert len(json.loads(expected["taxonomy.json"])["labels"]["ids"]) >= 4
    # A kill may fall between an answer and its file: that call comes again, and no other one.
    again = lines(log)
    assert set(again) == set(asked)
    assert max(Counter(asked).values()) == 1
    assert len(again) <= len(asked) + killed * MOST_CHATS
