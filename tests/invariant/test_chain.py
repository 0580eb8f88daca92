"""What must not matter does not matter, through several steps at once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from llmlabel.calibrate.conformal import fit_conformal, predict_sets
from llmlabel.data import with_columns
from llmlabel.engine.cache import CachedEngine
from llmlabel.engine.hf import HFEngine
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.refine.aggregate import aggregate
from llmlabel.refine.debias import batch_calibration
from llmlabel.softlabels import SoftLabels

pytestmark = pytest.mark.slow

NAMES = ["cat", "catfish", "business", "on the mat, no?"]
LABELS = load_labels(NAMES)


@pytest.fixture(scope="module")
def engine(tiny_decoder: Path) -> HFEngine:
    return HFEngine(str(tiny_decoder), dtype="float32")


@pytest.fixture(scope="module")
def texts() -> Dataset:
    rng = np.random.default_rng(0)
    words = ["cat", "mat", "business", "the", "Zürich", "?", "catfish", "\u05e9\u05dc\u05d5\u05dd"]
    rows = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(30)]
    return Dataset.from_dict({"id": [f"r{i}" for i in range(30)], "text": rows})


def chain(
    texts: Dataset, engine: HFEngine | CachedEngine, labels: LabelSpace, **given: int
) -> Dataset:
    one = batch_calibration(label_direct(texts, engine, labels, **given), labels)
    two = label_direct(texts, engine, labels, prompt="label/direct", **given)
    return aggregate({"corrected": one, "raw": two}, labels)


def dense(dataset: Dataset, labels: LabelSpace = LABELS) -> np.ndarray:
    return SoftLabels.from_dataset(dataset, labels).dense()


@pytest.fixture(scope="module")
def plain(texts: Dataset, engine: HFEngine) -> Dataset:
    return chain(texts, engine, LABELS)


@pytest.mark.parametrize("block_rows", [1, 7])
def test_blocks(texts: Dataset, engine: HFEngine, plain: Dataset, block_rows: int) -> None:
    other = chain(texts, engine, LABELS, block_rows=block_rows)
    np.testing.assert_allclose(dense(other), dense(plain), atol=1e-4)
    np.testing.assert_allclose(other["weight"][:], plain["weight"][:], atol=1e-4)


def test_row_order(texts: Dataset, engine: HFEngine, plain: Dataset) -> None:
    order = np.random.default_rng(1).permutation(len(texts))
    other = chain(texts.select(order), engine, LABELS)
    np.testing.assert_allclose(dense(other), dense(plain)[order], atol=1e-4)


def test_label_order(texts: Dataset, engine: HFEngine) -> None:
    # the list of labels stands in the prompt, so the prompt has to keep its order: none shown
    prompt = Path(__file__).parent / "no_list.jinja"
    order = [2, 0, 3, 1]
    moved = load_labels([NAMES[i] for i in order])
    one = label_direct(texts, engine, LABELS, prompt=prompt)
    two = label_direct(texts, engine, moved, prompt=prompt)
    np.testing.assert_allclose(dense(two, moved), dense(one)[:, order], atol=1e-4)


def test_cached_equals_plain(
    texts: Dataset, engine: HFEngine, plain: Dataset, tmp_path: Path
) -> None:
    cached = CachedEngine(engine, tmp_path / "replies.sqlite")
    for _ in range(2):
        np.testing.assert_allclose(dense(chain(texts, cached, LABELS)), dense(plain), atol=1e-4)
    cached.close()


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_do_not_depend_on_order_or_company(plain: Dataset, score: str) -> None:
    from datasets import List, Value

    gold = [[int(i % 4)] for i in range(30)]
    rows = with_columns(plain, {"gold": (gold, List(Value("int32")))})
    conformal = fit_conformal(rows, LABELS, alpha=0.2, score=score)
    order = np.random.default_rng(2).permutation(30)
    mixed = fit_conformal(rows.select(order), LABELS, alpha=0.2, score=score)
    assert mixed == conformal
    whole = predict_sets(rows, LABELS, conformal)["set_ids"][:]
    alone = [
        predict_sets(rows.select([i]), LABELS, conformal)["set_ids"][0] for i in range(0, 30, 9)
    ]
    assert alone == whole[::9]


def test_a_label_that_is_not_stored_is_a_label_of_probability_zero(plain: Dataset) -> None:
    soft = SoftLabels.from_dataset(plain, LABELS)
    full: Callable[[np.ndarray], Dataset] = lambda probs: SoftLabels.from_dense(  # noqa: E731
        probs, LABELS
    ).add_to(plain)
    kept = soft.top(2).dense()
    stored = SoftLabels.from_dataset(soft.top(2).add_to(plain), LABELS).dense()
    np.testing.assert_array_equal(stored, kept)
    np.testing.assert_array_equal(dense(full(kept)), kept)
