"""The loop of every training: updates, any number of processes, checkpoints, validation.

An update takes `per_device_train_batch_size` x `gradient_accumulation_steps` rows of every process,
rows of similar length, in passes of at most `pass_tokens` padded tokens. Its loss is divided by the
weights of all its rows, so that neither the passes nor the number of processes change the result.
What is random in an update comes from a seed of its own: a run that continues from a checkpoint ends
as one that was never disturbed.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llmlabel import models, progress
from llmlabel.loss.soft import weighted_mean
from llmlabel.train import checkpoint, shards
from llmlabel.train.batches import passes, update_batches
from llmlabel.train.settings import NO_RESULT, learning_rate_factor, number_format

_SAVE_SECONDS = 60.0


@runtime_checkable
class Memory(Protocol):
    """What a loss remembers, such as the targets of early-learning regularization."""

    def state_dict(self) -> Any:
        """What a checkpoint keeps: tensors by name."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """The opposite."""

    def synchronize(self) -> None:
        """Tells each process what the others saw; after every epoch and before a checkpoint."""


@dataclass(frozen=True)
class Update:
    """What is asked of `Objective.gradient`."""

    accelerator: Any
    number: int
    """Counted from 0."""
    rows: list[int]
    """Of all processes, in one order."""
    total: float
    """Their weight."""


@dataclass(eq=False)
class Objective:
    """What is trained, and by what."""

    network: torch.nn.Module
    groups: list[dict[str, Any]]
    """Parameters that are trained, with the `lr` of each group."""
    ids: Sequence[str]
    """Of the rows."""
    lengths: Sequence[int]
    """Tokens of each row."""
    weights: Float[np.ndarray, " rows"]
    inputs: Callable[[list[int]], tuple[Tensor, ...]] | None
    """Rows -> what the network takes, padded."""
    losses: Callable[[Any, list[int]], Float[Tensor, " some"]] | None
    """What the network gave, rows -> the loss of each."""
    memory: Memory | None = None
    after_update: Callable[[], None] | None = None
    """Called by all processes when the weights have changed."""
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None
    """The network -> numbers of the validation rows; the lowest `loss` is kept."""
    gradient: Callable[[Update], Float[Tensor, ""]] | None = None
    """In the place of `inputs` and `losses`, where the loss of a row depends on the other rows: adds
    the whole gradient of an update, in each of the processes, and gives its share of the summed loss.
    It calls the network's parts, not the network."""


@dataclass
class Fitted:
    """What a training went through; a checkpoint holds it."""

    updates: int = 0
    losses: list[float] = field(default_factory=list)
    """The mean of every epoch."""
    validation: list[dict[str, float]] = field(default_factory=list)
    """After every epoch."""
    epoch_loss: float = 0.0
    """Of the epoch that is not over, times weight."""
    epoch_weight: float = 0.0
    """Of its rows."""
    processes: int = 1
    is_main: bool = True
    """Whether this process writes the model."""

    @property
    def best_epoch(self) -> int | None:
        """Counted from 0; the first of equal ones."""
        values = [numbers["loss"] for numbers in self.validation]
        return int(np.argmin(np.nan_to_num(values, nan=np.inf))) if values else None

    def is_over(self, patience: int | None) -> bool:
        """Whether the validation loss has not become better for so many epochs."""
        best = self.best_epoch
        if patience is None or best is None:
            return False
        return len(self.validation) - 1 - best >= patience


