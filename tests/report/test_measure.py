import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from report.pages import SETS, STUDENT, TEACHER, example, lists, report_of, section, table

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.metrics import promised_coverage
from llmlabel.softlabels import SoftLabels


def test_numbers_of_the_student(tmp_path: Path) -> None:
    report, _ = report_of(tmp_path, baselines={"corrected": "raw"})
    student = report["sources"]["student"]
    assert student["accuracy"] == 0.75
    # Clopper-Pearson of 3 in 4: P(X >= 3) = 0.025 at the low end, P(X <= 3) = 0.025 at the high
    assert student["accuracy_low"] == pytest.approx(0.1941204, abs=1e-6)
    assert student["accuracy_high"] == pytest.approx(0.9936905, abs=1e-6)
    assert student["macro_f1"] == pytest.approx((0.8 + 1 + 0) / 3)
    assert student["nll"] == pytest.approx(-math.log(0.8 * 0.6 * 0.4 * 0.9) / 4, rel=1e-6)
    assert student["ece"] == pytest.approx((0.2 + 0.4 + 0.5 + 0.1) / 4, abs=1e-6)
    assert student["aurc"] == pytest.approx(0.25 * 0.25)
    assert student["brier"] == pytest.approx((0.06 + 0.26 + 0.62 + 0.02) / 4, abs=1e-6)
    assert report["sources"]["raw"]["accuracy"] == 0.25
    assert report["sources"]["corrected"]["before"] == "raw"


