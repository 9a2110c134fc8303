"""Which code steps each parameter of an optimizer, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fused_opt.rules import Group
from fused_opt.step import FusedStep, GroupPlan, Plan, plan


@dataclass(frozen=True)
class Row:
    """Parameters of one group that are treated alike.

    Attributes:
        group: index in `param_groups`.
        path: "cpu-avx2" and the like for this package's native code, "torch" for torch's own step.
        reason: why that path.
        dtype: of the parameters, without the "torch." prefix.
        states: the state tensors a step uses, with their dtype and size in bytes a parameter element, or "none".
        parameters: number of tensors.
        elements: number of values in them.
    """

    group: int
    path: str
    reason: str
    dtype: str
    states: str
    parameters: int
    elements: int


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table."""

    optimizer: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        count = sum(row.parameters for row in self.rows)
        lines = [f"{self.optimizer}: {count} parameter{'s' if count != 1 else ''}"]
        lines += [
            f"  group {row.group}: {row.parameters} x {row.dtype} ({row.elements} elements) by {row.path}: {row.reason}; "
            f"states: {row.states}"
            for row in self.rows
        ]
        return "\n".join(lines)


def explain(optimizer: torch.optim.Optimizer) -> Explanation:
    """Say which code the next step of `optimizer` runs for each parameter, and why. Changes nothing.

    Parameters without a gradient are explained as if they had one of their own dtype and layout.

    Args:
        optimizer: one of this package's optimizers.

    Returns:
        An Explanation, whose `rows` are the data and whose `str` is a table.

    Raises:
        TypeError: the optimizer is not one of this package's.
    """
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            f"explain() takes an optimizer of fused_opt, not {type(optimizer).__module__}.{type(optimizer).__qualname__}; "
            "make it with fused_opt.Adam, AdamW, RMSprop or SGD"
        )
    the_plan = plan(optimizer, assume_grad=True)
    alike: Counter[tuple[int, str, str, str, str]] = Counter()
    elements: Counter[tuple[int, str, str, str, str]] = Counter()
    for index, group in enumerate(the_plan.groups):
        for param, path, reason in _paths(the_plan, group):
            dtype = str(param.dtype).removeprefix("torch.")
            key = (index, path, reason, dtype, _states(optimizer, group.group, param))
            alike[key] += 1
            elements[key] += param.numel()
    the_plan.release()
    rows = tuple(Row(*key, parameters=count, elements=elements[key]) for key, count in alike.items())
    return Explanation(type(optimizer).__name__, rows)


def _paths(the_plan: Plan, group: GroupPlan) -> Iterator[tuple[torch.Tensor, str, str]]:
    declined = dict(group.declined)
    for i, param in enumerate(group.group["params"]):
        if i in declined:
            yield param, "torch", declined[i]
        else:
            yield param, f"cpu-{the_plan.backend.isa}", the_plan.backend.why


def _states(optimizer: FusedStep, group: Group, param: torch.Tensor) -> str:
    existing = optimizer.state.get(param, {})
    dtypes = {slot: getattr(existing.get(slot), "dtype", param.dtype) for slot in optimizer._rule.slots(group)}
    described = [f"{slot} {str(dtype).removeprefix('torch.')}" for slot, dtype in dtypes.items()]
    size = sum(dtype.itemsize for dtype in dtypes.values())
    return f"{', '.join(described)} ({size} bytes a value)" if described else "none"
