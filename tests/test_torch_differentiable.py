"""Differentiable steps of ``adagrad.torch.Adagrad``: gradients flow through them; those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adagrad.torch import Adagrad
from support import assert_same_bits
from torch_cases import rows_outside
from torch_oracle import HYPERS, coo, parameter


def _after_steps(start: Tensor, grad: Tensor, history: Tensor, lr: Any, **options: Any) -> tuple[Tensor, Tensor]:
    p = start.clone()
    optimizer = Adagrad([p], lr=lr, differentiable=True, **options)
    optimizer.state[p]["sum"] = history.clone()
    for k in range(2):
        p.grad = grad * (k + 1)
        optimizer.step()
    return p, optimizer.state[p]["sum"]


@pytest.mark.parametrize("lr_decay", [0.0, 0.5])
def test_gradients_reach_the_learning_rate_whatever_the_mode(lr_decay: float) -> None:
    found = []
    for mode in (torch.enable_grad, torch.no_grad):
        lr, p = torch.tensor(0.5, requires_grad=True), torch.ones(3, requires_grad=True).clone()
        optimizer = Adagrad([p], lr=lr, lr_decay=lr_decay, differentiable=True)
        p.grad = torch.ones(3)
        with mode():
            optimizer.step()
        found.append(torch.autograd.grad(p.sum(), lr)[0])
    assert found[0] == found[1] == -3


def test_options_that_require_grad_are_numbers() -> None:
    """Without a warning, which the tests would raise."""
    p = parameter((3,))
    optimizer = Adagrad([p], lr=torch.tensor(0.1, requires_grad=True), eps=torch.tensor(1.0, requires_grad=True))
    optimizer.param_groups[0]["lr_decay"] = torch.tensor(0.5, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["eps"].data.fill_(3.0)  # not the one that was looked at
    before = p.detach().clone()
    optimizer.step()
    want = torch.tensor(0.1) / torch.tensor(1.5) / (torch.tensor(2.0).sqrt() + 3)
    torch.testing.assert_close(before - p.detach(), want.expand(3))


def test_a_transform_of_a_differentiable_step() -> None:
    """torch.func's tensors look like others and have no memory of their own."""

    def loss(kind: Any) -> Any:
        def after_a_step(start: torch.Tensor) -> torch.Tensor:
            p = start.clone()
            p.grad = start * 2.0
            kind([p], lr=0.1, differentiable=True).step()
            return (p * p).sum()

        return after_a_step

    start = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    ours, theirs = (torch.func.grad(loss(kind))(start) for kind in (Adagrad, torch.optim.Adagrad))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_differentiable_step_under_vmap() -> None:
    def after_a_step(weight: Tensor) -> Tensor:
        optimizer = Adagrad([weight], lr=0.5, eps=0.0, differentiable=True)
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        return weight.sum()

    assert torch.func.vmap(after_a_step)(torch.ones(2, 3)).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("row_wise", [False, True])
def test_gradients_flow_through_a_step(name: str, row_wise: bool) -> None:
    options = {k: v for k, v in HYPERS[name].items() if k != "lr"}
    torch.manual_seed(0)
    start, grad = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    history = (torch.rand(3, 1 if row_wise else 4, dtype=torch.float64) + 0.1).requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: _after_steps(*inputs, row_wise=row_wise, **options), (start, grad, history, lr)
    )
    flowing = _after_steps(start, grad, history, 0.1, row_wise=row_wise, **options)
    plain = nn.Parameter(start.detach().clone())
    optimizer = Adagrad([plain], lr=0.1, row_wise=row_wise, **options)
    optimizer.state[plain]["sum"] = history.detach().clone()
    for k in range(2):
        plain.grad = (grad * (k + 1)).detach()
        optimizer.step()
    assert_same_bits(flowing[0], plain)
    assert_same_bits(flowing[1], optimizer.state[plain]["sum"])


