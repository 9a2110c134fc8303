"""Instruction sets, numbers of threads and where a tensor starts change no bit."""

from __future__ import annotations

import platform

import pytest
import torch

import fused_opt
from fused_opt.bench.cases import CASES, DTYPES, SHORT_DTYPES, Case
from helpers import ALL_ISAS, SUPPORTED_ISAS, assert_same_state, make_problem, ours, run_steps

SHAPES = ((80_021,), (7,), (300, 101), (1,), (8192,))


@pytest.mark.parametrize("dtype", [*DTYPES, *SHORT_DTYPES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_isas_and_threads(case: Case, dtype: torch.dtype, use_isa, threads) -> None:
    values, grads = make_problem(SHAPES, steps=3, dtype=dtype)
    results = []
    for isa in SUPPORTED_ISAS:
        for count in (1, 2, 3):
            use_isa(isa)
            threads(count)
            _, optimizer = ours(case, values)
            run_steps(optimizer, grads)
            assert (optimizer._last_ran.isa, optimizer._last_ran.threads) == (isa, count)
            results.append(optimizer)
    for other in results[1:]:
        assert_same_state(other, results[0])


def test_all_isas_of_this_architecture_are_built() -> None:
    expected = ["scalar", "avx2", "avx512"] if platform.machine() == "x86_64" else ["scalar"]
    assert expected == ALL_ISAS


def test_few_elements_stay_on_one_thread(threads) -> None:
    threads(2)
    param = torch.nn.Parameter(torch.ones(100))
    param.grad = torch.ones(100)
    optimizer = fused_opt.SGD([param])
    optimizer.step()
    assert optimizer._last_ran.threads == 1


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8, 13])
def test_unaligned_memory(offset: int) -> None:
    """A parameter that starts in the middle of a storage, with its gradient at another offset."""
    values, grads = make_problem([(4099,)], steps=3, dtype=torch.float32)
    aligned = torch.nn.Parameter(values[0].clone())
    storage = torch.zeros(5000)
    shifted = torch.nn.Parameter(storage[offset : offset + 4099])
    shifted.data.copy_(values[0])
    a, b = fused_opt.AdamW([aligned]), fused_opt.AdamW([shifted])
    run_steps(a, grads)
    run_steps(b, [[torch.zeros(5000)[2 * offset : 2 * offset + 4099].copy_(g[0])] for g in grads])
    assert b._last_ran is not None
    assert_same_state(b, a)
    assert shifted.data_ptr() == storage.data_ptr() + 4 * offset
    assert not storage[:offset].any()
    assert not storage[offset + 4099 :].any()


def test_memory_that_is_not_aligned_to_its_own_elements() -> None:
    values, grads = make_problem([(1001,)], steps=2, dtype=torch.float32)
    odd = torch.frombuffer(bytearray(4 * 1001 + 1), dtype=torch.float32, offset=1)
    odd.copy_(values[0])
    assert odd.data_ptr() % 4
    a, b = fused_opt.AdamW([torch.nn.Parameter(values[0].clone())]), fused_opt.AdamW([torch.nn.Parameter(odd)])
    run_steps(a, grads)
    run_steps(b, grads)
    assert_same_state(b, a)
