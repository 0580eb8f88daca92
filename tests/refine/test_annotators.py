import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Value
from pydantic import TypeAdapter
from reference import annotators as reference

from llmlabel import metrics
from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine import crowd
from llmlabel.refine.aggregate import aggregate, combine
from llmlabel.refine.annotators import AnnotatorReport, dawid_skene, measure_annotators
from llmlabel.refine.votes import Votes, add_votes, read_votes
from llmlabel.softlabels import VOTES, SoftLabels

SDG = Path(__file__).parents[3] / "shared" / "data" / "sdg_benchmark" / "sdg_benchmark.jsonl"
LABELS = load_labels(["a", "b", "c"])
SEEDS = range(20)


def random_votes(
    seed: int, *, rows: int = 30, sources: int = 6, labels: int = 3, soft: bool = False
) -> tuple[Votes, np.ndarray]:
    """Ragged votes, at least one a row, of sources that are often right; and the true labels."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, labels, rows)
    cast = rng.random((rows, sources)) < 0.6
    cast[np.arange(rows), rng.integers(0, sources, rows)] = True
    row, source = np.nonzero(cast)
    right = rng.random(len(row)) < rng.uniform(0.5, 0.95, sources)[source]
    label = np.where(right, gold[row], rng.integers(0, labels, len(row)))
    prob = rng.uniform(0.3, 1.0, len(row)) if soft else np.ones(len(row))
    names = tuple(f"s{number}" for number in range(sources))
    return Votes(row, source, label, prob, names, rows, labels), gold


def listed(votes: Votes) -> list[reference.Vote]:
    columns = (votes.row, votes.source, votes.label, votes.prob)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def permuted(votes: Votes, *, rows: np.ndarray, sources: np.ndarray, labels: np.ndarray) -> Votes:
    """The same votes with other places of rows, sources and labels."""
    row, source, label = rows[votes.row], sources[votes.source], labels[votes.label]
    order = np.lexsort((label, source, row))
    names = tuple(np.array(votes.names)[np.argsort(sources)].tolist())
    return dataclasses.replace(
        *(votes,), row=row[order], source=source[order], label=label[order],
        prob=votes.prob[order], names=names,
    )  # fmt: skip


# ---------------------------------------------------------------------------------- slow twins


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("soft", [False, True])
def test_dawid_skene_equals_the_loops(seed: int, soft: bool) -> None:
    votes, _ = random_votes(seed, soft=soft)
    for abstention in ("missing", "response"):
        got = dawid_skene(votes, abstention=abstention, iterations=4, tolerance=-np.inf)
        expected, likelihoods = reference.dawid_skene(
            *(listed(votes), 30, 3, 6, 4), silence=abstention == "response"
        )
        np.testing.assert_allclose(got.probs, expected, atol=1e-9)
        np.testing.assert_allclose(got.log_likelihoods, likelihoods, rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_counting_equals_the_loops(seed: int) -> None:
    votes, _ = random_votes(seed, soft=seed % 2 == 0)
    cast = listed(votes)
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, 6)
    np.testing.assert_allclose(
        crowd.majority(votes, weights=weights),
        reference.shares(cast, 30, 3, weights.tolist()),
        rtol=1e-12,
    )
    np.testing.assert_allclose(crowd.wawa(votes).probs, reference.wawa(cast, 30, 3, 6), rtol=1e-9)
    np.testing.assert_allclose(crowd.zbs(votes).probs, reference.zbs(cast, 30, 3, 6), rtol=1e-9)
    counts = np.zeros((30, 3))
    np.add.at(counts, (votes.row, votes.label), votes.prob)
    expected = np.exp(counts) / np.exp(counts).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(crowd.softmax(votes), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_mace_equals_the_loops(seed: int) -> None:
    from scipy.special import digamma

    votes, _ = random_votes(seed, soft=seed % 2 == 0)
    rng = np.random.default_rng(seed)
    knows, habits = rng.dirichlet([1.0, 1.0], 6), rng.dirichlet([1.0] * 3, 6)
    got, _, skill = crowd.mace_run(votes, knows, habits, iterations=2)
    for _ in range(3):
        posterior, knowing, guessing = reference.mace_step(
            *(listed(votes), 30, 3, knows[:, 1].tolist(), knows[:, 0].tolist(), habits.tolist())
        )
        both = np.stack([np.sum(guessing, axis=1), knowing], axis=1) + 0.5
        knows = np.exp(digamma(both) - digamma(both.sum(axis=1, keepdims=True)))
        raised = np.array(guessing) + 10.0
        habits = np.exp(digamma(raised) - digamma(raised.sum(axis=1, keepdims=True)))
    np.testing.assert_allclose(got, posterior, atol=1e-10)
    np.testing.assert_allclose(skill, both[:, 1] / both.sum(axis=1), rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_glad_equals_the_loops_in_its_first_step(seed: int) -> None:
    votes, _ = random_votes(seed)
    got = crowd.glad(votes, iterations=1).probs
    e = float(np.e)
    expected = reference.glad_posterior(listed(votes), 30, 3, [1.0] * 6, [e] * 30)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_glad_maximises_as_the_loops_do(seed: int) -> None:
    """Its 25 steps of conjugate gradients end near the optimum that numeric gradients find."""
    from scipy.optimize import minimize

    votes, _ = random_votes(seed, rows=12, sources=4)
    cast, e = listed(votes), float(np.e)
    first = reference.glad_posterior(cast, 12, 3, [1.0] * 4, [e] * 12)

    def loss(x: np.ndarray) -> float:
        return reference.glad_loss(cast, first, 3, x[:4].tolist(), x[4:].tolist())

    best = minimize(loss, np.ones(16)).x
    expected = reference.glad_posterior(cast, 12, 3, best[:4].tolist(), np.exp(best[4:]).tolist())
    got = crowd.glad(votes, iterations=2, tolerance=-np.inf).probs
    np.testing.assert_allclose(got, expected, atol=0.01)
    assert np.abs(got - first).max() > 0.03


@pytest.mark.parametrize("seed", range(3))
def test_better_sources_get_more_skill(seed: int) -> None:
    """In GLAD a source that is right in a third of its votes has a negative one: sigmoid(s) = 1/3."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 3, 400)
    accuracy = np.array([0.95, 0.8, 0.6, 1 / 3])
    right = rng.random((400, 4)) < accuracy
    label = np.where(right, gold[:, None], (gold[:, None] + rng.integers(1, 3, (400, 4))) % 3)
    row, source = np.divmod(np.arange(1600), 4)
    votes = Votes(row, source, label.ravel(), np.ones(1600), tuple("wxyz"), 400, 3)
    skill = crowd.glad(votes).skill
    assert (np.diff(skill) < 0).all()
    assert -0.6 < skill[3] < 0 < skill[2]
    assert (np.diff(crowd.mace(votes).skill) < 0).all()


