"""Tensors in 8-bit codes: `quantize_blockwise`, `dequantize_blockwise` and what they make."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from fused_opt import device_quantization
from fused_opt.native import NOBODY, gpu_server, interprets, native, triton_problem

BLOCK_SIZES = tuple(2**n for n in range(5, 13))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CODE_DTYPES = {
    "linear": torch.int8,
    "mulaw": torch.int8,
    "unsigned_mulaw": torch.uint8,
    "dynamic": torch.uint8,
    "unsigned_dynamic": torch.uint8,
}
CODES = tuple(_CODE_DTYPES)
_UNSIGNED = ("unsigned_mulaw", "unsigned_dynamic")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor in 8-bit codes. Plain data: picklable, copyable, and loadable by `torch.load(weights_only=True)` once it was imported.

    Attributes:
        codes: int8 or uint8, in the shape of the tensor.
        scales: float32, the largest magnitude of each block, in the order of the blocks.
        code: what the codes mean; see `quantize_blockwise`.
        dtype: of the tensor that was quantized, and that `dequantize` makes.
        block_size: elements in a block: consecutive ones of the flattened tensor, or with `axis` of the tensor with that axis moved to the
            front. The last block may be shorter.
        axis: the dimension along which each index has a scale of its own, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    code: str
    dtype: torch.dtype
    block_size: int
    axis: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `dequantize_blockwise`."""
        return dequantize_blockwise(self, out)

    def error(self, original: torch.Tensor) -> QuantizationError:
        """How far the codes are from `original`, a tensor of the same shape."""
        if not isinstance(original, torch.Tensor) or original.shape != self.shape:
            is_tensor = isinstance(original, torch.Tensor)
            what = f"has shape {tuple(original.shape)}" if is_tensor else f"is a {type(original).__name__}"
            raise ValueError(f"the original {what}, the codes have shape {tuple(self.shape)}; give the tensor that was quantized")
        exact = original.detach().to(torch.float64)
        errors = (self.dequantize(torch.empty(self.shape, dtype=torch.float64, device=self.codes.device)) - exact).abs_()
        if errors.numel() == 0:
            return QuantizationError(0.0, 0.0, 0.0)
        mean_square = float(errors.square().mean())
        power = float(exact.square().mean())
        relative = 0.0 if mean_square == 0 else math.inf if power == 0 else math.sqrt(mean_square / power)
        return QuantizationError(float(errors.max()), math.sqrt(mean_square), relative)


@dataclass(frozen=True)
class QuantizationError:
    """Differences between a tensor and its codes.

    Attributes:
        largest: largest absolute difference.
        root_mean_square: of the differences.
        relative: `root_mean_square` by the root mean square of the tensor.
    """

    largest: float
    root_mean_square: float
    relative: float


torch.serialization.add_safe_globals([QuantizedTensor])


