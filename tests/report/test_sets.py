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
from llmlabel.calibrate.diagnostics import worst_slices
from llmlabel.calibrate.drift import monitor_drift
from llmlabel.calibrate.exchangeability import check_exchangeability
from llmlabel.calibrate.groups import (
    GroupConformal,
    fit_class_conformal,
    fit_group_conformal,
    predict_group_sets,
)
from llmlabel.calibrate.noise import fit_noisy_conformal, predict_noisy_sets
from llmlabel.data import save, with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.recipe import load_recipe, run
from llmlabel.report import write_report
from llmlabel.report.plots import wealth, windows
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


def test_both_bounds_of_thresholds_from_wrong_labels(tmp_path: Path) -> None:
    gold, new = rows_of(0, 400, name="gold"), rows_of(1, 200, name="new")
    draw = np.random.default_rng(2)
    wrong = draw.random(400) < 0.2
    given = [
        [int(draw.integers(3))] if w else ids for w, ids in zip(wrong, gold["gold"], strict=True)
    ]
    pseudo = with_columns(gold, {"said": (given, List(Value("int32")))}).remove_columns("gold")
    fitted = fit_noisy_conformal(pseudo, LABELS, column="said", noise=0.2 * 2 / 3)
    report, page = promise_of(tmp_path, predict_noisy_sets(new, LABELS, fitted), fitted)
    told = report["coverage"]["promise"]
    assert told["corrected"]["guaranteed"] == fitted.guaranteed < fitted.coverage
    assert told["plain"]["threshold"] == fitted.plain_threshold > fitted.threshold
    assert "13.3 % of the 400 labels" in page
    assert "as given" in page


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


