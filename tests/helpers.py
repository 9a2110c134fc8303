"""What several test files need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.problem import make_problem as make_problem
from fused_opt.native import native

_ISAS: dict[str, bool] = dict(native().module.isas()) if native().module else {}
ALL_ISAS = list(_ISAS)
SUPPORTED_ISAS = [name for name, supported in _ISAS.items() if supported]

# Skips where param.grad_dtype, which lets a gradient have another dtype (torch 2.13), does not exist.
needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")

CLASSES = ("Adam", "AdamW", "RMSprop", "SGD")


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def run_steps(optimizer: torch.optim.Optimizer, grads: Sequence[Sequence[torch.Tensor]]) -> None:
    """One step for each sequence of gradients, which lie parallel to the parameters."""
    params = params_of(optimizer)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        optimizer.step()


def ours(case: Case, values: Sequence[torch.Tensor], **options: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    params = [torch.nn.Parameter(value.clone()) for value in values]
    return params, getattr(fused_opt, case.optimizer)(params, **case.options, **options)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Bit for bit, signs of zeros included; any NaN equals any NaN."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual.detach()), torch.view_as_real(expected.detach())
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, b = actual.detach().contiguous(), expected.detach().contiguous()
    differ = (a.view(as_int) != b.view(as_int)) & ~(a.isnan() & b.isnan())
    count = int(differ.sum())
    assert count == 0, f"{what}: {count} of {a.numel()} elements differ, first {a[differ][0]!r} instead of {b[differ][0]!r}"


def assert_same_state(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters, and all states with the same keys in the same order."""
    for group, expected_group in zip(actual.param_groups, expected.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], expected_group["params"], strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            assert list(actual.state.get(p, {})) == list(expected.state.get(q, {}))
            for key, value in expected.state.get(q, {}).items():
                assert_same_bits(actual.state[p][key], value, f"parameter {i}, {key}")


# Options of this package's constructors, after torch's own.
OWN_OPTIONS = [
    "state_dtype",
    "block_size",
    "min_8bit_size",
    "max_grad_norm",
    "grad_norm_type",
    "nonfinite_grad_norm",
    "max_grad_value",
    "l1",
    "l1_method",
    "anchor_decay",
    "average",
    "average_decay",
    "average_start",
    "average_every",
    "weights",
    "rounding_seed",
]


def own_options(name: str) -> list[str]:
    """Those of a class; Adam and AdamW have `decoupled_weight_decay` from torch."""
    return OWN_OPTIONS if "Adam" in name else [*OWN_OPTIONS, "decoupled_weight_decay"]
