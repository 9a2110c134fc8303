"""`fused-opt gpu-check` without a GPU: the dry run, planted faults, and what it says where it cannot check."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fused_opt
from fused_opt import cli
from fused_opt.bench import gpu_check
from fused_opt.bench.gpu_checks import DRY, FAILED, NOT_RUN, PASSED, CannotCheckError, Check, Found, perform
from fused_opt.bench.gpu_device import Gpu
from fused_opt.bench.gpu_interpreter import Interpreter
from fused_opt.bench.gpu_steps import Comparison

TESTS = Path(__file__).parent

triton = pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < gpu_check.INTERPRETER_FROM,
    reason="Triton's interpreter rounds otherwise than GPUs",
)


def run_here(*arguments: str) -> tuple[int, str]:
    """The command's status and what it says of errors."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(arguments)
    return status, errors.getvalue()


# Keys of the file, and of each of its checks.
TOP = {"command", "format", "extent", "complete", "passed", "failed", "not_run", "versions", "sanitizer", "checks"}
OF_A_CHECK = {"name": str, "promise": str, "status": str, "why": str, "compared": int, "problems": list, "data": dict}
ON_GPU_ONLY = ["machine", "huge", "graph", "no-sync", "speed"]


def assert_consistent(report: dict[str, Any]) -> None:
    """What whoever reads a file relies on."""
    assert set(report) == TOP
    assert (report["command"], report["format"], report["complete"]) == ("fused-opt gpu-check", 1, True)
    assert {"torch", "triton", "fused_opt", "cpu", "commit"} <= set(report["versions"])
    assert "compute-sanitizer --tool memcheck" in report["sanitizer"]
    for check in report["checks"]:
        assert {key: type(value) for key, value in check.items()} == OF_A_CHECK
        assert check["name"] in report[check["status"].replace(" ", "_")]
        assert (check["status"] == PASSED) == (check["why"] == "")
        assert (check["status"] == PASSED) <= (check["compared"] > 0 and not check["problems"])
        assert (check["status"] == FAILED) >= bool(check["problems"])
    assert sum(len(report[key]) for key in gpu_check.STATUSES) == len(report["checks"])


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(inner)


