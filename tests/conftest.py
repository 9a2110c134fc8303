from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fused_opt.native import native, triton_problem
from helpers import ALL_ISAS, SUPPORTED_ISAS

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]  # run by test_triton_interpreter.py


def pytest_report_header() -> list[str]:
    backend = native()
    missing = sorted(set(ALL_ISAS) - set(SUPPORTED_ISAS))
    return [
        f"torch {torch.__version__}, fused_opt on {backend.isa or 'torch'} ({backend.why}), instruction sets tested: {SUPPORTED_ISAS}",
        *([f"NOT tested, because this CPU lacks them: {missing}"] if missing else []),
    ]


def pytest_sessionstart() -> None:
    if native().module is None:
        pytest.exit(f"the extension must be usable for the tests: {native().why}", returncode=3)


@pytest.fixture
def use_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with an instruction set's name to run on that one until the test ends."""

    def use(name: str) -> None:
        monkeypatch.setenv("FUSED_OPT_CPU_ISA", name)
        native.cache_clear()
        assert native().isa == name

    yield use
    monkeypatch.undo()
    native.cache_clear()


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call it with a backend's name to force that one until the test ends."""

    def use(name: str) -> None:
        monkeypatch.setenv("FUSED_OPT_BACKEND", name)
        native.cache_clear()
        triton_problem.cache_clear()
        assert native().forced == name

    yield use
    monkeypatch.undo()
    native.cache_clear()
    triton_problem.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Call it with a number of threads, which torch and fused_opt use until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def without_the_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Until the test ends there is none."""
    monkeypatch.setenv("FUSED_OPT_BACKEND", "torch")
    native.cache_clear()
    yield
    monkeypatch.undo()
    native.cache_clear()


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of `fused-opt bench`, without packages of others that happen to be installed, which take seconds."""
    from bench_runs import SMALL  # here, since the benchmark has requirements of its own
    from fused_opt.bench import benchmark
    from fused_opt.bench.implementations import implementations, others

    for name in ("QUICK", "FULL", "PEERS"):
        monkeypatch.setattr(benchmark, name, SMALL)
    known = implementations()
    before = dict(known)
    for each in others():
        del known[each.name]
    yield
    known.clear()
    known.update(before)  # in the order that they had


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes most of the time of short trainings."""
    from fused_opt.bench.char_model import Corpus

    windows = Corpus.held_out_windows
    monkeypatch.setattr(Corpus, "held_out_windows", lambda corpus: [part[:10] for part in windows(corpus)])
