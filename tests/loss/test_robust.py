import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import losses as reference
from reference import soft as soft_reference

from llmlabel.loss import soft
from llmlabel.loss.robust import TargetMemory, early_learning_loss, early_learning_penalty


def names(rows: int) -> list[str]:
    return [f"row {i}" for i in range(rows)]


def random_logits(rng: np.random.Generator, rows: int, labels: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 3, (rows, labels)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("top_k", [None, 2])
def test_three_steps_equal_the_twin_in_value_memory_and_gradient(
    top_k: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, labels, beta = 6, int(rng.integers(2, 7)), float(rng.random())
    memory = TargetMemory(names(rows), labels, beta=beta, top_k=top_k)
    expected = [[0.0] * labels for _ in range(rows)]
    targets = torch.from_numpy(rng.dirichlet(np.ones(labels), rows))
    for _ in range(3):
        index = torch.from_numpy(rng.permutation(rows)[: int(rng.integers(1, rows))])
        logits = random_logits(rng, len(index), labels).requires_grad_()
        losses = early_learning_loss(logits, targets[index], index, memory, penalty_weight=2.0)
        losses.sum().backward()
        for place, row in enumerate(index.tolist()):
            z = logits[place].tolist()
            expected[row] = reference.early_learning_step(expected[row], z, beta)
            if top_k:
                expected[row] = reference.largest(expected[row], top_k)

            def loss(y: list[float], row: int = row) -> float:
                penalty = reference.early_learning_penalty(y, expected[row])
                return soft_reference.soft_cross_entropy(y, targets[row].tolist()) + 2 * penalty

            assert losses[place].item() == pytest.approx(loss(z), rel=1e-5, abs=1e-6)
            slope = soft_reference.slope(loss, z)
            assert logits.grad[place].tolist() == pytest.approx(slope, rel=1e-4, abs=1e-4)
        found = memory.read(torch.arange(rows))
        torch.testing.assert_close(
            found.double(), torch.tensor(expected).double(), atol=2e-7, rtol=1e-5
        )


@pytest.mark.parametrize("multilabel", [False, True])
def test_gradients_of_the_penalty(multilabel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator).double().requires_grad_()
    targets = torch.rand(4, 5, generator=generator).double().softmax(dim=1)
    assert torch.autograd.gradcheck(
        lambda z: early_learning_penalty(z, targets, multilabel=multilabel), logits
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_penalty_of_events_equals_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = random_logits(rng, 3, 4), torch.from_numpy(rng.random((3, 4)))
    found = early_learning_penalty(logits, targets, multilabel=True)
    for i in range(3):
        twin = reference.early_learning_penalty_of_events(logits[i].tolist(), targets[i].tolist())
        assert found[i].item() == pytest.approx(twin, rel=1e-12)


def test_without_a_weight_it_is_the_cross_entropy() -> None:
    logits = random_logits(np.random.default_rng(0), 4, 3)
    targets = torch.eye(3).double()[[0, 1, 2, 0]]
    for multilabel, loss in ((False, soft.soft_cross_entropy), (True, soft.binary_cross_entropy)):
        memory = TargetMemory(names(4), 3, multilabel=multilabel)
        found = early_learning_loss(logits, targets, torch.arange(4), memory, penalty_weight=0.0)
        torch.testing.assert_close(found, loss(logits, targets))


def test_the_penalty_pulls_towards_the_target_and_against_a_wrong_label() -> None:
    """Gradient descent on the penalty alone raises the target's label: the sign of lambda."""
    logits = torch.zeros(1, 3, requires_grad=True)
    penalty = early_learning_penalty(logits, torch.tensor([[0.9, 0.05, 0.05]]))
    (gradient,) = torch.autograd.grad(penalty.sum(), logits)
    assert gradient[0, 0] < 0 < gradient[0, 1]
    agreed = early_learning_penalty(
        torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.9, 0.05, 0.05]])
    )
    assert agreed.item() < penalty.item() < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_certain_prediction_stays_finite_in_half_precision(dtype: torch.dtype) -> None:
    """1 - 1e-4 is 1 in bfloat16, and log(1 - 1) is -inf."""
    memory = TargetMemory(names(2), 3, beta=0.0)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]]).to(dtype).requires_grad_()
    losses = early_learning_loss(logits, torch.eye(3)[[0, 1]], torch.arange(2), memory)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()
    assert losses[0].item() == pytest.approx(3 * math.log(1 - 0.9999 * 0.9999 / 1.0001), rel=1e-3)
    assert memory.targets.dtype == torch.float32
    assert memory.read(torch.tensor([0]))[0, 0].item() == pytest.approx(0.9999 / 1.0001, rel=1e-6)


