"""What a check of `fused-opt gpu-check` is, and how it is performed: what could not run, or compared nothing, has not passed."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fused_opt.bench.cases import CASES, Case
from fused_opt.bench.gpu_device import Gpu

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class CannotCheckError(Exception):
    """A check is not possible here; the message says why."""


@dataclass(frozen=True)
class Extent:
    """How much is checked.

    Attributes:
        name: in the report.
        cases: of the table in bench/cases.py.
        all_formats: whether every mixture of dtypes of parameters and states is tried, or the main ones.
        all_places: likewise of sizes and alignments of tensors.
        steps: of each comparison.
        tensors: where many are wanted.
        rounds: of timing.
        dtypes: in which steps are timed.
        huge: whether tensors may take gigabytes.
    """

    name: str
    cases: tuple[Case, ...]
    all_formats: bool
    all_places: bool
    steps: int
    tensors: int
    rounds: int
    dtypes: tuple[str, ...]
    huge: bool


# The one of each optimizer with the most options that its 8-bit states may have.
_RICHEST = (
    Case("Adam", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    Case("AdamW"),
    Case("RMSprop", {"momentum": 0.9}),
    Case("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
)
_QUICK = (*_RICHEST, Case("RMSprop", {"centered": True, "momentum": 0.9}), Case("SGD"))

FULL = Extent("full", CASES, True, True, steps=5, tensors=1000, rounds=100, dtypes=("float32", "bfloat16"), huge=True)
QUICK = Extent("quick", _QUICK, True, True, steps=3, tensors=1000, rounds=20, dtypes=("float32",), huge=False)
# By Triton's interpreter a tile of 1024 elements takes 20 to 50 ms.
DRY = Extent("dry run", _RICHEST, False, False, steps=2, tensors=4, rounds=0, dtypes=(), huge=False)


@dataclass
class Found:
    """What a check finds.

    Attributes:
        compared: how many values, launches or calls were judged.
        problems: what is not as promised, in words.
        data: all that may be of use to whoever reads the file.
    """

    compared: int = 0
    problems: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def judge(self, right: bool, problem: str, count: int = 1) -> None:
        """Count what was compared, and note the problem unless it is right."""
        self.compared += count
        if not right:
            self.problems.append(problem)


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: for the command line.
        promise: what is checked, in words.
        run: finds out. Raises CannotCheckError if that is not possible; any other exception is a failure.
        dry: whether a dry run can do it.
    """

    name: str
    promise: str
    run: Callable[[Gpu, Extent], Found]
    dry: bool = True


@dataclass(frozen=True)
class Result:
    """What came of a check. `why`: it did not run or failed."""

    name: str
    promise: str
    status: str
    why: str = ""
    compared: int = 0
    problems: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


def brief(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def perform(check: Check, gpu: Gpu, extent: Extent, wanted: bool = True) -> Result:
    """Run a check unless it is not wanted. Raises nothing but what ends the program."""
    if not wanted:
        return Result(check.name, check.promise, NOT_RUN, "not asked for")
    if gpu.dry_run and not check.dry:
        return Result(check.name, check.promise, NOT_RUN, "dry run: needs a GPU")
    try:
        found = check.run(gpu, extent)
        gpu.synchronize()  # what kernels do wrong is often said only now
    except CannotCheckError as why:
        return Result(check.name, check.promise, NOT_RUN, str(why))
    except Exception as error:  # a promise that ends like this is not kept
        return Result(check.name, check.promise, FAILED, brief(error), data={"traceback": traceback.format_exc().splitlines()})
    finally:
        gc.collect()
        gpu.release_memory()
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        return Result(check.name, check.promise, FAILED, found.problems[0] + more, found.compared, found.problems, found.data)
    if not found.compared:
        return Result(check.name, check.promise, FAILED, "nothing was compared", data=found.data)
    return Result(check.name, check.promise, PASSED, "", found.compared, data=found.data)
