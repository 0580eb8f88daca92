"""A trained student as what other programs load: a plain classifier, or adapters with their head.

`export_classifier` merges the adapters. Its folder is read by `AutoModelForSequenceClassification`
and served, with an answer from `POST /classify`, by

    vllm serve FOLDER --runner pooling --convert classify --dtype bfloat16

where a text is cut only if the request says `truncate_prompt_tokens`. `export_adapter` merges nothing,
so that many students share one backbone in memory:

    vllm serve BACKBONE --runner pooling --convert classify --dtype bfloat16 --enable-lora \
        --max-lora-rank 16 --max-lora-cls-labels LABELS --lora-modules NAME=FOLDER

and, where texts have several labels, `--hf-overrides '{"problem_type": "multi_label_classification"}'`.
Without a server, `llmlabel.engine.vllm_pooling.VLLMClassifier` reads both.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from llmlabel import models
from llmlabel.files import commit
from llmlabel.labelspace import LabelSpace, load_labels, save_labels
from llmlabel.train.network import LabelSupervised, load_classifier, padded

_CLOSE = 1e-3
"""How far a probability may be off: a wrong token or mask is further, rounding is not."""


def export_classifier(model: Path, *, output: Path) -> Path:
    """Merges the adapters and the head of a student into a plain folder of transformers.

    What is written is read again and must answer as the student before the folder counts as
    finished. The tokenizer cuts texts where the student did, once it is asked to cut.

    transformers reads the last token that is not the pad token. So the pad token is one with which
    the tokenizer ends no text: its own, or else the first of end, beginning and unknown that is.
    That is right even where pad and end are the same, as long as no text ends with the end token
    written out: such a text is read at the token before. vLLM pads nothing and reads it whole.

    Args:
        model: a folder written by `train_classifier`, of a decoder with `pooling: last`.
        output: the new folder.

    Returns:
        The new folder: weights in float32, `config.json` with the labels' names (their ids, where
        two have one name), the tokenizer and `labels.json`.

    Raises:
        ValueError: transformers has no class for such a student, or `output` holds something else.
    """
    from transformers import AutoModelForSequenceClassification

    settings = _settings(model, output)
    if settings.get("load_in_4bit"):
        raise ValueError(
            f"model {model}: load_in_4bit=True, and adapters cannot be merged into 4 bits; use "
            "llmlabel.train.export.export_adapter"
        )
    network, tokenizer, _ = load_classifier(model)
    labels = load_labels(model / "labels.json")
    assert isinstance(network, LabelSupervised)
    device = next(network.parameters()).device
    some = labels.names[:8]
    probe = [tokenizer(text).input_ids for text in (*some, " ".join(some))]
    with torch.inference_mode():
        expected = network(*(part.to(device) for part in padded(probe)))
    _prepare(tokenizer, settings)
    stock = _stock(network, labels, pad=tokenizer.pad_token_id, model=model)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output) as place:
        made = Path(place)
        stock.save_pretrained(made)
        del stock, network
        tokenizer.save_pretrained(made)
        again = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32)
        found = _answers(again.to(device).eval(), probe, tokenizer.pad_token_id)
        if not torch.allclose(_probs(found, labels), _probs(expected, labels), atol=_CLOSE):
            raise ValueError(
                f"model {model}: {type(again).__name__} of transformers does not answer as this "
                "student does; let llmlabel.train.classifier.predict read it"
            )
        _move(made, output, last="config.json")
    save_labels(labels, output / "labels.json")
    return output


def export_adapter(model: Path, *, output: Path) -> Path:
    """Writes a student as PEFT keeps a sequence classifier: adapters, and the head as it is.

    Read by PEFT on top of `AutoModelForSequenceClassification.from_pretrained(backbone,
    num_labels=...)`, and by vLLM as a LoRA adapter beside others of the same backbone.

    Args:
        model: see `export_classifier`.
        output: the new folder.

    Returns:
        The new folder: `adapter_config.json`, `adapter_model.safetensors` and `labels.json`.

    Raises:
        ValueError: see `export_classifier`.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    settings = _settings(model, output)
    if settings["bidirectional"]:
        raise ValueError(
            f"model {model}: bidirectional=True changes the backbone, and an adapter cannot; use "
            "llmlabel.train.export.export_classifier"
        )
    labels = load_labels(model / "labels.json")
    card = json.loads((model / "model_card.json").read_text("utf-8"))
    stock = _empty(AutoConfig.from_pretrained(models.fetch(card["model"])), model)
    before, after = "base_model.model.", f"base_model.model.{stock.base_model_prefix}."
    weights = {
        name.replace(before, after, 1): value
        for name, value in load_file(model / "adapter_model.safetensors").items()
    }
    weights[f"{before}score.weight"] = load_file(model / "head.safetensors")["weight"]
    config = json.loads((model / "adapter_config.json").read_text("utf-8"))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    output.mkdir(parents=True, exist_ok=True)
    commit(output / "adapter_model.safetensors", lambda path: save_file(weights, path))
    text = json.dumps(config, indent=2, sort_keys=True)
    commit(output / "adapter_config.json", lambda path: path.write_text(text + "\n", "utf-8"))
    save_labels(labels, output / "labels.json")
    return output


