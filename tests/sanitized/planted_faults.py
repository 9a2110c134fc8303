"""Faults that the sanitizers must report, in the process that runs the tests: so these ran with sanitizers, whose reports end a process.

address.sh names this file to pytest; the default suite does not collect it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
from collections.abc import Callable

import pytest
import torch

import fused_opt
from fused_opt.native import native
from helpers import SUPPORTED_ISAS

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def report_of(fault: Callable[[], None]) -> str:
    """What a forked child writes to stderr before it is aborted."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write_end, 2)
        faulthandler.disable()  # the report is enough
        fault()
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        report = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"no fault was found: {report}"
    assert os.WTERMSIG(status) == signal.SIGABRT, report
    return report


def step_on(address: int, count: int) -> None:
    """A step on `count` floats at `address`, whatever is there."""
    param = torch.nn.Parameter(torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32))
    param.grad = torch.ones(count)
    fused_opt.SGD([param]).step()


@pytest.mark.parametrize("isa", SUPPORTED_ISAS)
def test_a_kernel_that_goes_past_the_end_is_reported(isa: str, use_isa: Callable[[str], None]) -> None:
    use_isa(isa)
    block = torch.ones(100)
    step_on(block.data_ptr(), 100)
    report = report_of(lambda: step_on(block.data_ptr(), 101))
    assert "heap-buffer-overflow" in report
    assert f"update<fused_opt::{isa}::" in report


def test_memory_that_was_freed_is_reported() -> None:
    block = torch.ones(100)
    step_on(block.data_ptr(), 100)
    freed = block.data_ptr()
    del block
    assert "heap-use-after-free" in report_of(lambda: step_on(freed, 100))


def test_undefined_behaviour_is_reported() -> None:
    library = ctypes.CDLL(native().module.__file__)
    assert library.fused_opt_shift(30) == 1 << 30
    assert "runtime error: shift exponent 40 is too large" in report_of(lambda: library.fused_opt_shift(40))
