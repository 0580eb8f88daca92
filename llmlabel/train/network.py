"""The network of a student: backbone, what is trained in or before it, linear head; and its folder.

A model folder holds `head.safetensors`, `labels.json`, `model_card.json`, which says how it was made,
and `adapter_model.safetensors` with `adapter_config.json` (PEFT's format), or `prompt.safetensors`
where the card's settings have `prompt_tokens`.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlabel import models
from llmlabel.files import commit, write_text
from llmlabel.labelspace import LabelSpace, save_labels
from llmlabel.train.backbones import check_reads_texts, check_targets, see_later_tokens
from llmlabel.train.max_pooling import largest_scores
from llmlabel.train.soft_prompt import check_prompted, first_prompt, keys_and_values

_One = Literal["last", "mean"]  # vector for all labels
Pooling = Literal[_One, "max"]

_SHARED = ("model_card.json", "labels.json", "head.safetensors")
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_PROMPT = ("prompt.safetensors",)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters; rank, alpha and dropout of the paper.

    Differs from the paper: all linear layers of the backbone, not only q_proj and v_proj.
    """

    r: int = 12
    alpha: int = 32
    dropout: float = 0.1
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora: r must be at least 1, the rank of the adapters; got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout must be from 0 to below 1; got {self.dropout}")


PAPER_LORA = LoRA()


