"""Performs checks of `fused-opt gpu-check` with planted faults, by Triton's interpreter. A program of its own: see tests/test_gpu_check.py.

Writes to standard output what came of it, as JSON: name of the fault -> the exit status and the command's file.
"""

# No annotations from __future__: Triton wants to see what `tl.constexpr` is.
import contextlib
import ctypes
import dataclasses
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from rich.console import Console

import fused_opt
from fused_opt import cli, device, device_quantization, plan, rules
from fused_opt.bench import gpu_check, gpu_options, gpu_parity, gpu_speed
from fused_opt.bench.cases import Case
from fused_opt.bench.gpu_checks import DRY, QUICK, Check
from fused_opt.bench.gpu_interpreter import Interpreter
from fused_opt.bench.workloads import Workload
from fused_opt.kernels import launch, variants
from fused_opt.kernels import rules as kernel_rules

ADAMW = Case("AdamW")
TINY = dataclasses.replace(DRY, cases=(ADAMW,), steps=1)
SGD = dataclasses.replace(TINY, cases=(Case("SGD"),))


# Faults: contexts in which something is wrong.


@triton.jit
def move_without_eps(p, g, states, s, FLAGS: tl.constexpr):  # noqa: N803
    return p * s[2] + tl.div_rn(s[8] * states[0], tl.div_rn(tl.sqrt_rn(states[1]), s[6])), states


@contextlib.contextmanager
def wrong_rule() -> Any:
    variants.step_variant.cache_clear()
    with mock.patch.dict(kernel_rules.RULES, adam=kernel_rules.RULES["adam"]._replace(move=move_without_eps)):
        yield
    variants.step_variant.cache_clear()


class OneProgramShort(launch.TritonLauncher):
    """The grid does not cover the last chunk."""

    def launch(self, variant: Any, where: Any, programs: int, arguments: Any) -> None:
        super().launch(variant, where, programs - 1, arguments)


class BesideTensors(launch.TritonLauncher):
    """Writes one element too many of the first parameter."""

    def launch(self, variant: Any, where: Any, programs: int, arguments: Any) -> None:
        super().launch(variant, where, programs, arguments)
        address, count = arguments[0][0, 0].item(), arguments[0][0, 8].item()
        ctypes.c_uint16.from_address(address + count * (4 if variant.constants["PARAM_TYPE"] == tl.float32 else 2)).value = 1


def launcher(faulty: Any) -> Any:
    return mock.patch.object(launch, "launcher", faulty())


def two_launches() -> Any:
    """A launch for each half of a bucket: the same bits."""
    prepare = device.DeviceStep.prepare

    def twice(self: Any, *args: Any) -> None:
        prepare(self, *args)
        halves = []
        for each in self._launches:
            rows, chunks, *rest = each.arguments
            half = len(chunks) // 2
            for part in (chunks[:half], chunks[half:]):
                halves.append(dataclasses.replace(each, programs=len(part), arguments=(rows, part, *rest)))
        self._launches = halves

    return mock.patch.object(device.DeviceStep, "prepare", twice)


def wrong_code() -> Any:
    quantize = device_quantization.quantize

    def off_by_one(values: Any, codes: Any, *args: Any) -> None:
        quantize(values, codes, *args)
        codes.view(-1)[-1] ^= 1

    return mock.patch.object(device_quantization, "quantize", off_by_one)


def wrong_scalars() -> Any:
    """On the GPU and on the CPU alike: only torch's steps tell."""
    program = rules.SGD.program

    def wrong(self: Any, *args: Any) -> Any:
        flags, (*scalars, last) = program(*args)
        return flags, (*scalars, last * 1.001)

    return mock.patch.object(rules.Rule, "program", wrong)


def wrong_rate() -> Any:
    constants_row = device.DeviceStep._constants_row

    def wrong(self: Any, rule: Any, share: Any, *args: Any) -> bytes:
        return constants_row(self, rule, share._replace(group={**share.group, "lr": float(share.group["lr"]) * 1.001}), *args)

    return mock.patch.object(device.DeviceStep, "_constants_row", wrong)


def overflow_not_seen() -> Any:
    scaler = plan._scaler

    def blind(optimizer: Any) -> Any:
        found = scaler(optimizer)
        return found and found._replace(found_inf=torch.zeros(()))

    return mock.patch.object(plan, "_scaler", blind)


# Name -> what is wrong, the check that must see it, how much it checks.
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "nothing": (contextlib.nullcontext, "cpu-bits", TINY),
    "rule": (wrong_rule, "cpu-bits", TINY),
    "grid": (lambda: launcher(OneProgramShort), "cpu-bits", SGD),
    "beside": (lambda: launcher(BesideTensors), "cpu-bits", SGD),
    "launches": (two_launches, "cpu-bits", SGD),
    "many launches": (two_launches, "launches", TINY),
    "backend": (lambda: mock.patch.object(Interpreter, "by_triton", Interpreter.by_cpu), "cpu-bits", SGD),
    "exactness": (wrong_scalars, "torch", SGD),
    "code": (wrong_code, "quantize", TINY),
    "rate": (wrong_rate, "capturable", TINY),
    "overflow": (overflow_not_seen, "grad-scaler", TINY),
}


