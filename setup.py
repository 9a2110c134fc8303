"""Builds fused_opt._cpu with ninja: every file on its own, the kernels once per instruction set under that set's flags.

`python setup.py build_ext --inplace` rebuilds only what changed. FUSED_OPT_SANITIZE=address,undefined (or thread) builds with the
compiler's sanitizers, in a folder of its own; see tests/sanitized.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

SANITIZE = os.environ.get("FUSED_OPT_SANITIZE", "")
# -Og -g1: sanitized code of pybind11's headers takes gcc 12 twice as long with -O1 -g; with -O0 tests take half as long again.
SPEED_FLAGS = ["-Og", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else ["-O3"]
# Of what runs once a tensor or a step, and of the kernels for x86 CPUs before 2013, whose fma is a call: 0.08 MB of the wheel.
SMALL_FLAGS = [] if SANITIZE else ["-O2"]
# Nothing is thrown in kernels, and they call nobody: without tables for unwinding them the wheel has 0.03 MB less.
KERNEL_ONLY_FLAGS = [] if SANITIZE else ["-fno-exceptions", "-fno-asynchronous-unwind-tables"]
LINK_FLAGS = ["-shared", "-fopenmp", f"-fsanitize={SANITIZE}" if SANITIZE else "-s"]
COMMON_FLAGS = ["-std=c++17", *SPEED_FLAGS, "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
if os.environ.get("FUSED_OPT_WERROR"):  # for CI: a user's newer compiler may know more warnings
    COMMON_FLAGS.append("-Werror")
# Name -> flags: "all", and a line for each instruction set. See the file.
KERNEL_FLAGS = {
    name: flags.split()
    for name, _, flags in (line.partition(":") for line in (CSRC / "kernels" / "flags.txt").read_text().splitlines() if line[0] != "#")
}
ISAS = ["scalar", "avx2", "avx512"] if platform.machine().lower() in ("x86_64", "amd64") else ["scalar"]


def write_ninja(build_dir: Path) -> None:
    """Write build_dir/build.ninja, whose default target is build_dir/_cpu.so, the extension."""
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"
    with (build_dir / "build.ninja").open("w") as file:
        ninja_file = Writer(file, width=120)
        ninja_file.variable("cxx", compiler)
        ninja_file.rule(
            "compile",
            command="$cxx -MMD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        ninja_file.rule("link", command=f"$cxx {' '.join(LINK_FLAGS)} $in -o $out", description="link $out")
        objects = []
        for source in sorted([*CSRC.glob("*.cpp"), *([ROOT / "tests" / "sanitized" / "fault.cpp"] if SANITIZE else [])]):
            target = f"{source.stem}.o"
            objects += ninja_file.build(target, "compile", str(source), variables={"flags": [*COMMON_FLAGS, *SMALL_FLAGS, *includes]})
        for isa in ISAS:
            flags = [*COMMON_FLAGS, *KERNEL_ONLY_FLAGS, *KERNEL_FLAGS["all"], *KERNEL_FLAGS[isa], f"-DFUSED_OPT_ISA={isa}"]
            if isa == "scalar" and len(ISAS) > 1:
                flags += SMALL_FLAGS
            for source in sorted((CSRC / "kernels").glob("*.cpp")):
                target = f"{source.stem}.{isa}.o"
                objects += ninja_file.build(target, "compile", str(source), variables={"flags": flags})
        ninja_file.default(ninja_file.build("_cpu.so", "link", objects))


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Not self.build_temp: that is a new folder for every editable install, and nothing would be incremental.
        name = "-".join([sysconfig.get_platform(), sys.implementation.cache_tag, *filter(None, SANITIZE.split(","))])
        build_dir = ROOT / "build" / name
        build_dir.mkdir(parents=True, exist_ok=True)
        write_ninja(build_dir)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir], check=True)
        # Linked there and copied, so that no kind of build takes another's library for its own.
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # a running process may have mapped it
        shutil.copy(build_dir / "_cpu.so", library)


setup(
    ext_modules=[Extension("fused_opt._cpu", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
