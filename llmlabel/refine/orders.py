"""Label orders: the same prompt with its labels listed in another order, and who follows the order."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel import progress
from llmlabel.data import require_columns, with_columns
from llmlabel.engine import Engine
from llmlabel.files import arrow_table
from llmlabel.labelspace import LabelSpace
from llmlabel.prompt import prompt_sha, render
from llmlabel.softlabels import VOTES, SoftLabels

HOW = (
    "llmlabel.refine.orders.read_orders(dataset, engine, labels) reads a sample of the rows in "
    "several label orders"
)
"""The way out for rows without votes of label orders."""

_SOURCE = re.compile(r".+#(\d+)", re.DOTALL)


@dataclass(frozen=True)
class OrderSensitivity:
    """How far answers change when nothing but the order of the labels in the prompt does.

    Attributes:
        flips: Share of rows whose most probable label is not the same in all orders.
        distance: Mean total variation distance between the distributions of two orders, over rows
            and pairs of orders; None where votes hold the most probable label only.
        rows: Number of rows that all orders have a vote on.
        orders: Number of orders.
    """

    flips: float
    distance: float | None
    rows: int
    orders: int


def label_orders(labels: LabelSpace, orders: int) -> list[list[int]]:
    """The first `orders` orders of the labels, all different: their own, then random ones.

    An order depends on its number and the number of labels alone, so that the source
    `label/direct#2` of a vote says how the labels stood in its prompt.

    Raises:
        ValueError: so many labels do not have so many orders.
    """
    most = math.factorial(min(len(labels), 20))
    if not 1 <= orders <= most:
        raise ValueError(f"orders must be from 1 to {most} with {len(labels)} labels; got {orders}")
    rng = np.random.default_rng(0)  # orders go by their number
    found = [list(range(len(labels)))]
    while len(found) < orders:
        order = rng.permutation(len(labels)).tolist()
        if order not in found:  # two equal orders would look like a model that order cannot move
            found.append(order)
    return found


def orders_sha(sources: Sequence[tuple[str, list[int]]]) -> str:
    """`prompt_sha` of rows: the hash of their one prompt file, or of all prompt hashes and orders."""
    if len(sources) == 1:
        return sources[0][0]
    return hashlib.sha256(json.dumps([list(one) for one in sources]).encode()).hexdigest()[:16]


def answers_in_order(
    texts: Sequence[str],
    engine: Engine,
    labels: LabelSpace,
    *,
    order: Sequence[int],
    prompt: str | Path,
    demonstrations: Sequence[Mapping[str, str]],
) -> SoftLabels:
    """What a model answers to texts when the prompt lists the labels in this order."""
    lines = labels.texts()
    listed = [lines[label] for label in order]
    shown = [
        {"text": one["text"], "label": labels.names[labels.index(one["label"])]}
        for one in demonstrations
    ]
    chats = [render(prompt, text=text, labels=listed, demonstrations=shown) for text in texts]
    scores = engine.score(chats, labels.names)
    return SoftLabels.from_scores(scores.log_probs, labels, unread=scores.unread)


def refuse_other_prompt(dataset: Dataset, prompt: str | Path, orders: Sequence[list[int]]) -> None:
    """Raises a ValueError when rows were labelled with another prompt file or in other orders."""
    require_columns(dataset, "prompt_sha")
    sha = orders_sha([(prompt_sha(prompt), order) for order in orders])
    if others := set(dataset["prompt_sha"]) - {sha, None}:
        raise ValueError(
            f"prompt={str(prompt)!r} in {len(orders)} label orders has the hash {sha}, but rows were "
            f"labelled with {sorted(others)[0]}; give the prompt and the orders that made the labels"
        )


def read_orders(
    dataset: Dataset,
    engine: Engine,
    labels: LabelSpace,
    *,
    prompt: str | Path = "label/direct",
    demonstrations: Sequence[Mapping[str, str]] = (),
    orders: int = 4,
    rows: int = 100,
    seed: int = 0,
) -> Dataset:
    """Adds `votes`: whole distributions of a sample of the rows, read in several label orders.

    The soft labels stay. What corrects them later corrects these votes too, order by order, so that
    `llmlabel.refine.bias.measure_bias` can tell how far the label order matters before and after.

    Args:
        dataset: rows that `engine` labelled with the same prompt and demonstrations.
        engine: who labelled the rows.
        labels: their label space, single-label.
        prompt: the prompt file the rows were labelled with.
        demonstrations: those the rows were labelled with.
        orders: how many; the first is that of the label space.
        rows: size of the sample; the other rows have no votes.
        seed: of the sample, which depends on nothing else but the ids.

    Raises:
        ValueError: the rows have votes already, or were labelled with another prompt file.
    """
    require_columns(dataset, "id", "text")
    if labels.multilabel:
        raise ValueError("read_orders needs labels that exclude each other (single-label)")
    listed = label_orders(labels, orders)
    refuse_other_prompt(dataset, prompt, listed[:1])
    if "votes" in dataset.column_names:
        raise ValueError(
            "the rows have the column votes already; read the orders before other votes are added, "
            "or take it away with dataset.remove_columns('votes')"
        )
    texts, ids = dataset["text"][:], dataset["id"][:]
    readable = [row for row, text in enumerate(texts) if text.strip()]
    sample = sorted(sorted(readable, key=lambda row: _hash(f"{seed} {ids[row]}"))[:rows])
    asked = [texts[row] for row in sample]
    name = Path(prompt).name if Path(prompt).is_file() else str(prompt)
    votes = {}
    with progress.task("read_orders", total=orders * len(sample)) as advance:
        for number, order in enumerate(listed if sample else []):
            read = answers_in_order(
                *(asked, engine, labels), order=order, prompt=prompt, demonstrations=demonstrations
            )
            votes[f"{name}#{number}"] = _placed(read, sample, len(dataset))
            advance(len(sample))
    return with_order_votes(with_columns(dataset, {"votes": ([None] * len(ids), VOTES)}), votes)


def order_sensitivity(dataset: Dataset, labels: LabelSpace) -> OrderSensitivity | None:
    """How far the answers in `votes` depend on the label order; None without votes of two orders.

    In a distance, what is missing of a distribution counts as one more label. Votes of several
    prompts are compared within each prompt, and the prompts averaged.

    Args:
        dataset: rows with `votes` of sources named prompt#number, one for each label order.
        labels: the label space of the votes.
    """
    prompts: dict[str, list[SoftLabels]] = {}
    for source, votes in order_votes(dataset, labels).items():
        prompts.setdefault(source.rpartition("#")[0], []).append(votes)
    groups = [votes for votes in prompts.values() if len(votes) > 1]
    if not groups:
        return None
    best = [np.stack([_best(one) for one in votes]) for votes in groups]
    voted = (np.concatenate(best) >= 0).all(axis=0)
    if not voted.any():
        return None
    flips = [(group != group[0]).any(axis=0)[voted].mean() for group in best]
    whole = all(is_whole(one) for votes in groups for one in votes)
    return OrderSensitivity(
        flips=float(np.mean(flips)),
        distance=float(np.mean([_distance(votes)[voted] for votes in groups])) if whole else None,
        rows=int(voted.sum()),
        orders=max(len(votes) for votes in groups),
    )


def _distance(votes: list[SoftLabels]) -> Float[np.ndarray, " rows"]:
    """Total variation distance of each row, mean over pairs of sources."""
    distances = [
        abs(one.probs - other.probs).astype(np.float64).sum(axis=1)
        + abs(one.missing_mass - other.missing_mass)
        for one, other in itertools.combinations(votes, 2)
    ]
    mean: np.ndarray = np.mean(distances, axis=0) / 2
    return mean


def is_whole(votes: SoftLabels) -> bool:
    """Whether a source's votes are distributions, not the most probable label of each row alone."""
    return bool((np.diff(votes.probs.indptr) > 1).any())


