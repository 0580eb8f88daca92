import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import adapt as reference
from scipy.sparse import csr_array

from llmlabel.data import with_columns
from llmlabel.labelspace import load_labels
from llmlabel.refine.adapt import (
    adapt_bands,
    bands,
    confidence_weights,
    correct_missing,
    gold_labels,
    missing_labels,
    mix_gold,
)
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b", "c"])
MANY = load_labels(["a", "b", "c"], multilabel=True)
FERKD = ("drop", "soften", "keep", "drop")


def table(probs, gold=None, labels=LABELS) -> Dataset:
    ids = [f"r{i}" for i in range(len(probs))]
    rows = SoftLabels.from_dense(np.array(probs, dtype=float), labels).add_to(
        Dataset.from_dict({"id": ids})
    )
    return rows if gold is None else with_columns(rows, {"gold": (gold, List(Value("int32")))})


def dense(rows, labels=LABELS):
    return SoftLabels.from_dataset(rows, labels).dense()


# ------------------------------------------------------------------------------------- bands


def test_both_sides_of_each_boundary() -> None:
    values = np.array([0.1999, 0.2, 0.2001, 0.4999, 0.5, 0.5001, 0.8999, 0.9, 0.9001])
    found = [FERKD[i] for i in bands(values, cuts=(0.2, 0.5, 0.9), actions=FERKD)]
    assert found == ["drop", *["soften"] * 3, *["keep"] * 4, "drop"]
    assert found == [reference.ferkd(value, 0.2, 0.5, 0.9) for value in values]


def test_a_value_on_a_cut_goes_up_unless_only_that_is_dropped() -> None:
    half = np.array([0.5])
    assert bands(half, cuts=(0.5,), actions=("soften", "keep")).tolist() == [1]
    assert bands(half, cuts=(0.5,), actions=("keep", "drop")).tolist() == [0]
    assert bands(half, cuts=(0.5,), actions=("drop", "drop")).tolist() == [1]


@pytest.mark.parametrize("seed", range(20))
def test_bands_equal_the_rule_of_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = tuple(np.sort(rng.uniform(size=3)).astype(np.float32).tolist())
    values = np.concatenate([rng.uniform(size=50).astype(np.float32), cuts])
    found = [FERKD[i] for i in bands(values.astype(float), cuts=cuts, actions=FERKD)]
    assert found == [reference.ferkd(float(value), *cuts) for value in values]


def test_targets_and_weights_of_every_band() -> None:
    probs = [[0.1, 0.8, 0.1], [0.3, 0.4, 0.3], [0.6, 0.3, 0.1], [0.95, 0.05, 0.0]]
    rows = table(probs, gold=[[0]] * 4)
    got = adapt_bands(rows, LABELS, statistic="gold", cuts=(0.2, 0.5, 0.9))
    assert got["band"][:] == ["drop", "soften", "keep", "drop"]
    assert got["weight"][:] == [0, 1, 1, 0]
    expected = [probs[0], [0.9, 0.05, 0.05], probs[2], probs[3]]
    assert dense(got) == pytest.approx(np.array(expected), abs=1e-7)
    assert reference.softened(0, 3, 0.1) == pytest.approx(expected[1])


def test_by_the_largest_probability_the_hard_label_is_gold_or_else_the_own_one() -> None:
    rows = table([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [0.1, 0.9, 0.0]], gold=[[2], None, [0]])
    got = adapt_bands(
        rows, LABELS, statistic="max", cuts=(0.6,), actions=("soften", "keep"), smoothing=0.2
    )
    expected = [[0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.1, 0.9, 0.0]]
    assert dense(got) == pytest.approx(np.array(expected), abs=1e-7)


def test_rows_without_gold_or_without_a_label_stay_as_they_are() -> None:
    rows = table([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], gold=[None, [1], []])
    got = adapt_bands(rows, LABELS, statistic="gold")
    assert got["band"][:] == ["keep", None, "keep"]
    assert got["label_probs"][:] == [[1.0], [], [1.0]]
    assert got["weight"][:] == [1, 1, 1]


