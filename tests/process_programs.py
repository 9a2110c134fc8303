"""Programs that test_processes.py runs in processes of their own, because they fork, or would hang rather than fail.

python process_programs.py NAME
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fused_opt

# Enough for the kernels, and for torch's own operators, to use all threads.
LARGE = 300_000


def large_problem() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (LARGE, 100)]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params, fused_opt.AdamW(params, weight_decay=0.1)


def in_child(work: Callable[[], None]) -> None:
    """Fork, do it there, and wait for its success."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fork_after_a_step() -> None:
    """After the parent has used its threads: a child, and a child of that, step as the parent would. numpy compares, as torch's operators
    hang in such a child."""
    torch.set_num_threads(2)
    params, optimizer = large_problem()
    expected_params, expected = large_problem()
    for _ in range(3):
        expected.step()
    wanted = [p.detach().numpy() for p in expected_params]
    optimizer.step()
    assert optimizer._last_ran.threads == 2, optimizer._last_ran

    def grandchild() -> None:
        optimizer.step()
        for param, value in zip(params, wanted, strict=True):
            assert np.array_equal(param.detach().numpy(), value)

    def child() -> None:
        optimizer.step()
        in_child(grandchild)

    in_child(child)
    for _ in range(2):  # the parent's threads are as they were
        optimizer.step()
    assert optimizer._last_ran.threads == 2
    for param, value in zip(params, wanted, strict=True):
        assert np.array_equal(param.detach().numpy(), value)


def fork_before_the_first_step() -> None:
    """The kernels have not run yet, but torch's threads have: the child's first step is its first use of them."""
    torch.set_num_threads(2)
    params, optimizer = large_problem()
    before = params[0].detach().numpy().copy()

    def child() -> None:
        optimizer.step()
        assert not np.array_equal(params[0].detach().numpy(), before)

    in_child(child)
    assert np.array_equal(params[0].detach().numpy(), before)  # memory is not shared


class StepsInWorkers(torch.utils.data.Dataset[float]):
    """Each item is what a parameter has become after so many steps, made in the worker or copied from the parent."""

    def __init__(self) -> None:
        params, self.optimizer = large_problem()
        self.grads = [p.grad for p in params]  # a pickled parameter has none

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        optimizer = copy.deepcopy(self.optimizer)
        for param, grad in zip(optimizer.param_groups[0]["params"], self.grads, strict=True):
            param.grad = grad
        for _ in range(index + 1):
            optimizer.step()
        return float(optimizer.param_groups[0]["params"][0].detach().numpy().astype(np.float64).sum())


def data_loader() -> None:
    torch.set_num_threads(2)
    data = StepsInWorkers()
    expected = [data[index] for index in range(len(data))]
    assert len(set(expected)) == len(expected)
    loader = torch.utils.data.DataLoader(data, num_workers=2, batch_size=None, multiprocessing_context="fork")
    assert list(loader) == expected


def train_shared(model: torch.nn.Module, optimizer_class: type[torch.optim.Optimizer], steps: int) -> None:
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(step, 1, 6).reshape(2, 3)).square().mean().backward()
        optimizer.step()


def shared_memory() -> None:
    """Hogwild: a spawned process steps parameters in shared memory; the parent sees them change where they are."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    alone = copy.deepcopy(model)
    model.share_memory()
    where = model.weight.data_ptr()
    process = torch.multiprocessing.get_context("spawn").Process(target=train_shared, args=(model, fused_opt.RMSprop, 3))
    process.start()
    process.join()
    assert process.exitcode == 0
    train_shared(alone, fused_opt.RMSprop, 3)
    assert model.weight.data_ptr() == where
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert p.is_shared()
        assert torch.equal(p, q)


def data_parallel() -> None:
    """Gradients are views into the buckets of DistributedDataParallel, at addresses that are not aligned, and stay there."""
    results = []
    for module in (fused_opt, torch.optim):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)]
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers).double(), gradient_as_bucket_view=True)
        optimizer = module.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(4, 7, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        buckets = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(buckets) < len(list(model.parameters()))
        if module is fused_opt:
            assert [row.path.split("-")[0] for row in fused_opt.explain(optimizer).rows] == ["cpu"]
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def distributed_tensor() -> None:
    """DTensors, which wrap the part of a tensor that this process has, are stepped by torch, the plain parameters beside them are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    results = []
    for module in (fused_opt, torch.optim):
        whole = torch.linspace(-1, 1, 12).reshape(4, 3)
        sharded = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        plain = torch.nn.Parameter(whole.clone())
        optimizers = [module.SGD([p], lr=0.1, momentum=0.9) for p in (sharded, plain)]
        for step in range(3):
            sharded.grad = distribute_tensor(whole + step, mesh, [Shard(0)])
            plain.grad = whole + step
            for optimizer in optimizers:
                optimizer.step()
        assert isinstance(sharded, DTensor)
        assert torch.equal(sharded.full_tensor(), plain)
        if module is fused_opt:
            assert [fused_opt.explain(o).rows[0].path.split("-")[0] for o in optimizers] == ["torch", "cpu"]
        results.append(plain)
    assert torch.equal(*results)


def fork() -> None:
    fork_before_the_first_step()
    fork_after_a_step()
    data_loader()


def distributed() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    data_parallel()
    distributed_tensor()


PROGRAMS: dict[str, Callable[[], Any]] = {program.__name__: program for program in (fork, distributed, shared_memory)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
    print("done")
