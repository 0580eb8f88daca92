"""Two processes train the same student as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file

from llmlabel.data import save
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

RECIPE = """
labels: {{call: llmlabel.labelspace.load_labels, source: [animal, money]}}
rows: {{call: llmlabel.data.load, path: {rows}}}
student:
  call: llmlabel.train.classifier.train_classifier
  dataset: ${{rows}}
  labels: ${{labels}}
  model: "{encoder}"
  pooling: mean
  lora: {{r: 4, dropout: 0.0}}
  dtype: float32
  learning_rate: 0.005
  num_train_epochs: 2
  max_length: 128
  per_device_train_batch_size: {batch}
predicted: {{call: llmlabel.train.classifier.predict, dataset: "${{rows}}", model: "${{student}}"}}
"""


def run(recipe: Path, output: Path, processes: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "llmlabel", "run"]
    done = subprocess.run(
        [*command, str(recipe), "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_equal_one(tmp_path: Path, tiny_encoder: Path) -> None:
    labels = load_labels(["animal", "money"])
    texts = [["the cat sat", "business and money"][i % 2] + " mat" * (i % 5) for i in range(21)]
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])[np.arange(21) % 2]
    rows = Dataset.from_dict({"id": [str(i) for i in range(21)], "text": texts})
    save(SoftLabels.from_dense(probs, labels).add_to(rows), tmp_path / "rows.parquet")
    folders = {}
    for processes, batch in ((1, 8), (2, 4)):
        recipe = tmp_path / f"p{processes}.yaml"
        recipe.write_text(
            RECIPE.format(rows=tmp_path / "rows.parquet", encoder=tiny_encoder, batch=batch)
        )
        run(recipe, tmp_path / "runs", processes)
        folders[processes] = tmp_path / "runs" / recipe.stem
    one, two = (folders[n] / "student" for n in (1, 2))
    assert json.loads((two / "model_card.json").read_text())["processes"] == 2
    assert json.loads((one / "model_card.json").read_text())["processes"] == 1
    for name in ("head.safetensors", "adapter_model.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            np.testing.assert_allclose(second[key], value, atol=1e-4, err_msg=key)