# ----------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", SEEDS)
def test_the_likelihood_never_falls(seed: int) -> None:
    votes, _ = random_votes(seed, soft=seed % 2 == 0)
    for abstention in ("missing", "response"):
        fitted = dawid_skene(votes, abstention=abstention, iterations=60, tolerance=-np.inf)
        steps = np.diff(fitted.log_likelihoods)
        assert len(steps) == 59
        assert steps.min() > -1e-6  # no cell falls below 1e-10
        assert steps[0] > 0
        assert not fitted.converged


@pytest.mark.parametrize(
    "method", ["majority", "softmax", "glad", "mace", "dawid_skene", "mean_of_methods"]
)
def test_order_of_rows_sources_and_labels_changes_nothing(method: str) -> None:
    votes, _ = random_votes(3, rows=51, sources=7)
    rng = np.random.default_rng(0)
    rows, sources = rng.permutation(51), rng.permutation(7)
    other = permuted(votes, rows=rows, sources=sources, labels=np.arange(3))
    np.testing.assert_allclose(combine(other, method)[rows], combine(votes, method), atol=1e-6)


@pytest.mark.parametrize("method", ["majority", "softmax", "glad", "dawid_skene"])
def test_renamed_labels_change_nothing(method: str) -> None:
    votes, _ = random_votes(4)
    labels = np.array([2, 0, 1])
    other = permuted(votes, rows=np.arange(30), sources=np.arange(6), labels=labels)
    got = combine(other, method)[:, labels]
    np.testing.assert_allclose(got, combine(votes, method), atol=1e-6)


def test_a_spammer_harms_dawid_skene_less_than_the_shares() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 300)
    answers = np.where(rng.random((300, 4)) < 0.8, gold[:, None], rng.integers(0, 3, (300, 4)))
    spam = np.concatenate([answers, rng.integers(0, 3, (300, 5))], axis=1)
    harm = {}
    for method in ("majority", "dawid_skene"):
        before, after = (
            metrics.accuracy(combine(dense_votes(table), method), gold) for table in (answers, spam)
        )
        harm[method] = before - after
    assert harm["majority"] > 0.05
    assert harm["dawid_skene"] < harm["majority"] / 2


