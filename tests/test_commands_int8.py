"""What `bench`, `demo`, `quality` and `doctor` do about 8-bit states."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import cli, doctor
from fused_opt.bench import demo, measure, peers, quality, quality_tasks, speed_blocks
from fused_opt.bench.char_model import Corpus
from fused_opt.bench.coded_sample import follow
from fused_opt.bench.exact_sample import TOLERATED, ExactSample
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.peers import Peer
from fused_opt.bench.quality_tasks import RECIPES, TASKS
from fused_opt.bench.speed_blocks import DEQUANTIZE, INTO, QUANTIZE, BlocksRow, measure_blocks
from fused_opt.bench.speed_plan import AS_TORCH, CONFIGURATIONS, FULL_JOBS, INT8, QUICK_JOBS, STATES
from fused_opt.bench.speed_row import PLAIN, Tensors
from fused_opt.bench.workloads import WORKLOADS
from fused_opt.native import native

BLOCK = 256


@pytest.fixture
def without_the_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSED_OPT_BACKEND", "torch")
    native.cache_clear()
    yield
    monkeypatch.undo()
    native.cache_clear()


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of others that happen to be installed take seconds."""
    monkeypatch.setattr(peers, "PEERS", ())


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes most of the time of short trainings."""
    windows = Corpus.held_out_windows

    def few(corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = windows(corpus)
        return inputs[:10], targets[:10]

    monkeypatch.setattr(Corpus, "held_out_windows", few)
    monkeypatch.setattr(demo, "SAMPLE_CHARACTERS", 5)


def bench(tmp_path: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    """What the command measured."""
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *arguments, "--json", str(file)]) == status
    measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def test_the_runs_have_rows_with_8_bit_states() -> None:
    quick = {(job.workload.name, job.dtype) for job in QUICK_JOBS if job.state == INT8 and job.configuration == "adamw"}
    assert quick == {("gpt2", "float32"), ("gpt2", "bfloat16"), ("resnet50", "float32"), ("mlp", "float32"), ("tiny", "float32")}
    assert quick < {(job.workload.name, job.dtype) for job in FULL_JOBS if job.state == INT8}


def test_bench_times_8_bit_states_beside_torchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(tmp_path, "single", "--optimizer", "adamw", "--state", "int8")["rows"]
    assert set(row["samples"]) == {"ours", PLAIN, "fused", "foreach", "for-loop"}
    assert len({len(times) for times in row["samples"].values()}) == 1
    elements = 65_536
    assert row["state_bytes"] == {"as-torch": 8 * elements, "int8": 2 * (elements + 4 * elements // BLOCK)}
    assert row["step_bytes"] == 12 * elements + 2 * row["state_bytes"]["int8"]
    assert row["wrong"] == []
    assert max(row["errors"].values()) < TOLERATED / 2
    assert set(row["coded_errors"]) == set(row["detours"]) == {"ours"}
    assert row["coded_errors"]["ours"]["states"] <= 1
    assert 0.001 < row["detours"]["ours"] < 0.1, "not hidden: a code has five significant bits"
    printed = capsys.readouterr().out
    assert "float32, contiguous, our states int8" in printed
    assert "2.03 / 8.00" in printed


def test_bench_skips_what_cannot_have_8_bit_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = bench(tmp_path, "rl", "--optimizer", "adamw", "--state", "int8", "--dtype", "float64")["rows"]
    assert "torch.float64" in row["skipped"]
    assert "rl adamw float64 contiguous int8 states was skipped" in capsys.readouterr().out


@pytest.mark.usefixtures("without_the_extension")
def test_without_the_extension_there_are_no_8_bit_rows(tmp_path: Path) -> None:
    found = bench(tmp_path, "rl", "blocks", "--optimizer", "adamw", "--state", "int8")
    assert "FUSED_OPT_BACKEND=torch" in found["rows"][0]["skipped"]
    assert "FUSED_OPT_BACKEND=torch" in found["blocks"]["skipped"]


def test_bench_finds_8_bit_steps_that_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_opt.AdamW, "step", lambda self: None)
    (row,) = bench(tmp_path, "rl", "--optimizer", "adamw", "--state", "int8", status=1)["rows"]
    assert row["wrong"] == ["ours", PLAIN]
    assert "fused_opt is WRONG: rl adamw float32 contiguous int8 states" in capsys.readouterr().out


def sampled(name: str, dtype: torch.dtype = torch.float32) -> tuple[ExactSample, Tensors]:
    tensors = Tensors.random(WORKLOADS["mlp"], str(dtype).removeprefix("torch."))
    return ExactSample(CONFIGURATIONS[name], tensors.params, tensors.grads), tensors


def coded_optimizer(name: str, tensors: Tensors, layout: str = "contiguous", **options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    case, arrange = CONFIGURATIONS[name], LAYOUTS[layout]
    params = [torch.nn.Parameter(arrange.parameter(value.clone())) for value in tensors.params]
    for param, grad in zip(params, tensors.grads, strict=True):
        param.grad = arrange.gradient(grad)
    return getattr(fused_opt, case.optimizer)(params, **{**case.options, **options}, state_dtype="int8"), params


@pytest.mark.parametrize(
    ("dtype", "layout"), [*((torch.float32, layout) for layout in LAYOUTS), (torch.bfloat16, "contiguous"), (torch.float16, "permuted")]
)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_right_8_bit_steps_are_found_right(name: str, dtype: torch.dtype, layout: str) -> None:
    sample, tensors = sampled(name, dtype)
    optimizer, params = coded_optimizer(name, tensors, layout)
    errors = follow(CONFIGURATIONS[name], sample, optimizer, params)
    assert errors.parameters < TOLERATED / 2
    assert errors.states <= 1
    if any(key.endswith("_scale") for state in optimizer.state.values() for key in state):
        assert errors.states > 0.9, "the bound is no wider than it has to be"
    else:
        assert name in ("sgd", "rmsprop-centered-momentum"), "these have no 8-bit states"


def scales_off(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if name.endswith("_scale"):
                value.mul_(1.1)


def codes_off(optimizer: Any) -> None:
    for state in optimizer.state.values():
        if "exp_avg_scale" in state:
            state["exp_avg"].sub_(state["exp_avg"].sign() * 2)


def blocks_swapped(optimizer: Any) -> None:
    for state in optimizer.state.values():
        if "exp_avg_sq_scale" in state:
            state["exp_avg_sq"].copy_(state["exp_avg_sq"].flip(0))


def parameters_off(optimizer: Any) -> None:
    for param in optimizer.state:
        param.data.mul_(1 + 30 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("spoil", [scales_off, codes_off, blocks_swapped, parameters_off])
def test_wrong_8_bit_steps_are_found_wrong(spoil: Callable[[Any], None]) -> None:
    sample, tensors = sampled("adamw")
    optimizer, params = coded_optimizer("adamw", tensors)
    optimizer.register_step_post_hook(lambda optimizer, *_: spoil(optimizer))
    errors = follow(CONFIGURATIONS["adamw"], sample, optimizer, params)
    assert errors.parameters > 2 * TOLERATED if spoil is parameters_off else errors.states > 1.3


@pytest.mark.parametrize("options", [{"betas": (0.9, 0.998)}, {"weight_decay": 0.02}, {"lr": 1.001e-3}])
def test_8_bit_steps_with_slightly_wrong_options_are_found_wrong(options: dict[str, Any]) -> None:
    """Against the run without codes alone these would be hidden by what the codes cost."""
    sample, tensors = sampled("adamw")
    optimizer, params = coded_optimizer("adamw", tensors, **options)
    assert follow(CONFIGURATIONS["adamw"], sample, optimizer, params).parameters > 2 * TOLERATED
    right, right_params = coded_optimizer("adamw", tensors)
    follow(CONFIGURATIONS["adamw"], sample, right, right_params)
    assert sample.detour(right_params) > sample.detour(params) / 2


SMALL = measure.Effort(budget=0.05, least=2, most=3)


def small_blocks(elements: int = 2**16 + 100) -> speed_blocks.Blocks:
    streaming = functools.cache(lambda: measure.Streaming(2**16))
    return measure_blocks(SMALL, streaming, lambda share: None, elements)


def test_bench_times_blockwise_functions() -> None:
    rows = small_blocks().rows
    assert [row.function for row in rows] == [QUANTIZE, DEQUANTIZE, QUANTIZE + INTO, DEQUANTIZE + INTO]
    for row in rows:
        assert row.moved_bytes == 5 * row.elements + 4 * math.ceil(row.elements / BLOCK)
        assert len(row.seconds) == len(row.limits) >= 2
        assert row.right
    row = BlocksRow(QUANTIZE, 1, 2 * 10**9, [1.0, 0.5], [4.0, 4.0], True, [])
    assert (row.gb_per_s.median, row.share.median) == (3.0, 0.75)


def test_bench_finds_a_wrong_blockwise_function(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fused_opt.dequantize_blockwise
    monkeypatch.setattr(fused_opt, "dequantize_blockwise", lambda q, out=None: real(q, out).mul_(1.005))
    assert not any(row.right for row in small_blocks().rows)


def test_blocks_are_a_workload_of_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_opt.bench.speed.measure_blocks", lambda *_: small_blocks())
    found = bench(tmp_path, "blocks")
    assert found["rows"] == []
    assert [row["function"] for row in found["blocks"]["rows"]][:2] == [QUANTIZE, DEQUANTIZE]
    printed = capsys.readouterr().out
    assert "quantize_blockwise" in printed
    assert "speed-up" not in printed


def failing(*_: Any) -> Any:
    raise RuntimeError("no compiler found")


def copying(_: Any, x: torch.Tensor) -> peers.Calls:
    return {QUANTIZE: x.clone, DEQUANTIZE: x.clone}


# Each goes by the name of a package that is installed here.
WORKING = Peer("pytest", lambda package, params: torch.optim.AdamW(params, foreach=False), copying)
BROKEN = Peer("pytest", failing, failing)


def test_bench_times_installed_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", (WORKING, BROKEN, Peer("not_installed_anywhere", failing, failing)))
    (row,) = bench(tmp_path, "rl", "--optimizer", "adamw", "--state", "int8")["rows"]
    working, broken = row["peers"]
    assert working["peer"] == broken["peer"] == f"pytest {pytest.__version__}"
    assert len(working["samples"]["ours"]) == len(working["samples"]["peer"]) >= 3
    assert working["detour"] < 1e-3, "it is AdamW without codes"
    assert working["ours_is_faster_by"]["median"] > 0
    assert broken["failure"] == "RuntimeError: no compiler found"
    assert "no compiler found" in capsys.readouterr().out


def test_bench_times_the_blockwise_functions_of_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", (WORKING, BROKEN))
    rows = {row.function: row for row in small_blocks().rows}
    for name in (QUANTIZE, DEQUANTIZE):
        working, broken = rows[name].peers
        assert working.seconds.median > 0
        assert broken.failure
    assert not rows[QUANTIZE + INTO].peers


@pytest.mark.usefixtures("little_text")
def test_demo_compares_models_with_8_bit_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, file = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = ["--steps", "4", "--batch-size", "2", "--state", "int8", "--output", str(picture), "--json", str(file)]
    assert cli.main(["demo", *arguments]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert list(found["trainings"]) == ["torch.optim.AdamW(fused=True)", "fused_opt.AdamW8bit"]
    torchs, ours = found["state_bytes"]
    assert torchs == 8 * found["values"]
    assert ours < 2.1 * found["values"]
    assert found["losses"][0] != found["losses"][1] == pytest.approx(found["losses"][0], abs=0.1)
    printed = capsys.readouterr().out
    assert f"{found['losses'][1] - found['losses'][0]:+.4f} nats" in printed
    assert "identical" not in printed


@pytest.mark.usefixtures("little_text")
def test_demo_fails_where_8_bit_states_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LEARNING_RATE", 1e30)
    assert cli.main(["demo", "--steps", "3", "--batch-size", "2", "--state", "int8", "--output", str(tmp_path / "demo.png")]) == 1


@pytest.mark.usefixtures("without_the_extension")
@pytest.mark.parametrize("arguments", [("demo", "--state", "int8"), ("quality",)])
def test_without_the_extension_there_is_nothing_to_compare(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "8-bit states need the extension, and FUSED_OPT_BACKEND=torch" in capsys.readouterr().err


@pytest.mark.usefixtures("little_text")
def test_quality_reports_differences_beside_the_seeds_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quality.json"
    assert cli.main(["quality", "--steps", "4", "--seeds", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["comparisons"]
    assert [(row["task"], row["metric"]) for row in found] == [("characters", "loss"), ("digits", "loss"), ("digits", "accuracy")]
    for row in found:
        assert len(row["exact"]) == len(row["coded"]) == 2
        assert row["seeds_spread"] == pytest.approx(abs(row["exact"][1] - row["exact"][0]) / math.sqrt(2))
        assert row["state_bytes"] < 2.3, "the states are 8-bit ones"
    assert all(row["coded"] != row["exact"] for row in found if row["metric"] == "loss")
    assert "seeds' spread" in capsys.readouterr().out


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_format_of_states_differs(task: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATES, INT8, {})
    trained = TASKS[task](RECIPES[recipe], 1, 2)
    assert trained.metrics[AS_TORCH] == trained.metrics[INT8]
    assert trained.state_bytes[AS_TORCH] == trained.state_bytes[INT8]


def test_recipes_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier: a tenth is right by chance."""
    monkeypatch.setattr(quality_tasks, "FOLDS", 2)
    for recipe in RECIPES.values():
        trained = TASKS["digits"](recipe, 0, 60)
        assert min(metrics["accuracy"] for metrics in trained.metrics.values()) > 0.6


