"""Rows of the speed table for `quantize_blockwise` and `dequantize_blockwise`, beside the streaming limit and other packages.

Not beside torch: its nearest function, torch.quantize_per_tensor, has one scale for a whole tensor, is deprecated, and warns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

import fused_opt
from fused_opt.bench import peers
from fused_opt.bench.machine import available_memory
from fused_opt.bench.measure import Effort, Spread, Streaming, interleave
from fused_opt.native import native

ELEMENTS = 64 * 2**20
QUANTIZE, DEQUANTIZE = "quantize", "dequantize"
INTO = " into out"


@dataclass(frozen=True)
class BlocksRow:
    """What was measured of one function.

    Attributes:
        function: `QUANTIZE` or `DEQUANTIZE`, for one that makes a new result, or that and `INTO`.
        elements: float32 values.
        moved_bytes: values, codes and scales, each once.
        seconds: a call, by rounds.
        limits: the streaming limit in GB/s, by rounds.
        right: whether every value differs from what its code stands for by as much as the documentation says, or less.
        peers: functions of others.
    """

    function: str
    elements: int
    moved_bytes: int
    seconds: list[float]
    limits: list[float]
    right: bool
    peers: list[peers.Beside]

    @cached_property
    def gb_per_s(self) -> Spread:
        """1e9 bytes a second that it moves."""
        return Spread.of([self.moved_bytes / seconds / 1e9 for seconds in self.seconds])

    @cached_property
    def share(self) -> Spread:
        """Of the streaming limit in the same round."""
        return Spread.of([self.moved_bytes / seconds / 1e9 / limit for seconds, limit in zip(self.seconds, self.limits, strict=True)])


@dataclass(frozen=True)
class Blocks:
    """A row for each function, or why there is none."""

    rows: list[BlocksRow] = field(default_factory=list)
    skipped: str = ""


def measure_blocks(
    effort: Effort, streaming: Callable[[], Streaming], on_round: Callable[[float], None], elements: int = ELEMENTS
) -> Blocks:
    """Measure with torch's current number of threads; for the arguments see `speed_row.measure_row`."""
    if native().module is None:
        return Blocks(skipped=f"needs the extension, and {native().why}")
    needed = elements * (3 * 4 + 3 * 1)  # the values, the result, a new one; their codes
    available = available_memory()
    if available is not None and needed > available:
        return Blocks(skipped=f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    codes, values = fused_opt.quantize_blockwise(x), torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        QUANTIZE: lambda: fused_opt.quantize_blockwise(x),
        DEQUANTIZE: lambda: fused_opt.dequantize_blockwise(codes),
        QUANTIZE + INTO: lambda: fused_opt.quantize_blockwise(x, out=codes),
        DEQUANTIZE + INTO: lambda: fused_opt.dequantize_blockwise(codes, out=values),
    }
    memory = streaming()
    samples = interleave({**calls, **memory.kernels()}, effort, lead_in=False, on_round=on_round)
    limits, right = memory.limits(samples), _right(x, values, codes)
    beside = [peers.blocks_beside(peer, x, {name: calls[name] for name in (QUANTIZE, DEQUANTIZE)}) for peer in peers.installed()]
    rows = [
        BlocksRow(
            function=name,
            elements=elements,
            moved_bytes=x.nbytes + codes.nbytes,
            seconds=samples[name],
            limits=limits,
            right=right,
            peers=[found[name] for found in beside if name in found],
        )
        for name in calls
    ]
    return Blocks(rows)


def _right(x: torch.Tensor, values: torch.Tensor, codes: fused_opt.QuantizedTensor) -> bool:
    """`values` is what the calls above made of x by way of `codes`."""
    whole = x.numel() // codes.block_size * codes.block_size
    scales = x[:whole].view(-1, codes.block_size).abs().amax(1)
    error = (x[:whole] - values[:whole]).abs_().view(-1, codes.block_size).amax(1)
    bound = scales * (1 / 254 + 4 * torch.finfo(torch.float32).eps)  # decoding rounds twice, the comparison once
    return torch.equal(scales, codes.scales[: len(scales)]) and bool((error <= bound).all())
