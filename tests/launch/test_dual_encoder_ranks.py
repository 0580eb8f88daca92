"""Two processes that divide the labels train the same dual encoder as one."""

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
from llmlabel.refine.adapt import gold_labels

pytestmark = pytest.mark.slow

WORDS = ["cat", "dog", "fish", "bank", "money", "ball", "goal", "tree", "leaf", "stone", "river"]
RECIPE = """
labels: {{call: llmlabel.labelspace.load_labels, source: {words}, multilabel: true}}
rows: {{call: llmlabel.data.load, path: {rows}}}
model:
  call: llmlabel.train.dual_encoder.train_dual_encoder
  dataset: ${{rows}}
  labels: ${{labels}}
  model: "{tower}"
  dtype: float32
  learning_rate: 0.001
  max_steps: 12
  num_train_epochs: 9
  max_length: 64
  per_device_train_batch_size: {batch}
{more}
"""


@pytest.mark.parametrize(
    "more",
    [
        "  negatives: all\n  pass_tokens: 40",
        "  negatives: cached\n  refresh: 0.1\n  hard_labels: 2",
        "  negatives: ann\n  hard_labels: 3\n  positives: sampled",
        "  negatives: cached\n  loss: soft_topk\n  top_k: 2\n  hard_labels: 2",
    ],
)
def test_two_processes_equal_one(tmp_path: Path, tiny_encoder: Path, more: str) -> None:
    """After 12 updates, of rows and labels that do not divide evenly."""
    labels = load_labels(WORDS, multilabel=True)
    rng = np.random.default_rng(0)
    gold = [sorted(rng.choice(11, 1 + i % 3, replace=False).tolist()) for i in range(33)]
    texts = [" and the ".join(WORDS[j] for j in own) + " !" * (i % 4) for i, own in enumerate(gold)]
    rows = Dataset.from_dict({"id": [str(i) for i in range(33)], "text": texts, "gold": gold})
    save(gold_labels(rows, labels), tmp_path / "rows.parquet")
    found = {}
    for processes, batch in ((1, 8), (2, 4)):
        recipe = tmp_path / f"p{processes}.yaml"
        given = {"words": json.dumps(WORDS), "rows": tmp_path / "rows.parquet", "batch": batch}
        recipe.write_text(RECIPE.format(tower=tiny_encoder, more=more, **given))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *(launcher if processes == 2 else []), "-m", "llmlabel", "run"]
        done = subprocess.run(
            [*command, str(recipe), "--output", str(tmp_path / "runs")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs" / recipe.stem / "model"
        card = json.loads((folder / "model_card.json").read_text())
        assert (card["processes"], card["updates"]) == (processes, 12)
        found[processes] = load_file(folder / "encoder" / "model.safetensors"), card
    (one, first), (two, second) = found[1], found[2]
    if "all" not in more:  # there a half fits into one pass, the whole does not
        assert first["label_tokens"] == second["label_tokens"]
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-4)
    for name, value in one.items():
        if not name.endswith("key.bias"):  # softmax does not feel it: its gradient is rounding
            np.testing.assert_allclose(two[name], value, atol=1e-4, err_msg=name)
