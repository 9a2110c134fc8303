"""`load_state_dict` takes checkpoints of bitsandbytes' and torchao's 8-bit optimizers, into 8-bit states and into torch's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from test_foreign import ADAMW, OLD_ADAMW, TORCHAO, load, load_expected

import fused_opt
from helpers import assert_same_bits

CASES = (
    ("AdamW", ADAMW),
    ("AdamW", OLD_ADAMW),
    ("AdamW", TORCHAO),
    ("RMSprop", "bitsandbytes_RMSprop8bit"),
    ("SGD", "bitsandbytes_SGD8bit"),
)


def make(name: str, checkpoint: str, **options: Any) -> tuple[list[torch.nn.Parameter], Any, dict[str, torch.Tensor]]:
    """Parameters in the shapes of the checkpoint, an optimizer, and the states that are expected."""
    expected = load_expected(checkpoint)
    shapes = {int(key.split(".")[0]): value.shape for key, value in expected.items()}
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shapes[index], generator=generator)) for index in sorted(shapes)]
    momentum = {"momentum": 0.5} if name == "SGD" else {}
    return params, getattr(fused_opt, name)(params, **momentum, **options), expected


@pytest.mark.parametrize(("name", "checkpoint"), CASES)
def test_into_states_as_torch_has_them(name: str, checkpoint: str) -> None:
    params, optimizer, expected = make(name, checkpoint)
    with pytest.warns(UserWarning, match="does not apply") if name != "AdamW" else contextlib.nullcontext():
        optimizer.load_state_dict(load(checkpoint))
    for key, value in expected.items():
        index, slot = key.split(".")
        assert_same_bits(optimizer.state[params[int(index)]][slot], value, key)
    assert all(not value.dtype.is_complex for state in optimizer.state.values() for value in state.values())
    if name == "SGD":
        assert optimizer.param_groups[0]["momentum"] != 0.5, "the saved one counts"
        assert all("step" not in state for state in optimizer.state.values())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer._last_ran is not None


@pytest.mark.parametrize(("name", "checkpoint"), CASES)
def test_into_8bit_states(name: str, checkpoint: str) -> None:
    params, optimizer, expected = make(name, checkpoint, state_dtype="int8")
    with pytest.warns(UserWarning, match="does not apply") if name != "AdamW" else contextlib.nullcontext():
        optimizer.load_state_dict(load(checkpoint))
    coded = 0
    for key, value in expected.items():
        index, slot = key.split(".")
        state = optimizer.state[params[int(index)]]
        if value.numel() < 4096:
            assert_same_bits(state[slot], value, key)
            continue
        code = "unsigned_mulaw" if slot in ("exp_avg_sq", "square_avg") else "mulaw"
        quantized = fused_opt.quantize_blockwise(value, code=code)
        assert_same_bits(state[slot], quantized.codes, key)
        assert_same_bits(state[f"{slot}_scale"], quantized.scales, key)
        coded += 1
    assert coded > 0
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer._last_ran is not None
