"""What test_distributed.py runs in several processes: ``python distributed_workers.py rank world folder set``.

Each check runs in all processes at once, and says in the process's log how it ended. After a failure the processes
stop: the others may wait in a collective for one that is gone.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from adagrad.torch import Adagrad

STEPS = 4
OPTIONS = {
    "plain": {"lr": 0.1},
    "all": {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.02, "clip_value": 0.05, "eps": 1e-6, "maximize": True,
            "initial_accumulator_value": 0.1},
    "row-wise": {"lr": 0.1, "weight_decay": 0.02, "row_wise": True},
}  # fmt: skip


CHECKPOINT_OPTIONS = {"lr": 0.2, "lr_decay": 0.05, "weight_decay": 0.01, "initial_accumulator_value": 0.1}


# ----------------------------------------------------------------------------------------------------------- the pieces


class Model(nn.Module):
    """Sizes that two and four processes cannot divide: rows are 7, ``width``, 3 and 1."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, width)
        self.more = nn.Linear(width, 3, bias=False)
        self.out = nn.Linear(3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.more(torch.tanh(self.hidden(self.table(ids)))))
        return out


def batch(step: int, size: int = 8) -> Tensor:
    """Ids of one step, the same in every process."""
    return torch.randint(7, (size,), generator=torch.Generator().manual_seed(step))


def part(ids: Tensor) -> Tensor:
    """This process's share of a batch."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = (model(ids) - 0.5).square().mean()
    return out


def full(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered; other tensors as they are."""
    whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return whole.wait() if isinstance(whole, AsyncCollectiveTensor) else whole


def same(a: Tensor, b: Tensor, what: str = "") -> None:
    """Equal to the bit."""
    a, b = full(a), full(b)
    assert a.shape == b.shape, f"{what}: {a.shape} != {b.shape}"
    assert a.dtype == b.dtype, f"{what}: {a.dtype} != {b.dtype}"
    unsigned = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = int((a.contiguous().view(unsigned) != b.contiguous().view(unsigned)).sum())
    assert not differ, f"{what}: {differ} of {a.numel()} elements differ\n{a}\n{b}"


class Alone:
    """The same parameters in one process, which gets the gradients of the others gathered."""

    def __init__(self, params: dict[str, Tensor], **options: Any) -> None:
        self.params = {name: nn.Parameter(full(p).clone()) for name, p in params.items()}
        self.optimizer = Adagrad(self.params.values(), **options)

    def step(self, params: dict[str, Tensor]) -> None:
        for name, p in params.items():
            self.params[name].grad = None if p.grad is None else full(p.grad).clone()
        self.optimizer.step()

    def check(self, params: dict[str, Tensor], optimizer: Adagrad, what: str) -> None:
        """Parameters and states are the same to the bit, and states lie where their parameters do."""
        for name, p in params.items():
            same(p, self.params[name], f"{what}: {name}")
            for key, value in self.optimizer.state[self.params[name]].items():
                mine = optimizer.state[p][key]
                same(mine, value, f"{what}: {key} of {name}")
                if key != "step":
                    is_placed(mine, p, f"{what}: {key} of {name}")


def is_placed(state: Tensor, p: Tensor, what: str) -> None:
    assert type(state) is DTensor, f"{what}: {type(state)}"
    assert isinstance(p, DTensor)
    assert state.placements == p.placements, f"{what}: {state.placements} != {p.placements}"
    assert state.device_mesh == p.device_mesh, what
    # Nothing was gathered: what lies here is as many rows as the parameter has here.
    assert state.to_local().shape[:1] == p.to_local().shape[:1], f"{what}: {state.to_local().shape}"


