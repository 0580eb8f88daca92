import numpy as np
import pytest
from reference import hierarchical as twins
from reference import metrics as reference

from llmlabel import metrics
from llmlabel.labelspace import LabelSpace, load_labels

SEEDS = pytest.mark.parametrize("seed", range(20))


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties and rows of zeros; gold with rows of none of these."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(1, 60)), int(rng.integers(2, 7))
    probs = rng.integers(0, 5, (rows, labels)).astype(np.float64)
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1)
    probs[rng.random(rows) < 0.1] = 0
    return probs, rng.integers(-1, labels, rows)


def random_sets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 40)), int(rng.integers(2, 7))
    return rng.random(shape) < 0.4, rng.random(shape) < 0.3


@SEEDS
def test_scores_of_probabilities_equal_the_twins(seed: int) -> None:
    probs, gold = random_case(seed)
    labels = probs.shape[1]
    guesses = metrics.predicted(probs)
    twin = probs.tolist(), gold.tolist()
    assert guesses.tolist() == reference.predicted(twin[0])
    assert metrics.accuracy(probs, gold) == pytest.approx(reference.accuracy(*twin))
    assert metrics.nll(probs, gold) == pytest.approx(reference.nll(*twin, 1e-12), rel=1e-12)
    assert metrics.nll(probs, gold, floor=0.2) == pytest.approx(reference.nll(*twin, 0.2))
    assert metrics.brier(probs, gold) == pytest.approx(reference.brier(*twin), rel=1e-12)
    expected = reference.confusion(guesses.tolist(), gold.tolist(), labels)
    assert metrics.confusion(guesses, gold, labels).tolist() == expected
    assert metrics.macro_f1(guesses, gold, labels) == pytest.approx(
        reference.macro_f1(guesses.tolist(), gold.tolist(), labels), rel=1e-12
    )


@SEEDS
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_reliability_equals_the_twin(seed: int, bins: int) -> None:
    probs, gold = random_case(seed)
    table = metrics.reliability(probs, gold, bins=bins)
    for column, twin in zip(
        table, reference.reliability(probs.tolist(), gold.tolist(), bins), strict=True
    ):
        np.testing.assert_allclose(column, twin, rtol=1e-12)
    expected = reference.ece(probs.tolist(), gold.tolist(), bins)
    assert metrics.ece(probs, gold, bins=bins) == pytest.approx(expected, rel=1e-12)


@SEEDS
def test_risk_coverage_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 50))
    confidence, correct = rng.integers(0, 20, rows) / 20, rng.random(rows) < 0.7
    twin = confidence.tolist(), correct.tolist()
    coverages, risks = metrics.risk_coverage(confidence, correct)
    np.testing.assert_allclose([coverages, risks], reference.risk_coverage(*twin), rtol=1e-12)
    area = metrics.aurc(confidence, correct)
    assert area == pytest.approx(reference.aurc(*twin), rel=1e-12)
    order = rng.permutation(rows)
    assert metrics.aurc(confidence[order], correct[order]) == area


@SEEDS
def test_scores_of_sets_equal_the_twins(seed: int) -> None:
    guesses, gold = random_sets(seed)
    twin = guesses.tolist(), gold.tolist()
    assert metrics.micro_f1(guesses, gold) == pytest.approx(reference.micro_f1(*twin), rel=1e-12)
    macro = metrics.macro_f1_multilabel(guesses, gold)
    assert macro == pytest.approx(reference.macro_f1_multilabel(*twin), rel=1e-12)
    assert metrics.set_size(guesses) == pytest.approx(reference.set_size(twin[0]))
    truth = np.random.default_rng(seed).integers(-1, guesses.shape[1], len(guesses))
    expected = reference.coverage(twin[0], truth.tolist())
    assert metrics.coverage(guesses, truth) == pytest.approx(expected)


