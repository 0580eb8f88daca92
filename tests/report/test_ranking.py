import base64
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import ranking as reference
from report.pages import HOSTILE, STUDENT, TEACHER, Tags, lists, report_of, section, svg
from report.pages import table as three_labels

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.report import ranking
from llmlabel.report.measure import gather
from llmlabel.softlabels import SoftLabels

SEEDS = pytest.mark.parametrize("seed", range(20))
MANY = load_labels([f"name {number}" for number in range(30)], multilabel=True)


def rows_of(count: int, gold: list, **columns: Any) -> Dataset:
    ids = [f"r{number}" for number in range(count)]
    base = Dataset.from_dict({"id": ids, "text": ids})
    return with_columns(base, {"gold": lists(gold)} | columns)


def source(probs: np.ndarray, gold: list, labels: LabelSpace = MANY, **columns: Any) -> Dataset:
    return SoftLabels.from_dense(probs, labels).add_to(rows_of(len(probs), gold, **columns))


def told(tmp_path: Path, sources: dict[str, Dataset], training: Dataset, **arguments: Any) -> tuple:
    settings = {"labels": MANY, "split": None, "conformal": None} | arguments
    return report_of(tmp_path, sources, training=training, **settings)


def some(seed: int) -> tuple[dict[str, Dataset], Dataset, dict[str, list], list, list]:
    """Two sources, training rows, and the same as plain values; what is excluded has no score."""
    rng = np.random.default_rng(seed)
    rows, labels = 40, len(MANY)
    often = 1 / np.arange(1, labels + 1)
    drawn = [rng.random(labels) < often for _ in range(60 + rows)]
    true = [np.flatnonzero(row).tolist() for row in drawn]
    training, gold = true[:60], [ids if rng.random() < 0.9 else None for ids in true[60:]]
    known = [row for row, ids in enumerate(gold) if ids is not None]
    sources, plain = {}, {}
    for name, share in (("student", 0.5), ("other", 0.2)):
        probs = np.round(rng.random((rows, labels)) * (rng.random((rows, labels)) < share), 2)
        left_out = [rng.integers(0, labels, 2).tolist() for _ in range(rows)]
        sources[name] = source(probs, gold, excluded_ids=lists(left_out))
        plain[name] = [
            {at: p for at, p in enumerate(probs[row].tolist()) if p and at not in left_out[row]}
            for row in known
        ]
    return sources, rows_of(60, training), plain, training, [gold[row] for row in known]


@SEEDS
def test_numbers_of_each_source_equal_the_twins(seed: int) -> None:
    sources, rows, plain, training, gold = some(seed)
    settings = {"student": "student", "befores": {}, "split": None, "conformal": None}
    report = ranking.rankings(gather(sources, MANY, **settings), rows)
    weights = reference.inverse_propensity(training, len(MANY), 0.55, 1.5)
    counts = [sum(label in true for true in training) for label in range(len(MANY))]
    for name, stored in plain.items():
        found = report["sources"][name]
        expected = {}
        for k in (1, 3, 5):
            expected |= reference.scores(stored, gold, k, weights)
        shares = [
            sum(label in row for label in true) / len(true) if true else 0
            for row, true in zip(stored, gold, strict=True)
        ]
        assert found == pytest.approx(expected | {"R@stored": sum(shares) / len(shares)}, abs=1e-6)
        lines = reference.by_frequency(stored, gold, counts, 5, 10)
        tenths = report["tenths"]
        assert [(one["labels"], one["gold"], one["sources"][name]["hits"]) for one in tenths] == [
            line for line in lines if line[0]
        ]
        for one in tenths:
            own = one["sources"][name]
            assert own["P@5"] == own["hits"] / (5 * len(gold))
            assert own["R@5"] == (own["hits"] / one["gold"] if one["gold"] else 0)
        assert sum(one["sources"][name]["P@5"] for one in tenths) == pytest.approx(found["P@5"])
    assert report["never_seen"] == counts.count(0)
    assert report["training_rows"] == 60


def known_case() -> tuple[dict[str, Dataset], Dataset]:
    """Labels 0 and 1 are frequent, 2 is rare, 3 is in no training row; 30 rows of {0, 2}, 30 of {3}.

    The student finds 0 and 3 and stores 2 behind five others; the other source says 0 everywhere.
    """
    gold = [[0, 2]] * 30 + [[3]] * 30
    student, other = np.zeros((60, len(MANY))), np.zeros((60, len(MANY)))
    student[:30, 0], student[:30, 10:15], student[:30, 2] = 0.9, 0.4, 0.1
    student[30:, 3] = 0.2
    other[:, 0] = 0.6
    training = rows_of(11, [[0, 1]] * 8 + [[0, 2], [2], None])
    return {"student": source(student, gold), "other": source(other, gold)}, training


