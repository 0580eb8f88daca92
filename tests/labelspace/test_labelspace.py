import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmlabel.labelspace import LabelSpace, load_labels, save_labels

HARD_NAMES = [
    "bug",
    "bug, urgent",
    "bug: urgent",
    "bug?",
    'say "bug"',
    "it's",
    "no",
    "1.0",
    "null",
    "- dash",
    "# hash",
    "{brace}",
    "two\nlines",
    "naïve 漢字 😀",
    "line\u2028separator",
    "a\rb",
]
TREE = [
    {"id": "animal"},
    {"id": "pet", "description": "lives with people"},
    {"id": "dog", "name": "Dog", "parents": ["animal", "pet"]},
    {"id": "toy-dog", "name": "Dog", "parent": "dog", "description": "small: very small"},
]


def test_strings_are_id_and_name() -> None:
    labels = load_labels(["bug", "praise"])
    assert labels == LabelSpace(("bug", "praise"), ("bug", "praise"), ("", ""), ((), ()))
    assert len(labels) == 2
    assert labels.multilabel is False


def test_id_and_name_default_to_each_other() -> None:
    labels = load_labels([{"id": "b"}, {"name": "P"}, {"id": "c", "name": "C", "description": "d"}])
    assert labels.ids == ("b", "P", "c")
    assert labels.names == ("b", "P", "C")
    assert labels.descriptions == ("", "", "d")


def test_parents_one_or_several() -> None:
    labels = load_labels(TREE)
    assert labels.parents == ((), (), ("animal", "pet"), ("dog",))


def test_a_parent_named_twice_counts_once() -> None:
    labels = load_labels(["a", {"id": "b", "parents": ["a", "a"]}])
    assert labels.parents == ((), ("a",))


def test_null_description_and_parents_mean_none() -> None:
    labels = load_labels(["a", {"id": "b", "description": None, "parents": None}])
    assert (labels.descriptions[1], labels.parents[1]) == ("", ())


def test_white_space_at_the_ends_is_dropped() -> None:
    assert load_labels([" a ", {"id": "b", "description": "text\n"}]).ids == ("a", "b")
    assert load_labels(["a", {"id": "b", "description": "text\n"}]).descriptions[1] == "text"


def test_mapping_says_multilabel() -> None:
    assert load_labels({"labels": ["a"], "multilabel": True}).multilabel is True
    assert load_labels({"labels": ["a", "b"]}).multilabel is False
    assert load_labels({"labels": ["a", "b"]}, multilabel=True).multilabel is True


def test_texts() -> None:
    assert load_labels(TREE).texts() == [
        "animal",
        "pet: lives with people",
        "Dog",
        "Dog: small: very small",
    ]


def test_index_by_id_then_by_name() -> None:
    labels = load_labels([{"id": "x", "name": "y"}, {"id": "y", "name": "z"}])
    assert labels.index("x") == 0
    assert labels.index("y") == 1  # the id wins over the name of another label
    assert labels.index("z") == 1


def test_index_errors_name_the_way_out() -> None:
    labels = load_labels(TREE)
    with pytest.raises(ValueError, match=r"'Dog' is the name of several.*'dog', 'toy-dog'"):
        labels.index("Dog")
    with pytest.raises(ValueError, match=r"unknown label 'animl'; did you mean 'animal'\?"):
        labels.index("animl")
    with pytest.raises(ValueError, match=r"unknown label 'zzzz'; known are 'animal', 'pet'"):
        labels.index("zzzz")


