"""The command line, the README's example, and what the benchmark computes with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import cli, rules
from fused_opt.bench import ulp
from fused_opt.bench.contestants import Tensors
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED, ExactSample
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.speed_plan import CONFIGURATIONS, DTYPES
from fused_opt.bench.workloads import WORKLOADS
from fused_opt.native import native

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fused_opt", *arguments], capture_output=True, text=True, cwd=TESTS, check=False)


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the seconds of importing torch."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status: Any = cli.main(arguments)
        except SystemExit as exit_:
            status = exit_.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


def run_code(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=TESTS, check=False)


def test_readme_example_runs_and_explains_itself() -> None:
    examples = re.findall(r"<!-- test -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 7
    code = "\n".join(examples)
    result = run_code(code, "-W", "error")
    assert result.returncode == 0, result.stderr
    loss, *explanation = result.stdout.splitlines()
    assert float(loss) < 1
    isa = native().isa
    assert explanation[1].startswith(f"  group 0: 4 x float32 (1409 elements) by cpu-{isa}: ")
    assert explanation[0] in (ROOT / "README.md").read_text()
    assert explanation[-1].startswith(f"{2**22 + 4 * 2**22 // 256} "), "bytes of codes and scales"


def test_help_and_version() -> None:
    assert all(name in command("--help").stdout for name in ("bench", "parity", "doctor", "demo", "quality"))
    assert command("--version").stdout.strip().endswith(fused_opt.__version__)
    assert command().returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "gpt3"), "gpt3.*gpt2"),
        (("bench", "--optimizer", "lion"), "lion.*adamw"),
        (("bench", "--dtype", "int8"), "int8.*bfloat16"),
        (("bench", "--layout", "sparse"), "sparse.*permuted"),
        (("bench", "--state", "int4"), "int4.*as-torch, bfloat16, int8"),
        (("bench", "--threads", "0"), "0 is out of range.*from 1"),
        (("parity", "--optimizer", "Lion"), "Lion.*AdamW"),
        (("parity", "--dtype", "int8"), "int8.*bfloat16"),
        (("parity", "--steps", "0"), "0"),
        (("demo", "--steps", "0"), "0"),
        (("demo", "--state", "int4"), "int4.*int8"),
        (("train",), "train"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run_here(*arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_right_and_wrong_implementations_are_far_apart(name: str, dtype: str) -> None:
    """Right ones have a fraction of the tolerated error; a gradient in the wrong order, or a step less, makes a multiple of it."""
    case, tensors = CONFIGURATIONS[name], Tensors.random(WORKLOADS["single"], dtype)
    exact = ExactSample(case, tensors.params, tensors.grads)

    def error(module: Any, flip: bool = False, steps: int = COMPARED_STEPS, foreach: bool = False) -> float:
        params = [torch.nn.Parameter(value.clone()) for value in tensors.params]
        optimizer = getattr(module, case.optimizer)(params, **case.options, foreach=foreach)
        for param, grad in zip(params, tensors.grads, strict=True):
            param.grad = grad.flip(0) if flip else grad
        for _ in range(steps):
            optimizer.step()
        return exact.error(params)

    assert max(error(torch.optim), error(torch.optim, foreach=True), error(fused_opt)) < TOLERATED / 2
    assert min(error(torch.optim, flip=True), error(torch.optim, steps=COMPARED_STEPS - 1)) > 2 * TOLERATED


# By layout: strides of a parameter and a gradient of shape (3, 4), and of (2, 3, 4, 5).
STRIDES = {
    "contiguous": ((4, 1), (4, 1), (60, 20, 5, 1), (60, 20, 5, 1)),
    "permuted": ((1, 3), (1, 3), (60, 1, 15, 3), (60, 1, 15, 3)),
    "other-grad": ((4, 1), (1, 3), (60, 20, 5, 1), (60, 1, 15, 3)),
    "gaps": ((12, 1), (4, 1), (220, 20, 5, 1), (60, 20, 5, 1)),
}


def test_layouts_keep_the_values() -> None:
    for name, layout in LAYOUTS.items():
        arranged = [arrange(torch.empty(shape)) for shape in ((3, 4), (2, 3, 4, 5)) for arrange in (layout.parameter, layout.gradient)]
        assert tuple(tensor.stride() for tensor in arranged) == STRIDES[name]
        for shape in ((), (5,), (0, 3), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
            values = torch.randn(shape)
            assert torch.equal(layout.parameter(values), values)
            assert torch.equal(layout.gradient(values), values)
    assert LAYOUTS["gaps"].parameter(torch.empty(5)).stride() == (2,)


def test_parity_holds_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    result = run_here("parity", "--part", "rules", "--optimizer", "SGD", "--steps", "2", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every bit is as promised" in result.stdout
    report = json.loads(file.read_text())
    assert report["kept"] is True
    assert {row["tensor"] for row in report["rows"]} == {"param", "momentum_buffer"}
    assert all(row["values"] == row["reference"]["counts"]["0"] > 10_000 for row in report["rows"])


def test_parity_of_16_bits_counts_distances_from_the_exact_result(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    command_line = ("parity", "--part", "rules", "--optimizer", "AdamW", "--steps", "3", "--dtype", "bfloat16", "float16")
    result = run_here(*command_line, "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16"}
    assert all(row["values"] == row["reference"]["counts"]["0"] for row in rows)
    judged = [row for row in rows if row["tensor"] != "step"]
    for row in judged:
        found = row["exactness"]
        assert found["difference"]["counts"]["0"] + found["difference"]["counts"]["1"] + found["uncertain"] == row["values"]
        assert found["uncertain"] < row["values"] / 1000
        assert found["ours"] <= found["torchs"]
    assert any(row["exactness"]["ours"] < row["exactness"]["torchs"] for row in judged)


@pytest.mark.parametrize(
    ("dtype", "error", "words"),
    [("float32", 1e-6, "instead of"), ("bfloat16", 0.05, "not within 1 ULP of the correctly rounded")],
)
def test_parity_reports_a_planted_error(dtype: str, error: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> tuple[Any, ...]:
        *scalars, last = rules.SGD.scalars(*args)
        return (*scalars, last * (1 + error))

    monkeypatch.setattr(fused_opt.SGD, "_rule", dataclasses.replace(rules.SGD, scalars=wrong))
    result = run_here("parity", "--part", "rules", "--optimizer", "SGD", "--steps", "2", "--dtype", dtype)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "the promise is broken" in result.stdout
    assert words in result.stdout


def test_demo_trains_both_and_draws(tmp_path: Path) -> None:
    files = ("--output", str(tmp_path / "demo.png"), "--json", str(tmp_path / "demo.json"))
    result = run_here("demo", "--steps", "4", "--batch-size", "2", *files)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "identical bit for bit" in result.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_doctor_finds_nothing_wrong_here(tmp_path: Path) -> None:
    result = command("doctor", "--json", str(tmp_path / "doctor.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert native().isa in result.stdout
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["ok"] is True
    assert report["problems"] == []


@pytest.mark.parametrize("missing", ["torch", "fused_opt._cpu"])
def test_doctor_works_on_a_broken_installation(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fused_opt import cli; sys.exit(cli.main(['doctor']))"
    result = run_code(code)
    assert result.returncode == 1
    assert missing in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("missing", "name"), [("rich", "demo"), ("matplotlib", "demo"), ("sklearn", "quality")])
def test_a_missing_extra_is_named_with_its_remedy(missing: str, name: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fused_opt import cli; sys.exit(cli.main([{name!r}, '--steps', '1']))"
    result = run_code(code)
    assert result.returncode == 2
    assert missing in result.stderr
    assert "fused-opt[bench]" in result.stderr


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("mlp", 16, 526_336),
        ("rl", 12, 2 * (17 * 64 + 64 + 64 * 64 + 64 + 64 * 6 + 6)),
        ("tiny", 1000, 64_000),
        ("single", 1, 65_536),
        ("large", 1, 64 * 2**20),
        ("lora", 256, 8_388_608),
    ],
)
def test_workloads_have_their_models_shapes(name: str, tensors: int, elements: int) -> None:
    workload = WORKLOADS[name]
    assert (workload.tensors, workload.elements) == (tensors, elements)


def test_ulp_distance() -> None:
    one = torch.tensor([1.0, 1.0, -1.0, 0.0, float("nan"), 3.4028234663852886e38, -1e-45])
    other = torch.tensor([1.0, 1 + 2**-23, -1 - 2**-22, -0.0, float("nan"), float("inf"), 1e-45])
    assert ulp.distance(one, other).tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert ulp.max_ulp(one, other) == 2
    assert not ulp.bits_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert ulp.max_ulp(torch.tensor([1.0]), torch.tensor([float("nan")])) > 2**31
    assert sum(ulp.histogram(one, other).values()) == 7


def test_flags_and_scalars_are_those_of_the_kernels() -> None:
    """fused_opt/rules.py against the enums of csrc/request.h."""
    header = (ROOT / "csrc" / "request.h").read_text()
    python = {
        "adam": (rules.ADAM, {"kAmsgrad": rules.AMSGRAD, "kL2": rules.ADAM_L2}, torch.optim.Adam),
        "rmsprop": (
            rules.RMSPROP,
            {"kCentered": rules.CENTERED, "kMomentum": rules.RMSPROP_MOMENTUM, "kL2": rules.RMSPROP_L2},
            torch.optim.RMSprop,
        ),
        "sgd": (
            rules.SGD,
            {"kMomentum": rules.SGD_MOMENTUM, "kNesterov": rules.NESTEROV, "kFirst": rules.FIRST, "kL2": rules.SGD_L2},
            torch.optim.SGD,
        ),
    }
    for name, (rule, flags, torch_class) in python.items():
        (block,) = re.findall(rf"namespace {name} {{(.*?)}}  // namespace", header, re.DOTALL)
        (flag_text,) = re.findall(r"enum Flag : unsigned {(.*?)}", block, re.DOTALL)
        assert {flag: int(value) for flag, value in re.findall(r"(k\w+) = (\d+)", flag_text)} == flags
        (scalar_text,) = re.findall(r"enum Scalar {(.*?)}", block, re.DOTALL)
        scalars = re.findall(r"k\w+", scalar_text)[:-1]
        group = torch_class([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
        assert len(rule.program(group, 1.0, False)[1]) == len(scalars)
