"""`fused-opt parity`: steps of every optimizer with every option, compared with torch's bit for bit, and in 16 bits with exact ones."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import fused_opt
from fused_opt.arguments import whole_number, writable_file
from fused_opt.bench import machine, measure, parity_report
from fused_opt.bench.cases import CASES, DTYPES, SHORT_DTYPES, Case
from fused_opt.bench.exactness import Exactness, Result, compare_step
from fused_opt.bench.layouts import permuted
from fused_opt.bench.parity_report import Row
from fused_opt.bench.plain_loop import is_staged, joined, plain_steps
from fused_opt.bench.problem import Problem, make_problem
from fused_opt.bench.reference import reference_steps
from fused_opt.bench.stage_cases import STAGE_CASES, in_bits
from fused_opt.bench.ulp import Difference, bits_equal
from fused_opt.native import native

HELP = "step every optimizer with every option and compare with what is promised; the exit status is 1 if a promise is broken"

OPTIMIZERS = list(dict.fromkeys(case.optimizer for case in CASES))
PARTS = ("rules", "stages")
DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES, *SHORT_DTYPES)}

# No element, one, less than a vector, whole vectors, vectors and a tail; together enough for three threads, of which
# each takes 32,768 elements at least. The two-dimensional ones are transposed: dense, but not contiguous.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (0, 3), (8, 8), (31, 33), (10, 10, 10), (4099,), (100003,))

# Of steps with stages, which the plain loop takes in some thirty passes: without the last, which took three quarters of the time.
STAGE_SHAPES = SHAPES[:-1]

# Magnitudes of gradients, in powers of ten. Squares of the smallest are below fp32's normal numbers. In 16 bits the promise beside the bits
# is one about exactness, which fp32 must be able to keep: there the squares are normal numbers, in float16 those of gradients themselves.
DECADES = {torch.bfloat16: (-12.0, 3.0), torch.float16: (-4.0, 1.0)}
DEFAULT_DECADES = (-30.0, 3.0)
ZEROS = 0.05

# Gradients repeat after this many steps, so that many steps need little memory.
DISTINCT_GRADIENTS = 50
SEED = 0

# Wide enough for all tables. A narrower terminal shows the summary too, and breaks lines of the others.
WIDTH = 132

REFUSAL = "fused-opt parity: nothing to compare with torch: "


class UnprovenError(Exception):
    """What ran is not what was to be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    optimizers = ", ".join(OPTIMIZERS)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=f"any of {optimizers} (default: all)", **several)
    parser.add_argument("--dtype", choices=DTYPE_OF, metavar="NAME", help=f"any of {', '.join(DTYPE_OF)} (default: all)", **several)
    parser.add_argument(
        "--part", choices=PARTS, metavar="NAME", help="rules alone, or what is done beside them (clipping, averages...) (default: both)"
    )
    parser.add_argument("--steps", type=whole_number(1, 10_000), default=20, metavar="N", help="(default: 20)")
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        metavar="N",
        help="our numbers of threads; more than the tensors are worth are not used (default: torch's)",
        **several,
    )
    parser.add_argument("--isa", metavar="NAME", help="instruction sets, or all that this CPU has (default: the one in use)", **several)
    parser.add_argument("--verbose", action="store_true", help="a line for each tensor of each case")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything found to FILE")