@needs_interpreter
@pytest.mark.slow
def test_dry_run_passes_and_measures_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fused_opt", "gpu-check", "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing here was run on a GPU" in result.stdout
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert_consistent(report)
    assert report["extent"] == "dry run"
    assert report["failed"] == []
    assert report["not_run"] == ON_GPU_ONLY
    assert report["passed"] == [check.name for check in gpu_check.CHECKS if check.name not in ON_GPU_ONLY]
    for check in report["checks"]:
        if check["name"] in ON_GPU_ONLY:
            assert (check["why"], check["data"]) == ("dry run: needs a GPU", {})
    times = [key for key in keys_of(report) if re.search(r"_m?s$|second|time|host|clock|gb_per|rounds|ratio", key)]
    assert times == []
    rows = {row["case"]: row for check in report["checks"] if check["name"] == "cpu-bits" for row in check["data"]["rows"]}
    assert {case.partition("(")[0] for case in rows} == {"Adam", "AdamW", "RMSprop", "SGD"}
    assert all(row["paths"][0] == ["triton"] and row["launches"] == [1, 1] and row["comparison"]["values"] > 2000 for row in rows.values())


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    """Fault of tests/gpu_faults.py -> what the command made of it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "gpu_faults.py"], capture_output=True, text=True, cwd=TESTS, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# Fault -> the check that fails, and in which words.
SEEN = {
    "rule": ("cpu-bits", "have not the CPU's bits"),
    "grid": ("cpu-bits", "have not the CPU's bits"),
    "beside": ("cpu-bits", "1 elements beside the tensors were changed"),
    "launches": ("cpu-bits", r"\[2\] launches"),
    "many launches": ("launches", "step_launches=2"),
    "backend": ("cpu-bits", "not by Triton"),
    "exactness": ("torch", "more than rounding explains"),
    "code": ("quantize", "2 values differ; codes, element 902 of 903"),
    "rate": ("capturable", "values differ"),
    "overflow": ("grad-scaler", "values differ"),
    "graph": ("graph", "values differ"),
    "wait": ("no-sync", "only when the GPU had done the work"),
    "synchronisation": ("no-sync", "synchronizing CUDA operation"),
    "our speed": ("speed", "the error is"),
}


@needs_interpreter
@pytest.mark.parametrize("fault", SEEN)
def test_planted_faults_are_seen(fault: str, faulty: dict[str, Any]) -> None:
    name, words = SEEN[fault]
    found = faulty[fault]
    assert found["status"] == 1
    assert_consistent(found["report"])
    assert found["report"]["failed"] == [name]
    (check,) = [check for check in found["report"]["checks"] if check["name"] == name]
    assert re.search(words, check["why"])
    assert f"FAILED: {name}: " in found["output"]


@needs_interpreter
def test_without_a_fault_they_pass(faulty: dict[str, Any]) -> None:
    assert faulty["nothing"]["status"] == 0
    assert faulty["nothing"]["report"]["passed"] == ["cpu-bits"]
    assert faulty["pretended GPU"]["status"] == 0, faulty["pretended GPU"]["output"]
    assert faulty["pretended GPU"]["report"]["passed"] == ["graph", "no-sync", "speed"]


@needs_interpreter
def test_a_check_that_cannot_see_has_not_passed(faulty: dict[str, Any]) -> None:
    assert faulty["unnoticed"]["status"] == 2
    assert faulty["unnoticed"]["report"]["not_run"] == ["no-sync"]


@needs_interpreter
def test_broken_peers_are_reported_and_ratios_are_of_the_same_round(faulty: dict[str, Any]) -> None:
    (row,) = faulty["pretended GPU"]["report"]["checks"][-1]["data"]["rows"]
    assert row["failures"] == {"broken": "OSError: no kernel image", "tired": "RuntimeError: out of breath"}
    assert row["wrong"] == ["idle"]
    assert {"ours", "ours, 8-bit states", "torch fused", "torch foreach", "idle"} <= set(row["device"]) == set(row["host"])
    assert {len(times) for times in (*row["device"].values(), *row["host"].values())} == {3}, "rounds"
    for name, found in row["summary"].items():
        assert found["device_ratio"]["median"] == found["host_ratio"]["median"] == (1 if name.startswith("ours") else 2)
    assert row["bytes"]["ours"] == 43 * 28, "of 43 elements; counters are left out"
    assert re.search(r"idle .* WRONG", faulty["pretended GPU"]["output"])


@pytest.mark.parametrize(("built_for", "words"), [(None, "is built for the CPU only; install"), ("13.0", "is built for CUDA 13.0, but")])
def test_without_a_gpu_it_says_what_to_do(built_for: str | None, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    status, errors = run_here("gpu-check", "--json", str(tmp_path / "found.json"))
    assert status == 2
    assert errors.startswith("fused-opt gpu-check: there is no GPU")
    assert words in errors
    assert "--dry-run" in errors
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("variable", ["FUSED_OPT_BACKEND", "TRITON_INTERPRET"])
def test_what_would_change_the_kernels_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(variable, {"FUSED_OPT_BACKEND": "cpu", "TRITON_INTERPRET": "1"}[variable])
    status, errors = run_here("gpu-check", "--json", str(tmp_path / "found.json"))
    assert status == 2
    assert f"{variable}=" in errors
    assert "unset it" in errors


def _raise(error: Exception) -> Any:
    raise error


# What a check does -> status, and what is said.
OUTCOMES: dict[str, tuple[Callable[[Gpu, Any], Found], str, str]] = {
    "passes": (lambda gpu, extent: Found(compared=3), PASSED, "^$"),
    "fails": (lambda gpu, extent: Found(3, ["one", "two"]), FAILED, r"one \(and 1 more\)"),
    "compares nothing": (lambda gpu, extent: Found(), FAILED, "nothing was compared"),
    "breaks": (lambda gpu, extent: _raise(RuntimeError("an illegal memory access")), FAILED, "RuntimeError: an illegal memory access"),
    "cannot": (lambda gpu, extent: _raise(CannotCheckError("too little memory")), NOT_RUN, "too little memory"),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcomes_of_a_check(outcome: str, tmp_path: Path) -> None:
    """Also exit status and file; an error that a GPU reports late belongs to the check."""
    call, status, why = OUTCOMES[outcome]
    result = perform(Check("name", "promise", call), Interpreter(), DRY)
    assert result.status == status
    assert re.search(why, result.why)
    file = tmp_path / "found.json"
    checks = (Check("name", "promise", call), Check("gpu", "promise", OUTCOMES["passes"][0], dry=False))
    exit_status = gpu_check.check(Interpreter(), DRY, None, file, Console(file=io.StringIO()), checks)
    assert exit_status == {PASSED: 0, FAILED: 1, NOT_RUN: 2}[status]
    report = json.loads(file.read_text())
    assert_consistent(report)
    assert "gpu" in report["not_run"]


def test_late_errors_of_a_gpu_belong_to_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interpreter, "synchronize", lambda self: _raise(RuntimeError("misaligned address")))
    result = perform(Check("name", "promise", OUTCOMES["passes"][0]), Interpreter(), DRY)
    assert (result.status, result.why) == (FAILED, "RuntimeError: misaligned address")


def test_the_file_is_there_before_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    seen: list[Any] = []

    def look(gpu: Gpu, extent: Any) -> Found:
        seen.append(json.loads(file.read_text()))
        return Found(1)

    checks = (Check("first", "", OUTCOMES["passes"][0]), Check("second", "", look), Check("third", "", look))
    assert gpu_check.check(Interpreter(), DRY, ["first", "second"], file, Console(file=io.StringIO()), checks) == 0
    assert [(report["complete"], report["passed"]) for report in seen] == [(False, ["first"])]
    report = json.loads(file.read_text())
    assert (report["complete"], report["not_run"], report["checks"][2]["why"]) == (True, ["third"], "not asked for")


def test_the_file_is_json_whatever_is_found(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    check = Check("name", "", lambda gpu, extent: Found(1, [], {"errors": [float("inf"), float("nan"), 0.5]}))
    assert gpu_check.check(Interpreter(), DRY, None, file, Console(file=io.StringIO()), (check,)) == 0
    report = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report["checks"][0]["data"] == {"errors": ["inf", "nan", 0.5]}


def test_names_of_checks(tmp_path: Path) -> None:
    assert len({check.name for check in gpu_check.CHECKS}) == len(gpu_check.CHECKS)
    assert set(gpu_check.SANITIZED) <= {check.name for check in gpu_check.CHECKS}
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit):
        cli.main(["gpu-check", "--check", "everything"])
    assert re.search("everything.*cpu-bits", errors.getvalue())


NAN = float("nan")


@pytest.mark.parametrize(
    ("ours", "theirs", "different"),
    [
        ([1.0, NAN, -0.0], [1.0, -NAN, -0.0], 0),
        ([0.0, 1.0], [-0.0, 1.0], 1),
        ([NAN, 1.0], [1.0, NAN], 2),
        ([1.0], [1.0 + 2**-23], 1),
        ([1.0], [1.0, 1.0], 1),
        ([], [], 0),
        ([1.0], None, 1),
    ],
)
def test_comparison_of_bits(ours: list[float], theirs: list[float] | None, different: int) -> None:
    tensors = [{} if values is None else {"x": torch.tensor(values)} for values in (ours, theirs)]
    found = Comparison.of(*tensors)
    assert found.different == different
    assert bool(found.first) == bool(different)
    assert Comparison.of({"x": torch.tensor([1], dtype=torch.int8)}, {"x": torch.tensor([1], dtype=torch.uint8)}).different == 1


def test_it_is_in_the_help() -> None:
    assert "gpu-check" in cli.COMMANDS
    assert fused_opt.__version__ == gpu_check.gpu_machine.versions()["fused_opt"]
