"""What a result depends on: the machine and the versions."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fused_opt
from fused_opt.doctor import cpu_model
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


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not tell."""
    return _size("/proc/meminfo", "MemAvailable")


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which this process's resident memory grew at the most while `call` ran; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else a temporary is made of what an earlier one left to the allocator, and does not show
        Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak back to the present
    except (AttributeError, OSError):
        return None
    before = _size("/proc/self/status", "VmHWM")
    call()
    after = _size("/proc/self/status", "VmHWM")
    return None if before is None or after is None else after - before


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


def _size(file: str, key: str) -> int | None:
    """The value of a line like "MemAvailable:  123 kB", in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
