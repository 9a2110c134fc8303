"""Which code steps each parameter of an optimizer, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_opt import fallback
from fused_opt.plan import GroupPlan, Plan, plan
from fused_opt.quantization import block_size_of, scale_count
from fused_opt.rules import Group
from fused_opt.stages import MASK_STATE, stage_dtypes, stages_in_words
from fused_opt.states import BLOCK_SIZE, Blocks, code_dtype, format_of_new_states, is_codes, scale_name
from fused_opt.step import FusedStep


@dataclass(frozen=True)
class Row:
    """Parameters of one group that are treated alike.

    Attributes:
        group: index in `param_groups`.
        indices: of the parameters in the group's `params`.
        path: "cpu-avx2" and the like for this package's native code, "triton" for its kernels on a GPU, "torch" for torch's own step.
        isa: the instruction set of the native code on the CPU, or "" on the other paths.
        reason: why that path.
        dtype: of the parameters, without the "torch." prefix.
        states: the states a step uses and their dtypes, (name, dtype) each, in the rule's order; 8-bit codes with the elements in a block,
            such as "int8/256".
        stages: what a step does before and after the rule, such as "clip by norm 1.0"; in the order of `fused_opt.stages`.
        state_bytes: their size for all parameters of the row together, in bytes, with the scales of blocks and without step counters.
        elements: number of values in the parameters together.
    """

    group: int
    indices: tuple[int, ...]
    path: str
    isa: str
    reason: str
    dtype: str
    states: tuple[tuple[str, str], ...]
    stages: tuple[str, ...]
    state_bytes: int
    elements: int

    @property
    def parameters(self) -> int:
        """Number of tensors."""
        return len(self.indices)

    def __str__(self) -> str:
        states = ", ".join(f"{name} {dtype}" for name, dtype in self.states)
        stages = f"; in the same pass: {', '.join(self.stages)}" if self.stages else ""
        size = f" ({self.state_bytes / self.elements:.4g} bytes a value)" if self.elements and self.states else ""
        return (
            f"group {self.group}: {self.parameters} x {self.dtype} ({self.elements} elements) by {self.path}: {self.reason}; "
            f"states: {states or 'none'}{size}{stages}"
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table. `dataclasses.asdict` makes it plain data."""

    optimizer: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        count = sum(row.parameters for row in self.rows)
        return "\n".join([f"{self.optimizer}: {count} parameter{'s' if count != 1 else ''}", *(f"  {row}" for row in self.rows)])


def explain(optimizer: torch.optim.Optimizer) -> Explanation:
    """Say which code the next step of `optimizer` runs for each parameter, and why. Changes nothing.

    Parameters without a gradient are explained as if they had one of their own dtype and layout.

    Args:
        optimizer: one of this package's optimizers.

    Returns:
        An Explanation, whose `rows` are the data and whose `str` is a table.

    Raises:
        TypeError: the optimizer is not one of this package's.
        KeyError, RuntimeError, ValueError: the next step would raise it, too.
    """
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            f"explain() takes an optimizer of fused_opt, not {type(optimizer).__module__}.{type(optimizer).__qualname__}; "
            "make it with fused_opt.Adam, AdamW, RMSprop or SGD"
        )
    the_plan = plan(optimizer, assume_grad=True)
    if any(group.declined for group in the_plan.groups):
        fallback.check(optimizer, the_plan.groups)
    alike: dict[tuple[int, str, str, str, str, tuple[tuple[str, str], ...]], list[int]] = {}
    state_bytes: dict[tuple[int, int], int] = {}
    for number, group in enumerate(the_plan.groups):
        for index, path, isa, reason in _paths(the_plan, group):
            found = list(_states(optimizer, group.group, index))
            state_bytes[number, index] = sum(size for _, _, size in found)
            dtype = _name(group.group["params"][index].dtype)
            alike.setdefault((number, path, isa, reason, dtype, tuple((name, kind) for name, kind, _ in found)), []).append(index)
    the_plan.release()
    rows = []
    for (number, path, isa, reason, dtype, states), indices in alike.items():
        params = optimizer.param_groups[number]["params"]
        elements = sum(params[index].numel() for index in indices)
        rows.append(
            Row(
                group=number,
                indices=tuple(indices),
                path=path,
                isa=isa,
                reason=reason,
                dtype=dtype,
                states=states,
                stages=stages_in_words(optimizer.param_groups[number], params[indices[0]].dtype),
                state_bytes=sum(state_bytes[number, index] for index in indices),
                elements=elements,
            )
        )
    return Explanation(type(optimizer).__name__, tuple(rows))


def _paths(the_plan: Plan, group: GroupPlan) -> Iterator[tuple[int, str, str, str]]:
    """Index, path, instruction set and reason of each parameter."""
    declined = dict(group.declined)
    in_tables = set() if group.batch is None else set(group.batch.table_indices)
    for index, param in enumerate(group.group["params"]):
        if index in declined:
            yield index, "torch", "", declined[index]
        elif index in in_tables:
            yield index, "triton", "", f"on {param.device}, by {_triton()}"
        else:
            yield index, f"cpu-{the_plan.backend.isa}", the_plan.backend.isa, the_plan.backend.why


def _triton() -> str:
    import triton

    from fused_opt.kernels.launch import launcher

    return f"Triton {triton.__version__}{' on the CPU' if launcher.takes_cpu else ''}"


def _states(optimizer: FusedStep, group: Group, index: int) -> Iterator[tuple[str, str, int]]:
    """Name, kind and bytes of each."""
    param = group["params"][index]
    existing = optimizer.state.get(param, {})
    yield from _rule_states(optimizer, group, index, existing)
    for name, dtype in stage_dtypes(group, param).items():
        state = existing.get(name)
        if state is not None or name != MASK_STATE:
            found = dtype if state is None else state.dtype
            yield name, _name(found), param.numel() * found.itemsize


def _rule_states(optimizer: FusedStep, group: Group, index: int, existing: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    param = group["params"][index]
    for slot in optimizer._rule.slots(group):
        state: Any = existing.get(slot)
        if is_codes(state):
            scales = existing[scale_name(slot)]
            size = block_size_of(state.numel(), scales.numel(), group.get("block_size") or BLOCK_SIZE)
            yield slot, f"{_name(state.dtype)}/{size}", state.nbytes + scales.nbytes
        elif isinstance(state, torch.Tensor):
            yield slot, _name(state.dtype), state.numel() * state.itemsize  # nbytes would fail for sparse ones
        else:
            made = format_of_new_states(optimizer._rule, group, index)
            if isinstance(made, Blocks):
                scales_bytes = 4 * scale_count(param.numel(), made.size)
                yield slot, f"{_name(code_dtype(slot))}/{made.size}", param.numel() + scales_bytes
            else:
                yield slot, _name(made), param.numel() * made.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