class LabelSupervised(torch.nn.Module):
    """A backbone, a linear head without bias and a pooling of its logits.

    Args:
        backbone: a transformers base model whose output has `last_hidden_state`.
        labels: number of labels.
        pooling: over the tokens that are not padding.
    """

    def __init__(self, backbone: Any, *, labels: int, pooling: Pooling) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.score = torch.nn.Linear(backbone.config.hidden_size, labels, bias=False)
        torch.nn.init.zeros_(self.score.weight)  # starts undecided, and needs no random numbers

    def forward(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows labels"]:
        """Logits in float32."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pooling == "max":  # a maximum of each label; the others pool what is linear
                return largest_scores(hidden.float(), mask, self.score.weight)
            return self.score(pool(hidden.float(), mask, self.pooling))


class TokenSupervised(torch.nn.Module):
    """A backbone, dropout and a linear head for every token.

    Args:
        backbone: a transformers base model whose output has `last_hidden_state`.
        tags: number of tags.
        dropout: before the head; the paper's code has 0.1.
    """

    def __init__(self, backbone: Any, *, tags: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone, self.dropout = backbone, torch.nn.Dropout(dropout)
        self.score = torch.nn.Linear(backbone.config.hidden_size, tags)
        for parameter in self.score.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens tags"]:
        """Logits in float32."""
        hidden = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(self.dropout(hidden.float()))


class PromptTuned(torch.nn.Module):
    """A frozen decoder, a trained prompt before the text, a linear head without bias on its end.

    No text changes the keys and values of what stands before it, so those of the prompt are computed
    once a pass, for all of its rows.

    Args:
        backbone: a transformers base model that keeps keys and values.
        prompt: where the training of the prompt begins.
        labels: number of labels.
    """

    def __init__(
        self, backbone: Any, prompt: Float[Tensor, "prompt width"], *, labels: int
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(requires_grad=False)
        self.prompt = torch.nn.Parameter(prompt.detach().float().clone())
        self.score = torch.nn.Linear(backbone.config.hidden_size, labels, bias=False)
        torch.nn.init.zeros_(self.score.weight)

    def train(self, mode: bool = True) -> "PromptTuned":  # noqa: FBT001, FBT002  # torch's signature
        """A frozen backbone drops nothing out."""
        super().train(mode=mode)
        self.backbone.eval()
        return self

    def forward(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows labels"]:
        """Logits in float32, read at each text's last token."""
        kept, before = keys_and_values(self.backbone, inputs_embeds=self.prompt[None])
        kept.batch_repeat_interleave(len(ids))
        seen = torch.cat([mask.new_ones(len(ids), len(self.prompt)), mask], dim=1)
        hidden = self.backbone(input_ids=ids, attention_mask=seen, **before).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(pool(hidden.float(), mask, "last"))


Student = LabelSupervised | TokenSupervised | PromptTuned


def pool(
    hidden: Float[Tensor, "rows tokens width"], mask: Int[Tensor, "rows tokens"], how: _One
) -> Float[Tensor, "rows width"]:
    """One vector per row from the tokens where `mask` is 1."""
    if how == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * positions).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def padded(
    tokens: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Token ids with padding at the end, and a mask that is 1 where a token is."""
    width = max(map(len, tokens))
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    mask = torch.zeros(len(tokens), width, dtype=torch.long)
    for row, own in enumerate(tokens):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    return ids, mask


def load_backbone(model: str, *, settings: dict[str, Any]) -> Any:
    """A base model in float32, or in 4 bits, that sees later tokens where `bidirectional` says so.

    Raises:
        ValueError: it cannot be loaded, is none of texts, or a setting is not for it.
    """
    from transformers import AutoModel

    given: dict[str, Any] = {"dtype": torch.float32}
    if settings.get("load_in_4bit"):
        given |= {"quantization_config": _four_bits(), "dtype": torch.bfloat16}
    source = models.fetch(model)
    with models.loading(model):
        backbone = AutoModel.from_pretrained(source, **given)
    check_reads_texts(backbone, model)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # never used here, and DDP wants every trained weight to be used
    if settings.get("bidirectional"):
        see_later_tokens(backbone, first_layer=settings.get("bidirectional_from", 0))
    backbone.config.use_cache = False
    return backbone


def _four_bits() -> Any:
    """QLoRA: the backbone's weights in NF4."""
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ValueError("load_in_4bit needs a GPU and the package bitsandbytes; leave it out here")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def new_network(model: str, labels: LabelSpace, settings: dict[str, Any]) -> tuple[Student, Any]:
    """An untrained student and its tokenizer; adapters draw from torch's global generator."""
    from transformers import AutoTokenizer

    backbone = load_backbone(model, settings=settings)
    source = models.fetch(model)
    with models.loading(model):
        tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = settings.get("prompt_tokens", 0)
    limit = getattr(backbone.config, "max_position_embeddings", None)
    if limit is not None and prompt >= limit:
        raise ValueError(
            f"prompt_tokens={prompt} leaves no room for a text in the model's {limit} positions; give "
            "fewer, such as 50"
        )
    if limit is not None and settings["max_length"] + prompt > limit:
        what = f" with prompt_tokens={prompt}" if prompt else ""
        raise ValueError(
            f"max_length={settings['max_length']}{what} is more than the {limit} tokens of {model}; "
            f"set max_length={limit - prompt} or less"
        )
    if prompt:
        check_prompted(backbone, model, settings)
        ids = first_prompt(tokenizer, labels, settings)
        first = backbone.get_input_embeddings()(torch.tensor(ids))
        return PromptTuned(backbone, first, labels=len(labels)), tokenizer
    if settings["gradient_checkpointing"]:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.enable_input_require_grads()
    return _adapted(backbone, labels, settings), tokenizer


def _adapted(
    backbone: Any, labels: LabelSpace, settings: dict[str, Any]
) -> LabelSupervised | TokenSupervised:
    from peft import LoraConfig, get_peft_model

    lora = settings["lora"]
    check_targets(backbone, lora["targets"])
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        task_type="FEATURE_EXTRACTION",
    )
    outputs = 2 * len(labels) + 1 if _is_tagger(settings) else len(labels)
    return _with_head(get_peft_model(backbone, config), outputs, settings)


def _with_head(
    adapted: Any, outputs: int, settings: dict[str, Any]
) -> LabelSupervised | TokenSupervised:
    if _is_tagger(settings):
        return TokenSupervised(adapted, tags=outputs)
    return LabelSupervised(adapted, labels=outputs, pooling=settings["pooling"])


def _is_tagger(settings: dict[str, Any]) -> bool:
    return settings.get("task") == "tokens"


