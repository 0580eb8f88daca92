"""How far a long task is: silent in a library, a bar on a terminal, a plain line now and then in a log.

Steps call `task`; only a program that talks to a person (the command line) calls `show`.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOBase
from typing import Any, TextIO

Advance = Callable[[int], None]


@dataclass
class _Display:
    """Where and how often tasks are shown; `bar` is the rich bar that nested tasks share."""

    stream: TextIO | TextIOBase
    clock: Callable[[], float]
    first_seconds: float
    every_seconds: float
    bar: Any = None


_display: _Display | None = None


def show(
    *,
    stream: TextIO | TextIOBase | None = None,
    clock: Callable[[], float] = time.monotonic,
    first_seconds: float = 5.0,
    every_seconds: float = 10.0,
) -> None:
    """Shows every later task on `stream` (stderr), in rank 0 only.

    Off a terminal, a task's first line comes after `first_seconds` and the next ones every
    `every_seconds`; a shorter task prints nothing.
    """
    global _display
    if os.environ.get("RANK", "0") == "0":
        _display = _Display(stream or sys.stderr, clock, first_seconds, every_seconds)


def hide() -> None:
    """Makes tasks silent again."""
    global _display
    _display = None


@contextmanager
def task(name: str, total: int, unit: str = "rows") -> Iterator[Advance]:
    """A task of `total` units; the body calls the function it is given with what it has done.

    >>> with task("label_direct", 3) as advance:
    ...     advance(2)
    ...     advance(1)
    """
    display = _display
    if display is None:
        yield lambda done: None
    elif display.stream.isatty():
        with _bar(display, name, total, unit) as advance:
            yield advance
    else:
        with _lines(display, name, total, unit) as advance:
            yield advance


@contextmanager
def _lines(display: _Display, name: str, total: int, unit: str) -> Iterator[Advance]:
    start = display.clock()
    due = start + display.first_seconds
    done = 0

    def say(now: float, ending: str) -> None:
        rate = done / max(now - start, 1e-9)
        line = f"{name} {done}/{total} {unit}, {rate:.1f} {unit}/s, {ending}"
        print(line, file=display.stream, flush=True)

    def advance(step: int) -> None:
        nonlocal done, due
        done += step
        now = display.clock()
        if now >= due and 0 < done < total:
            say(now, f"{_span((total - done) * (now - start) / done)} left")
            due = now + display.every_seconds

    yield advance
    now = display.clock()
    if now - start >= display.first_seconds:
        say(now, f"took {_span(now - start)}")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bar(display: _Display, name: str, total: int, unit: str) -> Iterator[Advance]:
    outermost = display.bar is None
    if outermost:  # rich allows one live display at a time
        display.bar = _rich_bar(display.stream)
        display.bar.start()
    handle = display.bar.add_task(name, total=total, unit=unit, rate="")
    start = display.clock()
    done = 0

    def advance(step: int) -> None:
        nonlocal done
        done += step
        rate = done / max(display.clock() - start, 1e-9)
        display.bar.update(handle, completed=done, rate=f"{rate:.1f} {unit}/s")

    try:
        yield advance
    finally:
        if outermost:
            display.bar.stop()
            display.bar = None


def _rich_bar(stream: Any) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
