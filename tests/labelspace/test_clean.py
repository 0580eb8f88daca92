"""What is broken is repaired, and each repair is told."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.labelspace.clean import (
    RULES,
    Change,
    Cleaning,
    clean_labels,
    cleaned,
)
from llmlabel.labelspace.graph import closing_edges
from llmlabel.labelspace.sources import import_labels


def told(cleaning: Cleaning) -> dict[str, list[tuple[str, ...]]]:
    return {change.kind: list(change.items) for change in cleaning.changes}


def edges_of(labels: LabelSpace) -> list[tuple[str, str]]:
    pairs = zip(labels.ids, labels.parents, strict=True)
    return [(id, parent) for id, parents in pairs for parent in parents]


# --------------------------------------------------------------------------- cycles: slow twin


def leads_to(edges: list[tuple[int, int]], start: int, end: int) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        at = waiting.pop()
        more = {to for of, to in edges if of == at} - seen
        seen |= more
        waiting += more
    return end in seen


def slow_closing_edges(edges: list[tuple[int, int]], weights: list[float]) -> list[int]:
    """Each edge by falling weight, unless its end already leads to its start."""
    kept: list[tuple[int, int]] = []
    removed = []
    for place in sorted(range(len(edges)), key=lambda place: (-weights[place], place)):
        start, end = edges[place]
        if leads_to(kept, end, start):
            removed.append(place)
        else:
            kept.append((start, end))
    return sorted(removed)


def random_graph(seed: int) -> tuple[int, list[tuple[int, int]], list[float]]:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(2, 25))
    edges = [(int(a), int(b)) for a, b in rng.integers(0, nodes, (int(rng.integers(1, 60)), 2))]
    choices = [1.0] if seed % 2 else [0.1, 0.4, 0.5, 0.9]
    return nodes, edges, rng.choice(choices, len(edges)).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_closing_edges_equal_the_slow_twin(seed: int) -> None:
    nodes, edges, weights = random_graph(seed)
    assert closing_edges(nodes, edges, weights) == slow_closing_edges(edges, weights)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_removed_is_told_and_could_not_stay(seed: int) -> None:
    nodes, edges, weights = random_graph(seed)
    names = [f"n{node}" for node in range(nodes)]
    given = [(names[a], names[b]) for a, b in edges]
    cleaning = clean_labels(
        names, [(*edge, prob) for edge, prob in zip(given, weights, strict=True)]
    )
    assert cleaning.labels.ids == tuple(names)
    kept, change = edges_of(cleaning.labels), told(cleaning)
    assert set(change) <= {"self-loop", "repeated edge", "cycle"}
    removed = [tuple(item) for items in change.values() for item in items]
    assert Counter(kept + removed) == Counter(given)
    assert all(child == parent for child, parent in change.get("self-loop", []))
    assert set(change.get("repeated edge", [])) <= set(given)
    # LabelSpace refuses a cycle, and with any of the removed edges there would be one.
    pairs = [(names.index(child), names.index(parent)) for child, parent in kept]
    for child, parent in change.get("cycle", []):
        assert leads_to(pairs, names.index(parent), names.index(child))


@pytest.mark.parametrize("seed", range(20))
def test_cleaning_twice_changes_nothing(seed: int) -> None:
    nodes, edges, weights = random_graph(seed)
    entries = [{"id": f"n{node}", "name": f" name {node % 3} "} for node in range(nodes)]
    pairs = [(f"n{a}", f"n{b}", prob) for (a, b), prob in zip(edges, weights, strict=True)]
    once = clean_labels(entries, pairs)
    again = import_labels(once.labels)
    assert again == Cleaning(once.labels, ())


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_edges_is_no_matter_where_probabilities_differ(seed: int) -> None:
    nodes, edges, _ = random_graph(seed)
    rng = np.random.default_rng(seed)
    probs = rng.permutation(len(edges)) / len(edges)
    given = [(f"n{a}", f"n{b}", prob) for (a, b), prob in zip(edges, probs, strict=True)]
    names = [f"n{node}" for node in range(nodes)]
    shuffled = [given[place] for place in rng.permutation(len(given))]
    one, other = clean_labels(names, given), clean_labels(names, shuffled)
    assert set(edges_of(one.labels)) == set(edges_of(other.labels))
    assert {k: Counter(v) for k, v in told(one).items()} == {
        k: Counter(v) for k, v in told(other).items()
    }


# ---------------------------------------------------------------------------------- bad input


def test_the_last_edge_of_a_cycle_goes() -> None:
    entries = [
        {"id": "a", "parent": "b"},
        {"id": "b", "parent": "c"},
        {"id": "c", "parent": "a"},
        {"id": "d", "parent": "a"},
    ]
    with pytest.raises(ValueError, match="the parents form a cycle: 'a' -> 'b' -> 'c' -> 'a'"):
        load_labels(entries)
    cleaning = import_labels(entries)
    assert cleaning.labels.parents == (("b",), ("c",), (), ("a",))
    assert told(cleaning) == {"cycle": [("c", "a")]}
    assert cleaning.summary() == (
        "1 x cycle (the least probable edge of it is removed; of equal ones the last): 'c' / 'a'"
    )


def test_the_least_probable_edge_of_a_cycle_goes() -> None:
    edges = [("a", "b", 0.6), ("b", "c", 0.2), ("c", "a", 0.9), ("d", "a", None)]
    cleaning = clean_labels("abcd", edges)
    assert cleaning.labels.parents == (("b",), (), ("a",), ("a",))
    assert cleaning.labels.parent_probs == ((0.6,), (), (0.9,), (1.0,))
    assert told(cleaning) == {"cycle": [("b", "c")]}


def test_self_loops_and_2600_repeated_edges() -> None:
    names = [f"n{number}" for number in range(100)]
    edges = [(f"n{number}", f"n{number // 2}") for number in range(100)] * 27
    cleaning = clean_labels(names, edges)
    assert len(cleaning.labels) == 100
    assert edges_of(cleaning.labels) == [(f"n{n}", f"n{n // 2}") for n in range(1, 100)]
    assert {kind: len(items) for kind, items in told(cleaning).items()} == {
        "self-loop": 27,
        "repeated edge": 99 * 26,
    }
    assert "2574 x repeated edge (one edge, with the highest probability): 'n1' / 'n0';" in (
        cleaning.summary()
    )


def test_a_repeated_edge_has_the_highest_probability() -> None:
    cleaning = clean_labels("ab", [("a", "b", 0.2), ("a", "b", 0.7), ("a", "b", 0.3)])
    assert cleaning.labels.parent_probs == ((0.7,), ())


BLOCKS = [  # of ICD-10-CM: the block C50 has the code C50, which has the code C50.0
    {"id": "2", "name": "Neoplasms", "level": "chapter"},
    {"id": "C50", "name": "Malignant neoplasms of breast", "level": "block", "parent": "2"},
    {"id": "C50", "name": "Malignant neoplasm of breast", "level": "code", "parent": "C50"},
    {"id": "C50.0", "name": "Of nipple and areola", "level": "code", "parent": "C50"},
]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 1, 3, 2]])
def test_block_ids_that_are_also_codes(order: list[int]) -> None:
    cleaning = import_labels([BLOCKS[place] for place in order])
    labels = cleaning.labels
    assert dict(zip(labels.ids, labels.parents, strict=True)) == {
        "2": (),
        "block:C50": ("2",),
        "C50": ("block:C50",),
        "C50.0": ("C50",),
    }
    assert labels.names[labels.index("C50")] == "Malignant neoplasm of breast"
    assert told(cleaning) == {"id on several levels": [("C50", "block:C50")]}


def test_entries_may_say_parent_or_parents() -> None:
    entries = ["a", {"id": "b", "parent": "a"}, {"id": "c", "parents": ["a", "b"]}]
    expected = ((), ("a",), ("a", "b"))
    assert clean_labels(entries).labels.parents == expected
    assert import_labels(entries[1:], absent="make").labels.parents[:2] == expected[1:]
    filled = [{"id": "a"}, {"id": "b", "parent": "a", "parents": None}, entries[2]]
    assert clean_labels(filled).labels.parents == expected


def test_without_levels_one_id_is_one_label() -> None:
    rows = [{key: row[key] for key in row if key != "level"} for row in BLOCKS]
    cleaning = import_labels(rows)
    assert cleaning.labels.ids == ("2", "C50", "C50.0")
    assert cleaning.labels.names[1] == "Malignant neoplasms of breast"
    assert told(cleaning) == {
        "repeated label": [("C50", "Malignant neoplasm of breast")],
        "self-loop": [("C50", "C50")],
    }


def test_what_a_repeated_label_loses_is_told() -> None:
    entries = [
        {"id": "a", "parent": "b"},
        {"id": "a", "name": "A", "description": "one", "parent": "c"},
        {"id": "a", "name": "other", "description": "two"},
        {"id": "a", "name": "A"},
        "b",
        "c",
    ]
    cleaning = import_labels(entries)
    assert cleaning.labels.texts() == ["A: one", "b", "c"]
    assert cleaning.labels.parents == (("b", "c"), (), ())
    assert told(cleaning) == {"repeated label": [("a",), ("a", "other", "two"), ("a",)]}


@pytest.mark.parametrize("kind", [int, float, str])
def test_numbered_levels_look_for_the_parent_above(kind: type) -> None:
    entries = [
        {"id": "x", "level": kind(9)},
        {"id": "x", "level": kind(10), "parent": "x"},
        {"id": "x", "level": kind(11), "parent": "x"},
        {"id": "y", "level": kind(11), "parent": "x"},
    ]
    labels = import_labels(entries[::-1]).labels
    assert dict(zip(labels.ids, labels.parents, strict=True)) == {
        "y": (f"{kind(10)}:x",),
        "x": (f"{kind(10)}:x",),
        f"{kind(10)}:x": (f"{kind(9)}:x",),
        f"{kind(9)}:x": (),
    }


def test_a_level_that_some_labels_lack() -> None:
    entries = [{"id": "x"}, {"id": "x", "level": "code", "parent": "x"}, {"id": "y", "parent": "x"}]
    cleaning = import_labels(entries)
    assert cleaning.labels.ids == ("x (2)", "x", "y")
    assert cleaning.labels.parents == ((), ("x (2)",), ("x (2)",))


def test_a_new_id_that_is_taken() -> None:
    entries = [{"id": "a", "level": 1}, {"id": "a", "level": 2}, {"id": "1:a", "level": 2}]
    assert import_labels(entries).labels.ids == ("1:a (2)", "a", "1:a")


def test_a_parent_that_does_not_exist() -> None:
    entries = [{"id": "01", "parent": "TOTAL"}, {"id": "02", "parent": "TOTAL"}]
    with pytest.raises(ValueError, match="label '01' has the unknown parent 'TOTAL'"):
        load_labels(entries)
    cleaning = import_labels(entries)
    assert cleaning.labels.parents == ((), ())
    assert told(cleaning) == {"unknown parent": [("01", "TOTAL"), ("02", "TOTAL")]}
    cleaning = import_labels(entries, absent="make")
    assert cleaning.labels.ids == ("01", "02", "TOTAL")
    assert cleaning.labels.parents == (("TOTAL",), ("TOTAL",), ())
    assert told(cleaning) == {"made": [("TOTAL",)]}


def test_edges_of_labels_that_do_not_exist() -> None:
    cleaning = clean_labels(["a", "b"], [("c", "a"), ("b", "d")])
    assert told(cleaning) == {
        "unknown parent": [("b", "d")],
        "unknown label of an edge": [("c", "a")],
    }
    cleaning = clean_labels(["a", "b"], [("c", "a"), ("b", "d")], absent="make")
    assert cleaning.labels.ids == ("a", "b", "c", "d")
    assert edges_of(cleaning.labels) == [("b", "d"), ("c", "a")]


def test_two_roots_and_several_parents_are_fine() -> None:
    entries = ["a", "b", {"id": "c", "parents": ["a", "b"]}]
    assert import_labels(entries) == Cleaning(load_labels(entries), ())


def test_one_label_is_refused_unless_it_is_a_question() -> None:
    with pytest.raises(ValueError, match=r"one label only \('a'\), and a choice needs two"):
        import_labels(["a"])
    with pytest.raises(ValueError, match="there are no labels"):
        import_labels([])
    assert import_labels(["a"], multilabel=True).labels.multilabel is True


def test_20000_children_and_a_chain_of_10000() -> None:
    names = [f"n{number}" for number in range(20_001)]
    star = clean_labels(names, [(name, "n0") for name in names])
    assert len(star.labels.parents[0]) == 0
    assert edges_of(star.labels) == [(name, "n0") for name in names[1:]]
    assert told(star) == {"self-loop": [("n0", "n0")]}
    ring = [(number, (number + 1) % 10_000) for number in range(10_000)]
    for edges in (ring[::-1], [ring[n * 7919 % 10_000] for n in range(10_000)]):
        assert closing_edges(10_000, edges, [1.0] * 10_000) == [9_999]
    chain = clean_labels(names[:10_000], [(names[a], names[b]) for a, b in ring])
    assert told(chain) == {"cycle": [("n9999", "n0")]}


def test_names_that_siblings_share_get_their_ids() -> None:
    entries = [
        {"id": "a", "name": "Other"},
        {"id": "b", "name": "Other"},
        {"id": "c", "name": "Other (b)"},
        {"id": "d", "name": "Other", "parents": ["c"]},
    ]
    cleaning = import_labels(entries)
    assert cleaning.labels.names == ("Other (a)", "Other (b) (2)", "Other (b)", "Other")
    assert told(cleaning) == {
        "repeated name": [("a", "Other", "Other (a)"), ("b", "Other", "Other (b) (2)")]
    }
    reverse = import_labels(entries[::-1])
    assert set(told(reverse)["repeated name"]) == set(told(cleaning)["repeated name"])


def test_texts_that_are_none() -> None:
    rows = [
        {"id": 7, "name": " seven\n", "description": None},
        {"id": "8", "name": float("nan"), "parent": 7},
        {"id": "", "name": ""},
        {"name": "nine", "parent": ["7 ", None]},
    ]
    cleaning = import_labels(rows)
    assert cleaning.labels.ids == ("7", "8", "nine")
    assert cleaning.labels.names == ("seven", "8", "nine")
    assert cleaning.labels.parents == ((), ("7",), ("7",))
    assert told(cleaning) == {
        "white space": [(" seven\n", "seven"), ("7 ", "7")],
        "not text": [("7", "int")],
        "no id or name": [("label 3",)],
        "no name": [("8", "8")],
    }


@pytest.mark.parametrize("prob", [1.5, -0.1, "x", float("inf")])
def test_no_probability(prob: Any) -> None:
    with pytest.raises(
        ValueError, match="is no probability of a parent; give a number from 0 to 1"
    ):
        clean_labels("ab", [("a", "b", prob)])


def test_a_cleaning_is_json() -> None:
    cleaning = import_labels([{"id": "a", "parent": "b"}, {"id": "b", "parent": "a"}])
    adapter = TypeAdapter(Cleaning)
    assert adapter.validate_json(adapter.dump_json(cleaning)) == cleaning
    assert json.loads(adapter.dump_json(cleaning))["changes"] == [
        {"kind": "cycle", "items": [["b", "a"]]}
    ]
    assert cleaned(cleaning) is cleaning.labels
    assert set(told(cleaning)) <= set(RULES)


def test_a_change_in_one_short_line() -> None:
    change = Change("self-loop", (("a" + " word" * 100, "b"), *[("c", "c")] * 8))
    assert len(str(change)) < 200
    assert "\n" not in str(Change("white space", (("a\nb", "c"),)))
    assert str(Change("white space", ((" a", "a"),))).endswith(": ' a' / 'a'")
    assert str(change).startswith("9 x self-loop (the edge is removed): 'a word")
