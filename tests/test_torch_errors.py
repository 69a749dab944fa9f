"""What ``adagrad.torch.Adagrad`` refuses, after which nothing has changed; and tensors it cannot treat as memory."""

from __future__ import annotations

import gc
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from adagrad import kernels
from adagrad.kernels import fast_path, layout, tensor_layout, tensor_views
from adagrad.rule import Rule
from adagrad.torch import Adagrad
from support import assert_same_bits, set_layout


def coo(rows: list[int], values: Tensor, shape: Any) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=False)


class Case:
    """An optimizer of three parameters with gradients, one of them sparse, after a first step."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        self.optimizer = Adagrad(self.params, weight_decay=0.1, **options)
        self.set_grads()
        self.optimizer.step()
        self.set_grads()

    def set_grads(self) -> None:
        for p in self.params[:2]:
            p.grad = torch.randn(4, 3)
        self.params[2].grad = coo([1, 3, 1], torch.randn(3, 3), (4, 3))

    def everything(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        return [*self.params, *(t for state in states for t in state.values() if isinstance(t, Tensor))]


def replace_state(case: Case, new: Callable[[Tensor], Tensor]) -> None:
    state = case.optimizer.state[case.params[1]]
    state["sum"] = new(state["sum"])


def share_memory(case: Case) -> None:
    case.params[1].data = case.params[0].data


def overlap(case: Case) -> None:
    case.params[1].data = torch.zeros(4, 3)
    case.optimizer.state[case.params[1]]["sum"] = torch.empty(0).set_(case.params[0].data.untyped_storage(), 0, (4, 3))


def freed(case: Case) -> None:
    case.params[1].grad.untyped_storage().resize_(0)  # type: ignore[union-attr]


def negated(case: Case) -> None:
    case.params[1].data = torch._neg_view(case.params[1].data)


def set_data(k: int, new: Callable[[Tensor], Tensor]) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.params[k].data = new(case.params[k].data)

    return change


def set_grad_data(new: Callable[[Tensor], Tensor]) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        grad = case.params[1].grad
        assert grad is not None
        grad.data = new(grad.data)

    return change


def set_sparse(rows: list[int], values: Tensor) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.params[2].grad = coo(rows, values, (4, 3))

    return change


def set_option(name: str, value: Any) -> Callable[[Case], None]:
    return lambda case: case.optimizer.param_groups[0].__setitem__(name, value)


REFUSED: dict[str, tuple[Callable[[Case], None], type[Exception], str]] = {
    "row id too large": (set_sparse([0, 4], torch.ones(2, 3)), IndexError,
                         "indices of grads[2]: indices[1]=4: must be in [0, 4)"),
    "negative row id": (set_sparse([-1, 0], torch.ones(2, 3)), IndexError, "indices[0]=-1: must be in [0, 4)"),
    "history of another shape": (lambda case: replace_state(case, lambda s: s[:2].clone()), ValueError,
                                 "history in states[1]: shape (2, 3): must be (4, 3)"),
    "history of another dtype": (lambda case: replace_state(case, Tensor.double), TypeError,
                                 "history in states[1]: dtype float64: must be float32"),
    "history elsewhere": (lambda case: replace_state(case, lambda s: s.to("meta")), ValueError,
                          "history in states[1]: device meta: must be cpu"),
    "gradient of another dtype": (set_grad_data(Tensor.double), TypeError, "grads[1]: dtype float64: must be float32"),
    "gradient of another shape": (set_grad_data(lambda g: g[:3].clone()), ValueError,
                                  "grads[1]: shape (3, 3): must be (4, 3)"),
    "weight of 8 bits": (set_data(1, lambda w: w.to(torch.float8_e5m2)), TypeError,
                         "weights[1]: dtype torch.float8_e5m2: must be float16"),
    "weights that share memory": (share_memory, ValueError, "weights[1]: shares memory with weights[0]"),
    "history inside a weight": (overlap, ValueError, "shares memory with"),
    "weight that overlaps itself": (set_data(1, lambda w: w[:1].expand(4, 3)), ValueError, "overlaps itself"),
    "gradient without memory": (freed, ValueError, "grads[1]: address 0: must have memory for its 12 elements"),
    "negated weight": (negated, ValueError, "weights[1]: a negated or conjugated view"),
    "a count that is no tensor": (lambda case: case.optimizer.state[case.params[0]].__setitem__("step", 1.0), TypeError,
                                  "step: not a tensor: must be a tensor of one number"),
    "lr is not a number": (set_option("lr", math.nan), ValueError, "lr=nan: must be finite"),
    "lr is a tensor that is not": (set_option("lr", torch.tensor(math.inf)), ValueError, "lr=inf: must be finite"),
    "negative eps": (set_option("eps", -1.0), ValueError, "eps=-1.0: must be >= 0"),
    "weight_decay of infinity": (set_option("weight_decay", math.inf), ValueError, "weight_decay=inf: must be finite"),
    "negative lr_decay": (set_option("lr_decay", -1.0), ValueError, "lr_decay=-1.0: must be >= 0"),
    "clip_value of 0": (set_option("clip_value", 0.0), ValueError, "clip_value=0.0: must be None or > 0"),
    "row-wise all at once": (set_option("row_wise", True), ValueError,
                             "history in states[0]: shape (4, 3): must be (4, 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_step_changes_nothing(name: str) -> None:
    change, error, message = REFUSED[name]
    case = Case()
    change(case)
    tensors = case.everything()
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        case.optimizer.step()
    for now, was in zip(tensors, before, strict=True):
        if now.device.type == "cpu":
            assert_same_bits(now.double(), was.double())


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_gradient_of_another_layout() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = Adagrad([p], row_wise=True)
    p.grad = torch.sparse_coo_tensor(torch.zeros(0, 1), torch.ones(1, 4, 4), (4, 4), check_invariants=False)
    with pytest.raises(ValueError, match=re.escape("grads[0]: 0 sparse dimensions: must be 1 for row-wise history")):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0
    with pytest.raises(TypeError, match=re.escape("grads[7]: layout torch.sparse_csr: must be strided or sparse_coo")):
        tensor_views.ordinary("[7]", p, torch.eye(4).to_sparse_csr(), torch.zeros(4, 4), None, row_wise=False)


@pytest.mark.parametrize(
    ("row", "entry"),
    [([[0, 0], [0, 9]], r"indices\[1\]=9: .* \[0, 4\)"), ([[0, 3], [0, -1]], r"indices\[1\]=3: .* \[0, 3\)"),
     ([[3, 0], [0, 0]], r"indices\[0\]=3: .* \[0, 3\)"), ([[0, 1], [0, -1]], r"indices\[1\]=-1: .* \[0, 4\)")],
)  # fmt: skip
def test_an_entry_outside_does_not_become_another_row(row: list[list[int]], entry: str) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Adagrad([p])
    p.grad = torch.sparse_coo_tensor(torch.tensor(row), torch.ones(2), (3, 4), check_invariants=False)
    with pytest.raises(IndexError, match=entry):
        optimizer.step()
    assert (p == 1).all()


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


def test_several_sparse_dimensions_refused() -> None:
    for p, options, message in (
        (nn.Parameter(torch.ones(3, 4)), {"row_wise": True}, "2 sparse dimensions: must be 1 for row-wise history"),
        (
            nn.Parameter(torch.ones(4, 3).t()),
            {},
            "2 sparse dimensions: must be 1, or the weight and its state contiguous",
        ),
    ):
        optimizer = Adagrad([p], **options)
        p.grad = torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (3, 4), check_invariants=False)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert (p == 1).all()


def test_a_parameter_twice() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = Adagrad([p, p])
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0


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


# ------------------------------------------------------------------------------------- tensors that are not memory


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
    with pytest.raises(ValueError, match=r"weights\[1\]: strides \(0,\): overlaps itself"):
        optimizer.step()
    assert first.tolist() == [1, 1]
    assert optimizer.state[first]["sum"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"master copy in states\[0\]: shape \(3,\): must be \(2,\)"):
        kernels.update(
            [torch.ones(2, dtype=torch.float16).as_subclass(Logged)], [torch.ones(2)],
            [(torch.ones(3), torch.ones(2))], [0.1], [0.0], Rule(), fused=True,
        )  # fmt: skip


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


def test_meta_device() -> None:
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    optimizer = Adagrad([p], weight_decay=0.1, clip_value=1.0)
    p.grad = torch.ones(3, 2, device="meta")
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["sum"].device.type == "meta"


@pytest.mark.parametrize("row_wise", [False, True])
def test_the_general_path_gives_the_same_bits(row_wise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors cannot be read by compiled code, each goes through the checks in Python."""

    def train() -> list[Tensor]:
        case = Case(row_wise=row_wise, lr_decay=0.1)
        case.params.append(nn.Parameter(torch.randn(4, 3).bfloat16()))
        case.optimizer.add_param_group({"params": case.params[3], "multi_precision": True})
        case.params[3].grad = torch.randn(4, 3).bfloat16()
        for _ in range(2):
            case.optimizer.step()
        return case.everything()

    usual = train()
    set_layout(monkeypatch, None)
    for a, b in zip(usual, train(), strict=True):
        assert_same_bits(a, b)


