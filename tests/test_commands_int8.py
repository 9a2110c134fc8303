"""What `bench`, `demo` and `doctor` do about 8-bit states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import cli, doctor
from fused_opt.bench import demo
from fused_opt.bench.char_model import Corpus
from fused_opt.bench.coded_sample import follow
from fused_opt.bench.contestants import Tensors
from fused_opt.bench.exact_sample import TOLERATED, ExactSample
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.speed_plan import CONFIGURATIONS
from fused_opt.bench.workloads import WORKLOADS

BLOCK = 256


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes most of the time of short trainings."""
    windows = Corpus.held_out_windows

    def few(corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = windows(corpus)
        return inputs[:10], targets[:10]

    monkeypatch.setattr(Corpus, "held_out_windows", few)
    monkeypatch.setattr(demo, "SAMPLE_CHARACTERS", 5)


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
def test_without_the_extension_there_is_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--state", "int8"]) == 2
    assert "8-bit states need the extension, and FUSED_OPT_BACKEND=torch" in capsys.readouterr().err


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
