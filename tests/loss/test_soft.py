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


DIVERGENCES = ["reverse_kl_divergence", "symmetric_kl_divergence", "jensen_shannon_divergence"]
SINGLE = ["soft_cross_entropy", "kl_divergence", *DIVERGENCES]


def short_of_mass(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose targets sum to anything between 0 and 1, the last one to 0."""
    logits, targets = random_case(seed, sums_to_one=True)
    rng = np.random.default_rng(seed + 1000)
    targets = targets * torch.from_numpy(rng.random((len(targets), 1)))
    targets[-1] = 0
    return logits, targets


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_and_gradients_equal_the_twins(name: str, seed: int) -> None:
    logits, targets = short_of_mass(seed)
    logits.requires_grad_()
    losses = getattr(soft, name)(logits, targets)
    losses.sum().backward()
    twin = getattr(reference, name)
    for i, (z, t) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        assert losses[i].item() == pytest.approx(twin(z, t), rel=1e-11, abs=1e-13)
        slope = reference.slope(lambda y, t=t: twin(y, t), z)
        assert logits.grad[i].tolist() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SINGLE)
def test_a_row_short_of_mass_counts_by_its_mass_and_a_row_without_any_not_at_all(
    name: str, seed: int
) -> None:
    loss = getattr(soft, name)
    logits, targets = short_of_mass(seed)
    logits.requires_grad_()
    mass = targets.sum(dim=1)
    whole = torch.where(mass[:, None] > 0, targets / mass.clamp(min=1e-300)[:, None], targets)
    values = loss(logits, targets)
    torch.testing.assert_close(values, mass * loss(logits, whole), rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(values[-1], logits)
    assert values[-1].item() == 0
    assert not gradient.any()


def test_divergences_have_the_values_worked_out_by_hand() -> None:
    """Half of KL(p|q) + KL(q|p), which the code of SSLD names JSDiv, and the divergence of Lin."""
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert soft.symmetric_kl_divergence(q.log(), p).item() == pytest.approx(0.0885778, abs=5e-8)
    assert soft.symmetric_kl_divergence(p.log(), q).item() == pytest.approx(0.0885778, abs=5e-8)
    assert soft.jensen_shannon_divergence(q.log(), p).item() == pytest.approx(0.0219012, abs=5e-8)
    assert soft.reverse_kl_divergence(q.log(), p).item() == pytest.approx(
        soft.kl_divergence(p.log(), q).item(), rel=1e-12
    )


def test_jensen_shannon_is_bounded_and_impossible_labels_do_not_break_divergences() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]], requires_grad=True)
    apart = soft.jensen_shannon_divergence(logits, torch.tensor([[0.0, 1.0, 0.0]]))
    assert apart.item() == pytest.approx(math.log(2))
    for name in DIVERGENCES:
        value = getattr(soft, name)(logits, torch.tensor([[1.0, 0.0, 0.0]]))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.item() == pytest.approx(0.0, abs=1e-6)
        assert gradient.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", [*SINGLE, "binary_cross_entropy"])
def test_extreme_logits_have_finite_values_and_gradients(name: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]).bfloat16().requires_grad_()
    targets = torch.tensor([[0.1, 0.6, 0.3], [1.0, 0.0, 0.0]])
    values = getattr(soft, name)(logits, targets)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logits.grad).all()
    assert (values > 0.1).all()


@pytest.mark.parametrize("name", [*SINGLE, "binary_cross_entropy"])
def test_a_row_has_the_same_loss_in_any_batch(name: str) -> None:
    logits, targets = random_case(9, sums_to_one=True)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    loss = getattr(soft, name)
    together = loss(logits, targets)
    torch.testing.assert_close(loss(logits[order], targets[order]), together[order])
    torch.testing.assert_close(
        torch.cat([loss(logits[i : i + 1], targets[i : i + 1]) for i in range(len(logits))]),
        together,
    )
    assert loss(logits[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_classes_and_smoothing_equal_those_of_torch(seed: int) -> None:
    logits, targets = random_case(seed, sums_to_one=True)
    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.random(logits.shape[1]))
    expected = torch.nn.functional.cross_entropy(
        logits, targets, weight=weights, label_smoothing=0.1, reduction="none"
    )
    smoothed = soft.smooth(targets, 0.1)
    torch.testing.assert_close(smoothed.sum(dim=1), targets.sum(dim=1))
    found = soft.soft_cross_entropy(logits, smoothed, class_weights=weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        soft.binary_cross_entropy(logits, targets, pos_weight=weights),
        torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        ).sum(dim=1),
    )
    for i, (z, t) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        value = soft.binary_cross_entropy(logits, targets, pos_weight=weights)[i].item()
        twin = reference.weighted_binary_cross_entropy(z, t, weights.tolist())
        assert value == pytest.approx(twin, rel=1e-12)


def test_smoothing_leaves_rows_without_a_label_empty() -> None:
    targets = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    assert soft.smooth(targets, 0.2).tolist() == [[0.0, 0.0], pytest.approx([0.45, 0.05])]
    assert soft.smooth(torch.eye(2), 0.2, multilabel=True).tolist() == [
        pytest.approx([0.9, 0.1]),
        pytest.approx([0.1, 0.9]),
    ]


def test_balanced_weights() -> None:
    counts = torch.tensor([6.0, 3.0, 0.0])
    weights = soft.balanced_class_weights(counts)
    assert weights.tolist() == [0.75, 1.5, 1.0]  # sklearn's compute_class_weight of the two
    assert (weights * counts).sum() == counts.sum()
    assert soft.balanced_pos_weight(counts).tolist() == [1.0, 2.0, 1.0]
    assert soft.balanced_class_weights(torch.zeros(2)).tolist() == [1.0, 1.0]


def stored(targets: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What is above 0, in random order, with padding among it."""
    ids = np.full((len(targets), targets.shape[1] + 2), -1)
    probs = rng.random(ids.shape)  # of padding: to be ignored
    for i, row in enumerate(targets):
        labels = rng.permutation(row.nonzero()[:, 0].numpy())
        places = rng.permutation(ids.shape[1])[: len(labels)]
        ids[i, places], probs[i, places] = labels, row[labels].numpy()
    return torch.from_numpy(ids), torch.from_numpy(probs)


@pytest.mark.parametrize("seed", range(20))
def test_sparse_targets_equal_dense_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = short_of_mass(seed)
    logits.requires_grad_()
    ids, probs = stored(targets, rng)
    weights = torch.from_numpy(rng.random(logits.shape[1]))
    spread = targets.clone()
    for row in spread:
        if row.sum() > 0 and (row == 0).any():
            row[row == 0] = (1 - row.sum()) / (row == 0).sum()
    pairs = [
        (soft.sparse_cross_entropy(logits, ids, probs), soft.soft_cross_entropy(logits, targets)),
        (
            soft.sparse_cross_entropy(logits, ids, probs, rest="uniform"),
            soft.soft_cross_entropy(logits, spread),
        ),
        (
            soft.sparse_binary_cross_entropy(logits, ids, probs, pos_weight=weights),
            soft.binary_cross_entropy(logits, targets, pos_weight=weights),
        ),
        (
            soft.sparse_binary_cross_entropy(logits, ids, probs),
            soft.binary_cross_entropy(logits, targets),
        ),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        gradients = [
            torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


def test_sparse_losses_stay_exact_at_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 3.0]], requires_grad=True)
    ids, probs = torch.tensor([[1, 0, -1]]), torch.tensor([[0.25, 0.75, 0.5]])
    for loss in (soft.sparse_cross_entropy, soft.sparse_binary_cross_entropy):
        value = loss(logits, ids, probs)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(gradient).all()
        assert value.item() == pytest.approx(
            5000.0 if "binary" not in loss.__name__ else 5003.0486, rel=1e-6
        )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("divergence", "twin"),
    [
        ("cross_entropy", reference.soft_cross_entropy),
        ("kl", reference.kl_divergence),
        ("reverse_kl", reference.reverse_kl_divergence),
        ("symmetric_kl", reference.symmetric_kl_divergence),
        ("jensen_shannon", reference.jensen_shannon_divergence),
    ],
)
def test_distillation_equals_the_twin(divergence: str, twin, seed: int) -> None:
    logits, targets = random_case(seed, sums_to_one=True)
    teacher = random_case(seed + 50, sums_to_one=True)[0]
    teacher = torch.from_numpy(
        np.random.default_rng(seed).dirichlet(np.ones(logits.shape[1]), len(logits))
    )
    logits.requires_grad_()
    found = soft.distillation_loss(
        logits, targets, teacher, alpha=0.3, temperature=2.5, divergence=divergence
    )
    found.sum().backward()
    rows = zip(logits.tolist(), targets.tolist(), teacher.tolist(), strict=True)
    for i, (z, t, p) in enumerate(rows):
        whole = lambda y, t=t, p=p: reference.distillation_loss(y, t, p, 0.3, 2.5, twin)  # noqa: E731
        assert found[i].item() == pytest.approx(whole(z), rel=1e-10)
        assert logits.grad[i].tolist() == pytest.approx(
            reference.slope(whole, z), rel=1e-6, abs=1e-8
        )


