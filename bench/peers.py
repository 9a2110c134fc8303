"""8-bit code of other packages, timed beside ours where they are installed. What fails there is reported, and stops nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fused_opt.bench.exact_sample import COMPARED_STEPS
from fused_opt.bench.measure import Effort, Spread, interleave, paired_ratios

OURS, PEER = "ours", "peer"
BLOCK_SIZE = 256

# Steps of others take seconds on gpt2: 0.75 s and 2.4 s on 2 cores.
FEW = Effort(budget=1.0, least=3, most=20)

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Peer:
    """A package, and how to use it.

    Attributes:
        package: its name, to install and to import.
        adamw: the imported package and parameters to an 8-bit AdamW with torch's defaults.
        blocks: the imported package and a float32 tensor to calls named "quantize" and "dequantize".
    """

    package: str
    adamw: Callable[[Any, list[torch.nn.Parameter]], torch.optim.Optimizer]
    blocks: Callable[[Any, torch.Tensor], Calls]


@dataclass(frozen=True)
class Beside:
    """What was measured of a peer.

    Attributes:
        peer: package and version.
        samples: `OURS` and `PEER` -> seconds a call, in the same rounds; empty if it failed.
        detour: of its steps (see `ExactSample.detour`).
        failure: why it was not measured, or "".
    """

    peer: str
    samples: dict[str, list[float]]
    detour: float | None = None
    failure: str = ""

    @cached_property
    def seconds(self) -> Spread:
        """The peer's, a call."""
        return Spread.of(self.samples[PEER])

    @cached_property
    def ratio(self) -> Spread:
        """How many times as long as ours it took, in the same round."""
        return Spread.of(paired_ratios(self.samples[PEER], self.samples[OURS]))


def _bitsandbytes_blocks(package: Any, x: torch.Tensor) -> Calls:
    functional = package.functional
    codes, state = functional.quantize_blockwise(x, blocksize=BLOCK_SIZE)
    return {
        "quantize": lambda: functional.quantize_blockwise(x, blocksize=BLOCK_SIZE),
        "dequantize": lambda: functional.dequantize_blockwise(codes, state),
    }


def _torchao_blocks(package: Any, x: torch.Tensor) -> Calls:
    """What its optimizers do to a state, compiled, as they do it."""
    utils = importlib.import_module("torchao.optim.quant_utils")
    table = torch.tensor(utils.create_dynamic_map(signed=True))

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, scales = utils.scale_tensor(x, BLOCK_SIZE)
        return utils.quantize_8bit_with_qmap(scaled, table), scales

    encode: Any = torch.compile(quantize, dynamic=False)
    decode: Any = torch.compile(utils.dequant_with_qmap, dynamic=False)
    codes, scales = encode(x)
    return {"quantize": lambda: encode(x), "dequantize": lambda: decode(codes, table, scales)}


PEERS = (
    Peer("bitsandbytes", lambda package, params: package.optim.AdamW8bit(params), _bitsandbytes_blocks),
    Peer("torchao", lambda package, params: importlib.import_module("torchao.optim").AdamW8bit(params), _torchao_blocks),
)


def installed() -> list[Peer]:
    """Those that can be found; nothing is imported."""
    return [peer for peer in PEERS if importlib.util.find_spec(peer.package) is not None]


def steps_beside(
    peer: Peer,
    values: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    ours: Callable[[], object],
    detour: Callable[[Sequence[torch.Tensor]], float],
    lead_in: bool,
) -> Beside:
    """Time an AdamW of the peer's on copies of `values` beside `ours`, a step of ours.

    `detour` judges the parameters; `lead_in`: see `interleave`.
    """
    found: list[float] = []

    def make(package: Any) -> Callable[[], object]:
        params = [torch.nn.Parameter(value.clone()) for value in values]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        step = peer.adamw(package, params).step
        for _ in range(COMPARED_STEPS):
            step()
        found.append(detour(params))
        return step

    (beside,) = _time(peer, lambda package: {"step": make(package)}, {"step": ours}, lead_in).values()
    return Beside(beside.peer, beside.samples, found[0] if found else None, beside.failure)


def blocks_beside(peer: Peer, x: torch.Tensor, ours: Calls) -> dict[str, Beside]:
    """Time the peer's functions on x beside ours of the same name."""
    return _time(peer, lambda package: peer.blocks(package, x), ours, lead_in=False)


def _time(peer: Peer, make: Callable[[Any], Calls], ours: Calls, lead_in: bool) -> dict[str, Beside]:
    name = peer.package
    try:
        name = f"{name} {importlib.metadata.version(name)}"
        with warnings.catch_warnings():  # the peer's own affair
            warnings.simplefilter("ignore")
            calls = make(importlib.import_module(peer.package))
            samples = {what: interleave({OURS: call, PEER: calls[what]}, FEW, lead_in=lead_in) for what, call in ours.items()}
            return {what: Beside(name, times) for what, times in samples.items()}
    except Exception as error:  # whatever another package does
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {what: Beside(name, {}, failure=failure) for what in ours}
