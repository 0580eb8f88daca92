import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from reference.graph import random_dag
from reference.versions import NEW, OLD, SAME

from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.labelspace.versions import LabelDiff, describe, diff_labels, merge_labels


def space(parents: Mapping[str, Sequence[str]]) -> LabelSpace:
    return load_labels([{"id": id, "parents": list(some)} for id, some in parents.items()])


def test_every_kind_of_change_is_told() -> None:
    diff = diff_labels(OLD, NEW, same=SAME)
    assert diff.kept == ("animal", "plant")
    assert diff.renamed == ("bird", "stone")
    assert diff.moved == ("tree",)
    assert diff.split == {"cat": ("housecat", "wildcat")}
    assert diff.merged == {"canine": ("dog", "wolf")}
    assert diff.added == ("fungus",)
    assert diff.removed == ("moss",)
    assert diff.successors["bird"] == ("bird",)
    assert (diff.old_space, diff.new_space) == (OLD.fingerprint, NEW.fingerprint)
    assert not diff.is_empty
    assert describe(diff, OLD, NEW) == [
        "renamed 'bird': name 'birds' -> 'feathered'",
        "renamed 'stone': id 'stone' -> 'rock'",
        "moved 'tree': from 'plant' to 'animal'",
        "split 'cat' into 'housecat', 'wildcat'",
        "merged 'dog', 'wolf' into 'canine'",
        "added 'fungus' below the top",
        "removed 'moss' from 'plant'",
    ]


def test_without_a_mapping_ids_decide() -> None:
    diff = diff_labels(OLD, NEW)
    assert diff.removed == ("cat", "dog", "wolf", "moss", "stone")
    assert diff.added == ("housecat", "wildcat", "canine", "rock", "fungus")
    assert (diff.split, diff.merged) == ({}, {})


def test_equal_versions_have_no_changes() -> None:
    diff = diff_labels(OLD, OLD)
    assert diff.is_empty
    assert diff.kept == OLD.ids
    assert describe(diff, OLD, OLD) == []


PETS = load_labels(["pet", "wild", {"id": "cat", "parents": ["pet", "wild"]}])


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            load_labels(["pet", {"id": "cat", "parents": ["pet", "wild"]}, "wild"]),
            "order of labels",
        ),
        (
            load_labels(["pet", "wild", {"id": "cat", "parents": ["wild", "pet"]}]),
            "order of parents",
        ),
        (dataclasses.replace(PETS, parent_probs=((), (), (1.0, 1.0))), "parent_probs"),
        (dataclasses.replace(PETS, multilabel=True), "multilabel"),
        (
            LabelSpace(
                *[("wild", "pet", "cat")] * 2,
                *(("",) * 3, ((), (), ("pet", "wild"))),
                multilabel=True,
                parent_probs=((), (), (1.0, 0.5)),
            ),
            "order of labels, multilabel, parent_probs",
        ),
    ],
)
def test_what_differs_besides_the_labels_is_told(other: LabelSpace, line: str) -> None:
    refused = ", which refuses a change of multilabel" * ("multilabel" in line)
    for first, second in ((PETS, other), (other, PETS)):
        diff = diff_labels(first, second)
        assert diff.is_empty
        assert describe(diff, first, second) == [
            f"also changed: {line}; move old rows with carry_over{refused}"
        ]


@pytest.mark.parametrize("seed", range(20))
def test_labels_that_stay_themselves_in_another_order_are_told(seed: int) -> None:
    labels = random_dag(seed)
    at = np.random.default_rng(seed).permutation(len(labels)).tolist()
    columns = (labels.ids, labels.names, labels.descriptions, labels.parents)
    other = LabelSpace(*(tuple(column[i] for i in at) for column in columns))
    told = describe(diff_labels(labels, other), labels, other)
    assert bool(told) == (labels.fingerprint != other.fingerprint)


