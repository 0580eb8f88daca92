from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import aggregate as reference

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.recipe.calls import Recipe, RecipeError, bind
from llmlabel.refine.aggregate import (
    aggregate,
    combine,
    committee_weights,
    consensus,
    consensus_confidence,
)
from llmlabel.refine.votes import read_votes
from llmlabel.softlabels import VOTES, SoftLabels

METHODS = (
    *("majority", "softmax", "wawa", "zbs", "glad", "mace", "dawid_skene", "mean_of_methods"),
)

LABELS = load_labels(["a", "b", "c"])


def source(probs: np.ndarray, labels: LabelSpace = LABELS) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    return SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict({"id": ids, "text": ids}))


def dense(dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0, 1.0, 1.0], size=(rng.integers(1, 6), 7))
    sources = {f"s{i}": source(p) for i, p in enumerate(probs)}
    got = aggregate(sources, LABELS)
    for row in range(7):
        expected = reference.log_average(probs[:, row].tolist())
        np.testing.assert_allclose(dense(got)[row], expected, atol=1e-6)
        confidence = reference.confidence(probs[:, row].tolist(), int(np.argmax(expected)))
        assert got["weight"][row] == pytest.approx(min(confidence, 1.0) ** 2, abs=1e-6)
    average = aggregate(sources, LABELS, method="average")
    np.testing.assert_allclose(dense(average), probs.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("spread", "members", "value"),
    [
        (0, 2, 1.0),
        (0, 3, 1.05),
        (0, 4, 1.1),
        (0, 5, 1.1),
        (0.35, 2, 0.965605),
        (0.35, 4, 1.062166),
        (1, 2, 0.904837),
    ],
)
def test_golden_consensus(spread: float, members: int, value: float) -> None:
    assert reference.consensus(spread, members) == pytest.approx(value, abs=1e-6)
    got = consensus(np.array([float(spread)]), np.array([members]))
    assert got[0] == pytest.approx(value, abs=1e-6)


def test_identical_sources_have_no_spread() -> None:
    probs = np.array([[[0.8, 0.1, 0.1]]] * 4)
    got = consensus_confidence(probs, np.array([0]))
    assert got[0] == pytest.approx(0.8 * 1.1, rel=1e-12)


def test_majority_and_weights() -> None:
    probs = [np.array([[0.6, 0.4, 0.0]]), np.array([[0.0, 0.9, 0.1]]), np.array([[0.1, 0.8, 0.1]])]
    sources = {n: source(p) for n, p in zip("xyz", probs, strict=True)}
    np.testing.assert_allclose(
        dense(aggregate(sources, LABELS, method="majority")), [[1 / 3, 2 / 3, 0]], atol=1e-6
    )
    weighted = aggregate(sources, LABELS, method="majority", weights={"x": 2.0, "y": 1.0, "z": 1.0})
    np.testing.assert_allclose(dense(weighted), [[0.5, 0.5, 0]], atol=1e-6)
    assert weighted["votes"][0] == [
        {"source": "x", "label_id": 0, "prob": pytest.approx(0.6)},
        {"source": "y", "label_id": 1, "prob": pytest.approx(0.9)},
        {"source": "z", "label_id": 1, "prob": pytest.approx(0.8)},
    ]
    assert weighted["engine"][0] == "x + y + z"


def test_who_has_no_label_does_not_vote() -> None:
    sources = {
        "x": source(np.array([[0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])),
        "y": source(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])),
    }
    for method in ("average", "log_average", "majority"):
        got = aggregate(sources, LABELS, method=method)
        assert got["label_ids"][0][0] == 0
        assert got["label_ids"][1] == []
        assert got["error"][:] == [None, "no source has a label"]
        assert [len(v) for v in got["votes"]] == [1, 0]
        assert got["weight"][1] == 0


def test_order_of_sources_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    parts = {n: source(rng.dirichlet([1.0] * 3, size=5)) for n in "abc"}
    one = aggregate(parts, LABELS)
    two = aggregate(dict(reversed(parts.items())), LABELS)
    np.testing.assert_allclose(dense(one), dense(two), atol=1e-7)
    np.testing.assert_allclose(one["weight"][:], two["weight"][:], atol=1e-7)


