"""What ``adagrad.torch.Adagrad`` computes: the same bits as the library's other ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from adagrad.kernels import fast_path, general_path
from adagrad.kernels.tensors import views as tensor_views
from adagrad.torch import Adagrad
from processes import run
from support import assert_same_bits, refuse_the_general_path, to_numpy
from torch_oracle import HYPERS, LOW, Expected, contents, coo, gradient, parameter
from torch_versions import has_grad_dtype, reads_sparse

FLOATS = (torch.float32, torch.float64, *LOW)


# ----------------------------------------------------------------------------------------------------- what it computes


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
def test_sparse_gradients_with_duplicates(
    dtype: torch.dtype, name: str, extra: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
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
            assert torch.equal(p.grad._values(), before)
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "coalesce", None)
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


@has_grad_dtype
def test_float32_gradient_of_a_bfloat16_parameter() -> None:
    p = parameter((4, 3), torch.bfloat16)
    p.grad_dtype = torch.float32
    p.grad = torch.randn(4, 3) / 3
    optimizer, expected = Adagrad([p]), Expected(p)
    expected.step(p.grad)
    optimizer.step()
    expected.compare(p, optimizer.state[p])


@has_grad_dtype
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"row_wise": True}, {"differentiable": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_gradients_of_another_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, bool], is_sparse: bool
) -> None:
    """Whatever the format of the history can represent is converted to it; weights are updated as by the converted."""
    params = [[parameter((4, 3), dtype, i).detach() for i in range(2)] for _ in range(2)]
    first, second = (Adagrad(both, lr=0.1, **options) for both in params)
    for step in range(2):
        for k, (p, q) in enumerate(zip(*params, strict=True)):
            grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(grad_dtype)
            if is_sparse and k == 0:
                grad = coo([2, 0, 2, 3], grad, (4, 3))
            p.grad_dtype = grad_dtype
            q.grad_dtype = first.state[p]["sum"].dtype
            p.grad = grad
            q.grad = grad.to(first.state[p]["sum"].dtype)
        first.step()
        second.step()
        assert all(p.grad.dtype == grad_dtype for p in params[0])
    for p, q in zip(*params, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(first.state[p]["sum"], second.state[q]["sum"])


@has_grad_dtype
@pytest.mark.parametrize(("found_inf", "expected"), [(0.0, 4.0), (1.0, 0.0)])
def test_a_gradient_of_another_dtype_is_scaled(found_inf: float, expected: float) -> None:
    p = parameter((3,), torch.float64)
    optimizer = Adagrad([p], fused=True)
    p.grad_dtype, p.grad = torch.float32, torch.full((3,), 4.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)  # type: ignore[attr-defined]
    optimizer.step()
    assert (optimizer.state[p]["sum"] == expected).all()
    assert optimizer.state[p]["step"] == (expected > 0)


@has_grad_dtype
def test_a_gradient_of_another_dtype_and_order_is_not_rounded() -> None:
    p, q = (parameter((4, 3), torch.bfloat16) for _ in range(2))
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t()
    for each, one in ((p, grad), (q, grad.contiguous())):
        each.grad_dtype, each.grad = torch.float32, one
        optimizer = Adagrad([each])
        optimizer.step()
        assert_same_bits(optimizer.state[each]["sum"], grad.contiguous().square())
    assert_same_bits(p, q)


@has_grad_dtype
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_would_be_rounded_are_refused(dtype: torch.dtype, is_transposed: bool) -> None:
    p, q = (parameter((4, 3), dtype, i) for i in range(2))
    wide = torch.ones(3, 4, dtype=torch.float64).t() if is_transposed else torch.ones(4, 3, dtype=torch.float64)
    p.grad, q.grad_dtype, q.grad = torch.ones_like(p), torch.float64, wide
    before = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(TypeError, match=r"gradient of parameter\[1\]: dtype float64: must be"):
        Adagrad([p, q]).step()
    assert_same_bits(p, before[0])
    assert_same_bits(q, before[1])


# ------------------------------------------------------------------------------------------------------ complex numbers


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


@pytest.mark.parametrize("kind", ["complex", "transposed", "expanded", "conjugated", "negated", "with a view"])
def test_gradients_that_take_the_fast_path_as_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside usual ones, to the bits of the general path; no gradient changes."""
    is_complex = kind in ("complex", "conjugated")
    results = []
    for refused in (general_path, fast_path):
        odd = nn.Parameter(parameter((4, 6)).detach().t() if kind == "with a view" else parameter((6, 4)).detach())
        if is_complex:
            odd = nn.Parameter(torch.view_as_complex(parameter((6, 4, 2)).detach()))
        usual = parameter((5,))
        optimizer = Adagrad([usual, odd], lr=0.3, weight_decay=0.1, clip_value=2.0)
        for step in range(2):
            usual.grad, odd.grad = gradient(usual, step), torch.randn_like(odd, memory_format=torch.contiguous_format)
            odd.grad.copy_(torch.arange(odd.numel()).view_as(odd) + (1j if is_complex else 0))
            if kind == "transposed":
                odd.grad = odd.grad.t().contiguous().t()
            elif kind == "expanded":
                odd.grad = torch.full((6, 1), 0.5).expand(6, 4)
            elif kind == "conjugated":
                odd.grad = odd.grad.conj()
            elif kind == "negated":
                odd.grad = torch._neg_view(odd.grad)
            before = odd.grad.clone()
            with monkeypatch.context() as within:
                if refused is general_path:
                    refuse_the_general_path(within)
                else:
                    within.setattr(fast_path, "update_plain", lambda *_: False)
                optimizer.step()
            assert torch.equal(odd.grad, before)
        results.append([usual, optimizer.state[usual]["sum"], odd, optimizer.state[odd]["sum"]])
        assert optimizer.state[odd]["step"] == 2
    for a, b in zip(*results, strict=True):
        assert_same_bits(torch.view_as_real(a) if a.is_complex() else a, torch.view_as_real(b) if b.is_complex() else b)