def test_fingerprint_changes_with_every_field() -> None:
    labels = load_labels(TREE)
    assert re.fullmatch("[0-9a-f]{16}", labels.fingerprint)
    assert labels.fingerprint == load_labels(TREE).fingerprint
    others = [
        dataclasses.replace(labels, names=("animal", "pet", "Dog", "Toy")),
        dataclasses.replace(labels, descriptions=("", "", "", "")),
        dataclasses.replace(labels, parents=((), (), ("animal",), ("dog",))),
        dataclasses.replace(labels, multilabel=True),
        dataclasses.replace(
            labels, ids=("animal", "pet", "dog", "t"), parents=((),) * 3 + (("dog",),)
        ),
    ]
    assert len({labels.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_fingerprint_is_frozen() -> None:
    # Soft labels on disk carry it: a change here makes them unreadable.
    assert load_labels(["bug", "praise"]).fingerprint == "169823a03ca0c909"


def test_frozen_and_hashable() -> None:
    labels = load_labels(["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        labels.ids = ("c", "d")
    assert hash(labels) == hash(load_labels(["a", "b"]))


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".csv"])
@pytest.mark.parametrize(
    "entries", [HARD_NAMES, TREE, [{"id": "a", "description": 'x,"y"\n'}, "b"]]
)
def test_round_trip(tmp_path: Path, suffix: str, entries: list[Any]) -> None:
    labels = load_labels(entries)
    path = tmp_path / f"labels{suffix}"
    save_labels(labels, path)
    assert load_labels(path) == labels
    assert load_labels(str(path)).fingerprint == labels.fingerprint
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_round_trip_multilabel(tmp_path: Path, suffix: str) -> None:
    labels = load_labels(["only"], multilabel=True)
    save_labels(labels, tmp_path / f"labels{suffix}")
    assert load_labels(tmp_path / f"labels{suffix}") == labels


def test_csv_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multilabel: true; save as \.yaml"):
        save_labels(load_labels(["a"], multilabel=True), tmp_path / "labels.csv")
    with pytest.raises(ValueError, match=r"cannot save labels as '\.txt'"):
        save_labels(load_labels(["a", "b"]), tmp_path / "labels.txt")
    assert list(tmp_path.iterdir()) == []


def test_txt(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffbug, urgent\r\n\r\nbug\n  praise: yes? \n".encode())
    assert load_labels(path).names == ("bug, urgent", "bug", "praise: yes?")


def test_csv_columns(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text('name\nbug\n"bug, urgent"\n')
    assert load_labels(path).ids == ("bug", "bug, urgent")
    path.write_text("\ufeffid,name,description,parent\na,A,first,\nb,,,a\nc,C,,a|b\n", "utf-8")
    assert load_labels(path) == load_labels(
        [
            {"id": "a", "name": "A", "description": "first"},
            {"id": "b", "parent": "a"},
            {"id": "c", "name": "C", "parents": ["a", "b"]},
        ]
    )


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text(
        "multilabel: true\nlabels:\n- bug\n- {id: p, name: praise, description: 'a: b'}\n"
        "- id: q\n  parent: p\n"
    )
    assert load_labels(path) == LabelSpace(
        ("bug", "p", "q"), ("bug", "praise", "q"), ("", "a: b", ""), ((), (), ("p",)), True
    )


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["a", {"id": "b", "name": "B"}]))
    assert load_labels(path).names == ("a", "B")


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a", "b", "a"], r"labels 1 and 3 have the same id 'a'; give each"),
        (
            [{"id": "a", "name": "X"}, {"id": "b", "name": "X"}],
            r"'a' and 'b', both roots, have the same name 'X'; rename",
        ),
        (
            ["p", {"id": "a", "name": "X", "parent": "p"}, {"id": "b", "name": "X", "parent": "p"}],
            r"'a' and 'b', both children of 'p', have the same name 'X'",
        ),
        (["a", ""], r"label 2 has an empty name"),
        (["a", "  "], r"label 2 has an empty name"),
        (["a", {"id": "b", "name": ""}], r"label 2 has an empty name \(its id is 'b'"),
        (["a", {"id": "", "name": "b"}], r"label 2 has an empty id"),
        (
            ["animal", {"id": "b", "parent": "animl"}],
            r"'b' has the unknown parent 'animl'; did you mean 'animal'",
        ),
        (
            [{"id": "a", "parent": "c"}, {"id": "b", "parent": "a"}, {"id": "c", "parent": "b"}],
            r"cycle: 'a' -> 'c' -> 'b' -> 'a'; remove",
        ),
        (["r", {"id": "a", "parent": "a"}], r"cycle: 'a' -> 'a'"),
        (
            [
                {"id": "below", "parent": "a"},
                {"id": "a", "parent": "b"},
                {"id": "b", "parent": "a"},
            ],
            r"cycle: 'a' -> 'b' -> 'a'",
        ),
        (
            ["a", {"id": "b", "descripton": "x"}],
            r"label 2 has the unknown key 'descripton'; did you mean 'description'\?; allowed are "
            r"'id', 'name', 'description', 'parent', 'parents'",
        ),
        (["a", {"description": "x"}], r"label 2 has neither `id` nor `name`"),
        (["a", {"id": "b", "parent": "a", "parents": ["a"]}], r"both `parent` and `parents`"),
        (["a"], r"one label only \('a'\).*multilabel: true"),
        ([], r"there are no labels"),
        ({"labels": [], "multilabel": True}, r"there are no labels"),
        (["a", False], r"label 2 is the bool False, not text; put it in quotes"),
        (["a", 1.0], r"label 2 is the float 1.0, not text; put it in quotes"),
        (["a", None], r"label 2 is the NoneType None, not text; put it in quotes"),
        (["a", {"id": 7}], r"id of label 2 is the int 7, not text"),
        (["a", {"name": None}], r"name of label 2 is the NoneType None"),
        (["a", {"id": "b", "description": True}], r"description of label 2 is the bool True"),
        (["a", {"id": "b", "parents": [1]}], r"parent of label 2 is the int 1"),
        ({"label": ["a", "b"]}, r"unknown key 'label'; did you mean 'labels'"),
        ({"labels": "a"}, r"must be a list of names or of mappings; got str"),
        (
            {"labels": ["a", "b"], "multilabel": "yes"},
            r"multilabel must be true or false; got 'yes'",
        ),
    ],
)
def test_bad_labels(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_labels(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.yaml", "- true\n- no\n", r"label 1 is the bool True, not text; put it in quotes"),
        ("l.yaml", "- a\n- 1.0\n", r"label 2 is the float 1.0"),
        ("l.yaml", "- a\n- null\n", r"label 2 is the NoneType None"),
        ("l.yaml", "- a\n- bug: it broke\n", r"label 2 has the unknown key 'bug'"),
        (
            "l.yaml",
            "- id: a\n- id: b\n  name: x\n  name: y\n",
            r"line 4: 'name' is defined twice",
        ),
        ("l.yaml", "labels: [a, b]\nlabels: [c, d]\n", r"line 2: 'labels' is defined twice"),
        ("l.yaml", "- a\n- [b\n", r"line 3: expected"),
        ("l.yaml", "- a\n- \x00\n", r"special characters are not allowed"),
        ("l.yaml", "", r"must be a list of names or of mappings; got NoneType"),
        ("l.json", '["a",\n "b"', r"line 2 is not JSON"),
        ("l.json", '[{"id": "a", "id": "b"}, "c"]', r"the key 'id' is there twice"),
        ("l.json", '[{"": 1, "": 2}, "c"]', r"the key '' is there twice"),
        ("l.csv", "name,name\na,b\n", r"the column 'name' is there twice"),
        ("l.csv", "label\na\n", r"no column `id` or `name`.*'label'"),
        ("l.csv", "", r"no column `id` or `name`"),
        ("l.csv", "id,nam\na,b\nc,d\n", r"unknown key 'nam'; did you mean 'name'"),
        ("l.csv", "id,name\na,A\nb,B,c\n", r"line 3 has 3 fields, the first line has 2"),
        ("l.csv", 'id\na\n"b\n', r"not CSV"),
        ("l.csv", "id,description\na,x\n,y\n", r"label 2 has neither `id` nor `name`"),
        ("l.txt", "only\n", r"one label only"),
        ("l.txt", b"a\n\xff\n", r"byte 2 is not UTF-8"),
        ("l.xlsx", "a\nb\n", r"unknown label file type '\.xlsx'; use one of '\.yaml'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_labels(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"labels\.yaml: no such label file"):
        load_labels(tmp_path / "labels.yaml")


def test_direct_construction_is_checked() -> None:
    with pytest.raises(ValueError, match=r"equally many; got \[2, 1, 2, 2\]"):
        LabelSpace(("a", "b"), ("a",), ("", ""), ((), ()))
    with pytest.raises(ValueError, match=r"white space at an end of 'b '"):
        LabelSpace(("a", "b"), ("a", "b "), ("", ""), ((), ()))


def test_same_name_under_different_parents_is_fine() -> None:
    labels = load_labels(
        ["p", "q", {"id": "a", "name": "X", "parent": "p"}, {"id": "b", "name": "X", "parent": "q"}]
    )
    assert labels.names == ("p", "q", "X", "X")


def test_large_space_is_quick() -> None:
    entries = [{"id": str(n), "parents": [str(n // 10)] if n else []} for n in range(20_000)]
    labels = load_labels(entries)
    assert labels.index("19999") == 19_999
