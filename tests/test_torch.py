"""``adagrad.torch.Adagrad``: the same bits as the library's other ways, and an ordinary optimizer to PyTorch."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import oracle
from adagrad import torch as front_end
from adagrad import torch_compiler
from adagrad.kernels import fast_path, general_path
from adagrad.rule import Rule
from adagrad.torch import Adagrad
from support import assert_same_bits, to_numpy

LOW = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *LOW)
HYPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"lr": 0.3, "weight_decay": 0.1, "lr_decay": 0.5},
    "clip": {"clip_value": 0.4, "eps": 1e-3, "initial_accumulator_value": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.01, "clip_value": 1.0},
}


def parameter(shape: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(p: Tensor, seed: int) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def coo(indices: Any, values: Tensor, shape: Any) -> Tensor:
    """A sparse tensor, not coalesced."""
    indices = torch.as_tensor(indices)
    indices = indices if indices.ndim == 2 else indices[None]
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)


def hyper(step: int, **options: Any) -> oracle.Hyper:
    """The oracle's words for the options, at a step (the first is 0)."""
    return oracle.Hyper(
        lr=options.get("lr", 1e-2) / (1 + step * options.get("lr_decay", 0)),
        wd=options.get("weight_decay", 0.0),
        rescale_grad=-1.0 if options.get("maximize") else 1.0,
        clip_gradient=options.get("clip_value"),
        epsilon=options.get("eps", 1e-10),
        row_wise=options.get("row_wise", False),
    )


class Expected:
    """A parameter and its state as the oracle has them."""

    def __init__(self, p: Tensor, **options: Any) -> None:
        self.options = options
        self.weight = to_numpy(p).copy()
        wide = np.float64 if p.dtype == torch.float64 else np.float32
        shape = (len(p), *(1 for _ in p.shape[1:])) if options.get("row_wise") else tuple(p.shape)
        self.history = np.full(shape, options.get("initial_accumulator_value", 0.0), wide)
        self.master = None
        if options.get("multi_precision") and p.dtype in LOW:
            self.master = self.weight.astype(np.float32)
        self.steps = 0

    def step(self, grad: Tensor) -> None:
        now = hyper(self.steps, **self.options)
        if grad.is_sparse:
            rows, values = grad._indices()[0].tolist(), to_numpy(grad._values())
            new = oracle.row_sparse(self.weight, rows, values, self.history, now, self.master)
        else:
            new = oracle.dense(self.weight, to_numpy(grad), self.history, now, self.master)
        self.weight, self.history, self.master = new
        self.steps += 1

    def compare(self, p: Tensor, state: dict[str, Any]) -> None:
        assert_same_bits(p, self.weight, "weight")
        assert_same_bits(state["sum"], self.history, "sum")
        assert ("master" in state) == (self.master is not None)
        if self.master is not None:
            assert_same_bits(state["master"], self.master, "master")
        assert state["step"].item() == self.steps


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("extra", [{}, {"row_wise": True}, {"multi_precision": True}], ids=str)
@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense(dtype: torch.dtype, name: str, extra: dict[str, bool]) -> None:
    options = HYPERS[name] | extra
    params = [parameter(shape, dtype, seed) for seed, shape in enumerate([(5, 7), (33,), (2, 3, 4), (0, 3)])]
    optimizer, expected = Adagrad(params, **options), [Expected(p, **options) for p in params]
    for step in range(3):
        for i, (p, e) in enumerate(zip(params, expected, strict=True)):
            p.grad = gradient(p, 10 * step + i)
            e.step(p.grad)
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        e.compare(p, optimizer.state[p])


@pytest.mark.parametrize("extra", [{}, {"row_wise": True}, {"multi_precision": True}], ids=str)
@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sparse_gradients_with_duplicates(dtype: torch.dtype, name: str, extra: dict[str, bool]) -> None:
    """Rows that occur are updated once, decay included; the others keep their bits; nothing is coalesced."""
    options = HYPERS[name] | extra
    params = [parameter(shape, dtype, seed) for seed, shape in enumerate([(9, 4), (9,), (9, 2, 3)])]
    optimizer, expected = Adagrad(params, **options), [Expected(p, **options) for p in params]
    for step in range(3):
        for p, e in zip(params, expected, strict=True):
            rows = torch.randint(9, (12,), generator=torch.Generator().manual_seed(step))
            p.grad = coo(rows, torch.randn(12, *p.shape[1:]).to(dtype), p.shape)
            before = p.grad._values().clone()
            e.step(p.grad)
            assert not p.grad.is_coalesced()
            assert torch.equal(p.grad._values(), before)
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        e.compare(p, optimizer.state[p])


