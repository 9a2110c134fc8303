"""A process of its own for code that may fail in any way: what goes wrong there is an error here, and ends nothing else.

with Worker(threads=2) as worker:
    worker.call(prepare, "bitsandbytes")     # prepare(session, "bitsandbytes"), there; session is a dict that lasts
    seconds = worker.call(sample, 100)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Threads of OpenMP wait actively for some milliseconds for what comes next. Before somebody else is timed they must sleep.
SETTLE = 0.02

# Seconds to clean up in. Without any, semaphores of multiprocessing are left behind, of which Python warns in the end.
GRACE = 3.0

Session = dict[str, Any]


class WorkerError(Exception):
    """What was called did not return: it raised, crashed or took too long. The message says which, in a line."""


class TimedOutError(WorkerError):
    """It took too long."""


class Worker:
    """A process, started at once. Its output is kept away from ours; the last line of it is told if it crashes.

    Args:
        threads: torch's there, and those of other packages' OpenMP.
        limit: seconds that a call may take.
    """

    def __init__(self, threads: int, limit: float = 300.0) -> None:
        self._limit = limit
        descriptor, self._output = tempfile.mkstemp(prefix="fused-opt-", suffix=".txt")
        os.close(descriptor)
        # Not forked: a fork has none of OpenMP's threads, and torch hangs that waits for them.
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._output, threads), daemon=True)
        with _interrupts_held():
            self._process.start()
        there.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(session, *args)`, there. The function must be a module's; arguments and result are pickled.

        Raises:
            WorkerError: see there. After an exception the process and its session go on; after the rest it is gone.
            pickle.PicklingError, TypeError, AttributeError: the function or an argument cannot be pickled; nothing was called.
        """
        request = pickle.dumps((function, args))
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(self._limit):
                self._kill()
                raise TimedOutError(f"took longer than {self._limit:g} s")
            ok, result = pickle.loads(self._connection.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise WorkerError(self._death()) from None
        if not ok:
            raise WorkerError(result)
        return result

    def close(self) -> None:
        """End the process, and what it has started. It may clean up for `GRACE` seconds, if it is not busy."""
        self._connection.close()
        self._end(GRACE)
        Path(self._output).unlink(missing_ok=True)

    def _end(self, grace: float) -> None:
        """Wait so many seconds for the process to end, then end it, and in any case what it has started."""
        wait([self._process.sentinel], grace)  # not join(), after which its number may be another's
        self._kill()
        self._process.join()

    def _kill(self) -> None:
        number = self._process.pid
        assert number
        with contextlib.suppress(ChildProcessError, ProcessLookupError):  # ended and joined before; no group yet, because it still starts
            os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.killpg(number, signal.SIGKILL)
        self._process.kill()

    def _death(self) -> str:
        self._end(10)
        code = self._process.exitcode or 0
        with contextlib.suppress(ValueError):
            return f"crashed: {signal.Signals(-code).name}{self._last_line()}"
        return f"ended with exit status {code}{self._last_line()}"

    def _last_line(self) -> str:
        lines = Path(self._output).read_text(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def ready(session: Session) -> None:
    """Something to call that returns when the process has started."""


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process that is started within this context is not interrupted before it can say that it does not want to be."""
    resource_tracker.ensure_running()  # starting a process does that, and ends with interrupts let through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, output: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends this process
    os.setsid()  # with a group of its own, so that what it starts, a compiler for example, can be ended with it
    _write_to(output)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for packages that bring another OpenMP than torch's
    import torch

    torch.set_num_threads(threads)
    session: Session = {}
    with warnings.catch_warnings():  # other packages' own affair
        warnings.simplefilter("ignore")
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_answer(session, request))


def _write_to(output: str) -> None:
    """Let all that this process prints, from whatever language, go to a file, line by line."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)


def _answer(session: Session, request: bytes) -> bytes:
    try:
        function, args = pickle.loads(request)
        return pickle.dumps((True, function(session, *args)))
    except Exception as error:  # whatever another package does
        text = " ".join(str(error).split())[:300]
        return pickle.dumps((False, f"{type(error).__name__}: {text}" if text else type(error).__name__))