def follow(
    params: dict[str, Tensor],
    backward: Callable[[int], None],
    what: str,
    *,
    steps: int = STEPS,
    **options: Any,
) -> Adagrad:
    """Train, and the same in one process with equal gradients."""
    optimizer, alone = Adagrad(params.values(), **options), Alone(params, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(step)
        alone.step(params)
        optimizer.step()
        alone.check(params, optimizer, f"{what}, step {step}")
    return optimizer


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


# ------------------------------------------------------------------------------------------------------------------ DDP


def ddp_dense(folder: Path) -> None:
    model = Model().double()
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(model)
    optimizers = [Adagrad(m.parameters(), **OPTIONS["all"]) for m in (ddp, alone)]
    for step in range(STEPS):
        ids = batch(step)
        for m, optimizer, given in zip((ddp, alone), optimizers, (part(ids), ids), strict=True):
            optimizer.zero_grad()
            loss(m, given).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        # The mean over the batch is taken in another order.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        whole = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, p.detach())
        for other in whole:
            same(p, other, "processes drifted apart")


def ddp_sparse(folder: Path) -> None:
    # Gradients are small multiples of powers of two: sums are exact in any order, and what remains is the optimizer.
    for options in OPTIONS.values():
        table = nn.Embedding(50, 4, sparse=True)
        alone = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False, sparse=True)
        start = table.weight.detach().clone()
        dist.broadcast(start, 0)
        with torch.no_grad():
            table.weight.copy_(start)
            alone.weight.copy_(start)
        ddp = DistributedDataParallel(table)
        optimizers = [Adagrad(m.parameters(), **options) for m in (ddp, alone)]
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(20, (16,), generator=generator)  # rows of the second half never occur
            slope = torch.randint(-8, 8, (16, 4), generator=generator) / 16
            k = dist.get_world_size()
            for m, optimizer, i, s in (
                (ddp, optimizers[0], part(ids), part(slope)),
                (alone, optimizers[1], ids, slope / k),  # DDP takes the mean over processes
            ):
                optimizer.zero_grad()
                (m(i) * s).sum().backward()
                optimizer.step()
            assert table.weight.grad.is_sparse
            same(table.weight, alone.weight, f"{options}, step {step}")
            same(optimizers[0].state[table.weight]["sum"], optimizers[1].state[alone.weight]["sum"], f"{options}")
        same(table.weight[20:], start[20:], "rows that never occur")


# ---------------------------------------------------------------------------------------------------------------- FSDP2


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(folder: Path) -> None:
    world = dist.get_world_size()
    for name, options in OPTIONS.items():
        model = shard(Model(), mesh_of(world))
        params = dict(model.named_parameters())
        follow(params, lambda step, m=model: loss(m, part(batch(step))).backward(), name, **options)
        held = params["out.weight"].to_local().shape[0]
        assert held == (dist.get_rank() == 0), "one row: the other processes should have an empty shard"


def fsdp_low_precision(folder: Path) -> None:
    mesh = mesh_of(dist.get_world_size())
    for multi_precision in (False, True):
        model = shard(Model().bfloat16(), mesh)
        params = dict(model.named_parameters())
        options: dict[str, Any] = {"lr": 0.1, "multi_precision": multi_precision, "row_wise": multi_precision}
        optimizer = follow(params, lambda step, m=model: loss(m, part(batch(step))).backward(), "bfloat16", **options)
        for p in params.values():
            assert optimizer.state[p]["sum"].dtype == torch.float32
            assert ("master" in optimizer.state[p]) == multi_precision
        with torch.no_grad():
            for p in params.values():
                p.mul_(1)  # counted as a change: each process compares its part with the master copy
        with CommDebugMode() as seen:
            optimizer.step()
        assert seen.get_total_counts() == 0


def hsdp(folder: Path) -> None:
    model = shard(Model(), mesh_of(2, 2, names=("replicate", "shard")))
    params = dict(model.named_parameters())
    assert params["table.weight"].placements == (Replicate(), Shard(0))
    follow(params, lambda step: loss(model, part(batch(step))).backward(), "hsdp", **OPTIONS["row-wise"])


# --------------------------------------------------------------------------------------------------- tensor parallelism


def tensor_parallel(folder: Path) -> None:
    mesh = mesh_of(dist.get_world_size())
    model = parallelize_module(Model(width=8), mesh, {"hidden": ColwiseParallel(), "more": RowwiseParallel()})
    params = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert {p.placements[0] for p in params.values()} == {Shard(0), Shard(1)}
    follow(params, lambda step: loss(model, batch(step)).backward(), "tensor parallel", **OPTIONS["all"])