def run(args: argparse.Namespace) -> int:
    """Compare, and show what was found.

    Returns:
        The exit status: 0 if every promise is kept; 1 if one is not, or if it was not our code that stepped;
        2 if an instruction set is asked for that this CPU or build does not have.
    """
    console = Console(highlight=False)
    if args.verbose or not console.is_terminal:
        console.width = max(console.width, WIDTH)
    backend = native()
    if backend.module is None:
        print(f"{REFUSAL}torch's own step serves every parameter: {backend.why}", file=sys.stderr)
        return 1
    usable = [name for name, supported in backend.module.isas() if supported]
    asked = [name for isa in args.isa or [backend.isa] for name in (usable if isa == "all" else [isa])]
    isas, threads = dict.fromkeys(asked), dict.fromkeys(args.threads or [torch.get_num_threads()])
    if unusable := [isa for isa in isas if isa not in usable]:
        usage = f"--isa {unusable[0]}: this CPU or this build does not have it; use any of {', '.join(usable)}, or all"
        print(f"fused-opt parity: {usage}", file=sys.stderr)
        return 2
    cases = [(case, tuple(DTYPE_OF.values())) for case in CASES] if args.part != "stages" else []
    cases += STAGE_CASES if args.part != "rules" else ()
    work = [
        (case, dtype)
        for dtype in dict.fromkeys(args.dtype or DTYPE_OF)
        for case, dtypes in cases
        if case.optimizer in (args.optimizer or OPTIMIZERS) and DTYPE_OF[dtype] in dtypes and in_bits(case, DTYPE_OF[dtype])
    ]

    described = machine.describe()
    console.print(parity_report.header(described, args.steps), markup=False)
    rows: list[Row] = []
    try:
        # On one thread but for our steps: on tensors this small, waking a second one costs more than it saves.
        with measure.threads(1):
            for case, dtype in track(work, "comparing", console=console, transient=True, disable=not console.is_terminal):
                rows += compare(case, dtype, args.steps, list(isas), list(threads))
    except UnprovenError as error:
        print(f"{REFUSAL}{error}", file=sys.stderr)
        return 1
    parity_report.show(console, rows, args.verbose)
    kept = not any(row.broken or row.inexact for row in rows)
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
    staged = is_staged(case)
    values, grads = _problem(STAGE_SHAPES if staged else SHAPES, DTYPE_OF[dtype], steps)
    reference = (plain_steps if staged else reference_steps)(case, values, grads)
    for_loop: Result | None = None
    if not staged:
        default = getattr(torch.optim, case.optimizer)(_parameters(values), **case.options, foreach=False)
        for_loop, _ = _steps(default, grads)
    rows = []
    for isa in isas:
        for count in threads:
            with machine.instruction_set(isa), measure.threads(count):
                optimizer = getattr(fused_opt, case.optimizer)(_parameters(values), **case.options)
                before, ran = _steps(optimizer, grads[:-1])
                before = [{name: value.clone() for name, value in tensors.items()} for tensors in before]
                ours, last_ran = _steps(optimizer, grads[-1:])
                ran += last_ran
                paths = {row.path for row in fused_opt.explain(optimizer).rows}
            paths |= {f"cpu-{step.isa}" if step else "torch" for step in ran}
            if paths != {f"cpu-{isa}"}:
                where = f"on {isa}, but ran on {', '.join(sorted(paths))}"
                raise UnprovenError(f"{case} in {dtype} was to run {where}; `fused-opt doctor` may say why")
            exactness: dict[str, Exactness] = {}
            if DTYPE_OF[dtype] in SHORT_DTYPES and not staged:
                exactness = compare_step(case, before, grads[-1], ours)
            what = (case.optimizer, case.options, dtype, isa, max(step.threads for step in ran))
            rows += [Row(*what, name, *found, exactness.get(name), staged) for name, found in _differences(case, ours, reference, for_loop)]
    return rows


def _parameters(values: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value.clone()) for value in values]


def _steps(optimizer: Any, grads: list[list[torch.Tensor]]) -> tuple[Result, list[Any]]:
    """Step through `grads`. Returns the result, and what our code says it did in each step: None if it did not run."""
    params = optimizer.param_groups[0]["params"]
    ran = []
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        optimizer._last_ran = None
        optimizer.step()
        ran.append(optimizer._last_ran)
    return [joined({"param": param.detach(), **optimizer.state[param]}) for param in params], ran


@functools.lru_cache(maxsize=2)  # cases of one dtype follow each other, with stages and without
def _problem(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, steps: int) -> Problem:
    decades = DECADES.get(dtype, DEFAULT_DECADES)
    values, distinct = make_problem(shapes, min(steps, DISTINCT_GRADIENTS), dtype, SEED, decades, ZEROS)
    return _permuted(values), list(itertools.islice(itertools.cycle(map(_permuted, distinct)), steps))


def _permuted(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [permuted(tensor) for tensor in tensors]


def _differences(
    case: Case, ours: Result, reference: Result, for_loop: Result | None
) -> Iterator[tuple[str, tuple[int, Difference, str, Difference | None]]]:
    """For "param" and each state the remaining fields of its Row."""
    names = list(reference[0])
    for result in ours, reference, for_loop or []:
        for tensors in result:
            if list(tensors) != names:
                raise UnprovenError(f"{case} has the states {', '.join(tensors)} instead of {', '.join(names)}")
    for name in names:
        mine, theirs = ([tensors[name] for tensors in result] for result in (ours, reference))
        flat = _flat(mine)
        from_loop = Difference.of(flat, _flat([tensors[name] for tensors in for_loop])) if for_loop else None
        yield name, (flat.numel(), Difference.of(flat, _flat(theirs)), _first_difference(mine, theirs), from_loop)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


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
