"""Runs tests/interpreted in a process of its own: Triton either interprets or compiles, as the environment says when it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted")


def run_interpreted(*arguments: str) -> tuple[int, str]:
    """The number of tests that passed, and what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=INTERPRETED.parents[1], capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, output
    return int(passed[1]), output


def test_steps_of_the_interpreter() -> None:
    assert run_interpreted()[0] >= 18, "every optimizer, every format, stages"


@pytest.mark.slow
def test_all_steps_of_the_interpreter() -> None:
    assert run_interpreted("-m", "slow or not slow")[0] >= 350, "the case table in all formats, every stage"
