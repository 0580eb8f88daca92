import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference.graph import above, random_dag

from llmlabel.calibrate.conformal import Conformal
from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import promised_coverage
from llmlabel.report import plots, write_report
from llmlabel.report.taxonomy import rows_below, score_series
from llmlabel.softlabels import SoftLabels
from llmlabel.taxonomy.induce import Taxonomy

IDS = ["t1", "t2", "t3", "t4", "r5", "r6"]
TEXTS = ["one", "Hello, World!", "three", "four", "hello world", "six"]
SPLITS = ["test", "test", "test", "test", "train", "train"]
GOLD = [[0], [1], [2], [0], [1], [2]]
STUDENT = [
    [0.8, 0.1, 0.1],
    [0.3, 0.6, 0.1],
    [0.5, 0.1, 0.4],
    [0.9, 0.1, 0.0],
    [0.5, 0.4, 0.1],
    [0.1, 0.1, 0.8],
]
TEACHER = [[0.2, 0.6, 0.2]] * 6
SETS = [[0], [1], [], [0, 1], [0], [2]]
LABELS = load_labels(["alpha", "beta", "gamma"])
CONFORMAL = Conformal(
    alpha=0.25, score="lac", threshold=0.5, rows=100, seed=0, label_space=LABELS.fingerprint
)


def table(probs: list, labels: LabelSpace = LABELS, **columns: tuple) -> Dataset:
    base = Dataset.from_dict({"id": IDS, "text": TEXTS, "split": SPLITS})
    rows = {"gold": (GOLD, List(Value("int32")))} | columns
    rows = {name: column for name, column in rows.items() if column is not None}
    return SoftLabels.from_dense(np.array(probs), labels).add_to(with_columns(base, rows))


def strings(values: list) -> tuple:
    return values, Value("string")


def lists(values: list) -> tuple:
    return values, List(Value("int32"))


def example() -> dict[str, Dataset]:
    errors = strings([None, None, "text cut: 300 tokens", "text cut: 400 tokens", None, None])
    return {
        "raw": table(TEACHER, engine=strings(["fake"] * 6), prompt_sha=strings(["abcd"] * 6)),
        "corrected": table(TEACHER, error=errors, engine=strings(["fake"] * 6)),
        "student": table(STUDENT, set_ids=lists(SETS)),
    }


def report_of(tmp_path: Path, sources: dict[str, Dataset] | None = None, **arguments: object):
    labels = arguments.pop("labels", LABELS)
    conformal = dataclasses.replace(CONFORMAL, label_space=labels.fingerprint)
    settings = {"student": "student", "output": tmp_path / "report", "conformal": conformal}
    settings |= arguments
    report = write_report(sources or example(), labels, **settings)
    html = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert json.loads((tmp_path / "report" / "report.json").read_text("utf-8")) == report
    return report, html