def test_a_known_case_on_the_page(tmp_path: Path) -> None:
    report, html = told(tmp_path, *known_case())
    found = report["ranking"]
    assert found["training_rows"] == 10  # the gold of one is not known
    assert found["never_seen"] == 27
    one, other = found["sources"].values()
    assert (one["P@1"], one["R@5"], one["R@stored"]) == (1.0, 0.75, 1.0)
    assert (other["P@1"], other["R@5"], other["R@stored"]) == (0.5, 0.25, 0.25)
    # three labels occur: 9, 8 and 2 times, in the middle of a third each
    tenths = [
        (line["group"], line["labels"], line["least"], line["most"], line["gold"])
        for line in found["tenths"]
    ]
    assert tenths == [
        (2, 1, 9, 9, 30),
        (6, 1, 8, 8, 0),
        (9, 1, 2, 2, 30),
        ("zero-shot", 27, 0, 0, 30),
    ]
    assert [line["sources"]["student"]["R@5"] for line in found["tenths"]] == [1, 0, 0, 1]
    assert headline(html) == (
        "Of 60 rows, student has a true label first in 100.0\u202f%; of its first five labels, "
        "20.0\u202f% are true."
    )
    assert {key: report["summary"][key] for key in ranking.MAIN} == {
        key: one[key] for key in ranking.MAIN
    }
    text = section(html, "ranking")
    p5, ndcg = (one[key] for key in ("P@5", "nDCG@5"))
    assert p5 == 60 / 300
    assert ndcg == pytest.approx((1 / (1 + 1 / math.log2(3)) + 1) / 2)
    assert f"student 100.0 % 33.3 % 20.0 % 75.0 % {100 * ndcg:.1f}" in text
    assert "in the 10 training rows" in text
    assert "27 of the 30 labels occur in none" in text
    # the training rows, labels and pairs of each tenth, and both sources with their part of P@5
    assert "9 1 30 100.0 % (10.0) 100.0 % (10.0)" in text
    assert "8 1 0 \u2013 (0.0) \u2013 (0.0)" in text
    assert "none 27 30 100.0 % (10.0) 0.0 % (0.0)" in text
    assert "but for how often each label is true in training" not in text
    assert '<a href="#ranking">Ranking</a>' in html


def headline(html: str) -> str:
    return re.sub("<[^>]*>", "", re.search(r'<p class="headline">(.*)</p>', html)[1])


def drawn(html: str) -> str:
    part = html.split('<section id="ranking">')[1].split("</section>")[0]
    return svg(part.split('src="')[1].split('"')[0])


def test_the_figure_has_a_line_for_each_source_and_leaves_out_groups_of_few(tmp_path: Path) -> None:
    _, html = told(tmp_path, *known_case())
    figure = drawn(html)
    names = [
        name for name in ("student", "other", "none", "9", "8", "2") if f"<!-- {name} -->" in figure
    ]
    assert names == ["student", "other", "none", "9", "2"]  # none is true of the label of 8 rows
    alt = "R@5 by training rows of a label (9, 2, none): student 100.0\u202f%, 0.0\u202f%, 100.0"
    assert f'alt="{alt}' in html


def test_equal_inputs_give_equal_bytes_and_the_order_of_training_is_nothing(tmp_path: Path) -> None:
    sources, training = known_case()
    told(tmp_path / "one", sources, training)
    told(tmp_path / "two", sources, training.select(range(10, -1, -1)))
    for name in ("report.html", "report.json"):
        pages = [(tmp_path / one / "report" / name).read_bytes() for one in ("one", "two")]
        assert pages[0] == pages[1]


def test_gold_may_stand_in_another_source_and_baselines_are_not_drawn(tmp_path: Path) -> None:
    sources, training = known_case()
    first, _ = told(tmp_path / "one", sources, training)
    without = {"student": sources["student"].remove_columns("gold"), "other": sources["other"]}
    second, html = told(tmp_path / "two", without, training, baselines={"student": "other"})
    assert second["ranking"] == first["ranking"]
    assert "<!-- other -->" not in drawn(html)
    assert "other before correction 50.0" in section(html, "ranking")


