"""``adagrad.torch.Adagrad`` on two gloo processes: DistributedDataParallel, DTensor and FSDP2, against one process.

The file is also the program of the processes: ``python test_torch_ddp.py FOLDER JOB RANK``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adagrad.torch import Adagrad
from torch_versions import has_fsdp2_on_cpu

WORLD = 2
STEPS = 4
LIMIT = 100
"""Seconds that the processes have."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(20, 8, mode="sum", sparse=True)
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def batch(step: int) -> Tensor:
    """8 bags of 3 ids, of which one process takes the first half."""
    return torch.randint(20, (8, 3), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, cut: slice, **options: Any) -> Adagrad:
    optimizer = Adagrad(model.parameters(), lr=0.1, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        # Powers of two, so that a mean of two means is the mean; sums of sparse rows keep their order.
        (model(batch(step)[cut]) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


OPTIONS: dict[str, dict[str, Any]] = {"elementwise": {"weight_decay": 0.01}, "row-wise": {"row_wise": True}}


def ddp(rank: int) -> dict[str, Any]:
    """The parameters after training, for each of OPTIONS."""
    results = {}
    for name, options in OPTIONS.items():
        for view in (False, True):
            model = nn.parallel.DistributedDataParallel(Model(), gradient_as_bucket_view=view)
            train(model, slice(4 * rank, 4 * rank + 4), **options)
            results[f"{name}, {view}"] = [p.detach() for p in model.parameters()]
    return results


def dtensor(rank: int) -> dict[str, Any]:
    """What a step does to a parameter placed in various ways, gradients included, gathered again."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {}
    weight, grad = sample()
    gradients: dict[str, Callable[[Any], Any]] = {
        "same": lambda placement: distribute_tensor(grad, mesh, [placement]),
        "not yet summed": lambda placement: DTensor.from_local(grad / WORLD, mesh, [Partial()]),
    }
    for row_wise in (False, True):
        for placement in (Shard(0), Shard(1), Replicate()):
            for name, make in gradients.items():
                if row_wise and placement == Shard(1):
                    continue
                p = nn.Parameter(distribute_tensor(weight.clone(), mesh, [placement]))
                optimizer = Adagrad([p], weight_decay=0.1, row_wise=row_wise)
                for _ in range(2):
                    p.grad = make(placement)
                    optimizer.step()
                history = optimizer.state[p]["sum"]
                assert history.placements == p.placements
                results[f"{row_wise}, {placement}, {name}"] = (p.full_tensor().detach(), history.full_tensor())
    for wrong, options in ((Shard(1), {"row_wise": True}), (Partial(), {})):
        try:
            p = nn.Parameter(DTensor.from_local(weight.clone(), mesh, [wrong], run_check=False))
            optimizer = Adagrad([p], **options)
            p.grad = DTensor.from_local(grad.clone(), mesh, [wrong], run_check=False)
            optimizer.step()
        except ValueError as error:
            results[f"refused {wrong}"] = str(error)
    p = nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
    optimizer = Adagrad([p])
    p.grad = distribute_tensor(grad, mesh, [Shard(0)])
    optimizer.state[p]["sum"] = torch.zeros_like(weight)
    try:
        optimizer.step()
    except TypeError as error:
        results["mixed"] = str(error)
    return results


class Layers(nn.Module):
    """Of sizes that two processes cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def train_layers(model: nn.Module, around_step: Any = nullcontext, **options: Any) -> None:
    """Every process has the same examples, so that the mean of their gradients is exact."""
    optimizer = Adagrad(model.parameters(), lr=0.1, **options)
    examples = torch.randn(STEPS, 8, 5, generator=torch.Generator().manual_seed(2))
    for x in examples:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        with around_step():
            optimizer.step()


def fsdp2(rank: int) -> dict[str, Any]:
    """The parameters after training, for each of OPTIONS; how many collectives the last step called, and gathering."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    results: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        model, seen = Layers(), CommDebugMode()
        for layer in (*model.layers, model):
            if layer is model or isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        train_layers(model, lambda: seen, **options)  # noqa: B023
        calls = [seen.get_total_counts()]
        with seen:
            results[name] = [p.full_tensor().detach() for p in model.parameters()]
        results[f"collectives, {name}"] = [*calls, seen.get_total_counts()]
    return results


def sample() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 4), torch.randn(5, 4)


JOBS: dict[str, Callable[[int], dict[str, Any]]] = {"ddp": ddp, "dtensor": dtensor, "fsdp2": fsdp2}


def run(job: str, folder: Path) -> list[dict[str, Any]]:
    """What each process found; if one fails or time is up, all end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(WORLD)]
    command = [sys.executable, __file__, str(folder), job]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=log, stderr=log, env=environment)
        for rank, log in enumerate(logs)
    ]
    try:
        end = time.monotonic() + LIMIT
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        said = "".join((folder / f"{rank}.log").read_text() for rank in range(WORLD))
        assert [p.poll() for p in processes] == [0] * WORLD, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_ddp(tmp_path: Path) -> None:
    first, second = run("ddp", tmp_path)
    for key, params in first.items():
        for p, q in zip(params, second[key], strict=True):
            assert torch.equal(p, q), key  # the replicas agree to the bit
        model = Model()
        train(model, slice(None), **OPTIONS[key.split(", ")[0]])
        for p, q, start in zip(params, model.parameters(), Model().parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert not torch.equal(p, start)


def test_dtensor(tmp_path: Path) -> None:
    first, second = run("dtensor", tmp_path)
    weight, grad = sample()
    for key in first:
        if key.startswith("refused"):
            assert "placements" in first[key]
        elif key == "mixed":
            assert "must be a DTensor like the weight" in first[key]
        else:
            p = nn.Parameter(weight.clone())
            optimizer = Adagrad([p], weight_decay=0.1, row_wise=key.startswith("True"))
            for _ in range(2):
                p.grad = grad.clone()
                optimizer.step()
            for found in (first[key], second[key]):
                assert torch.equal(found[0], p), key
                assert torch.equal(found[1], optimizer.state[p]["sum"]), key
    assert len(first) == 2 * 3 + 2 * 2 + 2 + 1


@has_fsdp2_on_cpu
def test_fsdp2(tmp_path: Path) -> None:
    first, second = run("fsdp2", tmp_path)
    for name, options in OPTIONS.items():
        model = Layers()
        train_layers(model, **options)
        for found in (first, second):
            by_step, by_gathering = found[f"collectives, {name}"]
            assert (by_step, by_gathering > 0) == (0, True)
            for p, q, start in zip(found[name], model.parameters(), Layers().parameters(), strict=True):
                assert torch.equal(p, q), name
                assert not torch.equal(p, start)


if __name__ == "__main__":
    folder, job, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    torch.save(JOBS[job](rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without the interpreter's end, in which threads of PyTorch's were seen to abort the process
