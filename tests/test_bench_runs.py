"""`fused-opt bench` as a run: packages of others, kept, resumed and compared results, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import planted_peers
from bench_runs import ADAMW, bench, plant, rows, small_blocks
from fused_opt import cli
from fused_opt.bench import benchmark, block_peers, speed_measure, stability
from fused_opt.bench.block_peers import DEQUANTIZE, QUANTIZE
from fused_opt.bench.implementations import ENTRY_POINTS, Implementation, implementations, packages
from fused_opt.bench.measure import Effort, Estimate, interleave
from fused_opt.bench.sheet import to_rich
from fused_opt.bench.speed_blocks import INTO
from fused_opt.bench.speed_plan import INT8, PEER_JOBS, jobs
from fused_opt.bench.speed_row import OURS
from fused_opt.bench.suite import Results
from fused_opt.bench.worker import TimedOutError

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.slow
def test_others_are_timed_in_processes_of_their_own_and_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "Working", "Failing", "Dying")
    absent = Implementation("absent", "not_installed_anywhere", {"AdamW": "nowhere:AdamW"}, install="ask somebody")
    monkeypatch.setitem(implementations(), "absent", absent)
    names = ("Working", "Dying", "Failing", "absent")
    results = bench(tmp_path, *ADAMW, "--implementation", *names)
    working, dying, failing, missing = rows(results)
    assert set(working["samples"]) == {"ours", "Working"}
    assert len(working["samples"]["ours"]) == len(working["samples"]["Working"]) >= 2
    assert 0 < working["detours"]["Working"] < 1e-5
    assert working["wrong"] == []
    assert working["state_bytes"]["Working"] == 8 * working["elements"]
    assert dying["skipped"] == "crashed: SIGKILL"
    assert failing["skipped"] == "RuntimeError: no compiler found"
    assert missing["skipped"] == "not installed; ask somebody"
    printed = capsys.readouterr().out
    assert "rl adamw float32 contiguous against Dying was skipped: crashed: SIGKILL" in printed
    assert "not installed; ask somebody" in printed
    assert results.machine["packages"]["pytest"] == pytest.__version__


@pytest.mark.slow  # four processes
def test_blockwise_functions_of_others_are_timed_and_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_peers, "PEERS", {"pytest": planted_peers.copying, "rich": planted_peers.failing})
    found = {row.function: row for row in small_blocks(with_peers=True).rows}
    for name in (QUANTIZE, DEQUANTIZE):
        working, broken = found[name].peers
        assert working.peer == f"pytest {pytest.__version__}"
        assert working.ratio.median > 0
        assert broken.failure == "RuntimeError: no compiler found"
    assert not found[QUANTIZE + INTO].peers


def test_states_of_others_are_compared_with_ours_of_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "Working", state=INT8)
    implementation = implementations()["Working"]
    assert [benchmark._comparable(job, implementation) for job in PEER_JOBS[:1]] == [False]
    (coded,) = jobs(["rl"], ["float32"], ["contiguous"], ["adamw"], [INT8])
    assert benchmark._comparable(coded, implementation)
    (sgd,) = jobs(["rl"], ["float32"], ["contiguous"], ["sgd"], [INT8])
    assert not benchmark._comparable(sgd, implementation), "it has none"


def test_an_interrupted_run_keeps_what_it_has_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = ("rl", "--optimizer", "adamw", "sgd", "rmsprop")
    measured: list[str] = []
    measure_row = speed_measure.measure_row

    def interrupted_at(name: str) -> Callable[..., Any]:
        def measure(job: Any, *args: Any) -> Any:
            if job.configuration == name:
                raise KeyboardInterrupt
            measured.append(job.configuration)
            return measure_row(job, *args)

        return measure

    monkeypatch.setattr(speed_measure, "measure_row", interrupted_at("sgd"))
    assert len(rows(bench(tmp_path, *selection, status=130))) == 1
    printed = capsys.readouterr().out
    assert "Interrupted: 1 of 3 are measured; go on with: --json" in printed
    assert "for-loop" in printed, "what was measured is shown"
    monkeypatch.setattr(speed_measure, "measure_row", interrupted_at(""))
    resumed = bench(tmp_path, *selection, "--resume")
    assert [row["configuration"] for row in rows(resumed)] == measured == ["adamw", "sgd", "rmsprop"]


def test_a_run_is_not_resumed_elsewhere_or_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    results = bench(tmp_path, *ADAMW)
    for what, change in (("settings", {"threads": 77}), ("machine", {"torch": "1.0"})):
        content = json.loads(file.read_text())
        content[what] |= change
        file.write_text(json.dumps(content))
        assert cli.main(["bench", *ADAMW, "--json", str(file), "--resume"]) == 2
        ((name, value),) = change.items()
        assert f"its {name} is {value!r}, now it is" in capsys.readouterr().err
        results.write()
    assert cli.main(["bench", *ADAMW, "--resume"]) == 2
    assert "give --json FILE or --report DIR" in capsys.readouterr().err


def test_what_was_measured_can_be_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(tmp_path, *ADAMW)
    first = capsys.readouterr().out
    assert cli.main(["bench", "--from", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "bench.json").write_text("[]")
    assert cli.main(["bench", "--from", str(tmp_path / "bench.json")]) == 2
    assert "give a file written by --json" in capsys.readouterr().err


def test_a_slower_run_is_found_by_comparing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = bench(tmp_path, *ADAMW)
    (name,) = results.part("speed")

    def slowed(factor: float) -> Path:
        record = json.loads(json.dumps(results.part("speed")[name]))
        record["samples"] = {who: [factor if who == OURS else 2.0] * 8 for who in record["samples"]}
        results.records["speed"][name] = record
        results.path = tmp_path / f"{factor}.json"
        results.write()
        return results.path

    fast, slow, slightly = slowed(1.0), slowed(1.5), slowed(1.1)
    assert cli.main(["bench", "--from", str(slow), "--compare", str(fast)]) == 1
    printed = capsys.readouterr().out
    assert "3 of 3 differ by more than 15%" in printed, "fused, for-loop and foreach"
    assert f"Slower than before, beyond both confidence intervals: {name}" in printed
    assert cli.main(["bench", "--from", str(fast), "--compare", str(slow)]) == 0, "faster is no failure"
    assert cli.main(["bench", "--from", str(slightly), "--compare", str(fast)]) == 0
    assert "all agree within 15%" in capsys.readouterr().out


def test_two_quick_runs_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = jobs(["rl"], ["float32"], ["contiguous"], ["adamw"])
    monkeypatch.setattr(benchmark.speed_plan, "QUICK_JOBS", chosen)
    results = bench(tmp_path, "--part", "stability")
    assert list(results.part("stability")) == [f"{run} {chosen[0]}" for run in ("first", "second")]
    (sheet,) = stability.sheets(results.part("stability"))
    assert sheet.rows[0][0].text == str(chosen[0])
    assert "the median difference is" in sheet.notes[0]


def test_other_programs_that_kept_the_machine_busy_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_opt.bench.machine.OtherLoad.share", lambda self: 0.5)
    results = bench(tmp_path, *ADAMW)
    assert results.load_warning.startswith("Do not trust these times: other programs took up to 50% of the CPU during 1 of them")
    results.loads = {"speed": {"a": 0.05, "b": None}}
    assert results.load_warning == ""


def test_estimates_have_the_intervals_of_order_statistics() -> None:
    """Of 20 values the 6th and the 15th, which enclose the median with 95.9 %; of fewer than 6 the extremes."""
    values = [float(n) for n in range(1, 21)]
    assert Estimate.of(values) == Estimate(10.5, 6.0, 15.0)
    assert Estimate.of([3.0, 1.0, 2.0]) == Estimate(2.0, 1.0, 3.0)
    assert Estimate.of([1.0]) == Estimate(1.0, 1.0, 1.0)


def test_rounds_take_turns_and_samples_are_long_enough() -> None:
    calls: list[tuple[str, int]] = []

    def sampler(name: str, seconds: float) -> Callable[[int], float]:
        def sample(repeats: int) -> float:
            calls.append((name, repeats))
            return seconds * repeats

        return sample

    names = {"slow": 1.0, "quick": 0.3e-3, "quicker": 0.2e-3}
    found = interleave({name: sampler(name, seconds) for name, seconds in names.items()}, Effort(60.0, 6, 6))
    assert found == {name: pytest.approx([seconds] * 6) for name, seconds in names.items()}
    rounds = [calls[-18:][start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(each) == [("quick", 4), ("quicker", 8), ("slow", 1)] for each in rounds), "1 ms at least"
    assert {each[0][0] for each in rounds} == {each[-1][0] for each in rounds} == set(names)
    short = interleave({"slow": sampler("slow", 1.0)}, Effort(1e-9, 6, 60))
    assert short == {"slow": [1.0] * 3}, "where all takes far longer than planned, as on a busy machine"


def test_a_unit_that_fails_is_told_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_row = speed_measure.measure_row

    def measure(job: Any, *args: Any) -> Any:
        if job.configuration == "sgd":
            raise RuntimeError("out of order")
        return measure_row(job, *args)

    monkeypatch.setattr(speed_measure, "measure_row", measure)
    selection = ("rl", "--optimizer", "sgd", "adamw")
    results = bench(tmp_path, *selection, status=1)
    assert [row["configuration"] for row in rows(results)] == ["adamw"]
    assert results.failures == {"speed: rl sgd float32 contiguous": "RuntimeError: out of order"}
    assert "speed: rl sgd float32 contiguous failed: RuntimeError: out of order" in capsys.readouterr().out
    monkeypatch.setattr(speed_measure, "measure_row", measure_row)
    resumed = bench(tmp_path, *selection, "--resume")
    assert [row["configuration"] for row in rows(resumed)] == ["adamw", "sgd"]
    assert resumed.failures == {}


def test_a_row_may_have_nobody_to_compare_with(tmp_path: Path) -> None:
    (row,) = rows(bench(tmp_path, "rl", "--optimizer", "rmsprop", "--implementation", "fused"))
    assert (set(row["samples"]), row["fastest"]) == ({"ours"}, None)


def test_ours_is_not_measured_against_itself(tmp_path: Path) -> None:
    assert rows(bench(tmp_path, *ADAMW, "--implementation", "ours", "ours 8-bit")) == []
    (row,) = rows(bench(tmp_path, *ADAMW, "--implementation", "ours", "fused"))
    assert set(row["samples"]) == {"ours", "fused"}


def test_a_package_that_hangs_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "Working")
    started = []

    class Hanging:
        def __init__(self, threads: int) -> None:
            started.append(threads)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def call(self, *_: Any) -> None:
            raise TimedOutError("took longer than 300 s")

    monkeypatch.setattr(speed_measure, "Worker", Hanging)
    first, second = rows(bench(tmp_path, "rl", "single", "--optimizer", "adamw", "--implementation", "Working"))
    assert len(started) == 1
    assert (first["skipped"], second["skipped"]) == ("took longer than 300 s", "took longer than 300 s on rl")


def test_a_broken_plug_in_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"lost": "not_installed_anywhere:X", "other": "json:loads", "good": "planted_peers:PLUG_IN"}
    points = [EntryPoint(name, value, ENTRY_POINTS) for name, value in values.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    found = implementations.__wrapped__()
    assert found["planted"] is planted_peers.PLUG_IN
    assert found["planted"].missing == ""
    assert found["lost"].missing.startswith("not_installed_anywhere:X cannot be loaded: ModuleNotFoundError")
    assert "json:loads is <function loads" in found["other"].missing


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "real.json").touch()
    (tmp_path / "bench.json").symlink_to("real.json")
    assert len(rows(bench(tmp_path, *ADAMW))) == 1
    assert (tmp_path / "bench.json").is_symlink()
    assert Results.read(tmp_path / "real.json").part("speed")


def test_packages_of_others_are_listed_with_version_or_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "Working")
    absent = Implementation("absent", "not_installed_anywhere", {})
    monkeypatch.setitem(implementations(), "absent", absent)
    assert packages() == {"pytest": pytest.__version__, "not_installed_anywhere": "not installed; pip install not_installed_anywhere"}


def test_sheets_escape_what_looks_like_markup() -> None:
    from rich.console import Console

    from fused_opt.bench.sheet import BAD, Cell, Sheet

    sheet = Sheet("t", ["a"], ["b"])
    sheet.add("[red]x", Cell("[1]", BAD))
    sheet.notes.append("see [2]")
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        console.print(to_rich([sheet]))
    assert all(text in capture.get() for text in ("[red]x", "[1]", "see [2]"))
