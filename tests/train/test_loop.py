"""The loop on a network of one layer: every number of it can be computed by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.train import checkpoint, loop
from llmlabel.train.batches import passes, update_batches
from llmlabel.train.loop import Fitted, Objective, fit
from llmlabel.train.network import padded
from llmlabel.train.settings import settle

ROWS, LABELS, WIDTH = 30, 3, 6


class Killed(Exception):
    pass


class Counting:
    """A memory that adds up which rows were seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(ROWS)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()

    def synchronize(self) -> None:
        self.told = self.seen.clone()


def objective(*, dropout: float = 0.0, dies_at: int | None = None, **given: Any) -> Objective:
    """Softmax regression on bags of tokens; `dies_at` raises in a certain call of the losses."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, WIDTH, size=rng.integers(1, 9)).tolist() for _ in range(ROWS)]
    targets = torch.from_numpy(rng.dirichlet(np.ones(LABELS), size=ROWS))
    torch.manual_seed(0)
    embedding = torch.nn.EmbeddingBag(WIDTH, 8, mode="sum")
    head = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(8, LABELS))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = embedding, head

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.embedding(ids, per_sample_weights=mask.float()))

    memory = Counting()
    calls = iter(range(10_000))

    def losses(logits: Tensor, chosen: list[int]) -> Tensor:
        if next(calls) == dies_at:
            raise Killed
        memory.seen[chosen] += 1
        return soft_cross_entropy(logits, targets[chosen].to(logits))

    network = Network()
    return Objective(
        **{
            "network": network,
            "groups": [
                {"params": list(embedding.parameters()), "lr": 0.05},
                {"params": list(head.parameters()), "lr": 0.1},
            ],
            "ids": [f"r{i}" for i in range(ROWS)],
            "lengths": [len(ids) for ids in tokens],
            "weights": rng.uniform(0.5, 2.0, ROWS),
            "inputs": lambda chosen: padded([tokens[row] for row in chosen]),
            "losses": losses,
            "memory": memory,
            **given,
        }
    )


def settings(**given: Any) -> dict[str, Any]:
    small = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "dtype": "float32"}
    return settle({**small, **given})


def trained(one: Objective, output: Path, **given: Any) -> dict[str, Tensor]:
    fit(one, settings(**given), name="test", key="k", output=output)
    return {name: p.detach().clone() for name, p in one.network.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=atol, rtol=0.0, msg=name)


# ------------------------------------------------------------------------------------ one update


def test_the_first_updates_equal_adam_by_hand(tmp_path: Path) -> None:
    given = {"max_grad_norm": 0.3, "warmup_ratio": 0.0, "per_device_train_batch_size": ROWS}
    one = objective()
    got = trained(one, tmp_path, num_train_epochs=4, **given)

    two = objective()
    optimizer = torch.optim.AdamW(two.groups, weight_decay=0.01)
    weights = torch.from_numpy(two.weights)
    for update in range(4):
        for group, rate in zip(optimizer.param_groups, (0.05, 0.1), strict=True):
            group["lr"] = rate * (4 - update) / 3 if update else rate
        rows = list(range(ROWS))
        values = two.losses(two.network(*two.inputs(rows)), rows)
        ((weights * values).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(two.network.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    same({k: p.detach() for k, p in two.network.named_parameters()}, got, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"pass_tokens": 1},
        {"pass_tokens": 10},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_passes_and_accumulation_change_nothing(tmp_path: Path, given: dict[str, int]) -> None:
    same(trained(objective(), tmp_path / "a"), trained(objective(), tmp_path / "b", **given), 1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_every_row_once_an_epoch_and_passes_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 50, size=rng.integers(1, 200)).tolist()
    size, most = int(rng.integers(1, 20)), int(rng.integers(1, 200))
    given = {"seed": seed, "per_device_train_batch_size": size, "pass_tokens": most}
    per_epoch = -(-len(lengths) // size)
    batches = list(update_batches(lengths, size, given, 2 * per_epoch))
    assert len(batches) == 2 * per_epoch
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(len(lengths)))
    for batch in batches:
        parts = list(passes(batch, lengths, given))
        assert [row for part in parts for row in part] == batch
        for part in parts:
            longest = max(lengths[row] for row in part)
            assert len(part) <= size
            assert len(part) == 1 or len(part) * longest <= most
        for part, after in pairwise(parts):  # no pass could have been larger
            more = [*part, after[0]]
            longest = max(lengths[row] for row in more)
            assert len(more) > size or len(more) * longest > most


def test_rows_of_an_update_have_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=640).tolist()
    [sorted_waste, random_waste] = [
        np.mean([max(lengths[i] for i in batch) for batch in batches])
        for batches in (
            list(update_batches(lengths, 16, {"seed": 0}, 40)),
            np.random.default_rng(1).permutation(640).reshape(40, 16).tolist(),
        )
    ]
    assert sorted_waste < 0.7 * random_waste


def test_max_steps_ends_early_and_shortens_the_schedule(tmp_path: Path) -> None:
    one = objective()
    done = fit(one, settings(max_steps=5), name="test", key="k", output=tmp_path)
    assert (done.updates, len(done.losses)) == (5, 1)
    assert one.memory.seen.sum() == 4 * 4 + 2  # one batch of the 30 rows is short, and here it came


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dies_at", [1, 5, 8, 13, 23])
def test_a_killed_training_continues_to_the_same_bits(tmp_path: Path, dies_at: int) -> None:
    """In the middle of an epoch too, with dropout, a memory and a best epoch."""
    given = {"save_steps": 1, "lr_scheduler_type": "cosine"}

    def validate(network: torch.nn.Module) -> dict[str, float]:
        return {"loss": float(next(p for p in network.parameters()).abs().sum())}

    more = {"dropout": 0.3, "validate": validate}
    undisturbed = objective(**more)
    whole = trained(undisturbed, tmp_path / "whole", **given)
    with pytest.raises(Killed):
        trained(objective(**more, dies_at=dies_at), tmp_path / "killed", **given)
    again = objective(**more)
    same(whole, trained(again, tmp_path / "killed", **given))
    assert torch.equal(again.memory.seen, undisturbed.memory.seen)
    assert torch.equal(again.memory.seen, torch.full((ROWS,), 3.0))


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(objective(dies_at=9), tmp_path / "k", save_steps=1)
    for given in ({"learning_rate": 1.0}, {"seed": 1}):
        other = trained(objective(), tmp_path / "k", save_steps=1, **given)
        same(trained(objective(), tmp_path / "whole", save_steps=1, **given), other)
    file = tmp_path / "k" / checkpoint.NAME
    file.write_bytes(file.read_bytes()[:100])
    same(trained(objective(), tmp_path / "o"), trained(objective(), tmp_path / "k", save_steps=1))


def test_a_checkpoint_of_fewer_processes_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their updates had fewer rows, so that some rows would have no part in the epoch."""
    with pytest.raises(Killed):
        trained(objective(dies_at=9), tmp_path, save_steps=1)
    alone = loop._accelerator

    class First:
        """What the first of two processes is told; the other one's rows are lost."""

        num_processes = 2

        def __init__(self, *given: Any) -> None:
            self.real = alone(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    monkeypatch.setattr(loop, "_accelerator", First)
    again, fresh = objective(), objective()
    same(trained(fresh, tmp_path / "fresh"), trained(again, tmp_path))
    assert torch.equal(again.memory.seen, fresh.memory.seen)
    assert int(again.memory.seen.sum()) == 3 * 15  # its half of each epoch


def test_the_launcher_does_not_decide_how_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    plain = trained(objective(), tmp_path / "plain", max_grad_norm=0.01)
    for number, (name, value) in enumerate(
        [("GRADIENT_ACCUMULATION_STEPS", "1000"), ("MIXED_PRECISION", "bf16")]
    ):
        with monkeypatch.context() as launched:
            launched.setenv(f"ACCELERATE_{name}", value)
            AcceleratorState._reset_state(reset_partial_state=True)
            given = {"max_grad_norm": 0.01}
            same(plain, trained(objective(), tmp_path / str(number), **given))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_only_what_changes_the_result_must_be_the_same(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(objective(dies_at=9), tmp_path, save_steps=1)
    again = objective()
    trained(again, tmp_path, save_steps=3, logging_steps=1)
    assert again.memory.seen.sum() == 3 * ROWS  # those before the kill came with the checkpoint


# ------------------------------------------------------------------------------ what may go wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_keeps_the_weights(tmp_path: Path, value: float) -> None:
    one = objective()
    sane = one.losses

    def losses(logits: Tensor, chosen: list[int]) -> Tensor:
        found = sane(logits, chosen)
        return found * value if 7 in chosen and one.memory.seen[7] == 2 else found

    one.losses = losses
    with pytest.raises(
        ValueError, match=rf"test: the loss is {value} in update (9|1\d), .*'r7'"
    ) as e:
        trained(one, tmp_path)
    assert "\n" not in str(e.value)
    assert "lower learning_rate" in str(e.value)
    parts, story = checkpoint.load(tmp_path, key=kept_key(tmp_path))
    assert story["updates"] == 8 + story["updates"] % 8
    for name, parameter in one.network.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parts["now"][name], parameter)


def kept_key(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / checkpoint.NAME, framework="pt") as found:
        return found.metadata()["key"]


def test_a_gradient_that_is_no_number_stops(tmp_path: Path) -> None:
    one = objective()

    def losses(logits: Tensor, chosen: list[int]) -> Tensor:
        return (logits * 0).sum(dim=1).sqrt()  # 0 with an infinite slope

    one.losses = losses
    with pytest.raises(ValueError, match="the gradient is not finite in update 1"):
        trained(one, tmp_path)


# ------------------------------------------------------------------------------------ validation


def test_the_best_epoch_is_kept_and_no_better_one_stops(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 1.5, 0.0])
    weights: list[dict[str, Tensor]] = []

    def validate(network: torch.nn.Module) -> dict[str, float]:
        assert not network.training
        weights.append({k: p.detach().clone() for k, p in network.named_parameters()})
        return {"loss": next(values), "accuracy": 0.5}

    one = objective(validate=validate)
    given = settings(num_train_epochs=5, early_stopping_patience=2)
    done = fit(one, given, name="test", key="k", output=tmp_path)
    assert [numbers["loss"] for numbers in done.validation] == [3.0, 1.0, 2.0, 1.5]
    assert done.best_epoch == 1
    same(weights[1], {k: p.detach() for k, p in one.network.named_parameters()})
    assert one.network.training


def test_a_validation_loss_that_is_no_number_is_never_the_best() -> None:
    nan = float("nan")
    for values, best in (([2.0, nan, 1.0, nan], 2), ([nan, 3.0], 1), ([nan, nan], 0)):
        assert Fitted(validation=[{"loss": value} for value in values]).best_epoch == best
    assert Fitted().best_epoch is None


def test_the_curve_goes_to_a_tracker(tmp_path: Path) -> None:
    fit(
        objective(),
        settings(report_to="tensorboard", logging_steps=1),
        name="t",
        key="k",
        output=tmp_path,
    )
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_an_epoch_s_loss_is_the_mean_by_weight(tmp_path: Path) -> None:
    one = objective()
    done = fit(
        one,
        settings(num_train_epochs=1, per_device_train_batch_size=ROWS),
        name="test",
        key="k",
        output=tmp_path,
    )
    two = objective()
    values = two.losses(two.network(*two.inputs(list(range(ROWS)))), list(range(ROWS)))
    expected = np.average(values.detach().numpy(), weights=two.weights)
    assert done.losses == pytest.approx([expected], rel=1e-6)
    assert json.loads(json.dumps(vars(done)))["updates"] == 1