def test_a_hot_distillation_pulls_as_hard_as_a_cold_one() -> None:
    """arXiv 1503.02531, equation 4: near T = infinity the gradient is (z - v) / labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator).double().requires_grad_()
    taught = torch.randn(3, 5, generator=generator).double()
    for temperature in (1e3, 1e4):
        loss = soft.distillation_loss(
            logits, taught.softmax(1), taught.softmax(1), alpha=1.0, temperature=temperature
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        centred = (logits - logits.mean(1, keepdim=True)) - (taught - taught.mean(1, keepdim=True))
        torch.testing.assert_close(gradient, centred.detach() / 5, rtol=0, atol=2 / temperature)


def test_distillation_of_events_equals_its_parts() -> None:
    logits, targets = random_case(2, sums_to_one=False)
    teacher = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)).double()
    teacher[0, 0], teacher[-1, -1] = 0.0, 1.0
    weights = torch.arange(1.0, logits.shape[1] + 1).double()
    found = soft.binary_distillation_loss(
        logits, targets, teacher, alpha=0.4, temperature=3.0, pos_weight=weights
    )
    rows = zip(logits.tolist(), targets.tolist(), teacher.tolist(), strict=True)
    for i, (z, t, p) in enumerate(rows):
        odds = [(x / (1 - x)) ** (1 / 3) if x < 1 else math.inf for x in p]
        soft_teacher = [1 / (1 + 1 / o) if o else 0.0 for o in odds]
        expected = 0.6 * reference.weighted_binary_cross_entropy(z, t, weights.tolist())
        expected += 0.4 * 9 * reference.binary_cross_entropy([x / 3 for x in z], soft_teacher)
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_reaches_the_teacher_and_wrong_settings_are_named() -> None:
    logits, targets = random_case(5, sums_to_one=True)
    teacher = logits.softmax(dim=1).requires_grad_()
    loss = soft.distillation_loss(logits.requires_grad_(), targets, teacher, alpha=0.5)
    loss.sum().backward()
    assert teacher.grad is None
    for loss in (soft.distillation_loss, soft.binary_distillation_loss):
        with pytest.raises(ValueError, match=r"alpha.* got 1\.5"):
            loss(logits, targets, teacher, alpha=1.5)
        with pytest.raises(ValueError, match=r"temperature .* got 0"):
            loss(logits, targets, teacher, alpha=0.5, temperature=0.0)


def test_temper_keeps_mass_zeros_and_order() -> None:
    probs = torch.tensor([[0.64, 0.16, 0.0], [0.0, 0.0, 0.0], [1e-30, 1e-32, 0.0]])
    found = soft.temper(probs, 2.0)
    assert found[0].tolist() == pytest.approx([0.8 * 2 / 3, 0.8 / 3, 0.0])
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert found[2].tolist() == pytest.approx([1.01e-30 * 10 / 11, 1.01e-30 / 11, 0.0], rel=1e-5)


def test_the_mean_of_rows_without_weight_is_zero() -> None:
    values = torch.tensor([torch.inf, 2.0], requires_grad=True)
    mean = soft.weighted_mean(values, torch.zeros(2))
    mean.backward()
    assert mean.item() == 0.0
    assert values.grad.tolist() == [0.0, 0.0]
