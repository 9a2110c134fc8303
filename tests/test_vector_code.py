"""The vectorised kernels really are vector code, and no wide instruction stands anywhere else: read from the built extension itself."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from bisect import bisect_right
from pathlib import Path

import pytest

from fused_opt.native import native

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions")

REGISTER = {"scalar": "xmm", "avx2": "ymm", "avx512": "zmm"}
# What the body of each rule must contain: packed instructions on whole registers.
FMA = r"vfn?m(add|sub)\d{{3}}p{size}\s.*%{register}"
SQRT, DIV = r"vsqrtp{size}\s.*%{register}", r"vdivp{size}\s.*%{register}"
STORE = r"vmov([ua]p{size}|dq[ua](32|64)?)\s+%{register}\d+,.*\("
# Encoding 8-bit codes. (Not all rules decode them: SGD's first step has no buffer.)
CODES = {"avx2": (r"vpack[us]swb\s.*%ymm",), "avx512": (r"vpmovdb\s+%zmm",)}
# Kernels for 16-bit formats: decoding and encoding.
CONVERSIONS = {
    "bfloat16": (r"vpslld\s+\$0x10,.*%{register}", r"vpsrld\s+\$0x10,.*%{register}"),
    "float16": (r"vcvtph2ps\s.*%{register}", r"vcvtps2ph\s.*%{register}"),
}
ALWAYS = {"adam": (FMA, SQRT, DIV), "rmsprop": (FMA, SQRT, DIV), "sgd": (FMA,)}

Kernel = tuple[str, str, int, str, int]  # isa, rule, flags, format, address


def load_address(library: str) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(library):
            return int(line.split("-")[0], 16)
    raise AssertionError(f"{library} is not mapped")


@pytest.fixture(scope="module")
def disassembly() -> tuple[list[Kernel], list[tuple[int, str]], list[tuple[int, str]]]:
    """Kernels by their address in the file, where each set's code starts, and every instruction of the extension with its address."""
    if shutil.which("objdump") is None:
        pytest.fail("objdump is missing: install binutils, which comes with the C++ compiler")
    module = native().module
    base = load_address(module.__file__)
    kernels = sorted(((*rest, address - base) for *rest, address in module.kernel_addresses()), key=lambda k: k[-1])
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module.__file__], capture_output=True, text=True, check=True).stdout
    instructions = [(int(m[1], 16), m[2]) for m in re.finditer(r"^\s*([0-9a-f]+):\t(.*)$", text, re.MULTILINE)]
    return kernels, sorted((address - base, isa) for isa, address in module.code_starts()), instructions


def bodies(kernels: list[Kernel], instructions: list[tuple[int, str]]) -> dict[Kernel, list[str]]:
    starts = [kernel[-1] for kernel in kernels]
    found: dict[Kernel, list[str]] = {kernel: [] for kernel in kernels}
    for address, instruction in instructions:
        index = bisect_right(starts, address) - 1
        if index >= 0:
            found[kernels[index]].append(instruction)
    return found


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_kernel_uses_whole_registers(isa: str, disassembly) -> None:
    kernels, _, instructions = disassembly
    checked = set()
    for (name, rule, flags, stored, _), body in bodies(kernels, instructions).items():
        if name != isa:
            continue
        checked.add((rule, flags, stored))
        suffix = "d" if stored == "float64" else "s"
        of_values, _, states = stored.partition(" ")
        for mnemonic in (*ALWAYS[rule], *CONVERSIONS.get(of_values, (STORE,)), *(CODES[isa] if "int8" in states else ())):
            pattern = re.compile(mnemonic.format(register=REGISTER[isa], size=suffix))
            assert any(map(pattern.match, body)), f"{isa} {rule} flags {flags}, {stored}: no {pattern.pattern}"
    expected = {(rule, flags, stored) for name, rule, flags, stored, _ in kernels if name == "scalar"}
    # Which round stochastically, too, unlike those for processors without fma; all rules with 8-bit states but centered RMSprop.
    expected |= {(rule, flags, f"{stored} stochastic") for rule, flags, stored in expected if stored.startswith("bfloat16")}
    assert checked == expected
    assert len(checked) > 200


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_large_results_are_written_past_the_caches(isa: str, disassembly) -> None:
    _, sections, instructions = disassembly
    starts = [start for start, _ in sections]
    streamed = re.compile(rf"vmovntps\s+%{REGISTER[isa]}")
    inside = [instruction for address, instruction in instructions if sections[bisect_right(starts, address) - 1][1] == isa]
    assert any(map(streamed.match, inside))


def test_no_newer_instruction_outside_the_kernels_made_for_it(disassembly) -> None:
    """Code for AVX-512 that ran on the way to the dispatch, or in a shared inline function, would stop an older CPU."""
    _, sections, instructions = disassembly
    starts = [start for start, _ in sections]
    vex = re.compile(r"v")  # every AVX instruction, also on xmm registers, and none of the baseline that a compiler emits
    evex = re.compile(r".*%(zmm\d+|k[0-7]|[xy]mm(1[6-9]|2\d|3[01]))\b")
    counted = {"avx2": 0, "avx512": 0}
    for address, instruction in instructions:
        index = bisect_right(starts, address) - 1
        inside = sections[index][1] if index >= 0 else "portable"
        if evex.match(instruction):
            assert inside == "avx512", f"{instruction} at {address:#x} is among the {inside} code"
            counted["avx512"] += 1
        elif vex.match(instruction):
            assert inside in ("avx2", "avx512"), f"{instruction} at {address:#x} is among the {inside} code"
            counted["avx2"] += 1
    assert min(counted.values()) > 1000
