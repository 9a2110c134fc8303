"""Makes Triton's interpreter convert as a GPU does. These tests run with TRITON_INTERPRET=1: see tests/test_triton_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fused_opt.bench.gpu_interpreter import bfloat16_as_on_gpus


@pytest.fixture(autouse=True)
def _as_on_gpus() -> Iterator[None]:
    with bfloat16_as_on_gpus(), np.errstate(all="ignore"):  # dividing by zero is part of the arithmetic
        yield
