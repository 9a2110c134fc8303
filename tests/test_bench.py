"""`fused-opt bench`: what is measured, and which implementation is found to be wrong. How long things took is not tested."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from bench_runs import ADAMW, BLOCK, bench, rows, small_blocks
from fused_opt.bench import speed_blocks, speed_measure
from fused_opt.bench.block_peers import DEQUANTIZE, QUANTIZE
from fused_opt.bench.exact_sample import TOLERATED
from fused_opt.bench.speed_blocks import INTO, BlocksRow
from fused_opt.bench.speed_files import COLUMNS
from fused_opt.bench.speed_plan import FULL_JOBS, INT8, QUICK_JOBS, jobs
from fused_opt.bench.speed_row import CONTIGUOUS, PLAIN, Row, Skipped, from_record
from fused_opt.bench.workloads import WORKLOADS
from fused_opt.native import native

pytestmark = pytest.mark.usefixtures("short_runs")


def test_bench_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(bench(tmp_path, *ADAMW))
    assert "adamw" in capsys.readouterr().out
    assert (row["workload"], row["tensors"], row["dtype"], row["layout"]) == ("rl", 12, "float32", "contiguous")
    assert set(row["samples"]) == set(row["first_seconds"]) == set(row["peak_bytes"]) == {"ours", "fused", "foreach", "for-loop"}
    assert len({len(times) for times in row["samples"].values()}) == 1, "every round times every implementation"
    assert min(min(times) for times in row["samples"].values()) > 0
    assert min(row["first_seconds"].values()) > 0
    assert row["wrong"] == []
    assert 0 < row["errors"]["ours"] < TOLERATED
    assert set(row["state_bytes"].values()) == {8 * row["elements"]}, "exp_avg and exp_avg_sq in float32"
    assert row["ran"] == (native().isa or "torch")


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    for record in rows(bench(tmp_path, *ADAMW, "--state", "as-torch", "int8", "--dtype", "float32", "float64")):
        row = from_record(record)
        assert json.loads(json.dumps(row.to_record())) == record
        assert isinstance(row, Skipped) is (record["state"] == INT8 and record["dtype"] == "float64")


def test_bench_measures_every_combination_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes, layouts, threads = ["bfloat16"], ["permuted", "gaps"], [1, 2]
    selection = ("--dtype", *dtypes, "--layout", *layouts, "--optimizer", "sgd", "--threads", "1,2")
    found = rows(bench(tmp_path, "rl", *selection))
    expected = [(dtype, layout, count) for dtype in dtypes for layout in layouts for count in threads]
    assert [(row["dtype"], row["layout"], row["threads"]) for row in found] == expected
    printed = capsys.readouterr().out
    for row in found:
        assert f"{row['dtype']}, {row['layout']}" in printed
        assert set(row["samples"]) == {"ours", CONTIGUOUS, "fused", "foreach", "for-loop"}
        assert "ours" not in row["wrong"]
        assert from_record(row).fastest not in row["wrong"]


def test_every_row_is_measured_with_its_threads_and_instruction_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    measure_rounds = speed_measure.interleave
    before = torch.get_num_threads()

    def interleave(*args: Any, **options: Any) -> Any:
        seen.append((torch.get_num_threads(), native().isa))
        return measure_rounds(*args, **options)

    monkeypatch.setattr(speed_measure, "interleave", interleave)
    module = native().module
    assert module is not None
    usable = [name for name, supported in module.isas() if supported]
    found = rows(bench(tmp_path, *ADAMW, "--threads", "1", "3", "--isa", "all"))
    assert seen == [(threads, isa) for threads in (1, 3) for isa in usable]
    assert [(row["threads"], row["ran"]) for row in found] == seen
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", ["ours", "fused"])
def test_bench_finds_an_implementation_that_does_nothing(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the fastest of all, and not called so."""
    if wrong == "ours":
        monkeypatch.setattr(fused_opt.AdamW, "step", lambda self: None)
    else:
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None if self.defaults["fused"] else step(self))
    (row,) = rows(bench(tmp_path, *ADAMW, status=1 if wrong == "ours" else 0))
    who = "fused_opt" if wrong == "ours" else "torch, fused"
    assert f"{who} is WRONG: rl adamw float32 contiguous" in capsys.readouterr().out
    assert row["wrong"] == [wrong]
    assert row["fastest"] in {"fused", "foreach", "for-loop"} - {wrong}


def test_the_runs_have_rows_of_all_kinds() -> None:
    assert len(set(QUICK_JOBS)) == len(QUICK_JOBS)
    assert len(set(FULL_JOBS)) == len(FULL_JOBS)
    assert {job.layout for job in FULL_JOBS if job.workload.name == "resnet50"} == {"contiguous", "permuted", "other-grad", "gaps"}
    assert {job.workload.name for job in FULL_JOBS if job.state == INT8} == set(WORKLOADS)
    assert {job.state for job in QUICK_JOBS} == {"as-torch", "int8"}
    assert {job.dtype for job in FULL_JOBS if job.workload.name == "gpt2"} >= {"float32", "bfloat16", "float16"}
    assert set(QUICK_JOBS) <= set(FULL_JOBS), "the full run has all that the quick one has"
    assert {job.threads for job in FULL_JOBS} == {0, 1}


def test_torchs_fastest_implementation_must_be_right() -> None:
    (job,) = jobs(["rl"], ["float32"], ["contiguous"], ["adamw"])
    samples = {"ours": [1.0], "fused": [0.5], "for-loop": [3.0], "foreach": [2.0]}

    def row(fused_error: float) -> Row:
        errors = {name: fused_error if name == "fused" else 1.0 for name in samples}
        nothing = dict.fromkeys(samples, 0)
        return Row(job, samples, [], errors, [], dict.fromkeys(samples, 0.0), dict.fromkeys(samples), nothing, nothing)

    assert row(TOLERATED).fastest == "fused"
    assert row(TOLERATED * 1.01).fastest == "foreach"


