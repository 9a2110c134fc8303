"""Makes Triton's interpreter round as a GPU does. These tests run with TRITON_INTERPRET=1: see tests/test_triton_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts the lower half of a float off to make it bfloat16; GPUs round to the nearest, ties to even."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, to):  # type: ignore[no-untyped-def]
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return original(self, source, to)
        bits = source.data.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        data = np.where(np.isnan(source.data), 0x7FFF, rounded).astype(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, cast)


@pytest.fixture(autouse=True)
def _no_warnings_of_numpy() -> Iterator[None]:
    """Dividing by zero is part of the arithmetic."""
    with np.errstate(all="ignore"):
        yield
