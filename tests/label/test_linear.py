"""Linear classifiers over the labels that profiles find."""

import numpy as np
import pytest
from datasets import Dataset, List, Value
from label.letters import space
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit

from llmlabel.data import with_columns
from llmlabel.label import profiles
from llmlabel.label.linear import label_linear, residual_weights
from llmlabel.label.profiles import label_lexical
from llmlabel.labelspace import load_labels
from llmlabel.softlabels import SoftLabels


def rows(texts: list[str], gold: list[list[int]] | None = None, prefix: str = "r") -> Dataset:
    ids = [f"{prefix}{i:04}" for i in range(len(texts))]
    found = Dataset.from_dict({"id": ids, "text": texts})
    return found if gold is None else with_columns(found, {"gold": (gold, List(Value("int32")))})


def loss(
    weights: np.ndarray, x: np.ndarray, offsets: np.ndarray, hits: np.ndarray, s: float
) -> float:
    """What the weights are to minimise, row by row."""
    total = s / 8 * float(weights @ weights)
    for row, offset, hit in zip(x, offsets, hits, strict=True):
        p = expit(offset + row @ weights)
        total -= float(np.log(p if hit else 1 - p))
    return total


@pytest.mark.parametrize("seed", range(20))
def test_weights_reach_the_minimum_and_every_update_lowers_the_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(7, 4)) * (rng.random((7, 4)) < 0.7)
    offsets, hits = rng.normal(size=7), (rng.random(7) < 0.5).astype(float)
    s = float(rng.uniform(0.3, 3))
    best = minimize(loss, np.zeros(4), args=(x, offsets, hits, s), tol=1e-12)
    got = residual_weights(csr_array(x), offsets, hits, s, updates=300, steps=50)
    np.testing.assert_allclose(got, best.x, atol=1e-4)
    losses = [
        loss(
            residual_weights(csr_array(x), offsets, hits, s, updates=n, steps=50),
            x,
            offsets,
            hits,
            s,
        )
        for n in range(4)
    ]
    assert losses[0] > losses[1] > losses[2] >= losses[3] >= best.fun - 1e-9


def test_a_label_without_rows_has_no_weights() -> None:
    nothing = residual_weights(csr_array((0, 3)), np.zeros(0), np.zeros(0), 1.0)
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def noisy(count: int, seed: int, words: int = 6) -> tuple[list[str], list[list[int]]]:
    """Of each label one word is telling; many others are not, and the label's name is nowhere."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    texts = [
        " ".join(
            [
                *(f"noise{i}" for i in rng.integers(0, 100, words)),
                f"sign{'abc'[label]}",
                f"common{rng.integers(0, 2)}",
            ]
        )
        for label in labels
    ]
    return texts, [[int(label)] for label in labels]


NAMES = space(["first", "second", "third", "never"])


def right(found: Dataset, gold: list[list[int]]) -> float:
    pairs = zip(found["label_ids"], gold, strict=True)
    return float(np.mean([ids[0] == true[0] for ids, true in pairs]))


def test_classifiers_tell_apart_what_profiles_confuse() -> None:
    texts, gold = noisy(150, 0, words=40)
    new, true = noisy(100, 1, words=40)
    pool, asked = rows(texts, gold, "p"), rows(new)
    by_profile = right(label_lexical(asked, pool, NAMES), true)
    by_words = right(label_linear(asked, pool, NAMES, candidates=3), true)
    assert by_words > by_profile + 0.05


def test_single_rows_sum_to_1_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = load_labels(["first", "second", "third", "never"])
    texts, gold = noisy(60, 2)
    new, _ = noisy(7, 3)
    pool, asked = rows(texts, gold, "p"), rows([*new, " "])
    expected = label_linear(asked, pool, names, candidates=3)
    sums = SoftLabels.from_dataset(expected, names).probs.sum(axis=1)
    np.testing.assert_allclose(sums, [1.0] * 7 + [0.0], atol=1e-6)
    assert expected["error"] == [None] * 7 + ["empty text"]
    assert expected["engine"][0].startswith("linear@")
    monkeypatch.setattr(profiles, "_CELLS", 5)
    turned = pool.select(range(59, -1, -1))
    got = label_linear(asked, turned, names, candidates=3, block_rows=3)
    assert got["label_ids"] == expected["label_ids"]
    np.testing.assert_allclose(
        SoftLabels.from_dataset(got, names).dense(),
        SoftLabels.from_dataset(expected, names).dense(),
        atol=1e-6,
    )


def test_rows_that_were_learned_are_refused() -> None:
    texts, gold = noisy(30, 2)
    pool = rows(texts, gold, "p")
    with pytest.raises(ValueError, match="2 of 2 rows are in the pool, whose labels"):
        label_linear(pool.select([1, 3]), pool, NAMES)
    with pytest.raises(ValueError, match="strength must be above 0"):
        label_linear(rows(["a"]), pool, NAMES, strength=0.0)
    with pytest.raises(ValueError, match="the profiles find no label that is true"):
        label_linear(rows(["a"]), rows(["x"], [[]], "p"), NAMES)
