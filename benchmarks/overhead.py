"""What labelling itself costs: rows/s, memory and the scan of a resume, with an engine for nothing.

    python benchmarks/overhead.py --rows 100000 1000000 --block-rows 256 10000

`label_direct` (five labels, prompt label/direct) on short texts that stand memory-mapped on the
disk; each measurement is a process of its own. The overhead is all the time of the call but the
engine's. "Resume" is the same call in a new process when all blocks are there. Writes
benchmarks/results/overhead.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from llmlabel.engine import Scores
from llmlabel.label.direct import label_direct
from llmlabel.labelspace import load_labels
from llmlabel.prompt import Chat

LABELS = ["bug report", "praise", "question", "spam", "other"]
RESULT = Path(__file__).parent / "results" / "overhead.md"


class FreeEngine:
    """Says the same of every text, at once, and remembers how long that took."""

    name = "free"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rows = 0

    def score(self, chats: Sequence[Chat], labels: Sequence[str]) -> Scores:
        """The same numbers for every chat."""
        start = time.perf_counter()
        scores = Scores(np.tile(np.log([0.5, 0.2, 0.1, 0.05, 0.01]), (len(chats), 1)))
        self.seconds += time.perf_counter() - start
        self.rows += len(chats)
        return scores


def make_texts(folder: Path, rows: int) -> None:
    numbers = range(rows)
    texts = [f"Message {n}: the cat sat on the mat and it broke." for n in numbers]
    table = {"id": [f"row-{n}" for n in numbers], "text": texts}
    datasets.Dataset.from_dict(table).save_to_disk(str(folder))


def measure(texts: Path, output: Path, block_rows: int) -> dict[str, float]:
    """One call in this process."""
    dataset = datasets.load_from_disk(str(texts))
    engine = FreeEngine()
    before = _peak_mb()
    start = time.perf_counter()
    table = label_direct(dataset, engine, load_labels(LABELS), block_rows=block_rows, output=output)
    seconds = time.perf_counter() - start
    assert len(table) == len(dataset)
    np.testing.assert_allclose(table[-1]["label_probs"][0], 0.5 / 0.86, rtol=1e-6)
    return {
        "seconds": seconds,
        "engine_seconds": engine.seconds,
        "asked": engine.rows,
        "before_mb": before,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_new_process(*arguments: object) -> dict[str, float]:
    """What the call says; a process counts the memory of the one that started it as its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--block-rows", type=int, nargs="+", default=[256, 10_000])
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    if given.make:
        make_texts(Path(given.make[0]), int(given.make[1]))
        print("{}")
        return
    if given.measure:
        texts, output, block_rows = given.measure
        print(json.dumps(measure(Path(texts), Path(output), int(block_rows))))
        return
    lines = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            texts = Path(folder) / "texts"
            in_new_process("--make", texts, rows)
            for block_rows in given.block_rows:
                output = Path(folder) / str(block_rows)
                first = in_new_process("--measure", texts, output, block_rows)
                again = in_new_process("--measure", texts, output, block_rows)
                assert (first["asked"], again["asked"]) == (rows, 0)
                rate = rows / (first["seconds"] - first["engine_seconds"])
                size = sum(f.stat().st_size for f in output.rglob("*.parquet")) / 1024**2
                lines.append(
                    f"| {rows:,} | {block_rows:,} | {rate:,.0f} | {first['peak_mb']:.0f} MB "
                    f"| {again['seconds']:.2f} s | {again['peak_mb']:.0f} MB "
                    f"| {first['before_mb']:.0f} MB | {size:.1f} MB |"
                )
                print(lines[-1], flush=True)
    heading = (
        "| rows | rows a block | rows/s of own overhead | peak memory | resume | its peak memory "
        "| memory before the call | blocks on disk |\n|" + "---:|" * 8
    )
    command = f"python benchmarks/overhead.py --rows {' '.join(map(str, given.rows))} --block-rows "
    command += " ".join(map(str, given.block_rows))
    versions = f"Python {platform.python_version()}, datasets {datasets.__version__}"
    RESULT.write_text(
        f"`{command}`, {os.cpu_count()} CPU cores, {versions}\n\n"
        + "\n".join([heading, *lines])
        + "\n"
    )


if __name__ == "__main__":
    main()
