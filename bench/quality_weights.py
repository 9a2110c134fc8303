"""What `fused-opt quality` compares: formats of states, and with them ways to keep weights in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_opt import stages
from fused_opt.bench.speed_plan import AS_TORCH, STATES

NEAREST = "nearest"

# Constructor arguments of ours.
WEIGHTS: dict[str, dict[str, Any]] = {NEAREST: {}, **{name: {"weights": name} for name in stages.WEIGHTS}}


@dataclass(frozen=True)
class Format:
    """How a training keeps its numbers.

    Attributes:
        state: of states, a key of `STATES`.
        weights: a key of `WEIGHTS`: weights and gradients are bfloat16; "": they are float32.
    """

    state: str = AS_TORCH
    weights: str = ""

    def __str__(self) -> str:
        state = "" if self.weights and self.state == AS_TORCH else self.state
        return " ".join(filter(None, (self.weights, state)))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a constructor. States "as torch" are float32 beside bfloat16 weights, too: the weights are what is compared."""
        if not self.weights:
            return STATES[self.state]
        return {"state_dtype": torch.float32, **STATES[self.state], **WEIGHTS[self.weights]}

    def stored(self, model: nn.Module) -> Any:
        """The model, or one with its parameters in bfloat16; they remain the same objects."""
        return StoredInBFloat16(model) if self.weights else model


def formats(states: Iterable[str], weights: Iterable[str]) -> list[Format]:
    """Those to compare: float32 weights with each format of states; if ways to keep weights are given, these instead."""
    names = list(dict.fromkeys(weights))
    if not names:
        return [Format(state) for state in STATES if state != AS_TORCH and state in states]
    return [Format(state, name) for name in WEIGHTS if name in names for state in STATES if state in states]


class _Methods(nn.Module):
    """Calls a model's methods by name, which functional_call cannot."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.model, method)(*args)


class StoredInBFloat16(nn.Module):
    """A model whose parameters are stored in bfloat16. What is computed with them is computed in float32, from their very values.

    Gradients are rounded to bfloat16 when they arrive at the parameters. So trainings differ in what is stored, not in how a processor
    multiplies 16-bit matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._methods = _Methods(model.bfloat16())

    def forward(self, *args: Any) -> Any:
        """What the model returns."""
        return self._call("__call__", *args)

    def loss(self, inputs: Tensor, targets: Tensor) -> Any:
        """What the model's `loss` returns."""
        return self._call("loss", inputs, targets)

    def _call(self, method: str, *args: Any) -> Any:
        wide: Mapping[str, Tensor] = {name: param.float() for name, param in self._methods.named_parameters()}
        return functional_call(self._methods, dict(wide), (method, *args))