def section(html: str, name: str) -> str:
    """Visible text of a section, white space made one."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', html, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", found[1]).replace("&#8239;", "\u202f")
    return " ".join(text.split())


# ------------------------------------------------------------------------------------- numbers


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
    assert "4 of 6 rows have exactly one label in their set; the other 2" in section(html, "sets")


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


def test_label_bias_is_the_mean_share_against_gold(tmp_path: Path) -> None:
    probs = [*TEACHER[:3], [0.0, 0.0, 0.0], *TEACHER[4:]]  # a row without an answer has no share
    report, _ = report_of(tmp_path, example() | {"raw": table(probs)})
    bias = report["label_bias"]
    assert bias["gold"] == [0.5, 0.25, 0.25]
    assert bias["sources"]["raw"] == pytest.approx([0.2, 0.6, 0.2], abs=1e-6)
    assert bias["sources"]["student"] == pytest.approx([2.5 / 4, 0.9 / 4, 0.6 / 4], abs=1e-6)


def test_review_is_ranked_by_margin_and_disagreement_over_all_rows(tmp_path: Path) -> None:
    report, html = report_of(tmp_path, baselines={"corrected": "raw"}, review_rows=4)
    # (1 - margin) + disagreement: r5 .9+1, t3 .9+1, t2 .7+0, t1 .3+1, r6 .3+1, t4 .2+1
    assert report["review"] == ["t3", "r5", "t1", "r6"]
    shown = section(html, "review")
    assert (
        "t3 score 1.90 error of corrected: text cut: 300 tokens · "
        "sources disagree (beta 1, alpha 1) · empty set · low margin (0.10)"
    ) in shown
    assert "alpha 0.50 gamma 0.40 beta 0.10 set: empty · true: gamma" in shown
    assert "alpha 0.50 beta 0.40 gamma 0.10 set: alpha t1" in shown  # r5, whose gold is not shown


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


# ------------------------------------------------------------------------- what is (not) looked at


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


# ------------------------------------------------------------------------------- missing parts


def test_without_gold_nothing_is_claimed(tmp_path: Path) -> None:
    sources = {"student": table(STUDENT, gold=None, set_ids=lists(SETS))}
    report, html = report_of(tmp_path, sources)
    assert not [key for key in report["summary"] if "accuracy" in key or key == "coverage"]
    assert report["confusion"] is None
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


# ------------------------------------------------------------ hierarchies, their cost and origin

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
    assert scores["at_a_leaf"] == pytest.approx(2 / 3)
    assert tree["sources"]["other"]["f1"] == pytest.approx(2 * 2 / 15)
    assert tree["rows"] == {"a": 3, "a1": 2}
    assert tree["gold"] == {"a": 3, "b": 1, "a1": 1, "a2": 1, "b1": 1}
    assert (tree["levels"], tree["roots"], tree["leaves"]) == (2, 2, 3)
    assert report["summary"]["hierarchical_f1 of student"] == pytest.approx(8 / 12)
    assert sum(map(sum, report["confusion"]["counts"])) == 4
    told = section(html, "hierarchy")
    assert "student 25.0 % 80.0 % 57.1 % 66.7 % 1.00 66.7 %" in told
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


def history() -> list[dict]:
    entry = {
        **{"run": 0, "level": 1, "parent": None, "attempts": 1, "problem": None, "notes": []},
        **{"suggestions": None, "explanation": "groups of texts", "added": [], "removed": []},
    }
    return [
        {**entry, "step": "generate", "batch": 0, "score": None, "labels": ["x", "y"]},
        {
            **{**entry, "step": "update", "batch": 1, "score": 62, "labels": ["x", "<i>z"]},
            **{"added": ["<i>z"], "removed": ["y", "w"], "suggestions": "name it better"},
        },
        {
            **{**entry, "step": "review", "batch": None, "score": 71, "labels": ["x", "<i>z"]},
            **{"attempts": 5, "problem": "40 labels, at most 25"},
        },
        {**entry, "step": "select", "batch": None, "score": 0.5, "labels": ["x", "<i>z"]},
    ]


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


# ----------------------------------------------------------------------------------- provenance


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


# -------------------------------------------------------------------------------------- the page


class _Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]


HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}\u202e\x00\"'&<b> $x_1$"


def page_with(tmp_path: Path, string: str) -> tuple[dict, str]:
    """The string in every place that a person or a model can fill."""
    labels = load_labels([string, "beta", "gamma"])
    tmp_path.mkdir()
    (tmp_path / "model_card.json").write_text(json.dumps({string: string}))
    base = table(
        STUDENT,
        labels,
        set_ids=lists(SETS),
        id=strings([string, *IDS[1:]]),
        text=strings([string, string * 1000, "x" * 80_000, "", "\u2028 $a$", string]),
        error=strings([string] * 6),
        engine=strings([string] * 6),
        prompt_sha=strings([string] * 6),
    )
    sources = {string: base, "student": base}
    return report_of(
        tmp_path,
        sources,
        baselines={"student": string},
        title=string,
        labels=labels,
        model=tmp_path,
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    report, html = page_with(tmp_path / "hostile", HOSTILE)
    page, plain = _Tags(html), _Tags(page_with(tmp_path / "plain", "plain")[1])
    assert page.tags == plain.tags
    assert page.attributes == plain.attributes
    assert "script" not in page.tags
    assert all(place.startswith(("data:image/svg+xml;base64,", "#")) for place in page.addresses)
    assert "{{ 7 * 7 }}" in html
    assert not set(html) & {"\u202e", "\x00", "\u2028"}
    assert HOSTILE in report["review"]
    assert len(html) < 600_000


def test_hostile_labels_and_rounds_stay_text(tmp_path: Path) -> None:
    def tags(string: str, folder: Path) -> tuple[set[str], set[str], str]:
        entries = [string, {"id": "b", "name": string, "description": string, "parent": string}]
        labels = load_labels([*entries, {"id": "c", "parent": string}])
        rounds = [{**one, "parent": string, "labels": [string]} for one in history()]
        for one in rounds:
            one |= {"added": [string], "removed": [string], "suggestions": string}
            one |= {"problem": string, "explanation": string}
        calls = [1] * 6, Value("int32")
        sources = {string: table(STUDENT, labels, calls=calls, prompt_tokens=calls)}
        sources["student"] = sources[string]
        _, html = report_of(folder, sources, labels=labels, taxonomy=rounds)
        page = _Tags(html)
        return page.tags, page.attributes, html

    hostile, plain = tags(HOSTILE, tmp_path / "a"), tags("plain", tmp_path / "b")
    assert hostile[:2] == plain[:2]
    assert "script" not in hostile[0]
    assert not set(hostile[2]) & {"\u202e", "\x00"}
    assert "{{ 7 * 7 }}" in section(hostile[2], "hierarchy")
    assert "{{ 7 * 7 }}" in section(hostile[2], "taxonomy")


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    _, html = report_of(tmp_path)
    style = re.search("<style>(.*)</style>", html, flags=re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html
    assert "<link" not in html
    assert len(html) < 400_000
    for name in ("measured", "accuracy", "sets", "review", "provenance"):
        assert section(html, name)
    assert html.count("<img ") == html.count('alt="') == 9


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


def svg(uri: str) -> str:
    return base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()


def test_names_in_figures_are_no_mathematics() -> None:
    uri = plots.shares(np.array([0.5, 0.5]), None, names=["$x_1$ & <b>", "b"], limit=0.5)
    assert "<!-- $x_1$ &amp; &lt;b&gt; -->" in svg(uri)
    assert "font-family" not in svg(uri)  # drawn as paths
    assert "date" not in svg(uri)


def test_a_name_that_the_font_lacks_is_numbered() -> None:
    assert plots.drawable("政治", "label 3") == "label 3"
    assert plots.drawable("a\n b", "label 3") == "a b"
    assert plots.drawable("x" * 30, "label 3") == "x" * 23 + "…"
    assert plots.drawable("a\u202eb", "label 3") == "a\ufffdb"
    assert "<!-- label 2 -->" in svg(
        plots.shares(np.array([0.5, 0.5]), None, names=["a", "政治"], limit=0.5)
    )


# ---------------------------------------------------------------------------------------- errors


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
