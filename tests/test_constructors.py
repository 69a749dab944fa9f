"""Bad arguments of constructors: optimizers and their multipliers, row-sparse gradients, updaters."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, Updater, get_updater
from adagrad.lr_scheduler import FactorScheduler
from adagrad.torch import Adagrad
from support import assert_same_bits

CONSTRUCTORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"learning_rate": -0.1}, ValueError, "learning_rate=-0.1: must be >= 0"),
    ({"learning_rate": math.nan}, ValueError, "learning_rate=nan: must be finite and >= 0"),
    ({"learning_rate": math.inf}, ValueError, "learning_rate=inf: must be finite and >= 0"),
    ({"learning_rate": 10**400}, ValueError, "learning_rate=1000"),
    ({"learning_rate": "0.1"}, TypeError, "learning_rate='0.1': must be a number, not str"),
    ({"learning_rate": True}, TypeError, "learning_rate=True: must be a number, not bool"),
    ({"learning_rate": 1j}, TypeError, "learning_rate=1j: must be a number, not complex"),
    ({"learning_rate": np.ones(2)}, TypeError, "learning_rate=array([1., 1.]): must be a number, not ndarray"),
    ({"epsilon": -1e-06}, ValueError, "epsilon=-1e-06: must be >= 0"),
    ({"epsilon": math.nan}, ValueError, "epsilon=nan: must be finite and >= 0"),
    ({"epsilon": None}, TypeError, "epsilon=None: must be a number"),
    ({"initial_accumulator_value": -1}, ValueError, "initial_accumulator_value=-1: must be >= 0"),
    ({"initial_accumulator_value": math.inf}, ValueError, "initial_accumulator_value=inf: must be finite"),
    ({"wd": -1}, ValueError, "wd=-1: must be >= 0"),
    ({"wd": math.nan}, ValueError, "wd=nan: must be finite"),
    ({"wd": None}, TypeError, "wd=None: must be a number"),
    ({"rescale_grad": math.inf}, ValueError, "rescale_grad=inf: must be finite"),
    ({"rescale_grad": math.nan}, ValueError, "rescale_grad=nan: must be finite"),
    ({"rescale_grad": "1"}, TypeError, "rescale_grad='1': must be a number"),
    ({"clip_gradient": 0}, ValueError, "clip_gradient=0: must be None or > 0"),
    ({"clip_gradient": 0.0}, ValueError, "clip_gradient=0.0: must be None or > 0"),
    ({"clip_gradient": -1}, ValueError, "clip_gradient=-1: must be None or > 0"),
    ({"clip_gradient": math.inf}, ValueError, "clip_gradient=inf: must be None or finite and > 0"),
    ({"clip_gradient": math.nan}, ValueError, "clip_gradient=nan: must be None or finite and > 0"),
    ({"clip_gradient": "1"}, TypeError, "clip_gradient='1': must be a number"),
    ({"begin_num_update": -1}, ValueError, "begin_num_update=-1: must be >= 0"),
    ({"begin_num_update": 1.0}, TypeError, "begin_num_update=1.0: must be an integer, not float"),
    ({"multi_precision": 1}, TypeError, "multi_precision=1: must be True or False, not int"),
    ({"use_fused_step": "yes"}, TypeError, "use_fused_step='yes': must be True or False, not str"),
    ({"aggregate_num": 0}, ValueError, "aggregate_num=0: must be >= 1"),
    ({"aggregate_num": 2.5}, TypeError, "aggregate_num=2.5: must be an integer"),
    ({"aggregate_num": -math.inf}, TypeError, "aggregate_num=-inf: must be an integer"),
    ({"aggregate_num": math.nan}, TypeError, "aggregate_num=nan: must be an integer"),
    ({"param_idx2name": ["a"]}, TypeError, "param_idx2name=['a']: must be a dict, not list"),
    ({"param_dict": [1]}, TypeError, "param_dict=[1]: must be a dict, not list"),
    ({"lr_scheduler": 0.1}, TypeError, "lr_scheduler=0.1: must be callable with num_update"),
    ({"lr_scheduler": FactorScheduler}, TypeError, "FactorScheduler'>: must be callable with num_update, no class"),
]


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTORS, ids=[m for _, _, m in CONSTRUCTORS])
def test_constructor(klass: type[AdaGrad], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        klass(**arguments)


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad, Adagrad])
def test_defaults_can_be_written_to_files(klass: Any) -> None:
    """As by programs that make a command line or a configuration of a signature, and take no subclasses of float."""
    defaults = [p.default for p in inspect.signature(klass).parameters.values() if p.default is not p.empty]
    assert len(defaults) > 5
    assert {type(value) for value in defaults} <= {bool, int, float, str, type(None)}


@pytest.mark.parametrize("name", ["learning_rate", "epsilon", "initial_accumulator_value", "wd", "rescale_grad"])
def test_an_array_of_one_number_without_dimensions_is_a_number(name: str) -> None:
    """As interpolation and np.load return it."""
    optimizer = AdaGrad(**{name: np.array(0.25)})
    weight = np.ones(2, np.float32)
    optimizer.update(0, weight, np.ones(2, np.float32), optimizer.create_state(0, weight))
    other, expected = AdaGrad(**{name: 0.25}), np.ones(2, np.float32)
    other.update(0, expected, np.ones(2, np.float32), other.create_state(0, expected))
    assert_same_bits(weight, expected)
    for refused in (np.array(True), np.ma.masked, np.ma.array(0.5)):
        with pytest.raises(TypeError, match=f"{name}=.*: must be a number"):
            AdaGrad(**{name: refused})
    # As an attribute, too: it may change, and goes into a file.
    value, attribute = np.array(0.25), "lr" if name == "learning_rate" else name
    for changed in (0.25, 0.5):
        value[...] = changed
        setattr(optimizer, attribute, value)
        setattr(other, attribute, changed)
        state, expected_state = optimizer.create_state(0, weight), other.create_state(0, weight)
        optimizer.update(0, weight, np.ones(2, np.float32), state)
        other.update(0, expected, np.ones(2, np.float32), expected_state)
        assert_same_bits(weight, expected)
    get_updater(AdaGrad()).set_states(Updater(optimizer).get_states(dump_optimizer=True))


def test_aggregate_num_that_is_an_array() -> None:
    with pytest.raises(TypeError, match=r"^aggregate_num="):
        AdaGrad(aggregate_num=np.ones(2))


def test_multipliers() -> None:
    optimizer = AdaGrad()
    for name, method in (("args_lr_mult", optimizer.set_lr_mult), ("args_wd_mult", optimizer.set_wd_mult)):
        for bad, error in ((-1, ValueError), (math.nan, ValueError), ("2", TypeError), (None, TypeError)):
            with pytest.raises(error, match=rf"{name}\['a'\]={re.escape(repr(bad))}: must be"):
                method({"a": bad})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match=rf"{name}=\[1\]: must be a dict, not list"):
            method([1])  # type: ignore[arg-type]
    assert optimizer.lr_mult == optimizer.wd_mult == {}


ROW_SPARSE: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (np.ones((2, 3)), np.array([0.0, 1.0]), (4, 3), TypeError, "indices: dtype float64: must be int32 or int64"),
    (np.ones((2, 3)), np.array([0, 1], np.int16), (4, 3), TypeError, "indices: dtype int16: must be int32 or int64"),
    (np.ones((2, 3)), np.array([0, 1], np.uint64), (4, 3), TypeError, "indices: dtype uint64: must be int32 or int64"),
    (np.ones((2, 3)), np.array([True, False]), (4, 3), TypeError, "indices: dtype bool: must be int32 or int64"),
    (np.ones((2, 3)), [0, 1], (4, 3), TypeError, "indices=[0, 1]: must be a NumPy array or a torch tensor"),
    ([[1.0]], np.array([0]), (4, 1), TypeError, "values=[[1.0]]: must be a NumPy array or a torch tensor"),
    (None, np.array([0]), (4, 1), TypeError, "values=None: must be a NumPy array or a torch tensor"),
    (np.ones((2, 3)), np.array([[0, 1]]), (4, 3), ValueError, "indices: shape (1, 2): must have one dimension"),
    (np.ones((1, 3)), np.array(0), (4, 3), ValueError, "indices: shape (): must have one dimension"),
    (
        np.ones((3, 3)),
        np.array([0, 1]),
        (4, 3),
        ValueError,
        "values: shape (3, 3): must be (2, 3), for 2 indices into (4, 3)",
    ),
    (
        np.ones((2, 2)),
        np.array([0, 1]),
        (4, 3),
        ValueError,
        "values: shape (2, 2): must be (2, 3), for 2 indices into (4, 3)",
    ),
    (np.ones(2), np.array([0, 1]), (4, 3), ValueError, "values: shape (2,): must be (2, 3)"),
    (np.ones((2, 1)), np.array([0, 1]), (4,), ValueError, "values: shape (2, 1): must be (2,)"),
    (np.ones(()), np.array([0]), (), ValueError, "shape=(): must have one dimension or more"),
    (
        np.ones((1, 3)),
        np.array([0]),
        (-4, 3),
        ValueError,
        "shape=(-4, 3): must have one dimension or more, none of them negative",
    ),
    (np.ones((1, 3)), np.array([0]), 4, TypeError, "shape=4: must be a tuple of integers"),
    (np.ones((1, 3)), np.array([0]), "43", TypeError, "shape='43': must be a tuple of integers"),
    (np.ones((1, 3)), np.array([0]), (4.5, 3), TypeError, "shape=(4.5, 3): must be a tuple of integers"),
    (np.ones((1, 3)), np.array([0]), None, TypeError, "shape=None: must be a tuple of integers"),
    (
        np.ones((1, 3)),
        np.ma.masked_array([0]),
        (4, 3),
        TypeError,
        "must be a NumPy array or a torch tensor, not numpy.ma.",
    ),
    (np.ma.ones((1, 3)), np.array([0]), (4, 3), TypeError, "values=masked_array("),
]


@pytest.mark.parametrize(
    ("values", "indices", "shape", "error", "message"), ROW_SPARSE, ids=[case[-1] for case in ROW_SPARSE]
)
def test_row_sparse(values: Any, indices: Any, shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RowSparse(values, indices, shape)


def test_row_sparse_refers_to_its_arrays() -> None:
    values, indices = np.ones((2, 3), np.float32), np.array([0, 1])
    grad = RowSparse(values, indices, [4, np.int64(3)])
    assert grad.values is values
    assert grad.indices is indices
    assert grad.shape == (4, 3)
    assert repr(grad) == "RowSparse(<2 rows of float32>, shape=(4, 3))"


def test_updater() -> None:
    for bad in (None, AdaGrad, "adagrad"):
        with pytest.raises(TypeError, match=r"optimizer=.*must be an adagrad.Optimizer"):
            Updater(bad)  # type: ignore[arg-type]
    assert Updater(Optimizer()).states == {}