def fit(
    objective: Objective, settings: dict[str, Any], *, name: str, key: str, output: Path
) -> Fitted:
    """Trains in place, and ends with the weights of the best epoch where there is a validation.

    Args:
        objective: what is trained.
        settings: see `settle`.
        name: of the training, for progress and errors.
        key: stands for everything that the result depends on besides the settings; a checkpoint of
            another one is not continued.
        output: folder of the checkpoint, which all processes must see; `checkpoint.remove` does.

    Raises:
        ValueError: a loss or a gradient is no finite number.
    """
    accelerator = _accelerator(settings, name, output)
    shards.divide_by_layer(accelerator, objective.network)
    if objective.gradient is not None and accelerator.is_fsdp2:
        raise ValueError(
            f"{name}: its weights cannot be divided by FSDP; launch with recipes/accelerate/ddp.yaml"
        )
    optimizer = torch.optim.AdamW(objective.groups, weight_decay=settings["weight_decay"])
    rates = [group["lr"] for group in optimizer.param_groups]
    wrapped, optimizer = accelerator.prepare(objective.network, optimizer)
    key = _key(key, settings, accelerator.num_processes)
    run = _Run(objective, settings, name, key, output, accelerator, wrapped, optimizer)
    run.go_on()
    update_rows = (
        settings["per_device_train_batch_size"]
        * settings["gradient_accumulation_steps"]
        * accelerator.num_processes
    )
    rows = len(objective.lengths)
    per_epoch = -(-rows // update_rows)
    steps = settings["num_train_epochs"] * per_epoch
    if settings["max_steps"] > 0:
        steps = min(steps, settings["max_steps"])
    wrapped.train()
    done = run.fitted.updates
    with progress.task(name, steps, "updates") as advance:
        advance(done)
        for update, chosen in enumerate(
            update_batches(objective.lengths, update_rows, settings, steps)
        ):
            if update < done:
                continue
            if update % per_epoch == 0 and run.fitted.is_over(settings["early_stopping_patience"]):
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(update, steps, settings)
            run.update(chosen)
            advance(1)
            if (update + 1) % per_epoch == 0 or update + 1 == steps:
                run.end_epoch()
            if run.is_due:
                run.save()
    run.keep_best()
    for tracker in accelerator.trackers:  # end_training would take the process group down as well
        tracker.finish()
    return run.fitted


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@dataclass(eq=False)
class _Run:
    objective: Objective
    settings: dict[str, Any]
    name: str
    key: str
    output: Path
    accelerator: Any
    wrapped: torch.nn.Module
    optimizer: Any
    fitted: Fitted = field(default_factory=Fitted)
    best: dict[str, Tensor] | None = None
    saved_at: float = field(default_factory=time.monotonic)
    is_due: bool = False

    def __post_init__(self) -> None:
        self.fitted.processes = self.accelerator.num_processes
        self.fitted.is_main = self.accelerator.is_main_process

    def update(self, chosen: list[int]) -> None:
        """One step of the optimizer over the rows of all processes."""
        accelerator, settings, number = self.accelerator, self.settings, self.fitted.updates
        torch.manual_seed(_seed(settings["seed"], number, accelerator.process_index))
        total = float(self.objective.weights[chosen].sum())
        if self.objective.gradient is None:
            summed = self._gradient(chosen, total)
        else:
            with accelerator.no_sync(self.wrapped):
                summed = self.objective.gradient(Update(accelerator, number, chosen, total))
        due = time.monotonic() - self.saved_at > _SAVE_SECONDS
        told = torch.stack([summed, torch.tensor(float(due), device=summed.device)])
        loss, some_due = accelerator.reduce(told, "sum").tolist()
        norm = self._clip()
        if not np.isfinite(loss) or not np.isfinite(norm):
            self.save()  # the weights before this update are good
            raise ValueError(self._said_of(chosen, loss))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.fitted.updates += 1
        self.fitted.epoch_loss += loss
        self.fitted.epoch_weight += total
        if self.objective.after_update is not None:
            self.objective.after_update()
        steps = settings["save_steps"]
        self.is_due = some_due > 0 if steps is None else self.fitted.updates % steps == 0
        if self.fitted.updates % settings["logging_steps"] == 0:
            rate = self.optimizer.param_groups[0]["lr"]
            values = {"loss": loss / total, "learning_rate": rate, "grad_norm": norm}
            accelerator.log(values, step=self.fitted.updates)

    def _gradient(self, chosen: list[int], total: float) -> Float[Tensor, ""]:
        """Adds the gradient of an update; the summed loss of this process's rows."""
        accelerator, objective, settings = self.accelerator, self.objective, self.settings
        if objective.inputs is None or objective.losses is None:
            raise TypeError("an objective needs inputs and losses, or a gradient")
        count = accelerator.num_processes
        dtype = number_format(settings["dtype"], accelerator.device)
        everyones = [
            list(passes(chosen[rank::count], objective.lengths, settings)) for rank in range(count)
        ]
        mine = everyones[accelerator.process_index]
        # Divided weights are put together by all processes at once, in every pass.
        least = max(map(len, everyones)) if accelerator.is_fsdp2 else 1
        mine += [[]] * (least - len(mine))
        summed = torch.zeros((), device=accelerator.device)
        for number, rows in enumerate(mine):
            is_last = number == len(mine) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
                # An idle process still joins the exchange: with somebody's row, and no loss.
                inputs = [
                    part.to(accelerator.device) for part in objective.inputs(rows or chosen[:1])
                ]
                with torch.autocast(
                    accelerator.device.type,
                    dtype=dtype,
                    enabled=dtype != torch.float32,
                ):
                    found = self.wrapped(*inputs)
                if rows:
                    weights = torch.from_numpy(objective.weights[rows])
                    values = objective.losses(found, rows)
                    loss = weighted_mean(values, weights.to(values), total=total)
                else:
                    loss = (found * 0).sum()
                # DDP and FSDP average over processes what should be a sum.
                accelerator.backward(loss * accelerator.num_processes)
            summed += loss.detach() * total
        return summed

    def _clip(self) -> float:
        """The length of the gradient, before it is cut."""
        longest = self.settings["max_grad_norm"] or float("inf")
        norm = self.accelerator.clip_grad_norm_(trained(self.wrapped).values(), longest)
        return float(norm)

    def _said_of(self, chosen: list[int], loss: float) -> str:
        ids = [repr(self.objective.ids[row]) for row in chosen]
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        what = "the gradient is not finite" if np.isfinite(loss) else f"the loss is {loss}"
        return (
            f"{self.name}: {what} in update {self.fitted.updates + 1}, of the rows with ids "
            f"{', '.join(ids[:8])}{more}; {self.output / checkpoint.NAME} keeps the weights before it; give "
            "a lower learning_rate or dtype=float32, or look at these rows"
        )

    def end_epoch(self) -> None:
        """Its mean loss, and how good the network is on the validation rows."""
        fitted, objective = self.fitted, self.objective
        fitted.losses.append(fitted.epoch_loss / fitted.epoch_weight)
        fitted.epoch_loss = fitted.epoch_weight = 0.0
        if objective.memory is not None:
            objective.memory.synchronize()
        if objective.validate is None:
            return
        self.wrapped.eval()
        with torch.inference_mode():
            numbers = objective.validate(self.wrapped)
        self.wrapped.train()
        # Processes must agree to the last bit on when to stop.
        told = torch.tensor(list(numbers.values()), dtype=torch.float32)
        agreed = self.accelerator.reduce(told.to(self.accelerator.device), "mean").tolist()
        fitted.validation.append(dict(zip(numbers, agreed, strict=True)))
        self.accelerator.log(
            {f"validation_{what}": value for what, value in fitted.validation[-1].items()},
            step=fitted.updates,
        )
        if fitted.best_epoch == len(fitted.validation) - 1:
            now = shards.gathered(self._weights())
            self.best = {what: value.cpu().clone() for what, value in now.items()}

    def keep_best(self) -> None:
        """Gives the network the weights of the best epoch; no process has a part of them only."""
        if self.best is not None:
            self._give(self.best)
        shards.make_whole(self.accelerator.unwrap_model(self.wrapped), self._weights())

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        network = self.accelerator.unwrap_model(self.wrapped)
        shards.divide_again(network)
        return trained(network)

    @torch.no_grad()
    def _give(self, values: dict[str, Tensor]) -> None:
        for what, parameter in self._weights().items():
            parameter.copy_(shards.divided_like(values[what], parameter))

    # -------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Writes what continues this training, in rank 0."""
        self.saved_at, self.is_due = time.monotonic(), False
        memory = self.objective.memory
        if memory is not None:
            memory.synchronize()
        parts: dict[str, dict[str, Tensor]] = {
            "now": shards.gathered(self._weights()),
            "best": self.best or {},
            "memory": {} if memory is None else memory.state_dict(),
            **shards.kept_states(self.optimizer),
        }
        if self.accelerator.is_main_process:
            checkpoint.save(self.output, parts, key=self.key, story=vars(self.fitted))

    def go_on(self) -> None:
        """Takes up what an earlier process with the same key has left."""
        found = checkpoint.load(self.output, key=self.key)
        if found is not None:
            parts, story = found
            self._give(parts["now"])
            self.best = parts.get("best")
            if self.objective.memory is not None:
                self.objective.memory.load_state_dict(parts.get("memory", {}))
            shards.give_states(self.optimizer, parts)
            here = {name: getattr(self.fitted, name) for name in ("processes", "is_main")}
            self.fitted = Fitted(**story | here)
        self.accelerator.wait_for_everyone()  # nobody writes the next one before all have read this


def _accelerator(settings: dict[str, Any], name: str, output: Path) -> Any:
    from accelerate import Accelerator, utils

    tracker = None if settings["report_to"] == "none" else settings["report_to"]
    accelerator = Accelerator(  # `settings` decide, not what its launcher was told
        cpu=models.best_device().type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
        log_with=tracker,
        project_dir=str(output / "logs") if tracker else None,
    )
    if tracker:
        plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str)}
        accelerator.init_trackers(name, config=plain)
    return accelerator


def _key(key: str, settings: dict[str, Any], processes: int) -> str:
    kept = {name: value for name, value in settings.items() if name not in NO_RESULT}
    return json.dumps([key, kept, processes], sort_keys=True)


def _seed(seed: int, update: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, update, rank]).generate_state(1)[0])
