"""Runs the PTX that Triton emits on the CPU, in the memory of CPU tensors.

It faults where a GPU would, and where it is undefined what a GPU would do:

    memory = Memory()
    x = memory.add("x", tensor)
    statistics = Kernel(compiled.asm["ptx"], compiled.metadata.shared).run((blocks,), [x, n, 0, 0], memory)

`parser` reads the text, `types` says what a register's bits stand for, `operations` is the table of what computes a value from values,
`arithmetic` their exact arithmetic; `accesses` are loads and stores, `memory` what they may touch, `warps` exchanges between threads;
`steps` makes a function of each instruction, and `machine` runs them for `threads`. What the tables do not name is refused when a kernel
is read: nothing is ignored, and nothing approximated. The other files are for tests: `compiling` from Triton, `sample_kernels`,
`handwritten` ones, `operation_cases` and `mistakes`.
"""

from __future__ import annotations

from ptx.errors import PtxFaultError, UnsupportedPtxError
from ptx.machine import Kernel
from ptx.memory import Memory
from ptx.threads import Statistics

__all__ = ["Kernel", "Memory", "PtxFaultError", "Statistics", "UnsupportedPtxError"]
