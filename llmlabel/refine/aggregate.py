"""Several sources become one soft label, with a weight that says how far they agree."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from jaxtyping import Float, Int

from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.refine import crowd
from llmlabel.refine.annotators import Abstention, dawid_skene, warn_of_copies
from llmlabel.refine.debias import given_shares
from llmlabel.refine.votes import Votes, read_votes, vote_lists
from llmlabel.select import row_weights
from llmlabel.softlabels import VOTES, SoftLabels

Counting = Literal["average", "log_average", "majority", "softmax"]
Modelling = Literal["wawa", "zbs", "glad", "mace", "dawid_skene", "mean_of_methods"]
Method = Literal[Counting, Modelling]

_AVERAGED: tuple[Method, ...] = (
    *("majority", "softmax", "wawa", "zbs", "glad", "mace", "dawid_skene"),
)

_NO_LABEL = "no source has a label"

_MOST_NAMES = 8
"""So many sources of one table are named in the column `engine`; of more, their number."""


def aggregate(  # noqa: PLR0913 - each is one plain choice
    sources: dict[str, Dataset] | Dataset,
    labels: LabelSpace,
    *,
    method: Method = "log_average",
    weights: dict[str, float] | None = None,
    soft_votes: bool = False,
    abstention: Abstention = "missing",
    prior: dict[str, float] | None = None,
    min_agreement: int = 1,
    seed: int = 0,
) -> Dataset:
    """The rows with the soft label of all sources, their `votes`, an `agreement` and a `weight`.

    `average` takes the mean of the probabilities, `log_average` of the log-probabilities (a product
    of experts: the committee of CV-DD, arXiv 2501.07575, which averages logits). All other methods
    count votes: `majority` their shares, `softmax` the softmax of their numbers, `wawa`, `zbs`,
    `glad`, `mace` (`llmlabel.refine.crowd`) and `dawid_skene` (`llmlabel.refine.annotators`) with
    reliabilities of the sources, which they learn from the votes alone; `mean_of_methods` is the
    mean of these seven (arXiv 2212.09409), for when nobody knows which one fits: in our measurements
    its likelihood was never below the median of theirs.

    A source that has no label for a row, or probability 0 for all, does not vote on it. `agreement`
    is the number of sources whose most probable label is the row's, `weight` the squared confidence
    of that consensus (see `vote_confidence`). A row whose weight is 0 already, in the first source
    or the table, keeps 0: a selector such as `drop_near_duplicates` left it out. The rows of one
    table keep their own `error`; where no source has a label, that is said before it.

    Args:
        sources: name -> rows with soft labels, the same ids in the same order; or one table with
            the column `votes`, where each row may have votes of other sources.
        labels: the label space of all of them.
        method: how votes are combined; all but `average` need a single-label space.
        weights: of the sources, equal when left out, which did better in our measurements than
            `committee_weights`; for the methods that learn none. Scale the temperatures of teachers
            of different kinds first: in `log_average` the one with the largest logits is loudest.
        soft_votes: whether the methods that count votes take a source's probabilities as shares of
            a vote, instead of one vote for its most probable label.
        abstention: whether having no vote on a row is an answer, in Dawid-Skene.
        prior: the share of each label, by id or name, for Dawid-Skene; estimated when left out.
        min_agreement: a row whose label fewer sources chose has the weight 0.
        seed: of the random starts of MACE.

    Raises:
        ValueError: rows differ between sources, a vote is broken, a weight is missing, unknown or
            negative, or an argument is for another method.
    """
    read = read_votes(sources, labels)
    _refuse_arguments(method, labels, weights, prior=prior, abstention=abstention)
    if min_agreement < 1:
        raise ValueError(
            f"min_agreement must be at least 1, a number of sources; got {min_agreement}"
        )
    shares = _source_weights(read.names, weights)
    if not (shares > 0).all():
        read, shares = read.of(shares > 0), shares[shares > 0]
    if method in ("average", "log_average"):
        soft = _averaged(read, labels, method, shares)
    elif read.voted.any():
        cast = read if soft_votes else read.hard()
        if method in ("glad", "mace", "dawid_skene", "mean_of_methods"):
            warn_of_copies(cast)
        known = None if prior is None else given_shares(prior, labels, "prior")
        soft = SoftLabels.from_dense(
            combine(cast, method, weights=shares, abstention=abstention, prior=known, seed=seed),
            labels,
        )
    else:
        soft = SoftLabels.from_dense(np.zeros((read.rows, read.labels)), labels)
    confidence, agreement = vote_confidence(read, soft.dense().argmax(axis=1))
    weight = np.where(agreement >= min_agreement, np.minimum(confidence, 1.0) ** 2, 0.0)
    table = sources if isinstance(sources, Dataset) else None
    first = next(iter(sources.values())) if table is None else table
    weight = np.where(row_weights(first) > 0, weight, 0.0)
    engine = " + ".join(sources if table is None else read.names)
    if table is not None and len(read.names) > _MOST_NAMES:
        engine = f"{len(read.names)} sources"
    columns = {
        "weight": (weight.astype(np.float32), Value("float32")),
        "agreement": (agreement.astype(np.int32), Value("int32")),
        # of the first source, and nothing that all of them share
        "label_mass": (pa.nulls(read.rows), Value("float32")),
        **provenance(engine, rows=read.rows),
        "error": (_errors(read, table), Value("string")),
    }
    if table is None:
        columns = {"votes": (_votes(read), VOTES), **columns}
    return with_columns(soft.add_to(first), columns)


def combine(
    votes: Votes,
    method: Method,
    *,
    weights: Float[np.ndarray, " sources"] | None = None,
    abstention: Abstention = "missing",
    prior: Float[np.ndarray, " labels"] | None = None,
    seed: int = 0,
) -> Float[np.ndarray, "rows labels"]:
    """Soft labels from votes by one of the methods of `aggregate` that count them."""
    match method:
        case "majority":
            return crowd.majority(votes, weights=weights)
        case "softmax":
            return crowd.softmax(votes, weights=weights)
        case "wawa":
            return crowd.wawa(votes).probs
        case "zbs":
            return crowd.zbs(votes).probs
        case "glad":
            return crowd.glad(votes).probs
        case "mace":
            return crowd.mace(votes, seed=seed).probs
        case "dawid_skene":
            return dawid_skene(votes, abstention=abstention, prior=prior).probs
        case "mean_of_methods":
            found = [
                combine(votes, one, abstention=abstention, prior=prior, seed=seed)
                for one in _AVERAGED
            ]
            return np.mean(found, axis=0)
    raise ValueError(f"method {method!r} takes distributions; llmlabel.refine.crowd has it")


def provenance(engine: str, *, rows: int) -> dict[str, tuple[Any, Any]]:
    """The columns that say where what several sources made comes from; they share no prompt."""
    return {
        "engine": (pa.repeat(engine, rows), Value("string")),
        "prompt_sha": (pa.nulls(rows), Value("string")),
    }


def committee_weights(
    accuracies: dict[str, float], *, temperature: float = 10.0
) -> dict[str, float]:
    """Weights of a committee from what is known of its members: softmax of per cent / temperature.

    "Dataset Distillation via Committee Voting" (arXiv 2501.07575): 10 for labels, 5 for images.
    Equal weights did better in our measurements.

    Args:
        accuracies: of each source, as shares, on rows that are not those to label.
        temperature: in percentage points.

    Raises:
        ValueError: an accuracy is no share, or the temperature is not above 0.
    """
    for name, accuracy in accuracies.items():
        if not 0 <= accuracy <= 1:
            raise ValueError(
                f"accuracies are shares between 0 and 1; that of {name!r} is {accuracy}"
            )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    scores = 100 * np.array(list(accuracies.values())) / temperature
    weights = np.exp(scores - scores.max(initial=0.0))
    return dict(zip(accuracies, (weights / weights.sum()).tolist(), strict=True))


def consensus(
    spread: Float[np.ndarray, " items"], members: Int[np.ndarray, " items"]
) -> Float[np.ndarray, " items"]:
    """exp(-0.1 spread) min(1.1, 1 + 0.05 (members - 2)): what agreement adds to a confidence.

    Abid et al., "Robust and Label-Efficient Deep Waste Detection" (arXiv 2508.18799).
    """
    return np.exp(-0.1 * spread) * np.minimum(1.1, 1.0 + 0.05 * (members - 2))


def vote_confidence(
    votes: Votes, label: Int[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """How far the sources that chose `label` agree, which may pass 1 slightly, and their number.

    Base x `consensus`, where base is 0.7 max + 0.3 mean of these sources' probabilities of the
    label; 0 where no source chose it. Who dissents does not count, so votes without probabilities
    are all equally confident: tell their rows apart by the number.

    Differs from the paper: a document has no box, so the spread is 1 minus the mean overlap
    sum_c min(p_c, mean_c) of the sources' distributions with their mean (spans have one: see
    `llmlabel.refine.views.aggregate_spans`); a single source is scored too, not dropped.
    """
    top = votes.top()
    top = top[votes.label[top] == label[votes.row[top]]]
    row, prob = votes.row[top], votes.prob[top]
    count = np.bincount(row, minlength=votes.rows)
    peak = np.zeros(votes.rows)
    np.maximum.at(peak, row, prob)
    several = np.maximum(count, 1)
    base = 0.7 * peak + 0.3 * np.bincount(row, prob, minlength=votes.rows) / several
    vote = np.cumsum(votes.first()) - 1
    chose = np.zeros(len(vote), dtype=bool)
    chose[vote[top]] = True
    entries = np.flatnonzero(chose[vote])
    row, prob = votes.row[entries], votes.prob[entries]
    cell = row.astype(np.int64) * votes.labels + votes.label[entries]
    mean = np.bincount(cell, prob, minlength=votes.rows * votes.labels)[cell] / several[row]
    overlap = np.bincount(row, np.minimum(prob, mean), minlength=votes.rows)
    confidence = base * consensus(1.0 - overlap / several, count)
    return np.where(count > 0, confidence, 0.0), count


def consensus_confidence(
    probs: Float[np.ndarray, "sources rows labels"], label: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """`vote_confidence` of sources given as arrays; a source whose row is all 0 did not vote."""
    row, source, of = np.nonzero(probs.transpose(1, 0, 2))
    names = tuple(str(number) for number in range(len(probs)))
    votes = Votes(row, source, of, probs[source, row, of], names, *probs.shape[1:])
    return vote_confidence(votes, label)[0]


def _averaged(
    votes: Votes, labels: LabelSpace, method: Method, weights: Float[np.ndarray, " sources"]
) -> SoftLabels:
    if method == "average":
        return SoftLabels.from_dense(crowd.average(votes, weights=weights), labels)
    return SoftLabels.from_scores(crowd.log_average(votes, weights=weights), labels)


def _refuse_arguments(
    method: Method,
    labels: LabelSpace,
    weights: Mapping[str, float] | None,
    *,
    prior: Mapping[str, float] | None,
    abstention: Abstention,
) -> None:
    if labels.multilabel and method != "average":
        raise ValueError(f"method {method!r} needs a single-label space; use average")
    if weights is not None and method in get_args(Modelling):
        raise ValueError(
            f"method {method!r} learns its own weights; leave weights out, or use majority"
        )
    learns = method in ("dawid_skene", "mean_of_methods")
    if not learns and (prior is not None or abstention != "missing"):
        name = "prior" if prior is not None else "abstention"
        raise ValueError(f"{name} is for dawid_skene and mean_of_methods; {method!r} has none")


def _source_weights(
    names: tuple[str, ...], weights: dict[str, float] | None
) -> Float[np.ndarray, " sources"]:
    if weights is None:
        return np.ones(len(names))
    if set(weights) != set(names):
        raise ValueError(f"weights name {sorted(weights)}, the sources are {sorted(names)}")
    values = np.array([float(weights[name]) for name in names])
    if not (values >= 0).all() or not values.sum() > 0:
        raise ValueError(f"weights must be at least 0 and not all 0; got {weights}")
    return values


def _errors(votes: Votes, table: Dataset | None) -> list[str | None]:
    """The own error of each row of one table, behind `_NO_LABEL` where nobody voted."""
    own: list[str | None] = [None] * votes.rows
    if table is not None and "error" in table.column_names:
        require_columns(table, "error")
        own = table["error"][:]
    errors: list[str | None] = []
    for voted, error in zip(votes.voted.tolist(), own, strict=True):
        said = (error or "").removeprefix(_NO_LABEL).removeprefix("; ")  # by `aggregate` before
        parts = [part for part in ("" if voted else _NO_LABEL, said) if part]
        errors.append("; ".join(parts) or None)
    return errors


def _votes(votes: Votes) -> pa.ListArray:
    """The most probable label of each source as the column `votes`."""
    top = votes.top()
    entries = pa.table(
        {
            "source": pa.array(votes.names, pa.string()).take(pa.array(votes.source[top])),
            "label_id": pa.array(votes.label[top]),
            "prob": pa.array(votes.prob[top]),
        }
    )
    return vote_lists(votes.row[top], entries, rows=votes.rows)
