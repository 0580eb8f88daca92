"""The networks of generated prompts: who reads labels after a prompt, who draws one; their folder.

A model folder holds `generator.safetensors` (the generator, the prompts of the domains and the one that
they began as), `labels.json` and `model_card.json`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmlabel import models
from llmlabel.labelspace import LabelSpace
from llmlabel.train.folder import read_folder, write_folder
from llmlabel.train.network import load_backbone, padded, pool

WEIGHTS = "generator.safetensors"
TEMPERATURE = 0.05
"""Of cosines, as sentence encoders are trained with."""


class LabelReader(torch.nn.Module):
    """A frozen sentence encoder that reads every label after a prompt.

    Args:
        backbone: a transformers encoder.
        names: tokens of the labels, each with what the tokenizer puts at both ends.
        prompt: where a prompt stands that is trained.
    """

    def __init__(
        self, backbone: Any, names: list[list[int]], prompt: Float[Tensor, "prompt width"]
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(requires_grad=False)
        self.names, self.mask = padded(names)
        self.prompt = torch.nn.Parameter(prompt.detach().float().clone())

    def train(self, mode: bool = True) -> "LabelReader":  # noqa: FBT001, FBT002  # torch's signature
        """A frozen backbone drops nothing out."""
        super().train(mode=mode)
        self.backbone.eval()
        return self

    def vectors(
        self, prompts: Float[Tensor, "prompts prompt width"]
    ) -> Float[Tensor, "prompts labels width"]:
        """Of length 1: each label after each prompt, which stands behind the first token."""
        count, size = prompts.shape[:2]
        device = prompts.device
        words = self.backbone.get_input_embeddings()(self.names.to(device))
        given = torch.cat(
            [
                words[:, :1].expand(count, -1, -1, -1),
                prompts[:, None].expand(-1, len(words), -1, -1),
                words[:, 1:].expand(count, -1, -1, -1),
            ],
            dim=2,
        ).flatten(0, 1)
        mask = self.mask.to(device)
        mask = torch.cat([mask.new_ones(len(mask), size), mask], dim=1).repeat(count, 1)
        hidden = self.backbone(inputs_embeds=given, attention_mask=mask).last_hidden_state
        found = torch.nn.functional.normalize(pool(hidden.float(), mask, "mean"), dim=1)
        return found.view(count, len(words), -1)

    def forward(self, texts: Float[Tensor, "rows width"]) -> Float[Tensor, "rows labels"]:
        """Logits of texts after the prompt that is trained."""
        return texts @ self.vectors(self.prompt[None])[0].T / TEMPERATURE


class PromptGenerator(torch.nn.Module):
    """Noise and a text's vector -> a prompt in the box around the prompts of the domains.

    Args:
        prompts: of the domains; the generator begins near their mean, and no coordinate goes further
            away from it than the furthest of theirs.
    """

    def __init__(self, prompts: Float[Tensor, "domains prompt width"]) -> None:
        super().__init__()
        self.centre: Tensor
        self.bound: Tensor
        self.register_buffer("centre", prompts.mean(dim=0))
        self.register_buffer("bound", (prompts - self.centre).abs().amax(dim=0).clamp(min=1e-6))
        sizes = [2 * prompts.shape[2], 128, 256, 512, 1024]
        layers: list[torch.nn.Module] = []
        for before, after in pairwise(sizes):
            norm = [torch.nn.LayerNorm(after)] if layers else []
            layers += [torch.nn.Linear(before, after), *norm, torch.nn.LeakyReLU(0.2)]
        layers += [torch.nn.Linear(sizes[-1], self.centre.numel()), torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*layers)

    def forward(
        self, noise: Float[Tensor, "rows width"], texts: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "rows prompt width"]:
        """One prompt a row."""
        places = self.layers(torch.cat([noise, texts], dim=1)).view(-1, *self.centre.shape)
        return self.centre + self.bound * places

    def places(self, prompts: Float[Tensor, "rows prompt width"]) -> Float[Tensor, "rows both"]:
        """Where prompts are in the box, from -1 to 1."""
        return ((prompts - self.centre) / self.bound).flatten(1)


class Adversaries(torch.nn.Module):
    """The generator, and a judge of whether a prompt is that of a text's domain."""

    def __init__(self, generator: PromptGenerator) -> None:
        super().__init__()
        self.generator = generator
        layers: list[torch.nn.Module] = []
        before = generator.centre.numel() + generator.centre.shape[1]
        for place in range(3):
            drop = [torch.nn.Dropout(0.4)] if place else []
            layers += [torch.nn.Linear(before, 512), *drop, torch.nn.LeakyReLU(0.2)]
            before = 512
        self.judge = torch.nn.Sequential(*layers, torch.nn.Linear(512, 1))

    def forward(
        self, texts: Float[Tensor, "rows width"], prompts: Float[Tensor, "rows prompt width"]
    ) -> Float[Tensor, " rows"]:
        """Least-squares loss of both, of which neither's reaches the weights of the other.

        The judge should say 1 of the true pair and 0 of a drawn prompt, the generator make it say 1.
        What is drawn is drawn for another text of the batch.
        """
        others = texts[torch.randperm(len(texts), device=texts.device)]
        drawn = self.generator.places(self.generator(torch.randn_like(others), others))
        known = self.generator.places(prompts)
        fixed = {name: value.detach() for name, value in self.judge.named_parameters()}
        false_pair = torch.cat([drawn, others], dim=1)
        fooled = torch.func.functional_call(self.judge, fixed, (false_pair,))
        false = self.judge(false_pair.detach())
        true = self.judge(torch.cat([known, texts], dim=1))
        return (((true - 1) ** 2 + false**2) / 2 + (fooled - 1) ** 2)[:, 0]