def test_multilabel_averages_only() -> None:
    labels = load_labels(["a", "b"], multilabel=True)
    sources = {
        "x": source(np.array([[0.9, 0.8]]), labels),
        "y": source(np.array([[0.5, 0.2]]), labels),
    }
    got = aggregate(sources, labels, method="average")
    np.testing.assert_allclose(dense(got, labels), [[0.7, 0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="single-label space; use average"):
        aggregate(sources, labels)


def test_bad_input() -> None:
    one = source(np.array([[0.5, 0.5, 0.0]]))
    two = source(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="'y' has other rows than 'x'"):
        aggregate({"x": one, "y": two}, LABELS)
    with pytest.raises(ValueError, match="at least one source"):
        aggregate({}, LABELS)
    with pytest.raises(ValueError, match=r"weights name \['z'\]"):
        aggregate({"x": one}, LABELS, weights={"z": 1.0})
    with pytest.raises(ValueError, match="at least 0"):
        aggregate({"x": one}, LABELS, weights={"x": -1.0})
    others = load_labels(["a", "b", "d"])
    other = source(np.array([[0.5, 0.5, 0.0]]), others)
    with pytest.raises(ValueError, match=r"source 'y': the rows carry soft labels of label space"):
        aggregate({"x": one, "y": other}, LABELS)
    with pytest.raises(ValueError, match="the column 'id' is missing"):
        aggregate({"x": one.remove_columns("id")}, LABELS)
    with pytest.raises(ValueError, match="'y' has other rows than 'x'"):
        aggregate({"x": one, "y": one.remove_columns("id")}, LABELS)


@pytest.mark.parametrize("seed", range(20))
def test_confidence_of_sources_that_do_not_all_vote(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([0.5] * 3, size=(5, 9))
    probs[rng.random((5, 9)) < 0.3] = 0.0
    label = rng.integers(0, 3, 9)
    got = consensus_confidence(probs, label)
    for row in range(9):
        there = [one for one in probs[:, row].tolist() if sum(one) > 0]
        assert got[row] == pytest.approx(reference.confidence(there, int(label[row])), abs=1e-12)


@pytest.mark.parametrize(
    ("per_cent", "temperature", "weights"),
    [
        ([64, 60.6, 51.6, 59.4, 56.4], 10, [0.32257, 0.229596, 0.093347, 0.203633, 0.150855]),
        ([56.4, 42.3, 52.5, 44.2, 40.6], 10, [0.412813, 0.100785, 0.279498, 0.121875, 0.085029]),
        ([64, 60.6], 5, [0.663739, 0.336261]),
    ],
)
def test_golden_committee_weights(
    per_cent: list[float], temperature: float, weights: list[float]
) -> None:
    accuracies = {str(n): accuracy / 100 for n, accuracy in enumerate(per_cent)}
    got = committee_weights(accuracies, temperature=float(temperature))
    assert list(got) == list(accuracies)
    assert list(got.values()) == pytest.approx(weights, abs=1e-6)


def test_broken_committee_weights() -> None:
    with pytest.raises(ValueError, match="shares between 0 and 1; that of 'x' is 64"):
        committee_weights({"x": 64.0})
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        committee_weights({"x": 0.6}, temperature=0.0)


def voted(*rows: list[tuple[str, int, float | None]]) -> Dataset:
    lists = [[{"source": s, "label_id": n, "prob": p} for s, n, p in row] for row in rows]
    ids = [f"r{n}" for n in range(len(rows))]
    return with_columns(Dataset.from_dict({"id": ids, "text": ids}), {"votes": (lists, VOTES)})


def test_votes_of_one_table() -> None:
    dataset = voted(
        [("Ann", 0, None), ("Bob", 0, None), ("Cid", 1, None)],
        [],
        [("Bob", 1, 0.6), ("Bob", 2, 0.4), ("Ann", 2, 1.0)],
    )
    got = aggregate(dataset, LABELS, method="majority")
    np.testing.assert_allclose(dense(got), [[2 / 3, 1 / 3, 0], [0, 0, 0], [0, 0.5, 0.5]], atol=1e-6)
    assert got["error"][:] == [None, "no source has a label", None]
    assert got["agreement"][:] == [2, 0, 1]
    assert got["engine"][0] == "Ann + Bob + Cid"
    assert got["votes"][:] == dataset["votes"][:]
    soft = aggregate(dataset, LABELS, method="majority", soft_votes=True)
    np.testing.assert_allclose(dense(soft)[2], [0, 0.3, 0.7], atol=1e-6)
    average = aggregate(dataset, LABELS, method="average")
    np.testing.assert_allclose(dense(average), dense(soft), atol=1e-6)
    # Ann 1 and Bob 0.4 for label 2: 0.7 + 0.3 x 1, alone: 0.95; the weight is the square
    bob = aggregate(dataset, LABELS, method="average")["weight"][2]
    assert bob == pytest.approx(0.95**2, abs=1e-6)
    strict = aggregate(dataset, LABELS, method="majority", min_agreement=2)
    assert [weight > 0 for weight in strict["weight"]] == [True, False, False]
    many = voted([(f"s{n}", 0, None) for n in range(9)])
    assert aggregate(many, LABELS)["engine"][0] == "9 sources"


@pytest.mark.parametrize("method", METHODS)
def test_tables_and_their_votes_give_the_same(method: str) -> None:
    rng = np.random.default_rng(0)
    sources = {n: source(rng.dirichlet([0.3] * 3, size=40)) for n in "abcd"}
    from_tables = aggregate(sources, LABELS, method=method)
    from_votes = aggregate(from_tables, LABELS, method=method)
    np.testing.assert_allclose(dense(from_tables), dense(from_votes), atol=1e-6)
    np.testing.assert_allclose(dense(from_tables).sum(axis=1), 1.0, atol=1e-6)
    cast = read_votes(from_tables, LABELS).hard()
    np.testing.assert_allclose(dense(from_tables), combine(cast, method), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_missing_mass_counts_as_in_dense_arrays(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([0.5] * 5, size=(4, 6))
    probs[rng.random((4, 6)) < 0.2] = 0.0
    labels = load_labels(list("abcde"))
    read = [SoftLabels.from_dense(one, labels).top(2) for one in probs]
    ids = Dataset.from_dict({"id": list("uvwxyz")})
    sources = {name: one.add_to(ids) for name, one in zip("nmop", read, strict=True)}
    weights = dict(zip("nmop", rng.uniform(0.5, 2, 4).tolist(), strict=True))
    votes = np.stack([one.dense().sum(axis=1) > 0 for one in read])
    share = votes * np.array(list(weights.values()))[:, None]
    share = share / np.where(share.sum(axis=0) > 0, share.sum(axis=0), 1)
    for method, values in (
        ("average", np.stack([one.dense() for one in read])),
        ("log_average", np.stack([one.log_dense() for one in read])),
    ):
        expected = (values * share[:, :, None]).sum(axis=0)
        if method == "log_average":
            expected = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
            expected *= votes.any(axis=0)[:, None]
        got = aggregate(sources, labels, method=method, weights=weights)
        np.testing.assert_allclose(dense(got, labels), expected, atol=1e-6)


def test_mean_of_methods_is_their_mean() -> None:
    rng = np.random.default_rng(1)
    dataset = aggregate({n: source(rng.dirichlet([0.3] * 3, size=40)) for n in "abc"}, LABELS)
    each = [dense(aggregate(dataset, LABELS, method=one)) for one in METHODS[:-1]]
    got = dense(aggregate(dataset, LABELS, method="mean_of_methods"))
    np.testing.assert_allclose(got, np.mean(each, axis=0), atol=1e-6)


def test_a_source_of_weight_0_has_no_say() -> None:
    one, two = np.array([[0.6, 0.4, 0.0]]), np.array([[0.0, 0.9, 0.1]])
    for method in ("average", "log_average", "majority", "softmax"):
        alone = aggregate({"x": source(one)}, LABELS, method=method)
        got = aggregate(
            {"x": source(one), "y": source(two)},
            LABELS,
            method=method,
            weights={"x": 1.0, "y": 0.0},
        )
        np.testing.assert_allclose(dense(got), dense(alone), atol=1e-7)
        assert got["weight"][:] == alone["weight"][:]
        assert got["votes"][:] == alone["votes"][:]


def test_a_prior_moves_dawid_skene() -> None:
    rng = np.random.default_rng(2)
    dataset = aggregate({n: source(rng.dirichlet([1.0] * 3, size=60)) for n in "abc"}, LABELS)
    even = aggregate(dataset, LABELS, method="dawid_skene", prior={"a": 0.4, "b": 0.3, "c": 0.3})
    rare = aggregate(dataset, LABELS, method="dawid_skene", prior={"a": 0.01, "b": 0.5, "c": 0.49})
    assert dense(rare)[:, 0].mean() < dense(even)[:, 0].mean()
    with pytest.raises(ValueError, match="prior has no share for the label 'c'"):
        aggregate(dataset, LABELS, method="dawid_skene", prior={"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mace", "weights": {"x": 1.0, "y": 1.0}}, "'mace' learns its own weights"),
        ({"method": "wawa", "abstention": "response"}, "abstention is for dawid_skene and"),
        ({"prior": {"a": 1.0, "b": 0.0, "c": 0.0}}, "prior is for dawid_skene and mean_of_"),
        ({"min_agreement": 0}, "min_agreement must be at least 1"),
    ],
)
def test_arguments_of_another_method(arguments: dict, message: str) -> None:
    one = source(np.array([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8]]))
    with pytest.raises(ValueError, match=message):
        aggregate({"x": one, "y": one}, LABELS, **arguments)


def test_combine_counts_votes() -> None:
    votes = read_votes(voted([("Ann", 0, None)]), LABELS)
    with pytest.raises(ValueError, match="'average' takes distributions"):
        combine(votes, "average")


def test_nobody_voted() -> None:
    for method in ("average", "log_average", *METHODS):
        got = aggregate(voted([], []), LABELS, method=method)
        assert got["label_ids"][:] == [[], []]
        assert got["error"][:] == ["no source has a label"] * 2
        assert got["weight"][:] == [0.0, 0.0]


@pytest.mark.parametrize("method", ["average", "log_average", "majority", "softmax", "wawa"])
def test_votes_of_probability_0_are_none(method: str) -> None:
    dataset = voted([("Ann", 1, 0.0), ("Bob", 2, 0.8)], [("Ann", 1, 0.0)])
    alone = voted([("Bob", 2, 0.8)], [])
    got = aggregate(dataset, LABELS, method=method)
    assert dense(got).tolist() == dense(aggregate(alone, LABELS, method=method)).tolist()
    assert got["error"][:] == [None, "no source has a label"]
    assert got["weight"][1] == 0
    zero = {"label_ids": ([[0, 1]] * 2, List(Value("int32")))}
    zero["label_probs"] = ([[0.0, 0.0]] * 2, List(Value("float32")))
    mute = with_columns(source(np.eye(3)[:2]), zero)
    tables = {"mute": mute, "x": source(np.array([[0.2, 0.0, 0.8], [0.0, 0.0, 0.0]]))}
    got = aggregate(tables, LABELS, method=method)
    assert got["error"][:] == [None, "no source has a label"]
    assert got["agreement"][:] == [1, 0]
    assert [len(votes) for votes in got["votes"]] == [1, 0]


def test_one_table_keeps_its_own_errors() -> None:
    rows = voted([("Ann", 0, None)], [], [("Ann", 0, None)], [])
    own = ["pattern 'x' took too long", "a question could not be read", None, None]
    rows = with_columns(rows, {"error": (own, Value("string"))})
    got = aggregate(rows, LABELS, method="majority")
    silent = "no source has a label"
    assert got["error"][:] == [own[0], f"{silent}; {own[1]}", None, silent]
    again = aggregate(got, LABELS, method="majority")
    assert again["error"][:] == got["error"][:]


def test_what_an_earlier_consensus_said_of_a_row_is_not_kept() -> None:
    rows = voted([("Ann", 0, None), ("Bob", 1, None)], [("Bob", 1, None)])
    first = aggregate(rows, LABELS, method="majority", weights={"Ann": 1.0, "Bob": 0.0})
    assert first["error"][:] == [None, "no source has a label"]
    assert aggregate(first, LABELS, method="majority")["error"][:] == [None, None]


def test_rows_that_a_selector_left_out_stay_out() -> None:
    weights = {"weight": ([0.0, 0.3, None], Value("float32"))}
    one = with_columns(source(np.array([[1.0, 0.0, 0.0]] * 3)), weights)
    other = source(np.array([[1.0, 0.0, 0.0]] * 3))
    assert aggregate({"x": one, "y": other}, LABELS)["weight"][:] == [0, 1, 1]
    assert aggregate({"y": other, "x": one}, LABELS)["weight"][:] == [1, 1, 1]
    rows = with_columns(voted(*[[("Ann", 0, None), ("Bob", 0, None)]] * 3), weights)
    assert aggregate(rows, LABELS, method="majority")["weight"][:] == [0, 1, 1]


def test_a_recipe_gives_one_table_or_several() -> None:
    labels = {"call": "llmlabel.labelspace.load_labels", "source": ["a", "b"]}
    rows = {"call": "llmlabel.data.load", "path": "texts.jsonl"}
    step = {"call": "llmlabel.refine.aggregate.aggregate", "labels": "${labels}"}
    accuracies = {"call": "llmlabel.refine.aggregate.committee_weights", "accuracies": {"x": 0.5}}
    assignments = {
        **{"labels": labels, "rows": rows, "accuracies": accuracies},
        "votes": {**step, "sources": "${rows}", "method": "dawid_skene"},
        "tables": {**step, "sources": {"x": "${rows}"}, "weights": "${accuracies}"},
    }
    bound = bind(Recipe("r", Path("r.yaml"), assignments), check_files=False)
    assert list(bound) == list(assignments)
    assignments["votes"]["method"] = "dawid"
    with pytest.raises(RecipeError, match="dawid"):
        bind(Recipe("r", Path("r.yaml"), assignments), check_files=False)
    assignments["votes"] = {**step, "sources": {"x": "no table"}}
    with pytest.raises(RecipeError, match=r"votes\.sources"):
        bind(Recipe("r", Path("r.yaml"), assignments), check_files=False)
