"""How far 16-bit results lie from the exact ones, which are those of torch's for-loop in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from helpers import params_of


def pairs(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The first parameter's value and states, step counter excepted, of two optimizers."""
    p, q = params_of(a)[0], params_of(b)[0]
    yield "param", (p.detach(), q.detach())
    for key, value in b.state.get(q, {}).items():
        if key != "step":
            yield key, (a.state[p][key], value)


def continued(name: str, kwargs: dict[str, Any], start: torch.optim.Optimizer, make: Any, dtype: torch.dtype) -> torch.optim.Optimizer:
    """An optimizer at the very point of 16-bit `start`, in `dtype`, with the same gradient."""
    (param,) = params_of(start)
    copy = torch.nn.Parameter(param.detach().to(dtype, copy=True))
    copy.grad = param.grad.to(dtype, copy=True)
    optimizer: torch.optim.Optimizer = make(name, [copy], **kwargs)
    optimizer.load_state_dict({**start.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    for key, value in optimizer.state.get(copy, {}).items():
        optimizer.state[copy][key] = value.clone()
    return optimizer
