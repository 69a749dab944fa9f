"""PyTorch tensors on the CPU as weights and gradients of AdaGrad: the same bits as NumPy arrays."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import oracle
from adagrad import AdaGrad, GroupAdaGrad, RowSparse, get_updater
from adagrad.torch import Adagrad
from support import (
    BFLOAT16,
    HYPERS,
    KINDS,
    Kind,
    Operands,
    apply,
    assert_same,
    assert_same_bits,
    expected,
    operands,
    to_numpy,
    update_plain,
)
from torch_versions import reads_sparse
from training import FUSED

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's, on the state of its sparse tensors
CLASSES = pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
DTYPES = {torch.float32: "f4", torch.float64: "f8", torch.float16: "f2", torch.bfloat16: ml_dtypes.bfloat16}


def tensor(array: np.ndarray) -> torch.Tensor:
    """A copy as a tensor."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def tensors(o: Operands) -> Operands:
    """The same operands as tensors, which share nothing with them."""
    grad = o.grad
    if isinstance(grad, RowSparse):
        grad = RowSparse(tensor(grad.values), tensor(grad.indices), grad.shape)
    else:
        grad = tensor(grad)
    return Operands(tensor(o.weight), grad, tensor(o.history), None if o.master is None else tensor(o.master))  # type: ignore[arg-type]


@FUSED
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense(kind: Kind, row_wise: bool, fused: bool) -> None:
    rng = np.random.default_rng(0)
    for hyper in (HYPERS["all"], HYPERS["inside, decoupled"], HYPERS["plain"]):
        hyper = replace(hyper, row_wise=row_wise)
        for shape in [(0, 3), (17,), (5, 18)]:
            o = operands(rng, kind, shape, row_wise=row_wise)
            given = tensors(o)
            apply([given], [hyper], fused=fused)
            assert_same(given, expected(o, hyper), str(shape))
            assert_same_bits(given.grad, o.grad, "the gradient is not written to")


