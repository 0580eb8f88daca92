import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, List, Value
from reference import debias as reference
from reference import metrics as slow

from llmlabel.data import with_columns
from llmlabel.engine.fake import FakeEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.recipe.keep import keep, load_kept
from llmlabel.refine.bias import BiasReport, gain_interval, measure_bias
from llmlabel.refine.debias import batch_calibration
from llmlabel.refine.orders import OrderSensitivity, read_orders
from llmlabel.softlabels import SoftLabels

LABELS = load_labels(["a", "b"])


def rows(right: Sequence[bool], gold: Sequence[list[int] | None] | None = None) -> Dataset:
    """Rows whose label is a where right, else b, with probability 0.8."""
    probs = np.where(np.array(right)[:, None], [[0.8, 0.2]], [[0.2, 0.8]])
    table = Dataset.from_dict({"id": [f"r{i}" for i in range(len(right))]})
    values = [[0]] * len(right) if gold is None else gold
    table = with_columns(table, {"gold": (values, List(Value("int32")))})
    return SoftLabels.from_dense(probs, LABELS).add_to(table)


@pytest.mark.parametrize(
    ("won", "lost", "verdict"),
    [
        (20, 5, "gain"),
        (6, 0, "gain"),
        (5, 0, "no gain shown"),  # half of such rows win by luck with p = 2 / 32
        (20, 15, "no gain shown"),
        (0, 0, "no gain shown"),
        (3, 5, "no gain shown"),
        (5, 20, "worse"),
    ],
)
def test_the_verdict_is_the_exact_sign_test(won: int, lost: int, verdict: str) -> None:
    before = [False] * won + [True] * lost + [True] * 10
    after = [True] * won + [False] * lost + [True] * 10
    found = measure_bias(rows(before), rows(after), LABELS)
    assert found.verdict == verdict
    assert (found.won, found.lost, found.gold_rows) == (won, lost, won + lost + 10)
    assert found.before is not None
    assert found.after is not None
    assert found.gain_interval is not None
    low, high = found.gain_interval
    gain = found.after.accuracy - found.before.accuracy
    assert gain == pytest.approx((won - lost) / found.gold_rows)
    assert low - 1e-9 <= gain <= high + 1e-9


@pytest.mark.parametrize("changed", range(1, 40))
def test_the_interval_leaves_0_out_exactly_when_the_sign_test_rejects(changed: int) -> None:
    for won in range(changed + 1):
        low, high = gain_interval(won, changed - won, 100)
        assert (low > 0 or high < 0) == (reference.sign_test(won, changed - won) < 0.05)
        assert -changed / 100 <= low <= high <= changed / 100


def test_interval_by_hand() -> None:
    # both changed rows won, which happens in 0.025 of all cases when half of them win by 0.025 ** 0.5
    low, high = gain_interval(2, 0, 10)
    assert low == pytest.approx((2 * 0.025**0.5 - 1) * 0.2)
    assert high == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(20))
def test_quality_and_mix_equal_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.dirichlet([1.0, 1.0], size=(2, 15))
    gold = rng.integers(-1, 2, size=15)  # -1 is none of these
    golds: list[list[int] | None] = [[int(g)] if g >= 0 else [] for g in gold]
    golds[3] = None  # unknown
    known = [i for i in range(15) if i != 3]
    tables = []
    for probs in (one, two):
        table = rows([True] * 15, golds)
        tables.append(SoftLabels.from_dense(probs, LABELS).add_to(table))
    found = measure_bias(*tables, LABELS)
    assert found.gold_rows == 14
    for probs, quality, mix in (
        (one, found.before, found.mix_before),
        (two, found.after, found.mix_after),
    ):
        assert quality is not None
        here, there = probs[known].astype(np.float32).astype(float).tolist(), gold[known].tolist()
        right = [g >= 0 and p.index(max(p)) == g for p, g in zip(here, there, strict=True)]
        assert quality.accuracy == pytest.approx(sum(right) / 14)
        assert quality.nll == pytest.approx(slow.nll(here, there, 1e-12))
        assert quality.ece == pytest.approx(slow.ece(here, there, 10))
        assert list(mix.values()) == pytest.approx(reference.mean(probs.tolist()), abs=1e-6)
    assert found.mix_gold == {
        "a": pytest.approx((gold[known] == 0).mean()),
        "b": pytest.approx((gold[known] == 1).mean()),
    }