@_disable_dynamo  # torch.compile breaks its graph here: it cannot trace native code
def quantize_blockwise(
    tensor: torch.Tensor,
    block_size: int | None = 256,
    *,
    axis: int | None = None,
    code: str = "linear",
    seed: int | None = None,
    out: QuantizedTensor | None = None,
) -> QuantizedTensor:
    """Represent each value by one byte, relative to the largest magnitude of its block.

    Zero is kept exactly, and so is a block's largest magnitude (by "dynamic" only if it is positive; by mu-law but for the last two bits).
    With x relative to that magnitude (from -1 to 1), a value differs from what its code stands for by at most

    - "linear": 1/254 (code / 127; scale / 127 is the distance between two codes).
    - "mulaw": (|x| + 1/247) / 32: evenly spaced near zero, else by 3 to 6% of the value. Mu-law companding as in ITU-T G.711, mu = 247.
    - "unsigned_mulaw": (x + 1/63487) / 32, for values that are not negative. mu = 63487. Near zero up to 1/(16 * 63487), since no positive
      value becomes zero.
    - "dynamic", "unsigned_dynamic": half the distance between two entries of the table `dynamic_table` (Dettmers 2015,
      https://arxiv.org/abs/1511.04561), which is that of bitsandbytes. Slower.

    and by at most twice that where a `seed` asks for stochastic rounding. In blocks whose largest magnitude is below 127, 247 or 63487 (for
    the first three codes) times 2^-126, the smallest normal number, x is relative to that.

    Args:
        tensor: float32, float64, bfloat16 or float16, of any shape and strides, on the CPU or, with Triton, a GPU. It is read as float32.
            The codes have the same bytes on both.
        block_size: elements of the flattened tensor that share a scale, a power of two from 32 to 4096; None: all of them.
        axis: the dimension along which each index has a scale of its own, as for the output channels of a weight; `block_size` is not used.
        code: the meaning of the codes, see above.
        seed: round up or down at random, such that the result is right on average, instead of to the nearest. An integer from 0 to
            2**64 - 1. The draw depends on the seed and the value's place, not on the number of threads or the processor.
        out: what an earlier call with a tensor of the same shape and the same options returned; it is overwritten and returned.

    Raises:
        ValueError: an argument that cannot be; a value that is not finite in float32, or negative where the code has no sign. `out` is
            unchanged then.
        TypeError: the tensor is none, or of a dtype that cannot be quantized.
        RuntimeError: the tensor is on a device without kernels, or this installation lacks its extension.
    """
    _check_tensor(tensor, "tensor")
    if code not in CODES:
        raise ValueError(f"Invalid code: {code!r}; use one of {', '.join(CODES)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"Invalid seed: {seed!r}; give an integer from 0 to 2**64 - 1, or None to round to the nearest")
    tensor = _plain(tensor)
    size = _elements_in_a_block(tensor, block_size, axis)
    if out is None:
        made = _empty(tensor, code, size, axis)
    else:
        _check_out(out, tensor, code, size, axis)
        made = out
    if code in _UNSIGNED and tensor.numel() and bool((tensor.amin() < 0).item()):
        raise ValueError(
            f"code {code!r} has no sign, but the smallest value is {tensor.amin().item():g}; use {code.removeprefix('unsigned_')!r}"
        )
    if size > BLOCK_SIZES[-1] or out is not None:  # measured first, to write nothing if that fails
        scales = torch.empty_like(made.scales)
        _call("measure", tensor, made.codes, scales, size)
        _check_finite(scales, size)
        made.scales.copy_(scales)
        increment_version(made.codes)  # for autograd, whose checks do not see our writes
        _call("quantize", tensor, made.codes, made.scales, size, _table_or_name(code), True, seed)
    else:
        _call("quantize", tensor, made.codes, made.scales, size, _table_or_name(code), False, seed)
        _check_finite(made.scales, size)
    return made


@_disable_dynamo
def dequantize_blockwise(quantized: QuantizedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The values that the codes stand for.

    Args:
        quantized: what `quantize_blockwise` returned.
        out: a floating-point tensor of the same shape, on the codes' device, of any strides; it is overwritten and returned. Rounded to its
            dtype, to nearest even. Default: a new tensor of the dtype that was quantized.

    Raises:
        TypeError, ValueError: codes, scales or `out` that do not fit together. Nothing has been written then.
        RuntimeError: something is on another device, or on one without kernels, or this installation lacks its extension.
    """
    if not isinstance(quantized, QuantizedTensor):
        raise TypeError(f"expected a QuantizedTensor, not {type(quantized).__name__}; make one with quantize_blockwise")
    for name in ("codes", "scales"):
        if not isinstance(getattr(quantized, name), torch.Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, not {type(getattr(quantized, name)).__name__}; make them with quantize_blockwise"
            )
    if quantized.code not in CODES:
        raise ValueError(f"Invalid code: {quantized.code!r}; use one of {', '.join(CODES)}")
    if quantized.codes.dtype != _CODE_DTYPES[quantized.code]:
        raise TypeError(f"codes of {quantized.code!r} are {_CODE_DTYPES[quantized.code]}, not {quantized.codes.dtype}")
    if out is None:
        out = torch.empty(quantized.shape, dtype=quantized.dtype, device=quantized.codes.device)
    _check_tensor(out, "out")
    for name in ("codes", "scales"):
        if getattr(quantized, name).device != out.device:
            raise RuntimeError(f"{name} are on {getattr(quantized, name).device}, but out is on {out.device}; move one to the other")
    if out.shape != quantized.shape:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, the codes have {tuple(quantized.shape)}; make it with torch.empty_like(codes, dtype=...)"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("out requires a gradient, which writing to it would not have; pass out.detach(), or use torch.no_grad()")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"out has strides {out.stride()}: several of its elements are one memory location; clone() it")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("out was made in inference mode, outside of which it cannot be written; clone() it")
    decode(_in_order(quantized), quantized.scales, quantized.code, quantized.block_size, out)
    return out


def encode(
    tensor: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, code: str, block_size: int, seeds: torch.Tensor | None = None
) -> None:
    """Quantize into `codes` and `scales`. Blocks run over the elements in the order of the codes' memory.

    To the nearest, or stochastically with `seeds`, int64, one for each block. Values that are not finite make the scale of their block NaN.
    """
    _call("quantize", _plain(tensor), codes, scales, block_size, _table_or_name(code), False, seeds)


def step_seeds(param: torch.Tensor, states: Mapping[str, torch.Tensor], block_size: int) -> torch.Tensor:
    """The seeds with which a step rounds 8-bit states, one for each block.

    The upper half of a seed is the sum of the bits of the states' scales after the step; RMSprop's momentum does not count (`kMoved` in
    csrc/kernels/rules.h). The lower half is that of the bits of the parameters before it, as float32, without signs and with infinity for
    NaN. Both modulo 2^32.

    Args:
        param: the elements in the order of the blocks.
        states: of the parameter, by name, likewise.
    """

    def bits_in_blocks(values: torch.Tensor, if_not_finite: int) -> torch.Tensor:
        """Of magnitudes."""
        values = values.detach().reshape(-1).to(torch.float32)
        bits = (values.view(torch.int32) & 0x7FFFFFFF).to(torch.int64).masked_fill(~values.isfinite(), if_not_finite)
        return torch.nn.functional.pad(bits, (0, -len(bits) % block_size)).view(-1, block_size)

    if not param.numel():
        return torch.empty(0, dtype=torch.int64, device=param.device)
    counted = [state for name, state in states.items() if name != "momentum_buffer" or len(states) == 1]
    scale_sum = torch.stack([bits_in_blocks(state, 0x7FC00000).amax(1) for state in counted]).sum(0)
    return (scale_sum & 0xFFFFFFFF) << 32 | bits_in_blocks(param, 0x7F800000).sum(1) & 0xFFFFFFFF


def decode(codes: torch.Tensor, scales: torch.Tensor, code: str | torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """Dequantize into `out`. Blocks as for `encode`; `code` may be a table of 256 float32 values."""
    _call("dequantize", out.detach(), codes, scales, block_size, code if isinstance(code, torch.Tensor) else _table_or_name(code))
    increment_version(out)  # for autograd, whose checks do not see our writes


def check_block_size(block_size: Any) -> None:
    """Raise ValueError if states cannot have blocks of that size."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"Invalid block_size: {block_size!r}; use a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} (default: 256)"
        )


