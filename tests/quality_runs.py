"""Short runs of `fused-opt quality`, and what they measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_opt import cli
from fused_opt.bench import quality_units
from fused_opt.bench.quality_tasks import diabetes, digits
from fused_opt.bench.quality_units import FORMATS, Combination, units
from fused_opt.bench.quality_weights import Format

BLOCK = 256


SMALL = {"digits": digits, "diabetes": diabetes}


def measure(combination: Combination, seeds: int = 1, steps: int = 2, compared: Sequence[Format] = FORMATS) -> dict[str, dict[str, Any]]:
    return {unit.name: unit.measure(lambda share: None) for unit in units([combination], seeds, steps, compared)}


def measure_one(combination: Combination, steps: int = 2, compared: Sequence[Format] = FORMATS) -> dict[str, Any]:
    (record,) = measure(combination, steps=steps, compared=compared).values()
    return record


def command(*arguments: str, file: Path | None = None, status: int = 0) -> dict[str, Any]:
    """The records that it wrote."""
    assert cli.main(["quality", *arguments, *(["--json", str(file)] if file else [])]) == status
    return json.loads(file.read_text())["records"][quality_units.PART] if file and file.exists() else {}
