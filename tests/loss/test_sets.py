import numpy as np
import pytest
import torch
from reference import losses as reference
from reference.soft import slope

from llmlabel.loss.sets import (
    assign,
    set_cross_entropy,
    transport_loss,
    transport_plan,
)


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits of 1 to 4 steps, sets of 0 labels up to one a step with -1 anywhere, and `empty`."""
    rng = np.random.default_rng(seed)
    rows, steps, labels = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(5, 8))
    empty = int(rng.integers(labels))
    sets = np.full((rows, steps + 1), -1)
    for row in sets:
        size = int(rng.integers(0, steps + 1))
        members = rng.permutation([k for k in range(labels) if k != empty])[:size]
        row[rng.permutation(steps + 1)[:size]] = members
    return torch.from_numpy(rng.normal(0, 2, (rows, steps, labels))), torch.from_numpy(sets), empty


def members(row: torch.Tensor) -> list[int]:
    return [label for label in row.tolist() if label >= 0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scheme", ["all", "first_n"])
def test_set_cross_entropy_equals_the_best_of_all_assignments(scheme: str, seed: int) -> None:
    logits, sets, empty = random_case(seed)
    logits.requires_grad_()
    losses = set_cross_entropy(logits, sets, empty=empty, scheme=scheme)
    losses.sum().backward()
    labels = assign(logits.detach().softmax(2), sets, empty=empty, scheme=scheme)
    for i, z in enumerate(logits.tolist()):
        chosen = members(sets[i])
        expected = reference.set_cross_entropy(z, chosen, empty, scheme, 0.2)
        assert losses[i].item() == pytest.approx(expected, rel=1e-12)
        written = [k for k in labels[i].tolist() if k != empty]
        assert sorted(written) == sorted(chosen)
        if scheme == "first_n":
            assert empty not in labels[i, : len(chosen)].tolist()
        flat = slope(
            lambda y, i=i, z=z, chosen=chosen: reference.set_cross_entropy(
                np.reshape(y, np.shape(z)).tolist(), chosen, empty, scheme, 0.2
            ),
            np.ravel(z),
        )
        assert logits.grad[i].flatten().tolist() == pytest.approx(flat, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("method", ["ipot", "sinkhorn"])
@pytest.mark.parametrize("scheme", ["all", "first_n"])
def test_transport_equals_the_twin_row_by_row(scheme: str, method: str, seed: int) -> None:
    logits, sets, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    embeddings = torch.from_numpy(rng.normal(size=(logits.shape[2], 3)))
    logits.requires_grad_()
    embeddings.requires_grad_()
    losses = transport_loss(
        logits, sets, embeddings, scheme=scheme, method=method, beta=0.7, iterations=9
    )
    losses.sum().backward()
    assert embeddings.grad is None
    for i, z in enumerate(logits.tolist()):
        chosen = members(sets[i])
        if not chosen:
            assert losses[i].item() == 0
            assert not logits.grad[i].any()
            continue
        reach = len(z) if scheme == "all" else len(chosen)
        costs = reference.cosine_costs(z[:reach], chosen, embeddings.tolist())
        plan = reference.transport_plan(costs, method, 0.7, 9)
        expected = reference.transport_loss(costs, plan)
        assert losses[i].item() == pytest.approx(expected, rel=1e-10)

        def loss(y: list[float], z=z, chosen=chosen, plan=plan, reach=reach) -> float:
            rows = np.reshape(y, np.shape(z)).tolist()[:reach]
            costs = reference.cosine_costs(rows, chosen, embeddings.tolist())
            return reference.transport_loss(costs, plan)  # the plan stays

        expected = slope(loss, np.ravel(z))
        assert logits.grad[i].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_ipot_goes_to_the_exact_plan_and_sinkhorn_only_with_a_small_entropy(seed: int) -> None:
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    costs = rng.random((m, n))
    once = np.concatenate(
        [np.kron(np.eye(m), np.ones((1, n))), np.kron(np.ones((1, m)), np.eye(n))]
    )
    exact = linprog(costs.ravel(), A_eq=once, b_eq=[1 / m] * m + [1 / n] * n).fun
    there = (torch.ones(1, m, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool))
    problem = torch.from_numpy(costs)[None]
    ipot = transport_plan(problem, *there, beta=0.1, iterations=500)[0]
    assert ipot.sum(dim=1).tolist() == pytest.approx([1 / m] * m, abs=1e-3)
    assert ipot.sum(dim=0).tolist() == pytest.approx([1 / n] * n, abs=1e-12)
    assert (ipot.numpy() * costs).sum() == pytest.approx(exact, rel=0.01, abs=1e-3)
    cold = transport_plan(problem, *there, method="sinkhorn", beta=0.002, iterations=3000)[0]
    assert (cold.numpy() * costs).sum() == pytest.approx(exact, rel=0.02, abs=2e-3)


def test_ipot_with_the_constants_of_the_paper_has_its_marginals() -> None:
    costs = torch.rand(8, 24, 6, generator=torch.Generator().manual_seed(0)) * 2
    there = (torch.ones(8, 24, dtype=torch.bool), torch.ones(8, 6, dtype=torch.bool))
    plan = transport_plan(costs, *there)
    assert (plan.sum(dim=2) - 1 / 24).abs().max() < 1e-3
    assert (plan.sum(dim=1) - 1 / 6).abs().max() < 1e-6


@pytest.mark.parametrize("scheme", ["all", "first_n"])
def test_the_order_of_a_set_its_padding_and_its_neighbours_change_nothing(scheme: str) -> None:
    logits, sets, empty = random_case(7)
    logits[0] = 0.0  # all assignments tie
    embeddings = torch.randn(
        logits.shape[2], 4, generator=torch.Generator().manual_seed(0)
    ).double()

    def both(rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                set_cross_entropy(rows, given, empty=empty, scheme=scheme),
                transport_loss(rows, given, embeddings, scheme=scheme),
            ]
        )

    expected = both(logits, sets)
    assert (sets >= 0).sum(dim=1).max() > 1
    for seed in range(5):
        order = torch.randperm(sets.shape[1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(both(logits, sets[:, order]), expected, rtol=0, atol=0)
    wide = torch.nn.functional.pad(sets, (3, 2), value=-1)
    torch.testing.assert_close(both(logits, wide), expected)
    alone = [both(logits[i : i + 1], sets[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(torch.cat(alone, dim=1), expected)
    torch.testing.assert_close(both(logits.flip(0), sets.flip(0)), expected.flip(1))


def test_the_order_changes_a_plain_cross_entropy() -> None:
    """What the set loss is for."""
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]])
    one, other = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    plain = [
        torch.nn.functional.cross_entropy(logits[0], order[0]).item() for order in (one, other)
    ]
    assert plain[1] > plain[0] + 2
    found = [set_cross_entropy(logits, order, empty=2).item() for order in (one, other)]
    assert found == [pytest.approx(plain[0]), pytest.approx(plain[0])]


def test_schemes_and_weights_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]])
    sets = torch.tensor([[0, -1]])
    probs = logits.softmax(dim=2)
    assert assign(probs, sets, empty=2).tolist() == [[2, 0]]
    assert assign(probs, sets, empty=2, scheme="first_n").tolist() == [[0, 2]]
    far, near = -probs[0, 0, 2].log(), -probs[0, 1, 0].log()
    expected = (0.2 * far + near) / 1.2
    assert set_cross_entropy(logits, sets, empty=2).item() == pytest.approx(expected.item())
    heavier = set_cross_entropy(logits, sets, empty=2, empty_weight=1.0)
    assert heavier.item() == pytest.approx(((far + near) / 2).item())


def test_nothing_at_all_is_worth_nothing() -> None:
    embeddings = torch.eye(3)
    for rows, steps, places in ((0, 2, 2), (0, 0, 0), (2, 0, 0), (2, 0, 1)):
        logits = torch.zeros(rows, steps, 3, requires_grad=True)
        sets = torch.full((rows, places), -1)
        for loss in (
            set_cross_entropy(logits, sets, empty=2),
            set_cross_entropy(logits, sets, empty=2, scheme="first_n"),
            transport_loss(logits, sets, embeddings),
        ):
            loss.sum().backward()
            assert loss.tolist() == [0.0] * rows
    logits = torch.zeros(2, 2, 3, requires_grad=True)
    for sets in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.long)):
        loss = set_cross_entropy(logits, sets, empty=1)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.tolist() == pytest.approx([np.log(3)] * 2)
        assert gradient[:, :, 1].tolist() == [[pytest.approx(-1 / 3)] * 2] * 2
        assert set_cross_entropy(logits, sets, empty=1, empty_weight=0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    """A softmax before a logarithm would be -inf here."""
    logits = (torch.tensor([[[1.0, -1.0, 0.0], [1.0, -1.0, 0.0]]]) * 1e4).to(dtype).requires_grad_()
    sets = torch.tensor([[1, 0]])
    losses = set_cross_entropy(logits, sets, empty=2) + transport_loss(logits, sets, torch.eye(3))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(10000.5, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.isfinite(logits.grad).all()


def test_embeddings_of_length_zero_and_near_ties_stay_finite() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    loss = transport_loss(logits, torch.tensor([[0, 1]]), torch.zeros(3, 2))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1.0)
    assert not logits.grad.any()
    plan = transport_plan(
        torch.full((1, 2, 2), 1e4), torch.ones(1, 2).bool(), torch.ones(1, 2).bool(), beta=0.01
    )
    assert plan.flatten().tolist() == pytest.approx([0.25] * 4)  # exp(-1e6) is 0, its logarithm not


def test_masks_without_a_partner_get_no_mass() -> None:
    costs = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[True, True], [True, False], [False, False]])
    columns = torch.tensor([[False, False], [True, True], [True, False]])
    for method in ("ipot", "sinkhorn"):
        plan = transport_plan(costs, rows, columns, method=method)
        assert plan[0].tolist() == plan[2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert plan[1].flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])


def test_what_cannot_be_is_refused() -> None:
    logits = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match="row 1 has 2 labels, but the decoder writes 1"):
        set_cross_entropy(logits, torch.tensor([[0, -1], [0, 1]]), empty=2)
    with pytest.raises(ValueError, match="label 3 is outside the 3 outputs"):
        transport_loss(logits, torch.tensor([[3], [0]]), torch.eye(3))
    with pytest.raises(ValueError, match=r"empty must be an index of the 3 outputs.*got 3"):
        set_cross_entropy(logits, torch.tensor([[0], [0]]), empty=3)
    with pytest.raises(ValueError, match="label 2 of row 1 is the index that says"):
        set_cross_entropy(logits, torch.tensor([[0], [2]]), empty=2)
    ones = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"beta must be above 0; got 0\.0"):
        transport_plan(torch.zeros(1, 1, 1), ones, ones, beta=0.0)
    with pytest.raises(ValueError, match="iterations must be at least 1; got 0"):
        transport_plan(torch.zeros(1, 1, 1), ones, ones, iterations=0)


def test_autocast_does_not_coarsen_the_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, embeddings = (
        torch.randn(2, 3, 50, generator=generator),
        torch.randn(50, 8, generator=generator),
    )
    sets = torch.tensor([[4, 7, -1], [-1, 30, -1]])
    plain = transport_loss(logits, sets, embeddings), set_cross_entropy(logits, sets, empty=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = transport_loss(logits, sets, embeddings), set_cross_entropy(logits, sets, empty=0)
    assert all(torch.equal(*pair) for pair in zip(plain, coarse, strict=True))


def test_a_network_that_broke_has_a_loss_of_nan_and_its_neighbours_have_theirs() -> None:
    logits = torch.zeros(2, 2, 3)
    logits[0, 1, 1] = torch.nan
    sets = torch.tensor([[0, 1], [1, -1]])
    for losses in (
        set_cross_entropy(logits, sets, empty=2),
        transport_loss(logits, sets, torch.eye(3)),
    ):
        assert losses.isnan().tolist() == [True, False]