def dense_votes(answers: np.ndarray) -> Votes:
    row, source = np.nonzero(answers >= 0)
    names = tuple(f"s{n}" for n in range(answers.shape[1]))
    return Votes(
        *(row, source, answers[row, source], np.ones(len(row)), names, len(answers)),
        int(answers.max()) + 1,
    )


def test_confusion_and_prior_of_a_known_crowd() -> None:
    rng = np.random.default_rng(1)
    gold = rng.choice(2, 5000, p=[0.7, 0.3])
    rates = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.05, 0.95]], [[0.8, 0.2]] * 2])
    rates[2] = [[0.85, 0.15], [0.3, 0.7]]
    said = (rng.random((5000, 3)) < rates[np.arange(3), gold[:, None], 1]).astype(int)
    fitted = dawid_skene(dense_votes(said), tolerance=1e-9, iterations=2000)
    assert fitted.converged
    np.testing.assert_allclose(fitted.confusion, rates, atol=0.05)
    np.testing.assert_allclose(fitted.prior, [0.7, 0.3], atol=0.05)
    np.testing.assert_allclose(fitted.confusion.sum(axis=2), 1.0, rtol=1e-12)
    fixed = dawid_skene(dense_votes(said), prior=np.array([0.5, 0.5]))
    np.testing.assert_allclose(fixed.prior, [0.5, 0.5])
    assert fixed.probs[:, 1].mean() > fitted.probs[:, 1].mean()


def test_labels_that_nobody_votes_for_and_rows_without_votes_get_nothing() -> None:
    votes, _ = random_votes(5)
    wide = dataclasses.replace(votes, label=votes.label + 1, rows=32, labels=6)
    for method in ("majority", "wawa", "zbs", "glad", "mace", "dawid_skene"):
        probs = combine(wide, method)
        np.testing.assert_allclose(probs[:30, 1:4], combine(votes, method), atol=1e-12)
        assert probs[30:].sum() == 0
        assert probs[:, [0, 4, 5]].sum() == 0
    fitted = dawid_skene(wide, abstention="response")
    assert fitted.confusion.shape == (6, 6, 7)
    np.testing.assert_allclose(fitted.confusion[:, 1:4].sum(axis=2), 1.0, rtol=1e-12)
    assert fitted.confusion[:, [0, 4, 5]].sum() == 0
    assert fitted.confusion[0, 1, 6] > 0.1  # it has no vote on many rows


def test_one_label_in_all_votes_is_certain() -> None:
    votes = Votes(*([np.array([0, 0, 1]), np.array([0, 1, 0]), np.zeros(3, int)]), np.ones(3),
                  ("x", "y"), 2, 3)  # fmt: skip
    for method in ("glad", "mace", "dawid_skene"):
        np.testing.assert_allclose(combine(votes, method), [[1, 0, 0]] * 2, atol=1e-12)


# ------------------------------------------------------------------------- other implementations


def test_equals_crowdkit() -> None:
    """In a Python that has crowd-kit, with a scikit-learn that it fits (below 1.6)."""
    pytest.importorskip("crowdkit")
    import pandas as pd
    from crowdkit.aggregation import GLAD, DawidSkene, MajorityVote, Wawa, ZeroBasedSkill

    warnings.simplefilter("ignore")
    for seed in SEEDS:
        votes, _ = random_votes(seed, rows=200, labels=4)
        table = pd.DataFrame(
            {"task": votes.row, "worker": [votes.names[s] for s in votes.source]}
            | {"label": votes.label}
        )
        for theirs, method, within in (
            (MajorityVote(), "majority", 1e-12),
            (DawidSkene(), "dawid_skene", 1e-8),
            (GLAD(n_iter=10), "glad", 1e-6),
        ):
            expected = theirs.fit_predict_proba(table).sort_index().reindex(columns=range(4))
            got = (
                crowd.glad(votes, iterations=10).probs
                if method == "glad"
                else combine(votes, method)
            )
            np.testing.assert_allclose(got, expected.to_numpy(), atol=within)
        odd = votes_without_ties(seed)
        table = pd.DataFrame({"task": odd.row, "worker": odd.source, "label": odd.label})
        for theirs, method in ((Wawa(), "wawa"), (ZeroBasedSkill(), "zbs")):
            expected = theirs.fit_predict_proba(table).sort_index().reindex(columns=range(2))
            np.testing.assert_allclose(combine(odd, method), expected.to_numpy(), atol=1e-9)


