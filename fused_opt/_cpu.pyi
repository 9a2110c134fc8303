# The extension built from csrc/bindings.cpp. Internal.
from collections.abc import Sequence
from typing import Any

import torch

compiler: str
table_columns: int

def isas() -> list[tuple[str, bool]]: ...
def reader() -> str: ...
def forget_exchange_table() -> None: ...
def kernel_addresses() -> list[tuple[str, str, int, str, int]]: ...
def code_starts() -> list[tuple[str, int]]: ...
def measure(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block_size: int, isa: str, max_threads: int) -> None: ...
def quantize(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    code: str | torch.Tensor,
    measured: bool,
    seed: int | torch.Tensor | None,
    isa: str,
    max_threads: int,
) -> None: ...
def dequantize(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block_size: int, code: str | torch.Tensor, isa: str, max_threads: int
) -> None: ...

class Batch:
    def __init__(
        self,
        slots: Sequence[tuple[str, str, bool]],
        counter: str,
        takes_codes: bool,
        late: bool = False,
        stages: Sequence[str] = (),
        split: bool = False,
    ) -> None: ...
    def gather(
        self,
        params: list[torch.Tensor],
        state: dict[torch.Tensor, Any],
        assume_grad: bool = False,
        cpu: int = 1,
        gpu: int = 0,
        first_number: int = 0,
    ) -> bool: ...  # cpu, gpu: who serves, a Server in csrc/batch.h
    def adopt(self, i: int, state: dict[str, Any], fresh: bool = True) -> None: ...
    def clear(self) -> None: ...
    def run(
        self,
        rule: str,
        programs: Sequence[tuple[int, Sequence[float]]],
        isa: str,
        max_threads: int,
        on_device: bool = False,
        stages: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> tuple[str, int]: ...  # instruction set, threads
    def gradient_norm(self, isa: str, largest: bool, max_threads: int) -> float: ...
    @property
    def missing(self) -> list[int]: ...
    @property
    def indices(self) -> list[int]: ...
    @property
    def table_indices(self) -> list[int]: ...
    @property
    def in_tables(self) -> bool: ...
    @property
    def in_kernels(self) -> bool: ...
    @property
    def complex(self) -> list[int]: ...
    @property
    def mixed(self) -> list[int]: ...
    @property
    def declined(self) -> list[tuple[int, str]]: ...
    @property
    def cohorts(self) -> list[tuple[float, bool]]: ...
    @property
    def written(self) -> list[torch.Tensor]: ...

class Tables:
    def __init__(self, chunk: int) -> None: ...
    def begin(self) -> None: ...
    def add(self, batch: Batch, flags: Sequence[int], first_row: int, on_device: bool) -> None: ...
    def finish(
        self,
    ) -> list[
        tuple[tuple[int, int], int, tuple[str, ...], int, int, int, bool, bool]
    ]: ...  # device, flags, formats, block size, rows, chunks, rows changed, chunks changed
    def copy_rows(self, bucket: int, address: int) -> None: ...
    def copy_chunks(self, bucket: int, address: int) -> None: ...

class Sharing:
    def __init__(self) -> None: ...
    def found(self, batches: Sequence[Batch]) -> bool: ...
