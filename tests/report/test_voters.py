import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import voters as reference
from reference import weak as reference_weak
from report.pages import HOSTILE, Tags, lists, report_of, section, strings, svg

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import binomial_interval
from llmlabel.refine.aggregate import aggregate
from llmlabel.report import voters
from llmlabel.softlabels import VOTES, SoftLabels

LABELS = load_labels(["alpha", "beta", "gamma"])


def crowd(
    said: Any, labels: LabelSpace = LABELS, *, names: list[str] | None = None, **columns: Any
) -> Dataset:
    """A row of votes each, -1 where a voter has none, and their majority as soft labels."""
    said = np.array(said)
    names = names or [f"v{number}" for number in range(said.shape[1])]
    votes = [
        [
            {"source": name, "label_id": label, "prob": None}
            for name, label in zip(names, row.tolist(), strict=True)
            if label >= 0
        ]
        for row in said
    ]
    ids = [f"r{number}" for number in range(len(said))]
    rows = with_columns(Dataset.from_dict({"id": ids, "text": ids}), {"votes": (votes, VOTES)})
    return with_columns(aggregate(rows, labels, method="majority"), columns)


def told(tmp_path: Path, table: Dataset, **arguments: Any) -> tuple[dict, dict, str]:
    settings = {"labels": LABELS, "split": None, "conformal": None} | arguments
    report, html = report_of(tmp_path, {"student": table}, **settings)
    return report["voters"]["student"], report, html


def figures(html: str) -> list[str]:
    """The names that stand in the figures of the section."""
    part = html.split('<section id="voters">')[1].split("</section>")[0]
    uris = [one.split('"')[0] for one in part.split('src="')[1:]]
    return [svg(uri) for uri in uris]


# ------------------------------------------------------------------------------------ the numbers


Twin = tuple[dict, list[reference.Row], list[int | None], list[int | None], list[list[float]]]