def fsdp_and_tensor_parallel(folder: Path) -> None:
    mesh = mesh_of(2, 2, names=("data", "model"))
    for name, options in OPTIONS.items():
        if options.get("row_wise"):  # not the second, whose columns are split
            plan = {"hidden": ColwiseParallel(output_layouts=Replicate())}
        else:
            plan = {"hidden": ColwiseParallel(), "more": RowwiseParallel()}
        model = parallelize_module(Model(width=8), mesh["model"], plan)
        params = {}
        for layer in plan:
            fully_shard(model.get_submodule(layer), mesh=mesh["data"])
            params |= {f"{layer}.{n}": p for n, p in model.get_submodule(layer).named_parameters()}
        assert all(len(p.placements) == 2 for p in params.values())

        def backward(step: int, model: nn.Module = model) -> None:
            ids = batch(step).chunk(2)[mesh["data"].get_local_rank()]
            with warnings.catch_warnings():
                # The outputs of parallel layers are views, about which FSDP2 warns those who write to them.
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
                loss(model, ids).backward()

        optimizer = follow(params, backward, name, **options)
        # What one process saved goes to the right places.
        alone = Alone(params, **options)
        exact_step(alone.params, alone.optimizer, 0)
        optimizer.load_state_dict(alone.optimizer.state_dict())
        for n, p in params.items():
            same(optimizer.state[p]["sum"], alone.optimizer.state[alone.params[n]]["sum"], n)
            is_placed(optimizer.state[p]["sum"], p, n)


def summands(grad: Tensor, mesh: DeviceMesh, generator: torch.Generator) -> DTensor:
    """A gradient as a sum not yet taken, exact in float32."""
    first = torch.where(torch.rand(grad.shape, generator=generator) < 0.5, grad, 3.0)
    mine = first if mesh.get_local_rank() == 0 else (grad - first) / (mesh.size() - 1)
    return DTensor.from_local(mine, mesh, [Partial()], run_check=False)


def placements(folder: Path) -> None:
    """Parameters of every placement, gradients of every other, the sum not yet taken among them."""
    mesh = mesh_of(dist.get_world_size())
    for shape in ((7, 6), (1, 5), (4,)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        kinds = [Shard(0), Replicate(), *([Shard(1)] if len(shape) == 2 else [])]
        for wanted, given in itertools.product(kinds, [*kinds, Partial()]):
            p = nn.Parameter(distribute_tensor(value, mesh, [wanted]))

            def backward(step: int, p: Tensor = p, given: Any = given, shape: Any = shape) -> None:
                generator = torch.Generator().manual_seed(step)
                grad = torch.randint(-9, 9, shape, generator=generator) / 8
                partial = given == Partial()
                p.grad = summands(grad, mesh, generator) if partial else distribute_tensor(grad, mesh, [given])

            follow({"p": p}, backward, f"{shape}, {wanted}, {given}", steps=2, **OPTIONS["all"])
            assert p.grad.placements == (given,), "the gradient itself stays as it was"


def row_wise_placements(folder: Path) -> None:
    mesh = mesh_of(dist.get_world_size())
    value = torch.randn((7, 6), generator=torch.Generator().manual_seed(1))
    for wanted in (Shard(0), Replicate()):
        p = nn.Parameter(distribute_tensor(value, mesh, [wanted]))

        def backward(step: int, p: Tensor = p) -> None:
            grad = torch.randn((7, 6), generator=torch.Generator().manual_seed(step))
            p.grad = distribute_tensor(grad, mesh, [Shard(1)])

        optimizer = follow({"p": p}, backward, str(wanted), **OPTIONS["row-wise"])
        assert optimizer.state[p]["sum"].shape == (7, 1)
    split = nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"row_wise=True: parameter 'layer.weight' .*Shard\(dim=1\)"):
        Adagrad([("layer.weight", split)], row_wise=True)
    with pytest.raises(ValueError, match=r"row_wise=True: parameter 1 of its group .*Shard\(dim=1\)"):
        Adagrad([nn.Parameter(torch.ones(2)), split], row_wise=True)


