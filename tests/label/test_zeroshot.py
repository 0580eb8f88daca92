from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import zeroshot as reference

from llmlabel.data import with_columns
from llmlabel.label import zeroshot
from llmlabel.label.zeroshot import (
    bias_curve,
    choose_seen_bias,
    eszsl,
    gcn_layer,
    harmonic,
    label_graph,
    label_zero_shot,
    propagate,
)
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.softlabels import SoftLabels

TREE = load_labels(
    ["pets", "food", *({"id": i, "parents": ["pets"]} for i in ("cat", "dog", "fish"))]
    + [{"id": i, "parents": ["food"]} for i in ("bread", "milk", "rice")]
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def table(vectors: Any, gold: Any = None, prefix: str = "r", ids: Any = None) -> Dataset:
    ids = ids or [f"{prefix}{i:04}" for i in range(len(vectors))]
    rows = Dataset.from_dict({"id": list(ids), "text": [f"text {id}" for id in ids]})
    columns: dict[str, Any] = {"vector": (np.asarray(vectors).tolist(), List(Value("float32")))}
    if gold is not None:
        columns["gold"] = ([np.atleast_1d(g).tolist() for g in gold], List(Value("int32")))
    return with_columns(rows, columns)


def dense(dataset: Dataset, labels: LabelSpace = TREE) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


@pytest.mark.parametrize("seed", range(20))
def test_eszsl_has_no_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(15, 5)), rng.normal(size=(3, 4))
    y = np.eye(3)[rng.integers(0, 3, 15)]
    gamma, lam = rng.uniform(0.1, 3, 2)
    w = eszsl(x.T @ x, x.T @ y, s, gamma=gamma, lam=lam)
    gradient = 2 * (
        x.T @ (x @ w @ s.T - y) @ s + gamma * w @ s.T @ s + lam * x.T @ x @ w + gamma * lam * w
    )
    assert np.abs(gradient).max() < 1e-10

    def loss(some: np.ndarray) -> float:
        lists = (part.tolist() for part in (some, x, s, y))
        return reference.eszsl_objective(*lists, gamma, lam)

    for _ in range(3):
        step = rng.normal(size=w.shape) * 1e-2
        assert loss(w + step) > loss(w)


@pytest.mark.parametrize("seed", range(20))
def test_gcn_layer_equals_the_loop_and_the_dense_form(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 3 + seed % 5
    labels = load_labels([f"l{i}" for i in range(count)])
    pairs = {tuple(sorted(rng.choice(count, 2, replace=False).tolist())) for _ in range(count)}
    edges = [(f"l{a}", f"l{b}") for a, b in sorted(pairs)]
    x, w = rng.normal(size=(count, 3)), rng.normal(size=(3, 2))
    got = gcn_layer(label_graph(labels, [*edges, edges[0]]), x, w)
    expected = reference.gcn_layer(sorted(pairs), count, x.tolist(), w.tolist())
    np.testing.assert_allclose(got, expected, atol=1e-12)
    a = np.eye(count)
    for one, other in pairs:
        a[one, other] = a[other, one] = 1
    d = np.diag(a.sum(axis=1) ** -0.5)
    np.testing.assert_allclose(got, d @ a @ d @ x @ w, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_harmonic_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold, predicted = rng.integers(0, 4, (2, 15))
    seen = rng.random(4) < 0.6
    expected = reference.harmonic(predicted.tolist(), gold.tolist(), seen.tolist())
    assert harmonic(predicted, gold, seen) == pytest.approx(expected, rel=1e-12)


def test_harmonic_by_hand() -> None:
    seen = np.array([True, False])
    assert harmonic(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), seen) == pytest.approx(0.8)
    assert harmonic(np.array([0]), np.array([0]), seen) == 0
    assert harmonic(np.array([1, 0]), np.array([0, 1]), seen) == 0


@pytest.mark.parametrize("seed", range(20))
def test_propagate_is_the_ridge_regression_of_the_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(6, 3))
    names, prototypes = (unit(rng.normal(size=(6, 4))) for _ in range(2))
    seen = np.array([True, True, False, True, True, False])
    got = propagate(features, names, prototypes, seen, ridge=0.7)
    known = features[seen]
    b = np.linalg.inv(known.T @ known + 0.7 * np.eye(3)) @ known.T @ (prototypes - names)[seen]
    np.testing.assert_allclose(got[~seen], unit(names + features @ b)[~seen], atol=1e-10)
    np.testing.assert_array_equal(got[seen], prototypes[seen])