@pytest.fixture(params=range(20))
def twin(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Twin:
    """What is measured of a random crowd of 6, 4 of whom are shown, and the crowd itself."""
    monkeypatch.setattr(voters, "MOST_VOTERS", 4)
    monkeypatch.setattr(voters, "FEW", 3)
    monkeypatch.setattr("llmlabel.report.page.render", lambda *_, **__: "")
    rng = np.random.default_rng(request.param)
    gold = rng.integers(0, 3, 25)
    said = np.where(rng.random((25, 6)) < 0.6, gold[:, None], rng.integers(0, 3, (25, 6)))
    said[rng.random((25, 6)) < rng.uniform(0.1, 0.8, 6)] = -1
    said[0] = 0  # nobody is always silent
    known = [[int(one)] if rng.random() < 0.7 else None for one in gold]
    table = crowd(said, gold=lists(known))
    belief = SoftLabels.from_dataset(table, LABELS).dense()
    return (
        told(tmp_path, table)[0],
        [{f"v{at}": label for at, label in enumerate(row) if label >= 0} for row in said.tolist()],
        [None if one is None else one[0] for one in known],
        [int(row.argmax()) if row.any() else None for row in belief],
        belief.tolist(),
    )


def test_numbers_of_each_voter_equal_the_loop(twin: Twin) -> None:
    cast, rows, true, consensus, belief = twin
    functions = reference_weak.measure(rows, true)
    assert list(cast["shown"]) == reference.order(rows)[:4]
    for name, one in cast["shown"].items():
        wanted = functions[name]
        assert {key: one[key] for key in wanted} == pytest.approx(wanted)
        assert one["votes"] == sum(name in row for row in rows)
        assert one["abstentions"] == sum(bool(row) and name not in row for row in rows)
        agreed, compared = reference.consensus(rows, consensus, [name])
        assert one["consensus"] == agreed / compared
        mean = reference.reliability(rows, belief, [name])
        assert one["reliability"] == pytest.approx(mean, abs=1e-6)
        right, judged = reference.consensus(rows, true, [name])
        if judged:
            low, high = binomial_interval(right, judged)
            assert (one["accuracy_low"], one["accuracy_high"]) == (low, high)


def test_numbers_of_the_others_equal_the_loop(twin: Twin) -> None:
    cast, rows, true, consensus, belief = twin
    others, rest = cast["others"], reference.order(rows)[4:]
    agreed, compared = reference.consensus(rows, consensus, rest)
    assert (others["voters"], others["votes"]) == (2, compared)
    assert others["consensus"] == agreed / compared
    right, judged = reference.consensus(rows, true, rest)
    assert others["gold_votes"] == judged
    assert others["accuracy"] == (right / judged if judged else None)
    mean = reference.reliability(rows, belief, rest)
    assert others["reliability"] == pytest.approx(mean, abs=1e-6)


def test_pairs_and_confusions_equal_the_loop(twin: Twin) -> None:
    cast, rows, true, consensus, _ = twin
    order = reference.order(rows)[:4]
    assert cast["pairs"]["voters"] == order
    for (a, one), (b, other) in itertools.product(enumerate(order), repeat=2):
        both, alike = reference.pair(rows, one, other)
        assert cast["pairs"]["rows"][a][b] == both
        assert cast["pairs"]["agreement"][a][b] == (alike / both if both else None)
    for name, matrix in cast["confusions"].items():
        truth = true if matrix["against"] == "gold" else consensus
        assert matrix["counts"] == reference.confusion(rows, truth, name, 3)
    furthest = [one for one in order if one in cast["confusions"]]
    assert sorted(furthest, key=lambda one: cast["shown"][one]["consensus"]) == list(
        cast["confusions"]
    )


SAID = [[0, 0, 0, 1], [1, 1, -1, 1], [2, 0, 2, 2], [-1, -1, -1, -1], [2, 2, 2, 0], [0, 1, 0, 0]] * 4
GOLD = lists([[0], [1], [2], [0], [2], None] * 4)


def test_a_small_crowd_by_hand(tmp_path: Path) -> None:
    cast, report, html = told(tmp_path, crowd(SAID, gold=GOLD, names=list("abcd")))
    assert (cast["rows"], cast["rows_with_votes"], cast["votes"], cast["voters"]) == (24, 20, 76, 4)
    assert list(cast["shown"]) == ["a", "b", "d", "c"]
    a, b = cast["shown"]["a"], cast["shown"]["b"]
    assert (a["votes"], a["abstentions"], a["consensus"], a["accuracy"]) == (20, 0, 1.0, 1.0)
    assert (b["consensus"], b["accuracy"], b["gold_votes"]) == (3 / 5, 3 / 4, 16)
    assert a["agreement"] == pytest.approx((2 + 2 + 2 + 2 + 2) / (3 + 2 + 3 + 3 + 3))
    assert a["reliability"] == pytest.approx((0.75 + 1 + 0.75 + 0.75 + 0.75) / 5)
    assert (a["coverage"], a["conflict"]) == (pytest.approx(20 / 24), pytest.approx(16 / 24))
    assert a["confusion"]["beta"] == pytest.approx({"alpha": 1 / 3, "beta": 2 / 3})
    assert cast["others"] is None
    assert list(cast["confusions"]) == ["b", "d"]  # a and c never differ
    assert cast["confusions"]["b"] == {
        **{"against": "gold", "gold": list(LABELS.names), "predicted": list(LABELS.names)},
        "counts": [[4, 0, 0], [0, 4, 0], [4, 0, 4]],
    }
    shown = section(html, "voters")
    assert "4 voters gave 76 votes on 20 of the 24 measured rows" in shown
    assert "b 75.0 % (47.6 to 92.7 %)" in shown
    assert '<a href="#voters">Voters</a>' in html
    agreement, *confusions = figures(html)
    assert "<!-- 20 -->" in agreement  # b and d on one of five rows
    assert len(confusions) == 2
    assert set(report["summary"]) == {
        *("student", "split", "rows", "measured_rows", "labels", "accuracy of student"),
        *("macro_f1", "ece", "nll", "aurc"),
    }


def test_without_gold_the_voters_are_still_compared(tmp_path: Path) -> None:
    cast, _, html = told(tmp_path, crowd(SAID, names=list("abcd")))
    assert cast["shown"]["b"]["accuracy"] is None
    assert cast["shown"]["b"]["consensus"] == 3 / 5
    assert cast["confusions"]["b"]["against"] == "consensus"
    assert cast["confusions"]["b"]["counts"] == [[4, 4, 0], [0, 4, 0], [4, 0, 4]]
    shown = section(html, "voters")
    assert "accuracy" not in shown
    assert "reliability" in shown
    assert "<!-- consensus -->" in figures(html)[1]


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    table = crowd(SAID, gold=GOLD)
    order = np.random.default_rng(0).permutation(24).tolist()
    assert told(tmp_path, table.select(order))[0] == told(tmp_path, table)[0]


def test_gold_and_votes_of_other_rows_are_not_looked_at(tmp_path: Path) -> None:
    split = strings(["test"] * 12 + ["train"] * 12)
    first = told(tmp_path, crowd(SAID, gold=GOLD, split=split), split="test")[0]
    said, gold = SAID[:12] + [[0, 1, 2, 0]] * 12, lists(GOLD[0][:12] + [[1]] * 12)
    second = told(tmp_path, crowd(said, gold=gold, split=split), split="test")[0]
    assert first == second
    assert (first["rows"], first["all_rows"]) == (12, False)


def test_votes_on_other_rows_only_are_told_without_gold(tmp_path: Path) -> None:
    said = [[-1] * 4] * 24 + SAID
    split = strings(["test"] * 24 + ["train"] * 24)
    table = crowd(said, gold=lists([[1]] * 48), split=split)
    cast, _, html = told(tmp_path, table, split="test")
    assert (cast["rows"], cast["all_rows"], cast["rows_with_votes"]) == (48, True, 20)
    assert {one["gold_votes"] for one in cast["shown"].values()} == {0}
    assert "20 of the 48 rows of all splits (no measured row has votes)" in section(html, "voters")
    assert "accuracy " not in section(html, "voters").split("Reliability:")[0].split("voter ")[1]


# ------------------------------------------------------------------------------- which tables, who


def test_the_students_votes_else_those_of_each_other_table_once(tmp_path: Path) -> None:
    def names(**sources: Dataset) -> list[str]:
        report, html = report_of(
            tmp_path, sources, labels=LABELS, split=None, conformal=None, student="student"
        )
        assert ('id="voters"' in html) == ("voters" in report)
        return list(report.get("voters", []))

    mine, other = crowd(SAID), crowd([row[::-1] for row in SAID])
    none, one = mine.remove_columns("votes"), crowd([[row[0]] for row in SAID])
    assert names(student=mine, teacher=other) == ["student"]
    assert names(student=none, teacher=other, copy=other, second=mine) == ["teacher", "second"]
    assert names(student=one, teacher=none) == []


def test_a_copy_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    said = rng.integers(0, 3, (20, 5))
    said[:, 3] = said[:, 1]
    cast, _, html = told(tmp_path, crowd(said))
    assert cast["identical"] == [{"voters": ["v1", "v3"], "votes": 20}]
    assert "v1 says the same as v3 on all 20 rows: not an independent voice." in section(
        html, "voters"
    )
    said[:, 4] = said[:, 1]
    assert "v1, v3, v4 say the same on all 20 rows: they are one voice, not 3." in section(
        told(tmp_path, crowd(said))[2], "voters"
    )


def test_rules_that_say_one_label_only_are_compared_in_words(tmp_path: Path) -> None:
    said = [[0, -1, -1], [0, 1, -1], [0, 1, 1], [-1, 1, 1], [-1, -1, -1]] * 3
    cast, _, html = told(tmp_path, crowd(said, names=["x", "y", "z"]))
    assert [one["only_label"] for one in cast["shown"].values()] == ["alpha", "beta", "beta"]
    shown = section(html, "voters")
    assert "x only “alpha”" in shown
    assert (
        "vote against each other most: x and y on 6 of their 6 common rows; "
        "x and z on 3 of their 3 common rows."
    ) in shown
    assert figures(html) == []
    assert cast["confusions"] == {}


def test_of_many_voters_the_rest_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 3, 60)
    said = np.repeat(gold[:, None], 30, axis=1)
    said[rng.random(said.shape) < 0.1] = 0
    said[:30, 25:] = -1  # the last five vote least
    said[30:, 29] = (gold[30:] + 1) % 3
    names = [f"w{number:02}" for number in range(30)]
    cast, report, html = told(
        tmp_path, crowd(said, gold=lists([[int(g)] for g in gold]), names=names)
    )
    assert list(cast["shown"]) == names[:20]
    assert (cast["voters"], cast["others"]["voters"], cast["others"]["votes"]) == (30, 10, 450)
    assert cast["others"]["median_votes"] == 45
    assert next(iter(cast["others"]["furthest"].items())) == (
        "w29",
        {"votes": 30, "consensus": 0.0},
    )
    shown = section(html, "voters")
    assert "10 others together" in shown
    assert "450 (median 45)" in shown
    assert "w29 (0.0 % of 30 votes agree)" in shown
    assert "w07 and 22 more" in section(html, "provenance")
    assert len(report["provenance"]["sources"]["student"]["votes_of"]) == 30


