"""Bad arguments of an update: the right exception, a message that names argument and value, and nothing changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, GroupAdaGrad, RowSparse
from adagrad.kernels.cpu import dense as cpu_dense, rows as cpu_rows, strided
from bad_updates import SHAPE, Call, Case, check_refused
from support import BFLOAT16, assert_same_bits


class ArrayLike:
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.ones(SHAPE, np.float32)

    def __repr__(self) -> str:
        return "<an array of another library>"


def all_of_integers(c: Call) -> None:
    c.weight(lambda w: w.astype(np.int32))
    c.grad(lambda g: g.astype(np.int32))
    c.state(lambda h: h.astype(np.int32))


def longer_indices(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].indices = np.array([0, 1, 2, 3])


def resized_values(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].values.resize((1, 3), refcheck=False)


def float_indices(c: Call) -> None:
    c.rows([0, 1])
    c.grads[c.at].indices = np.array([0.0, 1.0])


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
        lambda c: (c.low_precision(lambda m, h: (m, h)), c.grad(lambda g: g.astype(BFLOAT16))),
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
        lambda c: c.low_precision(lambda m, h: (m, h.astype(np.float16))),
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
    "one index": (lambda c: setattr(c, "indices", 0), TypeError, r"indices=0: must be a list, like weights"),
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
        r"history in states[{at}]=None: must be a NumPy array or a torch tensor, as create_state returns it",
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
    check_refused(klass, fused, spoil, error, message)


def test_zero_dimensional_weight_has_no_rows() -> None:
    weight = np.ones((), np.float32)
    for fused in (True, False):
        optimizer = GroupAdaGrad(use_fused_step=fused)
        with pytest.raises(ValueError, match=r"weight: shape \(\): row-wise history needs rows"):
            optimizer.create_state(0, weight)
        with pytest.raises(ValueError, match=r"weights\[0\]: shape \(\): row-wise history needs rows"):
            optimizer.update(0, weight, weight.copy(), np.zeros((), np.float32))
    assert weight == 1


def test_states_of_foreign_arrays() -> None:
    for optimizer in (AdaGrad(), GroupAdaGrad(), AdaGrad(multi_precision=True)):
        for bad in ([1.0], None, np.ones(3, np.int32), "w"):
            with pytest.raises(TypeError, match="weight"):
                optimizer.create_state_multi_precision(0, bad)


def test_a_row_sparse_gradient_that_was_changed_is_named() -> None:
    weights = [np.ones((4, 3)), np.ones((4, 3))]
    grad = RowSparse(np.ones((2, 3)), np.array([0, 1]), (4, 3))
    grad.values = np.ones((1, 3))
    states = [np.zeros((4, 3)), np.zeros((4, 3))]
    with pytest.raises(ValueError, match=r"grads\[1\]: values: shape \(1, 3\): must be \(2, 3\)"):
        AdaGrad().update([0, 1], weights, [np.ones((4, 3)), grad], states)
    assert (weights[0] == 1).all()


@pytest.mark.parametrize("fused", [True, False])
def test_row_ids_that_were_given_another_shape(fused: bool) -> None:
    grad = RowSparse(np.ones((2, 3)), np.array([0, 1]), (4, 3))
    grad.indices = np.array([[0, 1]])
    weight = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"grads\[0\]: indices: shape \(1, 2\): must have one dimension"):
        AdaGrad(use_fused_step=fused).update(0, weight, grad, np.zeros((4, 3)))
    assert (weight == 1).all()


def test_the_cause_is_short() -> None:
    """A message shows the start of a large value, on one line."""
    optimizer = AdaGrad()
    with pytest.raises(TypeError) as caught:
        optimizer.update(0, [1.0] * 100_000, np.ones(2), np.ones(2))
    assert len(str(caught.value)) < 250
    with pytest.raises(TypeError) as caught:
        optimizer.update([0], np.ones((9, 9)), [np.ones(2)], [np.ones(2)])
    assert "\n" not in str(caught.value)


def second(kind: str) -> tuple[Any, Any, Any]:
    """A weight in float64 that the general path takes, its gradient and its history."""
    shape = (3, strided.TILE + 1) if kind == "long rows" else (3, 4)
    if kind in ("dense", "rows"):
        weight, grad, history = (np.ones(shape) for _ in range(3))
        weight = weight.view(np.recarray) if kind == "dense" else weight  # any class but ndarray
    else:
        weight, grad, history = (np.ones((3, 2 * shape[1]))[:, ::2] for _ in range(3))
    if kind in ("rows", "strided rows"):
        grad = RowSparse(np.ones((2, 4)), np.array([1, 1]), shape)
    return weight, grad, np.ones((3, 1)) if kind == "long rows" else history


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("dense", cpu_dense, "kernel"),
        ("strided", cpu_dense, "kernel"),
        ("long rows", cpu_dense, "row_part_kernel"),
        ("rows", cpu_rows, "kernel"),
        ("rows", cpu_rows, "grouping"),
        ("strided rows", cpu_rows, "kernel"),
        ("strided rows", cpu_rows, "grouping"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_changes_nothing(
    kind: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled at first use, for seconds, perhaps in the middle of training: all before the first runs."""
    optimizer = (GroupAdaGrad if kind == "long rows" else AdaGrad)(0.1)
    first = [np.ones((3, 8), np.float32)[:, ::2] for _ in range(3)]
    if kind == "long rows":
        first[2] = np.ones((3, 1), np.float32)
    weights, grads, histories = zip(first, second(kind), strict=True)
    compiled = getattr(module, name)

    def fails_for_float64(*formats: Any) -> int:
        if "float64" in formats:
            raise ZeroDivisionError("no compiler")
        return int(compiled(*formats))

    before = [np.array(array) for array in (*weights, *histories)]
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails_for_float64)
        with pytest.raises(ZeroDivisionError):
            optimizer.update([0, 1], list(weights), list(grads), list(histories))
    for was, now in zip(before, (*weights, *histories), strict=True):
        assert_same_bits(was, np.array(now))
    assert optimizer._index_update_count == {}
    optimizer.update([0, 1], list(weights), list(grads), list(histories))
    assert optimizer._index_update_count == {0: 1, 1: 1}
    assert not any(np.array_equal(was, now) for was, now in zip(before, (*weights, *histories), strict=True))
