import itertools
import math

import numpy as np
import pytest
from datasets import Dataset, List, Value
from pydantic import TypeAdapter
from reference import pac as reference

from llmlabel.calibrate import cuts as module
from llmlabel.calibrate.cuts import BUDGETS, Tree, kept_nodes, subtree_ends
from llmlabel.calibrate.pac import (
    Pac,
    PacTree,
    allowed_errors,
    fit_pac,
    fit_pac_tree,
    pac_threshold,
    predict_pac,
    predict_tree,
)
from llmlabel.calibrate.scores import Nonconformity
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
HOLES = pytest.mark.parametrize("holes", [1, 2, 3, 4])


def space(labels: int, *, multilabel: bool = False) -> LabelSpace:
    names = tuple(f"label {k}" for k in range(labels))
    return LabelSpace(names, names, ("",) * labels, ((),) * labels, multilabel)


def random_parents(rng: np.random.Generator, nodes: int) -> list[int]:
    """A random tree in preorder: each node below the last one or somebody above it."""
    parents, line = [-1], [0]
    for node in range(1, nodes):
        line = line[: int(rng.integers(1, len(line) + 1))]
        parents.append(line[-1])
        line.append(node)
    return parents


def random_tree(seed: int, nodes: int = 12) -> Tree:
    """Costs are multiples of 1/8, so that many sums are equal to a budget and to each other."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 9, nodes) / 8 * (rng.random(nodes) < 0.7)
    contents = tuple(map(str, range(nodes)))
    return Tree(np.array(random_parents(rng, nodes)), costs, contents)


def rows(probs: list[list[float]], gold: list[list[int]]) -> Dataset:
    table = Dataset.from_dict({"id": [f"r{i}" for i in range(len(gold))], "gold": gold})
    return SoftLabels.from_dense(np.array(probs), space(len(probs[0]))).add_to(table)


# ------------------------------------------------------------------------------------ thresholds


@pytest.mark.parametrize(
    ("n", "epsilon", "delta", "errors"),
    [(100, 0.1, 0.05, 4), (500, 0.1, 0.1, 40), (90, 0.2, 0.1, 12), (1000, 0.05, 0.01, 34)],
)
def test_allowed_errors_of_the_reference_code(n, epsilon, delta, errors) -> None:
    assert allowed_errors(n, epsilon=epsilon, delta=delta) == errors
    assert reference.allowed(n, epsilon, delta) == errors


@SEEDS
def test_allowed_errors_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, epsilon, delta = int(rng.integers(20, 200)), rng.integers(10, 50) / 100, 0.02 * (1 + seed)
    expected = reference.allowed(n, epsilon, delta)
    assert allowed_errors(n, epsilon=epsilon, delta=delta) == expected
    scores = rng.integers(0, 30, n) / 8
    found = pac_threshold(scores, epsilon=epsilon, delta=delta)
    assert found == reference.threshold(scores.tolist(), expected)


def test_too_few_rows_certify_nothing() -> None:
    assert allowed_errors(29, epsilon=0.1, delta=0.05) == 0  # 0.9^29 = 0.0471
    with pytest.raises(
        ValueError, match=r"cannot certify: .* need n >= 29 gold rows; there are 28"
    ):
        allowed_errors(28, epsilon=0.1, delta=0.05)
    with pytest.raises(ValueError, match=r"cannot certify: .* need n >= 29 gold rows; there are 0"):
        allowed_errors(0, epsilon=0.1, delta=0.05)
    with pytest.raises(ValueError, match="epsilon must lie strictly between 0 and 1; got 0"):
        allowed_errors(28, epsilon=0.0, delta=0.05)
    with pytest.raises(ValueError, match=r"delta must lie strictly between 0 and 1; got 1.5"):
        allowed_errors(28, epsilon=0.1, delta=1.5)


def test_flat_sets_by_hand() -> None:
    # 46 rows allow one error at epsilon 0.1 and delta 0.05 (reference.allowed).
    probs = [[0.5 + i / 128, 0.5 - i / 128] for i in range(46)]
    gold = [[0]] * 46
    fitted = fit_pac(rows(probs, gold), space(2), epsilon=0.1, delta=0.05)
    assert (fitted.errors, fitted.rows) == (reference.allowed(46, 0.1, 0.05), 46) == (1, 46)
    assert fitted.threshold == 0.5 - 1 / 128  # of the row with the second smallest probability
    new = rows([[0.5, 0.5], [0.25, 0.75], [65 / 128, 63 / 128]], [[]] * 3)
    sets = predict_pac(new, space(2), fitted)
    assert sets["set_ids"][:] == [[], [1], [0]]
    assert sets.features["set_ids"] == List(Value("int32"))
    adapter = TypeAdapter(Pac)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_gold_that_is_not_stored_counts_as_an_error() -> None:
    probs = [[0.75, 0.25, 0.0]] * 46
    one = fit_pac(rows(probs, [[0]] * 45 + [[2]]), space(3))
    assert one.threshold == 0.25
    line = (
        r"epsilon=0.1 is unreachable: only 44 of 46 gold rows have their true label among the labels "
        r"stored \(shortlist recall 0.98, 1 rows with none of the labels\); store more labels a row, "
        "or allow a larger epsilon"
    )
    with pytest.raises(ValueError, match=line):
        fit_pac(rows(probs, [[0]] * 44 + [[2], []]), space(3))


def test_flat_sets_take_any_score() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 60)
    gold = [[int(rng.choice(4, p=p))] for p in probs]
    data = rows(probs.tolist(), gold)
    fitted = fit_pac(data, space(4), epsilon=0.3, score=Nonconformity("aps"), seed=3)
    sets = predict_pac(data, space(4), fitted)["set_ids"][:]
    misses = sum(g[0] not in ids for g, ids in zip(gold, sets, strict=True))
    assert misses == fitted.errors
    order = rng.permutation(60)
    again = fit_pac(data.select(order), space(4), epsilon=0.3, score=Nonconformity("aps"), seed=3)
    assert again == fitted


def test_flat_refusals() -> None:
    data = rows([[0.5, 0.5]] * 46, [[0]] * 46)
    with pytest.raises(ValueError, match="multi-label"):
        fit_pac(data, space(2, multilabel=True))
    fitted = fit_pac(data, space(2))
    with pytest.raises(ValueError, match=r"was fitted in label space"):
        predict_pac(data, space(3), fitted)


# ------------------------------------------------------------------------------------------ trees


@HOLES
@SEEDS
def test_one_budget_keeps_as_many_nodes_as_brute_force(seed: int, holes: int) -> None:
    tree = random_tree(seed, nodes=3 + seed % 10)
    parents, costs = tuple(tree.parents.tolist()), tree.costs.tolist()
    possible = reference.partial_trees(parents, holes)
    for budget in (0.0, 0.125, 0.5, 1.0, 2.0, sum(costs)):
        kept = kept_nodes(tree, holes=holes, budgets=[budget])[0]
        nodes = frozenset(np.flatnonzero(kept).tolist())
        assert nodes in possible
        assert tree.costs[kept].sum() <= budget
        assert len(nodes) == reference.most_kept(parents, costs, budget, holes)


@HOLES
@SEEDS
def test_each_step_of_the_family_equals_brute_force(seed: int, holes: int) -> None:
    tree = random_tree(seed)
    parents, costs = tuple(tree.parents.tolist()), tree.costs.tolist()
    budgets = (0.0, 0.25, 0.625, 1.0, 1.5, 2.5, 4.0)
    for anchor in (0, 3, 6):
        family = kept_nodes(tree, holes=holes, budgets=budgets, anchor=anchor)
        sets = [frozenset(np.flatnonzero(kept).tolist()) for kept in family]
        assert all(tight <= loose for tight, loose in itertools.pairwise(sets))
        for level, (kept, budget) in enumerate(zip(sets, budgets, strict=True)):
            limits = {}
            if level > anchor:
                limits["holding"] = sets[level - 1]
            if level < anchor:
                limits["inside"] = sets[level + 1]
            assert kept in reference.partial_trees(parents, holes)
            assert sum(costs[node] for node in kept) <= budget
            expected = reference.most_kept(parents, costs, budget, holes, **limits)
            assert len(kept) == expected


def test_a_path_keeps_what_its_budget_pays() -> None:
    tree = Tree(np.arange(4) - 1, np.array([0.5, 0.25, 1.0, 0.25]), tuple("abcd"))
    kept = kept_nodes(tree, budgets=[0.25, 0.5, 1.0, 1.75, 2.0])
    assert kept.sum(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_an_impossible_node_is_never_kept() -> None:
    tree = Tree(np.array([-1, 0, 0]), np.array([0.0, np.inf, 0.0]))
    assert kept_nodes(tree)[-1].tolist() == [True, False, True]
    assert kept_nodes(Tree(np.empty(0, int), np.empty(0))).shape == (len(BUDGETS), 0)


@HOLES
def test_a_large_tree_stays_valid_nested_and_close(
    holes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few candidates and coarse cells: the costs are exact, only nodes may be lost."""
    rng = np.random.default_rng(holes)
    tree = Tree(np.array(random_parents(rng, 300)), rng.exponential(0.05, 300))
    exact = kept_nodes(tree, holes=holes, anchor=20)
    monkeypatch.setattr(module, "_CANDIDATES", 60)
    monkeypatch.setattr(module, "_CELLS", 40)
    rough = kept_nodes(tree, holes=holes, anchor=20)
    ends = subtree_ends(tree.parents)
    assert (rough[:-1] <= rough[1:]).all()
    for kept, budget in zip(rough, BUDGETS, strict=True):
        assert tree.costs[kept].sum() <= budget
        cut = [v for v in range(300) if not kept[v] and (v == 0 or kept[tree.parents[v]])]
        assert len(cut) <= holes
        assert not any(kept[v : ends[v]].any() for v in cut)
    assert rough[20].sum() <= exact[20].sum()
    assert rough.sum() >= 0.9 * exact.sum()