def test_gradients_flow_through_a_sparse_step() -> None:
    torch.manual_seed(0)
    start, values = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def step(start: Tensor, values: Tensor) -> Tensor:
        p = start.clone()
        p.grad = coo([0, 2, 0], values, (3, 4))
        Adagrad([p], differentiable=True, weight_decay=0.1, initial_accumulator_value=0.1).step()
        return p

    assert torch.autograd.gradcheck(step, (start, values))
    plain = nn.Parameter(start.detach().clone())
    plain.grad = coo([0, 2, 0], values.detach(), (3, 4))
    Adagrad([plain], weight_decay=0.1, initial_accumulator_value=0.1).step()
    assert_same_bits(step(start, values), plain)


def test_a_differentiable_step_starts_from_the_master_copy() -> None:
    """Whose bits the parameter lacks: an update that rounding loses would be lost at every step."""
    p, q = (torch.ones(3, dtype=torch.bfloat16) for _ in range(2))
    optimizers = [Adagrad([each], lr=1e-3, multi_precision=True, differentiable=each is p, eps=0.0) for each in (p, q)]
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(p, q)
    assert_same_bits(optimizers[0].state[p]["master"], optimizers[1].state[q]["master"])


def test_a_differentiable_step_decays_by_each_parameters_own_count() -> None:
    params = [torch.ones(2, requires_grad=True).clone() for _ in range(2)]
    optimizer = Adagrad(params, lr=0.5, lr_decay=1.0, eps=0.0, differentiable=True)
    optimizer.state[params[1]]["step"].fill_(1)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.5, 0.5], [0.75, 0.75]]


# ------------------------------------------------------------------------------------------------------ what is refused


def not_a_leaf() -> Tensor:
    return torch.ones(4, 2, requires_grad=True).clone()


DIFFERENTIABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "row -1": (lambda p, o: rows_outside(p, o, -1), IndexError, r"indices\[1\]=-1: must be in \[0, 4\)"),
    "row 4": (lambda p, o: rows_outside(p, o, 4), IndexError, r"indices\[1\]=4: must be in \[0, 4\)"),
    "history of another shape": (lambda p, o: o.state[p].update(sum=torch.zeros(2)), ValueError, r"sum of parameter"),
    "history of another dtype": (
        lambda p, o: o.state[p].update(sum=torch.zeros(4, 2, dtype=torch.float16)),
        TypeError,
        r"sum of parameter\[1\]: dtype float16: must be float32",
    ),
    "history that overlaps itself": (
        lambda p, o: o.state[p].update(sum=torch.zeros(4, 1).expand(4, 2)),
        ValueError,
        r"sum of parameter\[1\]: strides \(4, 0\): elements share memory",
    ),
    "history of another parameter": (
        lambda p, o: o.state[p].update(sum=next(iter(o.state.values()))["sum"]),
        ValueError,
        r"sum of parameter\[1\]: shares memory with sum of parameter\[0\]",
    ),
    "gradient of another shape": (
        lambda p, o: p.grad.set_(torch.ones(2)),
        ValueError,
        r"gradient of parameter\[1\]: shape \(2,\): must be \(4, 2\)",
    ),
    "gradient that is the weight": (
        lambda p, o: p.grad.set_(p.detach()),
        ValueError,
        r"parameter\[1\]: shares memory with gradient of parameter\[1\]",
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_differentiable_step_that_is_refused(name: str) -> None:
    spoil, error, message = DIFFERENTIABLE[name]
    params = [not_a_leaf(), not_a_leaf()]
    optimizer = Adagrad(params, differentiable=True)
    for p in params:
        p.grad = torch.ones(4, 2)
    spoil(params[1], optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all((p == 1).all() for p in params)
    assert optimizer.state[params[0]]["step"] == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_differentiable_step_of_a_leaf_is_refused() -> None:
    params = [not_a_leaf(), torch.ones(4, 2, requires_grad=True)]
    optimizer = Adagrad(params, differentiable=True)
    for p in params:
        p.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="leaf"):
        optimizer.step()
    assert all((p == 1).all() for p in params)
