"""Timing that survives a noisy machine: what is compared runs in turn, and comparisons are made within a round."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """The median of some measurements and their first and third quartile, in the measurements' unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises statistics.StatisticsError if there are no values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Estimate:
    """The median of some measurements and the limits of its 95 % confidence interval.

    The interval is the one of order statistics, which assumes no distribution, but that rounds are independent of each other. With fewer
    than 6 values no interval is that sure: then it is from the least to the largest, and sure to 1 - 2 / 2^n (94 % with 5 values).
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Raises statistics.StatisticsError if there are no values."""
        in_order = sorted(values)
        median, (low, high) = statistics.median(in_order), _ranks(len(in_order))
        return cls(median, in_order[low], in_order[high])


@functools.cache
def _ranks(count: int) -> tuple[int, int]:
    """Of the interval's limits among so many values in order: they depend on nothing else, and take 9 ms to find."""
    from scipy import stats  # 0.8 s to import, which who only samples need not wait for

    interval = stats.quantile_test(range(count), q=count / 2, p=0.5).confidence_interval(0.95)
    return (int(interval.low), int(interval.high)) if math.isfinite(interval.low) else (0, count - 1)


# On a busy machine steps of some implementations take a hundred times as long: a quick run took ten minutes instead of one.
PATIENCE = 10.0


@dataclass(frozen=True)
class Effort:
    """When to stop: after `budget` seconds, but not before `least` and not after `most` rounds.

    Unless rounds take so long that `least` of them would take more than `PATIENCE` budgets: then after 3.
    """

    budget: float
    least: int
    most: int


# Makes so many calls in a row; returns the seconds that they took.
Sampler = Callable[[int], float]


def samplers(calls: Mapping[str, Callable[[], object]], lead_in: float | None = None) -> dict[str, Sampler]:
    """For what is called in this process.

    Args:
        calls: name -> what to call.
        lead_in: untimed calls precede those that are timed, one or as many as take so many seconds; None: no call. For what fits into
            caches: otherwise what is called once a sample finds there what another one left, and what is called often does not.
    """

    def sample(call: Callable[[], object], repeats: int) -> float:
        if lead_in is not None:
            start = time.perf_counter()
            call()
            while time.perf_counter() < start + lead_in:
                call()
        return _time(call, repeats)

    return {name: functools.partial(sample, call) for name, call in calls.items()}


def interleave(
    samplers: Mapping[str, Sampler],
    effort: Effort,
    *,
    min_sample: float = 1e-3,
    on_round: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Take a sample of everything once a round.

    The order rotates from round to round, and after each whole turn its direction changes, so that nobody always follows the
    same neighbour. A sample is as many calls in a row as take `min_sample` seconds or more, found by trial before the
    first round; that also warms up. The garbage collector is off meanwhile.

    Args:
        samplers: name -> what to time.
        effort: how many rounds.
        min_sample: seconds; below that the clock and the caller's own overhead would be measured too.
        on_round: called after each round, outside of any sample, with the share of the work that is done (0 to 1).

    Returns:
        name -> seconds a call, one value for each round. Values at the same index were taken in the same round.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    with no_garbage_collection():
        repeats = {name: _repeats(sample, min_sample) for name, sample in samplers.items()}
        start = time.perf_counter()
        for n in range(effort.most):
            for name in order(list(samplers), n):
                samples[name].append(samplers[name](repeats[name]) / repeats[name])
            elapsed, rounds = (time.perf_counter() - start) / effort.budget, n + 1
            done = max(rounds / effort.most, min(elapsed, rounds / effort.least), min(elapsed / PATIENCE, rounds / 3))
            on_round(min(done, 1.0))
            if done >= 1:
                break
    return samples


def paired_ratios(others: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as long others took, round by round."""
    return [other / own for other, own in zip(others, ours, strict=True)]


class Streaming:
    """How fast this machine reads, changes and writes arrays far larger than its caches: the limit of any large step.

    Two kernels of torch, timed by `interleave` beside what is measured against them: `a += b`, which moves 12 bytes an
    element, and `a *= c`, which moves 8. Counted are reads and writes; there is no hidden read for ownership, because
    every line that is written has just been read. An optimizer step's traffic is of that kind: it reads all that it
    writes, and one array more (the gradient).

    Args:
        elements: of each of the two fp32 arrays; the default makes them 256 MiB each.
    """

    ADD, MULTIPLY = "stream: a += b", "stream: a *= c"

    def __init__(self, elements: int = 2**26) -> None:
        self.elements = elements
        # Not zeros: memory that was never written is one page of zeros, read from the cache.
        self._a, self._b = torch.ones(elements), torch.ones(elements)

    def kernels(self) -> dict[str, Callable[[], object]]:
        """What to time, by name."""
        return {self.ADD: lambda: self._a.add_(self._b), self.MULTIPLY: lambda: self._a.mul_(1.0)}

    def limits(self, samples: Mapping[str, Sequence[float]]) -> list[float]:
        """The larger throughput of the two kernels in each round, in GB/s (1e9 bytes a second)."""
        rounds = zip(samples[self.ADD], samples[self.MULTIPLY], strict=True)
        return [self.elements * max(12 / add, 8 / multiply) / 1e9 for add, multiply in rounds]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this context torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within this context none runs beside what is timed."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def order(names: list[str], n: int) -> list[str]:
    """In which order round n takes them: see `interleave`."""
    first = n % len(names)
    rotated = names[first:] + names[:first]
    return rotated[::-1] if n // len(names) % 2 else rotated


def _repeats(sample: Sampler, min_sample: float) -> int:
    repeats = 1
    while min(sample(repeats), sample(repeats)) < min_sample:  # twice, for the first may have been interrupted
        repeats *= 2
    return repeats


def _time(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        step()
    return (time.perf_counter_ns() - start) / 1e9
