"""The part of a report on labels that a student learned by heart."""

from pathlib import Path

import pytest
from datasets import Dataset, Value
from report.pages import (
    HOSTILE,
    LABELS,
    STUDENT,
    Tags,
    example,
    lists,
    report_of,
    section,
    table,
)

from llmlabel.labelspace import load_labels
from llmlabel.report.memorised import most_suspicious

GIVEN = [[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def suspects(**columns: tuple) -> Dataset:
    """Given a a b a b c; the last row was not trained on, the gold of row 4 is not known."""
    flags = Value("bool")
    found = {
        "suspect": ([False, True, True, True, False, None], flags),
        "memorised": ([False, True, False, True, False, None], flags),
        "early_id": ([0, 1, 2, 1, 1, None], Value("int32")),
        "early_margin": ([0.5, -0.25, -0.75, -0.25, 0.9, None], Value("float32")),
        "gold": lists([[0], [1], [1], None, [0], [2]]),
    }
    return table(GIVEN, **{**found, **columns})


def test_the_numbers_and_the_rows_are_told(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, suspects=suspects())
    part = report["memorised"]
    assert (part["rows"], part["suspect"], part["memorised"]) == (5, 0.6, 0.4)
    # known: rows 1, 2, 3 and 5, of which 2 and 5 are wrong, and 2 and 3 suspect
    assert (part["gold_rows"], part["wrong"]) == (4, 0.5)
    assert (part["precision"], part["recall"], part["memorised_wrong"]) == (0.5, 0.5, 0.5)
    assert part["labels"] == {
        "alpha": {"rows": 3, "suspect": 2, "memorised": 2, "early": "beta"},
        "beta": {"rows": 2, "suspect": 1, "memorised": 0, "early": "gamma"},
    }
    assert part["most"] == ["t3", "t2", "t4"]
    told = section(html, "memorised")
    assert "Of 5 rows trained on, 60.0 % are suspect and 40.0 % learned by heart" in told
    assert "The true label of 4 of these rows is known" in told
    assert "50.0 % of their given labels are wrong" in told
    assert "alpha 3 2 (66.7 %) 2 beta" in told
    assert "beta 2 1 (50.0 %) 0 gamma" in told
    assert "t3 margin -0.75 three given: beta early: gamma true: beta" in told
    assert "t2 margin -0.25 learned by heart Hello, World! given: alpha early: beta" in told
    assert told.endswith("t4 margin -0.25 learned by heart four given: alpha early: beta")
    assert 'href="#memorised"' in html
    assert "not looked at, except to measure labels learned by heart." in section(html, "measured")


def test_without_gold_or_suspects(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, suspects=suspects(gold=None))
    assert "gold_rows" not in report["memorised"]
    told = section(html, "memorised")
    assert "true" not in told.partition("The most suspicious rows")[2]
    assert "precision" not in told
    assert "the true labels of other rows were not looked at." in section(html, "measured")
    nobody = suspects(suspect=([False] * 5 + [None], Value("bool")))
    report, html = report_of(tmp_path / "b", suspects=nobody)
    assert (report["memorised"]["labels"], report["memorised"]["most"]) == ({}, [])
    assert report["memorised"]["precision"] is None
    told = section(html, "memorised")
    assert "Of 5 rows trained on, 0.0 % are suspect" in told
    assert "recall" in told
    assert "most suspicious" not in told


def test_a_report_without_them_says_nothing_of_it(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert "memorised" not in report
    assert "by heart" not in html


def test_texts_and_names_are_escaped_and_cut(tmp_path: Path) -> None:
    labels = load_labels([{"id": "a", "name": HOSTILE}, "b", "c"])
    rows = table(
        GIVEN,
        labels,
        **{
            name: (suspects()[name][:], suspects().features[name])
            for name in ("suspect", "memorised", "early_id", "early_margin")
        },
    ).remove_columns(["text", "id"])
    rows = rows.add_column("text", [HOSTILE * 20] * 6).add_column(
        "id", [f"{HOSTILE}{i}" for i in range(6)]
    )
    sources = {"student": table(STUDENT, labels)}
    _, html = report_of(tmp_path, sources, labels=labels, suspects=rows)
    found = Tags(html)
    assert not {"script", "b onerror"} & found.tags
    assert "onerror" not in found.attributes
    assert "x" not in found.addresses
    told = section(html, "memorised")
    assert "&lt;img src=x onerror=alert(1)&gt;" in told
    assert "\u202e" not in html
    assert "49" not in told  # {{ 7 * 7 }}
    assert len(told) < 6000


def test_a_large_space_and_few_rows_are_cut(tmp_path: Path) -> None:
    many = load_labels([f"label {i}" for i in range(30)])
    given = [[float(i == k) for k in range(30)] for i in range(30)]
    names = [f"r{i}" for i in range(30)]
    rows = Dataset.from_dict({"id": names, "text": names})
    import numpy as np

    from llmlabel.data import with_columns
    from llmlabel.softlabels import SoftLabels

    rows = SoftLabels.from_dense(np.array(given), many).add_to(rows)
    rows = with_columns(
        rows,
        {
            "suspect": ([True] * 30, Value("bool")),
            "memorised": ([False] * 30, Value("bool")),
            "early_id": ([0] * 30, Value("int32")),
            "early_margin": ([-0.5] * 30, Value("float32")),
        },
    )
    report, html = report_of(
        tmp_path, {"student": table(given[:6], many)}, labels=many, suspects=rows, review_rows=2
    )
    assert len(report["memorised"]["labels"]) == 20
    assert report["memorised"]["labels_left_out"] == 10
    assert "10 more are left out" in section(html, "memorised")
    assert report["memorised"]["most"] == ["r0", "r1"]


def test_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    back = suspects().select(range(5, -1, -1))
    assert report_of(tmp_path / "a", suspects=back) == report_of(
        tmp_path / "b", suspects=suspects()
    )


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the column 'suspect' is missing"):
        report_of(tmp_path, suspects=example()["student"])
    old = suspects().remove_columns("early_margin")
    with pytest.raises(ValueError, match="early_margin"):
        most_suspicious(old, LABELS, rows=3)
