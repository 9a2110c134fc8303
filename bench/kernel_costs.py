"""What the Triton kernels cost: registers, spills, memory accesses and instructions of the machine code, which needs no GPU.

`python -m fused_opt.bench.kernel_costs` compiles every typical variant for every target (4 minutes on two cores) and compares with
kernel_costs.json; `--write` writes that table anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_opt.arguments import one_of
from fused_opt.bench import kernel_arithmetic, machine_code

TABLE = Path(__file__).with_name("kernel_costs.json")

# Name -> Triton's backend, architecture and threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# An access is to be at least four elements wide, and one of float32 no wider than the widest there is.
ELEMENTS_OF_AN_ACCESS = 4

Job = tuple[str, str]  # names of a variant and a target


@dataclass(frozen=True)
class Traffic:
    """What a kernel moves, as its dtypes say.

    Attributes:
        tile: elements that a program takes at a time.
        streams: bytes of an element of each tensor, and how often it is moved: 2 if it is loaded and stored.
        block_size: elements of a block, for kernels that know blocks.
        block_bytes: moved for each block: scales and seeds.
        shared_bytes: that every thread reads of what is the same for all.
    """

    tile: int
    streams: tuple[tuple[int, int], ...]
    block_size: int = 1
    block_bytes: int = 0
    shared_bytes: int = 0

    @property
    def data_bytes(self) -> int:
        """For an element, without what its block shares."""
        return sum(size * times for size, times in self.streams)

    @property
    def bytes(self) -> float:
        """For an element."""
        return self.data_bytes + self.block_bytes / self.block_size


def _step_traffic(variant: Any) -> Traffic:
    of = variant.constants
    param, grad, *states = (kind.primitive_bitwidth // 8 for kind in (of["PARAM_TYPE"], of["GRAD_TYPE"], *of["STATE_TYPES"]))
    streams = ((param, 2), (grad, 1 + of["UNSCALE"]), *((state, 2) for state in states))
    # Of what stages use, mask and anchor are only loaded.
    stages = ((kind.primitive_bitwidth // 8, times) for kind, times in zip(of["OPERAND_TYPES"], (1, 1, 2, 2), strict=False) if kind)
    streams = (*streams, *stages)
    return Traffic(of["ROWS"] * of["SIZE"], streams, of["SIZE"], 2 * 4 * len(states) if of["CODED"] else 0)


def _quantization_traffic(variant: Any) -> Traffic | None:
    """Of `quantize` and `dequantize`. None where tails are masked everywhere, or a table is searched, which takes longer than memory."""
    of, arguments = variant.constants, variant.arguments
    if not of["EXACT"] or arguments["table"] != "constexpr":
        return None
    seeded, each = arguments.get("seeds", "constexpr") != "constexpr", of.get("SEED_STRIDE", 0)
    value = 4 if arguments["values"] == "*fp32" else 2
    return Traffic(of["ROWS"] * of["SIZE"], ((value, 1), (1, 1)), of["SIZE"], 4 + 8 * each, 8 * (seeded and not each))


# Name of a kernel -> its traffic by variant; None if memory is not what limits it.
_TRAFFIC: dict[str, Callable[[Any], Traffic | None]] = {
    "step": _step_traffic,
    "quantize": _quantization_traffic,
    "dequantize": _quantization_traffic,
    "largest_magnitudes": lambda variant: None,
    "compute_scalars": lambda variant: None,
    "measure_gradients": lambda variant: None,  # it is, but each program ends with a reduction
    "combine_partials": lambda variant: None,
}


@dataclass(frozen=True)
class Cost:
    """One variant, compiled for one target.

    Attributes:
        registers: of a thread; on AMD's GPUs vector registers.
        scalar_registers: of a wave, on AMD's GPUs only.
        spilled: bytes of a thread in memory that the kernel did not ask for.
        shared: bytes of a program in shared memory.
        elements: that a thread takes in a round of the main loop, as compiled, or in all; 0 if traffic is not known, as what follows.
        instructions: of a thread for these, where no operand of a root or a division is zero, denormal or near the ends of the range.
        special: of these, those for roots and reciprocals.
        loads, stores: width in bytes -> accesses to global memory.
    """

    registers: int
    scalar_registers: int
    spilled: int
    shared: int
    elements: int
    instructions: int
    special: int
    loads: dict[int, int]
    stores: dict[int, int]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Cost:
        widths = {key: {int(width): count for width, count in row[key].items()} for key in ("loads", "stores")}
        return cls(**{**row, **widths})


@dataclass(frozen=True)
class Finding:
    """What came of compiling a job.

    Attributes:
        bytes: that are moved for an element; 0 if that is not known.
        cost: the table's row.
        written: operations in the kernel's text, the main loop and the tail together.
        broken: limits that it does not keep, in words.
    """

    job: Job
    bytes: float
    cost: Cost
    written: kernel_arithmetic.Operations
    broken: list[str]


def typical_variants() -> dict[str, Any]:
    """By name. Needs Triton."""
    from fused_opt.kernels import variants

    return dict(variants.typical_variants())


def measure(job: Job) -> Finding:
    """Compile and examine a typical variant. Not in a process where Triton's interpreter is chosen."""
    return examine(job, typical_variants()[job[0]])


