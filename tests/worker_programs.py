"""What tests let worker processes run: functions that pickle finds in a module that both sides can import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch

Session = dict[str, Any]


def echo(session: Session, value: Any) -> Any:
    return value


def count(session: Session) -> int:
    session["calls"] = session.get("calls", 0) + 1
    return int(session["calls"])


def fail(session: Session, error: Exception) -> None:
    raise error


def warn(session: Session) -> None:
    warnings.warn("a warning", UserWarning, stacklevel=1)


def give_what_cannot_be_sent(session: Session) -> Any:
    return lambda: None


def threads(session: Session) -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def start_another(session: Session) -> tuple[int, int]:
    """Returns the numbers of this process and of one that it started."""
    session["other"] = subprocess.Popen(["sleep", "600"])
    return os.getpid(), session["other"].pid


def fall_asleep(session: Session) -> None:
    time.sleep(600)


def crash(session: Session) -> None:
    print("a line")
    os.write(2, b"the last line\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(session: Session) -> None:
    os.write(1, b"a line\n")
    print("no licence")
    sys.exit(3)


class Crashes(torch.optim.AdamW):
    """In its second step."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().step(closure)


class Lazy(torch.optim.AdamW):
    """Its steps do nothing."""

    def step(self, closure: Any = None) -> Any:
        return None


def refuse(params: Iterable[torch.Tensor], **options: Any) -> None:
    """Instead of a class of optimizers."""
    raise ImportError("needs a GPU")
