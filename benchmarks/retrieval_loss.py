"""Memory and time of the fused retrieval losses beside dense ones, on one thread.

    python benchmarks/retrieval_loss.py

Every memory figure is the largest resident set of a fresh process, from its start: Python, torch,
embeddings, loss and gradients. Times are CPU seconds of loss and gradients, as medians of rounds
in one process in which the ways take turns; the yardstick is one dense product of texts and labels
with its backward pass, which is no loss yet. Needs 4 GB; writes results/retrieval_loss.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlabel.loss.retrieval import Relevance, dense_retrieval_loss, retrieval_loss

LOSSES = ("decoupled_softmax", "softmax", "kl", "bce", "symmetric_kl", "soft_topk")
POSITIVES, WIDTH = 5, 384
MIB, GIB = 2**20, 2**30
SMALL, LARGE = (256, 131_072), (512, 1_000_000)
CASES: list[tuple[str, dict[str, Any], int | None]] = [
    ("decoupled_softmax, float32", {"shape": SMALL}, 900 * MIB),
    ("soft_topk, float32", {"shape": SMALL, "loss": "soft_topk"}, 900 * MIB),
    ("symmetric_kl, float32", {"shape": SMALL, "loss": "symmetric_kl"}, 900 * MIB),
    ("decoupled_softmax, float32, dense", {"shape": SMALL, "dense": True}, None),
    ("embeddings and torch alone, float32", {"shape": LARGE, "loss": None}, None),
    ("decoupled_softmax, float32", {"shape": LARGE}, 3 * GIB),
    ("decoupled_softmax, float32, labels fixed", {"shape": LARGE, "fixed": True}, 3 * GIB),
    ("decoupled_softmax, labels bfloat16", {"shape": LARGE, "half": True}, 3 * GIB),
]


def random_case(rows: int, labels: int, *, half: bool = False) -> tuple[Tensor, Tensor, Relevance]:
    """Unit embeddings, each text with 5 positives; made in place, so that nothing larger was held."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(rows, WIDTH, generator=generator)
    texts /= texts.norm(dim=1, keepdim=True)
    pool = torch.empty(labels, WIDTH, dtype=torch.bfloat16 if half else torch.float32)
    for part in pool.split(8192):
        drawn = torch.randn(len(part), WIDTH, generator=generator)
        part.copy_(drawn.div_(drawn.norm(dim=1, keepdim=True)))
    step = labels // POSITIVES
    starts = torch.randint(step, (rows, 1), generator=generator)
    ids = (starts + step * torch.arange(POSITIVES)).flatten()
    relevance = Relevance(torch.arange(rows + 1) * POSITIVES, ids, torch.ones(len(ids)))
    return texts, pool, relevance


def peak(
    shape: list[int],
    *,
    loss: Any = "decoupled_softmax",
    dense: bool = False,
    fixed: bool = False,
    half: bool = False,
) -> int:
    """Bytes of this process at most, by the kernel's count."""
    texts, labels, relevance = random_case(*shape, half=half)
    texts.requires_grad_()
    labels.requires_grad_(not fixed)
    if dense:
        found = dense_retrieval_loss(texts @ labels.T / 0.05, relevance, loss=loss)
        found.mean().backward()
    elif loss is not None:
        retrieval_loss(texts, labels, relevance, loss=loss).mean().backward()
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def memory_table() -> list[str]:
    """A row for each case, each in a process of its own."""
    lines = ["| rows x labels | what | peak resident MiB | bound |", "|---|---|---|---|"]
    for name, options, bound in CASES:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", json.dumps(options)],
            capture_output=True,
            text=True,
            check=True,
        )
        found, (rows, labels) = int(done.stdout), options["shape"]
        verdict = "" if bound is None else f"{bound // MIB} {'kept' if found < bound else 'MISSED'}"
        lines.append(f"| {rows} x {labels:,} | {name} | {found / MIB:,.0f} | {verdict} |")
    return lines


def ways(shape: tuple[int, int]) -> dict[str, Callable[[], None]]:
    """What is timed: name to a function."""
    texts, labels, relevance = random_case(*shape)
    texts.requires_grad_()
    labels.requires_grad_()
    upstream = torch.full((shape[0], shape[1]), 1e-3)

    def product() -> None:
        (texts @ labels.T).backward(upstream)

    def fused(loss: Any, block: int = 8192) -> None:
        retrieval_loss(texts, labels, relevance, loss=loss, block=block).mean().backward()

    def dense(loss: Any) -> None:
        dense_retrieval_loss(texts @ labels.T / 0.05, relevance, loss=loss).mean().backward()

    def timed(run: Callable[[], None]) -> Callable[[], None]:
        def clean() -> None:
            texts.grad = labels.grad = None
            run()

        return clean

    found = {
        "dense product": product,
        "decoupled_softmax, dense": lambda: dense("decoupled_softmax"),
    }
    for block in (1024, 4096):
        found[f"decoupled_softmax, fused, block {block}"] = lambda block=block: fused(
            "decoupled_softmax", block
        )
    for loss in LOSSES:
        found[f"{loss}, fused"] = lambda loss=loss: fused(loss)
    return {name: timed(run) for name, run in found.items()}


def time_table(shape: tuple[int, int], rounds: int) -> list[str]:
    """Medians over the rounds, and over the same rounds' yardstick."""
    seconds: dict[str, list[float]] = {}
    timed = ways(shape)
    for turn in range(rounds + 1):
        for name, run in timed.items():
            started = time.process_time()
            run()
            if turn:  # the first one warms up
                seconds.setdefault(name, []).append(time.process_time() - started)
    lines = [
        "| what | CPU seconds | times the dense product, median (lowest to highest) |",
        "|---|---|---|",
    ]
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["dense product"], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(taken):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=SMALL[1], help="of the timed case")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(**args.peak))
        return
    memory = memory_table()
    times = time_table((SMALL[0], args.labels), args.rounds)
    lines = [
        "# Fused retrieval losses: memory and time",
        "",
        "`python benchmarks/retrieval_loss.py`: width 384, 5 positives a row, temperature 0.05, one "
        f"thread, torch {torch.__version__}; how it is measured stands in the script.",
        "",
        *memory,
        "",
        f"{SMALL[0]} x {args.labels:,}, {args.rounds} rounds, blocks of 8192 labels unless told:",
        "",
        *times,
        "",
        "A fused loss computes the scores twice, four products of matrices for the three of the "
        "yardstick, which is 1.33 before anything else; what the yardstick spends on writing and "
        "reading its table of scores pays for part of that. `soft_topk` looks for the highest scores "
        "of each row too and sums powers of the others, from which t follows without another pass.",
    ]
    Path("benchmarks/results/retrieval_loss.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