def scale_count(elements: int, block_size: int) -> int:
    """Number of blocks."""
    return -(-elements // block_size)


def block_size_of(elements: int, scales: int, preferred: int = 256) -> int:
    """The block size that so many elements with so many scales have; 0 if none fits. If several do, `preferred` or the least."""
    return next((size for size in (preferred, *BLOCK_SIZES) if scale_count(elements, size) == scales), 0)


def _check_tensor(tensor: Any, what: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, not {type(tensor).__name__}; use torch.as_tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what} has layout {tensor.layout}; pass {what}.to_dense()")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{what} is a {type(tensor).__name__}, whose values may lie elsewhere; pass {what}.as_subclass(torch.Tensor)")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{what} has dtype {tensor.dtype}; cast it to one of {', '.join(map(str, _DTYPES))}")
    if tensor.device.type != "cpu":
        if tensor.device.type != "cuda" or gpu_server() == NOBODY:
            raise RuntimeError(f"{what} is on {tensor.device}, where blocks are not quantized: pass {what}.cpu()")
        if triton_problem():
            raise RuntimeError(f"{what} is on {tensor.device}, but {triton_problem()}; or pass {what}.cpu()")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_neg()


def _elements_in_a_block(tensor: torch.Tensor, block_size: int | None, axis: int | None) -> int:
    if axis is not None:
        if isinstance(axis, bool) or not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise ValueError(f"Invalid axis: {axis!r}; the tensor has {tensor.dim()} dimensions: give one from 0 on, or None for blocks")
        return max(tensor.numel() // max(tensor.shape[axis], 1), 1)
    if block_size is None:
        return max(tensor.numel(), 1)
    check_block_size(block_size)
    return block_size


def _empty(tensor: torch.Tensor, code: str, size: int, axis: int | None) -> QuantizedTensor:
    """Codes whose memory is in the order of the blocks."""
    if axis is None:
        codes = torch.empty(tensor.shape, dtype=_CODE_DTYPES[code], device=tensor.device)
    else:
        codes = torch.empty(tensor.movedim(axis, 0).shape, dtype=_CODE_DTYPES[code], device=tensor.device).movedim(0, axis)
    scales = torch.empty(scale_count(tensor.numel(), size), dtype=torch.float32, device=tensor.device)
    return QuantizedTensor(codes, scales, code, tensor.dtype, size, axis)


def _in_order(quantized: QuantizedTensor) -> torch.Tensor:
    """The codes such that their memory is in the order of the blocks; somebody may have copied them."""
    codes, axis = quantized.codes, quantized.axis
    return codes.contiguous() if axis is None else codes.movedim(axis, 0).contiguous().movedim(0, axis)


def _check_out(out: Any, tensor: torch.Tensor, code: str, size: int, axis: int | None) -> None:
    if not isinstance(out, QuantizedTensor):
        raise TypeError(f"out must be a QuantizedTensor, not {type(out).__name__}; pass what an earlier call returned")
    has = (tuple(out.shape), out.code, out.dtype, out.block_size, out.axis)
    needed = (tuple(tensor.shape), code, tensor.dtype, size, axis)
    for name, actual, expected in zip(("shape", "code", "dtype", "block size", "axis"), has, needed, strict=True):
        if actual != expected:
            raise ValueError(
                f"out has {name} {actual!r}, but {expected!r} is needed; pass what an earlier call with these options returned"
            )
    if out.codes.numel() and _in_order(out).data_ptr() != out.codes.data_ptr():  # a copy, whose writes would be lost
        raise ValueError(f"the codes of out have strides {out.codes.stride()}; pass what an earlier call with these options returned")


def _check_finite(scales: torch.Tensor, size: int) -> None:
    bad = scales.isnan()
    if bool(bad.any()):
        count, first = int(bad.sum()), int(bad.to(torch.uint8).argmax())
        raise ValueError(
            f"{count} of {scales.numel()} blocks of {size} values have NaN, infinity, or a magnitude beyond float32 (about 3.4e38), the "
            f"first is block {first}; no code stands for those: mend them first, for example with torch.nan_to_num"
        )


def _table_or_name(code: str) -> Any:
    return code if not code.endswith("dynamic") else dynamic_table(signed=code == "dynamic")


def _call(function: str, tensor: torch.Tensor, *args: Any) -> None:
    backend = native()
    if backend.module is None:
        raise RuntimeError(f"8-bit codes need the extension, and {backend.why}")
    if tensor.device.type != "cpu" or (backend.forced == "triton" and interprets()):
        getattr(device_quantization, function)(tensor, *args)
    else:
        getattr(backend.module, function)(tensor, *args, backend.isa, torch.get_num_threads())


@functools.cache
def dynamic_table(signed: bool = True) -> torch.Tensor:
    """The 256 values, ascending, of the dynamic 8-bit data type: shape (256,), float32, in [-1, 1] or [0, 1].

    A code has an exponent of ten in unary, and a linear fraction in the bits that this leaves: for k from 0 to 6, the middles of 2^k
    (without sign 2^(k+1)) even parts of the interval from 0.1 to 1, times 10^(k-6), each with both signs; further 0 and 1.
    """
    values = [0.0, 1.0]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (k + (not signed)) + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (k - 6)
        values += [*means.tolist(), *((-means).tolist() if signed else ())]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")
