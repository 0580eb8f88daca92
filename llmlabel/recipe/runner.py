"""Runs a recipe: what is to do, in order, in one process or many; the same command again resumes."""

import gc
import logging
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llmlabel.recipe import keep
from llmlabel.recipe.calls import Call, Recipe, Ref, bind, install_hint

_log = logging.getLogger(__name__)
_PACKAGES = ("llmlabel", "torch", "transformers", "datasets", "numpy")


class StepError(RuntimeError):
    """A step failed; one line that names the variable."""


class Results(Mapping[str, Any]):
    """The values of a run's variables, each read when it is asked for; engines are gone."""

    def __init__(self, readers: dict[str, Callable[[], Any]]) -> None:
        """Of one function per variable that reads its value."""
        self._readers = readers

    def __getitem__(self, name: str) -> Any:
        """The value of one variable."""
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        """The names in the order of the recipe."""
        return iter(self._readers)

    def __len__(self) -> int:
        """How many variables have a value."""
        return len(self._readers)


def run(
    recipe: Recipe, *, output: Path = Path("runs"), allow: Sequence[str] = (), force: bool = False
) -> Results:
    """Computes what is not kept in `output/<recipe>/`, in order.

    What can be kept is read back from there even right after it was computed, so that a run that
    was interrupted goes on with exactly the values of one that was not. Engines and other live
    objects are built when a call needs them and released after the last one.

    Args:
        recipe: From `load_recipe`.
        output: The folder of all runs.
        allow: Top-level packages besides llmlabel that calls may name.
        force: Deletes what is kept and computes everything again.

    Raises:
        RecipeError: The recipe does not fit; nothing was run.
        RuntimeError: Another process runs in the folder.
        StepError: A step failed; what was kept before stays.
    """
    bound = bind(recipe, allow=allow)
    folder = output / recipe.name
    with keep.lock(folder):
        if _is_main():
            keep.sweep(folder)
        work = _Work(recipe, bound, folder, force=force)
        _meet()  # all have seen the same kept results before the first one changes
        work.write_notes()
        try:
            for position, name in enumerate(work.to_do):
                with _reported(recipe, name, folder):
                    work.compute(name)
                _meet()
                work.release(work.to_do[position + 1 :])
        finally:  # what was spent is spent, whatever happened then
            work.note_usage()
    lasting = [n for n, v in bound.items() if not (isinstance(v, Call) and keep.is_live(v))]
    return Results({name: partial(work.value, name) for name in lasting})


