"""Models of annotators: how reliable each source is, and what its votes are then worth.

People, models, prompts, samples and rules are all sources. Every model here takes the sources to err
independently of each other once the true label is known. Where that fails (copies, prompts of one
model) its probabilities are too sure: see `llmlabel.calibrate.temperature`.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from llmlabel.data import gold_index, part
from llmlabel.labelspace import LabelSpace
from llmlabel.refine.crowd import majority, packed, posteriors, unpacked
from llmlabel.refine.votes import FEW, Votes, read_votes
from llmlabel.softlabels import SoftLabels

Abstention = Literal["missing", "response"]

_FLOOR = 1e-10
"""No used cell of a confusion matrix and no class prior is below this."""

_Rows = Float[np.ndarray, "rows labels"]
_Cells = Float[np.ndarray, "cells labels"]


@dataclass(frozen=True, eq=False)
class DawidSkene:
    """What Dawid-Skene makes of votes.

    Attributes:
        probs: Soft labels; a row without a vote, and a label that nobody votes for, has 0.
        confusion: Probability of each response of a source, given the true label: 0 where nobody
            votes for that label. Responses are the labels and then, if it counts, the abstention.
        prior: Share of each label.
        log_likelihoods: Of all votes, in nats, before each step.
        converged: Whether the last step gained less than the tolerance.
    """

    probs: Float[np.ndarray, "rows labels"]
    confusion: Float[np.ndarray, "sources labels responses"]
    prior: Float[np.ndarray, " labels"]
    log_likelihoods: list[float]
    converged: bool


def dawid_skene(
    votes: Votes,
    *,
    abstention: Abstention = "missing",
    prior: Float[np.ndarray, " labels"] | None = None,
    smoothing: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> DawidSkene:
    """A confusion matrix for each source and a soft label for each row, by EM from the vote shares.

    Dawid and Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
    Algorithm" (doi 10.2307/2346806), equations 2.3 to 2.5. Takes sources x labels^2 numbers beside
    rows x labels.

    Differs from the paper: a soft vote counts as a share of a vote for each of its labels. EM ends
    where crowd-kit's does, so that both give the same numbers: when a bound of the log-likelihood
    (one that counts the prior once a vote) gains less than `tolerance` a vote.

    Args:
        votes: of at least one source that votes for several labels, unless abstentions count.
        abstention: `missing` learns nothing from a source that has no vote on a row; `response`
            makes that an answer of its own, right where every source was asked about every row.
            Rows without any vote are left out of both.
        prior: the share of each label; estimated when left out.
        smoothing: added to each cell of the confusion matrices before they are normalised.
        iterations: at most so many steps.
        tolerance: see above.

    Raises:
        ValueError: no source votes for several labels, and abstentions do not count.
    """
    if abstention == "missing":
        _refuse_unipolar(votes)
    rows, seen, few = packed(votes)
    sources, responses = len(votes.names), few.labels + (abstention == "response")
    cells = _cells(few, responses)
    silent = np.zeros(sources * responses, dtype=bool)
    silent[few.labels :: responses] = responses > few.labels
    used = silent | (np.bincount(cells.indices, minlength=len(silent)) > 0) | (smoothing > 0)
    given = float(few.prob.sum())
    if silent.any():
        given += few.rows * sources - int(few.first().sum())

    def rates(counts: _Cells) -> _Cells:
        raised = np.where(used[:, None], np.maximum(counts + smoothing, _FLOOR), 0.0)
        total = raised.reshape(sources, responses, -1).sum(axis=1)
        return raised / np.repeat(np.where(total > 0, total, 1.0), responses, axis=0)

    def count(probs: _Rows) -> _Cells:
        return cells.T @ probs + silent[:, None] * np.einsum("rl->l", probs)

    if prior is not None and not prior[seen].sum() > 0:
        raise ValueError("prior gives no share to any label that sources vote for; leave it out")
    shares = None if prior is None else prior[seen] / prior[seen].sum()
    probs = majority(few)
    counts, mix = count(probs), probs.mean(axis=0) if shares is None else shares
    bound, log_likelihoods, converged = -np.inf, [], False
    for _ in range(iterations):
        log_rates, log_mix = _log(rates(counts)), np.log(np.maximum(mix, _FLOOR))
        probs, log_likelihood = posteriors(cells @ log_rates, silent @ log_rates + log_mix)
        log_likelihoods.append(log_likelihood)
        counts, totals = count(probs), np.einsum("rl->l", probs)
        entropy = log_likelihood - (counts * log_rates).sum() - totals @ log_mix
        mix = totals / few.rows if shares is None else shares
        log_mix = np.log(np.maximum(mix, _FLOOR))
        expected = (counts * _log(rates(counts))).sum() + counts.sum(axis=0) @ log_mix
        previous, bound = bound, (expected + entropy) / max(given, 1.0)
        if bound - previous < tolerance:
            converged = True
            break
    table = rates(counts).reshape(sources, responses, -1).transpose(0, 2, 1)
    all_mix = np.zeros(votes.labels)
    all_mix[seen] = mix
    return DawidSkene(
        probs=unpacked(probs, votes, rows, seen),
        confusion=_of_all_labels(table, seen, votes.labels),
        prior=all_mix,
        log_likelihoods=log_likelihoods,
        converged=converged,
    )


# -------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Annotator:
    """How reliable one source is.

    Attributes:
        source: Its name.
        votes: Number of rows that it voted on.
        abstentions: Number of rows that others voted on and it did not.
        only_label: The label that it always votes for, or None.
        agreement: Share of the other sources' votes on the same rows that are for its label; None
            where nobody else voted.
        accuracy: Expected share of right votes, when the rows' soft labels are believed.
        accuracy_gold: Share of right votes on the rows with gold; None without any.
        confusion: True label -> label voted for -> expected share, when the soft labels are
            believed; shares below 0.001 are left out.
    """

    source: str
    votes: int
    abstentions: int
    only_label: str | None
    agreement: float | None
    accuracy: float
    accuracy_gold: float | None
    confusion: dict[str, dict[str, float]]


@dataclass(frozen=True)
class AnnotatorReport:
    """How reliable the sources of votes are.

    Attributes:
        rows: Number of rows.
        rows_without_votes: Number of rows that nobody voted on.
        gold_rows: Number of rows whose gold is known.
        agreement: Krippendorff's alpha for nominal data: 1 is perfect, 0 is chance; None where it
            is not defined.
        annotators: One a source.
        identical: Groups of sources with the same votes on the same rows.
        notes: What limits these numbers.
    """

    rows: int
    rows_without_votes: int
    gold_rows: int
    agreement: float | None
    annotators: list[Annotator]
    identical: list[list[str]]
    notes: list[str]


def measure_annotators(
    dataset: Dataset, labels: LabelSpace, *, split: str | None = None
) -> AnnotatorReport:
    """How reliable each source in `votes` is, judged by the soft labels and, if there, by gold.

    A soft vote counts for its most probable label.

    Args:
        dataset: rows with `votes` and soft labels, such as `llmlabel.refine.aggregate.aggregate`
            gives; gold serves for measuring only.
        labels: the label space of both.
        split: only rows of this part are measured.

    Raises:
        ValueError: the space is multi-label, or a vote is broken.
    """
    if labels.multilabel:
        raise ValueError("measure_annotators needs labels that exclude each other (single-label)")
    rows = dataset if split is None else part(dataset, split=split)
    votes = read_votes(rows, labels).hard()
    belief = SoftLabels.from_dataset(rows, labels).probs.astype(np.float64)
    gold = np.full(len(rows), -1)
    if "gold" in rows.column_names:
        gold = gold_index(rows, labels)
    judged = {
        "accuracy": np.asarray(belief[votes.row, votes.label]).ravel(),
        "accuracy_gold": np.where(
            gold[votes.row] >= 0, gold[votes.row] == votes.label, np.nan
        ).astype(np.float64),
    }
    alike, counts = _counts(votes)
    same, others = alike - 1, counts.sum(axis=1)[votes.row] - 1
    only, voted = votes.only_label(), int(votes.voted.sum())
    order = np.argsort(votes.source, kind="stable")
    ends = np.cumsum(np.bincount(votes.source, minlength=len(votes.names)))
    confusions = _confusions(belief, votes, labels)
    found = []
    for number, (name, of) in enumerate(zip(votes.names, np.split(order, ends)[:-1], strict=True)):
        shares = {key: values[of] for key, values in judged.items()}
        known = shares["accuracy_gold"][~np.isnan(shares["accuracy_gold"])]
        found.append(
            Annotator(
                source=name,
                votes=len(of),
                abstentions=voted - len(of),
                only_label=labels.ids[only[number]] if only[number] >= 0 else None,
                agreement=float(same[of].sum() / others[of].sum()) if others[of].any() else None,
                accuracy=float(shares["accuracy"].mean()) if len(of) else 0.0,
                accuracy_gold=float(known.mean()) if len(known) else None,
                confusion=confusions[number],
            )
        )
    identical = votes.identical()
    return AnnotatorReport(
        *(len(rows), len(rows) - voted, int((gold >= 0).sum()), _krippendorff(counts)),
        *(found, identical, _notes(found, identical)),
    )


def _confusions(
    belief: csr_array, votes: Votes, labels: LabelSpace
) -> list[dict[str, dict[str, float]]]:
    """The belief in each label, summed over each source's votes for each label."""
    given = votes.source.astype(np.int64) * votes.labels + votes.label
    cells, place = np.unique(given, return_inverse=True)
    joint = (_indicator(place, len(cells)).T @ belief[votes.row]).tocoo()
    total = _indicator(votes.source, len(votes.names)).T @ belief[votes.row]
    source, said = np.divmod(cells[joint.row], votes.labels)
    share = joint.data / np.maximum(np.asarray(total[source, joint.col]).ravel(), 1e-300)
    tables: list[dict[str, dict[str, float]]] = [{} for _ in votes.names]
    for at in np.lexsort((said, joint.col, source)):
        if share[at] >= 0.001:
            true = tables[source[at]].setdefault(labels.ids[joint.col[at]], {})
            true[labels.ids[said[at]]] = float(share[at])
    return tables


