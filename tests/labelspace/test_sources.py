"""Whatever describes labels becomes a label space."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features

from llmlabel.labelspace import load_labels
from llmlabel.labelspace.clean import Cleaning
from llmlabel.labelspace.files import entries_of
from llmlabel.labelspace.sources import import_labels


def told(cleaning: Cleaning) -> dict[str, list[tuple[str, ...]]]:
    return {change.kind: list(change.items) for change in cleaning.changes}


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


def test_entries_with_and_without_a_path() -> None:
    entries = [{"path": "a > b", "id": "x"}, {"id": "y", "name": "z", "parent": "x"}]
    expected = Cleaning(load_labels(entries), ())
    assert expected.labels.ids == ("a", "x", "y")
    table = Dataset.from_list(
        [dict.fromkeys(("path", "id", "name", "parent")) | entry for entry in entries]
    )
    for source in (entries, table, table.to_pandas()):
        assert import_labels(source) == expected
    slashed = [{**entries[0], "path": "a/b"}, entries[1]]
    assert import_labels(slashed, separator="/") == expected
    mixed = [["c", "d"], "e/f", {"id": "g", "path": None, "parent": "c"}]
    assert import_labels(mixed, separator="/").labels.ids == ("c", "c/d", "e", "e/f", "g")


def test_texts_that_are_paths_beside_entries() -> None:
    labels = import_labels(["a/b", {"id": "c", "parent": "a"}], separator="/").labels
    assert labels.ids == ("a", "a/b", "c")
    assert labels.parents == ((), ("a",), ("a",))
    plain = import_labels(["a > b", {"id": "c", "path": None, "parent": "a > b"}]).labels
    assert plain.parents == ((), ("a > b",))


def test_rows_of_other_tables_without_a_path_are_told() -> None:
    rows = [
        {"id": "t1", "text": "one", "path": "a > b"},
        {"id": "t2", "text": "two", "path": None},
    ]
    cleaning = import_labels(rows)
    assert cleaning.labels.ids == ("a", "a > b")
    assert told(cleaning) == {"unused column": [("id",), ("text",)], "no path": [("row 2",)]}
    asked = import_labels(rows, columns={"id": "id"})
    assert told(asked)["no path"] == [("row 2",)]


def test_whole_numbers_in_a_data_frame_stay_whole() -> None:
    rows = [
        {"id": 1, "name": "a", "parent": None, "parent_probs": None},
        {"id": 2, "name": "b", "parent": 1, "parent_probs": 0.5},
        {"id": 3, "name": "c", "parent": 1, "parent_probs": 1.0},
    ]
    frame = Dataset.from_list(rows).to_pandas()
    assert frame["parent"].dtype == float
    labels = import_labels(frame).labels
    assert labels.ids == ("1", "2", "3")
    assert labels.parents == ((), ("1",), ("1",))
    assert labels.parent_probs == ((), (0.5,), (1.0,))
    several = [
        {"id": "x", "parents": [], "parent_probs": []},
        {"id": "y", "parents": ["x"], "parent_probs": [0.25]},
    ]
    listed = import_labels(Dataset.from_list(several).to_pandas()).labels
    assert (listed.parents, listed.parent_probs) == (((), ("x",)), ((), (0.25,)))


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


def test_a_misspelt_key_of_a_label_file_is_no_branch_of_a_tree() -> None:
    source: dict[str, Any] = {"labels": ["a", {"id": "b"}], "multilable": True}
    with pytest.raises(ValueError, match=r"unknown key 'multilable'; did you mean 'multilabel'"):
        import_labels(source)
    with pytest.raises(ValueError, match="multilabel must be true or false; got 'yes'"):
        import_labels({"labels": ["a", "b"], "multilabel": "yes"})
    tree = import_labels({"labels": ["a", {"name": ["b"]}], "more": ["c"]}).labels
    assert tree.ids == ("labels", "a", "name", "b", "more", "c")


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