class _Work:
    """One run: what is to do, the values in memory, and what `run.json` says."""

    def __init__(self, recipe: Recipe, bound: dict[str, Any], folder: Path, *, force: bool) -> None:
        self.recipe, self.bound, self.folder, self.force = recipe, bound, folder, force
        self.marks: dict[str, str] = {}
        self.arguments: dict[str, dict[str, str]] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.memory: dict[str, Any] = {}
        self.unkept: dict[str, Any] = {}
        """Results that no file can hold, but that the recipe wants computed."""
        before = (keep.read_json(folder / "run.json") or {}).get("variables", {})
        for name, value in bound.items():
            with _reported(recipe, name, folder):
                self.marks[name], self.arguments[name] = keep.fingerprint(value, self.marks)
            note = {**self._state(name), "fingerprint": self.marks[name]}
            old = before.get(name, {})
            if old.get("fingerprint") == self.marks[name]:
                if note["state"] == "kept":
                    note = old | note  # when it was computed, and how long that took
                elif "usage" in old:
                    note["usage"] = old["usage"]  # of the last run that asked this engine
            if isinstance(value, Call):
                note["defaults"] = keep.as_json(value.defaults)  # seeds, among others
            self.notes[name] = note
        self.to_do = [name for name, note in self.notes.items() if note["state"] == "to do"]

    def _state(self, name: str) -> dict[str, Any]:
        value = self.bound[name]
        if not isinstance(value, Call):
            return {"state": "given"}
        if keep.is_live(value):
            return {"state": "not needed"}
        kept = keep.read_kept(self.folder / name, self.marks[name])
        if kept is None or self.force or value.returns is None:
            return {"state": "to do"}
        if not keep.is_whole(self.folder / name, kept):
            return {"state": "to do", "damaged": True}
        return {"state": "kept", "kind": kept["kind"]}

    def compute(self, name: str) -> None:
        """Computes and keeps one variable; training in all processes, all else in the first."""
        call: Call = self.bound[name]
        folder = self.folder / name
        started, start = datetime.now(UTC), time.monotonic()
        if _is_main():
            self._announce(name, folder)
            if self.force:
                shutil.rmtree(folder, ignore_errors=True)
            keep.forget(folder)
        elif not call.path.startswith("llmlabel.train."):
            return
        value = self._evaluate(call, folder)
        if not _is_main():
            return
        kind = None
        if call.returns is not None:
            kind = keep.keep(
                value,
                folder,
                returns=call.returns,
                fingerprint=self.marks[name],
                arguments=self.arguments[name],
            )
            if kind is None:
                _log.warning(
                    "%s: no file holds a %s, so it is not kept", name, type(value).__name__
                )
        if kind is None:
            self.unkept[name] = value
        self.notes[name] |= {
            "state": "computed",
            "kind": kind,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 3),
        }
        self.write_notes()

    def _announce(self, name: str, folder: Path) -> None:
        old = (keep.read_json(folder / "kept.json") or {}).get("arguments")
        new = self.arguments[name]
        why = ""
        if self.notes[name].pop("damaged", False):
            why = " again, because what was kept is damaged"
        elif old is not None and not self.force:
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            why = f" again, because of {', '.join(changed) or 'the call or the version'}"
        _log.info("%s: computing%s", name, why)

    def value(self, name: str) -> Any:
        """A variable: from memory, from what is kept, or built."""
        value, folder = self.bound[name], self.folder / name
        if isinstance(value, Call) and value.returns is None:
            return None
        if name in self.unkept:
            return self.unkept[name]
        if name not in self.memory:
            if isinstance(value, Call) and keep.read_kept(folder, self.marks[name]):
                self.memory[name] = keep.load_kept(folder, returns=value.returns)
            else:
                self.notes[name]["state"] = "built" if isinstance(value, Call) else "given"
                self.memory[name] = self._evaluate(value, folder)
        return self.memory[name]

    def _evaluate(self, value: Any, folder: Path) -> Any:
        """A bound value as the function gets it; `folder` is where it may keep files."""
        if isinstance(value, Ref):
            return self.value(value.name) if value.is_call else self._evaluate(value.value, folder)
        if isinstance(value, dict):
            return {key: self._evaluate(v, folder / str(key)) for key, v in value.items()}
        if isinstance(value, list):
            return [self._evaluate(v, folder / str(i)) for i, v in enumerate(value)]
        if not isinstance(value, Call):
            return value
        arguments = {k: self._evaluate(v, folder / k) for k, v in value.arguments.items()}
        if value.makes_output:
            folder.mkdir(parents=True, exist_ok=True)
            arguments["output"] = folder
        return value.function(**arguments)

    def release(self, later: Sequence[str]) -> None:
        """Drops the values that computing `later` does not read, such as a model in memory."""
        needed: set[str] = set()
        queue = [ref for name in later for ref in _refs(self.bound[name])]
        while queue:
            name = queue.pop()
            on_disk = self.notes[name]["state"] in ("kept", "to do", "computed")
            if name not in needed and not on_disk:
                queue += _refs(self.bound[name])
            needed.add(name)
        dropped = [name for name in self.memory if name not in needed]
        self.note_usage()
        for name in dropped:
            del self.memory[name]
        if any(self.notes[name]["state"] == "built" for name in dropped):
            gc.collect()  # a model is in circles of references; this takes a tenth of a second

    def note_usage(self) -> None:
        """Writes down what the engines in memory have been asked so far, and what that cost."""
        from llmlabel.engine import Usage

        spent = {}
        for name, value in self.memory.items():
            usage = getattr(value, "usage", None)
            if isinstance(usage, Usage) and usage.requests:
                spent[name] = {**asdict(usage), "cost": getattr(value, "cost", None)}
        if any(self.notes[name].get("usage") != used for name, used in spent.items()):
            for name, used in spent.items():
                self.notes[name]["usage"] = used
            self.write_notes()

    def write_notes(self) -> None:
        """Writes `run.json`."""
        if not _is_main():
            return
        versions = {"python": platform.python_version()}
        content = {
            "recipe": self.recipe.path.read_text(encoding="utf-8"),
            "assignments": self.recipe.assignments,
            "versions": versions | {package: keep.version(package) for package in _PACKAGES},
            "variables": self.notes,
        }
        keep.write_json(self.folder / "run.json", content)


def _refs(value: Any) -> list[str]:
    """The variables that a bound value names."""
    if isinstance(value, Ref):
        return [value.name, *_refs(value.value)]
    if isinstance(value, Call):
        value = value.arguments
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for part in parts for name in _refs(part)]


@contextmanager
def _reported(recipe: Recipe, variable: str, folder: Path) -> Iterator[None]:
    """Turns the error of a step into one line; the traceback goes to `error.log`."""
    try:
        yield
    except Exception as error:
        full = _full_disk(error, folder)
        if full is None and not isinstance(
            error, ValueError | OSError | RuntimeError | ImportError
        ):
            raise  # a bug: its traceback is shown
        log = folder / "error.log"
        details = ""
        with suppress(OSError):  # the disk may be full
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            details = f" (details: {log})"
        problem = full or _problem(error)
        raise StepError(f"{recipe.path.name}: {variable}: {problem}{details}") from error


def _full_disk(error: BaseException, folder: Path) -> str | None:
    from llmlabel.files import disk_is_full  # here: it imports datasets, which takes a second

    cause: BaseException | None = error
    while cause is not None:
        if disk_is_full(cause):
            place = getattr(cause, "filename", None) or folder
            return f"the disk of {place} is full; what is kept stays: free space, run it again"
        cause = cause.__cause__ or cause.__context__
    return None


def _problem(error: BaseException) -> str:
    text = install_hint(error) if isinstance(error, ImportError) else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _meet() -> None:
    """All processes of one launch wait for each other here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        # Without the word, accelerate takes processes on CPUs for strangers and nobody waits.
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
