"""The CPU backend: loads the extension and chooses the instruction set. Nothing here is an error until somebody needs the backend."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("cpu", "torch")


@dataclass(frozen=True)
class Native:
    """What this process uses.

    Attributes:
        module: the extension `fused_opt._cpu`, or None if torch's own step serves everything.
        isa: the instruction set that steps run on.
        why: the reason for `isa`, or for there being no module.
        forced: whether FUSED_OPT_BACKEND=cpu forbids falling back to torch's step.
    """

    module: Any
    isa: str
    why: str
    forced: bool


@functools.cache
def native() -> Native:
    """Load and choose, once a process.

    Raises:
        ValueError: FUSED_OPT_BACKEND or FUSED_OPT_CPU_ISA names something that does not exist.
        RuntimeError: one of them names something that this installation or machine cannot do.
    """
    backend = os.environ.get("FUSED_OPT_BACKEND", "")
    if backend == "triton":
        raise RuntimeError("FUSED_OPT_BACKEND=triton: this version has no Triton backend; unset it, or use cpu or torch")
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
        if backend == "cpu":
            raise RuntimeError(f"FUSED_OPT_BACKEND=cpu, but {why}; reinstall fused-opt, or unset it") from error
        return Native(None, "", "FUSED_OPT_BACKEND=torch" if backend == "torch" else why, forced=False)
    isa, why = _choose_isa(dict(_cpu.isas()))
    if backend == "torch":
        return Native(None, "", "FUSED_OPT_BACKEND=torch", forced=False)
    return Native(_cpu, isa, why, forced=backend == "cpu")


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
