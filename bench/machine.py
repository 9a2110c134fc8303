"""What a result depends on: the machine and the versions."""

from __future__ import annotations

import os
import platform
import time
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


class OtherLoad:
    """How busy other programs, and other guests of the same host, keep this machine's CPUs from now on."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Of all CPU time since this object was made, 0 to 1; None where the system does not tell."""
        now = self._read()
        if now is None or self._start is None:
            return None
        busy, total, own = (end - begin for begin, end in zip(self._start, now, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of all CPUs at work, of all CPUs in all, of this process at work."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]  # without guests: user has theirs
        except OSError:
            return None
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = seconds[3] + seconds[4]  # idle and iowait; the last field is time stolen by other guests
        return sum(seconds) - idle, sum(seconds), time.process_time()


def _first_line(file: str, key: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
