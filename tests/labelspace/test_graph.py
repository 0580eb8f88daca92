import numpy as np
import pytest
from reference import graph as slow
from scipy.sparse import csr_array

from llmlabel.labelspace import LabelSpace, graph, load_labels

TREE = load_labels(
    [
        {"id": "dog", "parent": "animal"},
        "animal",
        {"id": "poodle", "parent": "dog"},
        {"id": "cat", "parent": "animal"},
        "stone",
        {"id": "toy", "name": "toy poodle", "parents": ["poodle", "small"]},
        {"id": "small", "parent": "stone"},
    ]
)
DOG, ANIMAL, POODLE, CAT, STONE, TOY, SMALL = range(7)


def test_neighbours() -> None:
    assert not TREE.is_flat
    assert load_labels(["a", "b"]).is_flat
    assert TREE.parent_positions[TOY] == (POODLE, SMALL)
    assert TREE.children[ANIMAL] == (DOG, CAT)
    assert TREE.roots == (ANIMAL, STONE)
    assert TREE.leaves == (CAT, TOY)


def test_ancestors_and_descendants() -> None:
    assert graph.ancestors(TREE, TOY) == [DOG, ANIMAL, POODLE, STONE, SMALL]
    assert graph.ancestors(TREE, TOY, itself=True) == [DOG, ANIMAL, POODLE, STONE, TOY, SMALL]
    assert graph.descendants(TREE, DOG) == [POODLE, TOY]
    assert graph.descendants(TREE, DOG, itself=True) == [DOG, POODLE, TOY]


def test_paths_and_their_names() -> None:
    assert graph.paths(TREE, TOY) == [(ANIMAL, DOG, POODLE, TOY), (STONE, SMALL, TOY)]
    assert graph.paths(TREE, TOY, most=1) == [(ANIMAL, DOG, POODLE, TOY)]
    assert graph.path_names(TREE)[TOY] == "animal > dog > poodle > toy poodle"
    assert graph.path_names(TREE, separator="/")[STONE] == "stone"


def test_depths_take_the_shortest_way() -> None:
    assert graph.depths(TREE).tolist() == [1, 0, 2, 1, 0, 2, 1]


def test_answers_stop_where_more_stops_than_goes_on() -> None:
    probs = np.zeros((5, 7))
    probs[0, [DOG, CAT]] = 0.4, 0.6
    probs[1, [DOG, POODLE, CAT]] = 0.5, 0.3, 0.2
    probs[2, [STONE, CAT]] = 0.5, 0.5  # equal: the first root, then on to its only child
    probs[3, [ANIMAL, POODLE]] = 0.5, 0.5
    assert graph.answers(probs, TREE).tolist() == [CAT, DOG, CAT, ANIMAL, -1]
    assert graph.answers(csr_array(probs), TREE).tolist() == [CAT, DOG, CAT, ANIMAL, -1]


def test_answers_in_a_flat_space_are_the_most_probable() -> None:
    flat = load_labels(["a", "b", "c"])
    assert graph.answers(np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0]]), flat).tolist() == [1, -1]


def test_two_roots_are_two_edges_apart() -> None:
    assert graph.distances_from(TREE, CAT).tolist() == [2, 1, 3, 0, 3, 4, 4]


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definitions(seed: int) -> None:
    labels = slow.random_dag(seed)
    n = len(labels)
    rng = np.random.default_rng(seed)
    place = {label: at for at, label in enumerate(graph.order(labels).tolist())}
    assert sorted(place) == list(range(n))
    assert all(place[p] < place[i] for i in range(n) for p in labels.parent_positions[i])
    assert [set(line) for line in labels.ancestors] == [slow.above(labels, i) for i in range(n)]
    assert [[j for j in range(n) if i in slow.above(labels, j)] for i in range(n)] == [
        graph.descendants(labels, i, itself=True) for i in range(n)
    ]
    far = slow.distances(labels)
    assert [graph.distances_from(labels, i).tolist() for i in range(n)] == far
    shortest = [min(map(len, slow.paths(labels, i))) - 1 for i in range(n)]
    assert graph.depths(labels).tolist() == shortest
    for i in range(n):
        found = graph.paths(labels, i, most=10_000)
        assert len(found) == len(set(found))
        assert set(found) == slow.paths(labels, i)
        for j in range(n):
            expected = slow.lowest_common_ancestors(labels, i, j)
            assert graph.lowest_common_ancestors(labels, i, j) == sorted(expected)
    assert graph.lowest_common_ancestors(labels) == []
    for count in (1, 3):
        some = rng.integers(n, size=count).tolist()
        common = set.intersection(*(slow.above(labels, i) for i in some))
        expected = {c for c in common if not any(c in slow.above(labels, d) for d in common - {c})}
        assert graph.lowest_common_ancestors(labels, *some) == sorted(expected)
    probs = rng.dirichlet(np.ones(n), size=5) * (rng.random((5, n)) < 0.6)
    expected_probs = np.array(slow.node_probs(probs.tolist(), labels))
    np.testing.assert_allclose(graph.node_probs(probs, labels), expected_probs, atol=1e-12)
    sparse = graph.node_probs(csr_array(probs), labels)
    np.testing.assert_allclose(sparse.toarray(), expected_probs, atol=1e-12)
    slowly = [slow.answer(row, labels) for row in probs.tolist()]
    assert graph.answers(probs, labels).tolist() == slowly


@pytest.mark.parametrize("seed", range(10))
def test_a_parent_has_at_least_what_its_children_have(seed: int) -> None:
    labels = slow.random_dag(seed + 100)
    probs = np.random.default_rng(seed).dirichlet(np.ones(len(labels)), size=4)
    mass = graph.node_probs(probs, labels)
    for child, parents in enumerate(labels.parent_positions):
        for parent in parents:
            assert (mass[:, parent] >= mass[:, child] - 1e-12).all()


def test_deep_and_wide_spaces_need_no_recursion() -> None:
    ids = [f"{i}" for i in range(6_000)]
    chain = LabelSpace(tuple(ids), tuple(ids), ("",) * 6_000, ((), *[(id,) for id in ids[:-1]]))
    assert graph.depths(chain)[-1] == 5_999
    assert graph.distances_from(chain, 0)[-1] == 5_999
    assert graph.path_names(chain, separator="/")[-1].count("/") == 5_999
    ids = [f"{i}" for i in range(20_001)]
    star = LabelSpace(tuple(ids), tuple(ids), ("",) * 20_001, ((), *[("0",)] * 20_000))
    assert len(star.children[0]) == 20_000
    probs = np.zeros((1, 20_001))
    probs[0, [0, 7]] = 0.2, 0.8
    assert graph.answers(probs, star).tolist() == [7]
