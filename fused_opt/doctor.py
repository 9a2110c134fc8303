"""`fused-opt doctor`: what this installation uses and why, and what is wrong with it. Needs only Python itself."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fused_opt
from fused_opt.arguments import writable_file
from fused_opt.native import native, triton_problem

HELP = "show what this installation uses and why, and what is wrong with it"

OPTIMIZERS: dict[str, dict[str, Any]] = {"Adam": {}, "AdamW": {}, "RMSprop": {}, "SGD": {"momentum": 0.9}}

# Of the parameter to try the step on: enough for three threads (32,768 each), and a tail that fills no vector.
ELEMENTS = 100_001
STEPS = 3

FP32_SECTION, CODED_SECTION = "fp32 parameters on the CPU", "fp32 parameters with 8-bit states on the CPU"

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

    def section(self, title: str) -> str:
        """A section as text."""
        return "\n".join([title, *(f"  {label:{LABEL_WIDTH}}{_text(v)}" for label, v in self.sections[title].items())])

    def verdict(self) -> str:
        """The problems as text."""
        if not self.problems:
            return "No problem found."
        lines = ["1 problem:" if len(self.problems) == 1 else f"{len(self.problems)} problems:"]
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
    report = Report()
    for title in examine(report):
        print(report.section(title), end="\n\n", flush=True)  # at once: the next thing tried may end the process
    print(report.verdict())
    if args.json:
        args.json.write_text(json.dumps({"ok": not report.problems, **asdict(report)}, indent=1) + "\n")
    return 1 if report.problems else 0


def examine(report: Report) -> Iterator[str]:
    """Look at everything, and yield the title of each section that is complete.

    Loads torch and the extension into this process where that is possible; raises nothing.
    """
    torch = _versions(report)  # torch first: the extension then uses the OpenMP library that torch has loaded
    yield "Versions"
    extension = _extension(report, torch)
    yield "Extension fused_opt._cpu"
    usable = _choice(report, torch, extension)
    yield "Choice"
    _machine(report, torch)
    yield "Machine"
    _openmp(report)
    yield "OpenMP libraries in this process"
    _gpu(report, torch)
    yield "GPU"
    _optimizers(report, torch if usable else None)
    yield FP32_SECTION
    _coded_optimizers(report, torch if usable else None)
    yield CODED_SECTION


def _versions(report: Report) -> Any:
    torch = None
    try:
        with warnings.catch_warnings():  # torch warns where numpy is missing; the table says so too
            warnings.simplefilter("ignore")
            module = importlib.import_module("torch")
        found = f"{module.__version__} ({Path(str(module.__file__)).parent})"
        torch = module
    except Exception as error:  # whatever a broken installation does
        found = f"cannot be imported: {_brief(error)}"
        report.problem(f"torch {found}", "install torch, or install it again: https://pytorch.org/get-started/locally")
    report.sections["Versions"] = {
        "fused_opt": f"{fused_opt.__version__} ({Path(fused_opt.__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": found,
        **{name: _installed(name) for name in ("triton", "numpy", "rich", "matplotlib", "scikit-learn")},
    }
    return torch


def _extension(report: Report, torch: Any) -> Any:
    """The extension module, or None. Loaded here also where FUSED_OPT_BACKEND leaves it out."""
    section = report.sections["Extension fused_opt._cpu"] = {}
    try:
        if name := _deadly("fused_opt._cpu"):
            sys.modules["fused_opt._cpu"] = None  # type: ignore[assignment]  # so that nobody imports it after this
            raise ImportError(f"loading it ends the process with {name}")
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


def _choice(report: Report, torch: Any, extension: Any) -> bool:
    """Returns whether steps are possible."""
    variables = ("FUSED_OPT_BACKEND", "FUSED_OPT_CPU_ISA")
    section = report.sections["Choice"] = {name: os.environ.get(name, "") or "not set" for name in variables}
    try:
        chosen = native()
    except Exception as error:  # ValueError and RuntimeError by contract; this command must not fail on another either
        section["uses"] = "nothing: every step fails"
        what, _, remedy = str(error).rpartition("; ")
        report.problem(what or _brief(error), remedy)
        return False
    if torch is None:
        section["uses"] = "nothing: torch cannot be imported"
        return False
    section["uses"] = f"cpu-{chosen.isa}" if chosen.module else "torch's own step"
    section["why"] = chosen.why
    if chosen.module is None and extension and os.environ.get("FUSED_OPT_BACKEND") != "torch":
        report.problem(chosen.why, "report this: the extension can be loaded, but not used")
    return True


def _machine(report: Report, torch: Any) -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.sections["Machine"] = {
        "CPU": cpu_model(),
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
    section = report.sections["GPU"] = {}
    if torch is None:
        section["devices"] = "not known without torch"
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = torch.cuda.is_available()
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
        cuda, hip = torch.version.cuda, torch.version.hip
        section["torch built for"] = f"CUDA {cuda}" if cuda else f"HIP {hip}" if hip else "CPU only"
        section["devices"] = names or ", ".join(["none", *(str(warning.message).splitlines()[0] for warning in caught)])
    except Exception as error:  # a driver may fail in any way; nothing here depends on it
        section["devices"] = f"not known: {_brief(error)}"
        return
    if not names:
        section["kernels"] = "not tried: they need a GPU"
    elif problem := triton_problem():
        section["kernels"] = f"torch's own step serves parameters on the GPU: {problem}"
        what, _, remedy = problem.rpartition(": ")
        report.problem(f"there is a GPU, but {what}", remedy)
    else:
        section["kernels"] = "Triton's; `fused-opt gpu-check` compares and times them"


def _optimizers(report: Report, torch: Any) -> None:
    _try_all(report, FP32_SECTION, OPTIMIZERS, "" if torch else "no step is possible", lambda name: _try_optimizer(report, torch, name))


def _coded_optimizers(report: Report, torch: Any) -> None:
    why_not = "no step is possible" if torch is None else "" if native().module else f"they need the extension, and {native().why}"
    names = [f"{name}8bit" for name in OPTIMIZERS]
    _try_all(report, CODED_SECTION, names, why_not, lambda name: _try_coded_optimizer(report, torch, name))


def _try_all(report: Report, title: str, names: Iterable[str], why_not: str, attempt: Callable[[str], str]) -> None:
    """A section with what comes of each attempt, unless there is a reason not to make any."""
    section = report.sections[title] = {}
    if why_not:
        section["not tried"] = why_not
        return
    for name in names:
        try:
            section[name] = attempt(name)
        except Exception as error:  # the point of trying
            section[name] = f"fails: {_brief(error)}"
            report.problem(f"{name}'s step fails: {_brief(error)}", "report this, with all of this output")


def _problem_values(torch: Any) -> list[Any]:
    """A parameter's start, and a gradient for each step."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ELEMENTS, generator=generator, dtype=torch.float32) for _ in range(1 + STEPS)]


