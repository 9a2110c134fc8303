"""What quantize_blockwise returns, as data; `out=`, autograd; and what is refused: type of error, value and remedy, nothing written."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fused_opt import QuantizedTensor, dequantize_blockwise, quantize_blockwise
from helpers import assert_same_bits
from pairs import outcome, through_file

X = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"block_size": 32, "code": "mulaw", "seed": 3},
    {"block_size": None},
    {"axis": 1},
    {"axis": -2, "code": "dynamic"},
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def assert_same_quantized(actual: QuantizedTensor, expected: QuantizedTensor) -> None:
    for field in dataclasses.fields(QuantizedTensor):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert_same_bits(a, b, field.name)
            assert a.stride() == b.stride()
        else:
            assert a == b, field.name


# --- a holder of plain data ---


@every_option
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda q: pickle.loads(pickle.dumps(q)),
        lambda q: through_file({"a": q})["a"],
        lambda q: QuantizedTensor(**{field.name: getattr(q, field.name) for field in dataclasses.fields(q)}),
        lambda q: dataclasses.replace(q, codes=q.codes.clone(), scales=torch.from_numpy(q.scales.numpy().copy())),
    ],
    ids=["copy", "deepcopy", "pickle", "weights_only", "fields", "clone"],
)
def test_copies(copied: Callable[[QuantizedTensor], QuantizedTensor], options: dict[str, Any]) -> None:
    q = quantize_blockwise(X.bfloat16(), **options)
    again = copied(q)
    assert type(again) is QuantizedTensor
    assert_same_quantized(again, q)
    assert_same_bits(again.dequantize(), q.dequantize())


def test_it_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize_blockwise(X).code = "mulaw"  # type: ignore[misc]


@every_option
def test_shape_and_bytes(options: dict[str, Any]) -> None:
    q = quantize_blockwise(X, **options)
    assert (q.shape, q.dtype, q.code) == (X.shape, torch.float32, options.get("code", "linear"))
    blocks = X.shape[options["axis"]] if "axis" in options else math.ceil(420 / (options.get("block_size", 256) or 420))
    assert q.nbytes == 420 + 4 * blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_error_statistics(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for options in OPTIONS:
        q = quantize_blockwise(x, **options)
        differences = (dequantize_blockwise(q, torch.empty(x.shape)).double() - x.double()).flatten()
        error = q.error(x)
        assert error.largest == pytest.approx(float(differences.abs().max()), rel=1e-12)
        assert error.root_mean_square == pytest.approx(float(differences.norm()) / math.sqrt(420), rel=1e-12)
        assert error.relative == pytest.approx(float(differences.norm() / x.double().norm()), rel=1e-12)
        assert 0 < error.relative < 0.05
    empty, zeros = torch.empty(0, 3, dtype=dtype), torch.zeros(5, dtype=dtype)
    for exact in (empty, zeros):
        assert dataclasses.astuple(quantize_blockwise(exact).error(exact)) == (0.0, 0.0, 0.0)
    assert quantize_blockwise(X[0, :5].to(dtype)).error(zeros).relative == math.inf


# --- what comes in ---


@every_option
def test_lazy_and_unusual_inputs(options: dict[str, Any]) -> None:
    """Lazily negated ones, parameters, views of complex numbers, those of inference mode: as a plain copy."""
    conjugated = torch.complex(torch.zeros_like(X), X).conj().imag
    with torch.inference_mode():
        inference = X.clone()
    for x in (torch._neg_view(X), conjugated, torch.nn.Parameter(X), inference):
        assert_same_quantized(quantize_blockwise(x, **options), quantize_blockwise(x.detach().resolve_neg().clone(), **options))


def test_results_are_outside_of_autograd() -> None:
    x = X.clone().requires_grad_()
    q = quantize_blockwise(x * 2)
    assert not q.scales.requires_grad
    assert not q.dequantize().requires_grad
    assert x.grad is None
    x._version_before = x._version  # type: ignore[attr-defined]
    quantize_blockwise(x)
    assert x._version == x._version_before  # type: ignore[attr-defined]


def test_inference_mode() -> None:
    with torch.inference_mode():
        q = quantize_blockwise(X)
        again = quantize_blockwise(X, out=q)
        q.dequantize(torch.empty(X.shape))
    assert again is q
    assert_same_bits(q.dequantize(), quantize_blockwise(X).dequantize())


# --- out= ---


@every_option
def test_quantize_into_an_earlier_result(options: dict[str, Any]) -> None:
    q = quantize_blockwise(X, **options)
    where = (q.codes.data_ptr(), q.scales.data_ptr())
    for other in (X * 3, X.flip(0), torch.zeros_like(X), -X.t().contiguous().t()):
        assert quantize_blockwise(other, out=q, **options) is q
        assert (q.codes.data_ptr(), q.scales.data_ptr()) == where
        assert_same_quantized(q, quantize_blockwise(other, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autograd_sees_that_out_was_written(dtype: torch.dtype) -> None:
    q = quantize_blockwise(X)
    out = torch.ones(X.shape, dtype=dtype)
    loss = (torch.ones(X.shape, dtype=dtype, requires_grad=True) * out).sum()
    before = out._version
    q.dequantize(out)
    assert out._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_refused_call_leaves_saved_tensors_usable() -> None:
    q = quantize_blockwise(X)
    out, w = torch.ones(X.shape), torch.ones(X.shape, requires_grad=True)
    loss = (w * out).sum()
    with pytest.raises(ValueError, match="scales"):
        dataclasses.replace(q, scales=q.scales[1:]).dequantize(out)
    loss.backward()
    assert_same_bits(out, torch.ones(X.shape))


@pytest.mark.parametrize("make", [lambda w: w, lambda w: w * 2, lambda w: w.view(6, 70)], ids=["leaf", "result", "view of a leaf"])
def test_out_that_requires_a_gradient_is_refused_as_in_torch(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Whatever was computed from it would have a wrong one. Without gradients being recorded it is memory like any other."""
    w = torch.ones(X.shape, requires_grad=True)
    q, out = quantize_blockwise(X), make(w)
    before = out.detach().clone()
    with pytest.raises(RuntimeError, match="require"):
        torch.neg(X, out=out)
    with pytest.raises(RuntimeError, match=r"gradient.*(detach|no_grad)"):
        q.dequantize(out)
    assert_same_bits(out, before)
    with torch.no_grad():
        q.dequantize(out)
    assert_same_bits(out, q.dequantize())


