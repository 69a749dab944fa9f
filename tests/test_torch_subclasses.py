"""``adagrad.torch.Adagrad`` and tensors that are not plain memory: subclasses, meta and fake tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from adagrad import RowSparse, kernels
from adagrad.kernels import fast_path
from adagrad.kernels.batch import Batch
from adagrad.rule import Rule
from adagrad.torch import Adagrad
from support import assert_same_bits


class Named(nn.Parameter):
    """A parameter with a name and nothing more."""


class Logged(Tensor):
    """A tensor that sees every operation on it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logged.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def expected(weight: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    p = nn.Parameter(weight.clone())
    optimizer = Adagrad([p], **options)
    p.grad = grad.clone()
    for _ in range(2):
        optimizer.step()
    return p.detach(), optimizer.state[p]["sum"]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip_value": 0.5, "maximize": True}], ids=str)
def test_subclasses(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(5, 4), torch.randn(5, 4)
    want, want_sum = expected(weight, grad, **options)
    Logged.seen = []
    wrapped = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    logged = weight.clone().as_subclass(Logged).requires_grad_()
    named = Named(weight.clone())
    for p, g in ((wrapped, TwoTensor(grad, grad)), (logged, grad), (named, grad)):
        p.grad = g
        optimizer = Adagrad([p], **options)
        for _ in range(2):
            optimizer.step()
        assert optimizer.state[p]["step"] == 2
        plain = p.a if isinstance(p, TwoTensor) else p.detach().as_subclass(Tensor)
        history = optimizer.state[p]["sum"]
        assert_same_bits(plain, want)
        assert_same_bits(history.a if isinstance(history, TwoTensor) else history.as_subclass(Tensor), want_sum)
    assert_same_bits(wrapped.b, want)
    assert "sqrt" in Logged.seen  # its own operations did it, not a kernel behind its back


def test_a_subclass_that_overlaps_itself_changes_nothing_else() -> None:
    first = nn.Parameter(torch.ones(2))
    Logged.seen = []
    second = torch.ones(1).expand(2).as_subclass(Logged).requires_grad_()
    optimizer = Adagrad([first, second])
    for p in (first, second):
        p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"parameter\[1\]: strides \(0,\): elements share memory"):
        optimizer.step()
    assert first.tolist() == [1, 1]
    assert optimizer.state[first]["sum"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"master copy in states\[0\]: shape \(3,\): must be \(2,\)"):
        kernels.update(
            [torch.ones(2, dtype=torch.float16).as_subclass(Logged)], [torch.ones(2)],
            [(torch.ones(3), torch.ones(2))], [0.1], [0.0], Rule(), fused=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "grad", "state"),
    [
        (torch.ones(()), torch.ones(()), torch.zeros(())),  # no rows
        (torch.ones(2), torch.ones(2), (torch.ones(2), torch.zeros(2, 1))),  # a master copy of float32
        (torch.ones(2), torch.ones(2), np.zeros(2, np.float32)),
        (torch.ones(2), torch.ones(2), torch.zeros(3)),
        (torch.ones(2), torch.ones(2), torch.zeros(2, dtype=torch.float64)),
        (torch.ones(2), np.ones(2, np.float32), torch.zeros(2)),
        (torch.ones(2), [1.0, 1.0], torch.zeros(2)),
        (torch.ones(2), torch.ones(3), torch.zeros(2)),
        (torch.ones(2), torch.ones(2).half(), torch.zeros(2)),
        (torch.ones(2).int(), torch.ones(2).int(), torch.zeros(2)),
        (torch.ones(2, 2), RowSparse(np.ones((1, 2), np.float32), np.array([0]), (2, 2)), torch.zeros(2, 1)),
    ],
    ids=str,
)
def test_a_subclass_is_refused_as_a_tensor_is(weight: Tensor, grad: Any, state: Any) -> None:
    Logged.seen, messages = [], []
    for kind in (Tensor, Logged):
        with pytest.raises((TypeError, ValueError)) as refused:
            kernels.update([weight.as_subclass(kind)], [grad], [state], [0.1], [0.0], Rule(row_wise=True), fused=True)
        messages.append(refused.exconly())
    assert messages[0] == messages[1]


class Fixed(Tensor):
    """A tensor that refuses to be written to, in a way that no check foresees."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__setitem__, Tensor.copy_):
            raise NotImplementedError("not to be written to")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_that_cannot_be_written_to_changes_nothing() -> None:
    first = nn.Parameter(torch.ones(2))
    second = torch.ones(2).as_subclass(Fixed).requires_grad_()
    optimizer = Adagrad([first, second])
    for p in (first, second):
        p.grad = torch.ones(2)
    optimizer.state[second]["sum"] = torch.zeros(2)
    with pytest.raises(NotImplementedError, match="not to be written to"):
        optimizer.step()
    assert first.tolist() == [1, 1]
    assert optimizer.state[first]["sum"].tolist() == optimizer.state[second]["sum"].tolist() == [0, 0]


def test_classes_that_are_only_memory_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as FSDP's flat parameters: the first step finds out. Classes with functions of their own never do."""

    class Flat(nn.Parameter):
        pass

    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(function, types, args, kwargs or {})

    real, done = fast_path.update_plain, []
    monkeypatch.setattr(fast_path, "update_plain", lambda *given: done.append(real(*given)) or done[-1])
    for kind, expected in ((Flat, [False, True, True]), (Own, [False, False, False])):
        p = kind(torch.ones(3))
        optimizer, other = Adagrad([p], lr=0.5), Adagrad([q := nn.Parameter(torch.ones(3))], lr=0.5)
        done.clear()
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        assert done == expected
        for _ in range(3):
            q.grad = torch.ones(3)
            other.step()
        assert_same_bits(p.detach().as_subclass(Tensor), q.detach())


@pytest.mark.parametrize("options", [{}, {"lr_decay": 0.1}, {"fused": True, "lr_decay": 0.1}], ids=str)
def test_meta_device(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = Adagrad([p], weight_decay=0.1, clip_value=1.0, **options)
    p.grad = torch.ones(3, 2, device="meta")
    optimizer.step()
    assert optimizer.state[p]["step"].is_meta or optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["sum"].device.type == "meta"


@pytest.mark.parametrize("count", [1, 2])
def test_a_rate_on_a_device_is_not_read_by_the_host(count: int) -> None:
    """Those on a CUDA device go to its kernels; here "meta" stands for it."""
    tensors = [torch.ones(3, device="meta") for _ in range(count)]
    lrs = [torch.tensor(0.1, device="meta")] * count
    assert not fast_path.update_plain(Batch(Rule(), tensors, tensors, tensors, [], lrs, [0.0]), [], None)


@pytest.mark.parametrize("options", [{"lr_decay": 0.1}, {"multi_precision": True}])
def test_fake_tensors(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        optimizer = Adagrad([p], **options)
        p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