def _by(row: Any) -> str:
    return f"{row.path} ({row.reason}); states: {row.state_bytes / row.elements:.4g} bytes a value"


def _try_optimizer(report: Report, torch: Any, name: str) -> str:
    """Take some steps, compare them with those of torch's for-loop, and say who made them."""
    start, *grads = _problem_values(torch)
    results = []
    for module, how in ((fused_opt, {}), (torch.optim, {"foreach": False})):
        param = torch.nn.Parameter(start.clone())
        optimizer = getattr(module, name)([param], lr=0.1, **OPTIMIZERS[name], **how)
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
            return f"{_by(row)}; WRONG: {key} differs from torch's"
    return f"{_by(row)}; {STEPS} steps agree with torch's for-loop"


def _try_coded_optimizer(report: Report, torch: Any, name: str) -> str:
    """Take some steps with 8-bit states, compare each with what it must be: dequantize, a step in fp32, quantize; and say who made them."""
    from fused_opt.quantization import encode, step_seeds
    from fused_opt.states import BLOCK_SIZE, code_of, scale_name

    plain_name = name.removesuffix("8bit")
    start, *grads = _problem_values(torch)
    param = torch.nn.Parameter(start)
    optimizer = getattr(fused_opt, name)([param], lr=0.1, **OPTIMIZERS[plain_name])
    (row,) = fused_opt.explain(optimizer).rows
    for step, grad in enumerate(grads, start=1):
        other = torch.nn.Parameter(param.detach().clone())
        reference = getattr(fused_opt, plain_name)([other], lr=0.1, **OPTIMIZERS[plain_name])
        reference.load_state_dict(copy.deepcopy(fused_opt.torch_state_dict(optimizer)))  # loading shares step counters
        param.grad, other.grad = grad, grad
        before = param.detach().clone()
        optimizer.step()
        reference.step()
        seeds = step_seeds(before, {slot: reference.state[other][slot] for slot, _ in row.states}, BLOCK_SIZE)
        pairs = {"parameter": (param.detach(), other.detach())}
        for slot, _ in row.states:
            codes, scales = (optimizer.state[param][name] for name in (slot, scale_name(slot)))
            expected = torch.empty_like(codes), torch.empty_like(scales)
            encode(reference.state[other][slot], *expected, code_of(slot), BLOCK_SIZE, seeds)
            pairs |= {slot: (codes, expected[0]), scale_name(slot): (scales, expected[1])}
        for key, (ours, right) in pairs.items():
            if not torch.equal(ours, right):
                report.problem(
                    f"{name}, {key} in step {step} by {row.path}: not what dequantizing, a step in fp32 and quantizing give",
                    "train with states in fp32, and report this with all of this output",
                )
                return f"{_by(row)}; WRONG: {key} in step {step}"
    return f"{_by(row)}; {STEPS} steps are dequantize, fp32 step, quantize"


def cpu_model() -> str:
    """The CPU's name as the system gives it, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _installed(package: str) -> str:
    """The version as installed, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _deadly(module: str) -> str:
    """The signal that ends a process which imports `module` (a truncated file or a wrong CPU do that), or ""."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = [sys.executable, "-c", f"import {module}"]
    status = subprocess.run(child, env=environment, capture_output=True, check=False).returncode
    return signal.Signals(-status).name if status < 0 else ""


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _text(value: Any) -> str:
    lines = [" ".join(str(line).split()) for line in (value if isinstance(value, list) else [value])]
    return ("\n" + " " * (LABEL_WIDTH + 2)).join(lines)