def test_other_labels_between_two_are_no_change_of_their_order() -> None:
    first, second = load_labels(["a", "b"]), load_labels(["new", "a", "between", "b"])
    told = describe(diff_labels(first, second), first, second)
    assert told == ["added 'new' below the top", "added 'between' below the top"]
    renamed = load_labels(["b", {"id": "a", "name": "A"}])
    told = describe(diff_labels(first, renamed), first, renamed)
    assert told == [
        "renamed 'a': name 'a' -> 'A'",
        "also changed: order of labels; move old rows with carry_over",
    ]


def test_a_child_of_a_renamed_split_or_merged_parent_has_not_moved() -> None:
    old = space({"a": [], "b": [], "x": ["a"], "y": ["b"], "z": ["a"]})
    new = space({"a1": [], "a2": [], "c": [], "x": ["a2"], "y": ["c"], "z": ["a1", "c"]})
    diff = diff_labels(old, new, same={"a": ["a1", "a2"], "b": ["c"]})
    assert diff.moved == ("z",)
    assert diff.kept == ("x", "y")


def test_a_diff_is_json() -> None:
    diff = diff_labels(OLD, NEW, same=SAME)
    content = json.loads(json.dumps(dataclasses.asdict(diff)))
    assert content["split"] == {"cat": ["housecat", "wildcat"]}

    from pydantic import TypeAdapter

    adapter = TypeAdapter(LabelDiff)
    assert adapter.validate_json(adapter.dump_json(diff)) == diff


@pytest.mark.parametrize(
    ("same", "message"),
    [
        ({"cta": ["bird"]}, "same: 'cta' is no id of the old labels; did you mean 'cat'"),
        (
            {"cat": ["housecta"]},
            "same: 'housecta' is no id of the new labels; did you mean 'housec",
        ),
    ],
)
def test_a_mapping_that_names_nobody_is_refused(same: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diff_labels(OLD, NEW, same=same)


# --------------------------------------------------------------------------------------- merging


def test_merged_versions_keep_the_ids_of_what_is_the_same() -> None:
    merged = merge_labels(OLD, NEW, same=SAME)
    assert merged.ids == (
        *("animal", "housecat", "wildcat", "canine", "bird", "plant", "tree", "stone", "fungus"),
    )
    assert merged.names == NEW.names
    assert merged.parents[merged.index("tree")] == ("animal",)


def test_an_id_that_had_another_meaning_is_never_used_again() -> None:
    old = space({"a": [], "b": [], "c": [], "d": []})
    # a is called b now, the new a is a part of c, b went into d; e was an id long ago
    new = space({"b": [], "a": ["d"], "c": [], "d": [], "e": []})
    same = {"a": ["b"], "b": ["d"], "c": ["a", "c"], "d": ["d"]}
    merged = merge_labels(old, new, same=same, retired=["e", "a-2"])
    assert merged.ids == ("a", "a-3", "c-2", "d-2", "e-2")
    assert merged.parents == ((), ("d-2",), (), (), ())


def test_merging_again_changes_nothing() -> None:
    merged = merge_labels(OLD, NEW, same=SAME)
    assert merge_labels(merged, merged) == merged
    assert merge_labels(OLD, merged, same={**SAME, "stone": ["stone"]}) == merged


def test_removed_labels_can_be_kept() -> None:
    merged = merge_labels(OLD, NEW, same=SAME, keep_removed=True)
    assert merged.ids[-1] == "moss"
    assert merged.parents[-1] == ("plant",)
    old = space({"a": [], "b": ["a"], "c": ["b", "a"], "d": []})
    new = space({"x": [], "d": []})
    merged = merge_labels(old, new, same={"a": ["x"]}, keep_removed=True)
    assert dict(zip(merged.ids, merged.parents, strict=True)) == {
        "a": (),
        "d": (),
        "b": ("a",),
        "c": ("b", "a"),
    }


def test_probabilities_of_edges_are_kept() -> None:
    new = LabelSpace(*[("a", "b")] * 2, ("", ""), ((), ("a",)), parent_probs=((), (0.75,)))
    old = space({"a": [], "c": ["a"]})
    merged = merge_labels(old, new, keep_removed=True)
    assert merged.parents == ((), ("a",), ("a",))
    assert merged.parent_probs == ((), (0.75,), (1.0,))
