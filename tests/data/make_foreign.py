"""Makes the checkpoints of other packages' 8-bit optimizers in this folder, with what those packages themselves take them to mean.

Made with torch 2.13.0, bitsandbytes 0.50.2 and torchao 0.18.0: python tests/data/make_foreign.py. For each name in MAKERS, NAME.pt is the
optimizer's state_dict and NAME.npz has its states in fp32, named by the parameter's index and torch's name: "0.exp_avg".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent
STEPS = 3

Checkpoint = dict[str, Any]
Expected = dict[str, torch.Tensor]

ADAM, RMSPROP, SGD = ("exp_avg", "exp_avg_sq"), ("square_avg",), ("momentum_buffer",)


def stepped(module: str, name: str, shape: tuple[int, int], **options: Any) -> Checkpoint:
    """The state_dict after some steps over a parameter with 8-bit states and two that are too small for them, one of those bf16."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    params = [torch.nn.Parameter(value) for value in (random(*shape), random(10), random(7).bfloat16())]
    optimizer = getattr(importlib.import_module(module), name)(params, **options)
    for _ in range(STEPS):
        grad = random(*shape) * 10 ** (2 * random(shape[0], 1))  # blocks of all magnitudes
        grad[:5] = 0  # a block of zeros
        grad[5:10] *= 1e-20  # one whose squares are denormal
        for param, value in zip(params, (grad, random(10), random(7)), strict=True):
            param.grad = value.to(param.dtype)
        optimizer.step()
    checkpoint: Checkpoint = optimizer.state_dict()
    return checkpoint


def of_bitsandbytes(name: str, slots: tuple[str, ...], **options: Any) -> tuple[Checkpoint, Expected]:
    checkpoint = stepped("bitsandbytes.optim", name, (65, 64), lr=0.01, weight_decay=0.1, **options)  # a short last block
    states = {index: state["__bnb_optimizer_quant_state__"] for index, state in checkpoint["state"].items()}
    return checkpoint, meant_by_bitsandbytes(states, slots, block_size=256)


def meant_by_bitsandbytes(states: dict[int, dict[str, torch.Tensor]], slots: tuple[str, ...], block_size: int) -> Expected:
    dequantize = importlib.import_module("bitsandbytes.functional").dequantize_blockwise
    expected = {}
    for index, state in states.items():
        for number, slot in enumerate(slots, 1):
            value = state[f"state{number}"]
            if value.dtype == torch.uint8:
                value = dequantize(value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=block_size)
            expected[f"{index}.{slot}"] = value
    return expected


def of_old_bitsandbytes() -> tuple[Checkpoint, Expected]:
    """As AdamW8bit saved it before version 0.44: blocks of 2048, no nesting, fewer options. Those versions step on GPUs only."""
    functional = importlib.import_module("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Any] = {"step": STEPS}
    for number, signed in ((1, True), (2, False)):
        value = torch.randn((65, 64), generator=generator)
        table = functional.create_dynamic_map(signed=signed)
        codes, quantized = functional.quantize_blockwise(value if signed else value.square(), code=table, blocksize=2048)
        state |= {f"state{number}": codes, f"qmap{number}": table, f"absmax{number}": quantized.absmax}
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    return {"state": {0: state}, "param_groups": [group]}, meant_by_bitsandbytes({0: state}, ADAM, block_size=2048)


def of_torchao(name: str, **options: Any) -> tuple[Checkpoint, Expected]:
    checkpoint = stepped("torchao.optim", name, (80, 64), lr=0.01, weight_decay=0.1, **options)
    saved = {f"{index}.{slot}": state[slot] for index, state in checkpoint["state"].items() for slot in ADAM}
    return checkpoint, {key: (value.dequantize() if hasattr(value, "codes") else value).float() for key, value in saved.items()}


MAKERS: dict[str, Callable[[], tuple[Checkpoint, Expected]]] = {
    "bitsandbytes_AdamW8bit": partial(of_bitsandbytes, "AdamW8bit", ADAM),
    "bitsandbytes_RMSprop8bit": partial(of_bitsandbytes, "RMSprop8bit", RMSPROP, alpha=0.95, momentum=0.9),
    "bitsandbytes_SGD8bit": partial(of_bitsandbytes, "SGD8bit", SGD, momentum=0.8, dampening=0.1),
    "bitsandbytes_0.43_AdamW8bit": of_old_bitsandbytes,
    "torchao_AdamW8bit": partial(of_torchao, "AdamW8bit", block_size=128),
}


def main() -> None:
    for name, make in MAKERS.items():
        checkpoint, expected = make()
        torch.save(checkpoint, FOLDER / f"{name}.pt")
        arrays: dict[str, Any] = {key: value.numpy() for key, value in expected.items()}
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
