"""Which labels an update encodes, and what those stand for that it does not."""

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from llmlabel.train.dual_step import relevance
from llmlabel.train.label_pool import LabelPool

NONE = np.zeros(0, dtype=np.int64)


def test_what_an_update_encodes() -> None:
    """Positives, labels in turn, and those with the largest shares among the negatives."""
    vectors = torch.eye(6)
    texts = torch.tensor([[1.0, 0.8, 0.1, 0.6, 0.0, 0.0]])
    given = csr_array(np.array([[1.0, 0, 0, 0, 0, 0]]))
    none = csr_array((1, 6))
    out = csr_array(np.array([[0, 1.0, 0, 0, 0, 0]]))

    def chosen(
        kind: Any, left_out: csr_array, hard: int, refresh: float, least: float = 0.0
    ) -> Any:
        pool = LabelPool(kind, 6, refresh, hard, least, 0.1, vectors)
        return pool.choose(texts, given, left_out, NONE).ids.tolist()

    assert chosen("all", none, 0, 0.0) == [0, 1, 2, 3, 4, 5]
    assert chosen("inbatch", none, 3, 1.0) == [0]
    for kind in ("cached", "ann"):
        assert chosen(kind, none, 2, 0.0) == [0, 1, 3]
        assert chosen(kind, out, 2, 0.0) == [0, 2, 3]
        drawn = np.random.default_rng(0).permutation(6)[:3].tolist()
        assert chosen(kind, none, 1, 0.5) == sorted({0, 1, *drawn})
        assert chosen(kind, none, 9, 0.0) == [0, 1, 2, 3, 4, 5]
    share = np.exp(6) / np.exp([8, 1, 6, 0, 0]).sum()
    assert chosen("cached", none, 2, 0.0, float(share) + 1e-6) == [0, 1]
    assert chosen("cached", none, 2, 0.0, float(share) - 1e-6) == [0, 1, 3]


def test_a_share_above_0_is_at_least_one_label() -> None:
    nothing = csr_array((1, 6))
    for refresh, count in ((0.0, 0), (0.01, 1), (1.0, 6)):
        pool = LabelPool("cached", 6, refresh, 0, 0.0, 0.1, torch.eye(6))
        assert len(pool.choose(torch.zeros(1, 6), nothing, nothing, NONE).ids) == count


def test_labels_in_turn_stand_for_all_that_are_not_encoded() -> None:
    texts, given = (
        torch.tensor([[1.0, 0.9, 0, 0, 0, 0]]),
        csr_array(np.array([[1.0, 0, 0, 0, 0, 0]])),
    )
    pool = LabelPool("cached", 6, 0.5, 1, 0.0, 0.1, torch.eye(6))
    found = pool.choose(texts, given, csr_array((1, 6)), NONE)
    weights = dict(zip(found.ids.tolist(), found.weights.tolist(), strict=True))
    drawn = [label for label in pool._order[:3].tolist() if label > 1]
    assert weights == {0: 1.0, 1: 1.0, **dict.fromkeys(drawn, 4 / len(drawn))}


def test_labels_are_refreshed_in_turn() -> None:
    pool = LabelPool("cached", 5, 0.4, 0, 0.0, 0.1, torch.zeros(5, 2))
    nothing, texts = csr_array((1, 5)), torch.zeros(1, 2)
    seen = []
    for _ in range(4):
        chosen = pool.choose(texts, nothing, nothing, NONE)
        seen.append(chosen.ids.tolist())
        assert chosen.weights.tolist() == [2.5, 2.5]  # two stand for five
        again = pool.choose(texts, nothing, nothing, NONE)
        assert again.ids.tolist() == seen[-1]  # until the update has succeeded
        pool.remember_later(chosen, torch.full((2, 2), float(len(seen))), 10)
        pool.commit()
    order = pool._order.tolist()
    assert sorted(order) == [0, 1, 2, 3, 4]
    turns = [order[i % 5] for i in range(8)]
    assert seen == [sorted(turns[i : i + 2]) for i in range(0, 8, 2)]
    assert pool.vectors is not None
    last = [1 + max(i for i, label in enumerate(turns) if label == n) // 2 for n in range(5)]
    assert pool.vectors[:, 0].tolist() == last
    assert pool.label_tokens == 40


def test_relevance_of_a_part_of_the_labels() -> None:
    given = csr_array(np.array([[0, 0.5, 0, 1.0], [0, 0, 0, 0.2]]))
    left_out = csr_array(np.array([[1.0, 0, 0, 0], [1.0, 0, 1.0, 0]]))
    found = relevance(given, left_out, np.array([3, 0, 1]))
    assert found.indptr.tolist() == [0, 3, 5]
    assert found.ids.tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_allclose(found.values.numpy(), [1.0, 0, 0.5, 0.2, 0], rtol=1e-6)
