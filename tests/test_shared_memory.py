"""Memory that an update refuses: read-only, overlapping itself, or shared with what the update writes to."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from adagrad import AdaGrad, GroupAdaGrad, RowSparse, arrays
from bad_updates import SHAPE, Call, Case, check_refused


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def broadcast(array: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(array, array.shape, (0, array.itemsize))


def twice(c: Call, weight: np.ndarray) -> None:
    """The good weight at 1, or a view of it, with a state of its own."""
    c.weight(lambda _: weight)
    c.state(lambda _: copy.deepcopy(c.states[1]))


def overlapping_grad(c: Call) -> None:
    base = np.ones(20, np.float32)
    c.weights[c.at], c.grads[c.at] = base[:12].reshape(SHAPE), base[8:].reshape(SHAPE)


def indices_in_weight(c: Call) -> None:
    c.rows(c.weights[c.at].reshape(-1).view(np.int32)[:0])
    c.grads[c.at].indices = c.weights[c.at].reshape(-1).view(np.int32)[:2]
    c.grads[c.at].values = np.ones((2, 3), np.float32)
    c.weights[c.at][...] = 0


CASES: dict[str, Case] = {
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
        r"weights[{at}]: strides (0, 4): elements share memory",
    ),
    "weight overlaps itself a little": (
        lambda c: c.weight(lambda w: np.lib.stride_tricks.as_strided(np.zeros(12, np.float32), SHAPE, (8, 4))),
        ValueError,
        r"weights[{at}]: strides (8, 4): elements share memory",
    ),
    "history overlaps itself": (
        lambda c: c.state(lambda h: np.lib.stride_tricks.as_strided(h, h.shape, (0, 4))),
        ValueError,
        r"history in states[{at}]: strides (0, 4): elements share memory",
    ),
    "weight listed twice": (lambda c: twice(c, c.weights[1]), ValueError, r"shares memory with weights["),
    "weight listed twice, reversed": (
        lambda c: twice(c, c.weights[1][::-1]),
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
}


@pytest.mark.parametrize("klass", [AdaGrad, GroupAdaGrad])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])
@pytest.mark.parametrize(("spoil", "error", "message"), CASES.values(), ids=CASES)
def test_update(klass: type[AdaGrad], fused: bool, spoil: Any, error: type[Exception], message: str) -> None:
    check_refused(klass, fused, spoil, error, message)


def test_a_weight_of_one_number_in_many_places_is_refused_at_once() -> None:
    weight = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**40,), (0,))
    with pytest.raises(ValueError, match=r"weights\[0\]: strides \(0,\): elements share memory"):
        AdaGrad().update(0, weight, weight, weight)


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
    monkeypatch.setattr(arrays, "MAX_WORK", 1)
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
