"""What optimizers and updaters are given in tests, and what an update makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import oracle
from adagrad import AdaGrad, GroupAdaGrad, RowSparse, Updater
from adagrad.lr_scheduler import FactorScheduler
from support import assert_same_bits, normal

CLASSES = [AdaGrad, GroupAdaGrad]
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "expression"])


# ----------------------------------------------------------------------------------------------------- for an optimizer


def weights_of(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(map(sum, shapes)))
    return [normal(rng, shape, dtype) for shape in shapes]


def sparse(weight: np.ndarray, rows: list[int], value: float = 1.0) -> RowSparse:
    return RowSparse(np.full((len(rows), *weight.shape[1:]), value, weight.dtype), np.array(rows), weight.shape)


def expected(weight: np.ndarray, *grads: np.ndarray, initial: float = 0.0, **hyper: Any) -> np.ndarray:
    history = np.full(weight.shape, initial, np.float64 if weight.dtype == np.float64 else np.float32)
    for grad in grads:
        weight, history, _ = oracle.dense(weight, grad, history, oracle.Hyper(**hyper))
    return weight


# ------------------------------------------------------------------------------------------------------- for an updater


class Plain(AdaGrad):
    """A user's class: an updater heeds its aggregate_num."""


def make_weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        normal(rng, shape, dtype)
        for shape, dtype in [((4, 3), "f4"), ((5,), "f8"), ((4, 2), "f2"), ((3, 3), "f4"), ((), "f4")]
    ]


def make_grads(t: int, weights: list[np.ndarray], rows: bool = True) -> list[Any]:
    rng = np.random.default_rng(100 + t)
    grads: list[Any] = [normal(rng, w.shape, w.dtype) for w in weights]
    if rows:
        grads[3] = RowSparse(normal(rng, (4, 3), "f4"), rng.integers(0, 3, 4), (3, 3))
    return grads


INDICES: list[Any] = [0, "one", 2, 3, "four"]


def run(updater: Updater, weights: list[np.ndarray], steps: range, *, together: bool = True) -> None:
    for t in steps:
        grads = make_grads(t, weights)
        if together:
            updater(INDICES, grads, weights)
        else:
            for index, grad, weight in zip(INDICES, grads, weights, strict=True):
                updater(index, grad, weight)


def optimizer(**options: Any) -> AdaGrad:
    schedule = options.pop("lr_scheduler", None) or FactorScheduler(step=2, factor=0.5, base_lr=0.3)
    kind = AdaGrad if options.get("aggregate_num") is None else Plain
    made = kind(None, lr_scheduler=schedule, wd=0.01, multi_precision=True, **options)
    made.set_lr_mult({0: 0.5, "one": 2.0})
    return made


def assert_same_states(one: dict[Any, Any], two: dict[Any, Any]) -> None:
    assert [(type(k), k) for k in one] == [(type(k), k) for k in two]
    for index, state in one.items():
        pairs = zip(state, two[index], strict=True) if isinstance(state, tuple) else [(state, two[index])]
        for a, b in pairs:
            assert_same_bits(a, b, f"state {index!r}")