def examine(job: Job, variant: Any) -> Finding:
    """The same for any variant, by whatever name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget(*TARGETS[job[1]])
    # As Triton finds the pointers of torch's tensors.
    arguments = enumerate(zip(variant.arguments.values(), variant.kernel.params, strict=False))
    aligned = [i for i, (kind, parameter) in arguments if kind.startswith("*") and not parameter.do_not_specialize]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    # A program has the same number of threads on every GPU, so that a thread has as many elements.
    options = variant.options(gpu.warp_size)
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, attributes)
    kernel: Any = triton.compile(source, target=gpu, options=options)
    asm = kernel.asm
    registers, scalar_registers, spilled, code = _sass(asm["cubin"]) if "cubin" in asm else _amdgcn(asm["amdgcn"])
    broken = kernel_arithmetic.differences(asm)
    if spilled:
        broken.append(f"{spilled} bytes are spilled")
    resources = registers, scalar_registers, spilled, kernel.metadata.shared
    traffic = _TRAFFIC[variant.kernel.__name__](variant)
    if traffic is None:
        cost = Cost(*resources, 0, 0, 0, {}, {})
    else:
        path = machine_code.main_path(code, machine_code.SASS if "cubin" in asm else machine_code.AMDGCN)
        elements = traffic.tile // (options["num_warps"] * gpu.warp_size)
        # The compiler may make one round of several. What one moves is known, but for what blocks share, which is less than the rest.
        elements *= path.bytes // (elements * traffic.data_bytes)
        broken += _wrong_accesses(path, traffic, elements)
        accesses = (dict(sorted(each.items())) for each in (path.loads, path.stores))
        cost = Cost(*resources, elements, path.instructions, path.special, *accesses)
    return Finding(job, traffic.bytes if traffic else 0, cost, kernel_arithmetic.written(asm["ttir"]), broken)


def _wrong_accesses(path: machine_code.Path, traffic: Traffic, elements: int) -> Iterator[str]:
    """In words."""
    of_blocks, of_block = path.bytes - elements * traffic.data_bytes, traffic.block_bytes + traffic.shared_bytes
    if elements == 0 or (of_blocks % of_block if of_block else of_blocks):
        yield f"a thread moves {path.bytes} bytes, which are not {traffic.data_bytes} for each element"
    for size in (4, 2):
        width = size * ELEMENTS_OF_AN_ACCESS
        narrower = sum(each * count for each, count in (path.loads + path.stores).items() if each < width)
        allowed = of_blocks + sum(elements * small * times for small, times in traffic.streams if small < size)
        if narrower > allowed:
            yield f"of elements of {size} bytes or more, {narrower - allowed} bytes move by accesses narrower than {width} bytes"


def _tool(name: str, *arguments: str) -> str:
    from triton.backends import nvidia

    command = [str(Path(nvidia.__path__[0]) / "bin" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sass(cubin: bytes) -> tuple[int, int, int, str]:
    """Registers, no scalar registers, spilled bytes, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], 0, used["STACK"] + used["LOCAL"], code


