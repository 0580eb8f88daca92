"""Fitted calibrators on disk: JSON, with the type, and nothing that could run."""

import importlib
import json
import re
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from llmlabel.files import write_text


def save_calibrator(calibrator: Any, path: Path) -> Path:
    """Writes a fitted dataclass of `llmlabel.calibrate` as JSON, with its type.

    Raises:
        ValueError: If it is none, or was fitted with a function as score and holds it.
    """
    kind = f"{type(calibrator).__module__}.{type(calibrator).__qualname__}"
    _calibrator_type(kind, "")
    try:
        value = TypeAdapter(type(calibrator)).dump_python(calibrator, mode="json")
    except PydanticSerializationError:
        raise ValueError(
            f"{kind} holds what JSON cannot, such as a function as score; take a score with a name, or "
            "fit_conformal, which keeps the name of the function"
        ) from None
    write_text(path, json.dumps({"type": kind, "value": value}, ensure_ascii=False))
    return path


def load_calibrator(path: Path) -> Any:
    """What `save_calibrator` wrote; predicting with it checks label space and model.

    Raises:
        ValueError: If the file is no calibrator.
    """
    try:
        kept = json.loads(path.read_text("utf-8"))
        kind, value = str(kept["type"]), kept["value"]
        return TypeAdapter(_calibrator_type(kind, f"{path}: ")).validate_json(json.dumps(value))
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValidationError,
    ) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"{path}: not a calibrator that save_calibrator wrote ({line}); save it again"
        ) from None


def _calibrator_type(kind: str, where: str) -> Any:
    module, _, name = kind.rpartition(".")
    found = None
    if re.fullmatch(r"llmlabel\.calibrate\.\w+\.[A-Z]\w*", kind):
        with suppress(ModuleNotFoundError):
            found = getattr(importlib.import_module(module), name, None)
        if is_dataclass(found) and isinstance(found, type) and found.__module__ == module:
            return found
    raise ValueError(f"{where}{kind} is no fitted dataclass of llmlabel.calibrate")
