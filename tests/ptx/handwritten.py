"""Kernels of a few instructions, written by hand."""

from __future__ import annotations

import re

import numpy as np
import torch

from ptx.machine import Kernel
from ptx.memory import Memory
from ptx.threads import Statistics


def kernel(body: str, parameters: int = 0, shared_bytes: int = 0) -> Kernel:
    """32 threads a block; pointers as parameters: p0, p1 and so on."""
    declared = ", ".join(f".param .u64 .ptr .global .align 1 p{k}" for k in range(parameters))
    text = f"""
        .version 8.7
        .target sm_90a
        .address_size 64
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry test({declared})
        .reqntid 32
        {{
        .reg .pred %p<10>; .reg .b16 %h<10>; .reg .b32 %r<10>; .reg .b64 %d<10>; .reg .b32 lane, block; .reg .b64 at, wide;
        mov.u32 lane, %tid.x;
        mov.u32 block, %ctaid.x;
        {body}
        ret;
        }}"""
    return Kernel(text, shared_bytes)


def launch(kernel: Kernel, blocks: int, *arguments: torch.Tensor | float) -> Statistics:
    memory = Memory()
    values = [memory.add(f"tensor {k}", x) if isinstance(x, torch.Tensor) else x for k, x in enumerate(arguments)]
    return kernel.run((blocks,), values, memory)


def run(body: str, *tensors: torch.Tensor, shared_bytes: int = 0, blocks: int = 1) -> Statistics:
    return launch(kernel(body, len(tensors), shared_bytes), blocks, *tensors)


def evaluate(instruction: str, rows: list[tuple[int, ...]]) -> list[int]:
    """Register 0 after the instruction, for each row of what is in registers 1, 2 and so on."""
    kinds = {int(number): kind for kind, number in re.findall(r"%([phrd])(\d)", instruction)}
    columns = max(kinds)
    inputs = torch.zeros(-(-len(rows) // 32) * 32, columns, dtype=torch.int64)
    inputs[: len(rows)] = torch.from_numpy(np.array(rows, dtype=np.uint64).view(np.int64))
    results = torch.zeros(len(inputs), dtype=torch.int64)
    narrow = {"p": "setp.ne.b64 %p{}, wide, 0;", "h": "cvt.u16.u64 %h{}, wide;", "r": "cvt.u32.u64 %r{}, wide;", "d": "mov.b64 %d{}, wide;"}
    widen = {"p": "selp.b64 wide, 1, 0, %p0;", "h": "cvt.u64.u16 wide, %h0;", "r": "cvt.u64.u32 wide, %r0;", "d": "mov.b64 wide, %d0;"}
    loads = [f"ld.global.b64 wide, [at+{8 * (k - 1)}]; {narrow[kinds[k]].format(k)}" for k in range(1, columns + 1)]
    row = "mad.lo.s32 %r9, block, 32, lane; ld.param.b64 %d9, [{}]; mad.wide.u32 at, %r9, {}, %d9;"
    body = [row.format("p0", 8 * columns), *loads, f"{instruction};", row.format("p1", 8), widen[kinds[0]], "st.global.b64 [at], wide;"]
    run("\n".join(body), inputs, results, blocks=len(inputs) // 32)
    return [value % 2**64 for value in results[: len(rows)].tolist()]
