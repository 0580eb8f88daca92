import math

import numpy as np
import pytest
import torch
from reference import soft as reference

from llmlabel.loss import soft

LOSSES = ["soft_cross_entropy", "kl_divergence", "binary_cross_entropy"]


def random_case(seed: int, *, sums_to_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 logits and targets, a third of them exactly 0."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(1, 7)), int(rng.integers(2, 9))
    targets = rng.random((rows, labels)) * (rng.random((rows, labels)) > 1 / 3)
    if sums_to_one:
        targets[:, 0] += 0.01
        targets /= targets.sum(axis=1, keepdims=True)
    return torch.from_numpy(rng.normal(0, 4, (rows, labels))), torch.from_numpy(targets)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_the_twins(name: str, seed: int) -> None:
    logits, targets = random_case(seed, sums_to_one=name != "binary_cross_entropy")
    logits.requires_grad_()
    losses = getattr(soft, name)(logits, targets)
    losses.sum().backward()
    for i, (z, t) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        assert losses[i].item() == pytest.approx(getattr(reference, name)(z, t), rel=1e-12)
        expected = getattr(reference, f"{name}_gradient")(z, t)
        assert logits.grad[i].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_the_closed_form_gradients_are_those_of_the_twins(name: str) -> None:
    logits, targets = random_case(0, sums_to_one=name != "binary_cross_entropy")
    twin, z, t = getattr(reference, name), logits[0].tolist(), targets[0].tolist()
    for k, slope in enumerate(getattr(reference, f"{name}_gradient")(z, t)):
        up, down = z.copy(), z.copy()
        up[k] += 1e-5
        down[k] -= 1e-5
        assert slope == pytest.approx((twin(up, t) - twin(down, t)) / 2e-5, abs=1e-8)


def test_a_target_of_zero_adds_nothing_at_an_impossible_label() -> None:
    logits = torch.tensor([[1.0, 1.0, -torch.inf]], requires_grad=True)
    targets = torch.tensor([[0.5, 0.5, 0.0]])
    for loss in (soft.soft_cross_entropy, soft.kl_divergence):
        value = loss(logits, targets)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.tolist() == [[0.0, 0.0, 0.0]]
    assert soft.soft_cross_entropy(logits, targets).item() == pytest.approx(math.log(2))
    assert soft.kl_divergence(logits, targets).item() == pytest.approx(0.0, abs=1e-7)
    hard = soft.binary_cross_entropy(torch.tensor([[-torch.inf, torch.inf]]), targets[:, [2, 2]])
    assert hard.tolist() == [torch.inf]  # the second label is certain, and wrong
    right = soft.binary_cross_entropy(
        torch.tensor([[-torch.inf, torch.inf]]), torch.tensor([[0.0, 1.0]])
    )
    assert right.tolist() == [0.0]


def test_one_hot_targets_give_the_ordinary_cross_entropy() -> None:
    logits, _ = random_case(3, sums_to_one=True)
    gold = torch.arange(len(logits)) % logits.shape[1]
    targets = torch.nn.functional.one_hot(gold, logits.shape[1]).double()
    expected = torch.nn.functional.cross_entropy(logits, gold, reduction="none")
    torch.testing.assert_close(soft.soft_cross_entropy(logits, targets), expected)
    torch.testing.assert_close(soft.kl_divergence(logits, targets), expected)


def test_divergence_from_itself_is_zero() -> None:
    logits, _ = random_case(4, sums_to_one=True)
    divergence = soft.kl_divergence(logits, logits.softmax(dim=1))
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), atol=1e-14, rtol=0)


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [-3e38, 3e38]], requires_grad=True)
    targets = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert soft.soft_cross_entropy(logits, targets).tolist() == pytest.approx([1e4, 0.0])
    assert soft.binary_cross_entropy(logits, targets).tolist() == pytest.approx([1e4, 0.0])
    soft.soft_cross_entropy(logits, targets).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator).to(dtype)
    targets = torch.softmax(torch.randn(3, 5000, generator=generator), dim=1).to(dtype)
    losses = getattr(soft, name)(logits, targets)
    assert losses.dtype == torch.float32
    expected = getattr(soft, name)(logits.double(), targets.double())
    assert expected.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_weighted_mean_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, weights = torch.from_numpy(rng.normal(size=9)), torch.from_numpy(rng.random(9))
    for total in (None, 7.5, torch.tensor(7.5, dtype=torch.float64)):
        mean = soft.weighted_mean(values, weights, total=total)
        expected = reference.weighted_mean(
            values.tolist(), weights.tolist(), None if total is None else 7.5
        )
        assert mean.item() == pytest.approx(expected, rel=1e-12)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.rand(8, generator=generator), torch.rand(8, generator=generator)
    total = weights.sum()
    parts = [
        soft.weighted_mean(values[i], weights[i], total=total) for i in torch.arange(8).split(3)
    ]
    torch.testing.assert_close(sum(parts), soft.weighted_mean(values, weights))


def test_a_row_of_weight_zero_does_not_spoil_the_mean() -> None:
    values = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    mean = soft.weighted_mean(values, torch.tensor([1.0, 0.0, 1.0]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5]
