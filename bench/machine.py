"""What a result depends on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import fused_opt
from fused_opt.native import native


def describe() -> dict[str, str | int]:
    """CPU, number of cores this process may use, versions, the instruction set of our steps and the reason for it.

    Raises:
        ValueError, RuntimeError: as `fused_opt.native.native`.
    """
    backend = native()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_opt": fused_opt.__version__,
        "isa": backend.isa or "none: torch's own step",
        "why": backend.why,
    }


def cpu_model() -> str:
    """The CPU's name as the system gives it, or at least its architecture."""
    with_name = _first_line("/proc/cpuinfo", "model name")
    return with_name or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not tell."""
    line = _first_line("/proc/meminfo", "MemAvailable")
    return int(line.split()[0]) * 1024 if line else None


def _first_line(file: str, key: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