def test_many_labels_do_not_drown_the_prediction_in_the_clamp() -> None:
    labels = 20000
    logits = torch.zeros(1, labels)
    logits[0, 7] = 20.0
    memory = TargetMemory(names(1), labels, beta=0.0, top_k=5)
    target = memory.update(logits, torch.tensor([0]))
    assert target[0, 7].item() == pytest.approx(1 / 1.01, rel=1e-3)
    assert sum(b.numel() * b.element_size() for b in (memory.targets, memory.ids)) == 40


def test_a_full_top_k_equals_the_dense_memory() -> None:
    rng = np.random.default_rng(3)
    dense, sparse = TargetMemory(names(5), 6), TargetMemory(names(5), 6, top_k=6)
    for _ in range(3):
        index = torch.from_numpy(rng.permutation(5)[:3])
        logits = random_logits(rng, 3, 6)
        torch.testing.assert_close(dense.update(logits, index), sparse.update(logits, index))
    given = torch.from_numpy(rng.integers(0, 6, 5))
    assert dense.suspects(given).tolist() == sparse.suspects(given).tolist()


@pytest.mark.parametrize("multilabel", [False, True])
def test_batches_and_their_order_change_nothing_and_filling_rows_neither(multilabel: bool) -> None:
    rng = np.random.default_rng(1)
    logits = random_logits(rng, 6, 4)
    whole, parts = (TargetMemory(names(6), 4, multilabel=multilabel) for _ in range(2))
    targets = torch.eye(4).double()[[0, 1, 2, 3, 0, 1]]
    for _ in range(2):
        together = early_learning_loss(logits, targets, torch.arange(6), whole)
        for index in (torch.tensor([5, 2]), torch.tensor([0, 4, 1, 3])):
            filled = torch.cat([index, torch.tensor([-1, -1])])
            found = early_learning_loss(logits[filled], targets[filled], filled, parts)
            torch.testing.assert_close(found[:-2], together[index])
            alone = soft.binary_cross_entropy if multilabel else soft.soft_cross_entropy
            torch.testing.assert_close(found[-2:], alone(logits[[-1, -1]], targets[[-1, -1]]))
    torch.testing.assert_close(whole.targets, parts.targets, rtol=0, atol=1e-7)
    assert early_learning_loss(logits[:0], targets[:0], torch.arange(0), whole).shape == (0,)


def test_events_start_at_what_was_first_predicted() -> None:
    memory = TargetMemory(names(2), 2, beta=0.5, multilabel=True)
    first = memory.update(torch.tensor([[2.0, -2.0]]), torch.tensor([1]))
    assert first[0].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)
    second = memory.update(torch.tensor([[-2.0, -2.0]]), torch.tensor([1]))
    assert second[0].tolist() == pytest.approx([0.5, 0.119203], abs=1e-6)
    assert memory.seen.tolist() == [False, True]
    with pytest.raises(ValueError, match="one label"):
        memory.suspects(torch.zeros(2, dtype=torch.long))


