"""How long a step of the Triton backend keeps the host busy, without a GPU: `python -m fused_opt.bench.host_time`.

Triton's driver is replaced by one that does nothing, and tensors are in the CPU's memory. So what is left out is the driver's part of a
launch, and of copying scalars.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fused_opt
from fused_opt.native import native, triton_problem

STEPS = 300
TENSORS = (148, 1000)  # as GPT-2 small has, and many
CONFIGURATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("AdamW", "AdamW", {}),
    ("AdamW, capturable", "AdamW", {"capturable": True}),
    ("SGD, momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    ("RMSprop", "RMSprop", {}),
    ("AdamW8bit", "AdamW8bit", {"min_8bit_size": 0}),
)


def measure() -> Iterator[tuple[str, int, float, float, Any]]:
    """Configuration, number of tensors, median and least microseconds a step, and what the last step launched."""
    for label, name, options in CONFIGURATIONS:
        for count in TENSORS:
            params = [torch.nn.Parameter(torch.ones(64)) for _ in range(count)]
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer = getattr(fused_opt, name)(params, **options)
            times = []
            for _ in range(STEPS):
                start = time.perf_counter()
                optimizer.step()
                times.append(1e6 * (time.perf_counter() - start))
            steady = times[STEPS // 10 :]
            yield label, count, statistics.median(steady), min(steady), optimizer._last_launched


def main() -> None:
    """Print the table."""
    from fused_opt.bench.stand_in_driver import stand_in_driver

    os.environ["FUSED_OPT_BACKEND"] = "triton"

    table = Table(title="Host time of a step by Triton kernels that are not run, microseconds")
    for column in ("optimizer", "tensors", "median", "least", "launches", "uploads"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    with stand_in_driver():
        native.cache_clear()
        triton_problem.cache_clear()
        for label, count, median, least, ran in measure():
            launches = ran.step_launches + ran.scalar_launches
            table.add_row(label, str(count), f"{median:.0f}", f"{least:.0f}", str(launches), str(ran.uploads))
    Console().print(table)


if __name__ == "__main__":
    main()
