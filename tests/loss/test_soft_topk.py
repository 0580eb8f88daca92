"""The soft top-k from one pass: what the highest scores and sums of powers of the others leave."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from loss.relevances import Rows, random_case, relevance_of
from reference import retrieval as reference
from torch import Tensor

from llmlabel.loss import soft_topk
from llmlabel.loss.retrieval import Relevance, dense_retrieval_loss, retrieval_loss

ROWS = 5


def scores_of(kind: str, labels: int, seed: int) -> np.ndarray:
    """Per label, before the temperature: 5 rows, each another multiple of them."""
    rng = np.random.default_rng(seed)
    return {
        "narrow": lambda: rng.normal(0, 0.3, labels),
        "wide": lambda: rng.normal(0, 4.0, labels),
        "equal": lambda: np.full(labels, 0.7),
        "ties": lambda: rng.integers(0, 3, labels).astype(float),
        "rising": lambda: np.sort(rng.normal(0, 2.0, labels)),
        "falling": lambda: -np.sort(rng.normal(0, 2.0, labels)),
        "tail": lambda: rng.standard_t(2, labels).clip(-30, 30),
        "apart": lambda: np.where(np.arange(labels) % (labels // 7) == 0, 20.0, -20.0),
    }[kind]()


def case(kind: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Relevance]:
    labels = 200 + 37 * seed
    texts = torch.linspace(0.5, 1.5, ROWS, dtype=dtype)[:, None].requires_grad_()
    pool = torch.from_numpy(scores_of(kind, labels, seed))[:, None].to(dtype).requires_grad_()
    first = np.arange(ROWS) * 7 + seed
    ids = np.stack([first, first + 50, first + 100], axis=1).ravel()  # the last one is left out
    values = torch.tensor([1.0, 0.5, 0.0] * ROWS, dtype=dtype)
    return texts, pool, Relevance(torch.arange(ROWS + 1) * 3, torch.from_numpy(ids), values)


def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = torch.arange(1.0, ROWS + 1, dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


KINDS = ["narrow", "wide", "equal", "ties", "rising", "falling", "tail", "apart"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_many_labels_equal_the_dense_loss(kind: str, seed: int) -> None:
    k = torch.tensor([1, 2, 5, 9, 30])
    texts, pool, relevance = case(kind, torch.float64, seed)
    dense = dense_retrieval_loss(texts @ pool.T, relevance, loss="soft_topk", k=k)
    expected = with_gradients(dense, texts, pool)
    for block in (64, 10_000):
        found = retrieval_loss(
            texts, pool, relevance, loss="soft_topk", k=k, temperature=1.0, block=block
        )
        for got, want in zip(with_gradients(found, texts, pool), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    texts, pool, relevance = case(kind, torch.float32, seed)
    found = retrieval_loss(texts, pool, relevance, loss="soft_topk", k=k, temperature=1.0, block=64)
    for got, want in zip(with_gradients(found, texts, pool), expected, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * max(scale, 1.0))


def test_one_pass_is_enough_where_few_labels_stand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    again = soft_topk._sums
    monkeypatch.setattr(soft_topk, "_sums", lambda *given: passes.append(1) or again(*given))
    settings: dict[str, Any] = {"loss": "soft_topk", "temperature": 1.0, "block": 500}
    for kind in ("wide", "tail", "apart", "equal"):
        retrieval_loss(*case(kind, torch.float32, 40), **settings)
    assert not passes
    retrieval_loss(*case("narrow", torch.float32, 40), k=800, **settings)
    assert 1 <= len(passes) <= 3  # half of all labels, close to each other: all are read again


@pytest.mark.parametrize("odds", [0.01, 0.3, 1.0, 5.0])
def test_the_bound_of_what_the_nodes_are_off_by(odds: float) -> None:
    """Of the sigmoids of single scores below the least kept one, and of their slopes."""
    v = torch.linspace(0, 1, 101, dtype=torch.float64)
    powers = torch.stack([v**power for power in range(1, soft_topk.POWERS + 1)])
    nodes, weights = soft_topk._nodes(powers)
    bound = soft_topk._off(torch.tensor(odds), v)
    for function in (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)):
        found = weights.T @ function((odds * nodes).log())
        off = (found - function((odds * v).log())).abs()
        assert (off <= bound + 1e-12).all()
        assert off.max() > 1e-3 * bound.max() or bound.max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_no_number_changes_no_other(kind: str) -> None:
    """The best of the other rows come in blocks in which nothing of this one can be compared."""
    found = []
    for broken in (False, True):
        texts, pool, relevance = case(kind, torch.float32, 4)
        given = texts.detach().clone()
        given[2] = torch.nan if broken else given[2]
        given.requires_grad_()
        loss = retrieval_loss(
            given, pool, relevance, loss="soft_topk", k=3, temperature=1.0, block=40
        )
        keep = torch.arange(ROWS) != 2
        (slopes,) = torch.autograd.grad(loss.sum(), given)
        assert bool(loss[2].isnan()) == broken
        found.append((loss.detach()[keep], slopes[keep]))
    for plain, beside in zip(*found, strict=True):
        assert torch.equal(plain, beside)


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.01])
def test_labels_far_above_the_rest_are_pulled_down_in_float32(temperature: float) -> None:
    """Whose slopes before they are divided by their sum are too small for the format."""
    pool = torch.tensor([1.0] * 5 + [-1.0] * 300)[:, None].requires_grad_()
    relevance = Relevance(torch.tensor([0, 1]), torch.tensor([10]), torch.tensor([1.0]))
    found = retrieval_loss(
        torch.ones(1, 1), pool, relevance, loss="soft_topk", k=5, temperature=temperature
    )
    (slopes,) = torch.autograd.grad(found.sum(), pool)
    torch.testing.assert_close(
        slopes[:5, 0] * temperature, torch.full((5,), 0.2), rtol=1e-3, atol=0
    )


# ------------------------------------------------------------------------------ few labels


@pytest.mark.parametrize("seed", range(20))
def test_the_soft_top_k_sums_to_k(seed: int) -> None:
    """Read from the losses: with one positive, loss = -log z of it."""
    rng = np.random.default_rng(seed)
    labels, spread = int(rng.integers(5, 40)), float(rng.choice([1.0, 10.0, 60.0]))
    line = torch.from_numpy(rng.normal(0, spread, labels))
    k = int(rng.integers(1, labels))
    relevance = relevance_of([{label: 1.0} for label in range(labels)])
    counts = torch.full((labels,), k)
    for found in (
        dense_retrieval_loss(line.expand(labels, -1), relevance, loss="soft_topk", k=k),
        retrieval_loss(
            torch.ones(labels, 1).double(),
            line[:, None],
            relevance,
            loss="soft_topk",
            k=counts,
            temperature=1.0,
            block=4,
        ),
    ):
        assert found.neg().exp().sum().item() == pytest.approx(k, abs=1e-12)


def test_the_number_of_soft_top_k_may_differ_by_row() -> None:
    texts, labels, _ = random_case(1)
    rows: Rows = [{0: 1.0, 3: 1.0}] * len(texts)
    k = torch.arange(len(texts)) % 3 + 1
    settings = {"loss": "soft_topk", "temperature": 1.0}
    found = retrieval_loss(texts, labels, relevance_of(rows), k=k, **settings)
    dense = dense_retrieval_loss(texts @ labels.T, relevance_of(rows), loss="soft_topk", k=k)
    each = [
        retrieval_loss(texts[i : i + 1], labels, relevance_of(rows[:1]), k=int(k[i]), **settings)
        for i in range(len(texts))
    ]
    torch.testing.assert_close(found, torch.cat(each))
    torch.testing.assert_close(found, dense)


def test_a_plateau_of_the_soft_top_k_is_exact_in_float32() -> None:
    """Two labels far above the rest: what they lack to 1 is far below the rounding of 1."""
    pool = torch.tensor([[30.0], [29.0], [-30.0], [-31.0]])
    relevance = relevance_of([{2: 1.0}])
    slopes = {}
    for dtype in (torch.float32, torch.float64):
        labels = pool.detach().to(dtype, copy=True).requires_grad_()
        found = retrieval_loss(
            torch.ones(1, 1, dtype=dtype), labels, relevance, loss="soft_topk", k=2, alpha=1.0,
            temperature=1.0,
        )  # fmt: skip
        found.sum().backward()
        slopes[dtype] = labels.grad.double()
    _, expected = reference.soft_topk([30.0, 29.0, -30.0, -31.0], {2: 1.0}, 2, 1.0)
    assert slopes[torch.float64][:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(slopes[torch.float32], slopes[torch.float64], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_labels_far_above_the_rest_are_exact_in_float32_in_the_dense_loss(
    temperature: float,
) -> None:
    """The loss of a positive below is that of the shift, half of log(5 / 300) below 0."""
    cosines = torch.tensor([[1.0] * 5 + [-1.0] * 300])
    scores = (cosines / temperature).requires_grad_()
    found = dense_retrieval_loss(scores, relevance_of([{10: 1.0}]), loss="soft_topk", k=5)
    found.sum().backward()
    assert found.item() == pytest.approx(2 / temperature + math.log(60) / 2, abs=1e-3)
    exact = (cosines.double() / temperature).requires_grad_()
    loss = dense_retrieval_loss(exact, relevance_of([{10: 1.0}]), loss="soft_topk", k=5)
    (slopes,) = torch.autograd.grad(loss.sum(), exact)
    torch.testing.assert_close(scores.grad.double(), slopes, rtol=1e-4, atol=1e-6)


def test_a_row_that_selects_all_candidates_has_no_gradient_in_the_dense_loss() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    rows: Rows = [{0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, {0: 1.0}]
    found = dense_retrieval_loss(scores, relevance_of(rows), loss="soft_topk", k=2)
    found.sum().backward()
    assert found[0] == 0
    assert scores.grad[0].tolist() == [0, 0, 0, 0]
    alone = scores.detach()[1:].requires_grad_()
    dense_retrieval_loss(alone, relevance_of(rows[1:]), loss="soft_topk", k=2).sum().backward()
    torch.testing.assert_close(scores.grad[1:], alone.grad)
    assert alone.grad.abs().max() > 0.1