def _settings(model: Path, output: Path) -> dict[str, Any]:
    """Of the student, where a class of transformers can hold it.

    Raises:
        FileNotFoundError: `model` is no whole folder of a student.
        ValueError: it cannot, or `output` holds something else.
    """
    for name in ("model_card.json", "head.safetensors", "labels.json"):
        if not (model / name).is_file():
            raise FileNotFoundError(
                f"model folder {model}: {name} is missing; give a folder of a student whose training "
                "has finished"
            )
    held = [p.name for p in output.iterdir()] if output.is_dir() else []
    seen = sorted(n for n in held if not n.startswith(".") and n not in ("kept.json", "value.json"))
    if seen and ("labels.json" not in held or "model_card.json" in held):
        raise ValueError(f"output={output}: it holds {seen[0]}; give a new or empty folder")
    card = json.loads((model / "model_card.json").read_text("utf-8"))
    settings: dict[str, Any] = card["settings"]
    with safe_open(model / "head.safetensors", framework="pt") as head:
        outputs = head.get_slice("weight").get_shape()[0]
    labels = load_labels(model / "labels.json")
    if outputs != len(labels):
        what = f"a head with {outputs} outputs for {len(labels)} labels"
    elif "prompt_tokens" in settings:
        what = f"prompt_tokens={settings['prompt_tokens']}"
    elif settings["pooling"] != "last":
        what = f"pooling={settings['pooling']}"
    elif settings["bidirectional"] and settings.get("bidirectional_from", 0):
        what = f"bidirectional_from={settings['bidirectional_from']}"
    else:
        return settings
    raise ValueError(
        f"model {model}: {what} is in no classifier of transformers; use the predict function of its "
        "trainer, or train with train_classifier and pooling=last"
    )


def _prepare(tokenizer: Any, settings: dict[str, Any]) -> None:
    """Lets it pad and cut as the student was trained."""
    ends = tokenizer("a").input_ids[-1]  # the end token, where the tokenizer adds it itself
    for name in ("pad_token", "eos_token", "bos_token", "unk_token"):
        token = getattr(tokenizer, name)
        if token is not None and tokenizer.convert_tokens_to_ids(token) != ends:
            tokenizer.pad_token = token
            break
    else:
        raise ValueError("the tokenizer has no token with which no text ends; give it a pad token")
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = settings["max_length"]


def _empty(config: Any, model: Path) -> Any:
    """The class of transformers for such a backbone, without weights."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            stock = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        stock = None
    if stock is None or not isinstance(getattr(stock, "score", None), torch.nn.Linear):
        raise ValueError(
            f"model {model}: transformers has no classifier that reads the last token of a "
            f"{config.model_type}; let llmlabel.train.classifier.predict read it"
        )
    return stock


def _stock(network: LabelSupervised, labels: LabelSpace, *, pad: int, model: Path) -> Any:
    """The student's weights in the class of transformers."""
    backbone = network.backbone
    names = labels.names if len(set(labels.names)) == len(labels) else labels.ids
    kind = "multi_label_classification" if labels.multilabel else "single_label_classification"
    config = backbone.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type, config.pad_token_id = kind, pad
    stock = _empty(config, model)
    stock.config = config
    setattr(stock, stock.base_model_prefix, backbone)
    stock.score.weight = network.score.weight
    if left := [name for name, p in stock.named_parameters() if p.is_meta]:
        raise ValueError(
            f"model {model}: {type(stock).__name__} of transformers has the weight {left[0]}, which "
            "was never trained; let llmlabel.train.classifier.predict read it"
        )
    return stock


@torch.inference_mode()
def _answers(stock: Any, tokens: Sequence[list[int]], pad: int) -> Float[Tensor, "rows labels"]:
    """Logits of rows that are padded as transformers does."""
    ids, mask = padded(tokens)
    ids = ids.masked_fill(mask == 0, pad)
    logits: Tensor = stock(
        input_ids=ids.to(stock.device), attention_mask=mask.to(stock.device)
    ).logits
    return logits.float()


def _probs(
    logits: Float[Tensor, "rows labels"], labels: LabelSpace
) -> Float[Tensor, "rows labels"]:
    return logits.sigmoid() if labels.multilabel else logits.softmax(dim=1)


def _move(made: Path, output: Path, *, last: str) -> None:
    """Commits the files of a folder, the one that makes it whole at the end."""
    (output / last).unlink(missing_ok=True)
    for old in output.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(made.iterdir(), key=lambda path: (path.name == last, path.name)):
        commit(output / path.name, path.replace)
