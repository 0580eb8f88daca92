import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Value
from reference.graph import above, random_dag
from report.pages import (
    LABELS,
    STUDENT,
    TEACHER,
    history,
    lists,
    report_of,
    section,
    strings,
    svg,
    table,
)

from llmlabel.labelspace import load_labels
from llmlabel.report.taxonomy import rows_below, score_series
from llmlabel.taxonomy.induce import Taxonomy

TREE = load_labels(
    [
        *("a", "b"),
        {"id": "a1", "name": "<b>one</b>", "parent": "a"},
        {"id": "a2", "name": "two", "parent": "a"},
        {"id": "b1", "parent": "b"},
    ]
)
NODES = [
    [0, 0, 0.3, 0.25, 0.4],  # b1 is the most probable label, but a is the heavier half
    [0.6, 0, 0.2, 0.1, 0],  # more stops at a than lies below
    [0, 0, 0, 0, 0],
    [0, 0, 0.9, 0, 0],
    [0, 0, 0, 0, 1],
    [0, 0, 0, 0, 1],
]


def tree_report(tmp_path: Path):
    gold = lists([[2], [3], [4], [0], [4], [4]])
    calls = [1] * 6, Value("int32")
    tables = {
        "student": table(NODES, TREE, gold=gold, calls=calls),
        "other": table([[0, 0, 0, 0, 1.0]] * 6, TREE, gold=gold),
    }
    return report_of(tmp_path, tables, labels=TREE, review_rows=1)


def test_in_a_hierarchy_answers_are_found_from_the_top_and_near_ones_count(tmp_path: Path) -> None:
    report, html = tree_report(tmp_path)
    student = report["sources"]["student"]
    # a1, a, no answer and a1, of which the first is right
    assert student["accuracy"] == 0.25
    assert student["ece"] == pytest.approx((0.7 + 0.6 + 0 + 0.9) / 4, abs=1e-6)
    assert student["nll"] == pytest.approx(-math.log(0.3 * 0.1 * 1e-24) / 4, rel=1e-5)
    tree = report["hierarchy"]
    scores = tree["sources"]["student"]
    # {a, a1} {a} {} {a, a1} against {a, a1} {a, a2} {b, b1} {a}
    assert (scores["precision"], scores["recall"]) == (4 / 5, pytest.approx(4 / 7))
    assert scores["f1"] == pytest.approx(8 / 12)
    assert scores["tree_induced_error"] == (0 + 1 + 2 + 1) / 4
    assert scores["squared_tree_error"] == (0 + 1 + 4 + 1) / 4
    assert scores["at_a_leaf"] == pytest.approx(2 / 3)
    assert tree["sources"]["other"]["f1"] == pytest.approx(2 * 2 / 15)
    assert tree["rows"] == {"a": 3, "a1": 2}
    assert tree["gold"] == {"a": 3, "b": 1, "a1": 1, "a2": 1, "b1": 1}
    assert (tree["levels"], tree["roots"], tree["leaves"]) == (2, 2, 3)
    assert report["summary"]["hierarchical_f1 of student"] == pytest.approx(8 / 12)
    assert sum(map(sum, report["confusion"]["counts"])) == 4
    told = section(html, "hierarchy")
    assert "student 25.0 % 80.0 % 57.1 % 66.7 % 1.00 1.50 66.7 %" in told
    assert "a 3 3 true &lt;b&gt;one&lt;/b&gt; 2 1 true two 0 1 true b 0 1 true b1 0 1 true" in told
    assert "<details open><summary><bdi>a</bdi>" in html
    assert "student 25.0 % (0.6 % to 80.6 %) 66.7 % 1.00 –" in section(html, "costs")  # noqa: RUF001


@pytest.mark.parametrize("seed", range(10))
def test_rows_below_equal_the_loop(seed: int) -> None:
    labels, rng = random_dag(seed), np.random.default_rng(seed)
    rows = rng.integers(5, size=(count := int(rng.integers(12)))) * 7
    answered = rng.integers(len(labels), size=count)
    pairs = {(row, up) for row, at in zip(rows, answered, strict=True) for up in above(labels, at)}
    expected = [sum(up == label for _, up in pairs) for label in range(len(labels))]
    assert rows_below(labels, rows, answered).tolist() == expected


