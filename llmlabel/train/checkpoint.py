"""The checkpoint of a training that is not finished: one file, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from llmlabel.files import commit

NAME = ".checkpoint.safetensors"
"""In the folder of the model, until it is finished."""


def save(
    folder: Path, parts: dict[str, dict[str, Tensor]], *, key: str, story: dict[str, Any]
) -> None:
    """Writes named groups of tensors, and what JSON can hold beside them.

    Args:
        folder: of the model; made where there is none.
        parts: name of a group -> its tensors.
        key: stands for everything that the training depends on.
        story: what it went through.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    told = {"key": key, "story": json.dumps(story)}
    folder.mkdir(parents=True, exist_ok=True)
    commit(folder / NAME, lambda path: save_file(tensors, path, metadata=told))


def load(folder: Path, *, key: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The groups and the story of `save`; None where there are none of this key."""
    from safetensors import SafetensorError, safe_open

    file = folder / NAME
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as found:
            told = found.metadata() or {}
            if told.get("key") != key:
                return None
            names = found.keys()
            tensors = {name: found.get_tensor(name) for name in names}
    except SafetensorError:  # cut off by hand, say: begin again
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, inner = name.partition("/")
        parts.setdefault(part, {})[inner] = value
    return parts, json.loads(told["story"])


def remove(folder: Path) -> None:
    """Of a training whose model is saved."""
    (folder / NAME).unlink(missing_ok=True)