@SEEDS
def test_binomial_interval_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = int(rng.integers(1, 40))
    successes = int(rng.integers(0, trials + 1))
    level = float(rng.choice([0.9, 0.95, 0.99]))
    interval = metrics.binomial_interval(successes, trials, level=level)
    assert interval == pytest.approx(reference.binomial_interval(successes, trials, level))


def test_binomial_interval_of_textbook_cases() -> None:
    assert metrics.binomial_interval(0, 10) == pytest.approx((0.0, 0.30849710))
    assert metrics.binomial_interval(10, 10) == pytest.approx((0.69150290, 1.0))
    assert metrics.binomial_interval(5, 10) == pytest.approx((0.18708603, 0.81291397))


def test_a_row_that_was_not_read_is_wrong() -> None:
    probs = np.array([[0.0, 0.0], [0.4, 0.6]])
    assert metrics.predicted(probs).tolist() == [-1, 1]
    assert metrics.accuracy(probs, np.array([-1, 1])) == 0.5  # -1 is not what -1 predicts
    assert metrics.accuracy(probs, np.array([0, 1])) == 0.5
    assert metrics.brier(probs, np.array([0, 1])) == pytest.approx((1 + 0.32) / 2)


def test_a_tie_goes_to_the_lower_id() -> None:
    assert metrics.predicted(np.array([[0.2, 0.4, 0.4]])).tolist() == [1]


def test_f1_leaves_out_labels_that_do_not_occur() -> None:
    guesses, gold = np.array([0, 0, 1, -1]), np.array([0, 1, 1, -1])
    assert metrics.macro_f1(guesses, gold, 2) == pytest.approx(2 / 3)
    assert metrics.macro_f1(guesses, gold, 50) == pytest.approx(2 / 3)
    nothing = np.zeros((2, 3), dtype=bool)
    assert metrics.micro_f1(nothing, nothing) == 0
    assert metrics.macro_f1_multilabel(nothing, nothing) == 0


def test_the_edge_of_a_bin_belongs_to_the_lower_one() -> None:
    probs = np.array([[0.6, 0.4], [0.2, 0.2], [1.0, 0.0], [0.0, 0.0]])
    _, _, count = metrics.reliability(probs, np.array([0, 0, 0, 0]), bins=5)
    assert count.tolist() == [2, 0, 1, 0, 1]  # 0.2 in (0, 0.2], 0.6 in (0.4, 0.6]


def test_calibration_error_of_a_known_case() -> None:
    probs = np.array([[0.9, 0.1]] * 10)
    gold = np.array([0] * 7 + [1] * 3)
    assert metrics.ece(probs, gold) == pytest.approx(0.2)


def test_equal_confidence_gives_one_point() -> None:
    correct = np.array([True, False, True, True])
    coverages, risks = metrics.risk_coverage(np.full(4, 0.5), correct)
    assert (coverages.tolist(), risks.tolist()) == ([1.0], [0.25])


def test_area_without_ties_is_the_mean_of_the_risks() -> None:
    correct = np.array([True, True, False, True])
    area = metrics.aurc(np.array([0.9, 0.8, 0.7, 0.6]), correct)
    assert area == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_promised_coverage_is_what_split_conformal_does() -> None:
    """Against simulation: uniform scores, the quantile of n, the share of new scores below it."""
    rng = np.random.default_rng(0)
    n, rows, k = 99, 200, 90
    scores = np.sort(rng.uniform(size=(4000, n)), axis=1)[:, k - 1]
    covered = (rng.uniform(size=(4000, rows)) <= scores[:, None]).mean(axis=1)
    low, high = metrics.promised_coverage(calibration_rows=n, rows=rows, alpha=0.1)
    inside = ((covered >= low) & (covered <= high)).mean()
    assert 0.95 <= inside <= 0.97
    assert low == pytest.approx(np.quantile(covered, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(covered, 0.975), abs=0.01)
    assert metrics.promised_coverage(calibration_rows=5, rows=10, alpha=0.1) == (1.0, 1.0)


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
