"""The data of benchmarks/xmc.py, and how good answers are.

`finna`: finna_yso of ../shared/data; a tenth of its train rows, by a hash of the id, is held to choose
settings by. `debtags`: what ../shared/data/build_debtags.py wrote; its validation rows are held. What
learns in the end learns from all rows but the test rows.
"""

import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from scipy.sparse import csr_array

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics.ranking import inverse_propensity, ranking_by_frequency, ranking_scores

KS = (1, 3, 5, 10, 100)


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows to learn from, of which some are `held`, and test rows, with their labels."""

    space: LabelSpace
    train: Dataset
    held: np.ndarray
    test: Dataset

    @cached_property
    def propensity(self) -> np.ndarray:
        """Inverse propensity of each label."""
        return inverse_propensity(self.gold("train"))

    def gold(self, which: str) -> csr_array:
        """Of the rows `train` or `test`."""
        rows = getattr(self, which)["gold"][:]
        ids = np.array([label for some in rows for label in some], dtype=np.int64)
        indptr = np.cumsum([0] + [len(some) for some in rows])
        return csr_array((np.ones(len(ids)), ids, indptr), shape=(len(rows), len(self.space)))

    def write(self, path: Path) -> None:
        """What a run is given: the labels of the test rows are not in it."""
        known = {"texts": self.train["text"][:], "gold": self.train["gold"][:]}
        known |= {"held": self.held.tolist(), "new": self.test["text"][:]}
        known |= {"names": self.space.names, "descriptions": self.space.descriptions}
        path.write_text(json.dumps(known), "utf-8")

    def said(self, answers: Path) -> csr_array:
        """Scores of the 100 best labels of the test rows."""
        with np.load(answers) as kept:
            ids, scores = kept["ids"], kept["scores"]
        order = np.argsort(np.where(ids < 0, len(self.space), ids), axis=1)
        ids, scores = (np.take_along_axis(table, order, axis=1) for table in (ids, scores))
        indptr = np.concatenate([[0], np.cumsum((ids >= 0).sum(axis=1))])
        shape = (len(ids), len(self.space))
        return csr_array((scores[ids >= 0].astype(float), ids[ids >= 0], indptr), shape=shape)

    def scores(self, answers: Path) -> dict[str, float]:
        """How good these answers are."""
        weights = self.propensity
        return ranking_scores(
            self.said(answers), self.gold("test"), ks=KS, inverse_propensity=weights
        )

    def by_frequency(self, answers: Path) -> list[dict[str, Any]]:
        """The same by how frequent labels are."""
        counts = self.gold("train").sum(axis=0).astype(int)
        return ranking_by_frequency(self.said(answers), self.gold("test"), counts, k=10)


def finna(shared: Path) -> Problem:
    folder = shared / "finna_yso"
    labels = _rows(folder / "labels.jsonl.gz")
    rows = _rows(folder / "finna_yso.jsonl.gz")
    known = [row for row in rows if row["split"] == "train"]
    held = np.array([zlib.crc32(row["id"].encode()) % 10 == 0 for row in known])
    test = [row for row in rows if row["split"] == "test"]
    return _problem(
        [row["label"] for row in labels], [row["name"] for row in labels], None, known, held, test
    )


def debtags(folder: Path) -> Problem:
    labels, facets = (_rows(folder / name) for name in ("labels.jsonl", "facets.jsonl"))
    facet = {row["facet"]: row["name"] for row in facets}
    names = [f"{facet[row['facet']]}: {row['name']}" for row in labels]
    descriptions = [" ".join(row["description"].split()) for row in labels]
    rows = _rows(folder / "debtags.jsonl.gz")
    known = [row for row in rows if row["split"] != "test"]
    held = np.array([row["split"] == "validation" for row in known])
    test = [row for row in rows if row["split"] == "test"]
    return _problem([row["label"] for row in labels], names, descriptions, known, held, test)


def _problem(
    ids: list[str],
    names: list[str],
    descriptions: list[str] | None,
    known: list[dict[str, Any]],
    held: np.ndarray,
    test: list[dict[str, Any]],
) -> Problem:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:  # 12 names of finna and one of debtags are those of two labels
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    texts = tuple(descriptions or [""] * len(ids))
    space = LabelSpace(tuple(ids), tuple(unique), texts, ((),) * len(ids), multilabel=True)
    place = {id: number for number, id in enumerate(ids)}
    return Problem(space, _table(known, place), held, _table(test, place))


def _table(rows: list[dict[str, Any]], place: dict[str, int]) -> Dataset:
    gold = [sorted(place[label] for label in row["labels"]) for row in rows]
    columns = {key: [row[key] for row in rows] for key in ("id", "text")}
    return with_columns(Dataset.from_dict(columns), {"gold": (gold, List(Value("int32")))})


def _rows(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
