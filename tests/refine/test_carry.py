"""Labelled rows moved to another version of their label space."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import versions as reference
from reference.versions import NEW, OLD, SAME
from scipy.optimize import linear_sum_assignment

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.labelspace.versions import diff_labels
from llmlabel.refine.carry import carry_over, mapping_from_rows
from llmlabel.softlabels import VOTES, SoftLabels

INTS = List(Value("int32"))


def space(parents: Mapping[str, Sequence[str]], *, multilabel: bool = False) -> LabelSpace:
    entries = [{"id": id, "parents": list(some)} for id, some in parents.items()]
    return load_labels(entries, multilabel=multilabel)


# ------------------------------------------------------------------------------ mapping from rows


def answered(answers: Sequence[str], labels: LabelSpace, ids: Sequence[str] = ()) -> Dataset:
    probs = np.zeros((len(answers), len(labels)))
    for row, answer in enumerate(answers):
        if answer:
            probs[row, labels.index(answer)] = 1.0
    ids = list(ids) or [f"r{row}" for row in range(len(answers))]
    return SoftLabels.from_dense(probs, labels).add_to(Dataset.from_dict({"id": ids}))


def test_splits_and_merges_are_found_and_counted() -> None:
    old, new = load_labels(["a", "b", "c", "d"]), load_labels(["p", "q", "r", "s"])
    pairs = ["ap"] * 6 + ["aq"] * 4 + ["br"] * 5 + ["cr"] * 7 + ["cp"] * 1 + ["ds"] * 2 + ["dr"]
    first = answered([pair[0] for pair in pairs], old)
    second = answered([pair[1] for pair in pairs], new)
    found = mapping_from_rows(first, second, old, new)
    # a stray third of d's rows went to r, which is mostly c: no part of d
    assert found.same == {"a": ("p", "q"), "b": ("r",), "c": ("r",), "d": ("s",)}
    assert found.counts["a"] == {"p": 6, "q": 4}
    assert found.counts["d"] == {"r": 1, "s": 2}
    assert found.rows == 26
    diff = diff_labels(old, new, same=found.same)
    assert diff.split == {"a": ("p", "q")}
    assert diff.merged == {"r": ("b", "c")}
    strict = mapping_from_rows(first, second, old, new, share=0.5)
    assert strict.same["a"] == ("p",)


def test_rows_are_joined_by_id_and_unanswered_ones_left_out() -> None:
    old, new = load_labels(["a", "b"]), load_labels(["p", "q"])
    first = answered(["a", "b", "", "a"], old, ["1", "2", "3", "4"])
    second = answered(["q", "p", "p", "q"], new, ["2", "1", "3", "9"])
    found = mapping_from_rows(first, second, old, new)
    assert found.counts == {"a": {"p": 1}, "b": {"q": 1}}
    assert found.rows == 2


def test_a_mapping_without_common_rows_is_refused() -> None:
    old, new = load_labels(["a", "b"]), load_labels(["p", "q"])
    first, second = answered(["a"], old, ["1"]), answered(["p"], new, ["2"])
    with pytest.raises(ValueError, match="none of the 1 rows with an old label has a new one"):
        mapping_from_rows(first, second, old, new)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\].*got 0"):
        mapping_from_rows(first, first, old, old, share=0.0)


@pytest.mark.parametrize("seed", range(20))
def test_mapping_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = load_labels(list("abcde")), load_labels(list("pqrstu"))
    pairs = [
        (old.ids[i], new.ids[j])
        for i, j in zip(rng.integers(5, size=60), rng.integers(6, size=60), strict=True)
    ]
    first, second = answered([a for a, _ in pairs], old), answered([b for _, b in pairs], new)
    found = mapping_from_rows(first, second, old, new, share=0.25)
    assert {id: set(some) for id, some in found.same.items()} == reference.mapping(pairs, 0.25)
    shuffled = rng.permutation(60)
    again = mapping_from_rows(first.select(shuffled), second, old, new, share=0.25)
    assert again == found


def test_one_to_one_undoes_a_permutation_and_is_the_best_assignment() -> None:
    rng = np.random.default_rng(0)
    old = load_labels([f"o{i}" for i in range(8)])
    new = load_labels([f"n{i}" for i in range(8)])
    to = rng.permutation(8)
    rows = rng.integers(8, size=400)
    noisy = np.where(rng.random(400) < 0.4, rng.integers(8, size=400), to[rows])
    first = answered([old.ids[i] for i in rows], old)
    second = answered([new.ids[i] for i in noisy], new)
    found = mapping_from_rows(first, second, old, new, one_to_one=True)
    assert found.same == {old.ids[i]: (new.ids[to[i]],) for i in range(8)}
    counts = np.zeros((8, 8))
    np.add.at(counts, (rows, noisy), 1)
    best = counts[linear_sum_assignment(-counts)].sum()
    assert sum(found.counts[i][j] for i, (j,) in found.same.items()) == best


# ---------------------------------------------------------------------------------- carrying over


def rows_of(probs: Sequence[Mapping[str, float]], labels: LabelSpace, **columns: tuple) -> Dataset:
    dense = np.zeros((len(probs), len(labels)))
    for row, some in enumerate(probs):
        for id, prob in some.items():
            dense[row, labels.index(id)] = prob
    base = Dataset.from_dict({"id": [f"r{row}" for row in range(len(probs))]})
    return SoftLabels.from_dense(dense, labels).add_to(with_columns(base, columns))


def shown(dataset: Dataset, labels: LabelSpace) -> list[dict[str, float]]:
    dense = SoftLabels.from_dataset(dataset, labels).dense()
    return [
        {labels.ids[at]: pytest.approx(row[at], abs=1e-6) for at in np.flatnonzero(row)}
        for row in dense
    ]


def at(labels: LabelSpace, *ids: str) -> list[int]:
    return [labels.index(id) for id in ids]


def test_probability_goes_where_its_label_went() -> None:
    dataset = rows_of(
        [
            {"bird": 0.5, "stone": 0.3, "tree": 0.2},
            {"dog": 0.25, "wolf": 0.5},
            {"cat": 0.6, "animal": 0.1},
            {"moss": 0.7, "plant": 0.2},
            {},
        ],
        OLD,
    )
    carried = carry_over(dataset, OLD, NEW, SAME)
    assert shown(carried, NEW) == [
        {"bird": 0.5, "rock": 0.3, "tree": 0.2},
        {"canine": 0.75},
        {"animal": 0.7},
        {"plant": 0.9},
        {},
    ]
    assert carried["label_space"][:] == [NEW.fingerprint] * 5
    assert "error" not in carried.column_names
    assert (
        carry_over(dataset, OLD, NEW, diff_labels(OLD, NEW, same=SAME)).to_list()
        == carried.to_list()
    )


def test_what_has_no_place_is_missing_and_told(caplog: pytest.LogCaptureFixture) -> None:
    old, new = load_labels(["a", "b", "c"]), load_labels(["a1", "a2", "b"])
    dataset = rows_of(
        [{"a": 0.6, "b": 0.4}, {"c": 1.0}, {}],
        old,
        gold=([[1], None, [1]], INTS),
        error=([None, "text cut", "unread"], Value("string")),
    )
    with caplog.at_level(logging.INFO, "llmlabel"):
        carried = carry_over(dataset, old, new, {"a": ["a1", "a2"]})
    assert shown(carried, new) == [{"b": 0.4}, {}, {}]
    assert carried["error"][:] == [
        None,
        "text cut; nothing is left of the soft label in the new labels",
        "unread",
    ]
    assert carried["gold"][:] == [[2], None, [2]]
    assert caplog.messages == ["carry_over: 1 of 3 rows lost a label; error says why"]


def test_gold_is_moved_or_unknown_but_never_guessed() -> None:
    golds = [at(OLD, id) for id in ("bird", "dog", "stone", "cat", "moss")] + [[], None]
    dataset = with_columns(
        Dataset.from_dict({"id": [f"{n}" for n in range(7)]}), {"gold": (golds, INTS)}
    )
    carried = carry_over(dataset, OLD, NEW, SAME)
    assert carried["gold"][:] == [
        *(at(NEW, id) for id in ("bird", "canine", "rock")),
        *(None, None, None, None),
    ]
    assert carried["error"][:] == [
        *(None, None, None),
        "gold is unknown: label 'cat' was split",
        "gold is unknown: label 'moss' was removed",
        "gold is unknown: none of the old labels, and labels were added",
        None,
    ]
    nothing_added = space({id: [] for id in OLD.ids if id != "moss"})
    assert carry_over(dataset, OLD, nothing_added)["gold"][5] == []


def test_candidates_sets_and_votes_move() -> None:
    votes = [
        {"source": "m", "label_id": label, "prob": prob}
        for label, prob in zip(
            at(OLD, "dog", "wolf", "cat", "moss"), (0.25, 0.25, 0.3, 0.2), strict=True
        )
    ]
    votes.append({"source": "n", "label_id": OLD.index("wolf"), "prob": 1.0})
    dataset = rows_of(
        [{"dog": 1.0}, {"dog": 1.0}, {"dog": 1.0}],
        OLD,
        candidates=([at(OLD, "wolf", "cat", "dog"), None, at(OLD, "moss")], INTS),
        set_ids=([at(OLD, "cat"), [], at(OLD, "dog", "wolf")], INTS),
        votes=([votes, [], None], VOTES),
    )
    carried = carry_over(dataset, OLD, NEW, SAME)
    assert carried["candidates"][:] == [
        at(NEW, "canine", "housecat", "wildcat"),
        None,
        at(NEW, "plant"),
    ]
    assert carried["set_ids"][:] == [at(NEW, "housecat", "wildcat"), [], at(NEW, "canine")]
    assert carried["votes"][1:] == [[], None]
    assert [(v["source"], NEW.ids[v["label_id"]], v["prob"]) for v in carried["votes"][0]] == [
        ("m", "canine", 0.5),
        ("m", "animal", pytest.approx(0.3)),
        ("m", "plant", pytest.approx(0.2)),
        ("n", "canine", 1.0),
    ]
    gone = space({"x": [], "y": []})
    empty = carry_over(dataset.select_columns(["candidates", "set_ids", "votes"]), OLD, gone)
    assert empty["candidates"][:] == [None, None, None]  # all labels, as nothing is known
    assert empty["set_ids"][:] == [[], [], []]
    assert empty["votes"][0] == []


def test_abstentions_stay_and_votes_without_a_probability_are_whole() -> None:
    votes = [
        {"source": "m", "label_id": None, "prob": None},
        {"source": "n", "label_id": OLD.index("wolf"), "prob": None},
        {"source": "o", "label_id": OLD.index("bird"), "prob": 0.5},
        {"source": "o", "label_id": None, "prob": 0.5},
    ]
    dataset = with_columns(Dataset.from_dict({"id": ["r"]}), {"votes": ([votes], VOTES)})
    carried = carry_over(dataset, OLD, NEW, SAME)["votes"][0]
    assert carried == [
        votes[0],
        {"source": "n", "label_id": NEW.index("canine"), "prob": 1.0},
        {"source": "o", "label_id": NEW.index("bird"), "prob": 0.5},
        votes[3],
    ]


def test_in_a_multilabel_space_the_largest_member_counts() -> None:
    old = load_labels(["a", "b", "c"], multilabel=True)
    new = load_labels(["ab", "c", "d"], multilabel=True)
    dataset = rows_of([{"a": 0.9, "b": 0.8, "c": 0.7}], old, gold=([[]], INTS))
    carried = carry_over(dataset, old, new, {"a": ["ab"], "b": ["ab"]})
    assert shown(carried, new) == [{"ab": 0.9, "c": 0.7}]
    assert carried["gold"][0] == []


def test_a_removed_label_of_two_parents_goes_to_the_one_that_is_left_or_above_both() -> None:
    old = space({"r": [], "a": ["r"], "b": ["r"], "x": ["a", "b"], "y": []})
    dataset = rows_of([{"x": 1.0}], old)
    without = {id: list(p) for id, p in zip(old.ids, old.parents, strict=True) if id != "x"}
    assert shown(carry_over(dataset, old, space(without)), space(without)) == [{"r": 1.0}]
    one = space({"r": [], "b": ["r"], "y": []})
    # a is gone too, so that what was below it is at r, which is above b
    assert shown(carry_over(dataset, old, one), one) == [{"r": 1.0}]
    other = space({"b": [], "y": []})
    assert shown(carry_over(dataset, old, other), other) == [{"b": 1.0}]


@pytest.mark.parametrize("seed", range(20))
def test_carry_over_equals_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    multilabel = bool(seed % 2)

    def random_parents(prefix: str, labels: int) -> dict[str, list[str]]:
        ids = [f"{prefix}{n}" for n in range(labels)]
        return {
            id: sorted({ids[p] for p in rng.integers(n, size=rng.integers(0, 3))}) if n else []
            for n, id in enumerate(ids)
        }

    before, after = random_parents("o", 8), random_parents("n", 7)
    old, new = space(before, multilabel=multilabel), space(after, multilabel=multilabel)
    same = {
        id: rng.choice(new.ids, size=rng.integers(0, 4), replace=False).tolist() for id in old.ids
    }
    probs = rng.dirichlet([0.5] * 8, size=6) * rng.uniform(0.5, 1.0, size=(6, 1))
    rows = [dict(zip(old.ids, row, strict=True)) for row in probs.tolist()]
    dataset = rows_of(rows, old)
    diff = diff_labels(old, new, same=same)
    carried = shown(carry_over(dataset, old, new, diff), new)
    expected = [reference.carried(row, before, after, same, multilabel=multilabel) for row in rows]
    assert carried == [{id: p for id, p in row.items() if p > 0} for row in expected]
    if not multilabel:  # nothing is invented: what is there is what has a place
        lost = [
            sum(p for id, p in row.items() if reference.place(before, after, same, id) is None)
            for row in rows
        ]
        sums = SoftLabels.from_dataset(carry_over(dataset, old, new, diff), new).dense().sum(axis=1)
        np.testing.assert_allclose(sums, probs.sum(axis=1) - lost, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"gold": ([[9]], INTS)}, "row 0: gold has the label 9, but the old labels are 0 to 8"),
        ({"set_ids": ([[-1]], INTS)}, "row 0: set_ids has the label -1"),
        ({"candidates": ([[None]], INTS)}, "row 0: candidates has the label None"),
        (
            {"votes": ([[{"source": "a", "label_id": 10, "prob": 1.0}]], VOTES)},
            "row 0: votes has the label 10",
        ),
        ({"gold": (["cat"], Value("string"))}, "the column 'gold' holds string"),
    ],
)
def test_positions_of_other_labels_are_refused(column: dict, message: str) -> None:
    dataset = with_columns(Dataset.from_dict({"id": ["r"]}), column)
    with pytest.raises(ValueError, match=message):
        carry_over(dataset, OLD, NEW, SAME)


def test_spaces_that_do_not_fit_are_refused() -> None:
    dataset = rows_of([{"a": 1.0}], load_labels(["a", "b"]))
    with pytest.raises(ValueError, match="rows carry soft labels of label space"):
        carry_over(dataset, OLD, NEW, SAME)
    with pytest.raises(ValueError, match="the diff leads from label space"):
        carry_over(dataset, OLD, NEW, diff_labels(NEW, OLD))
    with pytest.raises(ValueError, match="one label space is multi-label"):
        carry_over(dataset, OLD, load_labels(["a"], multilabel=True))