def watched(
    tmp_path: Path, *, noise: float = 1.0, source: str = "mail"
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Report, page and what it was given: 200 gold rows, 400 later ones of which half have noise."""
    known, calm = rows_of(1, 200, name="gold"), rows_of(2, 200, name="calm")
    late = concatenate_datasets([calm, rows_of(3, 200, name=source, noise=noise)])
    conformal = fit_conformal(known, LABELS, alpha=0.1)
    known, late = (predict_sets(rows, LABELS, conformal) for rows in (known, late))
    given = {
        "slices": worst_slices(late, LABELS, columns=("split",), words="leave out"),
        "drift": monitor_drift(late, LABELS, calibration=known, window=50),
        "shift": check_exchangeability(known, late, LABELS),
    }
    output = tmp_path / "report"
    arguments = {"student": "student", "conformal": conformal, "split": None, "output": output}
    report = write_report({"student": late}, LABELS, **arguments, **given)
    return report, (output / "report.html").read_text("utf-8"), given


def test_slices_drift_and_shift_are_shown(tmp_path: Path) -> None:
    report, html, given = watched(tmp_path, noise=3.0)
    sets, told = report["coverage"], section(html, "sets")
    worst, drift = given["slices"][0], given["drift"]
    assert worst.measured.below
    assert sets["slices"][0]["value"] == "mail"
    assert sets["slices"][0]["measured"]["covered"] == worst.measured.covered
    line = f"split = mail {100 * worst.found.coverage:.1f} % {worst.measured.rows} "
    assert line + f"{worst.measured.covered} {100 * worst.measured.coverage:.1f} %" in told
    assert f"to {100 * worst.measured.high:.1f} % {worst.measured.set_size:.2f} surely" in told
    assert f"{given['slices'][1].measured.set_size:.2f} not shown" in told

    numbers = [at for at, one in enumerate(drift.windows, start=1) if one.alarm]
    assert numbers
    assert min(numbers) > 4  # the first four are calm
    assert [one["number"] for one in sets["drift"]["windows"] if one["alarm"]] == numbers
    ends = f"({50 * numbers[0] - 50} to {50 * numbers[0] - 1})"
    assert f"Alarm: {len(numbers)} of 8 windows differ from the gold rows, the first" in told
    assert f"window {numbers[0]} {ends}" in told
    first = drift.windows[numbers[0] - 1]
    line = f"{numbers[0]} yes {first.first} to {first.last} 50 {100 * first.small_p_values:.1f} %"
    assert f"{line} {first.mean_set_size:.2f} {first.label} " in told
    assert drift.alarms
    for row in drift.alarms.values():
        assert f"raised its alarm at the row {row}" in told
    assert sets["drift"]["wealth_of_alarm"] == pytest.approx(math.log10(80))  # two bets, 5 %
    assert f"8 windows: {min(one.small_p_values for one in drift.windows):.3g} to" in html
    listed = ", ".join(map(str, numbers))
    assert html.count(f"windows with an alarm: {listed}.") == 2

    assert "No: at least one test says that the 400 new rows and the 200 gold rows are not" in told
    test = next(one for one in given["shift"].tests if one.of == "true_score")
    line = (
        f"score of the true label 400 {test.statistic:.3f} {test.p_value:.2g} {test.adjusted:.2g}"
    )
    assert f"{line} yes" in told
    assert sets["shift"]["shifted"] is True
    assert [one["of"] for one in sets["shift"]["tests"]] == [one.of for one in given["shift"].tests]


def test_calm_rows_raise_no_alarm(tmp_path: Path) -> None:
    report, html, _ = watched(tmp_path)
    told = section(html, "sets")
    assert "No alarm: no window and no bet says" in told
    assert "No sign against it: no test tells the 400 new rows from the 200 gold rows" in told
    assert html.count("windows with an alarm: none.") == 2
    assert (report["coverage"]["drift"]["drifted"], "surely below" in told) == (False, True)


def test_only_what_is_given_is_shown(tmp_path: Path) -> None:
    report, html = report_of(tmp_path)
    assert not {"slices", "drift", "shift"} & set(report["coverage"])
    for words in ("missed most", "like the gold rows?", "Drift along", "Bets against"):
        assert words not in html
    report, html = report_of(tmp_path, slices=())
    assert report["coverage"]["slices"] == []
    assert "None had rows in both halves" in section(html, "sets")


def test_hostile_slices_and_windows_are_text(tmp_path: Path) -> None:
    _, _, given = watched(tmp_path / "a", noise=3.0)
    window = dataclasses.replace(given["drift"].windows[-1], first=HOSTILE, last=HOSTILE * 9)
    _, html = report_of(
        tmp_path,
        slices=(dataclasses.replace(given["slices"][0], column=HOSTILE, value=HOSTILE * 9),),
        drift=dataclasses.replace(
            given["drift"], windows=(window,) * 101, alarms={"probability": HOSTILE}
        ),
    )
    tags = Tags(html)
    assert "script" not in tags.tags
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert "x" not in tags.addresses
    assert "\u202e" not in html
    told = section(html, "sets")
    assert told.count("&lt;img src=x") < 300  # each is cut
    assert "Windows with an alarm as a table" in told


def test_what_cannot_be_shown_with_the_sets_is_refused(tmp_path: Path) -> None:
    _, _, given = watched(tmp_path / "a")
    sources = example()
    with pytest.raises(ValueError, match="slices, drift: the student has no prediction sets"):
        report_of(
            tmp_path,
            sources | {"student": sources["student"].remove_columns("set_ids")},
            slices=given["slices"],
            drift=given["drift"],
        )
    for name in ("drift", "shift"):
        other = dataclasses.replace(given[name], label_space="other")
        with pytest.raises(ValueError, match=f"{name} is of label space other"):
            report_of(tmp_path, **{name: other})


def test_alarms_of_windows_and_bets_are_marked() -> None:
    drawn = {
        alarm: svg(windows([0.1, 0.4], [False, alarm], quantity="share", expected=0.1))
        for alarm in (False, True)
    }
    assert ["fill: #ffffff" in drawn[alarm] for alarm in (False, True)] == [False, True]
    quiet, loud = (svg(wealth({"bet": most}, alarm=1.6)) for most in (1.5, 1.7))
    assert "DejaVuSans-Bold" in loud
    assert "DejaVuSans-Bold" not in quiet


RECIPE = """
labels: {call: llmlabel.labelspace.load_labels, source: [alpha, beta, gamma]}
known: {call: llmlabel.data.load, path: KNOWN}
late: {call: llmlabel.data.load, path: LATE}
worst: {call: llmlabel.calibrate.diagnostics.worst_slices, dataset: "${late}", labels: "${labels}", columns: [source], words: leave out}
drift: {call: llmlabel.calibrate.drift.monitor_drift, new: "${late}", labels: "${labels}", calibration: "${known}"}
shift: {call: llmlabel.calibrate.exchangeability.check_exchangeability, calibration: "${known}", new: "${late}", labels: "${labels}"}
report:
  call: llmlabel.report.write_report
  sources: {student: "${late}"}
  labels: ${labels}
  student: student
  split: null
  slices: ${worst}
  drift: ${drift}
  shift: ${shift}
"""


def test_a_recipe_passes_them_on(tmp_path: Path) -> None:
    sets, _ = fitted(noise=3.0)
    text = RECIPE
    for name, rows in (("KNOWN", range(200)), ("LATE", range(200, 500))):
        path = save(sets.select(rows), output=tmp_path / f"{name}.parquet")
        text = text.replace(name, str(path))
    (tmp_path / "watch.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "watch.yaml")
    report = run(recipe, output=tmp_path / "runs")["report"]
    coverage = report["coverage"]
    assert (len(coverage["slices"]), coverage["slices"][0]["column"]) == (2, "source")
    assert (coverage["drift"]["drifted"], coverage["shift"]["shifted"]) == (True, True)
    told = section((tmp_path / "runs/watch/report/report.html").read_text("utf-8"), "sets")
    assert "Alarm:" in told
