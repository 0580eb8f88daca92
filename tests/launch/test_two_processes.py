"""Two processes train the same student as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value
from safetensors.numpy import load_file

from llmlabel.data import read_parquet, save, with_columns
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels
from llmlabel.train.settings import EARLY

pytestmark = pytest.mark.slow

RECIPE = """
labels: {{call: llmlabel.labelspace.load_labels, source: [animal, money]}}
rows: {{call: llmlabel.data.load, path: {rows}}}
student:
  call: {call}
  dataset: ${{rows}}
  labels: ${{labels}}
  model: "{model}"
  lora: {{r: 4, dropout: 0.0}}
  dtype: float32
  learning_rate: 0.005
  num_train_epochs: 5
  max_steps: 24
  max_length: 64
  per_device_train_batch_size: {batch}
{more}
predicted: {{call: llmlabel.train.classifier.predict, dataset: "${{rows}}", model: "${{student}}"}}
"""

PLAIN = "llmlabel.train.classifier.train_classifier"
WAYS = {
    "encoder": (PLAIN, "  pooling: mean"),
    "decoder": (PLAIN, "  bidirectional: true"),
    "early learning": (PLAIN, "  pooling: mean\n  early_learning: {beta: 0.5}"),
    "llkd": ("llmlabel.train.distill.distill", "  pooling: mean\n  select: llkd\n  alpha: 0.7"),
}


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


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(
    tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path, way: str
) -> None:
    """After 24 updates, the fifth epoch's first ones among them."""
    labels = load_labels(["animal", "money"])
    texts = [["the cat sat", "business and money"][i % 2] + " mat" * (i % 5) for i in range(45)]
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])[np.arange(45) % 2]
    gold = [[i % 2] if i % 3 else None for i in range(45)]
    rows = Dataset.from_dict({"id": [str(i) for i in range(45)], "text": texts})
    rows = with_columns(rows, {"gold": (gold, List(Value("int32")))})
    save(SoftLabels.from_dense(probs, labels).add_to(rows), tmp_path / "rows.parquet")
    call, more = WAYS[way]
    model = tiny_decoder if way == "decoder" else tiny_encoder
    folders = {}
    for processes, batch in ((1, 8), (2, 4)):
        recipe = tmp_path / f"p{processes}.yaml"
        rows_file = tmp_path / "rows.parquet"
        recipe.write_text(
            RECIPE.format(rows=rows_file, call=call, more=more, model=model, batch=batch)
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
    if way == "early learning":
        first, second = (read_parquet(folder / EARLY) for folder in (one, two))
        assert first["label_ids"][:] == second["label_ids"][:]
        for a, b in zip(first["label_probs"][:], second["label_probs"][:], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