def of_another_order(p: Tensor) -> Tensor:
    return torch.arange(float(p.numel())).to(p.dtype).view(p.shape[::-1]).t()


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (lambda o, a, b: a.detach().t(), r"parameter\[0\]: shares memory with gradient of parameter\[0\]"),
        (lambda o, a, b: b.detach().t(), r"parameter\[1\]: shares memory with gradient of parameter\[0\]"),
        (lambda o, a, b: b.detach()[:1].expand(3, 3), r"parameter\[1\]: shares memory with gradient"),
        (lambda o, a, b: b.detach()[1:2].expand(3, 3), r"parameter\[1\]: shares memory with gradient"),
        (lambda o, a, b: o.state[b]["sum"].t(), r"sum of parameter\[1\]: shares memory with gradient"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_gradient_of_another_order_that_shares_memory_is_refused(
    dtype: torch.dtype, shared: Any, message: str
) -> None:
    a, b = (nn.Parameter(torch.ones(3, 3, dtype=dtype)) for _ in range(2))
    optimizer = Adagrad([a, b])
    a.grad, b.grad = shared(optimizer, a, b), of_another_order(b)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(a, torch.ones_like(a))
    assert torch.equal(b, torch.ones_like(b))


def test_what_no_copy_helps_is_left_to_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights with gaps, histories that are none, and more than is copied."""
    a, b = (nn.Parameter(torch.ones(3, 8, dtype=dtype)[:, ::2]) for dtype in (torch.complex64, torch.float32))
    a.grad, b.grad = torch.ones(3, 4, dtype=torch.complex64).conj(), torch._neg_view(torch.ones(3, 4))
    Adagrad([a, b], lr=0.5).step()
    assert torch.equal(a, torch.full_like(a, 0.5))
    assert torch.equal(b, torch.full_like(b, 1.5))
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    optimizer = Adagrad([p])
    for history, message in (
        (None, "must be a NumPy array or a torch tensor"),
        (torch.ones(2, 2).to_sparse(), "layout"),
    ):
        p.grad, optimizer.state[p]["sum"] = of_another_order(p), history
        with pytest.raises(TypeError, match=rf"sum of parameter\[0\].*{message}"):
            optimizer.step()
    p.grad, optimizer.state[p]["sum"] = of_another_order(p), torch.ones_like(p).conj()
    with pytest.raises(ValueError, match=r"sum of parameter\[0\]: a negated or conjugated view: must be resolved"):
        optimizer.step()
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64).conj())
    p.grad = of_another_order(p)
    with pytest.raises(ValueError, match=r"parameter\[0\]: a negated or conjugated view: must be resolved"):
        Adagrad([p]).step()
    monkeypatch.setattr(tensor_views, "MOST_COPIED", 15)
    for rows, is_general in ((3, False), (4, True)):
        taken = []
        monkeypatch.setattr(general_path, "prepare", lambda *given, real=general_path.prepare, taken=taken, **options: (
            taken.append(0), real(*given, **options))[1])  # fmt: skip
        params = [nn.Parameter(torch.ones(rows, 2)) for _ in range(2)]
        for p in params:
            p.grad = of_another_order(p)
        Adagrad(params).step()
        assert bool(taken) == is_general


def test_sparse_complex_gradient() -> None:
    p = nn.Parameter(torch.ones(5, 2, dtype=torch.complex64))
    values = torch.randn(3, 2, dtype=torch.complex64)
    p.grad = coo([0, 3, 0], values, p.shape)
    Adagrad([p], lr=0.5).step()
    q = nn.Parameter(torch.ones(5, 2, dtype=torch.complex64))
    q.grad = coo([0, 3, 0], values, p.shape).to_dense()
    Adagrad([q], lr=0.5).step()
    assert_same_bits(torch.view_as_real(p), torch.view_as_real(q))


# --------------------------------------------------------------------------------------------------- memory of any kind


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


def test_parts_of_one_storage_are_not_shared_memory() -> None:
    """Interleaved views and neighbours are told apart; gradients may share."""
    base, q = torch.randn(4, 6), torch.zeros(0)
    first, second = nn.Parameter(base[:, ::2]), nn.Parameter(base[:, 1::2])
    q = nn.Parameter(base[:, ::2].clone())
    optimizer, other = Adagrad([first, second]), Adagrad([q])
    first.grad = second.grad = q.grad = torch.randn(4, 3)
    optimizer.step()
    other.step()
    assert_same_bits(first, q)


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


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("entries", [0, 1, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_sparse_dimension_is_one_row(shape: tuple[int, ...], entries: int, transposed: bool) -> None:
    """The sum of the entries, in the order of a row's occurrences."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(entries, *shape, generator=generator)
    p, q = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    if transposed:
        p = nn.Parameter(torch.ones(shape[::-1]).permute(tuple(reversed(range(len(shape))))))
    p.grad = torch.sparse_coo_tensor(torch.zeros(0, entries, dtype=torch.long), values, shape, check_invariants=False)
    row = nn.Parameter(q.detach().clone()[None])
    index = torch.zeros(1, entries, dtype=torch.long)
    row.grad = torch.sparse_coo_tensor(index, values, (1, *shape), check_invariants=False)
    for each in (p, row):
        optimizer = Adagrad([each], lr=0.1, weight_decay=0.1)
        optimizer.step()
    assert_same_bits(p, row[0])


def test_no_sparse_dimension_has_one_row_in_the_master_copy_too() -> None:
    p, row = (nn.Parameter(torch.full(shape, 0.3, dtype=torch.bfloat16)) for shape in ((3,), (1, 3)))
    values = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 4.0]], dtype=torch.bfloat16)
    p.grad = torch.sparse_coo_tensor(torch.zeros(0, 2, dtype=torch.long), values, (3,), check_invariants=False)
    row.grad = coo([0, 0], values, (1, 3))
    one, other = (Adagrad([each], lr=0.1, multi_precision=True) for each in (p, row))
    for optimizer in (one, other):
        optimizer.step()
    assert_same_bits(p, row[0])
    assert_same_bits(one.state[p]["master"], other.state[row]["master"][0])