def test_the_layout_of_this_pytorch_is_found() -> None:
    """If this fails after an upgrade, steps over many small tensors are slow, not wrong."""
    how = layout.current_layout()
    assert how is not None
    assert how[layout.TENSOR] == id(torch.Tensor)
    assert how[layout.SPARSE], "nor are sparse gradients known"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEARCHED", 64),
        ("_offset", lambda places, unit=None: 16),
        ("_library", lambda: object()),
        ("_keys_of", lambda tensor: 12345),
    ],
)
def test_a_layout_that_does_not_fit_is_not_used(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_layout, name, value)
    how = layout._layout.__wrapped__(True, False, False)
    assert how is not None, "NumPy's arrays are still known"
    assert how[layout.ARRAY] == id(np.ndarray)
    assert how[layout.TENSOR] == 0


@pytest.mark.parametrize(
    ("name", "value"), [("SEARCHED_IN_SPARSE", 64), ("_sparse", lambda k: torch.ones(k + 1, 2).to_sparse_csr())]
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_tensors_that_do_not_fit_are_not_looked_into(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Case()
    usual.optimizer.step()
    monkeypatch.setattr(tensor_layout, name, value)
    how = layout._layout.__wrapped__(True, False, False)
    assert how is not None
    assert how[layout.TENSOR] == id(torch.Tensor), "other tensors are still known"
    assert how[layout.SPARSE] == 0
    set_layout(monkeypatch, how)
    case = Case()
    case.optimizer.step()
    for a, b in zip(usual.everything(), case.everything(), strict=True):
        assert_same_bits(a, b)


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
    done = subprocess.run([sys.executable, "-c", FREED], timeout=300, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_decay", np.array(0.1), "weight_decay=array(0.1): must be a number, not ndarray"),
        ("lr_decay", np.array(0.1), "lr_decay=array(0.1): must be a number, not ndarray"),
        ("eps", [0.1], "eps=[0.1]: must be a number, not list"),
        ("clip_value", torch.tensor(1.0), "clip_value=tensor(1.): must be a number, not Tensor"),
    ],
)
def test_options_that_someone_has_set_to_what_is_no_number(name: str, value: Any, message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Adagrad([p])
    p.grad = torch.ones(3)
    optimizer.param_groups[0][name] = value
    with pytest.raises(TypeError, match=re.escape(message)):
        optimizer.step()
    assert (p == 1).all()


def test_the_library_does_not_import_torch() -> None:
    code = "import sys, adagrad; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (torch.tensor(True), r"step: torch\.bool of shape \(\)"),
        (torch.ones(1).expand(3), r"step: torch\.float32 of shape \(3,\): must be a tensor of one number"),
        (torch.ones(0), r"step: torch\.float32 of shape \(0,\)"),
        (torch.ones(1).to_sparse(), r"step: torch\.sparse_coo: must be a plain tensor"),
        (torch._neg_view(torch.ones(())), r"step: a view: must be a plain tensor"),
    ],
)
def test_counts_are_checked_before_anything_changes(count: Tensor, message: str) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = Adagrad(params)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.state[params[1]]["step"] = count
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all((p == 1).all() for p in params)
    assert optimizer.state[params[0]]["step"] == 0


