"""The folder of a model with one file of weights: that, labels.json and model_card.json.

Its card is written last, since a folder without it counts as unfinished.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from llmlabel import models
from llmlabel.files import commit, write_text
from llmlabel.labelspace import LabelSpace, load_labels, save_labels

_CARD, _LABELS = "model_card.json", "labels.json"


def read_folder(
    folder: Path, weights: str, *, trainer: str
) -> tuple[dict[str, Tensor], LabelSpace, dict[str, Any]]:
    """Weights, label space and model card.

    Raises:
        FileNotFoundError: the folder is none of this trainer or is half written.
        ValueError: one of its files is damaged or of another label space.
    """
    from safetensors.torch import load_file

    for name in (_CARD, _LABELS, weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"model folder {folder}: {name} is missing; give a folder of {trainer} whose "
                "training has finished"
            )
    labels = load_labels(folder / _LABELS)
    with models.loading(folder):
        card = json.loads((folder / _CARD).read_text("utf-8"))
        tensors = load_file(folder / weights)
    check_labels(folder, labels, card)
    return tensors, labels, card


def check_labels(folder: Path, labels: LabelSpace, card: dict[str, Any]) -> None:
    """Raises a ValueError if labels.json is not what the model was trained on."""
    trained_on = card.get("labels", "one that its model card does not name")
    if labels.fingerprint != trained_on:
        raise ValueError(
            f"model folder {folder}: labels.json is of label space {labels.fingerprint}, but the model "
            f"was trained on {trained_on}; train it again, or bring its own labels.json back"
        )


def write_folder(
    folder: Path, weights: str, tensors: dict[str, Tensor], labels: LabelSpace, card: dict[str, Any]
) -> None:
    """Writes what `read_folder` reads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CARD).unlink(missing_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    commit(folder / weights, lambda path: save_file(own, path))
    save_labels(labels, folder / _LABELS)
    write_text(folder / _CARD, json.dumps(card, indent=2))


def check_folder(output: Path, weights: str, *, what: str) -> None:
    """Refuses a folder with files that are not those of such a model.

    Raises:
        ValueError: names one of them.
    """
    ours = (_CARD, _LABELS, weights, "kept.json", "value.json", "logs")
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if path.name not in ours and not path.name.startswith("."):
            raise ValueError(
                f"output={output}: it holds {path.name}, which is no file of {what}; give a new or "
                "empty folder"
            )


def folder_sha(folder: Path, weights: str) -> str:
    """Stands for what the folder holds."""
    return "".join(models.content_sha(folder / name)[:8] for name in (_CARD, _LABELS, weights))
