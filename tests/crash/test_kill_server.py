"""A client of a server that is killed at any moment and started again ends with the same bytes."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash.killed_runs import contents, started
from engine.openai_server import FakeServer, storm

from llmlabel.data import read_parquet

pytestmark = pytest.mark.slow

KILLS, ROWS = 20, 96

RECIPE = """
labels: {{call: llmlabel.labelspace.load_labels, source: [cat, business, mat]}}
texts: {{call: llmlabel.data.load, path: {texts}}}
engine:
  call: llmlabel.engine.openai.OpenAIEngine
  base_url: {url}
  tokenizer: {tokenizer}
  in_flight: 8
raw:
  call: llmlabel.label.direct.label_direct
  dataset: ${{texts}}
  engine: ${{engine}}
  labels: ${{labels}}
  block_rows: 8
"""


def run_to_the_end(recipe: Path, output: Path) -> None:
    with started(recipe, output) as process:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


def test_killed_at_random_moments(tmp_path: Path, tiny_decoder: Path, tiny_tokenizer: Any) -> None:
    texts = tmp_path / "texts.csv"
    lines = [f"r{i},the cat sat on the mat {i} business" for i in range(ROWS)]
    texts.write_text("id,text\n" + "\n".join(lines) + "\n")
    recipe = tmp_path / "chain.yaml"
    with FakeServer(tiny_tokenizer, fault=lambda number, path, body: 0.02) as server:
        recipe.write_text(RECIPE.format(texts=texts, url=server.url, tokenizer=tiny_decoder))
        began = time.monotonic()
        run_to_the_end(recipe, tmp_path / "whole")
        seconds, asked = time.monotonic() - began, len(server.requests)
        rng = np.random.default_rng(0)
        blocks = tmp_path / "killed" / "chain" / "raw" / "blocks"
        killed = 0
        while killed < KILLS:
            with started(recipe, tmp_path / "killed") as process:
                # Each start has less left to do; what is left over goes to the next one.
                time.sleep(rng.uniform(0.2, 1.0) * seconds)
                if process.poll() is None:
                    process.kill()
                    killed += 1
                    continue
                assert process.returncode == 0
            for kept in sorted(blocks.parent.glob("*.json")):  # begin again with half of the blocks
                kept.unlink()
            for block in sorted(blocks.glob("*.parquet"))[::2]:
                block.unlink()
        server.requests.clear()
        run_to_the_end(recipe, tmp_path / "killed")
        assert len(server.requests) < asked  # finished blocks are not asked for again
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if "/blocks/" in name]) >= ROWS // 8
    assert contents(tmp_path / "killed") == expected
    rows = read_parquet(tmp_path / "killed/chain/raw/value.parquet")
    assert rows["id"][:] == [f"r{i}" for i in range(ROWS)]
    assert rows["error"][:] == [None] * ROWS


def test_a_minute_without_a_server_and_a_storm_of_429_are_survived_by_default(
    tmp_path: Path, tiny_decoder: Path, tiny_tokenizer: Any
) -> None:
    from llmlabel.engine.openai import OpenAIEngine
    from llmlabel.prompt import render

    labels = ["cat", "business", "mat"]
    chats = [render("label/direct", text=f"a cat {i}", labels=labels) for i in range(24)]
    with FakeServer(tiny_tokenizer) as server:
        engine = OpenAIEngine(server.url, tokenizer=str(tiny_decoder), in_flight=4)
        expected = engine.score(chats, labels)
        server.fault = storm(30, fault="status:429", after=len(server.requests) + 3)
        again = engine.score(chats, labels)
        np.testing.assert_array_equal(again.log_probs, expected.log_probs)
        assert again.errors == [None] * len(chats)

        later: list[FakeServer] = []

        def restart() -> None:
            time.sleep(60)
            later.append(FakeServer(tiny_tokenizer, port=server.server_address[1]).__enter__())

        server.kill()
        waiting = threading.Thread(target=restart)
        waiting.start()
        began = time.monotonic()
        after = engine.score(chats, labels)
        assert time.monotonic() - began > 59
        waiting.join()
        later[0].kill()
    np.testing.assert_array_equal(after.log_probs, expected.log_probs)
    assert after.errors == [None] * len(chats)