def test_counts_that_were_made_in_inference_mode_advance() -> None:
    p = nn.Parameter(torch.ones(2))
    with torch.inference_mode():
        optimizer = Adagrad([p], lr=0.5)
    assert optimizer.state[p]["step"].is_inference()
    version = p._version
    for n in (1, 2):
        p.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.state[p]["step"] == n
    assert p._version > version


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("sum", torch.zeros(4, 3), r"history in states\[0\]: shape \(4, 3\): must be \(3, 4\)"),
        ("sum", torch.zeros(3, 1), r"history in states\[0\]: shape \(3, 1\): must be \(3, 4\)"),
        ("master", torch.zeros(4, 3), r"master copy in states\[0\]: shape \(4, 3\): must be \(3, 4\)"),
    ],
)
def test_states_of_another_shape_with_several_sparse_dimensions(name: str, tensor: Tensor, message: str) -> None:
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    optimizer = Adagrad([p], multi_precision=True)
    optimizer.state[p][name] = tensor
    indices, values = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, dtype=torch.bfloat16)
    p.grad = torch.sparse_coo_tensor(indices, values, (3, 4), check_invariants=True)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (p == 0).all()
    assert (tensor == 0).all()


def test_a_master_copy_that_is_none() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Adagrad([p], multi_precision=True)
    p.grad = torch.ones_like(p)
    for master, error, message in (
        ("x", TypeError, "master: str: must be a tensor"),
        (torch.zeros(3).to_sparse(), TypeError, r"master copy in states\[0\]: layout torch.sparse_coo"),
    ):
        optimizer.state[p]["master"] = master
        with pytest.raises(error, match=message):
            optimizer.step()
    assert (p == 0).all()


