"""How long steps take on the GPU, ours and others': device time and host time, in the same rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import fused_opt
from fused_opt.bench import implementations as known
from fused_opt.bench.contestants import Tensors
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED, ExactSample
from fused_opt.bench.gpu_checks import CannotCheckError, Check, Extent, Found, brief
from fused_opt.bench.gpu_device import Gpu
from fused_opt.bench.gpu_machine import clocks
from fused_opt.bench.measure import Spread, no_garbage_collection, paired_ratios
from fused_opt.bench.speed_plan import AS_TORCH, CONFIGURATIONS, DTYPES
from fused_opt.bench.workloads import WORKLOADS, Workload

# 148 tensors of 124M elements, 1000 of 64, one of 64M.
TIMED = tuple(WORKLOADS[name] for name in ("gpt2", "tiny", "large"))
CASE = CONFIGURATIONS["adamw"]

OURS, INT8, STREAM = "ours", "ours, 8-bit states", "stream: a += b"
# An error in the unit of `ExactSample.detour` that is no longer due to 8-bit codes: a missing step of three is off by a third.
TOLERATED_DETOUR = 0.2

# The stream, against which throughput is compared: 12 bytes moved for each of so many fp32 elements.
STREAM_ELEMENTS = 2**26

# Traffic below which caches and launches count for more than the memory does.
STREAMING_FROM = 256 * 2**20


@dataclass(frozen=True)
class Implementation:
    """An AdamW with torch's defaults.

    Attributes:
        make: from parameters; may raise anything.
        coded: whether its states are in 8 bits.
        ours: whether it must work and be right; what others do is reported.
    """

    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    coded: bool = False
    ours: bool = False


def implementations() -> dict[str, Implementation]:
    """By name; of other packages those that are installed."""

    def peer(each: known.Implementation) -> Implementation:
        return Implementation(lambda params: each.make(CASE, params), coded=each.state != AS_TORCH)

    found = {
        OURS: Implementation(lambda params: fused_opt.AdamW(params), ours=True),
        INT8: Implementation(lambda params: fused_opt.AdamW8bit(params), coded=True, ours=True),
        "torch fused": Implementation(lambda params: torch.optim.AdamW(params, fused=True)),
        "torch foreach": Implementation(lambda params: torch.optim.AdamW(params, foreach=True)),
    }
    return found | {f"{each.name} {each.version}": peer(each) for each in known.others() if each.offers(CASE) and not each.missing}


class Timer:
    """Times calls on a GPU. L2 is flushed before each."""

    # More flushes ahead of a call would, with its own launches, fill the queue (1024), and make the host wait.
    _MOST_FLUSHES = 500

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        l2 = int(getattr(torch.cuda.get_device_properties(gpu.device), "L2_cache_size", 0))
        self._waste = torch.empty(max(2**28, 4 * l2), dtype=torch.uint8, device=gpu.device)
        self._flush()
        self._flush_seconds = self._between_events(lambda: self._flush(20)) / 20

    def host(self, call: Callable[[], object]) -> float:
        """Seconds until the call returns, with nothing else for the GPU to do."""
        self._gpu.synchronize()
        start = time.perf_counter_ns()
        call()
        seconds = (time.perf_counter_ns() - start) / 1e9
        self._gpu.synchronize()
        return seconds

    def device(self, call: Callable[[], object], host: float) -> float:
        """Seconds that the GPU takes for it. Flushes before it keep the GPU busy for as long as the host needs, `host` seconds."""
        self._gpu.synchronize()
        self._flush(min(math.ceil(1.5 * host / self._flush_seconds) + 1, self._MOST_FLUSHES))
        return self._between_events(call)

    def _flush(self, times: int = 1) -> None:
        for _ in range(times):
            self._waste.zero_()

    def _between_events(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@dataclass
class Row:
    """What was measured of a workload.

    Attributes:
        elements: of its parameters together.
        skipped: why nothing was measured, or "".
        device, host: implementation -> seconds, by rounds.
        bytes: implementation -> moved by a step that touches parameters, gradients and states once; of other packages not known.
        errors: implementation -> `ExactSample.error`, or `detour` for 8-bit states, after `COMPARED_STEPS` steps.
        wrong: implementations whose error is too large.
        failures: implementation -> why it could not be measured.
        clocks: after the last round.
    """

    workload: str
    dtype: str
    tensors: int
    elements: int
    skipped: str = ""
    device: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, Any]]:
        """implementation -> medians and quartiles; ratios are others' time over ours, in the same round."""
        found: dict[str, dict[str, Any]] = {}
        for name, seconds in self.device.items():
            found[name] = {
                "device_s": asdict(Spread.of(seconds)),
                "host_s": asdict(Spread.of(self.host[name])),
                "device_ratio": asdict(Spread.of(paired_ratios(seconds, self.device[OURS]))) if OURS in self.device else None,
                "host_ratio": asdict(Spread.of(paired_ratios(self.host[name], self.host[OURS]))) if OURS in self.device else None,
                "gb_per_s": self.bytes[name] / Spread.of(seconds).median / 1e9 if name in self.bytes else None,
                "of_stream": self._of_stream(name),
            }
        return found

    def _of_stream(self, name: str) -> float | None:
        """Throughput as a share of the stream's, in the same round."""
        if STREAM not in self.device or self.bytes.get(name, 0) < STREAMING_FROM:
            return None
        ratios = paired_ratios(self.device[STREAM], self.device[name])
        return self.bytes[name] / self.bytes[STREAM] * Spread.of(ratios).median


