"""The stages of parameters that torch steps, with torch's operations: the same formulas as csrc/kernels/stages.h, to a rounding or two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fused_opt import stages

if TYPE_CHECKING:
    from fused_opt.rules import Group, Rule
    from fused_opt.states import State


class Staged:
    """A parameter's stages around one step by torch: `before` it, which gives the gradient to step with, and `after` it."""

    def __init__(self, rule: Rule, group: Group, number: int, index: int, state: State, factor: float) -> None:
        """`factor`: what the gradient is multiplied with, beside its sign, which is torch's concern."""
        self._param, self._state, self._group = group["params"][index], state, group
        self._flags = stages.stage_flags(group)
        counter = stages.counter_of(rule, group)
        step = float(state[counter]) + 1 if counter in state else 1.0
        self._scalars = stages.stage_scalars_of(group, number, step, factor)
        self._counts = step if counter and not rule.counter else 0.0
        self._new = stages.new_stage_states(group, self._param, state)

    def before(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient that torch is to step with; a new one, if it is another. Shrinks the weight where that is asked for."""
        p, s, flags = self._param, self._scalars, self._flags
        sign = -1.0 if self._group["maximize"] else 1.0  # torch will turn it round; what is added here must not be
        if s[stages.FACTOR] != 1:
            grad = grad * s[stages.FACTOR]
        if flags & stages.CLAMP and s[stages.LIMIT] < math.inf:
            grad = grad.clamp(-s[stages.LIMIT], s[stages.LIMIT])
        if flags & stages.SUBGRADIENT:
            grad = grad.add(p.sign(), alpha=sign * s[stages.L1])
        if flags & stages.ANCHOR:
            grad = grad.add(p - self._stage_state(stages.ANCHOR_STATE), alpha=sign * s[stages.ANCHOR_DECAY])
        if flags & stages.MASK and stages.MASK_STATE in self._state:
            grad = grad.masked_fill(~self._state[stages.MASK_STATE], 0)
        if flags & stages.SHRINK:
            p.mul_(s[stages.KEEP])
        return grad

    def after(self) -> None:
        """What follows torch's step."""
        p, s, flags = self._param, self._scalars, self._flags
        self._state.update(self._new)
        if self._counts:
            self._state["step"] = torch.full((), self._counts, dtype=torch.float32, device="cpu")
        if flags & stages.PROXIMAL:
            p.copy_(torch.sign(p) * (p.abs() - s[stages.THRESHOLD]).clamp(min=0))
        if flags & stages.MASK and stages.MASK_STATE in self._state:
            p.masked_fill_(~self._state[stages.MASK_STATE], 0)
        if flags & stages.AVERAGE and s[stages.AVERAGE_WEIGHT] != 0:
            average = self._state[stages.AVERAGE_STATE]
            average.lerp_(p.to(average.dtype), s[stages.AVERAGE_WEIGHT])

    def _stage_state(self, name: str) -> torch.Tensor:
        return self._state[name] if name in self._state else self._new[name]
