"""`fused-opt bench --model TARGET`: how long steps should take on a GPU that is not here, from the compiled kernels. A prediction.

Two limits are known without a GPU: a kernel cannot move its bytes faster than the memory does, nor issue its instructions faster than the
GPU issues any. A step takes the longer of the two at least; latencies, launches and units that are slower than the issue come on top.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_opt.arguments import CannotRunError
from fused_opt.bench import kernel_costs
from fused_opt.bench.kernel_costs import Cost

PREDICTED = "PREDICTED, not measured"
PARAMS = 10**9

# Share of the boost clock at which a GPU is assumed to run: 1.7 GHz of an H100's 1.98.
CLOCK_SHARE = 0.86


@dataclass(frozen=True)
class Gpu:
    """The peaks that a model needs.

    Attributes:
        gb_per_s: 1e9 bytes a second of memory.
        units: multiprocessors or compute units.
        lanes: for which a unit issues an instruction in a clock: four warp instructions on NVIDIA's, one wave instruction on AMD's.
        boost_ghz: the highest clock.
        source: of these numbers.
    """

    name: str
    gb_per_s: float
    units: int
    lanes: int
    boost_ghz: float
    source: str

    @property
    def issued_per_s(self) -> float:
        """Instructions, counted for each thread."""
        return self.units * self.lanes * self.boost_ghz * CLOCK_SHARE * 1e9


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 2039, 108, 128, 1.41, "NVIDIA A100 datasheet and architecture whitepaper"),
    "sm_90": Gpu("H100 SXM", 3350, 132, 128, 1.98, "NVIDIA H100 datasheet and architecture whitepaper"),
    "sm_100": Gpu("B200", 8000, 148, 128, 1.965, "NVIDIA DGX B200 datasheet; multiprocessors and clock as the driver reports them"),
    "gfx942": Gpu("MI300X", 5300, 304, 64, 2.1, "AMD MI300X datasheet and CDNA 3 whitepaper"),
}


@dataclass(frozen=True)
class Prediction:
    """For one kernel on one GPU.

    Attributes:
        bytes: moved for a parameter.
        instructions: executed for a parameter; None where nobody counted them.
        issue_ms: in which the instructions of `PARAMS` parameters are issued; None likewise.
        memory_ms: in which their bytes are moved.
    """

    kernel: str
    bytes: float
    instructions: float | None
    issue_ms: float | None
    memory_ms: float

    @classmethod
    def of(cls, kernel: str, moved: float, instructions: float | None, gpu: Gpu) -> Prediction:
        issue_ms = None if instructions is None else PARAMS * instructions / gpu.issued_per_s * 1e3
        return cls(kernel, moved, instructions, issue_ms, PARAMS * moved / (gpu.gb_per_s * 1e9) * 1e3)

    @property
    def step_ms(self) -> float:
        return max(self.memory_ms, self.issue_ms or 0.0)

    @property
    def ratio(self) -> float | None:
        """Issue time over memory time: below 1 the memory is the limit."""
        return None if self.issue_ms is None else self.issue_ms / self.memory_ms

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "step_ms": self.step_ms, "ratio": self.ratio}


# Others' kernels: bytes by what their source loads and stores for a parameter, and instructions where they were counted.
# torch: aten/src/ATen/native/cuda/fused_adam_utils.cuh loads parameter, gradient and both moments and stores all but the gradient; its
# instructions are those of the compiled kernel for sm_90. bitsandbytes: kOptimizerStatic8bit2StateBlockwise loads parameter, gradient,
# two codes and two scales for each block of 256, and stores all but the gradient.
_SCALES = 2 * 2 * 4 / 256
OTHERS: list[tuple[str, float, dict[str, float]]] = [
    ("torch AdamW(fused=True), fp32", 7 * 4, {"sm_90": 48.8}),
    ("torch AdamW(fused=True), bf16", 7 * 2, {}),
    ("bitsandbytes AdamW8bit, fp32", 3 * 4 + 4 * 1 + _SCALES, {}),
    ("bitsandbytes AdamW8bit, bf16", 3 * 2 + 4 * 1 + _SCALES, {}),
]


def others(target: str, gpu: Gpu) -> list[Prediction]:
    return [Prediction.of(name, moved, instructions.get(target), gpu) for name, moved, instructions in OTHERS]


def ours(target: str, gpu: Gpu, moved: Mapping[str, float], costs: Mapping[kernel_costs.Job, Cost]) -> list[Prediction]:
    """Of each kernel that has a main loop."""
    return [
        Prediction.of(name, moved[name], cost.instructions / cost.elements, gpu)
        for (name, of), cost in costs.items()
        if of == target and cost.elements
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare those of `fused-opt bench` that are for this."""
    group = parser.add_argument_group("predictions for a GPU, from the compiled kernels; nothing is measured")
    group.add_argument("--model", type=_target, metavar="TARGET", help=", ".join(f"{target}: {gpu.name}" for target, gpu in GPUS.items()))
    group.add_argument("--bandwidth", type=_bandwidth, metavar="GB/S", help="of the GPU's memory (default: the datasheet's)")


