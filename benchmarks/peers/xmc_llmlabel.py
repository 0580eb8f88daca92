"""llmlabel: MiniLM as it is and trained, its memory of rows, and their fusion with profiles and words.

    python xmc_llmlabel.py JOB.json     job: `method`, one of METHODS; `max_length`, `model`, `training`

`frozen` trains nothing. `trained` takes the rows that are not held, for as many updates as the minutes
leave room for: the time of an update comes from two trainings of a few. Both embed all rows, and fit
the weights of the fusion on the held rows, of whose labels no source knows at that point; all but
the encoder then get them too. Each line of the table costs what was used up to there, sources by words
that only the last one needs included.

`one` trains with given settings for a fixed number of updates and leaves the answers of the
encoder alone; `rows` and `labels` of the job take fewer rows and repeat labels.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from protocol import peak_mib, versions
from xmc_protocol import Answers, best_of, cpu_seconds, read_job, save

from llmlabel import models
from llmlabel.data import label_csr, with_columns
from llmlabel.label.embedding import Encoder, embed
from llmlabel.label.index import LabelIndex, label_index
from llmlabel.label.linear import label_linear
from llmlabel.label.neighbours import label_neighbours
from llmlabel.label.profiles import label_lexical, label_profiles
from llmlabel.label.retrieval import label_nearest
from llmlabel.label.score_fusion import fit_fusion, fuse
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels
from llmlabel.train.dual_encoder import load_dual_encoder, train_dual_encoder

MEMORY = {"k": 100, "scale": 10.0}
PROBES = (2, 8)
"""Updates of the two trainings whose difference tells the time of an update."""


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows but the test rows, which of these are held, and the test rows without labels."""

    space: LabelSpace
    known: Dataset
    held: np.ndarray
    new: Dataset

    def learn(self) -> Dataset:
        """Those that are not held."""
        return self.known.select(np.flatnonzero(~self.held))

    def choose(self) -> Dataset:
        """Those that are."""
        return self.known.select(np.flatnonzero(self.held))


def rows_of(problem: dict[str, Any]) -> Rows:
    count = len(problem["names"])
    ids = tuple(str(number) for number in range(count))
    names, descriptions = tuple(problem["names"]), tuple(problem["descriptions"])
    space = LabelSpace(ids, names, descriptions, ((),) * count, multilabel=True)
    known = Dataset.from_dict({"id": [f"k{i}" for i in range(len(problem["texts"]))]})
    known = known.add_column("text", problem["texts"])
    known = with_columns(known, {"gold": (problem["gold"], List(Value("int32")))})
    new = Dataset.from_dict({"id": [f"n{i}" for i in range(len(problem["new"]))]})
    new = new.add_column("text", problem["new"])
    return Rows(space, known, np.array(problem["held"]), new)