def test_replaced_rows_are_joined_by_id() -> None:
    rows = table([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]])
    other = table([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).select([1, 0])
    ways = {"statistic": "max", "cuts": (0.7,), "actions": ("replace", "keep")}
    got = adapt_bands(rows, LABELS, **ways, replacement=other)
    assert dense(got) == pytest.approx(np.array([[0, 1, 0], [0.9, 0.1, 0]]), abs=1e-7)
    assert got["band"][:] == ["replace", "keep"]
    with pytest.raises(ValueError, match="row with id 'r1' is not in replacement"):
        adapt_bands(rows, LABELS, **ways, replacement=other.select([1]))
    with pytest.raises(ValueError, match="'replace' need each other"):
        adapt_bands(rows, LABELS, **ways)
    with pytest.raises(ValueError, match="'replace' need each other"):
        adapt_bands(rows, LABELS, statistic="max", replacement=other)


def test_a_row_keeps_its_label_where_the_replacement_has_none() -> None:
    rows = table([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 0.0]])
    other = table([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    ways = {"statistic": "max", "cuts": (0.7,), "actions": ("replace", "keep")}
    got = adapt_bands(rows, LABELS, **ways, replacement=other)
    assert got["band"][:] == ["keep", "replace", None]
    assert dense(got) == pytest.approx(np.array([[0.6, 0.4, 0], [0, 1, 0], [0, 0, 0]]), abs=1e-7)


def test_a_replacement_with_a_row_twice_is_refused() -> None:
    rows = table([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]])
    ways = {"statistic": "max", "cuts": (0.7,), "actions": ("replace", "keep")}
    with pytest.raises(ValueError, match="the id 'r1' is more than once in replacement; remove"):
        adapt_bands(rows, LABELS, **ways, replacement=rows.select([0, 1, 1]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cuts": (0.5,)}, "1 cuts make 2 bands"),
        ({"cuts": (0.5, 0.2, 0.9)}, "cuts must rise"),
        ({"cuts": (0.0, 0.2, 0.9)}, "cuts must rise"),
        ({"smoothing": 1.0}, "smoothing must be"),
    ],
)
def test_bad_bands_are_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        adapt_bands(table([[1, 0, 0]]), LABELS, statistic="max", **wrong)


def test_bands_need_a_single_label_space() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        adapt_bands(table([[1, 0, 1]], labels=MANY), MANY, statistic="max")


# ------------------------------------------------------------------------------------ weights


def test_confidence_to_the_power_times_the_weight() -> None:
    rows = table([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.0]])
    assert confidence_weights(rows, LABELS)["weight"][:] == pytest.approx([0.25, 0.81, 0])
    rows = with_columns(rows, {"weight": ([2.0, None, 1.0], Value("float32"))})
    got = confidence_weights(rows, LABELS, power=1.0)["weight"][:]
    assert got == pytest.approx([1.0, 0.9, 0])
    assert confidence_weights(rows, LABELS, power=0.0)["weight"][:] == [2, 1, 0]
    with pytest.raises(ValueError, match="power must be at least 0"):
        confidence_weights(rows, LABELS, power=-1.0)
    with pytest.raises(ValueError, match="exclude each other"):
        confidence_weights(table([[1, 0, 1]], labels=MANY), MANY)


def test_gold_and_soft_label_are_mixed_where_both_are_known() -> None:
    soft = [0.2, 0.8, 0.0]
    rows = table([soft, soft, soft, [0, 0, 0]], gold=[[0], None, [], [2]])
    got = dense(mix_gold(rows, LABELS, kd_weight=0.25))
    expected = [[0.8, 0.2, 0.0], soft, soft, [0, 0, 1]]
    assert got == pytest.approx(np.array(expected), abs=1e-7)
    many = table([soft, soft], gold=[[0, 2], []], labels=MANY)
    got = dense(mix_gold(many, MANY, kd_weight=0.5), MANY)
    assert got == pytest.approx(np.array([[0.6, 0.4, 0.5], [0.1, 0.4, 0]]), abs=1e-7)
    with pytest.raises(ValueError, match="kd_weight must be from 0 to 1"):
        mix_gold(rows, LABELS, kd_weight=1.1)


# ----------------------------------------------------------------------------- missing labels