def mixed_with_plain(folder: Path) -> None:
    """DTensors and plain tensors in one optimizer, and what does not fit together."""
    mesh = mesh_of(dist.get_world_size())
    p, q = nn.Parameter(distribute_tensor(torch.ones(7, 2), mesh, [Shard(0)])), nn.Parameter(torch.ones(3))
    optimizer = Adagrad([p, q], lr=0.5)
    p.grad, q.grad = distribute_tensor(torch.full((7, 2), 2.0), mesh, [Shard(0)]), torch.full((3,), -2.0)
    optimizer.step()
    assert full(p).tolist() == [[0.5, 0.5]] * 7
    assert q.tolist() == [1.5] * 3
    before = full(p).clone()
    optimizer.state[q]["sum"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"sum of parameter\[1\]"):
        optimizer.step()
    same(p, before, "a refused step")
    assert int(optimizer.state[p]["step"]) == 1


# ---------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_model(world: int) -> tuple[nn.Module, Adagrad]:
    model = shard(Model(), mesh_of(world))
    optimizer = Adagrad(model.parameters(), **CHECKPOINT_OPTIONS)
    return model, optimizer


def exact_step(params: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step with gradients that depend on nothing but the step: equal for any number of processes."""
    for k, (name, p) in enumerate(params.items()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + k)).to(p.dtype)
        assert name
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
    optimizer.step()


def states_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(folder: Path) -> None:
    model, optimizer = checkpoint_model(dist.get_world_size())
    params = dict(model.named_parameters())
    for step in range(3):
        exact_step(params, optimizer, step)
    states = states_of(model, optimizer)
    for name, p in params.items():
        is_placed(states["optimizer"]["state"][name]["sum"], p, f"state dict of {name}")
        is_placed(optimizer.state_dict()["state"][list(params).index(name)]["sum"], p, name)
    dcp.save(states, checkpoint_id=folder / f"from{dist.get_world_size()}")
    for step in range(3, 6):
        exact_step(params, optimizer, step)
    end = {name: full(p) for name, p in params.items()}
    end |= {f"sum of {name}": full(optimizer.state[p]["sum"]) for name, p in params.items()}
    if dist.get_rank() == 0:
        torch.save(end, folder / f"end{dist.get_world_size()}.pt")


def load_and_go_on(folder: Path, saved_by: int, model: nn.Module, optimizer: Adagrad) -> None:
    """Load what ``saved_by`` processes saved, go on, and end where they did."""
    states = states_of(model, optimizer)
    dcp.load(states, checkpoint_id=folder / f"from{saved_by}")
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    params = dict(model.named_parameters())
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params.values())
    assert optimizer.param_groups[0]["clip_value"] is None
    for step in range(3, 6):
        exact_step(params, optimizer, step)
    end = torch.load(folder / f"end{saved_by}.pt")
    for name, p in params.items():
        same(p, end[name], name)
        same(optimizer.state[p]["sum"], end[f"sum of {name}"], f"sum of {name}")
        if isinstance(p, DTensor):
            is_placed(optimizer.state[p]["sum"], p, name)


def load_of_two(folder: Path) -> None:
    load_and_go_on(folder, 2, *checkpoint_model(dist.get_world_size()))


def full_state_dicts(folder: Path) -> None:
    """Gathered into one process, and spread out again from there."""
    world = dist.get_world_size()
    model, optimizer = checkpoint_model(world)
    exact_step(dict(model.named_parameters()), optimizer, 0)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=gathered)
    states = get_optimizer_state_dict(model, optimizer, options=gathered)
    other, again = checkpoint_model(world)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, weights, options=spread)
    # A copy, because what PyTorch's optimizers load is theirs from then on: both would advance the same counts.
    set_optimizer_state_dict(other, again, copy.deepcopy(states), options=spread)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        is_placed(again.state[q]["sum"], q, name)
        same(again.state[q]["sum"], optimizer.state[p]["sum"], name)
    exact_step(dict(model.named_parameters()), optimizer, 1)
    exact_step(dict(other.named_parameters()), again, 1)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        same(p, q, name)


def plain_state_into_shards(folder: Path) -> None:
    """A state dict of one process loads into shards."""
    alone = Model()
    one = Adagrad(alone.parameters(), lr=0.1, row_wise=True)
    exact_step(dict(alone.named_parameters()), one, 0)
    model = shard(copy.deepcopy(alone), mesh_of(dist.get_world_size()))
    optimizer = Adagrad(model.parameters(), lr=0.1, row_wise=True)
    optimizer.load_state_dict(one.state_dict())
    for step in (1, 2):
        exact_step(dict(alone.named_parameters()), one, step)
        exact_step(dict(model.named_parameters()), optimizer, step)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        is_placed(optimizer.state[p]["sum"], p, name)
        same(p, q, name)


def states_of_other_placements(folder: Path) -> None:
    """They move to the parameter's; what cannot is refused, and nothing changes."""
    mesh = mesh_of(dist.get_world_size())
    value = torch.randn((7, 6), generator=torch.Generator().manual_seed(1))

    def made(*given: Any, **options: Any) -> tuple[nn.Parameter, Adagrad]:
        p = nn.Parameter(distribute_tensor(value, mesh, [*given]) if given else value.clone())
        return p, Adagrad([p], lr=0.1, **options)

    def refused(p: nn.Parameter, optimizer: Adagrad, saved: dict[str, Any], match: str) -> None:
        before, history = copy.deepcopy(optimizer.state_dict()["param_groups"]), full(optimizer.state[p]["sum"]).clone()
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"] == before
        same(optimizer.state[p]["sum"], history, match)

    p, optimizer = made(Shard(1))
    exact_step({"p": p}, optimizer, 0)
    for wanted in (Shard(0), Replicate(), Shard(1)):
        q, other = made(wanted)
        with torch.no_grad():
            q.copy_(p.detach().redistribute(mesh, [wanted]))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        is_placed(other.state[q]["sum"], q, str(wanted))
        same(other.state[q]["sum"], optimizer.state[p]["sum"], str(wanted))
        exact_step({"q": q}, other, 1)
    plain, alone = made()
    refused(plain, alone, optimizer.state_dict(), "sum: a DTensor: must be an ordinary tensor, like the parameter")
    _, by_row = made(row_wise=True)
    refused(p, optimizer, by_row.state_dict(), r"row_wise=True: placements .*: must have whole rows on a device")


def shapes_and_kinds_of_dtensors(folder: Path) -> None:
    """What is wrong as a whole is refused by every process, though its own part may fit."""
    world = dist.get_world_size()
    mesh, other = mesh_of(world), init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    p, q = nn.Parameter(distribute_tensor(torch.ones(7, 2), mesh, [Shard(0)])), nn.Parameter(torch.ones(7, 2))
    optimizer = Adagrad([p, q])
    right = optimizer.state[p]["sum"]

    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            optimizer.step()
        assert full(p).eq(1).all()
        assert q.eq(1).all()

    p.grad, q.grad = distribute_tensor(torch.ones(7, 2), mesh, [Shard(0)]), torch.ones(7, 2)
    optimizer.state[p]["sum"] = distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)])
    refused(ValueError, r"sum of parameter\[0\]: shape \(8, 2\): must be \(7, 2\)")
    optimizer.state[p]["sum"] = right
    optimizer.state[q]["sum"] = right
    refused(TypeError, r"sum of parameter\[1\]: must be an ordinary tensor, not a DTensor, like the weight")
    optimizer.state[q]["sum"] = torch.zeros(7, 2)
    p.grad = distribute_tensor(torch.ones(7, 2), other, [Replicate(), Shard(0)])
    refused(ValueError, r"gradient of parameter\[0\]: on DeviceMesh.*: must be on DeviceMesh.*, like the weight")
    p.grad = distribute_tensor(torch.ones(7, 2), mesh, [Shard(1)])
    optimizer.step()
    assert full(p).lt(1).all()


