"""The machine code of the Triton kernels, which compile without a GPU: what it costs, and that it computes what is written."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fused_opt.bench import kernel_arithmetic, kernel_costs, machine_code
from fused_opt.bench.kernel_arithmetic import Operations
from fused_opt.bench.kernel_costs import TARGETS, Finding, Table

# A minute's work for one core on all targets; together they have every rule, dtype, format of states and kind of kernel.
TYPICAL = (
    "adamw, fp32",
    "adamw, bf16, int8 states",
    "rmsprop centered momentum l2, fp16",
    "quantize mulaw, float32, stochastic",
)
TYPICAL_OR_ALL = pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["typical", "all"])

# Operations of a rule, as csrc/kernels/rules.h has them; by the beginning of a variant's name, the longest that fits.
WRITTEN = {
    "adamw": Operations(fma=2, div=2, sqrt=1),
    "adam amsgrad l2": Operations(fma=3, div=2, sqrt=1),
    "rmsprop": Operations(fma=1, div=1, sqrt=1),
    "rmsprop momentum": Operations(fma=2, div=1, sqrt=1),
    "rmsprop centered momentum l2": Operations(fma=5, div=1, sqrt=1),
    "sgd": Operations(fma=1, div=0, sqrt=0),
    "sgd momentum": Operations(fma=2, div=0, sqrt=0),
    "sgd nesterov l2": Operations(fma=4, div=0, sqrt=0),
}
STATES = {"adamw": 2, "adam amsgrad l2": 3, "rmsprop": 1, "rmsprop momentum": 2, "sgd momentum": 1, "sgd nesterov l2": 1}


def written_in_step(name: str) -> Operations:
    """In the step kernel's whole tiles and again in its tail. A state in codes adds five fused multiply-adds (three for its unit, one
    each to decode and to encode) and a division (the inverse)."""
    rule = max((rule for rule in WRITTEN if name.startswith(rule)), key=len)
    coded = STATES[rule] if "int8" in name else 0
    plain = WRITTEN[rule]
    return Operations(2 * (plain.fma + 5 * coded), 2 * (plain.div + coded), 2 * plain.sqrt)


@functools.cache
def compiled(everything: bool) -> list[Finding]:
    names = list(kernel_costs.typical_variants()) if everything else TYPICAL
    return list(kernel_costs.measure_all([(name, target) for name in names for target in TARGETS]))


@TYPICAL_OR_ALL
def test_kernels_keep_the_limits(everything: bool) -> None:
    """No spills, wide accesses, nothing contracted, IEEE roots and divisions: with any version of Triton."""
    assert {finding.job: finding.broken for finding in compiled(everything) if finding.broken} == {}


@TYPICAL_OR_ALL
def test_kernels_cost_what_the_table_says(everything: bool) -> None:
    """Exactly, with the version of Triton that the table is of. After a change: python -m fused_opt.bench.kernel_costs --write"""
    table = Table.read()
    for finding in compiled(everything):
        assert finding.bytes == table.bytes[finding.job[0]], finding.job
        if kernel_costs.triton_version() == table.triton:
            assert finding.cost == table.costs[finding.job], finding.job


@TYPICAL_OR_ALL
def test_kernels_have_the_operations_of_the_rules(everything: bool) -> None:
    steps = [finding for finding in compiled(everything) if finding.job[0].startswith(tuple(WRITTEN))]
    assert len(steps) == len(TARGETS) * len({finding.job[0] for finding in steps}) >= 3 * len(TARGETS)
    assert {finding.job: finding.written for finding in steps} == {finding.job: written_in_step(finding.job[0]) for finding in steps}


def test_the_table_is_of_all_variants_and_targets() -> None:
    table = Table.read()
    assert set(table.costs) == {(name, target) for name in kernel_costs.typical_variants() for target in TARGETS}
    assert list(table.bytes) == list(kernel_costs.typical_variants())
    assert table.text() == kernel_costs.TABLE.read_text()


def test_the_command_writes_the_table_and_compares_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = compiled(False)[: len(TARGETS)]
    monkeypatch.setattr(kernel_costs, "measure_all", lambda jobs: iter(findings))
    monkeypatch.setattr(kernel_costs, "TABLE", tmp_path / "table.json")
    assert kernel_costs.main(["--write"]) == 0
    assert Table.read() == Table.of(findings)
    assert kernel_costs.main([]) == 0
    assert capsys.readouterr().out == ""
    first = findings[0]
    findings[0] = dataclasses.replace(first, cost=dataclasses.replace(first.cost, registers=255))
    assert kernel_costs.main([]) == 1
    assert "registers=255" in capsys.readouterr().out
    findings[0] = dataclasses.replace(first, broken=["8 bytes are spilled"])
    assert kernel_costs.main([]) == 1
    assert capsys.readouterr().out == f"{', '.join(first.job)}: 8 bytes are spilled\n"


# Planted faults


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("adamw, fp32", {"num_warps": 16}, "of 4 bytes or more, 56 bytes move by accesses narrower than 16"),  # two elements a thread
        ("sgd, bf16", {"num_warps": 16}, "of 2 bytes or more, .* narrower than 8"),
        ("adamw, fp32", {"enable_fp_fusion": True}, "[0-9]+ fused multiply-adds, [0-9]+ were asked for"),
        ("adamw, fp32, int8 states in blocks of 4096", {"maxnreg": 32, "waves_per_eu": 8}, "[1-9][0-9]* bytes are spilled"),
    ],
)
def test_faults_are_found(kernel: str, changes: dict[str, Any], words: str, target: str) -> None:
    variant = kernel_costs.typical_variants()[kernel]
    changed = dataclasses.replace(variant, num_warps=changes.get("num_warps", variant.num_warps))
    others = {"num_warps", "maxnreg" if target == "gfx942" else "waves_per_eu"}  # and what only the other GPU's compiler knows
    planted = SimpleNamespace(
        **{name: getattr(changed, name) for name in ("kernel", "arguments", "constants", "signature", "constexprs", "num_warps")},
        options=lambda warp_size: changed.options(warp_size) | {name: value for name, value in changes.items() if name not in others},
    )
    broken = kernel_costs.examine(("planted", target), planted).broken
    assert any(re.search(words, each) for each in broken), broken


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("fma.rn.f32 \t%r1, %r2, %r3, %r4;", ["1 fused multiply-adds, 0 were asked for"]),
        ("@%p1 mul.f32 \t%r1, %r2, %r3;", ["1 mul.f32"]),
        ("mad.rn.f32 \t%r1, %r2, %r3, %r4;", ["1 mad.rn.f32"]),
        ("sqrt.approx.f32 \t%r1, %r2;", ["1 sqrt.approx.f32", "sqrt.approx.f32"]),
        ("div.full.f32 \t%r1, %r2, %r3;", ["1 div.full.f32", "div.full.f32"]),
        ("add.rn.ftz.f32 \t%r1, %r2, %r3;", ["1 add.rn.ftz.f32", "add.rn.ftz.f32"]),
        ("min.ftz.f32 \t%r1, %r2, %r3;", ["min.ftz.f32"]),
        ("mul.rn.bf16 \t%rs1, %rs2, %rs3;", ["1 mul.rn.bf16"]),
        ("add.rn.f32.bf16 \t%r1, %rs2, %r3;", []),
        ("div.rn.f32 \t%r1, %r2, %r3;", []),
        ("mad.lo.s32 \t%r1, %r2, %r3, %r4;", []),
    ],
)
def test_ptx_that_rounds_otherwise_is_found(instruction: str, found: list[str]) -> None:
    assert kernel_arithmetic.differences({"ptx": f"\t{instruction}\n", "llir": "", "ttir": ""}) == found


DENORMALS = "\t\t.amdhsa_float_denorm_mode_32 3\n"
DIVISION = "\tv_rcp_f32_e32 v1, v2\n" + 5 * "\tv_fma_f32 v1, v2, v3, v4\n" + "\tv_div_fixup_f32 v1, v2, v3, v4\n"


@pytest.mark.parametrize(
    ("text", "llir", "found"),
    [
        (DIVISION + DENORMALS, "%1 = fdiv float %2, %3", []),
        (DIVISION + DENORMALS, "", ["1 divisions, 0 were asked for"]),
        ("\tv_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]\n" + DENORMALS, "%1 = tail call <2 x float> @llvm.fma.v2f32(%2)", []),
        ("\tv_fmac_f32_e32 v0, v1, v2\n" + DENORMALS, "", ["1 fused multiply-adds, 0 were asked for"]),
        ("\tv_fma_mix_f32 v1, v2, v3, neg(0) op_sel_hi:[1,0,0]\n" + DENORMALS, "", []),
        ("\tv_fma_mix_f32 v1, v2, v3, v4 op_sel_hi:[1,0,0]\n" + DENORMALS, "", ["1 fused multiply-adds, 0 were asked for"]),
        ("\tv_rcp_f32_e32 v1, v2\n" + DENORMALS, "", ["1 reciprocals, 0 were asked for"]),
        ("\tv_rsq_f32_e32 v1, v2\n" + DENORMALS, "", ["1 approximate roots, 0 were asked for"]),
        (DENORMALS, "%1 = fmul contract float %2, %3", ["LLVM may change %1 = fmul contract float %2, %3"]),
        ("\t\t.amdhsa_float_denorm_mode_32 0\n", "", ["denormals are flushed"]),
    ],
)
def test_amdgcn_that_rounds_otherwise_is_found(text: str, llir: str, found: list[str]) -> None:
    assert kernel_arithmetic.differences({"amdgcn": text, "llir": llir, "ttir": ""}) == found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("%2 = arith.divf %0, %1 : tensor<4x256xf32> loc(#loc)", ["approximate arith.divf in the text"]),
        ("%2 = math.rsqrt %0 : f32 loc(#loc)", ["approximate math.rsqrt in the text"]),
        ("%2 = math.sqrt %0 : f64 loc(#loc)", []),
        ("%2 = tt.precise_divf %0, %1 : tensor<4x256xf32> loc(#loc)", []),
        ("%2 = math.fma %0, %1, %1 : tensor<4x256xf32> loc(#loc)", []),
    ],
)
def test_approximate_functions_are_found(line: str, found: list[str]) -> None:
    assert kernel_arithmetic.differences({"ptx": "", "llir": "", "ttir": f"    {line}\n"}) == found


# Reading machine code

LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P1 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.RSQ R1, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   MOV R5, 0x70 ;
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
.L_x_1:
        /*0070*/              @!P3 STG.E desc[UR4][R6.64], R9 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/               @P4 LDG.E R4, desc[UR4][R2.64] ;
        /*00b0*/               @P4 STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/               @P5 BRA `(.L_x_2) ;
        /*00d0*/                   EXIT ;
"""
NO_LOOP = """
        /*0000*/              @!P0 BRA `(.L_x_0) ;
        /*0010*/               @P1 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 STG.E.U8 desc[UR4][R2.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
"""
WAVES = """
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[2:5], v1, s[4:7], 0 offen
\ts_waitcnt vmcnt(0)
\tv_sqrt_f32_e32 v2, v2
\tbuffer_store_dwordx4 v[2:5], v1, s[4:7], 0 offen
\ts_cbranch_scc1 .LBB0_1
\ts_branch .LBB0_4
.LBB0_2:
\tglobal_load_ushort v1, v2, s[2:3]
\tglobal_store_short v1, v2, s[2:3]
\ts_endpgm
.LBB0_3:
\tv_mov_b32_e32 v0, 0
.LBB0_4:
\ts_branch .LBB0_2
"""


@pytest.mark.parametrize(
    ("text", "dialect", "path"),
    [
        (LOOP, machine_code.SASS, machine_code.Path(6, 1, Counter({16: 1}), Counter({16: 1, 4: 1}))),
        (NO_LOOP, machine_code.SASS, machine_code.Path(4, 0, Counter({8: 1}), Counter({4: 1}))),
        (WAVES, machine_code.AMDGCN, machine_code.Path(3, 1, Counter({16: 1}), Counter({16: 1}))),
    ],
    ids=["loop", "no loop", "AMD"],
)
def test_what_whole_tiles_execute(text: str, dialect: machine_code.Dialect, path: machine_code.Path) -> None:
    assert machine_code.main_path(text, dialect) == path


def test_a_slow_path_that_cannot_be_avoided_is_not_left_out() -> None:
    with pytest.raises(ValueError, match="slow path"):
        machine_code.main_path(LOOP.replace("@!P0 BRA `(.L_x_1)", "NOP"), machine_code.SASS)
