"""From Triton to the machine, without a GPU. Not in a process where TRITON_INTERPRET is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx.machine import Kernel


def compiled(function: Any, architecture: int, signature: Mapping[str, str], warps: int = 4, **constants: int) -> Kernel:
    """Pointers are promised to be multiples of 16, as a launch finds them to be."""
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = {(k,): [["tt.divisibility", 16]] for k, type_ in enumerate(signature.values()) if type_.startswith("*")}
    source = ASTSource(function, types, constants, attrs=aligned)
    result = compile_kernel(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "enable_fp_fusion": False})
    return Kernel(result.asm["ptx"], result.metadata.shared)