@pytest.mark.parametrize(("coded", "within"), [([1.1, 2.1, 3.1], True), ([2.1, 3.1, 4.1], False), ([0.0, 1.0, 1.5], False)])
def test_a_difference_is_judged_by_the_seeds_spread(coded: list[float], within: bool) -> None:
    comparison = quality.Comparison("task", "adamw", "loss", [1.0, 2.0, 3.0], coded, 2.0)
    assert comparison.seeds_spread == 1
    assert comparison.within is within
    assert any("by more than another seed" in line for line in quality.notes([comparison], 3, 1)) is not within


def test_doctor_tries_8_bit_steps(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.Report()
    doctor._optimizers(report, torch)
    doctor._coded_optimizers(report, torch)
    assert report.problems == []
    plain, coded = report.sections[doctor.FP32_SECTION], report.sections[doctor.CODED_SECTION]
    assert list(coded) == ["Adam8bit", "AdamW8bit", "RMSprop8bit", "SGD8bit"]
    assert "states: 8 bytes a value" in plain["AdamW"]
    assert "states: 2.031 bytes a value; 3 steps are dequantize, fp32 step, quantize" in coded["AdamW8bit"]
    assert "states: 1.016 bytes a value" in coded["SGD8bit"]


@pytest.mark.parametrize("spoil", [scales_off, parameters_off])
def test_doctor_finds_a_wrong_8_bit_step(spoil: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> None:
        fused_opt.AdamW._step(self)
        spoil(self)

    monkeypatch.setattr(fused_opt.AdamW8bit, "step", step)
    report = doctor.Report()
    doctor._coded_optimizers(report, torch)
    (problem,) = report.problems
    assert problem.what.startswith("AdamW8bit")
    assert "WRONG" in report.sections[doctor.CODED_SECTION]["AdamW8bit"]
