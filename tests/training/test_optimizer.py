from __future__ import annotations

import subprocess
import sys

import torch

from tunesmith.training.optimizer import FlatAdamW


def test_steps_are_those_of_torch_to_the_bit() -> None:
    chance = torch.Generator().manual_seed(0)
    ours = torch.randn(1_000, generator=chance)
    theirs = ours.clone()
    gradient = torch.zeros_like(ours)
    theirs.grad = torch.zeros_like(ours)
    optimizer = FlatAdamW(ours, gradient, weight_decay=0.01, largest_norm=1.0)
    expected = torch.optim.AdamW([theirs], weight_decay=0.01, fused=True)
    for step in range(1, 5):
        gradient.normal_(generator=chance).mul_(0.1 if step == 2 else 0.01)
        assert (gradient.norm() > 1.0) == (step == 2)
        theirs.grad.copy_(gradient)
        expected.param_groups[0]["lr"] = 0.01 / step
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        expected.step()
        optimizer.step(0.01 / step)
    assert torch.equal(ours, theirs)
    assert {name: value.tolist() for name, value in optimizer.state.items()} == {
        name: value.tolist() for name, value in expected.state[theirs].items()
    }


def test_a_step_does_not_import_the_compiler() -> None:
    program = """
import sys, torch
from tunesmith.training.optimizer import FlatAdamW
FlatAdamW(torch.zeros(2), torch.ones(2), weight_decay=0.0, largest_norm=1.0).step(0.1)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
