"""``adagrad.torch.Adagrad`` on PyTorch's own table of Adagrad configurations, and on wrong arguments."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from adagrad.torch import Adagrad

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.Adagrad)
INPUTS = INFO.optim_inputs_func(device="cpu")
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in ((5, 3), (7,), (), (0, 2))
    ]


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            if (i + step) % 4 == 3:
                p.grad = None  # a parameter that takes no part in this step
        optimizer.step()


def test_signature() -> None:
    theirs = inspect.signature(torch.optim.Adagrad).parameters
    ours = inspect.signature(Adagrad).parameters
    assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
        (p.name, p.kind, p.default) for p in list(ours.values())[: len(theirs)]
    ]
    extra = list(ours.values())[len(theirs) :]
    assert {p.name: p.default for p in extra} == {
        "clip_value": None,
        "row_wise": False,
        "multi_precision": False,
        "dialect": "torch",
        "epsilon_inside": None,
        "decoupled_decay": None,
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@pytest.mark.parametrize(
    "flag", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", INPUTS, ids=lambda config: config.desc)
def test_configuration(config: Any, dtype: torch.dtype, flag: dict[str, bool]) -> None:
    """As torch.optim.Adagrad one by one, but for a few roundings: there multiply-add is fused."""
    ours, theirs = parameters(dtype), parameters(dtype)
    first, second = Adagrad(ours, **config.kwargs, **flag), torch.optim.Adagrad(theirs, **config.kwargs, foreach=False)
    train(first, ours)
    train(second, theirs)
    single = dtype in (torch.float32, torch.complex64)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-13, "atol": 1e-14}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        torch.testing.assert_close(first.state[p]["sum"], second.state[q]["sum"], **tolerance)
        assert first.state[p]["step"] == second.state[q]["step"]
        assert first.state[p]["sum"].dtype == second.state[q]["sum"].dtype


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.optimizer_error_input.desc)
def test_error_input(error: Any) -> None:
    given = error.optimizer_error_input
    params = parameters(torch.float32) if given.params is None else given.params
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            Adagrad(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            Adagrad(params, **given.kwargs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0: lr must be finite and >= 0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate: -0.5"),
        ({"lr": "fast"}, TypeError, "lr='fast': must be a number"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        (
            {"weight_decay": math.inf},
            ValueError,
            "Invalid weight_decay value: inf: weight_decay must be finite and >= 0",
        ),
        ({"initial_accumulator_value": -1}, ValueError, "Invalid initial_accumulator_value value: -1"),
        ({"eps": -1e-3}, ValueError, "Invalid epsilon value: -0.001: eps must be finite and >= 0"),
        ({"clip_value": 0.0}, ValueError, "clip_value=0.0: must be None or > 0"),
        ({"clip_value": math.inf}, ValueError, "clip_value=inf: must be None or finite and > 0"),
        ({"row_wise": 1}, TypeError, "row_wise=1: must be True or False"),
        ({"multi_precision": "yes"}, TypeError, "multi_precision='yes': must be True or False"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
    ],
    ids=str,
)
def test_wrong_option(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Adagrad([torch.zeros(2)], **options)
    optimizer = Adagrad([torch.zeros(2)])
    added = torch.zeros(3)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [added], **options})
    assert len(optimizer.param_groups) == 1
    assert added not in optimizer.state


def test_row_wise_needs_rows_of_real_numbers() -> None:
    optimizer = Adagrad([torch.zeros(2)], row_wise=True)
    for parameter, message in (
        (torch.zeros(()), "parameter 0 of its group of shape (): must have rows"),
        (torch.zeros(2, dtype=torch.complex64), "real"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.add_param_group({"params": [parameter]})
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.state) == 1


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Adagrad([("weight", p)])
        p.grad = torch.ones(3)
        optimizer.step()
        assert repr(optimizer).startswith("Adagrad (")


def test_an_option_that_equals_the_last_one_is_checked_for_its_type() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p], clip_value=1.0)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["clip_value"] = True
    with pytest.raises(TypeError, match=r"^clip_value=True: must be a number"):
        optimizer.step()


def refused_at_a_step(name: str, value: Any, error: type[Exception], match: str, *, has_state: bool = True) -> None:
    """Set an option of the group: the next step raises, and changes nothing."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p])
    if not has_state:
        optimizer.state.clear()
    optimizer.param_groups[0][name] = value
    p.grad = torch.ones(2)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert (p == 1).all()


OPTIONS = ["eps", "weight_decay", "lr_decay", "initial_accumulator_value"]


@pytest.mark.parametrize("value", [torch.tensor([0.5, 0.5]), torch.tensor(0.5 + 1j), torch.ones(0)], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "lr"])
def test_options_that_are_tensors_must_be_one_real_number(name: str, value: torch.Tensor) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        Adagrad([p], **{name: value})
    if name != "initial_accumulator_value":
        refused_at_a_step(name, value, ValueError, rf"{name}: torch\..*: must be one real number")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_may_be_parameters(name: str) -> None:
    results = []
    for value in (0.5, torch.nn.Parameter(torch.tensor(0.5))):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = Adagrad([p], **{name: value})
        p.grad = torch.ones(2)
        optimizer.step()
        results.append(p.tolist())
    assert results[0] == results[1]


def test_a_weight_decay_that_a_schedule_brought_just_below_zero() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adagrad([p], lr=0.5, eps=0)
    optimizer.param_groups[0]["weight_decay"] = -1e-18
    p.grad = torch.ones(2)
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="weight_decay"):
        Adagrad([p], weight_decay=-1e-18)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("maximize", "row_wise", "epsilon_inside", "decoupled_decay", "multi_precision")
     for value in (1, "no", None)],
)  # fmt: skip
def test_what_must_be_true_or_false_is_checked_at_a_step(name: str, value: Any) -> None:
    refused_at_a_step(name, value, TypeError, f"{name}={value!r}: must be True or False")


def test_an_initial_value_that_was_set_is_checked_when_a_state_is_made() -> None:
    message = r"initial_accumulator_value=-1.0: must be >= 0"
    refused_at_a_step("initial_accumulator_value", -1.0, ValueError, message, has_state=False)
