import math

import numpy as np
import pytest
import torch
from reference import losses as reference
from reference.soft import sigmoid, slope

from llmlabel.loss import soft
from llmlabel.loss.head_tail import HeadTail, HeadTailBalancer, balance_loss
from llmlabel.loss.longtail import (
    LabelCorrector,
    LongTailLoss,
    asymmetric_loss,
    head_tail_factors,
    multi_focal_loss,
)


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, soft targets a third of which are 0, and counts of the labels."""
    rng = np.random.default_rng(seed)
    rows, labels = int(rng.integers(1, 5)), int(rng.integers(2, 7))
    targets = rng.random((rows, labels)) * (rng.random((rows, labels)) > 1 / 3)
    counts = torch.from_numpy(rng.integers(1, 500, labels)).double()
    return torch.from_numpy(rng.normal(0, 2, (rows, labels))), torch.from_numpy(targets), counts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_multi_focal_loss_and_its_gradient_equal_the_formulas(clip: float, seed: int) -> None:
    logits, targets, counts = random_case(seed)
    logits.requires_grad_()
    factors = head_tail_factors(counts)
    expected = reference.head_tail_factors(counts.tolist(), 1 / 3)
    assert factors.tolist() == pytest.approx(expected, rel=1e-12)
    found = multi_focal_loss(
        logits, targets, factors, gamma_pos=0.5, head_tail_pos=0.3, head_tail_neg=0.8, clip=clip
    )
    found.sum().backward()
    gammas = [[0.5 + 0.3 * h for h in expected], [3 + 0.8 * h for h in expected]]
    for i, (z, t) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        assert found[i].item() == pytest.approx(
            reference.asymmetric_loss(z, t, *gammas, clip), rel=1e-10
        )
        expected_slope = slope(lambda y, t=t: reference.asymmetric_loss(y, t, *gammas, clip), z)
        assert logits.grad[i].tolist() == pytest.approx(expected_slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_it_reduces_to_the_asymmetric_focal_and_binary_cross_entropy(seed: int) -> None:
    logits, targets, counts = random_case(seed)
    plain = multi_focal_loss(
        logits, targets, head_tail_factors(counts), gamma_pos=1.0, head_tail_neg=0.0
    )
    torch.testing.assert_close(
        plain, asymmetric_loss(logits, targets, gamma_pos=1.0, gamma_neg=3.0)
    )
    torch.testing.assert_close(
        asymmetric_loss(logits, targets, gamma_neg=0.0, clip=0.0),
        soft.binary_cross_entropy(logits, targets),
    )
    focal = asymmetric_loss(logits, targets.round(), gamma_pos=2.0, gamma_neg=2.0, clip=0.0)
    probs = torch.where(targets.round() > 0, logits, -logits).sigmoid()
    torch.testing.assert_close(focal, -((1 - probs) ** 2 * probs.log()).sum(dim=1))


def test_rare_labels_have_easier_negatives_forgiven_more() -> None:
    factors = head_tail_factors(torch.tensor([1240.0, 6.0, 0.0, 1.0]))
    assert factors[0] == 1
    assert factors[1].item() == pytest.approx((1 - math.log(6 / 1240)) ** (1 / 3))
    assert factors[2] == factors[3] > factors[1]  # never given counts as once, not without a bound
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = multi_focal_loss(logits, torch.zeros(1, 4), factors)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0, 0] > gradient[0, 1] > gradient[0, 2] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_extreme_logits_stay_finite(gamma: float, clip: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 0.0]]).to(dtype).requires_grad_()
    targets = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])
    loss = asymmetric_loss(logits, targets, gamma_pos=gamma, gamma_neg=gamma, clip=clip)
    other = HeadTail(logits.detach(), -logits.detach(), logits)
    balanced = balance_loss(other, targets, gamma_pos=gamma, gamma_neg=gamma, clip=clip)
    (loss + balanced).sum().backward()
    wrong = 1e4 if clip == 0 else -math.log(clip)
    assert loss.item() == pytest.approx(1e4 + wrong + math.log(2) * 0.5**gamma, rel=5e-3)
    assert torch.isfinite(balanced).all()
    assert torch.isfinite(logits.grad).all()


def test_gradients_where_the_clip_begins() -> None:
    """At and below it nothing, not even NaN from 0 to the power of something below 1."""
    at_clip = math.log(0.05 / 0.95)
    logits = torch.tensor([[at_clip, at_clip - 1e-3, -3.5]], dtype=torch.float64)
    logits.requires_grad_()
    loss = asymmetric_loss(logits, torch.zeros(1, 3), gamma_neg=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.tolist() == [[pytest.approx(0.0, abs=1e-6), 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(20))
def test_corrections_follow_the_rule_and_do_not_depend_on_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(1, 2, (12, 4)))
    targets = torch.from_numpy((rng.random((12, 4)) > 0.7).astype(float))
    corrector, parts = LabelCorrector(4, tau=0.6), LabelCorrector(4, tau=0.6)
    means, seen = [0.0] * 4, 0
    for update in range(3):
        own = slice(4 * update, 4 * update + 4)
        found, added = corrector(logits[own], targets[own])
        corrector.synchronize()
        pieces = [
            parts(logits[i : i + 2], targets[i : i + 2])[0] for i in (own.start, own.start + 2)
        ]
        parts(logits[:1] * 9, targets[:1], weights=torch.zeros(1))
        parts.synchronize()
        assert torch.equal(torch.cat(pieces), found)
        for i in range(4):
            z, t = logits[own][i].tolist(), targets[own][i].tolist()
            expected = reference.corrected(z, t, means, 0.6)
            assert found[i].tolist() == expected
            assert added[i].tolist() == [a != b for a, b in zip(expected, t, strict=True)]
        columns = list(zip(*logits[own].tolist(), strict=True))
        sums = [m * seen + sum(map(sigmoid, c)) for m, c in zip(means, columns, strict=True)]
        seen += 4
        means = [total / seen for total in sums]
    assert (corrector.sums / corrector.rows).tolist() == pytest.approx(means, rel=1e-5)
    torch.testing.assert_close(parts.sums, corrector.sums)


def test_a_label_that_is_likely_for_every_row_is_not_added_to_all() -> None:
    corrector = LabelCorrector(2)
    logits = torch.tensor([[3.0, -3.0], [1.5, 1.5], [2.5, 0.5]])
    _, added = corrector(logits, torch.zeros(3, 2))
    assert added.tolist() == [[True, False], [True, True], [True, False]]
    corrector.synchronize()
    _, added = corrector(logits, torch.zeros(3, 2))
    assert added.tolist() == [[True, False], [False, True], [True, False]]  # P of label 0 is 0.90
    assert corrector(logits, torch.ones(3, 2))[1].any().item() is False
    assert sorted(corrector.state_dict()) == ["rows", "sums"]
    with pytest.raises(ValueError, match=r"tau .* got 1\.0"):
        LabelCorrector(2, tau=1.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_the_long_tail_loss_is_the_sum_of_its_parts(start_epoch: int, seed: int) -> None:
    """Six rows are an epoch of two updates; the twin adds up by hand what the modules keep."""
    rng = np.random.default_rng(seed)
    given = (rng.random((6, 3)) > 0.6).astype(float)
    counts = given.sum(axis=0)
    whole, parts = (
        LongTailLoss(
            torch.from_numpy(counts),
            6,
            tau=0.6,
            start_epoch=start_epoch,
            correction_weight=0.7,
            gamma_pos=0.5,
            head_tail_neg=0.8,
        )
        for _ in range(2)
    )

    def modified(z: np.ndarray, t: np.ndarray, counted: np.ndarray) -> float:
        factors = reference.head_tail_factors(np.maximum(counted, 1).tolist(), 1 / 3)
        gammas = [[0.5] * 3, [3 + 0.8 * h for h in factors]]
        return reference.asymmetric_loss(z.tolist(), t.tolist(), *gammas, 0.05)

    sums, seen, found, corrected = np.zeros(3), 0, np.zeros(3), 0
    for update in range(6):
        rows = [0, 1, 2] if update % 2 == 0 else [3, 4, 5]
        logits = rng.normal(0.5, 2, (3, 3))
        probs = 1 / (1 + np.exp(-logits))
        means = sums / max(seen, 1)
        added = np.where((probs > np.maximum(means, 0.6)) & (given[rows] == 0), 1.0, given[rows])
        now = found * 6 / corrected if corrected else counts
        is_on = seen >= 6 * start_epoch
        expected = [
            modified(z, t, counts)
            + (0.7 * 6 / max(counts.sum(), 1) * modified(z, a, now) if is_on else 0)
            for z, t, a in zip(logits, given[rows], added, strict=True)
        ]
        targets = torch.from_numpy(given[rows])
        values = whole(torch.from_numpy(logits), targets)
        assert values.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        pieces = [parts(torch.from_numpy(logits[i : i + 1]), targets[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.cat(pieces), values)
        for loss in (whole, parts):
            loss.keep()
        sums, seen = sums + probs.sum(axis=0), seen + 3
        if is_on:
            found, corrected = found + added.sum(axis=0), corrected + 3
    assert whole.added_per_row() == pytest.approx(
        found.sum() / corrected - counts.sum() / 6, abs=1e-5
    )
    again = LongTailLoss(torch.from_numpy(counts), 6, tau=0.6)
    again.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert again.corrector.rows == 18
    assert torch.equal(again.found, whole.found)


def test_without_a_corrector_it_is_the_modifier_and_keeps_nothing() -> None:
    logits, targets, counts = random_case(3)
    loss = LongTailLoss(counts, 50, tau=None, head_tail_neg=0.5)
    expected = multi_focal_loss(
        logits, targets, head_tail_factors(counts.float()), head_tail_neg=0.5
    )
    for _ in range(3):
        torch.testing.assert_close(loss(logits, targets), expected)
        loss.keep()
    assert loss.added_per_row() == 0
    torch.testing.assert_close(loss.modified(logits, targets), expected)


def test_predictions_that_are_not_finite_leave_the_state_finite() -> None:
    loss = LongTailLoss(torch.ones(2), 2, start_epoch=0)
    logits = torch.tensor([[2.0, float("nan")], [1.0, -1.0]])
    assert torch.isnan(loss(logits, torch.zeros(2, 2))[0])  # the loop stops there
    loss.keep()
    assert loss.corrector.rows == 1
    torch.testing.assert_close(loss.corrector.sums, logits[1].sigmoid())
    assert all(torch.isfinite(value).all() for value in loss.state_dict().values())


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_row_of_weight_two_counts_as_two_rows(start_epoch: int) -> None:
    """Weights are 1 on average; of copies there are more, so that all counts are in proportion."""
    rng = np.random.default_rng(start_epoch)
    weights = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0]).double()
    given = torch.from_numpy((rng.random((5, 3)) > 0.5).astype(float))
    copies = torch.repeat_interleave(torch.arange(5), weights.long())
    shares = weights / weights.mean()
    one = LongTailLoss(shares @ given, 5, tau=0.6, start_epoch=start_epoch)
    other = LongTailLoss(given[copies].sum(dim=0), 8, tau=0.6, start_epoch=start_epoch)
    for update in range(4):
        logits = torch.from_numpy(rng.normal(1, 2, (5, 3)))
        values = one(logits, given, weights=shares)
        torch.testing.assert_close(other(logits[copies], given[copies]), values[copies])
        unweighted = LongTailLoss(given.sum(dim=0), 5, tau=0.6, start_epoch=start_epoch)
        assert not torch.allclose(unweighted(logits, given), values), update
        one.keep()
        other.keep()
    assert float(one.corrector.rows) == pytest.approx(20, rel=1e-12)
    torch.testing.assert_close(one.corrector.sums * 8 / 5, other.corrector.sums)
    torch.testing.assert_close(one.found * 8 / 5, other.found)
    assert one.added_per_row() == pytest.approx(other.added_per_row(), abs=1e-5)


def test_what_a_failed_update_saw_is_forgotten() -> None:
    one, other = (LongTailLoss(torch.ones(2), 3, start_epoch=0) for _ in range(2))
    logits = torch.tensor([[2.0, 0.5], [1.0, -1.0], [3.0, 3.0]])
    for update in range(2):
        for loss in (one, other):
            loss(logits * (update + 1), torch.zeros(3, 2))
            loss.keep()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    one(-logits, torch.ones(3, 2))
    one.synchronize()
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name])
    one.keep()
    again, expected = (loss(logits, torch.zeros(3, 2)) for loss in (one, other))
    assert torch.equal(again, expected)


def test_settings_of_the_long_tail_loss_are_checked() -> None:
    for given, message in [
        ({"tau": 0.0}, r"tau must lie strictly between 0 and 1; got 0\.0"),
        ({"start_epoch": -1}, "start_epoch must be at least 0; got -1"),
        ({"correction_weight": -1.0}, r"correction_weight must be at least 0; got -1\.0"),
        ({"gamma_neg": float("nan")}, "gamma_neg must be at least 0; got nan"),
        ({"clip": 1.0}, r"clip must be at least 0 and below 1; got 1\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LongTailLoss(torch.ones(2), 2, **given)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_balance_loss_and_its_gradient_equal_the_formulas(clip: float, seed: int) -> None:
    logits, targets, _ = random_case(seed)
    rng = np.random.default_rng(seed + 100)
    head, tail = (torch.from_numpy(rng.normal(0, 2, logits.shape)).requires_grad_() for _ in "ab")
    logits.requires_grad_()
    gammas = [[0.5] * logits.shape[1], [2.0] * logits.shape[1]]
    found = balance_loss(
        HeadTail(head, tail, logits), targets, gamma_pos=0.5, gamma_neg=2.0, clip=clip
    )
    found.sum().backward()
    assert head.grad is None
    assert tail.grad is None
    for i, t in enumerate(targets.tolist()):
        h, s, z = head[i].tolist(), tail[i].tolist(), logits[i].tolist()

        def whole(y: list[float], h=h, s=s, t=t) -> float:
            return reference.balance_loss(h, s, y, t, *gammas, clip, 2.0)

        assert found[i].item() == pytest.approx(whole(z), rel=1e-8)
        assert logits.grad[i].tolist() == pytest.approx(slope(whole, z), rel=1e-5, abs=1e-8)


def filled(balancer: HeadTailBalancer, seed: int) -> HeadTailBalancer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in [*balancer.parameters(), balancer.moving]:
            values += torch.randn(values.shape, generator=generator).to(values)
    return balancer.double()


@pytest.mark.parametrize("seed", range(20))
def test_the_three_classifiers_equal_the_formulas(seed: int) -> None:
    balancer = filled(HeadTailBalancer(4, 3, alpha=1.5), seed)
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 4)))
    out = balancer(features)
    moving = balancer.moving.tolist()
    for i in range(2):
        vectors = [w @ features[i] for w in balancer.project]
        asked = balancer.query @ vectors[2]
        scores = [
            (balancer.attend @ torch.tanh(asked + balancer.key @ f)).item() for f in vectors[:2]
        ]
        share = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        heads = [f.tolist() for f in vectors]
        mixed = [b + share[0] * h + share[1] * t for h, t, b in zip(*heads, strict=True)]
        for logits, f, weights, amount in zip(
            out, (heads[0], heads[1], mixed), balancer.classify.tolist(), (-1, 1.5, 0), strict=True
        ):
            expected = reference.cosine_logits(f, weights, moving, amount, 16.0, 1 / 32)
            assert logits[i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_groups_are_cosines_of_parts() -> None:
    balancer = filled(HeadTailBalancer(6, 2, groups=2), 1)
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    head = balancer(features).head
    for i in range(3):
        f = (balancer.project[0] @ features[i]).tolist()
        parts = [
            reference.cosine_logits(
                f[own],
                [w[own] for w in balancer.classify[0].tolist()],
                balancer.moving.tolist()[own],
                -1,
                8.0,
                1 / 32,
            )
            for own in (slice(0, 3), slice(3, 6))
        ]
        assert head[i].tolist() == pytest.approx([sum(p) for p in zip(*parts, strict=True)])
    with pytest.raises(ValueError, match="groups must divide the width 6"):
        HeadTailBalancer(6, 2, groups=4)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_moving_vector_sums_gradients_of_the_features_over_micro_batches(frozen: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(4, 3, generator=generator).double()
    whole, parts = filled(HeadTailBalancer(3, 2), 3), filled(HeadTailBalancer(3, 2), 3)
    before = whole.moving.clone()
    leaf = features.clone().requires_grad_()
    sum(logits.square().sum() for logits in whole(leaf)).backward()
    expected = 0.9 * before + leaf.grad.sum(dim=0)
    for piece in features.split(2):
        given = piece if frozen else piece.clone().requires_grad_()
        sum(logits.square().sum() for logits in parts(given)).backward()
    assert torch.equal(parts.moving, before)  # not in the middle of an update
    for balancer in (whole, parts):
        balancer.synchronize()
        torch.testing.assert_close(balancer.moving, expected)
        balancer.synchronize()
        torch.testing.assert_close(balancer.moving, 0.9 * expected)
    with torch.no_grad():
        parts(features)
    parts.eval()(features.clone().requires_grad_()).head.sum().backward()
    parts.synchronize()
    torch.testing.assert_close(parts.moving, 0.81 * expected)


def test_an_untrained_balancer_is_undecided_and_can_learn() -> None:
    balancer = HeadTailBalancer(4, 3)
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert not any(logits.any() for logits in balancer(features))
    assert [logits.shape for logits in balancer(features[:0])] == [(0, 3)] * 3
    targets = (features[:, :3] > 0).float()
    optimizer = torch.optim.Adam(balancer.parameters(), 0.03)
    for _ in range(60):
        out = balancer(features)
        own = sum(asymmetric_loss(z, targets, gamma_neg=1.0) for z in out)
        loss = (own + balance_loss(out, targets, gamma_neg=1.0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balancer.synchronize()
    assert balancer.attend.abs().max() > 0.01
    assert torch.equal(balancer(features).balanced > 0, targets > 0)


@pytest.mark.parametrize("loss", ["asymmetric", "balance"])
def test_a_row_has_the_same_loss_in_any_batch(loss: str) -> None:
    logits, targets, _ = random_case(11)

    def of(rows: slice | list[int]) -> torch.Tensor:
        if loss == "asymmetric":
            return asymmetric_loss(logits[rows], targets[rows])
        return balance_loss(HeadTail(logits[rows] / 2, -logits[rows], logits[rows]), targets[rows])

    together = of(slice(None))
    alone = torch.cat([of(slice(i, i + 1)) for i in range(len(logits))])
    torch.testing.assert_close(alone, together)
    order = list(reversed(range(len(logits))))
    torch.testing.assert_close(of(order), together[order])
    assert of(slice(0, 0)).shape == (0,)


def test_autocast_does_not_coarsen_the_classifiers_and_the_corrector() -> None:
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    balancer = filled(HeadTailBalancer(4, 3), 0).float()
    correctors = LabelCorrector(4), LabelCorrector(4)
    plain = balancer(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = balancer(features)
        correctors[0](features, features)
    correctors[1](features, features)
    for one, other in zip(plain, coarse, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(correctors[0]._sums, correctors[1]._sums)