def row_wise_of_flat_parameters(folder: Path) -> None:
    """FSDP1 cuts rows up, and does not say where they were."""
    for keep in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FullyShardedDataParallel is deprecated, and remarks on the CPU
            model = FullyShardedDataParallel(Model(), use_orig_params=keep, device_id=torch.device("cpu"))
        Adagrad(model.parameters())
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*must have whole rows; fully_shard keeps them"):
            Adagrad(model.parameters(), row_wise=True)


def low_precision_gradients_of_flat_parameters(folder: Path) -> None:
    """FSDP1 may leave the gradients of float32 parameters in bfloat16: as if they had been converted."""
    kept = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            nn.Linear(6, 4), use_orig_params=True, device_id=torch.device("cpu"), mixed_precision=kept
        )
        model(torch.ones(2, 6)).float().square().sum().backward()
    mine = [p for p in model.parameters() if p.grad is not None]
    alone = [nn.Parameter(p.detach().clone()) for p in mine]
    for p, q in zip(mine, alone, strict=True):
        assert p.grad is not None
        assert (p.dtype, p.grad.dtype) == (torch.float32, torch.bfloat16)
        q.grad = p.grad.float()
    for params in (mine, alone):
        Adagrad(params, weight_decay=0.1).step()
    assert mine
    for p, q in zip(mine, alone, strict=True):
        assert torch.equal(p, q)


