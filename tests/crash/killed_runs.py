"""What tests of killed runs share: a run as a process of its own, and what it left on disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but notes of times, locks, and what a killed writer left behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in {"run.json", "error.log", ".lock"}
        and not path.name.startswith((".tmp-", ".old-"))
    }


@contextmanager
def started(recipe: Path, output: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "llmlabel", "run", str(recipe), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stderr=pipe, text=True) as process:
        yield process
