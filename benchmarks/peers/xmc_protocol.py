"""What a run of the benchmark of very many labels is given and what it leaves; numpy, scipy, sklearn.

    PYTHON benchmarks/peers/xmc_NAME.py JOB.json

A job names the file `problem`, the prefix `answers` of the files to write, the `minutes` of processor
time that all of the run may take, and what a script needs beyond that. The problem holds `texts` with
the labels of each (`gold`), which of these rows are `held` to choose settings by, the `names` and
`descriptions` of the labels, and the `new` texts; of their labels a run knows nothing.

A script gives `run` its settings, the first of which is the default. Where there are several, each
learns from the rows that are not held; the best at the held ones, by P@1 + P@5, learns from all rows
then, and so does the default. Both write the 100 best labels of the new texts. One JSON line says
what was tried and what it cost: processor time, also of children, and the largest resident memory.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from protocol import forget_peak, peak_mib, versions
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

KEPT = 100
Answers = tuple[np.ndarray, np.ndarray]
"""Labels (rows, 100), best first, and their scores; -1 where there are no more."""


@dataclass(frozen=True, eq=False)
class Task:
    """Learn from `texts` with `gold`, say the labels of `new`, in so many `seconds` of the processor."""

    seconds: float
    texts: list[str]
    gold: csr_matrix
    new: list[str]
    names: list[str]
    descriptions: list[str]

    @cached_property
    def words(self) -> tuple[csr_matrix, csr_matrix]:
        """TF-IDF of words and pairs of words that at least two texts have."""
        return self._features(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True))

    @cached_property
    def characters(self) -> tuple[csr_matrix, csr_matrix]:
        """Those, and TF-IDF of three to five characters within words."""
        more = self._features(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=2, sublinear_tf=True)
        )
        both = [hstack(pair).tocsr() for pair in zip(self.words, more, strict=True)]
        return _plain(normalize(both[0])), _plain(normalize(both[1]))

    def _features(self, vectorizer: TfidfVectorizer) -> tuple[csr_matrix, csr_matrix]:
        return _plain(vectorizer.fit_transform(self.texts)), _plain(vectorizer.transform(self.new))


Fit = Callable[..., Answers]


def _plain(matrix: Any) -> csr_matrix:
    """The kind of matrix that all packages take."""
    matrix = csr_matrix(matrix, dtype=np.float32)
    matrix.sort_indices()
    matrix.indices, matrix.indptr = matrix.indices.astype("int32"), matrix.indptr.astype("int32")
    return matrix


def label_matrix(gold: list[list[int]], labels: int) -> csr_matrix:
    indptr = np.cumsum([0] + [len(some) for some in gold])
    ids = np.array([label for some in gold for label in some], dtype=np.int32)
    return _plain(csr_matrix((np.ones(len(ids)), ids, indptr), shape=(len(gold), labels)))


def best_of(scores: Any) -> Answers:
    """The 100 best labels of a matrix of scores, dense or CSR; of equal ones the lower id."""
    if isinstance(scores, np.ndarray):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :KEPT].astype(np.int32)
        return order, np.take_along_axis(scores, order, axis=1).astype(np.float32)
    scores = csr_matrix(scores)
    pairs = [
        list(zip(scores.indices[i:j].tolist(), scores.data[i:j].tolist(), strict=True))
        for i, j in zip(scores.indptr[:-1], scores.indptr[1:], strict=True)
    ]
    return best_of_pairs(pairs)


def best_of_pairs(pairs: list[list[tuple[int, float]]]) -> Answers:
    ids = np.full((len(pairs), KEPT), -1, dtype=np.int32)
    scores = np.zeros((len(pairs), KEPT), dtype=np.float32)
    for row, some in enumerate(pairs):
        some = sorted(some, key=lambda pair: (-pair[1], pair[0]))[:KEPT]
        if some:
            ids[row, : len(some)], scores[row, : len(some)] = zip(*some, strict=True)
    return ids, scores


def precision(ids: np.ndarray, gold: csr_matrix, k: int) -> float:
    hits = [np.isin(ids[row, :k], gold[row].indices).sum() for row in range(len(ids))]
    return float(np.mean(hits)) / k


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in whose)


def read_job() -> tuple[dict[str, Any], dict[str, Any]]:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    return job, json.loads(Path(job["problem"]).read_text("utf-8"))


def task_of(
    problem: dict[str, Any], seconds: float, *, held: bool
) -> tuple[Task, csr_matrix | None]:
    """The task to be answered, or that of the held rows, with their labels."""
    names, descriptions = problem["names"], problem["descriptions"]
    texts, gold = problem["texts"], label_matrix(problem["gold"], len(names))
    if not held:
        return Task(seconds, texts, gold, problem["new"], names, descriptions), None
    away = np.array(problem["held"])
    part = [[text for text, out in zip(texts, away, strict=True) if out == want] for want in (0, 1)]
    task = Task(seconds, part[0], _plain(gold[~away]), part[1], names, descriptions)
    return task, gold[away]


def save(job: dict[str, Any], which: str, answers: Answers) -> None:
    np.savez_compressed(f"{job['answers']} {which}.npz", ids=answers[0], scores=answers[1])


def run(
    packages: tuple[str, ...],
    fit: Fit,
    settings: dict[str, dict[str, Any]],
    *,
    default_too: bool = True,
    trial_share: float = 1.0,
) -> None:
    """`fit(task, **setting)` gives answers; a trial may take a share of the minutes."""
    job, problem = read_job()
    budget = 60 * job["minutes"]
    found: dict[str, Any] = {"versions": versions(packages), "trials": {}, "runs": {}}
    default = chosen = next(iter(settings))
    if len(settings) > 1:
        task, gold = task_of(problem, trial_share * budget, held=True)
        found["trials"] = tried(fit, settings, task, gold, budget)
        left = budget - cpu_seconds()
        points = {
            name: one["P@1"] + one["P@5"]
            for name, one in found["trials"].items()
            if one and (one["cpu_s"] < left or trial_share < 1)
        }
        chosen = max(points, key=lambda name: points[name], default=default)
    found |= {"search_s": cpu_seconds(), "setting": chosen}
    which = {"default": default, "chosen": chosen} if default_too else {"chosen": chosen}
    if default == chosen:
        which = {"default": default}
    for title, name in which.items():
        task, _ = task_of(problem, budget - found["search_s"], held=False)
        before = cpu_seconds()
        forget_peak(os.getpid())
        save(job, title, fit(task, **settings[name]))
        used = {"cpu_s": cpu_seconds() - before, "mib": peak_mib(os.getpid())}
        found["runs"][title] = {"setting": name, **used}
    print(json.dumps(found), flush=True)


def tried(
    fit: Fit, settings: dict[str, dict[str, Any]], task: Task, gold: csr_matrix, budget: float
) -> dict[str, dict[str, float] | None]:
    """What each setting reaches at the held rows; None where no time would be left to use it."""
    found: dict[str, dict[str, float] | None] = {}
    longest = 0.0
    for name, setting in settings.items():
        before = cpu_seconds()
        if before + 3 * longest > budget:
            found[name] = None
            continue
        ids, _ = fit(task, **setting)
        seconds = cpu_seconds() - before
        longest = max(longest, seconds)
        points = {f"P@{k}": precision(ids, gold, k) for k in (1, 5)}
        found[name] = {**points, "cpu_s": seconds}
        print(name, found[name], file=sys.stderr, flush=True)
    return found