def order_number(source: str) -> int:
    """The number of the label order that a source was read in."""
    return int(source.rpartition("#")[2])


def order_votes(dataset: Dataset, labels: LabelSpace) -> dict[str, SoftLabels]:
    """The votes of each source that is a label order, by its name; a row without one is empty.

    Raises:
        ValueError: a vote is outside the label space or no probability.
    """
    if "votes" not in dataset.column_names or labels.multilabel:
        return {}
    lists, rows = _vote_lists(dataset)
    votes = lists.flatten()
    sources = pc.struct_field(votes, "source").dictionary_encode()
    codes = sources.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    ids = pc.struct_field(votes, "label_id").fill_null(-1).to_numpy(zero_copy_only=False)
    probs = pc.struct_field(votes, "prob").cast(pa.float64()).to_numpy(zero_copy_only=False)
    found = {}
    for code, source in enumerate(sources.dictionary.to_pylist()):
        if _SOURCE.fullmatch(source) is None:
            continue
        of = codes == code
        if (outside := ids[of][(ids[of] < 0) | (ids[of] >= len(labels))]).size:
            raise ValueError(
                f"votes of source {source!r}: label id {outside[0]} is outside the label space, "
                f"which has ids 0 to {len(labels) - 1}"
            )
        given = csr_array((probs[of], (rows[of], ids[of])), shape=(len(dataset), len(labels)))
        try:
            found[source] = SoftLabels.from_dense(given.toarray(), labels)
        except ValueError as error:
            raise ValueError(f"votes of source {source!r}: {error}") from None
    return dict(sorted(found.items()))


