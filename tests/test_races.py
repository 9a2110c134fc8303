"""Two threads in the first steps of one optimizer: torch's promises nothing there, ours must not corrupt memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, threading, torch, fused_opt
if sys.argv[1] == "methods":
    from fused_opt.native import native
    native().module.forget_exchange_table()
for _ in range(25):
    params = [torch.nn.Parameter(torch.ones(50_000)) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fused_opt.AdamW(params)
    def work():
        for _ in range(25):
            try:
                optimizer.step()
                fused_opt.explain(optimizer)
            except (KeyError, RuntimeError):  # a state that the other thread is just making
                pass
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(bool(param.isfinite().all()) and bool((param < 1).all()) for param in params)
print("survived")
"""


@pytest.mark.slow
def test_threads_that_create_the_same_states() -> None:
    for reader in ("dlpack", "methods"):
        command = [sys.executable, "-c", PROGRAM, reader]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent, timeout=300)
        assert (result.returncode, result.stdout.strip()) == (0, "survived"), result.stderr[-2000:]
