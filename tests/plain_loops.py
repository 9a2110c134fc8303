"""What a training loop without stages has to do by hand: ordinary torch operations on parameters and gradients, and torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from forloop import forloop, forloop_step

Params = Sequence[torch.Tensor]
Tensors = Sequence[torch.Tensor]


def nothing(params: Params) -> None:
    """Before or after a step, in a loop that does nothing there."""


def clip_norm(limit: float, norm_type: float = 2.0) -> Callable[[Params], None]:
    return lambda params: torch.nn.utils.clip_grad_norm_(params, limit, norm_type) and None


def clip_value(limit: float) -> Callable[[Params], None]:
    return lambda params: torch.nn.utils.clip_grad_value_(params, limit)


def add_l1(strength: float) -> Callable[[Params], None]:
    """The subgradient of strength * |w|, which is 0 at 0."""

    @torch.no_grad()
    def before(params: Params) -> None:
        for param in params:
            param.grad += strength * param.sign()

    return before


def add_pull(strength: float, anchors: Tensors) -> Callable[[Params], None]:
    """The gradient of strength / 2 * |w - anchor|^2."""

    @torch.no_grad()
    def before(params: Params) -> None:
        for param, anchor in zip(params, anchors, strict=True):
            param.grad.add_(param - anchor, alpha=strength)

    return before


def shrink(factor: float) -> Callable[[Params], None]:
    """Decoupled weight decay (Loshchilov & Hutter): factor is 1 - lr * decay."""

    @torch.no_grad()
    def before(params: Params) -> None:
        for param in params:
            param.mul_(factor)

    return before


def soft_threshold(threshold: float) -> Callable[[Params], None]:
    """The proximal operator of threshold * |w|."""

    @torch.no_grad()
    def after(params: Params) -> None:
        for param in params:
            param.copy_(torch.nn.functional.softshrink(param, threshold))

    return after


def train(
    name: str,
    values: Tensors,
    grads: Sequence[Tensors],
    before: Callable[[Params], None] = nothing,
    after: Callable[[Params], None] = nothing,
    **options: Any,
) -> torch.optim.Optimizer:
    """Steps of torch's optimizer with those gradients, each between `before` and `after`."""
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = forloop(name, params, **options)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        before(params)
        forloop_step(optimizer)
        after(params)
    return optimizer
