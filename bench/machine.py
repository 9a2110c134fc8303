"""What a result depends on: the machine and the versions."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fused_opt
from fused_opt.doctor import cpu_model
from fused_opt.native import native

ISA_VARIABLE = "FUSED_OPT_CPU_ISA"

# Share of the CPU that other programs may take. An idle desktop takes 1 to 3 %; with one of 2 cores taken by another
# program (50 %), a step of torch's that starts a thread team for each tensor took up to 100 times as long.
TOLERATED_LOAD = 0.1


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


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within this context our code runs on `name`; on the one in use if that is ""."""
    before = os.environ.get(ISA_VARIABLE)
    if name:
        os.environ[ISA_VARIABLE] = name
        native.cache_clear()
    try:
        yield
    finally:
        if name:
            if before is None:
                del os.environ[ISA_VARIABLE]
            else:
                os.environ[ISA_VARIABLE] = before
            native.cache_clear()


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
        """Of all CPU time since this object was made, 0 to 1; None where the system does not tell, or in less than a second of it.

        The system counts in hundredths of a second.
        """
        now = self._read()
        if now is None or self._start is None:
            return None
        busy, total, own = (end - begin for begin, end in zip(self._start, now, strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total >= 1 else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of all CPUs at work, of all CPUs in all, of this process and its children at work."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]  # without guests: user has theirs
        except OSError:
            return None
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        idle = seconds[3] + seconds[4]  # idle and iowait; the last field is time stolen by other guests
        return sum(seconds) - idle, sum(seconds), _own_seconds()


def _own_seconds() -> float:
    """At work: of this process, its children that have ended, and those of multiprocessing that have not."""
    ended = os.times()
    seconds = time.process_time() + ended.children_user + ended.children_system
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _size(file: str, key: str) -> int | None:
    """The value of a line like "MemAvailable:  123 kB", in bytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