def test_without_gold_nothing_is_claimed() -> None:
    after = rows([True] * 3, [None] * 3)
    for before in (after, after.remove_columns("gold")):
        found = measure_bias(before, after, LABELS)
        assert found.verdict == "unknown: no gold"
        assert (found.gold_rows, found.before, found.after) == (0, None, None)
        assert (found.gain_interval, found.mix_gold) == (None, None)
        assert found.mix_after == {"a": pytest.approx(0.8), "b": pytest.approx(0.2)}


def test_gold_counts_in_the_split_only() -> None:
    before, after = rows([False] * 10), rows([True] * 6 + [False] * 4)
    splits = ["test"] * 6 + ["train"] * 4
    before, after = (one.add_column("split", splits) for one in (before, after))
    assert measure_bias(before, after, LABELS, split="test").won == 6
    assert measure_bias(before, after, LABELS, split="train").verdict == "no gain shown"
    assert measure_bias(before, after, LABELS, split="train").gold_rows == 4
    with pytest.raises(ValueError, match="dev"):
        measure_bias(before, after, LABELS, split="dev")


def test_other_rows_or_several_labels_are_refused() -> None:
    before = rows([True, False])
    with pytest.raises(ValueError, match="other rows, or another order"):
        measure_bias(before, before.select([1, 0]), LABELS)
    with pytest.raises(ValueError, match="single-label"):
        measure_bias(before, before, load_labels(["a", "b"], multilabel=True))
    with pytest.raises(ValueError, match="source 'after'"):
        measure_bias(before, before.remove_columns("label_ids"), LABELS)


# ------------------------------------------------------------------------- label orders


def test_orders_before_and_after() -> None:
    engine = FakeEngine(noise=3.0)
    table = Dataset.from_dict({"id": [f"r{i}" for i in range(20)], "text": ["a x"] * 20})
    raw = read_orders(label_direct(table, engine, LABELS), engine, LABELS, orders=2)
    found = measure_bias(raw, batch_calibration(raw, LABELS), LABELS)
    # the fake engine does not look at the list
    assert found.order_before == OrderSensitivity(0.0, 0.0, rows=20, orders=2)
    assert found.order_after == OrderSensitivity(0.0, 0.0, rows=20, orders=2)
    assert found.note is None


def votes(best: Sequence[int], whole: bool) -> list[list[dict[str, Any]]]:
    """Order 0 says a, order 1 says what is given."""
    found = []
    for label in best:
        said = [{"source": "p#0", "label_id": 0, "prob": 0.7}]
        said += [{"source": "p#1", "label_id": label, "prob": 0.6}]
        if whole:
            said += [{"source": "p#0", "label_id": 1, "prob": 0.3}]
            said += [{"source": "p#1", "label_id": 1 - label, "prob": 0.4}]
        found.append(said)
    return found


def test_where_votes_are_missing_the_way_to_them_is_named() -> None:
    before, after = rows([True] * 4), rows([True] * 3 + [False])
    found = measure_bias(before, after, LABELS)
    assert (found.order_before, found.order_after) == (None, None)
    assert found.note is not None
    assert "read_orders" in found.note
    best = [one.add_column("votes", votes([0, 0, 0, 1], whole=False)) for one in (before, after)]
    found = measure_bias(*best, LABELS)
    assert found.order_before == OrderSensitivity(flips=0.25, distance=None, rows=4, orders=2)
    assert found.order_after is None
    assert found.note is not None
    assert "most probable label of each order only" in found.note


def test_votes_that_were_not_corrected_say_nothing_about_after() -> None:
    before, after = rows([True] * 4), rows([True] * 3 + [False])
    same = [one.add_column("votes", votes([0, 0, 0, 1], whole=True)) for one in (before, after)]
    found = measure_bias(*same, LABELS)
    assert found.order_before is not None
    assert found.order_before.distance == pytest.approx((3 * 0.1 + 0.3) / 4)
    assert found.order_after is None
    assert found.note is not None
    assert "not the corrected votes" in found.note
    # without a change of the labels there is nothing to correct
    assert measure_bias(same[0], same[0], LABELS).order_after == found.order_before


def test_a_recipe_can_keep_the_report(tmp_path: Path) -> None:
    before, after = rows([False] * 8), rows([True] * 8)
    both = [one.add_column("votes", votes([0] * 8, whole=True)) for one in (before, after)]
    found = measure_bias(both[0], both[0], LABELS)
    assert keep(found, tmp_path, returns=BiasReport, fingerprint="f", arguments={}) == "json"
    assert load_kept(tmp_path, returns=BiasReport) == found
    assert json.loads((tmp_path / "value.json").read_text())["verdict"] == "no gain shown"
