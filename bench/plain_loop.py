"""A training loop in ordinary torch operations as the oracle for fused_opt/stages.py: one operation after the other, in its order.

Each parameter is computed with in a float32 copy (float64 for float64 ones), and complex ones as pairs of reals. The rule between the
stages is torch's for-loop, with square roots rounded as IEEE 754 asks, as in bench/reference.py.

Nothing here is fused_opt's, but for states in 8-bit codes, which torch does not have: the rule is then a step of `fused_opt` without any of
the options that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fused_opt.bench.cases import SHORT_DTYPES, Case
from fused_opt.bench.reference import IeeeSqrt

Result = list[dict[str, torch.Tensor]]

_OPTIONS = (
    "max_grad_norm",
    "grad_norm_type",
    "max_grad_value",
    "l1",
    "l1_method",
    "anchor_decay",
    "average",
    "average_decay",
    "average_start",
    "average_every",
    "weights",
    "rounding_seed",
)
_COMPANIONS = {"kahan": "compensation", "split": "low_bits", "master": "master"}


class PlainLoop:
    """An optimizer with stages, by hand.

    Args:
        case: the optimizer, options of rule and stages. `state_dtype` rounds the rule's states to it after each step.
        values: the parameters, which are copied. To write to `weights` is to change them between two steps.
        masks: a bool tensor for each parameter that has one.
        anchors: what `anchor_decay` pulls to; otherwise the first weights.
        group: number of the param group, on which random numbers depend.

    Attributes:
        weights: as they are stored; complex ones as pairs of reals.
        last_grad_norm: of the latest step with `max_grad_norm`.
    """

    def __init__(
        self,
        case: Case,
        values: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None = None,
        anchors: Sequence[torch.Tensor] | None = None,
        group: int = 0,
    ) -> None:
        self.options = {name: value for name, value in case.options.items() if name in _OPTIONS}
        options = {name: value for name, value in case.options.items() if name not in _OPTIONS}
        self.weights = [_real(value).clone() for value in values]
        self.masks, self.group = masks or [None] * len(values), group
        self.last_grad_norm: torch.Tensor | None = None
        self.sign = -1.0 if options.pop("maximize", False) else 1.0
        self.decoupled_decay = 0.0
        if options.get("decoupled_weight_decay") and case.optimizer in ("RMSprop", "SGD"):
            del options["decoupled_weight_decay"]
            self.decoupled_decay = options.pop("weight_decay")
        self.coded = options.get("state_dtype") == "int8"
        self.state_dtype = None if self.coded else options.pop("state_dtype", None)
        self.wide = [torch.nn.Parameter(_wide(weight)) for weight in self.weights]
        if self.coded:
            import fused_opt as module
        else:
            import torch.optim as module  # type: ignore[no-redef]

            options["foreach"] = False
        self.optimizer: torch.optim.Optimizer = getattr(module, case.optimizer)(self.wide, **options)
        self.steps = [0] * len(self.wide)
        self.stage_states: list[dict[str, torch.Tensor]] = [{} for _ in self.wide]
        for i, (weight, states) in enumerate(zip(self.weights, self.stage_states, strict=True)):
            if self.options.get("anchor_decay"):
                states["anchor"] = _real(anchors[i]).clone() if anchors is not None else weight.clone()
            if self.options.get("average"):
                states["average"] = _wide(weight)
            if self.options.get("weights") in _COMPANIONS and weight.dtype in SHORT_DTYPES:
                method = self.options["weights"]
                companion = _wide(weight) if method == "master" else torch.zeros_like(weight)
                states[_COMPANIONS[method]] = companion.to(torch.int16) if method == "split" else companion

    @torch.no_grad()
    def step(self, grads: Sequence[torch.Tensor | None], norm: torch.Tensor | None = None) -> None:
        """One step with these gradients, which are not changed; a parameter without one is left alone.

        With `norm` they are clipped as if that were theirs: one that is another unit in the last place off changes the bits of all weights.
        """
        factor = self.sign * self._clipping([grad for grad in grads if grad is not None], norm)
        lr = float(self.optimizer.param_groups[0]["lr"])
        stepped = [i for i, grad in enumerate(grads) if grad is not None]
        for param in self.wide:
            param.grad = None
        for i in stepped:
            self.wide[i].copy_(self._joined(i))
            self.wide[i].grad = self._gradient(i, _wide(_real(grads[i]), self.wide[i].dtype), factor)
            if self.decoupled_decay:
                self.wide[i].mul_(1 - lr * self.decoupled_decay)
        with IeeeSqrt():  # type: ignore[no-untyped-call]
            self.optimizer.step()
        for i in stepped:
            self._finish(i, lr)
            self.steps[i] += 1

    def result(self) -> Result:
        """For each parameter "param" and its states, named and ordered as those of fused_opt's optimizers."""
        results = []
        for i, (weight, param) in enumerate(zip(self.weights, self.wide, strict=True)):
            states = dict(self.optimizer.state.get(param, {}))
            if "step" not in states and (self.options.get("average") or self.options.get("weights") == "stochastic") and self.steps[i]:
                states = {"step": torch.tensor(float(self.steps[i])), **states}
            if not self.coded:
                states = {name: value if name == "step" else value.to(self._state_dtype(i)) for name, value in states.items()}
            results.append({"param": weight, **states, **(self.stage_states[i] if self.steps[i] else {})})
        return results

    def _clipping(self, grads: list[torch.Tensor], norm: torch.Tensor | None) -> float:
        """As torch.nn.utils.clip_grad_norm_, but for the norm, which is that of float64 gradients, rounded once."""
        limit = self.options.get("max_grad_norm")
        if limit is None:
            return 1.0
        self.last_grad_norm = total_norm(grads, self.options.get("grad_norm_type", 2))
        return float(torch.clamp(limit / ((self.last_grad_norm if norm is None else norm) + 1e-6), max=1.0))

    def _gradient(self, i: int, grad: torch.Tensor, factor: float) -> torch.Tensor:
        param, states, options = self.wide[i].detach(), self.stage_states[i], self.options
        grad = grad * factor
        if options.get("max_grad_value") is not None:
            grad = grad.clamp(-options["max_grad_value"], options["max_grad_value"])
        if options.get("l1") and options.get("l1_method") == "subgradient":
            grad = grad + options["l1"] * param.sign()
        if options.get("anchor_decay"):
            grad = grad.add(param - states["anchor"].to(param.dtype), alpha=options["anchor_decay"])
        return self._masked(i, grad)

    def _masked(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        mask = self.masks[i]
        return tensor if mask is None else torch.where(mask, tensor, torch.zeros_like(tensor))

    def _finish(self, i: int, lr: float) -> None:
        param, weight, states, options = self.wide[i].detach(), self.weights[i], self.stage_states[i], self.options
        if not self.coded:
            for name, value in self.optimizer.state[self.wide[i]].items():
                if name != "step":
                    value.copy_(value.to(self._state_dtype(i)))
        if options.get("l1") and options.get("l1_method") != "subgradient":
            threshold = torch.tensor(lr * options["l1"], dtype=param.dtype)
            param.copy_(torch.where(param.abs() <= threshold, torch.zeros_like(param), param - threshold * param.sign()))
        param.copy_(self._masked(i, param))
        method, short = options.get("weights"), weight.dtype in SHORT_DTYPES
        if short and method == "stochastic":
            seed = (options.get("rounding_seed", 0) + 65537 * self.group) % 2**24
            param.copy_(stochastically_rounded(param, seed, self.steps[i] + 1, i))
        elif short and method is None:
            param.copy_(param.to(weight.dtype))
        if options.get("average"):
            self._average(states["average"], param, self.steps[i] - options.get("average_start", 0))
        if short and method in _COMPANIONS:
            self._split(i)
        else:
            weight.copy_(param)

    def _average(self, average: torch.Tensor, param: torch.Tensor, since: int) -> None:
        """As torch.optim.swa_utils.AveragedModel, `since` steps after the first that counts."""
        number, rest = divmod(since, self.options.get("average_every", 1))
        if since < 0 or rest:
            return
        if number == 0:
            average.copy_(param)
        else:
            average.lerp_(param, 1 / (number + 1) if self.options["average"] == "swa" else 1 - self.options.get("average_decay", 0.999))

    def _joined(self, i: int) -> torch.Tensor:
        """The weight with what its 16 bits leave out."""
        weight, states = self.weights[i], self.stage_states[i]
        wide = _wide(weight)
        if "compensation" in states:
            return wide + states["compensation"].to(wide.dtype)
        if "low_bits" in states:
            return _with_low_bits(weight, states["low_bits"])
        if "master" in states:
            rounded = states["master"].to(weight.dtype)
            return torch.where((rounded == weight) | (rounded.isnan() & weight.isnan()), states["master"], wide)
        return wide

    def _split(self, i: int) -> None:
        param, weight, states = self.wide[i].detach(), self.weights[i], self.stage_states[i]
        if "low_bits" in states:  # rounded to the nearest, ties away from zero
            bits = param.view(torch.int32).to(torch.int64)
            upper = torch.where(param.isnan(), 0x7FC00000, (bits + 0x8000) & 0xFFFF0000)
            weight.copy_(_from_bits(upper))
            states["low_bits"].copy_(torch.where(param.isnan(), 0, bits - (upper - (upper >> 31 << 32))))
            return
        weight.copy_(param)
        if "master" in states:
            states["master"].copy_(param)
        else:
            rest = param - weight.to(param.dtype)
            states["compensation"].copy_(torch.where(rest.isnan(), torch.zeros_like(rest), rest))

    def _state_dtype(self, i: int) -> torch.dtype:
        dtype: torch.dtype = self.state_dtype or self.weights[i].dtype
        return dtype


def is_staged(case: Case) -> bool:
    """Whether a case has options of stages."""
    decouples = case.optimizer in ("RMSprop", "SGD") and "decoupled_weight_decay" in case.options
    return decouples or any(name in case.options for name in _OPTIONS)


def plain_steps(case: Case, values: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]]) -> Result:
    """As bench/reference.py's `reference_steps`, of a case with stages."""
    loop = PlainLoop(case, values)
    for step_grads in grads:
        loop.step(step_grads)
    return [joined(tensors) for tensors in loop.result()]


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the float32 number that weight and lower half make in place of the latter, whose bits are no number."""
    low = tensors.get("low_bits")
    return tensors if low is None else {**tensors, "low_bits": _with_low_bits(tensors["param"].detach(), low)}


def _with_low_bits(weight: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """A lower half that cannot be that of the weight is left out: somebody has changed the weight since."""
    wide, low = _wide(weight), low_bits.to(torch.int32)
    fits = torch.where(low < 0, weight != 0, ~weight.isinf())
    return torch.where(fits, (wide.view(torch.int32) + low).view(torch.float32), wide)


def total_norm(grads: Sequence[torch.Tensor], norm_type: float = 2) -> torch.Tensor:
    """The norm that torch.nn.utils.get_total_norm would have of these gradients, computed in float64 and rounded once: to float32 if one of
    them is not float64. Of float64 ones, the sum of squares is exact but for the squares' own rounding.

    torch's own norm of a million float32 numbers is off by 150 units in the last place, of ten thousand float64 ones by 17.
    """
    if not grads:
        return torch.tensor(0.0)
    wide = all(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    doubles = [grad.detach().to_dense().to(torch.complex128 if grad.is_complex() else torch.float64).reshape(-1) for grad in grads]
    if norm_type == 2 and wide:
        squares = torch.cat([_real(grad).reshape(-1).square() for grad in doubles])
        return torch.tensor(math.sqrt(math.fsum(squares.tolist())), dtype=torch.float64)
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat([grad.abs() for grad in doubles]), norm_type)
    return total if wide else total.float()


def _real(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _wide(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy to compute with."""
    return tensor.detach().to(dtype or (torch.float64 if tensor.dtype == torch.float64 else torch.float32), copy=True)