def _target(text: str) -> str:
    if text not in GPUS:
        raise argparse.ArgumentTypeError(f"unknown target {text!r}; use any of {', '.join(GPUS)}")
    return text


def _bandwidth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth; give a number of GB/s from 1 to 1000000")
    return value


def run(args: argparse.Namespace) -> int:
    """Predict and show.

    Returns:
        The exit status, 0.

    Raises:
        CannotRunError: kernels cannot be compiled here, although Triton is installed.
    """
    gpu = GPUS[args.model]
    if args.bandwidth:
        gpu = Gpu(gpu.name, args.bandwidth, gpu.units, gpu.lanes, gpu.boost_ghz, f"{gpu.source}; bandwidth as given")
    console = Console(highlight=False)
    moved, costs, counted = _costs(args.model, console)
    predictions = [*ours(args.model, gpu, moved, costs), *others(args.model, gpu)]
    if not console.is_terminal:
        console.width = 140
    console.print(_table(predictions, f"{PREDICTED}: 1B parameters on {gpu.name} ({args.model})", len(OTHERS)))
    console.print(_notes(gpu, counted), markup=False)
    if args.json:
        model = {"target": args.model, **asdict(gpu), "clock_share": CLOCK_SHARE, "parameters": PARAMS}
        rows = [prediction.to_json() for prediction in predictions]
        args.json.write_text(json.dumps({"what": PREDICTED, "model": model, "counted": counted, "rows": rows}, indent=1) + "\n")
    return 0


def _costs(target: str, console: Console) -> tuple[Mapping[str, float], Mapping[kernel_costs.Job, Cost], str]:
    """Bytes by kernel, costs, and what they are of: the kernels compiled now, or the table."""
    if not kernel_costs.can_compile():
        table = kernel_costs.Table.read()
        return table.bytes, table.costs, f"Triton is not installed: instructions are those of kernel_costs.json, by Triton {table.triton}."
    jobs = [(name, target) for name in kernel_costs.typical_variants()]
    try:
        shown = track(
            kernel_costs.measure_all(jobs), "compiling", len(jobs), console=console, transient=True, disable=not console.is_terminal
        )
        compiled = kernel_costs.Table.of(shown)
    except (OSError, RuntimeError, ValueError) as error:
        raise CannotRunError(f"Triton {kernel_costs.triton_version()} cannot compile the kernels for {target}: {error}") from error
    return compiled.bytes, compiled.costs, f"Instructions are those of the kernels as Triton {compiled.triton} compiled them now."


def _table(predictions: Sequence[Prediction], title: str, others_count: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for name in ("bytes/param", "instr/param", "issue ms", "memory ms", "PREDICTED step ms", "issue/mem"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, each in enumerate(predictions, start=1):
        table.add_row(
            each.kernel,
            f"{each.bytes:.2f}",
            _or_dash(each.instructions, ".1f"),
            _or_dash(each.issue_ms, ".2f"),
            f"{each.memory_ms:.2f}",
            f"{each.step_ms:.2f}",
            _or_dash(each.ratio, ".2f"),
            end_section=number == len(predictions) - others_count,
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _notes(gpu: Gpu, counted: str) -> str:
    clock = f"{CLOCK_SHARE * gpu.boost_ghz:.2f} GHz ({CLOCK_SHARE:.0%} of the boost clock)"
    return "\n".join(
        (
            f"{PREDICTED}. A step is the longer of two times at peak rates, which no kernel reaches: memory at {gpu.gb_per_s:g} GB/s, and",
            f"issue by {gpu.units} units x {gpu.lanes} lanes x {clock}. {gpu.source}.",
            counted,
            "They are of whole tiles where no operand of a root or a division is zero, denormal or huge; those take several times as many.",
            "Of others' kernels the bytes are counted in their source; a dash: instructions not counted.",
        )
    )
