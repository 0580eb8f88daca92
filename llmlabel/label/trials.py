"""What a prompt and demonstrations are worth to a language model, without gold.

Everything that self-training asks of an engine passes here: counted, and kept once it is answered.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel import metrics
from llmlabel.blocks import map_blocks
from llmlabel.data import with_columns
from llmlabel.engine import Engine
from llmlabel.files import keep_json, kept_json
from llmlabel.label.direct import UNREAD
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import Chat, prompt_sha, render
from llmlabel.refine.debias import batch_calibration
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels

Learned = dict[str, str]
"""What the prompt file is given: `words` or an `instruction`; nothing makes the manual prompt."""
Shown = list[list[dict[str, Any]]]
"""The demonstrations of each row."""
Targets = Int[np.ndarray, " all_rows"]
"""The pseudo-label of each row; -1 where there is none."""


@dataclass
class Trials:
    """Asks an engine about rows.

    Attributes:
        engine: who answers.
        labels: what may be answered.
        prompt: file or shipped name.
        rows: with `id` and `text`.
        settings: JSON; with the four above all that answers depend on.
        block_rows: rows committed at a time when all are labelled.
        output: folder that keeps answers; None keeps nothing.
        corrects: Whether the model's label preferences are taken out.
        calls: Chats given to the engine so far, before a crash too.
    """

    engine: Engine
    labels: LabelSpace
    prompt: str | Path
    rows: Dataset
    settings: Mapping[str, Any]
    block_rows: int
    output: Path | None
    corrects: bool = False
    calls: int = 0

    def __post_init__(self) -> None:
        """Reads the texts, and the mark of this call."""
        self.ids: list[str] = [str(id) for id in self.rows["id"][:]]
        self.texts: list[str] = self.rows["text"][:]
        self.readable = [row for row, text in enumerate(self.texts) if text.strip()]
        self.key = {"engine": self.engine.name, "prompt": prompt_sha(self.prompt), **self.settings}
        told = [version("llmlabel"), self.key, self.labels.fingerprint, self.ids, self.texts]
        self.mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def once(self, name: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `ask` learned from the engine by the `calls` that it tells, now or before a crash."""
        file = None if self.output is None else self.output / "steps" / f"{name}.json"
        said = None if file is None else kept_json(file, self.mark)
        if said is None:
            said = ask()
            if file is not None:
                keep_json(file, self.mark, said)
        self.calls += said["calls"]
        return said

    def chats(
        self,
        rows: Sequence[int],
        learned: Learned,
        shown: Shown,
        *,
        order: Sequence[int] | None = None,
    ) -> list[Chat]:
        """What the model reads of rows; `order` is that of the labels in the prompt."""
        texts = self.labels.texts()
        listed = texts if order is None else [texts[label] for label in order]
        return [
            render(
                self.prompt,
                text=self.texts[row],
                labels=listed,
                demonstrations=shown[row],
                **learned,
            )
            for row in rows
        ]

    def answers(self, chats: list[Chat]) -> Float[np.ndarray, "chats labels"]:
        """Log-probability of each label, normalised; uniform where the model gives none."""
        scores = self.engine.score(chats, self.labels.names)
        soft = SoftLabels.from_scores(scores.log_probs, self.labels, unread=scores.unread)
        return soft.log_dense()

    def losses(
        self, prompts: Sequence[Learned], rows: Sequence[int], shown: Shown, targets: Targets
    ) -> tuple[list[float], Float[np.ndarray, "prompts rows labels"]]:
        """Cross-entropy of each prompt against the pseudo-labels of the rows; its probabilities."""
        chats = [chat for learned in prompts for chat in self.chats(rows, learned, shown)]
        log_probs = self.answers(chats).reshape(len(prompts), len(rows), len(self.labels))
        if self.corrects and len(rows) >= 2 * len(self.labels):  # else their mean says little
            log_probs = centred(log_probs)
        probs = np.exp(log_probs)
        return [metrics.nll(one, targets[rows]) for one in probs], probs

    def corrected(self, labelled: Dataset) -> Dataset:
        """Soft labels without the preferences of the model, where these are taken out."""
        return batch_calibration(labelled, self.labels) if self.corrects else labelled

    def label_all(self, learned: Learned, shown: Shown, *, name: str) -> Dataset:
        """All rows with the answers to one prompt, kept in a folder `name`."""
        place = {id: row for row, id in enumerate(self.rows["id"][:])}
        sha = prompt_sha(self.prompt)

        def compute(block: Dataset) -> Dataset:
            rows = [place[id] for id in block["id"][:]]
            read = [i for i, row in enumerate(rows) if self.texts[row].strip()]
            probs, mass = np.zeros((len(block), len(self.labels))), np.zeros(len(block))
            errors: list[str | None] = ["empty text"] * len(block)
            if read:
                chats = self.chats([rows[i] for i in read], learned, shown)
                scores = self.engine.score(chats, self.labels.names)
                soft = SoftLabels.from_scores(scores.log_probs, self.labels, unread=scores.unread)
                probs[read], mass[read] = soft.dense(), np.nan_to_num(scores.label_mass, nan=0.0)
                for i, message in zip(read, scores.errors or [None] * len(read), strict=True):
                    errors[i] = message or (None if probs[i].any() else UNREAD)
            return with_columns(
                SoftLabels.from_dense(probs, self.labels).add_to(block),
                {
                    "label_mass": (mass.astype(np.float32), Value("float32")),
                    "engine": (pa.repeat(self.engine.name, len(block)), Value("string")),
                    "prompt_sha": (pa.repeat(sha, len(block)), Value("string")),
                    "error": (errors, Value("string")),
                },
            )

        key = {**self.key, "labels": self.labels, "learned": learned, "shown": common(shown)}
        labelled = map_blocks(
            self.rows,
            compute,
            columns=LABEL_COLUMNS,
            key=key,
            block_rows=self.block_rows,
            output=None if self.output is None else self.output / name,
            name="label_selftrain",
        )
        self.calls += len(self.readable)
        return labelled


def centred(
    log_probs: Float[np.ndarray, "*prompts rows labels"],
) -> Float[np.ndarray, "*prompts rows labels"]:
    """Without the mean log-probability of each label over the rows, normalised again."""
    free = log_probs - log_probs.mean(axis=-2, keepdims=True)
    return free - np.logaddexp.reduce(free, axis=-1, keepdims=True)


def common(shown: Shown) -> list[dict[str, Any]]:
    """The demonstrations of most rows; a row that is among them has others."""
    counts = Counter(json.dumps(some) for some in shown)
    most: list[dict[str, Any]] = json.loads(max(counts, key=lambda some: (counts[some], some)))
    return most