def test_label_graph() -> None:
    got = label_graph(TREE).toarray()
    np.testing.assert_array_equal(got, got.T)
    assert np.flatnonzero(got[0]).tolist() == [2, 3, 4]
    assert np.flatnonzero(got[2]).tolist() == [0]
    flat = load_labels(["a", "b"])
    with pytest.raises(ValueError, match="no parents, so no graph; give edges="):
        label_graph(flat)
    with pytest.raises(ValueError, match="joins 'a' with itself"):
        label_graph(flat, [("a", "a")])


def world(seed: int, *, rank: int = 12, far: float = 1.5) -> Any:
    """Rows of a label lie beside its name, all of one domain in one direction from there."""
    rng = np.random.default_rng(seed)
    names = unit(rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 12)))
    shift = {0: unit(rng.normal(size=12)), 1: unit(rng.normal(size=12))}
    gold = np.repeat(np.arange(2, 8), 20)
    place = names[gold] + far * np.array([shift[int(g > 4)] for g in gold])
    vectors = unit(place + 0.05 * rng.normal(size=place.shape))
    anchors = table(names, ids=TREE.ids)
    even = np.arange(len(gold)) % 2 == 0
    seen = ~np.isin(gold, (4, 7))  # fish and rice have no rows
    pool = table(vectors[even & seen], gold[even & seen], "p")
    return anchors, pool, table(vectors[~even], gold[~even]), gold[~even]


@pytest.mark.parametrize(("method", "rank", "far"), [("mapping", 3, 0.0), ("propagation", 12, 1.5)])
def test_unseen_labels_are_found(method: Any, rank: int, far: float) -> None:
    anchors, pool, rows, gold = world(0, rank=rank, far=far)
    seen = np.isin(np.arange(8), (2, 3, 5, 6))
    options: Any = {"method": method, "ridge": 0.1, "class_ridge": 0.1}
    bias = choose_seen_bias(bias_curve(pool, rows, anchors, TREE, folds=4, **options))
    got = label_zero_shot(rows, pool, anchors, TREE, seen_bias=bias, **options)
    probs = dense(got)
    assert (probs[:, :2] == 0).all()  # domains have no pool rows and are no leaves
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-6)
    assert harmonic(probs.argmax(axis=1), gold, seen) > 0.9
    far = label_zero_shot(rows, pool, anchors, TREE, seen_bias=5.0, **options)
    assert (~seen[dense(far).argmax(axis=1)]).all()


def test_probabilities_are_the_softmax_of_stacked_scores() -> None:
    anchors, pool, rows, _ = world(1)
    got = dense(label_zero_shot(rows, pool, anchors, TREE, hops=0, seen_bias=0.2, scale=5.0))
    plain = dense(label_zero_shot(rows, pool, anchors, TREE, hops=0, seen_bias=0.0, scale=5.0))
    seen = [2, 3, 5, 6]
    before, after = plain[:, seen] / plain[:, [4]], got[:, seen] / got[:, [4]]
    np.testing.assert_allclose(after, before * np.exp(-1.0), rtol=1e-4)


def test_edges_matter_and_hops_0_leaves_them_out() -> None:
    anchors, pool, rows, _ = world(2)
    tree = dense(label_zero_shot(rows, pool, anchors, TREE))
    swapped = [("fish", "food"), ("rice", "pets"), ("cat", "pets"), ("bread", "food")]
    other = dense(label_zero_shot(rows, pool, anchors, TREE, edges=swapped))
    assert np.abs(tree - other).max() > 1e-3
    none = dense(label_zero_shot(rows, pool, anchors, TREE, hops=0))
    again = dense(label_zero_shot(rows, pool, anchors, TREE, hops=0, edges=swapped))
    np.testing.assert_array_equal(none, again)


def test_rows_of_the_dataset_are_not_learned_from() -> None:
    anchors, pool, rows, _ = world(3)
    leaked = with_columns(rows, {"gold": ([[5]] * len(rows), List(Value("int32")))})
    both = Dataset.from_dict({c: [*pool[c][:], *leaked[c][:]] for c in pool.column_names})
    both = both.cast(pool.features)
    one = dense(label_zero_shot(rows, pool, anchors, TREE))
    two = dense(label_zero_shot(rows, both, anchors, TREE))
    np.testing.assert_array_equal(one, two)


