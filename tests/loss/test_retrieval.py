import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from loss.relevances import Rows, random_case, relevance_of
from reference import retrieval as reference
from reference.soft import slope, softmax
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmlabel.loss.retrieval import (
    Fixed,
    Relevance,
    RetrievalLoss,
    candidate_kl,
    candidate_symmetric_kl,
    dense_retrieval_loss,
    retrieval_loss,
)

LOSSES: list[RetrievalLoss] = [
    "decoupled_softmax",
    "softmax",
    "soft_topk",
    "bce",
    "kl",
    "symmetric_kl",
]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("loss", LOSSES)
def test_dense_losses_and_gradients_equal_the_twins(loss: RetrievalLoss, seed: int) -> None:
    texts, labels, rows = random_case(seed)
    scores = (3 * texts @ labels.T).detach().requires_grad_()
    found = dense_retrieval_loss(scores, relevance_of(rows), loss=loss, k=2, alpha=1.5)
    found.sum().backward()
    for i, row in enumerate(rows):
        expected, gradient = reference.retrieval_loss(loss, scores[i].tolist(), row, 2, 1.5)
        assert found[i].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert scores.grad[i].tolist() == pytest.approx(gradient, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_any_size_equal_the_dense_loss(loss: RetrievalLoss, seed: int) -> None:
    texts, labels, rows = random_case(seed)
    relevance, upstream = relevance_of(rows), torch.linspace(-1, 2, len(rows)).double()
    dense = dense_retrieval_loss(texts @ labels.T / 0.5, relevance, loss=loss, k=3)
    expected = torch.autograd.grad((dense * upstream).sum(), (texts, labels))
    for block in (1, 3, 7, 100):
        fused = retrieval_loss(
            texts, labels, relevance, loss=loss, k=3, temperature=0.5, block=block
        )
        found = torch.autograd.grad((fused * upstream).sum(), (texts, labels))
        torch.testing.assert_close(fused, dense, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("loss", LOSSES)
def test_fixed_labels_count_like_others_but_get_no_gradient(loss: RetrievalLoss, seed: int) -> None:
    """The last ones are rows of a table, in another order."""
    texts, labels, rows = random_case(seed)
    relevance, upstream = relevance_of(rows), torch.linspace(-1, 2, len(rows)).double()
    learned = len(labels) // 2
    whole = retrieval_loss(texts, labels, relevance, loss=loss, k=3, temperature=0.5, block=2)
    expected = torch.autograd.grad((whole * upstream).sum(), (texts, labels))
    order = torch.arange(len(labels) - learned).flip(0)
    table = torch.cat([labels[learned:].detach().flip(0), torch.full_like(labels[:1], torch.nan)])
    first = labels[:learned].detach().requires_grad_()
    found = retrieval_loss(
        *(texts, first, relevance),
        loss=loss,
        k=3,
        temperature=0.5,
        block=2,
        fixed=Fixed(table, order),
    )
    gradients = torch.autograd.grad((found * upstream).sum(), (texts, first))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[1], expected[1][:learned], rtol=1e-10, atol=1e-10)
    rough = retrieval_loss(
        *(texts, first, relevance),
        loss=loss,
        k=3,
        temperature=0.5,
        fixed=Fixed(table.bfloat16(), order),
    )
    torch.testing.assert_close(rough, whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences(loss: RetrievalLoss) -> None:
    texts, labels, _ = random_case(3)
    relevance = relevance_of(
        [{0: 1.0, 2: 0.4, 3: 0.0}, {len(labels) - 1: 0.5}, *[{}] * 9][: len(texts)]
    )
    assert torch.autograd.gradcheck(
        lambda x, y: retrieval_loss(x, y, relevance, loss=loss, k=2, temperature=0.7, block=2),
        (texts, labels),
    )


def test_one_positive_makes_softmax_infonce() -> None:
    texts, labels, _ = random_case(5)
    rows: Rows = [{i % len(labels): 0.3} for i in range(len(texts))]
    found = retrieval_loss(texts, labels, relevance_of(rows), loss="softmax", temperature=0.1)
    gold = torch.tensor([next(iter(row)) for row in rows])
    expected = torch.nn.functional.cross_entropy(texts @ labels.T / 0.1, gold, reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_far_from_0_stay_finite(dtype: torch.dtype, loss: RetrievalLoss) -> None:
    """Positives at -150 beside negatives at -200: a mask of -100 would give some 50 instead of 0."""
    labels = torch.tensor([[-150.0], [-150.0], [-200.0], [-200.0]], dtype=dtype).requires_grad_()
    texts = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    relevance = relevance_of([{0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}])
    found = retrieval_loss(texts, labels, relevance, loss=loss, k=2, temperature=1.0, block=3)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(labels.grad).all()
    assert torch.isfinite(texts.grad).all()
    if loss == "decoupled_softmax":
        assert found.tolist() == [pytest.approx(0.0, abs=1e-20), 0.0]  # and no negatives at all
        assert labels.grad[:2].abs().max() < 1e-20


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_without_positives_adds_nothing(loss: RetrievalLoss) -> None:
    texts, labels, _ = random_case(2)
    count = len(labels)
    rows: Rows = [{}, {1: 0.0}, dict.fromkeys(range(count), 0.0), {2: 1.0, 3: 0.0}]
    many = torch.cat([texts, texts])[:4].detach()
    many[0] = torch.nan  # of a text that does not count anything may come
    many.requires_grad_()
    found = retrieval_loss(many, labels, relevance_of(rows), loss=loss, k=2, block=3)
    found.sum().backward()
    one = many[3:].detach().requires_grad_()
    alone = retrieval_loss(one, labels.detach(), relevance_of(rows[3:]), loss=loss, k=2)
    alone.sum().backward()
    assert found.tolist() == [0, 0, 0, pytest.approx(alone.item())]
    assert many.grad[:3].abs().max() == 0
    torch.testing.assert_close(many.grad[3:], one.grad)
    assert torch.isfinite(labels.grad).all()
    assert labels.grad[3].abs().max() == 0  # left out in the only row that counts


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_shows_in_the_loss(loss: RetrievalLoss) -> None:
    texts, labels, _ = random_case(4)
    broken = labels.detach().clone()
    broken[-1] = torch.nan  # a negative of every row
    rows: Rows = [{0: 1.0}] * len(texts)
    found = retrieval_loss(texts, broken, relevance_of(rows), loss=loss, k=2, block=2)
    assert found.isnan().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_last_label_is_pulled_where_it_is_a_positive(loss: RetrievalLoss) -> None:
    """DEXML's code trains the last label of every process as a negative."""
    labels = torch.eye(6, dtype=torch.float64).requires_grad_()
    texts = torch.ones(1, 6, dtype=torch.float64)
    for block in (2, 4, 6):
        found = retrieval_loss(
            texts, labels, relevance_of([{5: 1.0}]), loss=loss, k=2, temperature=1.0, block=block
        )
        (slopes,) = torch.autograd.grad(found.sum(), labels)
        assert (slopes[5] < 0).all()
        assert (slopes[:5] > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_summed_in_float32(loss: RetrievalLoss) -> None:
    """Equal to float32 on the same numbers, rounded once at the end; also under autocast."""
    rng = torch.Generator().manual_seed(0)
    texts = torch.randn(4, 16, generator=rng).bfloat16()
    labels = torch.randn(3000, 16, generator=rng).bfloat16()
    relevance = relevance_of([{1: 1.0, 2999: 0.5}, {7: 1.0}, {}, {9: 0.0, 11: 1.0}])
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (t.to(dtype).requires_grad_() for t in (texts, labels))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = retrieval_loss(x, y, relevance, loss=loss, temperature=1.0, block=500)
            found.sum().backward()
        results[dtype] = (found, x.grad, y.grad)
    (exact, *gradients), (found, *halves) = results.values()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    for half, gradient in zip(halves, gradients, strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half, gradient.bfloat16(), rtol=0.008, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_candidate_kls_equal_the_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = torch.from_numpy(rng.uniform(-1, 1, (2, 2, 5)))
    teacher[1, 3:] = -torch.inf  # padding
    student.requires_grad_()
    at = {"student_temperature": 0.3, "teacher_temperature": 0.2}

    def kl(scores: list[float], judge: list[float]) -> tuple[float, float]:
        p, q = (softmax([v / t for v in values]) for values, t in ((scores, 0.3), (judge, 0.2)))
        pairs = list(zip(p, q, strict=True))
        return sum(b * math.log(b / a) for a, b in pairs), sum(
            a * math.log(a / max(b, 1e-8)) for a, b in pairs
        )

    for function, twin in (
        (candidate_kl, lambda s, t: kl(s, t)[0]),
        (candidate_symmetric_kl, lambda s, t: sum(kl(s, t)) / 2),
    ):
        student.grad = None
        found = function(student, teacher, **at)
        found.sum().backward()
        for i, count in ((0, 5), (1, 3)):
            judge, scores = teacher[i, :count].tolist(), student[i, :count].tolist()
            assert found[i].item() == pytest.approx(twin(scores, judge), rel=1e-9)
            expected = slope(lambda s, j=judge, f=twin: f(s, j), scores)
            assert student.grad[i, :count].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
            assert student.grad[i, count:].abs().sum() == 0


def test_a_list_of_padding_adds_nothing_to_candidate_kls() -> None:
    student = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = torch.tensor([[0.2, 0.9, 0.1], [-torch.inf] * 3])
    for function in (candidate_kl, candidate_symmetric_kl):
        found = function(student, teacher)
        (slopes,) = torch.autograd.grad(found.sum(), student)
        assert found[0] > 0
        assert found[1] == 0
        assert slopes[1].tolist() == [0, 0, 0]
        assert torch.isfinite(slopes).all()
    with pytest.raises(ValueError, match=r"temperatures must lie above 0; got 0\.0 and 1\.0"):
        candidate_kl(student, teacher, student_temperature=0.0, teacher_temperature=1.0)


def test_bad_input_is_named() -> None:
    texts, labels = torch.ones(2, 3), torch.ones(4, 3)
    empty = torch.tensor([], dtype=torch.long)
    with pytest.raises(ValueError, match="indptr must go from 0 to the 0 entries; got 0 to 1"):
        Relevance(torch.tensor([0, 1]), empty, torch.tensor([]))
    with pytest.raises(ValueError, match="ids of row 1 must ascend"):
        relevance_of([{0: 1.0}, {2: 1.0, 1: 1.0}])
    with pytest.raises(ValueError, match=r"a relevance must be 0 or above; got -1\.0"):
        relevance_of([{0: -1.0}])
    with pytest.raises(ValueError, match="relevance is of 1 rows; there are 2"):
        retrieval_loss(texts, labels, relevance_of([{0: 1.0}]))
    with pytest.raises(ValueError, match="labels 0 to 4; the pool has 4, counted from 0"):
        retrieval_loss(texts, labels, relevance_of([{0: 1.0}, {4: 1.0}]))
    good = relevance_of([{0: 1.0}, {3: 2.0}])
    with pytest.raises(ValueError, match="k must be from 1 to less than the 4 labels; got 4 to 4"):
        retrieval_loss(texts, labels, good, loss="soft_topk", k=4)
    with pytest.raises(ValueError, match=r"relevance must be at most 1 for bce; got 2\.0"):
        retrieval_loss(texts, labels, good, loss="bce")
    with pytest.raises(ValueError, match="temperature and alpha must lie above 0"):
        retrieval_loss(texts, labels, good, temperature=0.0)
    for call, given in ((retrieval_loss, (texts, labels)), (dense_retrieval_loss, (labels,))):
        plain: Any = inspect.unwrap(call)  # whose types the tests check before
        with pytest.raises(ValueError, match=r"loss is one of decoupled_softmax, .*; got 'foo'"):
            plain(*given, good, loss="foo")


def test_only_the_gradients_asked_for_are_computed() -> None:
    texts, labels, _ = random_case(6)
    relevance = relevance_of([{0: 1.0}] * len(texts))
    both = torch.autograd.grad(retrieval_loss(texts, labels, relevance).sum(), (texts, labels))
    fixed = retrieval_loss(texts, labels.detach(), relevance)
    torch.testing.assert_close(torch.autograd.grad(fixed.sum(), texts)[0], both[0])
    fixed = retrieval_loss(texts.detach(), labels, relevance)
    torch.testing.assert_close(torch.autograd.grad(fixed.sum(), labels)[0], both[1])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, forward or backward."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(given) if isinstance(value, Tensor)]
        self.found = max([self.found, *sizes])
        return given


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_of_all_rows_and_labels_are_never_held(loss: RetrievalLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(50, 4, generator=generator).requires_grad_()
    labels = torch.randn(2000, 4, generator=generator).requires_grad_()
    relevance = relevance_of([{i: 1.0, 390: 0.0} for i in range(50)])
    with LargestTensor() as largest:
        retrieval_loss(texts, labels, relevance, loss=loss, block=200).sum().backward()
    assert largest.found == 50 * 200
    with LargestTensor() as largest:
        dense_retrieval_loss(texts @ labels.T, relevance, loss=loss).sum().backward()
    assert largest.found == 50 * 2000
