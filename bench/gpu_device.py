"""The GPU that `fused-opt gpu-check` examines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_opt.arguments import CannotRunError
from fused_opt.native import native, triton_problem

# Steps before a CUDA graph is captured, as torch's documentation asks for.
WARM_UP = 3

# Work to keep a GPU busy while the host goes on: so many times 256 MiB are zeroed, 17 ms at 8 TB/s.
_BUSY_BYTES, _BUSY_TIMES = 2**28, 500

INSTEAD = "`fused-opt gpu-check --dry-run` tries everything that needs no GPU"


class Gpu:
    """The current GPU.

    Attributes:
        device: where tensors are to be.
        dry_run: whether it is none.
    """

    dry_run = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    @classmethod
    def find(cls) -> Gpu:
        """Raises CannotRunError, with what to do, if there is none that Triton's kernels can run on, or they are switched off."""
        if not torch.cuda.is_available():
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" if torch.version.hip else ""
            if not built:
                remedy = "is built for the CPU only; install one for your GPU: https://pytorch.org/get-started/locally"
            else:
                remedy = f"is built for {built}, but finds none; see whether nvidia-smi or rocm-smi does, and CUDA_VISIBLE_DEVICES"
            raise CannotRunError(f"there is no GPU: torch {torch.__version__} {remedy}. {INSTEAD}")
        for variable in ("FUSED_OPT_BACKEND", "TRITON_INTERPRET"):
            if os.environ.get(variable):
                raise CannotRunError(f"{variable}={os.environ[variable]} is set, which changes what steps on a GPU; unset it")
        if native().module is None:
            raise CannotRunError(f"no kernel of ours would run: {native().why}; `fused-opt doctor` says more")
        if problem := triton_problem():
            raise CannotRunError(problem)
        return cls()

    def session(self) -> contextlib.AbstractContextManager[None]:
        """To be in while checks run."""
        return contextlib.nullcontext()

    def by_triton(self) -> contextlib.AbstractContextManager[None]:
        """Within this context Triton's kernels step what is on `device`."""
        return contextlib.nullcontext()

    def by_cpu(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the CPU's kernels step what is on the CPU."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given. Raises what went wrong there."""
        torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        """Give what no tensor uses back to the driver."""
        with contextlib.suppress(RuntimeError):  # after an error in a kernel nothing works; the check has said so
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Memory that can be allocated."""
        return torch.cuda.mem_get_info(self.device)[0]

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """`WARM_UP` times `step`, then captured in a CUDA graph; what replays it, as torch's documentation has it."""
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """Within this context what makes the host wait for the GPU, as far as torch knows of it, raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def keep_busy(self) -> Any:
        """Give the GPU work for some milliseconds; returns an event, whose `query()` says whether that is done."""
        waste = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=self.device)
        for _ in range(_BUSY_TIMES):
            waste.zero_()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event
