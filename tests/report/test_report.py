import dataclasses
import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from datasets import List, Value
from report.pages import (
    CONFORMAL,
    GOLD,
    LABELS,
    SETS,
    STUDENT,
    TEACHER,
    example,
    lists,
    report_of,
    section,
    strings,
    table,
)

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.report import write_report


def test_summary_is_flat_and_names_every_source(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    summary = report["summary"]
    assert all(isinstance(value, int | float | str) for value in summary.values())
    assert summary["accuracy of raw"] == 0.25
    assert summary["accuracy of student"] == 0.75
    assert summary["coverage"] == 0.75
    # of 4 new rows, beta-binomial(4, 76, 25) covers 0 in 0.4 % of draws, 0 or 1 in 5.3 %
    assert (summary["promised_low"], summary["promised_high"]) == (0.25, 1.0)
    assert summary["rows_for_a_human"] == 2
    assert summary["measured_rows"] == 4
    headline = re.sub("<[^>]*>", "", re.search(r'<p class="headline">(.*)</p>', html)[1])
    assert headline == (
        "Of 4 test rows, student labels 75.0\u202f% right; its sets hold the true label in "
        "75.0\u202f%, with 1.00 labels on average, and 2 rows (50.0\u202f%) need a human."
    )


def test_review_is_ranked_by_margin_and_disagreement_over_all_rows(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, baselines={"corrected": "raw"}, review_rows=4)
    # (1 - margin) + disagreement: r5 .9+1, t3 .9+1, t2 .7+0, t1 .3+1, r6 .3+1, t4 .2+1
    assert report["review"] == ["t3", "r5", "t1", "r6"]
    shown = section(html, "review")
    assert (
        "t3 score 1.90 error of corrected: text cut: 300 tokens · "
        "sources disagree: beta (1), alpha (1) · empty set · low margin (0.10)"
    ) in shown
    assert "alpha 0.50 gamma 0.40 beta 0.10 set: empty · true: gamma" in shown
    assert "alpha 0.50 beta 0.40 gamma 0.10 set: alpha t1" in shown  # r5, whose gold is not shown


def test_long_answers_are_cut(tmp_path: Path) -> None:
    labels = load_labels(list("abcdefg"), multilabel=True)
    sizes = [7, 5, 4, 0, 1, 2]
    said = {f"s{size}": [[0.9] * size + [0.0] * (7 - size)] * 6 for size in sizes}
    sources = {name: table(probs, labels) for name, probs in said.items()}
    settings = {"labels": labels, "conformal": None, "split": None, "review_rows": 1}
    _, html = report_of(tmp_path, {**sources, "student": sources["s4"]}, **settings)
    assert (
        "sources disagree: a + b + c + d (2), a + b + c + 4 more (1), a + b + c + 2 more (1), "
        "a (1), other answers (1)"
    ) in section(html, "review")
    assert "there is no first answer whose confidence" in section(html, "probabilities")


def test_gold_plays_no_part_in_the_ranking(tmp_path: Path) -> None:
    first, _ = report_of(tmp_path)
    other = [[(ids[0] + 1) % 3] for ids in GOLD]
    sources = example()
    sources["student"] = table(STUDENT, set_ids=lists(SETS), gold=lists(other))
    second, _ = report_of(tmp_path, sources)
    assert first["review"] == second["review"]


def test_rows_with_errors_are_counted_by_message_without_numbers(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert report["errors"] == {"raw": {}, "corrected": {"text cut: # tokens": 2}, "student": {}}
    assert "corrected 2 text cut: # tokens" in section(html, "errors")


def test_gold_of_other_rows_is_never_looked_at(tmp_path: Path) -> None:
    report_of(tmp_path)
    first = (tmp_path / "report" / "report.html").read_bytes()
    nonsense = lists([*GOLD[:4], [99], [7, 8]])
    sources = {name: with_columns(one, {"gold": nonsense}) for name, one in example().items()}
    report_of(tmp_path, sources)
    assert (tmp_path / "report" / "report.html").read_bytes() == first
    with pytest.raises(ValueError, match="gold label 99"):
        report_of(tmp_path, sources, split=None)


def test_rows_are_joined_by_id(tmp_path: Path) -> None:
    first, _ = report_of(tmp_path)
    sources = example()
    sources["raw"] = sources["raw"].select([5, 3, 1, 0, 2, 4])
    assert report_of(tmp_path, sources)[0] == first


def test_gold_may_be_known_for_some_rows_and_stand_in_another_table(tmp_path: Path) -> None:
    gold = lists([[0], None, [2], None, None, None])
    sources = {"student": table(STUDENT, gold=None), "other": table(TEACHER, gold=gold)}
    report, html = report_of(tmp_path, sources)
    assert report["sources"]["student"]["gold_rows"] == 2
    assert report["sources"]["student"]["accuracy"] == 0.5
    assert "2 of them have a true label" in section(html, "measured")


def test_provenance(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    card = {"model": str(tmp_path / "cache" / "SmolLM2"), "seed": 7, "train_seconds": 12.5}
    (model / "model_card.json").write_text(json.dumps(card))
    report, html = report_of(tmp_path, model=model)
    provenance = report["provenance"]
    assert provenance["sources"]["raw"]["engine"] == ["fake"]
    assert provenance["sources"]["raw"]["prompt_sha"] == ["abcd"]
    assert provenance["label_space"] == LABELS.fingerprint
    assert provenance["model_card"] == {"model": "SmolLM2", "seed": 7}
    assert provenance["versions"]["numpy"] == np.__version__
    assert provenance["conformal"]["alpha"] == 0.25
    assert str(tmp_path) not in html
    assert "seed 7" in section(html, "provenance")


def test_votes_and_weights_are_told(tmp_path: Path) -> None:
    feature = List(
        {"source": Value("string"), "label_id": Value("int32"), "prob": Value("float32")}
    )
    vote = [
        {"source": "b", "label_id": 0, "prob": 1.0},
        {"source": "a", "label_id": 1, "prob": 0.5},
    ]
    student = table(STUDENT, votes=([vote] * 6, feature), weight=([0.5] * 6, Value("float32")))
    report, html = report_of(tmp_path, {"student": student})
    assert report["provenance"]["sources"]["student"]["votes_of"] == ["a", "b"]
    assert "votes of a, b. mean weight 0.500" in section(html, "provenance")


def test_equal_inputs_give_equal_bytes_whatever_matplotlibrc_says(tmp_path: Path) -> None:
    report_of(tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(first) == {"report.html", "report.json"}
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None}):
        report_of(tmp_path / "again")
        assert mpl.rcParams["font.size"] == 30
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "again" / "report").iterdir()
    } == first


