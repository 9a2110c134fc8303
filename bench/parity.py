"""`fused-opt parity`: steps of every optimizer with every option, compared with torch's bit for bit."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import fused_opt
from fused_opt.arguments import whole_number, writable_file
from fused_opt.bench import machine, measure, parity_report
from fused_opt.bench.cases import CASES, DTYPES, Case
from fused_opt.bench.parity_report import Difference, Row
from fused_opt.bench.reference import reference_steps
from fused_opt.bench.ulp import bits_equal
from fused_opt.native import native

HELP = "step every optimizer with every option and compare all bits with torch's; the exit status is 1 if any differs"

OPTIMIZERS = list(dict.fromkeys(case.optimizer for case in CASES))
DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# No element, one, less than a vector, whole vectors, vectors and a tail; together enough for 12 threads of 8192
# elements. The two-dimensional ones are transposed: dense, but not contiguous.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (0, 3), (8, 8), (31, 33), (10, 10, 10), (4099,), (100003,))

# Gradients repeat after this many steps, so that many steps need little memory.
DISTINCT_GRADIENTS = 50
SEED = 0

# Wide enough for the tables where there is no terminal to ask.
WIDTH = 132

# For each parameter "param" and its states, by torch's names.
Result = list[dict[str, torch.Tensor]]


class UnprovenError(Exception):
    """What ran is not what was to be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    optimizers = ", ".join(OPTIMIZERS)
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, metavar="NAME", help=f"any of {optimizers} (default: all)", **several
    )
    parser.add_argument("--dtype", choices=DTYPE_OF, help="of the parameters (default: both)", **several)
    parser.add_argument("--steps", type=whole_number(1, 10_000), default=20, metavar="N", help="(default: 20)")
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        metavar="N",
        help="our numbers of threads (default: torch's)",
        **several,
    )
    parser.add_argument(
        "--isa", metavar="NAME", help="instruction sets, or all that this CPU has (default: the one in use)", **several
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each tensor of each case")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything found to FILE")


