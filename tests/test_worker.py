"""Processes for code that may fail: whatever happens there is an error here, in a line, and nothing is left."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import worker_programs as programs
from fused_opt.bench.worker import Worker, WorkerError


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One that has been interrupted while it started."""
    with Worker(threads=1, limit=100) as worker:
        interrupt(worker)
        yield worker


def interrupt(worker: Worker) -> None:
    assert worker._process.pid
    os.kill(worker._process.pid, signal.SIGINT)


def test_sessions_last_whatever_is_raised(worker: Worker) -> None:
    assert worker.call(programs.count) == 1
    with pytest.raises(WorkerError, match=r"^ValueError: 3 is too many$"):
        worker.call(programs.fail, ValueError("3 is\n  too many"))
    with pytest.raises(WorkerError, match=r"^AssertionError$"):
        worker.call(programs.fail, AssertionError())
    interrupt(worker)
    assert worker.call(programs.echo, [1, {"a": None}]) == [1, {"a": None}]
    worker.call(programs.warn)  # warnings are errors in tests, not there
    assert worker.call(programs.count) == 2


def test_what_cannot_be_sent(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        worker.call(programs.echo, lambda: None)
    with pytest.raises(WorkerError, match=r"give_what_cannot_be_sent.*lambda"):
        worker.call(programs.give_what_cannot_be_sent)
    only_here = types.ModuleType("only_here")
    exec("def function(session): pass", only_here.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with pytest.raises(WorkerError, match=r"^ModuleNotFoundError: No module named 'only_here'$"):
        worker.call(only_here.function)
    assert worker.call(programs.echo, 5) == 5


def test_number_of_threads(worker: Worker) -> None:
    assert worker.call(programs.threads) == (1, "1")


def test_deaths_are_told_and_output_kept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as stack:
        crashing, leaving, late = (stack.enter_context(Worker(1, limit)) for limit in (100, 100, 0.1))
        with pytest.raises(WorkerError, match=r"^took longer than 0.1 s$"):
            late.call(programs.echo, 0)
        _, other = crashing.call(programs.start_another)
        with pytest.raises(WorkerError, match=r"^crashed: SIGSEGV \(the last line\)$"):
            crashing.call(programs.crash)
        with pytest.raises(WorkerError, match=r"^ended with exit status 3 \(no licence\)$"):
            leaving.call(programs.leave)
        for worker, why in ((late, "SIGKILL"), (crashing, "SIGSEGV"), (leaving, "exit status 3")):
            with pytest.raises(WorkerError, match=why):
                worker.call(programs.echo, 0)
            assert not worker._process.is_alive()
        assert ends(other)
        assert len(list(tmp_path.iterdir())) == 3
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("busy", [False, True])
def test_nothing_is_left_after_closing(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_opt.bench.worker.GRACE", 0.1 if busy else 20)
    with Worker(threads=1, limit=100) as worker:
        own, other = worker.call(programs.start_another)
        assert runs(own)
        assert runs(other)
        process = worker._process
        if busy:
            worker._connection.send_bytes(pickle.dumps((programs.fall_asleep, ())))
    assert process not in multiprocessing.active_children()
    assert not runs(own)
    assert ends(other)
    worker.close()  # again: nothing happens


def ends(number: int) -> bool:
    """Whether a process that was killed has ended in 10 seconds: it is nobody's child here, whose end could be waited for."""
    until = time.monotonic() + 10
    while runs(number) and time.monotonic() < until:
        time.sleep(0.01)
    return not runs(number)


def runs(number: int) -> bool:
    """Whether there is such a process, which has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