@torch.inference_mode()
def text_vectors(
    backbone: Any, tokenizer: Any, texts: list[str], settings: dict[str, Any]
) -> Float[Tensor, "rows width"]:
    """Of length 1, the mean of a text's tokens."""
    device = next(backbone.parameters()).device
    backbone.eval()
    limit = settings["max_length"]
    tokens = [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]
    found = torch.zeros(len(texts), backbone.config.hidden_size)
    order = sorted(range(len(tokens)), key=lambda row: (-len(tokens[row]), row))
    while order:
        count = max(1, settings["pass_tokens"] // len(tokens[order[0]]))
        chosen, order = order[:count], order[count:]
        ids, mask = (part.to(device) for part in padded([tokens[row] for row in chosen]))
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        found[chosen] = pool(hidden.float(), mask, "mean").cpu()
    return torch.nn.functional.normalize(found, dim=1)


def new_reader(model: str, labels: LabelSpace, template: str) -> tuple[LabelReader, Any]:
    """A reader whose prompt is the words of a template, and its tokenizer."""
    from transformers import AutoTokenizer

    backbone = load_backbone(model, settings={}).eval()
    source = models.fetch(model)
    with models.loading(model):
        tokenizer = AutoTokenizer.from_pretrained(source)
    words = tokenizer(template, add_special_tokens=False).input_ids
    if not words:
        raise ValueError(f"template={template!r} has no words to begin a prompt with")
    names = [tokenizer(name).input_ids for name in labels.names]
    with torch.no_grad():
        prompt = backbone.get_input_embeddings()(torch.tensor(words))
    return LabelReader(backbone, names, prompt), tokenizer


def load_generator(
    folder: Path,
) -> tuple[LabelReader, PromptGenerator, dict[str, Tensor], Any, LabelSpace, dict[str, Any]]:
    """Reader and generator in inference mode, prompts, tokenizer, label space and model card.

    Raises:
        FileNotFoundError: the folder is none of `train_prompt_generator` or is half written.
        ValueError: one of its files is damaged, or its backbone cannot be loaded.
    """
    tensors, labels, card = read_folder(folder, WEIGHTS, trainer="train_prompt_generator")
    reader, tokenizer = new_reader(card["model"], labels, card["settings"]["template"])
    kept = {name: tensors.pop(name) for name in ("prompts", "template")}
    with torch.random.fork_rng():
        generator = PromptGenerator(kept["prompts"])
    with models.loading(folder):
        generator.load_state_dict(tensors)
    device = models.best_device()
    return reader.to(device).eval(), generator.to(device).eval(), kept, tokenizer, labels, card


def save_generator(
    generator: PromptGenerator,
    kept: dict[str, Tensor],
    labels: LabelSpace,
    card: dict[str, Any],
    folder: Path,
) -> None:
    """Writes the folder."""
    write_folder(folder, WEIGHTS, {**generator.state_dict(), **kept}, labels, card)
