import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import discover as twins

from llmlabel.data import with_columns
from llmlabel.engine import Reply
from llmlabel.engine.fake import FakeEngine
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy import discover as module
from llmlabel.taxonomy.discover import (
    discover,
    gcd_metrics,
    name_new_labels,
    novel_queries,
    query_metrics,
    stable_mapping,
    with_new_labels,
)

SEEDS = pytest.mark.parametrize("seed", range(20))


@SEEDS
@pytest.mark.parametrize("round", [1, 2, 3])
def test_queries_equal_the_twin(seed: int, round: int) -> None:
    """Also fewer queries than new labels, and more than there are rows of new clusters."""
    rng = np.random.default_rng(seed)
    labels, rows = int(rng.integers(3, 9)), int(rng.integers(5, 60))
    known = int(rng.integers(0, labels))
    probs = rng.dirichlet(np.full(labels, 0.5), rows)
    for n in (0, 1, rows // 3, rows, rows + 4):
        got = novel_queries(probs, known, n, round=round)
        assert got.tolist() == twins.novel_queries(probs.tolist(), known, n, round, 2)


def test_queries_of_a_known_case() -> None:
    """Label 0 is known; rows 1 to 5 lie in the clusters of 1 and 2, row 0 and 6 in that of 0."""
    top = {
        0: (0, 0.5),
        1: (1, 0.9),
        2: (1, 0.6),
        3: (1, 0.7),
        4: (2, 0.8),
        5: (1, 0.5),
        6: (0, 0.9),
    }
    probs = np.array([[0.0, 0.0, 0.0]] * 7)
    for row, (label, most) in top.items():
        probs[row, label], probs[row, (label + 1) % 3] = most, 1 - most - 0.01
    assert novel_queries(probs, 1, 4, round=1).tolist() == [1, 3, 4, 2]  # sure; 2 a cluster, top-up
    assert novel_queries(probs, 1, 4, round=2).tolist() == [5, 2, 4, 3]  # doubtful
    assert novel_queries(probs, 1, 1, round=2).tolist() == [5]
    assert novel_queries(probs, 1, 4, round=2, adaptive_round=3).tolist() == [1, 3, 4, 2]
    assert novel_queries(probs, 1, 7, round=1).tolist() == [1, 3, 2, 4, 5, 6, 0]


@SEEDS
def test_mapping_inverts_a_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = int(rng.integers(2, 12))
    cluster_of = rng.permutation(labels)
    true = np.append(np.arange(labels), rng.integers(0, labels, 10))
    assert stable_mapping(cluster_of[true], true, labels).tolist() == cluster_of.tolist()


@SEEDS
def test_labels_without_rows_stay_if_they_can(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, met = int(rng.integers(4, 10)), int(rng.integers(1, 4))
    true, taken = rng.choice(labels, met, replace=False), rng.choice(labels, met, replace=False)
    mapping = stable_mapping(taken, true, labels)
    assert mapping[true].tolist() == taken.tolist()
    for label in set(range(labels)) - set(true.tolist()) - set(taken.tolist()):
        assert mapping[label] == label


def test_labels_without_rows_stay_where_they_are_unless_somebody_needs_the_place() -> None:
    none = np.array([], dtype=np.int64)
    assert stable_mapping(none, none, 4).tolist() == [0, 1, 2, 3]
    # label 1 was found in cluster 3: only these two change places
    clusters, true = np.array([3, 3, 1, -1, 0]), np.array([1, 1, 1, 2, -1])
    assert stable_mapping(clusters, true, 4).tolist() == [0, 3, 2, 1]


@SEEDS
def test_accuracy_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, rows = int(rng.integers(1, 7)), int(rng.integers(1, 40))
    known = int(rng.integers(0, labels + 1))
    gold = rng.integers(-1, labels, rows)
    guesses = np.where(rng.random(rows) < 0.7, (gold + 1) % labels, rng.integers(-1, labels, rows))
    expected, pairs, best = twins.gcd_metrics(guesses.tolist(), gold.tolist(), known)
    got = gcd_metrics(guesses, gold, known)
    assert got["all"] == pytest.approx(expected["all"])
    cluster = stable_mapping(guesses, gold, len(best))
    agree = [sum(pairs[c[g], g] for g in range(len(best))) for c in (best, cluster.tolist())]
    assert agree[0] == agree[1]
    if tuple(cluster.tolist()) == best:  # else another assignment is as good, with other shares
        assert got == pytest.approx(expected)


def test_accuracy_of_a_known_case() -> None:
    gold, guesses = np.array([0, 0, 1, 1, 2, 2, 2, -1]), np.array([5, 5, 1, 0, 0, 0, -1, 0])
    # the clusters 5, 1 and 0 are the labels 0, 1 and 2
    assert gcd_metrics(guesses, gold, 2) == pytest.approx(
        {"all": 5 / 7, "old": 3 / 4, "new": 2 / 3}
    )
    assert gcd_metrics(guesses, gold, 3)["new"] == 0.0


@SEEDS
def test_scores_of_queries_equal_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = int(rng.integers(2, 9))
    known = int(rng.integers(0, labels))
    gold = rng.integers(0, labels, int(rng.integers(0, 30)))
    expected = twins.query_metrics(gold.tolist(), known, labels)
    assert query_metrics(gold, known, labels) == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------- the rounds


class Encoder:
    """Texts of one kind ("b 3") lie together; kinds are at right angles."""

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        vectors = np.zeros((len(texts), 8))
        for row, text in enumerate(texts):
            kind, _, number = text.partition(" ")
            noise = np.random.default_rng(int(number or 9)).standard_normal(8)
            vectors[row] = np.eye(8)[(ord(kind[0]) - ord("a")) % 8] + 0.15 * noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


KINDS = "abcde"
SPACE = with_new_labels(load_labels(["a", "b"]), new=3)
GOLD = List(Value("int32"))


def kinds(each: int = 12) -> Dataset:
    """The first two rows of a and b have gold."""
    names = [f"{kind} {number}" for kind in KINDS for number in range(each)]
    gold = [[KINDS.index(n[0])] if n in ("a 0", "a 1", "b 0", "b 1") else None for n in names]
    return with_columns(Dataset.from_dict({"id": names, "text": names}), {"gold": (gold, GOLD)})


def answered(dataset: Dataset, labels: dict[str, int]) -> Dataset:
    """Somebody writes the label of each row that was asked about."""
    columns = zip(dataset["gold"][:], dataset["query"][:], dataset["text"][:], strict=True)
    gold = [old if asked is None else [labels[text[0]]] for old, asked, text in columns]
    return with_columns(dataset, {"gold": (gold, GOLD)})


def clusters(dataset: Dataset) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for text, ids in zip(dataset["text"][:], dataset["label_ids"][:], strict=True):
        found.setdefault(text[0], set()).add(ids[0])
    return found


def test_kinds_without_a_name_are_found_and_asked_about() -> None:
    found = discover(kinds(), SPACE, Encoder(), known=2, queries=7)
    groups = clusters(found)
    assert groups["a"] == {0}
    assert groups["b"] == {1}
    assert sorted(groups[kind].pop() for kind in "cde") == [2, 3, 4]
    places = {text[0]: [] for text in found["text"][:]}
    for text, place in zip(found["text"][:], found["query"][:], strict=True):
        if place is not None:
            places[text[0]].append(place)
    assert sorted(place for some in places.values() for place in some) == list(range(1, 8))
    assert [len(places[kind]) for kind in "ab"] == [0, 0]
    assert sorted(len(places[kind]) for kind in "cde") == [2, 2, 3]  # 7 // 3 each, one at the top


def test_soft_labels_are_the_softmax_of_cosines_with_the_centres() -> None:
    rows = kinds()
    wrong = [
        [0] if text == "c 3" else gold
        for text, gold in zip(rows["text"][:], rows["gold"][:], strict=True)
    ]
    rows = with_columns(rows, {"gold": (wrong, GOLD)})  # far from the others of its label
    found = discover(rows, SPACE, Encoder(), known=2, queries=0, temperature=0.3)
    vectors = Encoder().encode(rows["text"][:])
    nearest = [ids[0] for ids in found["label_ids"][:]]
    first = np.array([g[0] if g else n for g, n in zip(wrong, nearest, strict=True)])
    assert nearest[rows["text"][:].index("c 3")] > 1
    centres = np.stack([vectors[first == label].sum(axis=0) for label in range(5)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    expected = np.exp(vectors @ centres.T / 0.3)
    expected /= expected.sum(axis=1, keepdims=True)
    dense = SoftLabels.from_dataset(found, SPACE).dense()
    np.testing.assert_allclose(dense, expected, rtol=1e-5)
    assert found["query"][:] == [None] * 60
    asked = discover(rows, SPACE, Encoder(), known=2, queries=60, temperature=0.3)
    row = next(r for r, place in enumerate(asked["query"][:]) if place == 55)
    second, best = np.argsort(dense[row])[-2:]
    assert asked["query_reason"][row] == (
        f"nearest to {SPACE.names[best]!r}, then {SPACE.names[second]!r}; "
        f"margin {dense[row, best] - dense[row, second]:.3f}"
    )


def test_ids_do_not_jump_when_answers_come() -> None:
    """The one asked calls the kinds new-1, new-2, new-3 in an order of their own."""
    first = discover(kinds(), SPACE, Encoder(), known=2, queries=3)
    before = clusters(first)
    # d gets the number that another kind had; nobody was asked about the others
    own = {2, 3, 4} - before["d"]
    taken = min(own)
    only_d = answered(first.filter(lambda row: row["text"][0] == "d"), {"d": taken})
    gold = dict(zip(only_d["id"][:], only_d["gold"][:], strict=True))
    asked = [gold.get(id, old) for id, old in zip(first["id"][:], first["gold"][:], strict=True)]
    rows = with_columns(first, {"gold": (asked, GOLD)})
    second = clusters(discover(rows, SPACE, Encoder(), known=2, queries=3, round=2))
    assert second["d"] == {taken}
    for kind in "abce":
        moved = before[kind] == {taken}
        assert second[kind] == (before["d"] if moved else before[kind])


def test_answers_of_all_kinds_decide_the_numbers() -> None:
    found, names = kinds(), {"a": 0, "b": 1, "c": 4, "d": 2, "e": 3}
    for round in (1, 2, 3):
        found = discover(found, SPACE, Encoder(), known=2, queries=6, round=round)
        if round > 1:
            assert clusters(found) == {kind: {label} for kind, label in names.items()}
        found = answered(found, names)
    assert sum(gold is not None for gold in found["gold"][:]) == 4 + 3 * 6


def test_nothing_depends_on_the_order_of_rows() -> None:
    rows = kinds()
    shuffled = rows.select(np.random.default_rng(0).permutation(len(rows)))
    one, other = (discover(r, SPACE, Encoder(), known=2, queries=9) for r in (rows, shuffled))
    columns = ("label_ids", "label_probs", "query", "query_reason")
    for name in columns:
        values = dict(zip(other["id"][:], other[name][:], strict=True))
        assert [values[id] for id in one["id"][:]] == one[name][:]


def test_rows_that_cannot_be_asked_about() -> None:
    """A blank text, gold that is known, and gold that is known to be none of the labels."""
    rows = kinds(3).select([0, 1, 3, 4, 6, 9, 12])  # a a b b c d e
    texts = [*rows["text"][:6], " "]
    gold = [*rows["gold"][:4], [], None, None]
    rows = with_columns(rows, {"text": (texts, Value("string")), "gold": (gold, GOLD)})
    space = with_new_labels(load_labels(["a", "b"]), new=2)
    found = discover(rows, space, Encoder(), known=2, queries=7)
    assert found["query"][:] == [None] * 5 + [1, None]
    assert found["label_ids"][6] == []
    assert found["error"][:] == [None] * 6 + ["empty text"]
    with pytest.raises(ValueError, match="3 labels are to be found in 2 rows; give more rows"):
        discover(rows, SPACE, Encoder(), known=2, queries=7)


def test_a_label_that_lost_all_its_rows_is_looked_for_again() -> None:
    """Round 1 put c and d together; the new labels that got no row are drawn among rows far away."""
    rows, kind = kinds(), dict(zip(KINDS, (0, 1, 2, 2, 3), strict=True))
    probs = np.eye(5)[[kind[text[0]] for text in rows["text"][:]]]
    first = SoftLabels.from_dense(probs, SPACE).add_to(rows)
    second = discover(first, SPACE, Encoder(), known=2, queries=0, round=2)
    groups = clusters(second)
    assert sorted(len(labels) for labels in groups.values()) == [1] * 5
    assert groups["e"] == {3}
    assert groups["c"] | groups["d"] == {2, 4}


def test_the_best_of_ten_starts_is_kept() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((60, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gold = np.full(60, -1)
    each = []
    for start in range(10):
        drawn = module._drawn(vectors, gold, gold, 6, np.random.default_rng([8, start]))
        each.append(module._settled(vectors, drawn, gold))
    best = int(np.argmax([nearness for _, nearness in each]))
    assert 0 < best < 9
    found = module._best_centres(vectors, gold, gold, 6, seed=8)
    np.testing.assert_array_equal(found, each[best][0])
    centres, nearness = each[best]
    assert nearness == pytest.approx((vectors @ centres.T).max(axis=1).sum())


def test_starts_are_drawn_far_from_what_is_there() -> None:
    """Three tight groups, one of them with gold: each draw takes another group."""
    vectors = np.repeat(np.eye(3), [5, 90, 5], axis=0)
    gold = np.where(np.arange(100) == 0, 0, -1)
    for seed in range(20):
        centres = module._drawn(vectors, gold, gold, 3, np.random.default_rng(seed))
        assert sorted(centres.argmax(axis=1).tolist()) == [0, 1, 2]
        assert centres[0].tolist() == [1, 0, 0]


def test_an_empty_cluster_keeps_its_centre() -> None:
    vectors = np.eye(3)
    centres = module._means(vectors, np.array([0, 0, -1]), np.array([[1.0, 0, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(centres, [[2**-0.5, 2**-0.5, 0], [0, 0, 1]])


def test_room_for_new_labels() -> None:
    assert SPACE.ids == ("a", "b", "new-1", "new-2", "new-3")
    assert SPACE.names[2:] == ("new 1", "new 2", "new 3")
    with pytest.raises(ValueError, match="'new-1' is there already"):
        with_new_labels(SPACE, new=1)
    with pytest.raises(ValueError, match="new must be at least 1"):
        with_new_labels(SPACE, new=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": 5}, "known must be below the 5 labels there are; got 5"),
        ({"known": 4}, "2 of 4 known labels have no row with gold, the first is 'new-1'"),
        ({"queries": -1}, "queries=-1 and round=1 must be at least 0 and 1"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite; got 0.0"),
        ({"round": 2}, "the column 'label_ids' is missing"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(kinds(), SPACE, Encoder(), **{"known": 2, "queries": 3, **options})


def test_fewer_texts_than_labels() -> None:
    few = kinds().select([0, 1, 12, 13])
    with pytest.raises(ValueError, match="discover: 4 rows have a text, fewer than the 5 labels"):
        discover(few, SPACE, Encoder(), known=2, queries=3)
    blank = with_columns(kinds(), {"text": ([" "] * 60, Value("string"))})
    with pytest.raises(ValueError, match="discover: 0 rows have a text"):
        discover(blank, SPACE, Encoder(), known=2, queries=3)


def test_a_hierarchy_is_refused() -> None:
    tree = load_labels(["a", {"id": "b", "parent": "a"}])
    with pytest.raises(ValueError, match="flat, single-label space; take the leaves"):
        discover(kinds(), tree, Encoder(), known=1, queries=3)


class Namer(FakeEngine):
    """Names a group by the letter that its first text begins with."""

    def generate(self, chats: Sequence[Chat], **options: Any) -> list[Reply]:
        names = {"c": "cherries", "d": "apples", "e": "eggs"}
        groups = [chat[-1]["content"].partition("- ")[2][0] for chat in chats]
        said = [{"name": names[group], "description": f"all {names[group]}"} for group in groups]
        return [Reply(json.dumps(one), "stop") for one in said]


def test_new_labels_get_names_from_their_texts() -> None:
    """new-2 has no rows, and the name of new-4 is taken by a known label."""
    known = [{"id": "a", "name": "Apples", "description": "red"}, {"id": "b", "name": "bees"}]
    labels = with_new_labels(load_labels(known), new=4)
    place = {"a": 0, "b": 1, "c": 4, "d": 5, "e": 2}
    rows = kinds(3)
    probs = 0.9 * np.eye(6)[[place[text[0]] for text in rows["text"][:]]]
    probs[0] = 0  # a row that could not be read
    found = SoftLabels.from_dense(probs, labels).add_to(rows)
    named = name_new_labels(found, labels, Namer(), known=2, use_case="to sort food")
    assert named.ids == labels.ids
    assert named.names == ("Apples", "bees", "eggs", "new 2", "cherries", "apples (new 4)")
    assert named.descriptions == ("red", "", "all eggs", "", "all cherries", "all apples")
