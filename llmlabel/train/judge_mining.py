"""Negatives that a language model has read: hard ones, and what is true though nobody said so.

A weak judge makes things worse than none, so a labelled probe comes before anything it says is used.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from scipy.sparse import csr_array

from llmlabel.data import require_columns, with_columns, with_gold
from llmlabel.engine import Engine
from llmlabel.label.judge import judge, probe_auc, probe_pairs
from llmlabel.label.memory import Answers
from llmlabel.labelspace import LabelSpace
from llmlabel.refine.adapt import refuse_unknown_gold
from llmlabel.softlabels import SoftLabels
from llmlabel.train.mining import (
    IDS,
    Positive,
    Sample,
    columns_of,
    digest,
    given_labels,
    reducer,
    sampler,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """How well a judge tells true pairs from false ones."""

    auc: float
    """Probability that a true pair is judged higher than a false one; a tie counts half."""
    positives: int
    """True pairs that were judged."""
    negatives: int
    """False pairs that were judged."""
    unread: int
    """Pairs without a judgement, left out."""
    engine: str
    """Who judged."""


def probe_judge(
    dataset: Dataset,
    labels: LabelSpace,
    engine: Engine,
    *,
    rows: int = 100,
    least_auc: float = 0.6,
    prompt: str | Path = "label/judge",
    seed: int = 0,
    output: Path | None = None,
) -> Probe:
    """Judges the given labels of some rows and one label drawn at random a row; logs the AUC.

    Args:
        dataset: rows with `id`, `text` and `gold`.
        labels: their label space.
        engine: who judges.
        rows: how many of them, drawn by a hash of the `id`.
        least_auc: a judge below this is refused. UniME-V2 (arXiv 2510.13515) lost more by a weak
            judge than it gained by none.
        prompt: see `llmlabel.label.judge.judge`.
        seed: of the rows and of the labels drawn.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: the judge is refused, or there is nothing to probe it with.
    """
    require_columns(dataset, "id", "text", "gold")
    known = with_gold(dataset)
    hashes = [digest(seed, id) for id in known["id"][:]]
    some = known.select(sorted(range(len(known)), key=hashes.__getitem__)[:rows])
    pairs = probe_pairs(some, labels, seed=seed)
    if not len(pairs):
        raise ValueError("probe_judge: no row has a true label in `gold` to probe the judge with")
    found = probe_auc(judge(pairs, engine, prompt=prompt, output=output))
    true, false, unread = (int(found[name]) for name in ("positives", "negatives", "unread"))
    probe = Probe(found["auc"], true, false, unread, engine.name)
    said = f"AUC {probe.auc:.3f} of {engine.name} on {true} true and {false} false pairs ({unread} unread)"
    _log.info("probe_judge: %s", said)
    if probe.auc < least_auc:
        raise ValueError(
            f"the judge is too weak: {said}, least_auc is {least_auc}; take a larger model or another "
            "prompt, or mine by an encoder's scores with mine_negatives alone"
        )
    return probe


def judge_negatives(  # noqa: PLR0913  # who judges, where the bar is, what is taken, the probe
    dataset: Dataset,
    labels: LabelSpace,
    engine: Engine,
    *,
    beta: float = 0.01,
    positive: Positive = "max",
    sample: Sample = "cyclic",
    step: int = 5,
    count: int = 10,
    answers: Answers = "gold",
    probe: Dataset | None = None,
    probe_rows: int = 100,
    least_auc: float = 0.6,
    prompt: str | Path = "label/judge",
    seed: int = 0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """Leaves those of `negative_ids` that a judge finds less true than the row's own labels.

    Hard-negative mining of UniME-V2 (arXiv 2510.13515): a candidate whose score is above s - `beta`,
    s being the judge's score of the row's own label, moves to `excluded_ids`; of the others `count`
    are taken. Its candidates are the 50 nearest below a similarity that the paper calls delta:
    `mine_negatives(rule="abs", value=delta, k=100, count=50)`.

    Adds `judged_ids` and `judged_probs`, what the judge read and said, own labels first; null is a
    pair that could not be read, and which is no negative then. Adds `judge_auc`, see `probe_judge`,
    which comes before everything else.

    Differs from the paper: a row can have several labels (`positive`).

    Args:
        dataset: rows with `id`, `text`, given labels and `negative_ids`.
        labels: their label space.
        engine: who judges.
        beta: see above.
        positive: see `mine_negatives`, as for the next four.
        sample: see there.
        step: see there.
        count: see there.
        answers: see there.
        probe: rows with `gold` that the judge is probed with; those of the dataset where it is left out.
        probe_rows: how many of them.
        least_auc: see `probe_judge`.
        prompt: see `llmlabel.label.judge.judge`.
        seed: of the probe and of `uniform`.
        block_rows: pairs committed at a time.
        output: folder that keeps finished blocks; the same call continues there.

    Raises:
        ValueError: the judge is too weak, or there is nothing to judge.
    """
    require_columns(dataset, "id", "text", "negative_ids", *columns_of(answers))
    take, reduce = sampler(sample, step=step, count=count, seed=seed), reducer(positive)
    found = probe_judge(
        dataset if probe is None else probe,
        labels,
        engine,
        rows=probe_rows,
        least_auc=least_auc,
        prompt=prompt,
        seed=seed,
        output=output and output / "probe",
    )
    given, candidates = given_labels(dataset, labels, answers), dataset["negative_ids"][:]
    asked = [
        [*own, *some] if own and some is not None and text.strip() else []
        for own, some, text in zip(given, candidates, dataset["text"][:], strict=True)
    ]
    said = iter(_judged(dataset, labels, engine, asked, prompt, block_rows, output))
    columns: dict[str, list[Any]] = {name: [] for name in _JUDGED}
    before = dataset["excluded_ids"][:] if "excluded_ids" in dataset.column_names else None
    for row, (id, own, both) in enumerate(zip(dataset["id"][:], given, asked, strict=True)):
        probs = [next(said) for _ in both]
        excluded, negatives = before[row] if before else None, None
        mine = [p for p in probs[: len(own)] if p is not None]
        if mine:
            bar = reduce(mine) - beta
            others = list(zip(both[len(own) :], probs[len(own) :], strict=True))
            read = [(label, p) for label, p in others if p is not None]
            excluded = [*(excluded or []), *(label for label, p in read if p > bar)]
            negatives = take([label for label, p in read if p <= bar], id)
        values = (excluded, negatives, both or None, probs if both else None, found.auc)
        for name, value in zip(_JUDGED, values, strict=True):
            columns[name].append(value)
    return with_columns(dataset, {name: (columns[name], _JUDGED[name]) for name in _JUDGED})


_JUDGED = {
    "excluded_ids": IDS,
    "negative_ids": IDS,
    "judged_ids": IDS,
    "judged_probs": List(Value("float32")),
    "judge_auc": Value("float32"),
}


def judged_relevance(dataset: Dataset, labels: LabelSpace, *, answers: Answers = "gold") -> Dataset:
    """Adds soft relevance from a judge: `label_ids` and `label_probs` with `label_space`.

    A given label gets the judge's probability, or 1 where the judge read none. So does what the judge
    moved to `excluded_ids`; these leave that column, since they are positives now.

    Args:
        dataset: what `judge_negatives` gives.
        labels: its label space, multi-label.
        answers: see `mine_negatives`.

    Raises:
        ValueError: the labels exclude each other, or gold of a row is unknown.
    """
    if not labels.multilabel:
        raise ValueError(
            "relevance is a probability of each label alone; load the labels with multilabel=true"
        )
    require_columns(dataset, "judged_ids", "judged_probs", "excluded_ids", *columns_of(answers))
    if answers == "gold":
        refuse_unknown_gold(dataset)
    given = given_labels(dataset, labels, answers)
    rows, ids, probs, left = [], [], [], []
    names = ("judged_ids", "judged_probs", "excluded_ids")
    for row, values in enumerate(zip(*(dataset[n][:] for n in names), strict=True)):
        judged, said, excluded = values
        pairs = zip(judged or [], said or [], strict=True)
        read = {label: p for label, p in pairs if p is not None}
        relevant = {label: read.get(label, 1.0) for label in given[row]}
        relevant |= {label: read[label] for label in excluded or [] if label in read}
        rows += [row] * len(relevant)
        ids += list(relevant)
        probs += list(relevant.values())
        left.append(None if excluded is None else [x for x in excluded if x not in relevant])
    stored = csr_array((np.array(probs, np.float32), (rows, ids)), (len(dataset), len(labels)))
    soft = SoftLabels(stored, labels.fingerprint, multilabel=True)
    return with_columns(soft.add_to(dataset), {"excluded_ids": (left, IDS)})


def _judged(
    dataset: Dataset,
    labels: LabelSpace,
    engine: Engine,
    asked: list[list[int]],
    prompt: str | Path,
    block_rows: int,
    output: Path | None,
) -> list[float | None]:
    """The judge's probability of each row's labels, row after row, so that a row's stand together."""
    names = labels.texts()
    pairs = [
        (json.dumps([id, labels.ids[label]]), text, names[label])
        for id, text, some in zip(dataset["id"][:], dataset["text"][:], asked, strict=True)
        for label in some
    ]
    if not pairs:
        raise ValueError("judge_negatives: no row has a text, a given label and `negative_ids`")
    columns = dict(
        zip(("id", "text", "candidate"), map(list, zip(*pairs, strict=True)), strict=True)
    )
    judged = judge(
        Dataset.from_dict(columns),
        engine,
        prompt=prompt,
        block_rows=block_rows,
        output=output and output / "pairs",
    )
    found: list[float | None] = judged["match"][:]
    return found