RELEASED = """
import sys
import torch
from adagrad.torch import Adagrad
p = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
optimizer = Adagrad([p], multi_precision=True)
p.grad = torch.ones_like(p)
optimizer.step()
(p if sys.argv[1] == "parameter" else optimizer.state[p]["master"]).untyped_storage().resize_(0)
optimizer.step()
"""


@pytest.mark.parametrize(("which", "name"), [("parameter", "weights"), ("master", "master copy in states")])
def test_memory_that_was_freed_is_refused(which: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", RELEASED, which], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ValueError: {name}[0]: address 0: must have memory for its 1000 elements" in done.stderr


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


MODES = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from adagrad.kernels import layout
from adagrad.torch import Adagrad

def train():
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = Adagrad([p])
    p.grad = torch.ones(4, 3)
    optimizer.step()

def meta():
    with torch.device("meta"):
        train()

def fake():
    with FakeTensorMode():
        train()

def functional():
    torch.func.grad(lambda x: (layout.current_layout(), x.sum())[1])(torch.ones(3))

{"meta": meta, "fake": fake, "functional": functional}[sys.argv[1]]()
found = layout.current_layout()
sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3))
assert layout.describe_once(torch.ones(3), found) is not None
assert found[layout.SPARSE] == torch._C._dispatch_keys(sparse).raw_repr()
"""


@pytest.mark.parametrize("mode", ["meta", "fake", "functional"])
def test_a_first_use_within_a_mode_does_not_make_later_ones_slow(mode: str) -> None:
    done = subprocess.run([sys.executable, "-c", MODES, mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{"lr_decay": 0.1}, {"multi_precision": True}])
def test_fake_tensors(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        optimizer = Adagrad([p], **options)
        p.grad = torch.ones_like(p)
        optimizer.step()


def not_a_leaf() -> Tensor:
    return torch.ones(4, 2, requires_grad=True).clone()


def rows_outside(p: Tensor, optimizer: Adagrad, row: int) -> None:
    indices = torch.tensor([[1, row]])
    p.grad = torch.sparse_coo_tensor(indices, torch.ones(2, 2), (4, 2), check_invariants=False)


DIFFERENTIABLE: dict[str, tuple[Any, type[Exception], str]] = {
    "row -1": (lambda p, o: rows_outside(p, o, -1), IndexError, r"indices\[1\]=-1: must be in \[0, 4\)"),
    "row 4": (lambda p, o: rows_outside(p, o, 4), IndexError, r"indices\[1\]=4: must be in \[0, 4\)"),
    "history of another shape": (lambda p, o: o.state[p].update(sum=torch.zeros(2)), ValueError, r"history in states"),
    "history of another dtype": (
        lambda p, o: o.state[p].update(sum=torch.zeros(4, 2, dtype=torch.float16)),
        TypeError,
        r"history in states\[1\]: dtype float16: must be float32",
    ),
    "history that overlaps itself": (
        lambda p, o: o.state[p].update(sum=torch.zeros(4, 1).expand(4, 2)),
        ValueError,
        r"history in states\[1\]: strides \(4, 0\): overlaps itself",
    ),
    "history of another parameter": (
        lambda p, o: o.state[p].update(sum=next(iter(o.state.values()))["sum"]),
        ValueError,
        r"history in states\[1\]: shares memory with history in states\[0\]",
    ),
    "gradient of another shape": (
        lambda p, o: p.grad.set_(torch.ones(2)),
        ValueError,
        r"grads\[1\]: shape \(2,\): must be \(4, 2\)",
    ),
    "gradient that is the weight": (
        lambda p, o: p.grad.set_(p.detach()),
        ValueError,
        r"weights\[1\]: shares memory with grads\[1\]",
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


def test_messages_count_the_parameters_of_all_groups() -> None:
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(6)]
    groups = [{"params": params[:2]}, {"params": params[2:4], "row_wise": True}, {"params": params[4:], "lr": 0.5}]
    for bad in (1, 3, 5):
        for spoil, error, message in (
            (lambda p, o: rows_outside(p, o, 9), IndexError, rf"indices of grads\[{bad}\]: indices\[1\]=9"),
            (lambda p, o: o.state[p].update(sum=torch.zeros(3)), ValueError, rf"history in states\[{bad}\]: shape"),
        ):
            optimizer = Adagrad([dict(group) for group in groups])
            for p in params:
                p.grad = None
            params[4].grad = torch.ones(4, 2)
            params[bad].grad = torch.ones(4, 2)
            spoil(params[bad], optimizer)
            with pytest.raises(error, match=message):
                optimizer.step()


def test_a_group_has_no_dialect_of_its_own() -> None:
    with pytest.raises(ValueError, match="dialect='keras' of a parameter group: must be passed to the optimizer"):
        Adagrad([{"params": [nn.Parameter(torch.ones(2))], "dialect": "keras"}])


def test_the_position_of_a_bad_row_id_among_parameters_without_gradients() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    optimizer = Adagrad(params)
    params[1].grad = torch.ones(3, 2)
    bad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    bad._indices()[0, 0] = 3
    params[2].grad = bad
    with pytest.raises(IndexError, match=r"grads\[2\]"):
        optimizer.step()


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


@pytest.fixture
def own_layout(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A copy of the layout, with room for all classes."""
    found = layout.current_layout()
    assert found is not None
    found = found.copy()
    found[layout.ACCEPTED : layout.ACCEPTED + layout.MOST_ACCEPTED] = 0
    monkeypatch.setattr(layout, "current_layout", lambda: found)
    monkeypatch.setattr(layout, "_accepted", [])
    return found