def speed(gpu: Gpu, extent: Extent, make_timer: Callable[[Gpu], Timer] = Timer, workloads: Sequence[Workload] = TIMED) -> Found:
    """Time all workloads in all dtypes. A step of ours that fails or is wrong is a problem; what others do is only reported."""
    wanted = implementations()
    found = Found(data={"case": str(CASE), "rounds": extent.rounds, "tolerated": [TOLERATED, TOLERATED_DETOUR], "rows": []})
    timer = make_timer(gpu)
    for dtype in extent.dtypes:
        for workload in workloads:
            row = measure(gpu, timer, workload, dtype, extent.rounds, wanted)
            found.data["rows"].append({**asdict(row), "summary": row.summary()})
            what = f"{workload.name} in {dtype}"
            for own, each in wanted.items():
                if each.ours and not row.skipped:
                    found.judge(own in row.device, f"{what}, {own}: {row.failures.get(own)}")
                    found.judge(own not in row.wrong, f"{what}, {own}: the error is {row.errors.get(own)}")
    if not found.compared:
        raise CannotCheckError("; ".join(row["skipped"] for row in found.data["rows"]))
    return found


def measure(gpu: Gpu, timer: Timer, workload: Workload, dtype: str, rounds: int, wanted: Mapping[str, Implementation]) -> Row:
    """Time a workload's implementations in turn."""
    row = Row(workload.name, dtype, workload.tensors, workload.elements)
    gpu.release_memory()
    needed, free = _needed_bytes(workload, dtype, wanted), gpu.free_bytes()
    if needed > free:
        row.skipped = f"{workload.name} in {dtype} needs {needed / 1e9:.0f} GB of the GPU's memory, {free / 1e9:.0f} GB are free"
        return row
    with gpu.by_triton(), no_garbage_collection():
        _measure(gpu, timer, Tensors.random(workload, dtype), row, rounds, wanted)
    row.clocks = clocks()
    return row


def _measure(gpu: Gpu, timer: Timer, tensors: Tensors, row: Row, rounds: int, wanted: Mapping[str, Implementation]) -> None:
    exact = ExactSample(CASE, tensors.params, tensors.grads)
    grads = [grad.to(gpu.device) for grad in tensors.grads]
    calls: dict[str, Callable[[], object]] = {}
    for name, each in wanted.items():
        try:
            params = [torch.nn.Parameter(value.to(gpu.device, copy=True)) for value in tensors.params]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer = each.make(params)
            for _ in range(COMPARED_STEPS):
                optimizer.step()
            gpu.synchronize()
            if each.ours and (paths := {part.path for part in fused_opt.explain(optimizer).rows}) != {"triton"}:
                raise RuntimeError(f"stepped by {', '.join(sorted(paths))}, not by Triton's kernels")
            host_params = [param.detach().cpu() for param in params]
        except Exception as error:  # whatever a broken peer does
            row.failures[name] = brief(error)
            continue
        row.errors[name] = exact.detour(host_params) if each.coded else exact.error(host_params)
        if row.errors[name] > (TOLERATED_DETOUR if each.coded else TOLERATED):
            row.wrong.append(name)
        if each.ours or not each.coded:  # others keep theirs as they like
            row.bytes[name] = _step_bytes(optimizer)
        calls[name] = optimizer.step
    if any(moved >= STREAMING_FROM for moved in row.bytes.values()):
        a, b = (torch.ones(STREAM_ELEMENTS, device=gpu.device) for _ in range(2))
        calls[STREAM] = lambda: a.add_(b)
        row.bytes[STREAM] = 12 * STREAM_ELEMENTS
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            try:
                host = timer.host(calls[name])
                device = timer.device(calls[name], host)
            except Exception as error:  # a step that fails now would do so in each round
                row.failures[name] = brief(error)
                del calls[name]
                row.host.pop(name, None)
                row.device.pop(name, None)
                continue
            row.host.setdefault(name, []).append(host)
            row.device.setdefault(name, []).append(device)


def _needed_bytes(workload: Workload, dtype: str, wanted: Mapping[str, Implementation]) -> int:
    """Gradients; of each implementation parameters and two states; torch's temporaries; the stream."""
    copies = 1 + sum(2 if each.coded else 3 for each in wanted.values()) + 2
    return copies * workload.elements * DTYPES[dtype].itemsize + 8 * STREAM_ELEMENTS


def _step_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Reads the parameter, the gradient and the states; writes all but the gradient."""
    params: int = sum(param.nbytes for group in optimizer.param_groups for param in group["params"])
    return 3 * params + 2 * known.state_bytes(optimizer)


CHECKS = (Check("speed", "times of AdamW's step, and whether it is right", speed, dry=False),)
