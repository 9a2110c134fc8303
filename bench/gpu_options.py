"""What is special on a GPU: launches, options that are read there, gradient scalers, CUDA graphs, and a host that never waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.gpu_checks import CannotCheckError, Check, Extent, Found, brief
from fused_opt.bench.gpu_device import WARM_UP, Gpu
from fused_opt.bench.gpu_steps import Comparison, results, step
from fused_opt.bench.problem import make_problem
from fused_opt.device import Ran

SHAPES = ((1024,), (33,))  # a whole tile, and less
LONG = 64  # elements
INT8 = {"state_dtype": "int8", "min_8bit_size": 0}
FLOAT = torch.float32
RATE = 3 / 256  # which float32 has, too


def _params(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value.to(device, copy=True)) for value in values]


def _make(case: Case, values: Sequence[torch.Tensor], device: torch.device, **options: Any) -> Any:
    return getattr(fused_opt, case.optimizer)(_params(values, device), **{**case.options, **options})


def _set_grads(optimizer: Any, grads: Sequence[torch.Tensor]) -> None:
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad


# Launches


@dataclass(frozen=True)
class Launching:
    """An AdamW, and what one of its later steps, with the gradients of the one before, is to launch and to copy.

    Attributes:
        dtypes: of its parameters in turn.
        long: whether one of them has LONG elements. The others have one.
        step_launches, scalar_launches, uploads: see `fused_opt.device.Ran`.
    """

    name: str
    dtypes: tuple[torch.dtype, ...] = (FLOAT,)
    long: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    step_launches: int = 1
    scalar_launches: int = 0
    uploads: int = 1  # the step's scalars


LAUNCHING = (
    Launching("fp32"),
    Launching("three dtypes", dtypes=(FLOAT, torch.bfloat16, torch.float16), step_launches=3),
    Launching(
        "8-bit states, and short tensors without", long=True, options={"state_dtype": "int8", "min_8bit_size": LONG}, step_launches=2
    ),
    Launching("capturable", options={"capturable": True}, scalar_launches=1, uploads=0),
)


def launches(gpu: Gpu, extent: Extent) -> Found:
    """Of many tensors."""
    found = Found(data={"tensors": extent.tensors, "rows": []})
    for each in LAUNCHING:
        counts = [1] * (extent.tensors - each.long) + [LONG] * each.long
        values = [torch.ones(count, dtype=each.dtypes[i % len(each.dtypes)]) for i, count in enumerate(counts)]
        with gpu.by_triton():
            optimizer = _make(Case("AdamW"), values, gpu.device, **each.options)
            _set_grads(optimizer, [value.to(gpu.device, copy=True) for value in values])
            for _ in range(3):  # the first makes states, and the second finds the counters of the first
                step(optimizer)
            ran = optimizer._last_launched
        expected = Ran(each.step_launches, each.scalar_launches, each.uploads)
        if gpu.dry_run and ran is not None:  # step counters on the CPU are read by the host
            ran = ran._replace(uploads=each.uploads)
        found.data["rows"].append({"name": each.name, "launched": ran and ran._asdict(), "expected": expected._asdict()})
        found.judge(ran == expected, f"{each.name}: {ran}, not {expected}", extent.tensors)
    return found


# Options on the device

Configurations = tuple[tuple[Case, dict[str, Any]], ...]

ON_DEVICE: Configurations = (
    (Case("Adam", {"amsgrad": True, "weight_decay": 0.1}), {"capturable": True}),
    (Case("AdamW"), {"capturable": True, **INT8}),
    (Case("RMSprop", {"momentum": 0.9}), {"capturable": True}),
    (Case("SGD", {"momentum": 0.9}), {}),
)


def capturable(gpu: Gpu, extent: Extent) -> Found:
    """The learning rate is a tensor there and changes between steps. The CPU has the same numbers in its own memory."""
    found = Found(data={"rows": []})
    rates = [RATE / 2**n for n in range(extent.steps + 1)]
    values, grads = make_problem(SHAPES, len(rates), FLOAT)
    for case, options in ON_DEVICE:
        with gpu.by_triton():
            lr = torch.zeros((), device=gpu.device)
            ours = _make(case, values, gpu.device, **options, lr=lr)
            ran = []
            for rate, step_grads in zip(rates, grads, strict=True):
                lr.fill_(rate)
                _set_grads(ours, [grad.to(gpu.device) for grad in step_grads])
                ran.append(step(ours))
        counters = {state["step"].device.type for state in ours.state.values() if "step" in state}
        expected = _on_cpu(gpu, case, options, values, grads, rates)
        comparison = Comparison.of(results(ours), results(expected))
        what = f"{case} {options}"
        found.judge(not comparison.different, f"{what}: {comparison.different} values differ; {comparison.first}", comparison.values)
        found.judge(set(ran) == {1}, f"{what}: {ran} launches in the steps, not one in each")
        found.judge(counters <= {gpu.device.type}, f"{what}: step counters on {counters}, not on the device")
        found.data["rows"].append({"what": what, "different": comparison.different, "launches": ran})
    return found


def _on_cpu(
    gpu: Gpu,
    case: Case,
    options: dict[str, Any],
    values: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor]],
    rates: Sequence[float],
) -> Any:
    """The same, stepped on the CPU, which has no capturable."""
    optimizer = _make(case, values, torch.device("cpu"), **{name: value for name, value in options.items() if name != "capturable"})
    with gpu.by_cpu():
        for rate, step_grads in zip(rates, grads, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            _set_grads(optimizer, step_grads)
            optimizer.step()
    return optimizer


# Gradient scalers

SCALED: Configurations = (
    (Case("Adam"), {"fused": True}),
    (Case("AdamW"), {"fused": True, **INT8}),
    (Case("AdamW"), {"fused": False}),
    (Case("RMSprop"), {}),
    (Case("SGD", {"momentum": 0.9}), {"fused": True}),
)
OVERFLOWS = (0, 2)  # the steps whose gradients have an infinity
SCALE = 2.0**10  # a power of two: unscaling is exact


def grad_scaler(gpu: Gpu, extent: Extent) -> Found:
    """Overflowing steps are as if they had not been, and gradients are unscaled, as without a scaler on the CPU."""
    found = Found(data={"rows": []})
    values, grads = make_problem(SHAPES, 4, FLOAT)
    for case, options in SCALED:
        scaler = torch.amp.GradScaler(gpu.device.type, init_scale=SCALE, growth_interval=2)
        scaler.scale(torch.zeros((), device=gpu.device))  # it makes its scale only now
        ours = _make(case, values, gpu.device, **options)
        what = f"{case} {options}"
        kept = []
        for number, step_grads in enumerate(grads):
            _set_grads(ours, [(grad * scaler.get_scale()).to(gpu.device) for grad in step_grads])
            if number in OVERFLOWS:
                ours.param_groups[0]["params"][-1].grad[-1] = torch.inf
            ours._last_launched = ours._last_ran = None
            with gpu.by_triton():
                scaler.step(ours)
            if number not in OVERFLOWS:
                kept.append(step_grads)
                unscaled = {f"gradient {i}": p.grad.cpu() for i, p in enumerate(ours.param_groups[0]["params"])}
                comparison = Comparison.of(unscaled, {f"gradient {i}": grad for i, grad in enumerate(step_grads)})
                found.judge(not comparison.different, f"{what}, step {number}: {comparison.first}", comparison.values)
                by_triton = ours._last_launched is not None and ours._last_ran is None
                found.judge(by_triton, f"{what}, step {number}: not by Triton's kernels alone")
            scaler.update()
        own = {name: value for name, value in options.items() if name != "fused"}
        expected = _on_cpu(gpu, case, own, values, kept, [ours.param_groups[0]["lr"]] * len(kept))
        comparison = Comparison.of(results(ours), results(expected))
        found.judge(not comparison.different, f"{what}: {comparison.different} values differ; {comparison.first}", comparison.values)
        found.data["rows"].append({"what": what, "different": comparison.different})
    return found


# CUDA graphs

REPLAYS = 4


def graph(gpu: Gpu, extent: Extent) -> Found:
    """Replays against steps on the CPU, with gradients that were there before and with such as the captured code makes."""
    found = Found(data={"warm_up": WARM_UP, "replays": REPLAYS, "rows": []})
    values, grads = make_problem(SHAPES, WARM_UP + REPLAYS, FLOAT)
    rates = [RATE] * (WARM_UP + 1) + [RATE / 2] * (REPLAYS - 1)
    for case, options in ON_DEVICE:
        for made_inside in (False, True):
            what = f"{case} {options}, gradients {'made by the graph' if made_inside else 'in the same memory'}"
            try:
                comparison = _replay(gpu, case, options, values, grads, rates, made_inside)
            except Exception as error:  # the others are to be tried all the same
                found.judge(False, f"{what}: {brief(error)}")
                continue
            found.judge(not comparison.different, f"{what}: {comparison.different} values differ; {comparison.first}", comparison.values)
            found.data["rows"].append({"what": what, "different": comparison.different})
    return found


def _replay(
    gpu: Gpu,
    case: Case,
    options: dict[str, Any],
    values: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor]],
    rates: Sequence[float],
    made_inside: bool,
) -> Comparison:
    """Gradients of step k are `grads[k]`, but those of all steps before the first replay are `grads[0]`."""
    lr = torch.full((), rates[0], device=gpu.device)
    ours = _make(case, values, gpu.device, **options, lr=lr)
    params = ours.param_groups[0]["params"]
    inputs = [grad.to(gpu.device, copy=True) for grad in grads[0]]

    def one_step() -> None:
        if made_inside:
            for param in params:
                param.grad = None
            torch.stack([(param * x).sum() for param, x in zip(params, inputs, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
        ours.step()

    if not made_inside:
        _set_grads(ours, inputs)
    with gpu.by_triton():
        replay = gpu.capture(one_step)
        given = [grads[0]] * WARM_UP + list(grads[WARM_UP:])
        for step_grads, rate in zip(given[WARM_UP:], rates[WARM_UP:], strict=True):
            lr.fill_(rate)
            for x, grad in zip(inputs, step_grads, strict=True):
                x.copy_(grad)
            replay()
    return Comparison.of(results(ours), results(_on_cpu(gpu, case, options, values, given, rates)))


# Synchronisation

STEADY: Configurations = (
    (Case("AdamW"), {}),
    (Case("AdamW"), INT8),
    (Case("AdamW"), {"capturable": True}),
    (Case("AdamW"), {"fused": True}),  # with what a gradient scaler sets
    (Case("RMSprop", {"momentum": 0.9}), {}),
    (Case("SGD", {"momentum": 0.9}), {}),
)


def no_synchronisation(gpu: Gpu, extent: Extent) -> Found:
    """A steady step, with the gradients of the one before and with new ones, while the GPU has other work to do."""
    found = Found(data={"rows": []})
    probe = torch.zeros((), device=gpu.device)
    try:
        with gpu.no_synchronisation():
            probe.item()
    except RuntimeError:
        pass
    else:
        raise CannotCheckError("this torch does not notice it when the host waits for the GPU")
    values, grads = make_problem(SHAPES, 2, FLOAT)
    for case, options in STEADY:
        optimizer = _make(case, values, gpu.device, **options)
        if options.get("fused"):
            optimizer.found_inf = torch.zeros((), device=gpu.device)
            optimizer.grad_scale = torch.full((), SCALE, device=gpu.device)
        first, second = ([grad.to(gpu.device) for grad in step_grads] for step_grads in grads)
        _set_grads(optimizer, first)
        with gpu.by_triton():
            for _ in range(2):
                step(optimizer)
            for how, given in (("the same gradients", first), ("new gradients", second)):
                _set_grads(optimizer, given)
                waits = _waits(gpu, lambda: step(optimizer))  # noqa: B023  # called at once
                what = f"{case} {options}, {how}"
                found.data["rows"].append({"what": what, "waits": waits})
                found.judge(not waits, f"{what}: {waits}")
                found.judge(optimizer._last_launched is not None, f"{what}: not by Triton's kernels")
    return found


def _waits(gpu: Gpu, call: Callable[[], object]) -> str:
    """Whether a call waits for the GPU, in words, or ""."""
    gpu.synchronize()
    before = gpu.keep_busy()
    try:
        with gpu.no_synchronisation():
            call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "it returned only when the GPU had done the work it had before" if before.query() else ""


CHECKS = (
    Check("launches", "one launch a step for all tensors that are alike; tables are copied only when they have changed", launches),
    Check("capturable", "learning rate and step counters on the device: the bits of the CPU", capturable),
    Check("grad-scaler", "overflowing steps are left out, gradients unscaled: the bits of the CPU", grad_scaler),
    Check("graph", "replays of a captured step have the bits of the CPU's steps", graph, dry=False),
    Check("no-sync", "step() does not wait for the GPU", no_synchronisation, dry=False),
)
