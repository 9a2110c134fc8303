"""Choosing the backend and the instruction set: forced choices fail loudly, automatic ones fall back and say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import _cpu, rules
from fused_opt import native as native_module
from fused_opt.native import native
from helpers import ALL_ISAS, SUPPORTED_ISAS, assert_same_bits


@pytest.fixture(autouse=True)
def _fresh_choice() -> Any:
    native.cache_clear()
    yield
    native.cache_clear()


def one_step(optimizer_class: Any, **options: Any) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    param = torch.nn.Parameter(torch.arange(4.0))
    param.grad = torch.ones(4)
    optimizer = optimizer_class([param], **options)
    optimizer.step()
    return param, optimizer


def test_the_widest_supported_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_OPT_CPU_ISA", raising=False)
    assert native().isa == SUPPORTED_ISAS[-1]
    assert one_step(fused_opt.SGD)[1]._last_ran.isa == SUPPORTED_ISAS[-1]


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("FUSED_OPT_CPU_ISA", "avx1024", ValueError, "avx1024.*scalar.*unset"),
        ("FUSED_OPT_BACKEND", "gpu", ValueError, "gpu.*cpu, triton, torch"),
        ("FUSED_OPT_BACKEND", "triton", RuntimeError, "TRITON_INTERPRET=1"),
    ],
)
def test_a_forced_choice_that_does_not_exist_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=message):
        one_step(fused_opt.SGD)


def test_a_forced_instruction_set_that_the_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_OPT_CPU_ISA", "wide")
    with pytest.raises(RuntimeError, match="wide: this CPU does not have it; use one of scalar"):
        native_module._choose_isa({"scalar": True, "wide": False})
    for isa in set(ALL_ISAS) - set(SUPPORTED_ISAS):
        with pytest.raises(ValueError, match=f"cannot run {isa}"):
            _cpu.Batch((), "", True).run("sgd", [], isa, 1)


def test_backend_torch_runs_torchs_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_OPT_BACKEND", "torch")
    ours, optimizer = one_step(fused_opt.AdamW)
    theirs, _ = one_step(torch.optim.AdamW)
    assert optimizer._last_ran is None
    assert_same_bits(ours, theirs)
    row = fused_opt.explain(optimizer).rows[0]
    assert (row.path, row.reason) == ("torch", "FUSED_OPT_BACKEND=torch")


def test_backend_cpu_refuses_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_OPT_BACKEND", "cpu")
    assert one_step(fused_opt.AdamW)[1]._last_ran is not None
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch._neg_view(torch.ones(2)))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fused_opt.AdamW(params)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*lazily negated.*unset"):
        optimizer.step()
    assert bool((params[0] == 1).all())
    assert len(optimizer.state) == 0


TESTS = Path(__file__).parent

BROKEN_EXTENSION = """
import sys
sys.modules["fused_opt._cpu"] = None  # importing it now raises ImportError
import torch, fused_opt
p, q = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
p.grad, q.grad = torch.ones(4), torch.ones(4)
optimizer = fused_opt.AdamW([p]); optimizer.step()
torch.optim.AdamW([q]).step()
assert torch.equal(p, q) and not torch.equal(p, torch.arange(4.0))
print(fused_opt.explain(optimizer))
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd=TESTS, check=False)


def test_without_the_extension_the_classes_are_torchs() -> None:
    result = run_python(BROKEN_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert "by torch: the extension fused_opt._cpu cannot be used: ModuleNotFoundError" in result.stdout
    forced = run_python(BROKEN_EXTENSION, FUSED_OPT_BACKEND="cpu")
    assert forced.returncode != 0
    assert "FUSED_OPT_BACKEND=cpu, but the extension" in forced.stderr
    assert "reinstall" in forced.stderr


@pytest.mark.slow
def test_a_torch_without_the_exchange_table_is_read_by_methods() -> None:
    """Before torch 2.10 there is no DLPack exchange table; what a program may do must work when it is ignored."""
    result = run_python(
        "import torch, sys, pytest\n"
        "from fused_opt.native import native\n"
        "module = native().module; module.forget_exchange_table(); assert module.reader() == 'data_ptr'\n"
        f"files = [{str(TESTS)!r} + '/' + name for name in ('test_drop_in.py', 'test_refusals.py', 'test_int8_checkpoints.py')]\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *files]))"
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_import_costs_little() -> None:
    """Lazily loaded: `import fused_opt` after torch loads nothing but the package itself."""
    result = run_python("import torch, sys; before = set(sys.modules); import fused_opt; print(sorted(set(sys.modules) - before))")
    assert result.stdout.strip() == "['fused_opt']"
    assert "fused_opt.AdamW" in run_python("import fused_opt; print(fused_opt.AdamW)").stdout.replace("optimizers.", "")
    assert "no attribute 'Adamw'" in run_python("import fused_opt; fused_opt.Adamw").stderr


def test_both_sides_agree_on_which_rules_take_codes() -> None:
    """A state that Python makes 8-bit and the kernels do not take would have no kernel."""
    flags = {
        rule: {f for _, name, f, stored, _ in _cpu.kernel_addresses() if (name, stored) == (rule, "float32 int8")}
        for rule in ("adam", "rmsprop", "sgd")
    }
    assert flags["adam"] == set(range(4))
    assert flags["rmsprop"] == {f for f in range(8) if not f & rules.CENTERED}
    assert flags["sgd"] == {f for f in range(16) if f & rules.SGD_MOMENTUM}
    assert [rules.RMSPROP.takes_codes({"centered": centered}) for centered in (False, True)] == [True, False]
