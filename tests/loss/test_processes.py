"""State that losses keep beside the weights is the same for two processes as for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
from torch import distributed
from llmlabel.loss.head_tail import HeadTailBalancer
from llmlabel.loss.longtail import LabelCorrector
from llmlabel.loss.robust import TargetMemory

rank, meeting = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
logits = torch.arange(24.0).reshape(6, 4).sin() * 3

for top_k in (None, 2):
    alone, shared = (TargetMemory(list("abcdef"), 4, top_k=top_k) for _ in range(2))
    for epoch in range(3):
        own = torch.arange(5)[(torch.arange(5) + epoch) % 2 == rank]  # rows change processes
        alone.update(logits[:5] * epoch, torch.arange(5))
        shared.update(logits[own] * epoch, own)
        shared.synchronize()
    assert torch.equal(shared.read(torch.arange(6)), alone.read(torch.arange(6)))
    assert shared.seen.tolist() == [True] * 5 + [False]
shared.update(logits[:1], torch.tensor([0]))
try:
    shared.synchronize()
except ValueError as error:
    assert "row 0 was seen by 2 processes" in str(error)
else:
    raise AssertionError("a row of both processes was taken")

corrector = LabelCorrector(4)
corrector(logits[rank::2], torch.zeros(3, 4))
corrector.synchronize()
torch.testing.assert_close(corrector.sums, logits.sigmoid().sum(dim=0))
assert corrector.rows == 6

balancers = [HeadTailBalancer(4, 2) for _ in range(2)]
for balancer, rows in zip(balancers, (logits[rank::2], logits)):
    with torch.no_grad():
        balancer.classify += torch.arange(24.0).reshape(3, 2, 4)
    balancer(rows).tail.square().sum().backward()
balancers[0].synchronize()
distributed.destroy_process_group()
balancers[1].synchronize()
assert balancers[1].moving.abs().sum() > 0.1
torch.testing.assert_close(balancers[0].moving, balancers[1].moving)
"""


@pytest.mark.slow
def test_two_processes_keep_the_state_of_one(tmp_path: Path) -> None:
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
        errors = process.communicate(timeout=100)[1]
        assert process.returncode == 0, errors