def _indicator(place: Int[np.ndarray, " votes"], places: int) -> csr_array:
    votes = len(place)
    return csr_array((np.ones(votes), (np.arange(votes), place)), shape=(votes, places))


def _counts(votes: Votes) -> tuple[Int[np.ndarray, " votes"], csr_array]:
    """Votes that say the same of the same row, itself included; votes for each label of each row."""
    cell = votes.row.astype(np.int64) * votes.labels + votes.label
    found, place, times = np.unique(cell, return_inverse=True, return_counts=True)
    at = np.divmod(found, votes.labels)
    counts = csr_array((times.astype(np.float64), at), shape=(votes.rows, votes.labels))
    return times[place], counts


def _krippendorff(counts: csr_array) -> float | None:
    size = counts.sum(axis=1)
    counts, size = counts[size > 1], size[size > 1]
    total = counts.sum(axis=0)
    expected = (total.sum() ** 2 - (total**2).sum()) / max(total.sum() - 1, 1)
    if expected == 0:
        return None
    observed = ((size**2 - counts.power(2).sum(axis=1)) / (size - 1)).sum()
    return float(1 - observed / expected)


def _notes(annotators: list[Annotator], identical: list[list[str]]) -> list[str]:
    notes = [f"{_independence(group)}" for group in identical]
    if single := [one.source for one in annotators if one.votes == 1]:
        notes.append(f"{_some(single)} voted once; nothing general can be said of that")
    if only := [one.source for one in annotators if one.only_label and one.votes >= FEW]:
        notes.append(f"{_some(only)} voted for one label only, whatever the row")
    return notes


