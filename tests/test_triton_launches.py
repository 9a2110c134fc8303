"""How often a step launches and uploads, counted by a driver that does nothing else; and which parameters Triton serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.stand_in_driver import StandInDriver, stand_in_driver
from fused_opt.kernels import launch, step
from fused_opt.kernels.rules import RULES
from fused_opt.native import native
from helpers import CLASSES, params_of
from pairs import ALL_STATES, nothing_changes


@pytest.fixture
def driver(use_backend: Any) -> Iterator[StandInDriver]:
    with stand_in_driver() as stand_in:
        use_backend("triton")
        yield stand_in


def with_gradients(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def make(name: str, counts: list[int], dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Optimizer:
    params = with_gradients([torch.nn.Parameter(torch.ones(count, dtype=dtype)) for count in counts])
    optimizer: torch.optim.Optimizer = getattr(fused_opt, name)(params, **{**ALL_STATES[name], **options})
    return optimizer


@pytest.mark.parametrize("name", CLASSES)
def test_one_launch_for_a_thousand_tensors(name: str, driver: StandInDriver) -> None:
    optimizer = make(name, [64] * 1000)
    uploads = []
    for _ in range(4):
        driver.launches.clear()
        optimizer.step()
        assert driver.launches == [1000], "a program for each tensor"
        uploads.append(optimizer._last_launched.uploads)
    # Rows, chunks and scalars; SGD's second step is another kernel, and has its rows and chunks again.
    assert uploads == ([3, 3, 1, 1] if name == "SGD" else [3, 1, 1, 1])


def test_a_program_for_each_8192_elements(driver: StandInDriver) -> None:
    make("AdamW", [8192, 8193, 100_000, 0]).step()
    assert driver.launches == [1 + 2 + 13]


def test_what_is_uploaded_when_pointers_change(driver: StandInDriver) -> None:
    optimizer = make("AdamW", [300, 40])
    for _ in range(2):
        optimizer.step()
    param = params_of(optimizer)[0]
    param.grad = torch.ones(300)  # elsewhere: the old one is still there
    optimizer.step()
    assert optimizer._last_launched.uploads == 2, "rows and scalars"
    optimizer.add_param_group({"params": with_gradients([torch.nn.Parameter(torch.ones(9))])})
    optimizer.step()
    assert optimizer._last_launched.uploads == 3, "chunks, too"
    assert optimizer._last_launched.step_launches == 1, "for both groups"


def test_a_bucket_for_each_dtype_and_state_format(driver: StandInDriver) -> None:
    params = with_gradients([torch.nn.Parameter(torch.ones(n, dtype=d)) for n in (9, 5000) for d in (torch.float32, torch.bfloat16)])
    optimizer = fused_opt.AdamW(params, state_dtype="int8")
    for _ in range(2):
        driver.launches.clear()
        optimizer.step()
    assert driver.launches == [1, 1, 1, 1], "fp32 and bf16, each with fp32 and with 8-bit states"


def test_capturable_uploads_nothing(driver: StandInDriver) -> None:
    """What a CUDA graph replays must not depend on the host."""
    optimizer = make("AdamW", [300, 40], capturable=True, lr=torch.tensor(0.1))
    for _ in range(3):
        driver.launches.clear()
        optimizer.step()
    assert driver.launches == [2, 2], "scalars, a program for each tensor; the step, one for each chunk"
    assert optimizer._last_launched == (1, 1, 0)


def test_a_norm_is_two_launches(driver: StandInDriver) -> None:
    optimizer = make("AdamW", [300, 8193], capturable=True, max_grad_norm=1.0, average="ema", weights="kahan", dtype=torch.bfloat16)
    for _ in range(3):
        driver.launches.clear()
        optimizer.step()
    assert driver.launches == [3, 1, 2, 3], "norms of chunks, of all; scalars of tensors, step of chunks"
    assert optimizer._last_launched.uploads == 0


def test_parameters_that_share_memory_go_one_after_the_other(driver: StandInDriver) -> None:
    optimizer = make("SGD", [300, 40])
    shared = torch.nn.Parameter(params_of(optimizer)[0].detach()[100:])
    optimizer.add_param_group({"params": with_gradients([shared])})
    optimizer.step()
    assert driver.launches == [1, 1, 1]


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("float64", lambda p: p.double(), "float64"),
        ("strides", lambda p: p.view(8, 8).t().contiguous().t()[:4], "densely packed"),
        ("another order of the gradient", None, "densely packed"),
    ],
)
def test_what_triton_does_not_take(what: str, change: Any, words: str, driver: StandInDriver) -> None:
    value = torch.ones(64)
    param = torch.nn.Parameter(value.view(8, 8) if change is None else change(value))
    param.grad = torch.ones_like(param) if change else torch.ones(8, 8).t()
    optimizer = fused_opt.AdamW([param])
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=f"FUSED_OPT_BACKEND=triton, but parameter 0 .*{words}"):
        optimizer.step()
    assert driver.launches == []


def test_a_kernel_that_does_not_compile_changes_nothing(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such target")

    optimizer = make("AdamW", [64])
    monkeypatch.setattr(launch.launcher, "prepare", fail)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="no such target"):
        optimizer.step()
    monkeypatch.undo()


def test_explain(driver: StandInDriver) -> None:
    (row,) = fused_opt.explain(make("AdamW", [64, 9])).rows
    assert (row.path, row.isa, row.parameters) == ("triton", "", 2)
    assert row.reason.startswith("on cpu, by Triton 3.")


def test_columns_are_those_of_the_extension() -> None:
    assert native().module.table_columns == step.COLUMNS.value


def test_rules_have_the_states_of_their_specs() -> None:
    from fused_opt import rules

    assert {name for rule in RULES.values() for name, *_ in rule.states} == rules.SLOTS
    assert {name for rule in RULES.values() for name, kind, _ in rule.states if not kind.signed} == rules.NON_NEGATIVE


def test_a_kernel_that_cannot_be_loaded_changes_nothing(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU's memory is full: before the first launch, also of buckets that could be."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(driver, "load_binary", fail)
    options = {"betas": (0.5, 0.25), "amsgrad": True}  # nobody else's kernel
    params = [torch.nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in (torch.float32, torch.float16)]
    optimizer = fused_opt.AdamW(with_gradients(params), **options)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert driver.launches == []


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_parameters_that_share_a_gradient_are_unscaled_once(name: str, driver: StandInDriver) -> None:
    """By torch, since two programs of a launch would both do it."""
    optimizer = make(name, [64, 64])
    a, b = params_of(optimizer)
    b.grad = a.grad
    optimizer.step()  # SGD's first one asks the scaler
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert a.grad.eq(0.25).all()


def test_states_that_kernels_do_not_take(driver: StandInDriver) -> None:
    optimizer = make("AdamW", [64], state_dtype=torch.float64)
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=r"torch\.float64 cannot be had for parameter 0 of group 0, .* leave it out"),
    ):
        optimizer.step()


def test_host_time_prints_a_table(use_backend: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_opt.bench import host_time

    use_backend("cpu")  # which it changes itself
    monkeypatch.setattr(host_time, "STEPS", 4)
    monkeypatch.setattr(host_time, "TENSORS", (3, 40))
    native.cache_clear()
    host_time.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "AdamW, capturable" in line]) == 2
