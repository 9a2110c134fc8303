"""`fused-opt`: finds the command's module, which is imported only then, and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import fused_opt
from fused_opt.arguments import CannotRunError

# Command -> its module and its line in the help, which is here because the help must also work, and at once, where the
# module's own imports fail. The command's own help begins with the module's HELP.
COMMANDS = {
    "bench": ("fused_opt.bench.benchmark", "how fast, how exact, how small: steps and trainings, against torch and other packages"),
    "parity": ("fused_opt.bench.parity", "how exact: compares the bits of each option with torch's"),
    "gpu-check": ("fused_opt.bench.gpu_check", "on a GPU: parity, options, speed, in one file to send back"),
    "doctor": ("fused_opt.doctor", "what this installation uses and why, and what is wrong"),
    "demo": ("fused_opt.bench.demo", "trains a small transformer with torch's AdamW and with ours"),
    "quality": ("fused_opt.bench.quality", "what 8-bit states do to trained models, beside what other seeds do"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's).

    Returns:
        The command's exit status; 2 if it cannot run as asked, 130 if interrupted.

    Raises:
        SystemExit: help or version was asked for (0), or an argument is wrong (2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # No option before the command takes a value, so the first word is the command.
    chosen = next((word for word in argv if not word.startswith("-")), "")
    parser = argparse.ArgumentParser(prog="fused-opt", description=fused_opt.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {fused_opt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    module: Any = None
    for name, (module_name, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line)
        if name == chosen:
            try:
                module = importlib.import_module(module_name)
            except (ImportError, OSError) as error:  # OSError: a shared library that the loader refuses
                return _refuse(name, _why_no_import(error))
            command.description = module.HELP
            module.add_arguments(command)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_help(sys.stderr)
        return 2
    if chosen != "doctor" and (problem := _environment_problem()):
        return _refuse(chosen, problem)
    try:
        return int(module.run(args))
    except CannotRunError as why:
        return _refuse(chosen, str(why))
    except KeyboardInterrupt:
        return 130


def _refuse(command: str, why: str) -> int:
    print(f"fused-opt {command}: {why}", file=sys.stderr)
    return 2


def _why_no_import(error: ImportError | OSError) -> str:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package != "fused_opt":
        return f"the package {package} is not installed; install it with: pip install 'fused-opt[bench]'"
    return f"cannot start: {type(error).__name__}: {error}; `fused-opt doctor` says what is wrong with the installation"


def _environment_problem() -> str:
    from fused_opt.native import native

    try:
        native()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