# ---------------------------------------------------------------------------------------------------- lists and threads


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
    # Of the first group; with the last three, also under another rule.
    own = {"lr": 0.3} | data.draw(st.fixed_dictionaries({}, optional={
        "weight_decay": st.just(0.2), "row_wise": st.booleans(), "maximize": st.booleans(), "clip_value": st.just(0.7),
    }))  # fmt: skip

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
    groups = [{"params": params[:split], **own}, {"params": params[split:]}]
    together = Adagrad([group for group in groups if group["params"]], **options)
    alone = [Adagrad([q], **options | (own if i < split else {})) for i, q in enumerate(singles)]
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


def tables_and_weights() -> tuple[Adagrad, list[nn.Parameter]]:
    """A recommender's groups: embeddings with row-wise history, other parameters under two more rules."""
    params = [nn.Parameter(torch.ones(6, 2)) for _ in range(2)]
    params += [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in ((3, None), ((2, 2), torch.float64))]
    for i, p in enumerate(params):
        p.grad = coo([5, i, 5], torch.full((3, 2), i + 1.0), (6, 2)) if i < 2 else torch.full_like(p, i)
    rules: list[dict[str, Any]] = [{"row_wise": True}, {"lr": 0.25, "maximize": True}, {"clip_value": 0.5}]
    parts = [params[:2], params[2:3], params[3:]]
    return Adagrad([{"params": part, **rule} for part, rule in zip(parts, rules, strict=True)], lr=0.5), params


