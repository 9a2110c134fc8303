"""The part "passes" of `fused-opt bench`: what is done within a step leads where torch's way leads, and what does not is found."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fused_opt import cli
from fused_opt.bench import benchmark, memory_table, passes, passes_report
from fused_opt.bench.contestants import Tensors
from fused_opt.bench.figures import Figures
from fused_opt.bench.implementations import Implementation, implementations
from fused_opt.bench.measure import Effort
from fused_opt.bench.memory_table import FLASHOPTIM, OURS, PEERS, Held, Peer
from fused_opt.bench.passes_plan import FULL_WORKLOADS, PASSES, QUICK_JOBS, PassJob, every_job
from fused_opt.bench.passes_report import TORCH, PassRow
from fused_opt.bench.speed_measure import Shared
from fused_opt.bench.speed_plan import INT8
from fused_opt.bench.suite import Results
from fused_opt.bench.workloads import WORKLOADS
from fused_opt.native import native

SMALL = Effort(budget=0.01, least=2, most=3)
FEW = 4096  # elements of the parameter whose bytes are counted: the least that have 8-bit states

ALL = every_job(["rl"])
tensors = functools.cache(lambda dtype: Tensors.random(WORKLOADS["rl"], dtype))
pytestmark = pytest.mark.skipif(native().module is None, reason="needs the extension")


def distance(job: PassJob) -> float:
    made = tensors(job.row.dtype)
    loops = passes.both(job, made.params)
    return passes.distance(job, loops["ours"], loops[TORCH], made.grads)


@pytest.mark.parametrize("job", ALL, ids=str)
def test_a_step_with_all_that_it_does_leads_where_torchs_way_leads(job: PassJob) -> None:
    assert distance(job) <= 1


@pytest.mark.parametrize("name", passes.AROUND)
def test_what_is_left_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    around = dict(passes.AROUND)

    def nothing(loop: passes.Torchs) -> Any:
        around[name](loop)  # averages are there, but not updated
        return lambda: None

    monkeypatch.setitem(passes.AROUND, name, nothing)
    concerned = [job for job in ALL if any(name in names for names in job.row.torchs)]
    assert concerned
    for job in concerned:
        assert distance(job) > 10, job


@pytest.mark.parametrize("job", [job for job in ALL if job.row.dtype == "bfloat16"], ids=str)
def test_a_step_that_does_nothing_is_found(job: PassJob, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tensors(job.row.dtype)
    loops = passes.both(job, made.params)
    loops["ours"].step()
    monkeypatch.setattr(loops["ours"], "step", lambda: None)
    assert passes.distance(job, loops["ours"], loops[TORCH], made.grads) > 1


@pytest.mark.parametrize("what", ["kahan", "split", "master"])
def test_a_companion_that_is_missing_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = (job for job in ALL if job.what == what and job.state == "as-torch")
    monkeypatch.setitem(PASSES, what, dataclasses.replace(PASSES[what], options={}))
    assert distance(job) > 1


def test_nan_is_wrong() -> None:
    made = tensors("float32")
    loops = passes.both(ALL[0], made.params)
    loops["ours"].params[3].data[1] = math.nan
    error = passes.distance(ALL[0], loops["ours"], loops[TORCH], made.grads)
    row = PassRow(ALL[0], {"ours": [1.0], TORCH: [2.0]}, error)
    assert (error, row.wrong) == (math.inf, True)
    read = PassRow.from_record({**row.to_record(), "error": None})  # as JSON has it
    assert read == row
    assert any("WRONG" in note for note in passes_report.sheets({"a row": row.to_record()})[0].notes)


def test_a_row_is_timed_and_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    job = PassJob(WORKLOADS["rl"], "adamw", "clip-ema", threads=1)
    (unit,) = passes.units([job], SMALL, Shared())
    record = unit.measure(lambda share: None)
    row = PassRow.from_record(json.loads(json.dumps(record)))
    assert row.job == job
    assert row.to_record() == record
    assert len(row.samples["ours"]) == len(row.samples[TORCH]) >= 2
    assert not row.wrong
    assert record["torchs"] == "clip_grad_norm_ + fused step + AveragedModel.update_parameters"
    monkeypatch.setattr(passes.machine, "available_memory", lambda: 1000)
    (sheet,) = passes_report.sheets({"a": record, "b": unit.measure(lambda share: None)})
    assert [cell.text for cell in sheet.rows[1]][-1] == "skipped"
    assert any("needs 0.0 GB of memory" in note for note in sheet.notes)


def test_the_runs_have_every_pass() -> None:
    full = every_job(FULL_WORKLOADS)
    assert len(set(map(str, full))) == len(full)
    assert {job.what for job in full} == set(PASSES)
    assert {(job.what, job.state) for job in full} >= {(what, INT8) for what in ("stochastic", "kahan", "split", "master")}
    assert {job.configuration for job in full} == {"adamw", "sgd-momentum", "rmsprop"}
    assert set(QUICK_JOBS) <= set(full)


def test_a_few_are_in_the_quick_run_and_all_in_a_full_one() -> None:
    def names(*arguments: str) -> list[str]:
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        return [unit.name for unit in benchmark._units(parser.parse_args(arguments)) if unit.part == passes.PART]

    assert names() == list(map(str, QUICK_JOBS))
    assert names("mlp") == names("--optimizer", "adamw") == []
    with_peers = f"{memory_table.UNIT} with other packages"
    assert names("--full") == names("--full", "--part", "passes") == [*map(str, every_job(FULL_WORKLOADS)), with_peers]
    selected = names("rl", "--part", "passes", "--dtype", "bfloat16", "--state", "int8", "--threads", "1,2")
    assert selected[:2] == ["rl adamw stochastic int8 states 1 thread", "rl adamw stochastic int8 states 2 threads"]
    assert len(selected) == 2 * 4 + 1


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours", "others"):
        monkeypatch.setattr(memory_table, name, functools.partial(getattr(memory_table, name), elements=FEW))


@pytest.mark.slow
def test_the_part_is_added_to_a_file_that_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    monkeypatch.setattr(benchmark, "QUICK", SMALL)
    file = tmp_path / "results.json"
    arguments = ["rl", "--optimizer", "sgd-momentum", "--json", str(file)]
    assert cli.main(["bench", *arguments]) == 0
    before = Results.read(file)
    assert set(before.records) == {"speed"}
    assert cli.main(["bench", *arguments, "--part", "passes", "--resume"]) == 0
    after = Results.read(file)
    assert after.part("speed") == before.part("speed")
    assert list(after.part("passes")) == ["rl sgd-momentum clip", "rl sgd-momentum ema", "bytes a parameter"]
    printed = capsys.readouterr().out
    assert "One pass over memory" in printed
    assert "flashoptim, as published" in printed


def test_bytes_are_those_of_the_tensors() -> None:
    found = {(each.optimizer, each.weights, each.states): each for each in memory_table.ours(FEW)}
    assert len(found) == 54
    assert not any(each.failure for each in found.values())
    scales = 4 / 256  # of a state in codes
    adamw = {key[1:]: (each.total, each.released_total) for key, each in found.items() if key[0] == "adamw"}
    assert adamw["float32", "float32"] == (16, 12)
    assert adamw["float32", "int8"] == (10 + 2 * scales, 6 + 2 * scales)
    assert adamw["bfloat16, nearest", "bfloat16"] == (8, 6)
    assert adamw["bfloat16, stochastic", "int8"] == (6 + 2 * scales, 4 + 2 * scales)
    assert adamw["bfloat16, kahan", "bfloat16"] == (10, 8)
    assert adamw["bfloat16, split", "int8"] == (8 + 2 * scales, 6 + 2 * scales)
    assert adamw["bfloat16, master", "float32"] == (16, 14)
    assert found["sgd-momentum", "bfloat16, split", "int8"].total == 7 + scales
    keep = {weights for _, weights, _ in found if found["adamw", weights, "int8"].keeps_float32}
    assert keep == {"float32", "bfloat16, split", "bfloat16, master"}
    assert all(each.keeps_float32 == (each.weights in keep) for each in found.values())


def test_bytes_of_others_or_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(implementations(), "none", Implementation("none", "no_such_package", {}))
    torchs, none = memory_table.others([Peer("fused", "bfloat16", "bfloat16"), Peer("none", "float32", "float32")], FEW)
    assert (torchs.total, torchs.keeps_float32, torchs.released_total) == (8, False, None)
    assert "not installed" in none.failure
    (sheet,) = memory_table.sheets([torchs, none])
    assert [row[-1].text for row in sheet.rows] == ["no", "not measured"]
    assert any("not installed" in note for note in sheet.notes)


@pytest.mark.slow
def test_bytes_of_other_packages_are_measured_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Working", "Failing"):
        monkeypatch.setitem(implementations(), name, Implementation(name, "pytest", {"AdamW": f"planted_peers:{name}"}))
    right, wrong = memory_table.others([Peer("Working", "float32", "float32"), Peer("Failing", "float32", "float32")], FEW)
    assert (right.total, right.keeps_float32, right.failure) == (16, True, "")
    assert "no compiler found" in wrong.failure


@pytest.mark.peers
def test_every_package_has_its_bytes() -> None:
    found = [each for each in memory_table.others(PEERS, FEW) if "not installed" not in each.failure]
    assert {each.implementation for each in found} > {"fused"}
    assert [each.failure for each in found] == [""] * len(found)
    assert all(4 < each.total <= 16 for each in found)


def test_the_readmes_figures() -> None:
    timed = [
        PassRow(PassJob(WORKLOADS[workload], "adamw", what, state), {"ours": [1.0] * 3, TORCH: [2.0, 1.5, 3.0]}, 0.1)
        for workload, what, state in (("gpt2", "clip", "as-torch"), ("gpt2", "stochastic", INT8), ("mlp", "clip", "as-torch"))
    ]
    held = [Held("adamw", OURS, "bfloat16, split", "int8", 2.0, 2.0, 4.03125, 0.0, True), FLASHOPTIM]
    records = {str(row.job): row.to_record() for row in timed}
    records[memory_table.UNIT] = {"held": [dataclasses.asdict(each) for each in held]}
    figures = Figures(Results({}, {}, {passes.PART: records}))
    assert figures["pass-clip"] == figures["pass-stochastic-int8"] == "2.00 (1.50 to 3.00)"
    assert figures["bytes-split-int8"] == "8.03"
    assert figures["released-bytes-split-int8"] == "6.03"
    assert "| AdamW | stochastic, states int8 | fused step | 2.00 (1.50 to 3.00) |  |" in figures["passes"]
    assert "| flashoptim, as published | bfloat16, 24 bits with states | int8 | 2.00 | 2.00 | 3.00 | 7.00 | 5.00 | no |" in figures["bytes"]
    with pytest.raises(KeyError):
        Figures(Results({}, {}, {passes.PART: {}}))["pass-clip"]