def with_order_votes(dataset: Dataset, votes: Mapping[str, SoftLabels]) -> Dataset:
    """Gives these sources other votes; those of all other sources stay."""
    if not votes:
        return dataset
    lists, old_rows = _vote_lists(dataset)
    old = lists.flatten()
    kept = pc.invert(pc.is_in(pc.struct_field(old, "source"), value_set=pa.array(list(votes))))
    rows = [old_rows[kept.to_numpy(zero_copy_only=False)]]
    entries = [old.filter(kept)]
    for source, soft in votes.items():
        probs = soft.probs.tocoo()
        first = np.lexsort((probs.col, -probs.data, probs.row))
        rows.append(probs.row[first])
        columns = [
            pa.repeat(source, len(first)),
            pa.array(probs.col[first], pa.int32()),
            pa.array(probs.data[first], pa.float32()),
        ]
        entries.append(pa.StructArray.from_arrays(columns, fields=list(old.type)))
    row = np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(dataset)))])
    new = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.concat_arrays(entries).take(pa.array(np.argsort(row, kind="stable"))),
        mask=pa.array((np.diff(offsets) == 0) & lists.is_null().to_numpy(zero_copy_only=False)),
    )
    return with_columns(dataset, {"votes": (new, VOTES)})


def _vote_lists(dataset: Dataset) -> tuple[pa.ListArray, Int[np.ndarray, " votes"]]:
    """The lists of votes, and the row of each vote."""
    require_columns(dataset, "votes")
    lists = arrow_table(dataset.select_columns(["votes"]))["votes"]
    lists = lists.cast(Features({"votes": VOTES}).arrow_schema.field("votes").type)
    lists = lists.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return lists, rows


def _placed(soft: SoftLabels, rows: Sequence[int], length: int) -> SoftLabels:
    """Soft labels of some rows of a table, among rows without one."""
    probs = soft.probs.tocoo()
    place = np.array(rows, dtype=np.int64)[probs.row]
    shape = (length, soft.probs.shape[1])
    return SoftLabels(csr_array((probs.data, (place, probs.col)), shape=shape), soft.space)


def _best(soft: SoftLabels) -> Int[np.ndarray, " rows"]:
    """The most probable label of each row, -1 without one."""
    top = soft.top(1).probs
    best = np.full(top.shape[0], -1, dtype=np.int64)
    best[np.diff(top.indptr) > 0] = top.indices
    return best


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
