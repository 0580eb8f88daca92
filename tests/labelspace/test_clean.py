"""What is broken is repaired, and each repair is told."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from pydantic import TypeAdapter

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.labelspace.clean import (
    RULES,
    Change,
    Cleaning,
    clean_labels,
    cleaned,
)
from llmlabel.labelspace.files import entries_of
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
    for edges in (ring, ring[::-1], [ring[n * 7919 % 10_000] for n in range(10_000)]):
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


# ------------------------------------------------------------------------------------ sources


def test_columns_of_rows() -> None:
    rows = [
        {"code": "1", "title": "One", "up": None, "size": 3},
        {"code": "2", "title": "Two", "up": "1", "size": 4},
    ]
    columns = {"id": "code", "name": "title", "parent": "up"}
    for source in (rows, Dataset.from_list(rows)):
        cleaning = import_labels(source, columns=columns)
        assert entries_of(cleaning.labels) == [
            {"id": "1", "name": "One"},
            {"id": "2", "name": "Two", "parents": ["1"]},
        ]
        assert told(cleaning) == {"unused column": [("size",)]}
    with pytest.raises(ValueError, match="there is no column 'kode'; there are 'code', 'title'"):
        import_labels(rows, columns={"id": "kode"})
    with pytest.raises(ValueError, match=r"the unknown meaning 'nam'; did you mean 'name'\?"):
        import_labels(rows, columns={"nam": "title"})


def test_rows_in_files(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "One"}, {"id": "2", "text": "a, b", "parent": "1", "level": 2}]
    expected = load_labels([{"id": "1", "name": "One"}, {"id": "2", "name": "a, b", "parent": "1"}])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "l.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "l.json").write_text(json.dumps(rows))
    (tmp_path / "l.csv").write_text('id,text,parent,level\n1,One,,\n2,"a, b",1,2\n')
    for name in ("l.jsonl.gz", "l.json", "l.csv"):
        assert import_labels(tmp_path / name) == Cleaning(expected, ())
    (tmp_path / "l.csv").write_text("id,text,parent\n1,One,2\n2,Two,1\n")
    assert told(import_labels(str(tmp_path / "l.csv"))) == {"cycle": [("2", "1")]}
    (tmp_path / "l.csv").write_text("id\n")
    with pytest.raises(ValueError, match=r"l\.csv: there are no labels"):
        import_labels(tmp_path / "l.csv")


def test_rows_of_edges() -> None:
    rows = [
        {"id": "train-0", "parent": "spot, building", "child": "dike", "split": "train"},
        {"id": "train-1", "parent": "spot, building", "child": "pier", "split": "test"},
        {"id": "train-2", "parent": "harbour", "child": "pier", "split": "test"},
    ]
    cleaning = import_labels(rows)
    assert cleaning.labels.ids == ("spot, building", "dike", "pier", "harbour")
    assert cleaning.labels.parents == (
        (),
        ("spot, building",),
        ("spot, building", "harbour"),
        (),
    )
    assert told(cleaning) == {"unused column": [("id",), ("split",)]}
    roots = import_labels([{"child": "a", "parent": None}, {"child": "b", "parent": ""}])
    assert roots == Cleaning(load_labels(["a", "b"]), ())
    probs = import_labels([{**row, "prob": 0.5} for row in rows]).labels.parent_probs
    assert probs == ((), (0.5,), (0.5, 0.5), ())


def test_paths() -> None:
    expected = load_labels(
        [
            {"id": "a", "name": "a"},
            {"id": "a > b", "name": "b", "parent": "a"},
            {"id": "a > c", "name": "c", "parent": "a"},
            {"id": "b", "name": "b"},
        ]
    )
    rows = [["a", "b"], ["a", "c"], ["b", ""], ["a", "b"]]
    tables = [{"x": row[0], "y": row[1] or None} for row in rows]
    for cleaning in (
        import_labels(rows),
        import_labels(np.array(rows)),
        import_labels(["a > b", "a > c", "b"], separator=" > "),
        import_labels([{"path": "a > b"}, {"path": "a > c"}, {"path": "b"}]),
        import_labels(tables, columns={"path": ["x", "y"]}),
    ):
        assert cleaning == Cleaning(expected, ())


def test_paths_with_ids_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("id,path,description\nx,a > b,of b\ny,a > c,\n")
    plain = import_labels(path)
    assert plain.labels.ids == ("a", "a > b", "a > c")
    assert told(plain) == {"unused column": [("id",), ("description",)]}
    asked = import_labels(path, columns={"id": "id", "description": "description"})
    assert asked.labels.ids == ("a", "x", "y")
    assert asked.labels.names == ("a", "b", "c")
    assert asked.labels.descriptions == ("", "of b", "")
    assert asked.labels.parents == ((), ("a",), ("a",))
    mixed = import_labels(["art", {"path": "a > b", "id": "x"}])
    assert mixed.labels.ids == ("art", "a", "x")


def test_a_data_frame() -> None:
    frame = Dataset.from_list([{"id": "a", "parent": None}, {"id": "b", "parent": "a"}]).to_pandas()
    assert import_labels(frame) == Cleaning(load_labels(["a", {"id": "b", "parent": "a"}]), ())
    assert import_labels(frame["id"]).labels.ids == ("a", "b")


def test_trove_classifiers_are_paths() -> None:
    names = ["Topic :: Internet", "Topic :: Other/Nonlisted Topic", "Topic :: Internet :: Log"]
    labels = import_labels(names, separator=" :: ").labels
    assert labels.ids == ("Topic", *names)
    assert labels.names == ("Topic", "Internet", "Other/Nonlisted Topic", "Log")


@pytest.mark.parametrize(
    "names",
    [
        ["no", "a > b", "c, d"],
        ("no", "a > b", "c, d"),
        np.array(["no", "a > b", "c, d"]),
        np.array(["no", "a > b", "c, d"], dtype=object),
        ClassLabel(names=["no", "a > b", "c, d"]).names,
        Features({"label": ClassLabel(names=["no", "a > b", "c, d"])})["label"].names,
    ],
)
def test_class_lists(names: Any) -> None:
    assert import_labels(names) == Cleaning(load_labels(["no", "a > b", "c, d"]), ())


def test_classes_that_are_numbers() -> None:
    cleaning = import_labels(np.array([0, 1]))
    assert cleaning.labels.ids == ("0", "1")
    assert told(cleaning) == {"not text": [("0", "int"), ("1", "int")]}


def test_a_tree_of_mappings_and_lists() -> None:
    cleaning = import_labels({"pets": ["cat", {"dog": ["puppy"]}], "plants": None})
    assert entries_of(cleaning.labels) == [
        {"id": "pets", "name": "pets"},
        {"id": "cat", "name": "cat", "parents": ["pets"]},
        {"id": "dog", "name": "dog", "parents": ["pets"]},
        {"id": "puppy", "name": "puppy", "parents": ["dog"]},
        {"id": "plants", "name": "plants"},
    ]
    assert cleaning.changes == ()
    assert import_labels([{"pets": ["cat"]}, {"plants": "fern"}]).labels.ids == (
        "pets",
        "cat",
        "plants",
        "fern",
    )


def test_a_group_and_its_member_with_one_name() -> None:
    cleaning = import_labels({"joy": ["joy", "love"], "fear": ["fear"]})
    assert cleaning.labels.ids == ("1:joy", "joy", "love", "1:fear", "fear")
    assert cleaning.labels.names == ("joy", "joy", "love", "fear", "fear")
    assert cleaning.labels.parents == ((), ("1:joy",), ("1:joy",), (), ("1:fear",))
    assert told(cleaning) == {"id on several levels": [("joy", "1:joy"), ("fear", "1:fear")]}


def test_a_name_in_several_places_is_one_label() -> None:
    cleaning = import_labels({"airline": ["greeting", "seat", "seat"], "bank": ["greeting"]})
    assert cleaning.labels.ids == ("airline", "greeting", "seat", "bank")
    assert cleaning.labels.parents[1] == ("airline", "bank")
    assert told(cleaning) == {
        "repeated label": [("seat", "airline")],
        "several places": [("greeting", "bank")],
    }


def test_a_tree_that_holds_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "l.yaml").write_text("a: &x\n  b: *x\n")
    with pytest.raises(ValueError, match=r"l\.yaml: the tree has more than 100,000 levels"):
        import_labels(tmp_path / "l.yaml")
    lists = ["a: &l0 [x, y]\n"] + [
        f"a{n}: &l{n} {{p: *l{n - 1}, q: *l{n - 1}}}\n" for n in range(1, 40)
    ]
    (tmp_path / "l.yaml").write_text("".join(lists))  # 2^40 places
    assert len(import_labels(tmp_path / "l.yaml").labels) < 1000


def test_a_label_file_or_label_space_says_multilabel() -> None:
    for source in ({"labels": ["a"], "multilabel": True}, load_labels(["a"], multilabel=True)):
        assert import_labels(source) == Cleaning(load_labels(["a"], multilabel=True), ())
    assert import_labels({"labels": {"a": ["b"]}}).labels.parents == ((), ("a",))


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot make labels of a int; give a list, a mapping or"):
        import_labels(7)
    (tmp_path / "l.yaml").write_text("just words\n")
    with pytest.raises(ValueError, match=r"l\.yaml: cannot make labels of a str"):
        import_labels(tmp_path / "l.yaml")
    with pytest.raises(FileNotFoundError, match="no such label file"):
        import_labels(tmp_path / "none.yaml")


def test_real_sets(tmp_path: Path) -> None:
    data = Path(__file__).parents[3] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the shared data is not here")
    hs = import_labels(data / "hs_codes" / "hs_codes.jsonl.gz")
    assert (len(hs.labels), len(hs.labels.roots), len(hs.labels.leaves)) == (6939, 97, 5613)
    assert len(told(hs)["unknown parent"]) == 97
    schema = import_labels(data / "llms4ol" / "taxonomy_schemaorg.jsonl")
    assert (len(schema.labels), len(schema.labels.roots)) == (1375, 12)
    assert sum(len(parents) > 1 for parents in schema.labels.parents) == 65
    assert [child for child, _ in told(schema)["repeated edge"]] == ["HowToSection", "HowToStep"]
    clinc = import_labels(data / "clinc150_oos" / "taxonomy.json")
    assert (len(clinc.labels.roots), len(clinc.labels.leaves), clinc.changes) == (10, 150, ())
    ekman = import_labels(data / "goemotions" / "taxonomy_ekman.json")
    assert len(told(ekman)["id on several levels"]) == 7
    assert ekman.labels.parents[ekman.labels.index("joy")] == ("1:joy",)


def test_a_csv_of_edges(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("child,parent\na,b|c\nd,b|c\n")
    labels = import_labels(tmp_path / "e.csv").labels
    assert dict(zip(labels.ids, labels.parents, strict=True)) == {
        "b|c": (),
        "a": ("b|c",),
        "d": ("b|c",),
    }