def test_suspects_are_seen_rows_whose_target_is_another_label() -> None:
    memory = TargetMemory(names(4), 3)
    memory.update(torch.eye(3) * 5, torch.tensor([0, 1, 3]))
    assert memory.suspects(torch.tensor([0, 0, 1, -1])).tolist() == [False, True, False, False]


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_checkpoint_restores_the_memory_and_is_bound_to_its_rows(
    top_k: int | None, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    memory = TargetMemory(["a", "b", "c"], 3, top_k=top_k)
    memory.update(torch.eye(3), torch.tensor([2, 0, 1]))
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    state = load_file(tmp_path / "memory.safetensors")
    restored = TargetMemory(["a", "b", "c"], 3, top_k=top_k)
    restored.load_state_dict(state)
    again = [m.update(torch.eye(3).flip(0), torch.arange(3)) for m in (memory, restored)]
    assert torch.equal(*again)
    assert again[0].sum() > 0.4
    for others in (["a", "c", "b"], ["a", "b"], ["a", "b", "c", "d"], ["ab", "", "c"]):
        with pytest.raises(
            ValueError, match=f"3 rows that are not the {len(others)} training rows"
        ):
            TargetMemory(others, 3, top_k=top_k).load_state_dict(state)


def test_what_cannot_be_is_refused() -> None:
    memory = TargetMemory(names(3), 2)
    with pytest.raises(ValueError, match="row 1 occurs twice"):
        memory.update(torch.zeros(3, 2), torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="row 3 is outside the target memory of 3 rows"):
        memory.update(torch.zeros(1, 2), torch.tensor([3]))
    assert not memory.targets.any()
    with pytest.raises(ValueError, match=r"beta.* got 1\.0"):
        TargetMemory(names(3), 2, beta=1.0)
    with pytest.raises(ValueError, match="top_k must be from 1 to the 2 labels; got 3"):
        TargetMemory(names(3), 2, top_k=3)
    with pytest.raises(ValueError, match="top_k is for one label a row"):
        TargetMemory(names(3), 2, top_k=1, multilabel=True)


def toy(seed: int, penalty_weight: float) -> dict[str, float]:
    """10 Gaussian classes in 64 dimensions, 1,000 points, 40 % of the labels wrong, an MLP."""
    draw = torch.Generator().manual_seed(seed)
    means = 0.43 * torch.randn(10, 64, generator=draw)

    def points(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (rows,), generator=draw)
        return means[labels] + torch.randn(rows, 64, generator=draw), labels

    (train, true), (test, expected) = points(1000), points(1000)
    wrong = torch.rand(1000, generator=draw) < 0.4
    given = torch.where(wrong, (true + torch.randint(1, 10, (1000,), generator=draw)) % 10, true)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
        )
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    memory = TargetMemory(names(1000), 10, beta=0.7)
    targets = torch.nn.functional.one_hot(given, 10).float()
    accuracies = []
    for _ in range(60):
        for index in torch.randperm(1000, generator=draw).split(128):
            logits = network(train[index])
            loss = early_learning_loss(
                logits, targets[index], index, memory, penalty_weight=penalty_weight
            )
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        accuracies.append((network(test).argmax(dim=1) == expected).float().mean().item())
    suspects = memory.suspects(given)
    return {
        "final": accuracies[-1],
        "best": max(accuracies),
        "memorised": (network(train).argmax(dim=1) == given)[wrong].float().mean().item(),
        "precision": wrong[suspects].float().mean().item(),
        "recall": suspects[wrong].float().mean().item(),
    }


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_early_learning_regularisation_prevents_memorisation(seed: int) -> None:
    """The final epoch decides: at their best the two are alike, and nobody knows which that is."""
    plain, regular = toy(seed, 0.0), toy(seed, 3.0)
    assert plain["memorised"] > 0.98
    assert plain["final"] < plain["best"] - 0.15
    assert regular["final"] >= plain["final"] + 0.15
    assert regular["final"] > regular["best"] - 0.06
    assert regular["memorised"] < 0.2
    assert regular["precision"] > 0.9
    assert regular["recall"] > 0.85


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_prediction_that_is_not_finite_changes_no_target(top_k: int | None, bad: float) -> None:
    memory, other = (TargetMemory(names(3), 4, top_k=top_k) for _ in range(2))
    logits = random_logits(np.random.default_rng(0), 3, 4).float()
    for one in (memory, other):
        one.update(logits, torch.arange(3))
    broken = logits.clone()
    broken[1, 2] = bad
    found = memory.update(broken, torch.tensor([0, 1, -1]))
    other.update(logits[:1], torch.tensor([0]))
    assert torch.equal(memory.read(torch.arange(3)), other.read(torch.arange(3)))
    assert torch.equal(found[:2], other.read(torch.arange(2)))
    fresh = TargetMemory(names(2), 4, top_k=top_k)
    fresh.update(broken[:2], torch.arange(2))
    assert fresh.seen.tolist() == [True, False]
    assert not fresh.read(torch.tensor([1])).any()


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("top_k", [None, 2])
def test_what_was_looked_at_is_kept_only_when_told(top_k: int | None, multilabel: bool) -> None:
    top_k = None if multilabel else top_k
    looks, updates = (
        TargetMemory(names(4), 3, top_k=top_k, multilabel=multilabel) for _ in range(2)
    )
    rng = np.random.default_rng(5)
    for _ in range(3):
        logits = random_logits(rng, 4, 3)
        expected = updates.update(logits, torch.tensor([2, 0, -1, 3]))
        found = [
            looks.look(logits[[i]], torch.tensor([row])) for i, row in enumerate([2, 0, -1, 3])
        ]
        assert torch.equal(torch.cat(found), expected)
        looks.keep()
        before = {name: value.clone() for name, value in looks.state_dict().items()}
        looks.look(-logits, torch.arange(4))  # an update that fails
        looks.synchronize()
        looks.keep()
        for one in (before, updates.state_dict()):
            for name, value in looks.state_dict().items():
                assert torch.equal(value, one[name])


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_stored_targets_are_the_targets(top_k: int | None) -> None:
    memory = TargetMemory(names(5), 6, top_k=top_k)
    rng = np.random.default_rng(0)
    for _ in range(3):
        memory.update(random_logits(rng, 4, 6), torch.tensor([0, 1, 2, 4]))
    stored = memory.stored()
    assert stored.has_canonical_format
    assert np.array_equal(stored.toarray(), memory.read(torch.arange(5)).numpy())
    assert np.diff(stored.indptr).tolist() == [top_k or 6] * 3 + [0, top_k or 6]