def with_value(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = X.to(dtype, copy=True)
    x[4, 5] = value
    return x


# Values for which there is no code, and what says so.
BAD_VALUES: tuple[tuple[torch.Tensor, str, str], ...] = (
    (with_value(math.nan), "linear", r"1 of 2 blocks of 256.*NaN.*block 1.*nan_to_num"),
    (with_value(math.inf), "mulaw", r"1 of 2 blocks.*infinity.*nan_to_num"),
    (with_value(-math.inf, torch.bfloat16), "dynamic", r"1 of 2 blocks.*infinity.*nan_to_num"),
    (with_value(math.nan, torch.float16), "unsigned_mulaw", "NaN.*nan_to_num|no sign"),
    (with_value(math.nan).abs(), "unsigned_dynamic", r"1 of 2 blocks.*NaN"),
    (with_value(1e39, torch.float64), "linear", r"beyond float32 \(about 3.4e38\)"),
    (with_value(-(2.0**128) * (1 - 2**-26), torch.float64), "mulaw", "beyond float32"),  # rounds up to infinity
    (X.abs().neg(), "unsigned_mulaw", r"'unsigned_mulaw' has no sign.*smallest value is -[0-9.]+; use 'mulaw'"),
    (with_value(-1e-45).abs().neg(), "unsigned_dynamic", "no sign.*use 'dynamic'"),
)


@pytest.mark.parametrize(("x", "code", "message"), BAD_VALUES, ids=[f"{code}-{i}" for i, (_, code, _) in enumerate(BAD_VALUES)])
@pytest.mark.parametrize("block_size", [256, None])
def test_values_without_a_code(x: torch.Tensor, code: str, message: str, block_size: int | None) -> None:
    """Not with a seed either; what `out` had stays."""
    if block_size is None:
        message = message.replace("1 of 2", "1 of 1").replace("of 256", "of 420").replace("block 1", "block 0")
    out = quantize_blockwise(X.abs().to(x.dtype), block_size, code=code)
    before = copy.deepcopy(out)
    for seed in (None, 1):
        for target in (None, out):
            with pytest.raises(ValueError, match=message):
                quantize_blockwise(x, block_size, code=code, seed=seed, out=target)
    assert_same_quantized(out, before)


def test_the_largest_number_of_float32_has_a_code() -> None:
    largest = torch.finfo(torch.float32).max
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([largest, -largest, 0.0], dtype=dtype)
        assert_same_bits(quantize_blockwise(x).dequantize(), x)


def strange(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, str]]:
    """Tensors that are none of plain numbers in memory; what a message about them names, value and remedy."""
    yield x.to_sparse(), "sparse.*to_dense"
    yield x.to_mkldnn(), "mkldnn.*to_dense"
    yield x.as_subclass(type("Mine", (torch.Tensor,), {})), "Mine.*as_subclass"


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("code", ["linear", "unsigned_mulaw"])
def test_tensors_that_are_not_plain_are_refused(number: int, code: str) -> None:
    x, message = list(strange(X.abs()))[number]
    with pytest.raises((TypeError, ValueError), match=f"tensor .*{message}"):
        quantize_blockwise(x, code=code)
    with pytest.raises((TypeError, ValueError), match=f"out .*{message}"):
        quantize_blockwise(X).dequantize(x)