def votes_without_ties(seed: int) -> Votes:
    """crowd-kit resolves ties by the order of its columns, which is that of nothing in particular."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 2, 100)
    right = rng.random((100, 5)) < rng.uniform(0.55, 0.95, 5)
    return dense_votes(np.where(right, gold[:, None], 1 - gold[:, None]))


@pytest.mark.skipif(not SDG.is_file(), reason="../shared/data/sdg_benchmark is not there")
def test_reference_numbers_on_recorded_votes() -> None:
    rows = [json.loads(line) for line in SDG.read_text("utf-8").split("\n")[:-1]]
    gold = np.array([int(row["label"] == "relevant") for row in rows])
    names = sorted(rows[0]["votes"])
    families = ("openai", "deepseek", "llama", "mixtral", "gemini", "anthropic")
    llms = [name for name in names if name.startswith(families)]
    for of, majority, model in ((names, 0.8905, 0.8849), (llms, 0.8721, 0.8785)):
        votes = dense_votes(np.array([[row["votes"][name] for name in of] for row in rows]))
        assert metrics.accuracy(crowd.majority(votes), gold) == pytest.approx(majority, abs=5e-5)
        fitted = dawid_skene(votes, smoothing=0.01, iterations=50, tolerance=-np.inf)
        assert metrics.accuracy(fitted.probs, gold) == pytest.approx(model, abs=5e-5)
        methods = ("majority", "softmax", "wawa", "zbs", "glad", "mace", "dawid_skene")
        nll = [metrics.nll(combine(votes, method), gold) for method in methods]
        assert metrics.nll(combine(votes, "mean_of_methods"), gold) <= np.median(nll)


# ----------------------------------------------------------------------------------- the report


def dataset_of(votes: Votes, gold: np.ndarray | None = None) -> Dataset:
    lists: list[list[dict[str, object]]] = [[] for _ in range(votes.rows)]
    for row, source, label, prob in listed(votes):
        entry = {"source": votes.names[source], "label_id": label, "prob": prob}
        lists[row].append(entry)
    ids = [f"r{n}" for n in range(votes.rows)]
    dataset = with_columns(Dataset.from_dict({"id": ids, "text": ids}), {"votes": (lists, VOTES)})
    if gold is None:
        return dataset
    return dataset.add_column("gold", [[int(one)] for one in gold])


def test_report_of_three_sources() -> None:
    said = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1], [2, -1, 2], [-1, -1, -1]])
    dataset = dataset_of(dense_votes(said), np.array([0, 0, 1, 1, 2, 2]))
    belief = aggregate(dataset, LABELS, method="majority")
    report = measure_annotators(belief, LABELS)
    assert (report.rows, report.rows_without_votes, report.gold_rows) == (6, 1, 6)
    first, second, third = report.annotators
    assert [one.source for one in report.annotators] == ["s0", "s1", "s2"]
    assert (first.votes, first.abstentions) == (5, 0)
    assert (second.votes, second.abstentions) == (4, 1)
    assert first.accuracy_gold == 1.0
    assert second.accuracy_gold == 0.75
    assert third.accuracy_gold == 0.8
    assert first.agreement == pytest.approx((2 + 1 + 2 + 1 + 1) / 9)
    assert first.accuracy == pytest.approx((1 + 2 / 3 + 1 + 2 / 3 + 1) / 5, abs=1e-6)
    # s0 votes 0 on rows 0 and 1, whose belief in 0 is 1 and 2/3; in all, 0 has 1 + 2/3 + 1/3
    assert first.confusion["a"] == {
        "a": pytest.approx(5 / 6, abs=1e-6), "b": pytest.approx(1 / 6, abs=1e-6)
    }  # fmt: skip
    assert first.confusion["c"] == {"c": pytest.approx(1.0)}
    assert report.agreement == pytest.approx(
        reference.krippendorff(listed(dense_votes(said)), 6), rel=1e-12
    )
    assert report.notes == []
    assert TypeAdapter(AnnotatorReport).validate_json(
        TypeAdapter(AnnotatorReport).dump_json(report)
    ) == report  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_krippendorff_equals_the_pairs(seed: int) -> None:
    votes, _ = random_votes(seed)
    belief = aggregate(dataset_of(votes), LABELS, method="majority")
    got = measure_annotators(belief, LABELS).agreement
    assert got == pytest.approx(reference.krippendorff(listed(votes), 30), rel=1e-10)


def test_copies_single_votes_and_unipolar_sources_are_told() -> None:
    rng = np.random.default_rng(0)
    said = rng.integers(0, 3, (20, 3))
    said = np.concatenate([said, said[:, :1], np.full((20, 1), 2), np.full((20, 1), -1)], axis=1)
    said[7, 5] = 1
    dataset = dataset_of(dense_votes(said))
    report = measure_annotators(aggregate(dataset, LABELS, method="majority"), LABELS)
    assert report.identical == [["s0", "s3"]]
    assert report.annotators[4].only_label == "c"
    assert len(report.notes) == 3
    assert report.notes[0].startswith("'s0', 's3' have identical votes, so they are no independent")
    assert report.notes[1].startswith("'s5' voted once; ")
    assert report.notes[2].startswith("'s4' voted for one label only")
    with pytest.warns(UserWarning, match="identical votes|one label only") as told:
        aggregate(dataset, LABELS, method="dawid_skene")
    assert [str(one.message)[:31] for one in told] == [
        "'s0', 's3' have identical votes",
        "'s4' votes for one label only, ",
    ]


def test_unipolar_sources_are_refused_or_their_silence_counts() -> None:
    said = np.array([[0, -1, 1], [0, 0, -1], [-1, 0, 1], [-1, -1, 1]] * 5)
    dataset = dataset_of(dense_votes(said))
    labels = load_labels(["ham", "spam"])
    with pytest.raises(ValueError, match="each of the 3 sources votes for one label only") as told:
        aggregate(dataset, labels, method="dawid_skene")
    assert "abstention='response' makes their silence an answer" in str(told.value)
    got = aggregate(dataset, labels, method="dawid_skene", abstention="response")
    best = [ids[0] for ids in got["label_ids"][:4]]
    assert best[1] == 0
    assert best[3] == 1


def test_measure_needs_a_single_label_space() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    with pytest.raises(ValueError, match="exclude each other"):
        measure_annotators(Dataset.from_dict({"id": ["x"]}), labels)


# -------------------------------------------------------------------------------- reading votes


def table_of(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


def test_long_table_becomes_votes() -> None:
    rows = Dataset.from_dict({"id": ["x", "y", "z"], "text": ["1", "2", "3"]})
    long = table_of(
        id=["y", "x", "x", "y"],
        source=["Ann", "Bob", "Ann", "Bob"],
        label=["b", "a", "c", None],
        prob=[1.0, 0.5, None, None],
    )
    got = add_votes(rows, long, LABELS)
    assert got["votes"][:] == [
        [{"source": "Bob", "label_id": 0, "prob": 0.5}, {"source": "Ann", "label_id": 2, "prob": None}],
        [{"source": "Ann", "label_id": 1, "prob": 1.0}, {"source": "Bob", "label_id": None, "prob": None}],
        [],
    ]  # fmt: skip
    votes = read_votes(got, LABELS)
    assert votes.names == ("Ann", "Bob")
    assert listed(votes) == [(0, 0, 2, 1.0), (0, 1, 0, 0.5), (1, 0, 1, 1.0)]
    assert votes.voted.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ["x", "q"]}, "a vote is on the row 'q', but no row has that id"),
        ({"label": ["a", "d"]}, "column 'label' of the votes: unknown label 'd'"),
        ({"label": [0, 1]}, "column 'label' of the votes: the int 0 is no id or name of a label"),
        ({"source": ["Ann", None]}, "a vote has no source"),
        ({"id": ["x", "x"]}, "row with id 'x': source 'Ann' votes twice, for the label ids"),
        ({"prob": [float("nan"), 1.0]}, "source 'Ann' votes with the probability nan"),
        ({"prob": [1.0, -0.5]}, "source 'Ann' votes with the probability -0.5"),
        ({"prob": [1.0, 1.5]}, "source 'Ann' votes with the probability 1.5"),
    ],
)
def test_broken_long_tables(change: dict, message: str) -> None:
    rows = Dataset.from_dict({"id": ["x", "y"], "text": ["1", "2"]})
    good = {"id": ["x", "y"], "source": ["Ann", "Ann"], "label": ["a", "b"]}
    with pytest.raises(ValueError, match=message) as told:
        add_votes(rows, table_of(**{**good, **change}), LABELS)
    assert "\n" not in str(told.value)
    added = add_votes(rows, table_of(**good), LABELS)
    with pytest.raises(ValueError, match="the rows have the column votes already"):
        add_votes(added, table_of(**good), LABELS)


def one_row(*entries: tuple[str | None, int | None, float | None]) -> Dataset:
    lists = [[{"source": s, "label_id": n, "prob": p} for s, n, p in entries]]
    return with_columns(Dataset.from_dict({"id": ["x"]}), {"votes": (lists, VOTES)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("A", 3, 1.0)], "row with id 'x': source 'A' votes for label id 3, but the label space"),
        ([("A", -1, 1.0)], "source 'A' votes for label id -1"),
        ([(None, 1, 1.0)], "row with id 'x': a vote has no source"),
        ([("A", 1, 0.5), ("A", 1, 0.5)], "source 'A' votes twice, for the label ids"),
        ([("A", 1, 0.7), ("A", 0, 0.7)], r"sum to 1\.4; keep one vote"),
        ([("A", 1, None), ("A", 0, None)], "source 'A' votes twice"),
    ],
)
def test_broken_votes(entries: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_votes(one_row(*entries), LABELS)


def test_a_vote_of_probability_0_is_no_vote() -> None:
    votes = read_votes(one_row(("A", 0, 0.0), ("B", 1, 0.5), ("B", 2, 0.0), ("C", 2, 0.0)), LABELS)
    assert listed(votes) == [(0, 1, 1, 0.5), (0, 1, 2, 0.0)]
    assert votes.names == ("A", "B", "C")
    assert not read_votes(one_row(("A", 0, 0.0), ("A", 1, 0.0)), LABELS).voted.any()


def test_votes_of_another_label_space_are_refused() -> None:
    other = load_labels(["x", "y", "z"])
    rows = Dataset.from_dict({"id": ["x"], "label_ids": [[0]], "label_probs": [[1.0]]})
    lists = {"votes": ([[{"source": "A", "label_id": 0, "prob": 1.0}]], VOTES)}
    for space in (LABELS.fingerprint, None):
        known = with_columns(rows, {**lists, "label_space": ([space], Value("string"))})
        assert read_votes(known, LABELS).voted.all()
    wrong = with_columns(rows, {**lists, "label_space": ([other.fingerprint], Value("string"))})
    with pytest.raises(ValueError, match=f"of label space {other.fingerprint}, but the") as told:
        read_votes(wrong, LABELS)
    with pytest.raises(ValueError, match="carry soft labels of label space") as known:
        SoftLabels.from_dataset(wrong, LABELS)
    assert str(told.value) == str(known.value).replace("carry soft labels", "carry votes")
    long = table_of(id=["x"], source=["Ann"], label=["a"])
    with pytest.raises(ValueError, match="carry votes of label space"):
        add_votes(wrong.remove_columns("votes"), long, LABELS)


def test_a_long_table_of_abstentions_alone() -> None:
    rows = Dataset.from_dict({"id": ["x"]})
    got = add_votes(rows, table_of(id=["x"], source=["Ann"], label=[None]), LABELS)
    assert got["votes"][0] == [{"source": "Ann", "label_id": None, "prob": None}]
    assert not read_votes(got, LABELS).voted.any()


def test_votes_on_rows_with_one_id_are_refused() -> None:
    rows = Dataset.from_dict({"id": ["y", "x", "x"]})
    long = table_of(id=["y"], source=["Ann"], label=["a"])
    with pytest.raises(ValueError, match=r"the id 'x' is of several rows, .*; make ids unique"):
        add_votes(rows, long, LABELS)


def test_soft_votes_of_one_source_are_one_vote() -> None:
    votes = read_votes(one_row(("A", 2, 0.3), ("A", 0, 0.3), ("B", 1, 0.0), ("B", 0, 0.6)), LABELS)
    assert listed(votes) == [
        (0, 0, 0, pytest.approx(0.3)), (0, 0, 2, pytest.approx(0.3)),
        (0, 1, 0, pytest.approx(0.6)), (0, 1, 1, 0.0),
    ]  # fmt: skip
    hard = votes.hard()
    assert listed(hard) == [(0, 0, 0, 1.0), (0, 1, 0, 1.0)]
    assert votes.first().tolist() == [True, False, True, False]


def test_sources_with_the_same_number_of_votes_are_no_copies() -> None:
    votes = dense_votes(np.random.default_rng(0).integers(0, 3, (40, 5)))
    assert votes.identical() == []
    few = dense_votes(np.zeros((9, 2), dtype=int))
    assert few.identical() == []  # chance