def test_classes_that_are_only_memory_keep_their_places(own_layout: np.ndarray) -> None:
    kinds = [type(f"Kind{i}", (torch.Tensor,), {}) for i in range(layout.MOST_ACCEPTED + 2)]
    for kind in (torch.Tensor, torch.nn.Parameter, kinds[0], *kinds, *kinds[::-1]):
        layout.accept(kind)
    accepted = own_layout[layout.ACCEPTED : layout.ACCEPTED + layout.MOST_ACCEPTED]
    assert accepted.tolist() == [id(kind) for kind in kinds[: layout.MOST_ACCEPTED]]


def test_classes_that_were_accepted_stay_alive(own_layout: np.ndarray) -> None:
    """A new class at the address of one that is gone would be taken for it."""
    kind = type("Kind", (torch.Tensor,), {})
    gone = weakref.ref(kind)
    layout.accept(kind)
    del kind
    gc.collect()
    assert gone() is not None


def test_no_class_is_accepted_where_tensors_are_unknown(own_layout: np.ndarray) -> None:
    own_layout[layout.TENSOR] = 0
    layout.accept(torch.Tensor)
    assert own_layout[layout.ACCEPTED] == 0


@pytest.mark.parametrize("name", ["sum", "step"])
def test_a_state_without_its_history_or_count(name: str) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for p in params[1:]:
        p.grad = torch.ones(2)
    optimizer = Adagrad(params)
    del optimizer.state[params[2]][name]
    with pytest.raises(ValueError, match=rf"state of parameter\[2\]: no '{name}': must have step and sum"):
        optimizer.step()
    assert params[1].tolist() == [1, 1]