# -------------------------------------------------------------------------- other kinds of labels


def test_many_labels_a_row(tmp_path: Path) -> None:
    labels = load_labels(["alpha", "beta"], multilabel=True)
    votes = [
        [("x", 0, 0.9), ("x", 1, 0.8), ("y", 1, 0.7)],
        [("x", 0, 0.6), ("x", 1, 0.2), ("y", 0, 1.0)],
        [("y", 1, 0.1)],
        [],
    ]
    rows = [[dict(zip(VOTES_OF, vote, strict=True)) for vote in row] for row in votes]
    base = Dataset.from_dict({"id": list("abcd"), "text": list("abcd")})
    base = with_columns(base, {"votes": (rows, VOTES), "gold": lists([[0, 1], [1], [], None])})
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.1], [0.0, 0.0]])
    cast, _, html = told(tmp_path, SoftLabels.from_dense(probs, labels).add_to(base), labels=labels)
    x, y = cast["shown"]["x"], cast["shown"]["y"]
    assert list(cast["shown"]) == ["x", "y"]
    assert (x["votes"], x["coverage"], x["overlap"], x["conflict"]) == (2, 0.5, 0.5, None)
    assert (x["gold_votes"], x["accuracy"], x["consensus"]) == (3, 2 / 3, 2 / 3)
    assert "2 voters gave 4 votes on 2 of the 4 measured rows" in section(html, "voters")
    assert (y["votes"], y["accuracy"], y["consensus"]) == (2, 0.5, 0.5)
    assert not {"pairs", "confusions"} & set(cast)
    assert cast["krippendorff"] is None
    shown = section(html, "voters")
    assert "y 50.0 % 50.0 % 2 (50.0 %) 0 50.0 %" in shown
    assert "conflict" not in shown


