from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import singular as reference

from llmlabel.data import with_columns
from llmlabel.label import singular
from llmlabel.label.memory import read_pool
from llmlabel.label.singular import (
    GRID,
    best_exponent,
    intrinsic_dimension,
    label_singular,
    singular_weights,
)
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def table(vectors: Any, gold: Any = None, prefix: str = "r") -> Dataset:
    ids = [f"{prefix}{i:04}" for i in range(len(vectors))]
    rows = Dataset.from_dict({"id": ids, "text": [f"text {id}" for id in ids]})
    columns: dict[str, Any] = {"vector": (np.asarray(vectors).tolist(), List(Value("float32")))}
    if gold is not None:
        columns["gold"] = ([np.atleast_1d(g).tolist() for g in gold], List(Value("int32")))
    return with_columns(rows, columns)


def dense(dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


def case(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    rows, pool = (unit(rng.normal(size=(n, 4)).astype(np.float32)) for n in (10, 25))
    return rows, pool, rng.integers(0, 3, 25)


@pytest.mark.parametrize("seed", range(20))
def test_votes_equal_the_loop(seed: int) -> None:
    rows, pool, classes = case(seed)
    rows[0] = pool[3]  # an exact copy of one
    rows[1] = pool[5] = pool[4]  # and of two
    exponent, k = (2.0, 7.5, 40.0)[seed % 3], (25, 6)[seed % 2]
    got = label_singular(
        table(rows), table(pool, classes, "p"), LABELS, dimension=exponent, k=k, block_rows=4
    )
    expected = [
        reference.votes(row, pool.tolist(), classes, labels=3, exponent=exponent, k=k)
        for row in rows.tolist()
    ]
    np.testing.assert_allclose(dense(got), expected, atol=2e-5)
    np.testing.assert_allclose(dense(got)[0].max(), 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_dimension_and_leave_one_out_equal_the_loop(seed: int) -> None:
    _, pool, classes = case(seed)
    given = table(pool, classes)
    expected = reference.two_nn(pool.astype(np.float64).tolist())
    assert intrinsic_dimension(given) == pytest.approx(expected, rel=1e-4)
    scores = [
        reference.leave_one_out(pool.tolist(), classes.tolist(), labels=3, exponent=e, k=9)
        for e in GRID
    ]
    memory = read_pool(given, LABELS, answers="gold")
    assert best_exponent(memory, given, k=9) == GRID[int(np.argmin(scores))]


def test_huge_exponents_are_the_nearest_neighbour() -> None:
    """Distances to the power of -3000 overflow; in log space they are 1-NN."""
    squared = np.array([[0.2, 0.4, 1.8], [1.0, 4.0, np.inf]])
    np.testing.assert_allclose(
        singular_weights(squared, 3000.0), [[1, 0, 0], [1, 0, 0]], atol=1e-12
    )
    np.testing.assert_allclose(singular_weights(squared[1:], 2.0), [[0.8, 0.2, 0.0]])
    copies = np.array([[0.0, 1e-13, 1e-3]])
    np.testing.assert_allclose(singular_weights(copies, 2.0), [[0.5, 0.5, 0.0]])
    assert singular_weights(np.array([[np.inf]]), 2.0).tolist() == [[0.0]]


@pytest.mark.parametrize("dimension", [2, 4, 8])
def test_dimension_of_a_sphere_in_many_dimensions(dimension: int) -> None:
    rng = np.random.default_rng(dimension)
    sphere = np.zeros((1500, 40))
    sphere[:, : dimension + 1] = unit(rng.normal(size=(1500, dimension + 1)))
    turn = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    found = intrinsic_dimension(table((sphere @ turn).round(8)))
    assert found == pytest.approx(dimension, rel=0.12)


def test_too_few_vectors_tell_no_dimension() -> None:
    rows = table(np.repeat(np.eye(2), 3, axis=0), [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="only 2 vectors differ"):
        label_singular(rows, rows, LABELS)
    with pytest.raises(ValueError, match="dimension must be a number above 0; got -1"):
        label_singular(rows, rows, LABELS, dimension=-1.0)


def test_a_label_of_one_row_cannot_be_left_out() -> None:
    rows = table(np.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="no label has two pool rows"):
        label_singular(rows, rows, LABELS, dimension="leave_one_out")
    rng = np.random.default_rng(0)
    vectors, classes = unit(rng.normal(size=(9, 3))), [0, 0, 1, 0, 1, 0, 1, 1, 2]
    given = table(vectors, classes)
    vectors = np.array(given["vector"][:])
    scores = [
        reference.leave_one_out(vectors.tolist(), classes, labels=3, exponent=e, k=8) for e in GRID
    ]
    found = best_exponent(read_pool(given, LABELS, answers="gold"), given, k=8)
    assert found == GRID[int(np.argmin(scores))]


def test_estimates_are_used() -> None:
    rows, pool, classes = case(2)
    data, given = table(rows), table(pool, classes, "p")
    number = intrinsic_dimension(given)
    one, two = (label_singular(data, given, LABELS, dimension=d) for d in ("two_nn", number))
    np.testing.assert_allclose(dense(one), dense(two), atol=1e-6)
    best = best_exponent(read_pool(given, LABELS, answers="gold"), given, k=100)
    one, two = (label_singular(data, given, LABELS, dimension=d) for d in ("leave_one_out", best))
    np.testing.assert_array_equal(dense(one), dense(two))


def test_the_row_itself_has_no_vote_and_unknown_mass_is_missing() -> None:
    rows = table(unit(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])), [0, 1, 2])
    got = label_singular(rows, rows, LABELS, dimension=20.0, unknown=0.25)
    assert [ids[0] for ids in got["label_ids"]] == [1, 0, 1]
    np.testing.assert_allclose(dense(got).sum(axis=1), 0.75)


def test_another_call_is_not_answered_by_kept_blocks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, pool, classes = case(1)
    data, given = table(rows), table(pool, classes, "p")
    options: dict[str, Any] = {"dimension": 4.0, "block_rows": 4}
    first = label_singular(data, given, LABELS, output=tmp_path, **options)
    others = [
        (data, given, {"dimension": 2.0}),
        (data, given, {"k": 3}),
        (data, given, {"unknown": 0.1}),
        (table(rows[::-1]), given, {}),
        (data, given.select(range(20)), {}),
        (data, table(pool, (classes + 1) % 3, "p"), {}),
        (data, table(pool[:, ::-1], classes, "p"), {}),
    ]
    for d, p, changed in others:
        kept = label_singular(d, p, LABELS, output=tmp_path, **{**options, **changed})
        fresh = label_singular(d, p, LABELS, **{**options, **changed})
        assert kept.to_dict() == fresh.to_dict()
        assert np.abs(dense(kept) - dense(first)).max() > 1e-4

    def fails(squared: Any, exponent: float) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(singular, "singular_weights", fails)
    again = label_singular(data, given, LABELS, output=tmp_path, **options)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(AssertionError, match="computed again"):
        label_singular(data, given, LABELS, output=tmp_path, **{**options, "k": 5})


def test_multilabel_rows_average_each_label() -> None:
    many = load_labels(["a", "b", "c"], multilabel=True)
    pool = table(np.eye(2), [[0, 1], [1]], "p")
    got = label_singular(table([[np.sqrt(0.5), np.sqrt(0.5)]]), pool, many, dimension=2.0)
    np.testing.assert_allclose(dense(got, many), [[0.5, 1.0, 0.0]], atol=1e-6)


# ------------------------------------------------------------------------------------- the theorem


@pytest.mark.parametrize("dimension", list(reference.POLYNOMIALS))
def test_exponents_of_the_papers_activations(dimension: int) -> None:
    phi = reference.POLYNOMIALS[dimension]
    assert reference.exponent(phi) == pytest.approx(dimension, abs=1e-4)


@pytest.mark.parametrize(("dimension", "least"), [(1, 0.95), (2, 0.99), (4, 0.99)])
def test_the_deep_network_votes_like_the_singular_kernel(dimension: int, least: float) -> None:
    """The limit holds near a point; in dimension 1 the far ones, where it does not, weigh most."""
    rng = np.random.default_rng(1717)
    a, b = {
        1: ([1, 2], [2, 1]),
        2: ([0.5, 0.5, 2.5], [2.5, 0.1, 0.5]),
        4: ([0.5, 0.5, 2.5, 1, 1], [2.5, 0.1, 0.5, 1, 1]),
    }[dimension]

    def draw(count: int) -> Any:
        classes = (rng.random(count) < 0.4).astype(int)
        points = np.where(classes[:, None], rng.dirichlet(a, count), rng.dirichlet(b, count))
        return unit(np.sqrt(points) + 1e-9), classes

    (pool, classes), (rows, _) = draw(1000), draw(500)
    pool, rows = pool.astype(np.float32).astype(float), rows.astype(np.float32).astype(float)
    deep = reference.deep(
        reference.POLYNOMIALS[dimension], np.minimum(rows @ pool.T, 1.0), depth=60
    )
    onehot = np.eye(2)[classes]
    votes = deep @ onehot
    two = load_labels(["a", "b"])
    got = label_singular(
        table(rows), table(pool, classes, "p"), two, dimension=float(dimension), k=1000
    )
    agree = votes.argmax(axis=1) == dense(got, two).argmax(axis=1)
    assert agree.mean() > least
