import math
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, Value

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.votes import Votes, read_votes
from llmlabel.select import vote_entropy
from llmlabel.select.uncertain import entropies, label_entropy, select_uncertain
from llmlabel.softlabels import VOTES, SoftLabels

LABELS = load_labels(["bug", "praise", "other"])
PROBS = [[0.5, 0.3, 0.2], [0.45, 0.44, 0.11], [0.9, 0.05, 0.05], [0, 0, 0], [0.4, 0.3, 0.3]]


def table(probs=PROBS, labels=LABELS) -> Dataset:
    rows = Dataset.from_dict({"id": [f"r{i}" for i in range(len(probs))]})
    return SoftLabels.from_dense(np.array(probs, dtype=float), labels).add_to(rows)


@pytest.mark.parametrize(
    ("measure", "expected", "taken"),
    [
        ("margin", [0.8, 0.99, 0.15, 1.0, 0.9], [1, 3]),
        ("least_confident", [0.5, 0.55, 0.1, 1.0, 0.6], [3, 4]),
        ("entropy", None, [3, 4]),
    ],
)
def test_the_most_uncertain_rows(measure, expected, taken) -> None:
    found = select_uncertain(table(), LABELS, budget=2, measure=measure)
    if measure == "entropy":
        log = [-sum(p * math.log(p) for p in row if p) / math.log(3) for row in PROBS]
        expected = [1.0 if not any(row) else value for row, value in zip(PROBS, log, strict=True)]
    assert found["select_score"][:] == pytest.approx(expected, abs=1e-6)
    assert np.flatnonzero(found["selected"][:]).tolist() == taken


def test_reasons_name_the_labels_or_why_there_is_none() -> None:
    rows = with_columns(table(), {"error": ([None] * 3 + ["empty text", None], Value("string"))})
    found = select_uncertain(rows, LABELS, budget=2)["select_reason"][:]
    assert found[1] == "margin: uncertainty 0.99 about 'bug' and 'praise'"
    assert found[3] == "no label: empty text"
    assert [found[i] for i in (0, 2, 4)] == [None] * 3
    assert select_uncertain(table(), LABELS, budget=1)["select_reason"][3] == (
        "no label: nothing was read"
    )


def test_missing_mass_is_spread_in_the_entropy() -> None:
    soft = SoftLabels.from_dense(np.array([[0.5, 0, 0], [0, 0, 0]]), LABELS)
    spread = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(3)
    assert entropies(soft) == pytest.approx([spread, 1.0])


def test_many_labels_are_as_uncertain_as_the_nearest_to_a_half() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    rows = table([[0.9, 0.6], [0.95, 0.0]], labels)
    margin = select_uncertain(rows, labels, budget=1)
    assert margin["select_score"][:] == pytest.approx([0.8, 0.1], abs=1e-6)
    entropy = select_uncertain(rows, labels, budget=1, measure="entropy")
    expected = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in (0.6, 0.95)]
    assert entropy["select_score"][:] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="'votes' needs labels that exclude"):
        select_uncertain(rows, labels, budget=1, measure="votes")


def test_sources_that_disagree() -> None:
    def votes(*given):
        return [
            {"source": source, "label_id": label, "prob": 1.0}
            for source, label in zip("abc", given, strict=False)
            if label is not None
        ]

    column = [votes(0, 0, 0), votes(0, 1, 2), votes(0, 0, 1), votes(), None]
    rows = with_columns(Dataset.from_dict({"id": list("vwxyz")}), {"votes": (column, VOTES)})
    found = select_uncertain(rows, LABELS, budget=2, measure="votes")
    two = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert found["select_score"][:] == pytest.approx([0, 1, two, 1, 1])
    assert found["selected"][:] == [False, True, False, True, False]  # equal scores go by id
    assert found["select_reason"][1] == "the sources disagree: vote entropy 1.00"
    wrong = with_columns(rows, {"votes": ([votes(7)] * 5, VOTES)})
    said = "row with id 'v': source 'a' votes for label id 7, but the label space has ids 0 to 2"
    with pytest.raises(ValueError, match=said):
        select_uncertain(wrong, LABELS, budget=2, measure="votes")


def test_a_whole_distribution_votes_for_its_most_probable_label() -> None:
    """As `label_direct` writes the answers of two orders: most probable label first."""

    def distribution(source, *probs):
        order = np.argsort(-np.array(probs), kind="stable").tolist()
        return [{"source": source, "label_id": n, "prob": probs[n]} for n in order]

    column = [
        distribution("1", 0.6, 0.3, 0.1) + distribution("2", 0.5, 0.1, 0.4),
        distribution("1", 0.6, 0.3, 0.1) + distribution("2", 0.3, 0.6, 0.1),
        distribution("1", 0.6, 0.3, 0.1),
    ]
    rows = with_columns(Dataset.from_dict({"id": list("xyz")}), {"votes": (column, VOTES)})
    found = select_uncertain(rows, LABELS, budget=1, measure="votes")
    assert found["select_score"][:] == [0, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_label_entropy_equals_that_of_all_answers_to_the_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = rng.integers(-1, 4, (12, int(rng.integers(1, 7))))
    row, source = np.nonzero(answers >= 0)
    names = tuple(str(n) for n in range(answers.shape[1]))
    votes = Votes(row, source, answers[row, source], np.ones(len(row)), names, 12, 4)
    expected = []
    for given in answers.tolist():
        mine = np.array([[one for one in given if one >= 0]])
        expected.append(vote_entropy(mine)[0] if mine.size else 0.0)
    assert label_entropy(votes) == pytest.approx(expected, abs=1e-12)


def test_sources_that_are_silent_on_a_row_do_not_lower_its_score() -> None:
    column = [[{"source": str(n + 2 * row), "label_id": n, "prob": 1.0} for n in (0, 1)]
              for row in range(2000)]  # fmt: skip
    rows = Dataset.from_dict({"id": [f"r{n}" for n in range(2000)]})
    rows = with_columns(rows, {"votes": (column, VOTES)})
    tracemalloc.start()
    found = select_uncertain(rows, LABELS, budget=1, measure="votes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["select_score"][:] == [1] * 2000
    assert peak < 20e6  # 2000 rows x 4000 sources alone are 64 MB


def test_ties_of_vote_entropy_do_not_depend_on_the_labels() -> None:
    labels = load_labels(list("abcdef"))
    for counts in ([1, 2, 3, 5], [2, 3, 6, 7], [1, 1, 3, 4, 9]):
        given = [np.repeat(np.arange(6)[: len(counts)], np.roll(counts, by)) for by in range(3)]
        column = [
            [{"source": str(n), "label_id": label, "prob": 1.0} for n, label in enumerate(one)]
            for one in given
        ]
        rows = with_columns(Dataset.from_dict({"id": list("xyz")}), {"votes": (column, VOTES)})
        votes = read_votes(rows, labels)
        assert len(set(label_entropy(votes).tolist())) == 1


def test_order_of_rows_does_not_matter_and_a_budget_above_the_pool_is_refused() -> None:
    rows = table([[0.5, 0.5, 0]] * 5)
    assert select_uncertain(rows, LABELS, budget=2)["selected"][:] == [True, True, *[False] * 3]
    back = select_uncertain(rows.select([4, 3, 2, 1, 0]), LABELS, budget=2)
    assert back["selected"][:] == [*[False] * 3, True, True]
    for budget in (0, 6):
        with pytest.raises(ValueError, match=f"budget must be from 1 to 5, .* got {budget}"):
            select_uncertain(rows, LABELS, budget=budget)