def test_a_hierarchy_without_gold_shows_the_rows(tmp_path: Path) -> None:
    student = table(NODES, TREE, gold=None)
    report, html = report_of(tmp_path, {"student": student}, labels=TREE, split=None)
    assert report["hierarchy"]["gold"] is None
    assert report["hierarchy"]["sources"]["student"] == {"at_a_leaf": 0.8}
    assert report["hierarchy"]["rows"] == {"a": 3, "b": 2, "a1": 2, "b1": 2}
    assert "a 3 &lt;b&gt;one&lt;/b&gt; 2 two 0 b 2 b1 2" in section(html, "hierarchy")


def test_a_multilabel_hierarchy_counts_every_label_that_is_probable(tmp_path: Path) -> None:
    labels = dataclasses.replace(TREE, multilabel=True)
    gold = lists([[0, 2], [3], [], [], [], []])
    probs = [[0.5, 0, 0.9, 0.7, 0], [0, 0.6, 0, 0, 0.6], *[[0.4] * 5] * 4]
    report, html = report_of(tmp_path, {"student": table(probs, labels, gold=gold)}, labels=labels)
    assert report["hierarchy"]["rows"] == {"a": 1, "b": 1, "a1": 1, "a2": 1, "b1": 1}
    assert report["hierarchy"]["gold"] == {"a": 2, "a1": 1, "a2": 1}
    assert report["hierarchy"]["sources"] == {"student": {}}
    assert "tree-induced" not in section(html, "hierarchy")


def test_accuracy_against_cost(tmp_path: Path) -> None:
    def ints(values: list) -> tuple:
        return values, Value("int32")

    sources = {
        "DL": table(TEACHER, calls=ints([1] * 6), prompt_tokens=ints([300] * 6)),
        "TMH": table(
            STUDENT, calls=ints([2, 2, 3, 2, 9, 9]), prompt_tokens=ints([40, 60, None, 80, 9, 9])
        ),
        "encoder": table(STUDENT),
    }
    report, html = report_of(tmp_path, sources, student="TMH")
    assert set(report["costs"]) == {"DL", "TMH"}
    cost = report["costs"]["TMH"]
    assert (cost["calls"], cost["prompt_tokens"], cost["rows"]) == (2.25, 60.0, 4)
    assert cost["accuracy"] == 0.75
    told = section(html, "costs")
    assert "TMH 75.0 % (19.4 % to 99.4 %) 2.25 60.0" in told
    assert 'alt="accuracy and prompt tokens a row: DL 25.0\u202f%, 300; TMH 75.0' in html
    figure = re.search(r'<section id="costs">.*?<img src="([^"]*)"', html, flags=re.DOTALL)[1]
    assert "<!-- TMH -->" in svg(figure)
    nobody = table(TEACHER, calls=ints([None] * 6))
    assert "costs" not in report_of(tmp_path / "b", {"student": nobody})[0]
    unknown = table(TEACHER, gold=None, calls=ints([1] * 6))
    report, html = report_of(tmp_path / "c", {"student": unknown})
    assert report["costs"]["student"] == {"calls": 1.0, "prompt_tokens": None, "rows": 4}
    assert section(html, "costs").endswith("student 1.00 –")  # noqa: RUF001
    wrong = table(TEACHER, calls=strings(["1"] * 6))
    with pytest.raises(ValueError, match="source 'student': the column 'calls' holds string"):
        report_of(tmp_path / "d", {"student": wrong})


def test_every_round_that_found_the_labels_is_told(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, taxonomy=history())
    assert report["taxonomy"] == history()
    told = section(html, "taxonomy")
    assert "4 rounds" in told
    assert "update 1 0 1 62 2 + &lt;i&gt;z, − y, − w name it better" in told  # noqa: RUF001
    assert "groups of texts refused (5 attempts): 40 labels, at most 25" in told
    assert 'alt="Scores of the rounds: 62, 71"' in html
    whole = Taxonomy(LABELS, history())
    assert report_of(tmp_path / "b", taxonomy=whole) == (report, html)
    assert score_series([*history(), {**history()[1], "run": 1}]) == [[62.0, 71.0]]


def test_a_long_history_is_cut_on_the_page_only(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, taxonomy=history() * 60)
    assert len(report["taxonomy"]) == 240
    assert "40 more rounds are left out here" in section(html, "taxonomy")


def test_a_flat_report_says_nothing_of_hierarchies(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert not {"hierarchy", "costs", "taxonomy"} & set(report)
    assert "tree" not in html
    assert 'id="costs"' not in html