def of(change: Callable[[QuantizedTensor], Any]) -> Callable[[], Any]:
    """Dequantize one that was changed."""
    return lambda: dequantize_blockwise(change(quantize_blockwise(X, 32)), torch.empty(X.shape))


def but(**fields: Any) -> Callable[[], Any]:
    return of(lambda q: dataclasses.replace(q, **fields))


def into(out: Any) -> Callable[[], Any]:
    return lambda: quantize_blockwise(X).dequantize(out)


def onto(*args: Any, **options: Any) -> Callable[[], Any]:
    """Into what a call with other options returned."""
    return lambda: quantize_blockwise(X, out=quantize_blockwise(*args, **options))


def inference(make: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return make()


# As a program without types may call them.
quantize: Any = quantize_blockwise
dequantize: Any = dequantize_blockwise

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    **{
        f"block_size {bad!r}": (partial(quantize, X, bad), ValueError, "Invalid block_size: .*power of two from 32")
        for bad in (0, -32, 16, 48, 8192, True, "256", 256.0, [256], torch.tensor(256), math.nan)
    },
    **{
        f"axis {bad!r}": (partial(quantize, X, axis=bad), ValueError, r"Invalid axis: .*tensor has 2 dimensions")
        for bad in (2, -3, True, 1.0, "0", (0, 1))
    },
    "axis of a scalar": (partial(quantize, torch.ones(()), axis=0), ValueError, "Invalid axis: 0; the tensor has 0 dimensions"),
    **{
        f"code {bad!r}": (partial(quantize, X, code=bad), ValueError, "Invalid code: .*use one of linear, mulaw")
        for bad in ("int8", "", None, ["linear"], torch.int8)
    },
    **{
        f"seed {bad!r}": (partial(quantize, X, seed=bad), ValueError, r"Invalid seed: .*from 0 to 2\*\*64 - 1")
        for bad in (-1, 2**64, 1.0, True, "1", torch.tensor(1))
    },
    **{
        f"dtype {bad}": (partial(quantize, X.to(bad)), TypeError, rf"tensor has dtype {bad}; cast it to one of torch")
        for bad in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "numpy array": (partial(quantize, X.numpy()), TypeError, "must be a torch.Tensor, not ndarray; use torch.as_tensor"),
    "list": (partial(quantize, [1.0]), TypeError, "must be a torch.Tensor, not list"),
    "meta tensor": (partial(quantize, X.to("meta")), RuntimeError, r"tensor is on meta.*tensor\.cpu\(\)"),
    "out of another type": (partial(quantize, X, out=X), TypeError, "out must be a QuantizedTensor, not Tensor"),
    "out of another shape": (onto(X.t()), ValueError, r"out has shape \(70, 6\), but \(6, 70\) is needed"),
    "out of another code": (onto(X, code="mulaw"), ValueError, "out has code 'mulaw', but 'linear' is needed"),
    "out of another dtype": (onto(X.double()), ValueError, "out has dtype torch.float64, but torch.float32 is needed"),
    "out of another block size": (onto(X, 32), ValueError, "out has block size 32, but 256 is needed"),
    "out with an axis": (onto(X, axis=0), ValueError, "out has block size 70, but 256 is needed|out has axis 0"),
    "no QuantizedTensor": (partial(dequantize, X), TypeError, "expected a QuantizedTensor, not Tensor; make one with"),
    "unknown code": (but(code="int4"), ValueError, "Invalid code: 'int4'; use one of linear"),
    "codes of another code": (but(code="unsigned_mulaw"), TypeError, "codes of 'unsigned_mulaw' are torch.uint8, not torch.int8"),
    "codes that are a list": (but(codes=[1]), TypeError, "codes.*list"),
    "codes on meta": (of(lambda q: dataclasses.replace(q, codes=q.codes.to("meta"))), (ValueError, RuntimeError), "codes.*(CPU|meta)"),
    "fewer scales": (of(lambda q: dataclasses.replace(q, scales=q.scales[1:])), ValueError, "scales.*14"),
    "more scales": (but(scales=torch.ones(15)), ValueError, "scales.*14"),
    "scales of another dtype": (but(scales=torch.ones(14, dtype=torch.float64)), (TypeError, ValueError), "scales must be float32"),
    "scales with gaps": (but(scales=torch.ones(28)[::2]), ValueError, "scales must be.*contiguous"),
    "scales on meta": (but(scales=torch.ones(14, device="meta")), (ValueError, RuntimeError), "scales.*(CPU|meta)"),
    "scales that are none": (but(scales=None), (TypeError, ValueError), "scales"),
    "another block size": (but(block_size=64), ValueError, "scales.*7"),
    "no block size": (but(block_size=0), ValueError, "(?i)block.size"),
    "huge block size": (but(block_size=2**40), ValueError, "scales.*1"),
    "out of integers": (into(torch.empty(6, 70, dtype=torch.int32)), TypeError, "out has dtype torch.int32; cast it to one of"),
    "out that is numpy": (into(np.empty((6, 70))), TypeError, "out must be a torch.Tensor, not ndarray"),
    "out on meta": (into(torch.empty(6, 70, device="meta")), RuntimeError, "out is on meta"),
    "out of fewer elements": (into(torch.empty(6, 69)), ValueError, r"out has shape \(6, 69\), the codes have \(6, 70\).*empty_like"),
    "out that would broadcast": (into(torch.empty(6, 1)), ValueError, "out has shape"),
    "expanded out": (into(torch.empty(6, 1).expand(6, 70)), ValueError, r"out has strides \(1, 0\).*one memory location; clone"),
    "negated out": (into(torch._neg_view(torch.empty(6, 70))), ValueError, "lazily negated.*clone"),
    "out of inference mode": (into(inference(lambda: torch.empty(6, 70))), RuntimeError, "out was made in inference mode.*clone"),
    "codes of inference mode": (lambda: quantize_blockwise(X, out=inference(lambda: quantize_blockwise(X))), RuntimeError, "(?i)inference"),
    "another original": (lambda: quantize(X).error(X.t()), ValueError, r"original has shape \(70, 6\), the codes have shape \(6, 70\)"),
    "an original that is none": (lambda: quantize(X).error(X.numpy()), (TypeError, ValueError), "original .*ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


REARRANGED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda codes: codes.t().contiguous().t() if codes.is_contiguous() else codes.contiguous(),
    "with gaps": lambda codes: codes.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("rearranged", REARRANGED)
@pytest.mark.parametrize("options", [{"axis": 1}, {"block_size": 32}], ids=str)
def test_codes_in_another_order_of_memory(options: dict[str, Any], rearranged: str) -> None:
    """As from a file format that knows no strides: read by their places; written so, too, or refused."""
    q = quantize_blockwise(X, **options)
    other = dataclasses.replace(q, codes=REARRANGED[rearranged](q.codes))
    assert torch.equal(other.codes, q.codes)
    assert other.codes.stride() != q.codes.stride()
    assert_same_bits(other.dequantize(), q.dequantize())
    refused = outcome(lambda: quantize_blockwise(X * 2, out=other, **options))
    assert refused in (None, ValueError)
    assert_same_bits(other.dequantize(), quantize_blockwise(X if refused else X * 2, **options).dequantize())