@pytest.mark.parametrize(
    ("sources", "arguments", "message"),
    [
        ({}, {}, "there are no sources"),
        (None, {"student": "pupil"}, "student: 'pupil' is no source; the sources are 'raw', 'cor"),
        (None, {"baselines": {"student": "rawr"}}, "baselines: 'rawr' is no source"),
        (None, {"split": "tset"}, r"split 'tset' has no rows; .*'test': 4, 'train': 2"),
        (
            None,
            {"conformal": dataclasses.replace(CONFORMAL, label_space="0" * 16)},
            "conformal was fitted on label space 0000000000000000",
        ),
        (None, {"review_rows": -1}, "review_rows must be 0 or more; got -1"),
        (None, {"labels": load_labels(["x", "y"])}, "carry soft labels of label space"),
    ],
)
def test_errors_say_what_to_change(tmp_path: Path, sources, arguments, message) -> None:
    settings = {"student": "student", "output": tmp_path / "report"} | arguments
    labels = settings.pop("labels", LABELS)
    with pytest.raises(ValueError, match=message) as failure:
        write_report(example() if sources is None else sources, labels, **settings)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "report").exists()


def test_sources_must_have_the_same_rows(tmp_path: Path) -> None:
    sources = example()
    sources["raw"] = sources["raw"].select(range(5))
    with pytest.raises(
        ValueError, match=r"'raw' lacks 1 rows of source 'student', the first .*'r6'"
    ):
        report_of(tmp_path, sources)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"set_ids": lists([[0], [3], [], [], [], []])}, r"row with id 't2' has the set \[3\]"),
        ({"set_ids": strings(["a"] * 6)}, r"the column 'set_ids' holds string"),
        ({"error": ([5] * 6, Value("int64"))}, r"the column 'error' holds int64"),
        ({"votes": ([5] * 6, Value("int64"))}, r"the column 'votes' holds int64"),
    ],
)
def test_a_column_of_somebody_elses_is_named(tmp_path: Path, columns: dict, message: str) -> None:
    sources = example() | {"student": table(STUDENT, **columns)}
    with pytest.raises(ValueError, match=rf"source 'student': {message}"):
        report_of(tmp_path, sources)


def test_a_model_folder_without_a_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"half: model_card.json is missing"):
        report_of(tmp_path, model=tmp_path / "half")
    assert not (tmp_path / "report").exists()


def test_a_source_without_soft_labels_is_named(tmp_path: Path) -> None:
    sources = example()
    sources["raw"] = sources["raw"].remove_columns("label_probs")
    with pytest.raises(ValueError, match="source 'raw': the column 'label_probs' is missing"):
        report_of(tmp_path, sources)
