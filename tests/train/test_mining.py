import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reference import mining as reference
from train.mined import INTS, rows_of, space

from llmlabel.data import with_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.softlabels import SoftLabels
from llmlabel.train.mining import (
    bars,
    cyclic_order,
    mine_negatives,
    reciprocal_rank_fusion,
    reducer,
    sampler,
)


class Known:
    """An encoder whose vectors are given, one a text, and that counts what it reads."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors, self.read = vectors, list[str]()

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.read += texts
        found = np.stack([np.asarray(self.vectors[text], np.float64) for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def at(cosines: list[float]) -> Known:
    """One text, and labels that it has these cosines with."""
    vectors = {f"label {i}": np.array([c, np.sqrt(1 - c * c)]) for i, c in enumerate(cosines)}
    return Known({"text 0": np.array([1.0, 0.0])} | vectors)


# --------------------------------------------------------------------------------------- parts


def test_fusion_of_a_hand_example() -> None:
    got = reciprocal_rank_fusion([[4, 2, 9], [2, 4], [9]])
    # 9: 1/63 + 1/61 = .032266; 2 and 4: 1/61 + 1/62 = .032522, of which 2 is the lower number
    assert list(got) == [2, 4, 9]
    assert got[2] == got[4] == pytest.approx(0.0325225, abs=1e-7)
    assert got[9] == pytest.approx(0.0322665, abs=1e-7)
    assert reciprocal_rank_fusion([[4, 2], [2]], k=0) == {2: 1.5, 4: 1.0}
    assert reciprocal_rank_fusion([]) == {}


@pytest.mark.parametrize("seed", range(20))
def test_fusion_equals_the_loop_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rankings = [rng.permutation(9)[: rng.integers(0, 9)].tolist() for _ in range(4)]
    order, sums = reference.fused(rankings, 10)
    got = reciprocal_rank_fusion(rankings, k=10)
    assert got == pytest.approx(sums, rel=1e-12)
    assert list(got) == list(reciprocal_rank_fusion(rankings[::-1], k=10))
    assert [round(got[x], 12) for x in got] == [round(sums[x], 12) for x in order]


def test_fusion_refuses() -> None:
    with pytest.raises(ValueError, match=r"ranking number 1 has an item twice: \[3, 3\]"):
        reciprocal_rank_fusion([[3], [3, 3]])
    with pytest.raises(ValueError, match="k must be at least 0; got -1"):
        reciprocal_rank_fusion([[3]], k=-1)


@pytest.mark.parametrize(
    ("rule", "value", "positive", "kept", "excluded"),
    [
        ("perc_pos", 0.95, 0.8, 0.759, 0.761),  # the paper: 0.95 x 0.8 = 0.76
        ("perc_pos", 0.95, -0.2, -0.211, -0.209),  # 0.95 x -0.2 = -0.19 would keep -0.2 itself
        ("perc_pos", 0.95, 0.0, -0.001, 0.0),
        ("perc_pos", 1.0, -0.5, -0.501, -0.5),
        ("perc_pos", None, 0.8, 0.759, 0.761),
        ("margin_pos", 0.1, 0.8, 0.699, 0.701),
        ("margin_pos", 0.1, -0.2, -0.301, -0.299),
        ("margin_pos", None, 0.8, 0.749, 0.751),
        ("abs", 0.3, 0.8, 0.299, 0.3),
        ("abs", 0.3, -0.8, 0.299, 0.3),
        ("abs", -0.3, -0.8, -0.301, -0.3),
        ("none", None, -0.8, 1.0, np.inf),
    ],
)
def test_truth_table_of_the_rules(
    rule: Any, value: float | None, positive: float, kept: float, excluded: float
) -> None:
    bar = bars(np.array([positive]), rule=rule, value=value)[0]
    assert kept < bar <= excluded
    if value is not None:
        assert bar == pytest.approx(reference.bar(positive, rule, value))


def test_the_bar_rises_with_the_positive_and_never_lies_above_it() -> None:
    scores = np.linspace(-1, 1, 201)
    for rule in ("perc_pos", "margin_pos"):
        found = bars(scores, rule=rule)
        assert (np.diff(found) > 0).all()
        assert (found <= scores).all()


def test_cyclic_order() -> None:
    assert cyclic_order(12, step=5) == [0, 5, 10, 1, 6, 11, 2, 7, 3, 8, 4, 9]
    for size in range(30):
        assert cyclic_order(size, step=5) == reference.cyclic(size, 5)
        assert sorted(cyclic_order(size, step=7)) == list(range(size))


# --------------------------------------------------------------------------- a teacher's scores


def test_what_is_as_near_as_the_own_label_is_excluded() -> None:
    teacher, labels = at([0.8, 0.9, 0.77, 0.75, 0.5, -0.3]), space(6)
    got = mine_negatives(rows_of([[0]]), labels, teacher)
    assert got["excluded_ids"][0] == [1, 2]
    assert got["negative_ids"][0] == [3, 4, 5]
    few = mine_negatives(rows_of([[0]]), labels, teacher, k=4, count=1)
    assert (few["excluded_ids"][0], few["negative_ids"][0]) == ([1, 2], [3])
    bare = mine_negatives(rows_of([[0]]), labels, teacher, rule="none", count=3)
    assert (bare["excluded_ids"][0], bare["negative_ids"][0]) == ([], [1, 2, 3])
    strict = mine_negatives(rows_of([[0]]), labels, teacher, rule="abs", value=0.5)
    assert (strict["excluded_ids"][0], strict["negative_ids"][0]) == ([1, 2, 3, 4], [5])


def test_a_negative_own_score_keeps_the_sense_of_the_rule() -> None:
    got = mine_negatives(rows_of([[0]]), space(4), at([-0.2, -0.195, -0.2, -0.3]))
    assert got["excluded_ids"][0] == [1, 2]
    assert got["negative_ids"][0] == [3]


def test_which_own_label_counts() -> None:
    teacher, labels, rows = at([0.9, 0.3, 0.7, 0.5, 0.2]), space(5), rows_of([[1, 0]])
    found = {
        positive: mine_negatives(rows, labels, teacher, positive=positive)["excluded_ids"][0]
        for positive in ("max", "mean", "min")
    }
    assert found == {"max": [], "mean": [2], "min": [2, 3]}  # bars .855, .57 and .285


def test_samplers() -> None:
    teacher, labels, rows = at([0.9, *np.linspace(0.5, 0.1, 23)]), space(24), rows_of([[0]])

    def negatives(**options: Any) -> list[int]:
        found: list[int] = mine_negatives(rows, labels, teacher, **options)["negative_ids"][0]
        return found

    assert negatives(count=4) == [1, 2, 3, 4]
    assert negatives(count=5, sample="cyclic", step=5) == [1, 6, 11, 16, 21]
    assert negatives(count=7, sample="cyclic", step=5) == [1, 2, 6, 7, 11, 16, 21]
    drawn = negatives(count=5, sample="uniform", seed=1)
    assert drawn == sorted(set(drawn))  # hardest first, each once
    assert drawn == negatives(count=5, sample="uniform", seed=1)
    assert len({tuple(negatives(count=5, sample="uniform", seed=s)) for s in range(5)}) == 5
    take = [sampler("uniform", step=5, count=5, seed=seed) for seed in range(200)]
    counts = np.bincount([x for one in take for x in one(list(range(23)), "r0")], minlength=23)
    assert counts.min() > 20  # 43.5 on average; the last is drawn like the first
    assert counts.max() < 70


@pytest.mark.parametrize("seed", range(20))
def test_mining_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = space(17)
    vectors = {text: rng.normal(size=3) for text in [*labels.texts(), "text 0", "text 1", "text 2"]}
    gold = [sorted(rng.choice(17, rng.integers(1, 5), replace=False).tolist()) for _ in range(3)]
    options: dict[str, Any] = {
        "k": int(rng.integers(1, 20)),
        "positive": ("max", "mean", "min")[seed % 3],
        "sample": ("topk", "cyclic")[seed % 2],
        "step": int(rng.integers(1, 6)),
        "count": int(rng.integers(1, 8)),
    }
    rule, value = [("perc_pos", 0.9), ("margin_pos", 0.2), ("abs", 0.1), ("none", None)][seed % 4]
    got = mine_negatives(rows_of(gold), labels, Known(vectors), rule=rule, value=value, **options)
    unit = {t: (v / np.linalg.norm(v)).tolist() for t, v in vectors.items()}
    for i, given in enumerate(gold):
        anchors = [unit[text] for text in labels.texts()]
        expected = reference.mined(
            unit[f"text {i}"], anchors, given, rule=rule, value=value, **options
        )
        assert (got["excluded_ids"][i], got["negative_ids"][i]) == expected


def test_order_blocks_and_index_change_nothing() -> None:
    usearch = pytest.importorskip("usearch")
    assert usearch
    rng = np.random.default_rng(5)
    labels = space(60)
    vectors = {t: rng.normal(size=8) for t in [*labels.texts(), *(f"text {i}" for i in range(9))]}
    rows = rows_of([rng.choice(60, 3, replace=False).tolist() for _ in range(9)])

    def mined(rows: Dataset, **options: Any) -> list[Any]:
        got = mine_negatives(rows, labels, Known(vectors), sample="uniform", k=20, **options)
        columns = ("id", "excluded_ids", "negative_ids")
        return sorted(zip(*(got[name][:] for name in columns), strict=True))

    one = mined(rows)
    assert mined(rows.select(range(8, -1, -1))) == one
    assert mined(rows, block_rows=2) == one
    assert mined(rows, search="usearch") == one
    assert sum(len(excluded) for _, excluded, _ in one) > 3


def test_rows_without_a_label_or_a_text_have_null() -> None:
    teacher = at([0.8, 0.9, 0.1])
    rows = rows_of([[0], [], None, [0]], ["text 0", "text 0", "text 0", " \n"])
    got = mine_negatives(rows, space(3), teacher)
    assert got["excluded_ids"][:] == [[1], None, None, None]
    assert got["negative_ids"][:] == [[2], None, None, None]
    assert teacher.read.count("text 0") == 1
    every = mine_negatives(rows_of([[0, 1, 2]]), space(3), teacher)
    assert (every["excluded_ids"][0], every["negative_ids"][0]) == ([], [])


def test_what_is_excluded_already_stays_and_is_no_negative(tmp_path: Path) -> None:
    teacher, labels = at([0.8, 0.9, 0.77, 0.75, 0.5, -0.3]), space(6)
    rows = rows_of([[0], [0], None], ["text 0", "text 0", "text 0"])
    rows = with_columns(rows, {"excluded_ids": ([[4, 0], None, [5]], INTS)})  # 0 is its own too
    got = mine_negatives(rows, labels, teacher, k=4, output=tmp_path)
    assert got["excluded_ids"][:] == [[0, 1, 2, 4], [1, 2], [5]]
    assert got["negative_ids"][:] == [[3, 5], [3, 4], None]
    other = with_columns(rows, {"excluded_ids": ([[3], [], None], INTS)})
    again = mine_negatives(other, labels, teacher, k=4, output=tmp_path)  # reads no older block
    assert again["excluded_ids"][:] == [[1, 2, 3], [1, 2], None]
    assert again["negative_ids"][:] == [[4, 5], [3, 4], None]


def test_soft_labels_are_given_labels_too() -> None:
    labels = space(4)
    probs = np.array([[0.9, 0.0, 0.2, 0.0]])
    rows = SoftLabels.from_dense(probs, labels).add_to(rows_of([None]))
    got = mine_negatives(rows, labels, at([0.8, 0.79, 0.9, 0.1]), answers="soft")
    assert (got["excluded_ids"][0], got["negative_ids"][0]) == ([], [1, 3])  # the bar is .855
    with pytest.raises(ValueError, match="the column 'gold' is missing"):
        mine_negatives(rows.remove_columns("gold"), labels, at([0.5] * 4))


def test_blocks_are_kept(tmp_path: Path) -> None:
    labels, rows = space(3), rows_of([[0]])
    one = mine_negatives(rows, labels, at([0.8, 0.9, 0.1]), output=tmp_path)
    again = at([0.8, 0.9, 0.1])
    assert mine_negatives(rows, labels, again, output=tmp_path)[:] == one[:]
    assert "text 0" not in again.read
    other = mine_negatives(rows, labels, again, output=tmp_path, rule="none")
    assert other["negative_ids"][0] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": 1.2}, r"value of rule='perc_pos' must be from 0\.0 to 1\.0; got 1\.2"),
        ({"rule": "abs", "value": float("nan")}, r"value of rule='abs' must be .*; got nan"),
        ({"rule": "none", "value": 0.5}, r"rule='none' has no bar; leave value=0\.5 out"),
        ({"count": 0}, "count must be at least 1"),
        ({"step": 0}, "step must be at least 1; got 0"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mine_negatives(rows_of([[0]]), space(2), at([0.8, 0.9]), **options)


def test_choices_that_nobody_knows() -> None:
    """Asked past the run-time types of these tests, which a user does not have."""
    for function, options, message in (
        (
            bars,
            {"positives": np.ones(1), "rule": "share"},
            "rule must be one of perc_pos, .*; got 'sha",
        ),
        (reducer, {"positive": "median"}, "positive must be max, mean or min; got 'median'"),
        (
            sampler,
            {"sample": "best", "step": 1, "count": 1, "seed": 0},
            "sample must be .*; got 'best'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(function)(**options)


def test_bad_vectors_and_labels() -> None:
    broken = at([0.8, 0.9])
    broken.vectors["label 1"] = np.array([np.nan, 1.0])
    with pytest.raises(ValueError, match="vector of the label 'l1' is not finite"):
        mine_negatives(rows_of([[0]]), space(2), broken)
    with pytest.raises(ValueError, match=r"row with id 'r0' has the gold label 7"):
        mine_negatives(rows_of([[7]]), space(2), at([0.8, 0.9]))


# -------------------------------------------------------------------- labels that nobody gave


def hidden_labels(
    seed: int, *, least: float, most: float
) -> tuple[Dataset, LabelSpace, Known, Any]:
    """400 rows of 10 true labels, 3 of them hidden, and 20 hard negatives each, at known cosines."""
    rng = np.random.default_rng(seed)
    labels, width = space(600), 600
    vectors = {text: np.eye(width)[i] for i, text in enumerate(labels.texts())}
    given, hidden, hard = [], [], []
    for row in range(400):
        some = rng.choice(600, 30, replace=False)
        vector = np.zeros(width)
        vector[some[:10]] = rng.uniform(least, most, 10)
        vector[some[10:]] = rng.uniform(0.3, 0.6, 20) * least
        vectors[f"text {row}"] = vector
        hidden.append(some[:3].tolist())
        given.append(some[3:10].tolist())
        hard.append(some[10:].tolist())
    return rows_of(given), labels, Known(vectors), (hidden, hard)


@pytest.mark.parametrize(
    ("positive", "least", "most", "removes"),
    [("min", 0.7, 0.9, True), ("max", 0.86, 0.9, True), ("max", 0.7, 0.9, False)],
)
def test_injected_false_negatives(positive: Any, least: float, most: float, removes: bool) -> None:
    rows, labels, teacher, (hidden, hard) = hidden_labels(0, least=least, most=most)
    got = mine_negatives(rows, labels, teacher, positive=positive, count=50)

    def share(column: str, wanted: list[list[int]]) -> float:
        found = zip(got[column], wanted, strict=True)
        return float(np.mean([x in ids for ids, some in found for x in some]))

    assert (share("excluded_ids", hidden) >= 0.8) == removes  # one that scores unlike the rest
    assert share("negative_ids", hard) >= 0.8
    assert share("excluded_ids", hard) == 0
    raw = mine_negatives(rows, labels, teacher, rule="none", count=3)
    assert (
        np.mean([x in ids for ids, h in zip(raw["negative_ids"], hidden, strict=True) for x in h])
        == 1
    )


@pytest.mark.parametrize(("positive", "share"), [("min", 5 / 6), ("max", 1 / 6)])
def test_the_promise_for_a_forgotten_label(positive: Any, share: float) -> None:
    """Exchangeable scores: the hidden one of 6 is not the lowest (or is the highest)."""
    rng = np.random.default_rng(1)
    labels, count = space(40), 2000
    vectors = {text: np.eye(40)[i] for i, text in enumerate(labels.texts())}
    vectors |= {f"text {i}": rng.uniform(0.2, 1, 40) for i in range(count)}
    picked = [rng.choice(40, 6, replace=False) for _ in range(count)]
    rows = rows_of([some[1:].tolist() for some in picked])
    options: dict[str, Any] = {"rule": "margin_pos", "value": 0.0, "k": 40}
    got = mine_negatives(rows, labels, Known(vectors), positive=positive, **options)
    found = np.mean([some[0] in ids for some, ids in zip(picked, got["excluded_ids"], strict=True)])
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / count)