def test_csv_has_a_line_for_each_contestant(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    selection = ("--state", "int8", "--dtype", "float32", "float64", "--threads", "1")
    results = bench(tmp_path, *ADAMW, *selection, "--csv", str(file))
    with file.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert tuple(found[0]) == COLUMNS
    measured, skipped = rows(results)
    assert [line["contestant"] for line in found[:-1]] == list(measured["samples"])
    assert found[-1]["skipped"] == skipped["skipped"]
    for line in found[:-1]:
        assert float(line["seconds"]) == measured["seconds"][line["contestant"]]["median"]
        assert int(line["threads"]) == 1
        assert line["isa"] == native().isa
    assert float(found[0]["speed_up"]) == 1


def test_bench_times_8_bit_states_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(bench(tmp_path, "single", "--optimizer", "adamw", "--state", "int8"))
    assert set(row["samples"]) == {"ours", PLAIN, "fused", "foreach", "for-loop"}
    assert len({len(times) for times in row["samples"].values()}) == 1
    elements = 65_536
    assert row["state_bytes"]["ours"] == 2 * (elements + 4 * elements // BLOCK)
    assert row["state_bytes"]["fused"] == row["state_bytes"][PLAIN] == 8 * elements
    assert row["step_bytes"] == {name: 12 * elements + 2 * size for name, size in row["state_bytes"].items()}
    assert row["wrong"] == []
    assert max(row["errors"].values()) < TOLERATED / 2
    assert set(row["coded"]) == set(row["detours"]) == {"ours"}
    assert row["coded"]["ours"]["states"] <= 1
    assert 0.001 < row["detours"]["ours"] < 0.1, "not hidden: a code has five significant bits"
    printed = capsys.readouterr().out
    assert "float32, contiguous, our states int8" in printed
    assert "2.03" in printed


def test_bench_judges_bfloat16_states_by_their_own_precision(tmp_path: Path) -> None:
    (row,) = rows(bench(tmp_path, "single", "--optimizer", "adamw", "--state", "bfloat16"))
    assert row["state_bytes"]["ours"] == 4 * 65_536
    assert row["wrong"] == []
    assert 0.01 < row["errors"]["ours"] < TOLERATED / 2, "in units of bfloat16's eps"


def test_bench_skips_what_cannot_have_8_bit_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(bench(tmp_path, *ADAMW, "--state", "int8", "--dtype", "float64"))
    assert "torch.float64" in row["skipped"]
    assert "rl adamw float64 contiguous int8 states was skipped" in capsys.readouterr().out


def test_bench_skips_what_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_opt.bench.machine.available_memory", lambda: 10_000)
    (row,) = rows(bench(tmp_path, *ADAMW))
    assert re.search(r"needs 0\.\d GB of memory, 0\.0 GB are available", row["skipped"])


@pytest.mark.usefixtures("without_the_extension")
def test_without_the_extension_there_are_no_8_bit_rows(tmp_path: Path) -> None:
    found = bench(tmp_path, "blocks", *ADAMW, "--state", "int8")
    assert "FUSED_OPT_BACKEND=torch" in rows(found)[0]["skipped"]
    (blocks,) = found.part("blocks").values()
    assert "FUSED_OPT_BACKEND=torch" in blocks["skipped"]


def test_bench_finds_8_bit_steps_that_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_opt.AdamW, "step", lambda self: None)
    (row,) = rows(bench(tmp_path, *ADAMW, "--state", "int8", status=1))
    assert row["wrong"] == ["ours", PLAIN]
    assert "fused_opt is WRONG: rl adamw float32 contiguous int8 states" in capsys.readouterr().out


def test_bench_times_blockwise_functions() -> None:
    blocks = small_blocks()
    assert [row.function for row in blocks.rows] == [QUANTIZE, DEQUANTIZE, QUANTIZE + INTO, DEQUANTIZE + INTO]
    for row in blocks.rows:
        assert row.moved_bytes == 5 * row.elements + 4 * math.ceil(row.elements / BLOCK)
        assert len(row.seconds) == len(row.limits) >= 2
        assert row.right
    assert speed_blocks.Blocks.from_record(json.loads(json.dumps(blocks.to_record()))) == blocks
    row = BlocksRow(QUANTIZE, 1, 2 * 10**9, [1.0, 0.5], [4.0, 4.0], True)
    assert (row.gb_per_s.median, row.share.median) == (3.0, 0.75)


def test_bench_finds_a_wrong_blockwise_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fused_opt.dequantize_blockwise
    monkeypatch.setattr(fused_opt, "dequantize_blockwise", lambda q, out=None: real(q, out).mul_(1.005))
    monkeypatch.setattr(speed_blocks, "measure_blocks", lambda *_: small_blocks())
    bench(tmp_path, "blocks", status=1)
    assert "fused_opt is WRONG: what dequantize_blockwise makes" in capsys.readouterr().out


def test_blocks_are_a_workload_of_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_blocks, "measure_blocks", lambda *_: small_blocks())
    found = bench(tmp_path, "blocks")
    assert rows(found) == []
    (blocks,) = found.part("blocks").values()
    assert [row["function"] for row in blocks["rows"]][:2] == [QUANTIZE, DEQUANTIZE]
    printed = capsys.readouterr().out
    assert "quantize_blockwise" in printed
    assert "speed-up" not in printed