def _from_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 numbers from bits in int64."""
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


# --- stochastic rounding ---

_DRAW = 256  # elements that share 64 random bits


def stochastically_rounded(values: torch.Tensor, seed: int, step: int, number: int) -> torch.Tensor:
    """float32 numbers with the bits of bfloat16 ones: the neighbour above with the probability that is the distance from the one below.

    Args:
        values: float32, densely packed; elements count in the order of memory.
        seed, step, number: of the group, of the step (1 is the first), of the parameter in its group.
    """
    flat = values.detach().as_strided((values.numel(),), (1,))
    places = np.arange(flat.numel(), dtype=np.uint64)
    key = _random_bits(np.uint64(seed << 24 | step % 2**24), np.uint64(number))
    drawn = _random_bits(key, places // np.uint64(_DRAW))
    first, stride = drawn & np.uint64(0xFFFF), (drawn >> np.uint64(16)) & np.uint64(0xFFFF) | np.uint64(1)
    random = torch.from_numpy(((first + places % np.uint64(_DRAW) * stride) & np.uint64(0xFFFF)).astype(np.int64))
    bits = (flat.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + random
    rounded = _from_bits(torch.where(flat.isnan(), 0x7FC00000, bits & 0xFFFF0000))
    return torch.empty_like(values).copy_(rounded.as_strided(values.shape, values.stride()))


def _random_bits(seed: Any, place: Any) -> Any:
    """SplitMix64: what is drawn `place` steps from state `seed`."""
    with np.errstate(over="ignore"):
        x = seed + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
