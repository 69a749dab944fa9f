"""What ``adagrad.torch.Adagrad`` refuses, after which nothing has changed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adagrad.kernels import fast_path, general_path
from adagrad.kernels.names import of_parameter
from adagrad.kernels.tensors import views as tensor_views
from adagrad.torch import Adagrad
from support import assert_same_bits
from torch_cases import Case, rows_outside, unchecked_coo


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
        case.params[2].grad = unchecked_coo(rows, values, (4, 3))

    return change


def set_option(name: str, value: Any) -> Callable[[Case], None]:
    return lambda case: case.optimizer.param_groups[0].__setitem__(name, value)


REFUSED: dict[str, tuple[Callable[[Case], None], type[Exception], str]] = {
    "row id too large": (set_sparse([0, 4], torch.ones(2, 3)), IndexError,
                         "indices of gradient of parameter[2]: indices[1]=4: must be in [0, 4)"),
    "negative row id": (set_sparse([-1, 0], torch.ones(2, 3)), IndexError, "indices[0]=-1: must be in [0, 4)"),
    "history of another shape": (lambda case: replace_state(case, lambda s: s[:2].clone()), ValueError,
                                 "sum of parameter[1]: shape (2, 3): must be (4, 3)"),
    "history of another dtype": (lambda case: replace_state(case, Tensor.double), TypeError,
                                 "sum of parameter[1]: dtype float64: must be float32"),
    "history elsewhere": (lambda case: replace_state(case, lambda s: s.to("meta")), ValueError,
                          "sum of parameter[1]: device meta: must be cpu"),
    "gradient of another dtype": (set_grad_data(Tensor.double), TypeError,
                                  "gradient of parameter[1]: dtype float64: must be float32"),
    "gradient of another shape": (set_grad_data(lambda g: g[:3].clone()), ValueError,
                                  "gradient of parameter[1]: shape (3, 3): must be (4, 3)"),
    "weight of 8 bits": (set_data(1, lambda w: w.to(torch.float8_e5m2)), TypeError,
                         "parameter[1]: dtype torch.float8_e5m2: must be float16"),
    "weights that share memory": (share_memory, ValueError, "parameter[1]: shares memory with parameter[0]"),
    "history inside a weight": (overlap, ValueError, "shares memory with"),
    "weight that overlaps itself": (set_data(1, lambda w: w[:1].expand(4, 3)), ValueError, "elements share memory"),
    "gradient without memory": (freed, ValueError,
                                "gradient of parameter[1]: address 0: must have memory for its 12 elements"),
    "negated weight": (negated, ValueError, "parameter[1]: a negated or conjugated view"),
    "a count that is no tensor": (lambda case: case.optimizer.state[case.params[0]].__setitem__("step", 1.0), TypeError,
                                  "step: not a tensor: must be a tensor of one number"),
    "lr is not a number": (set_option("lr", math.nan), ValueError, "lr=nan: must be finite"),
    "lr is a tensor that is not": (set_option("lr", torch.tensor(math.inf)), ValueError, "lr=inf: must be finite"),
    "negative eps": (set_option("eps", -1.0), ValueError, "eps=-1.0: must be >= 0"),
    "weight_decay of infinity": (set_option("weight_decay", math.inf), ValueError, "weight_decay=inf: must be finite"),
    "negative lr_decay": (set_option("lr_decay", -1.0), ValueError, "lr_decay=-1.0: must be >= 0"),
    "clip_value of 0": (set_option("clip_value", 0.0), ValueError, "clip_value=0.0: must be None or > 0"),
    "row-wise all at once": (set_option("row_wise", True), ValueError,
                             "sum of parameter[0]: shape (4, 3): must be (4, 1)"),
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
    with pytest.raises(ValueError, match=r"parameter\[0\]: 0 sparse dimensions: must be 1 for row-wise history"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0
    with pytest.raises(TypeError, match=r"parameter\[7\]: layout torch.sparse_csr: must be strided or sparse_coo"):
        tensor_views.ordinary(of_parameter(7), p, torch.eye(4).to_sparse_csr(), torch.zeros(4, 4), None, row_wise=False)


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


def test_several_sparse_dimensions_refused() -> None:
    for p, options, message in (
        (nn.Parameter(torch.ones(3, 4)), {"row_wise": True}, "2 sparse dimensions: must be 1 for row-wise history"),
        (
            nn.Parameter(torch.ones(4, 3).t()),
            {},
            "2 sparse dimensions: must be 1 unless the weight and its state are contiguous",
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_decay", np.array([0.1]), "weight_decay=array([0.1]): must be a number, not ndarray"),
        ("lr_decay", np.array([0.1]), "lr_decay=array([0.1]): must be a number, not ndarray"),
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


def test_a_group_has_no_dialect_of_its_own() -> None:
    with pytest.raises(ValueError, match="dialect='keras' of a parameter group: must be passed to the optimizer"):
        Adagrad([{"params": [nn.Parameter(torch.ones(2))], "dialect": "keras"}])


# ------------------------------------------------------------------------------------------------------- all or nothing


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


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("sum", torch.zeros(4, 3), r"sum of parameter\[0\]: shape \(4, 3\): must be \(3, 4\)"),
        ("sum", torch.zeros(3, 1), r"sum of parameter\[0\]: shape \(3, 1\): must be \(3, 4\)"),
        ("master", torch.zeros(4, 3), r"master of parameter\[0\]: shape \(4, 3\): must be \(3, 4\)"),
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


def test_a_history_of_another_order_with_several_sparse_dimensions() -> None:
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = Adagrad([p])
    history = optimizer.state[p]["sum"] = torch.zeros(4, 3).t()
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 3]]), torch.ones(2), (3, 4), check_invariants=True)
    with pytest.raises(ValueError, match="2 sparse dimensions: must be 1 unless the weight and its state are contig"):
        optimizer.step()
    assert (p == 0).all()
    assert (history == 0).all()


def test_a_master_copy_that_is_none() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Adagrad([p], multi_precision=True)
    p.grad = torch.ones_like(p)
    for master, error, message in (
        ("x", TypeError, "master: str: must be a tensor"),
        (torch.zeros(3).to_sparse(), TypeError, r"master of parameter\[0\]: layout torch.sparse_coo"),
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


@pytest.mark.parametrize(("which", "name"), [("parameter", "parameter"), ("master", "master of parameter")])
def test_memory_that_was_freed_is_refused(which: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", RELEASED, which], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ValueError: {name}[0]: address 0: must have memory for its 1000 elements" in done.stderr


def test_messages_name_parameters_that_have_names() -> None:
    params = {name: nn.Parameter(torch.ones(2)) for name in ("a.weight", "a.bias", "b.weight")}
    groups = [{"params": [*params.items()][:1]}, {"params": [*params.items()][1:], "lr": 0.5}]
    optimizer = Adagrad(groups)
    for p in params.values():
        p.grad = torch.ones(2)
    optimizer.state[params["b.weight"]]["sum"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"sum of parameter 'b.weight': shape \(3,\): must be \(2,\)"):
        optimizer.step()
    first, second = optimizer.param_groups
    first["params"].append(second["params"].pop(0))  # without its name
    with pytest.raises(ValueError, match=r"sum of parameter\[2\]: shape"):
        optimizer.step()
    first["param_names"] = second["param_names"] = None
    with pytest.raises(ValueError, match=r"sum of parameter\[2\]: shape"):
        optimizer.step()


def test_messages_count_the_parameters_of_all_groups() -> None:
    params = [nn.Parameter(torch.ones(4, 2)) for _ in range(6)]
    groups = [{"params": params[:2]}, {"params": params[2:4], "row_wise": True}, {"params": params[4:], "lr": 0.5}]
    for bad in (1, 3, 5):
        for spoil, error, message in (
            (
                lambda p, o: rows_outside(p, o, 9),
                IndexError,
                rf"indices of gradient of parameter\[{bad}\]: indices\[1\]=9",
            ),
            (lambda p, o: o.state[p].update(sum=torch.zeros(3)), ValueError, rf"sum of parameter\[{bad}\]: shape"),
        ):
            optimizer = Adagrad([dict(group) for group in groups])
            for p in params:
                p.grad = None
            params[4].grad = torch.ones(4, 2)
            params[bad].grad = torch.ones(4, 2)
            spoil(params[bad], optimizer)
            with pytest.raises(error, match=message):
                optimizer.step()


def test_the_position_of_a_bad_row_id_among_parameters_without_gradients() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    optimizer = Adagrad(params)
    params[1].grad = torch.ones(3, 2)
    bad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    bad._indices()[0, 0] = 3
    params[2].grad = bad
    with pytest.raises(IndexError, match=r"gradient of parameter\[2\]"):
        optimizer.step()


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
