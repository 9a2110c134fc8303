"""Steps for `pytest bench/ --benchmark-only`: what pytest-benchmark times, groups by workload, saves and compares with earlier runs.

    pytest bench/ --benchmark-only --benchmark-autosave
    pytest bench/ --benchmark-only -k test_step --benchmark-compare --benchmark-compare-fail=median:15%

Times of two runs differ by what else the machine did; so `test_no_slower_than_torch` times torch beside ours in the same rounds, and is the
check that another machine, or another day, does not fail; its own time is that of measuring. These are benchmarks: no test of the product
hangs on them.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fused_opt.bench.contestants import Here, Tensors
from fused_opt.bench.implementations import implementations
from fused_opt.bench.layouts import LAYOUTS
from fused_opt.bench.measure import Effort
from fused_opt.bench.speed_measure import Shared, measure_row
from fused_opt.bench.speed_plan import CONFIGURATIONS, QUICK_CONFIGURATIONS, jobs
from fused_opt.bench.speed_row import IN_TORCH, Row
from fused_opt.bench.stability import TOLERATED
from fused_opt.bench.workloads import WORKLOADS

# The larger ones take seconds to set up: pytest bench/ --benchmark-only -m slow
TIMED = [
    *("rl", "tiny", "single", "mlp", "lora", "resnet50"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "large")),
]
OURS = ("ours", "ours bf16", "ours 8-bit")
EFFORT = Effort(budget=1.0, least=8, most=100)


@pytest.mark.parametrize(
    ("configuration", "name"),
    [
        (configuration, name)
        for configuration in QUICK_CONFIGURATIONS
        for name in (*OURS, *IN_TORCH)
        if implementations()[name].offers(CONFIGURATIONS[configuration])
    ],
)
@pytest.mark.parametrize("workload", TIMED)
def test_step(benchmark: BenchmarkFixture, workload: str, configuration: str, name: str) -> None:
    """A step of each implementation."""
    case, implementation = CONFIGURATIONS[configuration], implementations()[name]
    tensors = Tensors.random(WORKLOADS[workload], "float32")
    contestant = Here(lambda params: implementation.make(case, params), tensors.params, tensors.grads, LAYOUTS["contiguous"])
    contestant.step()  # makes the states
    benchmark.group = f"{workload} {configuration}"
    benchmark.extra_info |= {"implementation": name, "elements": tensors.workload.elements}
    benchmark(contestant.optimizer.step)


@pytest.mark.parametrize("configuration", QUICK_CONFIGURATIONS)
@pytest.mark.parametrize("workload", TIMED)
def test_no_slower_than_torch(benchmark: BenchmarkFixture, workload: str, configuration: str) -> None:
    """Ours beside torch's fastest right implementation: it fails if all of the confidence interval lies below 1 / 1.15."""
    (job,) = jobs([workload], ["float32"], ["contiguous"], [configuration])
    benchmark.group = "speed-ups, measured in pairs"
    row = benchmark.pedantic(measure_row, args=(job, EFFORT, True, IN_TORCH, Shared(), lambda share: None), rounds=1, iterations=1)
    assert isinstance(row, Row), row.reason
    assert "ours" not in row.wrong
    ratio = row.speed_ups[row.fastest]
    benchmark.extra_info |= {"over": row.fastest, "speed_up": ratio.median, "low": ratio.low, "high": ratio.high}
    assert ratio.high > 1 / (1 + TOLERATED), f"{ratio.low:.2f} to {ratio.high:.2f} times as fast as torch's {row.fastest}"
