"""No temporary of a parameter's size, ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")

CODE = """
import sys, torch, fused_opt
from fused_opt.bench.machine import peak_memory
param = torch.nn.Parameter(torch.ones(16 * 2**20))
param.grad = torch.full_like(param, 0.5)
module = fused_opt if sys.argv[1] == "fused_opt" else torch.optim
optimizer = getattr(module, sys.argv[2])([param], **({"foreach": False} if module is torch.optim else {}))
optimizer.step()  # makes the states
print(peak_memory(optimizer.step) / 2**20)
"""


def peak_mib(module: str, optimizer: str) -> float:
    """By how much a process grows in a step on 64 MiB of parameters; in one of its own, where nothing else is allocated."""
    command = [sys.executable, "-c", CODE, module, optimizer]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout)


@pytest.mark.parametrize("optimizer", ["AdamW", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Adam", "RMSprop", "SGD"))])
def test_a_step_allocates_nothing_of_a_parameters_size(optimizer: str) -> None:
    assert peak_mib("fused_opt", optimizer) < 4


def test_the_measure_sees_such_an_allocation() -> None:
    assert peak_mib("torch", "RMSprop") > 60
