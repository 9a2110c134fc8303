"""`fused-opt doctor`: what this installation uses and why, and what is wrong with it. Needs only Python itself."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import textwrap
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fused_opt
from fused_opt.arguments import writable_file
from fused_opt.native import native

HELP = "show what this installation uses and why, and what is wrong with it"

OPTIMIZERS: dict[str, dict[str, Any]] = {"Adam": {}, "AdamW": {}, "RMSprop": {}, "SGD": {"momentum": 0.9}}

# The smoke step's parameter: two shares of work and a tail, so that threads and the ends of vectors are tried too.
ELEMENTS = 20_001
STEPS = 3

# Room for the longest label.
LABEL_WIDTH = 20


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it."""

    what: str
    remedy: str


@dataclass
class Report:
    """What has been found. Sections map labels to values that JSON knows."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append(Problem(what, remedy))

    def __str__(self) -> str:
        lines = []
        for title, entries in self.sections.items():
            lines += [title, *(f"  {label:{LABEL_WIDTH}}{_text(value)}" for label, value in entries.items()), ""]
        if not self.problems:
            return "\n".join([*lines, "No problem found."])
        lines.append("1 problem:" if len(self.problems) == 1 else f"{len(self.problems)} problems:")
        for number, problem in enumerate(self.problems, start=1):
            for start, text in ((f"  {number}. ", problem.what), ("     Remedy: ", problem.remedy)):
                lines.append(textwrap.fill(text, 110, initial_indent=start, subsequent_indent=" " * 5))
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write everything found to FILE")


def run(args: argparse.Namespace) -> int:
    """Examine, and show what was found.

    Returns:
        The exit status: 0, or 1 if something is wrong.
    """
    report = examine()
    print(report)
    if args.json:
        args.json.write_text(json.dumps({"ok": not report.problems, **asdict(report)}, indent=1) + "\n")
    return 1 if report.problems else 0


def examine() -> Report:
    """Look at everything. Loads torch and the extension into this process where that is possible; raises nothing."""
    report = Report()
    torch = _versions(report)  # torch first: the extension then uses the OpenMP library that torch has loaded
    extension = _extension(report, torch)
    _choice(report, torch, extension)
    _machine(report, torch)
    _openmp(report)
    _gpu(report, torch)
    _optimizers(report, torch)
    return report


def _versions(report: Report) -> Any:
    torch = None
    try:
        with warnings.catch_warnings():  # torch warns where numpy is missing; the table says so too
            warnings.simplefilter("ignore")
            torch = importlib.import_module("torch")
        torch_version = f"{torch.__version__} ({Path(str(torch.__file__)).parent})"
    except Exception as error:  # whatever a broken installation does
        torch_version = f"cannot be imported: {_brief(error)}"
        report.problem(f"torch {torch_version}", "install torch: https://pytorch.org/get-started/locally")
    report.sections["Versions"] = {
        "fused_opt": f"{fused_opt.__version__} ({Path(fused_opt.__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch_version,
        **{name: _installed(name) for name in ("triton", "numpy", "rich", "matplotlib")},
    }
    return torch


def _extension(report: Report, torch: Any) -> Any:
    """The extension module, or None. Loaded here also where FUSED_OPT_BACKEND leaves it out."""
    section = report.sections["Extension fused_opt._cpu"] = {}
    try:
        module: Any = importlib.import_module("fused_opt._cpu")
        section["file"] = module.__file__
        section["built with"] = f"compiler version {module.compiler}"
        supported = dict(module.isas())
        section["instruction sets"] = [f"{n} ({'supported' if ok else 'not'} here)" for n, ok in supported.items()]
        section["reads tensors by"] = module.reader() if torch else "not known without torch"
    except Exception as error:  # a broken build may raise anything
        files = [path.name for path in sorted(Path(fused_opt.__file__).parent.glob("_cpu.*"))]
        section["files found"] = files or "none"
        section["cannot be used"] = _brief(error)
        report.problem(
            f"the extension cannot be used, so torch's own step serves everything: {_brief(error)}",
            "get torch to work first; it brings the OpenMP library that the extension needs"
            if torch is None
            else "rebuild it: pip install --force-reinstall --no-deps fused-opt (in a checkout: pip install -e .); "
            "this needs a C++17 compiler with OpenMP",
        )
        return None
    return module


def _choice(report: Report, torch: Any, extension: Any) -> None:
    section: dict[str, Any] = {name: os.environ.get(name, "") or "not set" for name in ("FUSED_OPT_BACKEND", "FUSED_OPT_CPU_ISA")}
    report.sections["Choice"] = section
    try:
        chosen = native()
    except Exception as error:  # ValueError and RuntimeError by contract; this command must not fail on another either
        section["uses"] = "nothing: every step fails"
        what, _, remedy = str(error).partition("; ")
        report.problem(what, remedy or "unset the environment variable")
        return
    section["uses"] = f"cpu-{chosen.isa}" if chosen.module else "torch's own step"
    section["why"] = chosen.why
    if chosen.module is None and extension and torch and os.environ.get("FUSED_OPT_BACKEND") != "torch":
        report.problem(chosen.why, "report this: the extension can be loaded, but fused_opt does not use it")


def _machine(report: Report, torch: Any) -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.sections["Machine"] = {
        "CPU": _cpu_model(),
        "cores": f"{os.cpu_count()}, of which this process may use {usable}",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads)" if torch else "not known without torch",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "") or "not set",
        "system": platform.platform(),
    }


def _openmp(report: Report) -> None:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        report.sections["OpenMP libraries in this process"] = {"files": "not known: this system has no /proc/self/maps"}
        return
    found = sorted(set(re.findall(r"/\S*/lib(?:gomp|omp|iomp)\d?[-.]\S*", maps)))
    report.sections["OpenMP libraries in this process"] = {"files": found or "none"}
    if len(found) > 1:
        report.problem(
            f"{len(found)} OpenMP libraries are loaded, each with threads of its own: {', '.join(found)}",
            "steps are correct, but the threads of one may disturb the other's; import torch before the package that brings "
            "the one that is not torch's, and set LD_PRELOAD to torch's if that does not help",
        )


def _gpu(report: Report, torch: Any) -> None:
    section = report.sections["GPU"] = {"kernels": "none in this version: torch's own step serves GPU parameters"}
    if torch is None:
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
        section["torch built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        if not torch.version.cuda and not torch.version.hip:
            section["torch built for"] = "CPU only"
        section["devices"] = names or ", ".join(["none", *(str(warning.message).splitlines()[0] for warning in caught)])
    except Exception as error:  # a driver may fail in any way; nothing here depends on it
        section["devices"] = f"not known: {_brief(error)}"


def _optimizers(report: Report, torch: Any) -> None:
    section = report.sections["fp32 parameters on the CPU"] = {}
    for name, options in OPTIMIZERS.items() if torch else ():
        try:
            section[name] = _try_optimizer(report, torch, name, options)
        except Exception as error:  # the point of trying
            section[name] = f"fails: {_brief(error)}"
            if "FUSED_OPT_" not in str(error):  # else it is listed already
                report.problem(f"{name}'s step fails: {_brief(error)}", "report this, with all of this output")
    if not section:
        section["not tried"] = "torch cannot be imported"


def _try_optimizer(report: Report, torch: Any, name: str, options: dict[str, Any]) -> str:
    """Take some steps, compare them with those of torch's for-loop, and say who made them."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(ELEMENTS, generator=generator, dtype=torch.float32) for _ in range(1 + STEPS))
    results = []
    for module, how in ((fused_opt, {}), (torch.optim, {"foreach": False})):
        param = torch.nn.Parameter(start.clone())
        optimizer = getattr(module, name)([param], lr=0.1, **options, **how)
        if module is fused_opt:
            (row,) = fused_opt.explain(optimizer).rows
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        results.append({"parameter": param.detach(), **optimizer.state[param]})

    if row.path == "torch" and native().module is not None:
        report.problem(f"{name}: the extension does not serve a plain fp32 parameter: {row.reason}", "report this")
    ours, theirs = results
    for key, value in theirs.items():
        try:
            torch.testing.assert_close(ours.get(key), value)
        except AssertionError as error:
            difference = " ".join(str(error).split())
            report.problem(
                f"{name}, {key} after {STEPS} steps by {row.path}: not what torch's for-loop computes: {difference}",
                "train with FUSED_OPT_BACKEND=torch, and report this with the output of `fused-opt parity`",
            )
            return f"{row.path} ({row.reason}); WRONG: {key} differs from torch's"
    return f"{row.path} ({row.reason}); {STEPS} steps agree with torch's for-loop"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _installed(package: str) -> str:
    """The version as installed, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _text(value: Any) -> str:
    return ("\n" + " " * (LABEL_WIDTH + 2)).join(map(str, value)) if isinstance(value, list) else str(value)