def test_order_and_blocks_do_not_matter() -> None:
    anchors, pool, rows, _ = world(4)
    one = dense(label_zero_shot(rows, pool, anchors, TREE, method="mapping"))
    mixed = np.random.default_rng(0).permutation(len(rows))
    turned = pool.select(range(len(pool) - 1, -1, -1))
    two = label_zero_shot(rows.select(mixed), turned, anchors, TREE, method="mapping", block_rows=7)
    np.testing.assert_allclose(dense(two), one[mixed], atol=1e-6)


def test_another_call_is_not_answered_by_kept_blocks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors, pool, rows, _ = world(4)
    turned = table(np.array(anchors["vector"][:])[::-1], ids=TREE.ids)
    moved = table(np.array(rows["vector"][:])[::-1])
    first = label_zero_shot(rows, pool, anchors, TREE, block_rows=50, output=tmp_path)
    others: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        *((rows, pool, anchors, {name: 3.0}) for name in ("seen_bias", "ridge", "scale")),
        *((rows, pool, anchors, option) for option in ({"hops": 0}, {"method": "mapping"})),
        (rows, pool, anchors, {"method": "mapping", "class_ridge": 3.0}),
        (rows, pool, anchors, {"edges": [("fish", "food"), ("rice", "pets")]}),
        (moved, pool, anchors, {}),
        (rows, pool.select(range(0, len(pool), 2)), anchors, {}),
        (rows, pool, turned, {}),
    ]
    for d, p, a, options in others:
        kept = label_zero_shot(d, p, a, TREE, block_rows=50, output=tmp_path, **options)
        fresh = label_zero_shot(d, p, a, TREE, block_rows=50, **options)
        assert kept.to_dict() == fresh.to_dict()
        assert np.abs(dense(kept) - dense(first)).max() > 1e-4, options

    def fails(logits: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(zeroshot, "normalised", fails)
    again = label_zero_shot(rows, pool, anchors, TREE, block_rows=50, output=tmp_path)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(AssertionError, match="computed again"):
        label_zero_shot(rows, pool, anchors, TREE, block_rows=50, output=tmp_path, scale=4.0)


def test_the_accuracies_promised_are_those_measured() -> None:
    """With the defaults, and with what `bias_curve` chooses."""
    text = (Path(__file__).parents[2] / "benchmarks/results/embedding.md").read_text("utf-8")
    table = text.partition("## 30 of 150")[2].partition("##")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    found = {cells[0]: (cells[5].split()[0], cells[6]) for cells in lines if len(cells) == 7}
    promised = " ".join((label_zero_shot.__doc__ or "").split())
    chosen, default = found["propagation, domains"]
    mapped, names = found["mapping (ESZSL)"][0], found["label names alone"][0]
    bare, none = (
        found["prototypes, names for unseen"][0],
        found["propagation, no graph (hops 0)"][0],
    )
    shuffled = found["propagation, shuffled domains"][0]
    assert f"accuracy of {names} %, `propagation` with the defaults {default} %" in promised
    assert f"to reach {chosen} % with `propagation` and {mapped} % with `mapping`" in promised
    assert f"bare names of unseen ones (a huge `ridge`) reach {bare} %" in promised
    assert f"without the graph {none} % and with a shuffled one {shuffled} %" in promised


def test_bad_arguments() -> None:
    anchors, pool, rows, _ = world(5)
    with pytest.raises(ValueError, match="ridge and class_ridge must be above 0"):
        label_zero_shot(rows, pool, anchors, TREE, ridge=0.0)
    with pytest.raises(ValueError, match="folds must be from 2 to 4"):
        bias_curve(pool, rows, anchors, TREE, folds=5)
    many = load_labels(["a", "b"], multilabel=True)
    with pytest.raises(ValueError, match="label_zero_shot needs labels that exclude"):
        label_zero_shot(rows, pool, anchors, many)
    unseen = rows.select([i for i, gold in enumerate(rows["gold"]) if gold[0] in (4, 7)])
    with pytest.raises(ValueError, match="no row of validation has a label of the pool"):
        bias_curve(pool, unseen, anchors, TREE, folds=2)
