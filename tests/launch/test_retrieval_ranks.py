"""Processes that divide the labels of a retrieval loss get the loss and gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from torch import distributed
from llmlabel.loss.retrieval import Relevance, retrieval_loss

rank, meeting = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
LABELS, CUT = 11, 4  # unequal parts; label 3 is the last of the first, 10 of the second
ROWS = [{0: 1.0, 3: 0.5, 4: 0.2}, {10: 1.0}, {}, {3: 1.0, 9: 0.0}, {1: 0.0, 2: 0.0},
        {j: 1.0 for j in range(LABELS)}, {j: 0.0 for j in range(4)} | {5: 0.3, 10: 0.7}]


def part(low, high):
    rows = [{j - low: v for j, v in row.items() if low <= j < high} for row in ROWS]
    ends = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    ids = torch.tensor([j for row in rows for j in row], dtype=torch.long)
    return Relevance(ends, ids, torch.tensor([v for row in rows for v in row.values()]).double())


def gradients(labels, relevance, group, loss):
    x, y = texts.clone().requires_grad_(), labels.clone().requires_grad_()
    found = retrieval_loss(
        x, y, relevance, loss=loss, k=5, temperature=0.4, block=3, group=group
    )
    (found * torch.arange(1.0, len(ROWS) + 1)).sum().backward()
    return found.detach(), x.grad, y.grad


generator = torch.Generator().manual_seed(0)
texts = torch.randn(len(ROWS), 3, generator=generator).double()
labels = torch.randn(LABELS, 3, generator=generator).double()
low, high = (0, CUT) if rank == 0 else (CUT, LABELS)
for loss in ("decoupled_softmax", "softmax", "soft_topk", "bce", "kl", "symmetric_kl"):
    found, x, y = gradients(labels[low:high], part(low, high), distributed.group.WORLD, loss)
    one, x_one, y_one = gradients(labels, part(0, LABELS), None, loss)
    assert found[2] == found[4] == 0 and one[0] > 0
    torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x, x_one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y, y_one[low:high], rtol=1e-10, atol=1e-10)

# a row whose only positive is the last label of its process pulls it: the gradient is along -text
texts = texts[1:2].abs()
ROWS = [{CUT - 1: 1.0}]
_, _, y = gradients(labels[low:high], part(low, high), distributed.group.WORLD, "decoupled_softmax")
assert bool((y[-1] < 0).all()) == (rank == 0) and bool((y[0] > 0).all())

broken = labels[low:high].clone()
if rank:
    broken[0] = torch.nan
found = retrieval_loss(texts, broken, part(low, high), group=distributed.group.WORLD)
assert found.isnan().all()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
