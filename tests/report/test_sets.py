"""The part of a report on prediction sets: who is missed, and what their promise rests on."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value, concatenate_datasets
from report.pages import (
    CONFORMAL,
    HOSTILE,
    LABELS,
    Tags,
    example,
    lists,
    report_of,
    section,
    strings,
    svg,
)

from llmlabel.calibrate.conformal import Conformal, fit_conformal, predict_sets
from llmlabel.calibrate.groups import (
    GroupConformal,
    fit_class_conformal,
    fit_group_conformal,
    predict_group_sets,
)
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.report import write_report
from llmlabel.report.sets import dots
from llmlabel.softlabels import SoftLabels


def rows_of(seed: int, rows: int, *, name: str, noise: float = 1.0, last: float = 1 / 3) -> Dataset:
    rng = np.random.default_rng(seed)
    gold = rng.choice(3, rows, p=[(1 - last) / 2, (1 - last) / 2, last])
    logits = rng.normal(0, noise, (rows, 3))
    logits[np.arange(rows), gold] += 2.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = [f"{name}{i}" for i in range(rows)]
    table = Dataset.from_dict(
        {"id": ids, "text": ids, "split": [name] * rows, "source": ["web", "mail"] * (rows // 2)}
    )
    columns = {"gold": ([[int(g)] for g in gold], List(Value("int32"))), "engine": strings(["e"] * rows)}  # fmt: skip
    return SoftLabels.from_dense(probs, LABELS).add_to(with_columns(table, columns))


def promise_of(
    tmp_path: Path, sets: Dataset, conformal: Any, split: str | None = "new"
) -> tuple[dict[str, Any], str]:
    output = tmp_path / "report"
    report = write_report(
        {"student": sets},
        LABELS,
        student="student",
        output=output,
        conformal=conformal,
        split=split,
    )
    return report, section((output / "report.html").read_text("utf-8"), "sets")


def fitted(**shift: float) -> tuple[Dataset, Conformal]:
    """200 gold rows and 300 measured ones, and a threshold fitted on the first."""
    known, new = rows_of(1, 200, name="gold"), rows_of(2, 300, name="new", **shift)
    conformal = fit_conformal(known, LABELS, alpha=0.1)
    return predict_sets(concatenate_datasets([known, new]), LABELS, conformal), conformal


def test_coverage_by_size_and_confidence(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    sets = report["coverage"]
    # sets [0] [1] [] [0, 1] of gold 0 1 2 0, confidences 0.8 0.6 0.5 0.9
    assert {name: (row["rows"], row["covered"]) for name, row in sets["by_size"].items()} == {
        "0": (1, 0), "1": (2, 2), "2": (1, 1)
    }  # fmt: skip
    assert {name: row["covered"] for name, row in sets["by_confidence"].items()} == {
        "0.5 to 0.5": 0, "0.6 to 0.6": 1, "0.8 to 0.8": 1, "0.9 to 0.9": 1
    }  # fmt: skip
    assert sets["macro_coverage"] == pytest.approx(2 / 3)
    assert sets["share_below_half"] == pytest.approx(1 / 3)
    told = section(html, "sets")
    assert "Averaged over labels, the coverage is 66.7 %; 33.3 % of the labels" in told
    assert "2 1 1 100.0 % 2.5 % to 100.0 % 2.00" in told
    assert "0.5 to 0.5 1 0 0.0 % 0.0 % to 97.5 % 0.00" in told
    assert 'alt="Coverage by size of the set: 0 0.0 % of 1; 1 100.0 % of 2' in html


def test_a_kept_promise(tmp_path: Path) -> None:
    report, told = promise_of(tmp_path, *fitted())
    promise = report["coverage"]["promise"]
    assert promise["shift"]["rows"] == 300
    assert promise["shift"]["p_value"] > 0.05
    assert (promise["trained_on"], promise["measured_fitted_on"]) == (0, 0)
    assert "No sign of a shift: true labels conform here as on the gold rows" in told
    assert "the threshold was fitted on 200 gold rows; none is among the measured ones" in told
    assert "Broken" not in told
    assert "In doubt" not in told
    sets = report["coverage"]
    assert sets["promised_low"] <= sets["coverage"] <= sets["promised_high"]


def test_what_breaks_the_promise_is_said(tmp_path: Path) -> None:
    sets, conformal = fitted(noise=3.0)
    conformal = dataclasses.replace(
        conformal, training_overlap=37, engines=("other",), recall=0.97, threshold=math.inf
    )
    report, told = promise_of(tmp_path, sets, conformal, split=None)
    promise = report["coverage"]["promise"]
    assert (promise["trained_on"], promise["measured_fitted_on"]) == (37, 200)
    assert promise["shift"]["rows"] == 300  # gold rows of the threshold are not compared with it
    assert promise["shift"]["p_value"] == 0.001
    for line in (
        "Broken: 37 of the gold rows were trained on",
        "Broken: 200 of the 500 measured rows are gold rows that the threshold was fitted on",
        "Broken: the threshold was fitted on soft labels of other, but rows here have those of e",
        "Kept, but empty: the threshold is infinite",
        "Ceiling: the soft labels of the gold rows store the true label in 97.0 % of them",
        "In doubt: true labels do not conform here as they do on the gold rows",
    ):
        assert line in told
    assert "Nothing known" not in told


def test_labels_that_are_surely_covered_too_rarely(tmp_path: Path) -> None:
    sets, conformal = fitted(noise=3.0)
    report, told = promise_of(tmp_path, sets, conformal)
    assert [row["below"] for row in report["coverage"]["classes"].values()] == [True] * 3
    assert "A hollow diamond and a bold number: surely below the target" in told


def test_without_a_conformal_nothing_is_promised(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, conformal=None)
    assert "promise" not in report["coverage"]
    told = section(html, "sets")
    assert "What the promise rests on" not in told
    assert "surely below" not in told
    assert "Band" not in told
    assert not any(row["below"] for row in report["coverage"]["classes"].values())


def test_too_few_rows_are_not_compared(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert report["coverage"]["promise"]["shift"] is None
    assert "Not tested: whether the measured rows are like the gold rows" in section(html, "sets")


def groups(*, column: str | None) -> tuple[Dataset, GroupConformal]:
    known, new = rows_of(1, 200, name="gold", last=0.02), rows_of(2, 300, name="new", last=0.02)
    if column is None:
        fit = fit_class_conformal(known, LABELS, alpha=0.1, fallback=("marginal",))
    else:
        fit = fit_group_conformal(known, LABELS, column=column, alpha=0.1)
    return predict_group_sets(new, LABELS, fit), fit


def test_labels_without_a_threshold_of_their_own(tmp_path: Path) -> None:
    sets, fit = groups(column=None)
    few = fit.thresholds[2].rows
    assert few < 9
    report, told = promise_of(tmp_path, sets, fit)
    promise = report["coverage"]["promise"]
    assert promise["without"] == {"gamma": {"rows": few, "level": "marginal"}}
    assert promise["levels"] == {"marginal": 1}
    assert "90.0 % of new rows of each label that has a threshold of its own" in told
    assert (
        "No promise of their own: 1 of 3 labels have no threshold from their own gold rows alone"
        in told
    )
    assert f"(1 from all rows): gamma ({few})." in told
    assert "promised_low" not in report["coverage"]
    assert "95 % of such draws" not in told
    assert report["provenance"]["conformal"]["score"] == "lac"


def test_groups_of_a_column(tmp_path: Path) -> None:
    report, told = promise_of(tmp_path, *groups(column="source"))
    assert report["coverage"]["promise"]["without_guarantee"] == 0
    assert "of each group of source that has a threshold of its own" in told
    assert "each of 2 groups of source has enough gold rows" in told


def test_what_is_as_long_as_the_data_is_left_out(tmp_path: Path) -> None:
    sets, conformal = fitted()
    report, _ = promise_of(tmp_path, sets, conformal)
    told = report["provenance"]["conformal"]
    assert not {"scores", "row_marks", "prior", "thresholds"} & set(told)
    assert (told["rows"], told["data_sha"]) == (200, conformal.data_sha)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    labels = LabelSpace(tuple("abc"), (HOSTILE, "beta", "gamma"), ("",) * 3, ((),) * 3)
    sources = {
        name: with_columns(table, {"label_space": strings([labels.fingerprint] * len(table))})
        for name, table in example().items()
    }
    conformal = dataclasses.replace(CONFORMAL, engines=(HOSTILE,))
    sources["student"] = with_columns(sources["student"], {"engine": strings([HOSTILE + "2"] * 6)})
    conformal = dataclasses.replace(conformal, label_space=labels.fingerprint)
    output = tmp_path / "report"
    write_report(sources, labels, student="student", output=output, conformal=conformal)
    html = (output / "report.html").read_text("utf-8")
    tags = Tags(html)
    assert "script" not in tags.tags
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in section(html, "sets").replace("&#39;", "'")


def test_a_diamond_where_coverage_is_surely_too_low() -> None:
    row = {"rows": 9, "covered": 8, "coverage": 0.8, "coverage_low": 0.6, "coverage_high": 0.9}
    plain = {"a": {**row, "below": False}, "b": {**row, "below": False}}
    marked = {**plain, "b": {**row, "below": True}}
    one, two = svg(dots(plain, target=0.9)), svg(dots(marked, target=0.9))
    assert one != two
    assert dots(marked, target=0.9) == dots(marked, target=0.9)
    assert "fill: #ffffff" in two
    assert "fill: #ffffff" not in one


def test_duplicate_ids_in_a_set_count_once(tmp_path: Path) -> None:
    sources = example()
    sources["student"] = with_columns(
        sources["student"], {"set_ids": lists([[0, 0], [1], [], [0, 1], [0], [2]])}
    )
    assert report_of(tmp_path, sources)[0]["coverage"]["by_size"]["1"]["rows"] == 2