# ------------------------------------------------------------------------------------------ checks


def warn_of_copies(votes: Votes) -> None:
    """Warns where sources are copies of each other, which the models of this module rule out."""
    for group in votes.identical():
        warnings.warn(_independence(group), stacklevel=2)


def _independence(group: list[str]) -> str:
    return (
        f"{_some(group)} have identical votes, so they are no independent sources; their agreement "
        "shows nothing: keep one of them"
    )


def _refuse_unipolar(votes: Votes) -> None:
    only = votes.only_label()
    cast = np.bincount(votes.source, minlength=len(votes.names))
    way_out = (
        "abstention='response' makes their silence an answer, where every source was asked about "
        "every row; method='majority' counts votes as they are"
    )
    if (np.bincount(votes.label, minlength=1) > 0).sum() < 2:
        return  # nobody ever disagrees
    if (only[cast > 0] >= 0).all():
        raise ValueError(
            f"each of the {int((cast > 0).sum())} sources votes for one label only, so confusion "
            f"matrices have nothing to learn from; {way_out}"
        )
    if ((only >= 0) & (cast >= FEW)).any():
        names = [votes.names[at] for at in np.flatnonzero((only >= 0) & (cast >= FEW))]
        warnings.warn(
            f"{_some(names)} votes for one label only, which Dawid-Skene ignores; {way_out}",
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" * (len(names) > 3))


def _of_all_labels(
    table: Float[np.ndarray, "sources seen answers"], seen: Int[np.ndarray, " seen"], labels: int
) -> Float[np.ndarray, "sources labels responses"]:
    """Confusion matrices of all labels from those of the labels seen; 0 elsewhere."""
    sources, abstention = table.shape[0], table.shape[2] - len(seen)
    whole = np.zeros((sources, labels, labels + abstention))
    answers = np.append(seen, np.arange(labels, labels + abstention))
    whole[np.ix_(np.arange(sources), seen, answers)] = table
    return whole


def _cells(votes: Votes, responses: int) -> csr_array:
    """Votes of each row (matrix row) in each cell source x response.

    Where abstention is a response, each vote also takes one abstention away, so that what all
    sources' silence says is added once for all rows and the matrix stays sparse.
    """
    shape = (votes.rows, len(votes.names) * responses)
    cell = (votes.source.astype(np.int64) * responses + votes.label).astype(np.int32)
    if responses == votes.labels:
        indptr = np.append(0, np.cumsum(np.bincount(votes.row, minlength=votes.rows)))
        return csr_array((votes.prob, cell, indptr.astype(np.int32)), shape=shape)
    first = votes.first()
    silent = votes.source[first].astype(np.int64) * responses + votes.labels
    row, column = np.append(votes.row, votes.row[first]), np.append(cell, silent)
    value = np.append(votes.prob, -np.ones(len(silent)))
    return csr_array((value, (row, column)), shape=shape)


def _log(values: _Cells) -> _Cells:
    return np.log(np.where(values > 0, values, 1.0))