def test_sets_and_confusion(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    sets = report["coverage"]
    assert (sets["rows"], sets["covered"], sets["coverage"]) == (4, 3, 0.75)
    assert sets["target"] == 0.75
    assert sets["sizes"] == [1, 2, 1]
    assert sets["mean_set_size"] == 1.0
    assert sets["empty_sets"] == 0.25
    assert (sets["rows_for_a_human"], sets["all_rows_for_a_human"]) == (2, 2)
    assert {name: row["covered"] for name, row in sets["classes"].items()} == {
        "alpha": 2,
        "beta": 1,
        "gamma": 0,
    }
    assert sets["classes"]["alpha"]["set_size"] == 1.5
    assert report["confusion"]["counts"] == [[2, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert list(report["confusions"]) == ["raw", "corrected"]
    assert report["confusions"]["raw"]["counts"] == [[0, 2, 0], [0, 1, 0], [0, 1, 0]]
    assert "<details><summary>The same for raw</summary>" in html
    assert "4 of 6 rows have exactly one label in their set; the other 2" in section(html, "sets")


def test_label_bias_is_the_mean_share_against_gold(tmp_path: Path) -> None:
    probs = [*TEACHER[:3], [0.0, 0.0, 0.0], *TEACHER[4:]]  # a row without an answer has no share
    report, _ = report_of(tmp_path, example() | {"raw": table(probs)})
    bias = report["label_bias"]
    assert bias["gold"] == [0.5, 0.25, 0.25]
    assert bias["sources"]["raw"] == pytest.approx([0.2, 0.6, 0.2], abs=1e-6)
    assert bias["sources"]["student"] == pytest.approx([2.5 / 4, 0.9 / 4, 0.6 / 4], abs=1e-6)


def test_overlap_ignores_case_and_punctuation(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert report["overlap"] == 1
    assert "1 of the measured rows have a text that also stands" in section(html, "measured")
    assert report_of(tmp_path, split=None)[0]["overlap"] is None


def test_a_row_without_a_prediction_is_wrong_and_has_a_column_of_its_own(tmp_path: Path) -> None:
    probs = [[0.0, 0.0, 0.0], *STUDENT[1:]]
    report, _ = report_of(tmp_path, {"student": table(probs)})
    assert report["sources"]["student"]["accuracy"] == 0.5
    assert report["confusion"]["predicted"][-1] == "no label"
    assert report["confusion"]["counts"] == [[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert report["provenance"]["sources"]["student"]["rows_without_label"] == 1


def test_the_promise_is_for_the_rows_that_coverage_is_measured_on(tmp_path: Path) -> None:
    gold = lists([[0], None, [2], None, [1], [2]])
    sources = {"student": table(STUDENT, set_ids=lists(SETS), gold=gold)}
    sets = report_of(tmp_path, sources)[0]["coverage"]
    assert (sets["rows"], sets["measured_rows"]) == (2, 4)
    promised = promised_coverage(calibration_rows=100, rows=2, alpha=0.25)
    assert promised != promised_coverage(calibration_rows=100, rows=4, alpha=0.25)
    assert (sets["promised_low"], sets["promised_high"]) == promised


def test_gold_that_is_none_of_the_labels_is_never_covered(tmp_path: Path) -> None:
    gold = lists([[0], [1], [], [0], [1], [2]])
    sources = {"student": table(STUDENT, set_ids=lists(SETS), gold=gold)}
    report, _ = report_of(tmp_path, sources)
    assert report["coverage"]["classes"]["no label"]["covered"] == 0
    assert report["confusion"]["gold"][-1] == "no label"
    assert report["confusion"]["counts"] == [[2, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_without_gold_nothing_is_claimed(tmp_path: Path) -> None:
    sources = {"student": table(STUDENT, gold=None, set_ids=lists(SETS))}
    report, html = report_of(tmp_path, sources)
    assert not [key for key in report["summary"] if "accuracy" in key or key == "coverage"]
    assert report["confusion"] is None
    assert report["confusions"] == {}
    assert report["coverage"]["mean_set_size"] == 1.0
    for name in ("accuracy", "probabilities", "confusion"):
        assert "there are none" in section(html, name)
    assert "coverage cannot be measured" in section(html, "sets")


def test_without_sets_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, {"student": table(STUDENT)})
    assert report["coverage"] is None
    assert "llmlabel.calibrate.conformal.fit_conformal" in section(html, "sets")
    assert "Of 4 test rows, student labels" in html


def test_many_labels_a_row_have_f1_instead_of_accuracy(tmp_path: Path) -> None:
    labels = load_labels(["alpha", "beta"], multilabel=True)
    probs = [[0.9, 0.6], [0.1, 0.7], [0.2, 0.2], [0.6, 0.1], [0.5, 0.5], [1, 1]]
    gold = lists([[0, 1], [0], [], [0], [], []])
    sources = {"student": table(probs, labels, gold=gold)}
    report, html = report_of(tmp_path, sources, labels=labels)
    # said {0,1} {1} {} {0}; right 3, said 4, true 4
    assert report["sources"]["student"]["micro_f1"] == 0.75
    assert report["sources"]["student"]["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert report["summary"]["micro_f1 of student"] == 0.75
    assert "no confusion matrix" in section(html, "confusion")


def test_of_many_labels_the_most_frequent_are_shown_and_the_rest_summed(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(60)]
    labels = load_labels(names)
    rows = 200
    gold = [[59 - min(59, int(abs(number) ** 0.8))] for number in range(rows)]
    probs = np.full((rows, 60), 0.001)
    probs[np.arange(rows), [ids[0] for ids in gold]] = 1 - 0.059
    base = Dataset.from_dict({"id": [f"{n}" for n in range(rows)], "text": ["x"] * rows})
    base = with_columns(base, {"gold": lists(gold)})
    student = SoftLabels.from_dense(probs, labels).add_to(base)
    report, html = report_of(tmp_path, {"student": student}, labels=labels, split=None)
    counts = np.array(report["confusion"]["counts"])
    assert counts.shape == (21, 21)
    assert counts.sum() == rows
    assert report["confusion"]["gold"][0] == "class 0"  # 35 of the rows are beyond the end
    assert report["confusion"]["gold"][-1] == "40 other labels"
    assert "The 20 most frequent labels are shown, the 40 others are summed" in html
    assert sum(report["label_bias"]["gold"]) == pytest.approx(1)
    bars = html.split('alt="Mean share of each label, student: ')[1].split('"')[0]
    assert "class 0 17.0" in bars
    assert "other labels" not in bars  # together they would dwarf the rest
    assert "40 other labels 50.5 % 51.5 %" in section(html, "bias")
