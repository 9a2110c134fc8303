"""Tells a right step with 8-bit states from a wrong one, by a float64 step from the very numbers that its codes stand for.

The codes' own error is far larger than what tells right from wrong in `exact_sample`: after a few steps it would hide a mistake of some
percent. So each step is judged by itself. What goes into it is known exactly; the parameters that come out may be wrong by rounding only,
and the states by what the code's documentation says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fused_opt.bench.cases import Case
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED, ExactSample, largest
from fused_opt.quantization import QuantizedTensor, scale_count
from fused_opt.states import BLOCK_SIZE, code_of, is_codes, scale_name
from fused_opt.step import FusedStep

# See `fused_opt.quantize_blockwise`: a value x of a block with scale s differs from its code by at most (|x| + s / MU) / 32, and by twice
# that with stochastic rounding, which states have.
MU = {"mulaw": 247, "unsigned_mulaw": 63487}
FP32_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class CodedErrors:
    """The largest errors that any of the compared steps made, starting from the states that the codes stand for.

    Attributes:
        parameters: in the unit of `ExactSample.error`; up to `TOLERATED` it is rounding.
        states: as a share of what the code's bound and rounding allow; right up to 1.
    """

    parameters: float
    states: float


def follow(
    case: Case, sample: ExactSample, optimizer: FusedStep, params: Sequence[torch.Tensor], step: Callable[[], object] | None = None
) -> CodedErrors:
    """Let `optimizer`, which is new, take `COMPARED_STEPS` steps with the gradients of `params`, and compare each of them.

    `step` makes it take one (default: its own method).
    """
    grad = sample.take([param.grad for param in params if param.grad is not None])
    errors = [_compare_step(case, sample, optimizer, params, grad, step or optimizer.step) for _ in range(COMPARED_STEPS)]
    return CodedErrors(max(error.parameters for error in errors), max(error.states for error in errors))


def _compare_step(
    case: Case,
    sample: ExactSample,
    optimizer: FusedStep,
    params: Sequence[torch.Tensor],
    grad: torch.Tensor,
    step: Callable[[], object],
) -> CodedErrors:
    before = sample.take(params)
    exact = torch.nn.Parameter(before.clone())
    exact.grad = grad
    reference = getattr(torch.optim, case.optimizer)([exact], **case.options, foreach=False)
    slots = optimizer._rule.slots(optimizer.param_groups[0])
    state = optimizer.state.get(params[0])
    if state:
        reference.state[exact] = {name: value.clone() for name, value in state.items() if name == optimizer._rule.counter}
        reference.state[exact] |= {slot: _decoded(sample, optimizer, params, slot)[0] for slot in slots}
    step()
    reference.step()

    after = exact.detach()
    magnitude = torch.maximum(before.abs(), after.abs()) + (after - before).abs()
    states = []
    for slot in slots:
        decoded, scales = _decoded(sample, optimizer, params, slot)
        expected = reference.state[exact][slot]
        coarse = 2 / 32 * (expected.abs() + scales / MU[code_of(slot)]) * (scales != 0)
        states.append(largest((decoded - expected).abs() / (coarse + TOLERATED * FP32_EPSILON * expected.abs())))
    return CodedErrors(largest((sample.take(params) - after).abs() / (sample.epsilon * magnitude)), max(states, default=0.0))


def _decoded(sample: ExactSample, optimizer: FusedStep, params: Sequence[torch.Tensor], slot: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled elements of a state, and the scales of their blocks, 0 where a state is not in codes; float64 of shape (elements,)."""
    values, scales = [], []
    for param, indices in zip(params, sample.indices, strict=True):
        state = optimizer.state[param]
        kept = state.get(slot, torch.full_like(param, math.nan))  # so that a step which makes none is as wrong as can be
        taken, scale = torch.take(kept.detach(), indices), torch.zeros(len(indices))
        if is_codes(taken):
            scale = state[scale_name(slot)][_places(indices, kept) // BLOCK_SIZE]
            ones = torch.ones(scale_count(len(taken), BLOCK_SIZE))
            taken = QuantizedTensor(taken, ones, code_of(slot), torch.float32, BLOCK_SIZE).dequantize() * scale
        values.append(taken.double())
        scales.append(scale.double())
    return torch.cat(values), torch.cat(scales)


def _places(indices: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Where in memory those elements lie, in elements from the first one: blocks are in the order of memory."""
    places = torch.zeros_like(indices)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        places += indices % size * stride
        indices = indices // size
    return places
