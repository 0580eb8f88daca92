"""A backbone and a decoder that says one label a step, fed with its own answers; and its folder.

A model folder holds `set_decoder.safetensors` (all that was trained, and the label vectors),
`labels.json` and `model_card.json`.
"""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlabel import models
from llmlabel.label.embedding import Encoder, unit_vectors
from llmlabel.labelspace import LabelSpace
from llmlabel.train.folder import read_folder, write_folder
from llmlabel.train.loop import trained
from llmlabel.train.network import PAPER_LORA, new_network, padded, pool

WEIGHTS = "set_decoder.safetensors"


class SetDecoder(torch.nn.Module):
    """A GRU with additive attention to the tokens, which says one label, or nothing, a step.

    Args:
        vectors: of the labels; they stay as they are.
        text_width: of the tokens' states.
        width: of its own state.
        steps: how many answers it gives.
        dropout: of what the answers are read from.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "labels label_width"],
        *,
        text_width: int,
        width: int,
        steps: int,
        dropout: float,
    ) -> None:
        super().__init__()
        labels, label_width = vectors.shape
        self.steps = steps
        self.vectors: Tensor
        self.register_buffer("vectors", torch.cat([vectors, torch.zeros(1, label_width)]))
        self.before = torch.nn.Parameter(torch.zeros(label_width))
        self.first = torch.nn.Linear(text_width, width)
        self.query = torch.nn.Linear(width, width)
        self.keys = torch.nn.Linear(text_width, width, bias=False)
        self.energy = torch.nn.Linear(width, 1, bias=False)
        self.cell = torch.nn.GRUCell(label_width + text_width, width)
        self.dropout = torch.nn.Dropout(dropout)
        self.score = torch.nn.Linear(width + text_width, labels + 1)
        torch.nn.init.zeros_(self.score.weight)  # starts undecided
        torch.nn.init.zeros_(self.score.bias)

    def forward(
        self,
        states: Float[Tensor, "rows tokens text_width"],
        mask: Int[Tensor, "rows tokens"],
        fed: Int[Tensor, "rows steps"] | None = None,
    ) -> Float[Tensor, "rows steps answers"]:
        """Logits of each step's answers, the last of which is "nothing".

        Args:
            states: of the tokens.
            mask: 1 where a token is.
            fed: what it is told that it said (teacher forcing); by default what it did say.
        """
        hidden = self.first(pool(states, mask, "mean")).tanh()
        keys = self.keys(states)
        last = self.before.expand(len(states), -1)
        found = []
        for step in range(self.steps):
            energy = self.energy((keys + self.query(hidden)[:, None]).tanh())[:, :, 0]
            share = energy.masked_fill(mask == 0, -torch.inf).softmax(dim=1)
            context = (share[:, :, None] * states).sum(dim=1)
            hidden = self.cell(torch.cat([last, context], dim=1), hidden)
            logits = self.score(self.dropout(torch.cat([hidden, context], dim=1)))
            found.append(logits)
            said = logits.argmax(dim=1) if fed is None else fed[:, step]
            last = self.vectors[said]
        return torch.stack(found, dim=1)


class TextToSet(torch.nn.Module):
    """A backbone, frozen or with adapters, and the decoder that reads its last layer.

    Args:
        backbone: a transformers base model whose output has `last_hidden_state`.
        vectors: see `SetDecoder`.
        settings: of `train_seq2set`.
    """

    def __init__(
        self, backbone: Any, vectors: Float[Tensor, "labels width"], settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.backbone, self.is_frozen = backbone, settings["lora"] is None
        self.decoder = SetDecoder(
            vectors,
            text_width=backbone.config.hidden_size,
            width=settings["width"],
            steps=settings["max_labels"],
            dropout=settings["dropout"],
        )

    def train(self, mode: bool = True) -> "TextToSet":  # noqa: FBT001, FBT002  # torch's signature
        """A frozen backbone drops nothing out."""
        super().train(mode=mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def forward(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows steps answers"]:
        """Logits in float32."""
        with torch.no_grad() if self.is_frozen else nullcontext():
            hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.decoder(hidden.float(), mask)


def new_backbone(model: str, labels: LabelSpace, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The backbone with the adapters that the settings ask for, and its tokenizer."""
    lora = settings["lora"] or asdict(PAPER_LORA)
    student, tokenizer = new_network(model, labels, settings | {"pooling": "mean", "lora": lora})
    backbone: Any = student.backbone
    if settings["lora"] is None:
        backbone = backbone.unload().requires_grad_(requires_grad=False)
    return backbone, tokenizer


@torch.no_grad()
def label_vectors(
    labels: LabelSpace,
    encoder: str | Path | Encoder | None,
    backbone: Any,
    tokenizer: Any,
    settings: dict[str, Any],
) -> Float[Tensor, "labels width"]:
    """Of length 1, in float32; each from a pass of its own, so that they have no neighbours."""
    texts = labels.texts()
    if encoder is not None:
        return torch.from_numpy(unit_vectors(models.load_encoder(encoder), texts)).float()
    backbone.eval()
    found = []
    for tokens in tokens_of(tokenizer, texts, settings):
        ids, mask = padded([tokens])
        hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        found.append(pool(hidden.float(), mask, "mean")[0])
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def tokens_of(tokenizer: Any, texts: list[str], settings: dict[str, Any]) -> list[list[int]]:
    """Cut at `max_length`."""
    limit = settings["max_length"]
    return [tokenizer(text, truncation=True, max_length=limit).input_ids for text in texts]


def load_set_decoder(folder: Path) -> tuple[TextToSet, Any, LabelSpace, dict[str, Any]]:
    """A trained decoder of sets in inference mode, its tokenizer, label space and model card.

    Raises:
        FileNotFoundError: the folder is none of `train_seq2set` or is half written.
        ValueError: one of its files is damaged, or its backbone cannot be loaded.
    """
    tensors, labels, card = read_folder(folder, WEIGHTS, trainer="train_seq2set")
    with torch.random.fork_rng():
        backbone, tokenizer = new_backbone(card["model"], labels, card["settings"])
        with models.loading(folder):
            network = TextToSet(backbone, tensors["decoder.vectors"][:-1], card["settings"])
            with torch.no_grad():
                for name, value in _own(network).items():
                    value.copy_(tensors[name])
    return network.to(models.best_device()).eval(), tokenizer, labels, card


def _own(network: TextToSet) -> dict[str, Tensor]:
    """What a folder keeps of a network: all but the backbone as it was."""
    return dict(trained(network)) | {"decoder.vectors": network.decoder.vectors}


def save_set_decoder(
    network: TextToSet, labels: LabelSpace, card: dict[str, Any], folder: Path
) -> None:
    """Writes the folder."""
    write_folder(folder, WEIGHTS, _own(network), labels, card)
