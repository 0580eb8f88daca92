"""Label files of every type; what is common to all labels is tested in test_labelspace.py."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.labelspace.files import SUFFIXES, parse, write

SEPARATORS = [
    "a, b",
    "a; b",
    "a | b",
    "a|b",
    "a > b",
    "a :: b",
    "a: b",
    "a/b",
    "a\tb",
    "a\nb",
    "a\r\nb",
    "a\x85b",
    "a\u2028b",
    "a ! b",
    "{a} [b]",
    '["a"]',
    "[a",
    "# a",
    "a\\ b",
    'a "b"',
    "<a> & b",
    "%20",
    "http://x.y/z#a",
    "urn:x:y",
]
WRITTEN = [".yaml", ".json", ".jsonl", ".csv", ".ttl", ".owl", ".obo"]


def hard_labels() -> LabelSpace:
    """Every name is also an id, and a parent of the next two; the later parent comes first."""
    return load_labels(
        [
            {
                "id": name,
                "name": name,
                "description": f"of {name}" if place % 2 else "",
                "parents": list(reversed(SEPARATORS[max(place - 2, 0) : place])),
            }
            for place, name in enumerate(SEPARATORS)
        ]
    )


@pytest.mark.parametrize("suffix", WRITTEN)
def test_names_ids_and_parents_with_separators_survive(tmp_path: Path, suffix: str) -> None:
    labels = hard_labels()
    path = tmp_path / f"labels{suffix}"
    save_labels(labels, path)
    back = load_labels(path)
    assert back == labels
    assert back.fingerprint == labels.fingerprint
    assert write(back, path) == path.read_bytes().decode()


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".jsonl", ".csv"])
def test_probabilities_of_parents_survive(tmp_path: Path, suffix: str) -> None:
    entries = ["a", "b", {"id": "c", "parents": ["a", "b"], "parent_probs": [0.1 + 0.2, 1]}]
    labels = load_labels(entries)
    assert labels.parent_probs == ((), (), (0.30000000000000004, 1.0))
    save_labels(labels, tmp_path / f"labels{suffix}")
    assert load_labels(tmp_path / f"labels{suffix}") == labels


@pytest.mark.parametrize("suffix", [".ttl", ".owl", ".obo"])
def test_an_ontology_cannot_hold_probabilities(tmp_path: Path, suffix: str) -> None:
    labels = load_labels(["a", {"id": "b", "parents": ["a"], "parent_probs": [0.5]}])
    path = tmp_path / f"labels{suffix}"
    with pytest.raises(
        ValueError, match=rf"{suffix}: a {suffix} cannot hold parent_probs; save as"
    ):
        save_labels(labels, path)
    assert not path.exists()
    save_labels(dataclasses.replace(labels, parent_probs=()), path)
    assert load_labels(path).parents == ((), ("a",))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".ttl", ".owl", ".obo"])
def test_what_cannot_say_multilabel(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        ValueError, match=rf"a {suffix} cannot say multilabel: true; save as \.yaml"
    ):
        save_labels(load_labels(["a"], multilabel=True), tmp_path / f"l{suffix}")


def test_unknown_types_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot save labels as '\.rdf'; use one of '\.yaml'"):
        save_labels(load_labels(["a", "b"]), tmp_path / "l.rdf")
    with pytest.raises(ValueError, match=r"unknown label file type '\.xml'; use one of"):
        load_labels(tmp_path / "l.xml")
    assert {".jsonl", ".ttl", ".rdf", ".owl", ".nt", ".jsonld", ".obo"} < set(SUFFIXES)


@pytest.mark.parametrize("suffix", [".jsonl", ".yaml", ".csv", ".obo"])
def test_gz_is_read(tmp_path: Path, suffix: str) -> None:
    labels = load_labels(["a", {"id": "b", "parent": "a"}])
    path = tmp_path / f"labels{suffix}.gz"
    path.write_bytes(gzip.compress(write(labels, Path(f"l{suffix}")).encode()))
    assert load_labels(path) == labels
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"gz: not a whole \.gz file"):
        load_labels(path)


# ------------------------------------------------------------------------------------- .jsonl


def test_jsonl_has_an_entry_a_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('"a"\n\n{"id": "b", "name": "line\u2028end", "parent": "a"}\n', "utf-8")
    assert load_labels(path) == load_labels(
        ["a", {"id": "b", "name": "line\u2028end", "parent": "a"}]
    )
    path.write_text('"a"\n{"id": "b"\n', "utf-8")
    with pytest.raises(ValueError, match=r"l\.jsonl: line 2: line 1 is not JSON"):
        load_labels(path)


# --------------------------------------------------------------------------------------- .csv


def test_csv_parents_are_separated_or_a_json_list(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text(
        'id,parents,parent_probs\na,,\n[b,a,\nc,a|[b,0.5|1\nd,"[""a"",""c""]",\ne,[b,\n'
    )
    labels = load_labels(path)
    assert labels.parents == ((), ("a",), ("a", "[b"), ("a", "c"), ("[b",))
    assert labels.parent_probs == ((), (1.0,), (0.5, 1.0), (1.0, 1.0), (1.0,))


# -------------------------------------------------------------------------------------- paths


def test_paths_make_the_labels_above_them(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("path,description\nsport > ball > golf,with clubs\nsport,games\nart,\n")
    assert load_labels(path) == LabelSpace(
        ids=("sport > ball", "sport > ball > golf", "sport", "art"),
        names=("ball", "golf", "sport", "art"),
        descriptions=("", "with clubs", "games", ""),
        parents=(("sport",), ("sport > ball",), (), ()),
    )


def test_a_path_may_have_an_id_that_its_children_use() -> None:
    labels = load_labels(
        [
            {"path": ["sport", "golf"], "id": "g"},
            {"path": "sport", "id": "s", "name": "Sports"},
            {"path": "sport > ski", "id": "k"},
        ]
    )
    assert labels.ids == ("g", "s", "k")
    assert labels.names == ("golf", "Sports", "ski")
    assert labels.parents == (("s",), (), ("s",))


def test_the_separator_of_paths_is_an_argument() -> None:
    labels = parse([{"path": "Topic :: A > B"}], multilabel=False, separator=" :: ")
    assert labels.ids == ("Topic", "Topic :: A > B")
    assert labels.names == ("Topic", "A > B")


def test_a_name_with_the_separator_is_not_two() -> None:
    labels = load_labels([{"path": ["a > b", "c"]}, {"path": ["a", "b", "c"]}])
    assert labels.ids == ("a\\ > b", "a\\ > b > c", "a", "a > b", "a > b > c")
    assert labels.names == ("a > b", "c", "a", "b", "c")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a >  > b"}, "path of label 1 has an empty name: 'a >  > b'; the separator is"),
        ({"path": ""}, "path of label 1 has an empty name: ''"),
        ({"path": []}, "path of label 1 has an empty name"),
        ({"path": 3}, "path of label 1 must be text or a list of names; got 3"),
        ({"path": ["a", 3]}, "path of label 1 is the int 3, not text"),
        ({"path": "a > b", "parent": "c"}, "label 1 has both `path` and `parent`; keep one"),
    ],
)
def test_bad_paths(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_labels([entry, "b"])


def test_errors_number_the_entries_as_they_were_given() -> None:
    with pytest.raises(ValueError, match=r"^label 2 is the int 7, not text"):
        load_labels([{"path": "a > b > c"}, 7])
    with pytest.raises(ValueError, match=r"^label 2 has the unknown key 'nmae'"):
        load_labels([{"path": "a > b > c"}, {"nmae": "d"}])


def test_one_path_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels 2 and 3 have the same id 'a > b'"):
        load_labels([{"path": "a > b"}, {"path": "a > b"}])


# ---------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (["x"], "parent_probs of label 2 must be numbers, one a parent; got 'x'"),
        ([True], "parent_probs of label 2 must be numbers, one a parent; got True"),
        ([0.5, 0.5], "parent_probs must have one number for each parent"),
        ([1.5], r"1\.5 is no probability of a parent"),
        ([float("nan")], "nan is no probability of a parent"),
    ],
)
def test_bad_probabilities(tmp_path: Path, probs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_labels(["a", {"id": "b", "parents": ["a"], "parent_probs": probs}])
    if probs == ["x"]:
        (tmp_path / "l.csv").write_text("id,parents,parent_probs\na,,\nb,a,x\n")
        with pytest.raises(ValueError, match=message):
            load_labels(tmp_path / "l.csv")


def test_json_nested_without_end_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"l\.json: the brackets are nested too deeply"):
        load_labels(path)


def test_20000_children_of_one_parent(tmp_path: Path) -> None:
    ids = tuple(str(number) for number in range(20_001))
    labels = LabelSpace(ids, ids, ("",) * len(ids), ((), *[("0",)] * 20_000))
    save_labels(labels, tmp_path / "l.csv")
    assert load_labels(tmp_path / "l.csv") == labels


def test_json_is_what_people_can_edit() -> None:
    labels = load_labels(["a", {"id": "b", "parent": "a", "description": "é"}])
    assert json.loads(write(labels, Path("l.json"))) == {
        "multilabel": False,
        "labels": [
            {"id": "a", "name": "a"},
            {"id": "b", "name": "b", "description": "é", "parents": ["a"]},
        ],
    }
