"""What conversions have in common: plain arrays, the optimizer that goes on with them, imports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from adagrad import AdaGrad, GroupAdaGrad, convert
from adagrad.dialects import DIALECTS
from processes import run
from support import assert_same_bits
from trajectories import f32

# --------------------------------------------------------------------------------------------------------- plain arrays


@pytest.mark.parametrize("dialect", ["mlx", "tensorflow", "tf"])
def test_arrays_there_and_back(dialect: str) -> None:
    optimizer = AdaGrad(0.1, dialect=dialect)
    given = [f32(1, 2), np.ones((2, 3)).T]
    states = convert.from_arrays(given, optimizer, dialect)
    assert list(states) == [0, 1]
    for found, array in zip(convert.to_arrays(states, optimizer, dialect), given, strict=True):
        assert_same_bits(found, array)
        assert not np.shares_memory(found, array)
        assert found.flags.c_contiguous
    named = convert.from_arrays({"b": f32(1), "a": f32(2)}, optimizer, dialect)
    assert list(named) == ["b", "a"]
    assert [each[0] for each in convert.to_arrays(named, optimizer, dialect)] == [1, 2]


def test_states_go_back_by_their_indices() -> None:
    optimizer = AdaGrad()
    for kind in (int, np.int64, np.uint8):
        states = {kind(index): f32(index) for index in (2, 0, 1)}
        assert [each[0] for each in convert.to_arrays(states, optimizer, "mxnet")] == [0, 1, 2]
    with pytest.raises(TypeError, match=r"states=.*: must be a dict of index to state"):
        convert.to_arrays([f32(1)], optimizer, "mxnet")  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_row_wise_histories_only_go_where_there_are_such(dialect: str) -> None:
    """Elsewhere they would be broadcast, to other steps."""
    states, optimizer = {0: np.ones((3, 1), np.float32)}, GroupAdaGrad(0.1, dialect=dialect)
    if dialect in ("mxnet", "mxnet1", "fbgemm"):
        assert_same_bits(convert.to_arrays(states, optimizer, dialect)[0], states[0])
    else:
        with pytest.raises(ValueError, match=r"row_wise=True: must be False: .* has no row-wise history"):
            convert.to_arrays(states, optimizer, dialect)


def test_arrays_are_checked() -> None:
    swapped = convert.from_arrays([f32(1, 2).astype(">f4")], AdaGrad(), "mxnet")[0]
    assert swapped.dtype == np.dtype(np.float32)
    assert swapped.dtype.isnative
    for bad, match in {
        "float16": "history 0: float16: must be float32 or float64",
        "int32": "history 0: int32: must be an array",
        "bool": "history 0: bool: must be an array",
    }.items():
        with pytest.raises(ValueError, match=match):
            convert.from_arrays([np.ones(2, bad)], AdaGrad(), "mxnet")
    with pytest.raises(
        ValueError, match=re.escape("history 1: shape (3, 2): must be (n, 1, ...), one value for each row")
    ):
        convert.from_arrays([np.ones((3, 1, 1)), np.ones((3, 2))], GroupAdaGrad(), "mxnet")
    with pytest.raises(ValueError, match=re.escape("history 0: shape (): must be (n, 1, ...)")):
        convert.from_arrays([np.array(1.0)], GroupAdaGrad(), "mxnet")
    for single in (np.ones((2, 3)), 3):
        with pytest.raises(TypeError, match=r"histories=.*: must be a list of arrays, or a dict of index to array"):
            convert.from_arrays(single, AdaGrad(), "mxnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dialect='x': must be one of"):
        convert.from_arrays([], AdaGrad(), "x")
    with pytest.raises(ValueError, match="history 0: masked: must be an array"):
        convert.from_arrays([np.ma.masked_less(f32(1, 2), 2)], AdaGrad(), "mxnet")
    with pytest.raises(ValueError, match=r"history 0: -2.0: must be >= 0, as a sum of squares is"):
        convert.from_arrays([f32(1, -2, np.nan)], AdaGrad(), "mxnet")
    for pair in ((f32(1), f32(1)), [f32(1), f32(1)]):
        with pytest.raises(ValueError, match=r"states\[0\]: a pair \(master copy, history\): must be one history"):
            convert.to_arrays({0: pair}, AdaGrad(), "mxnet")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex32"])
def test_histories_of_other_low_precisions_are_refused(dtype: str) -> None:
    low = torch.ones(2).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"history 0: {dtype}: must be float32 or float64"):
        convert.from_arrays([low], AdaGrad(dialect="mlx"), "mlx")


def test_a_variable_whose_value_is_a_function() -> None:
    """As TensorFlow's, which has ``numpy()``, too."""

    class Variable:
        def value(self) -> object:
            return object()

        def numpy(self) -> np.ndarray:
            return np.ones(2, np.float32)

    assert convert.from_arrays([Variable()], AdaGrad(dialect="tf"), "tf")[0].tolist() == [1, 1]


def test_a_history_that_requires_grad() -> None:
    history = torch.ones(2, requires_grad=True)
    assert convert.from_arrays([history], AdaGrad(dialect="mlx"), "mlx")[0].tolist() == [1, 1]


# -------------------------------------------------------------------------------------------------------- the optimizer

CALLS: list[Callable[[Any], Any]] = [
    lambda o: convert.from_arrays([], o, "mxnet"),
    lambda o: convert.to_arrays({}, o, "mxnet"),
    lambda o: convert.from_torch({}, o),
    lambda o: convert.to_torch({}, o),
    lambda o: convert.to_torch({}, o, ours=True),
    lambda o: convert.from_optax((), o),
    lambda o: convert.to_optax({}, o, ()),
    lambda o: convert.from_keras([], o),
    lambda o: convert.to_keras({}, o, []),
    lambda o: convert.from_fbgemm([], o),
    lambda o: convert.from_fbgemm([f32(1)], o),
    lambda o: convert.to_fbgemm({}, o),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("other", [None, "adagrad", AdaGrad, object()])
def test_the_optimizer_must_be_one(call: Callable[[Any], Any], other: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer=.*: must be an adagrad.AdaGrad or GroupAdaGrad"):
        call(other)


def test_weight_decay_must_be_where_keras_has_it() -> None:
    optimizer = AdaGrad(0.1, wd=0.1, dialect="keras", decoupled_decay=False)
    with pytest.raises(ValueError, match="decoupled_decay=False: must be True"):
        convert.from_arrays([np.ones(2, np.float32)], optimizer, "keras")


def test_without_weight_decay_its_place_is_no_matter() -> None:
    optimizer = AdaGrad(0.1, dialect="torch", decoupled_decay=True)
    assert len(convert.from_arrays([np.ones(2, np.float32)], optimizer, "torch")) == 1


# -------------------------------------------------------------------------------------------------------------- imports


def test_no_framework_is_imported() -> None:
    code = "import sys, adagrad.convert; assert not {'torch', 'jax', 'optax', 'keras', 'numba'} & sys.modules.keys()"
    run(code)


def test_the_module_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, adagrad; assert 'adagrad.convert' not in sys.modules; adagrad.convert.from_torch; adagrad.none"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("AttributeError: module 'adagrad' has no attribute 'none'\n")