def test_missing_labels_are_added_above_tau_and_above_the_mean_of_the_label() -> None:
    probs = [[0.95, 0.9, 0.1], [0.95, 0.2, 0.7], [0.8, 0.1, 0.71], [0.0, 0.0, 0.0]]
    rows = table(probs, gold=[[2], [], [1], [1]], labels=MANY)
    got = correct_missing(rows, MANY)
    # label a: mean 0.9, so that 0.8 is not enough; 0.7 is not above tau; the last row is unread
    assert got["added_ids"][:] == [[0, 1], [0], [2], []]
    expected = [[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert dense(got, MANY).tolist() == expected
    assert got["gold"][:] == rows["gold"][:]


@pytest.mark.parametrize("seed", range(20))
def test_correction_equals_the_rule_of_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.uniform(size=(15, 3)).astype(np.float32) * (rng.uniform(size=(15, 1)) < 0.9)
    gold = [rng.permutation(3)[: rng.integers(0, 3)].tolist() for _ in probs]
    got = correct_missing(table(probs, gold=gold, labels=MANY), MANY, tau=0.4)
    assert got["added_ids"][:] == reference.comic(probs.astype(float).tolist(), gold, 0.4)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_unknown_gold_keep_their_soft_label_and_count_in_no_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.uniform(size=(15, 3)).astype(np.float32) * (rng.uniform(size=(15, 1)) < 0.9)
    gold = [rng.permutation(3)[: rng.integers(0, 3)].tolist() for _ in probs]
    known = rng.uniform(size=15) < 0.6
    some = [one if there else None for one, there in zip(gold, known, strict=True)]
    rows = table(probs, gold=some, labels=MANY)
    got = correct_missing(rows, MANY, tau=0.4)
    taken = np.flatnonzero(known)
    expected = iter(
        reference.comic(probs[taken].astype(float).tolist(), [gold[i] for i in taken], 0.4)
    )
    assert got["added_ids"][:] == [next(expected) if there else [] for there in known]
    before, after = dense(rows, MANY), dense(got, MANY)
    assert after[~known].tolist() == before[~known].tolist()
    for row in taken:
        assert np.flatnonzero(after[row]).tolist() == sorted(gold[row] + got["added_ids"][row])
        assert set(after[row]) <= {0.0, 1.0}


def test_nobody_knows_any_gold() -> None:
    rows = table([[0.9, 0.8, 0.0]] * 2, gold=[None, None], labels=MANY)
    got = correct_missing(rows, MANY)
    assert got["added_ids"][:] == [[], []]
    assert got["label_probs"][:] == rows["label_probs"][:]


def test_a_training_loop_gives_its_own_means() -> None:
    probs, given = csr_array([[0.8, 0.8]]), csr_array([[False, False]])
    assert missing_labels(probs, given, np.array([0.5, 0.9]), tau=0.7).toarray().tolist() == [
        [True, False]
    ]


def test_correction_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="needs a multi-label space"):
        correct_missing(table([[1, 0, 0]], gold=[[0]]), LABELS)
    with pytest.raises(ValueError, match="tau must lie strictly between 0 and 1"):
        correct_missing(table([[1, 0, 0]], gold=[[0]], labels=MANY), MANY, tau=1.0)


def test_gold_as_soft_labels() -> None:
    labels = load_labels(["a", "b", "c"])
    rows = Dataset.from_dict({"id": list("wxyz"), "text": ["t"] * 4})
    gold = {"gold": ([[1], None, [0, 2], []], List(Value("int32")))}
    got = SoftLabels.from_dataset(gold_labels(with_columns(rows, gold), labels), labels).dense()
    np.testing.assert_allclose(got, [[0, 1, 0], [0, 0, 0], [0.5, 0, 0.5], [0, 0, 0]])
    many = load_labels(["a", "b", "c"], multilabel=True)
    known = with_columns(rows, gold).select([0, 2, 3])
    got = SoftLabels.from_dataset(gold_labels(known, many), many).dense()
    np.testing.assert_allclose(got, [[0, 1, 0], [1, 0, 1], [0, 0, 0]])
    with pytest.raises(
        ValueError, match="gold of the row with id 'x' is unknown; take such rows out"
    ):
        gold_labels(with_columns(rows, gold), many)
