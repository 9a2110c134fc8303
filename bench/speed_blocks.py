"""Times `quantize_blockwise` and `dequantize_blockwise`, beside the streaming limit and other packages.

Not beside torch: its nearest function, torch.quantize_per_tensor, has one scale for a whole tensor, is deprecated, and warns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

import fused_opt
from fused_opt.bench import block_peers
from fused_opt.bench import measure as measuring
from fused_opt.bench.block_peers import DEQUANTIZE, QUANTIZE, Peer
from fused_opt.bench.machine import available_memory
from fused_opt.bench.measure import Effort, Estimate, Sampler, Spread, Streaming, interleave, paired_ratios, samplers
from fused_opt.bench.suite import OnShare, Record, Unit
from fused_opt.bench.worker import WorkerError
from fused_opt.native import native

PART = "blocks"
ELEMENTS = 64 * 2**20
INTO = " into out"

# A call of others takes seconds: torchao's 0.75 s, 2.4 s.
FEW = Effort(budget=1.0, least=6, most=20)


@dataclass(frozen=True)
class Beside:
    """A function of another package, timed beside ours.

    Attributes:
        peer: the package and its version.
        ours, seconds: a call, by rounds.
        failure: why it was not measured, or "".
    """

    peer: str
    ours: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def ratio(self) -> Estimate:
        """How many times as long as ours it took, in the same round."""
        return Estimate.of(paired_ratios(self.seconds, self.ours))


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
    peers: list[Beside] = field(default_factory=list)

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

    def to_record(self) -> Record:
        """Times are in seconds, sizes in bytes, throughput in 1e9 bytes a second."""
        rows = [{**asdict(row), "gb_per_s": asdict(row.gb_per_s), "share_of_limit": asdict(row.share)} for row in self.rows]
        return {"skipped": self.skipped, "rows": rows}

    @classmethod
    def from_record(cls, record: Record) -> Blocks:
        """What `to_record` made."""

        def row(values: Mapping[str, Any]) -> BlocksRow:
            own = {name: values[name] for name in BlocksRow.__dataclass_fields__}
            return BlocksRow(**{**own, "peers": [Beside(**peer) for peer in values["peers"]]})

        return cls([row(values) for values in record["rows"]], record["skipped"])


def from_records(records: Mapping[str, Record]) -> list[Blocks]:
    """What was measured: one, or none."""
    return [Blocks.from_record(record) for record in records.values()]


def units(effort: Effort, streaming: Callable[[], Streaming], with_peers: bool, threads: int) -> list[Unit]:
    """One; for `streaming` see `measure_blocks`. `threads`: 0 for torch's default."""

    def measure(on_share: OnShare) -> Record:
        with measuring.threads(threads or torch.get_num_threads()):
            return measure_blocks(effort, streaming, with_peers, on_share).to_record()

    words = [f"{ELEMENTS:,} values", *([f"{threads} threads"] if threads else []), *(["with other packages"] if with_peers else [])]
    return [Unit(PART, " ".join(words), measure, seconds=effort.budget + (30 if with_peers else 2))]


def measure_blocks(
    effort: Effort, streaming: Callable[[], Streaming], with_peers: bool, on_share: OnShare, elements: int = ELEMENTS
) -> Blocks:
    """Measure with torch's current number of threads.

    Args:
        effort: how many rounds.
        streaming: gives the streaming kernels; called only if they are needed.
        with_peers: whether other packages are timed, too.
        on_share: called after each round.
        elements: how many values.
    """
    if native().module is None:
        return Blocks(skipped=f"needs the extension, and {native().why}")
    needed = elements * (3 * 4 + 3 * 1)  # the values, the result, a new one; their codes
    available = available_memory()
    if available is not None and needed > available:
        return Blocks(skipped=f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")
    x = block_peers.random_values(elements)
    codes, values = fused_opt.quantize_blockwise(x), torch.empty_like(x)
    calls = samplers(
        {
            QUANTIZE: lambda: fused_opt.quantize_blockwise(x),
            DEQUANTIZE: lambda: fused_opt.dequantize_blockwise(codes),
            QUANTIZE + INTO: lambda: fused_opt.quantize_blockwise(x, out=codes),
            DEQUANTIZE + INTO: lambda: fused_opt.dequantize_blockwise(codes, out=values),
        }
    )
    memory = streaming()
    samples = interleave({**calls, **samplers(memory.kernels())}, effort, on_round=on_share)
    limits, right = memory.limits(samples), _right(x, values, codes)
    beside: dict[str, list[Beside]] = {QUANTIZE: [], DEQUANTIZE: []}
    for name, peer in block_peers.installed().items() if with_peers else ():
        for function, found in beside.items():
            found.append(_beside(name, peer, elements, function, calls[function]))
    return Blocks(
        [BlocksRow(name, elements, x.nbytes + codes.nbytes, samples[name], limits, right, beside.get(name, [])) for name in calls]
    )


def _beside(name: str, peer: Peer, elements: int, function: str, ours: Sampler) -> Beside:
    try:
        with block_peers.Elsewhere(peer, elements, function) as theirs:
            samples = interleave({"ours": ours, "peer": theirs.sample}, FEW)
    except WorkerError as error:
        return Beside(name, failure=str(error))
    return Beside(name, samples["ours"], samples["peer"])


def _right(x: torch.Tensor, values: torch.Tensor, codes: fused_opt.QuantizedTensor) -> bool:
    """`values` is what the calls above made of x by way of `codes`."""
    whole = x.numel() // codes.block_size * codes.block_size
    scales = x[:whole].view(-1, codes.block_size).abs().amax(1)
    error = (x[:whole] - values[:whole]).abs_().view(-1, codes.block_size).amax(1)
    bound = scales * (1 / 254 + 4 * torch.finfo(torch.float32).eps)  # decoding rounds twice, the comparison once
    return torch.equal(scales, codes.scales[: len(scales)]) and bool((error <= bound).all())
