"""What stands for a GPU in a dry run of `fused-opt gpu-check`: the CPU, where Triton's kernels run by its interpreter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fused_opt.bench.gpu_device import Gpu
from fused_opt.native import native


class Interpreter(Gpu):
    """In a process that began with TRITON_INTERPRET=1."""

    dry_run = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        with bfloat16_as_on_gpus(), np.errstate(all="ignore"):
            yield

    def by_triton(self) -> contextlib.AbstractContextManager[None]:
        return _backend("triton")

    def by_cpu(self) -> contextlib.AbstractContextManager[None]:
        return _backend("cpu")

    def synchronize(self) -> None:
        pass

    def release_memory(self) -> None:
        pass


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("FUSED_OPT_BACKEND")
    os.environ["FUSED_OPT_BACKEND"] = name
    native.cache_clear()
    try:
        yield
    finally:
        del os.environ["FUSED_OPT_BACKEND"]
        if before is not None:
            os.environ["FUSED_OPT_BACKEND"] = before
        native.cache_clear()


@contextlib.contextmanager
def bfloat16_as_on_gpus() -> Iterator[None]:
    """Within this context the interpreter converts between float32 and bfloat16 as GPUs do.

    By itself it cuts off what does not fit into a bfloat16, where GPUs round to the nearest, ties to even; and of bfloat16's subnormal
    numbers it makes others.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    names = ("cast_impl", "create_fp_trunc", "create_fp_ext")
    originals = {name: getattr(builder, name) for name in names}

    def cast(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = source.data.view(np.uint32)
            rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
            return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return originals["cast_impl"](self, source, to)

    for name in names:
        setattr(builder, name, cast)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(builder, name, original)
