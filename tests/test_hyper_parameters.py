"""What hyper-parameters do to an update, given to a constructor or set between steps, and how those set are checked."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import oracle
from adagrad import AdaGrad, GroupAdaGrad, Optimizer
from support import BFLOAT16, assert_same_bits, normal
from training import FUSED, expected


def after(optimizer: Optimizer, weight: np.ndarray, *grads: Any, index: Any = 0) -> np.ndarray:
    """A copy of ``weight`` after updates with ``grads``."""
    weight = weight.copy()
    state = optimizer.create_state_multi_precision(index, weight)
    for grad in grads:
        optimizer.update_multi_precision(index, weight, grad, state)
    return weight


# ---------------------------------------------------------------------------------------------------------------- given

ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning_rate": ({"learning_rate": 0.3}, {"lr": 0.3}),
    "learning_rate 0": ({"learning_rate": 0}, {"lr": 0.0}),
    "learning_rate None": ({"learning_rate": None}, {"lr": 0.01}),
    "epsilon": ({"epsilon": 0.01}, {"lr": 0.01, "epsilon": 0.01}),
    "epsilon 0": ({"epsilon": 0}, {"lr": 0.01, "epsilon": 0.0}),
    "initial_accumulator_value": ({"initial_accumulator_value": 0.4}, {"lr": 0.01, "initial": 0.4}),
    "rescale_grad": ({"rescale_grad": -1 / 3}, {"lr": 0.01, "rescale_grad": -1 / 3}),
    "wd": ({"wd": 0.1}, {"lr": 0.01, "wd": 0.1}),
    "clip_gradient": ({"clip_gradient": 0.2}, {"lr": 0.01, "clip_gradient": 0.2}),
    "NumPy numbers": ({"learning_rate": np.float32(0.5), "wd": np.int64(1)}, {"lr": 0.5, "wd": 1.0}),
    "fractions": ({"learning_rate": Fraction(1, 3), "clip_gradient": 1}, {"lr": 1 / 3, "clip_gradient": 1.0}),
}


@FUSED
@pytest.mark.parametrize(("arguments", "hyper"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_hyper_parameters_do_what_they_say(arguments: Any, hyper: Any, fused: bool) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        weight, grads = normal(rng, (3, 4), dtype), [normal(rng, (3, 4), dtype) for _ in range(3)]
        found = after(AdaGrad(use_fused_step=fused, **arguments), weight, *grads)
        assert_same_bits(found, expected(weight, *grads, **hyper))


@FUSED
def test_group_adagrad(fused: bool) -> None:
    rng = np.random.default_rng(1)
    weight, grads = normal(rng, (6, 20), np.float32), [normal(rng, (6, 20), np.float32) for _ in range(3)]
    optimizer = GroupAdaGrad(0.1, wd=0.1, initial_accumulator_value=0.5, use_fused_step=fused)
    state = optimizer.create_state(0, weight)
    assert state.shape == (6, 1)
    assert (state == 0.5).all()
    want, history = weight, state.copy()
    for grad in grads:
        want, history, _ = oracle.dense(want, grad, history, oracle.Hyper(lr=0.1, wd=0.1, row_wise=True))
    assert_same_bits(after(optimizer, weight, *grads), want)


@pytest.mark.parametrize("multi_precision", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@FUSED
def test_multi_precision(multi_precision: bool, dtype: Any, fused: bool) -> None:
    rng = np.random.default_rng(2)
    weight, grads = normal(rng, (5,), dtype), [normal(rng, (5,), dtype) for _ in range(4)]
    optimizer = AdaGrad(0.01, wd=0.01, multi_precision=multi_precision, use_fused_step=fused)
    want, history = weight, np.zeros(5, np.float32)
    master = weight.astype(np.float32) if multi_precision else None
    for grad in grads:
        want, history, master = oracle.dense(want, grad, history, oracle.Hyper(lr=0.01, wd=0.01), master)
    assert_same_bits(after(optimizer, weight, *grads), want)


def test_small_steps_add_up_in_the_master_copy() -> None:
    weight, grads = np.ones(1, np.float16), [np.ones(1, np.float16)] * 50
    assert after(AdaGrad(1e-4, multi_precision=True), weight, *grads)[0] < 1
    assert after(AdaGrad(1e-4, multi_precision=False), weight, *grads)[0] == 1


# ---------------------------------------------------------------------------------------------------- set between steps


def test_attributes_may_change_between_steps() -> None:
    rng = np.random.default_rng(3)
    for fused in (True, False):
        optimizer = AdaGrad(0.1, use_fused_step=fused)
        weight = normal(rng, (6,), np.float32)
        state = optimizer.create_state(0, weight)
        changes: list[dict[str, Any]] = [
            {}, {"wd": 0.1}, {"rescale_grad": 0.5}, {"clip_gradient": 0.3}, {"epsilon": 0.1}, {"clip_gradient": None},
            {"lr": 0.2},
        ]  # fmt: skip
        hyper = oracle.Hyper(lr=0.1)
        for change in changes:
            for name, value in change.items():
                if name == "lr":
                    optimizer.set_learning_rate(value)
                else:
                    setattr(optimizer, name, value)
                hyper = oracle.Hyper(**(vars(hyper) | {name: value}))
            grad = normal(rng, (6,), np.float32)
            want = oracle.dense(weight, grad, state, hyper)
            optimizer.update(0, weight, grad, state)
            assert_same_bits(weight, want[0], str(change))
            assert_same_bits(state, want[1], str(change))
        optimizer.use_fused_step = not fused
        optimizer.update(0, weight, np.ones(6, np.float32), state)
        optimizer.wd = -1.0
        with pytest.raises(ValueError, match=r"wd=-1\.0: must be >= 0"):
            optimizer.update(0, weight, np.ones(6, np.float32), state)
        assert optimizer.num_update == len(changes) + 1


def test_what_equals_a_good_value_need_not_be_one() -> None:
    """True equals 1 and 1.0, and 0.0 equals -0.0."""
    optimizer, weight, history = AdaGrad(0.5, epsilon=1.0), np.ones(2, np.float32), np.zeros(2, np.float32)

    def update(index: Any) -> None:
        optimizer.update(index, weight, np.ones(2, np.float32), history)

    update(1)
    for index in (True, 1.0):
        with pytest.raises(TypeError, match=f"index={index}: must be an integer or a string"):
            update(index)
    optimizer.epsilon = True
    with pytest.raises(TypeError, match="epsilon=True: must be a number, not bool"):
        update(1)
    optimizer.epsilon, optimizer.epsilon_inside = 1.0, 0  # type: ignore[assignment]
    with pytest.raises(TypeError, match="epsilon_inside=0: must be"):
        update(1)
    for lr in (0.0, -0.0, 0.0):
        weights = [np.array([-0.0], np.float32) for _ in range(2)]
        for each, fused in zip(weights, (True, False), strict=True):
            AdaGrad(lr, use_fused_step=fused).update(0, each, np.ones(1, np.float32), np.zeros(1, np.float32))
        assert_same_bits(*weights, str(lr))


def test_rescale_grad_of_minus_zero() -> None:
    signs = []
    for before in (0.0, -0.0):
        optimizer = AdaGrad(rescale_grad=before)
        for now in (before, -0.0):
            optimizer.rescale_grad = now
            weight = np.full(2, -0.0)
            optimizer.update(0, weight, np.array([-1.0, 1.0]), np.zeros(2))
        signs.append(np.signbit(weight).tolist())
    assert signs[0] == signs[1]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("initial_accumulator_value", math.nan, ValueError),
        ("initial_accumulator_value", -1.0, ValueError),
        ("initial_accumulator_value", "x", TypeError),
        ("wd", True, TypeError),
        ("wd", -1.0, ValueError),
        ("wd", "x", TypeError),
        ("rescale_grad", np.ones(2), TypeError),
        ("clip_gradient", np.ones(2), TypeError),
        ("epsilon", np.ones(2), TypeError),
    ],
)
@pytest.mark.parametrize("multipliers", [{}, {7: 1.0}, {0: 0.0}])
def test_attributes_that_were_set_are_checked_by_name(
    name: str, value: Any, error: type[Exception], multipliers: Any
) -> None:
    optimizer, weight = AdaGrad(), np.ones(3, np.float32)
    optimizer.update(0, weight, np.ones(3, np.float32), optimizer.create_state(0, weight))
    optimizer.set_wd_mult(multipliers)
    before = weight.copy()
    setattr(optimizer, name, value)
    with pytest.raises(error, match=f"^{name}="):
        optimizer.update(0, weight, np.ones(3, np.float32), optimizer.create_state(0, weight))
    assert_same_bits(weight, before)
