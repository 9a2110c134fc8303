"""What serves steps here: loads the extension, chooses its instruction set, and finds out whether Triton can be used.

Nothing here is an error until somebody needs it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("cpu", "triton", "torch")

# Who steps the tensors of a device: `Server` in csrc/batch.h.
NOBODY, CPU_KERNELS, DEVICE_KERNELS = 0, 1, 2

# Of a GPU by NVIDIA; the least that Triton 3.6 to 3.9 compile for.
_LEAST_CAPABILITY = (7, 5)
_LEAST_TRITON = (3, 6)


@dataclass(frozen=True)
class Native:
    """What this process uses.

    Attributes:
        module: the extension `fused_opt._cpu`, or None if torch's own step serves everything.
        isa: the instruction set that steps run on.
        why: the reason for `isa`, or for there being no module.
        forced: "cpu" or "triton" if FUSED_OPT_BACKEND forbids all else, or "".
    """

    module: Any
    isa: str
    why: str
    forced: str


@functools.cache
def native() -> Native:
    """Load and choose, once a process.

    Raises:
        ValueError: FUSED_OPT_BACKEND or FUSED_OPT_CPU_ISA names something that does not exist.
        RuntimeError: one of them names something that this installation or machine cannot do.
    """
    backend = os.environ.get("FUSED_OPT_BACKEND", "")
    if backend and backend not in BACKENDS:
        raise ValueError(f"FUSED_OPT_BACKEND={backend!r} is not a backend; use one of {', '.join(BACKENDS)}, or unset it")
    try:
        import torch  # noqa: F401  # before the extension, which then shares torch's copy of OpenMP

        from fused_opt import _cpu

        _cpu.reader()  # looks torch's tensors up
    except Exception as error:  # a broken build must leave torch's own step usable, whatever is broken about it
        why = f"the extension fused_opt._cpu cannot be used: {type(error).__name__}: {error}"
        if (Path(__file__).parents[1] / "csrc").is_dir():
            why += "; this is the source folder, which hides an installed package: run Python elsewhere, or pip install -e ."
        if backend in ("cpu", "triton"):
            raise RuntimeError(f"FUSED_OPT_BACKEND={backend}, but {why}; reinstall fused-opt, or unset it") from error
        return Native(None, "", "FUSED_OPT_BACKEND=torch" if backend == "torch" else why, forced="")
    isa, why = _choose_isa(dict(_cpu.isas()))
    if backend == "torch":
        return Native(None, "", "FUSED_OPT_BACKEND=torch", forced="")
    if backend == "triton" and (problem := triton_problem()):
        raise RuntimeError(f"FUSED_OPT_BACKEND=triton, but {problem}; or unset it")
    return Native(_cpu, isa, why, forced=backend)


@functools.cache
def triton_problem() -> str:
    """Why Triton's kernels cannot be used in this process, and what to do about it; "" if they can. Imports triton."""
    import torch

    try:
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _LEAST_TRITON:
            return f"this is Triton {triton.__version__}, and {_LEAST_TRITON[0]}.{_LEAST_TRITON[1]} is the least: install a newer torch"
        from fused_opt.kernels import launch

        interprets = launch.launcher.takes_cpu
    except Exception as error:  # an installation may be broken in any way
        return f"Triton cannot be used ({type(error).__name__}: {error}): pip install 'fused-opt[triton]'"
    if interprets:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return "TRITON_INTERPRET=1 cannot follow the addresses of tensors on a GPU: unset it"
        return ""
    if not torch.cuda.is_available():
        return (
            "there is no GPU that this torch can use, and on the CPU Triton's kernels run by its interpreter only: set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if torch.version.hip is None and capability < _LEAST_CAPABILITY:
            return f"Triton has no kernels for cuda:{index} (compute capability {capability}, 7.5 is the least): hide it from this process"
    try:
        triton.runtime.driver.active.get_current_target()  # compiles C
    except Exception as error:
        return f"Triton's driver does not start ({type(error).__name__}: {error}): it needs a C compiler and Python's headers"
    return ""


def interprets() -> bool:
    """Whether Triton's kernels take tensors in the CPU's memory. Imports triton."""
    from fused_opt.kernels import launch

    return bool(launch.launcher.takes_cpu)


def gpu_server() -> int:
    """Who steps the tensors of GPUs; whether Triton can is left to be found out until there are some."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # as it is where tensors are on a GPU
        return NOBODY
    backend = native()
    if backend.module is None or backend.forced == "cpu":
        return NOBODY
    return NOBODY if triton_problem.cache_info().currsize and triton_problem() else DEVICE_KERNELS


def _choose_isa(supported: dict[str, bool]) -> tuple[str, str]:
    forced = os.environ.get("FUSED_OPT_CPU_ISA", "").lower()
    if not forced:
        return [name for name, usable in supported.items() if usable][-1], "the widest that this CPU has"
    if forced not in supported:
        names = ", ".join(supported)
        raise ValueError(f"FUSED_OPT_CPU_ISA={forced!r} is not an instruction set of this build; use one of {names}, or unset it")
    if not supported[forced]:
        names = ", ".join(name for name, usable in supported.items() if usable)
        raise RuntimeError(f"FUSED_OPT_CPU_ISA={forced}: this CPU does not have it; use one of {names}, or unset it")
    return forced, "FUSED_OPT_CPU_ISA"