@reads_sparse
def test_embeddings_and_weights_under_other_rules_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for refused in (general_path.prepare, fast_path.update_batches):
        optimizer, params = tables_and_weights()
        with monkeypatch.context() as within:
            if refused is general_path.prepare:
                refuse_the_general_path(within)
            else:
                within.setattr(fast_path, "update_batches", lambda *_: False)
            optimizer.step()
            optimizer.step()
        results.append(contents(optimizer, params))
        assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * 4
    for fast, general in zip(*results, strict=True):
        assert_same_bits(fast, general)


@pytest.mark.parametrize("fault", ["row id", "shape", "shared", "count"])
def test_of_groups_under_several_rules_all_or_none_are_updated(fault: str) -> None:
    optimizer, params = tables_and_weights()
    if fault == "row id":
        params[1].grad = torch.sparse_coo_tensor([[0, 6]], torch.ones(2, 2), (6, 2), check_invariants=False)
    elif fault == "shape":
        optimizer.state[params[3]]["sum"] = torch.zeros(2, 1, dtype=torch.float64)
    elif fault == "shared":
        params[2].data = params[0].data[0:2].view(4)[:3]
    else:
        optimizer.state[params[3]]["step"] = torch.zeros(2)
    before = contents(optimizer, params)
    message = {"row id": r"\[1\].*=6: must", "shape": r"\[3\]", "shared": "shares memory", "count": "parameter.3."}[
        fault
    ]
    with pytest.raises((ValueError, IndexError), match=message):
        optimizer.step()
    for was, now in zip(before, contents(optimizer, params), strict=True):
        assert_same_bits(was, now)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_as_torch_has(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    fast, general = fast_path.update_plain, general_path.prepare

    def update_plain(*values: Any) -> bool:
        given.append(values[2])
        return fast(*values)

    def prepare(*values: Any, **options: Any) -> Any:
        given.append(options["threads"])
        return general(*values, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(fast_path, "update_plain", update_plain)
    monkeypatch.setattr(general_path, "prepare", prepare)
    for step in (1, 2):
        p = nn.Parameter(torch.ones(8)[::step])
        p.grad = torch.ones_like(p)
        Adagrad([p]).step()
    assert given == [threads] * 3, "the second one goes both ways"


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


FREED = """
import threading, time
import torch
from adagrad.torch import Adagrad

height, columns, lookups = 200_000, 64, 400_000
p = torch.nn.Parameter(torch.zeros(height, columns))
optimizer = Adagrad([p])
ids, values = torch.randint(0, height, (1, lookups)), torch.ones(lookups, columns)

def step(wait=None):
    p.grad = torch.sparse_coo_tensor(ids, values.clone(), p.shape, check_invariants=False)
    other = threading.Thread(target=empty, args=(p.grad, wait))
    start = time.perf_counter()
    if wait is not None:
        other.start()
    optimizer.step()
    taken = time.perf_counter() - start
    if wait is not None:
        other.join()
    return taken

def empty(grad, wait):
    time.sleep(wait)
    with torch.no_grad():
        grad.zero_()
    torch.full((lookups, columns), float("nan"))

step()
duration = step()
for _ in range(10):
    step(duration / 3)
assert torch.isfinite(p.detach()).all()
"""


def test_a_gradient_that_another_thread_empties_meanwhile_is_read_to_its_end() -> None:
    run(FREED)
