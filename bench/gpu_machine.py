"""What a result of `fused-opt gpu-check` depends on: the GPU and the versions."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_opt
from fused_opt.bench import machine
from fused_opt.bench.gpu_checks import Check, Extent, Found
from fused_opt.bench.gpu_device import Gpu

# Fields of `nvidia-smi --query-gpu`, readable by everybody.
_FACTS = ("driver_version", "vbios_version", "ecc.mode.current", "clocks.max.sm", "clocks.max.mem", "power.limit", "mig.mode.current")
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks_throttle_reasons.active", "power.draw", "temperature.gpu")


def versions() -> dict[str, Any]:
    """Of the CPU's side, and of all software."""
    packages = ("triton", "numpy", *(each for each in ("bitsandbytes", "torchao") if _installed(each)))
    return {
        **machine.describe(),
        **{package: _installed(package) for package in packages},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "commit": _commit(),
    }


def gpu_facts(gpu: Gpu, extent: Extent) -> Found:
    """What torch and nvidia-smi say; and a sum, to see that the GPU computes."""
    properties = torch.cuda.get_device_properties(gpu.device)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size", "memory_clock_rate", "memory_bus_width")
    facts = {name: getattr(properties, name) for name in (*names, "gcnArchName") if hasattr(properties, name)}
    if {"memory_clock_rate", "memory_bus_width"} <= facts.keys():  # in kHz, of two transfers each, and bits
        facts["peak_gb_per_s"] = 2 * facts["memory_clock_rate"] * 1e3 * facts["memory_bus_width"] / 8 / 1e9
    found = Found(data={"gpu": facts, "nvidia_smi": _nvidia_smi(_FACTS), "clocks": clocks()})
    total = int(torch.arange(1000, device=gpu.device).sum())
    found.judge(total == 499_500, f"the sum of 0 to 999 on the GPU is {total}")
    return found


def clocks() -> dict[str, str]:
    """Of the first GPU that this process may use; empty where nvidia-smi does not tell."""
    return _nvidia_smi(_CLOCKS)


def _nvidia_smi(fields: tuple[str, ...]) -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None) if torch.cuda.is_available() else None
    if program is None or uuid is None:
        return {}
    found = {}
    for field in fields:  # each by itself: an old driver refuses all if it does not know one
        command = [program, f"--query-gpu={field}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0:
            found[field] = answer.stdout.strip()
    return found


def _installed(package: str) -> str | None:
    """The version; torch's own builds bring Triton under other names."""
    for name in (package, f"pytorch-{package}", f"{package}-rocm", f"pytorch-{package}-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    """Of the checkout that the package is imported from, with a + if it was changed; None if it is none."""
    root = Path(fused_opt.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")


CHECKS = (Check("machine", "the GPU, and that it computes", gpu_facts, dry=False),)
