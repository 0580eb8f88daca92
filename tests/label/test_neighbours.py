from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import neighbours as reference

from llmlabel.data import with_columns
from llmlabel.label import nearest, neighbours
from llmlabel.label.memory import directions
from llmlabel.label.nearest import finder
from llmlabel.label.neighbours import (
    exemplars,
    label_cache,
    label_neighbours,
    label_prototypes,
    label_test_time,
    test_time_probs,
)
from llmlabel.label.singular import label_singular
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])
MANY = load_labels(["a", "b", "c"], multilabel=True)
test_time_probs.__test__ = False


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def table(vectors: Any, gold: Any = None, prefix: str = "r") -> Dataset:
    ids = [f"{prefix}{i:03}" for i in range(len(vectors))]
    rows = Dataset.from_dict({"id": ids, "text": [f"text {id}" for id in ids]})
    vectors = [None if v is None else [float(x) for x in v] for v in vectors]
    columns: dict[str, Any] = {"vector": (vectors, List(Value("float32")))}
    if gold is not None:
        gold = [[int(g)] if np.ndim(g) == 0 else list(g) for g in gold]
        columns["gold"] = (gold, List(Value("int32")))
    return with_columns(rows, columns)


def dense(dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


def case(seed: int, rows: int = 12, pool: int = 20, width: int = 4) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda n: unit(rng.normal(size=(n, width)).astype(np.float32))  # noqa: E731
    return draw(rows), draw(pool), rng.integers(0, 3, pool), draw(3)


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_equal_the_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CHUNK", 7)
    rows, pool, classes, _ = case(seed)
    got = label_neighbours(
        table(rows), table(pool, classes, "p"), LABELS, k=5, scale=9.0, unknown=0.1, block_rows=5
    )
    expected = [
        reference.neighbours(row, pool.tolist(), classes, (), labels=3, k=5, scale=9.0, unknown=0.1)
        for row in rows.tolist()
    ]
    np.testing.assert_allclose(dense(got), expected, atol=1e-5)
    assert set(got["error"]) == {None}
    assert got["engine"][0].startswith("neighbours@")


@pytest.mark.parametrize("seed", range(20))
def test_prototypes_equal_the_loop_without_the_row_itself(seed: int) -> None:
    _, pool, classes, _ = case(seed)
    rows = table(pool, classes)
    got = label_prototypes(rows, rows, LABELS, scale=7.0, block_rows=6)
    expected = [
        reference.prototypes(row, pool.tolist(), classes, {i}, labels=3, scale=7.0)
        for i, row in enumerate(pool.tolist())
    ]
    np.testing.assert_allclose(dense(got), expected, atol=1e-5)


def test_prototypes_are_made_again_for_the_labels_of_the_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[int]()

    def counted(vectors: np.ndarray) -> np.ndarray:
        made.append(len(vectors))
        return directions(vectors)

    monkeypatch.setattr(neighbours, "directions", counted)
    labels = load_labels([f"l{i}" for i in range(50)])
    vectors = case(0, pool=60)[1]
    classes = [[i % 50] if i else [] for i in range(60)]  # the first is none of the labels
    rows = table(vectors, classes)
    got = label_prototypes(rows, rows, labels, scale=7.0, block_rows=6)
    assert made == [50, 0, *[1] * 59]
    taught = np.array([c for c in classes if c]).ravel()
    for i, row in enumerate(vectors.tolist()):
        own = {i - 1} if i else set()
        expected = reference.prototypes(
            row, vectors[1:].tolist(), taught, own, labels=50, scale=7.0
        )
        np.testing.assert_allclose(dense(got.select([i]), labels)[0], expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_soft_prototypes_without_the_row_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, soft = case(seed)[1], rng.dirichlet(np.ones(3), 20) * (rng.random((20, 3)) < 0.7)
    soft[soft.sum(axis=1) == 0, 0] = 1.0
    rows = SoftLabels.from_dense(soft, LABELS).add_to(table(vectors))
    got = dense(label_prototypes(rows, rows, LABELS, answers="soft", scale=7.0))
    for i, row in enumerate(vectors.astype(np.float64)):
        rest = np.delete(soft, i, axis=0).T @ np.delete(vectors, i, axis=0)
        odds = np.exp(7.0 * (unit(rest) @ row))
        np.testing.assert_allclose(got[i], odds / odds.sum(), atol=1e-5)


def test_soft_label_of_ps_ttl() -> None:
    """labeling.md 4.4: softmax(10 [.9, .7, .1])."""
    rows = [[0.9, 0.7, 0.1, 1.0]]  # of any length: cosines are compared
    length = np.linalg.norm(rows)
    got = label_prototypes(
        table(rows), table(np.eye(4)[:3], range(3), "p"), LABELS, scale=10 * length
    )
    np.testing.assert_allclose(dense(got), [[0.88054, 0.11917, 0.00030]], atol=1e-5)


def test_a_label_without_pool_rows_is_not_stored() -> None:
    got = label_prototypes(table(np.eye(2)), table(np.eye(2), [0, 2], "p"), LABELS)
    assert [sorted(ids) for ids in got["label_ids"]] == [[0, 2], [0, 2]]


def test_soft_pool_rows_count_by_their_probability() -> None:
    pool = SoftLabels.from_dense(np.array([[0.75, 0.25, 0], [0, 1.0, 0]]), LABELS).add_to(
        table(np.eye(2), prefix="p")
    )
    rows = table([[1.0, 0.0]])
    near = label_neighbours(rows, pool, LABELS, k=1, answers="soft")
    np.testing.assert_allclose(dense(near), [[0.75, 0.25, 0]])
    means = label_prototypes(rows, pool, LABELS, answers="soft", scale=1.0)
    cosine = 0.25 / np.sqrt(0.25**2 + 1)
    np.testing.assert_allclose(
        dense(means)[0, 1] / dense(means)[0, 0], np.exp(cosine - 1), rtol=1e-5
    )


def test_a_row_is_never_its_own_neighbour() -> None:
    pool = table(np.eye(3), [0, 1, 2])
    assert [ids[0] for ids in label_neighbours(pool, pool, LABELS, k=1)["label_ids"]] == [1, 0, 0]
    words = pool.remove_columns("id").add_column("id", ["x", "y", "z"])
    again = label_neighbours(words, pool, LABELS, k=1)
    assert [ids[0] for ids in again["label_ids"]] == [1, 0, 0]
    alone = label_neighbours(pool.select([0]), pool.select([0]), LABELS, k=1)
    assert alone["label_ids"][:] == [[]]
    assert alone["error"][:] == ["no pool row votes for a label"]


def test_neither_order_nor_blocks_matter(tmp_path: Any) -> None:
    rows, pool, classes, names = case(3, rows=30, pool=40)
    data, given = table(rows), table(pool, classes, "p")
    anchors = table(names).remove_columns("id").add_column("id", ["a", "b", "c"])
    mixed, turned = np.random.default_rng(0).permutation(30), given.select(range(39, -1, -1))
    calls = {
        "neighbours": lambda d, p, **o: label_neighbours(d, p, LABELS, k=4, **o),
        "prototypes": lambda d, p, **o: label_prototypes(d, p, LABELS, **o),
        "cache": lambda d, p, **o: label_cache(d, p, anchors, LABELS, shots=3, **o),
        "test_time": lambda d, p, **o: label_test_time(d, p, LABELS),
    }
    for name, call in calls.items():
        one = call(data, given, output=tmp_path / name)
        other = call(data.select(mixed), turned, block_rows=7)
        np.testing.assert_allclose(dense(other), dense(one)[mixed], atol=1e-6, err_msg=name)
        kept = call(data, given, output=tmp_path / name)
        assert kept["label_probs"][:] == one["label_probs"][:]


def test_another_call_is_not_answered_by_kept_blocks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, pool, classes, names = case(3, rows=9, pool=40)
    data, given = table(rows), table(pool, classes, "p")
    anchors = table(names).remove_columns("id").add_column("id", ["a", "b", "c"])
    turned = table(names[::-1]).remove_columns("id").add_column("id", ["a", "b", "c"])
    moved, fewer = table(rows[::-1]), given.select(range(30))
    renamed = table(pool, (classes + 1) % 3, "p")
    shifted = table(pool[:, ::-1], classes, "p")
    common = [(moved, given), (data, fewer), (data, renamed), (data, shifted)]
    near, means, cache = label_neighbours, label_prototypes, label_cache
    calls: dict[str, tuple[Any, list[tuple[Any, ...]], list[dict[str, Any]]]] = {
        "neighbours": (near, common, [{"k": 3}, {"scale": 3.0}, {"unknown": 0.1}]),
        "prototypes": (means, common, [{"scale": 3.0}]),
        "cache": (
            lambda d, p, space, a=anchors, **o: cache(d, p, a, space, **o),
            [common[0], common[1], common[3]],  # it reads no gold
            [
                *({"shots": 3}, {"alpha": 0.1}, {"beta": 3.0}, {"ratio": 3.0}),
                *({"centring": "none"}, {"scale": 3.0}, {"a": turned}),
            ],
        ),
    }
    for name, (call, tables, options) in calls.items():
        folder = tmp_path / name
        first = call(data, given, LABELS, block_rows=4, output=folder)
        ways = [(d, p, {}) for d, p in tables] + [(data, given, o) for o in options]
        for d, p, o in ways:
            kept = call(d, p, LABELS, block_rows=4, output=folder, **o)
            assert kept.to_dict() == call(d, p, LABELS, block_rows=4, **o).to_dict()
            assert np.abs(dense(kept) - dense(first)).max() > 1e-4, (name, o)

        def fails(logits: Any) -> Any:
            raise AssertionError("computed again")

        with monkeypatch.context() as patch:
            patch.setattr(neighbours, "normalised", fails)
            again = call(data, given, LABELS, block_rows=4, output=folder)
            assert again.to_dict() == first.to_dict()
            with pytest.raises(AssertionError, match="computed again"):
                call(data, given, LABELS, block_rows=4, output=folder, scale=4.0)


def test_rows_without_a_vector_keep_an_error() -> None:
    rows = table([[1.0, 0.0], None, None])
    rows = with_columns(rows, {"text": (["one", "two", " "], Value("string"))})
    got = label_neighbours(rows, table([[1.0, 0.0]], [1], "p"), LABELS)
    assert got["label_ids"][:] == [[1], [], []]
    assert got["error"][:] == [None, "no vector", "empty text"]


def test_none_of_the_labels_is_missing_mass() -> None:
    pool = table([[1.0, 0.0], [1.0, 0.0]], [[1], []], "p")
    got = label_neighbours(table([[1.0, 0.0]]), pool, LABELS, k=2)
    np.testing.assert_allclose(dense(got), [[0, 0.5, 0]])


def test_none_of_the_labels_is_a_soft_answer_of_a_multi_label_space() -> None:
    gold = [[0], [], [], []]
    pool = table(np.tile([1.0, 0.0], (4, 1)), gold, "p")
    soft = SoftLabels.from_dense(np.eye(3)[[0, 1, 1, 1]] * [1, 0, 0], MANY).add_to(pool)
    rows = table([[1.0, 0.0]])
    for answers in ("gold", "soft"):
        got = label_neighbours(rows, soft, MANY, k=4, answers=answers)
        np.testing.assert_allclose(dense(got, MANY), [[0.25, 0, 0]])
    errors = ["unreadable", "text cut: 9 of 8", "unreadable", None]
    said = with_columns(soft, {"error": (errors, Value("string"))})
    got = label_neighbours(rows, said, MANY, k=4, answers="soft")
    np.testing.assert_allclose(dense(got, MANY), [[1 / 3, 0, 0]])
    nulls = {"label_ids": List(Value("int32")), "label_probs": List(Value("float32"))}
    columns = {c: ([*soft[c][:2], None, None], kind) for c, kind in nulls.items()}
    got = label_neighbours(rows, with_columns(soft, columns), MANY, k=4, answers="soft")
    np.testing.assert_allclose(dense(got, MANY), [[0.5, 0, 0]])
    one = SoftLabels.from_dense(np.eye(3)[[0, 1, 1, 1]] * [1, 0, 0], LABELS).add_to(pool)
    got = label_neighbours(rows, one, LABELS, k=4, answers="soft")
    np.testing.assert_allclose(dense(got), [[1, 0, 0]])  # there it is a row without a soft label


def test_pool_rows_without_a_text_are_not_the_row_itself() -> None:
    blank = {"text": ([" "] * 3, Value("string"))}
    pool = with_columns(table(np.eye(3), [0, 1, 2], "p"), blank)
    got = label_neighbours(with_columns(table(np.eye(3)), blank), pool, LABELS, k=1)
    assert got["label_ids"][:] == [[0], [1], [2]]


def test_a_cut_text_stays_told(tmp_path: Any) -> None:
    cut = "text cut: 9 tokens, the limit is 8"
    rows = table([[1.0, 0.0], [0.0, 1.0], None])
    rows = with_columns(rows, {"error": ([cut, "unreadable", cut], Value("string"))})
    pool = table(np.eye(2), [0, 1], "p")
    for call in (label_neighbours, label_prototypes, label_test_time):
        assert call(rows, pool, LABELS)["error"][:] == [cut, None, "no vector"]
    assert label_neighbours(rows, pool, MANY)["error"][0] == cut
    own = table([[1.0, 0.0]], [0])
    alone = with_columns(own, {"error": ([cut], Value("string"))})
    got = label_neighbours(alone, own, LABELS)
    assert got["error"][:] == ["no pool row votes for a label"]
    before = label_neighbours(rows.remove_columns("error"), pool, LABELS, output=tmp_path)
    assert before["error"][:] == [None, None, "no vector"]
    kept = label_neighbours(rows, pool, LABELS, output=tmp_path)
    assert kept["error"][:] == [cut, None, "no vector"]


def test_multilabel_neighbours_average_each_label() -> None:
    pool = table([[1.0, 0.0], [1.0, 0.0]], [[0, 1], [1]], "p")
    got = label_neighbours(table([[1.0, 0.0]]), pool, MANY, k=2)
    np.testing.assert_allclose(dense(got, MANY), [[0.5, 1.0, 0.0]])
    with pytest.raises(ValueError, match="label_prototypes needs labels that exclude"):
        label_prototypes(table([[1.0, 0.0]]), pool, MANY)
    with pytest.raises(ValueError, match="row with id 'p000' has the gold labels"):
        label_neighbours(table([[1.0, 0.0]]), pool, LABELS)


def test_bad_arguments() -> None:
    rows, pool = table(np.eye(3)), table(np.eye(3), [0, 1, 2], "p")
    with pytest.raises(ValueError, match="k must be at least 1"):
        label_neighbours(rows, pool, LABELS, k=0)
    with pytest.raises(ValueError, match="unknown must be at least 0 and below 1"):
        label_neighbours(rows, pool, LABELS, unknown=1.0)
    with pytest.raises(ValueError, match="missing mass"):
        label_neighbours(rows, pool, MANY, unknown=0.1)
    with pytest.raises(ValueError, match="vectors of 2 numbers, what they are compared with has 3"):
        label_neighbours(table(np.eye(2)), pool, LABELS)
    with pytest.raises(ValueError, match="no pool row has a vector and an answer"):
        label_neighbours(rows, table([None], [0], "p"), LABELS)
    with pytest.raises(ValueError, match="cuts must be two rising shares"):
        label_test_time(rows, pool, LABELS, cuts=(0.7, 0.2))
    with pytest.raises(ValueError, match="momentum"):
        label_test_time(rows, pool, LABELS, momentum=2.0)
    with pytest.raises(ValueError, match="each pool row is also a row of the dataset"):
        label_test_time(pool, pool, LABELS)
    with pytest.raises(ValueError, match="no row has a vector"):
        label_test_time(table([None]), pool, LABELS)
    with pytest.raises(ValueError, match="shots must be at least 1"):
        label_cache(rows, rows, rows, LABELS, shots=0)


# --------------------------------------------------------------------------------------- test time


@pytest.mark.parametrize("seed", range(20))
def test_test_time_equals_the_loop(seed: int) -> None:
    rows, pool, classes, _ = case(seed, rows=25)
    classes = np.where(classes == 2, seed % 3, classes)  # sometimes a label without any row
    options = {
        "labels": 3,
        "scale": 6.0,
        "cuts": (0.2, 0.5),
        "queue": 4 + seed % 9,
        "momentum": 0.5,
        "step_rows": 1 + seed % 4,
    }
    got = test_time_probs(rows, pool, classes, **options)
    expected = reference.test_time(rows.tolist(), pool.tolist(), classes.tolist(), **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_prototypes_follow_trusted_rows_alone() -> None:
    few, rows = np.eye(2), unit(np.array([[1.0, 0.5]] * 8 + [[1.0, 0.9]]))  # the last is in doubt
    options: Any = {"labels": 2, "scale": 10.0, "queue": 1, "momentum": 0.5, "step_rows": 1}
    moved = test_time_probs(rows, few, np.arange(2), cuts=(0.0, 0.0), **options)
    still = test_time_probs(rows, few, np.arange(2), cuts=(1.0, 1.0), **options)
    np.testing.assert_allclose(moved[0], still[0])  # labelled before it moves anything
    np.testing.assert_allclose(still[:8], np.tile(still[0], (8, 1)))
    second = unit(0.5 * few[0] + 0.5 * rows[0])  # the queue of length 1 holds the row alone
    odds = np.exp(10 * (rows[0] @ second - rows[0] @ few[1]))
    np.testing.assert_allclose(moved[1, 0], odds / (1 + odds), rtol=1e-6)
    assert (np.diff(moved[:8, 0]) > 0).all()


def test_the_stream_is_drawn_from_the_seed() -> None:
    rows, pool, classes, _ = case(1, rows=40)
    one, two, other = (
        dense(label_test_time(table(rows), table(pool, classes, "p"), LABELS, seed=seed))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 1e-4


# ------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("seed", range(20))
def test_cache_equals_the_written_out_values(seed: int) -> None:
    rows, pool, _, names = case(seed, rows=8, pool=25, width=5)
    data = table(np.concatenate([rows, pool[:4]]))  # the last four are rows of the pool
    texts = [*data["text"][:8], *(f"text p{i:03}" for i in range(4))]
    data = with_columns(data, {"text": (texts, Value("string"))})
    anchors = table(names).remove_columns("id").add_column("id", ["a", "b", "c"])
    options: Any = {
        "shots": 4,
        "alpha": (0.0, 0.6, 1.0)[seed % 3],
        "beta": 1.0 + seed % 4,
        "ratio": 1.17,
        "centring": ("none", "cache", "all")[seed % 3 - seed % 2],
        "scale": 3.0,
    }
    got = label_cache(data, table(pool, prefix="p"), anchors, LABELS, block_rows=5, **options)
    expected = reference.cache(
        np.concatenate([rows, pool[:4]]).tolist(),
        [()] * 8 + [(i,) for i in range(4)],
        pool.tolist(),
        names.tolist(),
        **options,
    )
    np.testing.assert_allclose(dense(got), expected, atol=2e-5)


def test_part_of_a_large_pool_is_enough_to_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, pool, _, names = case(0, pool=400)
    anchors = table(names).remove_columns("id").add_column("id", ["a", "b", "c"])
    every = dense(label_cache(table(rows), table(pool, prefix="p"), anchors, LABELS, scale=1.0))
    monkeypatch.setattr(neighbours, "_CENTRED", 200)
    some = dense(label_cache(table(rows), table(pool, prefix="p"), anchors, LABELS, scale=1.0))
    plain = label_cache(
        table(rows), table(pool, prefix="p"), anchors, LABELS, scale=1.0, centring="none"
    )
    assert 0 < np.abs(some - every).max() < 0.2 * np.abs(dense(plain) - every).max()


def test_affinity_and_hard_values() -> None:
    """labeling.md 3.5: exp(-(1 - a)) at .8 is .81873; at alpha 0 it is added to the one label."""
    pool, names = table(np.eye(3), prefix="p"), np.eye(3)
    anchors = table(names).remove_columns("id").add_column("id", ["a", "b", "c"])
    row = np.array([[0.8, 0.6, 0.0]])
    got = dense(
        label_cache(
            table(row),
            pool,
            anchors,
            LABELS,
            shots=1,
            alpha=0.0,
            centring="none",
            scale=1.0,
            ratio=1 / 16,
        )
    )
    # the values of a row of V, (1, 0, 0), have the deviation of the cosines already
    expected = np.exp([0.8 + 0.81873, 0.6 + np.exp(-0.4), np.exp(-1)])
    np.testing.assert_allclose(got[0], expected / expected.sum(), atol=1e-5)


def test_exemplars_are_the_nearest_of_each_label() -> None:
    _, pool, _, names = case(4, pool=30)
    kept, belongs = exemplars(pool, names.astype(np.float64), shots=3)
    expected = reference.exemplars(pool.tolist(), names.tolist(), 3)
    assert list(zip(kept.tolist(), belongs.tolist(), strict=True)) == expected


# ------------------------------------------------------------------------------------------ search


def test_equal_cosines_go_to_the_first_and_padding_has_no_weight() -> None:
    pool = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    found, cosines = finder(pool, k=4, search="exact")(np.eye(2, dtype=np.float32)[:1], [[1]])
    assert found.tolist() == [[0, 2, 3, 4]]
    assert cosines.tolist() == [[1, 1, 0, 0]]
    _, few = finder(pool[:2], k=4, search="exact")(np.eye(2, dtype=np.float32)[:1], [[0]])
    assert few.tolist() == [[1, -np.inf]]


def test_usearch_finds_what_exact_finds() -> None:
    pytest.importorskip("usearch.index")
    rng = np.random.default_rng(0)
    pool, rows = unit(rng.normal(size=(500, 8))), unit(rng.normal(size=(20, 8)))
    given = table(pool, rng.integers(0, 3, 500), "p")
    data = table(np.concatenate([rows, pool[:5]]))
    texts = [*data["text"][:20], *given["text"][:5]]
    data = with_columns(data, {"text": (texts, Value("string"))})
    exact = label_neighbours(data, given, LABELS, k=5)
    near = label_neighbours(
        data, given, LABELS, k=5, search="usearch", block_rows=8
    )  # the last alone
    np.testing.assert_allclose(dense(near), dense(exact), atol=1e-6)


class Compares:
    """Answers as faiss does."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.counts = vectors.astype(np.float32), list[int]()

    def search(self, vectors: np.ndarray, count: int, /) -> tuple[np.ndarray, np.ndarray]:
        self.counts.append(count)
        cosines = vectors @ self.vectors.T
        nearest = np.argsort(-cosines, axis=1)[:, :count]
        filled = np.full((len(vectors), count), -1)
        filled[:, : nearest.shape[1]] = nearest
        return np.take_along_axis(cosines, nearest, axis=1), filled


def indexed(kind: str, vectors: np.ndarray) -> Any:
    if kind == "faiss":
        index = pytest.importorskip("faiss").IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return index
    if kind == "usearch":
        usearch = pytest.importorskip("usearch.index")
        # Wide and by one thread, so that this graph of few rows finds all: several threads that
        # begin an empty one may leave rows that no edge leads to.
        wide = {"connectivity": 64, "expansion_add": 256, "expansion_search": 256}
        index = usearch.Index(ndim=vectors.shape[1], dtype="f16", **wide)
        index.add(np.arange(len(vectors)), vectors, threads=1)
        return index
    return Compares(vectors)


@pytest.mark.parametrize("kind", ["plain", "faiss", "usearch"])
@pytest.mark.parametrize("seed", range(5))
def test_an_index_of_the_pool_names_its_rows_by_position(seed: int, kind: str) -> None:
    rows, pool, classes, _ = case(seed, pool=60)
    gold = [None if i % 3 == 1 else [int(c)] for i, c in enumerate(classes)]  # the last is known
    given = with_columns(table(pool, prefix="p"), {"gold": (gold, List(Value("int32")))})
    turned = np.random.default_rng(seed).permutation(59).tolist()  # and the first has no answer
    given = given.select([59, *turned][:: (-1) ** seed])
    data = table(np.concatenate([rows, pool[:6]]))
    texts = [*data["text"][:12], *(f"text p{i:03}" for i in range(6))]
    data = with_columns(data, {"text": (texts, Value("string"))})
    index = indexed(kind, np.array(given["vector"][:], dtype=np.float32))
    for call, options in ((label_neighbours, {"k": 5}), (label_singular, {"dimension": 3.0})):
        exact = call(data, given, LABELS, **options)
        near = call(data, given, LABELS, search=index, block_rows=5, **options)
        np.testing.assert_allclose(dense(near), dense(exact), atol=1e-6)
        assert near["engine"][0] != exact["engine"][0]


def test_more_is_asked_than_votes_and_than_is_the_row_itself() -> None:
    pool, index = np.eye(60, dtype=np.float32), Compares(np.eye(60))
    finder(pool, k=3, search=index)(pool[:2], [[1], [4, 5]])
    assert index.counts == [12, 14]  # the first when it is looked at


def test_an_index_of_other_vectors_is_refused() -> None:
    pool, other = case(0, pool=40, width=30)[1], case(1, pool=40, width=30)[1]
    with pytest.raises(
        ValueError, match=r"an index \(Compares\) that does not find the pool's own"
    ):
        label_neighbours(
            table(pool), table(pool, [0] * 40, "p"), LABELS, k=2, search=Compares(other)
        )


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
@pytest.mark.parametrize(
    ("rows", "width", "problem"),
    [
        (39, 30, "an index of 39 vectors, the pool has 40 to find; add the rows that it lacks"),
        (40, 29, "an index of vectors of 29 numbers, the pool's have 30; build it of the vectors"),
    ],
)
def test_an_index_of_another_size_is_refused(
    kind: str, rows: int, width: int, problem: str
) -> None:
    pool = case(0, pool=40, width=30)[1].astype(np.float32)
    index = indexed(kind, np.ascontiguousarray(pool[:rows, :width]))
    with pytest.raises(ValueError, match=problem):
        finder(pool, k=2, search=index)


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_an_index_may_have_many_rows_behind_the_last_entry(kind: str) -> None:
    rows, every, *_ = case(0, pool=800)
    rows, every = rows.astype(np.float32), every.astype(np.float32)
    pool, own = every[:20], [[]] * len(rows)
    search = indexed(kind, every)
    found = finder(pool, k=5, search=search, rows=np.arange(20))(rows, own)
    exact = finder(pool, k=5)(rows, own)
    assert found[0].tolist() == exact[0].tolist()
    np.testing.assert_allclose(found[1], exact[1], atol=1e-6)


def test_a_missing_index_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(ValueError, match="pip install usearch"):
        label_neighbours(
            table(np.eye(3)), table(np.eye(3), [0, 1, 2], "p"), LABELS, search="usearch"
        )