# What needs a GPU, with one that is pretended.


class Pretended(Interpreter):
    """A GPU that captures nothing: a replay is the step itself."""

    dry_run = False
    waits = False

    def free_bytes(self) -> int:
        return 2**40

    def capture(self, step: Any) -> Any:
        for _ in range(gpu_options.WARM_UP):
            step()
        return step

    def no_synchronisation(self) -> Any:
        return mock.patch.object(torch.Tensor, "item", mock.Mock(side_effect=RuntimeError("called a synchronizing CUDA operation")))

    def keep_busy(self) -> Any:
        return mock.Mock(query=lambda: self.waits)


class FakeTimer:
    """Ours take 1 ms of the device's time, everybody else 2; the host takes half of that."""

    def __init__(self, gpu: Any) -> None:
        pass

    def host(self, call: Any) -> float:
        call()
        return 0.5 * self._milliseconds(call)

    def device(self, call: Any, host: float) -> float:
        call()
        return self._milliseconds(call)

    @staticmethod
    def _milliseconds(call: Any) -> float:
        return 1e-3 if isinstance(getattr(call, "__self__", None), fused_opt.AdamW) else 2e-3


def idle_step(self: Any, closure: Any = None) -> None:
    pass


def step_that_waits(self: Any) -> Any:
    return torch.zeros(()).item()


class Idle(torch.optim.AdamW):
    step = idle_step


class Tired(torch.optim.AdamW):
    """Fails in its fifth step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 5:
            raise RuntimeError("out of breath")
        return super().step(closure)


def timed(**others: Any) -> Check:
    """The speed check of a tiny workload, with more implementations."""
    workload = Workload("small", "", ((40,), (3,)))
    peers = {name: gpu_speed.Implementation(make) for name, make in others.items()}
    wanted = {**gpu_speed.implementations(), **peers}

    def speed(gpu: Any, extent: Any) -> Any:
        with mock.patch.object(gpu_speed, "implementations", return_value=wanted):
            return gpu_speed.speed(gpu, extent, FakeTimer, [workload])

    return Check("speed", "", speed)


def capture_of_nothing(self: Any, step: Any) -> Any:
    return lambda: None


def _broken(params: Any) -> Any:
    raise OSError("no kernel image")


ON_GPU = gpu_options.CHECKS[-2:]
SMALL = dataclasses.replace(QUICK, rounds=3)
PRETENDED: dict[str, tuple[Any, tuple[Check, ...]]] = {
    "pretended GPU": (contextlib.nullcontext, (*ON_GPU, timed(broken=_broken, idle=Idle, tired=Tired))),
    "graph": (lambda: mock.patch.object(Pretended, "capture", capture_of_nothing), ON_GPU[:1]),
    "wait": (lambda: mock.patch.object(Pretended, "waits", True), ON_GPU[1:]),
    "synchronisation": (lambda: mock.patch.object(fused_opt.SGD, "step", step_that_waits), ON_GPU[1:]),
    "unnoticed": (lambda: mock.patch.object(Pretended, "no_synchronisation", contextlib.nullcontext), ON_GPU[1:]),
    "our speed": (lambda: mock.patch.object(fused_opt.AdamW, "step", idle_step), (timed(),)),
}


# Of these tables a row is enough to see a fault.
SHORTENED = {
    "LAUNCHING": gpu_options.LAUNCHING[:1],
    "ON_DEVICE": gpu_options.ON_DEVICE[2:3],
    "SCALED": gpu_options.SCALED[:1],
    "STEADY": gpu_options.STEADY[-1:],
}


def main() -> dict[str, Any]:
    found = {}
    short = mock.patch.multiple(gpu_options, **SHORTENED), mock.patch.object(gpu_parity, "CODES", ("mulaw",))
    with tempfile.TemporaryDirectory() as folder, short[0], short[1]:
        file = Path(folder) / "found.json"
        for name, (fault, check, extent) in FAULTS.items():
            with fault(), mock.patch.object(gpu_check, "DRY", extent), contextlib.redirect_stdout(io.StringIO()) as output:
                status = cli.main(["gpu-check", "--dry-run", "--check", check, "--json", str(file)])
            found[name] = {"status": status, "report": json.loads(file.read_text()), "output": output.getvalue()}
        for name, (fault, checks) in PRETENDED.items():
            output = io.StringIO()
            with fault():
                status = gpu_check.check(Pretended(), SMALL, None, file, Console(file=output), checks)
            found[name] = {"status": status, "report": json.loads(file.read_text()), "output": output.getvalue()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(main(), sys.stdout)