@SEEDS
def test_the_chosen_budget_makes_the_allowed_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trees, gold = [], []
    for i in range(40):
        tree = random_tree(100 * seed + i, nodes=8)
        trees.append(tree)
        right = rng.random(8) < np.exp(-tree.costs)
        gold.append([content for content, true in zip(tree.contents, right, strict=True) if true])
    fitted = fit_pac_tree(trees, gold, epsilon=0.3, delta=0.1, holes=2)
    allowed = reference.allowed(40, 0.3, 0.1)

    families = [kept_nodes(tree, holes=2) for tree in trees]

    def errors(level: int) -> int:
        return sum(
            any(tree.contents[v] not in true for v in np.flatnonzero(kept[level]))
            for tree, true, kept in zip(trees, gold, families, strict=True)
        )

    assert fitted.level == max((t for t in range(24) if errors(t) <= allowed), default=-1)
    assert fitted.errors == (errors(fitted.level) if fitted.level >= 0 else 0)
    for tree, whole in zip(trees[:5], families[:5], strict=True):
        expected = whole[fitted.level] if fitted.level >= 0 else np.zeros(8, bool)
        assert predict_tree(tree, fitted).tolist() == expected.tolist()
    adapter = TypeAdapter(PacTree)
    assert adapter.validate_json(adapter.dump_json(fitted)) == fitted


