"""What a run keeps: the fingerprint of each variable, its result on disk, and the lock.

A variable has the folder `runs/<recipe>/<variable>/`. Files that a step writes by its parameter
`output` are there, and beside them the kept result: `value.parquet` (a dataset), `value.json`
(a label space, another dataclass, JSON values) or nothing (the result is the path of a folder).
`kept.json` is written last; without it, or with another fingerprint in it, nothing is kept. It
has marks of the value's files, so that a value that is damaged later is computed again.
"""

import hashlib
import importlib.metadata
import inspect
import json
import shutil
import types
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import PydanticUserError, TypeAdapter
from pydantic_core import PydanticSerializationError, SchemaError, to_jsonable_python

from llmlabel.files import lock as lock_folder
from llmlabel.recipe.calls import Call, Ref

_QUICK_BYTES = 64 * 1024**2


def version(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process per run folder; the system frees the lock of a killed one.

    Raises:
        RuntimeError: Another process has it, or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(lock_folder(folder, way_out="another --output"))
        except OSError as error:
            raise RuntimeError(
                f"the run folder {folder} cannot be written ({error.strerror}); give another --output"
            ) from error
        yield


def sweep(folder: Path) -> None:
    """Removes what a killed writer left half done; to be called under the lock."""
    for pattern in (".tmp-*", ".old-*"):
        for path in folder.rglob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------- fingerprints


def fingerprint(value: Any, known: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The sha256 of a bound value, and for a call that of each argument.

    Args:
        value: What `llmlabel.recipe.calls.bind` made of a variable.
        known: The fingerprints of earlier variables.

    Raises:
        FileNotFoundError: A `package:` path names nothing.
    """
    if not isinstance(value, Call):
        return _sha(_content(value, known)), {}
    arguments = {}
    for name, argument in {**value.defaults, **value.arguments}.items():
        text = argument.value if isinstance(argument, Ref) else argument
        each = text if isinstance(text, list) else [text]
        if name == "prompt" and all(isinstance(one, str | Path) for one in each):
            from llmlabel.prompt import prompt_sha

            arguments[name] = _sha(["prompt", *map(prompt_sha, each)])
        else:
            # A string in a list is no path, except where the annotation made a Path of it
            files = (str, Path) if name in value.files else ()
            arguments[name] = _sha(_content(argument, known, files=files))
    return _sha([value.path, version("llmlabel"), arguments]), arguments


def _content(value: Any, known: dict[str, str], *, files: tuple[type, ...] = ()) -> Any:
    """JSON that changes when the value does: references by fingerprint, files by content."""
    if isinstance(value, Ref):
        return (
            ["ref", known[value.name]]
            if value.is_call
            else _content(value.value, known, files=files)
        )
    if isinstance(value, Call):
        return ["call", fingerprint(value, known)[0]]
    inner = files and (Path,)
    if isinstance(value, dict):
        return {str(key): _content(part, known, files=inner) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_content(part, known, files=inner) for part in value]
    is_package = isinstance(value, str) and value.startswith("package:")
    if isinstance(value, str | Path) and (isinstance(value, files) or is_package):
        from llmlabel.models import content_sha, local_path

        if (path := local_path(value)) is not None:
            return {"name": path.name, "content": content_sha(path)}
    return as_json(value)


def as_json(value: Any) -> Any:
    """JSON for a value of a recipe or a signature; a name stands for what JSON does not know."""
    return to_jsonable_python(value, fallback=lambda v: getattr(v, "__qualname__", str(type(v))))


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------- kept results


def is_live(call: Call) -> bool:
    """Whether the result is something to work with, such as an engine, which no file can hold."""
    if inspect.isclass(call.function):
        return True
    if isinstance(call.returns, str):  # a type that is imported for type checkers only
        return call.returns.rpartition(".")[2] != "Dataset"
    is_union = typing.get_origin(call.returns) in (typing.Union, types.UnionType)
    members = typing.get_args(call.returns) if is_union else (call.returns,)
    if any(_is_dataset(member) for member in members):
        return False
    try:
        TypeAdapter(call.returns)
    except (PydanticUserError, SchemaError):
        return True
    return False


def read_kept(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """What `kept.json` says, when it is of this fingerprint and its value is there."""
    note = read_json(folder / "kept.json")
    if note is None or note.get("fingerprint") != fingerprint or not {"kind", "files"} <= set(note):
        return None
    return note if _place(folder, note).exists() else None


def is_whole(folder: Path, note: dict[str, Any]) -> bool:
    """Whether the value is still what it was when `kept.json` was written."""
    now = _marks(folder, note)
    return all(now.get(name) == mark for name, mark in note["files"].items())


def _marks(folder: Path, note: dict[str, Any]) -> dict[str, str]:
    """File of the value -> size, and sha256 where reading it is quick; of none outside the run."""
    from llmlabel.models import content_sha

    place = _place(folder, note)
    if not note.get("inside", True):
        return {}
    marks = {}
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "kept.json" and not name.startswith("blocks/"):
            size = path.stat().st_size
            marks[name] = f"{size} {content_sha(path)[:16]}" if size <= _QUICK_BYTES else f"{size}"
    return marks


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON mapping, or None when there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that either the old or the new file is there."""
    from llmlabel.files import commit

    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    commit(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def forget(folder: Path) -> None:
    """Before a variable is computed again: a run that is killed half way has not kept it.

    A step that was finished may be followed by another call, so that the notes of whose blocks there
    are go first; one that was not may only be continued (see `llmlabel.blocks`).
    """
    if (kept := folder / "kept.json").is_file():
        for note in folder.rglob("blocks/*.json"):
            note.unlink()
        kept.unlink()


def keep(
    value: Any, folder: Path, *, returns: Any, fingerprint: str, arguments: dict[str, str]
) -> str | None:
    """Writes a result and then `kept.json`; returns its kind, or None when no file can hold it."""
    note: dict[str, Any] = {"fingerprint": fingerprint, "arguments": arguments}
    if isinstance(value, Path):
        inside = value.resolve().is_relative_to(folder.resolve())
        place = value.resolve().relative_to(folder.resolve()) if inside else value
        note |= {"kind": "path", "path": place.as_posix(), "inside": inside}
    elif _is_dataset(type(value)):
        from llmlabel.data import save

        save(value, folder / "value.parquet")
        note |= {"kind": "dataset"}
    else:
        try:
            content = _to_json(value, returns)
        except (PydanticUserError, PydanticSerializationError, SchemaError, TypeError, ValueError):
            return None
        write_json(folder / "value.json", content)
        note |= {"kind": "json"}
    write_json(folder / "kept.json", note | {"files": _marks(folder, note)})
    return str(note["kind"])


def load_kept(folder: Path, *, returns: Any) -> Any:
    """The result that `keep` wrote."""
    note = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
    place = _place(folder, note)
    if note["kind"] == "path":
        return place
    if note["kind"] == "dataset":
        from llmlabel.data import read_parquet

        return read_parquet(place)
    return _adapter(returns).validate_json(place.read_bytes())


def _place(folder: Path, note: dict[str, Any]) -> Path:
    if note["kind"] == "path":
        return folder / note["path"] if note["inside"] else Path(note["path"])
    return folder / {"dataset": "value.parquet", "json": "value.json"}[note["kind"]]


def _to_json(value: Any, returns: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError:  # a dataclass, or values that JSON does not know
        if _adapter(returns) is _ANYTHING:
            raise
        return _adapter(returns).dump_python(value, mode="json", warnings="error")
    return value


_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def _adapter(annotation: Any) -> Any:  # a TypeAdapter, which beartype does not read
    return (
        _ANYTHING if annotation is Any or isinstance(annotation, str) else TypeAdapter(annotation)
    )


def _is_dataset(cls: Any) -> bool:
    """By name, because importing `datasets` takes a second."""
    return getattr(cls, "__module__", "") == "datasets.arrow_dataset" and cls.__name__ == "Dataset"
