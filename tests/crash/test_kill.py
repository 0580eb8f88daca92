"""A run that is killed at any moment and started again ends with the same bytes."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from crash.killed_runs import contents, started

pytestmark = pytest.mark.slow

RECIPE = """
labels: {{call: llmlabel.labelspace.load_labels, source: [cat, business, mat]}}
texts: {{call: llmlabel.data.load, path: {texts}}}
engine: {{call: llmlabel.engine.hf.HFEngine, model: "{decoder}", dtype: float32}}
raw:
  call: llmlabel.label.direct.label_direct
  dataset: ${{texts}}
  engine: ${{engine}}
  labels: ${{labels}}
  block_rows: 8
llm: {{call: llmlabel.refine.debias.batch_calibration, dataset: "${{raw}}", labels: "${{labels}}"}}
student:
  call: llmlabel.train.classifier.train_classifier
  dataset: ${{llm}}
  labels: ${{labels}}
  model: "{encoder}"
  pooling: mean
  num_train_epochs: 4
  max_length: 128
  save_steps: 1
predicted:
  call: llmlabel.train.classifier.predict
  dataset: ${{texts}}
  model: ${{student}}
  block_rows: 16
"""


def run_to_the_end(recipe: Path, output: Path) -> None:
    with started(recipe, output) as process:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


def test_killed_at_random_moments(tmp_path: Path, tiny_decoder: Path, tiny_encoder: Path) -> None:
    texts = tmp_path / "texts.csv"
    lines = [f"r{i},the cat sat on the mat {i} business" for i in range(96)]
    texts.write_text("id,text\n" + "\n".join(lines) + "\n")
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(RECIPE.format(texts=texts, decoder=tiny_decoder, encoder=tiny_encoder))
    began = time.monotonic()
    run_to_the_end(recipe, tmp_path / "whole")
    seconds = time.monotonic() - began
    rng = np.random.default_rng(0)
    killed = 0
    for moment in rng.uniform(0.3, 1.0, 5) * seconds:
        with started(recipe, tmp_path / "killed") as process:
            time.sleep(moment)
            if process.poll() is None:
                killed += 1
                process.kill()
    assert killed >= 2  # later starts may be done before their moment
    run_to_the_end(recipe, tmp_path / "killed")
    expected = contents(tmp_path / "whole")
    assert len(expected) > 20
    assert contents(tmp_path / "killed") == expected


def test_interrupt_keeps_committed_work(tmp_path: Path, tiny_decoder: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("id,text\n" + "".join(f"r{i},the cat {i}\n" for i in range(4000)))
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(RECIPE.split("llm:")[0].format(texts=texts, decoder=tiny_decoder, encoder=""))
    blocks = tmp_path / "runs" / "chain" / "raw" / "blocks"
    with started(recipe, tmp_path / "runs") as process:
        for _ in range(2000):
            if blocks.is_dir() and len(list(blocks.glob("*.parquet"))) >= 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command continues" in said
    assert len([p for p in blocks.iterdir() if p.suffix == ".parquet"]) >= 3