def run(args: argparse.Namespace) -> int:
    """Compare, and show what was found.

    Returns:
        The exit status: 0 if every bit is the reference's; 1 if one is not, or if it was not our code that stepped;
        2 if an instruction set is asked for that this CPU or build does not have.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    backend = native()
    if backend.module is None:
        console.print(f"Nothing to compare, torch's own step serves every parameter: {backend.why}", markup=False)
        return 1
    usable = [name for name, supported in backend.module.isas() if supported]
    isas = [name for isa in _unique(args.isa or [backend.isa]) for name in (usable if isa == "all" else [isa])]
    if unusable := [isa for isa in isas if isa not in usable]:
        remedy = f"use any of {', '.join(usable)}, or all"
        console.print(f"--isa {unusable[0]}: this CPU or this build does not have it; {remedy}", markup=False)
        return 2
    threads = _unique(args.threads or [torch.get_num_threads()])
    cases = [case for case in CASES if case.optimizer in (args.optimizer or OPTIMIZERS)]
    work = [(case, dtype) for dtype in _unique(args.dtype or DTYPE_OF) for case in cases]

    described = machine.describe()
    console.print(parity_report.header(described, args.steps), markup=False)
    rows: list[Row] = []
    try:
        for case, dtype in track(work, "comparing", console=console, transient=True, disable=not console.is_terminal):
            rows += compare(case, dtype, args.steps, isas, threads)
    except UnprovenError as error:
        console.print(f"Nothing is proven. {error}", markup=False)
        return 1
    parity_report.show(console, rows, args.verbose)
    kept = not any(row.broken for row in rows)
    if args.json:
        settings = {"steps": args.steps, "seed": SEED, "shapes": SHAPES}
        results = {"machine": described, "settings": settings, "kept": kept, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if kept else 1


def compare(case: Case, dtype: str, steps: int, isas: Sequence[str], threads: Sequence[int]) -> list[Row]:
    """Step a case with torch, and with our code on each instruction set with each number of threads.

    Raises:
        UnprovenError: it was not our code that ran, or the states are not those of torch.
    """
    params, grads = _problem(DTYPE_OF[dtype], steps)
    reference = reference_steps(case, params, grads)
    for_loop, _ = _steps(getattr(torch.optim, case.optimizer), {**case.options, "foreach": False}, params, grads)
    rows = []
    for isa in isas:
        for count in threads:
            with _instruction_set(isa), measure.threads(count):
                ours, ran = _steps(getattr(fused_opt, case.optimizer), case.options, params, grads)
            if {name for name, _ in ran} != {isa}:
                names = ", ".join(sorted({name for name, _ in ran}))
                raise UnprovenError(f"{case} in {dtype} was to run on {isa}, but ran on: {names}; try `fused-opt doctor`")
            what = (case.optimizer, case.options, dtype, isa, max(used for _, used in ran))
            rows += [Row(*what, name, *found) for name, found in _differences(case, ours, reference, for_loop)]
    return rows


def _unique(given: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(given))


def _problem(dtype: torch.dtype, steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Start values, and for each step a gradient for each of them."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, dtype=dtype, generator=generator)
        return values.t() if values.dim() == 2 else values

    # A magnitude for each element: squares of the smallest are below fp32's normal numbers. One gradient in 20 is zero,
    # of either sign.
    params = [normal(shape) for shape in SHAPES]
    scales = [10 ** torch.empty_like(p).uniform_(-21, 3, generator=generator) for p in params]

    def gradient(scale: torch.Tensor) -> torch.Tensor:
        present = torch.empty_like(scale).uniform_(generator=generator) > 0.05
        return torch.empty_like(scale).normal_(generator=generator) * scale * present

    distinct = [[gradient(scale) for scale in scales] for _ in range(min(steps, DISTINCT_GRADIENTS))]
    return params, [distinct[step % len(distinct)] for step in range(steps)]


def _steps(
    optimizer_class: Any, options: dict[str, Any], values: list[torch.Tensor], grads: list[list[torch.Tensor]]
) -> tuple[Result, list[tuple[str, int]]]:
    """Step copies of `values`. Returns the result, and for each step the instruction set and threads of our code."""
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = optimizer_class(params, **options)
    ran = []
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer._last_ran = None
        optimizer.step()
        ran.append((optimizer._last_ran.isa, optimizer._last_ran.threads) if optimizer._last_ran else ("torch", 0))
    if isinstance(optimizer, fused_opt.step.FusedStep):
        ran += [(row.path.removeprefix("cpu-"), 0) for row in fused_opt.explain(optimizer).rows]  # of every parameter
    return [{"param": param.detach(), **optimizer.state[param]} for param in params], ran


def _differences(
    case: Case, ours: Result, reference: Result, for_loop: Result
) -> Iterator[tuple[str, tuple[int, Difference, str, Difference]]]:
    """For "param" and each state the remaining fields of its Row."""
    names = list(reference[0])
    for result in ours, reference, for_loop:
        for tensors in result:
            if list(tensors) != names:
                raise UnprovenError(f"{case} has the states {', '.join(tensors)} instead of {', '.join(names)}")
    for name in names:
        mine, theirs, loops = ([tensors[name] for tensors in result] for result in (ours, reference, for_loop))
        flat = torch.cat([t.reshape(-1) for t in mine])
        differences = [Difference.of(flat, torch.cat([t.reshape(-1) for t in other])) for other in (theirs, loops)]
        yield name, (flat.numel(), differences[0], _first_difference(mine, theirs), differences[1])


def _first_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """The first value whose bits differ, in words, or "" if there is none. Any NaN equals any NaN."""
    for a, b in zip(ours, theirs, strict=True):
        if bits_equal(a, b):
            continue
        a, b = a.reshape(-1), b.reshape(-1)
        different = ((a != b) | (a.signbit() != b.signbit())) & ~(a.isnan() & b.isnan())
        if different.any():
            i = int(different.nonzero()[0])
            return f"element {i} of {a.numel()}: {a[i].item():.17g} instead of {b[i].item():.17g}"
    return ""


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    """Within this context our code runs on `name`."""
    before = os.environ.get("FUSED_OPT_CPU_ISA")
    os.environ["FUSED_OPT_CPU_ISA"] = name
    native.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["FUSED_OPT_CPU_ISA"]
        else:
            os.environ["FUSED_OPT_CPU_ISA"] = before
        native.cache_clear()
