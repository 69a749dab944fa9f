"""``adagrad.torch.Adagrad`` in mixed precision: gradient scalers, weights of low precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adagrad.torch import Adagrad
from support import assert_same_bits
from torch_oracle import coo, gradient, parameter
from torch_versions import since


@pytest.mark.parametrize(
    ("fused", "dtype", "unscale"),
    [
        *[(fused, torch.float32, unscale) for fused in (None, False, True) for unscale in (False, True)],
        (True, torch.float16, False),  # which GradScaler does not unscale by itself
    ],
    ids=str,
)
def test_grad_scaler(fused: bool | None, dtype: torch.dtype, unscale: bool) -> None:
    p, q = parameter((8,), dtype), parameter((8,), dtype)
    optimizer, other = Adagrad([p], lr=0.1, fused=fused), Adagrad([q], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    factors = torch.linspace(-1, 1, 8)
    for bad in (False, True, False):
        for each, scale in ((p, scaler.scale), (q, lambda loss: loss)):
            each.grad = None
            loss = (each.float() * factors * (float("inf") if bad and each is p else 1.0)).sum()
            scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
        scaler.step(optimizer)
        if bad:
            assert_same_bits(p, before)
            assert_same_bits(optimizer.state[p]["sum"], state["sum"])
            assert optimizer.state[p]["step"] == state["step"] == 1
        else:
            other.step()
        scaler.update()
    assert optimizer.state[p]["step"] == 2
    assert_same_bits(p, q)
    assert scaler.get_scale() == 2.0**11


def test_grad_scaler_with_sparse_gradients() -> None:
    first, second = nn.Embedding(10, 4, sparse=True), nn.Embedding(10, 4, sparse=True)
    second.load_state_dict(first.state_dict())
    optimizer, other = Adagrad(first.parameters()), Adagrad(second.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.tensor([1, 7, 1])
    scaler.scale(first(ids).square().sum()).backward()
    second(ids).square().sum().backward()
    scaler.step(optimizer)
    other.step()
    assert_same_bits(first.weight, second.weight)


def test_grad_scaler_where_no_parameter_has_a_gradient() -> None:
    """As where several optimizers take turns: the scaler's sum of no tensors is the number 0."""
    used, idle = parameter((3,)), parameter((3,))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(used.sum()).backward()
    optimizer = Adagrad([idle], lr=0.1, fused=True)
    before = idle.detach().clone()
    scaler.step(optimizer)
    assert_same_bits(idle, before)


@since("2.12", "AdaGrad of its own that takes scaled gradients")
@pytest.mark.parametrize("fused", [None, False, True])
def test_grad_scaler_unscales_as_with_pytorch(fused: bool | None) -> None:
    """Trainers ask the attribute before they clip; hooks and steps of users see unscaled gradients by default."""
    seen = []
    for klass in (Adagrad, torch.optim.Adagrad):
        p = nn.Parameter(torch.ones(3))
        optimizer = klass([p], lr=0.1, fused=fused)
        assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) is (fused is True)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].grad.tolist()))
        assert bool(getattr(optimizer, "_step_supports_amp_scaling", False)) is (fused is True)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        scaler.scale(p.sum() * 2).backward()
        scaler.step(optimizer)
        assert optimizer.state[p]["sum"].tolist() == [4.0] * 3
    assert seen == [[2.0 * (65536 if fused else 1)] * 3] * 2


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("kind", ["pre", "post", "global"])
def test_hooks_of_the_step_see_unscaled_gradients(kind: str, fused: bool | None) -> None:
    """As with torch.optim.Adagrad, unless the kernels were asked to unscale."""
    seen = []
    for klass, options in ((Adagrad, {"fused": fused}), (torch.optim.Adagrad, {})):
        p = nn.Parameter(torch.ones(3))
        optimizer = klass([p], **options)  # type: ignore[arg-type]
        found: list[float] = []

        def hook(*_: Any, p: Tensor = p, found: list[float] = found) -> None:
            found.append(p.grad.norm().item())

        if kind == "global":
            handle = register_optimizer_step_pre_hook(hook)
        else:
            handle = getattr(optimizer, f"register_step_{kind}_hook")(hook)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (5.0, float("inf")):
            p.grad = None
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        handle.remove()
        seen.append((found, optimizer.state[p]["sum"].tolist()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("multi_precision", [False, True])
def test_embeddings_and_dense_layers_in_one_optimizer(order: int, multi_precision: bool) -> None:
    """The bits of an optimizer for each parameter; with one dtype by one compiled call, master copies and all."""

    def parameters() -> list[nn.Parameter]:
        shapes = [(9, 4), (5,), (7, 3), (4, 4)][::order]
        return [parameter(shape, torch.bfloat16, seed) for seed, shape in enumerate(shapes)]

    together, apart = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1, "lr_decay": 0.1, "multi_precision": multi_precision}
    one, several = Adagrad(together, **options), [Adagrad([p], **options) for p in apart]
    for step in range(3):
        for k, (p, q) in enumerate(zip(together, apart, strict=True)):
            grad = gradient(p, 10 * step + k)
            is_embedding = p.shape[0] in (9, 7)
            p.grad = q.grad = coo([1, 6, 1], grad[:3], p.shape) if is_embedding else grad
        one.step()
        for optimizer in several:
            optimizer.step()
    for p, q, optimizer in zip(together, apart, several, strict=True):
        assert_same_bits(p, q)
        for name, value in optimizer.state[q].items():
            assert_same_bits(one.state[p][name], value)
        assert one.state[p]["step"] == 3


def test_a_gradient_of_another_order_beside_a_master_copy() -> None:
    """Its order is made usual only where no weight has a master copy: that one would be left behind."""
    results = []
    for separate in (False, True):
        p, low = parameter((4, 3)), parameter((5,), torch.bfloat16)
        p.grad, low.grad = torch.arange(12.0).view(3, 4).t(), gradient(low, 1)
        options: dict[str, Any] = {"lr": 0.01, "multi_precision": True}
        optimizers = [Adagrad(params, **options) for params in ([[p], [low]] if separate else [[p, low]])]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        results.append((p, low, optimizers[-1].state[low]["master"], optimizers[-1].state[low]["sum"]))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_a_master_copy_is_made_anew_whatever_memory_the_new_values_have() -> None:
    for _ in range(50):
        p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
        optimizer = Adagrad([p], multi_precision=True)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        for value in (5.0, 7.0):  # the second finds the memory that the first has freed
            nn.utils.vector_to_parameters(torch.full((1000,), value, dtype=torch.bfloat16), [p])
        optimizer.step()
        assert p[0] == 7


def test_a_master_copy_keeps_what_was_not_changed_elsewhere() -> None:
    """As by ``nn.Embedding(max_norm=...)``, which renormalises the rows that it looks up."""
    p = nn.Parameter(torch.full((4, 2), 1.0, dtype=torch.bfloat16))
    optimizer = Adagrad([p], lr=0.001, multi_precision=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = optimizer.state[p]["master"].clone()
    assert (before != p).all(), "bits that the parameter does not have"
    with torch.no_grad():
        p[3] = 5.0
        p[2] *= 1  # counted as a change
    p.grad = torch.zeros_like(p)
    optimizer.step()
    after = optimizer.state[p]["master"]
    assert_same_bits(after[:3], before[:3])
    assert after[3].tolist() == p[3].tolist() == [5.0, 5.0]