def test_a_tree_that_is_always_wrong_certifies_the_empty_tree() -> None:
    tree = Tree(np.array([-1]), np.array([0.0]), ("a",))
    fitted = fit_pac_tree([tree] * 40, [["b"]] * 40)
    assert (fitted.level, fitted.errors) == (-1, 0)
    assert predict_tree(tree, fitted).tolist() == [False]


def test_tree_refusals() -> None:
    tree = Tree(np.array([-1, 0]), np.zeros(2), ("a", "b"))
    with pytest.raises(ValueError, match="holes must be at least 1"):
        kept_nodes(tree, holes=0)
    with pytest.raises(ValueError, match=r"budgets must ascend"):
        kept_nodes(tree, budgets=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"budgets must be numbers from 0 on"):
        kept_nodes(tree, budgets=[math.inf])
    with pytest.raises(ValueError, match="anchor must be a place among the 1 budgets; got 1"):
        kept_nodes(tree, budgets=[1.0], anchor=1)
    with pytest.raises(ValueError, match="cannot certify"):
        fit_pac_tree([tree] * 20, [["a"]] * 20)
    with pytest.raises(ValueError, match="2 trees do not fit 1 gold answers"):
        fit_pac_tree([tree] * 2, [["a"]])
    with pytest.raises(ValueError, match="node 1 has the parent 2"):
        subtree_ends(np.array([-1, 2, 0]))
    with pytest.raises(ValueError, match="one tree in preorder"):
        subtree_ends(np.array([-1, 0, 0, 1]))
    with pytest.raises(ValueError, match="node 1 has the parent -1"):
        subtree_ends(np.array([-1, -1]))
