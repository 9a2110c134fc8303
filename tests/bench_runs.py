"""Short runs of `fused-opt bench`, and what they measured."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from fused_opt import cli
from fused_opt.bench import measure, speed_blocks
from fused_opt.bench.implementations import Implementation, implementations
from fused_opt.bench.measure import Effort
from fused_opt.bench.speed_blocks import measure_blocks
from fused_opt.bench.suite import Results

BLOCK = 256
SMALL = Effort(budget=0.05, least=2, most=6)
ADAMW = ("rl", "--optimizer", "adamw")


def bench(tmp_path: Path, *arguments: str, status: int = 0) -> Results:
    """What the command measured."""
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *arguments, "--json", str(file)]) == status
    return Results.read(file)


def rows(results: Results) -> list[dict[str, Any]]:
    return list(results.part("speed").values())


def plant(monkeypatch: pytest.MonkeyPatch, *names: str, state: str = "as-torch") -> None:
    for name in names:
        monkeypatch.setitem(implementations(), name, Implementation(name, "pytest", {"AdamW": f"planted_peers:{name}"}, state=state))


def small_blocks(with_peers: bool = False, elements: int = 2**16 + 100) -> speed_blocks.Blocks:
    streaming = functools.cache(lambda: measure.Streaming(2**16))
    return measure_blocks(SMALL, streaming, with_peers, lambda share: None, elements)