def load_classifier(folder: Path) -> tuple[Student, Any, dict[str, Any]]:
    """A trained student in inference mode, its tokenizer and its model card.

    Raises:
        FileNotFoundError: the folder is not a student or is half written.
        ValueError: one of its files is damaged, or its backbone cannot be loaded, here or at all.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    _check_there(folder, _SHARED)
    with models.loading(folder):
        card = json.loads((folder / "model_card.json").read_text("utf-8"))
        own, model = _own(card["settings"]), card["model"]
    _check_there(folder, own)
    if card["settings"].get("load_in_4bit") and not torch.cuda.is_available():
        raise ValueError(
            f"model folder {folder}: it was trained with load_in_4bit=True, so that it can be used only "
            "where there are a GPU and the package bitsandbytes; go there, or train it without"
        )
    backbone = load_backbone(model, settings=card["settings"])
    source = models.fetch(model)
    with models.loading(folder):
        head = load_file(folder / "head.safetensors")
        network: Student
        if "prompt_tokens" in card["settings"]:
            prompt = load_file(folder / "prompt.safetensors")["prompt"]
            network = PromptTuned(backbone, prompt, labels=len(head["weight"]))
        else:
            adapted = cast(Any, PeftModel.from_pretrained(backbone, folder)).merge_and_unload()
            network = _with_head(adapted, len(head["weight"]), card["settings"])
        network.score.load_state_dict(head)
        tokenizer = AutoTokenizer.from_pretrained(source)
    return network.to(models.best_device()).eval(), tokenizer, card


def _own(settings: dict[str, Any]) -> tuple[str, ...]:
    """The files of what was trained besides the head."""
    return _PROMPT if "prompt_tokens" in settings else _ADAPTER


def _check_there(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"model folder {folder}: {name} is missing; give a folder of a student whose "
                "training has finished"
            )


def student_sha(folder: Path) -> str:
    """Stands for what a student's predictions depend on: its own files and its backbone's."""
    card = json.loads((folder / "model_card.json").read_text("utf-8"))
    names = (*_SHARED, *_own(card["settings"]))
    parts = [models.content_sha(folder / name)[:8] for name in names]
    return "".join([*parts, models.model_sha(models.fetch(card["model"]))])


def check_output(folder: Path, settings: dict[str, Any], *, others: Sequence[str] = ()) -> None:
    """Refuses a folder whose files are not those of such a student.

    Args:
        folder: may not be there yet.
        settings: of the student.
        others: names of files that its trainer keeps there.

    Raises:
        ValueError: names one of them.
    """
    ours = {*_SHARED, *_own(settings), "kept.json", "value.json", "logs", *others}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in ours and not path.name.startswith("."):
            raise ValueError(
                f"output={folder}: it holds {path.name}, which is no file of a student "
                f"{'with a prompt' if 'prompt_tokens' in settings else 'with adapters'}; "
                "give a new or empty folder"
            )


def save_network(
    network: Student, model: str, labels: LabelSpace, card: dict[str, Any], folder: Path
) -> None:
    """Writes the folder; the model card last, since a folder without it counts as unfinished."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_card.json").unlink(missing_ok=True)
    if isinstance(network, PromptTuned):
        prompt = {"prompt": network.prompt.detach().cpu().contiguous()}
        commit(folder / "prompt.safetensors", lambda path: save_file(prompt, path))
    else:
        _save_adapter(network.backbone, model, folder)
    head = {name: p.detach().cpu().contiguous() for name, p in network.score.named_parameters()}
    commit(folder / "head.safetensors", lambda path: save_file(head, path))
    save_labels(labels, folder / "labels.json")
    write_text(folder / "model_card.json", json.dumps(card, indent=2))


def _save_adapter(backbone: Any, model: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:  # PEFT adds a README.md of its own
        made = Path(place)
        backbone.save_pretrained(made)
        config = json.loads((made / "adapter_config.json").read_text("utf-8"))
        # PEFT writes a path of this machine and a set in random order.
        config["base_model_name_or_path"] = model.partition("#")[0]
        if isinstance(config.get("target_modules"), list):
            config["target_modules"] = sorted(config["target_modules"])
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True))
        weights = made / "adapter_model.safetensors"
        commit(folder / weights.name, lambda path: shutil.copyfile(weights, path))