class Results:
    """Answers of the test rows, and what was used until each was there."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.runs = job, {}

    def add(self, title: str, found: Dataset, space: LabelSpace) -> None:
        """Keeps one line of the table."""
        save(self.job, title, answers(found, space))
        self.runs[title] = {
            "setting": "",
            "cpu_s": cpu_seconds(),
            "mib": peak_mib(os.getpid()),
        }

    def tell(self, **more: Any) -> None:
        """Prints them all."""
        packages = ("torch", "transformers", "sentence-transformers")
        told = {"versions": versions(packages), "trials": {}, "search_s": 0.0, "setting": ""}
        print(json.dumps({**told, "runs": self.runs, **more}), flush=True)


def answers(found: Dataset, space: LabelSpace) -> Answers:
    return best_of(SoftLabels.from_dataset(found, space).probs)


# ----------------------------------------------------------------------------------------- sources


def sources(
    rows: Rows, known: Dataset, wanted: Dataset, index: LabelIndex, words: dict[str, Dataset]
) -> dict[str, Dataset]:
    """What each source says of rows that none of them has learned from."""
    return {
        "encoder": label_nearest(wanted, index),
        "memory": label_neighbours(wanted, known, rows.space, **MEMORY),
        "profiles": label_profiles(wanted, known, index),
        **words,
    }


def by_words(rows: Rows, known: Dataset, wanted: Dataset) -> dict[str, Dataset]:
    """The sources that need no encoder."""
    return {
        "words": label_lexical(wanted, known, rows.space),
        "linear": label_linear(wanted, known, rows.space),
    }


def ranked(
    rows: Rows,
    texts: Encoder,
    labels: Encoder,
    found: Results,
    first: str,
    held: dict[str, Dataset],
) -> dict[str, Any]:
    """The encoder alone, with its memory, and with all sources; `held` are by words."""
    index = label_index(rows.space, labels)
    new = embed(rows.new, texts)
    found.add(first, label_nearest(new, index), rows.space)
    ready = replace(rows, known=embed(rows.known, texts), new=new)
    parts: dict[str, dict[str, Dataset]] = {
        "held": sources(ready, ready.learn(), ready.choose(), index, held),
        "new": sources(ready, ready.known, new, index, by_words(rows, rows.known, rows.new)),
    }
    weights = {}
    for title, names in (
        ("memory", ("encoder", "memory")),
        ("all", (*parts["new"],)),
    ):
        chosen = {part: {name: some[name] for name in names} for part, some in parts.items()}
        fitted = fit_fusion(chosen["held"], ready.space, training=ready.learn())
        weights[title] = {"weights": fitted.weights, "ceiling": fitted.ceiling}
        fused = fuse(chosen["new"], ready.space, fusion=fitted, training=ready.known)
        found.add(f"{first} + {title}", fused, ready.space)
    return weights


# ----------------------------------------------------------------------------------------- methods


def frozen(job: dict[str, Any], rows: Rows) -> None:
    found, encoder = Results(job), minilm(job)
    held = by_words(rows, rows.learn(), rows.choose())
    found.tell(fusion=ranked(rows, encoder, encoder, found, "zero-shot", held))


def minilm(job: dict[str, Any]) -> Any:
    encoder = models.load_encoder(models.MINILM)
    encoder.max_seq_length = job["max_length"]
    return encoder.bfloat16() if job["training"].get("dtype") == "bfloat16" else encoder


def trained(job: dict[str, Any], rows: Rows) -> None:
    found = Results(job)
    budget = 60 * job["minutes"]
    some = rows.known.select(np.random.default_rng(0).permutation(len(rows.known))[:300])
    encoder, before = minilm(job), cpu_seconds()
    embed(some, encoder)
    each = (cpu_seconds() - before) / len(some)
    before = cpu_seconds()
    held = by_words(rows, rows.learn(), rows.choose())
    of_words = cpu_seconds() - before  # the others and the fusion take about as long again
    afterwards = 1.2 * each * (len(rows.known) + len(rows.new)) + 2.5 * of_words
    probes = [probe(job, rows, steps) for steps in PROBES]
    step = (probes[1] - probes[0]) / (PROBES[1] - PROBES[0])
    once = probes[0] - PROBES[0] * step
    left = budget - cpu_seconds() - afterwards - once
    steps = max(1, int(left / step))
    folder = train(rows, job, Path(job["work"]) / "trained", steps)
    dual = load_dual_encoder(folder)
    fusion = ranked(rows, dual.texts, dual.labels, found, "trained", held)
    card = {name: dual.card[name] for name in ("updates", "label_tokens", "settings")}
    found.tell(fusion=fusion, card=card, step_s=step, once_s=once, afterwards_s=afterwards)


def probe(job: dict[str, Any], rows: Rows, steps: int) -> float:
    before = cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        train(rows, job, Path(folder), steps)
    return cpu_seconds() - before


def train(rows: Rows, job: dict[str, Any], folder: Path, steps: int) -> Path:
    known = gold_as_soft(rows.learn(), rows.space)
    settings = {"max_length": job["max_length"], "num_train_epochs": 1000, **job["training"]}
    return train_dual_encoder(
        known, rows.space, model=models.MINILM, output=folder, max_steps=steps, **settings
    )


def gold_as_soft(dataset: Dataset, space: LabelSpace) -> Dataset:
    soft = SoftLabels(
        label_csr(dataset, space).astype(np.float32), space.fingerprint, multilabel=True
    )
    nothing = ([None] * len(dataset), Value("string"))
    return with_columns(soft.add_to(dataset), {"error": nothing})


def one(job: dict[str, Any], rows: Rows) -> None:
    """One training of `steps` updates."""
    found = Results(job)
    rows = replace(rows, known=rows.known.select(range(job.get("rows", len(rows.known)))))
    rows = replace(rows, held=rows.held[: len(rows.known)])
    rows = repeated(rows, job.get("labels", len(rows.space)))
    with tempfile.TemporaryDirectory() as folder:
        before, started = cpu_seconds(), time.monotonic()
        model = train(rows, job, Path(folder) / "model", job["steps"])
        used, seconds = cpu_seconds() - before, time.monotonic() - started
        dual = load_dual_encoder(model)
    if job.get("answers_too", True):
        index = label_index(rows.space, dual.labels)
        found.add("default", label_nearest(embed(rows.new, dual.texts), index), rows.space)
    card = {name: dual.card[name] for name in ("updates", "label_tokens", "loss")}
    card["seconds"] = seconds
    found.tell(card=card, cpu_s=used, mib=peak_mib(os.getpid()), learned=len(rows.learn()))


def repeated(rows: Rows, count: int) -> Rows:
    """With names numbered again and again until there are so many labels; rows keep theirs."""
    space = rows.space
    if count == len(space):
        return rows
    times = range(-(-count // len(space)))
    names = [f"{name} {time}" if time else name for time in times for name in space.names][:count]
    texts = [text for _ in times for text in space.descriptions][:count]
    ids = tuple(str(number) for number in range(count))
    return replace(
        rows, space=LabelSpace(ids, tuple(names), tuple(texts), ((),) * count, multilabel=True)
    )


METHODS: dict[str, Callable[[dict[str, Any], Rows], None]] = {
    "frozen": frozen,
    "trained": trained,
    "one": one,
}

if __name__ == "__main__":
    given, data = read_job()
    METHODS[given["method"]](given, rows_of(data))