def sharded_grad_scaler(folder: Path) -> None:
    """FSDP1's scaler: where one process finds infinities, all skip the step."""
    shard = nn.Parameter(torch.ones(2))
    optimizer = Adagrad([shard], lr=0.1)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    scaler.scale(shard.sum()).backward()
    assert shard.grad is not None
    if dist.get_rank() == 1:
        shard.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert shard.tolist() == [1, 1]
    assert optimizer.state[shard]["step"] == 0
    assert scaler.get_scale() == 2


# ----------------------------------------------------------------------------------------------------------------- ZeRO


def zero_redundancy(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its package compiles, at import, what is deprecated
        from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = Model(), Model()
    options = OPTIONS["all"]
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Adagrad, **options)
    one = Adagrad(alone.parameters(), **options)
    for step in range(2):
        exact_step(dict(model.named_parameters()), zero, step)
        exact_step(dict(alone.named_parameters()), one, step)
    held = len(zero.optim.state)
    assert held < len(list(model.parameters())), "each process should hold a part of the states"
    zero.consolidate_state_dict(to=0)
    states = [zero.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states, src=0)
    for theirs, mine in zip(states[0]["state"].values(), one.state.values(), strict=True):
        same(theirs["sum"], mine["sum"], "consolidated")
    again = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Adagrad, **options)
    again.load_state_dict(states[0])
    for step in range(2, 4):
        exact_step(dict(model.named_parameters()), again, step)
        exact_step(dict(alone.named_parameters()), one, step)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        same(p, q, name)


# ---------------------------------------------------------------------------------------------------------- the program


CHECKS: dict[str, list[Callable[[Path], None]]] = {
    "two": [
        ddp_dense, ddp_sparse, fsdp, fsdp_low_precision, tensor_parallel, placements, mixed_with_plain, save,
        full_state_dicts, zero_redundancy, plain_state_into_shards, row_wise_placements, sharded_grad_scaler,
        row_wise_of_flat_parameters, low_precision_gradients_of_flat_parameters, states_of_other_placements,
        shapes_and_kinds_of_dtensors,
    ],
    "four": [load_of_two, fsdp, hsdp, fsdp_and_tensor_parallel, save],
}  # fmt: skip


def main() -> None:
    rank, world, folder, name = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("error")
    for of_pytorch_2_9 in ("TypedStorage is deprecated", "Deallocating Tensor"):  # its checkpoints, and FSDP1's weights
        warnings.filterwarnings("ignore", message=of_pytorch_2_9)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / f"store of {name}"), world), rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for check in CHECKS[name]:
        began = time.perf_counter()
        try:
            check(folder)
        except BaseException:
            print(f"FAILED {check.__name__}", flush=True)
            traceback.print_exc()
            leave(1)  # the group may be unusable, and to destroy it could wait
        print(f"PASSED {check.__name__} {time.perf_counter() - began:.1f}", flush=True)
    dist.destroy_process_group()
    leave(0)


def leave(code: int) -> NoReturn:
    """End without taking down the interpreter, which takes seconds with all that is loaded."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
