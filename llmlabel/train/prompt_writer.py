"""A frozen decoder that writes the labels of a text after a trained prompt; and its folder.

A model folder holds `prompt.safetensors`, `labels.json` and `model_card.json`.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlabel import models
from llmlabel.engine.labelsets import LabelSets
from llmlabel.labelspace import LabelSpace
from llmlabel.train.folder import read_folder, write_folder
from llmlabel.train.network import padded
from llmlabel.train.settings import number_format
from llmlabel.train.soft_prompt import (
    as_kept,
    check_prompted,
    first_prompt,
    keep_matrices,
    keys_and_values,
)

WEIGHTS = "prompt.safetensors"


class PromptWriter(torch.nn.Module):
    """A frozen decoder with its language head, and a trained prompt before the text.

    Args:
        model: a transformers causal language model that keeps keys and values.
        prompt: where the training of the prompt begins.
    """

    def __init__(self, model: Any, prompt: Float[Tensor, "prompt width"]) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False)
        self.prompt = torch.nn.Parameter(prompt.detach().float().clone())
        self._takes_places = "position_ids" in inspect.signature(model.forward).parameters

    def train(self, mode: bool = True) -> "PromptWriter":  # noqa: FBT001, FBT002  # torch's signature
        """A frozen model drops nothing out."""
        super().train(mode=mode)
        self.model.eval()
        return self

    def forward(
        self,
        ids: Int[Tensor, "rows tokens"],
        mask: Int[Tensor, "rows tokens"],
        reply: Int[Tensor, "rows some"],
        reply_mask: Int[Tensor, "rows some"],
    ) -> Float[Tensor, " rows"]:
        """Mean surprise of a reply's tokens, in nats; its first one is given and not counted."""
        with as_kept(self.model):
            _, going_on, seen = self.read(ids, mask)
            logits = self.go_on(going_on, seen, reply, reply_mask)[0][:, :-1]
        with torch.autocast(logits.device.type, enabled=False):
            surprise = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), reply[:, 1:], reduction="none"
            )
        said = reply_mask[:, 1:].to(surprise)
        return (said * surprise).sum(dim=1) / said.sum(dim=1)

    def read(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> tuple[Any, dict[str, Any], Int[Tensor, "rows seen"]]:
        """What is kept of prompt and texts, how the model goes on from there, and what it may see."""
        kept, going_on = keys_and_values(self.model, inputs_embeds=self.prompt[None])
        kept.batch_repeat_interleave(len(ids))
        prompt = mask.new_ones(len(ids), len(self.prompt))
        _, seen = self.go_on(going_on | {"logits_to_keep": 1}, prompt, ids, mask)
        return kept, going_on, seen

    def go_on(
        self,
        going_on: dict[str, Any],
        seen: Int[Tensor, "rows seen"],
        ids: Int[Tensor, "rows new"],
        mask: Int[Tensor, "rows new"],
    ) -> tuple[Float[Tensor, "rows kept vocabulary"], Int[Tensor, "rows now"]]:
        """Logits of further tokens, and what may be seen then; padding takes no position."""
        now = torch.cat([seen, mask], dim=1)
        if self._takes_places:
            going_on = going_on | {"position_ids": (now.cumsum(dim=1) - 1)[:, seen.shape[1] :]}
        return self.model(input_ids=ids, attention_mask=now, **going_on).logits, now


@torch.inference_mode()
def written(
    network: PromptWriter, contexts: Sequence[list[int]], sets: LabelSets, pass_tokens: int
) -> list[list[int]]:
    """The reply after each text: the best of the tokens that are allowed, up to the end.

    Args:
        network: in inference mode.
        contexts: at least two tokens each.
        sets: what may be written.
        pass_tokens: padded tokens of texts computed at a time.
    """
    replies: list[list[int]] = [[] for _ in contexts]
    device = network.prompt.device
    order = sorted(range(len(contexts)), key=lambda row: (-len(contexts[row]), row))
    while order:
        count = max(1, pass_tokens // len(contexts[order[0]]))
        rows, order = order[:count], order[count:]
        ids, mask = (part.to(device) for part in padded([contexts[row][:-1] for row in rows]))
        kept, going_on, seen = network.read(ids, mask)
        last = [contexts[row][-1] for row in rows]
        while rows:
            new = torch.tensor(last, device=device)[:, None]
            logits, seen = network.go_on(going_on, seen, new, torch.ones_like(new))
            last = []
            for row, values in zip(rows, logits[:, -1].float().cpu(), strict=True):
                some = sets.allowed(replies[row])
                last.append(some[int(values[some].argmax())])
                replies[row].append(last[-1])
            left = [place for place, token in enumerate(last) if token != sets.end]
            if len(left) < len(rows):  # a reply that has ended leaves the pass
                rows, last = [rows[place] for place in left], [last[place] for place in left]
                places = torch.tensor(left, dtype=torch.long, device=device)
                kept.batch_select_indices(places)
                seen = seen[places]
    return replies


def new_writer(
    model: str, labels: LabelSpace, settings: dict[str, Any]
) -> tuple[PromptWriter, Any]:
    """An untrained writer and its tokenizer; it computes in the number format of the settings.

    Raises:
        ValueError: the model is no decoder with a language head.
    """
    decoder, tokenizer = _decoder(model)
    check_prompted(decoder.base_model, model, settings)
    ids = first_prompt(tokenizer, labels, settings)
    first = decoder.get_input_embeddings()(torch.tensor(ids))
    keep_matrices(decoder, number_format(settings["dtype"], models.best_device()))
    return PromptWriter(decoder, first), tokenizer


def _decoder(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = models.fetch(model)
    with models.loading(model):
        decoder = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return decoder.eval(), AutoTokenizer.from_pretrained(source)


def load_writer(folder: Path) -> tuple[PromptWriter, Any, LabelSpace, dict[str, Any]]:
    """A trained writer in inference mode, its tokenizer, label space and model card.

    Raises:
        FileNotFoundError: the folder is none of `train_text_to_text` or is half written.
        ValueError: one of its files is damaged, or its decoder cannot be loaded.
    """
    tensors, labels, card = read_folder(folder, WEIGHTS, trainer="train_text_to_text")
    decoder, tokenizer = _decoder(card["model"])
    return (
        PromptWriter(decoder, tensors["prompt"]).to(models.best_device()).eval(),
        tokenizer,
        labels,
        card,
    )


def save_writer(
    network: PromptWriter, labels: LabelSpace, card: dict[str, Any], folder: Path
) -> None:
    """Writes the folder."""
    write_folder(folder, WEIGHTS, {"prompt": network.prompt}, labels, card)