def test_hundreds_of_occurrences_of_one_row() -> None:
    p = parameter((3, 5))
    optimizer, expected = Adagrad([p]), Expected(p)
    p.grad = coo(torch.tensor([1, 2, 1, 1, 0]).repeat(300), torch.randn(1500, 5), p.shape)
    expected.step(p.grad)
    optimizer.step()
    expected.compare(p, optimizer.state[p])


@pytest.mark.parametrize("name", ["plain", "decay", "clip"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bags_as_dense(mode: str, name: str) -> None:
    """For rows that occur once the sparse gradient of a module gives the dense one's bits."""
    options = {k: v for k, v in HYPERS[name].items() if k != "weight_decay"}  # decay touches other rows, if dense
    modules = [nn.EmbeddingBag(50, 8, mode=mode, sparse=sparse) for sparse in (True, False)]
    modules[1].load_state_dict(modules[0].state_dict())
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20].reshape(5, 4)
    for module in modules:
        optimizer = Adagrad(module.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            module(ids).square().sum().backward()
            optimizer.step()
    assert_same_bits(modules[0].weight, modules[1].weight)


def test_as_torch_for_distinct_rows() -> None:
    ours, theirs = parameter((20, 6)), parameter((20, 6))
    first, second = Adagrad([ours], lr=0.1, lr_decay=0.1), torch.optim.Adagrad([theirs], lr=0.1, lr_decay=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sparse_coo_tensor", _quiet(torch.sparse_coo_tensor))
        for step in range(4):
            rows = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:7]
            ours.grad = coo(rows, torch.randn(7, 6, generator=torch.Generator().manual_seed(step)), (20, 6))
            theirs.grad = ours.grad.clone()
            first.step()
            second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.state[ours]["sum"], second.state[theirs]["sum"], rtol=1e-5, atol=1e-7)


def _quiet(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's own optimizer makes sparse tensors in a way that PyTorch warns of."""
    return lambda *args, **kwargs: make(*args, **{"check_invariants": False} | kwargs)


def test_histories_of_low_precision_do_not_freeze() -> None:
    """A bfloat16 accumulator of ones stays at 256: 256 + 1 rounds to 256."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = Adagrad([p])
    for _ in range(300):
        p.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[p]["sum"].dtype == torch.float32
    assert optimizer.state[p]["sum"].tolist() == [300.0] * 4


def test_float32_gradient_of_a_bfloat16_parameter() -> None:
    p = parameter((4, 3), torch.bfloat16)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this PyTorch has no grad_dtype")
    p.grad_dtype = torch.float32
    p.grad = torch.randn(4, 3) / 3
    optimizer, expected = Adagrad([p]), Expected(p)
    expected.step(p.grad)
    optimizer.step()
    expected.compare(p, optimizer.state[p])


# ------------------------------------------------------------------------------------------------ complex numbers


@pytest.mark.parametrize("name", HYPERS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_pairs(dtype: torch.dtype, name: str) -> None:
    real = torch.float32 if dtype == torch.complex64 else torch.float64
    pairs = [parameter((4, 3, 2), real), parameter((7, 2), real, 1)]
    params = [nn.Parameter(torch.view_as_complex(p.detach().clone())) for p in pairs]
    first, second = Adagrad(params, **HYPERS[name]), Adagrad(pairs, **HYPERS[name])
    for step in range(3):
        for p, pair in zip(params, pairs, strict=True):
            pair.grad = gradient(pair, step)
            p.grad = torch.view_as_complex(pair.grad.clone())
        first.step()
        second.step()
    for p, pair in zip(params, pairs, strict=True):
        assert_same_bits(torch.view_as_real(p), pair)
        assert_same_bits(torch.view_as_real(first.state[p]["sum"]), second.state[pair]["sum"])


def test_views_that_conjugate_or_negate() -> None:
    """What autograd hands over may be a view with a flag: its memory says something else than its numbers."""
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2))
    values = torch.tensor([1 + 2j, -3j, 2 - 1j])
    p.grad, q.grad = values.conj(), values.conj().resolve_conj()
    assert p.grad.is_conj()
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a.grad, b.grad = values.conj().imag, values.conj().imag.resolve_neg()
    assert a.grad.is_neg()
    for params in ([p, a], [q, b]):
        Adagrad(params).step()
    assert_same_bits(torch.view_as_real(p), torch.view_as_real(q))
    assert_same_bits(a, b)


def test_sparse_complex_gradient() -> None:
    p = nn.Parameter(torch.ones(5, 2, dtype=torch.complex64))
    values = torch.randn(3, 2, dtype=torch.complex64)
    p.grad = coo([0, 3, 0], values, p.shape)
    Adagrad([p], lr=0.5).step()
    q = nn.Parameter(torch.ones(5, 2, dtype=torch.complex64))
    q.grad = coo([0, 3, 0], values, p.shape).to_dense()
    Adagrad([q], lr=0.5).step()
    assert_same_bits(torch.view_as_real(p), torch.view_as_real(q))


# ------------------------------------------------------------------------------------------------ memory of any kind


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    def misaligned(t: Tensor) -> Tensor:
        raw = torch.frombuffer(bytearray(t.numel() * t.element_size() + 1), dtype=torch.uint8)
        return torch.from_numpy(np.ndarray(tuple(t.shape), to_numpy(t).dtype, raw.numpy().data, offset=1)).copy_(t)

    return {
        "contiguous": lambda t: t.clone(),
        "channels last": lambda t: t.clone(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "a slice": lambda t: torch.stack([t, t], -1)[..., 1],
        "a view into more": lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
        "misaligned": misaligned,
    }


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("second", layouts())
@pytest.mark.parametrize("first", layouts())
def test_layout(first: str, second: str, row_wise: bool) -> None:
    """Any strides of a parameter and of its gradient."""
    start, grad = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    p, q = nn.Parameter(layouts()[first](start)), nn.Parameter(start.clone())
    p.grad, q.grad = layouts()[second](grad), grad.clone()
    first_optimizer, second_optimizer = (Adagrad([t], weight_decay=0.1, row_wise=row_wise) for t in (p, q))
    for _ in range(2):
        first_optimizer.step()
        second_optimizer.step()
    assert_same_bits(p.detach().contiguous(), q)
    assert_same_bits(first_optimizer.state[p]["sum"].contiguous(), second_optimizer.state[q]["sum"])


def test_expanded_gradient() -> None:
    p, q = parameter((4, 3)), parameter((4, 3))
    p.grad, q.grad = torch.full((1, 1), 0.5).expand(4, 3), torch.full((4, 3), 0.5)
    Adagrad([p]).step()
    Adagrad([q]).step()
    assert_same_bits(p, q)


@pytest.mark.parametrize("sparse_dim", [2, 3])
def test_several_sparse_dimensions(sparse_dim: int) -> None:
    """Each entry is a row of its own: decay touches those that occur."""
    p, q = parameter((3, 4, 5)), parameter((3, 4, 5))
    indices = torch.tensor([[0, 2, 0, 1], [3, 1, 3, 0], [0, 4, 0, 2]])[:sparse_dim]
    p.grad = coo(indices, torch.randn(4, *p.shape[sparse_dim:]), p.shape)
    optimizer = Adagrad([p], weight_decay=0.1)
    flat = nn.Parameter(q.detach().reshape(-1, *p.shape[sparse_dim:]))
    rows = indices[0]
    for d in range(1, sparse_dim):
        rows = rows * p.shape[d] + indices[d]
    flat.grad = coo(rows, p.grad._values().clone(), flat.shape)
    other = Adagrad([flat], weight_decay=0.1)
    optimizer.step()
    other.step()
    assert_same_bits(p.detach().reshape(flat.shape), flat)
    assert_same_bits(optimizer.state[p]["sum"].reshape(flat.shape), other.state[flat]["sum"])


@given(st.data())
def test_any_list_of_parameters(data: st.DataObject) -> None:
    """A step over a mixed list is the steps of its parameters one by one."""
    kinds = st.tuples(
        st.sampled_from([(3,), (2, 3), (4, 1), (0,), (2, 0)]),
        st.sampled_from(FLOATS),
        st.sampled_from(["dense", "sparse", "none"]),
    )
    drawn = data.draw(st.lists(kinds, min_size=1, max_size=6))
    options = data.draw(st.fixed_dictionaries({}, optional={
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "lr_decay": st.sampled_from([0.0, 0.3]),
        "maximize": st.booleans(),
        "clip_value": st.sampled_from([None, 0.5]),
        "row_wise": st.booleans(),
        "multi_precision": st.booleans(),
    }))  # fmt: skip
    split = data.draw(st.integers(0, len(drawn)))

    def make() -> list[nn.Parameter]:
        params = []
        for i, (shape, dtype, kind) in enumerate(drawn):
            p = parameter(shape, dtype, i)
            if kind == "dense":
                p.grad = gradient(p, i)
            elif kind == "sparse":
                rows = torch.arange(3) % shape[0] if shape[0] else torch.zeros(0, dtype=torch.int64)
                p.grad = coo(rows, torch.randn(len(rows), *shape[1:]).to(dtype), shape)
            params.append(p)
        return params

    params = make()
    singles = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": params[:split], "lr": 0.3}, {"params": params[split:]}]
    together = Adagrad([group for group in groups if group["params"]], **options)
    alone = [Adagrad([q], **options | ({"lr": 0.3} if i < split else {})) for i, q in enumerate(singles)]
    for p, q in zip(params, singles, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    for _ in range(2):
        together.step()
        for optimizer in alone:
            optimizer.step()
    for p, q, optimizer in zip(params, singles, alone, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(together.state[p]["sum"], optimizer.state[q]["sum"])
        assert together.state[p]["step"] == optimizer.state[q]["step"] == (0 if p.grad is None else 2)


@pytest.mark.parametrize("sparse", [False, True])
def test_threads_change_no_bit(sparse: bool, always_parallel: None) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = parameter((1000, 8))
            optimizer = Adagrad([p], weight_decay=0.1)
            for step in range(2):
                rows = torch.randint(1000, (3000,), generator=torch.Generator().manual_seed(step))
                values = torch.randn(3000, 8, generator=torch.Generator().manual_seed(step))
                p.grad = coo(rows, values, p.shape) if sparse else gradient(p, step)
                optimizer.step()
            results.append(p)
    finally:
        torch.set_num_threads(before)
    for p in results[1:]:
        assert_same_bits(p, results[0])


# ------------------------------------------------------------------------------------------- an ordinary optimizer


def test_what_is_swapped_between_steps_counts() -> None:
    """Nothing of a step is remembered: not addresses, not dtypes, not states."""
    p = parameter((4, 3))
    optimizer, expected = Adagrad([p], lr=0.1), Expected(p, lr=0.1)
    for step in range(4):
        p.data = p.data.clone()
        optimizer.state[p]["sum"] = optimizer.state[p]["sum"].clone()
        p.grad = gradient(p, step)
        expected.step(p.grad)
        optimizer.step()
    expected.compare(p, optimizer.state[p])
    p.data = p.data.t().contiguous().t()
    p.grad = gradient(p, 9)
    expected.step(p.grad)
    optimizer.step()
    expected.compare(p.detach().contiguous(), {**optimizer.state[p], "sum": optimizer.state[p]["sum"].contiguous()})
    p.data = p.data.double()
    optimizer.state[p]["sum"] = optimizer.state[p]["sum"].double()
    p.grad = torch.zeros(4, 3, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[p]["sum"].dtype == torch.float64
    optimizer.state[p] = {}
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_groups_have_their_own_options() -> None:
    options = [{"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.1}, {"eps": 1e-2, "clip_value": 0.3}, {"row_wise": True},
               {"maximize": True, "initial_accumulator_value": 0.5}]  # fmt: skip
    params = [parameter((5, 4), seed=i) for i in range(len(options))]
    optimizer = Adagrad([{"params": [p], **o} for p, o in zip(params[:3], options[:3], strict=True)])
    for p, o in zip(params[3:], options[3:], strict=True):
        optimizer.add_param_group({"params": p, **o})
    expected = [Expected(p, **o) for p, o in zip(params, options, strict=True)]
    for step in range(3):
        for p, e in zip(params, expected, strict=True):
            p.grad = gradient(p, step)
            e.step(p.grad)
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        e.compare(p, optimizer.state[p])


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)], ids=repr)
def test_learning_rate_is_a_number_or_a_tensor(lr: Any, fused: bool | None) -> None:
    p, q = parameter((3,)), parameter((3,))
    optimizer = Adagrad([p], lr=lr, lr_decay=0.5, fused=fused)
    other = Adagrad([q], lr=float(lr), lr_decay=0.5)
    for factor in (1.0, 0.5, 0.25):
        p.grad = q.grad = gradient(p, 0)
        if isinstance(lr, Tensor):
            optimizer.param_groups[0]["lr"] = lr * factor
        else:
            optimizer.param_groups[0]["lr"] = lr * factor
        other.param_groups[0]["lr"] = float(lr * factor)
        optimizer.step()
        other.step()
    assert_same_bits(p, q)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["step", "one cycle", "cosine", "lambda"],
)
def test_schedulers(make: Callable[[Any], Any]) -> None:
    p, q = parameter((6,)), parameter((6,))
    first, second = Adagrad([p], lr=0.1), torch.optim.Adagrad([q], lr=0.1)
    schedulers = [make(first), make(second)]
    for step in range(6):
        p.grad = gradient(p, step)
        q.grad = p.grad.clone()
        for optimizer, scheduler in zip((first, second), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_reduce_on_plateau() -> None:
    p = parameter((2,))
    optimizer = Adagrad([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_closure_and_hooks() -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert loss is not None
    assert loss.item() > 0
    optimizer.zero_grad()
    assert p.grad is None


def test_hooks_are_called_from_when_they_are_there() -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    calls = []
    for name in ("pre", "post"):
        optimizer.step()
        own = getattr(optimizer, f"register_step_{name}_hook")(lambda *_, name=name: calls.append(name))
        optimizer.step()
        own.remove()
        optimizer.step()
    handle = register_optimizer_step_pre_hook(lambda *_: ((optimizer, lambda: calls.append("closure")), {}))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert calls == ["pre", "post", "closure"]
    assert optimizer.state[p]["step"] == 8
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: calls.append("the closure's")))  # type: ignore
    assert calls[3:] == ["the closure's"]


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_profiler_sees_the_step(in_a_thread: bool) -> None:
    p = parameter((3,))
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    optimizer.step()
    config = torch.profiler._ExperimentalConfig(profile_all_threads=in_a_thread)
    with torch.profiler.profile(experimental_config=config) as profiler:
        if in_a_thread:
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            thread.join()
        else:
            optimizer.step()
    optimizer.step()
    assert [event.name for event in profiler.events()].count("Optimizer.step#Adagrad.step") == 1


def test_optimizer_in_backward() -> None:
    """One optimizer for each parameter, which steps as soon as its gradient is complete."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    other = copy.deepcopy(model)
    optimizers = {p: Adagrad([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    together = Adagrad(other.parameters(), lr=0.1)
    for seed in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        other(x).square().mean().backward()
        together.step()
        together.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(p, q)


def test_pickle_and_deepcopy() -> None:
    model = nn.Linear(3, 2)
    optimizer = Adagrad(model.parameters(), lr=0.1, weight_decay=0.1, clip_value=0.5)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    pair = model, optimizer
    for again_model, again in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        again_model(torch.ones(3)).sum().backward()
        again.step()
        assert again.param_groups[0]["clip_value"] == 0.5
    model.zero_grad()
    again_model.zero_grad()
    for m, o in ((model, optimizer), (again_model, again)):
        m(torch.ones(3)).sum().backward()
        o.step()
    assert optimizer.state[model.weight]["step"] == 2
    assert again.state[again_model.weight]["step"] == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_differentiable_step_under_vmap() -> None:
    def after_a_step(weight: Tensor) -> Tensor:
        optimizer = Adagrad([weight], lr=0.5, eps=0.0, differentiable=True)
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        return weight.sum()

    assert torch.func.vmap(after_a_step)(torch.ones(2, 3)).tolist() == [1.5, 1.5]


def test_share_memory() -> None:
    p = parameter((3,), torch.bfloat16)
    optimizer = Adagrad([p], multi_precision=True)
    p.grad = gradient(p, 0)
    optimizer.step()
    optimizer.share_memory()
    assert optimizer.state[p]["sum"].is_shared()
    assert optimizer.state[p]["master"].is_shared()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_only_the_parameters_state_is_shared() -> None:
    optimizer = Adagrad([parameter((3,))])
    optimizer.state["global"] = 3  # type: ignore[index, assignment]
    optimizer.share_memory()


@pytest.mark.parametrize("what", ["parameter", "sum", "master"])
def test_autograd_notices_what_has_changed(what: str) -> None:
    p = parameter((3,), torch.bfloat16 if what == "master" else torch.float32)
    optimizer = Adagrad([p], multi_precision=what == "master")
    p.grad = torch.ones_like(p)
    optimizer.step()
    factor = torch.ones(3, requires_grad=True)
    loss = (factor * (p if what == "parameter" else optimizer.state[p][what])).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ mixed precision


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


# ------------------------------------------------------------------------------------------------------ compilation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo asks
def test_compiled_training_step() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = Adagrad(model.parameters(), lr=0.1)

        def step(x: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(step, backend="eager") if compiled else step
        results.append([run(torch.ones(5, 4) * k).item() for k in range(4)])
        assert optimizer.state[model[0].weight]["step"] == 4
    assert results[0] == results[1]
    torch._dynamo.reset()


def test_the_compiler_traces_nothing_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it compiles `step` itself nor where it comes back after a break in the graph."""
    seen = []

    def spy(*arguments: Any) -> None:
        seen.append((torch.compiler.is_dynamo_compiling(), torch_compiler._compiler()))
        update(*arguments)

    update, nothing = front_end.update, torch_compiler._compiler()
    monkeypatch.setattr(front_end, "update", spy)
    p = parameter((3,))
    optimizer = Adagrad([p], lr=0.1)

    def run(x: Tensor) -> Tensor:
        p.grad = x * 2
        torch._dynamo.graph_break()
        optimizer.step()
        return x + 1

    ways: list[Callable[[], Any]] = [partial(torch.compile(run, backend="eager"), torch.ones(3))]
    ways += [torch.compile(optimizer.step, backend="eager"), optimizer.step]
    for step in ways:
        step()
        step()
    assert seen == [(False, nothing)] * 6
    assert optimizer.state[p]["step"] == 6
    torch._dynamo.reset()


def test_asking_for_the_compiler_takes_no_reference_away() -> None:
    """PyTorch 2.6 and 2.7 do that: they are not asked."""
    before = sys.getrefcount(None)
    for _ in range(10_000):
        torch_compiler._compiler()
    assert abs(sys.getrefcount(None) - before) < 1000


@pytest.mark.parametrize(("version", "is_asked"), [("2.4.1", False), ("2.7.1+cu126", False), ("2.13.0+cpu", True)])
def test_whom_to_ask_for_the_compiler(version: str, is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: "asked", raising=False)
    assert torch_compiler.what_tells_the_compiler()() == ("asked" if is_asked else False)


# ------------------------------------------------------------------------------------------------- differentiable


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


def test_parameters_in_a_tuple_of_ones_own() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adagrad(params, lr=0.5)
    optimizer.param_groups[0]["params"] = tuple(params)
    for p in params:
        p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert all(p.tolist() == [0.5] * 3 for p in params)


@pytest.mark.parametrize("count", [1, 2])
def test_a_rate_on_a_device_is_not_read_by_the_host(count: int) -> None:
    """Those on a CUDA device go to its kernels; here "meta" stands for it."""
    tensors = [torch.ones(3, device="meta") for _ in range(count)]
    lrs = [torch.tensor(0.1, device="meta")] * count
    assert not fast_path.update_plain(tensors, tensors, tensors, [], [], lrs, [0.0], Rule(), None)


def test_a_parameter_that_comes_back_keeps_its_state() -> None:
    params = [[parameter((3,))] for _ in range(2)]
    for (p,), klass in zip(params, (Adagrad, torch.optim.Adagrad), strict=True):
        optimizer = klass([p], lr=0.1)
        for step in range(4):
            if step == 2:
                optimizer.param_groups.clear()
                optimizer.add_param_group({"params": [p], "lr": 0.2})
            p.grad = gradient(p, step)
            optimizer.step()
        assert optimizer.state[p]["step"] == 4
    assert torch.allclose(params[0][0], params[1][0], rtol=1e-6)


@pytest.mark.parametrize("name", ["eps", "weight_decay", "lr_decay"])
def test_hyper_parameters_that_are_tensors(name: str) -> None:
    params = [parameter((3,)) for _ in range(2)]
    number = torch.tensor(0.25)
    for p, value in zip(params, (number, 0.25), strict=True):
        optimizer = Adagrad([p], lr=0.1, **{name: value})  # type: ignore[arg-type]
        for step in range(3):
            p.grad = gradient(p, step)
            optimizer.step()
    assert_same_bits(*params)


def test_many_groups_of_one_rule_and_of_others() -> None:
    """Groups in any order: each parameter as if it were alone."""
    options = [{"lr": 0.1 * (1 + k % 3), "eps": 0.1 * (1 + k % 2), "weight_decay": 0.01 * (k % 4)} for k in range(12)]
    params, alone = [parameter((3,), seed=k) for k in range(12)], [parameter((3,), seed=k) for k in range(12)]
    together = Adagrad([{"params": [p], **each} for p, each in zip(params, options, strict=True)])
    apart = [Adagrad([p], **each) for p, each in zip(alone, options, strict=True)]  # type: ignore[arg-type]
    for p, q in zip(params, alone, strict=True):
        p.grad, q.grad = gradient(p, 0), gradient(q, 0)
    together.step()
    for each in apart:
        each.step()
    for p, q in zip(params, alone, strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize("is_plain", [True, False])
def test_an_interrupt_that_is_noticed_after_the_kernels_loses_no_count(
    is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(*given: Any) -> None:
        real(*given)
        raise KeyboardInterrupt

    place, name = (fast_path, "update_plain") if is_plain else (general_path.Prepared, "run")
    real = getattr(place, name)
    p = nn.Parameter(torch.ones(3) if is_plain else torch.ones(6)[::2])
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    monkeypatch.setattr(place, name, update)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[p]["sum"].tolist() == [1.0] * 3
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("is_plain", [True, False])
def test_an_interrupt_before_the_kernels_counts_nothing(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    p = nn.Parameter(torch.ones(3) if is_plain else torch.ones(6)[::2])
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    monkeypatch.setattr(*((fast_path, "update_plain") if is_plain else (general_path, "prepare")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0
    assert (p == 1).all()


def test_a_differentiable_step_decays_by_each_parameters_own_count() -> None:
    params = [torch.ones(2, requires_grad=True).clone() for _ in range(2)]
    optimizer = Adagrad(params, lr=0.5, lr_decay=1.0, eps=0.0, differentiable=True)
    optimizer.state[params[1]]["step"].fill_(1)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.5, 0.5], [0.75, 0.75]]


def test_fused_counts_are_on_the_parameters_device() -> None:
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    for fused, device in ((True, "meta"), (False, "cpu")):
        assert Adagrad([p], fused=fused).state[p]["step"].device.type == device


def test_counts_are_as_wide_as_pytorchs() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(torch.ones(2))
        assert [kind([p]).state[p]["step"].dtype for kind in (Adagrad, torch.optim.Adagrad)] == [torch.float64] * 2
    finally:
        torch.set_default_dtype(torch.float32)
