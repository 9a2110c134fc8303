"""Runs what is to be measured, unit by unit, and keeps what has been: an interrupted run loses one unit, and can be resumed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fused_opt.arguments import CannotRunError
from fused_opt.bench import machine

# Parts that tell no times.
UNTIMED = ("conformance", "quality")

# What was measured, as JSON has it.
Record = dict[str, Any]

OnShare = Callable[[float], None]  # called with the share of a unit that is done, 0 to 1, outside of anything that is timed


@dataclass(frozen=True)
class Unit:
    """A piece of work that is measured, kept and resumed as a whole.

    Attributes:
        part: of the suite, such as "speed".
        name: unique within the part.
        measure: does it.
        seconds: about how long it takes, for the progress bar.
    """

    part: str
    name: str
    measure: Callable[[OnShare], Record]
    seconds: float = 1.0


@dataclass
class Results:
    """Everything that a run has measured.

    Attributes:
        machine: see `machine.describe`.
        settings: what all units of a run have in common; a run is only resumed with the same ones.
        records: part -> name of a unit -> what it measured.
        loads: part -> name of a unit -> share of the CPU, 0 to 1, that other programs took meanwhile; None where the system does not tell.
        durations: part -> name of a unit -> seconds that it took.
        failures: "part: name" of units that failed -> why. They are tried again when the run is resumed.
        path: the file that holds all this, or None.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    loads: dict[str, dict[str, float | None]] = field(default_factory=dict)
    durations: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def part(self, name: str) -> dict[str, Record]:
        """The records of a part, in the order of measuring; empty if there are none."""
        return self.records.get(name, {})

    @property
    def load_warning(self) -> str:
        """What to say of other programs that ran meanwhile, or "". Of parts without times nothing."""
        busy = [
            (share, name)
            for part, loads in self.loads.items()
            if part not in UNTIMED
            for name, share in loads.items()
            if share is not None and share > machine.TOLERATED_LOAD
        ]
        if not busy:
            return ""
        return (
            f"Do not trust these times: other programs took up to {max(busy)[0]:.0%} of the CPU during {len(busy)} of them "
            f"(first: {busy[0][1]}), and threads that wait for each other suffer from that out of proportion. Run it again on an idle "
            "machine, or with --threads 1."
        )

    def keep(self, unit: Unit, record: Record, load: float | None, seconds: float) -> None:
        """Add what a unit measured, and write the file."""
        self.records.setdefault(unit.part, {})[unit.name] = record
        self.loads.setdefault(unit.part, {})[unit.name] = load
        self.durations.setdefault(unit.part, {})[unit.name] = seconds
        self.write()

    def write(self) -> None:
        """To `path`, if there is one: all of it or, if that fails, nothing."""
        if self.path is None:
            return
        content = json.dumps(_to_json({name: getattr(self, name) for name in _CONTENT}), indent=1, allow_nan=False) + "\n"
        path = self.path.resolve()
        if path.exists() and not path.is_file():  # a device or a pipe
            path.write_text(content)
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote.

        Raises:
            CannotRunError: it is not such a file.
        """
        try:
            content = json.loads(path.read_text())
            return cls(**{name: content[name] for name in _CONTENT}, path=path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise CannotRunError(f"{str(path)!r} has no results of fused-opt bench ({why}); give a file written by --json") from error

    def resume(self, path: Path) -> None:
        """Go on with what an earlier run wrote.

        Raises:
            CannotRunError: it ran elsewhere, or with other settings.
        """
        earlier = Results.read(path)
        for what in ("machine", "settings"):
            now, then = _to_json(getattr(self, what)), getattr(earlier, what)
            if different := [key for key in {**now, **then} if now.get(key) != then.get(key)]:
                key = different[0]
                raise CannotRunError(
                    f"{str(path)!r} cannot be resumed: its {key} is {then.get(key)!r}, now it is {now.get(key)!r}; leave out --resume"
                )
        self.records, self.loads, self.durations = earlier.records, earlier.loads, earlier.durations


_CONTENT = ("machine", "settings", "records", "loads", "durations", "failures")


def run(units: Sequence[Unit], results: Results, console: Console) -> bool:
    """Measure the units that are not in the results yet. Returns False if interrupted; units that fail are told in the results."""
    to_do = [unit for unit in units if unit.name not in results.part(unit.part)]
    with Bar(console, to_do) as bar:
        try:
            for unit in to_do:
                load, start = machine.OtherLoad(), time.monotonic()
                try:
                    record = unit.measure(bar.begin(unit))
                except Exception as error:  # an implementation's, or ours: the others are measured all the same
                    results.failures[f"{unit.part}: {unit.name}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    continue
                results.keep(unit, record, load.share(), time.monotonic() - start)
        except KeyboardInterrupt:
            results.write()
            left = sum(unit.name not in results.part(unit.part) for unit in units)
            resume = f"; go on with: --json {results.path} --resume" if results.path else ""
            console.print(f"Interrupted: {len(units) - left} of {len(units)} are measured{resume}.", markup=False, soft_wrap=True)
            return False
    results.write()  # also if there was nothing to measure, or all failed
    for what, why in results.failures.items():
        console.print(f"{what} failed: {why}", markup=False, soft_wrap=True)
    return True


class Bar:
    """A progress bar over units, on a terminal only.

    It is drawn between samples, ten times a second at the most. The thread that usually draws would take time from what is measured.
    """

    def __init__(self, console: Console, units: Iterable[Unit]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=sum(unit.seconds for unit in units))
        self._drawn = -math.inf
        self._unit: Unit | None = None
        self._done = 0.0

    def begin(self, unit: Unit) -> OnShare:
        """Draw that the last unit is done and this one begins. Returns what is to be called with the share of it that is done."""
        if self._unit:
            self._done += self._unit.seconds
        self._unit = unit
        self._drawn = -math.inf
        self._show(0)
        return self._show

    def _show(self, share: float) -> None:
        if self._unit and time.monotonic() > self._drawn + 0.1:
            done, name = self._done + share * self._unit.seconds, f"{self._unit.part}: {self._unit.name}"
            self._progress.update(self._task, completed=done, description=name, refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def _to_json(value: Any) -> Any:
    """`value` in what JSON has: no infinity, no NaN (None instead), keys that are strings."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