def _amdgcn(text: str) -> tuple[int, int, int, str]:
    found = re.findall(r"^\s+\.(vgpr_count|sgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text, re.MULTILINE)
    used = {name: int(value) for name, value in found}
    # Scalar registers that do not suffice go to lanes of vector registers (.sgpr_spill_count), not to memory.
    return used["vgpr_count"], used["sgpr_count"], used["private_segment_fixed_size"] + 4 * used["vgpr_spill_count"], text


def can_compile() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_version() -> str:
    """As installed."""
    import triton

    return str(triton.__version__)


def measure_all(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Each of them, in order, in as many processes as there are cores; new ones, without Triton's interpreter."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        workers = min(len(os.sched_getaffinity(0)), len(jobs)) or 1
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(measure, jobs)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


@dataclass(frozen=True)
class Table:
    """What kernel_costs.json holds.

    Attributes:
        triton: the version that compiled.
        bytes: variant -> bytes that are moved for an element; 0 if that is not known.
        costs: by job.
    """

    triton: str
    bytes: dict[str, float]
    costs: dict[Job, Cost]

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Table:
        found = list(findings)
        return cls(triton_version(), {each.job[0]: each.bytes for each in found}, {each.job: each.cost for each in found})

    @classmethod
    def read(cls) -> Table:
        content = json.loads(TABLE.read_text())
        costs = {
            (name, target): Cost.from_json(row)
            for name, variant in content["variants"].items()
            for target, row in variant["targets"].items()
        }
        return cls(content["triton"], {name: variant["bytes"] for name, variant in content["variants"].items()}, costs)

    def text(self) -> str:
        """As JSON, a line for each job, so that differences can be read."""
        variants = []
        for name, moved in self.bytes.items():
            rows = [f"{json.dumps(target)}: {json.dumps(asdict(cost))}" for (of, target), cost in self.costs.items() if of == name]
            variants.append(f'{json.dumps(name)}: {{"bytes": {moved}, "targets": {{' + ",\n  ".join(rows) + "}}")
        return f'{{"triton": {json.dumps(self.triton)}, "variants": {{\n' + ",\n".join(variants) + "\n}}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0; 1 if a limit is broken, or the table is not what compiling gives."""
    parser = argparse.ArgumentParser(prog="python -m fused_opt.bench.kernel_costs", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--target", nargs="+", type=one_of("target", TARGETS), metavar="TARGET", help=f"any of {', '.join(TARGETS)}")
    args = parser.parse_args(argv)
    if not can_compile():
        parser.error("the package triton is not installed; install it with: pip install 'fused-opt[triton]'")
    if args.write and args.target:
        parser.error("--write needs all targets; leave --target out")
    status = 0
    findings = []
    for finding in measure_all([(name, target) for name in typical_variants() for target in args.target or TARGETS]):
        findings.append(finding)
        for problem in finding.broken:
            print(f"{', '.join(finding.job)}: {problem}")
            status = 1
    compiled = Table.of(findings)
    if args.write:
        TABLE.write_text(compiled.text())
        return status
    kept = Table.read()
    if kept.triton != compiled.triton:
        print(f"The table is of Triton {kept.triton}, this is {compiled.triton}: not compared.")
        return status
    for job, cost in compiled.costs.items():
        if kept.costs.get(job) != cost:
            print(f"{', '.join(job)}: {cost}, the table has {kept.costs.get(job)}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
