"""Threads, forks, workers and process groups: the bits are those of one process alone, and nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fused_opt
from helpers import CLASSES, assert_same_state, make_problem
from pairs import make, step_with

PROGRAMS = Path(__file__).with_name("process_programs.py")
HANGS_AFTER = 120  # seconds; the slowest takes 10 on a busy machine


@pytest.mark.parametrize("program", ["fork", "distributed", pytest.param("shared_memory", marks=pytest.mark.slow)])
def test_in_a_process_of_its_own(program: str) -> None:
    command = [sys.executable, str(PROGRAMS), program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("elements", [50, 300_000])
def test_optimizers_in_several_threads_at_once(elements: int) -> None:
    """Each thread makes its own and steps it; small ones by the hundred, large ones on all threads of the machine."""
    steps = 50 if elements < 1000 else 4
    values, grads = make_problem([(elements,), (17,)], 4, torch.float32)
    start, results, errors = threading.Barrier(len(CLASSES) * 2), {}, []

    def work(number: int, name: str) -> None:
        try:
            optimizer = make(fused_opt, name, values)
            start.wait()
            for step in range(steps):
                step_with(optimizer, grads[step % 4])
            results[number] = name, optimizer
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(number, name)) for number, name in enumerate(CLASSES * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    alone = {name: make(fused_opt, name, values) for name in CLASSES}
    for optimizer in alone.values():
        for step in range(steps):
            step_with(optimizer, grads[step % 4])
    assert len(results) == len(threads)
    for name, optimizer in results.values():
        assert_same_state(optimizer, alone[name])


def test_one_optimizer_handed_from_thread_to_thread() -> None:
    values, grads = make_problem([(1000,), (17,)], 6, torch.float32)
    optimizer, expected = (make(fused_opt, "Adam", values) for _ in range(2))
    for step_grads in grads:
        thread = threading.Thread(target=step_with, args=(optimizer, step_grads))
        thread.start()
        thread.join()
        step_with(expected, step_grads)
    assert_same_state(optimizer, expected)