@FUSED
@pytest.mark.parametrize("row_wise", [False, True], ids=["each", "row-wise"])
@pytest.mark.parametrize("index", ["i4", "i8"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows(kind: Kind, index: str, row_wise: bool, fused: bool) -> None:
    rng = np.random.default_rng(1)
    hyper = replace(HYPERS["unclipped"], row_wise=row_wise)
    indices = rng.permutation([0, 3, 3, 8] + [5] * 200).astype(index)
    values = operands(rng, kind, (204, 3)).grad
    o = operands(rng, kind, (9, 3), row_wise=row_wise, grad=RowSparse(values, indices, (9, 3)))
    given = tensors(o)
    apply([given], [hyper], fused=fused)
    assert_same(given, expected(o, hyper))


def coo(indices: list[int], values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([indices]), values, shape)


@CLASSES
@FUSED
def test_sparse_coo_gradients(klass: type[AdaGrad], fused: bool) -> None:
    """Coalesced or not: the same as the RowSparse of their indices and values."""
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    uncoalesced = coo([6, 2, 6, 0, 6], values, (8, 3))
    assert not uncoalesced.is_coalesced()
    optimizer = klass(0.1, wd=0.1, use_fused_step=fused)
    for grad in (uncoalesced, uncoalesced.coalesce(), coo([], torch.zeros(0, 3), (8, 3))):
        weight = torch.ones(8, 3)
        state = optimizer.create_state(0, weight)
        rows = RowSparse(grad._values().numpy(), grad._indices()[0].numpy(), (8, 3))
        o = Operands(np.ones((8, 3), np.float32), rows, np.zeros(state.shape, np.float32))
        want = expected(o, oracle.Hyper(wd=0.1, row_wise=klass is GroupAdaGrad))
        optimizer.update(0, weight, grad, state)
        assert_same_bits(weight, want.weight)
        assert_same_bits(state, want.history)
    assert not uncoalesced.is_coalesced()
    assert_same_bits(uncoalesced._values(), values)


SPARSE_GRADIENTS: dict[str, tuple[Any, bool]] = {
    "uncoalesced": (lambda v: coo([6, 2, 6, 0, 6], v, (8, 3)), True),
    "coalesced": (lambda v: coo([6, 2, 6, 0, 6], v, (8, 3)).coalesce(), True),
    "no entries": (lambda v: coo([], v[:0], (8, 3)), True),
    "of a scaled loss": (lambda v: coo([6, 2, 6, 0, 6], v, (8, 3)) * 2, True),
    "of an embedding": (lambda v: embedding_gradient([6, 2, 6, 0, 6], v), True),
    "values in steps": (lambda v: coo([6, 2, 6, 0, 6], v.repeat(2, 1)[::2], (8, 3)), False),
    "values transposed": (lambda v: coo([6, 2, 6, 0, 6], v.t().contiguous().t(), (8, 3)), False),
    "values expanded": (lambda v: coo([6, 2, 6, 0, 6], v[:1].expand(5, 3), (8, 3)), False),
    "ids in steps": (lambda v: in_shape((8, 3), torch.tensor([6, 7, 2, 7, 6, 7, 0, 7, 6])[None, ::2], v), False),
    "negated": (lambda v: coo([6, 2, 6, 0, 6], torch._neg_view(v), (8, 3)), True),
}


def in_shape(shape: tuple[int, ...], indices: Any, values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.as_tensor(indices), values, shape, check_invariants=False)


def embedding_gradient(indices: list[int], values: torch.Tensor) -> Any:
    weight = torch.zeros(8, 3, dtype=values.dtype, requires_grad=True)
    torch.nn.functional.embedding(torch.tensor(indices), weight, sparse=True).backward(values)
    return weight.grad


@reads_sparse
@pytest.mark.parametrize("name", SPARSE_GRADIENTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.grad == kind.weight], ids=str)
def test_compiled_code_looks_into_sparse_gradients(kind: Kind, name: str) -> None:
    """The fast path takes those whose parts are plain, and the others are left as they were for the ordinary one."""
    make, is_plain = SPARSE_GRADIENTS[name]
    o = operands(np.random.default_rng(3), kind, (8, 3))
    values = tensors(operands(np.random.default_rng(4), kind, (5, 3))).weight
    grad = make(values)
    assert grad.dtype == values.dtype
    rows = RowSparse(to_numpy(grad._values()), grad._indices()[0].numpy(), (8, 3))
    want = expected(replace(o, grad=rows), HYPERS["plain"])
    given, before = (tensors(replace(o, grad=rows)) for _ in range(2))
    given.grad = grad
    assert update_plain([given], [HYPERS["plain"]]) == is_plain
    assert_same(given, want if is_plain else before)


@reads_sparse
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_sparse_gradients_are_held_no_longer_than_the_update(threads: int, always_parallel: None) -> None:
    values, ids = np.ones((2, 3), np.float32), np.array([[4, 1]])
    gone = [weakref.ref(array) for array in (values, ids)]
    grad: Any = in_shape((8, 3), torch.from_numpy(ids), torch.from_numpy(values))
    del values, ids
    assert all(array() is not None for array in gone)
    given: Any = Operands(torch.ones(8, 3), grad, torch.ones(8, 3))  # type: ignore[arg-type]
    assert update_plain([given], [HYPERS["plain"]], threads)
    del grad, given
    assert all(array() is None for array in gone)


MISFITS: dict[str, Any] = {
    "more rows": lambda: in_shape((9, 3), [[1]], torch.ones(1, 3)),
    "fewer rows": lambda: in_shape((7, 3), [[1]], torch.ones(1, 3)),
    "fewer columns": lambda: in_shape((8, 2), [[1]], torch.ones(1, 2)),
    "one more dimension": lambda: in_shape((8, 3, 1), [[1]], torch.ones(1, 3, 1)),
    "two sparse dimensions": lambda: in_shape((8, 3), [[1], [2]], torch.ones(1)),
    "two sparse dimensions, no entries": lambda: in_shape((8, 3), torch.zeros(2, 0).long(), torch.ones(0)),
    "two sparse dimensions, no entries, rows alike": lambda: in_shape(
        (8, 5, 3), torch.zeros(2, 0).long(), torch.ones(0, 3)
    ),
    "no sparse dimension": lambda: in_shape((8, 3), torch.zeros(0, 1).long(), torch.ones(1, 8, 3)),
    "no sparse dimension, no entries": lambda: in_shape((8, 3), torch.zeros(0, 0).long(), torch.ones(0, 8, 3)),
    "float64": lambda: in_shape((8, 3), [[1]], torch.ones(1, 3).double()),
    "complex": lambda: in_shape((8, 3), [[1]], torch.ones(1, 3) * 1j),
    "meta": lambda: in_shape((8, 3), [[1]], torch.ones(1, 3)).to("meta"),
    "compressed": lambda: torch.ones(8, 3).to_sparse_csr(),
    "dense integers": lambda: torch.ones(8, 3, dtype=torch.int64),
    "a list": lambda: [1.0, 2.0],
}


@reads_sparse
@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("beside_dense", [False, True])
def test_gradients_that_do_not_fit_are_left_to_the_general_path(name: str, beside_dense: bool) -> None:
    plain: Any = coo([1], torch.ones(1, 3), (8, 3))
    grads = [plain, MISFITS[name](), *([torch.ones(8, 3)] if beside_dense else [])]
    given: list[Any] = [Operands(torch.ones(8, 3), grad, torch.ones(8, 3)) for grad in grads]  # type: ignore[arg-type]
    assert not update_plain(given, [HYPERS["plain"]])
    assert all((t == 1).all() for o in given for t in (o.weight, o.history))
    given[1].grad = plain
    assert update_plain(given, [HYPERS["plain"]]), "it was the misfit"


@FUSED
def test_values_that_are_sparse_themselves_are_refused(fused: bool) -> None:
    values = in_shape((8, 3), [[1]], torch.ones(1, 3))
    grad = RowSparse(values, torch.full((8,), 99), (8, 3))
    weights, histories = ([torch.ones(8, 3) for _ in range(2)] for _ in range(2))
    optimizer = AdaGrad(use_fused_step=fused)
    for count, grads in ((1, [grad]), (2, [coo([1], torch.ones(1, 3), (8, 3)), grad])):
        with pytest.raises(
            TypeError, match=rf"values of grads\[{count - 1}\]: layout torch.sparse_coo: must be a dense"
        ):
            optimizer.update(list(range(count)), weights[:count], grads, histories[:count])
    assert all((t == 1).all() for t in (*weights, *histories))


@FUSED
def test_several_sparse_dimensions(fused: bool) -> None:
    """Each entry is a row of one: those present are updated, decay included, and no others."""
    torch.manual_seed(0)
    weight, entries = torch.randn(4, 3), torch.tensor([[0, 3, 3], [1, 0, 2]])
    want, grad = weight.clone(), torch.zeros(4, 3)
    grad[entries[0], entries[1]] = torch.tensor([0.5, -2.0, 0.25])
    optimizer = AdaGrad(0.1, wd=0.1, use_fused_step=fused)
    present = grad != 0
    state, want_state = optimizer.create_state(0, weight), optimizer.create_state(1, want)
    before = want.clone()
    optimizer.update([0, 1], [weight, want], [grad.to_sparse(), grad], [state, want_state])
    assert_same_bits(weight, torch.where(present, want, before))
    assert_same_bits(state, torch.where(present, want_state, 0.0))


@FUSED
def test_several_sparse_dimensions_of_another_shape(fused: bool) -> None:
    """Entries would otherwise be those of other rows: both weights have as many elements."""
    optimizer, weight = AdaGrad(use_fused_step=fused), torch.ones(4, 3)
    state = optimizer.create_state(0, weight)
    with pytest.raises(ValueError, match=r"grads\[0\]: shape \(3, 4\): must be \(4, 3\)"):
        optimizer.update(0, weight, torch.eye(3, 4).to_sparse(), state)
    assert (weight == 1).all()
    assert not state.any()


@FUSED
def test_gradients_as_an_embedding_gives_them(fused: bool) -> None:
    """backward() of nn.Embedding(sparse=True), applied to the parameter itself."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = AdaGrad(0.1, wd=0.01, use_fused_step=fused)
    weight = embedding.weight
    state = optimizer.create_state(0, weight)
    want, history = weight.detach().numpy().copy(), np.zeros((10, 4), np.float32)
    for _ in range(3):
        weight.grad = None
        (embedding(torch.tensor([1, 7, 1, 3])) ** 2).sum().backward()
        assert weight.grad is not None
        assert weight.grad.is_sparse
        indices, values = weight.grad._indices()[0].numpy(), weight.grad._values().numpy()
        want, history, _ = oracle.row_sparse(want, list(indices), values, history, oracle.Hyper(wd=0.01))
        optimizer.update(0, weight, weight.grad, state)
        assert_same_bits(weight, want)
    assert weight.requires_grad
    assert weight.is_leaf


@CLASSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states(klass: type[AdaGrad], dtype: torch.dtype) -> None:
    weight = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    optimizer = klass(initial_accumulator_value=0.5, multi_precision=True)
    state = optimizer.create_state(0, weight)
    assert isinstance(state, torch.Tensor)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert state.shape == ((4, 1) if klass is GroupAdaGrad else (4, 3))
    assert (state == 0.5).all()
    assert not state.requires_grad
    pair = optimizer.create_state_multi_precision(0, weight)
    assert isinstance(pair, tuple) == (dtype in (torch.float16, torch.bfloat16))
    if isinstance(pair, tuple):
        assert all(part.dtype == torch.float32 and not part.requires_grad for part in pair)


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype, fused: bool) -> None:
    """Transposed, stepped, channels-last, offset by two bytes: as the contiguous tensor of the same numbers."""
    base = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    layouts = {
        "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "stepped": lambda t: torch.stack([t, t], dim=-1)[..., 0],
        "offset": lambda t: torch.cat([torch.zeros(1, dtype=dtype), t.reshape(-1)])[1:].reshape(t.shape),
        "expanded gradient": None,
    }
    for name, lay_out in layouts.items():
        plain, moved = base.clone(), base.clone() if lay_out is None else lay_out(base)
        grad = torch.ones(3, dtype=dtype).expand(4, 6, 5, 3) if lay_out is None else plain * 2
        results = []
        for weight, given in ((plain, grad.clone()), (moved, grad if lay_out is None else lay_out(grad))):
            optimizer = AdaGrad(0.1, use_fused_step=fused)
            state = optimizer.create_state(0, weight)
            optimizer.update(0, weight, given, state)
            results.append((weight, state))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a.contiguous(), b.contiguous(), name)


@FUSED
def test_numpy_and_tensors_in_one_list(fused: bool) -> None:
    arrays = [np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)]
    weights: list[Any] = [arrays[0], tensor(arrays[1])]
    optimizer = AdaGrad(use_fused_step=fused)
    states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
    optimizer.update([0, 1], weights, [np.ones((3, 2), np.float32), torch.ones(3, 2)], states)
    assert_same_bits(weights[0], weights[1])


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "NumPy gradient": (
        lambda w, s: (w, np.ones((4, 3), np.float32), s),
        TypeError,
        "grads[0]: a NumPy array: must be a torch tensor, like the weight",
    ),
    "NumPy history": (
        lambda w, s: (w, torch.ones(4, 3), s.numpy()),
        TypeError,
        "history in states[0]: a NumPy array: must be a torch tensor",
    ),
    "NumPy weight": (
        lambda w, s: (w.numpy(), torch.ones(4, 3), s.numpy()),
        TypeError,
        "grads[0]: a torch tensor: must be a NumPy array, like the weight",
    ),
    "NumPy values": (
        lambda w, s: (w, RowSparse(np.ones((1, 3), np.float32), np.array([0]), (4, 3)), s),
        TypeError,
        "values of grads[0]: a NumPy array",
    ),
    "integers": (
        lambda w, s: (w, torch.ones(4, 3, dtype=torch.int32), s),
        TypeError,
        "grads[0]: dtype torch.int32: must be float16, bfloat16, float32 or float64",
    ),
    "complex": (
        lambda w, s: (w, torch.ones(4, 3, dtype=torch.complex64), s),
        TypeError,
        "grads[0]: dtype torch.complex64",
    ),
    "dtype": (
        lambda w, s: (w, torch.ones(4, 3, dtype=torch.float64), s),
        TypeError,
        "grads[0]: dtype float64: must be float32",
    ),
    "shape": (lambda w, s: (w, torch.ones(3, 4), s), ValueError, "grads[0]: shape (3, 4): must be (4, 3)"),
    "sparse, shape": (
        lambda w, s: (w, coo([0], torch.ones(1, 3), (5, 3)), s),
        ValueError,
        "grads[0]: shape (5, 3): must be (4, 3)",
    ),
    "sparse CSR": (
        lambda w, s: (w, torch.eye(4, 3).to_sparse_csr(), s),
        TypeError,
        "grads[0]: layout torch.sparse_csr",
    ),
    "sparse weight": (
        lambda w, s: (coo([0], torch.ones(1, 3), (4, 3)), w, s),
        TypeError,
        "weights[0]: layout torch.sparse_coo",
    ),
    "row too large": (
        lambda w, s: (w, RowSparse(torch.ones(2, 3), torch.tensor([1, 4]), (4, 3)), s),
        IndexError,
        "indices of grads[0]: indices[1]=4: must be in [0, 4)",
    ),
    "expanded weight": (
        lambda w, s: (torch.ones(3).expand(4, 3), w, s),
        ValueError,
        "weights[0]: strides (0, 4): elements share memory",
    ),
    "gradient is the weight": (lambda w, s: (w, w, s), ValueError, "weights[0]: shares memory with grads[0]"),
    "gradient is a view": (lambda w, s: (w, w.view(3, 4).view(4, 3), s), ValueError, "shares memory with grads[0]"),
    "device": (lambda w, s: (w, torch.ones(4, 3, device="meta"), s), ValueError, "grads[0]: device meta: must be cpu"),
    "no tensor": (lambda w, s: (w, [[0.5] * 3] * 4, s), TypeError, "grads[0]=[["),
}


@FUSED
@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Any, error: type[Exception], message: str, fused: bool) -> None:
    for others in (0, 1):
        optimizer = AdaGrad(use_fused_step=fused)
        weight, state = torch.full((4, 3), 0.5), torch.zeros(4, 3)
        good = [(np.ones(3, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32))] * others
        given = [make(weight, state), *good]
        with pytest.raises(error, match=re.escape(message)):
            optimizer.update(list(range(len(given))), *([each[k] for each in given] for k in range(3)))
        assert (weight == 0.5).all()
        assert (state == 0).all()
        assert all((w == 1).all() and (s == 0).all() for w, _, s in good)
        assert optimizer._index_update_count == {}


def test_in_many_steps_on_a_model() -> None:
    """A model of several parameters, one call a step: fused is the expression, bit for bit."""
    results = []
    for fused in (True, False):
        torch.manual_seed(2)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
        data = torch.randn(32, 6)
        updater = get_updater(AdaGrad(0.1, wd=1e-3, clip_gradient=0.5, use_fused_step=fused, aggregate_num=np.inf))
        parameters = list(model.parameters())
        losses = []
        for _ in range(15):
            model.zero_grad()
            loss = ((model(data) - data[:, :1]) ** 2).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            updater(list(range(len(parameters))), [p.grad for p in parameters], parameters)
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        results.append([p.detach().clone() for p in parameters])
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


@FUSED
@CLASSES
def test_autograd_notices_that_weights_and_histories_changed(klass: type[AdaGrad], fused: bool) -> None:
    for grad in (torch.ones(3, 2), RowSparse(torch.ones(1, 2), torch.tensor([1]), (3, 2))):
        weight, other = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
        optimizer = klass(0.1, use_fused_step=fused)
        history = optimizer.create_state(0, weight)
        losses = (weight * weight).sum(), (other * history).sum()
        optimizer.update(0, weight, grad, history)
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


class Subclass(torch.Tensor):
    """A tensor that only PyTorch understands, for all that is known."""


@FUSED
def test_nothing_is_recorded_of_an_update_of_a_subclass(fused: bool) -> None:
    weight = torch.ones(3).as_subclass(Subclass).requires_grad_()
    optimizer = AdaGrad(0.5, epsilon=0.0, use_fused_step=fused)
    history = optimizer.create_state(0, weight)
    optimizer.update(0, weight, (torch.ones(3) * torch.ones(3, requires_grad=True)).as_subclass(Subclass), history)
    assert weight.tolist() == [0.5] * 3
    assert weight.is_leaf
    assert not history.requires_grad
    assert optimizer._index_update_count == {0: 1}


@FUSED
@pytest.mark.parametrize("row", [-1, 4])
def test_row_ids_outside_a_subclass_are_refused(row: int, fused: bool) -> None:
    weights = [torch.ones(4, 2), torch.ones(4, 2).as_subclass(Subclass)]
    optimizer = AdaGrad(0.5, use_fused_step=fused)
    states = [optimizer.create_state(i, w) for i, w in enumerate(weights)]
    grads = [torch.ones(4, 2), RowSparse(torch.ones(2, 2), torch.tensor([1, row]), (4, 2))]
    with pytest.raises(IndexError, match=rf"indices of grads\[1\]: indices\[1\]={row}: must be in \[0, 4\)"):
        optimizer.update([0, 1], weights, grads, states)
    assert all((w == 1).all() for w in weights)
    assert all((h == 0).all() for h in states)


@FUSED
def test_dtypes_of_a_subclass_are_checked(fused: bool) -> None:
    optimizer = AdaGrad(0.5, use_fused_step=fused)
    weight = torch.ones(3).as_subclass(Subclass)
    with pytest.raises(TypeError, match="history in states"):
        optimizer.update(0, weight, torch.ones(3), torch.zeros(3, dtype=torch.float16).as_subclass(Subclass))
    whole = torch.ones(3, dtype=torch.int32).as_subclass(Subclass)
    with pytest.raises(TypeError, match="int32"):
        optimizer.update(0, whole, torch.ones(3, dtype=torch.int32), torch.zeros(3).as_subclass(Subclass))


def test_a_step_of_ones_own_updates_a_parameter_of_low_precision() -> None:
    class Descent(AdaGrad):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for index, weight, grad in zip(indices, weights, grads, strict=True):
                self._update_count(index)
                weight -= 0.5 * grad

    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = Descent(multi_precision=True)
    optimizer.update_multi_precision(
        0, weight, torch.ones(3, dtype=torch.float16), optimizer.create_state_multi_precision(0, weight)
    )
    assert weight.tolist() == [0.5] * 3


def test_interleaved_weights_beside_a_tensor_subclass() -> None:
    base = torch.ones(4, 4)
    weights = [base[:, :2], base[:, 2:], torch.ones(3).as_subclass(Subclass)]
    AdaGrad(1.0, epsilon=0.0).update(
        [0, 1, 2], weights, [torch.ones_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    )
    assert (base == 0).all()
    assert (weights[2] == 0).all()


def test_indices_on_another_device() -> None:
    grad = RowSparse(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64, device="meta"), (3, 2))
    with pytest.raises(ValueError, match=r"indices of grads\[0\]: on meta: must be on cpu, like the weight"):
        AdaGrad().update(0, torch.ones(3, 2), grad, torch.zeros(3, 2))


def test_a_master_copy_of_another_kind() -> None:
    weight = np.ones(2, np.float16)
    state = torch.ones(2), np.zeros(2, np.float32)
    with pytest.raises(TypeError, match="a torch tensor: must be a NumPy array, like the weight"):
        AdaGrad(multi_precision=True).update(0, weight, np.ones(2, np.float16), state)
    assert (weight == 1).all()


def test_the_history_of_a_tensor_subclass_on_another_device() -> None:
    weight, history = torch.ones(2).as_subclass(Subclass), torch.zeros(2, device="meta").as_subclass(Subclass)
    with pytest.raises(ValueError, match=r"history in states\[0\]: device meta: must be cpu"):
        AdaGrad().update(0, weight, torch.ones(2), history)


def test_row_wise_master_copies_of_a_tensor_subclass() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16).as_subclass(Subclass))
    optimizer = Adagrad([p], lr=1.0, eps=0.0, row_wise=True, multi_precision=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p == 0).all()


def test_rows_whose_values_are_a_negated_view() -> None:
    weights = torch.ones(4, 3), torch.ones(4, 3)
    values = torch.complex(torch.zeros(2, 3), torch.arange(6.0).reshape(2, 3)).conj().imag
    assert values.is_neg()
    for weight, each in zip(weights, (values, values.resolve_neg()), strict=True):
        get_updater(AdaGrad(0.1))(0, RowSparse(each, torch.tensor([0, 2]), (4, 3)), weight)
    assert torch.equal(*weights)
    assert (weights[0][0, 1:] > 1).all()


def test_a_weight_that_is_a_negated_view_is_refused_by_name() -> None:
    weight = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
    with pytest.raises(ValueError, match="weight: a negated view: must be resolved"):
        get_updater(AdaGrad(0.1))(0, torch.ones(2), weight)


@pytest.mark.parametrize("fused", [True, False])
def test_row_ids_that_were_given_another_shape(fused: bool) -> None:
    grad = RowSparse(torch.ones(2, 3), torch.tensor([0, 1]), (4, 3))
    grad.indices = torch.tensor([[0, 1]])
    weight = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"grads\[0\]: indices: shape \(1, 2\): must have one dimension"):
        AdaGrad(use_fused_step=fused).update(0, weight, grad, torch.zeros(4, 3))
    assert (weight == 1).all()
