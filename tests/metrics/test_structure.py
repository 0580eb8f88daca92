import numpy as np
import pytest
from metrics.cases import SEEDS
from reference import hierarchical as twins
from reference import metrics as reference

from llmlabel import metrics
from llmlabel.labelspace import LabelSpace, load_labels


def random_space(rng: np.random.Generator, *, most_parents: int) -> LabelSpace:
    """Labels in random order, each with up to so many parents; one root or several."""
    size, names = int(rng.integers(2, 16)), rng.permutation(16)
    entries = []
    for n in range(size):
        some = int(rng.integers(0 if rng.random() < 0.3 else 1, most_parents + 1)) if n else 0
        parents = rng.choice(n, min(some, n), replace=False) if n else []
        entries.append({"id": f"l{names[n]}", "parents": [f"l{names[p]}" for p in parents]})
    return load_labels([entries[i] for i in rng.permutation(size)])


@SEEDS
@pytest.mark.parametrize("most_parents", [1, 3])
def test_scores_of_hierarchies_equal_the_twins(seed: int, most_parents: int) -> None:
    rng = np.random.default_rng(seed)
    labels = random_space(rng, most_parents=most_parents)
    guesses, gold = rng.integers(-1, len(labels), (2, int(rng.integers(1, 40))))
    twin = guesses.tolist(), gold.tolist(), labels.parent_positions
    scores = metrics.hierarchical_scores(guesses, gold, labels)
    assert scores == pytest.approx(twins.hierarchical_scores(*twin), rel=1e-12)
    error = metrics.tree_induced_error(guesses, gold, labels)
    assert error == pytest.approx(twins.tree_induced_error(*twin), rel=1e-12)
    assert metrics.tree_induced_error(gold, guesses, labels) == pytest.approx(error)


@SEEDS
def test_scores_of_clusters_equal_the_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assigned, gold = rng.integers(-1, 5, (2, 40))
    kept = gold >= 0
    pair = assigned[kept].tolist(), gold[kept].tolist()
    scores = metrics.cluster_scores(assigned, gold)
    assert scores["nmi"] == pytest.approx(twins.nmi(*pair), abs=1e-12)
    assert scores["ari"] == pytest.approx(twins.ari(*pair), abs=1e-12)


def test_hierarchical_scores_of_a_known_case() -> None:
    """Two trees; hiclass 5.0 gives the same three numbers for these four rows."""
    labels = load_labels(
        ["a", "b", *({"id": id, "parent": id[:-1]} for id in ("a0", "a1", "b0", "a00"))]
    )
    at = labels.index
    guesses = np.array([at("a1"), at("a"), at("b0"), at("a00")])
    gold = np.array([at("a0"), at("a00"), at("a0"), at("a00")])
    # sizes of the sets: predicted 2 1 2 3, gold 2 3 2 3, in both 1 1 0 3
    scores = metrics.hierarchical_scores(guesses, gold, labels)
    assert scores == pytest.approx({"precision": 5 / 8, "recall": 5 / 10, "f1": 10 / 18})
    assert metrics.tree_induced_error(guesses, gold, labels) == pytest.approx((2 + 2 + 4 + 0) / 4)


def test_the_only_root_is_in_no_ancestor_set() -> None:
    labels = load_labels(["top", {"id": "a", "parent": "top"}, {"id": "b", "parent": "top"}])
    scores = metrics.hierarchical_scores(np.array([1, 0]), np.array([2, 2]), labels)
    assert scores == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    half = metrics.hierarchical_scores(np.array([2, 0]), np.array([2, 2]), labels)
    assert half == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})


def test_no_answer_lies_above_the_roots() -> None:
    labels = load_labels(["a", "b", {"id": "a0", "parent": "a"}])
    assert metrics.tree_induced_error(np.array([-1]), np.array([2]), labels) == 2
    assert metrics.tree_induced_error(np.array([1]), np.array([-1]), labels) == 1
    assert metrics.tree_induced_error(np.array([-1]), np.array([-1]), labels) == 0
    empty = metrics.hierarchical_scores(np.array([-1]), np.array([2]), labels)
    assert empty == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_the_shorter_of_two_ways_counts() -> None:
    """c lies below a (two edges, by b) and directly below a; d below a."""
    labels = load_labels(
        ["a", *({"id": c, "parents": list(p)} for c, p in [("b", "a"), ("c", "ba"), ("d", "a")])]
    )
    assert metrics.tree_induced_error(np.array([2]), np.array([3]), labels) == 2


def test_an_edge_given_twice_counts_once() -> None:
    gold = [("cat", "animal"), ("dog", "animal"), ("dog", "animal"), ("oak", "plant")]
    guesses = [("cat", "animal"), ("cat", "animal"), ("animal", "cat")]
    scores = metrics.edge_scores(guesses, gold)
    assert scores == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5})
    assert metrics.edge_scores([], gold) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_rows_assigned_to_nothing_are_one_group() -> None:
    gold = np.array([0, 0, 1, 1, -1])
    assert metrics.cluster_scores(np.array([5, 5, -1, -1, 5]), gold) == {
        "nmi": pytest.approx(1.0),
        "ami": pytest.approx(1.0),
        "ari": 1.0,
    }
    split = metrics.cluster_scores(np.array([0, 1, 0, 1, 0]), gold)
    assert split["ami"] < split["nmi"] + 1e-9 < 0.1
    with pytest.raises(ValueError, match="none of the 1 rows has a gold group"):
        metrics.cluster_scores(np.array([0]), np.array([-1]))


@SEEDS
def test_modularity_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges, scores = rng.integers(0, 8, (15, 2)), rng.random((8, 3)) * (rng.random((8, 1)) < 0.8)
    total = scores.sum(axis=1, keepdims=True)
    shares = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
    expected = reference.modularity([tuple(edge) for edge in edges.tolist()], shares.tolist())
    assert metrics.label_modularity(edges, scores) == pytest.approx(expected, abs=1e-12)


def test_modularity_of_two_blocks_equals_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    rng = np.random.default_rng(0)
    block = np.arange(40) % 2
    likely = np.where(block[:, None] == block, 0.4, 0.05)
    edges = np.argwhere(np.triu(rng.random((40, 40)) < likely, k=1))
    graph = networkx.Graph(edges.tolist())
    sets = [set(np.flatnonzero(block == side).tolist()) for side in (0, 1)]
    expected = networkx.community.modularity(graph, sets)
    assert expected > 0.2
    got = metrics.label_modularity(edges, 0.3 * np.eye(2)[block])
    assert got == pytest.approx(expected, abs=1e-9)
    mixed = metrics.label_modularity(edges, rng.random((40, 2)))
    assert mixed < expected / 2
    with pytest.raises(ValueError, match="at least one edge"):
        metrics.label_modularity(np.zeros((0, 2), dtype=np.int64), np.eye(2))