VOTES_OF = ("source", "label_id", "prob")


def test_in_a_hierarchy_the_consensus_is_the_answer_from_the_top(tmp_path: Path) -> None:
    tree = load_labels(["a", "b", *({"id": f"a{n}", "parent": "a"} for n in range(3)),
                        {"id": "b1", "parent": "b"}])  # fmt: skip
    table = crowd([[2, 5, 3]] * 12, tree)
    probs = np.tile([0, 0, 0.3, 0.25, 0, 0.4], (12, 1))  # b1 is most probable, a the heavier half
    cast = told(tmp_path, SoftLabels.from_dense(probs, tree).add_to(table), labels=tree)[0]
    assert [one["consensus"] for one in cast["shown"].values()] == [1.0, 0.0, 0.0]


def test_more_labels_than_can_be_shown_have_no_confusion(tmp_path: Path) -> None:
    labels = load_labels([f"l{number}" for number in range(21)])
    rng = np.random.default_rng(0)
    cast = told(tmp_path, crowd(rng.integers(0, 21, (30, 3)), labels), labels=labels)[0]
    assert "confusions" not in cast
    assert "confusion" not in cast["shown"]["v0"]
    assert cast["pairs"]["rows"] == [[30] * 3] * 3


# ------------------------------------------------------------------------------ other people's text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    def page(string: str, folder: Path) -> tuple[set[str], set[str], str]:
        labels = load_labels([string, "beta", "gamma"])
        rng = np.random.default_rng(0)
        said = rng.integers(0, 3, (40, 24))
        said[:, 1] = said[:, 0]
        said[20:, 20:] = -1
        names = [f"{string}{number:02}" for number in range(24)]
        only = crowd([[0, 1, 2], [0, 1, -1]] * 6, labels, names=names[:3])
        table = crowd(said, labels, names=names)
        student = table.remove_columns("votes").select(range(12))
        sources = {"student": student, string: table.select(range(12)), f"{string}!": only}
        _, html = report_of(
            folder, sources, labels=labels, split=None, conformal=None, review_rows=0
        )
        _, whole = report_of(
            folder, {"student": table}, labels=labels, split=None, conformal=None, review_rows=0
        )
        tags = Tags(html + whole)
        return tags.tags, tags.attributes, html + whole

    hostile, plain = page(HOSTILE, tmp_path / "a"), page("plain", tmp_path / "b")
    assert hostile[:2] == plain[:2]
    assert "script" not in hostile[0]
    assert not set(hostile[2]) & {"\u202e", "\x00"}
    assert "{{ 7 * 7 }}" in section(hostile[2], "voters")


def test_a_broken_vote_names_the_table(tmp_path: Path) -> None:
    votes = [[{"source": "x", "label_id": 7, "prob": None}]] + [[]] * 23
    table = with_columns(crowd(SAID), {"votes": (votes, VOTES)})
    with pytest.raises(
        ValueError, match=r"source 'student': row with id 'r0': source 'x' votes for"
    ):
        told(tmp_path, table)