def test_only_rows_of_the_split_are_ranked(tmp_path: Path) -> None:
    sources, training = known_case()
    split = (["test"] * 30 + ["train"] * 30), sources["other"].features["id"]
    sources = {name: with_columns(one, {"split": split}) for name, one in sources.items()}
    report, html = told(tmp_path, sources, training, split="test")
    assert report["ranking"]["sources"]["student"]["R@5"] == 0.5
    assert report["ranking"]["tenths"][-1]["gold"] == 0
    assert "but for how often each label is true in training" in section(html, "measured")


def test_single_labels_are_ranked_too(tmp_path: Path) -> None:
    training = rows_of(3, [[0], [0], [1]])
    report, html = report_of(
        tmp_path,
        {"student": three_labels(STUDENT), "other": three_labels(TEACHER)},
        training=training,
    )
    found = report["ranking"]["sources"]
    assert {name: one["P@1"] for name, one in found.items()} == {"student": 0.75, "other": 0.25}
    assert found["student"]["P@1"] == report["sources"]["student"]["accuracy"]
    assert found["student"]["R@3"] == 1.0
    assert "source P@1 R@3 R@5 nDCG@5 PSP@1 PSP@5 R@stored" in section(html, "ranking")
    assert "student labels 75.0\u202f% right" in headline(html)


def test_without_gold_or_training_nothing_is_said(tmp_path: Path) -> None:
    sources, training = known_case()
    sources = {name: one.remove_columns("gold") for name, one in sources.items()}
    report, html = told(tmp_path / "one", sources, training)
    assert report["ranking"]["sources"] == {}
    assert "This needs the true labels of the measured rows" in section(html, "ranking")
    report, html = told(tmp_path / "two", sources, None)
    assert "ranking" not in report
    assert 'id="ranking"' not in html
    assert "P@1" not in report["summary"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    def page(name: str, folder: Path) -> tuple[Tags, str]:
        sources, training = known_case()
        labels = load_labels([name, *(f"name {at}" for at in range(29))], multilabel=True)
        sources = {
            key: with_columns(
                one, {"label_space": ([labels.fingerprint] * 60, one.features["label_space"])}
            )
            for key, one in sources.items()
        }
        sources = {name: sources["other"], "student": sources["student"]}
        _, html = told(folder, sources, training, labels=labels, baselines={"student": name})
        return Tags(html), html

    (hostile, html), (plain, _) = page(HOSTILE, tmp_path / "a"), page("plain", tmp_path / "b")
    assert (hostile.tags, hostile.attributes) == (plain.tags, plain.attributes)
    assert "{{ 7 * 7 }}" in section(html, "ranking")
    assert not set(html) & {"\u202e", "\x00"}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (Dataset.from_dict({"id": ["a"]}), "training: the column 'gold' is missing"),
        (rows_of(1, [None]), "training: no row has known gold; give the rows that models learned"),
        (
            rows_of(1, [[30]]),
            "training: row with id 'r0' has the gold label 30, but there are only 30",
        ),
    ],
)
def test_training_rows_that_do_not_fit(tmp_path: Path, training: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message) as failure:
        told(tmp_path, known_case()[0], training)
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "report").exists()


@SEEDS
def test_names_beside_lines_do_not_cover_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.round(rng.random(int(rng.integers(1, 9))), 1).tolist()
    places = ranking._spread(values, 0.1, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(places)[order]) >= 0.1 - 1e-9).all()
    assert 0 <= min(places) <= max(places) <= 1 + 1e-9
    apart = np.diff(np.sort(values))
    if len(values) == 1 or apart.min() >= 0.1 - 1e-9:
        assert places == pytest.approx(values)


def test_a_figure_is_drawn_with_and_without_unseen_labels() -> None:
    shares = {"<a>": [0.5, 0.25], "政治": [0.5, 0.0]}
    look = {"accent": "<a>", "quantity": "q"}
    seen = svg(ranking.by_frequency(shares, ["9 to 3", "2"], **look))
    unseen = svg(ranking.by_frequency(shares, ["9 to 3", ranking.NEVER], **look))
    assert "<!-- &lt;a&gt; -->" in seen
    assert "<!-- source 2 -->" in seen
    assert "<!-- none -->" in unseen
    assert base64.b64encode(seen.encode()) != base64.b64encode(unseen.encode())
