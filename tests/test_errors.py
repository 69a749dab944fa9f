"""Bad input: the right exception, a message that names argument and value, and nothing changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, GroupAdaGrad, Optimizer, RowSparse, Updater, arrays
from support import BFLOAT16

SHAPE = (4, 3)


@dataclass
class Call:
    """The arguments of an update, of which the one at ``at`` is made bad."""

    optimizer: AdaGrad
    indices: Any = field(default_factory=list)
    weights: Any = field(default_factory=list)
    grads: Any = field(default_factory=list)
    states: Any = field(default_factory=list)
    at: int = 0

    def add(self, dtype: Any, rows: bool = False) -> None:
        weight = np.arange(1, 13).reshape(SHAPE).astype(dtype)
        values = np.full((2, 3), 0.5, dtype)
        self.indices.append(len(self.indices))
        self.weights.append(weight)
        self.grads.append(RowSparse(values, np.array([0, 2]), SHAPE) if rows else np.full(SHAPE, 0.5, dtype))
        self.states.append(self.optimizer.create_state_multi_precision(self.indices[-1], weight))

    def snapshot(self) -> tuple[Any, ...]:
        """Everything that an update may write to, and the gradients."""

        def content(value: Any) -> Any:
            if isinstance(value, RowSparse):
                return content(value.values), content(value.indices)
            if isinstance(value, (list, tuple)):
                return [content(each) for each in value]
            return value.tobytes() if isinstance(value, np.ndarray) and value.dtype != object else id(value)

        return (
            content(self.weights), content(self.states), content(self.grads),
            dict(self.optimizer._index_update_count), self.optimizer.num_update, self.optimizer.learning_rate,
        )  # fmt: skip

    def update(self) -> None:
        self.optimizer.update_multi_precision(self.indices, self.weights, self.grads, self.states)

    # What is made bad:

    def weight(self, make: Callable[[np.ndarray], Any]) -> None:
        self.weights[self.at] = make(self.weights[self.at])

    def grad(self, make: Callable[[np.ndarray], Any]) -> None:
        self.grads[self.at] = make(np.full(SHAPE, 0.5, np.float32))

    def state(self, make: Callable[[np.ndarray], Any]) -> None:
        self.states[self.at] = make(self.states[self.at])

    def low_precision(self, make_state: Callable[[np.ndarray, np.ndarray], Any]) -> None:
        """The weight becomes a float16 one with a master copy."""
        weight = self.weights[self.at].astype(np.float16)
        self.weights[self.at], self.grads[self.at] = weight, np.full(SHAPE, 0.5, np.float16)
        self.states[self.at] = make_state(weight.astype(np.float32), self.states[self.at])

    def other_state(self) -> tuple[np.ndarray, np.ndarray]:
        """What the rule acts on of the good weight at 1, and its history."""
        state = self.states[1]
        return state if isinstance(state, tuple) else (self.weights[1], state)

    def rows(self, indices: Any, values: Any = None, shape: tuple[int, ...] = SHAPE) -> None:
        indices = np.asarray(indices)
        values = np.ones((len(indices), *shape[1:]), np.float32) if values is None else values
        self.grads[self.at] = RowSparse(values, indices, shape)


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def broadcast(array: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(array, array.shape, (0, array.itemsize))


class ArrayLike:
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.ones(SHAPE, np.float32)

    def __repr__(self) -> str:
        return "<an array of another library>"


def history_as(c: Call) -> tuple[int, ...]:
    return (4, 1) if c.optimizer.row_wise else SHAPE


def overlapping_grad(c: Call) -> None:
    base = np.ones(20, np.float32)
    c.weights[c.at], c.grads[c.at] = base[:12].reshape(SHAPE), base[8:].reshape(SHAPE)


def all_of_integers(c: Call) -> None:
    c.weight(lambda w: w.astype(np.int32))
    c.grad(lambda g: g.astype(np.int32))
    c.state(lambda h: h.astype(np.int32))


def indices_in_weight(c: Call) -> None:
    c.rows(c.weights[c.at].reshape(-1).view(np.int32)[:0])
    c.grads[c.at].indices = c.weights[c.at].reshape(-1).view(np.int32)[:2]
    c.grads[c.at].values = np.ones((2, 3), np.float32)
    c.weights[c.at][...] = 0


def longer_indices(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].indices = np.array([0, 1, 2, 3])


def resized_values(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].values.resize((1, 3), refcheck=False)


def float_indices(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].indices = np.array([0.0, 1.0])


Case = tuple[Callable[[Call], Any], type[Exception], str]

CASES: dict[str, Case] = {
    # shapes
    "gradient of another shape": (
        lambda c: c.grad(lambda g: g.T.copy()),
        ValueError,
        r"grads[{at}]: shape (3, 4): must be (4, 3)",
    ),
    "gradient of more dimensions": (
        lambda c: c.grad(lambda g: g[None]),
        ValueError,
        r"grads[{at}]: shape (1, 4, 3): must be (4, 3)",
    ),
    "gradient with a dimension more at its end": (
        lambda c: c.grad(lambda g: g[..., None]),
        ValueError,
        r"grads[{at}]: shape (4, 3, 1): must be (4, 3)",
    ),
    "gradient of one row": (
        lambda c: c.grad(lambda g: g[:1]),
        ValueError,
        r"grads[{at}]: shape (1, 3): must be (4, 3)",
    ),
    "gradient 0-d": (
        lambda c: c.grad(lambda g: np.ones((), np.float32)),
        ValueError,
        r"grads[{at}]: shape (): must be (4, 3)",
    ),
    "gradient of as many elements": (
        lambda c: c.grad(lambda g: g.reshape(12)),
        ValueError,
        r"grads[{at}]: shape (12,): must be (4, 3)",
    ),
    "history of another shape": (
        lambda c: c.state(lambda h: np.zeros((4, 4), np.float32)),
        ValueError,
        r"history in states[{at}]: shape (4, 4): must be {history}",
    ),
    "history of the other optimizer": (
        lambda c: c.state(lambda h: np.zeros(SHAPE if c.optimizer.row_wise else (4, 1), np.float32)),
        ValueError,
        r"history in states[{at}]: shape",
    ),
    "master copy of another shape": (
        lambda c: c.low_precision(lambda m, h: (m[:2], h)),
        ValueError,
        r"master copy in states[{at}]: shape (2, 3): must be (4, 3)",
    ),
    "rows of another weight": (
        lambda c: c.rows([0], shape=(5, 3)),
        ValueError,
        r"grads[{at}]: shape (5, 3): must be (4, 3), the weight's",
    ),
    "rows of another length": (
        lambda c: c.rows([0], shape=(4, 2)),
        ValueError,
        r"grads[{at}]: shape (4, 2): must be (4, 3), the weight's",
    ),
    # dtypes
    "gradient of integers": (
        lambda c: c.grad(lambda g: g.astype(np.int32)),
        TypeError,
        r"grads[{at}]: dtype int32: must be float16, bfloat16, float32 or float64",
    ),
    "gradient of booleans": (lambda c: c.grad(lambda g: g > 0), TypeError, r"grads[{at}]: dtype bool: must be"),
    "gradient of objects": (
        lambda c: c.grad(lambda g: g.astype(object)),
        TypeError,
        r"grads[{at}]: dtype object: must be",
    ),
    "gradient complex": (
        lambda c: c.grad(lambda g: g.astype(complex)),
        TypeError,
        r"grads[{at}]: dtype complex128: must be",
    ),
    "gradient float64": (
        lambda c: c.grad(lambda g: g.astype(np.float64)),
        TypeError,
        r"grads[{at}]: dtype float64: must be float32, for a weight of float32",
    ),
    "gradient float16": (
        lambda c: c.grad(lambda g: g.astype(np.float16)),
        TypeError,
        r"grads[{at}]: dtype float16: must be float32, for a weight of float32",
    ),
    "values float64": (
        lambda c: c.rows([0], np.ones((1, 3))),
        TypeError,
        r"values of grads[{at}]: dtype float64: must be float32, for a weight of float32",
    ),
    "gradient float64 for float16": (
        lambda c: (c.low_precision(lambda m, h: (m, h)), c.grad(lambda g: g.astype(np.float64))),
        TypeError,
        r"grads[{at}]: dtype float64: must be float16 or float32, for a weight of float16",
    ),
    "gradient bfloat16 for float16": (
        lambda c: (c.low_precision(lambda m, h: h), c.grad(lambda g: g.astype(BFLOAT16))),
        TypeError,
        r"grads[{at}]: dtype bfloat16: must be float16 or float32",
    ),
    "weight of integers": (
        lambda c: c.weight(lambda w: w.astype(np.int64)),
        TypeError,
        r"weights[{at}]: dtype int64: must be",
    ),
    "weight longdouble": (lambda c: c.weight(lambda w: w.astype(np.longdouble)), TypeError, r"weights[{at}]: dtype "),
    "all of integers": (all_of_integers, TypeError, r"weights[{at}]: dtype int32: must be"),
    "history float64 for float32": (
        lambda c: c.state(lambda h: h.astype(np.float64)),
        TypeError,
        r"history in states[{at}]: dtype float64: must be float32",
    ),
    "history float16": (
        lambda c: c.low_precision(lambda m, h: h.astype(np.float16)),
        TypeError,
        r"history in states[{at}]: dtype float16: must be float32",
    ),
    "master copy float64": (
        lambda c: c.low_precision(lambda m, h: (m.astype(np.float64), h)),
        TypeError,
        r"master copy in states[{at}]: dtype float64: must be float32",
    ),
    "master copy float16": (
        lambda c: c.low_precision(lambda m, h: (m.astype(np.float16), h)),
        TypeError,
        r"master copy in states[{at}]: dtype float16: must be float32",
    ),
    # lists
    "too few weights": (lambda c: c.weights.pop(), ValueError, r"weights: 2 entries: must be 3, as many as indices"),
    "too many gradients": (
        lambda c: c.grads.append(c.grads[0]),
        ValueError,
        r"grads: 4 entries: must be 3, as many as indices",
    ),
    "too few states": (lambda c: c.states.pop(), ValueError, r"states: 2 entries: must be 3, as many as indices"),
    "weights not a list": (
        lambda c: setattr(c, "weights", np.ones((3, *SHAPE), np.float32)),
        TypeError,
        r"weights=array(",
    ),
    "gradients not a list": (
        lambda c: setattr(c, "grads", np.ones((3, *SHAPE), np.float32)),
        TypeError,
        r"grads=array(",
    ),
    "gradients none": (lambda c: setattr(c, "grads", None), TypeError, r"grads=None: must be a list, like indices"),
    "gradients one row-sparse": (
        lambda c: setattr(c, "grads", RowSparse(np.ones((1, 3)), np.array([0]), SHAPE)),
        TypeError,
        r"grads=RowSparse(<1 rows of float64>, shape=(4, 3)): must be a list",
    ),
    "states none": (lambda c: setattr(c, "states", None), TypeError, r"states=None: must be a list, like indices"),
    "index listed twice": (
        lambda c: c.indices.__setitem__(c.at, 1),
        ValueError,
        "indices=[{duplicate}]: must be distinct within one call",
    ),
    "index a float": (
        lambda c: c.indices.__setitem__(c.at, 1.5),
        TypeError,
        "index=1.5: must be an integer or a string, not float",
    ),
    "index none": (lambda c: c.indices.__setitem__(c.at, None), TypeError, "index=None: must be an integer or"),
    "index not hashable": (lambda c: c.indices.__setitem__(c.at, []), TypeError, "must be integers or strings"),
    # rows
    "row negative": (
        lambda c: c.rows([0, -1]),
        IndexError,
        r"indices of grads[{at}]: indices[1]=-1: must be in [0, 4), the weight's rows",
    ),
    "row too large": (
        lambda c: c.rows([3, 2, 4]),
        IndexError,
        r"indices of grads[{at}]: indices[2]=4: must be in [0, 4), the weight's rows",
    ),
    "row far too large": (
        lambda c: c.rows(np.array([2**40])),
        IndexError,
        r"indices of grads[{at}]: indices[0]=1099511627776: must be in [0, 4)",
    ),
    "row far too small": (
        lambda c: c.rows(np.array([-(2**63)])),
        IndexError,
        r"indices of grads[{at}]: indices[0]=-9223372036854775808: must be in [0, 4)",
    ),
    "row too large, int32": (
        lambda c: c.rows(np.array([3, 3, 4], np.int32)),
        IndexError,
        r"indices of grads[{at}]: indices[2]=4: must be in [0, 4)",
    ),
    "row too large, byte-swapped": (
        lambda c: c.rows(np.array([3, 3, 4], ">i8")),
        IndexError,
        r"indices of grads[{at}]: indices[2]=4: must be in [0, 4)",
    ),
    "row of a weight without rows": (
        lambda c: (c.weight(lambda w: w[:0]), c.state(lambda h: h[:0]), c.rows([0], shape=(0, 3))),
        IndexError,
        r"indices[0]=0: must be in [0, 0)",
    ),
    "indices replaced by more": (longer_indices, ValueError, r"values: shape (2, 3): must be (4, 3), for 4 indices"),
    "indices replaced by floats": (float_indices, TypeError, "indices: dtype float64: must be int32 or int64"),
    "values resized": (resized_values, ValueError, r"values: shape (1, 3): must be (2, 3), for 2 indices"),
    "master row too large": (
        lambda c: (c.low_precision(lambda m, h: (m, h)), c.rows([4], np.ones((1, 3), np.float16))),
        IndexError,
        r"indices[0]=4",
    ),
    # states
    "no state": (
        lambda c: c.state(lambda h: None),
        TypeError,
        r"history in states[{at}]=None: must be a NumPy array or a torch tensor",
    ),
    "state a number": (lambda c: c.state(lambda h: 0.0), TypeError, r"history in states[{at}]=0.0: must be"),
    "state of three": (
        lambda c: c.state(lambda h: (h, h, h)),
        ValueError,
        r"states[{at}]: 3 entries: must be a history or a pair (master copy, history)",
    ),
    "master copy of a float32 weight": (
        lambda c: c.state(lambda h: (c.weights[c.at].copy(), h)),
        ValueError,
        r"states[{at}]: a master copy: only for float16 and bfloat16 weights, not float32",
    ),
    "master copy none": (
        lambda c: c.low_precision(lambda m, h: (None, h)),
        TypeError,
        r"master copy in states[{at}]=None",
    ),
    # memory
    "weight read-only": (lambda c: c.weight(frozen), ValueError, r"weights[{at}]: read-only: must be writable"),
    "history read-only": (
        lambda c: c.state(frozen),
        ValueError,
        r"history in states[{at}]: read-only: must be writable",
    ),
    "master copy read-only": (
        lambda c: c.low_precision(lambda m, h: (frozen(m), h)),
        ValueError,
        r"master copy in states[{at}]: read-only",
    ),
    "weight overlaps itself": (
        lambda c: c.weight(broadcast),
        ValueError,
        r"weights[{at}]: strides (0, 4): overlaps itself",
    ),
    "weight overlaps itself a little": (
        lambda c: c.weight(lambda w: np.lib.stride_tricks.as_strided(np.zeros(12, np.float32), SHAPE, (8, 4))),
        ValueError,
        r"weights[{at}]: strides (8, 4): overlaps itself",
    ),
    "history overlaps itself": (
        lambda c: c.state(lambda h: np.lib.stride_tricks.as_strided(h, h.shape, (0, 4))),
        ValueError,
        r"history in states[{at}]: strides (0, 4): overlaps itself",
    ),
    "weight listed twice": (lambda c: c.weight(lambda w: c.weights[1]), ValueError, r"shares memory with weights["),
    "weight listed twice, reversed": (
        lambda c: c.weight(lambda w: c.weights[1][::-1]),
        ValueError,
        r"shares memory with weights[",
    ),
    "one history for two": (
        lambda c: c.state(lambda h: c.other_state()[1]),
        ValueError,
        r"shares memory with history in states[",
    ),
    "gradient is the weight": (
        lambda c: c.grads.__setitem__(c.at, c.weights[c.at]),
        ValueError,
        r"weights[{at}]: shares memory with grads[{at}]",
    ),
    "gradient is a view of the weight": (
        lambda c: c.grads.__setitem__(c.at, c.weights[c.at][::-1]),
        ValueError,
        r"shares memory with grads[{at}]",
    ),
    "gradient is another weight": (
        lambda c: c.grads.__setitem__(c.at, c.other_state()[0]),
        ValueError,
        r"shares memory with grads[{at}]",
    ),
    "gradient overlaps the weight": (overlapping_grad, ValueError, r"weights[{at}]: shares memory with grads[{at}]"),
    "values are rows of the weight": (lambda c: c.rows([0, 1], c.weights[c.at][:2]), ValueError, r"shares memory with"),
    "row ids in the weight's memory": (
        indices_in_weight,
        ValueError,
        r"weights[{at}]: shares memory with indices of grads[{at}]",
    ),
    "master copy is the history": (
        lambda c: c.low_precision(lambda m, h: (h, h) if not c.optimizer.row_wise else (m, m[:, :1])),
        ValueError,
        r"master copy in states[{at}]: shares memory with history in states[{at}]",
    ),
    # kinds
    "weight a list": (lambda c: c.weight(lambda w: w.tolist()), TypeError, r"weights[{at}]=[["),
    "weight a number": (
        lambda c: c.weight(lambda w: 1.5),
        TypeError,
        r"weights[{at}]=1.5: must be a NumPy array or a torch tensor, not builtins.float",
    ),
    "weight a masked array": (
        lambda c: c.weight(np.ma.masked_array),
        TypeError,
        r"must be a NumPy array or a torch tensor, not numpy.ma.",
    ),
    "gradient of another library": (
        lambda c: c.grad(lambda g: ArrayLike()),
        TypeError,
        r"grads[{at}]=<an array of another library>: must be a NumPy array or a torch tensor, not test_err",
    ),
    "gradient none": (
        lambda c: c.grad(lambda g: None),
        TypeError,
        r"grads[{at}]=None: must be a NumPy array or a torch tensor, not builtins.NoneType",
    ),
    "gradient a string": (lambda c: c.grad(lambda g: "abc"), TypeError, r"grads[{at}]='abc': must be"),
    "gradient a masked array": (lambda c: c.grad(np.ma.masked_array), TypeError, r"not numpy.ma."),
    "weight row-sparse": (
        lambda c: c.weight(lambda w: RowSparse(w, np.arange(4), SHAPE)),
        TypeError,
        r"not adagrad.row_sparse.RowSparse",
    ),
    # hyper-parameters, set meanwhile
    **{
        f"{name} {value}": (
            lambda c, name=name, value=value: setattr(c.optimizer, name, value),
            error,
            f"{name}={value!r}: must be",
        )  # type: ignore[misc]
        for name, values in {
            "wd": [-0.1, math.nan, math.inf],
            "epsilon": [-1e-6, math.nan, math.inf],
            "clip_gradient": [0, -1.0, math.nan, math.inf],
            "rescale_grad": [math.nan, math.inf, -math.inf],
            "lr": [-1.0, math.nan, math.inf],
        }.items()
        for value in values
        for error in [ValueError]
    },
    **{
        f"{name} {value!r}": (
            lambda c, name=name, value=value: setattr(c.optimizer, name, value),
            TypeError,
            f"{name}={value!r}: must be a number",
        )  # type: ignore[misc]
        for name in ("wd", "epsilon", "clip_gradient", "rescale_grad", "lr")
        for value in ("0.1", True, [1.0])
        if (name, value) not in (("lr", [1.0]), ("rescale_grad", True))  # True is the 1 that it was
    },
    "lr_mult of a parameter": (
        lambda c: setattr(c.optimizer, "param_dict", {2: type("P", (), {"lr_mult": math.nan, "wd_mult": 1.0})}),
        ValueError,
        "lr_mult of param_dict[2]=nan: must be finite",
    ),
    "wd_mult of a parameter": (
        lambda c: (
            setattr(c.optimizer, "wd", 0.1),
            setattr(c.optimizer, "param_dict", {2: type("P", (), {"lr_mult": 1.0, "wd_mult": -1.0})}),
        ),
        ValueError,
        "wd_mult of param_dict[2]=-1.0: must be >= 0",
    ),
    "a parameter without lr_mult": (
        lambda c: setattr(c.optimizer, "param_dict", {2: object()}),
        TypeError,
        "must have lr_mult and wd_mult",
    ),
    "a schedule that fails": (
        lambda c: setattr(c.optimizer, "lr_scheduler", lambda n: 1 / (2 - n)),
        ZeroDivisionError,
        "division by zero",
    ),
    "a schedule that gives NaN": (
        lambda c: setattr(c.optimizer, "lr_scheduler", lambda n: math.nan if n > 1 else 0.1),
        ValueError,
        "lr_scheduler(2)=nan: must be finite",
    ),
}


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
@pytest.mark.parametrize(("spoil", "error", "message"), CASES.values(), ids=CASES)
def test_update(klass: type[AdaGrad], fused: bool, spoil: Any, error: type[Exception], message: str) -> None:
    """One bad among good ones, first or last; the others plain float32 arrays alone, or of all kinds."""
    for others in ([np.float32] * 2, [np.float32, np.float16], [np.float32, BFLOAT16, "rows"]):
        for at in (0, 2):
            call = Call(klass(0.1, use_fused_step=fused, multi_precision=True), at=at)
            for i in range(3):
                call.add(
                    np.float32 if i == at or others[i % 2] == "rows" else others[i % 2],
                    rows="rows" in others and i == 1,
                )
            call.update()  # counts and histories that are not those of the start
            spoil(call)
            before = call.snapshot()
            with pytest.raises(error) as caught:
                call.update()
            duplicate = {0: "1, 1, 2", 2: "0, 1, 1"}[at]
            wanted = message.format(at=at, history=history_as(call), duplicate=duplicate)
            assert wanted in str(caught.value)
            assert call.snapshot() == before
            assert call.optimizer._resolved == {}


def test_zero_dimensional_weight_has_no_rows() -> None:
    weight = np.ones((), np.float32)
    for fused in (True, False):
        optimizer = GroupAdaGrad(use_fused_step=fused)
        with pytest.raises(ValueError, match=r"weight: shape \(\): row-wise history needs rows"):
            optimizer.create_state(0, weight)
        with pytest.raises(ValueError, match=r"weights\[0\]: shape \(\): row-wise history needs rows"):
            optimizer.update(0, weight, weight.copy(), np.zeros((), np.float32))
    assert weight == 1


def test_the_cause_is_short() -> None:
    """A message shows the start of a large value, on one line."""
    optimizer = AdaGrad()
    with pytest.raises(TypeError) as caught:
        optimizer.update(0, [1.0] * 100_000, np.ones(2), np.ones(2))
    assert len(str(caught.value)) < 250
    with pytest.raises(TypeError) as caught:
        optimizer.update([0], np.ones((9, 9)), [np.ones(2)], [np.ones(2)])
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- constructors

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
]


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTORS, ids=[m for _, _, m in CONSTRUCTORS])
def test_constructor(klass: type[AdaGrad], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        klass(**arguments)


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


def test_a_row_sparse_gradient_that_was_changed_is_named() -> None:
    weights = [np.ones((4, 3)), np.ones((4, 3))]
    grad = RowSparse(np.ones((2, 3)), np.array([0, 1]), (4, 3))
    grad.values = np.ones((1, 3))
    states = [np.zeros((4, 3)), np.zeros((4, 3))]
    with pytest.raises(ValueError, match=r"grads\[1\]: values: shape \(1, 3\): must be \(2, 3\)"):
        AdaGrad().update([0, 1], weights, [np.ones((4, 3)), grad], states)
    assert (weights[0] == 1).all()


def test_a_weight_of_one_number_in_many_places_is_refused_at_once() -> None:
    weight = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**40,), (0,))
    with pytest.raises(ValueError, match=r"weights\[0\]: strides \(0,\): overlaps itself"):
        AdaGrad().update(0, weight, weight, weight)


@pytest.mark.parametrize("fused", [True, False])
def test_row_ids_that_were_given_another_shape(fused: bool) -> None:
    grad = RowSparse(np.ones((2, 3)), np.array([0, 1]), (4, 3))
    grad.indices = np.array([[0, 1]])
    weight = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"grads\[0\]: indices: shape \(1, 2\): must have one dimension"):
        AdaGrad(use_fused_step=fused).update(0, weight, grad, np.zeros((4, 3)))
    assert (weight == 1).all()


def test_states_of_foreign_arrays() -> None:
    for optimizer in (AdaGrad(), GroupAdaGrad(), AdaGrad(multi_precision=True)):
        for bad in ([1.0], None, np.ones(3, np.int32), "w"):
            with pytest.raises(TypeError, match="weight"):
                optimizer.create_state_multi_precision(0, bad)


def test_updater() -> None:
    for bad in (None, AdaGrad, "adagrad"):
        with pytest.raises(TypeError, match=r"optimizer=.*must be an adagrad.Optimizer"):
            Updater(bad)  # type: ignore[arg-type]
    assert Updater(Optimizer()).states == {}


def test_aggregate_num_that_is_an_array() -> None:
    with pytest.raises(TypeError, match=r"^aggregate_num="):
        AdaGrad(aggregate_num=np.ones(2))


@pytest.mark.parametrize("fused", [True, False])
def test_a_reversed_weight_that_shares_memory(fused: bool) -> None:
    base = np.ones(8, np.float32)
    weights = [base[:4][::-1], base[:2]]
    optimizer = AdaGrad(use_fused_step=fused)
    with pytest.raises(ValueError, match=r"weights\[1\]: shares memory with weights\[0\]"):
        optimizer.update([0, 1], weights, [np.ones_like(w) for w in weights], [np.zeros_like(w) for w in weights])
    assert (base == 1).all()


def test_an_empty_view_of_a_weight_shares_no_byte() -> None:
    weight = np.ones(4, np.float32)
    weights = [weight, weight[2:][:0]]
    AdaGrad(1.0, epsilon=0.0, use_fused_step=False).update(
        [0, 1], weights, [np.ones_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    )
    assert (weight == 0).all()


def test_what_is_too_hard_to_decide_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(arrays, "WORK", 1)
    base = np.ones(400, np.float32)
    forms = ((2, (4, 4, 2), (132, 128, 68)), (0, (2, 2, 3), (20, 60, 24)))
    weights = [np.lib.stride_tricks.as_strided(base[start:], shape, strides) for start, shape, strides in forms]
    assert not np.shares_memory(*weights)
    with pytest.raises(ValueError, match="shares memory"):
        AdaGrad(use_fused_step=False).update(
            [0, 1], weights, [np.ones_like(w) for w in weights], [np.zeros_like(w) for w in weights]
        )
    assert (base == 1).all()


@pytest.mark.parametrize("fused", [True, False])
def test_the_end_of_a_history_is_another_weight(fused: bool) -> None:
    """A float32 history has twice as many bytes as its float16 weight."""
    base = np.ones(20, np.float32)
    weights, histories = [np.ones(12, np.float16), base[8:]], [base[:12], np.ones(12, np.float32)]
    with pytest.raises(ValueError, match="shares memory with"):
        AdaGrad(use_fused_step=fused).update([0, 1], weights, [np.ones_like(w) for w in weights], histories)
    assert (base == 1).all()


@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_within_a_gradient_that_holds_another_gradient_too(fused: bool) -> None:
    base = np.ones(100, np.float32)
    weights = [np.ones(100, np.float32), np.ones(10, np.float32), base[50:60]]
    grads = [base, base[10:20], np.ones(10, np.float32)]
    with pytest.raises(ValueError, match="shares memory with"):
        AdaGrad(use_fused_step=fused).update([0, 1, 2], weights, grads, [np.ones_like(w) for w in weights])
    assert (base == 1).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "beside rows"])
def test_a_gradient_is_the_last_history(rows: bool, fused: bool) -> None:
    """The last of the memory that is written to, before what is only read."""
    weights, grads, histories = ([np.ones(SHAPE, np.float32) for _ in range(3)] for _ in range(3))
    given: list[Any] = [histories[2], *grads[1:]]
    if rows:
        given[1] = RowSparse(np.ones((2, 3), np.float32), np.array([0, 2]), SHAPE)
    with pytest.raises(ValueError, match=r"history in states\[2\]: shares memory with grads\[0\]"):
        AdaGrad(use_fused_step=fused).update([0, 1, 2], weights, given, histories)
    assert all((array == 1).all() for array in weights + histories)
