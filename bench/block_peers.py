"""Blockwise quantization of other packages, each in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fused_opt.bench.implementations import version
from fused_opt.bench.measure import samplers
from fused_opt.bench.worker import SETTLE, Session, Worker

QUANTIZE, DEQUANTIZE = "quantize", "dequantize"
BLOCK_SIZE = 256


def _bitsandbytes(x: torch.Tensor) -> Mapping[str, Callable[[], object]]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes, state = functional.quantize_blockwise(x, blocksize=BLOCK_SIZE)
    return {
        QUANTIZE: lambda: functional.quantize_blockwise(x, blocksize=BLOCK_SIZE),
        DEQUANTIZE: lambda: functional.dequantize_blockwise(codes, state),
    }


def _torchao(x: torch.Tensor) -> Mapping[str, Callable[[], object]]:
    """What its optimizers do to a state, compiled, as they do it."""
    utils: Any = importlib.import_module("torchao.optim.quant_utils")
    table = torch.tensor(utils.create_dynamic_map(signed=True))

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, scales = utils.scale_tensor(x, BLOCK_SIZE)
        return utils.quantize_8bit_with_qmap(scaled, table), scales

    encode: Any = torch.compile(quantize, dynamic=False)
    decode: Any = torch.compile(utils.dequant_with_qmap, dynamic=False)
    codes, scales = encode(x)
    return {QUANTIZE: lambda: encode(x), DEQUANTIZE: lambda: decode(codes, table, scales)}


# From a float32 tensor to calls, by function.
Peer = Callable[[torch.Tensor], Mapping[str, Callable[[], object]]]

# By the package that each is of.
PEERS: dict[str, Peer] = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}


def installed() -> dict[str, Peer]:
    """Those that can be found, by the package's name and version; nothing is imported."""
    found = {package: peer for package, peer in PEERS.items() if importlib.util.find_spec(package) is not None}
    return {f"{package} {version(package)}": peer for package, peer in found.items()}


def random_values(elements: int) -> torch.Tensor:
    """What is quantized: float32 of shape (elements,), the same in every process."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(0))


class Elsewhere:
    """A package's function in a process of its own, with torch's current number of threads.

    Raises:
        WorkerError: it fails; so does `sample`.
    """

    def __init__(self, peer: Peer, elements: int, function: str) -> None:
        self._worker = Worker(torch.get_num_threads())
        try:
            self._worker.call(_prepare, peer, elements, function)
        except BaseException:
            self._worker.close()
            raise

    def sample(self, repeats: int) -> float:
        """Seconds that so many calls in a row take."""
        time.sleep(SETTLE)
        return float(self._worker.call(_sample, repeats))

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()


def _prepare(session: Session, peer: Peer, elements: int, function: str) -> None:
    session["sample"] = samplers(peer(random_values(elements)))[function]


def _sample(session: Session, repeats: int) -> float:
    seconds: float = session["sample"](repeats)
    time.sleep(SETTLE)
    return seconds
