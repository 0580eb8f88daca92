"""The prediction sets of a cheap classifier shorten the list of labels that a language model reads.

Conformal in-context learning, Pantelidis et al. 2025 (CICLe, arXiv 2512.05732). Sets of level
`alpha` prune the true label of at most that share of rows on average, so the accuracy of the model
falls by at most `alpha`, if a shorter list does not itself mislead it. Where a set is one label,
the model is not asked at all.

What is saved are tokens that are sent. An engine that keeps the common start of all prompts computes
a list that all rows share only once, and a list of each row's own every time: there, only the rows
that are not asked save time. Where the classifier errs less often than `alpha`, sets of LAC are empty
on many rows, which then list all labels: choose a smaller `alpha`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, List, Value

from llmlabel import models
from llmlabel.data import gold_matrix, require_columns, with_columns, with_gold
from llmlabel.engine import Engine
from llmlabel.engine.plan import PlanEngine
from llmlabel.label.direct import label_direct
from llmlabel.label.shortlist import candidate_lists
from llmlabel.labelspace import LabelSpace
from llmlabel.metrics import binomial_interval
from llmlabel.softlabels import LABEL_COLUMNS

_TYPES = {
    "label_ids": List(Value("int32")),
    "label_probs": List(Value("float32")),
    "label_mass": Value("float32"),
}


@dataclass(frozen=True)
class Pruning:
    """What shorter lists of labels save, and what they may cost.

    Attributes:
        rows: Rows.
        asked: Rows that the model is asked about; the others have one candidate.
        mean_labels: Labels listed for a row that is asked.
        tokens: Of all prompts with all labels listed.
        tokens_pruned: Of the prompts that are left.
        saved: Share of the tokens saved.
        is_exact: Whether all tokens were counted; of many rows some are estimated.
        alpha: Share of rows whose true label is pruned, at most, by the promise of the sets.
        missed: That share among the rows with a gold label; null without any.
        missed_interval: Its exact 95 % interval; null without any.
    """

    rows: int
    asked: int
    mean_labels: float
    tokens: int
    tokens_pruned: int
    saved: float
    is_exact: bool
    alpha: float
    missed: float | None
    missed_interval: tuple[float, float] | None


def prune_labels(
    dataset: Dataset, labels: LabelSpace, *, empty: Literal["all", "top"] = "all"
) -> Dataset:
    """Adds `candidates`, the labels of each row's prediction set, in its order.

    Args:
        dataset: Rows with `set_ids`, from `llmlabel.calibrate.conformal.predict_sets` for example.
        labels: Their label space.
        empty: Where a set is empty, "all" labels may be answered (null), or only the "top" one, the
            most probable of `label_ids` (all where a row has none). A row whose set is null has all.

    Raises:
        ValueError: If a set holds what is no position of a label.
    """
    require_columns(dataset, "id", "set_ids", *(("label_ids",) if empty == "top" else ()))
    sets = dataset["set_ids"][:]
    if empty == "top":
        tops = dataset["label_ids"][:]
        sets = [
            some if some is None else some or (top or [])[:1]
            for some, top in zip(sets, tops, strict=True)
        ]
    pruned = with_columns(
        dataset, {"candidates": ([some or None for some in sets], List(Value("int32")))}
    )
    candidate_lists(pruned, labels)  # refuses what is no position of a label
    return pruned


def label_pruned(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path | None = None,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    min_mass: float = 0.0,
    block_rows: int = 256,
    output: Path | None = None,
) -> Dataset:
    """`label_direct` where a row has several candidates; a row with one keeps its soft label.

    That is the soft label of the cheap classifier, with its `engine`. A row without one, or whose
    candidate is not its most probable label (sets with a threshold for each class), gets all
    probability on its candidate: the answer is in the set that promises. `error` says nothing there.

    Args:
        dataset: Rows with `candidates`.
        engine: Who reads.
        labels: A single-label space.
        prompt: See `label_direct`, as are the next.
        demonstrations: Only those whose label is a candidate of the row are shown.
        min_mass: A row whose `label_mass` is below it gets no label.
        block_rows: Rows committed at a time.
        output: Folder that keeps finished blocks.

    Raises:
        ValueError: If the label space is multi-label, where one candidate may still be wrong.
    """
    if labels.multilabel:
        raise ValueError(
            "label_pruned needs labels that exclude each other: in a multi-label space a single "
            "candidate may still be wrong; use label_direct, which heeds `candidates` too"
        )
    require_columns(dataset, "id", "text", "candidates")
    lists = candidate_lists(dataset, labels) or []
    asked = [row for row, some in enumerate(lists) if len(some) != 1]
    values = {name: _given(dataset, name) for name in LABEL_COLUMNS}
    for row, some in enumerate(lists):
        if len(some) == 1:
            if (values["label_ids"][row] or [])[:1] != some:
                values["label_ids"][row], values["label_probs"][row] = some, [1.0]
            values["label_space"][row] = labels.fingerprint
            values["error"][row] = None
    if asked:
        read = label_direct(
            dataset.select(asked),
            engine,
            labels,
            prompt=prompt,
            demonstrations=demonstrations,
            min_mass=min_mass,
            block_rows=block_rows,
            output=output,
        )
        for name, column in values.items():
            for row, value in zip(asked, read[name][:], strict=True):
                column[row] = value
    return with_columns(
        dataset,
        {name: (column, _TYPES.get(name, Value("string"))) for name, column in values.items()},
    )


def measure_pruning(
    dataset: Dataset,
    labels: LabelSpace,
    tokenizer: Any,
    *,
    alpha: float,
    prompt: str | Path | None = None,
    demonstrations: Sequence[Mapping[str, Any]] = (),
) -> Pruning:
    """Counts the tokens that `label_pruned` sends, and those of `label_direct` without `candidates`.

    Args:
        dataset: Rows with `candidates`, perhaps with gold, which only measures what was pruned.
        labels: A single-label space.
        tokenizer: Of the language model: a loaded one, or its path or name.
        alpha: What the sets promise, `Conformal.alpha`.
        prompt: See `label_direct`.
        demonstrations: See `label_direct`.

    Raises:
        ValueError: If `alpha` is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1; got {alpha}")
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(models.fetch(tokenizer))
    require_columns(dataset, "id", "text", "candidates")
    lists = candidate_lists(dataset, labels) or []
    whole, few = (PlanEngine(name, tokenizer=tokenizer) for name in ("whole", "pruned"))
    every = dataset.remove_columns("candidates")
    label_direct(every, whole, labels, prompt=prompt, demonstrations=demonstrations)
    label_pruned(dataset, few, labels, prompt=prompt, demonstrations=demonstrations)
    sizes = np.array([len(some) for some in lists if len(some) != 1])
    missed, count = 0, 0
    if "gold" in dataset.column_names:
        gold = gold_matrix(known := with_gold(dataset), labels)
        kept = candidate_lists(known, labels) or []
        pruned = [not gold[row, kept[row]].any() for row in np.flatnonzero(gold.sum(axis=1))]
        missed, count = sum(pruned), len(pruned)
    tokens, tokens_pruned = round(whole.asked.prompt_tokens), round(few.asked.prompt_tokens)
    return Pruning(
        len(dataset),
        len(sizes),
        float(sizes.mean()) if len(sizes) else 0.0,
        tokens,
        tokens_pruned,
        1 - tokens_pruned / max(tokens, 1),
        whole.asked.is_exact and few.asked.is_exact,
        alpha,
        missed / count if count else None,
        binomial_interval(missed, count) if count else None,
    )


def _given(dataset: Dataset, name: str) -> list[Any]:
    return dataset[name][:] if name in dataset.column_names else [None] * len(dataset)
