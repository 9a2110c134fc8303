"""What a user installs: built without torch in sight, small, complete, and used away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = shutil.ignore_patterns("build", "*.so", ".venv*", ".git", "*.egg-info", "__pycache__", ".*_cache")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with a torch first on the path that cannot be imported."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=BUILT)
    poison = folder / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('the build must not need torch')")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(poison)}, capture_output=True)
    (built,) = folder.glob("fused_opt-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    # The benchmark suite is a product of its own, a fifth of the wheel; what a training loads stays below 0.9 MB.
    parts = {entry.filename: entry.compress_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert sum(size for name, size in parts.items() if not name.startswith("fused_opt/bench/")) < 900_000
    assert wheel.stat().st_size < 1_100_000
    names = set(parts)
    for module in (
        "fused_opt/__init__.py",
        "fused_opt/py.typed",
        "fused_opt/kernels/__init__.py",
        "fused_opt/bench/cases.py",
        "fused_opt/bench/report.html",
    ):
        assert module in names
    assert [name for name in names if name.startswith("fused_opt/_cpu.") and name.endswith(".so")]
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"fused_opt"}, "kernels or bench as top-level packages"


def test_torch_is_the_only_requirement(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in required] == ["torch"]
    assert {line.split()[1] for line in lines if line.startswith("Provides-Extra:")} == {"triton", "bench", "peers", "test", "dev"}


def test_it_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import json, torch, fused_opt, fused_opt.bench.cases, fused_opt.kernels\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "o = fused_opt.AdamW([p]); o.step()\n"
        "print(json.dumps([fused_opt.__file__, fused_opt.bench.cases.__file__, o._last_ran.isa]))"
    )
    # The current folder, first on the path, holds no package of that name; the extracted wheel comes next.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *files, isa = json.loads(result.stdout)
    assert all(file.startswith(str(tmp_path)) for file in files)
    assert isa


def test_the_extension_links_no_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (library,) = (tmp_path / "fused_opt").glob("_cpu.*.so")
    needed = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[1] for line in needed.splitlines() if "NEEDED" in line}
    assert not [name for name in libraries if "torch" in name or "c10" in name]


def test_a_change_in_one_file_rebuilds_one_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "source", ignore=BUILT)

    def build() -> str:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=tmp_path / "source", capture_output=True, text=True, check=True).stdout

    assert build().count("compile ") >= 6
    assert "no work to do" in build()
    changed = tmp_path / "source" / "csrc" / "parallel.cpp"
    changed.write_text(changed.read_text() + "\n")
    output = build()
    assert "compile parallel.o" in output
    assert output.count("compile ") == 1
